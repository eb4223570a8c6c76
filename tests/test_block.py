"""The quarantine's own block: its gradients against plain autograd, its start, its masks, its files."""

import copy
import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from fake_runs import few_pairs
from projected_grpo.antipasto import block_name, merged_weight, unwrap, wrap
from projected_grpo.arm_settings import arm_settings
from projected_grpo.arms.absorb import block_starts
from projected_grpo.arms.gate import Anchors, GateState
from projected_grpo.arms.table import intervene
from projected_grpo.block import Block, direction_start, random_start
from projected_grpo.checks import validate
from projected_grpo.cli import main
from projected_grpo.config import PRESETS, LossConfig, ModelConfig
from projected_grpo.deploy.trained import find_source, open_source
from projected_grpo.errors import UserError
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.proj import HackBasis, haar_basis
from projected_grpo.rollout import Rollout
from projected_grpo.run.checkpoint import load_adapter, save_adapter, state_paths
from projected_grpo.run.start import start_from
from test_checkpoint import edit

K = 3
IDS = torch.tensor([[5, 9, 20, 31, 7]])
ROLLOUTS = [
    Rollout(prompt, completion, "")
    for prompt, completion in (
        ((5, 6, 7), (3, 1, 4, 1, 5, 9)),
        ((8, 9, 10, 11), (2, 7)),
        ((5, 6, 7), (6, 5, 3, 5)),
        ((8, 9, 10, 11), (8, 9, 7)),
    )
]
PARTS = (0, 1, 0, 1)
A = (1.0, -0.5, -1.25, 2.0)
MAX_NEW = 8


def with_blocks(model, moved=0.3):
    """A policy with a block in every module, all adapter parameters but delta_hack away from zero."""
    policy = wrap(model, None)
    policy.give_blocks(block_starts(policy, HackBasis({}, {}), arm_settings("absorb", block_rank=K), 0))
    generator = torch.Generator().manual_seed(2)
    for layer in policy.layers.values():
        for parameter in (layer.delta_s, layer.block.moved):
            parameter.data.copy_(moved * torch.randn(parameter.shape, generator=generator))
    return policy


def explicit(layer, A, B):
    """W + U diag(delta_s) Vh + s (B A - B0 A0)."""
    block, (d_out, d_in) = layer.block, layer.weight.shape
    k = len(block.A0)
    s = min(d_out, d_in) / (k * math.sqrt(2 * d_in * d_out * (d_in + d_out)))
    W = layer.base.weight.data + layer.U @ torch.diag(layer.delta_s.detach()) @ layer.Vh
    return W + s * (B @ A - block.B0 @ block.A0)


def slow_gradients(policy, base, rollout, advantage):
    """One rollout through the plain model, its weights functions of plain A and B."""
    plain, weights = {}, {}
    for m, layer in policy.layers.items():
        a, b = layer.block.halves(layer.block.moved.detach())
        plain[m] = tuple((x0 + x).requires_grad_() for x0, x in ((layer.block.A0, a), (layer.block.B0, b)))
        weights[f"{m}.weight"] = explicit(layer, *plain[m])
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    logits = functional_call(base, weights, (), {"input_ids": ids}).logits[0]
    start = len(rollout.prompt_ids)
    loss = torch.zeros((), dtype=torch.float64)
    for t, token in enumerate(rollout.completion_ids):
        loss = loss - advantage * torch.log_softmax(logits[start + t - 1], -1)[token]
    leaves = [half for halves in plain.values() for half in halves]
    found = iter(torch.autograd.grad(loss / (len(ROLLOUTS) * MAX_NEW), leaves))
    return {m: torch.cat([next(found).flatten(), next(found).flatten()]) for m in plain}


@pytest.mark.parametrize("how", ["rollouts", "parts"])
def test_a_blocks_rows_are_those_of_plain_parameters_one_rollout_at_a_time(small_model, how):
    policy, base = with_blocks(small_model("qwen3")), small_model("qwen3")
    parts = PARTS if how == "parts" else None
    advantage = torch.tensor(A, dtype=torch.float64)
    got = per_rollout_grads(policy, ROLLOUTS, advantage, LossConfig(), MAX_NEW, parts=parts)
    slow = [slow_gradients(policy, base, r, a) for r, a in zip(ROLLOUTS, A, strict=True)]
    for m in policy.layers:
        expected = torch.stack([one[m] for one in slow])
        if parts:
            expected = torch.stack([expected[0] + expected[2], expected[1] + expected[3]])
        for row, want in zip(got.rows[block_name(m)], expected, strict=True):
            assert float(want.norm()) > 0
            torch.testing.assert_close(row, want, rtol=1e-7, atol=1e-8 * float(want.norm()))


def test_half_precision_has_the_same_rows_to_rounding(small_model):
    exact, half = (with_blocks(small_model("qwen3", dtype)) for dtype in (torch.float64, torch.bfloat16))
    for m, layer in half.layers.items():
        for name in ("U", "Vh"):  # of another basis deltas mean something else
            getattr(layer, name).copy_(getattr(exact.layers[m], name))
    expected, got = (
        per_rollout_grads(policy, ROLLOUTS, torch.tensor(A), LossConfig(), MAX_NEW).rows
        for policy in (exact, half)
    )
    for name, rows in got.items():
        assert rows.dtype == torch.float32
        cosine = torch.cosine_similarity(rows.double().flatten(), expected[name].flatten(), dim=0)
        assert float(cosine) > 0.95, name


@torch.no_grad()
def logits(policy, deltas):
    with policy.bind(deltas):
        return policy.model(input_ids=IDS).logits


@pytest.mark.parametrize("init", ["random", "direction"])
def test_a_block_begins_without_effect_and_with_a_gradient(small_model, init):
    policy, base = wrap(small_model("qwen3"), None), small_model("qwen3")
    V = {m: haar_basis(2, r, torch.Generator().manual_seed(0)) for m, r in policy.ranks.items()}
    arm = arm_settings("absorb", block_init=init, block_rank=K)
    policy.give_blocks(block_starts(policy, HackBasis(V, {}), arm, 0))
    assert (
        set(policy.blocks) == set(policy.layers)
        and not policy.quarantine_used
        and policy.quarantine_norm == 0
    )
    assert torch.equal(logits(policy, policy.deltas()), base(input_ids=IDS).logits)
    with policy.merge(policy.deltas()):
        assert torch.equal(logits(policy, None), base(input_ids=IDS).logits)
    grads = per_rollout_grads(policy, ROLLOUTS, torch.tensor(A), LossConfig(), MAX_NEW)
    for m, block in policy.blocks.items():
        assert all(float(half.norm()) > 0 for half in block.halves(grads.rows[block_name(m)]))


def test_the_layer_is_its_equation_bound_and_merged(small_model):
    policy, base = with_blocks(small_model("qwen3")), small_model("qwen3")
    weights = {}
    for m, layer in policy.layers.items():
        a, b = layer.block.halves(layer.block.moved.detach())
        weights[f"{m}.weight"] = explicit(layer, layer.block.A0 + a, layer.block.B0 + b)
    with torch.no_grad():
        expected = functional_call(base, weights, (), {"input_ids": IDS}).logits
    torch.testing.assert_close(logits(policy, policy.deltas()), expected, rtol=1e-9, atol=1e-9)
    with policy.merge(policy.deltas()):
        torch.testing.assert_close(logits(policy, None), expected, rtol=1e-9, atol=1e-9)
    changes = [
        float((weights[f"{m}.weight"] - explicit(layer, layer.block.A0, layer.block.B0)).square().sum())
        for m, layer in policy.layers.items()
    ]
    assert policy.quarantine_used and policy.quarantine_norm == pytest.approx(math.sqrt(sum(changes)))
    plain = unwrap(policy, ablate_quarantine=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-9, atol=1e-9)


def test_deletion_leaves_exactly_the_deployed_diagonal(small_model):
    policy, never = with_blocks(small_model("qwen3")), wrap(small_model("qwen3"), None)
    for m, layer in never.layers.items():
        layer.delta_s.data.copy_(policy.layers[m].delta_s.data)
    deployed = policy.deltas(ablate_quarantine=True)
    assert set(deployed) == set(policy.layers)
    assert torch.equal(logits(policy, deployed), logits(never, never.deltas()))
    assert not torch.equal(logits(policy, policy.deltas()), logits(never, never.deltas()))
    with policy.merge(deployed), never.merge(never.deltas()):
        for m, layer in policy.layers.items():
            assert torch.equal(layer.base.weight, never.layers[m].base.weight)
            W = small_model("qwen3").get_submodule(m).weight.data
            assert torch.equal(layer.base.weight.data, W + (layer.U * layer.delta_s.data) @ layer.Vh)


def test_a_merged_block_whose_displacement_is_not_bound_is_not_used(small_model):
    layer = next(iter(with_blocks(small_model("qwen3"), moved=0.0).layers.values()))
    zero, moved = torch.zeros_like(layer.delta_s), layer.block.moved.detach()
    for merged in (merged_weight(layer, zero), merged_weight(layer, zero, moved)):
        assert merged.data_ptr() == layer.base.weight.data_ptr()
    moved.fill_(1.0)
    assert merged_weight(layer, zero).data_ptr() == layer.base.weight.data_ptr()
    assert not torch.equal(merged_weight(layer, zero, moved), layer.base.weight)


@pytest.mark.parametrize(("d_out", "d_in", "k"), [(80, 120, 1), (120, 80, 4), (100, 100, 20)])
def test_a_first_step_of_adamw_lowers_the_loss_as_much_as_one_of_the_diagonal(d_out, d_in, k):
    generator = torch.Generator().manual_seed(0)
    block = Block(random_start(d_out, d_in, k, generator), torch.float64, torch.device("cpu"))
    W = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    through_block, through_diagonal = [], []
    for _ in range(40):  # by lr times the absolute gradient, to first order
        G = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((block.weight(block.moved) * G).sum(), block.moved)
        through_block.append(float(gradient.abs().sum()))
        through_diagonal.append(float((U.T @ G @ Vh.T).diagonal().abs().sum()))
    assert np.mean(through_block) == pytest.approx(np.mean(through_diagonal), rel=0.1)


# The start


def within_reach(change, start):
    """Energy of a weight change within reach of a first step: what B0 or A0 already touches."""
    P, _ = torch.linalg.qr(start.B.double())
    Q, _ = torch.linalg.qr(start.A.double().T)
    return float((change - (change - P @ (P.T @ change)) @ (torch.eye(len(Q)) - Q @ Q.T)).square().sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("axes", "k"), [(1, 1), (1, 3), (3, 2), (3, 6)])
def test_a_seeded_block_begins_where_the_changes_along_v_lie_best(seed, axes, k):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    V = haar_basis(axes, 6, generator).double()
    start = direction_start(U, Vh, V, k)
    assert start.A.shape == (k, 6) and start.B.shape == (9, k)
    torch.testing.assert_close(start.A.norm(dim=1), torch.full((k,), math.sqrt(6.0)))
    torch.testing.assert_close(start.B.norm(dim=0), torch.full((k,), 3.0))
    changes = [U @ torch.diag(v) @ Vh for v in V]
    got, both = sum(within_reach(change, start) for change in changes), min(2 * k, 6)
    best = max(float(V[:, list(some)].square().sum()) for some in combinations(range(6), both))
    assert got == pytest.approx(best, rel=1e-5)
    if axes == 1:  # no start of this rank has more, as the library's singular values say
        singular = torch.linalg.svdvals(changes[0])[:both]
        assert got == pytest.approx(float(singular.square().sum()), rel=1e-5)
    drawn = [random_start(9, 6, k, torch.Generator().manual_seed(s)) for s in range(9)]
    at_random = [sum(within_reach(change, one) for change in changes) for one in drawn]
    assert got == pytest.approx(axes, rel=1e-5) if both == 6 else got > max(at_random)


def test_starts_hang_on_seed_and_module_and_rank(small_model):
    policy = wrap(small_model("qwen3"), None)
    first = next(iter(policy.layers))
    basis = HackBasis({first: haar_basis(2, policy.ranks[first], torch.Generator().manual_seed(0))}, {})
    arm = arm_settings("absorb", block_rank=K)
    one, again, other = (block_starts(policy, basis, arm, seed) for seed in (0, 0, 1))
    seeded = block_starts(policy, basis, replace(arm, block_init="direction"), 0)
    for m in policy.layers:
        assert torch.equal(one[m].A, again[m].A) and not torch.equal(one[m].A, other[m].A)
        assert torch.equal(one[m].B, seeded[m].B) == (m != first)  # at random where V has nothing
    q, k = (one[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    assert not torch.equal(q.A, k.A)
    assert block_starts(policy, basis, arm_settings("route2"), 0) == {}
    with pytest.raises(UserError, match="--block-rank 999: model"):
        block_starts(policy, basis, replace(arm, block_rank=999), 0)


# Masks


MASKS = [(f, u) for f in ("keep", "absorb", "route") for u in ("keep", "absorb", "route") if f != u]


@pytest.mark.parametrize("quarantine", ["diagonal", "block"])
@pytest.mark.parametrize(("flagged", "unflagged"), MASKS)
def test_masks_sort_rollouts_as_an_explicit_loop_does(flagged, unflagged, quarantine):
    rng = np.random.default_rng(5)
    ranks, wide, n = {"a": 6, "free": 4}, {"a": 9, "free": 7}, 8
    rows = {m: torch.tensor(rng.normal(size=(n, r))) for m, r in ranks.items()}
    blocks = {block_name(m): torch.tensor(rng.normal(size=(n, p))) for m, p in wide.items()}
    v = {m: torch.tensor(np.linalg.qr(rng.normal(size=(r, 1)))[0][:, 0]) for m, r in ranks.items()}
    hack = torch.tensor([True] + [False] * 7)
    anchors = Anchors(hack, ~hack & False, torch.ones(n, dtype=torch.float64))
    arm = arm_settings("route2", quarantine=quarantine, mask_flagged=flagged, mask_unflagged=unflagged)
    given = rows | (blocks if quarantine == "block" else {})
    gate = GateState({"a": 0.2, "free": 0.1}, {"a": -0.2, "free": 0.1})
    update = intervene(
        given,
        HackBasis({"a": v["a"][None]}, v),
        arm,
        torch.zeros(n, dtype=torch.bool) | hack,
        anchors,
        gate,
    )
    seen = set()
    for m in ranks:
        keep = torch.zeros(ranks[m]).double()
        own = blocks[block_name(m)] if quarantine == "block" else rows[m]
        routed = torch.zeros(own.shape[1]).double()
        for i in range(n):
            cosine = float(rows[m][i] @ v[m] / rows[m][i].norm())
            mask = flagged if bool(hack[i]) or cosine > update.gate.tau(m) else unflagged
            seen.add(mask)
            keep += rows[m][i] if mask in ("keep", "absorb") else 0
            routed += own[i] if mask in ("route", "absorb") else 0
        torch.testing.assert_close(update.keep[m], keep)
        torch.testing.assert_close(update.routed[m], routed)
    assert seen == {flagged, unflagged}


def test_absorb_trains_both_on_everything():
    rows = {"m": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}
    block = {block_name("m"): torch.randn(5, 7, generator=torch.Generator().manual_seed(1))}
    empty, teacher = HackBasis({}, {}), torch.zeros(5, dtype=torch.bool)
    both = intervene(rows | block, empty, arm_settings("absorb"), teacher)
    assert torch.equal(both.keep["m"], rows["m"].sum(0)) and set(both.keep) == {"m"}
    assert torch.equal(both.routed["m"], block[block_name("m")].sum(0))
    twins = intervene(rows, empty, arm_settings("absorb", quarantine="diagonal"), teacher)
    assert torch.equal(twins.routed["m"], twins.keep["m"]) and twins.stats["q_egy"] == 0.5
    block[block_name("m")][0, 0] = math.inf
    with pytest.raises(FloatingPointError):
        intervene(rows | block, empty, arm_settings("absorb"), teacher)


# Settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"intervention": "route2", "block_rank": 2}, "--block-rank needs a block: --quarantine=block"),
        ({"intervention": "absorb", "quarantine": "diagonal", "block_rank": 2}, "--block-rank needs"),
        ({"intervention": "absorb", "block_rank": 0}, "--block-rank must be at least 1"),
        ({"intervention": "absorb", "control": "haar"}, "--block-init=direction"),
        ({"intervention": "route2", "quarantine": "block", "control": "shrink"}, "--control shrink routes"),
        (
            {"intervention": "route2", "mask_flagged": "keep"},
            "--mask-flagged and --mask-unflagged are both keep",
        ),
    ],
    ids=str,
)
def test_an_arm_that_cannot_use_an_option_refuses_it_in_one_line(options, words):
    smoke = PRESETS["smoke"][1]
    with pytest.raises(UserError, match=words) as caught:
        validate(replace(smoke, arm=arm_settings(**options)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arm", "block"),
    [
        (arm_settings("absorb"), True),
        (arm_settings("absorb", quarantine="block", block_init="direction"), True),
        (arm_settings("absorb", quarantine="diagonal"), False),
        (arm_settings("absorb", control="haar", block_init="direction"), True),
        (arm_settings("route2", quarantine="diagonal"), False),
        (arm_settings("route2", quarantine="block"), True),
    ],
)
def test_which_arms_have_a_block(arm, block):
    validate(replace(PRESETS["smoke"][1], arm=arm))
    assert arm.has_block == block


# Files


@pytest.fixture
def saved(tiny, svd_cache, tmp_path):
    """A policy with blocks, its adapter file, and a way to a fresh policy."""
    policy = wrap(copy.deepcopy(tiny[0]), svd_cache)
    policy.give_blocks(block_starts(policy, HackBasis({}, {}), arm_settings("absorb"), 3))
    for layer in policy.layers.values():
        layer.delta_s.data.fill_(0.01)
        layer.block.moved.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "k.safetensors"
    save_adapter(path, policy, {"model": "tiny-random", "step": 1}, deployed=False)
    return policy, path, wrap(copy.deepcopy(tiny[0]), svd_cache)


def test_blocks_come_back_bit_for_bit_and_stay_the_same_parameters(saved):
    policy, path, fresh = saved
    load_adapter(path, fresh)
    assert torch.equal(logits(fresh, fresh.deltas()), logits(policy, policy.deltas()))
    assert not torch.equal(logits(fresh, fresh.deltas()), logits(fresh, fresh.deltas(ablate_quarantine=True)))
    before = {m: block.moved for m, block in fresh.blocks.items()}
    fresh.give_blocks(block_starts(fresh, HackBasis({}, {}), arm_settings("absorb"), 4))
    load_adapter(path, fresh)
    for m, block in fresh.blocks.items():
        assert block.moved is before[m] and torch.equal(block.A0, policy.blocks[m].A0)
        assert torch.equal(block.moved, policy.blocks[m].moved)


def test_a_deployed_file_has_no_block_and_takes_blocks_away(saved, tmp_path):
    policy, path, fresh = saved
    save_adapter(tmp_path / "d.safetensors", policy, {}, deployed=True)
    assert {name.split("/")[0] for name in load_file(tmp_path / "d.safetensors")} == {"delta_s"}
    load_adapter(path, fresh)
    load_adapter(tmp_path / "d.safetensors", fresh)
    assert not fresh.blocks and not fresh.quarantine_used
    assert torch.equal(logits(fresh, fresh.deltas()), logits(policy, policy.deltas(ablate_quarantine=True)))


@pytest.mark.parametrize("part", ["block", "block_A0", "block_B0"])
@pytest.mark.parametrize("damage", ["missing", "short", "elsewhere", "scalar"])
def test_a_block_that_does_not_fit_is_refused_whole(saved, part, damage):
    _, path, fresh = saved

    def change(tensors, meta):
        name = next(n for n in tensors if n.startswith(f"{part}/"))
        tensor = tensors.pop(name)
        if damage == "short":
            tensors[name] = tensor[:-1].clone()
        elif damage == "scalar":
            tensors[name] = torch.tensor(1.0)
        elif damage == "elsewhere":
            tensors[f"{part}/elsewhere"] = tensor
        meta.pop("checksum")

    edit(path, change)
    with pytest.raises(UserError, match="made for another model") as caught:
        load_adapter(path, fresh)
    assert "\n" not in str(caught.value)
    assert not fresh.blocks and all(not layer.delta_s.any() for layer in fresh.layers.values())


# Runs


def test_a_run_with_a_block_is_saved_evaluated_exported_and_started_from(svd_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    few_pairs(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "svd_cache").symlink_to(svd_cache)
    run = [
        *(
            "train",
            "smoke",
            "--n-problems=4",
            "--eval-n-prompts=1",
            "--max-new=8",
            "--workers=1",
            "--steps=2",
        ),
        *("--lr=1e-2", "--warmup-frac=0", "--vhack-pairs-path=pairs.json", "--device=cpu"),
    ]
    arm = ["--intervention=absorb", "--block-init=direction", "--control=haar", "--rollout-ablate-frac=0.5"]
    assert main([*run, *arm, "--eval-ablate-every=1"]) == 0
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    state, deployed = load_file(state_paths(folder)[0]), load_file(folder / "train.safetensors")
    assert summary["finished"] and summary["delta_hack_norm"] > 0
    assert not any(bool(t.any()) for name, t in state.items() if name.startswith("delta_hack/"))
    assert all(bool(t.any()) for name, t in state.items() if name.startswith("block/"))
    assert {name.split("/")[0] for name in deployed} == {"delta_s"}
    assert all(torch.equal(t, state[name]) for name, t in deployed.items())
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert all(0 < s["q_egy"] < 1 for s in steps if s["gn"] is not None)

    settings = ModelConfig(model="", device="cpu", svd_cache=svd_cache)
    policy = open_source(find_source(folder, ""), settings).policy
    trained, alone = policy.deltas(), policy.deltas(ablate_quarantine=True)
    assert policy.quarantine_norm == pytest.approx(summary["delta_hack_norm"])
    assert not torch.equal(logits(policy, trained), logits(policy, alone))
    assert main(["export", str(folder), "--out=model", "--as-trained", "--device=cpu"]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"|H| {summary['delta_hack_norm']:.3e}" in card
    both = tmp_path / "model" / "adapter.safetensors"
    again = open_source(find_source(both, ""), settings)
    assert torch.equal(logits(again.policy, again.policy.deltas()), logits(policy, trained))

    start_from(both, again.policy)  # --init-adapter
    assert not again.policy.blocks and not again.policy.quarantine_used
    assert torch.equal(logits(again.policy, again.policy.deltas()), logits(policy, alone))
