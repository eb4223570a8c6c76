"""Every attack ends in the right verdict, leaves the trainer alive and nothing behind.

As an ordinary user, with a Python that this user can read (test_again_with_less runs a part so):
    setpriv --reuid 65534 --regid 65534 --clear-groups python3 -m pytest tests/sandbox/test_attacks.py
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from attacks import ATTACKS
from hacks import CANONICAL, WRONG, fenced, make_task, processes_below
from projected_grpo.rewards import Grader
from projected_grpo.sandbox.host import Limits, Outcome, Program, Sandbox
from projected_grpo.sandbox.seccomp import (
    ALLOW,
    ARCHITECTURES,
    FCNTL,
    FIRST_ARGUMENT_AT,
    IOCTL,
    ITSELF_ONLY,
    JUMP_EQUAL,
    LOAD,
    NEW_PROCESS,
    NUMBER_AT,
    PRCTL,
    REFUSE,
    REFUSED,
    RETURN,
    op,
)

ROOT = Path(__file__).parents[2]
SHORT = Limits(wall_s=1.5, cpu_s=1, memory_mb=512)
TASK = make_task("gt_only")
NOBODY = 65534


class Watched(Sandbox):
    """Remembers the outcomes of the last plan."""

    last: tuple[Outcome, ...]

    def submit_plan(self, plan, conclude):
        def keep(done):
            self.last = tuple(done.values())
            return conclude(done)

        return super().submit_plan(plan, keep)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where this module's interpreters have their folders; reachable for other users, unlike pytest's own."""
    tmp_path_factory.getbasetemp()  # made in the usual place, before that is changed
    before = tempfile.tempdir
    folder = tempfile.tempdir = tempfile.mkdtemp(prefix="attacks-")
    os.chmod(folder, 0o711)
    yield Path(folder)
    tempfile.tempdir = before
    os.rmdir(folder)


@pytest.fixture(scope="module")
def sandbox(root):
    with Watched(1, SHORT) as box:
        assert box.layers["rlimits"] is True
        yield box
    until = time.monotonic() + 5  # killed processes need a moment where many run
    while processes_below(root) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(root.iterdir()) == [] and processes_below(root) == set()


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """What the attacks' placeholders stand for: a readable secret file, a listening port, and so on."""
    secret = tmp_path_factory.mktemp("secret") / "expected.txt"
    secret.write_text("6 0 6 passed")
    os.environ["ATTACK_SECRET"] = "6 0 6"
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "@SECRET@": str(secret),
            "@TRAINER@": str(os.getpid()),
            "@PORT@": str(server.getsockname()[1]),
            "@PROJECT@": str(ROOT),
            "@HOME@": str(Path.home()),
        }
    del os.environ["ATTACK_SECRET"]
    assert secret.read_text() == "6 0 6 passed"


def traces(root: Path) -> tuple[object, ...]:
    """What may be left behind: files, descriptors, threads, and the number of processes."""
    folders = [root, Path("/tmp"), Path("/dev/shm"), Path("/var/tmp"), Path.home(), ROOT, ROOT / "src"]
    left = [name for folder in folders[1:] if os.access(folder, os.R_OK) for name in os.listdir(folder)]
    return (
        [name for name in left if name.startswith(("attack-left", "sitecustomize", "usercustomize"))],
        sorted(len(list(folder.rglob("*"))) for folder in root.iterdir()),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(processes_below(root)),
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(sandbox, surroundings, root, name):
    attack, code = ATTACKS[name], ATTACKS[name].code
    for placeholder, value in surroundings.items():
        code = code.replace(placeholder, value)
    if attack.needs and not any(sandbox.layers[layer] is True for layer in attack.needs):
        pytest.skip(f"not stopped, so not tried, without one of {', '.join(attack.needs)}")
    grader = Grader(sandbox)
    assert grader.grade(TASK, fenced(CANONICAL)).gt_correct
    before = traces(root)

    grade = grader.grade(TASK, fenced(code))
    seen = sandbox.last
    assert grade.gt_correct is attack.right, grade
    assert grade.reward == (3.5 if attack.right else 0.5 if grade.format_ok else 0.0)
    assert attack.error in str(grade.error)

    assert grader.grade(TASK, fenced(CANONICAL)).gt_correct
    assert not grader.grade(TASK, fenced(WRONG)).gt_correct
    assert traces(root) == before
    assert all(one.status != "worker_died" and "ESCAPED" not in one.stdout for one in seen), seen


def test_there_are_enough_attacks():
    assert sum(not attack.right for attack in ATTACKS.values()) >= 60


def test_a_link_to_a_file_from_elsewhere_is_not_read(sandbox, surroundings):
    """The secret says `passed`: a link named result.txt would otherwise pay."""
    for link in ("os.symlink", "os.link"):
        code = f"import os\n{link}({surroundings['@SECRET@']!r}, 'result.txt')\n{WRONG}"
        assert not Grader(sandbox).grade(make_task("file_marker"), fenced(code)).passed


LEAVE = """
import builtins, gc, os, sys
os.umask(0)
for place in ('', '/tmp/', '/dev/shm/', '../', '../../'):
    try: open(place + 'attack-left', 'w').write('6')
    except OSError: pass
builtins.attack_left = os.environ['ATTACK_LEFT'] = sys.attack_left = 6
"""
LOOK = """
import builtins, os, sys
print([p for p in ('', '/tmp/', '/dev/shm/', '../', '../../') if os.path.exists(p + 'attack-left')],
    hasattr(builtins, 'attack_left'), hasattr(sys, 'attack_left'), dict(os.environ), os.listdir())
"""


def test_a_program_finds_nothing_of_the_one_before(sandbox):
    if sandbox.layers["landlock"] is not True:
        pytest.skip("without Landlock a program can write to the machine's temporary folders")
    sandbox.run(Program(LEAVE, "total"))
    assert sandbox.run(Program(LOOK, "total")).stdout == "[] False False {} []\n"


WHERE = """
import fcntl, os, struct, sys
places = [0, 1, 2, os.open('/dev/null', os.O_RDWR), os.open(sys.path[0] + '/os.py', os.O_RDONLY)]
"""
LOCK = """
import time
for fd in places:
    for kind in (1, 0):  # F_WRLCK; F_RDLCK where the descriptor is for reading only
        for command in (37, 6):  # F_OFD_SETLK, F_SETLK
            try: fcntl.fcntl(fd, command, struct.pack('hhqqi4x', kind, 0, 4242, 6, 0)); print('locked', fd)
            except OSError: pass
    try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB); print('locked', fd)
    except OSError: pass
print('done', flush=True)
"""
LOOK_FOR_LOCKS = """
for fd in places:
    for command in (36, 5):  # F_OFD_GETLK, F_GETLK
        try: got = struct.unpack('hhqqi4x', fcntl.fcntl(fd, command, struct.pack('hhqqi4x', 1, 0, 0, 0, 0)))
        except OSError: continue
        if got[0] != 2: print('found', fd, got)
    try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: print('found', fd)
    except OSError: pass
"""


def test_no_lock_is_a_message_to_a_later_program_or_to_another_worker(root):
    """Record locks on /dev/null, which all see, would tell a range of 63 bits each."""
    with Sandbox(2, SHORT) as box:
        if box.layers["seccomp"] is not True:
            pytest.skip("without seccomp locks are not refused")
        look = Program(WHERE + LOOK_FOR_LOCKS, "total")
        assert box.run(Program(WHERE + LOCK, "total")).stdout == "done\n"
        assert [future.result(60).stdout for future in [box.submit(look) for _ in range(6)]] == [""] * 6
        alive = box.submit(Program(WHERE + LOCK + "time.sleep(.8)", "total"))
        time.sleep(0.2)
        assert [box.run(look).stdout for _ in range(6)] == [""] * 6 and not alive.done()
        assert alive.result(60).stdout == "done\n"


def test_no_flag_of_the_null_device_reaches_a_later_program(sandbox):
    mark = Program("import fcntl\nfcntl.fcntl(0, 4, fcntl.fcntl(0, 3) | 0xC00)", "total")
    look = Program("import fcntl\nprint(fcntl.fcntl(0, 3) & 0xC00)", "total")
    assert [sandbox.run(program).stdout for program in (look, mark, look)] == ["0\n", "", "0\n"]


TINY = (
    CANONICAL,
    WRONG,
    "import os\nos._exit(0)",
    "open('a', 'w').write('x')\n" + CANONICAL,
    "import os\nos.mkfifo('result.txt')\nos.close(3)\n" + WRONG,
    "import ctypes\nctypes.string_at(0)",
    "x = (",
    "import os\ntry: os.fork()\nexcept OSError: pass\n" + CANONICAL,
)


def test_nothing_grows_over_2000_gradings(root):
    with Sandbox(2, SHORT) as box:
        grader = Grader(box)

        def grade(count: int) -> int:
            codes = [TINY[i % len(TINY)] for i in range(count)]
            return sum(g.gt_correct for g in grader.grade_all([(TASK, fenced(code)) for code in codes]))

        grade(16)
        before = traces(root)
        assert grade(2000) == 2000 * 3 // 8
        assert traces(root) == before


# ---- less of a kernel, less of a user ----------------------------------------------------------------------


def test_the_numbers_of_the_filter_are_the_kernels():
    """Read from the C library's headers, where they are installed."""
    headers = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    checked = 0
    for machine, path in headers.items():
        if not path.exists():
            continue
        words = [line.split() for line in path.read_text().splitlines() if line.startswith("#define __NR")]
        numbers = {word[1].split("_", 3)[-1]: int(word[2]) for word in words if word[2].isdigit()}
        numbers |= {word[1].removeprefix("__NR_"): int(word[2]) for word in words if word[2].isdigit()}
        numbers |= {word[1].removeprefix("__NR3264_"): int(word[2]) for word in words if word[2].isdigit()}
        column = ARCHITECTURES[machine][0]
        table = {name: row[column] for name, row in {**REFUSED, **ITSELF_ONLY, **NEW_PROCESS}.items()}
        table |= {"prctl": PRCTL[column], "fcntl": FCNTL[column], "ioctl": IOCTL[column]}
        known = {name: number for name, number in table.items() if number is not None and name in numbers}
        assert known == {name: numbers[name] for name in known}
        assert len(known) > len(table) - 12
        checked += 1
    if not checked:
        pytest.skip("no kernel headers here")


def without(*layers: str) -> bytes:
    """A filter for a whole test process: a kernel that has no such layer."""
    column = ARCHITECTURES[os.uname().machine][0]
    number = {"namespaces": REFUSED["unshare"][column], "landlock": 444}
    code = [op(LOAD, NUMBER_AT)]
    for layer in layers:
        if layer == "seccomp":
            code += [op(JUMP_EQUAL, PRCTL[column], 0, 4), op(LOAD, FIRST_ARGUMENT_AT)]
            code += [op(JUMP_EQUAL, 22, 0, 1), op(RETURN, REFUSE | 22), op(RETURN, ALLOW)]
        else:
            code += [op(JUMP_EQUAL, number[layer] or 0, 0, 1), op(RETURN, REFUSE | 38)]
    return b"".join([*code, op(RETURN, ALLOW)])


INSTALL = """import ctypes, struct, sys
libc = ctypes.CDLL(None)
code = ctypes.create_string_buffer(bytes.fromhex(sys.argv.pop(1)))
libc.prctl(38, 1, 0, 0, 0)
program = struct.pack('@HP', len(code) // 8, ctypes.addressof(code))
assert libc.prctl(22, 2, program, 0, 0) == 0
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def python_for(user: int | None) -> str | None:
    """An interpreter like this one that the user can read."""
    if user is None:
        return sys.executable
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin") or sys.executable):
        try:
            if as_user(user, [python, "-c", "import pytest, projected_grpo.rewards"]).returncode == 0:
                return python
        except PermissionError:
            continue
    return None


def as_user(user: int | None, command: list[str]) -> subprocess.CompletedProcess[str]:
    paths = [
        str(ROOT / "src"),
        str(ROOT / "tests"),
        *(path for path in sys.path if path.endswith("-packages")),
    ]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.defpath}
    settings["PROJECTED_GRPO_CHECK_SHAPES"] = "0"  # the same tests check them as this user
    groups: list[int] | None = None if user is None else []
    return subprocess.run(
        command,
        env=settings,
        cwd="/",
        user=user,
        group=user,
        extra_groups=groups,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("user", "missing"),
    [
        (None, ("seccomp",)),
        (NOBODY, ()),
        (NOBODY, ("namespaces",)),
        (NOBODY, ("namespaces", "landlock")),
        (NOBODY, ("namespaces", "landlock", "seccomp")),
    ],
    ids=["root_no_seccomp", "user", "user_no_namespaces", "user_seccomp_alone", "user_nothing"],
)
def test_again_with_less(user, missing):
    """The attacks on containment as another user and without layers; what only those stop is skipped."""
    if os.geteuid() != 0 and user is not None:
        pytest.skip("only root can become another user")
    python = python_for(user)
    if python is None:
        pytest.skip("no Python that another user can read")
    groups = "(process- or snooping- or leftover- or exit- or before or link) and not recursion_without"
    # Without conftest.py, which imports torch and transformers: nothing here needs them.
    arguments = ["-p", "no:cacheprovider", "--noconftest", "--tb=short", "-k", groups]
    arguments += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), __file__]
    done = as_user(user, [python, "-c", INSTALL, without(*missing).hex(), *arguments])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
