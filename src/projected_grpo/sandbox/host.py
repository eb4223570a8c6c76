"""Runs untrusted programs: a pool of threads, each with one warm interpreter that forks a child per program.

The child is never told an expected value, so what it answers is only ever an answer. Whatever a program does
to its process, to its interpreter or to the pipes ends in an Outcome; it cannot end or stall the caller.
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
import marshal
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal, TypeVar

from projected_grpo.errors import UserError

Action = Literal["calls", "tests", "script"]
Status = Literal["ok", "timeout", "crash", "worker_died"]

NOT_ROOT = "not root"  # what layer uid_drop says of an ordinary user
CHILD = Path(__file__).with_name("child.py")
FIRST_UID = 61_000  # children of worker i run as FIRST_UID + i when the trainer is root
GRACE_S = 10.0  # how long past its wall limit a program's cleanup may take before its interpreter is replaced
START_S = 60.0
DROP_S = 1.0  # how long an interpreter that was killed, or is just starting, is waited for
# Imported once, before forking: what the datasets' setup code and ordinary solutions use. Each page that an
# import adds makes every fork a little slower, so what one in a hundred imports is left to that one.
PRELOAD = (
    *("array", "bisect", "collections", "copy", "datetime", "enum", "functools", "heapq", "io", "itertools"),
    *("json", "math", "operator", "queue", "random", "re", "string", "time", "typing", "unicodedata"),
)

MAX_DEATHS = 24  # interpreters lost in a row, in all workers, after which one is tried on a harmless program
MAX_SETUPS = 16  # setups that one interpreter keeps prepared; the children run any further ones themselves
NOT_PREPARED = 255
JOB, SETUP, MORE, END = range(4)  # kinds of message to the interpreter, as in child.py
MESSAGE, ANSWER = struct.Struct(">BBI"), struct.Struct(">5I")
OVER_CPU_LIMIT = (-signal.SIGXCPU, -signal.SIGKILL)  # the soft one, the hard one
STARTED = b"R"  # a contained child's first byte on its result pipe

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
    others: tuple[str, ...] = ()  # of these the first that compiles, where the source does not
    code: bytes = b""  # the Outcome.code of an earlier program of this source: spares parsing it again
    more: bool = False  # others of its plan may follow: they then share one contained process that forks


@dataclass(frozen=True)
class CallResult:
    """One call's answer: the encoded value (see oracle.decode), or the error it raised."""

    value: object = None
    error: str | None = None
    equal: frozenset[str] = frozenset()  # builtin types whose random members all equal this foreign object
    held: tuple[object, ...] = ()  # encoded plain values in this foreign object's attributes that equal it


@lru_cache(1 << 14)
def compiled(source: str, name: str, kind: str) -> CodeType | str:
    """A dataset's code, compiled once for all responses; the source itself where the child must do it."""
    try:
        code = compile(source, name, kind, dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source
    return source if holds_a_set(code) else code


@dataclass(frozen=True)
class Outcome:
    """What happened to one program.

    `compiled`, `tests` and `code` were said before the response's first line ran. `loaded`, `calls`,
    `attributes`, `tests_passed` and `error` are the word of a process the response controls. The rest was
    observed.
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
    code: bytes = b""  # the response compiled, where it defines a test function; else empty
    seconds: float = 0.0
    cpu_s: float = 0.0  # of the program's process and what it started and reaped, containment included


# Name -> program to run next, given the outcomes so far by name; empty when there is no more to run.
Plan = Callable[[Mapping[str, Outcome]], Mapping[str, Program]]
T = TypeVar("T")


class WorkerDied(Exception):
    """The warm interpreter ended, answered nonsense or did not answer in time."""


class _Worker:
    def __init__(self, limits: Limits, index: int, packages: Sequence[str]) -> None:
        self.limits = limits
        self.root = tempfile.mkdtemp(prefix="projected-grpo-")
        os.chmod(self.root, 0o711)  # a child of another user must reach its own directory below
        uid = FIRST_UID + index if os.geteuid() == 0 else None
        config = asdict(limits) | {"root": self.root, "uid": uid}
        config |= {"preload": PRELOAD, "packages": places(packages)}
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
        self.setups: dict[str, int] = {}
        self.open = False  # a contained process may be waiting for more
        try:
            hello, _ = self._answer(time.monotonic() + START_S)
            if "layers" not in hello:
                raise WorkerDied(f"the interpreter did not start: {hello.get('broken')}")
        except (WorkerDied, ValueError):
            self.close()
            raise
        self.layers: dict[str, bool | str] = hello["layers"]

    def run(self, program: Program) -> Outcome:
        deadline = time.monotonic() + self.limits.wall_s + GRACE_S
        number = self._prepared(program.setup, deadline)
        job = {
            **vars(program),
            "calls": tuple(compiled(source, "<call>", "eval") for source in program.calls),
            "canonical": program.canonical and compiled(program.canonical, "<canonical>", "exec"),
        }
        self._send(MORE if program.more else JOB, number, marshal.dumps(job), deadline)
        self.open = program.more
        return read_outcome(program, *self._answer(deadline))

    def end_plan(self) -> bool:
        """The next program is of another plan; False when the interpreter failed, which is then closed."""
        try:
            if self.open:
                self._send(END, 0, b"", time.monotonic() + GRACE_S)
        except WorkerDied:
            self.close()
            return False
        self.open = False
        return True

    def _prepared(self, setup: str, deadline: float) -> int:
        """Under which number this interpreter has run the setup; NOT_PREPARED when each child must."""
        if setup not in self.setups and len(self.setups) < MAX_SETUPS and plain(setup):
            self.setups[setup] = len(self.setups)
            self._send(SETUP, self.setups[setup], setup.encode("utf-8", "surrogatepass"), deadline)
        return self.setups.get(setup, NOT_PREPARED)

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

    def _send(self, kind: int, number: int, body: bytes, deadline: float) -> None:
        view = memoryview(MESSAGE.pack(kind, number, len(body)) + body)
        while view:
            try:
                view = view[os.write(self.stdin, view) :]
            except BlockingIOError:
                self._wait(self.stdin, select.POLLOUT, deadline)
            except OSError as error:
                raise WorkerDied(str(error)) from error

    def _answer(self, deadline: float) -> tuple[dict[str, Any], bytes]:
        """What the interpreter saw, and what the child wrote on its result pipe."""
        data, length = bytearray(), ANSWER.size
        while len(data) < length:
            self._wait(self.stdout, select.POLLIN, deadline)
            part = os.read(self.stdout, 1 << 16)  # as much as a pipe holds
            if not part:
                raise WorkerDied("the interpreter ended")
            data += part
            if length == ANSWER.size <= len(data):
                length += sum(ANSWER.unpack_from(data))
        stream = BytesIO(data)
        head, stdout, stderr, result, files = map(stream.read, ANSWER.unpack(stream.read(ANSWER.size)))
        seen = json.loads(head)
        seen["stdout"], seen["stderr"] = stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")
        seen["files"] = json.loads(files or b"{}")
        return seen, result[len(STARTED) :]


def holds_a_set(code: CodeType) -> bool:
    """Whether a constant is a set, whose order would no longer come from the child's own fixed hashes."""
    return any(
        isinstance(value, frozenset) or (isinstance(value, CodeType) and holds_a_set(value))
        for value in code.co_consts
    )


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
    elif why == "timeout" or code in OVER_CPU_LIMIT:
        status, error = "timeout", "time limit"
    elif not answered[program.action] or (program.action != "script" and code != 0):
        status, error = "crash", error or f"ended without an answer (exit code {code})"
    tests, attributes = answer.get("tests"), items(answer.get("attributes"))
    observed = ("exit_code", "stdout", "stderr", "files", "seconds", "cpu_s")
    fields: dict[str, Any] = {name: seen[name] for name in observed}
    return Outcome(
        status=status,
        compiled=answer.get("compiled") is True,
        tests=tests if tests in ("module", "class", "guarded") else None,
        loaded=answer.get("loaded") is True,
        calls=calls or (),
        attributes=tuple(name for name in program.watch if name in attributes),
        code=read_code(answer.get("code")),
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
        else CallResult(
            item["value"],
            None,
            frozenset(name for name in items(item.get("equal")) if isinstance(name, str)),
            tuple(items(item.get("held"))),
        )
        for item in data
    )


def items(data: object) -> list[Any]:
    """The list that the child sent, if it is one."""
    return data if isinstance(data, list) else []


def read_code(data: object) -> bytes:
    """The compiled response that the child sent, if it did; only another child of this response loads it."""
    try:
        return base64.b64decode(data, validate=True) if isinstance(data, str) else b""
    except ValueError:
        return b""


def active(layers: dict[str, bool | str]) -> set[str]:
    """Names of the layers in force."""
    return {name for name, state in layers.items() if state is True}


@dataclass(frozen=True)
class _Job:
    plan: Plan
    conclude: Callable[[Mapping[str, Outcome]], Any]
    future: Future[Any]


class Sandbox:
    """A pool of warm interpreters. `submit` returns at once; results do not depend on order or timing."""

    def __init__(
        self, workers: int | None = None, limits: Limits | None = None, packages: Sequence[str] = PACKAGES
    ) -> None:
        self.packages = packages
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._layers: Future[dict[str, bool | str]] = Future()
        self._lock = threading.Lock()
        self._closed = False
        self._dropped = False  # what was queued or runs is not waited for
        self._workers: dict[int, _Worker] = {}  # the living interpreter of each thread
        self._deaths = 0  # interpreters lost in a row
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

    def submit_plan(self, plan: Plan, conclude: Callable[[Mapping[str, Outcome]], T]) -> Future[T]:
        """Queue a plan, whose programs one worker runs in order; the future is what `conclude` makes of their
        outcomes. It raises for nothing that a program does, UserError if no interpreter lives.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            self._jobs.put(_Job(plan, conclude, future))
        return future

    def submit(self, program: Program) -> Future[Outcome]:
        return self.submit_plan(lambda done: {} if done else {"it": program}, lambda done: done["it"])

    def run(self, program: Program) -> Outcome:
        return self.submit(program).result()

    def close(self, *, drop: bool = False) -> None:
        """Finish what is queued, or `drop` it; then end every interpreter and remove its folder."""
        with self._lock:
            if self._closed:
                return
            self._closed, self._dropped = True, drop
            for worker in self._workers.values() if drop else ():
                worker.process.kill()  # its thread notices, and cleans up
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + DROP_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()) if drop else None)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close(drop=kind is not None)

    def _serve(self, index: int) -> None:
        worker: _Worker | None = None

        def start() -> _Worker:
            fresh = _Worker(self.limits, index, self.packages)
            with self._lock:
                self._workers[index] = fresh
                if not self._layers.done():
                    self._layers.set_result(fresh.layers)
                dropped = self._dropped
            less = not self._layers.exception() and not active(fresh.layers) >= active(self._layers.result())
            if dropped or less:
                fresh.close()  # what the caller was told of the containment must stay true
                raise WorkerDied("dropped" if dropped else "contained by less than the first interpreter")
            return fresh

        try:
            try:
                worker = start()
            except Exception as error:  # each program then tries again, and says in its outcome why not
                with self._lock:
                    if not self._layers.done():
                        self._layers.set_exception(UserError(f"nothing can be graded here: {error}"))
            while (job := self._jobs.get()) is not None:
                worker = self._serve_plan(job, worker, start)
        finally:
            if worker is not None:
                worker.close()

    def _serve_plan(self, job: _Job, worker: _Worker | None, start: Callable[[], _Worker]) -> _Worker | None:
        """Run a plan to its end; returns the interpreter for the next one."""
        if self._dropped:
            job.future.cancel()
        if not job.future.set_running_or_notify_cancel():
            return worker
        if worker is not None and worker.process.poll() is not None:
            worker.close()  # it died while idle: not this plan's doing
            worker = None
        done: dict[str, Outcome] = {}
        try:
            while programs := job.plan(done):
                for name, program in programs.items():
                    done[name], worker = self._run(program, worker, start)
                    if self._dropped:
                        raise WorkerDied("dropped")
                    self._check(done[name], start)
            result = job.conclude(done)
        except Exception as error:  # no interpreter lives, or a defect in the plan: whoever waits must hear
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
        return worker if worker is None or worker.end_plan() else None

    def _run(
        self, program: Program, worker: _Worker | None, start: Callable[[], _Worker]
    ) -> tuple[Outcome, _Worker | None]:
        """Run one program; its outcome, and the interpreter for the next one."""
        try:
            worker = worker or start()
            return worker.run(program), worker
        except Exception as error:  # this thread serves every later program: nothing a program did may end it
            if worker is not None:
                worker.close()
            return Outcome("worker_died", error=f"sandbox worker restarted: {error}"[:200]), None

    def _check(self, outcome: Outcome, start: Callable[[], _Worker]) -> None:
        """UserError when interpreter after interpreter died: grades would all be wrong, and silent.

        A group of responses that each kill their interpreter must not end a run: a harmless program decides.
        """
        with self._lock:
            self._deaths = self._deaths + 1 if outcome.status == "worker_died" else 0
            if self._deaths < MAX_DEATHS:
                return
        if not works(start):
            reason = f"the last {MAX_DEATHS} programs each ended their interpreter ({outcome.error})"
            raise UserError(f"nothing can be graded here: {reason}")
        with self._lock:
            self._deaths = 0


def works(start: Callable[[], _Worker]) -> bool:
    try:
        worker = start()
        try:
            return worker.run(Program("", "f")).status == "ok"
        finally:
            worker.close()
    except Exception:
        return False


@lru_cache(256)
def plain(setup: str) -> bool:
    """Whether a setup only imports modules that are loaded anyway or what they define, defines functions and
    classes, and names constants: running it can neither go on for ever nor touch anything that a later
    program would see.
    """
    try:
        body = ast.parse(setup).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return "float" not in bound_names(body) and all(map(harmless, body))


def bound_names(body: Sequence[ast.stmt]) -> set[str]:
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return names | {alias.asname or alias.name for node in imports for alias in node.names}


def harmless(node: ast.stmt) -> bool:
    """Whether one statement of a setup runs no code but an import, a definition or float('...')."""
    if isinstance(node, ast.Import):
        return all(name.name in PRELOAD for name in node.names)
    if isinstance(node, ast.ImportFrom):
        module = node.module if node.level == 0 else None
        return module in PRELOAD and all(defined(module, name.name) for name in node.names)
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if not isinstance(n, ast.Pass | ast.Expr)]
        return (
            not (node.bases or node.keywords or node.decorator_list)
            and all(isinstance(n, ast.FunctionDef) and n.name != "__class_getitem__" for n in methods)
            and all(map(harmless, node.body))
        )
    if isinstance(node, ast.FunctionDef):
        evaluated = [*node.args.defaults, *node.args.kw_defaults, node.returns]
        evaluated += [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
        return not node.decorator_list and all(e is None or constant(e) for e in evaluated)
    if isinstance(node, ast.Assign):
        names = all(isinstance(target, ast.Name) and target.id != "float" for target in node.targets)
        return names and constant(node.value)
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def defined(module: str, name: str) -> bool:
    """Whether the module defines this; a submodule is no attribute before an import runs it."""
    value = getattr(importlib.import_module(module), name, None)
    return name == "*" or not (value is None or isinstance(value, ModuleType))


def constant(node: ast.expr) -> bool:
    """A literal, a name, a generic type of names (List[int]) or float('inf')."""
    match node:
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant()], keywords=[]):
            return True
        case ast.Subscript(value=ast.Name(), slice=inside):
            return constant(inside)
        case ast.Tuple(elts=parts):
            return all(map(constant, parts))
    return isinstance(node, ast.Constant | ast.Name)


def places(packages: Sequence[str]) -> dict[str, str]:
    """Package name -> the folder it is installed in, for those that are installed."""
    specs = {name: importlib.util.find_spec(name) for name in packages}
    return {
        name: str(Path(spec.origin).parent.parent) for name, spec in specs.items() if spec and spec.origin
    }
