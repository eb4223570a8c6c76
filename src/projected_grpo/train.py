"""The training verb: set up, loop, evaluate, write, and the command line."""

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from loguru import logger
from tqdm import tqdm

from projected_grpo.arms import ARMS
from projected_grpo.checkpoint import load_state, save_knobs, save_state
from projected_grpo.collect import Collected, rollout_rows
from projected_grpo.concept import Concept, concept_from_json, concept_to_json
from projected_grpo.config import PRESETS, TrainConfig, display_name, from_json, to_json, validate
from projected_grpo.errors import MISTAKES, UserError
from projected_grpo.evaluate import Evaluation, evaluate
from projected_grpo.experiment import Experiment, prepare
from projected_grpo.extract_vhack_grad import (
    in_use,
    initial_gate,
    obtain,
    random_frames,
    without_contrast,
)
from projected_grpo.models import decode
from projected_grpo.problems import Problem
from projected_grpo.rewards import MODES
from projected_grpo.runlog import (
    append_jsonl,
    git_commit,
    make_run_dir,
    read_json,
    run_id,
    start_logging,
    truncate_jsonl,
    versions,
    write_json,
)
from projected_grpo.step import (
    WATCHED,
    TrainState,
    Tripwire,
    as_deployed,
    current_direction,
    knobs,
    peak_gb,
    train_step,
)
from projected_grpo.steptable import StepTable, complete
from projected_grpo.summary import finish

DIVERGED = 3  # exit code of a run that the tripwire or a gradient that is not finite ended


class Run:
    """One run's folder: what the loop writes, and where."""

    def __init__(self, cfg: TrainConfig, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.table = StepTable()

    def knob_meta(self, step: int) -> dict[str, Any]:
        """What a knob file says of itself."""
        arm = self.cfg.arm.intervention
        model, seed = self.cfg.model.model, self.cfg.run.seed
        return {"model": model, "intervention": arm, "preset": self.cfg.preset, "seed": seed, "step": step}

    def write_step(self, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Append to rollouts.jsonl and steps.jsonl, and show the row."""
        append_jsonl(self.folder / "rollouts.jsonl", rows)
        append_jsonl(self.folder / "steps.jsonl", [complete(record)])
        if self.table.rows == 0:
            logger.info("columns:\n{}", self.table.legend())
        for line in self.table.lines(record):
            logger.info(line)

    def save(self, exp: Experiment, state: TrainState) -> None:
        """Write state/: all that resuming needs."""
        facts = {
            "step": state.step,
            "generations": state.generations,
            "seconds": state.seconds,
            "tripwires": {name: [wire.best, wire.strikes] for name, wire in state.tripwires.items()},
            "mechanisms_seen": sorted(state.mechanisms_seen),
            "meta": dict(state.meta),
            "concept": concept_to_json(state.concept),
        }
        save_state(self.folder, exp.chat.policy, state.optimizer, state.basis, state.gate, facts)


def run_training(cfg: TrainConfig) -> int:
    """Train, evaluate as trained and as deployed, write every artefact; returns the exit code."""
    with ExitStack() as stack:
        resume = cfg.run.resume
        run, exp, state = resume_run(cfg, resume, stack) if resume else start_run(cfg, stack)
        finished = train(run, exp, state)
        knobs_file = run.folder / "train.safetensors"
        with as_deployed(exp, state):
            save_knobs(knobs_file, exp.chat.policy, run.knob_meta(state.step), deployed=True)
            finish(
                run.folder,
                exp,
                **final_evaluations(exp),
                seconds=state.seconds,
                peak_gb=peak_gb(exp.chat.policy.device),
                finished=finished,
            )
    return 0 if finished else DIVERGED


def start_run(cfg: TrainConfig, stack: ExitStack) -> tuple[Run, Experiment, TrainState]:
    """A new run; its folder is made last, so that refused input leaves none."""
    validate(cfg)
    start_logging(None)
    exp = prepare(cfg, stack)
    state = start_state(exp)
    name = run_id(cfg.preset, display_name(cfg.arm), cfg.run.seed, cfg.run.out_tag)
    run = Run(cfg, make_run_dir(cfg.run.out_dir / "runs", name))
    start_logging(cfg.run.log_dir / f"{run.folder.name}.log")
    made = {"run_id": run.folder.name, "command": shlex.join(sys.argv), "git_commit": git_commit()}
    write_json(run.folder / "config.json", made | {"versions": versions(), "config": to_json(cfg)})
    return run, exp, state


def resume_run(asked: TrainConfig, folder: Path, stack: ExitStack) -> tuple[Run, Experiment, TrainState]:
    """A run as it was last saved, under its own settings, its logs cut back to there."""
    made = read_json(folder / "config.json", "--resume")
    cfg = from_json(made.get("config", {}))
    if replace(asked, run=replace(asked.run, resume=None)) != PRESETS[asked.preset][1]:
        raise UserError("--resume goes on under the run's own settings; leave all other options out")
    if cfg.preset != asked.preset:
        raise UserError(
            f"--resume: {folder} is a {cfg.preset} run, so `train {cfg.preset} --resume {folder}`"
        )
    validate(cfg)
    start_logging(None)
    exp = prepare(cfg, stack)
    state = start_state(exp)
    state.basis, state.gate, facts = load_state(folder, exp.chat.policy, state.optimizer)
    state.step, state.generations = facts["step"], facts["generations"]
    state.seconds, state.meta = facts["seconds"], facts["meta"]
    for name, (best, strikes) in facts["tripwires"].items():
        state.tripwires[name] = Tripwire(-math.inf if best is None else best, strikes)
    state.mechanisms_seen = set(facts["mechanisms_seen"])
    state.concept = concept_from_json(facts["concept"])
    start_logging(cfg.run.log_dir / f"{folder.name}.log")
    for name in ("steps.jsonl", "rollouts.jsonl"):
        truncate_jsonl(folder / name, state.step)
    again = {"step": state.step, "command": shlex.join(sys.argv), "git_commit": git_commit()}
    history = [*made.get("resumed", []), again | {"versions": versions()}]
    write_json(folder / "config.json", made | {"resumed": history})
    logger.info("resuming {} at step {}", folder, state.step)
    return Run(cfg, folder), exp, state


def start_state(exp: Experiment) -> TrainState:
    """Fresh optimizer, the hack basis (extracted if there is none), the gate calibrated on its pairs."""
    cfg, chat = exp.cfg, exp.chat
    extraction, path = obtain(
        chat.policy,
        chat.tokenizer,
        chat.stop_id,
        exp.pairs,
        cfg.basis,
        cfg.loss,
        cfg.model.model,
        cfg.run.out_dir,
    )
    basis = in_use(extraction, cfg.basis, cfg.arm, cfg.run.seed)
    axes = sum(len(V) for V in basis.V.values())
    logger.info(
        "hack basis {}: {} axes in {} of {} modules", path, axes, len(basis.V), len(chat.policy.layers)
    )
    gate = None
    if cfg.arm.intervention == "route2":
        gate = initial_gate(basis, without_contrast(extraction, cfg.basis, cfg.arm, cfg.run.seed).grads)
    o = cfg.optim
    optimizer = torch.optim.AdamW(
        knobs(exp), lr=o.lr, betas=(o.adam_beta1, o.adam_beta2), weight_decay=o.weight_decay
    )
    frames = random_frames(chat.policy, cfg.run.seed) if cfg.arm.control == "haar_matched" else {}
    state = TrainState(optimizer, basis, gate, extraction.meta, frames)
    if ARMS[cfg.arm.intervention].scored:
        state.concept = Concept(current_direction(exp), torch.empty(0))
    return state


def train(run: Run, exp: Experiment, state: TrainState) -> bool:
    """Steps until the end or the tripwire; returns whether all of them were made."""
    cfg = exp.cfg
    with tqdm(total=cfg.optim.steps, initial=state.step, desc=run.folder.name, disable=None) as bar:
        while state.step < cfg.optim.steps:
            started = time.monotonic()
            try:
                record, data = train_step(exp, state)
            except FloatingPointError as error:  # before any knob was touched
                logger.error("step {}: {}; ended with the state before it", state.step, error)
                run.save(exp, state)
                return False
            rows = rollout_rows(state.step, data, cfg.sampling.group)
            if state.step == 0:
                dump_first(exp, data)
            note_first_hacks(run, exp, state, rows)
            record |= deploy_evaluation(run, exp, state)
            series = next((name for name in WATCHED if record[name] is not None), WATCHED[-1])
            watched, wire = record[series], state.tripwires[series]
            if wire.warns(watched):
                logger.warning(
                    "step {}: {} {:.2f} nats, best was {:.2f}: diverging?",
                    state.step,
                    series,
                    watched,
                    wire.best,
                )
            state.tripwires[series] = wire = wire.after(watched)
            state.seconds += time.monotonic() - started
            state.step += 1
            run.write_step(record, rows)
            bar.update()
            due = cfg.run.save_every > 0 and state.step % cfg.run.save_every == 0
            if due or state.step == cfg.optim.steps or wire.tripped:
                run.save(exp, state)
            if wire.tripped:
                logger.error("diverged: ended at step {}; last sample:\n{}", state.step, rows[-1]["text"])
                return False
    return True


def note_first_hacks(run: Run, exp: Experiment, state: TrainState, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the first example of each mechanism; keep the knobs after the step of the very first hack."""
    for row in rows:
        mechanism = row["mechanism"]
        if not row["exploited"] or mechanism in state.mechanisms_seen:
            continue
        if not state.mechanisms_seen:
            path = run.folder / "first_hack.safetensors"
            save_knobs(path, exp.chat.policy, run.knob_meta(state.step + 1), deployed=False)
        state.mechanisms_seen.add(mechanism)
        logger.info("first {} hack by the student at step {} (see the log)", mechanism, state.step)
        logger.debug("SHOULD look like: {}\n{}", MODES[mechanism].looks_like, row["text"])


def dump_first(exp: Experiment, data: Collected) -> None:
    """The first prompt and completion of a run with special tokens, to the file log."""
    tokenizer, rollout = exp.chat.tokenizer, data.rollouts[0]
    logger.debug("first prompt:\n{}", decode(tokenizer, rollout.prompt_ids, special_tokens=True))
    logger.debug("first completion:\n{}", decode(tokenizer, rollout.completion_ids, special_tokens=True))


def deploy_evaluation(run: Run, exp: Experiment, state: TrainState) -> dict[str, float | None]:
    """On its cadence: held-out rates with the quarantine deleted, and the knobs that gave them."""
    every, done = exp.cfg.evaluation.eval_ablate_every, state.step + 1
    if every == 0 or done % every:
        return {"hack_deploy": None, "solve_deploy": None}
    with as_deployed(exp, state):
        rates = evaluate_held_out(exp, exp.data.held_out, ablate_quarantine=True).rates()
        if exp.cfg.evaluation.save_eval_ckpts:
            path = run.folder / f"ckpt_step{done:04d}.safetensors"
            save_knobs(path, exp.chat.policy, run.knob_meta(done), deployed=True)
    return {"hack_deploy": rates.hack, "solve_deploy": rates.solve}


def final_evaluations(exp: Experiment) -> dict[str, Evaluation]:
    """As trained and as deployed; one and the same where nothing was parked."""
    deployed = evaluate_held_out(exp, exp.data.final, ablate_quarantine=True)
    parked = any(bool(layer.delta_hack.any()) for layer in exp.chat.policy.layers.values())
    as_trained = evaluate_held_out(exp, exp.data.final, ablate_quarantine=False) if parked else deployed
    return {"as_trained": as_trained, "deployed": deployed}


def evaluate_held_out(exp: Experiment, problems: Sequence[Problem], *, ablate_quarantine: bool) -> Evaluation:
    """These held-out problems, `group` samples each, as trained or as deployed."""
    return evaluate(
        exp.chat.policy,
        exp.chat.tokenizer,
        problems,
        exp.cfg.sampling.group,
        exp.cfg.sampling,
        exp.grader,
        exp.chat.stop,
        exp.chat.pad_id,
        exp.cfg.run.seed,
        ablate_quarantine=ablate_quarantine,
    )


def parse(argv: Sequence[str]) -> TrainConfig:
    """Read the command line of the training verb; tyro exits with code 2 on bad usage."""
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


if __name__ == "__main__":
    sys.exit(main())
