"""Arm absorb: everything trains both, and the quarantine is a low-rank block that deployment deletes."""

import torch

from projected_grpo.antipasto import Policy
from projected_grpo.arms.stages import ArmInput, Update
from projected_grpo.block import Start, direction_start, random_start
from projected_grpo.config import ArmConfig, has_block
from projected_grpo.errors import UserError
from projected_grpo.proj import HackBasis
from projected_grpo.seeds import stream_seed


def arm_absorb(x: ArmInput) -> Update:
    """No gate: every rollout trains delta_s and the quarantine, with the same gradient or its own block's."""
    return Update(x.total, {m: rows.sum(0) for m, rows in x.quarantine_rows.items()}, x.gate, {})


def block_starts(policy: Policy, basis: HackBasis, arm: ArmConfig, seed: int) -> dict[str, Start]:
    """Where each module's block begins, by --block-init; none for an arm without blocks.

    Modules that have no axes in the basis begin at random. Raises UserError for a rank above a module's.
    """
    if not has_block(arm):
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
