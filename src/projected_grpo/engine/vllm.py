"""Completions from a vLLM engine in this process, on the policy's own GPU (needs the `vllm` extra).

The engine has weights of its own, in the layout of its kernels. It begins with random ones; everything of the
policy's model is copied into it when it is opened, and before each generation every adapted weight that is
not there yet as W + U diag(delta) Vh + H, merged and copied one after another. Seeds go to the engine with
their request. The log-probabilities are the engine's own, of its logits before temperature and filters; what
they differ by from the loss's is what the importance weight corrects (grpo.py).

The calls were read in vLLM's documentation and sources, and in TRL 1.16, whose colocated mode works alike
with 0.22 to 0.31: `apply_model` and `load_weights` (names of a checkpoint; the engine fuses q, k, v and gate,
up itself), `logprobs_mode` raw_logprobs, `reset_prefix_cache`, and VLLM_ENABLE_V1_MULTIPROCESSING=0 for one
process. They were never run here but against a stand-in, so an engine whose probabilities are not the model's
is refused when it is opened.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from projected_grpo.antipasto import AdaptedLinear, Policy, block_name, merged_weight
from projected_grpo.config import ModelConfig, SamplingConfig
from projected_grpo.engine.batch import collate
from projected_grpo.engine.logps import completion_logps
from projected_grpo.engine.placement import pick_devices
from projected_grpo.errors import UserError
from projected_grpo.rollout import Completion, Rollout

VLLM_MEMORY = 0.3  # share of the GPU that the engine takes for good; the rest is training's
CONTEXT = 4096  # tokens of a prompt and its completion; training has half of that, evaluations may ask more
HOTTEST = 2.0  # temperature that vLLM takes
TRIED = 8  # tokens, of a prompt and of its completion, by which a new engine is compared with the model
FAR = 0.5  # nats a token; half precision and other kernels are far below
ENDED = ("stop", "length")  # ways in which a completion may end


def opener(cfg: ModelConfig) -> Callable[[Policy], "VllmSampler"]:
    """What opens the engine for a policy. Raises UserError where this vLLM does not run on the device."""
    devices, runs_on = pick_devices(cfg.device), current_platform.device_type
    if len(devices) > 1:
        raise UserError("--sampler=vllm: vLLM takes one GPU; give --device one, or take --sampler=own")
    (device,) = devices
    if device.type != runs_on:
        raise UserError(
            f"--sampler=vllm: the vLLM that is installed runs on {runs_on}, the model on {device.type}; "
            f"give --device={runs_on} or --sampler=own"
        )
    if device.index:
        raise UserError(
            f"--sampler=vllm: vLLM takes the first GPU, the model {device}; choose the GPU with "
            "CUDA_VISIBLE_DEVICES and leave --device out"
        )
    return lambda policy: VllmSampler(policy, VLLM_MEMORY)


class VllmSampler:
    """A rollout.Sampler. `memory` is the share of the GPU's memory that its engine takes."""

    def __init__(self, policy: Policy, memory: float) -> None:
        config: Any = policy.model.config
        self._room = min(CONTEXT, config.get_text_config().max_position_embeddings)
        self._engine = start_engine(policy, memory, self._room)
        self._held: dict[str, tuple[Tensor, ...]] = {}  # what each adapted weight was merged from
        try:
            loaded = self._load(unadapted_weights(policy)) | self.bring(policy, ablate_quarantine=False)
        except (AttributeError, KeyError, ValueError) as error:
            raise UserError(
                f"--sampler=vllm: vLLM does not take the weights of a {type(policy.model).__name__} "
                f"({str(error)[:160]}); take --sampler=own"
            ) from error
        (names,) = self._engine.apply_model(parameter_names)
        missing = sorted(names - loaded)
        if missing:
            raise UserError(
                f"--sampler=vllm: the model has nothing for {len(missing)} of vLLM's weights, e.g. "
                f"{missing[0]}; take --sampler=own"
            )
        self._compare(policy)

    def _compare(self, policy: Policy) -> None:
        """Raises UserError unless the engine gives its own draws about the model's probabilities."""
        vocabulary = len(next(policy.model.parameters()))
        prompt = tuple(i % vocabulary for i in range(TRIED))
        plain = SamplingConfig(max_new=TRIED, temperature=1.0, top_k=0, top_p=1.0)
        (((ids, reported),),) = self(policy, [prompt], [[0]], plain, frozenset())
        batch = collate([Rollout(prompt, ids, "")], policy.device)
        with torch.no_grad(), policy.merge(policy.deltas()):
            own = completion_logps(policy.model, batch)[0].cpu()
        far = float((own - reported).abs().mean())
        if not far < FAR:
            raise UserError(
                f"--sampler=vllm: vLLM's log-probabilities are {far:.2g} nats a token off the model's, so it "
                "does not hold its weights; take --sampler=own"
            )

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: frozenset[int],
        *,
        ablate_quarantine: bool = False,
    ) -> list[list[Completion]]:
        """One completion of prompt p per seed in seeds[p], stop token included, as rollout.sample has them.

        Raises UserError for a prompt that leaves no room for a completion, or too high a temperature.
        """
        asked = [(prompts[p], seed) for p, group in enumerate(seeds) for seed in group]
        if not asked:
            return [[] for _ in prompts]
        if sampling.temperature > HOTTEST:
            raise UserError(f"--temperature {sampling.temperature}: vLLM takes at most {HOTTEST}")
        longest = max(len(ids) for ids, _ in asked) + sampling.max_new
        if longest > self._room:
            raise UserError(
                f"--sampler=vllm: a prompt with --max-new {sampling.max_new} is {longest} tokens, "
                f"at most {self._room}; lower --max-new"
            )
        self.bring(policy, ablate_quarantine=ablate_quarantine)
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(ids)} for ids, _ in asked],
            [request(sampling, seed, stop) for _, seed in asked],
            use_tqdm=False,
        )
        drawn = map(completion, outputs)
        return [[next(drawn) for _ in group] for group in seeds]

    def bring(self, policy: Policy, *, ablate_quarantine: bool) -> set[str]:
        """Copy the adapted weights that the engine does not hold yet; returns the engine's names of them."""
        deltas = policy.deltas(ablate_quarantine=ablate_quarantine)
        wanted = {
            m: made_from(layer, deltas[m], deltas.get(block_name(m))) for m, layer in policy.layers.items()
        }
        changed = [m for m, parts in wanted.items() if not same(parts, self._held.get(m, ()))]
        if not changed:
            return set()
        loaded = self._load(
            (f"{m}.weight", merged_weight(policy.layers[m], deltas[m], deltas.get(block_name(m))))
            for m in changed
        )
        self._held |= {m: wanted[m] for m in changed}
        return loaded

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        """Have the engine take these weights one by one, and forget what it computed with others."""
        (loaded,) = self._engine.apply_model(lambda model: model.load_weights(weights))
        if self._engine.reset_prefix_cache() is False:
            raise UserError(
                "--sampler=vllm: vLLM would not drop the keys and values of the weights it had before; go on "
                "from the last save with --resume"
            )
        return set(loaded)


def start_engine(policy: Policy, memory: float, room: int) -> LLM:
    """An engine of the policy's architecture with random weights, which needs no file but the settings.

    `room`: tokens of a prompt and its completion. Raises UserError if vLLM does not take them.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when an engine is made
    config: Any = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__]
    dtype = str(policy.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(Path(folder))
        try:
            engine = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # none but what a request says
                dtype=dtype,
                gpu_memory_utilization=memory,
                max_model_len=room,
                logprobs_mode="raw_logprobs",
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"--sampler=vllm: vLLM does not start with {memory:.0%} of the GPU ({str(error)[:160]})"
            ) from error
    logger.info("a vLLM engine in {} generates, with {:.0%} of the GPU's memory", dtype, memory)
    return engine


def parameter_names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def unadapted_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """All weights that no adapter parameter changes, under the names they have in a checkpoint."""
    for name, value in policy.model.named_parameters():
        module, _, leaf = name.rpartition(".base.")
        adapted = module in policy.layers
        # All that is trained are adapter parameters.
        if not value.requires_grad and not (adapted and leaf == "weight"):
            yield f"{module}.{leaf}" if adapted else name, value.data


def made_from(layer: AdaptedLinear, delta: Tensor, moved: Tensor | None) -> tuple[Tensor, ...]:
    """What a merged weight depends on, besides W, U and Vh: not to be changed afterwards."""
    if layer.block is None or moved is None or not bool(moved.any()):
        return (delta,)
    return delta, moved, layer.block.A0.clone(), layer.block.B0.clone()


def same(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    """Whether both hold the same values."""
    return len(these) == len(those) and all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def request(sampling: SamplingConfig, seed: int, stop: frozenset[int]) -> SamplingParams:
    """One completion, ended by tokens in `stop` and no others, with the log-probabilities of its tokens."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new,
        seed=seed,
        stop_token_ids=sorted(stop),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )


def completion(output: Any) -> Completion:
    """Token ids and log-probabilities of a finished request. RuntimeError for one that was given up."""
    (made,) = output.outputs
    if made.finish_reason not in ENDED:
        raise RuntimeError(f"vLLM gave a completion up: {made.finish_reason}")
    ids = tuple(made.token_ids)
    logps = [at[token].logprob for token, at in zip(ids, made.logprobs, strict=True)]
    return ids, torch.tensor(logps, dtype=torch.float32)
