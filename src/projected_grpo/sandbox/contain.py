"""Containment: what the warm interpreter gives up once, and what every child gives up before its program.

Standard library only. Every layer is probed where it is put in place; `prepare` returns name -> True, or why
not.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import struct
import sys
from typing import Any

from projected_grpo.sandbox.encode import attempt
from projected_grpo.sandbox.seccomp import PR_SET_NO_NEW_PRIVS, Filter, libc, probe_filter

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC_PRIVATE = 1, 0x20, 0x1000, 0x44000
MS_NOSUID_NODEV, MS_NOSUID_NODEV_NOEXEC = 6, 0xE
MNT_DETACH = 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
LANDLOCK_FS_BITS = (0, 13, 14, 15, 15, 16)  # by ABI version: how many kinds of file access it governs
LANDLOCK_READ_DIR, LANDLOCK_FILE = 0xD, 0x7  # execute, read file, read dir; execute, write file, read file
# With own mounts, a program's folder is mounted on the second, inside the first.
PARENT, FOLDER = "jobs", "job"
READABLE = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36

EMPTY_CAPABILITIES = struct.pack("Ii", 0x20080522, 0), bytes(24)


class Containment:
    """What a child needs to contain itself, made before forking: after a fork every step costs more."""

    def __init__(self, cfg: dict[str, Any], layers: dict[str, Any]) -> None:
        self.uid = cfg["uid"] if layers["uid_drop"] is True else None
        self.landlock_abi = cfg["landlock_abi"] if layers["landlock"] is True else 0
        self.filter = Filter(cfg["processes"] > 0) if layers["seccomp"] is True else None
        self.processes = cfg["base_processes"] + cfg["processes"]
        memory, file, open_files = cfg["memory_mb"] << 20, cfg["file_mb"] << 20, cfg["open_files"]
        self.limits = {
            resource.RLIMIT_CPU: (cfg["cpu_s"], cfg["cpu_s"] + 1),
            resource.RLIMIT_AS: (memory, memory),
            resource.RLIMIT_FSIZE: (file, file),
            resource.RLIMIT_NOFILE: (open_files, open_files),
            resource.RLIMIT_CORE: (0, 0),
        }

    def ruleset(self, folder: str) -> int | None:
        """Descriptor of a Landlock ruleset that leaves `folder` as the only place to write; None without."""
        return landlock_ruleset(self.landlock_abi, folder) if self.landlock_abi else None

    def enter(self, ruleset: int | None) -> None:
        """All that holds for every program of this process. Limits first, then the loss of rights that
        setting them may have needed. For good.
        """
        for kind, values in self.limits.items():
            resource.setrlimit(kind, values)
        if (uid := self.uid) is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        libc.capset(*EMPTY_CAPABILITIES)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError("no_new_privs refused")
        if ruleset is not None:
            if libc.syscall(LANDLOCK_RESTRICT, ruleset, 0):
                raise OSError(ctypes.get_errno(), "landlock refused")
            os.close(ruleset)
        libc.prctl(PR_SET_DUMPABLE, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: a change of uid clears it
        if self.filter is not None:
            self.filter.install_lasting()

    def enter_program(self) -> None:
        """The rest, just before a program: no process beside it, no reach beyond it. For good."""
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: a fork clears it
        resource.setrlimit(resource.RLIMIT_NPROC, (self.processes, self.processes))
        if self.filter is not None:  # last: it refuses some of the above
            self.filter.install_for_program()


def landlock_ruleset(abi: int, folder: str) -> int:
    """Deny all files but `folder` and, to read, Python's and the system's libraries; TCP, signals.

    `folder` is the work folder itself or the parent of where it is mounted: the kernel looks through a mount.
    """
    everything = (1 << LANDLOCK_FS_BITS[min(abi, len(LANDLOCK_FS_BITS) - 1)]) - 1
    attributes = struct.pack("QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock refused")
    rules = [(path, LANDLOCK_READ_DIR) for path in (*READABLE, *sys.path)]
    rules += [(path, LANDLOCK_FILE) for path in DEVICES] + [(folder, everything)]
    for path, access in rules:
        try:
            fd = os.open(path, os.O_PATH)
        except OSError:
            continue
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= LANDLOCK_FILE
        libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    return ruleset


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


def own_files(root: str) -> str:
    """A tmpfs as work folder and in it a readable standard library without packages; returns its place."""
    mount("none", "/", "", MS_REC_PRIVATE, "")
    mount("tmpfs", root, "tmpfs", MS_NOSUID_NODEV, "size=1m,mode=0711")
    try:
        target = os.path.join(root, "lib")
        os.mkdir(target, 0o755)
        mount(os.path.dirname(os.__file__), target, "", MS_BIND, "")
        os.mkdir(jobs := os.path.join(root, PARENT), 0o711)
        os.mkdir(os.path.join(jobs, FOLDER), 0o700)
        mount("tmpfs", root, "", MS_REMOUNT | MS_RDONLY | MS_NOSUID_NODEV, "")  # nothing stays beside the job
        for folder in ("site-packages", "dist-packages"):  # may hold this project and its data
            if os.path.isdir(os.path.join(target, folder)):
                mount("tmpfs", os.path.join(target, folder), "tmpfs", MS_RDONLY, "size=4k")
    except OSError:
        libc.umount2(root.encode(), MNT_DETACH)  # programs then get plain folders in what is below
        raise
    return target


def private_mounts(root: str, layers: dict[str, Any]) -> None:
    """Own mounts, and a /proc of this namespace only; what does not work leaves no half of itself behind."""
    if layers["namespaces"] is not True:
        layers["mounts"] = layers["private_proc"] = "needs namespaces"
        return
    try:
        target = own_files(root)
    except OSError as error:
        layers["mounts"] = layers["private_proc"] = str(error)
        return
    layers["mounts"] = True
    library = os.path.dirname(os.__file__)
    sys.path[:] = [target, os.path.join(target, "lib-dynload")]
    for module in [*sys.modules.values()]:  # packages already loaded look for their submodules here too
        if hasattr(module, "__path__"):
            module.__path__ = [path.replace(library, target, 1) for path in module.__path__]
    try:
        mount("proc", "/proc", "proc", MS_NOSUID_NODEV_NOEXEC, "")
        layers["private_proc"] = True
    except OSError as error:
        layers["private_proc"] = str(error)


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
    containment = Containment({**cfg, "processes": 0}, layers)
    pid = os.fork()
    if pid == 0:
        try:
            containment.enter(containment.ruleset(cfg["root"]))
            containment.enter_program()
        except BaseException:
            os._exit(3)
        try:
            os._exit(1 if os.fork() else 0)
        except OSError:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return True if code == 2 else "the kernel does not apply it to this user"


def prepare(cfg: dict[str, Any]) -> dict[str, Any]:
    """Put the layers that last for the interpreter's life in place; returns them, name -> True or why not."""
    always = ("process_group", "rlimits", "empty_environment", "no_descriptors")
    layers: dict[str, Any] = dict.fromkeys(always, True)
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
    layers["seccomp"] = probe_filter()
    layers["process_limit"] = process_limit(cfg, layers)
    return layers
