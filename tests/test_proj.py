"""The projection, the arms and their figures, against explicit loops and closed forms."""

import math
from dataclasses import replace
from typing import get_args

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arm_lists import INTERVENTIONS
from projected_grpo.arm_settings import SETTINGS, GateMode, SplitSettings, arm_settings
from projected_grpo.arms.gate import SCORE, Anchors, GateState, update_gate
from projected_grpo.arms.table import ARMS, intervene
from projected_grpo.engine.logps import per_token_logps
from projected_grpo.proj import (
    HackBasis,
    assert_orthonormal,
    basis_overlap,
    haar_basis,
    hackward_share,
    mean_difference,
    mean_hackward_share,
    null_share,
    project_delta_S_grad,
    row_cosines,
    svd_basis,
)

GATE_MODES = get_args(GateMode)


def orthonormal(rng: np.random.Generator, k: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(r, k)))[0].T


@st.composite
def problem(draw):
    """A gradient and an orthonormal basis in float64, over many shapes and scales."""
    r = draw(st.integers(1, 24))
    k = draw(st.integers(1, min(r, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g = rng.normal(size=r) * 10.0 ** draw(st.integers(-6, 4))
    return torch.tensor(g), torch.tensor(orthonormal(rng, k, r))


def tol(g: torch.Tensor, relative: float = 1e-12) -> float:
    return relative * float(g.norm())


def close(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> bool:
    return float((a - b).norm()) <= tol(scale)


# The projection of one module


@pytest.mark.parametrize("gate_mode", GATE_MODES)
@given(problem(), st.sampled_from([0.5, 1.0, 1.1]), st.booleans())
def test_removed_lies_in_the_span_of_v(gate_mode, case, overshoot, preserve):
    g, V = (x.float() for x in case)
    removed = project_delta_S_grad(
        g, V, gate_mode=gate_mode, overshoot=overshoot, preserve_magnitude=preserve
    ).removed.numpy()
    coordinates = np.linalg.lstsq(V.numpy().T, removed, rcond=None)[0]
    assert np.linalg.norm(removed - V.numpy().T @ coordinates) <= 1e-5 * np.linalg.norm(g.numpy())


@pytest.mark.parametrize("gate_mode", GATE_MODES)
@given(problem(), st.sampled_from([0.5, 1.0, 1.1]))
def test_keep_plus_removed_is_the_gradient(gate_mode, case, overshoot):
    g, V = case
    split = project_delta_S_grad(g, V, gate_mode=gate_mode, overshoot=overshoot)
    assert close(split.keep + split.removed, g, g)


@given(problem())
def test_one_sided_removes_positive_coefficients_only_and_never_adds(case):
    g, V = case
    split = project_delta_S_grad(g, V)
    expected = g.clone()
    for v in V:
        expected -= max(0.0, float(v @ g)) * v
    assert close(split.keep, expected, g)
    assert float(split.keep.norm()) <= float(g.norm()) * (1 + 1e-12)
    assert float((V @ split.keep).max()) <= tol(g)
    assert close((V @ split.keep).clamp_max(0), (V @ g).clamp_max(0), g)


@given(problem())
def test_no_gate_leaves_nothing_along_v(case):
    g, V = case
    keep = project_delta_S_grad(g, V, gate_mode="no_gate").keep
    assert float((V @ keep).norm()) <= tol(g)
    complement = g - V.T @ torch.linalg.lstsq(V.T, g[:, None]).solution[:, 0]
    assert close(keep, complement, g)


@given(problem())
def test_reverse_reflects(case):
    g, V = case
    keep = project_delta_S_grad(g, V, gate_mode="reverse").keep
    householder = torch.eye(len(g), dtype=g.dtype)
    for v in V:
        householder = householder @ (torch.eye(len(g), dtype=g.dtype) - 2 * torch.outer(v, v))
    assert close(keep, householder @ g, g)
    assert close(V @ keep, -(V @ g), g)
    assert float(keep.norm()) == pytest.approx(float(g.norm()), rel=1e-12)


@given(problem())
def test_overshoot_turns_a_tenth_of_the_component_round(case):
    g, V = case
    c = (V @ g).tolist()
    keep = project_delta_S_grad(g, V, overshoot=1.1).keep
    expected = torch.tensor([-0.1 * x if x > 0 else x for x in c], dtype=g.dtype)
    assert close(V @ keep, expected, g)


@given(problem())
def test_preserve_magnitude_keeps_the_norm_and_the_direction(case):
    g, V = case
    plain = project_delta_S_grad(g, V)
    scaled = project_delta_S_grad(g, V, preserve_magnitude=True)
    assert torch.equal(scaled.removed, plain.removed)
    if plain.keep.norm() <= 1e-3 * g.norm():
        assert torch.equal(scaled.keep, plain.keep)
        return
    assert float(scaled.keep.norm()) == pytest.approx(float(g.norm()), rel=1e-9)
    assert float(scaled.keep @ plain.keep) == pytest.approx(
        float(scaled.keep.norm() * plain.keep.norm()), rel=1e-9
    )


def test_preserve_magnitude_does_not_blow_up_rounding_of_a_wholly_hackward_gradient():
    V = torch.tensor([[0.6, 0.8, 0.0]])
    g = 3.0 * V[0]
    split = project_delta_S_grad(g, V, preserve_magnitude=True)
    assert float(split.keep.norm()) < 1e-5
    assert float(hackward_share(g, V)) == pytest.approx(1.0)


@pytest.mark.parametrize("gate_mode", GATE_MODES)
@given(problem())
def test_the_hackward_share_before_and_after(gate_mode, case):
    g, V = case
    split = project_delta_S_grad(g, V, gate_mode=gate_mode, overshoot=0.5)
    for vector in (g, split.keep):
        got = hackward_share(vector, V)
        squares = 0.0
        for v in V.numpy():
            squares += max(0.0, float(np.dot(v, vector.numpy()))) ** 2
        norm = np.linalg.norm(vector.numpy())
        expected = math.sqrt(squares) / norm if norm > 1e-9 * np.linalg.norm(g.numpy()) else float(got)
        assert float(got) == pytest.approx(expected, abs=1e-9)


def test_relu_acts_on_each_coefficient_before_they_are_aggregated():
    V = torch.eye(3)[:2]
    assert float(hackward_share(torch.tensor([3.0, -4.0, 0.0]), V)) == pytest.approx(0.6)
    basis = HackBasis({"a": V[:1], "b": V[:1]}, {})
    opposed = {"a": torch.tensor([2.0, 0.0, 0.0]), "b": torch.tensor([-2.0, 0.0, 0.0])}
    assert mean_hackward_share(opposed, basis) == pytest.approx(0.5)  # summing first would give 0


def test_a_zero_gradient_has_no_share_and_no_nan():
    V = torch.eye(4)[:2]
    split = project_delta_S_grad(torch.zeros(4), V, preserve_magnitude=True)
    assert float(hackward_share(torch.zeros(4), V)) == 0.0
    assert not split.keep.any() and not split.removed.any()
    basis = HackBasis({"a": V, "b": V}, {})
    assert mean_hackward_share({"a": torch.zeros(4), "b": torch.eye(4)[0]}, basis) == 1.0
    assert mean_hackward_share({"a": torch.zeros(4), "b": torch.zeros(4)}, basis) is None
    assert mean_hackward_share({}, HackBasis({}, {})) is None


@pytest.mark.parametrize(("k", "r"), [(1, 8), (3, 10), (5, 40)])
def test_null_share_is_the_root_mean_square_over_random_directions(k, r):
    generator = torch.Generator().manual_seed(k)
    g = torch.randn(r, generator=generator)
    shares = [float(hackward_share(g, haar_basis(k, r, generator))) for _ in range(3000)]
    measured = math.sqrt(sum(s * s for s in shares) / len(shares))
    assert null_share(torch.eye(r)[:k]) == pytest.approx(math.sqrt(k / (2 * r)))
    assert measured == pytest.approx(math.sqrt(k / (2 * r)), rel=0.06)


def test_a_gradient_of_another_rank_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        project_delta_S_grad(torch.zeros(5), torch.eye(4)[:2])


# Log-probabilities


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_per_token_logps_are_log_softmax(scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(3, 5, 17, generator=generator, dtype=torch.float64)
    ids = torch.randint(17, (3, 5), generator=generator)
    expected = torch.log_softmax(logits, -1)
    got = per_token_logps(logits, ids)
    assert got.dtype == torch.float64
    for b in range(3):
        for t in range(5):
            assert float(got[b, t]) == pytest.approx(float(expected[b, t, ids[b, t]]), rel=1e-12, abs=1e-12)


def test_per_token_logps_of_bfloat16_logits_are_computed_in_float32():
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(2, 4, 300, generator=generator)).bfloat16()
    ids = torch.randint(300, (2, 4), generator=generator)
    got = per_token_logps(logits, ids)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-5)


# Bases


@given(st.integers(2, 10), st.integers(2, 16), st.integers(1, 12), st.integers(0, 10**6))
def test_svd_basis_is_the_leading_eigenspace_in_order_and_orthonormal(pairs, r, top_k, seed):
    D = np.random.default_rng(seed).normal(size=(pairs, r))
    V, S = svd_basis(torch.tensor(D), top_k)
    k = min(top_k, pairs, r)
    assert V.shape == (k, r) and S.shape == (k,)
    values, vectors = np.linalg.eigh(D.T @ D)
    np.testing.assert_allclose(S.numpy() ** 2, values[::-1][:k], rtol=1e-7, atol=1e-9 * values[-1])
    np.testing.assert_allclose(V.numpy() @ V.numpy().T, np.eye(k), atol=1e-9)
    for v, axis in zip(V.numpy(), vectors.T[::-1], strict=False):
        assert abs(v @ axis) == pytest.approx(1, abs=1e-5)


@given(st.integers(2, 9), st.integers(2, 12), st.integers(0, 10**6))
def test_each_axis_points_where_most_pairs_point(pairs, r, seed):
    D = np.random.default_rng(seed).normal(size=(pairs, r)) + 0.3
    V, _ = svd_basis(torch.tensor(D), 5)
    for v in V.numpy():
        positive = sum(float(d @ v) > 0 for d in D)
        if 2 * positive == pairs:
            assert float(np.mean(D @ v)) >= -1e-12
        else:
            assert 2 * positive > pairs


def test_the_majority_decides_and_not_the_mean():
    D = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-5.0, 0.0]])
    V, S = svd_basis(D, 1)
    assert V[0].tolist() == pytest.approx([1.0, 0.0])
    assert float(S[0]) == pytest.approx(math.sqrt(27))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mean_decides_a_tied_vote(sign):
    V, _ = svd_basis(sign * torch.tensor([[3.0, 0.0], [-1.0, 0.0]]), 1)
    assert V[0].tolist() == pytest.approx([sign, 0.0])


@pytest.mark.parametrize(("tau_axis", "k"), [(0.0, 4), (0.2, 3), (0.5, 3), (0.51, 2), (0.9, 1), (1.0, 1)])
def test_tau_axis_drops_the_axes_below_its_share_of_the_first(tau_axis, k):
    D = torch.diag(torch.tensor([8.0, 6.0, 4.0, 1.0]))
    V, S = svd_basis(D, 9, tau_axis)
    assert len(V) == len(S) == k
    assert S.tolist() == pytest.approx([8.0, 6.0, 4.0, 1.0][:k])


def test_a_rank_deficient_stack_gives_no_more_axes_than_its_rank():
    rng = np.random.default_rng(0)
    D = torch.tensor(rng.normal(size=(8, 2)) @ rng.normal(size=(2, 20)), dtype=torch.float32)
    V, S = svd_basis(D, 6)
    assert V.shape == (2, 20) and S.shape == (2,)
    assert float((D - D @ V.T @ V).abs().max()) < 1e-5


def test_a_zero_stack_gives_no_axis_and_a_zero_mean():
    V, S = svd_basis(torch.zeros(3, 5), 4)
    assert V.shape == (0, 5) and S.shape == (0,)
    assert not mean_difference(torch.zeros(3, 5)).any()
    assert_orthonormal(V, "m")


def test_mean_difference_is_the_unit_mean():
    D = torch.tensor([[3.0, 1.0], [3.0, 7.0]])
    assert mean_difference(D).tolist() == pytest.approx([0.6, 0.8])


@given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 10**6))
def test_haar_basis_is_orthonormal_and_follows_its_seed(k, more, seed):
    draws = [haar_basis(k, k + more, torch.Generator().manual_seed(s)) for s in (seed, seed, seed + 1)]
    np.testing.assert_allclose(draws[0].numpy() @ draws[0].numpy().T, np.eye(k), atol=1e-5)
    assert torch.equal(draws[0], draws[1])
    assert k + more == 1 or not torch.equal(draws[0], draws[2])


def test_haar_directions_have_no_preferred_side_or_axis():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([haar_basis(2, 5, generator) for _ in range(4000)])
    assert float(draws.mean(0).abs().max()) < 0.03  # QR without the sign fix has a mean of about 0.4
    torch.testing.assert_close(draws.square().mean(0), torch.full((2, 5), 0.2), rtol=0.05, atol=0)


def test_basis_overlap_in_closed_form():
    eye, angle = torch.eye(6), math.radians(30)
    tilted = torch.stack([math.cos(angle) * eye[0] + math.sin(angle) * eye[3]])

    def overlap(a: torch.Tensor, b: torch.Tensor) -> float | None:
        return basis_overlap(HackBasis({"m": a}, {}), HackBasis({"m": b, "new": eye}, {}))

    rotated = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) @ eye[:2]
    assert overlap(eye[:2], rotated) == pytest.approx(1)
    assert overlap(eye[:2], eye[2:5]) == 0
    assert overlap(eye[:1], eye[:4]) == pytest.approx(1)  # the smaller lies in the larger
    assert overlap(eye[:1], tilted) == pytest.approx(0.75)
    assert basis_overlap(HackBasis({"a": eye}, {}), HackBasis({"b": eye}, {})) is None
    two = HackBasis({"m": eye[:1], "w": eye[:1]}, {}), HackBasis({"m": eye[:1], "w": eye[1:2]}, {})
    assert basis_overlap(*two) == pytest.approx(0.5)


def test_assert_orthonormal_names_the_module_that_is_not():
    assert_orthonormal(torch.eye(5)[:3], "fine")
    bad = [torch.eye(5)[:3] * 1.01, torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2) * float("nan")]
    for V in bad:
        with pytest.raises(ValueError, match=r"layers\.3\.q_proj"):
            assert_orthonormal(V, "layers.3.q_proj")


# route2's gate


def test_row_cosines_are_cosines_and_zero_for_zero_rows():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]])
    assert row_cosines(rows, torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.6, 0.0, -1.0])


signs = st.sampled_from([-1.0, 0.0, 1.0])
labels = st.sampled_from(["hack", "clean", ""])


@given(st.lists(st.tuples(signs, labels, st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=8))
def test_update_gate_follows_an_explicit_loop(rollouts):
    old = GateState({"a": 0.3, "b": -0.2}, {"a": -0.1, "b": 0.4})
    cosines = {m: torch.tensor([row[2 + i] for row in rollouts]) for i, m in enumerate("ab")}
    anchors = Anchors(
        hack=torch.tensor([label == "hack" for _, label, _, _ in rollouts]),
        clean=torch.tensor([label == "clean" for _, label, _, _ in rollouts]),
        advantage_sign=torch.tensor([sign for sign, _, _, _ in rollouts]),
    )
    new = update_gate(old, cosines, anchors)
    for kind in ("hack", "clean"):
        for i, m in enumerate("ab"):
            votes = [row[2 + i] * row[0] for row in rollouts if row[1] == kind and row[0] != 0]
            before = getattr(old, kind)[m]
            after = 0.9 * before + 0.1 * sum(votes) / len(votes) if votes else before
            assert getattr(new, kind)[m] == pytest.approx(after, abs=1e-6)
    assert new.tau("a") == pytest.approx((new.hack["a"] + new.clean["a"]) / 2)


def test_a_punished_hack_votes_for_the_same_side_as_a_rewarded_one():
    old = GateState({"m": 0.0}, {"m": 0.0})
    anchors = Anchors(
        torch.tensor([True, True]), torch.tensor([False, False]), advantage_sign=torch.tensor([1.0, -1.0])
    )
    new = update_gate(old, {"m": torch.tensor([0.8, -0.8])}, anchors)
    assert new.hack["m"] == pytest.approx(0.08)  # without the sign the two would cancel
    assert new.clean["m"] == 0.0


# The arms


def scene(seed: int = 0, n: int = 7):
    """Rollout gradients of three modules, axes for two of them, anchors and a gate."""
    rng = np.random.default_rng(seed)
    ranks = {"a": 6, "b": 9, "free": 4}
    rows = {m: torch.tensor(rng.normal(size=(n, r)), dtype=torch.float32) for m, r in ranks.items()}
    for g in rows.values():
        g[2] = 0  # a rollout without advantage
    V = {m: torch.tensor(orthonormal(rng, k, ranks[m]), dtype=torch.float32) for m, k in (("a", 2), ("b", 3))}
    v_grad = {m: torch.tensor(orthonormal(rng, 1, r)[0], dtype=torch.float32) for m, r in ranks.items()}
    anchors = Anchors(
        hack=torch.tensor([True, False, False, False, True, False, False]),
        clean=torch.tensor([False, True, False, True, False, False, False]),
        advantage_sign=torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0, -1.0]),
    )
    is_teacher = torch.tensor([True, True, False, False, False, False, False])
    gate = GateState({"a": 0.3, "b": 0.1, "free": 0.2}, {"a": -0.2, "b": -0.3, "free": 0.1})
    return rows, HackBasis(V, v_grad), is_teacher, anchors, gate


def share(g: np.ndarray, V: np.ndarray) -> float:
    return float(np.linalg.norm(np.maximum(V @ g, 0)) / np.linalg.norm(g))


@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.parametrize("gate_mode", GATE_MODES)
def test_every_arm_returns_a_gradient_for_every_module(arm, gate_mode):
    splits = issubclass(SETTINGS[arm], SplitSettings)
    settings = arm_settings(arm, gate_mode=gate_mode) if splits else arm_settings(arm)
    rows, basis, is_teacher, anchors, gate = scene()
    labels = (anchors, gate) if arm == "route2" else ()
    update = intervene(rows, basis, settings, is_teacher, *labels)
    assert set(update.keep) == set(rows)
    assert all(update.keep[m].shape == (rows[m].shape[1],) for m in rows)
    parks = {"route": set(basis.V), "route2": set(rows), "absorb": set(rows)}.get(arm, set())
    assert set(update.routed) == parks
    assert all(g.shape == update.keep[m].shape for m, g in update.routed.items())
    if arm != "route2":  # no axes: unchanged
        torch.testing.assert_close(update.keep["free"], rows["free"].sum(0))
    finite = [x for x in update.stats.values() if x is not None]
    assert finite and all(math.isfinite(x) for x in finite)


def test_the_arms_are_those_of_the_configuration():
    assert set(ARMS) == set(INTERVENTIONS)


def test_none_is_the_plain_sum():
    rows, basis, is_teacher, _, _ = scene()
    update = intervene(rows, basis, arm_settings("none"), is_teacher)
    for m, g in rows.items():
        np.testing.assert_allclose(update.keep[m].numpy(), sum(row for row in g.numpy()), rtol=1e-5)
    assert update.stats["q_egy"] == 0.0
    assert update.stats["cos_pre"] == update.stats["cos_post"]


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("arm", ["erase", "route"])
def test_one_sided_arms_leave_no_hackward_share(arm, preserve):
    rows, basis, is_teacher, _, _ = scene()
    update = intervene(rows, basis, arm_settings(arm, preserve_magnitude=preserve), is_teacher)
    assert update.stats["cos_pre"] > 0.1
    assert update.stats["cos_post"] == pytest.approx(0, abs=1e-5)


def test_the_settings_reach_the_projection():
    rows, basis, is_teacher, _, _ = scene()
    settings = arm_settings("route", gate_mode="reverse", preserve_magnitude=False, project_overshoot=0.7)
    update = intervene(rows, basis, settings, is_teacher)
    for m, V in basis.V.items():
        g = rows[m].numpy().sum(0)
        removed = 0.7 * 2 * V.numpy().T @ (V.numpy() @ g)
        np.testing.assert_allclose(update.routed[m].numpy(), removed, atol=1e-5)
        np.testing.assert_allclose(update.keep[m].numpy(), g - removed, atol=1e-5)
    bigger = intervene(
        rows, basis, replace(settings, preserve_magnitude=True, gate_mode="no_gate"), is_teacher
    )
    for m in basis.V:
        assert float(bigger.keep[m].norm()) == pytest.approx(float(rows[m].sum(0).norm()), rel=1e-5)


def test_the_logged_shares_follow_an_explicit_loop():
    rows, basis, is_teacher, _, _ = scene()
    update = intervene(
        rows, basis, arm_settings("erase", gate_mode="reverse", project_overshoot=0.3), is_teacher
    )
    teacher = is_teacher.numpy()
    parts = {"cos_pre": np.ones(7, bool), "cos_pre_t": teacher, "cos_pre_s": ~teacher}
    for name, mask in parts.items():
        shares = [share(rows[m].numpy()[mask].sum(0), V.numpy()) for m, V in basis.V.items()]
        assert update.stats[name] == pytest.approx(sum(shares) / 2, rel=1e-5)
    after = [share(update.keep[m].numpy(), V.numpy()) for m, V in basis.V.items()]
    assert update.stats["cos_post"] == pytest.approx(sum(after) / 2, rel=1e-5)
    nulls = [math.sqrt(len(V) / (2 * V.shape[1])) for V in basis.V.values()]
    assert update.stats["cos_null"] == pytest.approx(sum(nulls) / 2)
    fired = [np.mean(V.numpy() @ rows[m].numpy().sum(0) > 0) for m, V in basis.V.items()]
    assert update.stats["fired"] == pytest.approx(sum(fired) / 2)


def test_the_split_by_source_can_be_left_out_and_is_empty_without_teacher_rows():
    rows, basis, is_teacher, _, _ = scene()
    assert "cos_pre_t" not in intervene(rows, basis, arm_settings("none"), is_teacher, split=False).stats
    alone = intervene(rows, basis, arm_settings("none"), torch.zeros(7, dtype=torch.bool)).stats
    assert alone["cos_pre_t"] is None
    assert alone["cos_pre_s"] == pytest.approx(alone["cos_pre"])


def test_q_egy_is_the_quarantines_share_of_the_gradient_norms():
    rows, basis, is_teacher, _, _ = scene()
    update = intervene(rows, basis, arm_settings("route"), is_teacher)
    kept = math.sqrt(sum(float((g.double() ** 2).sum()) for g in update.keep.values()))
    routed = math.sqrt(sum(float((g.double() ** 2).sum()) for g in update.routed.values()))
    assert update.stats["q_egy"] == pytest.approx(routed / (kept + routed), rel=1e-5)
    zero = {m: torch.zeros_like(g) for m, g in rows.items()}
    assert intervene(zero, basis, arm_settings("route"), is_teacher).stats["q_egy"] == 0.0


@pytest.mark.parametrize("seed", range(6))
def test_route2_sorts_rows_as_an_explicit_loop_does(seed):
    rows, basis, is_teacher, anchors, gate = scene(seed)
    update = intervene(rows, basis, arm_settings("route2"), is_teacher, anchors, gate)
    taus, residuals, flags = [], [], []
    for m, v in basis.v_grad.items():
        v = v.double().numpy()
        cosines = [g @ v / np.linalg.norm(g) if g.any() else 0.0 for g in rows[m].double().numpy()]
        means = {}
        for kind, mask in (("hack", anchors.hack), ("clean", anchors.clean)):
            votes = [
                c * s
                for c, s, x in zip(cosines, anchors.advantage_sign.tolist(), mask, strict=True)
                if x and s
            ]
            means[kind] = 0.9 * getattr(gate, kind)[m] + 0.1 * sum(votes) / len(votes)
            assert getattr(update.gate, kind)[m] == pytest.approx(means[kind], abs=1e-6)
        tau = (means["hack"] + means["clean"]) / 2
        keep, routed = np.zeros(len(v)), np.zeros(len(v))
        for i, g in enumerate(rows[m].double().numpy()):
            flagged = cosines[i] > tau or bool(anchors.hack[i])
            if anchors.advantage_sign[i] != 0:  # the others carry no gradient
                flags.append(flagged)
            if flagged:
                routed += g
            else:
                keep += g
        np.testing.assert_allclose(update.keep[m].numpy(), keep, atol=1e-5)
        np.testing.assert_allclose(update.routed[m].numpy(), routed, atol=1e-5)
        np.testing.assert_allclose(
            (update.keep[m] + update.routed[m]).numpy(), rows[m].sum(0).numpy(), atol=1e-5
        )
        taus.append(tau)
        residuals.append(keep @ v / np.linalg.norm(keep) if keep.any() else 0.0)
    assert update.stats["tau"] == pytest.approx(np.mean(taus), abs=1e-6)
    assert update.stats["resid"] == pytest.approx(np.mean(residuals), abs=1e-5)
    assert update.stats["fired"] == pytest.approx(np.mean(flags), abs=1e-6)
    gaps = [update.gate.hack[m] - update.gate.clean[m] for m in rows]
    assert update.stats["hkgap"] == pytest.approx(np.mean(gaps)) and len(taus) == 3


@pytest.mark.parametrize("seed", range(6))
def test_an_activation_gate_sorts_rollouts_alike_in_all_modules_as_an_explicit_loop_does(seed):
    rows, basis, is_teacher, anchors, _ = scene(seed)
    scores = np.random.default_rng(seed).normal(size=7) * (0.05 if seed == 5 else 3.0)  # below the floor, too
    gate = GateState({SCORE: 0.9}, {SCORE: -0.4})
    arm = arm_settings("route2", gate_signal="activation")
    update = intervene(
        rows, basis, arm, is_teacher, anchors, gate, scores=torch.tensor(scores, dtype=torch.float32)
    )
    mean = sum(scores) / 7
    std = max(math.sqrt(sum((s - mean) ** 2 for s in scores) / 7), 0.1)
    z = [(s - mean) / std for s in scores]
    means = {}
    for kind, mask in (("hack", anchors.hack), ("clean", anchors.clean)):
        votes = [one for one, anchor in zip(z, mask.tolist(), strict=True) if anchor]  # whatever their A
        means[kind] = 0.9 * getattr(gate, kind)[SCORE] + 0.1 * sum(votes) / len(votes)
    tau = (means["hack"] + means["clean"]) / 2
    flags = [one > tau or known for one, known in zip(z, anchors.hack.tolist(), strict=True)]
    for m, g in rows.items():
        sums = {side: np.zeros(g.shape[1]) for side in (True, False)}
        for row, flagged in zip(g.numpy(), flags, strict=True):
            sums[flagged] += row
        np.testing.assert_allclose(update.routed[m].numpy(), sums[True], atol=1e-5)
        np.testing.assert_allclose(update.keep[m].numpy(), sums[False], atol=1e-5)
    assert update.stats["tau"] == pytest.approx(tau, abs=1e-6)
    assert update.stats["hkgap"] == pytest.approx(means["hack"] - means["clean"], abs=1e-6)
    live = [flagged for i, flagged in enumerate(flags) if i != 2]
    assert update.stats["fired"] == pytest.approx(np.mean(live), abs=1e-6)
    with pytest.raises(ValueError, match="scores"):
        intervene(rows, basis, arm, is_teacher, anchors, gate)


def test_an_oracle_gate_routes_the_exploits_and_nothing_else():
    rows, basis, is_teacher, anchors, _ = scene()
    arm, known = arm_settings("route2", gate_signal="oracle"), replace(anchors, kinds=frozenset({"oracle"}))
    update = intervene(rows, basis, arm, is_teacher, known)
    for m, g in rows.items():
        exploits = [i for i, hack in enumerate(anchors.hack.tolist()) if hack]
        torch.testing.assert_close(update.routed[m], sum(g[i] for i in exploits))
        torch.testing.assert_close(update.keep[m], sum(g[i] for i in range(7) if i not in exploits))
    assert update.stats["tau"] is update.stats["hkgap"] is update.gate is None
    assert update.stats["fired"] == pytest.approx(2 / 6)


def test_route2_routes_known_hacks_whatever_their_cosine():
    rows = {"m": torch.tensor([[-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])}
    basis = HackBasis({"m": torch.eye(2)[:1]}, {"m": torch.eye(2)[0]})
    nobody = torch.zeros(3, dtype=torch.bool)
    gate = GateState({"m": 0.5}, {"m": -0.5})
    anchors = Anchors(torch.tensor([True, False, False]), nobody, torch.zeros(3))
    update = intervene(rows, basis, arm_settings("route2"), nobody, anchors, gate)
    assert update.routed["m"].tolist() == [0.0, 0.0]  # the known hack (-1) and the row over tau (+1)
    assert update.keep["m"].tolist() == [-1.0, 0.0]
    without = intervene(rows, basis, arm_settings("route2"), nobody, replace(anchors, hack=nobody), gate)
    assert without.routed["m"].tolist() == [1.0, 0.0]


def test_route2_needs_anchors_and_a_gate():
    rows, basis, is_teacher, anchors, gate = scene()
    for given_anchors, given_gate in ((None, gate), (anchors, None)):
        with pytest.raises(ValueError, match="anchors"):
            intervene(rows, basis, arm_settings("route2"), is_teacher, given_anchors, given_gate)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.parametrize("module", ["b", "free"])
def test_a_gradient_that_is_not_finite_is_refused(bad, arm, module):
    rows, basis, is_teacher, anchors, gate = scene()
    rows[module][4, 1] = bad
    labels = (anchors, gate) if arm == "route2" else ()
    with pytest.raises(FloatingPointError):
        intervene(rows, basis, arm_settings(arm), is_teacher, *labels)


@pytest.mark.parametrize("arm", list(ARMS))
def test_an_arm_does_not_write_into_its_input(arm):
    rows, basis, is_teacher, anchors, gate = scene()
    copies = {m: g.clone() for m, g in rows.items()}
    labels = (anchors, gate) if arm == "route2" else ()
    intervene(rows, basis, arm_settings(arm), is_teacher, *labels)
    assert all(torch.equal(rows[m], g) for m, g in copies.items())
    assert gate == scene()[4]
