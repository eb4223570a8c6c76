"""The live view as TensorBoard event files in the run's tb/ (needs the `live` extra)."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from projected_grpo.run.live import LiveView, Step, figures

VERSION = "brain.Event:2"  # of the format, as readers expect it


class View(LiveView):
    """Event files of one run."""

    def _begin(self, folder: Path, steps: Sequence[Step]) -> None:
        """A new file with all steps, then the older ones away. Readers that saw those start over."""
        folder = folder / "tb"
        folder.mkdir(exist_ok=True)
        older = list(folder.glob("*tfevents*"))
        path = folder / f"events.out.tfevents.{time.time():017.6f}"  # by name in the order they were made
        self._file = RecordWriter(str(path))
        self._event(file_version=VERSION)
        self._event(step=0, session_log=SessionLog(status=SessionLog.START))
        self._write(steps)
        for file in older:
            file.unlink()

    def _write(self, steps: Iterable[Step]) -> None:
        for row, _ in steps:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures(row).items()]
            self._event(step=row["step"], summary=Summary(value=values))
        self._file.flush()

    def _end(self) -> None:
        self._file.close()

    def _event(self, **fields: Any) -> None:
        self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())
