"""What the live views share: which figures they show, and a thread that writes.

steps.jsonl and rollouts.jsonl stay the record; a continued run has its view written again from them, so that
no step is missing or there twice however the run was ended. No step waits for a view, and one that fails
ends with one line, not the run.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loguru import logger

from projected_grpo.run.columns import COLUMNS
from projected_grpo.runlog import complete_lines

Row = Mapping[str, Any]
Step = tuple[Row, Sequence[Row]]  # a line of steps.jsonl, and the step's lines of rollouts.jsonl


class LiveView(ABC):
    """A view of the run in `folder`, beginning with the steps that were made before."""

    shows_rollouts = False

    def __init__(self, folder: Path) -> None:
        rollouts = defaultdict(list)
        for row in complete_lines(folder / "rollouts.jsonl") if self.shows_rollouts else ():
            rollouts[row["step"]].append(row)
        steps = [(row, rollouts[row["step"]]) for row in complete_lines(folder / "steps.jsonl")]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="live")
        self._failed = False
        self._attempt(self._begin, folder, steps)

    def add(self, record: Row, rollouts: Sequence[Row]) -> None:
        """Have a step written; returns at once."""
        self._thread.submit(self._attempt, self._write, [(dict(record), rollouts)])

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
        self._attempt(self._end)

    def _attempt(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            function(*arguments)
        except Exception as error:  # any error here must be reported and must not end the run
            self._failed = True
            logger.error("live view ended ({}); steps.jsonl continues, and --resume rewrites it", error)

    @abstractmethod
    def _begin(self, folder: Path, steps: Sequence[Step]) -> None:
        """A new view of the run with these steps, in place of any older one."""

    @abstractmethod
    def _write(self, steps: Iterable[Step]) -> None:
        """Add these steps."""

    @abstractmethod
    def _end(self) -> None:
        """Close what `_begin` opened."""


def figures(record: Row) -> dict[str, float]:
    """Every column that was measured, by its tag; a [count, n] pair is its rate."""
    found = {}
    for column in COLUMNS:
        value = record.get(column.key)
        if column.form == "pair" and value is not None:
            value = value[0] / value[1] if value[1] else None
        if column.key != "step" and value is not None and math.isfinite(value):
            found[f"step/{column.key}"] = float(value)
    return found
