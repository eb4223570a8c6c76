"""What each token of a rollout does along the hack direction, for a reader: no arm reads it.

    s_t = -d log p_t / d epsilon  at  epsilon = 0,  the adapter at delta + epsilon v,  v = v_grad / |v_grad|

v is taken over all modules together. s_t is how much likelier token t becomes by a unit step against v, as
descent takes it, to first order, in nats: above 0 is hack-ward. Over a rollout's tokens it sums to
grad NLL . v, the rollout's score of `concept` (the cosine of its gradient with v_grad) times that gradient's
norm.

One forward pass in forward mode gives it for all tokens, exact to rounding, where a backward pass would give
the sum alone. The weights are those that sampled, merged; the pass adds the tangent of every layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from projected_grpo.antipasto import Deltas, Policy
from projected_grpo.collect import Collected
from projected_grpo.config import LossConfig
from projected_grpo.engine.attention import decoding
from projected_grpo.engine.logps import head_chunk
from projected_grpo.engine.passes import fixed_logps, microbatches, padded, prompt_numbers
from projected_grpo.errors import UserError
from projected_grpo.experiment import Experiment
from projected_grpo.rollout import Rollout


@torch.no_grad()
def token_scores(
    policy: Policy,
    rollouts: Sequence[Rollout],
    v_grad: Mapping[str, Float[Tensor, " _"]],
    deltas: Deltas,
    loss: LossConfig,
) -> list[Float[Tensor, " _"]]:
    """s_t of every completion token of each rollout, nats, with the adapter at `deltas`.

    Raises UserError for a model with a layer that has no forward-mode derivative.
    """
    found = [torch.empty(0)] * len(rollouts)
    length = torch.stack([v.norm() for v in v_grad.values()]).norm()
    chunk = head_chunk(policy, loss.tokens_per_microbatch)
    prompts = prompt_numbers(policy.model, rollouts, loss)
    batches = microbatches(rollouts, range(len(rollouts)), loss.tokens_per_microbatch, prompts)
    try:
        with (
            policy.using(policy.merged(deltas)),
            decoding(policy.model),
            sdpa_kernel(SDPBackend.MATH),  # fused kernels have no forward mode
            forward_ad.dual_level(),
            policy.bind(
                {m: forward_ad.make_dual(torch.zeros_like(v), v / length) for m, v in v_grad.items()}
            ),
        ):
            for index in batches:
                shared = len({prompts[i] for i in index}) < len(index)
                batch = padded(policy, [rollouts[i] for i in index], share_prompts=shared)
                slope = forward_ad.unpack_dual(fixed_logps(policy, batch, chunk)).tangent
                for i, row in zip(index, slope.float().cpu(), strict=True):
                    found[i] = -row[: len(rollouts[i].completion_ids)]
    except NotImplementedError as error:
        what = str(error).splitlines()[0]
        raise UserError(f"leave out --keep-token-scores: it cannot follow this model ({what})") from error
    return found


def piece_lengths(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """How many characters of `text` each of its tokens gives, 0 for a part of one; [] if that is not told.

    What is left at the end, of a character that was never finished, is the last token's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not ids:
        return []
    stream = DecodeStream(skip_special_tokens=True)
    pieces = [stream.step(backend, token) or "" for token in ids]
    if not text.startswith("".join(pieces)):
        return []
    lengths = [len(piece) for piece in pieces]
    return [*lengths[:-1], lengths[-1] + len(text) - sum(lengths)]


def token_rows(
    exp: Experiment, step: int, data: Collected, v_grad: Mapping[str, Tensor], deltas: Deltas
) -> list[dict[str, Any]]:
    """The lines of tokens.jsonl for a step's student rollouts, sampled at `deltas`; each process scores its
    share."""
    group, tokenizer = exp.cfg.sampling.group, exp.chat.tokenizer
    students = [i for i, rollout in enumerate(data.rollouts) if not rollout.is_teacher]
    rollouts = [data.rollouts[i] for i in students]
    own = exp.ranks.share([len(r.prompt_ids) + len(r.completion_ids) for r in rollouts])
    with exp.ranks.together():
        scores = token_scores(exp.chat.policy, rollouts[own.start : own.stop], v_grad, deltas, exp.cfg.loss)
    rows = []
    for i, rollout, score in zip(students, rollouts, sum(exp.ranks.gather(scores), []), strict=True):
        logp = () if rollout.logp_old is None else rollout.logp_old.tolist()
        rows.append(
            {
                **{"step": step, "p_idx": i // group, "gi": i % group},
                "chars": piece_lengths(tokenizer, rollout.completion_ids, rollout.text),
                "logp": [round(value, 3) for value in logp],
                "hackward": [float(f"{value:.3g}") for value in score.tolist()],
            }
        )
    return rows
