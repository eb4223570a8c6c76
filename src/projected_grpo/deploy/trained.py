"""A trained policy from its files: a run folder, an adapter file, or a model alone (the base policy)."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from loguru import logger

from projected_grpo.config import ModelConfig, TrainConfig, from_json
from projected_grpo.engine.chat import Chat, SamplerOpener, open_chat, own_sampler
from projected_grpo.engine.models import Loaded
from projected_grpo.errors import UserError
from projected_grpo.run.checkpoint import load_adapter, read_adapter_meta, state_paths
from projected_grpo.runlog import read_json

DEPLOYED_FILE = "train.safetensors"


@dataclass(frozen=True)
class Source:
    """Which files a policy comes from. `quarantine` also holds the quarantine; None: it is not known."""

    model: str
    run: Path | None = None
    cfg: TrainConfig | None = None  # the run's
    adapter: Path | None = None
    quarantine: Path | None = None

    @property
    def name(self) -> str:
        """What it is called in logs and tables."""
        return self.run.name if self.run else self.adapter.name if self.adapter else self.model


def find_source(path: Path | None, model: str) -> Source:
    """What `path` (a run folder, an adapter file, a run's state, or None) and `--model` (or "") name.

    Raises UserError if a file is missing or damaged, or nothing says which model to load.
    """
    if path is None:
        if not model:
            raise UserError("name a run folder or an adapter file, or the base model with --model")
        return Source(model)
    if path.is_dir():
        return _run_source(path, model)
    meta = read_adapter_meta(path)
    model = model or meta.get("model", "")
    if not model:
        raise UserError(f"{path}: does not say which model its adapter parameters are for; add --model")
    return Source(model, adapter=path, quarantine=None if meta.get("deployed") else path)


def _run_source(folder: Path, model: str) -> Source:
    made = read_json(folder / "config.json", str(folder)).get("config")
    if made is None:
        raise UserError(f"{folder}: not a run folder; a folder with a model goes to --model")
    cfg = from_json(made, older=True)
    adapter, state = folder / DEPLOYED_FILE, next(iter(state_paths(folder)), None)
    if not adapter.exists():
        hint = f"; for its last saved state give {state}" if state else ""
        raise UserError(f"{folder}: not finished, there is no {DEPLOYED_FILE} in it{hint}")
    if state is None:
        logger.warning("{}: no state in it, so what was routed is not known", folder)
    return Source(model or cfg.model.model, folder, cfg, adapter, state)


def model_settings(source: Source, cfg: ModelConfig) -> ModelConfig:
    """How to run the source's model: as asked for, and where nothing is, as its run did."""
    cfg = replace(cfg, model=source.model)
    ran = source.cfg.model if source.cfg else cfg
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype=ran.dtype)
    if cfg.attention == "auto" and ran.attention != "flash_attention_2":  # which not every machine has
        cfg = replace(cfg, attention=ran.attention)
    return cfg


def open_source(
    source: Source,
    cfg: ModelConfig,
    open_sampler: SamplerOpener = own_sampler,
    loaded: Loaded | None = None,
) -> Chat:
    """The source's model (device and so on from `cfg`) with its adapter, the quarantine included.

    Raises UserError for an adapter that does not fit the model, or a state that is not of the deployed step.
    """
    chat = open_chat(model_settings(source, cfg), open_sampler, loaded)
    if source.adapter is None:
        return chat
    meta = load_adapter(source.adapter, chat.policy)
    if source.quarantine not in (None, source.adapter):
        deployed = chat.policy.deltas(ablate_quarantine=True)
        if load_adapter(source.quarantine, chat.policy).get("step") != meta.get("step"):
            raise UserError(
                f"{source.quarantine}: of another step than {source.adapter}; "
                "give the one of them that you mean"
            )
        with torch.no_grad():  # an arm's deploy stage may have taken more than the quarantine out
            for m, layer in chat.policy.layers.items():
                layer.delta_hack.add_(layer.delta_s - deployed[m])
                layer.delta_s.copy_(deployed[m])
    return chat


def file_hash(path: Path | None) -> str | None:
    """Hash of a file's bytes."""
    return None if path is None else hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
