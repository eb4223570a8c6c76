"""The training verb: its loop, evaluations, files and command line."""

import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from projected_grpo.errors import (
    DIVERGED,
    LOST,
    SIGNALLED,
    UNSAVED,
    RankLost,
    answer,
    as_process,
    goes_on,
)

if __name__ == "__main__":
    sys.exit(as_process(["train", *sys.argv[1:]]))  # before the imports below: they take seconds

from loguru import logger
from tqdm import tqdm

from projected_grpo.antipasto import Deltas
from projected_grpo.collect import Collected, rollout_rows
from projected_grpo.config import MAX_SEQUENCE, TrainConfig
from projected_grpo.engine.models import decode
from projected_grpo.evaluate import Evaluation, Samples, evaluate
from projected_grpo.experiment import Experiment
from projected_grpo.options.train import parse
from projected_grpo.problems import Problem
from projected_grpo.ranks import Ranks, join_ranks, odd_one
from projected_grpo.record import peak_gb
from projected_grpo.rewards import MODES
from projected_grpo.run.checkpoint import save_adapter, state_paths
from projected_grpo.run.folder import Run
from projected_grpo.run.identity import arm_name
from projected_grpo.run.resume import AUTO, finished_or_none, newest_run, open_run, read_settings
from projected_grpo.run.stop import StopSignal
from projected_grpo.run.summary import finish
from projected_grpo.run.token_scores import token_rows
from projected_grpo.runlog import command_line, start_logging
from projected_grpo.state import WATCHED, TrainState
from projected_grpo.step import adapter_digest, as_deployed, train_step

MAX_SKIPPED = 3  # steps in a row without a finite gradient: the run is lost, not unlucky
ECHO_S = 5.0  # in which launchers pass a signal on


def train(cfg: TrainConfig) -> int:
    """Train, evaluate as trained and as deployed, write every file of the run; returns the exit code."""
    ranks = join_ranks(begun_with(cfg).model.device)
    folder, code = find_resumable(cfg, ranks)
    if code is not None:  # --resume=auto, and that run has ended
        return code
    with ExitStack() as stack:
        run, exp, state = open_run(cfg, folder, ranks, stack)
        try:
            with StopSignal(ECHO_S if ranks.size > 1 else 0.0) as stop, progress(run, state) as bar:
                try:
                    while code is None and state.step < exp.cfg.optim.steps:
                        sampled_at = exp.chat.policy.deltas() if exp.cfg.run.keep_token_scores else None
                        record, data = train_step(exp, state)
                        code = end_of_step(run, exp, state, stop, record, data, sampled_at)
                        bar.update()
                except FloatingPointError as error:  # before any parameter was touched
                    logger.error("step {}: {}; ended with the state before it", state.step, error)
                    run.save(exp, state)
                    code = UNSAVED if any(ranks.gather(run.unsaved)) else DIVERGED
                except RankLost:  # the processes may hold different adapters
                    raise
                except Exception:  # memory that does not suffice, say: what was trained is kept
                    if state.whole:
                        run.save(exp, state)
                    raise
            with goes_on(f"go on with: {resuming(run, exp.ranks)}"):
                return conclude(run, exp, state, code)
        except RankLost as error:
            logger.error("ended at step {}: {}", state.step, error)
            if state_paths(run.folder):
                logger.error("go on from what was saved:\n  {}", resuming(run, exp.ranks))
            return LOST


def begun_with(cfg: TrainConfig) -> TrainConfig:
    """The settings of the run that --resume names; else these, which --resume=auto looks for."""
    return cfg if cfg.run.resume in (None, AUTO) else read_settings(cfg.run.resume)


def find_resumable(cfg: TrainConfig, ranks: Ranks) -> tuple[Path | None, int | None]:
    """The run folder to continue, if any, and its exit code if it has ended (under --resume=auto)."""
    folder, code = cfg.run.resume, None
    if folder == AUTO:
        folder = None
        if ranks.first:
            start_logging(None)
            folder = newest_run(cfg)
            finished = None if folder is None else finished_or_none(folder)
            if finished is not None:
                logger.info("{} has {}", folder, "finished" if finished else "ended before its last step")
                code = 0 if finished else DIVERGED
        folder, code = ranks.from_first((folder, code))
    return folder, code


def progress(run: Run, state: TrainState) -> tqdm:
    """A bar over the steps, shown where there is a terminal, by the process that writes."""
    # Short, since a long name leaves no room for the time that is left.
    what = f"{arm_name(run.cfg)} seed {run.cfg.run.seed}"
    steps, hidden = run.cfg.optim.steps, None if run.writes else True
    return tqdm(total=steps, initial=state.step, desc=what, disable=hidden, dynamic_ncols=True)


def end_of_step(
    run: Run,
    exp: Experiment,
    state: TrainState,
    stop: StopSignal,
    record: dict[str, Any],
    data: Collected,
    sampled_at: Deltas | None,
) -> int | None:
    """Evaluate, watch, write and save; returns the exit code if the run must end here.

    With the adapter that sampled the rollouts, their tokens' scores are written, too.
    A save that failed is tried again after every further step.
    """
    started = time.monotonic()
    rows = rollout_rows(state.step, data, exp.cfg.sampling.group)
    tokens = [] if sampled_at is None else token_rows(exp, state.step, data, state.basis.v_grad, sampled_at)
    if state.step == 0:
        dump_first(exp, data)
    note_first_hacks(run, exp, state, rows)
    record |= deploy_evaluation(run, exp, state)
    reason = hopeless(exp, state, record)
    state.seconds += record["sec"] + time.monotonic() - started
    state.step += 1
    run.write_step(record, rows, tokens)
    state.whole = True
    if reason:
        sample = rows[-1]["text"] if rows else ""
        logger.error("{}: ended at step {}; last sample:\n{}", reason, state.step, sample)
    signalled = agreed(exp, stop)
    every = exp.cfg.run.save_every
    ending = reason or signalled is not None or state.step == exp.cfg.optim.steps
    if ending or run.unsaved or (every > 0 and state.step % every == 0):
        run.save(exp, state)
    if ending and any(exp.ranks.gather(run.unsaved)):
        return UNSAVED
    if reason:
        return DIVERGED
    if signalled is not None:
        logger.info("stopped by {} after step {}", signal.Signals(signalled).name, state.step - 1)
        return SIGNALLED + signalled
    return None


def hopeless(exp: Experiment, state: TrainState, record: Mapping[str, Any]) -> str:
    """Why the run must end after this step, or "". Moves the tripwires and the count of skipped steps."""
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
    if wire.tripped:
        return "diverged"
    if state.skipped_in_a_row >= MAX_SKIPPED:
        return f"{state.skipped_in_a_row} steps in a row skipped"
    return ""


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


def note_first_hacks(run: Run, exp: Experiment, state: TrainState, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the first example of each mechanism; keep the adapter after the step of the very first hack."""
    for row in rows:
        mechanism = row["mechanism"]
        if not row["exploited"] or mechanism in state.mechanisms_seen:
            continue
        if not state.mechanisms_seen:
            run.keep_adapter("first_hack.safetensors", exp, run.adapter_meta(state.step + 1), deployed=False)
        state.mechanisms_seen.add(mechanism)
        logger.info("first {} hack by the student at step {}; its text is in the log", mechanism, state.step)
        logger.debug("it should look like: {}\n{}", MODES[mechanism].looks_like, row["text"])


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


def conclude(run: Run, exp: Experiment, state: TrainState, code: int | None) -> int:
    """The results of a run that made all its steps or diverged; returns the exit code."""
    if code not in (None, DIVERGED):
        logger.info("go on with:\n  {}", resuming(run, exp.ranks))
        return code
    try:
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
                    finished=code is None,
                )
        exp.ranks.gather(
            None
        )  # torchrun ends all when one has left with an error: none leaves before the writer
    except OSError as error:
        logger.error("results not written ({}); --resume writes them again", error)
        return UNSAVED
    return code or 0


def resuming(run: Run, ranks: Ranks) -> str:
    """The command that goes on with a run, as it can be pasted."""
    words = [run.cfg.preset, f"--resume={run.folder}"]
    if ranks.size == 1:
        return command_line("train", *words)
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return shlex.join([*started, f"--nproc-per-node={ranks.size}", "-m", "projected_grpo.train", *words])


def final_evaluations(exp: Experiment) -> dict[str, Evaluation]:
    """As trained and as deployed; one and the same where the quarantine is empty."""
    deployed = evaluate_held_out(exp, exp.data.final, ablate_quarantine=True)
    if not exp.chat.policy.quarantine_used:
        return {"as_trained": deployed, "deployed": deployed}
    as_trained = evaluate_held_out(exp, exp.data.final, ablate_quarantine=False)
    return {"as_trained": as_trained, "deployed": deployed}


def evaluate_held_out(exp: Experiment, problems: Sequence[Problem], *, ablate_quarantine: bool) -> Evaluation:
    """These held-out problems, `group` samples each, as trained or as deployed; a share in each process."""
    own = exp.ranks.share([1] * len(problems))
    sampling = exp.cfg.sampling
    how = Samples(sampling, sampling.group, exp.cfg.run.seed, sampling.rows_per_batch * MAX_SEQUENCE)
    part = evaluate(
        exp.chat, exp.grader, problems[own.start : own.stop], how, ablate_quarantine=ablate_quarantine
    )
    parts = exp.ranks.gather((part.texts, part.grades))
    return Evaluation(
        tuple(problems),
        tuple(group for texts, _ in parts for group in texts),
        tuple(group for _, grades in parts for group in grades),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m projected_grpo.train PRESET ...`; a user's mistake is one line and exit code 2."""
    return answer(lambda: train(parse(sys.argv[1:] if argv is None else argv)))
