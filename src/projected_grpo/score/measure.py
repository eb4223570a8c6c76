"""Every figure of `score`: how well each direction tells exploits apart, and what erasing it would do.

A completion's score is the cosine of the gradient of its -log p with v_grad, over all modules together; in
hidden states, its mean state times the concept direction (concept.py). Each figure stands beside those of
nulls: random directions of the same shape (haar), and pairs without their contrast (shuffled).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from projected_grpo.arm_settings import AdvmodSettings, EraseSettings
from projected_grpo.arms.advmod import advantage_modified, standardised
from projected_grpo.arms.controls import haar_like
from projected_grpo.arms.erase import split_by_arm
from projected_grpo.arms.stages import Evidence, RewardInput
from projected_grpo.concept import completion_states
from projected_grpo.config import BasisConfig, LossConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.proj import HackBasis, pooled_cosines, row_cosines
from projected_grpo.score.directions import SUPPORTED, Source, Support
from projected_grpo.score.foretold import Gradient, Half, Slopes, grouped_advantages, halves, slopes
from projected_grpo.score.graded import Pool
from projected_grpo.score.separation import auroc, clustered_interval, flags, stratified_auroc

NULL_QUANTILE = 0.95
FEWEST_DRAWS, FEWEST_OF_A_KIND = 20, 10  # for a verdict
NOT_MEASURED = "not measured"
AT_ONCE = 64  # completions whose gradients are taken in one call
ERASE, ADVMOD = EraseSettings(), AdvmodSettings()


@dataclass(frozen=True)
class Measured:
    """A pool under a model: gradients of -log p, hidden states, log p per token, what steps are made of."""

    pool: Pool
    rows: Mapping[str, Float[Tensor, "n r"]]
    states: Float[Tensor, "n d"]
    logp: Float[Tensor, " n"]
    advantage: Float[Tensor, " n"]
    both: tuple[Half, Half]
    plain: Slopes

    @cached_property
    def trivial(self) -> dict[str, float]:
        """AUROC of scores that need no direction."""
        norm = torch.stack([g.norm(dim=1) for g in self.rows.values()]).norm(dim=0)
        scores = {"length": self.pool.lengths, "neg_logp": -self.logp, "grad_norm": norm}
        return {name: auroc(score, self.pool.exploited) for name, score in scores.items()}


def measure(chat: Chat, pool: Pool, loss: LossConfig, depth: float) -> Measured:
    """One forward and backward pass per completion, and one more forward pass for the hidden states."""
    n, parameters = len(pool.rollouts), sum(chat.policy.ranks.values())
    tokens = sum(len(r.prompt_ids) + len(r.completion_ids) for r in pool.rollouts)
    weights = sum(p.numel() for p in chat.policy.model.parameters())
    logger.info(
        "{} completions, {} tokens, forward and backward: about {:.2g} PFLOP; their gradients take {:.2g} GB",
        *(n, tokens, 8e-15 * weights * tokens, 8e-9 * n * parameters),  # of all, and again of both halves
    )
    found: dict[str, list[Tensor]] = {m: [] for m in chat.policy.ranks}
    logp = []
    settings = replace(loss, beta=0.0, unbiased=True)
    for start in tqdm(range(0, n, AT_ONCE), desc="gradients", disable=None):
        part = pool.rollouts[start : start + AT_ONCE]
        deployed = chat.policy.deltas(ablate_quarantine=True)
        got = per_rollout_grads(chat.policy, part, torch.ones(len(part)), settings, 1, deltas=deployed)
        for m in found:  # the loss divides by the number of rollouts
            found[m].append(len(part) * got.rows[m].float().cpu())
        logp.append(got.logp)
    rows = {m: torch.cat(parts) for m, parts in found.items()}
    states = completion_states(chat.policy, pool.rollouts, depth, loss.tokens_per_microbatch).mean
    advantage = grouped_advantages(pool.reward, pool.prompt)
    both = halves(rows, pool.problem, pool.exploited, pool.correct)
    return Measured(
        pool, rows, states, torch.cat(logp), advantage, both, slopes(both, advantage, lambda g: g)
    )


def erased(basis: HackBasis) -> Callable[[Gradient], Gradient]:
    """What erase leaves of a gradient, by its default settings."""
    return lambda g: {**g, **{m: split_by_arm(g[m], V, ERASE).keep for m, V in basis.V.items()}}


def lowered(data: Measured, z: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Advantages as advmod has them, by its default settings, of these scores standardised over the pool."""
    nobody = Evidence(torch.zeros_like(data.pool.exploited))
    shaped = advantage_modified(RewardInput(data.pool.reward[:, None], nobody, ADVMOD, z, None))
    return grouped_advantages(shaped.rewards[:, 0], data.pool.prompt)


@dataclass(frozen=True)
class Null:
    """AUROC and foretold hack slope of stand-ins for a direction."""

    auroc: list[float]
    hack_slope: list[float | None]


@dataclass(frozen=True)
class Scored:
    """One direction: the score of every completion by it, a gate's threshold, foretold slopes, nulls."""

    name: str
    kind: str  # gradient or hidden
    score: Float[Tensor, " n"]
    threshold: float
    slopes: Mapping[str, float | None]
    by_module: Sequence[float]
    nulls: Mapping[str, Null]
    support: Support | None


def score_gradient(source: Source, data: Measured, cfg: BasisConfig, draws: int) -> Scored:
    """A direction of gradients: v_grad separates, V is what erase would remove."""
    hit, basis = data.pool.exploited, source.basis(cfg)

    def null(bases: Sequence[HackBasis]) -> Null:
        areas = [auroc(pooled_cosines(data.rows, b.v_grad), hit) for b in bases]
        return Null(
            areas,
            [slopes(data.both, data.advantage, erased(b)).over(data.plain)["hack_slope"] for b in bases],
        )

    areas = [auroc(row_cosines(data.rows[m], v), hit) for m, v in basis.v_grad.items()]
    return Scored(
        source.name,
        "gradient",
        pooled_cosines(data.rows, basis.v_grad),
        source.threshold(basis),
        slopes(data.both, data.advantage, erased(basis)).over(data.plain),
        areas,
        {
            "haar": null([haar_like(basis, cfg.v_hack_k, seed) for seed in range(draws)]),
            "shuffled": null([source.shuffled(cfg, seed) for seed in range(draws)]),
        },
        source.support,
    )


def score_hidden(source: Source, data: Measured, draws: int) -> Scored:
    """A direction of hidden states: the slopes are those of advmod's lowered advantages."""
    hit = data.pool.exploited

    def foretold(direction: Tensor) -> dict[str, float | None]:
        made = slopes(data.both, lowered(data, data.states @ direction), lambda g: g)
        return made.over(data.plain)

    def null(control: Literal["haar", "shuffled"]) -> Null:
        arm = replace(ADVMOD, control=control)
        directions = [source.concept(arm, seed) for seed in range(draws)]
        return Null(
            [auroc(data.states @ d, hit) for d in directions],
            [foretold(d)["hack_slope"] for d in directions],
        )

    direction = source.concept(ADVMOD)
    z = standardised(data.states @ direction, None)
    nulls = {"haar": null("haar"), "shuffled": null("shuffled")}
    return Scored(f"{source.name} (hidden)", "hidden", z, 0.0, foretold(direction), (), nulls, source.support)


def figures(scored: Scored, data: Measured) -> dict[str, Any]:
    """All figures of one direction, and its verdict."""
    pool, hit = data.pool, data.pool.exploited
    judged = hit | pool.correct
    gate = flags(scored.score > scored.threshold, hit)
    modes = {mode: pool.in_mode(mode) for mode in pool.counts()["by_mode"]}
    found: dict[str, Any] = {
        "kind": scored.kind,
        "auroc": auroc(scored.score, hit),
        "auroc_interval": clustered_interval(scored.score, hit, pool.problem),
        "auroc_against_solved": auroc(scored.score[judged], hit[judged]),
        "auroc_by_mode": {mode: auroc(scored.score[own], hit[own]) for mode, own in modes.items()},
        "auroc_by_module": spread(scored.by_module),
        "auroc_within_logp": stratified_auroc(scored.score, hit, data.logp),
        "threshold": scored.threshold,
        **asdict(gate),
        **scored.slopes,
        "nulls": {control: null.auroc for control, null in scored.nulls.items()},
        "null_quantiles": {
            control: float(np.quantile(null.auroc, NULL_QUANTILE)) for control, null in scored.nulls.items()
        },
        "null_hack_slopes": {control: null.hack_slope for control, null in scored.nulls.items()},
        "trivial": data.trivial,
        "support": support_figures(scored.support, data),
    }
    return found | verdict(found, int(hit.sum()), int((~hit).sum()))


def spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None


def support_figures(known: Support | None, data: Measured) -> dict[str, Any] | None:
    """Mean log-probability per token of both sides, of the model's own completions, and of a uniform draw."""
    return None if known is None else known.figures() | {"own": float(data.logp.mean())}


def verdict(found: Mapping[str, Any], exploits: int, others: int) -> dict[str, Any]:
    """Gate B2 on a direction's figures: passes, fails, or not measured, with the reasons."""
    draws = min(map(len, found["nulls"].values()))
    missing = []
    if draws < FEWEST_DRAWS:
        missing.append(f"{draws} null draws, a verdict needs {FEWEST_DRAWS} (--nulls)")
    if min(exploits, others) < FEWEST_OF_A_KIND:
        few = f"{exploits} exploits and {others} others"
        missing.append(f"{few}, a verdict needs {FEWEST_OF_A_KIND} of each (--rollouts, --pool)")
    if missing:
        return {"verdict": NOT_MEASURED, "reasons": missing}
    reasons = against(found)
    return {"verdict": "fails" if reasons else "passes", "reasons": reasons or [in_favour(found)]}


def against(found: Mapping[str, Any]) -> list[str]:
    """Gate B2's reasons to fail a direction (docs/spec.md, A8); none if it passes."""
    reasons = []
    for control, edge in found["null_quantiles"].items():
        if not found["auroc"] > edge:
            reasons.append(f"AUROC {found['auroc']:.3f} is not above {edge:.3f} (95th percentile, {control})")
    # Hidden states of texts that the model would not write may still separate, gradients have not (A8).
    support = found["support"] or {}
    for side in ("hack", "clean") if support and found["kind"] == "gradient" else ():
        if not support[side] > SUPPORTED:
            reasons.append(
                f"{side} sides have log p {support[side]:.2f} per token, must exceed {SUPPORTED:g}: "
                f"the model would not write them (the completions scored: {support['own']:.2f})"
            )
    return reasons


def in_favour(found: Mapping[str, Any]) -> str:
    known = "" if found["support"] else "; the support of its pairs is not known"
    return f"AUROC {found['auroc']:.3f} is above the 95th percentile of both nulls{known}"
