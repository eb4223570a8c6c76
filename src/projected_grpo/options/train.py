"""The command line of `train PRESET`: the usual options first, then those of each group of settings.

Every option keeps one flat name (`--v-hack-k`, not `--basis.v-hack-k`). The options of the arm that
`--intervention` names are there, those of other arms are not.
"""

import ast
import dataclasses
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from projected_grpo.arm_settings import SETTINGS, ArmSettings, digest_of, settings_of
from projected_grpo.checks import validate
from projected_grpo.config import PRESETS, REMOVED, TrainConfig
from projected_grpo.errors import UserError
from projected_grpo.options.paths import check_paths
from projected_grpo.options.typed import VALUES, can_be_typed, is_tyros, near, read_options, typed_fields

USUAL = (
    *("intervention", "control", "seed", "steps", "model", "problems"),
    *("vhack_pairs_path", "teacher_pool_dir", "out_dir", "resume"),
)
DEFAULT_ARM = TrainConfig("").arm.intervention


def parse(argv: Sequence[str]) -> TrainConfig:
    """Read `PRESET [options]`. Raises UserError, or SystemExit where tyro answers (--help)."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        if argv:
            sys.exit(0)
        raise UserError(f"name a preset: {', '.join(PRESETS)}")
    preset, *given = argv
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"train {preset}: no such preset{near(preset, list(PRESETS))}; choose from {known}")
    arm, file = _arm_of(given)
    about, cfg = PRESETS[preset]
    cfg = dataclasses.replace(cfg, arm=arm())
    if file is not None:
        _refuse_options(cfg, file)
    _refuse_unknown(given, cfg)
    if is_tyros(given):
        answered(cfg, given, f"{about}\n\n{arm.__doc__}")
    parts = {name: getattr(cfg, name) for name in _groups(cfg)}
    kinds = {name: kind for part in parts.values() for name, kind, _ in typed_fields(part.__class__)}
    values, _ = read_options(given, kinds, (), f"train {preset}")
    changed = {name.replace("-", "_"): value for name, value in values.items()}
    if file is not None:
        changed |= {"arm_file": file.absolute(), "arm_digest": digest_of(file)}
    own = {
        group: {f.name: changed[f.name] for f in dataclasses.fields(part) if f.name in changed}
        for group, part in parts.items()
    }
    return dataclasses.replace(
        cfg, **{group: dataclasses.replace(part, **own[group]) for group, part in parts.items()}
    )


def _arm_of(given: Sequence[str]) -> tuple[type[ArmSettings], Path | None]:
    """The settings of the arm that these words name, and the file it is from."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--intervention", nargs="?")
    first.add_argument("--arm-file", "--arm_file", nargs="?")
    found = first.parse_known_args(given)[0]
    named = "none" if (found.intervention or "").lower() == "none" else found.intervention
    if found.arm_file and found.arm_file.lower() != "none":
        file = Path(found.arm_file).expanduser()
        return settings_of(named, file), file
    return settings_of(named or DEFAULT_ARM, None), None


def _refuse_options(cfg: TrainConfig, file: Path) -> None:
    """Raises UserError for an arm file's option that cannot be typed, or has another option's name."""
    own: Any = type(cfg.arm)
    for name, kind, _ in typed_fields(own):
        if not can_be_typed(kind):
            raise UserError(
                f"{file}: {name.replace('-', '_')} is of a type that no option has; take bool, int, float, "
                "str, Path, Literal[...], tuple[..., ...] of one of these, or one of these | None"
            )
    groups = [getattr(cfg, group) for group in _groups(cfg) if group != "arm"]
    others = {f.name for group in groups for f in dataclasses.fields(group)}
    for name in others & {f.name for f in dataclasses.fields(own)}:
        raise UserError(f"{file}: every run has an option {name}; give this one another name")


def checked(argv: Sequence[str]) -> TrainConfig:
    """`parse`, and refuse what cannot make a run: all that needs no file to be read and no model."""
    cfg = parse(argv)
    if cfg.run.resume is None:  # else its own settings are used
        validate(cfg)
        check_paths(cfg)
    return cfg


def usage() -> str:
    """The presets."""
    lines = "\n".join(f"  {name:<6} {text}" for name, (text, _) in PRESETS.items())
    return (
        "usage: projected-grpo train PRESET [options]   (`train PRESET --help` lists them)\n\n"
        f"Train one arm. The hack basis is extracted first if it is not there.\n\n{lines}"
    )


def answered(cfg: TrainConfig, given: Sequence[str], about: str) -> NoReturn:
    """Let tyro show the options, or what else it is asked for. Raises SystemExit."""
    with VALUES:
        tyro.cli(
            command(cfg),
            prog=f"projected-grpo train {cfg.preset}",
            description=f"{about} `--intervention=NAME --help` shows another arm's options.",
            args=list(given),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    sys.exit(0)


def _groups(cfg: TrainConfig) -> list[str]:
    return [f.name for f in dataclasses.fields(cfg) if f.name != "preset"]


def _refuse_unknown(given: Sequence[str], cfg: TrainConfig) -> None:
    """One line for an option that is gone, is another arm's, or never was."""
    mine = {f.name for group in _groups(cfg) for f in dataclasses.fields(getattr(cfg, group))} - set(REMOVED)
    for word in given:
        option = word.partition("=")[0]
        name = option.removeprefix("--").replace("-", "_")
        plain = name.removeprefix("no_")
        if not option.startswith("--") or option == "--help" or option.startswith("--tyro-"):
            continue
        if name in mine or plain in mine:
            continue
        if name in REMOVED:
            raise UserError(f"{option} is gone: {REMOVED[name].instead}")
        takes = [
            arm for arm, kind in SETTINGS.items() if name.removeprefix("no_") in kind.__dataclass_fields__
        ]
        if takes:
            raise UserError(
                f"{option} is an option of --intervention={' or '.join(takes)}, not of {cfg.arm.intervention}"
            )
        known = ["--" + each.replace("_", "-") for each in mine]
        raise UserError(f"no option {option}{near(option, known)}; `train {cfg.preset} --help` lists all")


def command(cfg: TrainConfig) -> type:
    """The settings' options as tyro reads them: a group of the usual ones, then the groups without them."""
    options: dict[str, tuple[str, Any, Any]] = {}
    for group in _groups(cfg):
        part = getattr(cfg, group)
        for f in dataclasses.fields(part):
            metavar = "NAME" if f.name == "intervention" else None
            shown = tyro.conf.arg(help=descriptions(type(part)).get(f.name), metavar=metavar)
            default = dataclasses.field(default=getattr(part, f.name))
            options[f.name] = (f.name, Annotated[f.type, shown], default)
    titles = {group: cfg.arm.intervention if group == "arm" else group for group in _groups(cfg)}
    groups = {"usual": USUAL} | {
        title: tuple(f.name for f in dataclasses.fields(getattr(cfg, group)) if f.name not in USUAL)
        for group, title in titles.items()
    }
    made = {
        title: dataclasses.make_dataclass(title, [options[name] for name in names])
        for title, names in groups.items()
    }
    fields = [(title, kind, dataclasses.field(default_factory=kind)) for title, kind in made.items()]
    return dataclasses.make_dataclass("Options", fields)


def descriptions(kind: type) -> dict[str, str]:
    """The text below each field of a class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        found |= _texts(base.__module__).get(base.__name__, {})
    return found


@cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """By class and field, the docstrings below the fields of a module's classes."""
    source = Path(str(sys.modules[module].__file__)).read_text()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {
        node.name: {
            ast.unparse(named.target): " ".join(str(text.value.value).split())
            for named, text in pairwise(node.body)
            if isinstance(named, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        }
        for node in classes
    }
