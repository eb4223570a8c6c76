"""Runs untrusted programs: a pool of threads, each with one warm interpreter that forks a child per program.

The child is never told an expected value, so what it answers is only ever an answer. Whatever a program does
to its process, to its interpreter or to the pipes ends in an Outcome; it cannot end or stall the caller.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Action = Literal["calls", "tests", "script"]
Status = Literal["ok", "timeout", "crash", "worker_died"]

NOT_ROOT = "not root"  # what layer uid_drop says of an ordinary user
CHILD = Path(__file__).with_name("sandbox_child.py")
FIRST_UID = 61_000  # children of worker i run as FIRST_UID + i when the trainer is root
GRACE_S = 10.0  # how long past its wall limit a program's cleanup may take before its interpreter is replaced
START_S = 60.0
# Imported once, before forking: what the datasets' setup code and ordinary solutions use.
PRELOAD = (
    *("array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions"),
    *("functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "math", "numbers", "operator"),
    *("queue", "random", "re", "statistics", "string", "textwrap", "time", "traceback", "typing"),
    *("unicodedata", "unittest"),
)

# Third-party packages that LeetCode offers to solutions: imported before forking, where they are installed.
PACKAGES = ("sortedcontainers",)


@dataclass(frozen=True)
class Limits:
    """What one program may use. Times in seconds; `processes`: processes and threads beside the first."""

    wall_s: float = 10.0
    cpu_s: int = 8  # the benchmark's slowest right solutions take 6
    memory_mb: int = 1024
    file_mb: int = 8
    disk_mb: int = 32
    disk_inodes: int = 1024
    open_files: int = 64
    processes: int = 0
    stdout_bytes: int = 1 << 18
    stderr_bytes: int = 1 << 12
    result_bytes: int = 1 << 22
    flood_bytes: int = 1 << 26  # a program that writes more than this is killed
    file_bytes: int = 1 << 12
    max_files: int = 32


@dataclass(frozen=True)
class Program:
    """What a child is told. There is no field for an expected value.

    calls: evaluates each call and returns the results. tests: calls the response's own test function, after
    putting `substitute` in place of the method. script: runs as a script whose last statement raises.
    """

    source: str
    method: str
    action: Action = "calls"
    setup: str = ""
    calls: tuple[str, ...] = ()
    watch: tuple[str, ...] = ()  # attribute names to look for on the instance that answered, or on its class
    test_name: str = "run_tests"
    test_place: Literal["module", "class"] = "module"
    substitute: Literal["own", "stub", "canonical"] = "own"
    canonical: str = ""  # only with substitute="canonical"


@dataclass(frozen=True)
class CallResult:
    """One call's answer: the encoded value (see oracle.decode), or the error it raised."""

    value: object = None
    error: str | None = None
    equal: frozenset[str] = frozenset()  # builtin types whose random members all equal this foreign object
    held: tuple[object, ...] = ()  # encoded plain values in this foreign object's attributes that equal it


@dataclass(frozen=True)
class Outcome:
    """What happened to one program.

    `compiled` and `tests` were said before the response's first line ran. `loaded`, `calls`, `attributes`,
    `tests_passed` and `error` are the word of a process the response controls. The rest was observed.
    """

    status: Status
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    files: dict[str, str] = field(default_factory=dict)
    compiled: bool = False
    tests: Literal["module", "class", "guarded"] | None = None  # where the test function is defined
    loaded: bool = False  # the response's top level ended (or raised)
    calls: tuple[CallResult, ...] = ()
    attributes: tuple[str, ...] = ()
    tests_passed: bool | None = None  # None: no answer
    error: str | None = None
    seconds: float = 0.0


class WorkerDied(Exception):
    """The warm interpreter ended, answered nonsense or did not answer in time."""


class _Worker:
    """One warm interpreter process and its two pipes."""

    def __init__(self, limits: Limits, index: int, packages: Sequence[str]) -> None:
        self.limits = limits
        self.root = tempfile.mkdtemp(prefix="projected-grpo-")
        os.chmod(self.root, 0o711)  # a child of another user must reach its own directory below
        uid = FIRST_UID + index if os.geteuid() == 0 else None
        config = {
            **asdict(limits),
            "root": self.root,
            "uid": uid,
            "preload": PRELOAD,
            "packages": places(packages),
        }
        # -I would also ignore PYTHONHASHSEED, and set order must not change a verdict from run to run.
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", str(CHILD), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        try:
            hello = json.loads(self._frame(time.monotonic() + START_S))
            if "layers" not in hello:
                raise WorkerDied(f"the interpreter did not start: {hello.get('broken')}")
        except (WorkerDied, ValueError):
            self.close()
            raise
        self.layers: dict[str, bool | str] = hello["layers"]

    def run(self, program: Program) -> Outcome:
        """One program to its end; WorkerDied when the interpreter failed."""
        body = json.dumps(asdict(program)).encode()
        deadline = time.monotonic() + self.limits.wall_s + GRACE_S
        self._write(struct.pack(">I", len(body)) + body, deadline)
        seen = json.loads(self._frame(deadline))
        return read_outcome(program, seen, self._frame(deadline))

    def close(self) -> None:
        """Kill the interpreter with all its children and remove its folder."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise WorkerDied("no answer in time")

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self.stdin, select.POLLOUT, deadline)
            try:
                view = view[os.write(self.stdin, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerDied(str(error)) from error

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._wait(self.stdout, select.POLLIN, deadline)
            part = os.read(self.stdout, count - len(data))
            if not part:
                raise WorkerDied("the interpreter ended")
            data += part
        return bytes(data)

    def _frame(self, deadline: float) -> bytes:
        (length,) = struct.unpack(">I", self._read(4, deadline))
        return self._read(length, deadline)


def read_outcome(program: Program, seen: dict[str, object], lines: bytes) -> Outcome:
    """Join what the interpreter saw with what the child wrote; anything odd in the latter is a crash."""
    answer: dict[str, object] = {}
    for line in lines.split(b"\n", 4)[:4]:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(data, dict):
            break
        # The child's first words come first: later lines cannot take them back.
        answer = {**data, **answer}
    why, code = seen["why"], seen["exit_code"]
    calls = read_calls(answer.get("calls"), len(program.calls))
    answered = {
        "calls": calls is not None,
        "tests": "tests_error" in answer,
        "script": answer.get("compiled") is True,
    }
    status: Status = "ok"
    error: object = answer.get("fatal") or answer.get("load_error") or answer.get("tests_error")
    if why == "flood":
        status, error = "crash", "wrote too much"
    elif why == "timeout" or code in (
        -signal.SIGXCPU,
        -signal.SIGKILL,
    ):  # wall limit, or soft or hard CPU limit
        status, error = "timeout", "time limit"
    elif not answered[program.action] or (program.action != "script" and code != 0):
        status, error = "crash", error or f"ended without an answer (exit code {code})"
    tests, attributes = answer.get("tests"), answer.get("attributes")
    fields: dict[str, Any] = {
        name: seen[name] for name in ("exit_code", "stdout", "stderr", "files", "seconds")
    }
    return Outcome(
        status=status,
        compiled=answer.get("compiled") is True,
        tests=tests if tests in ("module", "class", "guarded") else None,
        loaded=answer.get("loaded") is True,
        calls=calls or (),
        attributes=tuple(
            name for name in program.watch if isinstance(attributes, list) and name in attributes
        ),
        tests_passed=answer["tests_error"] is None if "tests_error" in answer else None,
        error=str(error)[:200] if error else None,
        **fields,
    )


def read_calls(data: object, count: int) -> tuple[CallResult, ...] | None:
    """The child's call results, or None when they are not exactly `count` well-formed ones."""
    if not isinstance(data, list) or len(data) != count or not all(isinstance(item, dict) for item in data):
        return None
    return tuple(
        CallResult(item.get("value"), str(item["error"])[:200])
        if item.get("error") is not None or "value" not in item
        else CallResult(item["value"], None, names(item.get("equal")), held_values(item.get("held")))
        for item in data
    )


def names(data: object) -> frozenset[str]:
    """The strings in a list that the child sent, if it is one."""
    return (
        frozenset(name for name in data if isinstance(name, str)) if isinstance(data, list) else frozenset()
    )


def active(layers: dict[str, bool | str]) -> set[str]:
    """Names of the layers in force."""
    return {name for name, state in layers.items() if state is True}


def held_values(data: object) -> tuple[object, ...]:
    """The list that the child sent, if it is one."""
    return tuple(data) if isinstance(data, list) else ()


class Sandbox:
    """A pool of warm interpreters. `submit` returns at once; results do not depend on order or timing."""

    def __init__(
        self, workers: int | None = None, limits: Limits | None = None, packages: Sequence[str] = PACKAGES
    ) -> None:
        self.packages = packages
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._jobs: queue.SimpleQueue[tuple[Program, Future[Outcome]] | None] = queue.SimpleQueue()
        self._layers: Future[dict[str, bool | str]] = Future()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"sandbox-{i}", daemon=True)
            for i in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def layers(self) -> dict[str, bool | str]:
        """Containment in force, name -> True or why not. Waits for the first interpreter to start."""
        return self._layers.result(START_S)

    @property
    def missing(self) -> dict[str, str]:
        """Containment not in force, name -> why. Only root needs to change user."""
        return {
            name: str(state)
            for name, state in self.layers.items()
            if state is not True and (name, state) != ("uid_drop", NOT_ROOT)
        }

    def submit(self, program: Program) -> Future[Outcome]:
        """Queue a program; the future never raises for anything the program does."""
        future: Future[Outcome] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            self._jobs.put((program, future))
        return future

    def run(self, program: Program) -> Outcome:
        """Submit and wait."""
        return self.submit(program).result()

    def close(self) -> None:
        """Finish what is queued, then end every interpreter and remove its folder."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _serve(self, index: int) -> None:
        worker: _Worker | None = None

        def start() -> _Worker:
            fresh = _Worker(self.limits, index, self.packages)
            with self._lock:
                if not self._layers.done():
                    self._layers.set_result(fresh.layers)
            if not self._layers.exception() and not active(fresh.layers) >= active(self._layers.result()):
                fresh.close()  # what the caller was told of the containment must stay true
                raise WorkerDied("contained by less than the first interpreter")
            return fresh

        try:
            try:
                worker = start()
            except Exception as error:  # each program then tries again, and says in its outcome why not
                with self._lock:
                    if not self._layers.done():
                        self._layers.set_exception(RuntimeError(f"no sandbox: {error}"))
            while (job := self._jobs.get()) is not None:
                program, future = job
                worker = self._serve_one(program, future, worker, start)
        finally:
            if worker is not None:
                worker.close()

    def _serve_one(
        self, program: Program, future: Future[Outcome], worker: _Worker | None, start: Callable[[], _Worker]
    ) -> _Worker | None:
        """Run one program; returns the interpreter for the next one."""
        if not future.set_running_or_notify_cancel():
            return worker
        if worker is not None and worker.process.poll() is not None:
            worker.close()  # it died while idle: not this program's doing
            worker = None
        try:
            worker = worker or start()
            outcome = worker.run(program)
        except Exception as error:  # this thread serves every later program: nothing a program did may end it
            if worker is not None:
                worker.close()
            worker = None
            outcome = Outcome("worker_died", error=f"sandbox worker restarted: {error}"[:200])
        future.set_result(outcome)
        return worker


def places(packages: Sequence[str]) -> dict[str, str]:
    """Package name -> the folder it is installed in, for those that are installed."""
    specs = {name: importlib.util.find_spec(name) for name in packages}
    return {
        name: str(Path(spec.origin).parent.parent) for name, spec in specs.items() if spec and spec.origin
    }
