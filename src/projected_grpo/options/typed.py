"""How options are typed: a list is one word with commas, `none` means no value, a flag takes no value.

`train` is read here, as a plan of many runs reads it once a run; other verbs by tyro, after what is wrong
was told in one line. Lists as several words, the form that scripts of earlier versions use, are taken too.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from projected_grpo.errors import UserError


class NameValue(str):
    """`steps=20`: an option of train without its dashes."""


PARTS = {NameValue: re.compile(r",(?=[\w-]+=)")}  # else every comma parts a list
SHOWN = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", NameValue: "NAME=VALUE"}
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NOT_TYPED = get_args(tyro.conf.Fixed[int])[1:]
POSITIONAL = get_args(tyro.conf.Positional[int])[1]

VALUES = ConstructorRegistry()
"""The forms of lists and of options that may have no value, for tyro and its help."""


def is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple


def plain(kind: Any) -> Any:
    """A kind without its marks."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def without_none(kind: Any) -> Any:
    """The other half of `X | None`; None for a kind that always has a value."""
    if get_origin(kind) not in (UnionType, Union):
        return None
    (value,) = (each for each in get_args(kind) if each is not type(None))
    return plain(value)


def can_be_typed(kind: Any) -> bool:
    """Whether `read` knows this kind of value."""
    if is_list(kind):
        return can_be_typed(get_args(kind)[0]) and get_args(kind)[1:] == (...,)
    if get_origin(kind) in (UnionType, Union):
        return len(get_args(kind)) == 2 and NoneType in get_args(kind) and can_be_typed(without_none(kind))
    return kind is bool or get_origin(kind) is Literal or kind in SHOWN


def metavar(kind: Any) -> str:
    """What help shows in place of a value."""
    if is_list(kind):
        return f"{metavar(get_args(kind)[0])},..."
    if inner := without_none(kind):
        return f"{metavar(inner)}|none"
    return "{" + ",".join(map(str, get_args(kind))) + "}" if get_origin(kind) is Literal else SHOWN[kind]


def read(kind: Any, text: str) -> Any:
    """The value that was typed. Raises ValueError saying what it is not."""
    if is_list(kind):
        inner = get_args(kind)[0]
        if text.lower() == "none" and get_origin(inner) is Literal:
            return ()
        parts = (part.strip() for part in re.split(PARTS.get(inner, ","), text))
        return tuple(read(inner, part) for part in parts if part)
    if inner := without_none(kind):
        return None if text.lower() == "none" else read(inner, text)
    if get_origin(kind) is Literal:
        return one_of(text, get_args(kind))
    if kind is Path:
        return Path(text).expanduser()  # as the shell does it, but not behind an =
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no {'whole number' if kind is int else 'number'}") from error


def one_of(text: str, choices: Sequence[str]) -> str:
    found = text.lower() if text.lower() == "none" else text
    if found not in choices:
        raise ValueError(f"{text!r} is not one of: {', '.join(choices)}{near(text, choices)}")
    return found


def near(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` where something known is spelt much like it."""
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def written(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as they are typed: `--name=value`, `--name=a,b` for a list, `--name` or `--no-name`."""
    words = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option}={written(value)}")
    return words


@VALUES.primitive_rule
def lists_and_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """tyro's reader of a list in one word, and of a value that may be none."""
    kind: Any = info.type
    if not (is_list(kind) or without_none(kind)) or (is_list(kind) and POSITIONAL in info.markers):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar(kind),
        instance_from_str=lambda words: read(kind, words[0]),
        is_instance=lambda value: value is None or isinstance(value, tuple) == is_list(kind),
        str_from_instance=lambda value: [] if value == () else [written(value)],
    )


@cache
def typed_fields(options: type) -> tuple[tuple[str, Any, bool], ...]:
    """Every option of a class and of the classes in it: its name, its kind, and whether it is positional."""
    hints = get_type_hints(options, include_extras=True)
    found: list[tuple[str, Any, bool]] = []
    for field in fields(options):
        hint = hints[field.name]
        kind, *markers = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if isinstance(kind, type) and is_dataclass(kind):
            found += typed_fields(kind)
        elif not any(marker in NOT_TYPED for marker in markers):
            found.append((field.name.replace("_", "-"), kind, POSITIONAL in markers))
    return tuple(found)


def is_tyros(argv: Sequence[str]) -> bool:
    """Whether the words ask for help, or for something else that tyro answers."""
    return any(word in ("-h", "--help") or word.startswith("--tyro-") for word in argv)


def as_typed(argv: Sequence[str], options: type, command: str) -> list[str]:
    """The words as tyro is to read them: each option one word, then those that belong to none.

    Raises UserError as `read_options` does.
    """
    if is_tyros(argv):
        return list(argv)
    found = typed_fields(options)
    kinds = {name: kind for name, kind, positional in found if not positional}
    values, alone = read_options(argv, kinds, [kind for _, kind, positional in found if positional], command)
    return [*flags(values), *alone]


def read_options(
    argv: Sequence[str], kinds: Mapping[str, Any], places: Sequence[Any], command: str
) -> tuple[dict[str, Any], list[str]]:
    """The values of the options, and the words that belong to none.

    `kinds`: what each option takes, by name; `places`: what the words of their own are.
    Raises UserError for an option that is unknown, that needs a value or takes none, or whose value is wrong.
    """
    words, values, alone = list(argv), dict[str, Any](), list[str]()
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        if not word.startswith("--"):
            if option.lstrip("-").replace("_", "-") in kinds and option.startswith("-"):
                raise UserError(f"{option}: an option begins with two dashes, as in -{option}")
            if len(alone) == len(places) and not any(map(is_list, places)):
                raise UserError(f"{word!r} belongs to no option; a list is one word with commas, as in a,b")
            alone.append(word)
        elif kinds.get(name.removeprefix("no-")) is bool:
            if equals or (words and words[0].lower() in (*YES, *NO)):
                refuse_value(name, value if equals else words[0])
            values[name.removeprefix("no-")] = not name.startswith("no-")
        elif name in kinds:
            values[name] = value_of(name, kinds[name], [value] if equals else [], words)
        else:
            known = ["--" + each for each in kinds]
            raise UserError(f"no option {option}{near(option, known)}; `{command} --help` lists all")
    for word, kind in zip(alone, places, strict=False):
        if get_origin(kind) is Literal:
            checked(command, kind, word)
    return values, alone


def refuse_value(option: str, value: str) -> None:
    """Raises UserError for a flag that is given a value, as in `--x False` and `--x=false`."""
    plain = option.removeprefix("no-")
    meant = f"--{plain} or --no-{plain}"
    if value.lower() in (*YES, *NO):
        meant = f"--{plain}" if (value.lower() in YES) == (option == plain) else f"--no-{plain}"
    raise UserError(f"--{option} takes no value, got {value!r}: write {meant}")


def value_of(name: str, kind: Any, given: list[str], words: list[str]) -> Any:
    """An option's value; the words that stand behind it are taken from `words`."""
    alone = not given  # typed without an =
    if alone:
        if not words or words[0].startswith("--"):
            raise UserError(f"--{name} needs a value: {metavar(kind)}")
        given.append(words.pop(0))
    if is_list(kind):
        pairs = get_args(kind)[0] is NameValue
        while words and not words[0].startswith("--") and is_next(given, words[0], pairs, alone):
            given.append(words.pop(0))
    text = ",".join(word.strip(",") for word in given) if is_list(kind) else given[0]
    return checked(f"--{name}", kind, text)


def checked(what: str, kind: Any, text: str) -> Any:
    """`read`, with its refusal as the user's mistake."""
    try:
        return read(kind, text)
    except ValueError as error:
        raise UserError(f"{what} {error}") from error


def is_next(given: Sequence[str], word: str, pairs: bool, alone: bool) -> bool:
    """Whether a word goes on with a list: of NAME=VALUE, after a comma, or of words without either."""
    if pairs:
        return "=" in word
    return given[-1].endswith(",") or (alone and not any("," in each for each in given))
