"""The check of a problem file: what its tests let pass, what no program solves, and the limits of time."""

import json

import pytest

from projected_grpo.cli import main
from projected_grpo.config import GraderConfig
from projected_grpo.rewards import ORIGINAL_PHRASE

BURN = "import time\n        while time.process_time() < 1.2:\n            pass\n        "


def problem(name, asserts, body="return n + 1"):
    prompt = [{"role": "user", "content": f"PROBLEM:\nAdd one. It {ORIGINAL_PHRASE}."}]
    solution = f"class Solution:\n    def f(self, n):\n        {body}"
    row = {"id": name, "difficulty": "easy", "prompt": prompt, "func_name": "Solution().f", "setup_code": ""}
    return row | {
        "canonical_solution": solution,
        "gt_answer": [f"assert Solution().{text}" for text in asserts],
    }


GOOD = problem("good", ["f(n = 1) == 2", "f(n = 4) == 5"])


@pytest.fixture
def lint(tmp_path, capsys):
    def run(*rows, options=()):
        path, figures = tmp_path / "mine.jsonl", tmp_path / "figures.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main(["problems", "lint", str(path), f"--json={figures}", "--workers=1", *options])
        return code, capsys.readouterr().out, json.loads(figures.read_text())

    return run


def test_each_kind_of_finding_is_told_of_its_problem(lint):
    code, out, said = lint(
        GOOD,
        problem("lazy", ["f(n = [1]) == None"], "n[0] = 0"),
        problem("wrong", ["f(n = 1) == 2", "f(n = 2) == 4"]),
        problem("slow", ["f(n = 1) == 2"], BURN + "return n + 1"),
        problem("unread", ["f(n = 1) in (2, 3)"]),
        options=("--cpu-seconds=1",),
    )
    each = {one["problem_id"]: one for one in said["each"]}
    assert code == 1 and said["cpu_seconds"] == 1
    assert said["problems"] == 5 and said["with_findings"] == 4
    assert (said["left_out"], said["trivial"], said["solution_not_right"]) == (1, 1, 2)
    assert each["good"]["findings"] == [] and each["good"]["tests"] == 2 and each["good"]["solution_right"]
    assert each["lazy"]["trivial"] == ["None"] and "anything that returns nothing is right" in out
    assert "call 1: wrong answer" in each["wrong"]["error"]
    assert "time limit; --cpu-seconds" in each["slow"]["error"] and each["slow"]["cpu_s"] > 0
    assert "not understood" in each["unread"]["left_out"] and each["unread"]["tests"] is None
    for name in each:
        assert f"| {name} " in out


def test_a_file_without_findings_leaves_with_0_and_names_the_slowest(lint):
    slow = problem("slow", ["f(n = 1) == 2"], BURN.replace("1.2", "0.2") + "return n + 1")
    code, out, said = lint(GOOD, slow)
    assert code == 0 and said["with_findings"] == 0 and "2 problems, 0 with findings" in out
    assert said["slowest"]["problem_id"] == "slow" and said["cpu_seconds"] == GraderConfig.cpu_seconds
