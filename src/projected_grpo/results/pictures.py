"""Which pictures can be drawn of which runs: one file per kind and context, arms of one context together."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Literal

from projected_grpo.results.files import read_heldout
from projected_grpo.results.plots import (
    COSINES,
    Bar,
    Point,
    Series,
    by_step,
    cosines,
    dynamics,
    heldout_histogram,
    mode_bars,
    pareto,
)
from projected_grpo.results.runs import BASELINE, EndedRun, Groups
from projected_grpo.results.statistics import shares, where_measured

Kind = Literal["all", "dynamics", "pareto", "modes", "cosines", "routed", "heldout"]
HELD_OUT = ".heldout.json"


def draw(groups: Groups, kind: Kind, out: Path) -> tuple[list[str], list[str]]:
    """Draw what was asked for: (names of the pictures made, a line for each that could not be)."""
    contexts = list(dict.fromkeys(setting.context for setting in groups))
    kinds = list(DRAWERS) if kind == "all" else [kind] if kind in DRAWERS else []
    made, skipped = [], []
    for number, context in enumerate(contexts, start=1):
        own = baseline_first({s: seeds for s, seeds in groups.items() if s.context == context})
        folder = out if len(contexts) == 1 else out / f"{context[0]}-{number}"
        where = f" ({next(iter(own)).title})" if len(contexts) > 1 else ""
        for name in kinds:
            missing = DRAWERS[name](own, folder / name)
            if missing is None:
                made.append(f"{folder / name}.png{where}")
            else:
                skipped.append(f"{name} left out{where}: {missing}")
    if kind in ("all", "heldout"):
        made += draw_heldout(groups, out)
        if not any("heldout-" in name for name in made):
            skipped.append(
                f"heldout left out: no *{HELD_OUT} beside a basis; `projected-grpo verify` writes it"
            )
    return made, skipped


def baseline_first(groups: Groups) -> Groups:
    """So that it has the same look in every picture."""
    return dict(sorted(groups.items(), key=lambda item: item[0].arm != BASELINE))


def arms(groups: Groups) -> list[str]:
    """All arms by their labels: an arm looks the same in a picture from which others are missing."""
    return [setting.label for setting in groups]


def draw_dynamics(groups: Groups, path: Path) -> str | None:
    lines = {
        key: [
            Series(
                setting.label,
                [shares(run.values(counts)) for run in seeds.values()],
                [where_measured(run.values(deployed)) for run in seeds.values()],
            )
            for setting, seeds in groups.items()
            if any(run.values(counts) for run in seeds.values())
        ]
        for key, counts, deployed in (("hack", "hack_s", "hack_deploy"), ("solve", "gt_s", "solve_deploy"))
    }
    if not lines["hack"] or not lines["solve"]:
        return "no run has the columns hack_s and gt_s"
    dynamics(lines["hack"], lines["solve"], path, arms(groups))
    return None


def draw_pareto(groups: Groups, path: Path) -> str | None:
    points = [
        Point(setting.label, run.summary["hack_deploy"], run.summary["solve_deploy"])
        for setting, seeds in groups.items()
        for run in seeds.values()
        if None not in (run.summary.get("hack_deploy"), run.summary.get("solve_deploy"))
    ]
    if not points:
        return "no run has hack_deploy and solve_deploy"
    pareto(points, path, arms(groups))
    return None


def draw_modes(groups: Groups, path: Path) -> str | None:
    bars: dict[str, list[Bar]] = {"hack": [], "solve": []}
    for setting, seeds in groups.items():
        tables = [run.summary.get("by_mode", {}) for run in seeds.values()]
        for mode in dict.fromkeys(mode for table in tables for mode in table):
            rows = [table[mode] for table in tables if mode in table]
            for key, found in bars.items():
                deployed, trained = (
                    [row[f"{key}_{p}"] for row in rows if row.get(f"{key}_{p}") is not None]
                    for p in ("deploy", "train")
                )
                within = all(row.get("in_distribution", True) for row in rows)
                if deployed:
                    found.append(Bar(setting.label, mode, deployed, trained, within))
    if not bars["hack"]:
        return "no run has held-out rates by mode"
    mode_bars(bars["hack"], bars["solve"], path, arms(groups))
    return None


def draw_cosines(groups: Groups, path: Path) -> str | None:
    """Hack-ward shares and the overlap of refreshed bases, a panel per arm; a reason if it cannot be."""
    panels: dict[str, dict[str, Series]] = {}
    overlap: dict[str, dict[int, float]] = {}
    for setting, seeds in groups.items():
        found = {c: series(setting.label, seeds.values(), c) for c in COSINES}
        kept = {column: line for column, line in found.items() if line is not None}
        if kept:
            panels[setting.label] = kept
            overlap[setting.label] = mean_at_steps(seeds.values(), "refr")
    if not panels:
        return f"no run has one of the columns {', '.join(COSINES)}"
    cosines(panels, overlap, path)
    return None


def draw_routed(groups: Groups, path: Path) -> str | None:
    """The quarantine's share of the gradient norm; a reason if nothing was routed."""
    found = [series(setting.label, seeds.values(), "q_egy") for setting, seeds in groups.items()]
    lines = [line for line in found if line and any(v > 0 for seed in line.seeds for v in seed)]
    if not lines:
        return "no run routed anything (q_egy)"
    by_step(lines, "routed share of the gradient norm (q_egy)", path, arms(groups))
    return None


def draw_heldout(groups: Groups, out: Path) -> list[str]:
    """A histogram for every checked basis that lies where these runs put theirs."""
    made = []
    for file in heldout_files(run for seeds in groups.values() for run in seeds.values()):
        result = read_heldout(file, "plot")
        name = file.name.removesuffix(HELD_OUT)
        heldout_histogram(result, name, out / f"heldout-{name}")
        made.append(f"{out / f'heldout-{name}'}.png")
    return made


def heldout_files(runs: Iterable[EndedRun]) -> list[Path]:
    """Checks of the bases beside the runs' own: of --v-hack-path, or in vhack/ next to runs/."""
    found: set[Path] = set()
    for run in runs:
        given = run.config.get("basis", {}).get("v_hack_path")
        if given:
            found |= {file for file in (Path(given).with_suffix(HELD_OUT),) if file.is_file()}
        elif run.path.is_dir():
            found |= set((run.path.resolve().parents[1] / "vhack").glob(f"*{HELD_OUT}"))
    return sorted(found)


DRAWERS: Mapping[str, Callable[[Groups, Path], str | None]] = {  # each returns why it cannot, or None
    "dynamics": draw_dynamics,
    "pareto": draw_pareto,
    "modes": draw_modes,
    "cosines": draw_cosines,
    "routed": draw_routed,
}


def series(name: str, runs: Iterable[EndedRun], column: str) -> Series | None:
    seeds = [[math.nan if v is None else float(v) for v in run.values(column)] for run in runs]
    seeds = [seed for seed in seeds if any(not math.isnan(v) for v in seed)]
    return Series(name, seeds) if seeds else None


def mean_at_steps(runs: Iterable[EndedRun], column: str) -> dict[int, float]:
    found = [where_measured(run.values(column)) for run in runs]
    steps = sorted({step for own in found for step in own})
    return {step: fmean(own[step] for own in found if step in own) for step in steps}
