"""A system-call filter for the child: what no solution needs and an attack might, refused with EPERM.

Classic BPF through prctl(2), so it needs no library (docs/grader.md says why none is used). Standard library
only. The filter is a deny list: CPython and the C library are free to use whatever else they need.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
# BPF_LD|W|ABS, BPF_JMP|JA, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_JMP|JSET|K, BPF_RET|K
LOAD, JUMP, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_IF_ANY, RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data. Of an argument the low half: ids, options, flags are 32 bits wide.
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT, SECOND_ARGUMENT_AT, THIRD_ARGUMENT_AT = 0, 4, 16, 24, 32
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO, plus the errno
X32 = 0x40000000  # x86-64's second numbering, which would be a way around the list

# Columns: x86-64, aarch64. None: that architecture does not have it.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # sockets: nothing inherited is one, and io_uring and pidfd_getfd below are the other ways to get one
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "sendto": (44, 206),
    "sendmsg": (46, 211), "bind": (49, 200), "listen": (50, 201), "socketpair": (53, 199),
    "accept4": (288, 242), "sendmmsg": (307, 269),
    # other processes and their memory
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    # namespaces, mounts, paths by handle
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # what kernel bugs are most often reached through
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "personality": (135, 92),
    "modify_ldt": (154, None),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "iopl": (172, None), "ioperm": (173, None), "acct": (163, 89),
    "quotactl": (179, 60), "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "adjtimex": (159, 171), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    # memory that no limit counts, or that outlives the program and so could carry a message to the next one
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180),
    # locks and watches: on a library's file or a device every program of every worker sees them (see FCNTL)
    "flock": (73, 32), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
    # by user or by number, so that it could slow the process that the next program is forked from
    "setpriority": (141, 140), "ioprio_set": (251, 30),
}  # fmt: skip
# Allowed towards the calling process only (their first argument is a process id).
ITSELF_ONLY: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261), "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
}  # fmt: skip
# Refused to a program that may have no process and no thread beside the first.
NEW_PROCESS: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281),
}  # fmt: skip
PRCTL = (157, 167)
# The rest of fcntl locks, sends signals to whom it names, or sets what stays with a pipe. F_DUPFD, F_GETFD,
# F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETFL without O_ASYNC.
FCNTL, FCNTL_ALLOWED, F_SETFL, O_ASYNC = (72, 25), (0, 1, 2, 3, 1030), 4, 0x2000
IOCTL, IOCTL_REFUSED = (16, 29), (0x5452, 0x8901, 0x8902)  # FIOASYNC, FIOSETOWN, SIOCSPGRP
PID_PLACE = 0x7FFFFFFF  # no process id is this large
KEPT_OPTIONS = (1, 4)  # PR_SET_PDEATHSIG, PR_SET_DUMPABLE: set by `contain`, not to be taken back
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*

libc = ctypes.CDLL(None, use_errno=True)


def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; the jumps count the instructions that are skipped."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def refuse(table: dict[str, tuple[int | None, int | None]], column: int, error: int) -> list[bytes]:
    """These system calls end here with this errno; an instruction each, as every child pays for them."""
    numbers = [number for row in table.values() if (number := row[column]) is not None]
    code = [op(JUMP_EQUAL, number, len(numbers) - i, 0) for i, number in enumerate(numbers)]
    return [*code, op(JUMP, 1), op(RETURN, REFUSE | error)]


def descriptor_rules(column: int) -> list[bytes]:
    """What fcntl and ioctl may do; both decide by their second argument."""
    no, yes = op(RETURN, REFUSE | errno.EPERM), op(RETURN, ALLOW)
    count = len(FCNTL_ALLOWED)
    fcntl = [op(JUMP_EQUAL, command, count + 3 - i, 0) for i, command in enumerate(FCNTL_ALLOWED)]
    fcntl += [op(JUMP_EQUAL, F_SETFL, 0, 2), op(LOAD, THIRD_ARGUMENT_AT), op(JUMP_IF_ANY, O_ASYNC, 0, 1)]
    count = len(IOCTL_REFUSED)
    ioctl = [op(JUMP_EQUAL, request, count - i, 0) for i, request in enumerate(IOCTL_REFUSED)]
    code = []
    for number, body in ((FCNTL, [*fcntl, no, yes]), (IOCTL, [*ioctl, yes, no])):
        code += [op(JUMP_EQUAL, number[column], 0, len(body) + 1), op(LOAD, SECOND_ARGUMENT_AT), *body]
    return code


def lasting_rules(machine: str) -> bytes:
    """What holds for every program of a contained process, and for the process itself, which forks them."""
    column, architecture = ARCHITECTURES[machine]
    no = op(RETURN, REFUSE | errno.EPERM)
    code = [op(LOAD, ARCHITECTURE_AT), op(JUMP_EQUAL, architecture, 1, 0), no, op(LOAD, NUMBER_AT)]
    if machine == "x86_64":
        code += [op(JUMP_AT_LEAST, X32, 0, 1), no]
    code += [*refuse(REFUSED, column, errno.EPERM), *descriptor_rules(column)]
    return b"".join([*code, op(RETURN, ALLOW)])


def program_rules(machine: str, pid: int, new_processes: bool) -> bytes:
    """What one program may not do beside that: reach any process but its own, this one, or start another."""
    column, _ = ARCHITECTURES[machine]
    no, yes = op(RETURN, REFUSE | errno.EPERM), op(RETURN, ALLOW)
    code = [op(LOAD, NUMBER_AT)]
    if not new_processes:
        code += refuse(NEW_PROCESS, column, errno.EAGAIN)  # what a process limit answers
    numbers = [number for row in ITSELF_ONLY.values() if (number := row[column]) is not None]
    code += [op(JUMP_EQUAL, number, len(numbers) - i, 0) for i, number in enumerate(numbers)]
    code += [op(JUMP, 5), op(LOAD, FIRST_ARGUMENT_AT)]
    code += [op(JUMP_EQUAL, 0, 2, 0), op(JUMP_EQUAL, pid, 1, 0), no, yes]
    code += [op(JUMP_EQUAL, PRCTL[column], 0, 5), op(LOAD, FIRST_ARGUMENT_AT)]
    code += [op(JUMP_EQUAL, KEPT_OPTIONS[0], 1, 0), op(JUMP_EQUAL, KEPT_OPTIONS[1], 0, 1), no, yes]
    return b"".join([*code, yes])


class Rules:
    """A filter's instructions where the kernel can read them."""

    def __init__(self, code: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(code, len(code))
        self.program = struct.pack("@HP", len(code) // 8, ctypes.addressof(self.buffer))

    def install(self) -> None:
        """Filter this process and all it may start, for good; OSError when the kernel refuses."""
        if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, self.program, 0, 0):
            raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


class Filter:
    """Both sets of rules, built before forking: a child only writes its own process id into the second."""

    def __init__(self, new_processes: bool) -> None:
        machine = os.uname().machine
        self.lasting = Rules(lasting_rules(machine))
        code = program_rules(machine, PID_PLACE, new_processes)
        self.of_program = Rules(code)
        self.place = code.index(op(JUMP_EQUAL, PID_PLACE, 1, 0)) + 4

    def install_lasting(self) -> None:
        """The rules for this process and all it forks; forking stays allowed."""
        self.lasting.install()

    def install_for_program(self) -> None:
        """The rest, for this process as it is numbered now."""
        struct.pack_into("=I", self.of_program.buffer, self.place, os.getpid())
        self.of_program.install()


def probe_filter() -> bool | str:
    """Whether a filtered process is really refused a socket and a signal to another, and still runs."""
    if os.uname().machine not in ARCHITECTURES:
        return f"no list of system calls for {os.uname().machine}"
    pid = os.fork()
    if pid == 0:
        try:
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            rules = Filter(False)
            rules.install_lasting()
            rules.install_for_program()
            refused = libc.socket(1, 1, 0) == -1 and ctypes.get_errno() == errno.EPERM
            refused = refused and libc.kill(-1, 0) == -1 and ctypes.get_errno() == errno.EPERM
            os._exit(0 if refused and libc.kill(os.getpid(), 0) == 0 else 3)
        except OSError:
            os._exit(4)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return True if code == 0 else "refused by the kernel" if code == 4 else "has no effect in this kernel"
