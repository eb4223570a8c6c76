"""Forks of the test's process that find what torchrun would have set for them."""

import os
import signal
import socket
import sys
import time

HANGS = 240  # seconds after which a process counts as hanging
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def in_processes(size, work, log):
    """Do `work(rank)` in forks that find what torchrun would have set; their exit codes. They write `log`."""
    port, pids = free_port(), []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 (pytest's own is no descriptor)
                found = (rank, rank, size, size, "127.0.0.1", port)
                os.environ |= dict(zip(TORCHRUN, map(str, found), strict=True)) | {"TORCHELASTIC_RUN_ID": "t"}
                code = work(rank)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                os._exit(code)
        pids.append(pid)
    deadline, status = time.monotonic() + HANGS, dict.fromkeys(pids)
    while None in status.values() and time.monotonic() < deadline:
        for pid in (pid for pid, known in status.items() if known is None):
            found, how = os.waitpid(pid, os.WNOHANG)
            status[pid] = os.waitstatus_to_exitcode(how) if found else None
        time.sleep(0.02)
    for pid in (pid for pid, known in status.items() if known is None):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(status.values())
