"""A sweep of runs that take a second, and a command in a process that shares this one's imports."""

import os
import signal
import time
from contextlib import contextmanager

from fake_runs import few_pairs
from projected_grpo.cli import main

OPTIONS = """steps = {steps}
lr = 0.3
n-problems = 6
eval-n-prompts = 1
eval-ablate-every = 0
max-new = 4
workers = 1
save-every = 1
vhack-pairs-path = "pairs.json"
"""
TINY = """
name = "four"
preset = "{preset}"
[options]
{options}
[[arms]]
name = "none"
options = {{ intervention = "none" }}
why = "H4: does none hack"
resolve = "if not, stop"
[[arms]]
name = "erase"
options = {{ intervention = "erase" }}
why = "H1"
[grid]
seed = "1-2"
"""


def spec_file(folder, steps=3, more="", preset="smoke", options=OPTIONS):
    few_pairs(folder)
    path = folder / "four.toml"
    path.write_text(TINY.format(preset=preset, options=options.format(steps=steps)) + more)
    return path


@contextmanager
def in_a_fork(*words):
    """The command in a process of its own, which is spared the imports; its id. The end waits for it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
            code = main(list(words))
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code if isinstance(code, int) else 98)
    try:
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    finally:
        os.waitpid(pid, 0)


def wait(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
