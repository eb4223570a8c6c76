"""The live view in trackio's store on this machine (needs the `trackio` extra): figures and some rollouts.

All runs are in one project, by the name of their folder. trackio keeps them under TRACKIO_DIR.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import trackio

from projected_grpo.run.live import LiveView, Row, Step, figures
from projected_grpo.runlog import read_json

PROJECT = "projected_grpo"
ROLLOUTS = 16  # of a step; the page loads those of all steps
SHOWN = ("problem_id", "env_mode", "reward", "gt_correct", "exploited", "text")


class View(LiveView):
    """A run of trackio's, with a table of rollouts for each step."""

    shows_rollouts = True

    def _begin(self, folder: Path, steps: Sequence[Step]) -> None:
        """The run anew: what an earlier process logged of this folder is deleted first."""
        place = {"folder": str(folder.absolute())}
        for older in runs_so_far():
            if older.name == folder.name and place.items() <= (older.config or {}).items():
                older.delete()
        settings = read_json(folder / "config.json", "--live")["config"]
        with redirect_stdout(sys.stderr):  # trackio prints; stdout is the summary's alone
            self._run = trackio.init(
                PROJECT,
                name=folder.name,
                config=place | settings,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._write(steps)

    def _write(self, steps: Iterable[Step]) -> None:
        for record, rollouts in steps:
            values: dict[str, Any] = dict(figures(record))
            if rollouts:
                values["rollouts"] = table(rollouts)
            self._run.log(values, step=record["step"])

    def _end(self) -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()


def runs_so_far() -> list[Any]:
    """The project's runs; none before its first."""
    try:
        return list(trackio.Api().runs(PROJECT))
    except ValueError:
        return []


def table(rollouts: Sequence[Row]) -> Any:
    """Rollouts of a step, at most ROLLOUTS and evenly spaced."""
    shown = rollouts[:: -(-len(rollouts) // ROLLOUTS)]
    return trackio.Table(columns=list(SHOWN), data=[[row[name] for name in SHOWN] for row in shown])
