"""A run's folder: what is written to it, and its saved states."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from loguru import logger

from projected_grpo.concept import concept_to_json
from projected_grpo.config import TrainConfig
from projected_grpo.engine.cost import FIRST_STEPS, duration
from projected_grpo.engine.template import template_date
from projected_grpo.experiment import Data, Experiment
from projected_grpo.run.checkpoint import save_adapter, save_state, state_path, state_paths
from projected_grpo.run.columns import StepTable, complete
from projected_grpo.run.identity import chosen
from projected_grpo.run.live import LiveView
from projected_grpo.runlog import JsonlLog
from projected_grpo.sandbox.oracle import as_assert
from projected_grpo.state import TrainState

TELL_EVERY = 10  # steps between two words on the time that is left, which a terminal's bar shows all along
KEPT_STATES = 2  # the newest ones: should the last be damaged, the one before it is used


class Run:
    """One run's folder: what the loop writes, and where. Of a run's processes, only one `writes`."""

    def __init__(self, cfg: TrainConfig, folder: Path, *, writes: bool = True) -> None:
        self.cfg, self.folder, self.writes = cfg, folder, writes
        self.table = StepTable()
        names = ("rollouts", *(("tokens",) if cfg.run.keep_token_scores else ()), "steps")
        self.logs = {name: JsonlLog(folder / f"{name}.jsonl") for name in names}
        self.unsaved = False  # the last save failed
        self.live: LiveView | None = None  # the view that --live asks for
        self.ends: list[float] = []  # of the steps that this process made, on the clock [s]

    def adapter_meta(self, step: int) -> dict[str, Any]:
        """What an adapter file says of itself."""
        arm = self.cfg.arm.intervention
        model, seed = self.cfg.model.model, self.cfg.run.seed
        return {"model": model, "intervention": arm, "preset": self.cfg.preset, "seed": seed, "step": step}

    def write_step(
        self,
        record: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        tokens: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Append to the run's logs, and show the row."""
        if not self.writes:
            return
        lines = {"rollouts": rows, "tokens": tokens, "steps": [complete(record)]}
        for name, log in self.logs.items():
            try:
                log.append(lines[name])
            except OSError as error:
                logger.error("{} not written ({}); kept for the next save", log.path, error)
        if self.live is not None:
            self.live.add(record, rows)
        if self.table.rows == 0:
            logger.info(
                "a row a step; - is not measured, steps.jsonl has more columns:\n{}", self.table.legend()
            )
        for line in self.table.lines(record):
            logger.info(line)
        left = self.seconds_left(record["step"])
        if left and (len(self.ends) == FIRST_STEPS or (record["step"] + 1) % TELL_EVERY == 0):
            logger.info("time left to the last step: {}", duration(left))

    def seconds_left(self, step: int) -> float | None:
        """After this step, at the mean pace since the first one of this process; None before its third."""
        self.ends.append(time.monotonic())
        made = len(self.ends) - 1
        if made < FIRST_STEPS - 1:
            return None
        return (self.ends[-1] - self.ends[0]) / made * (self.cfg.optim.steps - step - 1)

    def show_live(self, view: ModuleType | None, stack: ExitStack) -> None:
        """Begin the view that --live asks for, with the steps made so far; `stack` closes it."""
        if view is not None:
            self.live = view.View(self.folder)
            stack.callback(self.live.close)

    def keep_adapter(self, name: str, exp: Experiment, meta: Mapping[str, Any], *, deployed: bool) -> bool:
        """Write an adapter file; False, said in one line, if the storage does not take it."""
        if not self.writes:
            return True
        try:
            save_adapter(self.folder / name, exp.chat.policy, meta, deployed=deployed)
        except OSError as error:
            logger.error("{} not written: {}", self.folder / name, error)
            return False
        return True

    def save(self, exp: Experiment, state: TrainState) -> None:
        """Write state/: all that resuming needs; older states than the last KEPT_STATES go.

        Where the storage does not take it, that is said in one line and remembered in `unsaved`; the last
        good state stays.
        """
        if not self.writes:
            return
        try:
            for log in self.logs.values():
                log.flush(sync=True)  # a state must not outlive the lines that it stands behind
            path = state_path(self.folder, state.step)
            facts = self.facts(state) | {"data": data_digest(exp.data)}
            save_state(path, exp.chat.policy, state.optimizer, state.basis, state.gate, facts)
            for old in state_paths(self.folder)[KEPT_STATES:]:
                old.unlink()
        except OSError as error:
            self.unsaved = True
            logger.error("step {}: not saved ({}); the last good state stays", state.step, error)
        else:
            self.unsaved = False

    def facts(self, state: TrainState) -> dict[str, Any]:
        """The part of the state that is not tensors, and what it belongs to."""
        return {
            **self.adapter_meta(state.step),
            "settings": chosen(self.cfg),
            "logs": {name: log.mark() for name, log in self.logs.items()},
            "generations": state.generations,
            "seconds": state.seconds,
            "skipped_in_a_row": state.skipped_in_a_row,
            "best": state.best,
            "tripwires": {name: [wire.best, wire.strikes] for name, wire in state.tripwires.items()},
            "mechanisms_seen": sorted(state.mechanisms_seen),
            "meta": dict(state.meta),
            "concept": concept_to_json(state.concept),
        }


def prompt_facts(exp: Experiment) -> dict[str, Any]:
    """What a run's prompts are, as its model reads them: a run goes on with the same."""
    digest = hashlib.blake2b(digest_size=8)
    for name, ids in sorted(exp.prompts.items()):
        digest.update(f"{name}\0{ids}\0".encode())
    return {"date": template_date(exp.chat.tokenizer), "digest": digest.hexdigest()}


def data_digest(data: Data) -> str:
    """Hash of what is trained and evaluated on, with the teacher's rows: a run goes on with the same."""
    digest = hashlib.blake2b(digest_size=8)
    for problem in (*data.train, *data.held_out, *data.final):
        digest.update(f"{problem.problem_id}\0{problem.env_mode}\0{problem.messages}\0".encode())
        digest.update(f"{problem.canonical}\0{problem.setup_code}\0".encode())
        digest.update("\0".join(map(as_assert, problem.calls)).encode())
    for name, rows in sorted(data.teacher.rows.items()):
        digest.update(f"{name}\0{rows}\0".encode())
    return digest.hexdigest()
