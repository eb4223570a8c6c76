"""A run and its folder: begun, locked, written to, saved, found again and gone on with."""

import hashlib
import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from loguru import logger

from projected_grpo.antipasto import Policy, weights_digest
from projected_grpo.arms.absorb import block_starts
from projected_grpo.arms.controls import random_frames
from projected_grpo.arms.gate import initial_gate
from projected_grpo.arms.table import ARMS
from projected_grpo.checkpoint import (
    SavedState,
    knobs_meta,
    load_knobs,
    read_state,
    restore_state,
    save_knobs,
    save_state,
    state_path,
    state_paths,
)
from projected_grpo.checks import validate
from projected_grpo.concept import Concept, concept_from_json, concept_to_json
from projected_grpo.config import PRESETS, TrainConfig, display_name, from_json, settings, to_json
from projected_grpo.errors import UserError
from projected_grpo.experiment import Data, Experiment, prepare
from projected_grpo.extract_vhack_grad import in_use, obtain, without_contrast
from projected_grpo.ranks import Ranks, odd_one
from projected_grpo.runlog import (
    JsonlLog,
    complete_lines,
    git_commit,
    lock_folder,
    log_errors,
    make_run_dir,
    read_json,
    remove_leftovers,
    run_id,
    start_logging,
    versions,
    write_json,
)
from projected_grpo.state import TrainState, Tripwire
from projected_grpo.step import current_direction, knobs
from projected_grpo.steptable import StepTable, complete
from projected_grpo.tensor_files import content_hash

AUTO = Path("auto")  # --resume=auto; a folder of that name is ./auto


class Run:
    """One run's folder: what the loop writes, and where. Of a run's processes, only one `writes`."""

    def __init__(self, cfg: TrainConfig, folder: Path, *, writes: bool = True) -> None:
        self.cfg, self.folder, self.writes = cfg, folder, writes
        self.table = StepTable()
        self.logs = {name: JsonlLog(folder / f"{name}.jsonl") for name in ("rollouts", "steps")}
        self.unsaved = False  # the last save failed
        self.live: Any = None  # the view that --live asks for

    def knob_meta(self, step: int) -> dict[str, Any]:
        """What a knob file says of itself."""
        arm = self.cfg.arm.intervention
        model, seed = self.cfg.model.model, self.cfg.run.seed
        return {"model": model, "intervention": arm, "preset": self.cfg.preset, "seed": seed, "step": step}

    def write_step(self, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Append to rollouts.jsonl and steps.jsonl, and show the row."""
        if not self.writes:
            return
        for name, lines in (("rollouts", rows), ("steps", [complete(record)])):
            try:
                self.logs[name].append(lines)
            except OSError as error:
                logger.error("{} not written ({}); kept for the next save", self.logs[name].path, error)
        if self.live is not None:
            self.live.add(record)
        if self.table.rows == 0:
            logger.info("columns:\n{}", self.table.legend())
        for line in self.table.lines(record):
            logger.info(line)

    def show_live(self, view: ModuleType | None, stack: ExitStack) -> None:
        """Begin the view that --live asks for, with the steps made so far; `stack` closes it."""
        if view is not None:
            self.live = view.LiveView(self.folder / "tb", complete_lines(self.logs["steps"].path))
            stack.callback(self.live.close)

    def keep_knobs(self, name: str, exp: Experiment, meta: Mapping[str, Any], *, deployed: bool) -> bool:
        """Write a knob file; False, said in one line, if the storage does not take it."""
        if not self.writes:
            return True
        try:
            save_knobs(self.folder / name, exp.chat.policy, meta, deployed=deployed)
        except OSError as error:
            logger.error("{} not written: {}", self.folder / name, error)
            return False
        return True

    def save(self, exp: Experiment, state: TrainState) -> None:
        """Write state/: all that resuming needs; older states beyond --keep-states go.

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
            for old in state_paths(self.folder)[self.cfg.run.keep_states :]:
                old.unlink()
        except OSError as error:
            self.unsaved = True
            logger.error("step {}: not saved ({}); the last good state stays", state.step, error)
        else:
            self.unsaved = False

    def facts(self, state: TrainState) -> dict[str, Any]:
        """The part of the state that is not tensors, and what it belongs to."""
        return {
            **self.knob_meta(state.step),
            "settings": settings_hash(self.cfg),
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


def settings_hash(cfg: TrainConfig) -> str:
    """Tells the states of one run from those of runs with other settings."""
    return hashlib.blake2b(json.dumps(settings(cfg), sort_keys=True).encode(), digest_size=8).hexdigest()


def data_digest(data: Data) -> str:
    """Hash of what is trained and evaluated on, with the teacher's rows: a run goes on with the same."""
    digest = hashlib.blake2b(digest_size=8)
    for problem in (*data.train, *data.held_out, *data.final):
        digest.update(f"{problem.problem_id}\0{problem.env_mode}\0{problem.messages}\0".encode())
        digest.update(f"{problem.canonical}\0{len(problem.calls)}\0".encode())
    for name, rows in sorted(data.teacher.rows.items()):
        digest.update(f"{name}\0{rows}\0".encode())
    return digest.hexdigest()


def live_module(cfg: TrainConfig) -> ModuleType | None:
    """The module of the view that --live asks for. Raises UserError naming a missing extra."""
    if cfg.run.live == "none":
        return None
    try:
        return importlib.import_module(f"projected_grpo.live_{cfg.run.live}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("projected_grpo"):
            raise
        raise UserError(
            f"--live {cfg.run.live} needs {error.name}: pip install 'projected_grpo[live]'"
        ) from error


def provenance(ranks: Ranks) -> dict[str, Any]:
    """What made a run, or went on with it. No environment variable is part of it."""
    command, commit = shlex.join(sys.argv), git_commit()
    return {"command": command, "processes": ranks.size, "git_commit": commit, "versions": versions()}


Opened = tuple[Run, Experiment, TrainState]


def open_run(asked: TrainConfig, folder: Path | None, ranks: Ranks, stack: ExitStack) -> Opened:
    """A new run, or the one in `folder` as it was saved.

    The first process opens it alone and fills the caches, then the others follow. Raises UserError, also
    where they do not read the same files.
    """
    if ranks.first:
        opened = resume_run(asked, folder, ranks, stack) if folder else start_run(asked, ranks, stack)
        run, exp, state = opened
        saved = state_path(run.folder, state.step)
        ranks.from_first((run.cfg, run.folder, saved if saved.exists() else None))
    else:
        log_errors(f"process {ranks.rank}")
        opened = follow_run(ranks, stack)
    if ranks.size > 1:
        check_alike(opened[1], opened[2])
    return opened


def check_alike(exp: Experiment, state: TrainState) -> None:
    """Raises UserError unless all processes of the run begin with the same."""
    rank = odd_one(exp.ranks.gather(start_digest(exp, state)))
    if rank is not None:
        raise UserError(
            f"process {rank} does not begin as process 0 does: all need the same model, problems, pairs, "
            "--out-dir and --svd-cache"
        )


def start_digest(exp: Experiment, state: TrainState) -> str:
    """Hash of what a run begins with: weights and their singular bases, data, hack basis, knobs.

    The bases are the adapters': the same weights on other hardware may have other signs of U and Vh, and rows
    of V come from the first process. A row of each tells.
    """
    tensors = {f"V/{m}": V for m, V in state.basis.V.items()}
    for m, layer in exp.chat.policy.layers.items():
        tensors |= {f"U/{m}": layer.U[:1].contiguous(), f"Vh/{m}": layer.Vh[:, :1].contiguous()}
    for m, block in exp.chat.policy.blocks.items():
        tensors |= {f"A0/{m}": block.A0, f"B0/{m}": block.B0}
    tensors |= {f"knobs/{i}": knob.detach() for i, knob in enumerate(knobs(exp))}
    meta = [weights_digest(exp.chat.policy), data_digest(exp.data), exp.pairs.digest, state.step]
    return content_hash(tensors, meta)


def follow_run(ranks: Ranks, stack: ExitStack) -> Opened:
    """The run that the first process has just opened, from the files that this one wrote."""
    named: tuple[TrainConfig, Path, Path | None] = ranks.from_first()
    cfg, folder, path = named
    exp, state = set_up(cfg, ranks, stack)
    if path is not None:
        restore(exp, state, read_state(path))
    return Run(cfg, folder, writes=False), exp, state


def set_up(cfg: TrainConfig, ranks: Ranks, stack: ExitStack) -> tuple[Experiment, TrainState]:
    """Everything as it is before the first step."""
    exp = prepare(cfg, stack, ranks)
    if cfg.optim.init_knobs is not None and cfg.optim.init_knobs.exists():
        start_from(cfg.optim.init_knobs, exp.chat.policy)  # which the basis is extracted at
    return exp, start_state(exp)


def restore(exp: Experiment, state: TrainState, saved: SavedState) -> None:
    """Put a saved state in place of a fresh one."""
    state.basis, state.gate = restore_state(saved, exp.chat.policy, state.optimizer), saved.gate
    restore_facts(state, saved)


def start_run(asked: TrainConfig, ranks: Ranks, stack: ExitStack) -> Opened:
    """A new run; its folder is made last, so that refused input leaves none."""
    cfg = replace(asked, run=replace(asked.run, resume=None))
    validate(cfg)
    view = live_module(cfg)
    start_logging(None)
    if cfg.optim.init_knobs is not None:
        knobs_meta(cfg.optim.init_knobs)  # a bad path is told before a model is loaded
    exp, state = set_up(cfg, ranks, stack)
    name = run_id(cfg.preset, display_name(cfg.arm), cfg.run.seed, cfg.run.out_tag)
    run = Run(cfg, make_run_dir(cfg.run.out_dir / "runs", name))
    lock_folder(run.folder, stack, "--out-dir")
    start_logging(cfg.run.log_dir / f"{run.folder.name}.log")
    write_json(
        run.folder / "config.json", {"run_id": run.folder.name, **provenance(ranks), "config": to_json(cfg)}
    )
    run.show_live(view, stack)
    return run, exp, state


def start_from(path: Path, policy: Policy) -> None:
    """Begin at another run's delta_s with an empty quarantine. Raises UserError for another model's."""
    load_knobs(path, policy)
    policy.give_blocks({})
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.delta_hack.zero_()
    logger.info("starting from the deployed knobs of {}", path)


def resume_run(asked: TrainConfig, folder: Path, ranks: Ranks, stack: ExitStack) -> Opened:
    """A run as it was last saved, under its own settings; the command line may say nothing else."""
    cfg = read_settings(folder)
    if asked.run.resume == AUTO:  # which has compared them
        return go_on(cfg, folder, ranks, stack)
    if replace(asked, run=replace(asked.run, resume=None)) != PRESETS[asked.preset][1]:
        raise UserError("--resume goes on under the run's own settings; leave all other options out")
    if cfg.preset != asked.preset:
        raise UserError(
            f"--resume: {folder} is a {cfg.preset} run, so `train {cfg.preset} --resume {folder}`"
        )
    return go_on(cfg, folder, ranks, stack)


def read_settings(folder: Path) -> TrainConfig:
    """The settings a run was begun with. Raises UserError if its config.json does not say."""
    made = read_json(folder / "config.json", "--resume")
    return from_json(made.get("config", {}))


def newest_run(cfg: TrainConfig) -> Path | None:
    """For --resume=auto: the newest run in --out-dir with exactly these settings that ended or was saved."""
    wanted = to_json(replace(cfg, run=replace(cfg.run, resume=None)))
    found = []
    for folder in (cfg.run.out_dir / "runs").glob(f"*_{cfg.preset}_*"):
        try:
            made = read_json(folder / "config.json", "--resume")
        except UserError as error:
            logger.warning("{}; passed over", error)
            continue
        if made.get("config") == wanted and (ended(folder) is not None or state_paths(folder)):
            found.append(folder)
    return max(found, key=age, default=None)


def age(folder: Path) -> tuple[str, int]:
    """Run folders in the order they were made: by time stamp, then by the number behind equal names."""
    attempt = re.search(r"-(\d+)$", folder.name)
    return folder.name.partition("_")[0], int(attempt.group(1)) if attempt else 1


def ended(folder: Path) -> bool | None:
    """Whether a run made all its steps; None while it has not ended."""
    path = folder / "summary.json"
    return bool(read_json(path, "--resume").get("finished")) if path.exists() else None


def go_on(cfg: TrainConfig, folder: Path, ranks: Ranks, stack: ExitStack) -> Opened:
    """Take the folder, its newest good state, and cut the logs back to there."""
    validate(cfg)
    view = live_module(cfg)
    start_logging(None)
    lock_folder(folder, stack, "--resume")
    run = Run(cfg, folder)
    saved = newest_state(run)
    exp, state = set_up(cfg, ranks, stack)
    for field in ("weights", "pairs"):
        if saved.facts.get("meta", {}).get(field) != state.meta.get(field):
            raise UserError(
                f"--resume: the {field} of {folder} have changed since; it cannot go on with others"
            )
    if saved.facts.get("data") != data_digest(exp.data):
        raise UserError(
            f"--resume: the problems or the pool of {folder} have changed since; it needs its own"
        )
    restore(exp, state, saved)
    start_logging(cfg.run.log_dir / f"{folder.name}.log")
    remove_leftovers(folder)
    if state.step < cfg.optim.steps:  # what an early end left is not this run's any more
        for name in ("summary.json", "deploy.json", "train.safetensors"):
            (folder / name).unlink(missing_ok=True)
    for later in state_paths(folder):
        if later == saved.path:
            break
        later.replace(later.with_name(later.name + ".refused"))
    for name, log in run.logs.items():
        log.cut_back(saved.facts["logs"][name])
    made = read_json(folder / "config.json", "--resume")
    again = {"step": state.step, **provenance(ranks)}
    write_json(folder / "config.json", made | {"resumed": [*made.get("resumed", []), again]})
    run.show_live(view, stack)
    logger.info("resuming {} at step {}", folder, state.step)
    return run, exp, state


def newest_state(run: Run) -> SavedState:
    """The newest state that is whole, of this run, and in step with its logs. UserError if there is none."""
    refused = []
    for path in state_paths(run.folder):
        try:
            saved = read_state(path)
            if saved.facts.get("settings") != settings_hash(run.cfg):
                raise UserError(f"{path}: of a run with other settings")
            for name, log in run.logs.items():
                log.read(saved.facts["logs"][name])
            return saved
        except (UserError, KeyError, TypeError) as error:
            refused.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            logger.warning("state refused: {}", refused[-1])
    if not refused:
        raise UserError(
            f"--resume: {run.folder} was not saved yet: no state/state_stepNNNN.safetensors in it"
        )
    raise UserError(f"--resume: no state of {run.folder} can be used: {'; '.join(refused)}")


def restore_facts(state: TrainState, saved: SavedState) -> None:
    """Put the counters back. Raises UserError if the state does not have them all."""
    try:
        facts = saved.facts
        state.step, state.generations = facts["step"], facts["generations"]
        state.seconds, state.meta = facts["seconds"], facts["meta"]
        state.skipped_in_a_row, state.best = facts["skipped_in_a_row"], facts["best"]
        for name, (best, strikes) in facts["tripwires"].items():
            state.tripwires[name] = Tripwire(-math.inf if best is None else best, strikes)
        state.mechanisms_seen = set(facts["mechanisms_seen"])
        state.concept = concept_from_json(facts["concept"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{saved.path}: written by another version ({error!r})") from error


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
    extraction = without_contrast(extraction, cfg.basis, cfg.arm, cfg.run.seed)
    basis = in_use(extraction.axes, cfg.basis, cfg.arm, cfg.run.seed)
    axes = sum(len(V) for V in basis.V.values())
    logger.info(
        "hack basis {}: {} axes in {} of {} modules", path, axes, len(basis.V), len(chat.policy.layers)
    )
    gate = initial_gate(basis, extraction.grads) if cfg.arm.intervention == "route2" else None
    chat.policy.give_blocks(block_starts(chat.policy, basis, cfg.arm, cfg.run.seed))
    o = cfg.optim
    optimizer = torch.optim.AdamW(
        knobs(exp), lr=o.lr, betas=(o.adam_beta1, o.adam_beta2), weight_decay=o.weight_decay
    )
    frames = random_frames(chat.policy, cfg.run.seed) if cfg.arm.control == "haar_matched" else {}
    state = TrainState(optimizer, basis, gate, extraction.meta, frames)
    if ARMS[cfg.arm.intervention].scored:
        state.concept = Concept(current_direction(exp), torch.empty(0))
    return state
