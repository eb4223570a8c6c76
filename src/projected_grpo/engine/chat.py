"""A model that answers: policy, tokenizer and what ends a turn, passed whole to what samples or scores."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from projected_grpo.antipasto import Policy, wrap
from projected_grpo.config import ModelConfig, SamplingConfig
from projected_grpo.engine.generate import sample
from projected_grpo.engine.models import Loaded, load_model, stop_ids
from projected_grpo.engine.template import turn_end
from projected_grpo.errors import UserError
from projected_grpo.rollout import Completion, Sampler


@dataclass(frozen=True)
class Chat:
    """A policy with its tokenizer and the token ids that frame text."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    sampler: Sampler = sample

    @cached_property
    def stop_id(self) -> int:
        """The token that ends a cached completion: the template's own, else the tokenizer's."""
        ends = (turn_end(self.tokenizer), self.tokenizer.eos_token_id)
        return next((end for end in ends if end is not None), min(self.stop, default=0))

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        ablate_quarantine: bool = False,
    ) -> list[list[Completion]]:
        """One completion of prompt p per seed in seeds[p], by this chat's sampler."""
        return self.sampler(
            self.policy, prompts, seeds, sampling, self.stop, ablate_quarantine=ablate_quarantine
        )


SamplerOpener = Callable[[Policy], Sampler]


def own_sampler(policy: Policy) -> Sampler:
    """Our own decoding, for which nothing has to be opened."""
    return sample


def sampler_opener(cfg: ModelConfig, processes: int = 1) -> SamplerOpener:
    """What makes the sampler that --sampler names, once there is a model; all that can be refused before is.

    Raises UserError for settings or a place that the engine cannot work with, and naming a missing extra.
    """
    if cfg.sampler == "own":
        return own_sampler
    if processes > 1:
        raise UserError(
            f"--sampler={cfg.sampler} runs in one process; leave torchrun out, or take --sampler=own"
        )
    try:
        engine = importlib.import_module(f"projected_grpo.engine.{cfg.sampler}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != cfg.sampler:
            raise
        raise UserError(
            f"--sampler={cfg.sampler} needs {error.name}: pip install 'projected_grpo[{cfg.sampler}]'"
        ) from error
    opener: SamplerOpener = engine.opener(cfg)
    return opener


def open_chat(
    cfg: ModelConfig, open_sampler: SamplerOpener = own_sampler, loaded: Loaded | None = None
) -> Chat:
    """Load the model unless it is, adapt its Linears, and open what generates from it."""
    model, tokenizer = loaded or load_model(cfg)
    with tqdm(desc="SVD", unit=" modules", leave=False, disable=None) as bar:
        policy = wrap(model, cfg.svd_cache, on_module=lambda name: bar.update())
    stop = stop_ids(model, tokenizer)
    logger.info(
        "model {}: {} adapted Linears, {} adapter parameters each, {} on {}",
        cfg.model,
        len(policy.layers),
        sum(policy.ranks.values()),
        str(next(model.parameters()).dtype).removeprefix("torch."),
        ", ".join(map(str, policy.devices)),
    )
    return Chat(policy, tokenizer, stop, open_sampler(policy))
