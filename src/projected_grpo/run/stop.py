"""Stopping a run by a signal: the step is finished and the state saved."""

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

OTHER_S = 5.0  # in which a SIGTERM that follows Ctrl-C comes of it: of the sweep that it has ended, too


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop after this step; the same again ends the process,
    and so does the other one after `OTHER_S` seconds.

    One that comes within `echo_s` seconds is the same one again: a queue manager may signal a launcher and
    its processes, and the launcher passes its own on.
    """

    def __init__(self, echo_s: float = 0.0) -> None:
        self.received: int | None = None
        self.echo_s = echo_s
        self._since = -math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handler
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            # Not through the logger, which may be in the middle of a line.
            os.write(2, b"\nstopping after this step; the same signal again ends at once, unsaved\n")
        if now - self._since >= (self.echo_s if number == self.received else OTHER_S):
            signal.signal(number, signal.SIG_DFL)
            if now > self._since:
                signal.raise_signal(number)
