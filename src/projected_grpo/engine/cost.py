"""What a run will take, told before it starts: memory and disk by formula, time as measured or estimated.

at rest    weights, U and Vh, adapter parameters with AdamW's moments, rows of gradients
loss       above that: its largest microbatch, every completion at --max-new (engine/memory.py)
sampling   above that: merged weights, the output layer in float32, a cache for every rollout
time       a step of earlier runs of the same work on the same hardware; else the table below
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from projected_grpo.antipasto import target_linears
from projected_grpo.config import GPU_GB, TrainConfig, to_json
from projected_grpo.engine.capacity import LEFT_FREE, LOGITS, cache_bytes, layers_on
from projected_grpo.engine.memory import FLOAT, predicted_peak
from projected_grpo.errors import UserError
from projected_grpo.rollout import Rollout
from projected_grpo.runlog import complete_lines, read_json

# Estimated, from the kernels that a 4 B model launches in bfloat16; nothing of it was measured.
TOKEN_S = {"H200": 96e-6, "H100": 115e-6, "RTX PRO 6000": 214e-6}  # of the loss, a padded token
LAYER_S = 0.75e-3  # of decoding, a token and layer, however many rows: what the host takes to launch it
ESTIMATED_WEIGHTS = 4e9  # of the model that these are for
ASSUMED, ASSUMED_BYTES = "H200", 141e9  # where a GPU is meant and none is here
BYTES_A_TOKEN = 8  # of rollouts.jsonl, prompt and grade included: 7 to 11 kB for 600 to 1,024 tokens
PAIRS = 22  # of the packaged sets, whose gradients the basis file holds
LOOKED_AT, ENOUGH = 100, 5  # earlier runs that are read at most, and that are averaged at most
FIRST_STEPS = 3  # of a run that has not ended, before its rate says anything
SAME_WORK = ("problems", "sampling", "loss", "evaluation", "teacher")  # settings that must agree
SAME_MODEL = ("model", "dtype", "attention", "sampler")
SAME_RUN = ("threads", "workers", "keep_token_scores")


@dataclass(frozen=True)
class Cost:
    """Bytes, and seconds a step: None where nothing is known of it."""

    rest: int
    loss: int
    sampling: int
    one_row: int  # of sampling's, were rollouts sampled one by one, as on a GPU they can be
    cache: int  # of the SVDs on disk, once per model
    disk: int  # of the run itself
    steps: int
    step_s: float | None
    source: str  # of the seconds

    @property
    def peak(self) -> int:
        """Bytes of tensors at once, as many rollouts being sampled together as a step has."""
        return self.rest + max(self.loss, self.sampling)

    @property
    def least(self) -> int:
        """Bytes below which no batch of rollouts is small enough."""
        return self.rest + max(self.loss, self.one_row)

    @property
    def seconds(self) -> float | None:
        """Of all steps."""
        return None if self.step_s is None else self.step_s * self.steps

    def text(self) -> str:
        """One line."""
        memory = f"{gb(self.peak)} GB of memory"
        if self.peak > 1.01 * self.least:
            memory += f" ({gb(self.least)} at least, where fewer rollouts are sampled together)"
        time = "" if self.seconds is None else f"{duration(self.seconds)} for {self.steps} steps, "
        return f"{memory}, {gb(self.cache + self.disk)} GB of disk; time: {time}{self.source}"


def all_of(costs: Sequence[Cost]) -> str:
    """What runs of a sweep take, in one line: the largest memory, disk and time in all."""
    most = max(costs, key=lambda cost: cost.peak)
    disk = sum(cost.disk for cost in costs) + max(cost.cache for cost in costs)
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    time = f"{duration(sum(known))} one after another" if known else ""
    if 0 < len(known) < len(costs):
        time += f" for the {len(known)} whose time is known"
    source = "; ".join(dict.fromkeys(cost.source for cost in costs))
    least = f" ({gb(most.least)} at least)" if most.peak > 1.01 * most.least else ""
    time = f"{time} ({source})" if time else source
    return f"{gb(most.peak)} GB of memory each{least}, {gb(disk)} GB of disk; time: {time}"


def gb(count: int | float) -> str:
    """Gigabytes, 1e9 bytes."""
    return f"{count / 1e9:.2g}" if count < 10e9 else f"{count / 1e9:.0f}"


def duration(seconds: float | int) -> str:
    """Two figures: `45 s`, `3.2 min`, `6.3 h`."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def kind_of_device(cfg: TrainConfig) -> str:
    """cuda or cpu: where a run is to be, whether or not this machine has it."""
    wanted = cfg.model.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() or cfg.preset in GPU_GB else "cpu"
    return wanted.partition(":")[0]


def hardware(kind: str) -> str:
    """What a rate holds for: the GPU's name, of one that is not here ASSUMED; or processor and cores."""
    if kind == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else ASSUMED
    return f"{platform.machine()} {kind}, {os.cpu_count()} cores"


def cost_of(
    model: nn.Module,
    cfg: TrainConfig,
    *,
    prompt_tokens: int,
    rows_of_gradients: int,
    processes: int,
    runs: Sequence[Path],
) -> Cost:
    """The cost of a run to one of its processes, of a model that may be on the meta device.

    `prompt_tokens`: of the longest prompt. `runs`: folders of earlier runs.
    """
    s, kind = cfg.sampling, kind_of_device(cfg)
    place = hardware(kind)
    prompts = -(-s.prompts_per_step // processes)
    width = next(model.parameters()).element_size()
    linears = target_linears(model).values()
    weights = sum(p.numel() for p in model.parameters())
    adapted = sum(m.weight.numel() for m in linears)
    ranks = sum(min(m.weight.shape) for m in linears)
    bases = sum(min(m.weight.shape) * sum(m.weight.shape) for m in linears)
    block = getattr(cfg.arm, "block_rank", 0) * sum(sum(m.weight.shape) for m in linears)
    row = ranks + (block if cfg.arm.has_block else 0)
    frames = sum(min(m.weight.shape) ** 2 for m in linears) if cfg.arm.control == "haar_matched" else 0
    rest = width * (weights + bases) + FLOAT * (6 * ranks + rows_of_gradients * row + frames)

    n, longest = prompts * s.group, prompt_tokens + s.max_new
    together = min(n, s.rows_per_batch or n)
    merged = width * adapted + (0 if width == FLOAT else FLOAT * head_values(model))
    each = sum(layers_on(model).values()) * longest * cache_bytes(model) + LOGITS * vocabulary(model)
    own = cfg.model.sampler == "own"

    names = [(i,) * prompt_tokens for i in range(prompts)]
    rollouts = [Rollout(name, (0,) * s.max_new, "") for name in names for _ in range(s.group)]
    step_s, source = measured(cfg, place, processes, runs)
    if step_s is None:
        step_s, source = estimated(model, cfg, rollouts, place, rest + merged, each)
    return Cost(
        rest=rest,
        loss=predicted_peak(model, rollouts, cfg.loss),
        sampling=merged + together * each if own else 0,
        one_row=merged + (each if kind == "cuda" else together * each) if own else 0,
        cache=width * bases + FLOAT * ranks,
        disk=files_of(cfg, row, ranks, s.prompts_per_step * s.group * longest),
        steps=cfg.optim.steps,
        step_s=step_s,
        source=source,
    )


def head_values(model: nn.Module) -> int:
    """Of the output layer."""
    parts: Any = model
    return int(parts.get_output_embeddings().weight.numel())


def vocabulary(model: nn.Module) -> int:
    """Tokens that a logit is made for."""
    parts: Any = model
    return int(parts.config.get_text_config().vocab_size)


def files_of(cfg: TrainConfig, row: int, ranks: int, tokens: int) -> int:
    """Bytes of a run's folder and its basis file; `tokens` of a step, prompts included."""
    every, steps = cfg.evaluation.eval_ablate_every, cfg.optim.steps
    kept = 3 + (steps // every if every and cfg.evaluation.save_eval_ckpts else 0)
    axes = cfg.basis.v_hack_extract_top_k * ranks
    states = 2 * (3 * (row + ranks) + axes)  # parameters with AdamW's moments, and the basis
    basis = axes + 2 * PAIRS * ranks
    return FLOAT * (kept * ranks + states + basis) + BYTES_A_TOKEN * steps * tokens


def measured(cfg: TrainConfig, place: str, processes: int, runs: Sequence[Path]) -> tuple[float | None, str]:
    """Seconds a step, median over the newest runs of the same work on the same hardware; and their number.

    Those of the same arm count, or if there is none those of any.
    """
    wanted = to_json(cfg)
    same_arm: list[float] = []
    others: list[float] = []
    for made, folder in islice(newest(runs), LOOKED_AT):
        config = made.get("config", {})
        if (made.get("hardware"), made.get("processes")) != (place, processes):
            continue
        if not same_work(wanted, config):
            continue
        rate = step_seconds(folder)
        if rate is not None:
            (same_arm if config.get("arm") == wanted["arm"] else others).append(rate)
        if len(same_arm) == ENOUGH:
            break
    rates = (same_arm or others)[:ENOUGH]
    arms = "" if same_arm else " of other arms"
    count = f"{len(rates)} run{'s' if len(rates) > 1 else ''}{arms}"
    return (median(rates), f"as measured here in {count}") if rates else (None, "")


def newest(runs: Sequence[Path]) -> Iterator[tuple[dict[str, Any], Path]]:
    """config.json and folder of earlier runs, the last one first; unreadable ones are passed over."""
    found = (path for folder in runs for path in folder.glob("*/config.json"))
    for path in sorted(found, key=lambda path: path.parent.name, reverse=True):
        try:
            yield read_json(path, "config.json"), path.parent
        except UserError:
            continue


def same_work(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a step of these settings does as much, but for the arm."""
    if any(wanted[group] != found.get(group) for group in SAME_WORK):
        return False
    return all(
        wanted[group][name] == found.get(group, {}).get(name)
        for group, names in (("model", SAME_MODEL), ("run", SAME_RUN))
        for name in names
    )


def step_seconds(folder: Path) -> float | None:
    """Of an ended run with its evaluations; of another the mean of its steps, if there are some."""
    steps = [row.get("sec") for row in complete_lines(folder / "steps.jsonl")]
    seconds = [float(value) for value in steps if isinstance(value, (int, float))]
    if (folder / "summary.json").exists():
        try:
            whole = read_json(folder / "summary.json", "summary.json").get("seconds")
        except UserError:
            whole = None
        if isinstance(whole, (int, float)) and seconds:
            return float(whole) / len(seconds)
    return mean(seconds) if len(seconds) >= FIRST_STEPS else None


def estimated(
    model: nn.Module, cfg: TrainConfig, rollouts: Sequence[Rollout], place: str, held: int, row: int
) -> tuple[float | None, str]:
    """Seconds a step by the table, every completion at --max-new; None on hardware that is not in it."""
    gpu = next((name for name in TOKEN_S if name in place), None)
    if gpu is None:
        return None, "known from the third step on"
    s, layers = cfg.sampling, sum(layers_on(model).values())
    free = (card_bytes() - held) * (1 - LEFT_FREE)
    batches = -(-len(rollouts) // max(1, int(free) // row)) if free > 0 else 1
    passes = batches + (1 / every if (every := cfg.evaluation.eval_ablate_every) else 0)
    decoding = passes * s.max_new * layers * LAYER_S
    padded = len(rollouts) // s.group * len(rollouts[0].prompt_ids) + len(rollouts) * s.max_new
    weights = sum(p.numel() for p in model.parameters())
    loss = padded * TOKEN_S[gpu] * weights / ESTIMATED_WEIGHTS
    return decoding + loss, f"estimated for an {gpu} and completions of full length, not measured"


def card_bytes() -> float:
    """Of the GPU that is here, or the assumed one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else ASSUMED_BYTES
