"""A run found again and resumed from its newest good state."""

import math
import re
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from loguru import logger

from projected_grpo.antipasto import weights_digest
from projected_grpo.arm_settings import digest_of
from projected_grpo.checks import validate
from projected_grpo.concept import concept_from_json
from projected_grpo.config import TrainConfig, from_json
from projected_grpo.errors import UserError
from projected_grpo.experiment import Experiment
from projected_grpo.options.paths import check_paths
from projected_grpo.options.typed import flags
from projected_grpo.ranks import Ranks, odd_one
from projected_grpo.run.checkpoint import SavedState, read_state, restore_state, state_path, state_paths
from projected_grpo.run.folder import Run, data_digest, prompt_facts
from projected_grpo.run.identity import chosen, differing, given, identity
from projected_grpo.run.start import Opened, live_module, provenance, set_up, start_run
from projected_grpo.runlog import (
    command_line,
    lock_folder,
    log_errors,
    read_json,
    remove_leftovers,
    start_logging,
    write_json,
)
from projected_grpo.state import TrainState, Tripwire
from projected_grpo.step import adapter_parameters
from projected_grpo.tensor_files import content_hash

AUTO = Path("auto")  # --resume=auto; a folder of that name is ./auto


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
    other = odd_one(ranks.gather(start_digest(opened[1], opened[2]))) if ranks.size > 1 else None
    if other is not None:
        raise UserError(
            f"process {other} does not begin as process 0 does: all need the same model, problems, pairs, "
            "--out-dir and out/svd_cache"
        )
    return opened


def start_digest(exp: Experiment, state: TrainState) -> str:
    """Hash of what a run begins with: weights and their singular bases, data, hack basis, adapter parameters.

    The bases are the adapters': the same weights on other hardware may have other signs of U and Vh, and rows
    of V come from the first process. A row of each tells.
    """
    tensors = {f"V/{m}": V for m, V in state.basis.V.items()}
    for m, layer in exp.chat.policy.layers.items():
        tensors |= {f"U/{m}": layer.U[:1].contiguous(), f"Vh/{m}": layer.Vh[:, :1].contiguous()}
    for m, block in exp.chat.policy.blocks.items():
        tensors |= {f"A0/{m}": block.A0, f"B0/{m}": block.B0}
    tensors |= {f"adapter/{i}": parameter.detach() for i, parameter in enumerate(adapter_parameters(exp))}
    data = [data_digest(exp.data), exp.pairs.digest, prompt_facts(exp)]
    meta = [weights_digest(exp.chat.policy), *data, state.step]
    return content_hash(tensors, meta)


def follow_run(ranks: Ranks, stack: ExitStack) -> Opened:
    """The run that the first process has just opened, from the files that this one wrote."""
    named: tuple[TrainConfig, Path, Path | None] = ranks.from_first()
    cfg, folder, path = named
    exp, state = set_up(cfg, ranks, stack)
    if path is not None:
        restore(exp, state, read_state(path))
    return Run(cfg, folder, writes=False), exp, state


def resume_run(asked: TrainConfig, folder: Path, ranks: Ranks, stack: ExitStack) -> Opened:
    """A run as it was last saved, under its own settings; the command line may say nothing else.

    Under --resume=auto the settings are those of the command line, which may name another place.
    """
    typed = replace(asked, run=replace(asked.run, resume=None))
    if asked.run.resume == AUTO:
        return resume(typed, folder, ranks, stack)
    cfg = read_settings(folder)
    if others := given(typed):
        told = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UserError(f"--resume goes on under the run's own settings; leave out {told}")
    if cfg.preset != asked.preset:
        raise UserError(
            f"--resume: {folder} is a {cfg.preset} run, so: "
            + command_line("train", cfg.preset, "--resume", folder)
        )
    return resume(cfg, folder, ranks, stack)


def read_settings(folder: Path) -> TrainConfig:
    """The settings a run was begun with. Raises UserError if its config.json does not say."""
    made = read_json(folder / "config.json", "--resume")
    return from_json(made.get("config", {}))


def newest_run(cfg: TrainConfig) -> Path | None:
    """For --resume=auto: the newest run in --out-dir of the same id and place that was saved or has ended."""
    found = []
    for folder in (cfg.run.out_dir / "runs").glob(f"*_{cfg.preset}_*"):
        try:
            made = read_json(folder / "config.json", "--resume")
        except UserError as error:
            logger.warning("{}; passed over", error)
            continue
        same = False
        with suppress(UserError):  # a run of another version is not the same
            there = from_json(made.get("config", {}))
            same = identity(there) == identity(cfg) and place(there) == place(cfg)
        if same and (finished_or_none(folder) is not None or state_paths(folder)):
            found.append(folder)
    return max(found, key=creation_order, default=None)


def place(cfg: TrainConfig) -> tuple[str, str, bool]:
    """Tag and device (on another device --dtype=auto may mean other weights), and which files there are."""
    return cfg.run.out_tag, cfg.model.device, cfg.run.keep_token_scores


def creation_order(folder: Path) -> tuple[str, int]:
    """Run folders in the order they were made: by time stamp, then by the number behind equal names."""
    attempt = re.search(r"-(\d+)$", folder.name)
    return folder.name.partition("_")[0], int(attempt.group(1)) if attempt else 1


def finished_or_none(folder: Path) -> bool | None:
    """Whether a run made all its steps; None while it has not ended."""
    path = folder / "summary.json"
    return bool(read_json(path, "--resume").get("finished")) if path.exists() else None


def resume(cfg: TrainConfig, folder: Path, ranks: Ranks, stack: ExitStack) -> Opened:
    """Lock the folder, restore its newest good state, and cut the logs back to it."""
    validate(cfg)
    check_paths(cfg)
    view = live_module(cfg)
    start_logging(None)
    lock_folder(folder, stack, "--resume")
    run = Run(cfg, folder)
    saved = newest_state(run)
    exp, state = set_up(cfg, ranks, stack)
    if cfg.arm.arm_file is not None and digest_of(cfg.arm.arm_file) != cfg.arm.arm_digest:
        raise UserError(f"--resume: {cfg.arm.arm_file} changed since; {folder} cannot go on with another arm")
    for field in ("weights", "pairs"):
        if saved.facts.get("meta", {}).get(field) != state.meta.get(field):
            raise UserError(f"--resume: the {field} of {folder} changed since; it cannot go on with others")
    if saved.facts.get("data") != data_digest(exp.data):
        raise UserError(
            f"--resume: the problems or the pool of {folder} have changed since; it needs its own"
        )
    made, prompts = read_json(folder / "config.json", "--resume"), prompt_facts(exp)
    if made.get("prompts", prompts) != prompts:  # runs made before this was written down go on unchecked
        raise UserError(
            f"--resume: the prompts of {folder} have changed since, though its problems have not: put the "
            f"tokenizer and chat template of {cfg.model.model} back as they were"
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
    again = {"step": state.step, **provenance(ranks)}
    resumed = {"prompts": prompts, "resumed": [*made.get("resumed", []), again]}
    write_json(folder / "config.json", made | resumed)
    run.show_live(view, stack)
    logger.info("resuming {} at step {}", folder, state.step)
    return run, exp, state


def newest_state(run: Run) -> SavedState:
    """The newest state that is whole, of this run, and in step with its logs. UserError if there is none."""
    refused = []
    for path in state_paths(run.folder):
        try:
            saved = read_state(path)
            others = differing(saved.facts["settings"], chosen(run.cfg))
            if others:
                raise UserError(f"{path}: of a run with other settings: {', '.join(others)}")
            for name, log in run.logs.items():
                log.read(saved.facts["logs"][name])
            return saved
        except (UserError, KeyError, TypeError, AttributeError) as error:
            why = str(error) if isinstance(error, UserError) else "written by another version"
            refused.append(why if str(path) in why else f"{path}: {why}")
            logger.warning("state refused: {}", refused[-1])
    if not refused:
        raise UserError(
            f"--resume: {run.folder} was not saved yet: no state/state_stepNNNN.safetensors in it. To begin "
            f"it again: {command_line('train', run.cfg.preset, *flags(given(run.cfg)))}"
        )
    raise UserError(f"--resume: no state of {run.folder} can be used: {'; '.join(refused)}")


def restore(exp: Experiment, state: TrainState, saved: SavedState) -> None:
    """Put a saved state in place of a fresh one. Raises UserError if it lacks one of the counters."""
    state.basis, state.gate = restore_state(saved, exp.chat.policy, state.optimizer), saved.gate
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
        raise UserError(f"{saved.path}: written by another version, its counters cannot be read") from error
