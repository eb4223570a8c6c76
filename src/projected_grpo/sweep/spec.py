"""What a sweep is: arms x axes of one preset, from a TOML file or a few options, expanded into runs with ids.

    name = "nano-k"                 # default: the file's name; the sweep lives in out/sweeps/NAME
    preset = "nano"
    [options]                       # of every run: any option of train, by its name there
    steps = 24
    [[arms]]                        # what is compared
    name = "erase"
    options = { intervention = "erase" }
    grid = { v-hack-k = [1, 5] }    # axes of this arm alone
    [grid]                          # axes of all arms
    seed = "41-45"

An id (run/identity.py) survives a new option, a renamed arm and a file that grows.
"""

import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from projected_grpo.config import PRESETS, REMOVED, BasisConfig, LossConfig, ModelConfig, TrainConfig
from projected_grpo.errors import UserError
from projected_grpo.options import train
from projected_grpo.options.typed import flags
from projected_grpo.results.files import check_fields
from projected_grpo.run.identity import identity, shown

SWEEPS = Path("out/sweeps")
ENGINES = ("local", "pueue", "slurm", "ray")
ITS_OWN = ("out_dir", "out_tag", "resume")  # options that the sweep sets itself
NAME = re.compile(r"[A-Za-z0-9_.+=-]+")
MOST_SEEDS = 10_000  # of one range


@dataclass(frozen=True)
class SweepArm:
    """One thing to compare: options, axes of its own, and what its runs are for."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    why: str = ""
    resolve: str = ""
    controls: str = ""
    """The arm that this one is a control of."""
    later: bool = False
    """Made when all others are."""
    explored: bool = False
    """Thought of after tables had been seen."""


@dataclass(frozen=True)
class SweepLimits:
    """How a sweep is run, as `sweep --help` says of each; none of it decides an outcome."""

    jobs: int = 0
    cores: int = 0
    gpus: int | None = None
    retries: int = 1
    max_failures: int = 3


@dataclass(frozen=True)
class Spec:
    """A whole sweep, as read."""

    name: str
    preset: str
    home: Path
    arms: tuple[SweepArm, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    limits: SweepLimits = field(default_factory=SweepLimits)
    engine: str = "local"
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options of each engine
    keep: Path | None = None  # folder of the kept records


@dataclass(frozen=True)
class SweepRun:
    """One run: its id, what it is called, what it takes, and its settings."""

    id: str
    label: str  # its arm and axes, without its seed
    arm: SweepArm
    axes: Mapping[str, Any]
    argv: tuple[str, ...]  # of train: preset and options, without the sweep's own
    cfg: TrainConfig

    @property
    def name(self) -> str:
        """What it is called in queues and tables."""
        return " ".join([*self.label.split(), f"seed={self.cfg.run.seed}"])

    @property
    def stem(self) -> str:
        """The name of its record's file; with its id where arm and axes do not fit into one."""
        plain = "_".join(self.label.split())
        safe = re.sub(r"[^\w.+=-]+", "-", plain, flags=re.ASCII)[:100]
        words = [safe] if safe == plain != "" else [safe, self.id]
        return "_".join([*filter(None, words), f"seed{self.cfg.run.seed}"])


def expand(spec: Spec) -> list[SweepRun]:
    """All runs, first seeds first, later arms last. Raises UserError for what train would refuse."""
    runs: dict[str, SweepRun] = {}
    for arm in spec.arms:
        grid = {**spec.grid, **arm.grid}
        seeds = grid.pop("seed", (None,))
        for values in itertools.product(*grid.values()):  # the last axis changes fastest
            axes = dict(zip(grid, values, strict=True))
            options = {**spec.options, **arm.options, **axes}
            words = [arm.name] if arm.name else []
            label = " ".join(words + [f"{name}={shown(value)}" for name, value in axes.items()])
            cfg = checked(spec.preset, options, label or spec.preset)
            for seed in seeds:
                drawn = {} if seed is None else {"seed": seed}
                own = replace(cfg, run=replace(cfg.run, **drawn))
                argv = (spec.preset, *flags({**options, **drawn}))
                run = SweepRun(identity(own), label, arm, {**axes, **drawn}, argv, own)
                if run.id in runs:
                    raise UserError(
                        f"sweep {spec.name}: {run.name!r} is the same run as {runs[run.id].name!r}"
                    )
                runs[run.id] = run
    for stem, count in Counter(run.stem for run in runs.values()).items():
        if count > 1:
            raise UserError(f"sweep {spec.name}: two runs would be kept as {stem}; rename an arm")
    return sorted(runs.values(), key=lambda run: (run.arm.later, run.cfg.run.seed))


def basis_options(cfg: TrainConfig) -> list[str]:
    """What extract and verify need to make the basis of this run: what is not their own default."""
    groups = ((cfg.model, ModelConfig()), (cfg.basis, BasisConfig()), (cfg.loss, LossConfig()))
    return flags(
        {
            f.name: getattr(group, f.name)
            for group, default in groups
            for f in fields(group)
            if f.name not in REMOVED and getattr(group, f.name) != getattr(default, f.name)
        }
    )


def checked(preset: str, options: Mapping[str, Any], what: str) -> TrainConfig:
    """The settings of these options. Raises UserError naming the arm whose options train would refuse."""
    for name in options:
        if name.replace("-", "_") in ITS_OWN:
            raise UserError(f"{what}: the sweep sets {name} itself; leave it out")
    argv = [preset, *flags(options)]
    try:
        return train.checked(argv)
    except SystemExit as error:
        raise UserError(f"{what}: train does not take {' '.join(argv)}") from error
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def seed_range(value: object) -> tuple[int, ...]:
    """`41`, `[41, 42]`, `"41-45"`, `"41,43,50-52"` or `"41 42 43"`."""
    parts = (
        [str(v) for v in value]
        if isinstance(value, (list, tuple))
        else re.split(r"[,\s]+", str(value).strip())
    )
    seeds: list[int] = []
    for part in parts:
        ends = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        if not ends:
            raise UserError(f"seeds: {part!r} is neither a number nor a range like 41-45")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last - first >= MOST_SEEDS:
            raise UserError(f"seeds: {part!r} are more than {MOST_SEEDS}")
        seeds.extend(range(first, last + 1))
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds: {value!r} names {'no seed' if not seeds else 'a seed twice'}")
    return tuple(seeds)


def axes_of(table: object, what: str) -> dict[str, tuple[Any, ...]]:
    """A grid's axes; a list of lists is an axis whose values are lists."""
    if not isinstance(table, dict):
        raise UserError(f"{what}: must be a table of options, each with a list of values")
    axes: dict[str, tuple[Any, ...]] = {}
    for name, values in table.items():
        if name in ("seed", "seeds"):
            axes["seed"] = seed_range(values)
        elif isinstance(values, list) and values:
            axes[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        else:
            raise UserError(f"{what}: {name} must be a list of values, got {values!r}")
    return axes


def take(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse a key that nothing reads. Raises UserError naming it and those there are."""
    for key in table:
        if key not in known:
            raise UserError(f"{what}: unknown key {key!r}; it takes {', '.join(known)}")


def read_arm(table: object, what: str) -> SweepArm:
    if not isinstance(table, dict) or not NAME.fullmatch(str(table.get("name", ""))):
        raise UserError(f"{what}: every [[arms]] needs a name of letters, digits and _ . + = -")
    take(table, [f.name for f in fields(SweepArm)], f"{what} {table['name']}")
    optional = {"why": str, "resolve": str, "controls": str, "later": bool, "explored": bool}
    check_fields(table, {"name": str}, optional, what)
    grid = axes_of(table.get("grid", {}), f"{what} {table['name']} grid")
    options = table_of(table, "options", f"{what} {table['name']}")
    return SweepArm(**{**table, "grid": grid, "options": options})


def read_limits(table: Mapping[str, Any], what: str) -> SweepLimits:
    take(table, [f.name.replace("_", "-") for f in fields(SweepLimits)], f"{what} [limits]")
    for key, value in table.items():
        if type(value) is not int:
            raise UserError(f"{what} [limits]: {key} must be a whole number, got {value!r}")
    return SweepLimits(**{key.replace("-", "_"): value for key, value in table.items()})


def table_of(data: Mapping[str, Any], key: str, what: str) -> dict[str, Any]:
    """A table of the file, empty if it is not there. Raises UserError if the key holds something else."""
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{what}: {key} must be a table, got {value!r}")
    return value


def only(spec: Spec, arms: Sequence[str], seeds: str) -> Spec:
    """The part of a sweep with these arms (none: all) and, unless empty, these seeds in place of its own.

    Raises UserError for an arm that it does not have.
    """
    known = [arm.name for arm in spec.arms]
    for name in arms:
        if name not in known:
            raise UserError(f"--arms {name}: not in sweep {spec.name}; it has {', '.join(known)}")
    chosen = tuple(arm for arm in spec.arms if not arms or arm.name in arms)
    if not seeds:
        return replace(spec, arms=chosen)
    grids = [{axis: values for axis, values in arm.grid.items() if axis != "seed"} for arm in chosen]
    chosen = tuple(replace(arm, grid=grid) for arm, grid in zip(chosen, grids, strict=True))
    return replace(spec, arms=chosen, grid={**spec.grid, "seed": seed_range(seeds)})


def read_spec(path: Path) -> Spec:
    """A sweep from its TOML file. Raises UserError naming the key that is wrong."""
    try:
        raw = path.read_bytes()
        data = tomllib.loads(raw.decode(json.detect_encoding(raw)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 or UTF-16") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from error
    tables = ("name", "preset", "home", "keep", "options", "arms", "grid", "limits", "engine", *ENGINES[1:])
    take(data, tables, str(path))
    one_of(data.get("preset"), tuple(PRESETS), f"{path}: preset")
    listed = data.get("arms", [])
    if not isinstance(listed, list):
        raise UserError(f"{path}: arms must be given as [[arms]] entries")
    arms = [read_arm(arm, f"{path}: arm") for arm in listed] or [SweepArm("")]
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: two arms are called {max(names, key=names.count)!r}")
    name = str(data.get("name", path.stem))
    if not NAME.fullmatch(name):
        raise UserError(f"{path}: name {name!r}: only letters, digits and _ . + = - fit a folder name")
    return Spec(
        name,
        data["preset"],
        Path(data.get("home", SWEEPS / name)),
        tuple(arms),
        table_of(data, "options", str(path)),
        axes_of(data.get("grid", {}), f"{path} [grid]"),
        read_limits(table_of(data, "limits", str(path)), str(path)),
        one_of(data.get("engine", "local"), ENGINES, f"{path}: engine"),
        {engine: table_of(data, engine, str(path)) for engine in ENGINES},
        Path(data["keep"]) if "keep" in data else None,
    )


def one_of(value: Any, known: Sequence[str], what: str) -> str:
    """The value, if it is one of these."""
    if value not in known:
        raise UserError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    return str(value)


def typed(text: str) -> Any:
    """A value as TOML reads it, or else the text itself: `3`, `1e-4`, `true`, `erase`."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def quick_spec(preset: str, name: str, grid: Sequence[str], given: Sequence[str]) -> Spec:
    """A sweep from `--grid intervention=none,erase` and `--set steps=3`. Raises UserError."""
    one_of(preset, tuple(PRESETS), "--preset")
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: only letters, digits and _ . + = - fit a folder name")
    axes: dict[str, tuple[Any, ...]] = {}
    for option, text in map(split_pair, grid):
        axes[option] = seed_range(text) if option == "seed" else tuple(map(typed, text.split(",")))
    return Spec(name, preset, SWEEPS / name, (SweepArm(""),), given_options(given), axes)


def given_options(given: Sequence[str]) -> dict[str, Any]:
    """Options of every run from `--set steps=3`. Raises UserError for what is not NAME=VALUE."""
    return {option: typed(text) for option, text in map(split_pair, given)}


def split_pair(text: str) -> tuple[str, str]:
    """`name=value` apart."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"{text!r}: must be NAME=VALUE, an option of train without its dashes")
    return name.removeprefix("--"), value
