"""Reading finished runs: run folders and kept study records alike, seeds of one setting together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loguru import logger

from projected_grpo.config import DISPLAY_NAME, PLACE, PRESETS, from_json, to_json
from projected_grpo.errors import UserError
from projected_grpo.results.files import check_record, read_ended
from projected_grpo.runlog import read_json

SHOWN = ("model", "problems", "env_mode", "steps", "intervention")  # in columns of their own
# What vanilla's training can depend on; the other groups are the arm's own and its basis'.
SHARED_GROUPS = ("model", "problems", "sampling", "loss", "optim", "teacher", "evaluation")
IN_THE_NAME = (
    "control",
    "project",
    "advmod_form",
    "quarantine",
    "block_init",
)  # options that `config.display_name` tells
VANILLA = DISPLAY_NAME["none"]


@dataclass(frozen=True, order=True)
class Setting:
    """What two runs must share to be seeds of one thing. Options are those that differ from the preset's."""

    preset: str
    model: str
    problems: str
    env_mode: str
    steps: int
    shared_options: str
    arm: str
    own_options: str  # of the arm, beside what its name tells
    basis_options: str
    options: str  # all of them, as they are shown

    @property
    def context(self) -> tuple[Any, ...]:
        """All that an arm and the vanilla it is compared with have in common."""
        return (self.preset, self.model, self.problems, self.env_mode, self.steps, self.shared_options)

    @property
    def title(self) -> str:
        """The context in words."""
        words = f"{self.preset}, {self.model}, problems {self.problems}, {self.env_mode}, {self.steps} steps"
        return words + (f", {self.shared_options}" if self.shared_options else "")

    @property
    def study_name(self) -> str:
        """The arm as studies and options call it: `erase+haar` for `projected-haar`."""
        display, *more = self.arm.split("-")
        names = {shown: intervention for intervention, shown in DISPLAY_NAME.items()}
        return "+".join([names.get(display, display), *more])

    @property
    def label(self) -> str:
        """The arm with its own options, for a legend inside one context."""
        return " ".join(filter(None, (self.arm, self.own_options, self.basis_options)))


@dataclass(frozen=True)
class Run:
    """One run that wrote its summary, whichever file it was read from."""

    name: str
    path: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    git_commit: str | None
    steps: Mapping[str, Sequence[Any]]  # columns, a value a step

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.summary["seed"]

    @property
    def finished(self) -> bool:
        """False if it was ended early: by the tripwire, or a gradient that is not finite."""
        return bool(self.summary.get("finished"))

    @cached_property
    def setting(self) -> Setting:
        """The group this run is a seed of."""
        config, defaults = self.config, {}
        with suppress(UserError):  # settings of another kind of run are taken as they stand
            cfg = from_json(config, older=True)
            config = to_json(cfg)
            defaults = to_json(replace(PRESETS[cfg.preset][1], arm=type(cfg.arm)()))
        s, groups = self.summary, {g: v for g, v in config.items() if g not in ("preset", "run")}
        changed = {g: _changed(values, defaults.get(g, {})) for g, values in groups.items()}
        arm = {name: value for name, value in changed.get("arm", {}).items() if name not in IN_THE_NAME}
        others = [g for g in changed if g not in (*SHARED_GROUPS, "arm", "basis")]
        return Setting(
            preset=s["preset"],
            model=s["model"],
            problems=s["problems"],
            env_mode=s["env_mode"],
            steps=self.config.get("optim", {}).get("steps", s["steps"]),
            shared_options=_words(*(changed.get(g, {}) for g in SHARED_GROUPS)),
            arm=s["arm"],
            own_options=_words(arm, *(changed[g] for g in others)),
            basis_options=_words(changed.get("basis", {})),
            options=_words(*changed.values()),
        )

    def values(self, column: str) -> list[Any]:
        """A column of the steps; empty where the run has none."""
        return list(self.steps.get(column, ()))

    def rate(self, column: str, last: int | None = None) -> float | None:
        """A [count, n] column summed over the last steps (default: all), as a rate."""
        pairs = [v for v in self.values(column)[-last if last else None :] if v is not None]
        n = sum(p[1] for p in pairs)
        return sum(p[0] for p in pairs) / n if n else None

    def mean(self, column: str, last: int | None = None) -> float | None:
        """Mean of a column over those of the last steps (default: all) that have it."""
        found = [v for v in self.values(column)[-last if last else None :] if v is not None]
        return fmean(found) if found else None


Groups = Mapping[Setting, Mapping[int, Run]]


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        option: value
        for option, value in values.items()
        if option not in SHOWN + PLACE and value != defaults.get(option)
    }


def _words(*groups: Mapping[str, Any]) -> str:
    return " ".join(f"{option}={value}" for group in groups for option, value in group.items())


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Every run under these paths that has ended: run folders, study records, or folders of either.

    Runs that are under way are skipped and counted. Raises UserError if nothing is left.
    """
    paths = list(paths)
    found, skipped = [], 0
    for path in paths:
        for place in _places(path):
            if place.is_file():
                found.append(_read_record(place))
            elif (place / "summary.json").exists():
                found.append(_read_folder(place))
            else:
                skipped += 1
    if skipped:
        logger.warning("{} unfinished runs left out", skipped)
    if not found:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}; train one first (`just smoke`)")
    return sorted(found, key=lambda run: run.name)


def _places(path: Path) -> list[Path]:
    if path.is_file() or (path / "config.json").exists():
        return [path]
    folders = [folder for folder in sorted(path.glob("*/")) if (folder / "config.json").exists()]
    return folders + sorted(path.glob("*_seed*.json"))


def _read_record(path: Path) -> Run:
    data = read_json(path, "results")
    check_record(data, (), f"results: {path} is no study record")
    return Run(path.stem, path, data["summary"], data["config"], data.get("git_commit"), data["steps"])


def _read_folder(folder: Path) -> Run:
    summary, made, rows = read_ended(folder, "results")
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return Run(folder.name, folder, summary, made["config"], made.get("git_commit"), columns)


def finished(runs: Sequence[Run]) -> list[Run]:
    """Without those that were ended early, which are told. Raises UserError if nothing is left."""
    kept = [run for run in runs if run.finished]
    early = [run.name for run in runs if not run.finished]
    if early:
        logger.warning("{} unfinished runs left out, ended early: {}", len(early), ", ".join(early))
    if not kept:
        raise UserError(f"no finished run: {', '.join(early)} ended early; train one first (`just smoke`)")
    return kept


def grouped(runs: Iterable[Run]) -> dict[Setting, dict[int, Run]]:
    """Runs by setting, then seed. Of several of one setting and seed the newest counts, and that is told."""
    groups: dict[Setting, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        seeds = groups.setdefault(run.setting, {})
        if run.seed in seeds:
            logger.warning("{} is superseded by {}", seeds[run.seed].name, run.name)
        seeds[run.seed] = run
    return {setting: dict(sorted(groups[setting].items())) for setting in sorted(groups)}


def mean_sem(values: Sequence[float], form: str = ".3f") -> str:
    """`mean ± SEM`; a single value has no SEM and says so by leaving it out."""
    if not values:
        return "-"
    if len(values) == 1:
        return format(values[0], form)
    return f"{fmean(values):{form}} ± {stdev(values) / math.sqrt(len(values)):{form}}"
