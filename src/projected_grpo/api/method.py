"""Public: the adapter, the hack basis and what is done with it, for a training loop of one's own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from projected_grpo import antipasto
from projected_grpo.antipasto import Policy
from projected_grpo.concept import gradient_scores
from projected_grpo.config import BasisConfig, LossConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import encode_chat, evaluating, stop_ids
from projected_grpo.errors import UserError
from projected_grpo.extract_vhack_grad import pair_differences, principal_axes, select
from projected_grpo.pairs import PairSet
from projected_grpo.proj import HackBasis, project_delta_S_grad
from projected_grpo.rollout import Rollout

__all__ = [
    "HackBasis",
    "Policy",
    "ablate_quarantine",
    "extract",
    "project",
    "score",
    "unwrap",
    "wrap",
]

Vectors = Mapping[str, Float[Tensor, " r"]]  # by module; r is the module's own


def wrap(model: nn.Module, svd_cache: Path | None = None) -> Policy:
    """Freeze a transformers model and adapt its Linears in place; train `policy.model` as any other model.

    y = W x + b + U ((delta_s + delta_hack) * (Vh x)), where W = U diag(S) Vh. Only delta_s, which is
    deployed, and delta_hack, the quarantine, require a gradient; both start at 0, where the model is what it
    was. Autograd gives both the same gradient, that by their sum. `svd_cache`: a folder that keeps the SVDs.

    Shapes: delta_s and delta_hack [r], r = min(d_out, d_in) of each Linear, in float32.
    Units: those of W's singular values.
    Errors: UserError if no Linear has a name like q_proj or down_proj.
    Source: AntiPaSTO's singular-value parametrisation; compare SVFT (Lingam et al. 2024).
    """
    policy = antipasto.wrap(model, svd_cache)
    policy.use_parameters()
    return policy


def extract(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PairSet,
    *,
    k: int = 5,
    drop: float = 0.25,
    per_token: bool = True,
) -> HackBasis:
    """The hack basis of the policy as deployed: principal axes of grad NLL(hack) - grad NLL(clean) of pairs.

    Extract again every few steps: the basis is of the parameters as they are. The two pairs that are held
    out are not used. `k`: axes of a module at most. `drop`: of all modules' axes, the share with the smallest
    singular values, which is left out. `per_token`: log-likelihoods are means over tokens, else sums.
    No parameter and no `.grad` is touched.

    Shapes: V [k, r] orthonormal, v_grad [r] unit, by module; V lacks modules whose axes were all dropped.
    Units: none. A descent step along a row of V makes hacks likelier.
    Errors: UserError if pairs do not reach a module, or nothing is left; FloatingPointError if a gradient is
    not finite.
    Source: docs/concepts.md.
    """
    settings = BasisConfig(v_hack_extract_top_k=k, v_hack_k=k, v_hack_drop_bottom_frac=drop)
    used, _ = pairs.split()
    chat = Chat(policy, tokenizer, stop_ids(policy.model, tokenizer))
    with evaluating(policy.model):
        differences = pair_differences(chat, used, LossConfig(), length_norm=per_token)
    return select(principal_axes(differences, settings), k, drop)


def project(
    gradients: Vectors, basis: HackBasis, *, preserve_magnitude: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split gradients of delta_s at the basis: (what is kept, what was removed).

    removed = V^T relu(V g); kept = g - removed, rescaled to |g| under `preserve_magnitude`. To erase, give
    delta_s what is kept; to route, give delta_hack what was removed, too (`policy.write_gradients`). Average
    gradients over processes first, and clip afterwards. Modules without a V are kept whole.

    Shapes: gradients {module: [r]}; kept has the same modules, removed those with a V.
    Units: those of the gradients.
    Errors: KeyError for a module of the basis that the gradients lack.
    Source: docs/arms.md.
    """
    splits = {
        m: project_delta_S_grad(gradients[m], V, preserve_magnitude=preserve_magnitude)
        for m, V in basis.V.items()
    }
    kept = dict(gradients) | {m: split.keep for m, split in splits.items()}
    return kept, {m: split.removed for m, split in splits.items()}


def score(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    basis: HackBasis,
    prompts: Sequence[Sequence[Mapping[str, str]]],
    completions: Sequence[str],
) -> Float[Tensor, " n"]:
    """How hack-ward each completion is: cos(grad of its -log p, v_grad), over all modules together.

    One forward and backward pass each. `prompts`: chat messages, written by the template with thinking off.
    No parameter and no `.grad` is touched.

    Shapes: n prompts and completions -> [n].
    Units: a cosine, in [-1, 1]; the higher, the more a step on this completion is one on a hack.
    Errors: UserError if their numbers differ.
    Source: docs/score.md.
    """
    if len(prompts) != len(completions):
        raise UserError(f"{len(prompts)} prompts but {len(completions)} completions; give one to each")
    chat = Chat(policy, tokenizer, stop_ids(policy.model, tokenizer))
    rollouts = []
    for messages, text in zip(prompts, completions, strict=True):
        ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], chat.stop_id)
        rollouts.append(Rollout(encode_chat(tokenizer, messages), ids, text))
    with evaluating(policy.model):
        return gradient_scores(policy, rollouts, basis.v_grad, LossConfig())


@contextmanager
def ablate_quarantine(policy: Policy) -> Iterator[None]:
    """Within it the quarantine is 0: the policy is what is deployed. Afterwards it is what it was.

    Shapes: none change.
    Units: none.
    Errors: none.
    Source: docs/arms.md.
    """
    quarantines = [layer.quarantine for layer in policy.layers.values()]
    before = [quarantine.detach().clone() for quarantine in quarantines]
    try:
        with torch.no_grad():
            for quarantine in quarantines:
                quarantine.zero_()
        yield
    finally:
        with torch.no_grad():
            for quarantine, values in zip(quarantines, before, strict=True):
                quarantine.copy_(values)


def unwrap(policy: Policy) -> nn.Module:
    """The deployed model with plain Linears again, delta_s merged into W, to be saved or served as any other.

    The policy is used up.

    Shapes: those of the model that was wrapped.
    Units: none.
    Errors: none.
    Source: docs/evaluate.md. In bfloat16 small changes are rounded up or down by chance (antipasto.rounded).
    """
    return antipasto.unwrap(policy, ablate_quarantine=True)
