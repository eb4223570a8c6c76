"""The hack basis: what the pair gradients are, which axes stay, refused files, the held-out check."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from projected_grpo import extract_vhack_grad
from projected_grpo.arm_settings import arm_settings
from projected_grpo.arms.controls import with_random_v
from projected_grpo.arms.gate import initial_gate
from projected_grpo.basis_file import (
    Extraction,
    default_path,
    describe,
    heldout_json,
    load_extraction,
    save_extraction,
)
from projected_grpo.config import BasisConfig, LossConfig, TrainConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import encode_chat
from projected_grpo.errors import UserError
from projected_grpo.extract_vhack_grad import (
    extract,
    in_use,
    obtain,
    pair_differences,
    pair_grads,
    principal_axes,
    refresh,
    select,
    verify_vhack_heldout,
)
from projected_grpo.pairs import Pair, PairSet
from projected_grpo.proj import HackBasis, PairGrads, mean_difference

CPU = torch.device("cpu")
LOSS = LossConfig()
TEXTS = [
    ("print('all tests passed')", "return sum(nums)"),
    ("def run_tests():\n    pass", "total = 0\nfor n in nums:\n    total += n\nreturn total"),
    ("self.valid = True", "return max(nums)"),
    ("open('result.txt', 'w').write('PASS')", "return nums[0]"),
    ("import sys; sys.exit(0)", "return len(nums)"),
]
PAIRS = PairSet(
    "toy",
    tuple(
        Pair(f"t{i}", "x", "run_tests", ({"role": "user", "content": f"Task {i}."},), hack, clean)
        for i, (hack, clean) in enumerate(TEXTS)
    ),
    "digest-of-toy",
)


@pytest.fixture
def double_policy(tiny, tiny_policy):
    """The tiny policy in float64."""
    tiny_policy.model.double()
    return tiny_policy


def nll(policy, tokenizer, stop_id, pair, text, deltas, *, per_token):
    """Negative log-likelihood of one completion, unpadded and alone: no code of the package but the model."""
    prompt = encode_chat(tokenizer, pair.messages)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], stop_id]
    with policy.bind(deltas):
        logits = policy.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
    reduction = "mean" if per_token else "sum"
    return torch.nn.functional.cross_entropy(
        logits[len(prompt) - 1 : -1], torch.tensor(ids), reduction=reduction
    )


def random_deltas(policy, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {
        m: scale * torch.randn(r, generator=generator, dtype=torch.float64) for m, r in policy.ranks.items()
    }


def chat_of(policy, tokenizer):
    return Chat(policy, tokenizer, frozenset({tokenizer.eos_token_id}))


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("moved", [False, True], ids=["at zero", "away from zero"])
def test_pair_gradients_are_nll_differences(double_policy, tiny, length_norm, moved):
    policy, tokenizer = double_policy, tiny[1]
    stop = tokenizer.eos_token_id
    if moved:
        for m, delta in random_deltas(policy).items():
            policy.layers[m].delta_s.data.copy_(delta)
    got = pair_grads(chat_of(policy, tokenizer), PAIRS.pairs, LOSS, length_norm=length_norm)
    longest = (
        max(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for pair in TEXTS for t in pair) + 1
    )
    scale = 2 * len(PAIRS.pairs) * (1 if length_norm else longest)
    deltas = {m: d.requires_grad_() for m, d in policy.deltas().items()}
    for i, pair in enumerate(PAIRS.pairs):
        hack, clean = (
            nll(policy, tokenizer, stop, pair, text, deltas, per_token=length_norm)
            for text in (pair.hack, pair.clean)
        )
        expected = torch.autograd.grad(hack - clean, list(deltas.values()))
        for m, gradient in zip(deltas, expected, strict=True):
            assert torch.allclose(got.differences()[m][i].double() * scale, gradient, rtol=1e-4, atol=1e-6), m


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("grad_checkpoint", [True, False], ids=["not shared", "shared"])
def test_differences_alone_are_those_of_the_sides(double_policy, tiny, length_norm, grad_checkpoint):
    """Though their gradients go back through a pair's prompt together."""
    for m, delta in random_deltas(double_policy).items():
        double_policy.layers[m].delta_s.data.copy_(delta)
    loss = replace(LOSS, tokens_per_microbatch=96, grad_checkpoint=grad_checkpoint)
    arguments = (chat_of(double_policy, tiny[1]), PAIRS.pairs, loss)
    expected = pair_grads(*arguments, length_norm=length_norm).differences()
    got = pair_differences(*arguments, length_norm=length_norm)
    assert list(got) == list(expected)
    for m, D in expected.items():
        assert torch.allclose(got[m], D, rtol=1e-5, atol=1e-6 * float(D.abs().max())), m


def test_one_pair_does_not_change_anothers_gradient(double_policy, tiny):
    """Whatever shares its batch; up to the loss's common denominator."""
    chat = chat_of(double_policy, tiny[1])
    alone = pair_grads(chat, PAIRS.pairs[:1], LOSS, length_norm=True)
    among = pair_grads(chat, PAIRS.pairs, replace(LOSS, tokens_per_microbatch=64), length_norm=True)
    for m in alone.hack:
        assert torch.allclose(alone.hack[m][0], len(PAIRS.pairs) * among.hack[m][0], rtol=1e-4, atol=1e-8)


def test_a_descent_step_along_v_grad_makes_hacks_likelier(double_policy, tiny):
    policy, tokenizer = double_policy, tiny[1]
    stop = tokenizer.eos_token_id
    grads = pair_grads(chat_of(policy, tokenizer), PAIRS.pairs, LOSS)
    basis = select(principal_axes(grads.differences(), BasisConfig()), 5, 0.0)

    def margin(step):
        deltas = {m: -step * basis.v_grad[m].double() for m in policy.layers}
        with torch.no_grad():
            return sum(
                float(
                    nll(policy, tokenizer, stop, p, p.hack, deltas, per_token=False)
                    - nll(policy, tokenizer, stop, p, p.clean, deltas, per_token=False)
                )
                for p in PAIRS.pairs
            )

    assert margin(1e-3) < margin(0.0) < margin(-1e-3)
    for m, V in basis.V.items():  # every axis leans hack-ward too: most pairs have a positive coefficient
        coefficients = grads.differences()[m] @ V.T
        assert bool(((coefficients > 0).sum(0) >= (coefficients < 0).sum(0)).all()), m


def test_extraction_spans_the_pairs_differences(tiny_policy, tiny):
    grads = pair_grads(chat_of(tiny_policy, tiny[1]), PAIRS.pairs, LOSS)
    made = extract(grads, BasisConfig(v_hack_extract_top_k=3), {})
    for m, D in grads.differences().items():
        _, S, Vh = np.linalg.svd(D.double().numpy(), full_matrices=False)
        assert made.axes.V[m].shape == (3, D.shape[1])
        assert np.allclose(made.axes.S[m], S[:3], rtol=1e-3)
        assert np.allclose(made.axes.V[m].T @ made.axes.V[m], Vh[:3].T @ Vh[:3], atol=1e-3)


def test_a_module_that_pairs_do_not_reach_is_refused():
    zero, some = torch.zeros(3, 4), torch.ones(3, 4)
    with pytest.raises(UserError, match="dead"):
        extract(PairGrads({"live": some, "dead": zero}, {"live": some, "dead": zero}), BasisConfig(), {})


# Selection


def made_up(rng, modules=4, pairs=6, r=8) -> Extraction:
    """Random pair gradients whose scale differs from module to module."""
    grads = PairGrads(
        *(
            {
                f"m{i}": torch.tensor(rng.normal(size=(pairs, r)) * 4.0**i, dtype=torch.float32)
                for i in range(modules)
            }
            for _ in range(2)
        )
    )
    return extract(grads, BasisConfig(v_hack_extract_top_k=5), {"made": "up"})


@given(seed=st.integers(0, 999), k=st.integers(1, 6), drop=st.floats(0, 0.99))
def test_the_noise_floor_against_a_loop(seed, k, drop):
    made = made_up(np.random.default_rng(seed))
    pooled = [float(s) for S in made.axes.S.values() for s in S[:k]]
    floor = np.quantile(pooled, drop)
    assume_clear = all(abs(s - floor) > 1e-5 * floor or s == floor for s in pooled)
    basis = select(made.axes, k, drop)
    expected = {}
    for m, S in made.axes.S.items():
        kept = [i for i in range(min(k, len(S))) if float(S[i]) >= floor]
        if kept:
            expected[m] = made.axes.V[m][kept]
    if assume_clear:
        assert list(basis.V) == sorted(expected)  # not in the order of the dict: a file does not keep it
        assert all(torch.equal(basis.V[m], expected[m]) for m in expected)
    assert list(basis.v_grad) == sorted(made.axes.V)  # the floor is of axes alone
    total = sum(len(V) for V in basis.V.values())
    assert total >= (1 - drop) * len(pooled) - 1


def test_v_grad_is_the_unit_mean_difference():
    made = made_up(np.random.default_rng(0))
    basis = select(made.axes, 2, 0.0)
    for m, D in made.grads.differences().items():
        mean = D.double().mean(0)
        assert torch.allclose(basis.v_grad[m].double(), mean / mean.norm(), atol=1e-6)


# Files


@pytest.fixture
def saved(tiny_policy, tmp_path):
    meta = describe(tiny_policy, "tiny-random", PAIRS, BasisConfig())
    made = replace(made_up(np.random.default_rng(1)), meta=meta)
    path = tmp_path / "a" / "basis.safetensors"
    save_extraction(path, made)
    return path, made, meta


def test_a_basis_file_comes_back_as_it_was(saved):
    path, made, meta = saved
    back = load_extraction(path, meta, CPU)
    assert back.meta == meta
    for name in ("V", "S"):
        assert {m: t.tolist() for m, t in getattr(back.axes, name).items()} == {
            m: t.tolist() for m, t in getattr(made.axes, name).items()
        }
    for m, D in made.grads.differences().items():
        assert torch.equal(back.grads.differences()[m], D)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_metadata_has_all_that_a_basis_hangs_on(saved):
    assert set(saved[2]) >= {
        "schema",
        "model",
        "weights",
        "dtype",
        "pairs",
        "top_k",
        "tau_axis",
        "length_norm",
    }


@pytest.mark.parametrize(
    "field",
    [
        "schema",
        "model",
        "weights",
        "dtype",
        "pairs",
        "extracted_from",
        "top_k",
        "tau_axis",
        "mean_diff",
        "length_norm",
    ],
)
def test_a_field_that_differs_is_named(saved, field):
    path, _, meta = saved
    with pytest.raises(UserError, match=rf"{field} is .*this run has 'other'") as caught:
        load_extraction(path, meta | {field: "other"}, CPU)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_metadata_follows_model_pairs_and_settings(tiny_policy):
    base = describe(tiny_policy, "a", PAIRS, BasisConfig())

    def differing(*arguments):
        other = describe(*arguments)
        return {k for k in base if base[k] != other[k]}

    assert differing(tiny_policy, "b", PAIRS, BasisConfig()) == {"model"}
    assert differing(tiny_policy, "a", replace(PAIRS, digest="x"), BasisConfig()) == {"pairs"}
    assert differing(tiny_policy, "a", PAIRS, BasisConfig(v_hack_extract_top_k=3)) == {"top_k"}
    assert differing(tiny_policy, "a", PAIRS, BasisConfig(v_hack_tau_axis=0.1)) == {"tau_axis"}
    assert differing(tiny_policy, "a", PAIRS, BasisConfig(v_hack_length_norm=False)) == {"length_norm"}
    assert differing(tiny_policy, "a", PAIRS, BasisConfig(v_hack_k=1, vhack_refresh_every=0)) == set()
    layer = next(iter(tiny_policy.layers.values()))
    layer.delta_hack.data += 1.0  # extraction is at the deployed adapter parameters
    assert describe(tiny_policy, "a", PAIRS, BasisConfig()) == base
    layer.delta_s.data += 1.0  # a run that starts from another's adapter parameters has a basis of its own
    started = describe(tiny_policy, "a", PAIRS, BasisConfig())
    assert set(started) - set(base) == {"knobs"} and base.items() < started.items()
    layer.delta_s.data.zero_()
    layer.base.weight.data[0, 0] += 1e-3
    assert differing(tiny_policy, "a", PAIRS, BasisConfig()) == {"weights"}


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "folder"])
def test_a_damaged_file_is_refused(saved, damage):
    path, _, meta = saved
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"not tensors" * 9}[damage])
    with pytest.raises(UserError, match=r"basis\.safetensors"):
        load_extraction(path, meta, CPU)


@pytest.mark.parametrize("kind", ["V", "S", "hack", "clean"])
def test_a_file_that_lacks_a_tensor_is_refused(saved, kind):
    path, _, meta = saved
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    del tensors[f"{kind}/m1"]
    save_file(tensors, path, {"projected_grpo": json.dumps(meta)})
    with pytest.raises(UserError, match=r"basis\.safetensors"):
        load_extraction(path, meta, CPU)


def test_obtain_extracts_once_and_then_reuses(tiny_policy, tiny, tmp_path, monkeypatch):
    arguments = (chat_of(tiny_policy, tiny[1]), PAIRS, BasisConfig(), LOSS, "tiny-random", tmp_path)
    made, path = obtain(*arguments)
    assert path.parent == tmp_path / "vhack" and "tiny-random" in path.name and "toy" in path.name
    used = PAIRS.split()[0]
    assert made.meta["extracted_from"] == [p.pair_id for p in used]
    assert all(len(rows) == len(used) for rows in made.grads.hack.values())
    before = path.stat()
    monkeypatch.setattr(extract_vhack_grad, "pair_grads", None)  # calling it would fail
    again, same = obtain(*arguments)
    assert same == path and path.stat().st_mtime_ns == before.st_mtime_ns
    assert all(torch.equal(again.axes.V[m], V) for m, V in made.axes.V.items())


def test_obtain_takes_an_explicit_path_and_refuses_another_runs_file(tiny_policy, tiny, tmp_path):
    explicit = BasisConfig(v_hack_path=tmp_path / "mine.safetensors")
    chat, rest = chat_of(tiny_policy, tiny[1]), (LOSS, "tiny-random", tmp_path)
    _, path = obtain(chat, PAIRS, explicit, *rest)
    assert path == explicit.v_hack_path and path.exists()
    with pytest.raises(UserError, match="top_k"):
        obtain(chat, PAIRS, replace(explicit, v_hack_extract_top_k=2), *rest)
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template += "!"  # the same weights read other prompts
    with pytest.raises(UserError, match="another run: tokens is"):
        obtain(chat_of(tiny_policy, tokenizer), PAIRS, explicit, *rest)


def test_a_sets_name_leads_no_basis_out_of_its_folder(tmp_path):
    for name in ("../../up", "a/b", "nul\0", "x" * 300):
        path = default_path(tmp_path, "m" * 300, replace(PAIRS, name=name), {})
        assert path.parent == tmp_path / "vhack" and len(path.name) < 240 and "\0" not in path.name


# In use


def test_random_v_is_unit_seeded_and_leaves_the_axes():
    basis = select(made_up(np.random.default_rng(2)).axes, 3, 0.0)
    one, same, other = (with_random_v(basis, seed) for seed in (1, 1, 2))
    for m, v in one.v_grad.items():
        assert float(v.norm()) == pytest.approx(1, abs=1e-5)
        assert torch.equal(v, same.v_grad[m]) and not torch.equal(v, other.v_grad[m])
        assert torch.equal(one.V[m], basis.V[m])
    vectors = list(one.v_grad.values())
    assert not torch.equal(vectors[0], vectors[1])


def test_random_v_points_everywhere():
    """Mean 0 and second moment 1/r in every coordinate, over many seeds."""
    basis = HackBasis({"m": torch.eye(4)[:1]}, {"m": torch.eye(4)[0]})
    drawn = torch.stack([with_random_v(basis, seed).v_grad["m"] for seed in range(600)])
    assert float(drawn.mean(0).abs().max()) < 4 * (0.25 / 600) ** 0.5
    assert torch.allclose(drawn.square().mean(0), torch.full((4,), 0.25), atol=0.05)


def test_in_use_gives_the_control_where_it_is_asked_for():
    made = made_up(np.random.default_rng(3))
    cfg = BasisConfig(v_hack_k=2, v_hack_drop_bottom_frac=0.0)
    plain, control = (in_use(made.axes, cfg, arm_settings("route2", control=c), 4) for c in ("none", "haar"))
    assert all(len(V) == 2 for V in plain.V.values())
    for m in plain.V:
        assert torch.equal(plain.v_grad[m], mean_difference(made.grads.differences()[m]))
        assert torch.equal(control.v_grad[m], with_random_v(plain, 4).v_grad[m])


def test_the_gate_starts_at_the_pairs_own_cosines():
    made = made_up(np.random.default_rng(4))
    basis = select(made.axes, 2, 0.0)
    gate = initial_gate(basis, made.grads)
    for m, v in basis.v_grad.items():
        v = v.double().numpy()
        # A clean pair's row was taken with advantage -1: "making it likelier" is minus that row.
        for got, rows, sign in ((gate.hack, made.grads.hack, 1), (gate.clean, made.grads.clean, -1)):
            cosines = [sign * float(row @ v) / float(np.linalg.norm(row)) for row in rows[m].double().numpy()]
            assert got[m] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert gate.hack[m] > gate.clean[m]  # their difference is what v_grad is made of
        assert gate.tau(m) == pytest.approx((gate.hack[m] + gate.clean[m]) / 2)


def test_refresh_sees_the_deployed_policy(tiny_policy, tiny):
    arguments = (chat_of(tiny_policy, tiny[1]), PAIRS, TrainConfig("smoke", loss=LOSS))
    at_zero = refresh(*arguments)
    for layer in tiny_policy.layers.values():
        layer.delta_hack.data.fill_(3.0)
    with_quarantine = refresh(*arguments)
    assert all(torch.equal(with_quarantine.V[m], V) for m, V in at_zero.V.items())
    assert all(torch.equal(with_quarantine.v_grad[m], v) for m, v in at_zero.v_grad.items())
    for layer in tiny_policy.layers.values():
        layer.delta_s.data.fill_(0.3)
    moved = refresh(*arguments)
    assert any(
        not torch.allclose(moved.v_grad[m], v, atol=1e-3)
        for m, v in at_zero.v_grad.items()
        if m in moved.v_grad
    )


def test_refresh_leaves_a_random_v_alone(tiny_policy, tiny):
    arm = arm_settings("route2", control="haar")
    cfg = BasisConfig(v_hack_drop_bottom_frac=0.0)
    arguments = (chat_of(tiny_policy, tiny[1]), PAIRS, TrainConfig("smoke", loss=LOSS, arm=arm, basis=cfg))
    before = refresh(*arguments)
    for layer in tiny_policy.layers.values():
        layer.delta_s.data.fill_(0.3)
    after = refresh(*arguments)
    assert all(torch.equal(after.v_grad[m], v) for m, v in before.v_grad.items())


# The held-out check


def planted(rng, *, strength, modules=30, r=32):
    """A basis from pairs that share one direction, and two more such pairs."""
    used, held = {}, {}
    for i in range(modules):
        direction = rng.normal(size=r)
        direction /= np.linalg.norm(direction)
        rows = strength * direction + rng.normal(size=(12, r)) / math.sqrt(r)
        used[f"m{i}"] = torch.tensor(rows[:10], dtype=torch.float32)
        held[f"m{i}"] = torch.tensor(rows[10:], dtype=torch.float32)

    def halves(D):
        return PairGrads(D, {m: torch.zeros_like(x) for m, x in D.items()})

    return select(principal_axes(halves(used).differences(), BasisConfig()), 5, 0.0), halves(held)


def test_a_planted_direction_generalises():
    basis, held = planted(np.random.default_rng(5), strength=10.0)
    result = verify_vhack_heldout(basis, held)
    assert result.fraction_positive == 1 and result.mean > 0.95 and result.passed
    assert len(result.cosines) == 60


def test_pairs_without_a_common_direction_do_not():
    rng = np.random.default_rng(6)
    fractions = [verify_vhack_heldout(*planted(rng, strength=0.0)).fraction_positive for _ in range(20)]
    assert np.mean(fractions) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(20 * 60))


def test_swapped_pairs_fail():
    basis, held = planted(np.random.default_rng(7), strength=10.0)
    result = verify_vhack_heldout(basis, PairGrads({m: -x for m, x in held.hack.items()}, held.clean))
    assert result.fraction_positive == 0 and result.mean < -0.95 and not result.passed


def test_exactly_half_is_not_enough():
    v = torch.tensor([1.0, 0.0])
    basis = HackBasis({"m": v[None]}, {"m": v})
    zero = {"m": torch.zeros(2, 2)}
    half = verify_vhack_heldout(basis, PairGrads({"m": torch.tensor([[1.0, 0.5], [-1.0, 0.5]])}, zero))
    assert half.fraction_positive == 0.5 and not half.passed
    written = heldout_json(half)
    assert (written["passed"], written["hard_gate"], written["soft_gate"]) == (False, 0.5, 0.2)
    assert written["cosines"] == pytest.approx([1 / math.sqrt(1.25), -1 / math.sqrt(1.25)])


def test_the_cosine_is_with_the_hackward_direction_of_the_subspace():
    """v_grad's projection on span(V), not v_grad itself and not the subspace without a sign."""
    basis = HackBasis({"m": torch.eye(3)[:2]}, {"m": torch.tensor([0.6, 0.0, 0.8])})
    row = torch.tensor([[1.0, 1.0, 5.0]])
    result = verify_vhack_heldout(basis, PairGrads({"m": row}, {"m": torch.zeros(1, 3)}))
    assert result.cosines == pytest.approx((1 / math.sqrt(27),))
