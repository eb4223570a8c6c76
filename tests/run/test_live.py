"""What a run shows while it runs: the terminal's table and bar, and the event files for TensorBoard."""

import errno
import fcntl
import json
import os
import re
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest
from loguru import logger
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from fake_runs import few_pairs
from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.run.columns import COLUMNS, StepTable
from projected_grpo.run.live import figures
from projected_grpo.run.live_tensorboard import View
from projected_grpo.runlog import append_jsonl, printable, start_logging

STEPS, GONE_AFTER, COLUMNS_WIDE = 4, 3, 100
OPTIONS = (
    *("--n-problems=6", "--eval-n-prompts=1", "--max-new=8", "--workers=1", "--device=cpu", "--group=3"),
    *("--vhack-pairs-path=pairs.json", "--vhack-refresh-every=0", "--eval-ablate-every=2", "--save-every=2"),
    *("--intervention=route2", f"--steps={STEPS}", "--live=tensorboard", "--out-tag=_t"),
    "--keep-token-scores",
)
ROW = {"step": 0, "hack_s": [1, 4], "gt_s": [0, 0], "kl": None, "gn": 0.5, "loss": float("nan")}
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def events(file):
    """The records of an event file, by the format alone: length, its checksum, data, its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def event_files(folder):
    return sorted(folder.glob("*tfevents*"))


def told(folder):
    """(tag, step) -> value, as a reader shows it that starts over where a writer says that it did."""
    shown, times = {}, {}
    for event in (event for file in event_files(folder) for event in events(file)):
        if event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
            times = dict.fromkeys(shown, 1)
        for value in event.summary.value:
            key = (value.tag, event.step)
            shown[key], times[key] = value.simple_value, times.get(key, 0) + 1
    assert set(times.values()) <= {1}, "a figure is there twice"
    return shown


class Gone(Exception):
    """Stands for a machine that is switched off."""


class Terminal:
    """A terminal of 100 columns as standard error."""

    def __enter__(self):
        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS_WIDE, 0, 0))
        self.read, self.before = b"", sys.stderr
        self.thread = threading.Thread(target=self._drain)
        self.thread.start()
        sys.stderr = os.fdopen(theirs, "w", buffering=1)
        return self

    def __exit__(self, *exc):
        logger.remove()
        sys.stderr.close()
        sys.stderr = self.before
        self.thread.join()
        os.close(self.ours)
        self.text = self.read.decode()

    def _drain(self):
        try:
            while part := os.read(self.ours, 65536):
                self.read += part
        except OSError as error:  # nobody has the other end open any more
            assert error.errno == errno.EIO


@pytest.fixture(scope="module")
def run(tmp_path_factory, svd_cache):
    """A run in a terminal that is gone after its third step, and what it had shown."""
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    few_pairs(home)
    (home / "out").mkdir()
    (home / "out" / "svd_cache").symlink_to(svd_cache)
    real = train_module.Run.write_step

    def write_step(self, record, rows, tokens):
        real(self, record, rows, tokens)
        if record["step"] == GONE_AFTER - 1:
            raise Gone

    os.chdir(home)
    try:
        with pytest.MonkeyPatch.context() as patch, Terminal() as terminal:
            patch.setattr(train_module.Run, "write_step", write_step)
            with pytest.raises(Gone):
                main(["train", "smoke", *OPTIONS])
        (folder,) = (home / "out" / "runs").iterdir()
        early = told(folder / "tb")
        assert main(["train", "smoke", f"--resume={folder}"]) == 0  # no terminal here
    finally:
        os.chdir(before)
    return folder, terminal.text, early


def steps_of(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def as_figures(rows):
    return {
        (tag, row["step"]): pytest.approx(value, rel=1e-6)
        for row in rows
        for tag, value in figures(row).items()
    }


def test_the_view_says_what_steps_jsonl_says_and_nothing_twice_after_a_resume(run):
    folder, _, early = run
    rows = steps_of(folder)
    assert len(rows) == STEPS and {step for _, step in early} == set(range(GONE_AFTER))
    assert told(folder / "tb") == as_figures(rows)
    assert len(event_files(folder / "tb")) == 1
    assert any(step == 1 for tag, step in early if tag == "step/hack_deploy")


def test_every_rollout_has_its_tokens_once_after_a_resume(run):
    lines = {
        name: [json.loads(line) for line in (run[0] / f"{name}.jsonl").read_text().splitlines()]
        for name in ("rollouts", "tokens")
    }
    places = {name: [(row["step"], row["p_idx"], row["gi"]) for row in rows] for name, rows in lines.items()}
    assert places["tokens"] == places["rollouts"] and len(lines["tokens"]) >= STEPS
    for row, rollout in zip(lines["tokens"], lines["rollouts"], strict=True):
        assert len(row["chars"]) == len(row["logp"]) == len(row["hackward"]) > 0
        assert sum(row["chars"]) == len(rollout["text"]) and max(row["logp"]) <= 0
    means = [sum(row["logp"]) / len(row["logp"]) for row in lines["tokens"] if row["step"] == 0]
    assert steps_of(run[0])[0]["lp_s"] == pytest.approx(sum(means) / len(means), abs=1e-3)


def test_in_a_terminal_the_table_fits_and_the_bar_has_its_end(run):
    _, shown, _ = run
    plain = CODES.sub("", shown)
    legend = plain.split("columns:")[1]
    rows = [line.strip("\r") for line in re.split(r"[\r\n]+", legend) if re.match(r"\s*(step|\d+) ", line)]
    assert rows[0].split()[:2] == ["step", "optimizer"]
    header, *body = rows[1:]
    assert header.split()[:2] == ["step", "rew"] and [row.split()[0] for row in body] == ["0", "1", "2"]
    assert {len(row) for row in (header, *body)} == {len(header)} and len(header) <= COLUMNS_WIDE
    bars = [part for part in re.split(r"[\r\n]+", plain) if "%|" in part]
    assert bars and all(len(bar) <= COLUMNS_WIDE for bar in bars)
    assert any(re.search(r"route2 seed 41: +50%\|.*\| 2/4 \[\d+:\d+<\d+:\d+,", bar) for bar in bars)
    assert plain.count("optimizer step") == 1, "the legend once"


def test_files_have_neither_colour_nor_bar(run):
    folder, shown, _ = run
    assert "\x1b" in shown
    (log,) = (folder.parents[2] / "logs").glob("*.log")
    text = log.read_text()
    assert "resuming" in text and not set(text) & set(map(chr, (*range(9), *range(11, 32), 127)))
    assert "%|" not in text


def test_without_a_terminal_there_is_no_bar(run, monkeypatch, capsys, tmp_path):
    start_logging(tmp_path / "x.log")
    logger.info("a model wrote {}", "\x1b[31mred\x1b[0m \r \x9b2J and a\ttab")
    logger.remove()
    said = "a model wrote \\x1b[31mred\\x1b[0m \\r \\x9b2J and a\ttab\n"
    assert capsys.readouterr().err == said and (tmp_path / "x.log").read_text().endswith(said)
    assert printable("plain\n\ttext") == "plain\n\ttext"


def test_every_row_and_legend_fits_a_hundred_columns_in_the_largest_preset():
    table = StepTable()
    wide = {"pair": [258, 258], "d": 199, ".1e": 1e-5, ".1f": 999.9, ".2f": -9.99, ".3f": 0.999}
    lines = table.lines({c.key: wide.get(c.form, 0.5) for c in COLUMNS})
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= COLUMNS_WIDE
    assert max(map(len, table.legend().splitlines())) <= COLUMNS_WIDE


def test_figures_are_rates_and_what_was_not_measured_is_left_out():
    assert figures(ROW) == {"step/hack_s": 0.25, "step/gn": 0.5}


def test_a_stalled_disk_holds_no_step_up(tmp_path, monkeypatch):
    stalled, real = threading.Event(), RecordWriter.write

    def write(self, data):
        assert stalled.wait(60)
        real(self, data)

    view = View(tmp_path)
    monkeypatch.setattr(RecordWriter, "write", write)
    for step in range(500):
        view.add(ROW | {"step": step}, [])  # would never end if it waited
    assert told(tmp_path / "tb") == {}
    stalled.set()
    view.close()
    assert {step for _, step in told(tmp_path / "tb")} == set(range(500))


def test_a_full_disk_ends_the_view_with_one_line(tmp_path, monkeypatch):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = []
    sink = logger.add(said.append, level="ERROR", format="{message}")
    monkeypatch.setattr(RecordWriter, "write", write)
    append_jsonl(tmp_path / "steps.jsonl", [ROW])
    view = View(tmp_path)
    for step in range(3):
        view.add(ROW | {"step": step}, [])
    view.close()
    logger.remove(sink)
    assert len(said) == 1 and "No space left" in said[0] and "steps.jsonl" in said[0]


@pytest.mark.parametrize(
    "view, package, extra", [("tensorboard", "tensorboardX", "live"), ("trackio", "trackio", "trackio")]
)
def test_a_missing_extra_is_named_before_anything_is_made(
    view, package, extra, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"projected_grpo.run.live_{view}", raising=False)
    assert main(["train", "smoke", f"--live={view}"]) == 2
    said = capsys.readouterr().err
    assert f"--live {view} needs {package}: pip install 'projected_grpo[{extra}]'" in said
    assert not list(tmp_path.iterdir())
