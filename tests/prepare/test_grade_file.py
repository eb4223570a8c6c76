"""A grading goes on with its own lines, and with nothing else's."""

import json
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace

import pytest

from projected_grpo.cli import main
from projected_grpo.errors import UserError
from projected_grpo.prepare.grade_file import grade_file, read_completions
from projected_grpo.problems import load_problems
from projected_grpo.rewards import Grade, Grader
from projected_grpo.runlog import lock_file
from projected_grpo.sandbox.host import Limits
from projected_grpo.sandbox.oracle import Call

PROBLEMS = load_problems("embedded").problems[:2]


class Told(Grader):
    """Answers at once: the reward is the number of the completion, however often it is asked."""

    def __init__(self, limits=None, stops_at=10**9, **how):
        self.sandbox = type("Box", (), {"limits": limits or Limits()})
        self.any_fence, self.asked, self.stops_at = how.get("any_fence", True), [], stops_at

    def submit(self, task, text):
        future = Future()
        if int(text) >= self.stops_at:
            future.set_exception(KeyboardInterrupt())
        else:
            self.asked.append(int(text))
            future.set_result(Grade(float(text), *[False] * 3, None, *[False] * 4, None))
        return future


def items(tmp_path, texts, problems=PROBLEMS, mode="gt_only"):
    path = tmp_path / "in.jsonl"
    rows = [{"problem_id": problems[0].problem_id, "completion": str(t), "env_mode": mode} for t in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_completions(path, problems)


@pytest.fixture
def begun(tmp_path):
    """Twenty completions, of which the first seven were graded before Ctrl-C."""
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        grade_file(items(tmp_path, range(20)), Told(stops_at=7), tmp_path / "out")
    assert len((tmp_path / "out.part").read_text().splitlines()) == 7  # none of those is lost
    return tmp_path


@pytest.mark.parametrize("torn", [b"", b'{"problem_id": "e0', b'{"problem_id": 1}'], ids=str)
def test_it_goes_on_behind_its_last_whole_line(begun, torn):
    with open(begun / "out.part", "ab") as file:
        file.write(torn)
    grader = Told()
    rows = grade_file(items(begun, range(20)), grader, begun / "out")
    assert grader.asked == list(range(7, 20))
    assert [json.loads(line) for line in (begun / "out").read_text().splitlines()] == rows
    assert [row["reward"] for row in rows] == list(range(20)) and not (begun / "out.part").exists()


def other_expected(problem):
    call = problem.calls[0]
    return replace(problem, calls=(Call(call.source, ["other"]), *problem.calls[1:]))


OTHERS = {
    "completions": lambda p: (items(p, range(1, 21)), Told()),
    "fewer": lambda p: (items(p, range(5)), Told()),
    "mode": lambda p: (items(p, range(20), mode="sentinel"), Told()),
    "expected value": lambda p: (items(p, range(20), [other_expected(PROBLEMS[0])]), Told()),
    "setup": lambda p: (items(p, range(20), [replace(PROBLEMS[0], setup_code="x = 1")]), Told()),
    "limits": lambda p: (items(p, range(20)), Told(Limits(cpu_s=3))),
    "fences": lambda p: (items(p, range(20)), Told(any_fence=False)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_it_is_not_gone_on_with_by_another(begun, other):
    before = (begun / "out.part").read_bytes()
    work, grader = OTHERS[other](begun)
    with pytest.raises(UserError, match="left by another grading"):
        grade_file(work, grader, begun / "out")
    assert grader.asked == [] and (begun / "out.part").read_bytes() == before
    assert not (begun / "out").exists()


def test_lines_of_a_version_without_hashes_are_refused(tmp_path):
    (tmp_path / "out.part").write_text('{"problem_id": "e001", "env_mode": "gt_only"}\n')
    with pytest.raises(UserError, match="left by another grading"):
        grade_file(items(tmp_path, range(2)), Told(), tmp_path / "out")


def test_more_completions_behind_the_same_ones_go_on(begun):
    grader = Told()
    assert len(grade_file(items(begun, range(30)), grader, begun / "out")) == 30
    assert grader.asked == list(range(7, 30))


def test_two_processes_do_not_share_a_grading(tmp_path):
    with ExitStack() as stack:
        lock_file(tmp_path / "out.part", stack, "the other")
        with pytest.raises(UserError, match="being written by another process"):
            grade_file(items(tmp_path, range(3)), Told(), tmp_path / "out")
    assert len(grade_file(items(tmp_path, range(3)), Told(), tmp_path / "out")) == 3


def test_a_device_is_not_replaced(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"problem_id": "e001", "completion": "x"}\n')
    assert main(["grade", f"--completions={source}", "--out=/dev/full", "--workers=1"]) == 2
    assert "no regular file" in capsys.readouterr().err.splitlines()[-1]


def test_chat_messages_are_graded_as_their_text(tmp_path):
    path, name = tmp_path / "in.jsonl", PROBLEMS[0].problem_id
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
    ]
    path.write_text(json.dumps({"problem_id": name, "completion": chat}) + "\n")
    assert [item.text for item in read_completions(path, PROBLEMS)] == ["7"]
    path.write_text(json.dumps({"problem_id": name, "completion": chat[:1]}) + "\n")
    with pytest.raises(UserError, match="in.jsonl:1: completion must be a string, or chat messages"):
        read_completions(path, PROBLEMS)
