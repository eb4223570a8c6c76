"""One optimizer step: collect, score, shape, advantages, per_rollout_grads, intervene, AdamW, record.

Only `Policy.write_gradients` writes a parameter's `.grad`. Labels of rollouts (gt_correct,
exploited, detectors) are recorded; only those that the arm declares reach the update.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor

from projected_grpo.arm_settings import (
    AdvmodSettings,
    ConceptSettings,
    GateMode,
    RouteSettings,
    StepSettings,
)
from projected_grpo.arms.controls import random_order
from projected_grpo.arms.erase import split_by_arm
from projected_grpo.arms.gate import Anchors, Draws
from projected_grpo.arms.route2 import find_anchors
from projected_grpo.arms.stages import DeployInput, RewardInput, Update
from projected_grpo.arms.table import arm_of, intervene, shape
from projected_grpo.collect import Collected, collect, gather_evidence
from projected_grpo.concept import Concept, concept_scores, fit_concept, gradient_scores
from projected_grpo.experiment import Experiment
from projected_grpo.extract_vhack_grad import refresh
from projected_grpo.grpo import RolloutGrads, advantages, per_rollout_grads
from projected_grpo.proj import HackBasis, basis_overlap, mean_hackward_share, routed_share, used_coefficients
from projected_grpo.ranks import by_source, over_ranks, own_share
from projected_grpo.record import describe_shaping, describe_step
from projected_grpo.state import TrainState, learning_rate
from projected_grpo.tensor_files import tensor_hash


def train_step(exp: Experiment, state: TrainState) -> tuple[dict[str, Any], Collected]:
    """One optimizer step; returns its line of steps.jsonl and its rollouts.

    A step whose groups are all flat has no gradient: it is recorded, AdamW is left alone, and the groups' KL
    is dropped. AdamW is left alone, too, where the loss or its gradient is not finite: a skipped step.
    """
    cfg, policy, started = exp.cfg, exp.chat.policy, time.monotonic()
    refreshed = maybe_refresh(exp, state)
    data = collect(exp, state.step)
    backward = time.monotonic()
    evidence = gather_evidence(cfg, data, state.step)
    scores, concept = score_rollouts(exp, state, data)
    past = None if state.concept is None else state.concept.past
    shaped = shape(RewardInput(data.rewards, evidence, cfg.arm, scores, past))
    advantage = advantages(shaped.rewards, cfg.loss.unbiased, shaped.keep).flatten()
    grads = loss_grads(exp, state.step, data, advantage)
    stats: dict[str, float | None] = {}
    skipped, update = not finite(grads), None
    if skipped:
        logger.warning("step {}: loss {} or its gradient is not finite; skipped", state.step, grads.loss)
    elif bool((advantage != 0).any()):
        anchors = find_anchors(evidence, advantage.to(policy.device), cfg.arm)
        update = gradient_stage(exp, state, data, anchors, scores, grads)
    state.whole = False  # until its line is written: an error before this point leaves the state as it was
    if update is not None:
        before = policy.deltas(ablate_quarantine=True)
        norm = write_gradients(exp, state, update)
        state.optimizer.step()
        moved = correct_change(exp, state, update, before)
        state.gate = update.gate
        stats = {**update.stats, **moved, "gn": norm, "loss": grads.loss}
    state.concept = concept
    state.generations += sum(not r.is_teacher for r in data.rollouts)
    record = describe_step(exp, state, data, grads) | describe_shaping(data, shaped) | stats
    now = time.monotonic()
    timings = {"refr": refreshed, "fb": now - backward, "sec": now - started}
    return record | {"skipped": int(skipped)} | timings, data


def score_rollouts(
    exp: Experiment, state: TrainState, data: Collected
) -> tuple[Float[Tensor, " n"] | None, Concept | None]:
    """The scores of this step's rollouts and the concept that remembers them; None for an arm without."""
    arm, concept, policy, loss = exp.cfg.arm, state.concept, exp.chat.policy, exp.cfg.loss
    if concept is None or not isinstance(arm, ConceptSettings):
        return None, None
    own = exp.ranks.share([len(r.prompt_ids) + len(r.completion_ids) for r in data.rollouts])
    rollouts = data.rollouts[own.start : own.stop]
    with exp.ranks.together():
        if concept.direction is None:
            found = gradient_scores(policy, rollouts, state.basis.v_grad, loss)
        else:
            found = concept_scores(policy, rollouts, concept.direction, arm, loss.tokens_per_microbatch)
    scores = torch.cat(exp.ranks.gather(found))
    return scores, concept.after(scores, arm.advmod_buffer if isinstance(arm, AdvmodSettings) else 0)


def loss_grads(exp: Experiment, step: int, data: Collected, advantage: Float[Tensor, " n"]) -> RolloutGrads:
    """Gradients of the step's loss, a row per rollout or per source; each process runs its share."""
    cfg = exp.cfg
    per_rollout = arm_of(cfg.arm).per_rollout
    with exp.ranks.together():
        grads = per_rollout_grads(
            exp.chat.policy,
            data.rollouts,
            own_share(exp.ranks, data.rollouts, advantage),
            cfg.loss,
            cfg.sampling.max_new,
            with_reference=cfg.loss.ref_every > 0 and step % cfg.loss.ref_every == 0,
            parts=None if per_rollout else parts_by_source(data),
            # Other kernels or rounding, to which PPO's clip would lose tokens.
            truncated=cfg.model.sampler != "own" or exp.chat.policy.dtype == torch.bfloat16,
        )
    if exp.ranks.size > 1 and not per_rollout:
        grads = by_source(grads, data.is_teacher)
    return over_ranks(exp.ranks, grads)


def parts_by_source(data: Collected) -> list[int]:
    """A number per rollout: those of one group and one source are summed, since only their sum is used."""
    group = len(data.rollouts) // len(data.problems)
    names = [(i // group, teacher) for i, teacher in enumerate(data.is_teacher.tolist())]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def finite(grads: RolloutGrads) -> bool:
    """Whether the loss and every adapter gradient are numbers, and small enough to have a norm."""
    norms = [torch.linalg.vector_norm(rows) for rows in grads.rows.values()]
    return math.isfinite(grads.loss) and bool(torch.stack(norms).norm().isfinite())


def gradient_stage(
    exp: Experiment,
    state: TrainState,
    data: Collected,
    anchors: Anchors | None,
    scores: Float[Tensor, " n"] | None,
    grads: RolloutGrads,
) -> Update:
    """What the arm makes of the gradients: the part to keep and the part to route."""
    device, split_every = exp.chat.policy.device, exp.cfg.evaluation.cos_pre_split_every
    per_rollout = arm_of(exp.cfg.arm).per_rollout  # else rows are sums, to which no score belongs
    order = random_order(len(data.rollouts), exp.cfg.run.seed, state.step).to(device)
    return intervene(
        grads.rows,
        state.basis,
        exp.cfg.arm,
        data.is_teacher[grads.first].to(device),
        anchors,
        state.gate,
        split=split_every > 0 and state.step % split_every == 0,
        draws=Draws(state.frames, order),
        scores=scores.to(device) if scores is not None and per_rollout else None,
    )


def write_gradients(exp: Experiment, state: TrainState, update: Update) -> float:
    """Write every `.grad`, clip, and set the step's learning rate; returns the norm before the clip."""
    exp.chat.policy.write_gradients(update.keep, update.routed)
    norm = torch.nn.utils.clip_grad_norm_(adapter_parameters(exp), exp.cfg.optim.grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, exp.cfg.optim)
    arm = exp.cfg.arm
    if isinstance(arm, StepSettings) and arm.project == "purge":
        purge_momentum(exp, state, arm.gate_mode)
    return float(norm)


def correct_change(
    exp: Experiment, state: TrainState, update: Update, before: Mapping[str, Float[Tensor, " r"]]
) -> dict[str, float | None]:
    """Drop the gradients, act on the change that AdamW made where the arm does so, and measure its leak."""
    state.optimizer.zero_grad(set_to_none=True)
    stats: dict[str, float | None] = {}
    arm = exp.cfg.arm
    if isinstance(arm, StepSettings) and arm.project == "update":
        stats["q_egy"] = project_update(exp, arm, state.basis, before)
    elif update.shrink:
        stats["q_egy"] = shrink_update(exp, update.shrink, before)
    after = exp.chat.policy.deltas(ablate_quarantine=True)
    descent = {m: before[m] - after[m] for m in after}  # the gradient of which plain SGD would make this step
    return stats | {"cos_update": mean_hackward_share(descent, state.basis)}


@torch.no_grad()
def project_update(
    exp: Experiment, arm: StepSettings, basis: HackBasis, before: Mapping[str, Float[Tensor, " r"]]
) -> float:
    """Take the hack-ward part out of the change just made to delta_s; under route the quarantine gets it.

    Returns the quarantine's share of the change.
    """
    routed = {}
    for m, V in basis.V.items():
        layer = exp.chat.policy.layers[m]
        change = split_by_arm(before[m] - layer.delta_s, V, arm)  # a descent step, like a gradient
        layer.delta_s.copy_(before[m] - change.keep)
        if isinstance(arm, RouteSettings):
            layer.delta_hack.sub_(change.removed)
            routed[m] = change.removed
    now = exp.chat.policy.deltas(ablate_quarantine=True)
    return routed_share({m: before[m] - now[m] for m in now}, routed)


@torch.no_grad()
def shrink_update(
    exp: Experiment, share: Mapping[str, Float[Tensor, ""]], before: Mapping[str, Float[Tensor, " r"]]
) -> float:
    """Move this share of the change just made to delta_s into the quarantine; returns the routed share."""
    routed = {m: part * (before[m] - exp.chat.policy.layers[m].delta_s) for m, part in share.items()}
    for m, change in routed.items():
        exp.chat.policy.layers[m].delta_s.add_(change)
        exp.chat.policy.layers[m].delta_hack.sub_(change)
    now = exp.chat.policy.deltas(ablate_quarantine=True)
    return routed_share({m: before[m] - now[m] for m in now}, routed)


@torch.no_grad()
def purge_momentum(exp: Experiment, state: TrainState, gate_mode: GateMode) -> None:
    """Take out of AdamW's first moment of delta_s what the arm takes out of a gradient (reverse: all of it).

    The moment is of gradients projected by earlier bases; what those left of today's V is taken here.
    The scaling by 1/sqrt(v), which turns any step, and weight decay remain.
    """
    mode: GateMode = "one_sided" if gate_mode == "one_sided" else "no_gate"
    for m, V in state.basis.V.items():
        moments = state.optimizer.state.get(exp.chat.policy.layers[m].delta_s, {})
        if moments:
            moment = moments["exp_avg"]
            moment.sub_(used_coefficients(V @ moment, mode) @ V)


@contextmanager
def as_deployed(exp: Experiment, state: TrainState) -> Iterator[None]:
    """Within it the quarantine holds what deployment deletes, as the arm's deploy stage has it.

    What the policy does as trained stays; afterwards the adapter parameters are what they were.
    """
    layers = exp.chat.policy.layers
    leaving = arm_of(exp.cfg.arm).deploy(
        DeployInput(exp.chat.policy.deltas(ablate_quarantine=True), state.basis, exp.cfg.arm, state.frames)
    )
    before = {m: (layers[m].delta_s.detach().clone(), layers[m].delta_hack.detach().clone()) for m in leaving}
    try:
        with torch.no_grad():
            for m, part in leaving.items():
                layers[m].delta_s.sub_(part)
                layers[m].delta_hack.add_(part)
        yield
    finally:
        with torch.no_grad():
            for m, (delta_s, delta_hack) in before.items():
                layers[m].delta_s.copy_(delta_s)
                layers[m].delta_hack.copy_(delta_hack)


def adapter_digest(exp: Experiment) -> str:
    """Hash of all trainable parameters."""
    return tensor_hash(torch.cat([parameter.detach().cpu() for parameter in adapter_parameters(exp)]))


def adapter_parameters(exp: Experiment) -> list[torch.nn.Parameter]:
    """All trainable parameters in a fixed order."""
    layers = exp.chat.policy.layers.values()
    return [layer.delta_s for layer in layers] + [layer.quarantine for layer in layers]


def maybe_refresh(exp: Experiment, state: TrainState) -> float | None:
    """Extract the basis again when it is due; returns its overlap with the old one."""
    every = exp.cfg.basis.vhack_refresh_every
    if every == 0 or state.step == 0 or state.step % every:
        return None
    new = refresh(exp.chat, exp.pairs, exp.cfg, exp.ranks)
    old, state.basis = state.basis, new
    if state.concept is not None:
        direction = current_direction(exp)
        if direction is None or state.concept.direction is None:
            same = all(torch.equal(v, old.v_grad[m]) for m, v in new.v_grad.items())
        else:
            same = torch.equal(direction, state.concept.direction)
        past = state.concept.past if same else torch.empty(0)  # scores by another direction
        state.concept = Concept(direction, past)
    return basis_overlap(old, new)


def current_direction(exp: Experiment) -> Float[Tensor, " d"] | None:
    """The concept direction of the run's pairs at the policy as it is; None where v_grad is the direction."""
    pairs, _ = exp.pairs.split()
    cfg, arm = exp.cfg, exp.cfg.arm
    if not isinstance(arm, ConceptSettings) or arm.scored_by != "activation":
        return None
    return fit_concept(exp.chat, pairs, arm, cfg.loss.tokens_per_microbatch, cfg.run.seed)
