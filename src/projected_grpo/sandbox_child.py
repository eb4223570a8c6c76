"""The warm interpreter of the sandbox: forks one contained child per untrusted program.

A standalone standard-library program, started by sandbox.py as `python -s -S -P -B sandbox_child.py CONFIG`.
On descriptor 0 arrive messages: a kind, the number of a prepared setup, a length and that many bytes. A setup
(dataset code that only imports and defines, see sandbox.plain) is run by the interpreter; forks find it done.
A job is read by the forked child alone, and what a program says or leaves is read into memory that no fork
inherits (see Output): neither a canonical solution nor an answer is ever in the memory of a later child. A
job is answered by five lengths, what this interpreter saw (JSON), and the four parts of the Output.
"""

from __future__ import annotations

import gc
import importlib
import json
import marshal
import mmap
import os
import select
import shutil
import signal
import stat
import struct
import sys
import time
import types
from typing import Any

register_at_fork = os.register_at_fork
JOB, SETUP = 0, 1  # kinds of message
MESSAGE, ANSWER = struct.Struct(">BBI"), struct.Struct(">5I")

if "projected_grpo" not in sys.modules:  # a program of its own: the real package needs more than this library
    stand_in = types.ModuleType("projected_grpo")
    stand_in.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["projected_grpo"] = stand_in
    # `random` and `threading` ask to be told of every fork, to seed or to take stock anew. The children start
    # from a fixed seed, and this interpreter has one thread: neither is needed, and they cost half a fork.
    os.register_at_fork = lambda **hooks: None

from projected_grpo.sandbox_contain import (  # noqa: E402
    FOLDER,
    MNT_DETACH,
    MS_NOSUID_NODEV_NOEXEC,
    PARENT,
    PR_SET_PDEATHSIG,
    Containment,
    libc,
    mount,
    prepare,
)
from projected_grpo.sandbox_encode import attempt, describe  # noqa: E402
from projected_grpo.sandbox_run import RESULT_FD, Run, Setup, flush, report  # noqa: E402

STDOUT, STDERR, RESULT, FILES = range(4)  # the parts of an Output
NAME_BYTES = 255  # the longest name of a file
SPARE_BYTES = 1 << 16
STARTED = b"R"  # the first byte on the result pipe: the child is contained and has its job
SETUP_FAILED = 70  # exit code of a child whose containment could not be put in place


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


class Output:
    """What one program wrote and left, up to the caps, in a mapping that the kernel gives to no fork.

    It goes from a pipe into the mapping and from there to the trusted side. A `bytes` of it on the heap would
    stay there, freed or not, where the next program, forked from this interpreter, could find it.
    """

    def __init__(self, cfg: dict[str, Any]) -> None:
        files = cfg["max_files"] * 6 * (cfg["file_bytes"] + NAME_BYTES + 2)  # a byte is up to 6 in JSON
        sizes = (cfg["stdout_bytes"], cfg["stderr_bytes"], cfg["result_bytes"], files)
        memory = mmap.mmap(-1, sum(sizes) + SPARE_BYTES)
        memory.madvise(mmap.MADV_DONTFORK)
        view = memoryview(memory)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.parts = [view[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self.spare = view[ends[-1] :]
        self.lengths = [0] * len(sizes)

    def clear(self) -> None:
        """Forget the program before."""
        self.lengths = [0] * len(self.parts)

    def read(self, part: int, fd: int) -> int:
        """Read once; how many bytes there were, also of those over the cap."""
        room = self.parts[part][self.lengths[part] :]
        count = os.readv(fd, [room, self.spare])
        self.lengths[part] += min(count, len(room))
        return count


def answer(fd: int, seen: dict[str, Any], output: Output | None = None) -> None:
    """Five lengths, what this interpreter saw as JSON, and the program's output."""
    head = json.dumps(seen).encode()
    lengths = output.lengths if output else [0, 0, 0, 0]
    parts = [memoryview(ANSWER.pack(len(head), *lengths) + head)]
    if output:
        parts += [part[:length] for part, length in zip(output.parts, lengths, strict=True)]
    for part in parts:
        while part:
            part = part[os.write(fd, part) :]


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
    """Watches one child until it ends or its time is up, and collects what it writes."""

    def __init__(self, pid: int, readers: list[int], output: Output, cfg: dict[str, Any]) -> None:
        self.pid, self.cfg = pid, cfg
        self.output = output
        self.parts = dict(zip(readers, (STDOUT, STDERR, RESULT), strict=True))
        self.seen = 0
        self.cpu_s = 0.0
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
        _, status, used = os.wait4(self.pid, 0)
        self.cpu_s = used.ru_utime + used.ru_stime
        kill_rest(self.pid)
        for fd in self.parts:  # every writer is dead, so this empties each pipe
            while self.drain(fd):
                continue
            os.close(fd)
        os.close(self.end)
        return why, status

    def drain(self, fd: int) -> bool:
        """Read once; False when nothing is there now."""
        try:
            count = self.output.read(self.parts[fd], fd)
        except BlockingIOError:
            return False
        if not count:
            try:
                self.poll.unregister(fd)
            except KeyError:
                return False
        self.seen += count
        return count > 0


class Scratch:
    """A fresh directory per program: its own small tmpfs where the kernel allows, else a plain directory."""

    def __init__(self, cfg: dict[str, Any], containment: Containment, mounts: bool) -> None:
        self.cfg, self.containment, self.mounts = cfg, containment, mounts
        parent = os.path.join(cfg["root"], PARENT) if mounts else cfg["root"]
        self.path = os.path.join(parent, FOLDER)
        # The parent of what is mounted lasts, so its ruleset does; it is read-only, so that only the mount is
        # writable.
        self.ruleset = containment.ruleset(parent) if mounts else None

    def make(self) -> None:
        """Create the directory, owned by the child's user."""
        if self.mounts:
            options = f"size={self.cfg['disk_mb']}m,nr_inodes={self.cfg['disk_inodes']},mode=0700"
            mount("tmpfs", self.path, "tmpfs", MS_NOSUID_NODEV_NOEXEC, options)
        else:
            os.mkdir(self.path, 0o700)
            self.ruleset = self.containment.ruleset(self.path)
        if self.cfg["uid"] is not None:
            os.chown(self.path, self.cfg["uid"], self.cfg["uid"])

    def files(self) -> dict[str, str]:
        """Name -> first bytes of the plain files lying directly in the directory."""
        found = {}
        try:  # a program may have removed its folder, or its own rights to it
            if not os.path.islink(self.path):
                os.chmod(self.path, 0o700)
            entries = sorted(os.listdir(self.path))
        except OSError:
            return {}
        for entry in entries[: self.cfg["max_files"]]:
            try:
                fd = os.open(os.path.join(self.path, entry), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:  # no link to a file from elsewhere
                found[entry] = os.read(fd, self.cfg["file_bytes"]).decode("utf-8", "replace")
            os.close(fd)
        return found

    def untouched(self) -> bool:
        """Whether the program left nothing, told without reading a name: its tmpfs has one inode."""
        info = os.statvfs(self.path) if self.mounts else None
        return info is not None and info.f_files - info.f_ffree == 1

    def clear(self, output: Output) -> None:
        """Report the files and remove the directory with whatever was left in it."""
        if not self.untouched():
            self.read_in_a_fork(output)
        if self.mounts:
            if libc.umount2(self.path.encode(), MNT_DETACH):
                raise OSError("cannot unmount a program's folder")  # the next program must not find it
        elif self.ruleset is not None:
            os.close(self.ruleset)

    def read_in_a_fork(self, output: Output) -> None:
        """Names and contents are the program's words: they pass through memory that ends with a fork."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                view = memoryview(json.dumps(self.files()).encode())
                while view:
                    view = view[os.write(writer, view) :]
                if not self.mounts:
                    self.remove()
                os._exit(0)
            except BaseException:
                os._exit(1)
        os.close(writer)
        while output.read(FILES, reader):
            continue
        os.close(reader)
        if os.waitpid(pid, 0)[1]:
            raise OSError("cannot read or remove what a program left")

    def remove(self) -> None:
        """Remove a plain directory."""
        attempt(lambda: shutil.rmtree(self.path, ignore_errors=True))
        if os.path.lexists(self.path):  # modes taken away, nested too deep for rmtree, or no folder any more
            if not os.path.islink(self.path):
                os.spawnv(os.P_WAIT, "/bin/chmod", ["chmod", "-R", "u+rwX", self.path])
            os.spawnv(os.P_WAIT, "/bin/rm", ["rm", "-rf", self.path])


def run_job(length: int, setup: Setup | None, scratch: Scratch, output: Output, null: int, out: int) -> bool:
    """Fork a child for the job waiting on descriptor 0, and answer; False when the child could not start."""
    scratch.make()
    output.clear()
    pipes = [os.pipe() for _ in range(3)]
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(length, setup, scratch, [null, *(write for _, write in pipes)])
    for _, write in pipes:
        os.close(write)
    supervisor = Supervisor(pid, [reader for reader, _ in pipes], output, scratch.cfg)
    why, status = supervisor.watch()
    seen = {
        "why": why,
        "exit_code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "cpu_s": supervisor.cpu_s,
    }
    scratch.clear(output)
    answer(out, seen, output)
    return output.lengths[RESULT] > 0 and output.parts[RESULT][0] == STARTED[0]


def child(length: int, setup: Setup | None, scratch: Scratch, files: list[int]) -> None:
    """Contain this freshly forked process, read the job, run it. Never returns."""
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        job = marshal.loads(read_exactly(0, length))  # from the trusted side
        for target, source in enumerate(files):
            os.dup2(source, target)
        ruleset = scratch.ruleset
        if ruleset is not None:
            ruleset = os.dup2(ruleset, RESULT_FD + 1)
        os.closerange(RESULT_FD + (2 if ruleset is not None else 1), 1 << 16)
        os.chdir(scratch.path)
        scratch.containment.enter(ruleset)
        os.write(RESULT_FD, STARTED)
    except BaseException as error:
        text = describe(error)
        attempt(lambda: os.write(2, text.encode()))
        os._exit(SETUP_FAILED)
    try:
        gc.enable()
        getattr(Run(job, setup), job["action"])()
    except BaseException as error:
        text = describe(error)
        attempt(lambda: report({"fatal": text}))
        os._exit(1)
    flush()
    os._exit(0)


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
    os.umask(0o077)
    importlib.import_module("random").seed(
        0
    )  # an honest randomised solution gets the same verdict every time
    gc.collect()
    gc.freeze()
    gc.disable()
    return layers


def withdraw_imports() -> None:
    """Forget where this program's modules are, so that no response can import them or their neighbours."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "projected_grpo"]:
        del sys.modules[name]
    sys.path_importer_cache.clear()


def prepare_setup(source: bytes) -> Setup | None:
    """Run a setup before forking; None when it fails, which each child then finds for itself."""
    try:
        return Setup(source.decode("utf-8", "surrogatepass"))
    except Exception:
        return None
    finally:
        gc.freeze()


def main() -> None:
    """Serve jobs until descriptor 0 closes."""
    cfg = json.loads(sys.argv[1])
    os.environ.clear()
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        layers = warm_up(cfg)
        scratch = Scratch(cfg, Containment(cfg, layers), layers["mounts"] is True)
        output = Output(cfg)
    except Exception as error:
        answer(out, {"broken": describe(error)})
        return
    withdraw_imports()
    os.register_at_fork = register_at_fork
    answer(out, {"layers": layers})
    setups: dict[int, Setup | None] = {}
    while True:
        try:
            kind, number, length = MESSAGE.unpack(read_exactly(0, MESSAGE.size))
        except EOFError:
            return
        if kind == SETUP:
            setups[number] = prepare_setup(read_exactly(0, length))
        elif not run_job(length, setups.get(number), scratch, output, null, out):
            return  # the job may lie half read on descriptor 0: only a new interpreter is in step again


if __name__ == "__main__":
    main()
