"""`--resume=auto`: which run goes on, and which begins anew."""

import json
import shutil
from pathlib import Path

import pytest

from projected_grpo.cli import main
from projected_grpo.errors import DIVERGED
from short_runs import command, cut_short, folder_of, same_bytes

pytestmark = pytest.mark.usefixtures("unchecked")


def test_auto_begins_goes_on_and_stays_done(here, whole, capsys):
    folder = cut_short("auto", 3, "--resume=auto")
    assert main(command("auto", "--resume=auto")) == 0
    assert folder_of("auto") == folder
    same_bytes(whole, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    capsys.readouterr()
    assert main(command("auto", "--resume=auto")) == 0
    assert f"{folder} has finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_auto_takes_no_run_of_other_settings(cut):
    folder = cut("other", 3)
    before = (folder / "steps.jsonl").read_bytes()
    assert main(command("whole", "--resume=auto", "--seed=9")) == 0
    assert (folder / "steps.jsonl").read_bytes() == before
    assert len(list(Path("out/runs").glob("*_seed9_whole"))) == 1


def test_auto_takes_the_newest(whole, cut):
    folder = cut("newest", 3)
    later = folder.with_name("2999" + whole.name[4:])
    shutil.copytree(folder, later)
    shutil.copytree(folder, later.with_name(later.name + "-2"))
    assert main(command("whole", "--resume=auto")) == 0
    assert not (folder / "summary.json").exists() and not (later / "summary.json").exists()
    same_bytes(whole, later.with_name(later.name + "-2"))


def test_auto_says_that_a_run_diverged(here, whole, capsys):
    folder = whole.with_name("20200101T000000_smoke_gone")
    shutil.copytree(whole, folder)
    made = json.loads((folder / "config.json").read_text())
    made["config"]["run"]["out_tag"] = "_gone"
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "summary.json").write_text(json.dumps({"finished": False}))
    assert main(command("gone", "--resume=auto")) == DIVERGED
    assert "_gone" in capsys.readouterr().err


def test_auto_passes_over_what_is_no_run(here, capsys):
    odd = Path("out/runs/19990101T000000_smoke_odd")
    odd.mkdir(parents=True)
    (odd / "config.json").write_text("{")
    try:
        assert main(command("passed", "--resume=auto", "--steps=1")) == 0
        assert "passed over" in capsys.readouterr().err
    finally:
        shutil.rmtree(odd)
