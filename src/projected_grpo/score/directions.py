"""What is scored: directions of pair sets and basis files, in gradients and hidden states, and nulls."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.arm_settings import AdvmodSettings
from projected_grpo.arms.controls import relabelled
from projected_grpo.basis_file import load_extraction, weights_hash
from projected_grpo.concept import completion_states, direction
from projected_grpo.config import BasisConfig, LossConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import Loaded, encode_chat, positions
from projected_grpo.engine.passes import rollout_logps
from projected_grpo.errors import UserError
from projected_grpo.extract_vhack_grad import pair_grads, pair_rollouts, principal_axes, select
from projected_grpo.pairs import PairSet, load_pairs
from projected_grpo.proj import HackBasis, PairGrads, pooled_cosines

BASIS = ".safetensors"
SUPPORTED = -1.0  # nats per token: below it, on either side, the model would not write the pairs (A8)


@dataclass(frozen=True)
class Support:
    """How likely the model finds a pair set: mean log-probability per token of each side, by pair, nats."""

    ids: tuple[str, ...]
    hack: Float[Tensor, " pairs"]
    clean: Float[Tensor, " pairs"]
    chance: float  # of a uniform draw from the vocabulary

    def figures(self) -> dict[str, Any]:
        """Means over pairs, and the pairs that are no likelier than chance."""
        means = {"hack": float(self.hack.mean()), "clean": float(self.clean.mean())}
        return {**means, "chance": self.chance, "below_chance": self.below_chance}

    def __str__(self) -> str:
        means = f"hack {float(self.hack.mean()):.2f}, clean {float(self.clean.mean()):.2f}"
        return f"log p per token by this model: {means}; chance {self.chance:.2f}"

    @property
    def below_chance(self) -> list[str]:
        """Pairs of which the model finds a side no likelier than chance."""
        worst = torch.minimum(self.hack, self.clean)
        return [name for name, logp in zip(self.ids, worst.tolist(), strict=True) if logp <= self.chance]


@dataclass(frozen=True)
class Source:
    """A direction's pairs as the model reads them; states and support are None for a basis file."""

    name: str
    grads: PairGrads
    states: Float[Tensor, "rows d"] | None  # at the last token of hack and clean in turn
    support: Support | None

    def basis(self, cfg: BasisConfig) -> HackBasis:
        """The basis that a run with these settings would use."""
        return basis_of(self.grads, cfg)

    def shuffled(self, cfg: BasisConfig, seed: int) -> HackBasis:
        """The same of pairs matched within their label, drawn by the seed."""
        return basis_of(relabelled(self.grads, "shuffled", seed), cfg)

    def concept(self, arm: AdvmodSettings, seed: int = 0) -> Float[Tensor, " d"]:
        """The direction in hidden space that advmod would use under this arm's control."""
        if self.states is None:
            raise ValueError(f"{self.name} has no texts")
        return direction(self.states[0::2], self.states[1::2], arm, seed)

    def threshold(self, basis: HackBasis) -> float:
        """Where a gate would start: halfway between the pairs' mean cosines of hack and clean sides."""
        hack = pooled_cosines(self.grads.hack, basis.v_grad).mean()
        clean = pooled_cosines({m: -g for m, g in self.grads.clean.items()}, basis.v_grad).mean()
        return float(hack + clean) / 2


def basis_of(grads: PairGrads, cfg: BasisConfig) -> HackBasis:
    return select(principal_axes(grads.differences(), cfg), cfg.v_hack_k, cfg.v_hack_drop_bottom_frac)


def read_source(chat: Chat, name: str, cfg: BasisConfig, loss: LossConfig, arm: AdvmodSettings) -> Source:
    """A packaged pair set by its name, a pair file, or a basis file (.safetensors), as this model has it.

    Raises UserError for a basis of other weights, and for pairs longer than the model can read.
    """
    if name.endswith(BASIS):
        extraction = load_extraction(Path(name), {}, torch.device("cpu"))
        if extraction.meta.get("weights") != weights_hash(chat.policy):
            made_for = extraction.meta.get("model")
            raise UserError(f"{name}: a basis of other weights ({made_for}); extract one for this --model")
        return Source(name_of(name), extraction.grads, None, None)
    return of_pairs(chat, load_pairs(Path(name)), name_of(name), cfg, loss, arm)


def of_pairs(
    chat: Chat, pairs: PairSet, name: str, cfg: BasisConfig, loss: LossConfig, arm: AdvmodSettings
) -> Source:
    """A pair set without those held out. Raises UserError if they are longer than the model can read."""
    used, _ = pairs.split()
    check_lengths((chat.policy.model, chat.tokenizer), pairs)
    grads = pair_grads(chat, used, loss, length_norm=cfg.v_hack_length_norm)
    rollouts = pair_rollouts(chat, used)
    states = completion_states(chat.policy, rollouts, arm.advmod_depth, loss.tokens_per_microbatch)
    cpu = PairGrads({m: g.cpu() for m, g in grads.hack.items()}, {m: g.cpu() for m, g in grads.clean.items()})
    return Source(name, cpu, states.last, support(chat, pairs, loss))


def name_of(name: str) -> str:
    """What a direction is called: a file by its stem, a packaged set as it is."""
    return Path(name).stem if name.endswith((".json", BASIS)) else name


def check_lengths(loaded: Loaded, pairs: PairSet) -> None:
    """Refuse pairs that are longer than the model's positions: they are another model's."""
    model: Any = loaded[0]
    tokenizer, room = loaded[1], positions(model.config)
    longest = 1 + max(  # the end of a turn
        len(encode_chat(tokenizer, pair.messages))
        + len(tokenizer(text, add_special_tokens=False)["input_ids"])
        for pair in pairs.pairs
        for text in (pair.hack, pair.clean)
    )
    if longest > room:
        raise UserError(
            f"pairs {pairs.name!r} take up to {longest} tokens, and the model has {room} positions: "
            "they are for another model"
        )


def support(chat: Chat, pairs: PairSet, loss: LossConfig) -> Support:
    """Mean log-probability per token of both sides of every pair, held-out ones too. One forward pass."""
    logps = rollout_logps(chat.policy, pair_rollouts(chat, pairs.pairs), loss.tokens_per_microbatch)
    model: Any = chat.policy.model
    chance = -math.log(model.get_input_embeddings().num_embeddings)
    return Support(tuple(p.pair_id for p in pairs.pairs), logps[0::2], logps[1::2], chance)
