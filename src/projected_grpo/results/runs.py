"""Reading finished runs: run folders and kept study records alike, seeds of one setting together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loguru import logger

from projected_grpo.config import TrainConfig, from_json
from projected_grpo.errors import UserError
from projected_grpo.results.files import check_record, read_ended
from projected_grpo.run.identity import OWN_GROUPS, arm_name, tags
from projected_grpo.runlog import command_line, read_json

SHOWN = ("model", "problems", "env_mode", "steps")  # in columns of their own
BASELINE = "none"  # the arm without an intervention, which others are compared with


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
    own_options: str  # of the arm
    basis_options: str

    @property
    def context(self) -> tuple[Any, ...]:
        """All that an arm and the baseline it is compared with have in common."""
        return (self.preset, self.model, self.problems, self.env_mode, self.steps, self.shared_options)

    @property
    def title(self) -> str:
        words = f"{self.preset}, {self.model}, problems {self.problems}, {self.env_mode}, {self.steps} steps"
        return words + (f", {self.shared_options}" if self.shared_options else "")

    @property
    def options(self) -> str:
        """All options but those with columns of their own."""
        return joined(self.own_options, self.basis_options, self.shared_options)

    @property
    def arm_options(self) -> str:
        return joined(self.own_options, self.basis_options)

    @property
    def label(self) -> str:
        """The arm with its options, for a legend inside one context: `erase+haar k=12`."""
        return joined(self.arm, self.arm_options)


def joined(*words: str) -> str:
    """The words that are not empty, with spaces between."""
    return " ".join(filter(None, words))


@dataclass(frozen=True)
class EndedRun:
    """One run that wrote its summary, whichever file it was read from."""

    name: str
    path: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    git_commit: str | None
    steps: Mapping[str, Sequence[Any]]  # columns, a value a step

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def finished(self) -> bool:
        """False if it was ended early: by the tripwire, or a gradient that is not finite."""
        return bool(self.summary.get("finished"))

    @cached_property
    def cfg(self) -> TrainConfig:
        """Its settings. Raises UserError if they are of an unknown version."""
        try:
            return from_json(self.config, older=True)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    @cached_property
    def setting(self) -> Setting:
        """The group this run is a seed of."""
        cfg = self.cfg
        found = tags(cfg, but=SHOWN)
        shared = [tag for group in found if group not in OWN_GROUPS for tag in found[group]]
        return Setting(
            preset=cfg.preset,
            model=self.summary["model"],
            problems=self.summary["problems"],
            env_mode=self.summary["env_mode"],
            steps=cfg.optim.steps,
            shared_options=" ".join(shared),
            arm=arm_name(cfg),
            own_options=" ".join(found["arm"]),
            basis_options=" ".join(found["basis"]),
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


Groups = Mapping[Setting, Mapping[int, EndedRun]]


def names(settings: Iterable[Setting], context: tuple[Any, ...]) -> dict[Setting, str]:
    """What each arm of a context is called beside the others, the baseline first.

    Options that all of them have are left out.
    """
    own = [setting for setting in settings if setting.context == context]
    options = [set(setting.arm_options.split()) for setting in own]
    shared = set.intersection(*options) if len(own) > 1 else set()
    found = {s: joined(s.arm, *(word for word in s.arm_options.split() if word not in shared)) for s in own}
    return dict(sorted(found.items(), key=lambda item: (item[0].arm != BASELINE, item[1])))


def read_runs(paths: Iterable[Path]) -> list[EndedRun]:
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
        where = ", ".join(map(str, paths))
        raise UserError(f"no finished run in {where}; train one first: {command_line('train', 'smoke')}")
    return sorted(found, key=lambda run: run.name)


def _places(path: Path) -> list[Path]:
    if path.is_file() or (path / "config.json").exists():
        return [path]
    folders = [folder for folder in sorted(path.glob("*/")) if (folder / "config.json").exists()]
    return folders + sorted(path.glob("*_seed*.json"))


def _read_record(path: Path) -> EndedRun:
    data = read_json(path, "results")
    check_record(data, (), f"results: {path} is no study record")
    return EndedRun(path.stem, path, data["summary"], data["config"], data.get("git_commit"), data["steps"])


def _read_folder(folder: Path) -> EndedRun:
    summary, made, rows = read_ended(folder, "results")
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return EndedRun(folder.name, folder, summary, made["config"], made.get("git_commit"), columns)


def finished(runs: Sequence[EndedRun]) -> list[EndedRun]:
    """Without those that were ended early, with a warning. Raises UserError if nothing is left."""
    kept = [run for run in runs if run.finished]
    early = [run.name for run in runs if not run.finished]
    if early:
        logger.warning("{} unfinished runs left out, ended early: {}", len(early), ", ".join(early))
    if not kept:
        raise UserError(f"no finished run: {', '.join(early)} ended early")
    return kept


def grouped(runs: Iterable[EndedRun]) -> dict[Setting, dict[int, EndedRun]]:
    """Runs by setting, then seed. Duplicates: the newest wins, with a warning."""
    groups: dict[Setting, dict[int, EndedRun]] = {}
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
    return f"{fmean(values):{form}} ± {stdev(values) / math.sqrt(len(values)):{form.lstrip('+')}}"
