"""The training verb: its loop, evaluations, files and command line."""

import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import tyro
from loguru import logger
from tqdm import tqdm

from projected_grpo.collect import Collected, rollout_rows
from projected_grpo.config import MAX_SEQUENCE, PRESETS, TrainConfig, display_name
from projected_grpo.engine.models import decode
from projected_grpo.errors import DIVERGED, LOST, MISTAKES, SIGNALLED, UNSAVED, RankLost, UserError
from projected_grpo.evaluate import Evaluation, evaluate
from projected_grpo.experiment import Experiment
from projected_grpo.problems import Problem
from projected_grpo.ranks import Ranks, join_ranks, odd_one
from projected_grpo.record import peak_gb
from projected_grpo.rewards import MODES
from projected_grpo.run.checkpoint import save_adapter, state_paths
from projected_grpo.run.folder import Run
from projected_grpo.run.resume import AUTO, ended, newest_run, open_run, read_settings
from projected_grpo.run.summary import finish
from projected_grpo.runlog import start_logging
from projected_grpo.state import WATCHED, TrainState
from projected_grpo.step import adapter_digest, as_deployed, train_step

ECHO_S = 5.0  # in which launchers pass a signal on


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a wish to stop after this step; a second ends the process.

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
        if now - self._since >= self.echo_s:
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)
            if now > self._since:
                signal.raise_signal(number)


def run_training(cfg: TrainConfig) -> int:
    """Train, evaluate as trained and as deployed, write every artefact; returns the exit code."""
    folder = cfg.run.resume
    begun = (
        cfg if folder is None or folder == AUTO else read_settings(folder)
    )  # auto: under the same settings
    ranks = join_ranks(begun.model.device)
    with ExitStack() as stack:
        if folder == AUTO:
            folder, finished = to_go_on_with(cfg, ranks)
            if finished is not None:
                return 0 if finished else DIVERGED
        run, exp, state = open_run(cfg, folder, ranks, stack)
        try:
            return to_the_end(run, exp, state)
        except RankLost as error:
            logger.error("ended at step {}: {}", state.step, error)
            if state_paths(run.folder):
                logger.error("go on from what was saved: train {} --resume {}", run.cfg.preset, run.folder)
            return LOST


def to_the_end(run: Run, exp: Experiment, state: TrainState) -> int:
    """Train, and write the results if that was not cut short; returns the exit code."""
    with StopSignal(ECHO_S if exp.ranks.size > 1 else 0.0) as stop:
        code = train(run, exp, state, stop)
    if code not in (0, DIVERGED):
        logger.info("go on with: train {} --resume {}", run.cfg.preset, run.folder)
        return code
    try:
        conclude(run, exp, state, finished=code == 0)
    except OSError as error:
        logger.error("results not written ({}); --resume writes them again", error)
        return UNSAVED
    return code


def to_go_on_with(cfg: TrainConfig, ranks: Ranks) -> tuple[Path | None, bool | None]:
    """For --resume=auto: the run to go on with, if there is one, and whether it finished, if it has ended."""
    folder = finished = None
    if ranks.first:
        start_logging(None)
        folder = newest_run(cfg)
        finished = None if folder is None else ended(folder)
        if finished is not None:
            logger.info("{} has {}", folder, "finished" if finished else "ended before its last step")
    return ranks.from_first((folder, finished))


def conclude(run: Run, exp: Experiment, state: TrainState, *, finished: bool) -> None:
    """The deployed adapter parameters, the last evaluations, the summary."""
    with as_deployed(exp, state):
        if run.writes:
            adapter = run.folder / "train.safetensors"
            save_adapter(adapter, exp.chat.policy, run.adapter_meta(state.step), deployed=True)
        evaluations = final_evaluations(exp)
        if run.writes:
            finish(
                run.folder,
                exp,
                **evaluations,
                seconds=state.seconds,
                peak_gb=peak_gb(exp.chat.policy.devices),
                finished=finished,
            )
    exp.ranks.gather(None)  # torchrun ends all when one has left with an error: none leaves before the writer


def train(run: Run, exp: Experiment, state: TrainState, stop: StopSignal) -> int:
    """Steps until the end, divergence or a signal; returns the exit code.

    A save that failed is tried again after every further step.
    """
    cfg = exp.cfg
    what = f"{display_name(cfg.arm)} seed {cfg.run.seed}"  # short: a bar that is too long loses its ETA
    steps = cfg.optim.steps
    hidden = None if run.writes else True  # None: where there is no terminal
    with tqdm(total=steps, initial=state.step, desc=what, disable=hidden, dynamic_ncols=True) as bar:
        while state.step < steps:
            try:
                diverged = one_step(run, exp, state)
            except UserError:  # a rollout too large for memory, say: what was trained is kept
                run.save(exp, state)
                raise
            except FloatingPointError as error:  # before any adapter parameter was touched
                logger.error("step {}: {}; ended with the state before it", state.step, error)
                run.save(exp, state)
                return UNSAVED if any(exp.ranks.gather(run.unsaved)) else DIVERGED
            bar.update()
            signalled = agreed(exp, stop)
            due = cfg.run.save_every > 0 and state.step % cfg.run.save_every == 0
            last = state.step == steps
            ending = last or diverged or signalled is not None
            if due or ending or run.unsaved:
                run.save(exp, state)
            if ending and any(exp.ranks.gather(run.unsaved)):
                return UNSAVED
            if diverged:
                return DIVERGED
            if ending and signalled is not None:
                logger.info("stopped by {} after step {}", signal.Signals(signalled).name, state.step - 1)
                return SIGNALLED + signalled
    return 0


def agreed(exp: Experiment, stop: StopSignal) -> int | None:
    """The signal that reached any process of the run, the same answer in all.

    Raises RankLost if they do not hold the same adapter parameters any more.
    """
    if exp.ranks.size == 1:
        return stop.received
    received, digests = zip(*exp.ranks.gather((stop.received, adapter_digest(exp))), strict=True)
    rank = odd_one(digests)
    if rank is not None:
        raise RankLost(
            f"process {rank} no longer holds the adapter of process 0 (their hardware must be alike)"
        )
    return next((number for number in received if number is not None), None)


def one_step(run: Run, exp: Experiment, state: TrainState) -> bool:
    """A step with its evaluation and its lines in the files; returns whether the run must end."""
    cfg, started = exp.cfg, time.monotonic()
    record, data = train_step(exp, state)
    rows = rollout_rows(state.step, data, cfg.sampling.group)
    if state.step == 0:
        dump_first(exp, data)
    note_first_hacks(run, exp, state, rows)
    record |= deploy_evaluation(run, exp, state)
    series = next((name for name in WATCHED if record[name] is not None), WATCHED[-1])
    watched, wire = record[series], state.tripwires[series]
    if wire.warns(watched):
        logger.warning(
            "step {}: {} {:.2f} nats, best was {:.2f}: diverging?", state.step, series, watched, wire.best
        )
    state.tripwires[series] = wire = wire.after(watched)
    if record["skipped"]:
        state.skipped_in_a_row += 1
    elif record.get("gn") is not None:  # a step without reward variance proves nothing
        state.skipped_in_a_row = 0
    state.seconds += time.monotonic() - started
    state.step += 1
    run.write_step(record, rows)
    if wire.tripped:
        logger.error("diverged: ended at step {}; last sample:\n{}", state.step, rows[-1]["text"])
    hopeless = state.skipped_in_a_row >= cfg.run.max_skipped
    if hopeless:
        logger.error("{} steps in a row skipped: ended at step {}", state.skipped_in_a_row, state.step)
    return wire.tripped or hopeless


def note_first_hacks(run: Run, exp: Experiment, state: TrainState, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the first example of each mechanism; keep the adapter after the step of the very first hack."""
    for row in rows:
        mechanism = row["mechanism"]
        if not row["exploited"] or mechanism in state.mechanisms_seen:
            continue
        if not state.mechanisms_seen:
            run.keep_adapter("first_hack.safetensors", exp, run.adapter_meta(state.step + 1), deployed=False)
        state.mechanisms_seen.add(mechanism)
        logger.info("first {} hack by the student at step {} (see the log)", mechanism, state.step)
        logger.debug("SHOULD look like: {}\n{}", MODES[mechanism].looks_like, row["text"])


def dump_first(exp: Experiment, data: Collected) -> None:
    """The first prompt and completion of a run with special tokens, to the file log."""
    tokenizer, rollout = exp.chat.tokenizer, data.rollouts[0]
    logger.debug("first prompt:\n{}", decode(tokenizer, rollout.prompt_ids, special_tokens=True))
    logger.debug("first completion:\n{}", decode(tokenizer, rollout.completion_ids, special_tokens=True))


def deploy_evaluation(run: Run, exp: Experiment, state: TrainState) -> dict[str, float | None]:
    """On its cadence: held-out rates of what would be deployed now, and the adapter that gave them.

    best.safetensors holds those with the highest solve - hack so far.
    """
    every, step = exp.cfg.evaluation.eval_ablate_every, state.step + 1
    if every == 0 or step % every:
        return {"hack_deploy": None, "solve_deploy": None}
    with as_deployed(exp, state):
        rates = evaluate_held_out(exp, exp.data.held_out, ablate_quarantine=True).rates()
        found = {"hack_deploy": rates.hack, "solve_deploy": rates.solve}
        meta = run.adapter_meta(step)
        if exp.cfg.evaluation.save_eval_ckpts:
            run.keep_adapter(f"ckpt_step{step:04d}.safetensors", exp, meta, deployed=True)
        if rates.hack is not None and rates.solve is not None:
            score = rates.solve - rates.hack
            better = state.best is None or score > state.best
            if better and run.keep_adapter("best.safetensors", exp, meta | found, deployed=True):
                state.best = score
    return found


def final_evaluations(exp: Experiment) -> dict[str, Evaluation]:
    """As trained and as deployed; one and the same where nothing was routed."""
    deployed = evaluate_held_out(exp, exp.data.final, ablate_quarantine=True)
    routed = exp.chat.policy.quarantine_used
    as_trained = evaluate_held_out(exp, exp.data.final, ablate_quarantine=False) if routed else deployed
    return {"as_trained": as_trained, "deployed": deployed}


def evaluate_held_out(exp: Experiment, problems: Sequence[Problem], *, ablate_quarantine: bool) -> Evaluation:
    """These held-out problems, `group` samples each, as trained or as deployed; a share in each process."""
    own = exp.ranks.share([1] * len(problems))
    part = evaluate(
        exp.chat.policy,
        exp.chat.tokenizer,
        problems[own.start : own.stop],
        exp.cfg.sampling.group,
        exp.cfg.sampling,
        exp.grader,
        exp.chat.stop,
        exp.chat.pad_id,
        exp.cfg.run.seed,
        ablate_quarantine=ablate_quarantine,
        sampler=exp.chat.sampler,
        tokens_at_once=exp.cfg.sampling.rows_per_batch * MAX_SEQUENCE,
    )
    parts = exp.ranks.gather((part.texts, part.grades))
    return Evaluation(
        tuple(problems),
        tuple(group for texts, _ in parts for group in texts),
        tuple(group for _, grades in parts for group in grades),
    )


def parse(argv: Sequence[str]) -> TrainConfig:
    """Read the command line of the training verb; tyro exits with code 2 on bad usage."""
    return _parsed(tuple(argv))


@lru_cache(512)  # tyro takes a fifth of a second, and a study's plan is a hundred command lines
def _parsed(argv: tuple[str, ...]) -> TrainConfig:
    return tyro.extras.overridable_config_cli(
        dict(PRESETS),
        prog="projected-grpo train",
        description="Train one arm. The hack basis is extracted first if it is not there.",
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m projected_grpo.train PRESET ...`; a user's mistake is one line and exit code 2."""
    try:
        return run_training(parse(sys.argv[1:] if argv is None else argv))
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST


if __name__ == "__main__":
    gc.freeze()  # what is imported by now stays: collections, and the end of the process, need not walk it
    sys.exit(main())
