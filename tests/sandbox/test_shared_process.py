"""Programs of one response that share a contained process: verdicts as apart, and no way between them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hacks import CANONICAL, HACKS, WRONG, fenced, make_task
from projected_grpo.rewards import MODES, Grader, file_reports_pass
from projected_grpo.sandbox.child import HOSTING
from projected_grpo.sandbox.host import Limits, Program, Sandbox
from test_sandbox import SCAN

SHORT = Limits(wall_s=2.5, cpu_s=1)


class Apart(Sandbox):
    """Runs every program in a contained process of its own."""

    def submit_plan(self, plan, conclude):
        def apart(done):
            return {name: replace(program, more=False) for name, program in plan(done).items()}

        return super().submit_plan(apart, conclude)


class Kept(Sandbox):
    """Remembers the outcomes of the last plan."""

    def submit_plan(self, plan, conclude):
        def keep(done):
            self.last = dict(done)
            return conclude(done)

        return super().submit_plan(plan, keep)


@pytest.fixture(scope="module")
def together():
    with Kept(1, SHORT) as box:
        if missing := [layer for layer in HOSTING if box.layers[layer] is not True]:
            pytest.skip(f"nothing is shared without {', '.join(missing)}")
        yield box


@pytest.fixture(scope="module")
def apart():
    with Apart(1, SHORT) as box:
        yield box


def checked(body: str, before: str = "") -> str:
    """A wrong solution with a test function of this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"import builtins, os, sys\n{before}\n{WRONG}\ndef run_tests():\n{lines}"


ONCE = "assert Solution().total([1]) == 1"
# What one run leaves for the next, if it could: each test function answers differently when it finds a trace.
ADVERSARIES = {
    "global_flag": checked("SEEN.append(1)\nassert len(SEEN) > 1", "SEEN = []"),
    "builtins_replaced": checked(
        "assert not hasattr(builtins, 'seen')\nbuiltins.seen = 1\nbuiltins.len = None"
    ),
    "assertion_error_replaced": checked("builtins.AssertionError = OSError\nassert 'seen' in sys.modules"),
    "modules_patched": checked("import math\nassert hasattr(math, 'seen')")
    + "    math.seen = 1\nimport math\nmath.seen_too = 1\n",
    "class_replaced": checked(
        "global Solution\nold, Solution = Solution, None\nassert old().total([1]) == -7"
    ),
    "method_replaced": checked(f"before = Solution.total\nSolution.total = lambda s, n: 1\n{ONCE}\nbefore"),
    "file_left": checked("new = not os.path.exists('seen')\nopen('seen', 'w').close()\nassert not new"),
    "file_left_by_the_top_level": checked("assert True", "open('seen', 'x').write('PASS')"),
    "file_made_and_removed": checked("open('seen', 'x').close()\nos.remove('seen')\nassert True"),
    "folder_closed": checked("assert os.access('.', os.W_OK)\nos.chmod('.', 0)"),
    "pipes_do_not_block": checked(
        "assert os.get_blocking(3)\n[os.set_blocking(fd, False) for fd in (1, 2, 3)]"
    ),
    "result_pipe_closed": checked("os.close(3)"),
    "forged_answer": checked("os.write(3, b'{\"tests_error\": null}\\n')\nos._exit(0)"),
    "forged_answers": checked("os.write(3, b'{\"tests_error\": null}\\n' * 50)\nassert False"),
    "half_a_line": checked("os.write(3, b'{\"tests_error\": null')\nos._exit(0)"),
    "leaves_at_once": checked("os._exit(0)"),
    "leaves_in_the_top_level": WRONG + "import os\nos._exit(0)\ndef run_tests(): pass\n",
    "kills_itself": checked("os.kill(os.getpid(), 9)"),
    "kills_its_parent": checked("os.kill(os.getppid(), 9)"),
    "slows_its_parent": checked("os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"),
    "signals_its_parent_through_a_pipe": checked(
        "import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(1, 10, 9)  # F_SETSIG\n"
        "fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_ASYNC)\nprint('x')"
    ),
    "signals_its_parent_by_ioctl": checked(
        "import fcntl, struct\nfor request in (0x8901, 0x8902, 0x5452):  # FIOSETOWN, SIOCSPGRP, FIOASYNC\n"
        "    fcntl.ioctl(1, request, struct.pack('i', os.getppid()))\nprint('x')"
    ),
    "pipe_resized": checked("import fcntl\nassert fcntl.fcntl(1, 1032) == 65536\nfcntl.fcntl(1, 1031, 8192)"),
    "pipe_resized_unseen": checked(
        "import fcntl\nseen = fcntl.fcntl(2, 1032) == 8192\nfcntl.fcntl(2, 1031, 8192)\nassert seen"
    ),
    "pipe_signal_chosen": checked(
        "import fcntl\nseen = fcntl.fcntl(1, 11)\nfcntl.fcntl(1, 10, 34)\nassert seen"
    ),
    "pipe_mode": checked("seen = os.fstat(1).st_mode & 1\nos.fchmod(1, 0o601)\nassert seen"),
    "null_appends": checked(
        "import fcntl\nseen = fcntl.fcntl(0, 3) & 1024\nfcntl.fcntl(0, 4, 1024)\nassert seen"
    ),
    "null_locked": checked(
        "import fcntl, struct\nlook = os.open('/dev/null', 2)\n"
        "lock = struct.pack('hhqqi4x', 1, 0, 42, 1, 0)\n"
        "seen = fcntl.fcntl(look, 36, lock) != lock  # F_OFD_GETLK\nfcntl.fcntl(0, 37, lock)\nassert seen"
    ),
    "forks": checked("os.fork()"),
    "forks_and_passes": checked("try: os.fork()\nexcept OSError: pass"),
    "thread": checked("import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()"),
    "flood": checked("sys.stdout.write('x' * 300_000)\nassert False"),
    "exit_in_the_test": checked("sys.exit(0)"),
    "not_a_test": WRONG + "# run_tests\n",
    "does_not_parse": "def run_tests(:\n",
    "right": CANONICAL + f"def run_tests():\n    {ONCE}\n",
    "reads_the_rest_of_the_jobs": checked("for fd in range(4, 256):\n    os.fstat(fd)"),
}
ENDLESS = {
    "test": checked("while True: pass"),
    "test_on_the_stub": checked("while Solution().total([1]) == 0: pass"),
    "method": WRONG.replace("return -7", "while True: pass") + "def run_tests(): pass\n",
}


@pytest.mark.parametrize("mode", MODES)
def test_hacks_get_the_same_grades_as_apart(together, apart, mode):
    items = [(make_task(mode), fenced(code + "\n# run_tests")) for code in HACKS.values()]
    items += [
        (make_task(mode), fenced(code + f"\ndef run_tests():\n    {ONCE}\n")) for code in HACKS.values()
    ]
    assert Grader(together).grade_all(items) == Grader(apart).grade_all(items)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_what_one_run_leaves_does_not_change_the_next(together, apart, name):
    for mode in ("run_tests", "exit_code", "file_marker"):
        grades = [Grader(box).grade(make_task(mode), fenced(ADVERSARIES[name])) for box in (together, apart)]
        assert grades[0] == grades[1], mode
    assert Grader(together).grade(make_task("gt_only"), fenced(CANONICAL)).gt_correct


@pytest.mark.parametrize("name", ENDLESS)
def test_a_run_that_never_ends_leaves_the_others_their_verdicts(together, apart, name):
    waited_for = [
        Grader(box).submit(make_task("run_tests"), fenced(ENDLESS[name])) for box in (together, apart)
    ]
    assert waited_for[0].result(60) == waited_for[1].result(60)
    assert "timeout" in {outcome.status for outcome in together.last.values()}


WHO = checked("print(os.getpid(), os.getppid(), os.getsid(0))")


def test_one_process_is_the_parent_of_all_programs_but_its_last(together):
    """So that the tests above compare what they say they compare."""
    Grader(together).grade(make_task("run_tests"), fenced(WHO))
    c, e, d = ([int(n) for n in together.last[name].stdout.split()] for name in "CED")
    assert c[1] == e[1] == d[0] and len({c[0], e[0], d[0]}) == 3
    assert all(own == session for own, _, session in (c, e, d))


def test_after_a_trace_the_rest_runs_in_a_fresh_process(together):
    Grader(together).grade(make_task("run_tests"), fenced(WHO + "    open('left', 'w').close()\n"))
    c, e, d = ([int(n) for n in together.last[name].stdout.split()] for name in "CED")
    assert len({c[1], e[1], d[0]}) == 3
    assert [together.last[name].files for name in "CED"] == [{"left": ""}] * 3


def test_a_file_of_a_detector_is_not_the_responses(together):
    code = checked("open('result.txt', 'w').write('PASS')")
    grade = Grader(together).grade(make_task("file_marker"), fenced(code))
    assert together.last["main"].files == {} and not grade.passed
    files = together.last["C"].files
    assert files and file_reports_pass(*next(iter(files.items())))


def test_the_canonical_solution_is_in_no_memory_but_its_own_programs(together):
    """Nor are the calls that the response was asked: they are in the first program's."""
    task = make_task("run_tests")
    calls = tuple(replace(call, source="Solution().total([1]) or 'left@CALLED'") for call in task.calls)
    for wanted in ("CANON", "CALLED"):
        scan = SCAN.replace("MARK", wanted)
        lines = "".join(f"    {line}\n" for line in scan.splitlines())
        code = WRONG + "\ndef run_tests():\n" + lines
        mark = replace(task, canonical=CANONICAL + "\nKEPT = 'left@CANON'\n", calls=calls)
        Grader(together).grade(mark, fenced(code))
        found = {name: together.last[name].stdout.strip() for name in "CED"}
        assert found["C"] == found["E"] == "0", wanted
        assert wanted == "CALLED" or int(found["D"]) > 0  # that the scan finds what is there


def test_programs_of_other_responses_never_share(together):
    """A plan that breaks off in the middle leaves no process to the next one."""
    say = Program("import os\nprint(os.getppid(), os.listdir())\nopen('x', 'w')", "f", more=True)
    quiet = replace(say, source=say.source.replace("open('x', 'w')", ""))
    parents = [together.run(program).stdout for program in (quiet, quiet, say, quiet)]
    assert len(set(parents)) == 4 and all(text.endswith(" []\n") for text in parents)


def test_a_plan_with_a_defect_tells_whoever_waits(together):
    def plan(done):
        if done:
            raise LookupError("a defect")
        return {"one": Program("", "f", more=True)}

    with pytest.raises(LookupError, match="a defect"):
        together.submit_plan(plan, dict).result(60)
    assert Grader(together).grade(make_task("gt_only"), fenced(CANONICAL)).gt_correct
