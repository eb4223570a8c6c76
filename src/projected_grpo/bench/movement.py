"""How far adapter parameters of a size move the policy: which learning rate can teach it anything.

    rho      = |delta_i| / rms(S)     of every module
    random   = mean |d|               d: change of a completion's log-probability per token, signs at random
    toward   = mean (d of hack - d of clean)     of pairs, every sign as descent on the pairs' contrast has it
    forecast = sum_i |g_i| |delta_i|             the same to first order; g: gradient of the contrast

A step of AdamW changes a parameter by its learning rate at most, or about so much. So `toward` at |delta_i| =
the sum of all learning rates of a run is about the most that the run can do.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.antipasto import Deltas, Policy
from projected_grpo.bench.step import bench_config, describe, open_bench_chat
from projected_grpo.config import NANO
from projected_grpo.engine.passes import rollout_logps
from projected_grpo.extract_vhack_grad import pair_differences, pair_rollouts
from projected_grpo.options.verbs import Work
from projected_grpo.pairs import load_pairs
from projected_grpo.proj import contrast_gradient, reached
from projected_grpo.seeds import stream_seed

RHOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def bench_movement(work: Work) -> dict[str, Any]:
    """For each rho, nats per token: random signs, on average over `steps` draws, and those of the pairs."""
    chat = open_bench_chat(work)
    policy, loss = chat.policy, bench_config(work, Path()).loss
    pairs = load_pairs(Path(NANO) if work.model.model == NANO else None).split()[0]
    rollouts = pair_rollouts(chat, pairs)
    gradient = contrast_gradient(pair_differences(chat, pairs, loss, length_norm=True))
    downhill = {m: -g.sign() for m, g in gradient.items()}
    scale = {m: rms_singular(policy, m) for m in policy.layers}

    def change(signs: Deltas, rho: float) -> Float[Tensor, " n"]:
        set_adapter(policy, {m: rho * scale[m] * s for m, s in signs.items()})
        return rollout_logps(policy, rollouts, loss.tokens_per_microbatch) - before

    set_adapter(policy, {m: torch.zeros_like(s) for m, s in downhill.items()})
    before = rollout_logps(policy, rollouts, loss.tokens_per_microbatch)
    points = []
    for rho in RHOS:
        drawn = [change(random_signs(policy, work.seed, draw), rho).abs() for draw in range(work.steps)]
        moved = change(downhill, rho)
        points.append(
            {
                "rho": rho,
                "random": float(torch.stack(drawn).mean()),
                "toward": float((moved[0::2] - moved[1::2]).mean()),
                "forecast": sum(reached({m: g}, rho * scale[m]) for m, g in gradient.items()),
            }
        )
    sizes = torch.tensor(list(scale.values()))
    return {
        "points": points,
        "rms_S_median": float(sizes.median()),
        "contrast_per_delta": reached(gradient, 1.0),
    } | describe(work, chat)


def rms_singular(policy: Policy, module: str) -> float:
    """Root mean square of a weight's singular values."""
    layer = policy.layers[module]
    return float(layer.weight.float().norm()) / len(layer.delta_s) ** 0.5


def random_signs(policy: Policy, seed: int, draw: int) -> dict[str, Float[Tensor, " r"]]:
    """+1 or -1 for every adapter parameter."""
    signs = {}
    for m, r in policy.ranks.items():
        generator = torch.Generator().manual_seed(stream_seed(seed, draw, "movement", m))
        signs[m] = (torch.randint(2, (r,), generator=generator) * 2.0 - 1).to(policy.device)
    return signs


@torch.no_grad()
def set_adapter(policy: Policy, deltas: Deltas) -> None:
    """Put these into delta_s."""
    for m, delta in deltas.items():
        policy.layers[m].delta_s.copy_(delta)
