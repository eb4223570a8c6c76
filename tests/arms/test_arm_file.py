"""`--arm-file`: an arm from a file is like one of the package; what is wrong in it is told by its place."""

import json
from pathlib import Path

import pytest

from doc_commands import ROOT, scripts
from projected_grpo.arm_settings import arm_settings, settings_of
from projected_grpo.arms.table import arm_of
from projected_grpo.cli import main
from projected_grpo.config import from_json, to_json
from projected_grpo.errors import UserError
from projected_grpo.options.train import parse
from projected_grpo.run.identity import given, identity, run_name

VOTE = scripts((ROOT / "docs/howto/own_arm.md").read_text())["vote.py"]
ERASE_AGAIN = """
from dataclasses import dataclass
from typing import Literal

from projected_grpo.arm_settings import EraseSettings
from projected_grpo.arms.erase import ERASE


@dataclass(frozen=True)
class SETTINGS(EraseSettings):
    intervention: Literal["again"] = "again"


ARM = ERASE
"""
SMALL = (
    *("--steps=2", "--n-problems=4", "--eval-n-prompts=1", "--max-new=8", "--workers=1", "--save-every=1"),
    *("--vhack-refresh-every=0", "--eval-ablate-every=0"),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(here, text, name="mine.py"):
    (here / name).write_text(text)
    return name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("ARM = Arm(", "ARM = Arn("), "mine.py:{line}: NameError: name 'Arn' is not defined"),
        (("def vote(", "def vote("[:-1]), "mine.py:{line}: "),
        (("SETTINGS = VoteSettings", ""), "defines no SETTINGS; docs/howto/own_arm.md"),
        (
            ("SETTINGS = VoteSettings", "SETTINGS = dict"),
            "SETTINGS must be a dataclass made from ArmSettings",
        ),
        (("vote_share: float = 0.5", "vote_share: float"), "vote_share"),
        (
            ("vote_share: float = 0.5", "vote_share: dict = None"),
            "vote_share is of a type that no option has",
        ),
        (("vote_share: float", "steps: float"), "every run has an option steps; give this one another name"),
        (('"vote"] = "vote"', '"erase"] = "erase"'), "erase is an arm of the package"),
        (('"vote"] = "vote"', '"a b"] = "a b"'), "must be the arm's name, not 'a b'"),
        (("ARM = Arm(gradient=vote, per_rollout=True)", "ARM = vote"), "ARM must be an Arm"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_is_wrong_in_a_file_is_told_by_line_or_name(here, capsys, change, said):
    text = VOTE.replace(*change)
    assert text != VOTE
    said = said.format(line=text[: text.find(change[1])].count("\n") + 1)
    written(here, text)
    assert main(["train", "smoke", "--arm-file=mine.py", *SMALL]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "mine.py" in error and said in error
    assert not (here / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arm-file=none.py"], "none.py: no such Python file"),
        (["--arm-file=mine.txt"], "mine.txt: no such Python file (its name must end in .py)"),
        (["--arm-file=mine.py", "--intervention=erase"], "the arm of mine.py is called vote"),
        (["--arm-file=mine.py", "--vote-shar=1"], "did you mean --vote-share?"),
        (["--arm-file=mine.py", "--control=flip"], "'flip' is not one of: none, haar"),
        (["--vote-share=1"], "no option --vote-share"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_slip_on_the_command_line_is_told(here, capsys, words, said):
    written(here, VOTE)
    written(here, VOTE, "mine.txt")
    assert main(["train", "smoke", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_arm_of_a_file_has_its_options_and_its_name(here):
    cfg = parse(["smoke", f"--arm-file={written(here, VOTE)}", "--vote-share=0.25", "--control=haar"])
    assert (cfg.arm.vote_share, cfg.arm.control, cfg.arm.arm_file) == (0.25, "haar", here / "mine.py")
    assert run_name(cfg) == "vote+haar vote_share=0.25"
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg
    assert "arm_file" in given(cfg) and "arm_digest" not in given(cfg)


def test_an_arm_is_what_its_file_says_wherever_it_lies(here):
    (here / "elsewhere").mkdir()
    paths = [written(here, VOTE), written(here, VOTE, "elsewhere/mine.py"), written(here, VOTE + "#", "b.py")]
    ids = [identity(parse(["smoke", f"--arm-file={path}"])) for path in paths]
    assert ids[0] == ids[1] and len({*ids, identity(parse(["smoke"]))}) == 3


def test_a_run_can_be_read_where_its_arms_file_is_gone(here):
    cfg = parse(["smoke", f"--arm-file={written(here, VOTE)}", "--vote-share=0.25", "--half-a=C,E"])
    data = to_json(cfg)
    data["arm"]["arm_file"] = str(here / "gone.py")
    with pytest.raises(UserError, match=r"gone\.py: no such Python file"):
        from_json(data)
    read = from_json(data, older=True)
    assert (read.arm.intervention, read.arm.vote_share, read.arm.half_a) == ("vote", 0.25, ("C", "E"))
    assert run_name(read).startswith("vote")
    del data["arm"]["arm_file"]  # as kept records have it
    assert from_json(data, older=True).arm.vote_share == 0.25


def test_the_packages_arms_are_those_of_the_table(here):
    assert settings_of("erase", None) is type(arm_settings("erase"))
    with pytest.raises(UserError, match="choose from"):
        settings_of("vote", None)
    own = settings_of(None, here / written(here, ERASE_AGAIN, "again.py"))(arm_file=here / "again.py")
    assert arm_of(own) is arm_of(arm_settings("erase"))


def test_erase_from_a_file_is_erase_and_goes_on_only_with_the_same_file(here, unchecked, capsys):
    written(here, ERASE_AGAIN, "again.py")
    assert main(["train", "smoke", "--arm-file=again.py", *SMALL]) == 0
    assert main(["train", "smoke", "--intervention=erase", *SMALL]) == 0
    again, erase = sorted(Path("out/runs").glob("*"), key=lambda run: "erase" in run.name)
    assert (again / "rollouts.jsonl").read_bytes() == (erase / "rollouts.jsonl").read_bytes()
    assert (again / "arm.py").read_text() == ERASE_AGAIN
    assert main(["results", "out/runs"]) == 0
    assert "again" in capsys.readouterr().out
    (again / "summary.json").unlink()
    Path("again.py").unlink()  # the run has its own
    assert main(["train", "smoke", f"--resume={again}"]) == 0
    (again / "summary.json").unlink()
    (again / "arm.py").write_text(ERASE_AGAIN + "\n# changed\n")
    assert main(["train", "smoke", f"--resume={again}"]) == 2
    assert "arm.py changed since" in capsys.readouterr().err
