"""The warm interpreter of the sandbox: forks a process for every untrusted program and contains it.

A standalone standard-library program, started by host.py as `python -s -S -P -B child.py CONFIG`.
On descriptor 0 arrive messages: a kind, the number of a prepared setup, a length and that many bytes. A setup
(dataset code that only imports and defines, see host.plain) is run by the interpreter; forks find it done.
A job is read by the process that runs it alone, and what a program says or leaves is read into memory that
no fork inherits (see Output): neither a canonical solution nor an answer is ever in a later program's memory.
A job is answered by five lengths, what this interpreter saw (JSON), and the four parts of the Output.

A job that others of the same response may follow (MORE) is run by a fork of the contained process, which
itself never runs, reads or hears anything of a response; the others are forked from it too (see Cell).
"""

from __future__ import annotations

import gc
import importlib
import json
import marshal
import mmap
import os
import select
import signal
import stat
import struct
import sys
import time
import types
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

register_at_fork = os.register_at_fork
JOB, SETUP, MORE, END = range(4)  # kinds of message; END: no more for the contained process that is there
MESSAGE, ANSWER = struct.Struct(">BBI"), struct.Struct(">5I")
ORDER, ENDED = struct.Struct(">?I"), struct.Struct(">?id")  # to a contained process; what it says of a fork
HOSTING = ("seccomp", "process_limit", "mounts")  # layers without which a program could reach the next one's

if "projected_grpo" not in sys.modules:  # a program of its own: the real package needs more than this library
    stand_in = types.ModuleType("projected_grpo")
    stand_in.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["projected_grpo"] = stand_in
    # `random` and `threading` ask to be told of every fork, to seed or to take stock anew. The children start
    # from a fixed seed, and this interpreter has one thread: neither is needed, and they cost half a fork.
    os.register_at_fork = lambda **hooks: None

from projected_grpo.sandbox.contain import (  # noqa: E402
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
from projected_grpo.sandbox.encode import attempt, describe  # noqa: E402
from projected_grpo.sandbox.run import RESULT_FD, Run, Setup, flush, report, write  # noqa: E402

STDOUT, STDERR, RESULT, FILES = range(4)  # the parts of an Output
NAME_BYTES = 255  # the longest name of a file
QUIET_S = 0.005  # most programs end sooner: what they say is then read once, not line by line
SPARE_BYTES = 1 << 16
F_GETFL = 3
STARTED = b"R"  # the first byte on the result pipe: the child is contained and has its job
JOBS_FD = 200  # where this interpreter reads messages
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
        write(part, fd)


def kill_rest(pid: int) -> float:
    """Kill and reap everything the program left, of which this interpreter is the subreaper; CPU seconds."""
    cpu_s = 0.0
    while True:
        try:
            ended, _, used = os.wait4(-1, os.WNOHANG)
            if not ended:
                # As first process of its own pid namespace it reaches everything else in there with -1.
                for target in [-1] if os.getpid() == 1 else [-pid, *children()]:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(target, signal.SIGKILL)
                _, _, used = os.wait4(-1, 0)
        except ChildProcessError:
            return cpu_s
        cpu_s += used.ru_utime + used.ru_stime


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


class Job(NamedTuple):
    """A program to run: its length on JOBS_FD; `more`: others of the same response may follow."""

    length: int
    more: bool


class Seen(NamedTuple):
    """What became of one program. `clean`: it ended by itself and left its contained process as it was."""

    why: str  # exit, timeout or flood
    exit_code: int
    cpu_s: float
    clean: bool = False


class Cell:
    """One contained process with its fresh folder and pipes, watched until it ends or its time is up.

    Its first and only program it runs itself. Where others may follow it forks itself for each, one at a
    time, and stays as it was, so that each finds what the first one found; the last one it runs itself.
    A program after which anything is not as before is the last one here.
    """

    def __init__(self, scratch: Scratch, output: Output, number: int) -> None:
        self.scratch, self.output, self.number = scratch, output, number
        self.pid = self.end = -1
        self.parts: dict[int, int] = {}
        self.heard = self.order = -1  # pipes from and to a process that forks
        self.told = 0.0  # CPU seconds of its forks
        self.status: int | None = None
        self.poll = select.poll()

    def start(self, job: Job, setup: Setup | None, null: int) -> None:
        self.scratch.make()
        pipes = [os.pipe() for _ in range(3)]
        up, down = (os.pipe(), os.pipe()) if job.more else ((-1, -1), (-1, -1))
        self.pid = os.fork()
        if self.pid == 0:
            child(job, setup, self.scratch, [null, *(end for _, end in pipes)], (up[1], down[0]))
        for fd in (*(end for _, end in pipes), up[1], down[0]):
            if fd >= 0:
                os.close(fd)
        self.heard, self.order = up[0], down[1]
        self.parts = dict(zip((read for read, _ in pipes), (STDOUT, STDERR, RESULT), strict=True))
        self.end = os.pidfd_open(self.pid)
        for fd in self.parts:
            os.set_blocking(fd, False)
        for fd in (self.end, self.heard):
            if fd >= 0:
                self.poll.register(fd, select.POLLIN)

    def go_on(self, job: Job) -> bool:
        """Have the process run another job; False when it is no longer there."""
        try:
            os.write(self.order, ORDER.pack(job.more, job.length))
        except BrokenPipeError:
            return False
        if not job.more:
            self.poll.unregister(self.heard)  # it forks no more: all it will say is that it closed this
        return True

    def watch(self) -> Seen:
        cfg, written = self.scratch.cfg, 0
        deadline = time.monotonic() + cfg["wall_s"]
        if not self.poll.poll(QUIET_S * 1000):
            for fd in self.parts:
                self.poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in self.poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
            written += sum(self.drain(fd) for fd in self.parts if fd in ready)
            if self.heard in ready and (said := os.read(self.heard, ENDED.size)):
                whole, status, cpu_s = ENDED.unpack(said)
                self.told += cpu_s
                self.empty()
                clean = whole and status == 0 and self.scratch.untouched()
                return Seen("exit", os.waitstatus_to_exitcode(status), cpu_s, clean)
            if self.end in ready:
                return self.stop("exit")
            if written > cfg["flood_bytes"]:
                return self.stop("flood")
            if time.monotonic() >= deadline:
                return self.stop("timeout")

    def stop(self, why: str) -> Seen:
        """End the process and everything below it, and hear what was left to hear."""
        if why != "exit":
            os.kill(self.pid, signal.SIGKILL)
        _, self.status, used = os.wait4(self.pid, 0)
        cpu_s = used.ru_utime + used.ru_stime + kill_rest(self.pid) - self.told
        self.empty()  # every writer is dead
        return Seen(why, os.waitstatus_to_exitcode(self.status), cpu_s)

    def empty(self) -> None:
        for fd in self.parts:
            while self.drain(fd):
                continue

    def drain(self, fd: int) -> int:
        """Read once; how many bytes, 0 when nothing is there now."""
        try:
            count = self.output.read(self.parts[fd], fd)
        except BlockingIOError:
            return 0
        if not count:
            with suppress(KeyError):
                self.poll.unregister(fd)
        return count

    def close(self) -> None:
        """End the process if it is there, report the files of its last program, and remove the folder."""
        if self.status is None:
            self.stop("closed")
        for fd in (*self.parts, self.end, self.heard, self.order):
            if fd >= 0:
                os.close(fd)
        self.scratch.clear(self.output)


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
        if self.mounts:
            options = f"size={self.cfg['disk_mb']}m,nr_inodes={self.cfg['disk_inodes']},mode=0700"
            mount("tmpfs", self.path, "tmpfs", MS_NOSUID_NODEV_NOEXEC, options)
        else:
            os.mkdir(self.path, 0o700)
            self.ruleset = self.containment.ruleset(self.path)
        if self.cfg["uid"] is not None:
            os.chown(self.path, self.cfg["uid"], self.cfg["uid"])
        self.made = self.folder()

    def folder(self) -> tuple[int, ...]:
        """The directory's own state, which any entry made or removed in it changes."""
        info = os.stat(self.path)
        return info.st_ino, info.st_mode, info.st_uid, info.st_nlink, info.st_mtime_ns, info.st_ctime_ns

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
        return info is not None and info.f_files - info.f_ffree == 1 and self.folder() == self.made

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
                write(json.dumps(self.files()).encode(), writer)
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
        attempt(lambda: remove_tree(self.path))
        if os.path.lexists(self.path):  # modes taken away, nested too deep, or no folder any more
            if not os.path.islink(self.path):
                os.spawnv(os.P_WAIT, "/bin/chmod", ["chmod", "-R", "u+rwX", self.path])
            os.spawnv(os.P_WAIT, "/bin/rm", ["rm", "-rf", self.path])


def remove_tree(path: str) -> None:
    """shutil.rmtree for a folder that no one changes meanwhile: importing shutil would make forks dearer."""
    for folder, folders, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        for name in folders:
            place = os.path.join(folder, name)
            (os.unlink if os.path.islink(place) else os.rmdir)(place)
    os.rmdir(path)


def child(
    job: Job, setup: Setup | None, scratch: Scratch, files: list[int], channel: tuple[int, int]
) -> NoReturn:
    """Contain this freshly forked process; run the job, or fork for it and wait for the next one."""
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for target, source in enumerate(files):
            os.dup2(source, target)
        ruleset = scratch.ruleset
        if ruleset is not None:
            ruleset = os.dup2(ruleset, RESULT_FD + 1)
        keep_only(RESULT_FD + (2 if ruleset is not None else 1), (JOBS_FD, *channel))
        os.chdir(scratch.path)
        scratch.containment.enter(ruleset)
        state = shared_state()
        while job.more and os.fork():
            job = after_a_fork(*channel, state)
        if job.more:
            os.setsid()  # as it is in a process that runs its only program
        data = marshal.loads(read_exactly(JOBS_FD, job.length))  # from the trusted side
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # its own: flags and locks would stay with a shared one
        os.closerange(RESULT_FD + 1, 1 << 16)
        scratch.containment.enter_program()
        os.write(RESULT_FD, STARTED)
    except BaseException as error:
        text = describe(error)
        attempt(lambda: os.write(2, text.encode()))
        os._exit(SETUP_FAILED)
    try:
        gc.enable()
        getattr(Run(data, setup), data["action"])()
    except BaseException as error:
        text = describe(error)
        attempt(lambda: report({"fatal": text}))
        os._exit(1)
    flush()
    os._exit(0)


def shared_state() -> list[tuple[int, int, int, int]]:
    """Of the pipes, which the programs of this process share beside the folder: flags, mode and owner."""
    infos = [(libc.fcntl(fd, F_GETFL, 0), os.fstat(fd)) for fd in range(1, RESULT_FD + 1)]
    return [(flags, info.st_mode, info.st_uid, info.st_gid) for flags, info in infos]


def after_a_fork(heard: int, order: int, state: list[tuple[int, int, int, int]]) -> Job:
    """Wait for the end of the program that this process forked, say how it ended, and be told the next."""
    _, status, used = os.wait4(-1, 0)
    os.write(heard, ENDED.pack(shared_state() == state, status, used.ru_utime + used.ru_stime))
    more, length = ORDER.unpack(read_exactly(order, ORDER.size))
    return Job(length, more)


def keep_only(first: int, kept: Iterable[int]) -> None:
    """Close all descriptors from `first` on but these."""
    for fd in sorted(fd for fd in kept if fd >= first):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 1 << 16)


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
    # An honest randomised solution gets the same verdict every time.
    importlib.import_module("random").seed(0)
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


class Server:
    """Takes messages from the trusted side, one after the other, and answers the jobs."""

    def __init__(self, scratch: Scratch, output: Output, hosting: bool, null: int, out: int) -> None:
        self.scratch, self.output, self.hosting = scratch, output, hosting
        self.null, self.out = null, out
        self.setups: dict[int, Setup | None] = {}
        self.cell: Cell | None = None

    def serve(self) -> None:
        """Until descriptor JOBS_FD closes, or a job was not read: only a new interpreter is in step again."""
        while True:
            try:
                kind, number, length = MESSAGE.unpack(read_exactly(JOBS_FD, MESSAGE.size))
            except EOFError:
                return
            if kind == SETUP:
                self.setups[number] = prepare_setup(read_exactly(JOBS_FD, length))
            elif kind == END:
                self.close_cell()
            elif not self.run(number, Job(length, kind == MORE and self.hosting)):
                return

    def run(self, number: int, job: Job) -> bool:
        """Run a job and answer; False when no process began with it."""
        started = time.monotonic()
        if self.cell is not None and not (self.cell.number == number and self.cell.go_on(job)):
            self.close_cell()
        self.output.clear()
        if self.cell is None:
            self.cell = Cell(self.scratch, self.output, number)
            self.cell.start(job, self.setups.get(number), self.null)
        seen = self.cell.watch()
        seconds = time.monotonic() - started
        if not seen.clean:
            self.close_cell()
        told = {"why": seen.why, "exit_code": seen.exit_code, "seconds": seconds, "cpu_s": seen.cpu_s}
        answer(self.out, told, self.output)
        return self.output.lengths[RESULT] > 0 and self.output.parts[RESULT][0] == STARTED[0]

    def close_cell(self) -> None:
        if self.cell is not None:
            self.cell.close()
        self.cell = None


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
    os.dup2(0, JOBS_FD)  # out of the way of a program's own descriptors
    answer(out, {"layers": layers})
    hosting = not cfg["processes"] and all(layers[name] is True for name in HOSTING)
    Server(scratch, output, hosting, null, out).serve()


if __name__ == "__main__":
    main()
