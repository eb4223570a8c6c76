"""What changes from step to step: optimizer, basis, gate, counters, and the tripwire on log-probabilities."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from projected_grpo.arms.gate import GateState
from projected_grpo.concept import Concept
from projected_grpo.config import OptimConfig
from projected_grpo.proj import HackBasis

WARN_NATS, STOP_NATS, STOP_AFTER = 3.0, 5.0, 2
WATCHED = ("lp_t", "lp_ref")  # teacher text while there is some, else the reference on student text


@dataclass(frozen=True)
class Tripwire:
    """Watches a mean log-probability fall: warn 3 nats under its best, stop after two steps beyond 5."""

    best: float = -math.inf
    strikes: int = 0

    def after(self, value: float | None) -> "Tripwire":
        """The next state; steps without a value change nothing."""
        if value is None:
            return self
        strikes = self.strikes + 1 if value < self.best - STOP_NATS else 0
        return Tripwire(max(self.best, value), strikes)

    def warns(self, value: float | None) -> bool:
        """Whether this value lies in the warning zone."""
        return value is not None and value < self.best - WARN_NATS

    @property
    def tripped(self) -> bool:
        """Whether the run must end."""
        return self.strikes >= STOP_AFTER


@dataclass
class TrainState:
    """All that changes from step to step (saved in state/, with the adapter parameters themselves)."""

    optimizer: torch.optim.Optimizer
    basis: HackBasis
    gate: GateState | None
    meta: Mapping[str, Any]  # of the basis file
    frames: Mapping[str, Tensor] = field(default_factory=dict)  # drawn by the seed, so not saved
    concept: Concept | None = None  # of an arm that scores rollouts
    step: int = 0
    generations: int = 0
    seconds: float = 0.0
    tripwires: dict[str, Tripwire] = field(default_factory=lambda: dict.fromkeys(WATCHED, Tripwire()))
    mechanisms_seen: set[str] = field(default_factory=set)
    skipped_in_a_row: int = 0
    best: float | None = None  # highest solve_deploy - hack_deploy so far
    whole: bool = True  # of one step; not so from where a step begins to change it until its line is written


def learning_rate(step: int, cfg: OptimConfig) -> float:
    """Linear warm-up over warmup_frac of the steps, then cosine to zero, or constant."""
    warmup = round(cfg.warmup_frac * cfg.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.lr_schedule == "constant":
        return cfg.lr
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, cfg.steps - warmup)))


def reach(cfg: OptimConfig) -> float:
    """The sum of a run's learning rates: about the most that AdamW moves a parameter in all its steps."""
    return sum(learning_rate(step, cfg) for step in range(cfg.steps))
