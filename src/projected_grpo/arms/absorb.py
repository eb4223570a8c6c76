"""Arm absorb: everything trains both, and the quarantine is a low-rank block that deployment deletes.

    keep = g    routed = the gradient of the block H (block.py), or g again under --quarantine=diagonal

No gate and no labels: what the absorption of gradient routing (Cloud et al. 2024, arXiv:2410.04332) does
by itself. Settings: `AbsorbSettings`. Controls: haar, shuffled, clean_clean, but only
with --block-init=direction.
"""

import torch

from projected_grpo.antipasto import Policy
from projected_grpo.arm_settings import AbsorbSettings, ArmSettings, BlockSettings
from projected_grpo.arms.stages import Arm, ArmInput, Update
from projected_grpo.block import Start, direction_start, random_start
from projected_grpo.errors import UserError
from projected_grpo.proj import HackBasis
from projected_grpo.seeds import stream_seed


def arm_absorb(x: ArmInput[AbsorbSettings]) -> Update:
    """No gate: every rollout trains delta_s and the quarantine, with the same gradient or its own block's."""
    return Update(x.total, {m: rows.sum(0) for m, rows in x.quarantine_rows.items()}, x.gate, {})


def block_starts(policy: Policy, basis: HackBasis, arm: ArmSettings, seed: int) -> dict[str, Start]:
    """Where each module's block begins, by --block-init; none for an arm without blocks.

    Modules that have no axes in the basis begin at random. Raises UserError for a rank above a module's.
    """
    if not isinstance(arm, BlockSettings) or not arm.has_block:
        return {}
    starts = {}
    for m, layer in policy.layers.items():
        if arm.block_rank > policy.ranks[m]:
            raise UserError(f"--block-rank {arm.block_rank}: {m} has only rank {policy.ranks[m]}")
        if arm.block_init == "direction" and m in basis.V:
            V = basis.V[m].to(layer.U.device)
            starts[m] = direction_start(layer.U, layer.Vh, V, arm.block_rank)
        else:
            generator = torch.Generator().manual_seed(stream_seed(seed, "block", m))
            starts[m] = random_start(len(layer.U), layer.Vh.shape[1], arm.block_rank, generator)
    return starts


ABSORB = Arm(gradient=arm_absorb)
