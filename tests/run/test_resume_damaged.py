"""Runs whose files are damaged, lost, changed, or of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from projected_grpo import experiment
from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.run.checkpoint import state_path, state_paths
from short_runs import command, cut_short, folder_of, go_on, same_bytes

pytestmark = pytest.mark.usefixtures("unchecked")


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "cut", "gone"])
def test_the_state_before_is_used_when_the_last_is_damaged(whole, cut, capsys, damage):
    tag = f"damaged{damage.__name__}"
    folder = cut(tag, 5)
    assert state_paths(folder) == [state_path(folder, 4), state_path(folder, 2)]
    damage(state_path(folder, 4))
    capsys.readouterr()
    assert go_on(folder) == 0
    said = capsys.readouterr().err
    assert "at step 2" in said
    assert ("state_step0004" in said) == (damage is not Path.unlink)
    same_bytes(whole, folder)


def test_a_run_whose_states_are_all_damaged_is_refused(whole, cut, capsys):
    folder = cut("lost", 5)
    for path in state_paths(folder):
        flip(path)
    capsys.readouterr()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert go_on(folder) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --resume") and "state_step0004" in told and "state_step0002" in told
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_state_of_another_run_is_refused(cut, capsys):
    folder, other = cut("foreign", 5), cut_short("seed7", 3, "--seed=7")
    shutil.copy(state_path(other, 2), state_path(folder, 6))
    shutil.copy(state_path(other, 2), state_path(folder, 2))
    assert go_on(folder) == 0
    said = capsys.readouterr().err
    assert "state_step0006.safetensors: " in said and "other settings: seed (" in said and "at step 4" in said


def test_lines_that_a_state_stands_behind_must_be_there(whole, cut, capsys):
    folder = cut("log", 5)
    text = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "steps.jsonl").write_text("".join(text[:3]))  # as a power cut could leave it
    assert go_on(folder) == 0
    said = capsys.readouterr().err
    assert "steps.jsonl" in said and "at step 2" in said
    same_bytes(whole, folder)


def test_a_changed_line_is_found(whole, cut, capsys):
    folder = cut("changed", 5)
    flip(folder / "rollouts.jsonl", 0.01)
    assert go_on(folder) == 2
    assert "rollouts.jsonl" in capsys.readouterr().err


def test_a_run_whose_pairs_changed_is_refused(whole, cut, home, capsys):
    folder = cut("otherpairs", 3)
    kept = (home / "pairs.json").read_text()
    changed = json.loads(kept)
    changed["pairs"][0]["hack"] += "\n# changed"
    try:
        (home / "pairs.json").write_text(json.dumps(changed))
        assert go_on(folder) == 2
    finally:
        (home / "pairs.json").write_text(kept)
        made = {path: path.stat().st_mtime_ns for path in (home / "out" / "vhack").iterdir()}
        if len(made) > 1:
            max(made, key=made.__getitem__).unlink()  # the basis of the changed pairs
    assert "the pairs of" in capsys.readouterr().err
    assert go_on(folder) == 0


def test_a_run_whose_problems_changed_is_refused(whole, cut, monkeypatch, capsys):
    folder = cut("otherdata", 3)
    real = experiment.read_data

    def read_data(cfg, grader):
        data = real(cfg, grader)
        return replace(data, train=(replace(data.train[0], canonical="pass"), *data.train[1:]))

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "read_data", read_data)
        assert go_on(folder) == 2
    assert "the problems" in capsys.readouterr().err


def test_a_run_whose_chat_template_changed_is_refused(whole, cut, monkeypatch, capsys):
    real = experiment.load_model

    def edited(cfg):
        model, tokenizer = real(cfg)
        tokenizer.chat_template = "Be brief.\n" + tokenizer.chat_template
        return model, tokenizer

    folder = cut("template", 3)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "load_model", edited)
        assert go_on(folder) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --resume") and "prompts" in told and "chat template" in told
    made = json.loads((folder / "config.json").read_text())
    assert made["prompts"]["date"] is None  # none was asked for
    del made["prompts"]  # as of a run from before
    (folder / "config.json").write_text(json.dumps(made))
    assert go_on(folder) == 0
    assert json.loads((folder / "config.json").read_text())["prompts"]
    same_bytes(whole, folder)


def test_results_of_an_early_end_do_not_outlive_the_run_that_goes_on(whole, cut, monkeypatch):
    folder = cut("outlived", 5)
    shutil.copy(whole / "summary.json", folder)  # as a divergence leaves it
    (folder / "summary.json").write_text(json.dumps({"finished": False}))

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", stop)
        assert go_on(folder) == 130
    assert not (folder / "summary.json").exists()
    assert go_on(folder) == 0
    same_bytes(folder, whole)


def test_a_damaged_basis_is_extracted_again_where_nobody_named_it(here, whole, capsys):
    basis = min(Path("out/vhack").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)  # whole's
    intact = basis.read_bytes()
    flip(basis, 0.9)
    assert main(command("named", f"--v-hack-path={basis}")) == 2
    assert "checksum" in capsys.readouterr().err and not list(Path("out/runs").glob("*_named"))
    assert main(command("derived")) == 0
    assert "extracting again" in capsys.readouterr().err
    assert basis.read_bytes() == intact
    same_bytes(whole, folder_of("derived"))
