"""A stand-in for vLLM: the calls that the sampler makes and no others, answered by transformers.

What an engine does behind them is kept: weights of its own that begin random and are known by fused names,
a cache of prompts that outlives a change of weights unless it is reset, one process only where the
environment says so, stop tokens only as asked. Two things are not vLLM's: tokens come from rollout's own
streams of uniforms, so that both samplers can be compared, and requests are served one at a time.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from projected_grpo.engine.generate import pick_tokens
from projected_grpo.rollout import uniforms

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def fused(name: str) -> str:
    """What vLLM calls the parameter that holds this weight of a checkpoint."""
    return ".".join(FUSED.get(part, part) for part in name.split("."))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Names and defaults as in vLLM."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class Model(nn.Module):
    """The engine's own copy of the weights."""

    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        (name,) = config.architectures
        self.transformer = getattr(transformers, name)(config).to(getattr(torch, dtype)).eval()
        self.held = dict(self.transformer.named_parameters())
        self.loads: list[dict[str, Tensor]] = []

    def named_parameters(self, *_: Any, **__: Any) -> Iterable[tuple[str, Tensor]]:
        return {fused(name): value for name, value in self.held.items()}.items()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.loads.append({})
        for name, value in weights:
            if name not in self.held:
                raise ValueError(f"There is no module or parameter named '{name}'")
            assert value.shape == self.held[name].shape
            self.held[name].copy_(value)
            self.loads[-1][name] = value.clone()
        return {fused(name) for name in self.loads[-1]}


class LLM:
    """Built with exactly these arguments."""

    def __init__(
        self,
        *,
        model: str,
        load_format: str,
        skip_tokenizer_init: bool,
        generation_config: str,
        dtype: str,
        gpu_memory_utilization: float,
        max_model_len: int,
        logprobs_mode: str,
    ) -> None:
        assert (load_format, generation_config) == ("dummy", "vllm") and 0 < gpu_memory_utilization < 1
        self.in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        self.model = Model(model, dtype)
        self.tokenizer = not skip_tokenizer_init
        self.room, self.mode = max_model_len, logprobs_mode
        self.prompts: dict[tuple[int, ...], Tensor] = {}  # logits behind each
        self.requests: list[SamplingParams] = []

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        if not self.in_process:
            raise TypeError("a function cannot be sent to another process")
        return [func(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.prompts.clear()
        return True

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert not use_tqdm
        self.requests += sampling_params
        return [
            RequestOutput([self._complete(params, **prompt)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    @torch.no_grad()
    def _complete(self, params: SamplingParams, *, prompt_token_ids: list[int]) -> CompletionOutput:
        if params.detokenize and not self.tokenizer:
            raise ValueError("no tokenizer")
        if len(prompt_token_ids) + params.max_tokens > self.room:
            raise ValueError("longer than the maximum model length")
        stop = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop.add(self.model.transformer.config.eos_token_id)
        draws = uniforms(params.seed, params.max_tokens).float()
        made = CompletionOutput(finish_reason="length")
        for u in draws:
            logits = self._logits(tuple(prompt_token_ids), made.token_ids)
            token = int(pick_tokens(logits[None], u[None], params.temperature, params.top_k, params.top_p))
            told = logits if self.mode == "raw_logprobs" else logits / params.temperature
            made.token_ids.append(token)
            if params.logprobs is not None:
                made.logprobs.append({token: Logprob(float(told.float().log_softmax(-1)[token]))})
            if token in stop:
                made.finish_reason = "stop"
                break
        return made

    def _logits(self, prompt: tuple[int, ...], completion: list[int]) -> Tensor:
        if completion:
            return self._run([*prompt, *completion])
        if prompt not in self.prompts:
            self.prompts[prompt] = self._run([*prompt])
        return self.prompts[prompt]

    def _run(self, ids: list[int]) -> Tensor:
        return self.model.transformer(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def modules(device_type: str = "cpu") -> dict[str, ModuleType]:
    """`vllm` and what is imported from inside it, for sys.modules."""
    package, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    package.LLM, package.SamplingParams = LLM, SamplingParams
    platforms.current_platform = type("Platform", (), {"device_type": device_type})()
    return {"vllm": package, "vllm.platforms": platforms}
