"""Getting a model and its tokenizer: from a folder, from the hub, or from the package."""

import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from loguru import logger
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from projected_grpo.config import MAX_SEQUENCE, NANO, TINY_RANDOM, ModelConfig
from projected_grpo.engine.model_files import damage
from projected_grpo.engine.placement import attention_choices, pick_devices, pick_dtype, place
from projected_grpo.engine.template import PROBE, Messages, check_template, first_line, render_chat, turn_end
from projected_grpo.errors import UserError

TINY_SEED = 0  # of the random weights: one tiny-random model for all seeds, so that its SVD is cached once
PACKAGED = {TINY_RANDOM: "tiny", NANO: "nano"}  # their folders in data/
QWEN3_4B: Mapping[str, Any] = {  # the sizes of the model of `fast` and `full`, known where its files are not
    **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}
Loaded = tuple[nn.Module, PreTrainedTokenizerBase]


def load_model(cfg: ModelConfig) -> Loaded:
    """Model in evaluation mode and tokenizer. Raises UserError for one that cannot be had or trained."""
    devices = pick_devices(cfg.device)
    dtype = pick_dtype(cfg.dtype, devices[0])
    slowest = next((d for d in devices if d.type != "cuda"), devices[0])
    choices = attention_choices(cfg.attention, slowest, dtype)
    tokenizer, config, changes = load_tokenizer(cfg.model)
    for change in changes:
        logger.warning("--model {}: {}", cfg.model, change)
    if cfg.model == TINY_RANDOM:
        model = _tiny_random(config, choices[0]).to(dtype=dtype)
    else:
        model = _pretrained(cfg, dtype, choices)
    place(model, devices)
    check_finite(model, cfg.model)
    return model.eval(), tokenizer


def outline(name: str, dtype: torch.dtype) -> nn.Module | None:
    """The layers of a model without their values, on the meta device, by its settings on this machine.

    None where they are not here, or say nothing that transformers knows; nothing is asked of the network.
    """
    try:
        with _source(name, ask=False) as (source, _):
            config = AutoConfig.from_pretrained(source, local_files_only=True)
    except Exception:  # foreign files, through many parsers: anything may come
        if name != ModelConfig.model:
            return None
        config = Qwen3Config(**QWEN3_4B, tie_word_embeddings=True)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception:
        return None
    return model


def load_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, PretrainedConfig, list[str]]:
    """Tokenizer, settings, and what is done otherwise than the template has it, before any weight is read.

    Raises UserError for what nothing can be trained with.
    """
    with _source(name) as (source, offline):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
            config = AutoConfig.from_pretrained(source, local_files_only=offline)
        except Exception as error:  # foreign files, through many parsers: anything may come
            raise _not_loaded(name, error) from error
    try:
        changes = check_template(tokenizer)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from error
    check_vocabulary(tokenizer, config, name)
    return tokenizer, config, changes


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, name: str) -> None:
    """Raises UserError if text can become tokens for which the model has no embedding."""
    rows = getattr(config.get_text_config(), "vocab_size", None) or sys.maxsize
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    in_text = set(tokenizer.get_vocab().values()) - special
    framing = {*encode_chat(tokenizer, PROBE), turn_end(tokenizer), tokenizer.eos_token_id} - {None}
    beyond = [i for i in in_text | framing if i >= rows]
    if beyond:
        raise UserError(
            f"--model {name}: its tokenizer has {len(beyond)} tokens more than the model's {rows} embeddings "
            f"(e.g. {tokenizer.convert_ids_to_tokens(min(beyond))!r}); give it its own tokenizer"
        )


def check_finite(model: nn.Module, name: str) -> None:
    """Raises UserError naming the first weight that holds NaN or infinity."""
    for weight, values in model.named_parameters():
        finite = values.isfinite()
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise UserError(
                f"--model {name}: {count} of the {values.numel()} values of {weight} are NaN or infinite; "
                "copy or download the model again, or take one whose training did not diverge"
            )


def positions(config: PretrainedConfig) -> int:
    """Tokens of prompt and completion that a model can read."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def room_of(model: nn.Module) -> int:
    """Tokens of prompt and completion at most, in training and in what is made for it."""
    config: Any = model.config
    return min(MAX_SEQUENCE, positions(config))


def too_long(shortest: int, max_new: int, room: int) -> UserError:
    """What is said where no prompt, the shortest of so many tokens, leaves room for a completion."""
    most = f"{room} tokens" if room == MAX_SEQUENCE else f"the model's {room} positions"
    change = "lower --max-new" if shortest < room else "take shorter problems, or another model"
    return UserError(
        f"every prompt plus --max-new {max_new} is longer than {most} (the shortest prompt has {shortest}); "
        f"{change}"
    )


def too_long_ones(sizes: Mapping[str, int], max_new: int, room: int) -> set[str]:
    """The prompts, by name, that leave no room for a completion; a warning tells their number.

    `sizes`: tokens of each prompt. Raises UserError if none is left.
    """
    skipped = {name for name, size in sizes.items() if size + max_new > room}
    if len(skipped) == len(sizes):
        raise too_long(min(sizes.values()), max_new, room)
    if skipped:
        logger.warning("{} prompts skipped: with --max-new {} over {} tokens", len(skipped), max_new, room)
    return skipped


def _tiny_random(config: Any, attention: str | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        if attention is not None:
            config._attn_implementation = attention
        return Qwen3ForCausalLM(config)


@contextmanager
def _source(name: str, *, ask: bool = True) -> Iterator[tuple[str, bool]]:
    """Where transformers finds a model, and whether it must not ask the hub (never, without `ask`).

    Raises UserError for a folder that is not there, or whose files are not whole.
    """
    if name in PACKAGED:
        with as_file(files("projected_grpo") / "data" / PACKAGED[name]) as folder:
            yield str(folder), True
        return
    check_there(name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        online = ask and _hub_resolves()  # else every file is asked for six times before the error comes
        yield name, not online
        return
    if damaged := damage(folder):
        raise UserError(f"--model {name}: {damaged}")
    yield str(folder), True


def check_there(name: str) -> None:
    """Raises UserError if a model that is a folder's path is not there."""
    folder = Path(name).expanduser()
    if looks_local(name) and not folder.is_dir():
        where = "" if folder.is_absolute() else f" in {Path.cwd()}"  # where a run was begun may be another
        raise UserError(f"--model {name}: no such folder{where}")


def looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _pretrained(cfg: ModelConfig, dtype: torch.dtype, choices: Sequence[str | None]) -> nn.Module:
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # as our own: no bar in a file
    with _source(cfg.model) as (source, offline):

        def load(attention: str | None) -> Any:
            return AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=offline,
                output_loading_info=True,
            )

        try:
            try:
                model, loading = load(choices[0])
            except ValueError:
                if len(choices) == 1:
                    raise
                model, loading = load(choices[1])  # one that has not the first
        except Exception as error:  # foreign files, through many parsers: anything may come
            if cfg.attention != "auto" and "attention" in str(error):
                raise UserError(
                    f"--attention {cfg.attention}: the model does not take it ({first_line(error)}); "
                    "leave it out, or take --attention=eager"
                ) from error
            raise _not_loaded(cfg.model, error) from error
    if loading["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(loading["missing_keys"])
        what = f"{len(missing)} weights are not in its files, e.g. {missing[0]}"
        raise UserError(f"--model {cfg.model}: {what}")
    return model


def _not_loaded(name: str, error: Exception) -> UserError:
    hint = (
        "the folder must hold a transformers model and tokenizer"
        if looks_local(name) or Path(name).is_dir()
        else f"run `just download-model {name}` where there is network, or give a local folder"
    )
    return UserError(f"--model {name} cannot be loaded: {hint} ({first_line(error)})")


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it no dropout, and no layer that another loop has run again in its backward pass, which takes no
    cache. Afterwards every module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[int, ...]:
    """Token ids of a chat up to where the answer begins (`render_chat`)."""
    text = render_chat(tokenizer, messages)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special_tokens: bool = False) -> str:
    """Text of token ids."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special_tokens))


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's, the generation config's, the template's."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    listed = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ids = {i for i in (*listed, tokenizer.eos_token_id, turn_end(tokenizer)) if i is not None}
    if not ids:
        raise UserError("the tokenizer has no end-of-sequence token")
    return frozenset(ids)
