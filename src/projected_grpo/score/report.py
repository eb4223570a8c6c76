"""All figures of some directions on some completions as one document, and as a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from projected_grpo.config import BasisConfig, LossConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.score.directions import Source
from projected_grpo.score.graded import Completion, as_read
from projected_grpo.score.measure import ADVMOD, figures, measure, score_gradient, score_hidden

SCHEMA = "projected_grpo.score/1"


def score(
    chat: Chat,
    completions: Sequence[Completion],
    sources: Sequence[Source],
    cfg: BasisConfig,
    loss: LossConfig,
    draws: int,
) -> dict[str, Any]:
    """Counts of the completions, and every figure of each direction in gradients and in hidden states.

    Raises OneKind where nothing can be told apart.
    """
    pool = as_read(chat, completions)
    data = measure(chat, pool, loss, ADVMOD.advmod_depth)
    scored = []
    for source in sources:
        scored.append(score_gradient(source, data, cfg, draws))
        if source.states is not None:
            scored.append(score_hidden(source, data, draws))
    return {
        "schema": SCHEMA,
        "pool": pool.counts(),
        "directions": {one.name: figures(one, data) for one in scored},
    }


def table(document: Mapping[str, Any]) -> str:
    """The main figures, a row per direction, between those of the pool and the reasons of each verdict."""
    pool, found = document["pool"], document["directions"]
    first = next(iter(found.values()))
    flat = any(one[slope] is None for one in found.values() for slope in ("hack_slope", "solve_slope"))
    lines = [
        f"{pool['n']} completions: {pool['exploited']} exploit, {pool['correct']} are right",
        *(f"  {mode}: {own['exploited']} of {own['n']} exploit" for mode, own in pool["by_mode"].items()),
    ]
    headers = [
        "direction", "AUROC", "within log p", "haar, 95th", "shuffled, 95th", "precision", "F0.5",
        "hack slope", "solve slope", "hack side", "clean side", "B2",
    ]  # fmt: skip
    rows = [[name, *row(one)] for name, one in found.items()]
    trivial = ", ".join(f"{name} {number(area)}" for name, area in first["trivial"].items())
    return "\n".join(
        [
            *lines,
            "",
            tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True),
            "",
            f"AUROC without a direction: {trivial}",
            "slopes: erase's (hidden: advmod's) first-order effect over that of none; sides: log p per token",
            *(
                ["a slope of -: rewards do not vary, or the plain step makes them no likelier"]
                if flat
                else []
            ),
            *(f"{name}: B2 {one['verdict']}: {'; '.join(one['reasons'])}" for name, one in found.items()),
        ]
    )


def row(one: Mapping[str, Any]) -> list[str]:
    low, high = one["auroc_interval"] or (None, None)
    edges = [one["null_quantiles"][control] for control in ("haar", "shuffled")]
    support = one["support"] or {"hack": None, "clean": None}
    return [
        f"{number(one['auroc'])} [{number(low)}, {number(high)}]",
        *map(number, (one["auroc_within_logp"], *edges, one["precision"], one["f_half"])),
        *map(number, (one["hack_slope"], one["solve_slope"], support["hack"], support["clean"])),
        one["verdict"],
    ]


def number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"
