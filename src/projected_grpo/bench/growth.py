"""How a step's time and the loss's memory grow: with rollouts, completions, module rank and layers.

Each point is the base work with one size multiplied. Steps of all points are made in turns. On a CPU seconds
are those of its cores, so that other work on the machine counts little; only their ratios are of use.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from projected_grpo.bench.step import (
    SIZES,
    Work,
    alternated,
    by_group,
    describe,
    loss_pass,
    nudge_adapter,
    open_bench_chat,
    open_stepper,
)
from projected_grpo.engine.memory import measured_peak
from projected_grpo.errors import UserError

FACTORS = (2, 4)
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Point:
    """The base work with `axis` multiplied by `factor`."""

    axis: str
    factor: int
    work: Work
    shape: Mapping[str, Any]


def points(work: Work) -> Iterator[Point]:
    """The base, then each axis. r is the smaller side of a weight, so it grows with the width."""
    shape = SIZES.get(work.model.model)
    small = [name for name in SIZES if name != "random-4b"]  # four models are in memory at once
    if shape is None or work.model.model not in small:
        raise UserError(f"--model {work.model.model}: growth is measured on {' or '.join(small)}")
    yield Point("base", 1, work, shape)
    for factor in FACTORS:
        yield Point("rollouts", factor, replace(work, group=factor * work.group), shape)
    for factor in FACTORS:
        yield Point("completion", factor, replace(work, max_new=factor * work.max_new), shape)
    yield Point("rank", 2, work, {**shape, **{name: 2 * shape[name] for name in WIDTHS}})
    yield Point("layers", 2, work, {**shape, "num_hidden_layers": 2 * shape["num_hidden_layers"]})


def bench_growth(work: Work) -> dict[str, Any]:
    """Figures of every point; `peak_mb` is of tensors above the resting model."""
    with ExitStack() as stack:
        table, chats, steppers = [], {}, {}
        for number, point in enumerate(points(work)):
            key = tuple(point.shape.items())
            if key not in chats:
                chats[key] = open_bench_chat(point.work, point.shape)
                nudge_adapter(chats[key])
            chat = chats[key]
            run, predicted = loss_pass(point.work, chat, by_group(point.work))
            run()
            measured = measured_peak(run, chat.policy.devices)
            figures = {"peak_mb": measured / 1e6, "predicted_mb": predicted / 1e6}
            size = describe(point.work, chat)
            kept = {name: size[name] for name in ("group", "max_new", "parameters")}
            rank = max(chat.policy.ranks.values())
            table.append({"axis": point.axis, "factor": point.factor, **kept, "rank": rank, **figures})
            steppers[str(number)] = stack.enter_context(open_stepper(point.work, chat))
        on_cpu = chat.policy.device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        seconds = list(alternated(steppers, chat.policy.devices, work.steps, clock).values())
        base_mb = table[0]["peak_mb"]
        for row, step_s in zip(table, seconds, strict=True):
            row["step_s"] = step_s
            row["step_over_base"] = step_s / seconds[0]
            row["peak_over_base"] = row["peak_mb"] / base_mb
            row["predicted_over_peak"] = row["predicted_mb"] / row["peak_mb"]
        base = next(iter(chats.values()))
        return {"clock": "cpu" if on_cpu else "wall", "points": table} | describe(work, base)
