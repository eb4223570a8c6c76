"""The live view: a run's steps as TensorBoard event files (needs the `live` extra).

steps.jsonl stays the record; a continued run has its view written again from it, so that no step is missing
or there twice however the run was ended. A thread writes, so that no step waits for the disk, and a disk
that does not take it ends the view with one line, not the run.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loguru import logger
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from projected_grpo.run.columns import COLUMNS

VERSION = "brain.Event:2"  # of the format, as readers expect it


class LiveView:
    """Event files of one run in `folder`, beginning with the steps that were made before."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="live")
        self._failed = False
        self._submit(self._begin, folder, list(rows))

    def add(self, record: Mapping[str, Any]) -> None:
        """Have a step written; returns at once."""
        self._submit(self._write, [dict(record)])

    def close(self) -> None:
        """Wait until all is written."""
        self._submit(lambda: self._file.close())  # looked up there, where it was opened
        self._thread.shutdown()

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._thread.submit(self._attempt, function, *arguments)

    def _attempt(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            function(*arguments)
        except Exception as error:  # any error here must be reported and must not end the run
            self._failed = True
            logger.error("live view ended ({}); steps.jsonl continues, and --resume rewrites it", error)

    def _begin(self, folder: Path, rows: list[Mapping[str, Any]]) -> None:
        """A new file with all rows, then the older ones away. Readers that saw those start over at step 0."""
        folder.mkdir(exist_ok=True)
        older = list(folder.glob("*tfevents*"))
        path = folder / f"events.out.tfevents.{time.time():017.6f}"  # by name in the order they were made
        self._file = RecordWriter(str(path))
        self._event(file_version=VERSION)
        self._event(step=0, session_log=SessionLog(status=SessionLog.START))
        self._write(rows)
        for file in older:
            file.unlink()

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures(row).items()]
            self._event(step=row["step"], summary=Summary(value=values))
        self._file.flush()

    def _event(self, **fields: Any) -> None:
        self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Every column that was measured, by its tag; a [count, n] pair is its rate."""
    found = {}
    for column in COLUMNS:
        value = record.get(column.key)
        if column.form == "pair" and value is not None:
            value = value[0] / value[1] if value[1] else None
        if column.key != "step" and value is not None and math.isfinite(value):
            found[f"step/{column.key}"] = float(value)
    return found
