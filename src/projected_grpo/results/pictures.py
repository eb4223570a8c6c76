"""Which pictures can be drawn of which runs: one file per kind and context, arms of one context together."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from projected_grpo.config import NANO, PRESETS
from projected_grpo.errors import UserError
from projected_grpo.nano_tasks import packaged_base
from projected_grpo.results.files import read_heldout
from projected_grpo.results.plots import (
    COSINES,
    Bar,
    Look,
    Point,
    Series,
    by_step,
    cosines,
    dynamics,
    heldout_histogram,
    looks,
    mode_bars,
    pareto,
)
from projected_grpo.results.runs import EndedRun, Groups, Setting, names
from projected_grpo.results.statistics import shares, where_measured

Kind = Literal["all", "dynamics", "pareto", "modes", "cosines", "routed", "heldout"]
HELD_OUT = ".heldout.json"
Arms = Mapping[str, Sequence[EndedRun]]  # by the name that pictures give them


def draw(groups: Groups, kind: Kind, out: Path, arms: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Draw what was asked for: (names of the pictures made, a line for each that could not be).

    Raises UserError for one of `arms` that no run is of. Looks follow from all runs, drawn or not.
    """
    contexts = {setting.context: names(groups, setting.context) for setting in sorted(groups)}
    chosen = choose({s: name for own in contexts.values() for s, name in own.items()}, arms)
    kinds = list(DRAWERS) if kind == "all" else [kind] if kind in DRAWERS else []
    made, skipped = [], []
    for number, (context, named) in enumerate(contexts.items(), start=1):
        own = {name: list(groups[s].values()) for s, name in named.items() if s in chosen}
        folder = out if len(contexts) == 1 else out / f"{context[0]}-{number}"
        where = f" ({next(iter(named)).title})" if len(contexts) > 1 else ""
        for name in kinds if own else ():
            missing = DRAWERS[name](own, looks(named.values()), folder / name)
            if missing is None:
                made.append(f"{folder / name}.png{where}")
            else:
                skipped.append(f"{name} left out{where}: {missing}")
    if kind in ("all", "heldout"):
        made += draw_heldout({s: groups[s] for s in chosen}, out)
        if not any("heldout-" in name for name in made):
            skipped.append(
                f"heldout left out: no *{HELD_OUT} beside a basis; `projected-grpo verify` writes it"
            )
    return made, skipped


def choose(named: Mapping[Setting, str], words: Sequence[str]) -> list[Setting]:
    """The settings that words name: as pictures do (`*` is any text), or all of an arm. Without words all."""
    found = list(named) if not words else []
    for word in words:
        own = [s for s, name in named.items() if fnmatchcase(name, word) or fnmatchcase(s.label, word)]
        own = own or [s for s in named if s.arm == word]
        if not own:
            known = ", ".join(dict.fromkeys(setting.arm for setting in named))
            raise UserError(f"--arms {word}: no run of that arm; there are {known}")
        found += own
    return found


def base_of(arms: Arms) -> dict[str, Any] | None:
    """The base model's held-out hack and solve rate over the modes of these runs, and `by_mode`.

    None if they are not known: they are of the packaged model, sampled as its preset does.
    """
    run = next(iter(arms.values()))[0]
    modes, base = run.summary["env_mode"].split(","), packaged_base()["by_mode"]
    usual, own = PRESETS[NANO][1].sampling, run.cfg.sampling
    same = [getattr(own, name) == getattr(usual, name) for name in ("temperature", "top_p", "top_k")]
    if (run.summary["model"], run.summary["problems"]) != (NANO, NANO) or not all(same):
        return None
    if not set(modes) <= set(base):
        return None
    n = sum(base[mode]["n"] for mode in modes)
    every = {key: sum(base[mode][key] * base[mode]["n"] for mode in modes) / n for key in ("hack", "solve")}
    return every | {"by_mode": base}


def draw_dynamics(arms: Arms, drawn: Mapping[str, Look], path: Path) -> str | None:
    lines = {
        key: [
            Series(
                name,
                [shares(run.values(counts)) for run in runs],
                [where_measured(run.values(f"{key}_deploy")) for run in runs],
                at_the_end(runs, f"{key}_deploy"),
            )
            for name, runs in arms.items()
            if any(run.values(counts) for run in runs)
        ]
        for key, counts in (("hack", "hack_s"), ("solve", "gt_s"))
    }
    if not lines["hack"] or not lines["solve"]:
        return "no run has the columns hack_s and gt_s"
    dynamics(lines["hack"], lines["solve"], path, drawn, base_of(arms))
    return None


def at_the_end(runs: Iterable[EndedRun], key: str) -> list[float]:
    """A figure of the summaries, of the runs that have it."""
    return [value for run in runs if (value := run.summary.get(key)) is not None]


def draw_pareto(arms: Arms, drawn: Mapping[str, Look], path: Path) -> str | None:
    points = [
        Point(name, run.summary["hack_deploy"], run.summary["solve_deploy"])
        for name, runs in arms.items()
        for run in runs
        if None not in (run.summary.get("hack_deploy"), run.summary.get("solve_deploy"))
    ]
    if not points:
        return "no run has hack_deploy and solve_deploy"
    pareto(points, path, drawn, base_of(arms))
    return None


def draw_modes(arms: Arms, drawn: Mapping[str, Look], path: Path) -> str | None:
    bars: dict[str, list[Bar]] = {"hack": [], "solve": []}
    for name, runs in arms.items():
        tables = [run.summary.get("by_mode", {}) for run in runs]
        for mode in dict.fromkeys(mode for table in tables for mode in table):
            rows = [table[mode] for table in tables if mode in table]
            for key, found in bars.items():
                deployed, trained = (
                    [row[f"{key}_{p}"] for row in rows if row.get(f"{key}_{p}") is not None]
                    for p in ("deploy", "train")
                )
                within = all(row.get("in_distribution", True) for row in rows)
                if deployed:
                    found.append(Bar(name, mode, deployed, trained, within))
    if not bars["hack"]:
        return "no run has held-out rates by mode"
    base = base_of(arms)
    mode_bars(bars["hack"], bars["solve"], path, drawn, base and base["by_mode"])
    return None


def draw_cosines(arms: Arms, drawn: Mapping[str, Look], path: Path) -> str | None:
    """Hack-ward shares and the overlap of refreshed bases, a panel per arm; a reason if it cannot be."""
    panels: dict[str, dict[str, Series]] = {}
    for name, runs in arms.items():
        found = {c: series(name, runs, c) for c in COSINES}
        kept = {column: line for column, line in found.items() if line is not None}
        panels |= {name: kept} if kept else {}
    if not panels:
        return f"no run has one of the columns {', '.join(COSINES)}"
    overlap = {name: [where_measured(run.values("refr")) for run in arms[name]] for name in panels}
    cosines(panels, overlap, path)
    return None


def draw_routed(arms: Arms, drawn: Mapping[str, Look], path: Path) -> str | None:
    """The quarantine's share of the gradient norm; a reason if nothing was routed."""
    found = [series(name, runs, "q_egy") for name, runs in arms.items()]
    lines = [line for line in found if line and any(v > 0 for seed in line.seeds for v in seed)]
    if not lines:
        return "no run routed anything (q_egy)"
    by_step(lines, "routed share of the gradient norm (q_egy)", path, drawn)
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


Drawer = Callable[[Arms, Mapping[str, Look], Path], str | None]  # returns why it cannot, or None
DRAWERS: Mapping[str, Drawer] = {
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
