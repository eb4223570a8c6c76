"""The warm interpreter of the sandbox: forks one contained child per untrusted program.

A standalone standard-library program, started by sandbox.py as `python -s -S -P -B sandbox_child.py CONFIG`.
A job arrives on descriptor 0 as a 4-byte length and that many bytes of JSON. The interpreter itself reads
only the length: the body is read by the forked child, so no job (a canonical solution, say) is ever in the
memory that later children inherit. Back go two length-prefixed frames: what this interpreter saw (JSON), and
what the child wrote (at most `result_bytes` of untrusted bytes).
"""

from __future__ import annotations

import ast
import atexit
import builtins
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

RESULT_FD = 3
SETUP_FAILED = 70  # exit code of a child whose containment could not be put in place
MAX_DEPTH = 100
MAX_NODES = 200_000
MAX_INT_BITS = 1_000_000
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID_NODEV, MS_NOSUID_NODEV_NOEXEC, MS_BIND, MS_REC_PRIVATE = 1, 6, 0xE, 0x1000, 0x44000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
LANDLOCK_FS_BITS = (0, 13, 14, 15, 15, 16)  # by ABI version: how many kinds of file access it governs
LANDLOCK_READ_DIR, LANDLOCK_FILE = 0xD, 0x7  # execute, read file, read dir; execute, write file, read file
READABLE = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
EXACT_TYPES = (type(None), bool, int, float, str, list, tuple, dict, set, frozenset, bytes)

libc = ctypes.CDLL(None, use_errno=True)


# ---- encoding: any Python object to plain JSON -------------------------------------------------------------


class Unencodable(Exception):
    """The value is too deep, too large or cyclic."""


class Encoder:
    """Turns one returned value into JSON data, spending from a node budget; oracle.decode is the inverse."""

    def __init__(self) -> None:
        self.left = MAX_NODES

    def encode(self, value: Any, depth: int = 0) -> Any:
        """JSON data: exact builtins by value, ListNode and TreeNode shapes by structure, the rest opaque."""
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            raise Unencodable("result too large, too deep or cyclic")
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is int:
            return self.integer(value)
        if kind is str:
            self.left -= len(value) // 8
            return value
        if kind is list:
            return [self.encode(item, depth + 1) for item in list.__iter__(value)]
        if kind in EXACT_TYPES:
            return {"t": kind.__name__, "v": self.members(kind, value, depth)}
        return self.other(kind, value, depth)

    def integer(self, value: int) -> Any:
        if -(1 << 63) <= value < 1 << 63:
            return value
        if value.bit_length() > MAX_INT_BITS:
            raise Unencodable("integer too large")
        return {"t": "int", "v": hex(value)}  # decimal would meet Python's 4300-digit limit in the parent

    def members(self, kind: Any, value: Any, depth: int) -> Any:
        if kind is bytes:
            self.left -= len(value) // 4
            return value.hex() if self.left > 0 else ""
        if kind is dict:
            return [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in dict.items(value)]
        return [self.encode(item, depth + 1) for item in kind.__iter__(value)]

    def other(self, kind: Any, value: Any, depth: int) -> Any:
        name = str(type.__dict__["__name__"].__get__(kind))[:80]
        base = next((b for b in type.__dict__["__mro__"].__get__(kind) if b in EXACT_TYPES), None)
        if base is not None:
            return {"t": "sub", "type": name, "v": self.encode(exact_base(base, value), depth + 1)}
        fields = {field: read(value, field) for field in ("val", "next", "left", "right")}
        if MISSING not in (fields["val"], fields["left"], fields["right"]):
            return {"t": "tree", "v": self.tree(value, depth)}
        if MISSING not in (fields["val"], fields["next"]):
            return {"t": "list_node", "v": self.chain(value, depth)}
        return {"t": "opaque", "type": name}

    def chain(self, node: Any, depth: int) -> list[Any]:
        values = []
        while node is not None and node is not MISSING:
            values.append(self.encode(read(node, "val"), depth + 1))  # the budget ends a cycle
            node = read(node, "next")
        return values

    def tree(self, root: Any, depth: int) -> list[Any]:
        nodes: list[Any] = []
        queue = [root]
        for node in queue:
            if node is None or node is MISSING:
                nodes.append(None)
                continue
            nodes.append([self.encode(read(node, "val"), depth + 1)])
            queue += [read(node, "left"), read(node, "right")]
        return nodes


class Missing:
    """What `read` gives for an attribute that is absent or raises."""


MISSING = Missing()


def read(value: Any, name: str) -> Any:
    """An attribute of any object, or MISSING when it is absent or raises."""
    try:
        return getattr(value, name, MISSING)
    except BaseException:
        return MISSING


def exact_base(base: Any, value: Any) -> Any:
    """The plain builtin inside an instance of a subclass, without calling methods it may override."""
    if base is int:
        return int.__add__(value, 0)
    if base is float:
        return float.__add__(value, 0.0)
    if base is str:
        return str.__add__(value, "")
    if base is dict:
        return dict(dict.items(value))
    if base is bytes:
        return bytes.__add__(value, b"")
    return base(base.__iter__(value))


def always_equal_to(value: Any) -> list[str]:
    """Names of builtin types whose fresh random members all equal `value`, an object of some other type."""
    rng = random.SystemRandom()
    numbers = [rng.getrandbits(60) + 7 for _ in range(3)]
    decoys: dict[str, list[Any]] = {
        "NoneType": [None],
        "bool": [True, False],
        "int": numbers,
        "float": [n / 7 for n in numbers],
        "str": [f"{n:x}" for n in numbers],
        "list": [[n, n + 1] for n in numbers] + [[]],
        "tuple": [(n,) for n in numbers],
        "dict": [{n: n} for n in numbers],
        "set": [{n} for n in numbers],
    }
    found = []
    for name, members in decoys.items():
        try:
            if all(bool(value == member) for member in members):
                found.append(name)
        except BaseException:  # a hostile __eq__ only spoils its own case
            continue
    return found


# ---- the child: run one program ----------------------------------------------------------------------------


def describe(error: BaseException) -> str:
    """One short line for an exception, whatever its __str__ does."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return type(error).__name__[:200]


def find_tests(tree: ast.Module, name: str) -> str | None:
    """Where the response defines its test function: 'module', 'class', 'guarded' (voided) or None."""
    places = [("module", tree.body)]
    places += [("class", n.body) for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Solution"]
    for place, body in places:
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                guarded = any(isinstance(n, ast.Constant) and n.value == "__main__" for n in ast.walk(node))
                return "guarded" if guarded else place
    return None


def new_module(name: str, setup: str) -> dict[str, Any]:
    """The namespace of a fresh __main__ module in which the setup code has run."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__name__=name, __builtins__=builtins)
    sys.modules["__main__"] = module
    exec(compile(setup, "<setup>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


class Run:
    """One program in its own process: loads it, drives it, and reports on RESULT_FD."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.instances: list[Any] = []

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, Any], types.CodeType]:
        """Run the setup, parse the response; returns (namespace, names that calls see, response code)."""
        space = new_module(name, self.job["setup"])
        setup_names = dict(space)
        setup_names["Solution"] = lambda: self.instance(space)
        tree = ast.parse(self.job["source"])
        code = compile(tree, "<response>", "exec", dont_inherit=True)
        # Written before any line of the response runs, so the response cannot change it.
        report({"compiled": True, "tests": find_tests(tree, self.job["test_name"])})
        return space, setup_names, code

    def instance(self, space: dict[str, Any]) -> Any:
        """What `Solution()` in a call stands for: a new instance, remembered."""
        made = space["Solution"]()
        self.instances.append(made)
        return made

    def calls(self) -> None:
        """Drive every ground-truth call and report the encoded results with the side channels."""
        space, names, code = self.load("__main__")
        load_error = attempt(lambda: exec(code, space))
        report({"loaded": True})
        results: list[Any] = []
        found: set[str] = set()
        for source in self.job["calls"]:
            self.instances.clear()
            results.append(self.one_call(source, names))
            holders = self.instances or [space.get("Solution")]
            found.update(
                name for name in self.job["watch"] if any(truthy(holder, name) for holder in holders)
            )
        report({"load_error": load_error, "calls": results, "attributes": sorted(found)})

    def one_call(self, source: str, names: dict[str, Any]) -> dict[str, Any]:
        """Evaluate one call: its encoded value, or what it raised."""
        try:
            value = eval(compile(source, "<call>", "eval", dont_inherit=True), names)
            equal = [] if type(value) in EXACT_TYPES else always_equal_to(value)
            return {"value": Encoder().encode(value), "equal": equal}
        except BaseException as error:
            return {"error": describe(error)}

    def tests(self) -> None:
        """Call the response's own test function after putting the stub or the canonical method in place."""
        space, names, code = self.load("<graded>")
        attempt(lambda: exec(code, space))
        report({"loaded": True})
        report({"tests_error": attempt(lambda: self.call_tests(space))})

    def call_tests(self, space: dict[str, Any]) -> None:
        """Substitute the method, then call the test function without arguments; returning is passing."""
        job = self.job
        solution = space.setdefault("Solution", type("Solution", (), {}))
        if job["substitute"] == "stub":
            setattr(solution, job["method"], lambda *args, **kwargs: 0)
        elif job["substitute"] == "canonical":
            other = new_module("<canonical>", job["setup"])
            exec(compile(job["canonical"], "<canonical>", "exec", dont_inherit=True), other)
            for name, value in vars(other["Solution"]).items():
                if name == "__init__" or not (name.startswith("__") and name.endswith("__")):
                    setattr(solution, name, value)
        name = job["test_name"]
        test = space[name] if job["test_place"] == "module" else getattr(solution(), name)
        test()

    def script(self) -> None:
        """Run response, calls and a forced failure as a script would run; the exit code is the result."""
        space, names, code = self.load("__main__")
        status = 1
        try:
            exec(code, space)
            for source in self.job["calls"]:
                eval(compile(source, "<call>", "eval", dont_inherit=True), names)
            raise AssertionError("forced failure")
        except SystemExit as error:
            status = exit_status(error)
        except BaseException:
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as error:
                status = exit_status(error)
            except BaseException:
                status = 1
        attempt(threading._shutdown)  # type: ignore[attr-defined]
        attempt(atexit._run_exitfuncs)
        flush()
        os._exit(status)


def exit_status(error: SystemExit) -> int:
    """The exit code CPython gives a SystemExit."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def attempt(action: Callable[[], Any]) -> str | None:
    """Run `action`; the description of what it raised, or None."""
    try:
        action()
    except BaseException as error:
        return describe(error)
    return None


def truthy(holder: Any, name: str) -> bool:
    """Whether an attribute is set and true; methods do not count, honest helpers are called is_valid too."""
    value = read(holder, name)
    try:
        return value is not MISSING and not callable(value) and bool(value)
    except BaseException:
        return False


def report(data: dict[str, Any]) -> None:
    """Append one line of JSON to the result pipe."""
    view = memoryview(json.dumps(data).encode() + b"\n")
    while view:
        view = view[os.write(RESULT_FD, view) :]


def flush() -> None:
    """Hand over what Python still buffers, also where the program has replaced sys.stdout."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        attempt(stream.flush)  # type: ignore[union-attr]


def child(length: int, cwd: str, pipes: list[int], cfg: dict[str, Any], layers: dict[str, Any]) -> None:
    """Contain this freshly forked process, read the job, run it. Never returns."""
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        job = json.loads(read_exactly(0, length))
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (pipes[0], 1), (pipes[1], 2), (pipes[2], RESULT_FD)):
            os.dup2(source, target)
        os.closerange(RESULT_FD + 1, 1 << 16)
        os.chdir(cwd)
        contain(cfg, layers)
        os.write(RESULT_FD, b"R")
    except BaseException as error:
        text = describe(error)
        attempt(lambda: os.write(2, text.encode()))
        os._exit(SETUP_FAILED)
    try:
        gc.enable()
        random.seed(0)  # an honest randomised solution gets the same verdict every time
        getattr(Run(job), job["action"])()
    except BaseException as error:
        text = describe(error)
        attempt(lambda: report({"fatal": text}))
        os._exit(1)
    flush()
    os._exit(0)


def contain(cfg: dict[str, Any], layers: dict[str, Any]) -> None:
    """Limits first, then the loss of rights that setting them may have needed."""
    megabyte = 1 << 20
    for name, value in (
        ("RLIMIT_CPU", cfg["cpu_s"]),
        ("RLIMIT_AS", cfg["memory_mb"] * megabyte),
        ("RLIMIT_FSIZE", cfg["file_mb"] * megabyte),
        ("RLIMIT_NOFILE", cfg["open_files"]),
        ("RLIMIT_NPROC", cfg["base_processes"] + cfg["processes"]),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))
    if layers["uid_drop"] is True:
        os.setgroups([])
        os.setresgid(cfg["uid"], cfg["uid"], cfg["uid"])
        os.setresuid(cfg["uid"], cfg["uid"], cfg["uid"])
    header, empty = struct.pack("Ii", 0x20080522, 0), bytes(24)
    libc.capset(header, empty)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("no_new_privs refused")
    if layers["landlock"] is True:
        landlock(cfg["landlock_abi"], os.getcwd())
    libc.prctl(PR_SET_DUMPABLE, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: a change of uid clears it
    os.umask(0o077)


def landlock(abi: int, cwd: str) -> None:
    """Deny all files but the work folder and, to read, Python's and the system's libraries; TCP, signals."""
    everything = (1 << LANDLOCK_FS_BITS[min(abi, len(LANDLOCK_FS_BITS) - 1)]) - 1
    attributes = struct.pack("QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock refused")
    rules = [(path, LANDLOCK_READ_DIR) for path in (*READABLE, *sys.path)]
    rules += [(path, LANDLOCK_FILE) for path in DEVICES] + [(cwd, everything)]
    for path, access in rules:
        try:
            fd = os.open(path, os.O_PATH)
        except OSError:
            continue
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= LANDLOCK_FILE
        libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    if libc.syscall(LANDLOCK_RESTRICT, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock refused")
    os.close(ruleset)


# ---- the warm interpreter ----------------------------------------------------------------------------------


def read_exactly(fd: int, count: int) -> bytes:
    """Exactly `count` bytes; EOFError when the other side closed."""
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_frame(fd: int, data: bytes) -> None:
    """A 4-byte length and the bytes."""
    view = memoryview(struct.pack(">I", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def kill_rest(pid: int) -> None:
    """Kill and reap everything the program left: this interpreter is the subreaper of all of it."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        # As first process of its own pid namespace it reaches everything else in there with -1.
        for target in [-1] if os.getpid() == 1 else [-pid, *children()]:
            try:
                os.kill(target, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        os.waitpid(-1, 0)


def children() -> list[int]:
    """Process ids whose parent is this interpreter."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = file.read().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.append(int(name))
    return found


class Supervisor:
    """Watches one child until it ends or its time is up, and collects what it writes, up to the caps."""

    def __init__(self, pid: int, readers: list[int], cfg: dict[str, Any]) -> None:
        self.pid, self.cfg = pid, cfg
        self.caps = dict(
            zip(readers, (cfg["stdout_bytes"], cfg["stderr_bytes"], cfg["result_bytes"]), strict=True)
        )
        self.data = {fd: bytearray() for fd in readers}
        self.seen = 0
        self.poll = select.poll()
        self.end = os.pidfd_open(pid)
        for fd in (*readers, self.end):
            os.set_blocking(fd, False)
            self.poll.register(fd, select.POLLIN)

    def watch(self) -> tuple[str, int]:
        """Returns (why it ended: exit, timeout or flood; wait status)."""
        deadline = time.monotonic() + self.cfg["wall_s"]
        why = None
        while why is None:
            ready = [fd for fd, _ in self.poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
            for fd in ready:
                if fd != self.end:
                    self.drain(fd)
            if self.end in ready:
                why = "exit"
            elif self.seen > self.cfg["flood_bytes"]:
                why = "flood"
            elif time.monotonic() >= deadline:
                why = "timeout"
        if why != "exit":
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        kill_rest(self.pid)
        for fd in self.data:  # every writer is dead, so this empties each pipe
            while self.drain(fd):
                continue
            os.close(fd)
        os.close(self.end)
        return why, status

    def drain(self, fd: int) -> bool:
        """Read once; False when nothing is there now."""
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if not part:
            try:
                self.poll.unregister(fd)
            except KeyError:
                return False
        self.seen += len(part)
        self.data[fd] += part[: max(0, self.caps[fd] - len(self.data[fd]))]
        return bool(part)


class Scratch:
    """A fresh directory per program: its own small tmpfs where the kernel allows, else a plain directory."""

    def __init__(self, root: str, cfg: dict[str, Any], mounts: bool) -> None:
        self.path, self.cfg, self.mounts = os.path.join(root, "job"), cfg, mounts

    def make(self) -> None:
        """Create the directory, owned by the child's user."""
        os.mkdir(self.path, 0o700)
        if self.mounts:
            options = f"size={self.cfg['disk_mb']}m,nr_inodes={self.cfg['disk_inodes']},mode=0700"
            mount("tmpfs", self.path, "tmpfs", MS_NOSUID_NODEV_NOEXEC, options)
        if self.cfg["uid"] is not None:
            os.chown(self.path, self.cfg["uid"], self.cfg["uid"])

    def files(self) -> dict[str, str]:
        """Name -> first bytes of the plain files lying directly in the directory."""
        found = {}
        for entry in sorted(os.listdir(self.path))[: self.cfg["max_files"]]:
            try:
                fd = os.open(os.path.join(self.path, entry), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:  # no link to a file from elsewhere
                found[entry[:200]] = os.read(fd, self.cfg["file_bytes"]).decode("utf-8", "replace")
            os.close(fd)
        return found

    def clear(self) -> None:
        """Remove the directory with whatever was left in it."""
        if self.mounts and libc.umount2(self.path.encode(), 2) == 0:
            os.rmdir(self.path)
            return
        try:
            shutil.rmtree(self.path)
        except (OSError, RecursionError):  # modes taken away, or nested too deep for rmtree
            os.chmod(self.path, 0o700)
            os.spawnv(os.P_WAIT, "/bin/rm", ["rm", "-rf", self.path])


def run_job(
    length: int, scratch: Scratch, cfg: dict[str, Any], layers: dict[str, Any]
) -> tuple[dict[str, Any], bytes]:
    """Fork a child for the job waiting on descriptor 0; returns (observations, the child's bytes)."""
    scratch.make()
    pipes = [os.pipe() for _ in range(3)]
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(length, scratch.path, [write for _, write in pipes], cfg, layers)
    for _, write in pipes:
        os.close(write)
    readers = [reader for reader, _ in pipes]
    supervisor = Supervisor(pid, readers, cfg)
    why, status = supervisor.watch()
    out, err, result = (bytes(supervisor.data[fd]) for fd in readers)
    seen = {
        "ready": result[:1] == b"R",
        "why": why,
        "exit_code": os.waitstatus_to_exitcode(status),
        "stdout": out.decode("utf-8", "replace"),
        "stderr": err.decode("utf-8", "replace"),
        "files": scratch.files(),
        "seconds": time.monotonic() - started,
    }
    scratch.clear()
    return seen, result[1:]


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """mount(2); OSError when refused."""
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def unshare() -> None:
    """Take own pid, network, ipc and mount namespaces, an ordinary user through a user namespace; OSError."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if libc.unshare(flags if uid == 0 else flags | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if uid != 0:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def enter_namespaces(layers: dict[str, Any]) -> None:
    """Move to own namespaces if the kernel allows; the caller goes on as first process of the new ones."""
    reader, writer = os.pipe()
    if os.fork() == 0:  # tried in a fork first: half a failure could not be undone
        os.write(writer, (attempt(unshare) or "").encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    refused = os.read(reader, 4096).decode()
    os.close(reader)
    if refused:
        layers["namespaces"] = refused
        return
    unshare()
    pid = os.fork()
    if pid:
        os.closerange(0, 3)
        os.waitpid(pid, 0)
        os._exit(0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    layers["namespaces"] = True


def private_mounts(root: str, layers: dict[str, Any]) -> None:
    """Own mounts: a tmpfs as work folder, a /proc of this namespace only, a readable standard library."""
    if layers["namespaces"] is not True:
        layers["mounts"] = "needs namespaces"
        return
    try:
        mount("none", "/", "", MS_REC_PRIVATE, "")
        mount("tmpfs", root, "tmpfs", MS_NOSUID_NODEV, "size=1m,mode=0711")
        library = os.path.dirname(os.__file__)
        target = os.path.join(root, "lib")
        os.mkdir(target, 0o755)
        mount(library, target, "", MS_BIND, "")
        sys.path[:] = [target, os.path.join(target, "lib-dynload")]
        for module in [*sys.modules.values()]:  # packages already loaded look for their submodules here too
            if hasattr(module, "__path__"):
                module.__path__ = [path.replace(library, target, 1) for path in module.__path__]
        layers["mounts"] = True
        for folder in ("site-packages", "dist-packages"):  # may hold this project and its data
            if os.path.isdir(os.path.join(target, folder)):
                mount("tmpfs", os.path.join(target, folder), "tmpfs", MS_RDONLY, "size=4k")
        mount("proc", "/proc", "proc", MS_NOSUID_NODEV_NOEXEC, "")
        layers["private_proc"] = True
    except OSError as error:
        layers["private_proc" if layers.get("mounts") is True else "mounts"] = str(error)


def uid_drop(cfg: dict[str, Any], layers: dict[str, Any]) -> bool | str:
    """Whether children can become a user of their own: needs root, and a library that user can read."""
    if cfg["uid"] is None:
        return "not root"
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(cfg["uid"], cfg["uid"], cfg["uid"])
            os.setresuid(cfg["uid"], cfg["uid"], cfg["uid"])
            library = sys.path[0] if layers.get("mounts") is True else os.path.dirname(os.__file__)
            os._exit(0 if os.access(os.path.join(library, "os.py"), os.R_OK) else 3)
        except OSError:
            os._exit(4)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 0:
        return True
    return "the standard library is not readable by other users" if code == 3 else "setresuid refused"


def process_limit(cfg: dict[str, Any], layers: dict[str, Any]) -> bool | str:
    """Whether a contained child is really refused a process too many: the kernel exempts root."""
    pid = os.fork()
    if pid == 0:
        contain({**cfg, "processes": 0}, layers)
        try:
            os._exit(1 if os.fork() else 0)
        except OSError:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return True if code == 2 else "the kernel does not apply it to this user"


def prepare(cfg: dict[str, Any]) -> dict[str, Any]:
    """Put the layers that last for the interpreter's life in place; returns them, name -> True or why not."""
    layers: dict[str, Any] = {
        "process_group": True,
        "rlimits": True,
        "empty_environment": True,
        "no_descriptors": True,
    }
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    enter_namespaces(layers)
    private_mounts(cfg["root"], layers)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(PR_SET_DUMPABLE, 0)
    layers["uid_drop"] = uid_drop(cfg, layers)
    if layers["uid_drop"] is not True:
        cfg["uid"] = None
    cfg["base_processes"] = 1 if layers["uid_drop"] is True else 3 if layers["namespaces"] is True else 0
    cfg["landlock_abi"] = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    layers["landlock"] = cfg["landlock_abi"] > 0 or "not in this kernel"
    layers["no_new_privs"] = True
    layers["process_limit"] = process_limit(cfg, layers)
    layers["seccomp"] = "not built"
    return layers


def warm_up(cfg: dict[str, Any]) -> dict[str, Any]:
    """Everything that is done once, so that a fork finds it done; returns the containment in force."""
    layers = prepare(cfg)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=False)  # type: ignore[union-attr]
    for name in cfg["preload"]:
        importlib.import_module(name)
    for name, folder in cfg["packages"].items():
        sys.path.append(folder)
        importlib.import_module(name)
        sys.path.remove(folder)  # the rest of that folder stays out of reach
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.collect()
    gc.freeze()
    gc.disable()
    return layers


def main() -> None:
    """Serve jobs until descriptor 0 closes."""
    cfg = json.loads(sys.argv[1])
    os.environ.clear()
    out = os.dup(1)
    try:
        layers = warm_up(cfg)
    except Exception as error:
        write_frame(out, json.dumps({"broken": describe(error)}).encode())
        return
    write_frame(out, json.dumps({"layers": layers}).encode())
    scratch = Scratch(cfg["root"], cfg, layers.get("mounts") is True)
    while True:
        try:
            (length,) = struct.unpack(">I", read_exactly(0, 4))
        except EOFError:
            return
        seen, result = run_job(length, scratch, cfg, layers)
        write_frame(out, json.dumps(seen).encode())
        write_frame(out, result)
        if not seen["ready"]:
            return  # the job may lie half read on descriptor 0: only a new interpreter is in step again


if __name__ == "__main__":
    main()
