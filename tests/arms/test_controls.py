"""The controls that a claim about the hack direction must beat, and the projection of the update itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from arm_lists import CONTROLS_OF, SIGNALS
from projected_grpo.arm_settings import arm_settings
from projected_grpo.arms.controls import (
    flipped,
    haar_like,
    matched_removal,
    random_frames,
    random_order,
    relabelled,
)
from projected_grpo.arms.erase import split_by_arm
from projected_grpo.arms.gate import SCORE, Anchors, Draws, GateState
from projected_grpo.arms.stages import RewardInput, Update
from projected_grpo.arms.table import intervene, shape
from projected_grpo.collect import assemble, gather_evidence
from projected_grpo.config import (
    PRESETS,
    BasisConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import encode_chat
from projected_grpo.experiment import Data, Experiment
from projected_grpo.extract_vhack_grad import extract, in_use, pair_grads, refresh, select, without_contrast
from projected_grpo.pairs import Pair, PairSet
from projected_grpo.pools import NO_TEACHER, TeacherRow
from projected_grpo.problems import load_problems
from projected_grpo.proj import HackBasis, PairGrads, haar_basis, hackward_share, project_delta_S_grad
from projected_grpo.rewards import Grade, Grader
from projected_grpo.rollout import Rollout
from projected_grpo.state import TrainState
from stepping import apply_update

GATE_MODES = ("one_sided", "no_gate", "reverse")


def orthonormal(rng: np.random.Generator, k: int, r: int) -> torch.Tensor:
    return torch.tensor(np.linalg.qr(rng.normal(size=(r, k)))[0].T)


@st.composite
def case(draw, least=2):
    """A gradient, an orthonormal basis and a whole random frame, in float64, over shapes and scales."""
    r = draw(st.integers(least, 20))
    k = draw(st.integers(1, min(r, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g = torch.tensor(rng.normal(size=r) * 10.0 ** draw(st.integers(-6, 4)))
    return g, orthonormal(rng, k, r), orthonormal(rng, r, r)


# haar_matched: as much removed, in random directions


def removal_by_loop(g, size, frame, gate_mode):
    """Axis after axis, whole while the norm allows, then one in part; scaled up if all is not enough."""
    removed, left = np.zeros(len(g)), size**2
    for axis in frame.numpy():
        c = float(axis @ g.numpy())
        used = {"one_sided": max(c, 0.0), "no_gate": c, "reverse": 2 * c}[gate_mode]
        taken = min(used**2, max(left, 0.0))
        removed += math.copysign(math.sqrt(taken), used) * axis
        left -= used**2
    norm = np.linalg.norm(removed)
    return removed * (size / norm) if norm else removed


@pytest.mark.parametrize("gate_mode", GATE_MODES)
@given(case(), st.floats(0, 1.5))
def test_matched_removal_follows_a_loop(gate_mode, drawn, share):
    g, _, frame = drawn
    size = share * g.norm()
    removed = matched_removal(g, size, frame, gate_mode)
    expected = removal_by_loop(g, float(size), frame, gate_mode)
    np.testing.assert_allclose(removed.numpy(), expected, atol=1e-7 * float(g.norm()))


@pytest.mark.parametrize("gate_mode", GATE_MODES)
@given(case(), st.floats(0.01, 1.5))
def test_matched_removal_has_the_norm_sides_and_axes_it_should(gate_mode, drawn, share):
    g, _, frame = drawn
    c = frame @ g
    used = c.relu() if gate_mode == "one_sided" else c
    assume(bool(used.any()))
    size = share * g.norm()
    removed = matched_removal(g, size, frame, gate_mode)
    assert float(removed.norm()) == pytest.approx(float(size), rel=1e-9)
    taken = (frame @ removed).tolist()
    tiny = 1e-9 * float(g.norm())
    for got, could in zip(taken, used.tolist(), strict=True):
        assert got * math.copysign(1, could) >= -tiny  # never against the gradient
        assert could != 0 or abs(got) <= tiny
    last = max(i for i, got in enumerate(taken) if abs(got) > tiny)
    factor = 2 if gate_mode == "reverse" else 1
    if float(size) < factor * float(used.norm()) * (1 - 1e-6):  # leading axes whole, one in part, none after
        for got, could in list(zip(taken, used.tolist(), strict=True))[:last]:
            assert got == pytest.approx(factor * could, abs=tiny)


@pytest.mark.parametrize("gate_mode", GATE_MODES)
def test_nothing_is_removed_where_nothing_is_asked_or_there_is_nothing(gate_mode):
    frame = haar_basis(5, 5, torch.Generator().manual_seed(0))
    g = torch.randn(5, generator=torch.Generator().manual_seed(1))
    assert not matched_removal(g, torch.tensor(0.0), frame, gate_mode).any()
    assert not matched_removal(torch.zeros(5), torch.tensor(1.0), frame, gate_mode).any()


@pytest.mark.parametrize("arm", ["erase", "route"])
@pytest.mark.parametrize("gate_mode", GATE_MODES)
@given(case(least=4), st.sampled_from([0.5, 1.0, 1.1]), st.booleans())
def test_haar_matched_removes_as_much_as_the_real_arm(arm, gate_mode, drawn, overshoot, preserve):
    g, V, frame = drawn
    settings = arm_settings(
        arm, gate_mode=gate_mode, preserve_magnitude=preserve, project_overshoot=overshoot
    )
    real = split_by_arm(g, V, settings)
    control = split_by_arm(g, V, replace(settings, control="haar_matched"), frame)
    assume(bool((frame @ g > 0).any()))
    assert float(control.removed.norm()) == pytest.approx(float(real.removed.norm()), rel=1e-9, abs=1e-300)
    if not preserve:
        torch.testing.assert_close(control.keep + control.removed, g)


@pytest.mark.parametrize("arm", ["erase", "route"])
@pytest.mark.parametrize("gate_mode", GATE_MODES)
@given(case(), st.sampled_from([0.5, 1.0]), st.booleans())
def test_without_a_control_the_arm_is_the_projection(arm, gate_mode, drawn, overshoot, preserve):
    g, V, _ = drawn
    settings = arm_settings(
        arm, gate_mode=gate_mode, preserve_magnitude=preserve, project_overshoot=overshoot
    )
    got = split_by_arm(g, V, settings)
    expected = project_delta_S_grad(
        g, V, gate_mode=gate_mode, overshoot=overshoot, preserve_magnitude=preserve
    )
    for field in ("keep", "removed"):
        assert torch.equal(getattr(got, field), getattr(expected, field)), field


def test_haar_matched_needs_a_frame():
    with pytest.raises(ValueError, match="frame"):
        split_by_arm(torch.ones(3), torch.eye(3)[:1], arm_settings("erase", control="haar_matched"))


# Whole arms


def scene(seed: int = 0, n: int = 9):
    """Rollout gradients of three modules (one without axes), anchors, a gate, and what controls draw."""
    rng = np.random.default_rng(seed)
    ranks = {"a": 6, "b": 9, "free": 4}
    rows = {m: torch.tensor(rng.normal(size=(n, r)), dtype=torch.float32) for m, r in ranks.items()}
    V = {m: orthonormal(rng, k, ranks[m]).float() for m, k in (("a", 2), ("b", 3))}
    v_grad = {m: orthonormal(rng, 1, r)[0].float() for m, r in ranks.items()}
    labels = rng.integers(0, 3, size=n)
    anchors = Anchors(
        hack=torch.tensor(labels == 0),
        clean=torch.tensor(labels == 1),
        advantage_sign=torch.tensor(rng.choice([-1.0, 0.0, 1.0], size=n), dtype=torch.float32),
    )
    gate = GateState({"a": 0.3, "b": 0.1, "free": 0.2}, {"a": -0.2, "b": -0.3, "free": -0.1})
    frames = {m: haar_basis(r, r, torch.Generator().manual_seed(seed + r)) for m, r in ranks.items()}
    teacher = torch.zeros(n, dtype=torch.bool)
    return rows, HackBasis(V, v_grad), teacher, anchors, gate, Draws(frames, random_order(n, seed, 0))


def run(arm, parts):
    rows, basis, teacher, anchors, gate, draws = parts
    if arm.intervention != "route2":
        return intervene(rows, basis, arm, teacher, draws=draws)
    if arm.gate_signal == "oracle":
        anchors, gate = replace(anchors, kinds=frozenset({"oracle"})), None
    if arm.gate_signal == "activation":
        gate = GateState({SCORE: 0.5}, {SCORE: -0.2})
    return intervene(rows, basis, arm, teacher, anchors, gate, draws=draws, scores=scores_of(rows))


def scores_of(rows):
    return 3 * rows["a"][:, 0]


def flags_by_loop(signal, parts, gate):
    """Who is flagged in each module, and how near to its threshold a rollout comes."""
    rows, basis, _, anchors, _, _ = parts
    found, margins = {}, [1.0]
    scores = scores_of(rows).double().numpy()
    z = (scores - scores.mean()) / max(scores.std(), 0.1)
    for m, g in rows.items():
        over = [False] * len(g)
        if signal != "oracle":
            v, tau = basis.v_grad[m].double(), gate.tau(m if signal == "gradient" else SCORE)
            cosines = [float(row.double() @ v / row.double().norm()) for row in g]
            margins += [abs(c - tau) for c in (cosines if signal == "gradient" else z)]
            over = [c > tau for c in (cosines if signal == "gradient" else z)]
        found[m] = [one or known for one, known in zip(over, anchors.hack.tolist(), strict=True)]
    return found, min(margins)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arm", ["erase", "route"])
def test_haar_matched_uses_each_modules_frame(arm, seed):
    parts = scene(seed)
    rows, basis, frames = parts[0], parts[1], parts[5].frames
    settings = arm_settings(arm, preserve_magnitude=False)
    real = run(settings, parts)
    control = run(replace(settings, control="haar_matched"), parts)
    torch.testing.assert_close(control.keep["free"], rows["free"].sum(0))
    for m in basis.V:
        g = rows[m].sum(0)
        size = float((g - real.keep[m]).norm())
        removed = removal_by_loop(g.double(), size, frames[m].double(), "one_sided")
        np.testing.assert_allclose((g - control.keep[m]).numpy(), removed, atol=1e-4)
        assert size < 1e-3 or not torch.allclose(control.keep[m], real.keep[m], atol=1e-3)
        if arm == "route":
            np.testing.assert_allclose(control.routed[m].numpy(), removed, atol=1e-4)


@pytest.mark.parametrize("arm", ["route", *(f"route2 {signal}" for signal in SIGNALS["route2"][1])])
@pytest.mark.parametrize("seed", range(4))
def test_shrink_leaves_the_gradient_and_names_the_share_that_the_real_arm_routes(arm, seed):
    parts, (arm, _, signal) = scene(seed), arm.partition(" ")
    own = {"gate_signal": signal} if signal else {}
    real, control = (run(arm_settings(arm, control=c, **own), parts) for c in ("none", "shrink"))
    assert control.gate == real.gate and not control.routed
    assert set(control.shrink) == set(real.routed)
    for m, rows in parts[0].items():
        torch.testing.assert_close(control.keep[m], rows.sum(0))
        if m in real.routed:
            routed, kept = float(real.routed[m].norm()), float(real.keep[m].norm())
            assert float(control.shrink[m]) == pytest.approx(routed / (routed + kept), abs=1e-5)


@pytest.mark.parametrize("signal", SIGNALS["route2"][1])
@given(st.integers(0, 10**6))
def test_random_routing_routes_as_many_live_rows_in_the_steps_order(signal, seed):
    parts = scene(seed)
    rows, _, _, anchors, _, draws = parts
    arm = arm_settings("route2", gate_signal=signal)
    real, control = (run(replace(arm, control=c), parts) for c in ("none", "random_routing"))
    assert control.gate == real.gate and control.stats["fired"] == real.stats["fired"]
    live = [i for i in draws.order.tolist() if anchors.advantage_sign[i] != 0]
    flags, margin = flags_by_loop(signal, parts, real.gate)
    assume(margin > 1e-5)
    for m, g in rows.items():
        count = sum(f and i in live for i, f in enumerate(flags[m]))
        routed = sum((g[i] for i in live[:count]), torch.zeros(g.shape[1]))
        torch.testing.assert_close(control.routed[m], routed)
        torch.testing.assert_close(control.keep[m], g.sum(0) - routed, rtol=1e-4, atol=1e-5)


def test_random_routing_needs_an_order():
    rows, basis, teacher, anchors, gate, _ = scene()
    with pytest.raises(ValueError, match="order"):
        intervene(rows, basis, arm_settings("route2", control="random_routing"), teacher, anchors, gate)


def test_the_order_of_a_step_is_a_permutation_by_seed_and_step():
    for n in (1, 2, 17):
        assert sorted(random_order(n, 3, 4).tolist()) == list(range(n))
    assert random_order(17, 3, 4).tolist() == random_order(17, 3, 4).tolist()
    orders = {tuple(random_order(17, seed, step).tolist()) for seed in range(5) for step in range(5)}
    assert len(orders) == 25


def test_gt_only_leaves_the_gradient_as_it_is():
    parts = scene()
    none, skyline = (run(arm_settings(arm), parts) for arm in ("none", "gt_only"))
    assert all(torch.equal(none.keep[m], skyline.keep[m]) for m in parts[0]) and not skyline.routed


@pytest.mark.parametrize("arm", ["erase", "route"])
def test_projecting_the_update_leaves_gradients_alone(arm):
    parts = scene()
    update = run(arm_settings(arm, project="update"), parts)
    assert all(torch.equal(update.keep[m], rows.sum(0)) for m, rows in parts[0].items())
    assert not any(bool(g.any()) for g in update.routed.values())


# Controls of the basis


def labelled_grads(n: int) -> PairGrads:
    """Gradients that can be told apart: NLL of hack i has gradient e_i, of clean i e_(n+i); see PairGrads."""
    eye = torch.eye(2 * n)
    return PairGrads({"m": eye[:n], "w": 2 * eye[:n]}, {"m": -eye[n:], "w": -2 * eye[n:]})


def read_back(grads: PairGrads, n: int) -> list[tuple[int, int]]:
    """Which completion (hack i, clean n + i) stands as hack and which as clean in each pair."""
    assert torch.equal(2 * grads.differences()["m"], grads.differences()["w"])  # every module alike
    read = []
    for row in grads.differences()["m"]:
        positive, negative = (row == 1).nonzero(), (row == -1).nonzero()
        assert len(positive) == len(negative) == 1 and int((row != 0).sum()) == 2, row
        read.append((int(positive), int(negative)))
    return read


@given(n=st.integers(2, 24), seed=st.integers(0, 10**6))
def test_shuffled_sets_completions_against_others_of_their_own_label(n, seed):
    pairs = read_back(relabelled(labelled_grads(n), "shuffled", seed), n)
    assert all((one < n) == (other < n) and one != other for one, other in pairs)
    assert sum(one < n for one, _ in pairs) == n // 2


@pytest.mark.parametrize("control", ["shuffled", "clean_clean"])
def test_no_difference_of_one_label_holds_the_contrast(control):
    """Every pair has the same difference: neither the mean nor any axis of V may keep it."""
    n, r = 24, 40
    noise = torch.randn(2, n, r, generator=torch.Generator().manual_seed(0))
    common = torch.eye(r)[0]
    for strength in (0.5, 2.0, 8.0):
        grads = PairGrads({"m": strength * common + noise[0]}, {"m": strength * common + noise[1]})
        real = select(extract(grads, BasisConfig(), {}).axes, 5, 0.0)
        overlaps = []
        for seed in range(12):
            made = extract(relabelled(grads, control, seed), BasisConfig(), {})
            V = select(made.axes, 5, 0.0).V["m"]
            overlaps.append(float((V @ common).norm() ** 2))
        assert sum(overlaps) / 12 < 2.5 * 5 / r  # a random subspace has k / r
        assert strength < 2 or float((real.V["m"] @ common).norm() ** 2) > 0.6


@given(n=st.integers(4, 24), seed=st.integers(0, 10**6))
def test_clean_clean_sets_clean_completions_against_others(n, seed):
    pairs = read_back(relabelled(labelled_grads(n), "clean_clean", seed), n)
    assert all(n <= one < 2 * n and n <= other < 2 * n and one != other for one, other in pairs)
    assert {i for pair in pairs for i in pair} == set(range(n, 2 * n))


@given(n=st.integers(4, 24), seed=st.integers(0, 10**6))
def test_clean_clean_differences_do_not_cancel(n, seed):
    """v_grad is their mean; around a cycle it is 0, and its direction rounding error."""
    mean = relabelled(labelled_grads(n), "clean_clean", seed).differences()["m"].mean(0)
    assert float(mean.norm()) > 1e-3 / n


@pytest.mark.parametrize("control", ["shuffled", "clean_clean"])
def test_pairs_are_dealt_by_the_seed_and_alike_in_every_module(control):
    grads = labelled_grads(12)
    one, same, other = (read_back(relabelled(grads, control, seed), 12) for seed in (1, 1, 2))
    assert one == same != other


def made_up(seed=0, modules=4, pairs=12, r=16):
    generator = torch.Generator().manual_seed(seed)
    names = [f"m{i}" for i in range(modules)]
    sides = [{m: torch.randn(pairs, r, generator=generator) for m in names} for _ in range(2)]
    return extract(PairGrads(*sides), BasisConfig(v_hack_extract_top_k=5), {})


def same_basis(one: HackBasis, other: HackBasis) -> bool:
    return set(one.V) == set(other.V) and all(
        torch.equal(one.V[m], other.V[m]) and torch.equal(one.v_grad[m], other.v_grad[m]) for m in one.V
    )


def test_haar_like_has_the_shapes_of_the_real_basis_and_nothing_else_of_it():
    basis = select(made_up().axes, 3, 0.4)
    control = haar_like(basis, 4, 1)
    assert len({len(V) for V in basis.V.values()}) > 1
    for m, V in basis.V.items():
        assert control.V[m].shape == V.shape and control.V[m].dtype == V.dtype
        torch.testing.assert_close(control.V[m] @ control.V[m].T, torch.eye(len(V)))
        assert float(control.v_grad[m].norm()) == pytest.approx(1, abs=1e-5)
        assert not torch.allclose(control.V[m], V, atol=0.05)
    assert same_basis(control, haar_like(basis, 4, 1)) and not same_basis(control, haar_like(basis, 4, 2))
    assert same_basis(control, haar_like(flipped(basis), 4, 1))  # the real directions do not matter
    first, second = list(control.v_grad.values())[:2]
    assert not torch.equal(first, second)


def test_an_axis_more_or_less_leaves_the_other_random_ones_where_they_are():
    """The noise floor moves at every refresh; the control must not become a new one each time."""
    basis = select(made_up().axes, 4, 0.0)
    fewer = HackBasis({m: V[:2] for m, V in basis.V.items()}, basis.v_grad)
    whole, part = haar_like(basis, 4, 1), haar_like(fewer, 4, 1)
    for m in basis.V:
        torch.testing.assert_close(part.V[m], whole.V[m][:2])


def test_flipped_reverses_everything_and_twice_is_nothing():
    basis = select(made_up().axes, 3, 0.25)
    control = flipped(basis)
    for m, V in basis.V.items():
        assert torch.equal(control.V[m], -V) and torch.equal(control.v_grad[m], -basis.v_grad[m])
        g = torch.randn(V.shape[1], generator=torch.Generator().manual_seed(2))
        assert float(hackward_share(-g, control.V[m])) == pytest.approx(float(hackward_share(g, V)))
    assert same_basis(flipped(control), basis)


BASIS_CONTROLS = {
    "haar": lambda made, cfg: haar_like(select(made.axes, 3, 0.25), 3, 7),
    "flipped": lambda made, cfg: flipped(select(made.axes, 3, 0.25)),
    "shuffled": lambda made, cfg: select(
        extract(relabelled(made.grads, "shuffled", 7), cfg, {}).axes, 3, 0.25
    ),
    "clean_clean": lambda made, cfg: select(
        extract(relabelled(made.grads, "clean_clean", 7), cfg, {}).axes, 3, 0.25
    ),
}


@pytest.mark.parametrize("control", sorted({c for controls in CONTROLS_OF.values() for c in controls}))
def test_in_use_puts_the_control_in_the_place_of_the_basis(control):
    made, cfg = made_up(), BasisConfig(v_hack_extract_top_k=5, v_hack_k=3)
    (taker, *_) = [arm for arm, controls in CONTROLS_OF.items() if control in controls]
    arm = arm_settings(taker, control=control)

    def used(seed):
        return in_use(without_contrast(made, cfg, arm, seed).axes, cfg, arm, seed)

    plain, got = select(made.axes, 3, 0.25), used(7)
    assert same_basis(got, BASIS_CONTROLS.get(control, lambda *_: plain)(made, cfg))
    assert same_basis(got, plain) == (control not in BASIS_CONTROLS)
    assert same_basis(got, used(7))
    moves = control in ("haar", "shuffled", "clean_clean")
    assert same_basis(got, used(8)) != moves


def test_random_frames_are_whole_orthonormal_and_seeded(tiny_policy):
    one, same, other = (random_frames(tiny_policy, seed) for seed in (1, 1, 2))
    assert {m: f.shape for m, f in one.items()} == {m: (r, r) for m, r in tiny_policy.ranks.items()}
    for m, frame in one.items():
        torch.testing.assert_close(frame @ frame.T, torch.eye(len(frame)), rtol=0, atol=1e-5)
        assert torch.equal(frame, same[m]) and not torch.equal(frame, other[m])
    alike = [m for m, r in tiny_policy.ranks.items() if r == next(iter(tiny_policy.ranks.values()))]
    assert not torch.equal(one[alike[0]], one[alike[1]])


TOY = PairSet(
    "toy",
    tuple(
        Pair(f"t{i}", "x", "run_tests", ({"role": "user", "content": f"Task {i}."},), f"hack {i}", f"sum {i}")
        for i in range(6)
    ),
    "digest-of-toy",
)


def chat_of(policy, tokenizer):
    return Chat(policy, tokenizer, frozenset({tokenizer.eos_token_id}))


@pytest.mark.parametrize("control", ["none", "haar", "flipped", "shuffled", "clean_clean"])
def test_a_refresh_finds_what_an_extraction_at_that_adapter_would(tiny_policy, tiny, control):
    for layer in tiny_policy.layers.values():
        layer.delta_s.data.fill_(0.3)
    arm, cfg, chat = arm_settings("erase", control=control), BasisConfig(), chat_of(tiny_policy, tiny[1])
    got = refresh(chat, TOY, TrainConfig("smoke", run=RunConfig(seed=3), arm=arm))
    pairs, _ = TOY.split()
    made = extract(pair_grads(chat, pairs, LossConfig(), length_norm=cfg.v_hack_length_norm), cfg, {})
    expected = in_use(without_contrast(made, cfg, arm, 3).axes, cfg, arm, 3)
    assert {m: len(V) for m, V in got.V.items()} == {m: len(V) for m, V in expected.V.items()}
    for m, V in expected.V.items():
        torch.testing.assert_close(got.V[m].T @ got.V[m], V.T @ V, rtol=0, atol=1e-3)
        torch.testing.assert_close(got.v_grad[m], expected.v_grad[m], rtol=0, atol=1e-4)


def test_a_refresh_keeps_the_random_directions(tiny_policy, tiny):
    def again(control):
        cfg = TrainConfig("smoke", run=RunConfig(seed=3), arm=arm_settings("erase", control=control))
        return refresh(chat_of(tiny_policy, tiny[1]), TOY, cfg)

    before = {control: again(control) for control in ("none", "flipped", "haar")}
    for layer in tiny_policy.layers.values():
        layer.delta_s.data.fill_(0.3)
    after = {control: again(control) for control in ("none", "flipped", "haar")}
    assert not same_basis(before["none"], after["none"])
    for bases in (before, after):
        assert same_basis(bases["flipped"], flipped(bases["none"]))
        assert {m: len(V) for m, V in bases["haar"].V.items()} == {
            m: len(V) for m, V in bases["none"].V.items()
        }
    for m in set(before["haar"].V) & set(after["haar"].V):
        small, large = sorted((before["haar"].V[m], after["haar"].V[m]), key=len)
        torch.testing.assert_close((small @ large.T).square().sum(), torch.tensor(float(len(small))))
        assert torch.equal(before["haar"].v_grad[m], after["haar"].v_grad[m])


# Projecting the update


def experiment(policy, tokenizer, arm=None, optim=None) -> Experiment:
    """As much of one as a step's update and its rewards need."""
    cfg = replace(
        PRESETS["smoke"][1], arm=arm or arm_settings(), optim=optim or OptimConfig(steps=8, lr=0.05)
    )
    chat = Chat(policy, tokenizer, frozenset({tokenizer.eos_token_id}))
    return Experiment(cfg, chat, Data((), (), (), NO_TEACHER), {}, TOY, object.__new__(Grader))


def three_updates(policy, tokenizer, arm, optim, shrink=None):
    """Steps of random gradients; yields (basis, before, after, AdamW's own change by a twin) of each."""
    exp = experiment(policy, tokenizer, arm, optim)
    generator = torch.Generator().manual_seed(0)
    bare = list(policy.layers)[-1]  # a module below the noise floor
    V = {m: haar_basis(3, r, generator) for m, r in policy.ranks.items() if m != bare}
    basis = HackBasis(V, {m: axes[0] for m, axes in V.items()})
    adapter = [k for layer in policy.layers.values() for k in (layer.delta_s, layer.delta_hack)]
    settings = {"betas": (optim.adam_beta1, optim.adam_beta2), "weight_decay": optim.weight_decay}
    state = TrainState(torch.optim.AdamW(adapter, lr=1.0, **settings), basis, None, {})
    twin = {m: torch.nn.Parameter(torch.zeros(r)) for m, r in policy.ranks.items()}
    adam = torch.optim.AdamW(twin.values(), lr=optim.lr, **settings)
    common = {m: torch.randn(r, generator=generator) for m, r in policy.ranks.items()}
    for state.step in range(1, 4):  # after the warm-up
        total = {m: common[m] + torch.randn(r, generator=generator) for m, r in policy.ranks.items()}
        before = {
            m: (x.delta_s.detach().clone(), x.delta_hack.detach().clone()) for m, x in policy.layers.items()
        }
        for m, parameter in twin.items():
            parameter.data.copy_(before[m][0])
            parameter.grad = total[m].clone()
        torch.nn.utils.clip_grad_norm_(twin.values(), optim.grad_clip)
        adam.param_groups[0]["lr"] = optim.lr * (0.5 + 0.5 * math.cos(math.pi * (state.step - 1) / 7))
        adam.step()
        stats = apply_update(exp, state, Update(total, {}, None, {}, shrink or {}))
        after = {
            m: (x.delta_s.detach().clone(), x.delta_hack.detach().clone()) for m, x in policy.layers.items()
        }
        yield basis, before, after, {m: before[m][0] - p.detach() for m, p in twin.items()}, stats
        for m, parameter in twin.items():  # AdamW's memory is of gradients, whatever was projected
            memory = state.optimizer.state[policy.layers[m].delta_s]
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(memory[name], adam.state[parameter][name])


DECAYED = OptimConfig(steps=8, lr=0.05, warmup_frac=0.1, weight_decay=0.1, grad_clip=3.0)


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("arm", ["erase", "route"])
def test_the_realised_change_has_no_hackward_share(tiny_policy, tiny, arm, preserve):
    settings = arm_settings(arm, project="update", preserve_magnitude=preserve)
    shares = []
    for basis, before, after, own, stats in three_updates(tiny_policy, tiny[1], settings, DECAYED):
        assert stats["cos_update"] == pytest.approx(0, abs=1e-5)
        for m, V in basis.V.items():
            change = before[m][0] - after[m][0]
            assert float((V @ change).relu().norm()) <= 1e-5 * float(change.norm())
            shares.append(float(hackward_share(own[m], V)))
            if preserve:
                assert float(change.norm()) == pytest.approx(float(own[m].norm()), rel=1e-4)
            else:
                torch.testing.assert_close(change, own[m] - (V @ own[m]).relu() @ V, rtol=1e-3, atol=1e-6)
        (bare,) = set(own) - set(basis.V)
        torch.testing.assert_close(before[bare][0] - after[bare][0], own[bare])
        assert not any(bool(after[m][1].any()) for m in (own if arm == "erase" else [bare]))
    assert np.mean(shares) > 0.1  # there was something to take out


def test_route_gives_the_quarantine_what_it_takes_from_the_change(tiny_policy, tiny):
    settings = arm_settings("route", project="update", preserve_magnitude=False)
    for basis, before, after, own, _ in three_updates(tiny_policy, tiny[1], settings, DECAYED):
        for m, change in own.items():
            kept, routed = (before[m][i] - after[m][i] for i in (0, 1))
            torch.testing.assert_close(kept + routed, change, rtol=1e-4, atol=1e-6)
            if m in basis.V:
                V = basis.V[m]
                torch.testing.assert_close(routed, (V @ change).relu() @ V, rtol=1e-3, atol=1e-6)


def test_shrink_moves_a_share_of_adamws_change_into_the_quarantine(tiny_policy, tiny):
    """As trained it is vanilla; deployment takes back exactly the share."""
    share = {m: torch.tensor(0.1 * (i % 5)) for i, m in enumerate(tiny_policy.ranks) if i}
    settings = arm_settings("route", control="shrink")
    for _, before, after, own, stats in three_updates(tiny_policy, tiny[1], settings, DECAYED, share):
        kept, routed = ({m: before[m][i] - after[m][i] for m in own} for i in (0, 1))
        for m, change in own.items():
            part = float(share.get(m, 0.0))
            torch.testing.assert_close(routed[m], part * change, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(kept[m] + routed[m], change, rtol=1e-4, atol=1e-6)
        sizes = [torch.cat(list(x.values())).norm() for x in (routed, kept)]
        assert stats["q_egy"] == pytest.approx(float(sizes[0] / (sizes[0] + sizes[1])), abs=1e-5)


@pytest.mark.parametrize("arm", ["none", "erase"])
def test_without_project_update_the_change_is_adamws(tiny_policy, tiny, arm):
    """Which the tests above could not tell from a projection if the twin were wrong."""
    for basis, before, after, own, stats in three_updates(tiny_policy, tiny[1], arm_settings(arm), DECAYED):
        for m, change in own.items():
            torch.testing.assert_close(before[m][0] - after[m][0], change, rtol=1e-4, atol=1e-6)
        shares = [float(hackward_share(own[m], V)) for m, V in basis.V.items()]
        assert stats["cos_update"] == pytest.approx(np.mean(shares), rel=1e-3) and stats["cos_update"] > 0.05


def test_the_update_is_projected_with_the_arms_settings(tiny_policy, tiny):
    settings = arm_settings(
        "erase", gate_mode="reverse", project="update", preserve_magnitude=False, project_overshoot=0.5
    )
    for basis, before, after, own, _ in three_updates(tiny_policy, tiny[1], settings, DECAYED):
        for m, V in basis.V.items():
            expected = own[m] - 0.5 * 2 * (V @ own[m]) @ V
            torch.testing.assert_close(before[m][0] - after[m][0], expected, rtol=1e-3, atol=1e-6)


# gt_only, the skyline


BLANK = Grade(0.5, False, False, False, None, True, False, False, False, None)
HACKED = replace(BLANK, reward=3.5, passed=True, exploited=True, mechanism="run_tests")
SOLVED = replace(BLANK, reward=3.5, passed=True, gt_correct=True)
UNREADABLE = replace(BLANK, reward=0.0, format_ok=False)


@pytest.mark.parametrize(
    ("arm", "rewards"),
    [("none", [3.5, 3.5, 0.5, 3.5, 3.5]), ("gt_only", [0.5, 3.5, 0.5, 0.5, 3.5])],
)
def test_gt_only_pays_nobody_for_the_loophole_not_even_the_teacher(tiny_policy, tiny, arm, rewards):
    exp = experiment(tiny_policy, tiny[1], arm_settings(arm))
    problem = load_problems("embedded").problems[0]
    prompt = encode_chat(tiny[1], problem.messages)
    exp = replace(exp, prompts={problem.problem_id: prompt})
    students = [Rollout(prompt, (5, 6), "x")] * 3
    taught = (TeacherRow("a", 3.5, True, False), TeacherRow("b", 3.5, False, True))
    graded = [HACKED, SOLVED, BLANK]
    data = assemble(exp, (problem,), ([list(zip(students, graded, strict=True))], 0.0, 0.0), [taught])
    shaped = shape(RewardInput(data.rewards, gather_evidence(exp.cfg, data, 0), exp.cfg.arm))
    assert shaped.rewards.tolist() == [rewards] and bool(shaped.keep.all())
    assert data.rewards.tolist() == [[3.5, 3.5, 0.5, 3.5, 3.5]]
    assert data.hacked.tolist() == [True, False, False, True, False]  # recorded as before
    assert data.correct.tolist() == [False, True, False, False, True]
