"""Scores of rollouts, for advmod and route2: by their hidden states, or by their own gradient.

    activation  d = unit mean over pairs of h_last(hack) - h_last(clean)   h_last: at a completion's end
                s = mean over a rollout's completion tokens of h . d
    gradient    s = cos(grad NLL(rollout), v_grad), both over all modules together

d, the concept direction, is what hidden states of hacks have that those of honest answers have not. They are
read at one layer, at a relative depth, of the policy as it is. The pairs are those the basis is extracted
from.

Departures from the source (Wu and Tang, arXiv:2604.01476): the direction comes from the run's own pairs, not
from 80 non-coding ones; the score is a mean over completion tokens, since the source prints the prompt's last
token, whose state is the same for a whole group. On 1,624 rollouts of a nano run without an intervention the
mean tells exploits from the rest with an AUROC of .92, .87 and .80 (early, middle, late), the last token with
.78, .70 and .72, the mean on a random direction with .57, .54 and .64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.arm_settings import RELABELLED, ConceptSettings
from projected_grpo.arms.controls import relabelled
from projected_grpo.config import LossConfig
from projected_grpo.engine.batch import collate
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.passes import microbatches
from projected_grpo.extract_vhack_grad import pair_rollouts
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.pairs import Pair
from projected_grpo.proj import PairGrads, haar_basis, mean_difference, pooled_cosines
from projected_grpo.rollout import Rollout
from projected_grpo.seeds import stream_seed


@dataclass(frozen=True)
class Concept:
    """A unit direction in hidden space (None: v_grad is it), and the latest scores by it, oldest first."""

    direction: Float[Tensor, " d"] | None
    past: Float[Tensor, " b"]

    def after(self, scores: Float[Tensor, " n"], keep: int) -> "Concept":
        """The memory with these scores in it, the last `keep` of all."""
        seen = torch.cat([self.past, scores])
        return replace(self, past=seen[len(seen) - min(keep, len(seen)) :])


def concept_to_json(concept: Concept | None) -> dict[str, list[float] | None] | None:
    """What resuming needs of it; JSON keeps float32 exactly."""
    if concept is None:
        return None
    direction = None if concept.direction is None else concept.direction.tolist()
    return {"direction": direction, "past": concept.past.tolist()}


def concept_from_json(saved: Mapping[str, Any] | None) -> Concept | None:
    """The concept of a saved run."""
    if saved is None:
        return None
    direction = saved["direction"]
    return Concept(None if direction is None else torch.tensor(direction), torch.tensor(saved["past"]))


@dataclass(frozen=True)
class States:
    """Hidden states of completions, float32 on the CPU: at the last token, and the mean over all tokens."""

    last: Float[Tensor, "n d"]
    mean: Float[Tensor, "n d"]


@torch.no_grad()
def completion_states(
    policy: Policy, rollouts: Sequence[Rollout], depth: float, tokens_per_microbatch: int
) -> States:
    """Hidden states of the policy as trained, after the block at this relative depth (1: the last one)."""
    model: Any = policy.model
    block = max(1, round(depth * model.config.get_text_config().num_hidden_layers))
    last: list[Tensor] = [torch.empty(0)] * len(rollouts)
    mean = list(last)
    with policy.merge(policy.deltas()):
        for index in microbatches(rollouts, range(len(rollouts)), tokens_per_microbatch):
            batch = collate([rollouts[i] for i in index], policy.device)
            out = model.base_model(input_ids=batch.ids, output_hidden_states=True, use_cache=False)
            states = batch.at_answers(out.hidden_states[block]).float().cpu()
            for i, own in zip(index, states.split(batch.completion.sum(1).tolist()), strict=True):
                last[i], mean[i] = own[-1], own.mean(0)
    return States(torch.stack(last), torch.stack(mean))


def fit_concept(
    chat: Chat, pairs: Sequence[Pair], arm: ConceptSettings, tokens_per_microbatch: int, seed: int
) -> Float[Tensor, " d"]:
    """The direction of these pairs at the current policy, or what --control puts in its place."""
    rollouts = pair_rollouts(chat, pairs)
    states = completion_states(chat.policy, rollouts, arm.advmod_depth, tokens_per_microbatch).last
    return direction(states[0::2], states[1::2], arm, seed)


def direction(
    hack: Float[Tensor, "pairs d"], clean: Float[Tensor, "pairs d"], arm: ConceptSettings, seed: int
) -> Float[Tensor, " d"]:
    """Unit mean difference; under a control a random one, one without the contrast, or the reverse."""
    if arm.control == "haar":
        generator = torch.Generator().manual_seed(stream_seed(seed, "haar-concept"))
        return haar_basis(1, hack.shape[1], generator)[0]
    contrast = PairGrads({"h": hack}, {"h": -clean})
    if arm.control in RELABELLED:
        contrast = relabelled(contrast, arm.control, seed)
    unit = mean_difference(contrast.differences()["h"])
    return -unit if arm.control == "flipped" else unit


def concept_scores(
    policy: Policy,
    rollouts: Sequence[Rollout],
    direction: Float[Tensor, " d"],
    arm: ConceptSettings,
    tokens_per_microbatch: int,
) -> Float[Tensor, " n"]:
    """Each rollout's score s by its hidden states, in their units. One forward pass."""
    if not rollouts:
        return torch.empty(0)
    return completion_states(policy, rollouts, arm.advmod_depth, tokens_per_microbatch).mean @ direction


def gradient_scores(
    policy: Policy, rollouts: Sequence[Rollout], v_grad: Mapping[str, Float[Tensor, " _"]], loss: LossConfig
) -> Float[Tensor, " n"]:
    """Each rollout's score s by its gradient, whatever its advantage. One forward and backward pass."""
    if not rollouts:
        return torch.empty(0)
    plain = [replace(r, logp_old=None) for r in rollouts]  # importance weights of 1: the NLL's own gradient
    longest = max(len(r.completion_ids) for r in rollouts)
    found = per_rollout_grads(policy, plain, torch.ones(len(plain)), replace(loss, beta=0.0), longest)
    return pooled_cosines(found.rows, v_grad).float().cpu()
