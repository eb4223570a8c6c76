"""The loss and its per-rollout gradients, against scalar loops, finite differences and plain autograd."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from projected_grpo import antipasto
from projected_grpo.antipasto import Policy, wrap
from projected_grpo.config import LossConfig, SamplingConfig
from projected_grpo.engine import generate as generating
from projected_grpo.engine import logps as scoring
from projected_grpo.engine import passes, prefix, tangent
from projected_grpo.engine.batch import collate, collate_shared
from projected_grpo.engine.models import checkpointed
from projected_grpo.engine.passes import microbatches
from projected_grpo.errors import UserError
from projected_grpo.grpo import (
    RATIO_CAP,
    RolloutGrads,
    advantages,
    grpo_loss,
    k3,
    per_rollout_grads,
)
from projected_grpo.rollout import Rollout

# Advantages


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 3.0, 3.5]), min_size=4, max_size=4), min_size=1, max_size=5),
    st.booleans(),
)
def test_advantages_follow_an_explicit_loop(groups, unbiased):
    got = advantages(torch.tensor(groups, dtype=torch.float64), unbiased)
    for row, rewards in zip(got.tolist(), groups, strict=True):
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for a, r in zip(row, rewards, strict=True):
            assert a == pytest.approx((r - mean) if unbiased else (r - mean) / (std + 1e-4), abs=1e-12)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.1, 3.5, -7.3])
@pytest.mark.parametrize("group", [2, 3, 7])
def test_a_flat_group_has_advantage_exactly_zero(unbiased, reward, group):
    rewards = torch.tensor([[reward] * group, [1.0] + [0.0] * (group - 1)])
    got = advantages(rewards, unbiased)
    assert not got[0].any() and bool(got[1].any())


# The loss


def per_token(logp, old, A, cap, clip=0.2, *, truncated):
    """The objective of every token, as grpo_loss has it for one rollout of one token."""
    size = (torch.ones(1, 1, dtype=torch.bool), LossConfig(clip=clip), 1, 1)
    with mock.patch("projected_grpo.grpo.RATIO_CAP", cap):
        rows = [
            [
                -grpo_loss(
                    logp[i, t].view(1, 1),
                    old[i, t].view(1, 1),
                    None,
                    A[i : i + 1],
                    *size,
                    truncated=truncated,
                )
                for t in range(logp.shape[1])
            ]
            for i in range(logp.shape[0])
        ]
    return torch.stack([torch.stack(row) for row in rows])


def surrogate(logp, old, A, clip, cap):
    return per_token(logp, old, A, cap, clip, truncated=False)


def truncated_surrogate(logp, old, A, cap):
    return per_token(logp, old, A, cap, truncated=True)


def slow_surrogate(logp: float, old: float, A: float, clip: float, cap: float) -> tuple[float, float]:
    """Value and derivative in logp of one token's objective, case by case."""
    ratio = math.exp(logp - old)
    if A >= 0:
        return ((1 + clip) * A, 0.0) if ratio > 1 + clip else (ratio * A, ratio * A)
    if ratio < 1 - clip:
        return (1 - clip) * A, 0.0
    weight = min(ratio, cap)  # truncated: the value and the step it asks for stop growing
    return weight * A, weight * A


@given(
    st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 3)), min_size=1, max_size=6),
    st.sampled_from([-1.5, -0.1, 0.0, 0.7, 2.0]),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([1.2, 3.0, 100.0]),
)
def test_surrogate_and_its_gradient_follow_a_scalar_loop(tokens, A, clip, cap):
    logp = torch.tensor([[x for x, _ in tokens]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[x - d for x, d in tokens]], dtype=torch.float64)
    value = surrogate(logp, old, torch.tensor([A], dtype=torch.float64), clip, cap)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    for t, (x, d) in enumerate(tokens):
        if min(abs(math.exp(d) - edge) for edge in (1 - clip, 1 + clip)) < 1e-9:
            continue  # at a kink either side is right
        expected = slow_surrogate(x, x - d, A, clip, cap)
        assert (float(value[0, t].detach()), float(gradient[0, t])) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("log_ratio", "A", "value", "slope"),
    [
        (math.log(1.5), 1.0, 1.2, 0.0),  # clipped above
        (math.log(0.5), 1.0, 0.5, 0.5),  # a good token that became unlikely is pulled back
        (math.log(0.5), -1.0, -0.8, 0.0),  # clipped below
        (math.log(1.5), -1.0, -1.5, -1.5),
        (math.log(50.0), -1.0, -3.0, -3.0),  # truncated, and still pushed down
        (math.log(50.0), 1.0, 1.2, 0.0),
        (0.0, 1.0, 1.0, 1.0),
        (0.0, -1.0, -1.0, -1.0),
    ],
)
def test_surrogate_in_each_case(log_ratio, A, value, slope):
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    got = surrogate(logp, logp.detach() - log_ratio, torch.tensor([A], dtype=torch.float64), 0.2, 3.0)
    got.sum().backward()
    assert got.item() == pytest.approx(value) and logp.grad.item() == pytest.approx(slope)


def test_a_cap_at_the_clip_leaves_positive_advantages_clipped():
    logp = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    got = surrogate(logp, logp.detach() - 1, torch.tensor([0.7], dtype=torch.float64), 0.2, 1.2)
    got.sum().backward()
    assert got.item() == pytest.approx(0.84) and logp.grad.item() == 0


def slow_truncated(logp: float, old: float, A: float, cap: float) -> float:
    """Value and derivative in logp, which are the same, of one token's objective."""
    return min(math.exp(logp) / math.exp(old), cap) * A


@given(
    st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 3)), min_size=1, max_size=6),
    st.sampled_from([-1.5, 0.0, 2.0]),
    st.sampled_from([1.2, 3.0, 100.0]),
)
def test_the_truncated_surrogate_and_its_gradient_follow_a_scalar_loop(tokens, A, cap):
    logp = torch.tensor([[x for x, _ in tokens]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[x - d for x, d in tokens]], dtype=torch.float64)
    value = truncated_surrogate(logp, old, torch.tensor([A], dtype=torch.float64), cap)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    for t, (x, d) in enumerate(tokens):
        expected = slow_truncated(x, x - d, A, cap)
        assert float(value[0, t].detach()) == float(gradient[0, t]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_truncated_weights_give_the_policys_own_gradient_where_clipping_does_not(A):
    """Tokens drawn by a sampler whose ratios are .62 to 1.38; the mean over its draws is taken exactly."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.tensor([-0.4, 0.4, -0.3, 0.3, 0.1, -0.1], dtype=torch.float64)
    logits.requires_grad_()
    logp, old = logits.log_softmax(0), (logits.detach() + noise).log_softmax(0)
    advantage = A * torch.tensor([1.0, 0.9, 0.4, 1.3, 0.2, 0.8], dtype=torch.float64)

    def mean_gradient(objective, p):
        (found,) = torch.autograd.grad((p * objective[:, 0]).sum(), logits, retain_graph=True)
        return found

    expected = mean_gradient(advantage[:, None] * logp[:, None], logp.exp().detach())
    column = (logp[:, None], old[:, None], advantage)
    truncated = mean_gradient(truncated_surrogate(*column, 3.0), old.exp())
    torch.testing.assert_close(truncated, expected, rtol=1e-12, atol=1e-12)
    clipped = mean_gradient(surrogate(*column, 0.2, 3.0), old.exp())
    assert float((clipped - expected).norm() / expected.norm()) > 0.1


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=8))
def test_k3_is_its_closed_form_and_never_negative(pairs):
    logp, ref = (torch.tensor([column], dtype=torch.float64) for column in zip(*pairs, strict=True))
    got = k3(logp, ref)[0].tolist()
    for k, (x, y) in zip(got, pairs, strict=True):
        assert k >= -1e-12
        assert k == pytest.approx(math.exp(y - x) - (y - x) - 1, rel=1e-12, abs=1e-12)
    assert not k3(logp, logp).any()


def test_k3_is_an_unbiased_estimate_of_the_kl():
    p, q = (
        torch.softmax(torch.randn(6, generator=torch.Generator().manual_seed(s)).double(), 0) for s in (0, 1)
    )
    exact = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    assert float((p * k3(p.log()[None], q.log()[None])[0]).sum()) == pytest.approx(exact)


# Microbatches


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 200),
    st.data(),
)
def test_microbatches_hold_each_index_once_within_the_budget(lengths, budget, data):
    rollouts = [Rollout((1,) * p, (2,) * c, "") for p, c in lengths]
    which = data.draw(st.lists(st.sampled_from(range(len(rollouts))), unique=True))
    batches = list(microbatches(rollouts, which, budget))
    assert sorted(i for batch in batches for i in batch) == sorted(which)
    for batch in batches:
        padded = (max(lengths[i][0] for i in batch) + max(lengths[i][1] for i in batch)) * len(batch)
        assert batch and (padded <= budget or len(batch) == 1)


def test_a_large_budget_is_one_microbatch():
    rollouts = [Rollout((1, 2), (3,) * c, "") for c in (1, 5, 3)]
    assert list(microbatches(rollouts, [0, 1, 2], 21)) == [[1, 2, 0]]
    assert len(list(microbatches(rollouts, [0, 1, 2], 20))) == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 200),
)
def test_microbatches_count_the_prompt_of_a_part_once(rows, budget):
    widths = (3, 17, 30, 9)
    rollouts = [Rollout((1,) * widths[part], (2,) * c, "") for part, c in rows]
    parts = [part for part, _ in rows]
    batches = list(microbatches(rollouts, range(len(rows)), budget, parts))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        width = max(widths[parts[i]] for i in batch)
        length = max(len(rollouts[i].completion_ids) for i in batch)
        assert width * len({parts[i] for i in batch}) + length * len(batch) <= budget or len(batch) == 1
    order = [parts[i] for batch in batches for i in batch]
    assert [p for p, q in zip(order, [None, *order], strict=False) if p != q] == list(dict.fromkeys(order))


# Per-rollout gradients

MAX_NEW = 8
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13), (5, 6, 7), (14,), (8, 9)]
COMPLETIONS = [(3, 1, 4, 1, 5, 9), (2, 7), (6, 5, 3, 5), (8, 9, 7, 9, 3, 2, 3, 8), (4,)]
ADVANTAGES = (1.0, -0.5, 0.0, -1.25, 2.0)
CLASSIC = LossConfig(unbiased=False)


@pytest.fixture
def policy(small_model) -> Policy:
    """A float64 policy whose adapter parameters are away from zero, so that it differs from its reference."""
    policy = wrap(small_model("qwen3"), None)
    generator = torch.Generator().manual_seed(0)
    for layer in policy.layers.values():
        for parameter in (layer.delta_s, layer.delta_hack):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def alone(policy: Policy, rollout: Rollout) -> Tensor:
    """Log-probabilities of one completion by itself: no padding, whole logits, log-softmax."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    start = len(rollout.prompt_ids)
    table = torch.log_softmax(policy.model(input_ids=ids).logits[0], -1)
    return torch.stack([table[start + t - 1, token] for t, token in enumerate(rollout.completion_ids)])


@pytest.fixture
def rollouts(policy: Policy) -> list[Rollout]:
    """On- and off-policy rollouts; the old log-probabilities put ratios on both sides of the clip."""
    drift = torch.tensor([0.05, -0.1, 0.5, -0.6, 0.15, -0.02, 1.05, 0.3], dtype=torch.float64)
    with torch.no_grad(), policy.bind(policy.deltas()):
        found = [Rollout(p, c, "") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        logps = [alone(policy, r) for r in found]
    return [
        r if i == 1 else replace(r, logp_old=logp - drift[: len(logp)])
        for i, (r, logp) in enumerate(zip(found, logps, strict=True))
    ]


def slow_loss(
    policy: Policy,
    rollout: Rollout,
    A: float,
    loss: LossConfig,
    n: int,
    deltas: Mapping[str, Tensor],
    *,
    truncated: bool = False,
) -> Tensor:
    """The loss of one rollout token by token, differentiable in deltas by plain autograd."""
    with policy.bind(deltas):
        logp = alone(policy, rollout)
    with torch.no_grad(), policy.bind(None):
        ref = alone(policy, rollout)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(logp)):
        old = logp[t].detach() if rollout.logp_old is None else rollout.logp_old[t]
        if truncated:
            value = slope = slow_truncated(logp[t].item(), old.item(), A, RATIO_CAP)
        else:
            value, slope = slow_surrogate(logp[t].item(), old.item(), A, loss.clip, RATIO_CAP)
        objective = value + slope * (logp[t] - logp[t].detach())
        kl = torch.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
        denominator = n * MAX_NEW if loss.unbiased else n * len(logp)
        total = total + (-objective + loss.beta * kl) / denominator
    return total


def grads(
    policy: Policy,
    rollouts: Sequence[Rollout],
    loss: LossConfig,
    A: Sequence[float] = ADVANTAGES,
    *,
    deltas: Mapping[str, Tensor] | None = None,
    with_reference: bool = False,
    truncated: bool = False,
) -> RolloutGrads:
    advantage = torch.tensor(A, dtype=torch.float64)
    return per_rollout_grads(
        *(policy, rollouts, advantage, loss, MAX_NEW),
        deltas=deltas,
        with_reference=with_reference,
        truncated=truncated,
    )


@pytest.mark.parametrize(
    ("loss", "truncated"),
    [(LossConfig(unbiased=unbiased, beta=beta), False) for unbiased in (True, False) for beta in (0.0, 0.3)]
    + [(LossConfig(), True)],
    ids=["unbiased", "unbiased-kl", "classic", "classic-kl", "truncated"],
)
def test_loss_and_rows_are_those_of_plain_autograd_one_rollout_at_a_time(policy, rollouts, loss, truncated):
    got = grads(policy, rollouts, loss, truncated=truncated)
    total = 0.0
    for i, (rollout, A) in enumerate(zip(rollouts, ADVANTAGES, strict=True)):
        if A == 0:
            continue
        leaves = {m: d.clone().requires_grad_() for m, d in policy.deltas().items()}
        value = slow_loss(policy, rollout, A, loss, len(rollouts), leaves, truncated=truncated)
        expected = torch.autograd.grad(value, list(leaves.values()))
        total += float(value.detach())
        for m, gradient in zip(leaves, expected, strict=True):
            assert float(gradient.norm()) > 0
            torch.testing.assert_close(
                got.rows[m][i], gradient, rtol=1e-6, atol=1e-6 * float(gradient.norm())
            )
    assert got.loss == pytest.approx(total, rel=1e-6)


def test_rows_are_the_slopes_of_the_loss(policy, rollouts, monkeypatch):
    monkeypatch.setattr("projected_grpo.grpo.RATIO_CAP", 100.0)
    loss = LossConfig(beta=0.2, clip=10.0)  # no kink and no cap within the difference
    got = grads(policy, rollouts, loss)
    for m, j in (
        ("model.layers.0.self_attn.q_proj", 3),
        ("model.layers.1.mlp.down_proj", 0),
        ("model.layers.0.self_attn.v_proj", 7),
    ):
        for i in (0, 1, 3, 4):
            if rollouts[i].logp_old is None:
                continue  # its ratio is 1 by definition at every point
            values = []
            for step in (1e-5, -1e-5):
                deltas = policy.deltas()
                deltas[m][j] += step
                with torch.no_grad():
                    values.append(slow_loss(policy, rollouts[i], ADVANTAGES[i], loss, len(rollouts), deltas))
            slope = float(values[0] - values[1]) / 2e-5
            assert float(got.rows[m][i, j]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("unbiased", [True, False])
def test_any_token_budget_gives_the_same_gradients(policy, rollouts, unbiased):
    loss = LossConfig(unbiased=unbiased, beta=0.1, tokens_per_microbatch=10**6)
    whole = grads(policy, rollouts, loss)
    for budget in (1, 20, 30):
        parts = grads(policy, rollouts, replace(loss, tokens_per_microbatch=budget))
        assert parts.loss == pytest.approx(whole.loss, rel=1e-9)
        for m in whole.rows:
            scale = float(whole.rows[m].norm())
            torch.testing.assert_close(parts.rows[m], whole.rows[m], rtol=1e-9, atol=1e-9 * scale)
        torch.testing.assert_close(parts.kl, whole.kl, equal_nan=True)


def test_unbiased_divides_by_a_fixed_length_and_classic_by_each_rollouts_own(policy, rollouts):
    unbiased, classic = grads(policy, rollouts, LossConfig()), grads(policy, rollouts, CLASSIC)
    for m in unbiased.rows:
        for i, rollout in enumerate(rollouts):
            length = len(rollout.completion_ids)
            scaled = unbiased.rows[m][i] * MAX_NEW / length
            torch.testing.assert_close(classic.rows[m][i], scaled, rtol=0, atol=1e-6 * float(scaled.norm()))


def count_rows(policy: Policy, rows: list[int]):
    return policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )


@pytest.mark.parametrize(("beta", "passes"), [(0.0, 1), (0.5, 2)])
def test_rollouts_without_advantage_are_not_run_and_have_zero_rows(policy, rollouts, beta, passes):
    ran: list[int] = []
    handle = count_rows(policy, ran)
    got = grads(policy, rollouts, LossConfig(beta=beta))
    assert ran == [4] * passes
    assert all(not rows[2].any() for rows in got.rows.values())
    assert torch.isnan(got.logp).tolist() == [False, False, True, False, False]
    ran.clear()
    flat = grads(policy, rollouts, LossConfig(beta=beta), [0.0] * 5)
    handle.remove()
    assert not ran and flat.loss == 0.0
    assert all(rows.shape == (5, policy.ranks[m]) and not rows.any() for m, rows in flat.rows.items())
    assert bool(torch.isnan(flat.logp).all())


def test_dropped_rollouts_still_count_in_the_denominator(policy, rollouts):
    """The loss is over n rollouts, flat or not: dropping is a saving and must not change the step."""
    five = grads(policy, rollouts, LossConfig())
    four = grads(policy, [r for i, r in enumerate(rollouts) if i != 2], LossConfig(), (1.0, -0.5, -1.25, 2.0))
    for m in five.rows:
        kept = five.rows[m][[0, 1, 3, 4]]
        torch.testing.assert_close(kept * 5, four.rows[m] * 4, rtol=1e-6, atol=1e-12)


def test_no_gradient_or_value_of_a_parameter_is_touched(policy, rollouts):
    layers = list(policy.layers.values())
    layers[0].delta_s.grad = torch.full_like(layers[0].delta_s, 7.0)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    grads(policy, rollouts, LossConfig(beta=0.1))
    assert bool((layers[0].delta_s.grad == 7.0).all())
    assert all(p.grad is None for p in policy.model.parameters() if p is not layers[0].delta_s)
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert all(layer.bound == (None, None) for layer in layers)


def test_the_gradient_can_be_taken_at_other_deltas(policy, rollouts):
    fresh = [replace(r, logp_old=None) for r in rollouts]
    deployed = policy.deltas(ablate_quarantine=True)
    there = grads(policy, fresh, LossConfig(), deltas=deployed)
    here = grads(policy, fresh, LossConfig())
    assert all(not torch.allclose(there.rows[m], here.rows[m], rtol=1e-3) for m in here.rows)
    for layer in policy.layers.values():
        layer.delta_hack.data.zero_()
    moved = grads(policy, fresh, LossConfig())
    assert all(torch.equal(there.rows[m], moved.rows[m]) for m in moved.rows)


def test_a_pair_gives_the_difference_of_mean_log_likelihood_gradients(policy):
    """The identity behind extraction: A = +1 and -1 give grad NLL(hack) - grad NLL(clean), over n = 2."""
    hack, clean = (Rollout(PROMPTS[1], COMPLETIONS[i], "") for i in (0, 3))
    got = grads(policy, [hack, clean], CLASSIC, (1.0, -1.0))
    leaves = {m: d.clone().requires_grad_() for m, d in policy.deltas().items()}
    with policy.bind(leaves):
        difference = -alone(policy, hack).mean() + alone(policy, clean).mean()
    expected = torch.autograd.grad(difference, list(leaves.values()))
    for m, gradient in zip(leaves, expected, strict=True):
        scale = float(gradient.norm())
        torch.testing.assert_close(2 * got.rows[m].sum(0), gradient, rtol=1e-6, atol=1e-6 * scale)


def test_a_descent_step_along_a_hack_row_makes_the_hack_likelier(policy):
    hack = Rollout(PROMPTS[1], COMPLETIONS[0], "")
    rows = grads(policy, [hack], CLASSIC, (1.0,)).rows
    logps = []
    for step in (0.0, 1e-3):
        with torch.no_grad(), policy.bind({m: d - step * rows[m][0] for m, d in policy.deltas().items()}):
            logps.append(float(alone(policy, hack).sum()))
    assert logps[1] > logps[0]


def test_figures_are_means_over_each_rollouts_own_tokens(policy, rollouts):
    got = grads(policy, rollouts, LossConfig(), with_reference=True)
    for i, rollout in enumerate(rollouts):
        if ADVANTAGES[i] == 0:
            continue
        with torch.no_grad(), policy.bind(policy.deltas()):
            logp = alone(policy, rollout)
        with torch.no_grad(), policy.bind(None):
            ref = alone(policy, rollout)
        kl = [math.exp(b - a) - (b - a) - 1 for a, b in zip(logp.tolist(), ref.tolist(), strict=True)]
        assert float(got.logp[i]) == pytest.approx(float(logp.mean()), rel=1e-5)
        assert float(got.ref_logp[i]) == pytest.approx(float(ref.mean()), rel=1e-5)
        assert float(got.kl[i]) == pytest.approx(sum(kl) / len(kl), rel=1e-5)
        gap = 0.0 if rollout.logp_old is None else float((logp - rollout.logp_old).abs().mean())
        assert float(got.gap[i]) == pytest.approx(gap, rel=1e-5, abs=1e-7)


def test_without_a_reference_pass_its_figures_are_missing_and_the_rows_the_same(policy, rollouts):
    plain = grads(policy, rollouts, LossConfig())
    measured = grads(policy, rollouts, LossConfig(), with_reference=True)
    assert bool(torch.isnan(plain.kl).all()) and bool(torch.isnan(plain.ref_logp).all())
    assert int(torch.isnan(measured.kl).sum()) == 1
    assert all(torch.equal(plain.rows[m], measured.rows[m]) for m in plain.rows)


def test_the_kl_alone_pulls_towards_the_reference(policy, rollouts):
    """With beta large the step goes against the gradient of the mean K3."""
    loss = LossConfig(beta=1e4)
    got = grads(policy, rollouts, loss)
    step = {m: rows.sum(0) for m, rows in got.rows.items()}
    size = math.sqrt(sum(float((g**2).sum()) for g in step.values()))
    moved = {m: d - 1e-3 * step[m] / size for m, d in policy.deltas().items()}
    live = [r for r, A in zip(rollouts, ADVANTAGES, strict=True) if A]
    before, after = (
        grads(policy, live, LossConfig(), (1.0,) * 4, deltas=d, with_reference=True).kl
        for d in (policy.deltas(), moved)
    )
    weights = torch.tensor([len(r.completion_ids) for r in live])
    assert float((after * weights).sum()) < float((before * weights).sum())


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_5"])
def test_rows_are_single_gradients_in_padded_batches_of_other_families(small_model, family):
    policy = wrap(small_model(family), None)
    rollouts = [Rollout(p, c, "") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    A = (1.0, -0.5, 1.0, -1.25, 2.0)
    together = grads(policy, rollouts, LossConfig(), A)
    relative = 1e-4 if family == "qwen3_5" else 1e-7  # the gated delta rule computes in float32 inside
    for i, rollout in enumerate(rollouts):
        single = grads(policy, [rollout], LossConfig(), A[i : i + 1])
        for m, rows in together.rows.items():
            expected = single.rows[m][0] / len(rollouts)
            torch.testing.assert_close(rows[i], expected, rtol=0, atol=relative * float(expected.norm()))


def test_bfloat16_weights_give_float32_rows(small_model):
    policy = wrap(small_model("qwen3", torch.bfloat16), None)
    rollouts = [Rollout(p, c, "") for p, c in zip(PROMPTS[:2], COMPLETIONS[:2], strict=True)]
    rows = grads(policy, rollouts, LossConfig(), (1.0, -1.0)).rows
    exact = grads(wrap(small_model("qwen3"), None), rollouts, LossConfig(), (1.0, -1.0)).rows
    for g in rows.values():
        assert g.dtype == torch.float32 and bool(g.isfinite().all())
    m = "model.layers.1.mlp.down_proj"  # nearest the loss, so least rounded
    cosine = torch.cosine_similarity(rows[m].double().flatten(), exact[m].flatten(), dim=0)
    assert float(cosine) > 0.9


# Prompts that are run once, and parts: rows that are sums over rollouts

PARTS = (0, 1, 0, 2, 2, 0)


def with_common_prompts(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Six rollouts in three parts; part 2 has a prompt of one token."""
    extra = Rollout((), (9, 9, 1), "")
    prompts = {0: (5, 6, 7), 1: (8, 9, 10, 11, 12, 13), 2: (14,)}
    return [replace(r, prompt_ids=prompts[part]) for part, r in zip(PARTS, [*rollouts, extra], strict=True)]


@pytest.mark.parametrize("budget", [1, 25, 16384])
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(unbiased=False, beta=0.3)])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_5"])
@pytest.mark.parametrize(
    ("parts", "first"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (PARTS, [0, 1, 3]),
        ((0, 1, 2, 3, 3, 0), [0, 1, 2, 3]),
        ((0, 1, 1, 0, 1, 0), [0, 1]),
    ],
    ids=["a row each", "by prompt", "two of a prompt", "across prompts"],
)
def test_rows_are_sums_of_what_each_rollout_gives_by_itself(
    small_model, monkeypatch, family, loss, budget, parts, first
):
    policy = wrap(small_model(family), None)
    generator = torch.Generator().manual_seed(1)
    for layer in policy.layers.values():
        layer.delta_s.data.copy_(0.2 * torch.randn(layer.delta_s.shape, generator=generator))
    rollouts = with_common_prompts([Rollout(p, c, "") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    A = torch.tensor((1.0, -0.5, 0.25, -1.25, 2.0, 0.0), dtype=torch.float64)
    loss = replace(loss, tokens_per_microbatch=budget)
    with monkeypatch.context() as patch:
        patch.setattr(passes, "can_share", lambda model: False)
        single = per_rollout_grads(policy, rollouts, A, loss, MAX_NEW, with_reference=True)
    shared = per_rollout_grads(policy, rollouts, A, loss, MAX_NEW, with_reference=True, parts=parts)
    parts = range(6) if parts is None else parts
    assert shared.first.tolist() == first
    relative = 1e-4 if family == "qwen3_5" else 1e-7  # the gated delta rule computes in float32 inside
    assert shared.loss == pytest.approx(single.loss, rel=relative)
    for m, rows in shared.rows.items():
        for part, row in enumerate(rows):
            expected = sum(single.rows[m][i] for i, p in enumerate(parts) if p == part)
            # Norms compute in float32 inside: a small row of many is rounded as the large ones are.
            scale = single.rows[m] if len(first) == 6 else expected
            torch.testing.assert_close(row, expected, rtol=0, atol=relative * float(scale.norm()))
    for name in ("logp", "ref_logp", "kl", "gap"):
        torch.testing.assert_close(
            getattr(shared, name), getattr(single, name), rtol=1e-4, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("parts", [None, (0, 0, 0, 0, 0)])
def test_a_shared_prompt_is_run_once(policy, monkeypatch, parts):
    rollouts = [Rollout((5, 6, 7, 8), c, "") for c in COMPLETIONS]
    fed: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        policy.model.base_model,
        "forward",
        lambda *a, _run=policy.model.base_model.forward, **k: (
            fed.append(tuple(k["input_ids"].shape)),
            _run(*a, **k),
        )[1],
    )
    A = torch.ones(5, dtype=torch.float64)
    per_rollout_grads(policy, rollouts, A, LossConfig(), MAX_NEW, parts=parts)
    assert fed == [(1, 3), (5, 8)]  # the prompt but for its last token; that token and 8 - 1 of completion


def test_the_products_of_a_prompt_are_made_once(policy, monkeypatch):
    """However many backward passes go through it."""
    made: list[tuple[int, ...]] = []
    real, (layer,) = (
        torch.nn.functional.linear,
        [layer for name, layer in policy.layers.items() if name.endswith("0.mlp.down_proj")],
    )

    def linear(x, weight, bias=None):
        if weight.data_ptr() == layer.Vh.data_ptr():
            made.append(tuple(x.shape[:2]))
        return real(x, weight, bias)

    monkeypatch.setattr(tangent.F, "linear", linear)
    rollouts = [Rollout((5, 6, 7, 8), c, "") for c in COMPLETIONS]
    per_rollout_grads(policy, rollouts, torch.ones(5).double(), LossConfig(), MAX_NEW)
    assert made == [(5, 8), (1, 3)]
    assert not any(layer.fast for layer in policy.layers.values())


def test_prompts_run_once_are_rounded_no_more_in_half_precision(small_model, monkeypatch):
    """Unmerged layers: rows of both ways are as near to those in float64."""
    rollouts = [Rollout((5, 6, 7, 8, 9), c, "") for c in COMPLETIONS]
    A = torch.tensor((1.0, -0.5, 1.0, -1.25, 2.0))
    exact, half = (wrap(small_model("qwen3", dtype), None) for dtype in (torch.float64, torch.bfloat16))
    expected = per_rollout_grads(exact, rollouts, A.double(), LossConfig(), MAX_NEW).rows
    shared = per_rollout_grads(half, rollouts, A, LossConfig(), MAX_NEW).rows
    monkeypatch.setattr(passes, "can_share", lambda model: False)
    apart = per_rollout_grads(half, rollouts, A, LossConfig(), MAX_NEW).rows

    def error(found):
        return sum(float((found[m].double() - rows).norm() ** 2) for m, rows in expected.items())

    assert error(shared) < 1.5 * error(apart)
    assert error(shared) < 0.1 * sum(float(rows.norm() ** 2) for rows in expected.values())


def test_a_first_layer_whose_keys_hang_on_no_adapter_is_no_obstacle(monkeypatch):
    """As in Phi-3, whose queries, keys and values are one Linear that is not adapted."""
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Phi3Config(**sizes, num_key_value_heads=2, vocab_size=48, pad_token_id=0)
    for layers in (1, 2):  # with one, no key hangs on an adapter parameter
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        torch.manual_seed(0)
        policy = wrap(transformers.Phi3ForCausalLM(config).double().eval(), None)
        rollouts = [Rollout((5, 6, 7), c, "") for c in COMPLETIONS]
        A = torch.tensor((1.0, -0.5, 1.0, -1.25, 2.0), dtype=torch.float64)
        got = per_rollout_grads(policy, rollouts, A, LossConfig(), MAX_NEW)
        with monkeypatch.context() as patch:
            patch.setattr(passes, "can_share", lambda model: False)
            expected = per_rollout_grads(policy, rollouts, A, LossConfig(), MAX_NEW)
        for m, rows in expected.rows.items():
            torch.testing.assert_close(got.rows[m], rows, rtol=0, atol=1e-7 * float(rows.norm()))


# The output layer in chunks


def in_chunks(patch, policy: Policy, tokens: int) -> list[int]:
    """Make the loss take the output layer so many tokens at a time; returns how many tokens each call had."""
    patch.setattr(scoring, "CHUNK_LOGITS", tokens * 48)
    real, sizes = torch.nn.functional.linear, []
    head = policy.model.lm_head.weight.data_ptr()

    def linear(x, weight, bias=None):
        if weight.data_ptr() == head:
            sizes.append(x.numel() // x.shape[-1])
        return real(x, weight, bias)

    patch.setattr(scoring.F, "linear", linear)
    return sizes


def moved_policy_and_rollouts(model):
    """A policy whose adapter is not zero, rollouts whose prompts are those of PARTS, and their advantages."""
    policy = wrap(model, None)
    generator = torch.Generator().manual_seed(1)
    for layer in policy.layers.values():
        layer.delta_s.data.copy_(0.2 * torch.randn(layer.delta_s.shape, generator=generator))
    found = with_common_prompts([Rollout(p, c, "") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    return policy, found, torch.tensor((1.0, -0.5, 0.25, -1.25, 2.0, 0.5), dtype=torch.float64)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("parts", [None, PARTS])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_chunks_of_the_output_layer_change_nothing(small_model, monkeypatch, family, parts, tokens):
    policy, found, A = moved_policy_and_rollouts(small_model(family))
    loss = LossConfig(beta=0.3)
    whole = per_rollout_grads(policy, found, A, loss, MAX_NEW, parts=parts)
    with monkeypatch.context() as patch:
        sizes = in_chunks(patch, policy, tokens)
        chunked = per_rollout_grads(policy, found, A, loss, MAX_NEW, parts=parts)
    answers = sum(len(r.completion_ids) for r in found)
    looked = 8  # to see that the logits are the output layer's own
    assert sum(sizes) == 2 * answers + looked, "policy and reference, and no padding"
    assert sorted(sizes)[-2] <= tokens
    relative = 1e-5 if family == "qwen3_5" else 1e-9  # the gated delta rule computes in float32 inside
    assert chunked.loss == pytest.approx(whole.loss, rel=relative)
    for m, rows in chunked.rows.items():
        scale = float(whole.rows[m].norm())
        torch.testing.assert_close(rows, whole.rows[m], rtol=0, atol=relative * scale)
    for name in ("logp", "ref_logp", "kl", "gap"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=1e-5, atol=1e-7)


def test_a_policy_is_merged_once_a_loss_and_its_output_layer_looked_at_once(small_model, monkeypatch):
    policy, found, A = moved_policy_and_rollouts(small_model("qwen3"))
    looked, merged = [], []
    probe, merge = antipasto.has_bare_head, antipasto.merged_weight
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 2 * 48)
    monkeypatch.setattr(antipasto, "has_bare_head", lambda model: looked.append(1) or probe(model))
    monkeypatch.setattr(
        antipasto, "merged_weight", lambda layer, *more: merged.append(1) or merge(layer, *more)
    )
    for losses in (1, 2):
        per_rollout_grads(policy, found, A, LossConfig(tokens_per_microbatch=1), MAX_NEW)
        assert len(looked) == 1 and len(merged) == losses * len(policy.layers)


@pytest.mark.parametrize("chunk", [None, 3])
def test_logits_of_half_precision_are_computed_in_float32(small_model, monkeypatch, chunk):
    """In the sampler and in both ways of the loss; the oracle has the model's last hidden states."""
    model = small_model("qwen3", torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # logits from 32 to 64, which bfloat16 has in steps of 1/4
    policy, seen, real = wrap(model, None), [], scoring.per_token_logps
    for module in (scoring, generating, prefix):
        monkeypatch.setattr(module, "per_token_logps", lambda x, ids: seen.append(x) or real(x, ids))
    rollouts = [Rollout((5, 6, 7), c, "") for c in COMPLETIONS]
    with torch.no_grad():
        batch = collate(rollouts, policy.device)
        states = model.base_model(input_ids=batch.ids).last_hidden_state
        logits = states.float() @ model.lm_head.weight.float().T
        expected = batch.spread(
            batch.before_answers(logits).log_softmax(-1)[range(len(batch.answers)), batch.answers]
        )
        torch.testing.assert_close(
            scoring.completion_logps(model, batch, chunk), expected, rtol=1e-5, atol=1e-5
        )
        shared = prefix.shared_logps(policy, collate_shared(rollouts, policy.device), chunk)
        assert float((shared - expected).abs().max()) < 1.5
    generating.sample(policy, [(5, 6, 7)], [[1, 2]], SamplingConfig(max_new=4), frozenset())
    assert seen and all(x.dtype == torch.float32 for x in seen)
    assert all(float((x.bfloat16() != x).float().mean()) > 0.5 for x in seen)
    assert model(input_ids=batch.ids).logits.dtype == torch.bfloat16, "only there"


def test_a_loss_that_fits_into_one_chunk_is_the_models_own_logits(policy, rollouts, monkeypatch):
    live = [r for r, a in zip(rollouts, ADVANTAGES, strict=True) if a]
    shortest = min(len(r.prompt_ids) for r in live)
    columns = 1 + max(len(r.prompt_ids) + len(r.completion_ids) for r in live) - shortest
    needed = len(live) * columns * 48
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "CHUNK_LOGITS", needed)
        patch.setattr(scoring, "chunked_logps", None)
        exact = grads(policy, rollouts, LossConfig())
    usual = grads(policy, rollouts, LossConfig())
    assert all(torch.equal(exact.rows[m], usual.rows[m]) for m in usual.rows)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", needed - 1)
    monkeypatch.setattr(scoring, "chunked_logps", None)
    with pytest.raises(TypeError):
        grads(policy, rollouts, LossConfig())


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_a_model_that_caps_its_logits_is_not_chunked(monkeypatch, cap):
    """Gemma 2's logits are not what its output layer says, if only a little."""
    shape = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma2Config(**shape, **heads, final_logit_softcapping=cap)
    policy = wrap(transformers.Gemma2ForCausalLM(config).eval(), None)
    found = [Rollout((5, 6), c, "") for c in COMPLETIONS[:2]]
    whole = grads(policy, found, LossConfig(), (1.0, -1.0))
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 48)
    assert scoring.head_chunk(policy, 12) is None
    again = grads(policy, found, LossConfig(), (1.0, -1.0))
    assert all(torch.equal(again.rows[m], whole.rows[m]) for m in whole.rows)


def test_an_output_layer_that_is_trained_is_not_chunked(small_model):
    model = small_model("qwen3")
    batch = collate([Rollout((5, 6), (7, 8), "")], torch.device("cpu"))
    with pytest.raises(ValueError, match="output layer is trained"):
        scoring.completion_logps(model, batch, chunk=1)


# Layers that run again in the backward pass


@pytest.mark.parametrize("parts", [None, PARTS])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_layers_that_run_again_change_no_gradient(small_model, family, parts):
    policy, found, A = moved_policy_and_rollouts(small_model(family))
    loss = LossConfig(beta=0.3)
    kept = per_rollout_grads(policy, found, A, loss, MAX_NEW, parts=parts)
    modes = [module.training for module in policy.model.modules()]
    ran: list[bool] = []
    gate = policy.model.model.layers[0].mlp.gate_proj
    handle = gate.register_forward_hook(lambda *_: ran.append(gate.bound[0] is not None))
    again = per_rollout_grads(policy, found, A, replace(loss, grad_checkpoint=True), MAX_NEW, parts=parts)
    handle.remove()
    assert ran == [False, True, True], "the reference; the forward pass; once more, with the same rows bound"
    relative = 1e-4 if family == "qwen3_5" else 1e-9  # the gated delta rule computes in float32 inside
    assert again.loss == pytest.approx(kept.loss, rel=relative)
    for m, rows in again.rows.items():
        scale = float(kept.rows[m].norm())
        assert scale > 0
        torch.testing.assert_close(rows, kept.rows[m], rtol=0, atol=relative * scale)
    assert [module.training for module in policy.model.modules()] == modes
    assert all(p.grad is None for p in policy.model.parameters())
    trainable = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all(name.endswith(("delta_s", "delta_hack")) for name in trainable), "no weight has a gradient"


def test_dropout_stays_off_in_layers_that_run_again(small_model):
    model = small_model("qwen3")
    policy = wrap(model, None)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    found = [Rollout((5, 6, 7), c, "") for c in COMPLETIONS[:2]]
    kept = grads(policy, found, LossConfig(), (1.0, -1.0))
    again = grads(policy, found, LossConfig(grad_checkpoint=True), (1.0, -1.0))
    assert all(torch.allclose(again.rows[m], kept.rows[m], rtol=1e-9, atol=1e-15) for m in kept.rows)


def test_a_model_without_such_layers_is_told_so():
    with pytest.raises(UserError, match="--grad-checkpoint"), checkpointed(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("parts", [None, [0, 0]])
def test_completions_without_a_token_have_no_gradient(policy, parts):
    empty = [Rollout((5, 6, 7), (), ""), Rollout((5, 6, 7), (), "")]
    got = per_rollout_grads(policy, empty, torch.ones(2), LossConfig(), 4, parts=parts)
    assert got.rows and not any(rows.any() for rows in got.rows.values())


# Out of memory


def starved(patch, where: str, rows: int):
    """Memory for microbatches of at most `rows` rollouts, short in the forward or in the backward pass."""
    counts = []
    real_forward, real_backward = passes.completion_logps, torch.autograd.grad

    def forward(model, batch, chunk):
        counts.append(len(batch.ids))
        if where == "forward" and counts[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real_forward(model, batch, chunk)

    def backward(*arguments, **options):
        if where == "backward" and counts[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real_backward(*arguments, **options)

    patch.setattr(passes, "completion_logps", forward)
    patch.setattr(torch.autograd, "grad", backward)
    return counts


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_microbatch_that_does_not_fit_is_halved_to_the_same_gradients(
    policy, rollouts, monkeypatch, where, rows
):
    loss = LossConfig(beta=0.1)
    whole = grads(policy, rollouts, loss, with_reference=True)
    before = {m: layer.weight.clone() for m, layer in policy.layers.items()}
    with monkeypatch.context() as patch:
        counts = starved(patch, where, rows)
        halves = grads(policy, rollouts, loss, with_reference=True)
    assert max(counts) == 4 and counts[-1] <= rows
    assert halves.loss == pytest.approx(whole.loss, rel=1e-12)
    for m in whole.rows:
        torch.testing.assert_close(halves.rows[m], whole.rows[m], rtol=1e-9, atol=1e-15)
    for name in ("logp", "ref_logp", "kl", "gap"):
        torch.testing.assert_close(getattr(halves, name), getattr(whole, name), equal_nan=True)
    assert all(torch.equal(layer.weight, before[m]) for m, layer in policy.layers.items())
    again = grads(policy, rollouts, loss, with_reference=True)  # nothing stays bound or merged
    assert all(torch.equal(again.rows[m], whole.rows[m]) for m in whole.rows)


def test_a_single_rollout_that_does_not_fit_is_told_in_one_line(policy, rollouts, monkeypatch):
    starved(monkeypatch, "forward", 0)
    with pytest.raises(UserError, match="--max-new") as caught:
        grads(policy, rollouts, LossConfig())
    assert "\n" not in str(caught.value)


class FromTheHost(TorchFunctionMode):
    """Counts tensors made of lists, integers moved to a device, and lists as an index: each is a copy."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func is torch.tensor and args[0] != []  # which transformers begins a cache with
        moved = func is Tensor.to and args[0].dtype == torch.long
        listed = func is Tensor.__getitem__ and isinstance(args[1], list)
        self.count += made or moved or listed
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", [None, [0, 0, 1, 1]], ids=["each", "summed"])
def test_what_is_sent_to_a_device_does_not_grow_with_the_model(parts):
    counts = []
    for layers in (1, 3):
        settings = {
            **{"vocab_size": 48, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": layers},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        }
        policy = wrap(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)).eval(), None)
        rollouts = [Rollout(p, c, "") for p in ((1, 2, 3), (4, 5)) for c in ((6, 7), (8,))]
        with FromTheHost() as sent:
            per_rollout_grads(policy, rollouts, torch.ones(4), LossConfig(), 4, parts=parts)
        counts.append(sent.count)
    assert counts[0] == counts[1] < 60
