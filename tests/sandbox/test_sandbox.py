"""Whatever a program does, the sandbox answers, stays alive and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from hacks import processes_below
from projected_grpo import rewards
from projected_grpo.config import GraderConfig
from projected_grpo.errors import UserError
from projected_grpo.problems import load_problems
from projected_grpo.sandbox import host as sandbox_module
from projected_grpo.sandbox.host import (
    MAX_DEATHS,
    MAX_SETUPS,
    NOT_ROOT,
    Limits,
    Outcome,
    Program,
    Sandbox,
    plain,
    read_outcome,
)
from projected_grpo.sandbox.oracle import LinkedList, decode

SRC = Path(__file__).parents[2] / "src"
SHORT = Limits(wall_s=1.5, cpu_s=1)
NODE = "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(1, SHORT) as box:
        yield box


def method(body: str, before: str = "") -> str:
    """A response whose method f(n) has this body."""
    return f"{before}\nclass Solution:\n    def f(self, n):\n" + "".join(
        f"        {line}\n" for line in body.splitlines()
    )


def ask(box: Sandbox, source: str, **fields) -> Outcome:
    return box.run(Program(source, "f", calls=("Solution().f(n=3)",), **fields))


def value(outcome: Outcome) -> object:
    assert outcome.status == "ok", outcome
    assert outcome.calls[0].error is None, outcome.calls[0].error
    return decode(outcome.calls[0].value)


def alive(box: Sandbox) -> bool:
    return value(ask(box, method("return n + 1"))) == 4


def test_a_program_has_no_place_for_an_expected_value():
    fields = {field.name for field in dataclasses.fields(Program)}
    assert not fields & {"expected", "answers", "asserts", "calls_with_answers", "tests_source"}


def test_calls_answer_in_order_with_fresh_instances(sandbox):
    source = method("self.k += n\nreturn self.k") + "    def __init__(self): self.k = 0\n"
    outcome = sandbox.run(Program(source, "f", calls=tuple(f"Solution().f({n})" for n in range(50))))
    assert [decode(call.value) for call in outcome.calls] == list(range(50))


def test_arguments_are_built_by_the_setup_even_if_the_response_shadows_it(sandbox):
    setup = NODE + "def list_node(values):\n    return ListNode(values[0], ListNode(values[1]))\n"
    source = method("return n.next", "list_node = None")
    outcome = sandbox.run(Program(source, "f", setup=setup, calls=("Solution().f(n=list_node([1, 2]))",)))
    assert value(outcome) == LinkedList((2,))


def test_the_environment_is_empty_and_the_folder_fresh(sandbox):
    source = method("return [dict(os.environ), os.listdir(), sys.argv[0] is None]", "import os, sys")
    assert value(ask(sandbox, source))[:2] == [{}, []]
    assert ask(sandbox, method("open('left', 'w').write('x' * 9000)")).files == {"left": "x" * 4096}
    assert value(ask(sandbox, method("return os.listdir()", "import os"))) == []


def test_no_descriptor_but_the_result_pipe_is_inherited(sandbox):
    opened = "def is_open(fd):\n    try: return bool(os.fstat(fd))\n    except OSError: return False\n"
    source = method("return [fd for fd in range(200) if is_open(fd)]", "import os\n" + opened)
    assert value(ask(sandbox, source)) == [0, 1, 2, 3]


def test_an_earlier_job_is_not_in_a_later_child(sandbox):
    secret = "canonical_" + os.urandom(8).hex()
    sandbox.run(
        Program(
            "def run_tests(): pass", "f", action="tests", substitute="canonical", canonical=f"x = '{secret}'"
        )
    )
    half = secret[:13]
    body = (
        "objects = [o for o in gc.get_objects() if type(o) in (dict, list, tuple)]\n"
        "held = [o.values() if type(o) is dict else o for o in objects]\n"
        f"return [s for o in held for s in list(o) if type(s) is str and '{half}' in s and len(s) < 40]"
    )
    answer = value(ask(sandbox, method(body, "import gc")))
    assert isinstance(answer, list) and secret not in str(answer)


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\nwhile True: time.sleep(60)",
        method("while True: pass"),
        method("n = 1\nwhile True: n *= 3"),
        "import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, print)\nwhile True: pass",
        method("class D:\n    def __eq__(self, other):\n        while True: pass\nreturn D()"),
        "class Solution:\n    def __getattr__(self, name):\n        while True: pass",
    ],
    ids=["module", "sleep", "method", "big_number", "signals_ignored", "equality", "attribute"],
)
def test_endless_programs_end_at_the_limit(sandbox, source):
    start = time.monotonic()
    outcome = ask(sandbox, source)
    assert outcome.status == "timeout" and outcome.error == "time limit"
    assert time.monotonic() - start < SHORT.wall_s + 3.0
    assert alive(sandbox)


def test_loaded_says_whether_the_top_level_ended(sandbox):
    assert not ask(sandbox, "while True: pass").loaded
    assert ask(sandbox, method("while True: pass")).loaded
    assert ask(sandbox, "1 / 0").loaded and "ZeroDivisionError" in (ask(sandbox, "1 / 0").error or "")


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        method("os._exit(0)", "import os"),
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.kill(os.getpid(), 6)",
        "import os\nos.close(3)",
        "import os\nos.write(3, b'\\x00' * 100)\nos._exit(0)",
        "import os\nos.write(3, b'[' * 100000 + b'\\n')\nos._exit(0)",
        "import os\nos.write(3, b'{\"calls\": 7}\\n' * 9)\nos._exit(0)",
        "import os\nos.write(3, b'{\"calls\": [3]}\\n')\nos._exit(0)",
        "import os\nos.write(3, b'\\n' * 10_000_000)\nos._exit(0)",
    ],
)
def test_a_child_that_does_not_answer_properly_is_a_crash(sandbox, source):
    outcome = ask(sandbox, source)
    assert outcome.status == "crash" and outcome.calls == () and outcome.compiled
    assert alive(sandbox)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import sys; sys.exit(0)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return self.f(n)", "RecursionError"),
        ("return ' ' * (1 << 33)", "MemoryError"),
        ("return [0] * 10_000_000", "Unencodable"),
        ("n = []\nfor _ in range(10_000): n = [n]\nreturn n", "Unencodable"),
        ("n = []\nn.append(n)\nreturn n", "Unencodable"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E"),
    ],
)
def test_what_a_call_raises_is_its_error(sandbox, body, error):
    outcome = ask(sandbox, method(body))
    assert outcome.status == "ok" and outcome.calls[0].error is not None
    assert error in outcome.calls[0].error


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (method("yield n"), "opaque"),
        (method("return iter(int, 1)"), "opaque"),
        (method("class L(list):\n    def __iter__(self): return iter([9])\nreturn L([1])"), "sub"),
        (method("class S(str):\n    def __str__(self): return 'no'\nreturn S('yes')"), "sub"),
        (
            method("class O:\n    __class__ = int\n    __len__ = __iter__ = __repr__ = None\nreturn O()"),
            "opaque",
        ),
        (method("class O:\n    def __getattribute__(self, name): raise SystemExit\nreturn O()"), "opaque"),
    ],
)
def test_foreign_objects_are_tagged(sandbox, source, kind):
    assert ask(sandbox, source).calls[0].value["t"] == kind


def test_odd_sources_are_answered(sandbox):
    assert not ask(sandbox, "x = (").compiled
    assert not ask(sandbox, "x = '\0'").compiled
    assert not ask(sandbox, "(" * 100_000).compiled
    assert ask(sandbox, method("return '\\ud800'")).calls[0].value == "\ud800"
    assert ask(sandbox, "x = '\ud800'").status == "crash"
    assert ask(sandbox, "x = 1\n" * 10_000 + method("return 5")).calls[0].value == 5
    assert not ask(sandbox, "-" * 200_000 + "1").compiled
    assert alive(sandbox)


def test_output_is_capped_and_a_flood_is_stopped(sandbox):
    outcome = ask(sandbox, "print('a' * 1_000_000)" + method("return 1"))
    assert len(outcome.stdout) == SHORT.stdout_bytes and outcome.status == "ok"
    outcome = ask(sandbox, "import os\nwhile True: os.write(1, b'x' * 65536)")
    assert outcome.status in ("crash", "timeout") and len(outcome.stdout) == SHORT.stdout_bytes
    assert alive(sandbox)


def test_disk_and_memory_are_limited(sandbox):
    body = "for _ in range(40): open('big', 'ab').write(b'x' * (1 << 20))"
    outcome = ask(sandbox, method(body))
    assert outcome.status == "crash" or outcome.calls[0].error
    body = "for i in range(10): open(str(i), 'wb').write(b'x' * (7 << 20))"
    if sandbox.layers["mounts"] is True:
        assert "No space" in (ask(sandbox, method(body)).calls[0].error or "")
    assert "MemoryError" in (ask(sandbox, method("return len(bytearray(2 << 30))")).calls[0].error or "")
    assert alive(sandbox)


def test_new_processes_and_threads_are_refused(sandbox):
    if sandbox.layers["process_limit"] is not True:
        pytest.skip(f"process limit: {sandbox.layers['process_limit']}")
    assert "BlockingIOError" in (ask(sandbox, method("return os.fork()", "import os")).calls[0].error or "")
    threads = "import threading\nthreading.Thread(target=print).start()"
    assert "can't start new thread" in (ask(sandbox, method(threads)).calls[0].error or "")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_fork_bomb_with_setsid_leaves_nothing(root):
    bomb = "import os, time\nfor _ in range(6):\n    if os.fork() == 0: os.setsid()\n" + method("return 1")
    with Sandbox(1, dataclasses.replace(SHORT, processes=32)) as box:
        assert box.layers["rlimits"] is True
        idle = processes_below(root)
        ask(box, bomb + "time.sleep(0.1)")
        ask(box, bomb + "if os.getsid(0) == os.getpid(): time.sleep(30)")
        assert processes_below(root) == idle != set()
        assert alive(box)
    assert processes_below(root) == set()


def test_programs_run_as_another_user(sandbox):
    if sandbox.layers["uid_drop"] is not True:
        pytest.skip(f"uid drop: {sandbox.layers['uid_drop']}")
    assert value(
        ask(sandbox, method("return os.getuid() >= 61000 and os.getuid() == os.geteuid()", "import os"))
    )
    assert "PermissionError" in (
        ask(sandbox, method("os.kill(os.getppid(), 9)", "import os")).calls[0].error or ""
    )


def test_the_project_and_its_data_cannot_be_read(sandbox):
    if sandbox.layers["landlock"] is not True:
        pytest.skip(f"landlock: {sandbox.layers['landlock']}")
    for path in (SRC, Path(__file__), Path.home(), Path("/etc/passwd"), Path("/")):
        for look in ("open(p).read()", "os.listdir(p)"):
            error = (
                ask(sandbox, method(f"p = {str(path)!r}\nreturn {look}", "import os")).calls[0].error or ""
            )
            assert "PermissionError" in error or "DirectoryError" in error, (path, look)


def test_the_network_cannot_be_reached(sandbox):
    if sandbox.layers["namespaces"] is not True:
        pytest.skip(f"namespaces: {sandbox.layers['namespaces']}")
    with __import__("socket").create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        body = f"socket.create_connection(('127.0.0.1', {port}), timeout=0.5)"
        assert ask(sandbox, method(body, "import socket")).calls[0].error


def test_standard_modules_can_still_be_imported(sandbox):
    source = method(
        "return [graphlib.__name__, cmath.sqrt(-1).imag]", "import graphlib, cmath, csv, uuid, zlib"
    )
    assert value(ask(sandbox, source)) == ["graphlib", 1.0]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 1),
        ("import sys; sys.exit(0)", 0),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(256 + 5)", 5),
        ("import sys; sys.exit('text')", 1),
        ("raise SystemExit(0)", 0),
        ("import os; os._exit(0)", 0),
        ("import atexit, os; atexit.register(os._exit, 0)", 0),
        ("import atexit, sys; atexit.register(sys.exit, 0)", 1),
        ("import sys, os; sys.excepthook = lambda *error: os._exit(0)", 0),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 15)", -15),
    ],
)
def test_scripts_exit_as_in_cpython(sandbox, ending, code):
    source = method("return 1") + ending
    assert ask(sandbox, source, action="script").exit_code == code
    if code >= 0:  # the reference: a plain interpreter on the same script, with the forced failure at its end
        script = source + "\nSolution().f(n=3)\nraise AssertionError"
        assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == code


def test_test_functions_run_against_own_stub_and_canonical(sandbox):
    source = (
        method("return 1")
        + "def helper(): return 0\ndef run_tests():\n    assert Solution().f(3) == helper()\n"
    )
    answers = {
        kind: sandbox.run(
            Program(source, "f", "tests", substitute=kind, canonical="K = 0\n" + method("return K"))
        ).tests_passed
        for kind in ("own", "stub", "canonical")
    }
    assert answers == {"own": False, "stub": True, "canonical": True}


def test_a_killed_interpreter_is_replaced_and_the_outcome_says_so(root):
    with Sandbox(1, SHORT) as box:
        assert box.layers["rlimits"] is True
        idle = processes_below(root)
        future = box.submit(Program(method("while True: pass"), "f", calls=("Solution().f(1)",)))
        while processes_below(root) == idle:
            time.sleep(0.01)
        os.kill(min(idle), 9)
        assert future.result(10).status == "worker_died"
        assert alive(box)
        os.kill(min(processes_below(root)), 9)  # this time while it is idle
        time.sleep(0.2)
        assert ask(box, method("return 1")).status in ("ok", "worker_died")
        assert alive(box)
    deadline = time.monotonic() + 10  # what a killed interpreter leaves is the kernel's to end
    while processes_below(root) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_below(root) == set()


def test_when_every_interpreter_dies_it_is_said_and_not_graded(root):
    """Silent, it would look like a student that never solves anything."""
    with Sandbox(1, SHORT) as box:
        box.layers["one_more"] = True  # as if the first interpreter had had it: no other is ever accepted
        os.kill(min(processes_below(root)), 9)
        time.sleep(0.2)
        futures = [box.submit(Program(method("return 1"), "f")) for _ in range(MAX_DEATHS + 2)]
        assert all(f.result(60).status == "worker_died" for f in futures[: MAX_DEATHS - 1])
        for future in futures[MAX_DEATHS - 1 :]:
            with pytest.raises(UserError, match="can be graded"):
                future.result(60)


def test_programs_that_kill_their_interpreters_do_not_end_a_run(monkeypatch):
    """However many: while a harmless program is answered, it is the programs."""
    run = sandbox_module._Worker.run

    def killed(worker, program):
        if program.source == "kill":
            raise sandbox_module.WorkerDied("the interpreter ended")
        return run(worker, program)

    monkeypatch.setattr(sandbox_module._Worker, "run", killed)
    monkeypatch.setattr(sandbox_module, "MAX_DEATHS", 3)
    with Sandbox(1, SHORT) as box:
        futures = [box.submit(Program("kill", "f")) for _ in range(7)]
        assert [f.result(60).status for f in futures] == ["worker_died"] * 7
        assert alive(box)


def test_results_keep_their_order_and_nothing_is_left_behind(root):
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with Sandbox(2, SHORT) as box:
        futures = [
            box.submit(Program(method(f"return {i}"), "f", calls=("Solution().f(1)",))) for i in range(60)
        ]
        assert [value(future.result()) for future in futures] == list(range(60))
    assert list(root.iterdir()) == [] and threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(RuntimeError):
        box.submit(Program("", "f"))


def test_an_exception_drops_what_is_queued_and_what_runs(root):
    """Ctrl-C must not wait for endless answers; nothing of theirs is left."""
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Sandbox(2, Limits(wall_s=60.0, cpu_s=60)) as box:
        endless = Program(method("while True: pass"), "f", calls=("Solution().f(1)",))
        futures = [box.submit(endless) for _ in range(64)]
        while not all(future.running() for future in futures[:2]):
            time.sleep(0.01)
        started = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5
    assert all(future.done() for future in futures[:2]) and not any(f.running() for f in futures)
    assert list(root.iterdir()) == [] and threading.active_count() == threads


def test_the_same_program_gets_the_same_answer():
    source = method("return [list({'a', 'b', 'c', 'd'}), random.random(), hash('x')]", "import random")
    with Sandbox(2, SHORT) as box, Sandbox(1, SHORT) as other:
        answers = [ask(b, source).calls[0].value for b in (box, box, box, other)]
    assert answers.count(answers[0]) == 4


def test_a_cancelled_job_does_not_stop_the_pool(sandbox):
    first = sandbox.submit(Program(method("time.sleep(0.2)", "import time"), "f", calls=("Solution().f(1)",)))
    second = sandbox.submit(Program(method("return 1"), "f", calls=("Solution().f(1)",)))
    assert second.cancel() and first.result().status == "ok" and alive(sandbox)


def test_the_first_word_of_a_child_stands():
    seen = {
        "why": "exit",
        "exit_code": 0,
        "stdout": "",
        "stderr": "",
        "files": {},
        "seconds": 0.1,
        "cpu_s": 0.1,
    }
    lines = [{"compiled": True, "tests": None}, {"tests": "module", "calls": []}, {"calls": [{"value": 1}]}]
    outcome = read_outcome(Program("", "f"), seen, b"\n".join(json.dumps(line).encode() for line in lines))
    assert outcome.tests is None and outcome.calls == ()


class Uncontained(Sandbox):
    """Starts no interpreter; says that two layers are missing and that this is an ordinary user."""

    layers = {"rlimits": True, "landlock": "not in this kernel", "seccomp": "refused", "uid_drop": NOT_ROOT}

    def __init__(self, *_args):
        super().__init__(1)


def test_strict_refuses_to_start_and_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(rewards, "Sandbox", Uncontained)
    with (
        ExitStack() as stack,
        pytest.raises(UserError, match=r"landlock \(not .*seccomp \(refused") as caught,
    ):
        rewards.open_grader(GraderConfig(1, "strict"), stack)
    assert "\n" not in str(caught.value) and "uid_drop" not in str(caught.value)


def test_strict_starts_where_everything_is_in_force(sandbox):
    with ExitStack() as stack:
        if sandbox.missing:
            with pytest.raises(UserError):
                rewards.open_grader(GraderConfig(1, "strict"), stack)
        else:
            assert rewards.open_grader(GraderConfig(1, "strict"), stack).sandbox.missing == {}


def test_auto_warns_once(monkeypatch):
    monkeypatch.setattr(rewards, "Sandbox", Uncontained)
    rewards.warn_uncontained.cache_clear()
    lines: list[str] = []
    sink = rewards.logger.add(lines.append, level="WARNING")
    with ExitStack() as stack:
        for _ in range(3):
            rewards.open_grader(GraderConfig(1), stack)
    rewards.logger.remove(sink)
    assert len(lines) == 1 and "landlock" in lines[0] and "docs/grader.md" in lines[0]


def test_a_replacement_with_less_containment_is_refused(root):
    with Sandbox(1, SHORT) as box:
        box.layers["one_more"] = True  # as if the first interpreter had had it
        os.kill(min(processes_below(root)), 9)
        time.sleep(0.2)
        outcome = ask(box, method("return 1"))
        assert outcome.status == "worker_died"
        assert "less" in (ask(box, method("return 1")).error or "")


def test_a_folder_without_rights_or_gone_does_not_end_the_interpreter(sandbox):
    for body in ("os.makedirs('a/b')\nos.chmod('a', 0)\nos.chmod('.', 0)", "os.chmod('.', 0)\nos.rmdir('.')"):
        assert ask(sandbox, method(body, "import os")).status == "ok"
        assert alive(sandbox)


def test_an_ordinary_user_can_run_it(unchecked_children):
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare(1) to become an ordinary user")
    script = (
        "from projected_grpo.sandbox.host import *\nimport os\n"
        "program = Program('class Solution:\\n  def f(self): return 4', 'f', calls=('Solution().f()',))\n"
        "with Sandbox(1) as box:\n"
        "    answer = box.run(program).calls[0].value\n"
        "    print(os.geteuid(), answer, box.layers['uid_drop'], box.layers['no_new_privs'])\n"
    )
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", script]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    if "unshare failed" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout.split() == ["1000", "4", "not", "root", "True"], done.stderr


HALF = """
import os, sys
from projected_grpo.sandbox import contain
real, failing, root = contain.mount, sys.argv[1], sys.argv[2]
def mount(source, target, *rest):
    if target.endswith(failing) and (failing != 'packages' or rest[0] == 'tmpfs'):
        raise OSError(1, 'refused')
    real(source, target, *rest)
contain.mount = mount
if failing == 'packages':
    os.path.isdir = lambda path: True  # wherever this Python keeps them
layers = {}
contain.enter_namespaces(layers)
before = list(sys.path)
if layers['namespaces'] is True:
    contain.private_mounts(root, layers)
print(layers.get('mounts'), layers.get('private_proc'), before == sys.path, os.listdir(root), sep='; ')
"""


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ("packages", "[Errno 1] refused; [Errno 1] refused; True; ['below']"),
        ("lib", "[Errno 1] refused; [Errno 1] refused; True; ['below']"),
        ("/proc", "True; [Errno 1] refused; False; ['jobs', 'lib']"),
    ],
)
def test_mounts_that_fail_are_not_said_to_be_in_force(tmp_path, failing, said):
    """Nor do they stay half: programs then get plain folders in the root, which must be writable."""
    (tmp_path / "below").touch()
    command = [sys.executable, "-c", HALF, failing, str(tmp_path)]
    alone = {**os.environ, "PYTHONPATH": str(SRC), "PROJECTED_GRPO_CHECK_SHAPES": "0"}  # no library is loaded
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    if done.stdout.startswith("None"):
        pytest.skip("no namespaces here")
    assert done.stdout.strip() == said, done.stderr


SCAN = """import ctypes, gc, os
libc = ctypes.CDLL(None)
places = {id(o) >> 21 for o in gc.get_objects()} | {id(bytes(n)) >> 21 for n in (600, 5000, 70_000, 300_000)}
places = {place + near for place in places for near in (-1, 0, 1)}
copy = os.open('copy', os.O_RDWR | os.O_CREAT)
libc.memmem.restype = ctypes.c_void_p
wanted = b'@'.join([b'left', b'MARK'])
found = 0
for page in (p for place in places for p in range(place << 21, place + 1 << 21, 4096)):
    os.lseek(copy, 0, 0)
    if libc.write(copy, ctypes.c_void_p(page), 4096) == 4096:  # an address without memory is only an error
        at = libc.memmem(ctypes.c_void_p(page), ctypes.c_size_t(4096), wanted, ctypes.c_size_t(len(wanted)))
        found += at is not None and not 0 <= at - id(wanted) < 64
print(found)
"""
SAY = {
    "stdout": "os.write(1, text)",
    "stderr": "os.write(2, text)",
    "result": "os.write(3, text)",
    "much": "os.write(1, text * 100)\n    os.write(1, text)",
    "file": "open('f', 'wb').write(text)",
    "name": "open(text[:200], 'wb')",
    "exception": "raise ValueError(text)",
}


def scan(box: Sandbox, mark: str) -> int:
    """How many pages of a new program hold the mark."""
    return int(box.run(Program(SCAN.replace("MARK", mark), "f")).stdout)


@pytest.mark.parametrize("substitute", ["own", "canonical"])
def test_what_a_program_says_is_in_no_later_memory(substitute):
    """It could tell a later response the answers, as one interpreter passes it on and forks the next."""
    with Sandbox(1, SHORT) as box:
        for channel, statement in SAY.items():
            mark = os.urandom(6).hex()
            source = f"import os\ndef run_tests():\n    text = b'left@{mark} ' * 300\n    {statement}\n"
            for _ in range(3):
                program = Program(
                    source, "f", "tests", substitute=substitute, canonical="class Solution: pass"
                )
                assert box.run(program).loaded
            assert scan(box, mark) == 0, channel
        # That the scan finds what is inherited: the interpreter runs a plain setup, so it holds its text.
        mark = os.urandom(6).hex()
        box.run(Program("", "f", setup=f"text = {'left@' + mark!r}"))
        assert scan(box, mark) > 0


def test_all_files_come_back_up_to_the_caps(sandbox):
    body = "for i in range(40): open(f'{i:02}' + '\\x01' * 250, 'wb').write(bytes(9000))"
    files = ask(sandbox, method(body)).files
    assert files == {f"{i:02}" + "\x01" * 250: "\0" * 4096 for i in range(SHORT.max_files)}


CHANGE = """
import builtins, random, sys
ListNode.val = 'changed'
list_node.__defaults__ = ('changed',)
before = dict(globals())
builtins.setup_left = sys.modules['__main__'].setup_left = 1
random.seed(99)
List = inf = 'changed'
sys.setrecursionlimit(77)
"""
STATE = """
import builtins, random, sys
class Solution:
    def f(self, n):
        main = sys.modules['__main__']
        return [type(ListNode.__dict__.get('val')).__name__, list_node.__defaults__ is None, inf, hasattr(main, 'setup_left'),
                hasattr(builtins, 'setup_left'), random.random(), sys.getrecursionlimit(), main.Solution is Solution]
"""  # noqa: E501
PLAIN = (
    NODE
    + "import collections\nfrom typing import *\ninf = float('inf')\ndef list_node(v): return ListNode(v)\n"
)


def test_a_prepared_setup_is_each_programs_own():
    """The interpreter runs it once; what one program does to it, the next one does not see."""
    with Sandbox(1, SHORT) as box:
        first = value(ask(box, STATE, setup=PLAIN))
        assert first[:5] == ["NoneType", True, float("inf"), False, False] and first[-1] is True
        for action in ("calls", "tests", "script"):
            box.run(Program(CHANGE + "def run_tests(): pass", "f", action, setup=PLAIN))
        assert value(ask(box, STATE, setup=PLAIN)) == first
        unprepared = "import sys\nx = sys.getrecursionlimit()\n" + PLAIN
        assert value(ask(box, STATE, setup=unprepared)) == first


def test_more_setups_than_are_kept_are_run_all_the_same(sandbox):
    for i in range(2 * MAX_SETUPS):
        assert value(ask(sandbox, method("return SETUP"), setup=f"SETUP = {i}\n")) == i


@pytest.mark.parametrize(
    "setup",
    [
        "while True: pass",
        "import os",
        "from subprocess import run",
        "from json import tool",  # a module that no one has imported
        "from collections import abc",
        "from math import no_such_name",
        "import sys\nsys.setrecursionlimit(10 ** 6)",
        "x = [0] * 10 ** 9",
        "x = print('now')",
        "def f(x=print('now')): pass",
        "def f(x: print('now')): pass",
        "def f() -> print('now'): pass",
        "@print\ndef f(): pass",
        "@print\nclass A: pass",
        "class A(B): pass",
        "class A(metaclass=M): pass",
        "class A:\n    x = print('now')",
        "class A:\n    def __class_getitem__(cls, x): print('now')\nx = A[1]",
        "from builtins import print as float\nx = float('now')",
        "from typing import cast as float\nx = float('now')",
        "float = print",
        "def float(x): print('now')\nx = float('now')",
        "class float: pass\nx = float('now')",
        "x.y = 1",
        "x = (",
        "[print() for _ in (1,)]",
        "if True: pass",
        "x = f'{print()}'",
        "del x",
    ],
)
def test_a_setup_that_does_more_than_define_is_not_for_the_interpreter(setup):
    assert not plain(setup)


def test_the_datasets_setups_are_plain(shared_data):
    folder = shared_data / "leetcode"
    for source in ("embedded", *folder.glob("leetcode_*.jsonl"), *folder.glob("LeetCodeDataset-*")):
        assert all(plain(p.setup_code) for p in load_problems(str(source)).problems)


def test_an_endless_or_failing_setup_costs_its_own_program_only(sandbox):
    assert ask(sandbox, method("return 1"), setup="while True: pass").status == "timeout"
    failing = "x = no_such_name"
    assert plain(failing)
    for _ in range(2):
        outcome = ask(sandbox, method("return 1"), setup=failing)
        assert outcome.status == "crash" and "no_such_name" in (outcome.error or "")
    assert alive(sandbox)


def test_compiled_code_comes_back_and_runs_without_the_source(sandbox):
    source = method("return 1") + "\ndef run_tests():\n    assert Solution().f(1) == 1\n"
    main = ask(sandbox, source)
    assert main.tests == "module" and main.code and ask(sandbox, method("return 1")).code == b""
    answers = [
        sandbox.run(Program(text, "f", "tests", substitute=kind, code=code)).tests_passed
        for text, code in ((source, b""), ("", main.code))
        for kind in ("own", "stub")
    ]
    assert answers == [True, False, True, False]
    assert sandbox.run(Program("", "f", "tests", code=b"not marshalled")).status == "crash"
    assert alive(sandbox)


def test_code_that_the_response_sends_is_not_taken(sandbox):
    forged = 'import os\nos.write(3, b\'{"code": "Zm9yZ2Vk", "tests": "module"}\\n\')\n'
    for source in (forged + method("return 1"), forged + "def run_tests(): pass\n" + method("return 1")):
        assert b"forged" not in ask(sandbox, source).code
    assert ask(sandbox, forged + method("return 1")).tests is None


@pytest.mark.parametrize("name", ["run_tests", "\uff52un_tests", "run_\\\ntests"])
def test_a_test_function_is_found_however_it_is_written(sandbox, name):
    outcome = ask(sandbox, f"def {name}(): pass\n" + method("return 1"))
    assert outcome.tests == ("module" if outcome.compiled else None)
    assert outcome.compiled is ("\\" not in name)


def test_cpu_time_is_measured(sandbox):
    idle = ask(sandbox, method("time.sleep(0.2)", "import time"))
    busy = ask(
        sandbox, method("n = time.process_time()\nwhile time.process_time() - n < 0.2: pass", "import time")
    )
    assert 0 < idle.cpu_s < 0.2 <= busy.cpu_s


def test_nothing_can_be_written_beside_a_programs_folder(sandbox):
    if sandbox.layers["mounts"] is not True:
        pytest.skip(f"mounts: {sandbox.layers['mounts']}")
    for place in ("../left", "../../left", "../../lib/left"):
        for make in (f"open({place!r}, 'w')", f"os.mkdir({place!r})", f"os.symlink('x', {place!r})"):
            assert ask(sandbox, method(make, "import os")).calls[0].error, (place, make)
    assert "Error" in (
        ask(sandbox, method("os.rename('../job', '../other')", "import os")).calls[0].error or ""
    )
