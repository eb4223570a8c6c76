"""Tables over finished runs: seeds of one setting together, different settings never."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loguru import logger
from tabulate import tabulate

from projected_grpo.config import PRESETS, to_json
from projected_grpo.errors import UserError
from projected_grpo.runlog import read_json

METRICS = (
    "hack_rate_student",
    "pass_rate_student",
    "hack_train",
    "hack_deploy",
    "solve_train",
    "solve_deploy",
)
SETTING = ("preset", "model", "problems", "env_mode", "steps", "arm", "options")
SHOWN = ("model", "problems", "env_mode", "steps", "intervention")  # in columns of their own
PLACE = ("device", "svd_cache")  # where a run is made, not what it is


def read_summaries(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """summary.json of every finished run under these folders (a run, or a folder of runs).

    Unfinished runs are skipped and counted. Raises UserError if nothing is left.
    """
    found, skipped = [], 0
    for folder in folders:
        runs = [folder] if (folder / "config.json").exists() else sorted(folder.glob("*/"))
        for run in runs:
            if not (run / "summary.json").exists():
                skipped += (run / "config.json").exists()
                continue
            summary = read_json(run / "summary.json", "results")
            if summary.get("finished"):
                config = read_json(run / "config.json", "results").get("config", {})
                found.append(summary | {"run": run.name, "options": other_options(config)})
            else:
                skipped += 1
    if skipped:
        logger.warning("{} unfinished runs left out", skipped)
    if not found:
        raise UserError(f"no finished run in {', '.join(map(str, folders))}; train one first (`just smoke`)")
    return found


def other_options(config: Mapping[str, Any]) -> str:
    """What a run's config changes of its preset, beside the columns of the table, its seed and its place."""
    name = str(config.get("preset"))
    preset = to_json(PRESETS[name][1]) if name in PRESETS else {}
    changed = [
        f"{option}={value}"
        for group, values in config.items()
        if group not in ("preset", "run")
        for option, value in values.items()
        if option not in SHOWN + PLACE and value != preset.get(group, {}).get(option)
    ]
    return " ".join(changed)


def mean_sem(values: Sequence[float]) -> str:
    """`mean ± SEM`; a single value has no SEM and says so by leaving it out."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ± {stdev(values) / math.sqrt(len(values)):.3f}"


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row per setting: its seeds, then mean ± SEM over them of each metric.

    Of several runs of one setting and seed the newest counts; the others are told.
    """
    groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for summary in sorted(summaries, key=lambda s: s["run"]):
        seeds = groups.setdefault(tuple(summary[k] for k in SETTING), {})
        if summary["seed"] in seeds:
            logger.warning("{} is superseded by {}", seeds[summary["seed"]]["run"], summary["run"])
        seeds[summary["seed"]] = summary
    rows = []
    for setting, by_seed in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        runs = list(by_seed.values())
        figures = [mean_sem([r[m] for r in runs if r[m] is not None]) for m in METRICS]
        rows.append([*setting, " ".join(map(str, sorted(by_seed))), *figures])
    return tabulate(rows, headers=[*SETTING, "seeds", *METRICS], tablefmt="github", disable_numparse=True)
