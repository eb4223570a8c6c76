"""Sweeps through pueue: a stand-in records its calls and answers as the real one is documented to."""

import json
import os
import subprocess
import sys

import pytest

from projected_grpo.cli import main
from projected_grpo.sweep.pueue import CLI
from small_sweeps import spec_file


@pytest.fixture
def here(tmp_path, monkeypatch, unchecked_children):
    monkeypatch.chdir(tmp_path)
    return tmp_path


FAKE_PUEUE = f"""#!{sys.executable}
import json, os, sys
words, log = sys.argv[1:], os.environ["FAKE_PUEUE"]
queue = {{"calls": [], "tasks": {{}}, "groups": {{"default": {{}}}}}}
if os.path.exists(log):
    queue = json.load(open(log))
queue["calls"].append(words)
if words == ["status", "--json"]:
    print(json.dumps({{k: queue[k] for k in ("tasks", "groups")}}))
elif words[:2] == ["group", "add"]:
    queue["groups"][words[2]] = {{}}
elif words[0] == "add":
    number = str(len(queue["tasks"]))
    label = words[words.index("--label") + 1]
    queue["tasks"][number] = {{"id": int(number), "label": label, "status": {{"Queued": {{}}}}}}
    print(number)
elif words[0] != "parallel":
    sys.exit("unrecognized subcommand")
json.dump(queue, open(log, "w"))
"""


@pytest.fixture
def pueue(here, monkeypatch):
    """A pueue that records how it was called, and answers as the real one is documented to."""
    (here / "bin").mkdir()
    (here / "bin" / "pueue").write_text(FAKE_PUEUE)
    (here / "bin" / "pueue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PUEUE", str(here / "pueue.json"))
    return lambda: json.loads((here / "pueue.json").read_text())


def added(queue):
    """Label, dependencies and command of every task, as pueue's own parser would read them."""
    for words in queue["calls"]:
        if words[0] == "add":
            split = words.index("--")
            after = words.index("--after") if "--after" in words else split
            ids = words[after + 1 : split]
            assert all(i.isdigit() for i in ids) and len(words) == split + 2
            assert words[1:3] == ["--print-task-id", "--label"]
            yield words[3], [int(i) for i in ids], words[-1]


def test_pueue_gets_the_chain_with_its_gates(here, pueue, capsys):
    path = spec_file(here, more='[pueue]\ngroup = "gpu"\n')
    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--jobs=1"]) == 0
    tasks = list(added(pueue()))
    calls = pueue()["calls"]
    assert calls[:3] == [["status", "--json"], ["group", "add", "gpu"], ["parallel", "1", "--group", "gpu"]]
    assert all(words[words.index("--group") + 1] == "gpu" for words in calls if words[0] == "add")
    names = [label.split(" [")[0] for label, _, _ in tasks]
    assert [n.split(" tiny")[0] for n in names[:3]] == ["extract", "gate A", "gate B: verify"]
    order = {name: i for i, name in enumerate(names)}
    after = {name: {names[i] for i in ids} for name, (_, ids, _) in zip(names, tasks, strict=True)}
    assert after[names[3]] == {names[2]} and names[3] == "gate A2 learning rate"
    rate = names[3]
    for seed in ("seed=1", "seed=2"):
        assert after[f"smoke none {seed}"] == {rate}
        assert after[f"gate C none {seed}"] == {f"smoke none {seed}"}
        assert after[f"smoke erase {seed}"] == {rate, f"gate C none {seed}"}
        assert after[f"gate D erase {seed}"] == {f"smoke erase {seed}"}
    assert len(tasks) == 4 + 2 * 4 and all(order[b] < order[a] for a in after for b in after[a])
    (none,) = (label for label, _, _ in tasks if label.startswith("smoke none seed=1"))
    assert none.endswith("| why: H4: does none hack | resolve: if not, stop")

    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--jobs=1"]) == 0  # all of it is queued
    assert "0 tasks queued, 12 were" in capsys.readouterr().out and len(list(added(pueue()))) == 12


def words_of(command):
    """The words of a command as a shell makes them: unquoted, patterns expanded."""
    found = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    ).stdout
    return found.decode().split("\0")[:-1]


def test_pueues_tasks_do_what_they_say(here, pueue, capsys):
    """Each command in the order of its dependencies, as pueue would."""
    path = spec_file(here, steps=2)
    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--seeds=1"]) == 0
    results = {}
    for number, (label, after, command) in enumerate(added(pueue())):
        if any(results[i] for i in after):
            results[number] = "a dependency failed"
            continue
        words = words_of(command)
        assert tuple(words[:3]) == CLI
        results[number] = main(words[3:])
        if label.startswith("gate C"):
            assert results[number] == 1  # a random model does not hack
    assert list(results.values()) == [0, 0, 0, 0, 0, 1, "a dependency failed", "a dependency failed"]
    main(["sweep", "status", str(path), "--seeds=1"])
    assert "2 runs: 1 finished, 1 to do" in capsys.readouterr().out


def test_gates_need_a_none_to_stand_behind(here, pueue, capsys):
    (here / "s.toml").write_text('preset = "smoke"\n[[arms]]\nname="erase"\n[grid]\nseed = [1]\n')
    assert main(["sweep", "s.toml", "--engine=pueue", "--gates"]) == 2
    assert "intervention=none" in capsys.readouterr().err


def test_a_dry_run_of_pueue_is_a_script_that_queues_the_same(here, pueue, capsys):
    path = spec_file(here)
    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert not (here / "pueue.json").exists()
    subprocess.run(["bash", "-euc", script], check=True)
    by_script = list(added(pueue()))
    (here / "pueue.json").unlink()
    assert main(["sweep", str(path), "--engine=pueue", "--gates"]) == 0
    assert list(added(pueue())) == by_script


def test_without_pueue_or_its_daemon_one_line_says_so(here, monkeypatch, pueue, capsys):
    path = spec_file(here)
    (here / "bin" / "pueue").write_text("#!/bin/sh\necho 'Failed to connect to daemon' >&2\nexit 1\n")
    assert main(["sweep", str(path), "--engine=pueue"]) == 2
    assert "Failed to connect to daemon; does pueued run?" in capsys.readouterr().err
    (here / "bin" / "pueue").unlink()
    assert main(["sweep", str(path), "--engine=pueue"]) == 2
    assert "pueue is not installed" in capsys.readouterr().err
