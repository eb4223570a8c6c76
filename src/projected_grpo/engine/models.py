"""Getting a model and its tokenizer: from a folder, from the hub, or from the package."""

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from projected_grpo.config import NANO, TINY_RANDOM, ModelConfig
from projected_grpo.engine.placement import pick_attention, pick_devices, pick_dtype, place
from projected_grpo.errors import UserError

TINY_SEED = 0  # of the random weights: one tiny-random model for all seeds, so that its SVD is cached once
Messages = Sequence[Mapping[str, str]]


def load_model(cfg: ModelConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model in evaluation mode and tokenizer. Raises UserError with how to get what is missing."""
    devices = pick_devices(cfg.device)
    dtype = pick_dtype(cfg.dtype, devices[0])
    attention = pick_attention(cfg.attention, next((d for d in devices if d.type != "cuda"), devices[0]))
    if cfg.model == TINY_RANDOM:
        model, tokenizer = _tiny_random(attention)
        model.to(dtype=dtype)
    elif cfg.model == NANO:
        with as_file(files("projected_grpo") / "data" / "nano") as folder:
            model, tokenizer = _pretrained(str(folder), dtype, attention)
    else:
        model, tokenizer = _pretrained(cfg.model, dtype, attention)
    if tokenizer.chat_template is None:
        raise UserError(f"--model {cfg.model}: its tokenizer has no chat template; use a chat model")
    place(model, devices)
    return model.eval(), tokenizer


def _tiny_random(attention: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    with as_file(files("projected_grpo") / "data" / "tiny") as folder:
        config = Qwen3Config.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        config._attn_implementation = attention
        return Qwen3ForCausalLM(config), tokenizer


def _pretrained(name: str, dtype: torch.dtype, attention: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise UserError(f"--model {name}: no such folder")
    source = str(Path(name).expanduser()) if looks_local else name
    offline = not _hub_resolves()  # else every file is asked for six times before the error comes
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=offline,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        hint = (
            "the folder must hold a transformers model and tokenizer"
            if looks_local or Path(name).is_dir()
            else f"run `just download-model {name}` where there is network, or give a local folder"
        )
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--model {name} cannot be loaded: {hint} ({reason[:120]})") from error
    model, loading = loaded
    if loading["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(loading["missing_keys"])
        raise UserError(f"--model {name}: {len(missing)} weights are not in its files, e.g. {missing[0]}")
    return model, tokenizer


def _hub_resolves() -> bool:
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443))
    except OSError:
        return False


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Run layers that keep their input alone, and run again in the backward pass, which must lie inside too.

    A layer that does so takes no cache. It is put into training mode by itself, as transformers asks; what is
    in it, dropout too, stays as it was. Raises UserError for a model that does not support it.
    """
    parts: Any = model
    layers = [layer for layer in parts.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"--grad-checkpoint: {type(model).__name__} does not support it; leave it out")
    newer = hasattr(parts, "activation_checkpointing_enable")  # the other is deprecated since
    enable = parts.activation_checkpointing_enable if newer else parts.gradient_checkpointing_enable
    disable = parts.activation_checkpointing_disable if newer else parts.gradient_checkpointing_disable
    modes = [layer.training for layer in layers]
    enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        disable()
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[int, ...]:
    """Token ids of a chat up to where the assistant starts; thinking off where the template knows it."""
    text = render_chat(tokenizer, messages)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special_tokens: bool = False) -> str:
    """Text of token ids."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special_tokens))


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The prompt as text, special tokens included."""
    chat = [dict(m) for m in messages]
    return str(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    )


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's and the generation config's."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    listed = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ids = {i for i in (*listed, tokenizer.eos_token_id) if i is not None}
    if not ids:
        raise UserError("the tokenizer has no end-of-sequence token")
    return frozenset(ids)
