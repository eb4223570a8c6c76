"""How options are typed: lists, no value, flags; and that each one has help."""

import dataclasses
from pathlib import Path
from typing import Literal, get_type_hints

import pytest

from projected_grpo.arm_settings import SETTINGS
from projected_grpo.cli import VERBS, main
from projected_grpo.config import PRESETS
from projected_grpo.errors import UserError
from projected_grpo.options.train import descriptions, parse
from projected_grpo.options.typed import NameValue, as_typed, flags, metavar, read, typed_fields
from projected_grpo.options.verbs import StudyOptions, SweepOptions


@pytest.mark.parametrize(
    ("typed", "modes"),
    [
        (["--teacher-modes=run_tests,sentinel"], ("run_tests", "sentinel")),
        (["--teacher-modes", "run_tests,sentinel"], ("run_tests", "sentinel")),
        (["--teacher-modes", "run_tests, sentinel,"], ("run_tests", "sentinel")),
        (["--teacher-modes", "run_tests", "sentinel", "--steps=3"], ("run_tests", "sentinel")),  # as of old
        (["--teacher_modes", "run_tests,", "sentinel"], ("run_tests", "sentinel")),
        (["--teacher-modes=none"], ()),
        (["--teacher-modes="], ()),
    ],
    ids=" ".join,
)
def test_a_list_is_typed_with_commas(typed, modes):
    assert parse(["smoke", *typed]).teacher.teacher_modes == modes


def test_a_word_behind_a_list_with_an_equals_sign_is_one_of_its_own():
    assert as_typed(["--arms=none", "nano"], StudyOptions, "study") == ["--arms=none", "nano"]
    assert as_typed(["--arms=none,", "erase", "nano"], StudyOptions, "study") == ["--arms=none,erase", "nano"]


def test_a_path_is_read_as_the_shell_reads_it():
    assert parse(["smoke", "--out-dir=~/zz"]).run.out_dir == Path.home() / "zz"


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_typed_in_one_way(word):
    cfg = parse(
        [
            "nano",
            f"--vhack-pairs-path={word}",
            "--teacher-off-step",
            word,
            f"--intervention={word}",
            f"--control={word}",
        ]
    )
    assert cfg.basis.vhack_pairs_path is None and cfg.teacher.teacher_off_step is None
    assert (cfg.arm.intervention, cfg.arm.control) == ("none", "none")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--preserve-magnitude False", "write --no-preserve-magnitude"),
        ("--preserve-magnitude=false", "write --no-preserve-magnitude"),
        ("--preserve_magnitude no", "write --no-preserve-magnitude"),
        ("--preserve-magnitude=True", "write --preserve-magnitude"),
        ("--no-preserve-magnitude 0", "write --preserve-magnitude"),
        ("--no-preserve-magnitude=1", "write --no-preserve-magnitude"),
        ("--unbiased=maybe", "write --unbiased or --no-unbiased"),
        ("--steps=many", "--steps 'many' is no whole number"),
        ("--steps 1.5", "--steps '1.5' is no whole number"),
        ("--lr fast", "--lr 'fast' is no number"),
        ("--lr", "--lr needs a value: FLOAT"),
        ("--lr --steps=3", "--lr needs a value: FLOAT"),
        ("--teacher-off-step=later", "--teacher-off-step 'later' is no whole number"),
        ("--dtype float23", "did you mean float32?"),
        ("--half-a CE", "--half-a 'CE' is not one of: C, D, E"),
        ("--env-mode run_tests sentinel", "'sentinel' belongs to no option; a list is one word with commas"),
        ("--step=3", "did you mean --steps?"),
        ("-steps=3", "two dashes, as in --steps"),
    ],
)
def test_a_slip_is_told_in_one_line(typed, said, capsys):
    assert main(["train", "smoke", *typed.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert "class" not in error and "Type" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("export RUN --as-trained true", "--as-trained takes no value, got 'true': write --as-trained"),
        ("evaluate --temprature=1", "no option --temprature; did you mean --temperature?; `evaluate --help`"),
        ("study nono", "study 'nono' is not one of: nano"),
        ("probe gate Z out", "probe gate 'Z' is not one of: A, A2, B, B2, C, D"),
        ("export RUN OTHER --out=x", "'OTHER' belongs to no option"),
    ],
)
def test_other_verbs_tell_the_same(words, said, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    "words",
    [
        ["--grid", "intervention=none,erase", "v-hack-k=1,5", "FILE"],
        ["--grid", "intervention=none,erase,v-hack-k=1,5", "FILE"],
        ["--grid=intervention=none,erase,v-hack-k=1,5", "FILE"],
    ],
    ids=" ".join,
)
def test_values_of_axes_may_be_lists_themselves(words):
    grid, file = as_typed(words, SweepOptions, "sweep")
    pairs = read(tuple[NameValue, ...], grid.removeprefix("--grid="))
    assert pairs == ("intervention=none,erase", "v-hack-k=1,5") and file == "FILE"


def test_a_file_may_stand_behind_a_list_with_commas():
    assert as_typed(["--arms", "none,erase", "nano"], StudyOptions, "study") == ["--arms=none,erase", "nano"]


@pytest.mark.parametrize("value", [None, 3, (), ("C",), ("C", "E")])
def test_what_is_written_is_read_again(value):
    kind = tuple[Literal["C", "D", "E"], ...] if isinstance(value, tuple) else int | None
    (word,) = flags({"b_c": value})
    assert word.startswith("--b-c=") and read(kind, word.removeprefix("--b-c=")) == value


def leaves(kind):
    """(class, field) of every option, in classes at any depth."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint)
        else:
            yield kind, name


KINDS = {**{verb: kind for verb, (kind, _) in VERBS.items()}, **SETTINGS}
GROUPS = dict.fromkeys(
    type(group) for _, cfg in PRESETS.values() for group in vars(cfg).values() if not isinstance(group, str)
)


@pytest.mark.parametrize("kind", [*KINDS.values(), *GROUPS], ids=lambda kind: kind.__name__)
def test_every_option_has_help_and_a_form_that_is_known(kind):
    for owner, name in leaves(kind):
        assert len(descriptions(owner).get(name, "")) > 3, f"{owner.__name__}.{name}"
    assert all(metavar(one) for _, one, _ in typed_fields(kind) if one is not bool)


def test_a_wrong_value_is_no_value_of_an_option():
    with pytest.raises(UserError, match="--out"):
        as_typed(["--out"], StudyOptions, "study")
    assert read(Path | None, "a,b") == Path("a,b")
