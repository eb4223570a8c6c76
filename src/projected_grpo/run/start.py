"""A new run: everything as it is before the first step, and its folder."""

import importlib
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from loguru import logger

from projected_grpo.antipasto import Policy
from projected_grpo.arm_settings import Route2Settings
from projected_grpo.arms.absorb import block_starts
from projected_grpo.arms.advmod import standardised
from projected_grpo.arms.controls import random_frames
from projected_grpo.arms.gate import GateState, initial_gate, initial_score_gate
from projected_grpo.checks import validate
from projected_grpo.concept import Concept, concept_scores
from projected_grpo.config import TrainConfig, to_json
from projected_grpo.engine.cost import hardware, kind_of_device
from projected_grpo.errors import UserError
from projected_grpo.experiment import Experiment, prepare
from projected_grpo.extract_vhack_grad import in_use, obtain, pair_rollouts, without_contrast
from projected_grpo.options.paths import check_paths
from projected_grpo.proj import HackBasis, PairGrads
from projected_grpo.ranks import Ranks
from projected_grpo.run.checkpoint import load_adapter, read_adapter_meta
from projected_grpo.run.folder import Run, prompt_facts
from projected_grpo.run.identity import run_id
from projected_grpo.runlog import (
    git_commit,
    lock_folder,
    make_run_dir,
    start_logging,
    versions,
    write_atomically,
    write_json,
)
from projected_grpo.state import TrainState
from projected_grpo.step import adapter_parameters, current_direction

EXTRAS = {"tensorboard": "live", "trackio": "trackio"}  # what to install for a live view


def live_module(cfg: TrainConfig) -> ModuleType | None:
    """The module of the view that --live asks for. Raises UserError naming a missing extra."""
    if cfg.run.live == "none":
        return None
    try:
        return importlib.import_module(f"projected_grpo.run.live_{cfg.run.live}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("projected_grpo"):
            raise
        raise UserError(
            f"--live {cfg.run.live} needs {error.name}: pip install 'projected_grpo[{EXTRAS[cfg.run.live]}]'"
        ) from error


def provenance(ranks: Ranks) -> dict[str, Any]:
    """What made a run, or went on with it. No environment variable is part of it."""
    command, commit = shlex.join(sys.argv), git_commit()
    return {"command": command, "processes": ranks.size, "git_commit": commit, "versions": versions()}


Opened = tuple[Run, Experiment, TrainState]


def set_up(cfg: TrainConfig, ranks: Ranks, stack: ExitStack) -> tuple[Experiment, TrainState]:
    """Everything as it is before the first step."""
    exp = prepare(cfg, stack, ranks)
    if cfg.optim.init_adapter is not None and cfg.optim.init_adapter.exists():
        start_from(cfg.optim.init_adapter, exp.chat.policy)  # which the basis is extracted at
    return exp, start_state(exp)


def start_run(asked: TrainConfig, ranks: Ranks, stack: ExitStack) -> Opened:
    """A new run; its folder is made last, so that refused input leaves none."""
    cfg = replace(asked, run=replace(asked.run, resume=None))
    validate(cfg)
    check_paths(cfg)  # --resume=auto comes here unchecked
    view = live_module(cfg)
    start_logging(None)
    if cfg.optim.init_adapter is not None:
        read_adapter_meta(cfg.optim.init_adapter)  # a bad path is reported before a model is loaded
    exp, state = set_up(cfg, ranks, stack)
    run = Run(cfg, make_run_dir(cfg.run.out_dir / "runs", run_id(cfg)))
    lock_folder(run.folder, stack, "--out-dir")
    start_logging(cfg.run.log_dir / f"{run.folder.name}.log")
    made = {"run_id": run.folder.name, **provenance(ranks), "prompts": prompt_facts(exp)}
    made["hardware"] = hardware(kind_of_device(cfg))
    if cfg.arm.arm_file is not None:  # the run has its own, lest it change
        kept = (run.folder / "arm.py").absolute()
        write_atomically(kept, cfg.arm.arm_file.read_bytes())
        cfg = replace(cfg, arm=replace(cfg.arm, arm_file=kept))
    write_json(run.folder / "config.json", made | {"config": to_json(cfg)})
    run.show_live(view, stack)
    return run, exp, state


def start_from(path: Path, policy: Policy) -> None:
    """Begin at another run's delta_s with an empty quarantine. Raises UserError for another model's."""
    load_adapter(path, policy)
    policy.give_blocks({})
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.delta_hack.zero_()
    logger.info("starting from the deployed adapter parameters of {}", path)


def start_state(exp: Experiment) -> TrainState:
    """Fresh optimizer, the hack basis (extracted if there is none), the gate calibrated on its pairs."""
    cfg, chat = exp.cfg, exp.chat
    extraction, path = obtain(chat, exp.pairs, cfg.basis, cfg.loss, cfg.model.model, cfg.run.out_dir)
    extraction = without_contrast(extraction, cfg.basis, cfg.arm, cfg.run.seed)
    basis = in_use(extraction.axes, cfg.basis, cfg.arm, cfg.run.seed)
    axes = sum(len(V) for V in basis.V.values())
    logger.info(
        "hack basis {}: {} axes in {} of {} modules", path, axes, len(basis.V), len(chat.policy.layers)
    )
    chat.policy.give_blocks(block_starts(chat.policy, basis, cfg.arm, cfg.run.seed))
    o = cfg.optim
    optimizer = torch.optim.AdamW(
        adapter_parameters(exp), lr=o.lr, betas=(o.adam_beta1, o.adam_beta2), weight_decay=o.weight_decay
    )
    frames = random_frames(chat.policy, cfg.run.seed) if cfg.arm.control == "haar_matched" else {}
    scored = cfg.arm.scored_by is not None
    concept = Concept(current_direction(exp), torch.empty(0)) if scored else None
    gate = start_gate(exp, basis, extraction.grads, concept)
    return TrainState(optimizer, basis, gate, extraction.meta, frames, concept)


def start_gate(
    exp: Experiment, basis: HackBasis, grads: PairGrads, concept: Concept | None
) -> GateState | None:
    """route2's gate, calibrated on the pairs; None for other arms, and for an oracle, which needs none."""
    arm = exp.cfg.arm
    if not isinstance(arm, Route2Settings) or arm.gate_signal == "oracle":
        return None
    if concept is None or concept.direction is None:
        return initial_gate(basis, grads)
    rollouts, tokens = pair_rollouts(exp.chat, exp.pairs.split()[0]), exp.cfg.loss.tokens_per_microbatch
    scores = concept_scores(exp.chat.policy, rollouts, concept.direction, arm, tokens)
    return initial_score_gate(standardised(scores, None))
