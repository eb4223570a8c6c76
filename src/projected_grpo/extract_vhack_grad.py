"""The hack basis: gradients of contrastive pairs, their principal directions, a file that can be trusted.

A pair counts as a group of two rollouts with advantages +1 (hack) and -1 (clean) and goes through the same
`per_rollout_grads` as training, so that

    row(hack) + row(clean) = grad NLL(hack) - grad NLL(clean)

up to the loss's fixed denominator. A descent step along it makes the hack likelier. These differences are
stacked per module, D [pairs, r], and decomposed (proj.svd_basis).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.arm_settings import RELABELLED, ArmSettings
from projected_grpo.arms.controls import flipped, haar_like, relabelled
from projected_grpo.basis_file import (
    Axes,
    Extraction,
    HeldOut,
    default_path,
    describe,
    load_extraction,
    save_extraction,
)
from projected_grpo.config import BasisConfig, LossConfig, TrainConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import encode_chat
from projected_grpo.errors import UserError
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.pairs import Pair, PairSet
from projected_grpo.proj import (
    HackBasis,
    PairGrads,
    assert_orthonormal,
    mean_difference,
    row_cosines,
    svd_basis,
)
from projected_grpo.ranks import ALONE, Ranks, over_ranks, own_share
from projected_grpo.rollout import Rollout
from projected_grpo.tensor_files import tensor_hash


def pair_grads(
    chat: Chat, pairs: Sequence[Pair], loss: LossConfig, *, length_norm: bool = False, ranks: Ranks = ALONE
) -> PairGrads:
    """Gradients of all pairs, both sides of each, through the training loss at the deployed adapter.

    With `ranks`, which all must call, each process runs its share of them.
    """
    rollouts = pair_rollouts(chat, pairs)
    rows = _gradients(chat.policy, rollouts, range(len(rollouts)), loss, length_norm, ranks)
    return PairGrads(
        hack={m: g[0::2].contiguous() for m, g in rows.items()},
        clean={m: g[1::2].contiguous() for m, g in rows.items()},
    )


def pair_differences(
    chat: Chat, pairs: Sequence[Pair], loss: LossConfig, *, length_norm: bool = False, ranks: Ranks = ALONE
) -> dict[str, Float[Tensor, "pairs r"]]:
    """`pair_grads(...).differences()`, with one backward pass through a pair's prompt for two."""
    rollouts = pair_rollouts(chat, pairs)
    pair = [i // 2 for i in range(len(rollouts))]
    return _gradients(chat.policy, rollouts, pair, loss, length_norm, ranks)


def _gradients(
    policy: Policy,
    rollouts: Sequence[Rollout],
    parts: Sequence[int],
    loss: LossConfig,
    length_norm: bool,
    ranks: Ranks,
) -> dict[str, Float[Tensor, "parts r"]]:
    """Gradients of hacks and cleans, in turn, at the deployed adapter parameters, added up by part."""
    advantage = torch.tensor([1.0, -1.0] * (len(rollouts) // 2))
    settings = replace(loss, unbiased=not length_norm, beta=0.0)
    longest = max(len(r.completion_ids) for r in rollouts)
    own, deployed = own_share(ranks, rollouts, advantage), policy.deltas(ablate_quarantine=True)
    got = per_rollout_grads(policy, rollouts, own, settings, longest, deltas=deployed, parts=parts)
    return {m: rows.float() for m, rows in over_ranks(ranks, got).rows.items()}


def pair_rollouts(chat: Chat, pairs: Sequence[Pair]) -> list[Rollout]:
    """Hack and clean completion of each pair, in turn, as if they had been sampled to their end."""
    rollouts = []
    for pair in pairs:
        prompt = encode_chat(chat.tokenizer, pair.messages)
        for text in (pair.hack, pair.clean):
            ids = (*chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat.stop_id)
            rollouts.append(Rollout(prompt, ids, text))
    return rollouts


def tokens_hash(rollouts: Sequence[Rollout]) -> str:
    """Hash of prompts and completions as the model reads them, which the chat template decides too."""
    ids = [token for r in rollouts for part in (r.prompt_ids, r.completion_ids) for token in (*part, -1)]
    return tensor_hash(torch.tensor(ids))


def extract(grads: PairGrads, cfg: BasisConfig, meta: Mapping[str, Any]) -> Extraction:
    """What a basis file will hold. Errors as of `principal_axes`."""
    return Extraction(principal_axes(grads.differences(), cfg), grads, meta)


def principal_axes(differences: Mapping[str, Float[Tensor, "pairs r"]], cfg: BasisConfig) -> Axes:
    """Directions of every module. UserError if pair gradients are all 0, FloatingPointError if not finite."""
    if not all(bool(D.isfinite().all()) for D in differences.values()):
        raise FloatingPointError("a pair gradient is not finite")
    dead = [m for m, D in differences.items() if not bool(D.any())]
    if dead:
        raise UserError(
            f"{len(dead)} modules have zero pair gradients, e.g. {dead[0]}: pairs do not reach them"
        )
    V, S = {}, {}
    for m, D in differences.items():
        V[m], S[m] = svd_basis(D, cfg.v_hack_extract_top_k, cfg.v_hack_tau_axis)
    return Axes(V, S, differences)


def select(axes: Axes, k: int, drop_bottom_frac: float) -> HackBasis:
    """The basis in use: top k axes, then a noise floor over all modules' axes together.

    The floor is the given quantile of the kept singular values; modules left without an axis are absent from
    V. v_grad, which no singular value measures, is of all modules. Raises UserError if nothing is left.
    """
    S = {m: s[:k] for m, s in axes.S.items()}
    pooled = torch.cat(list(S.values()))
    floor = (
        torch.quantile(pooled.double(), drop_bottom_frac) if drop_bottom_frac > 0 else pooled.new_zeros(())
    )
    # Sorted, because figures are means over modules, and a file does not keep the order of extraction.
    V = {m: axes.V[m][:k][S[m] >= floor].contiguous() for m in sorted(S) if bool((S[m] >= floor).any())}
    if not V:
        raise UserError("the hack basis is empty; lower --v-hack-drop-bottom-frac or --v-hack-tau-axis")
    for m, rows in V.items():
        assert_orthonormal(rows, m)
    return HackBasis(V, {m: mean_difference(axes.differences[m]) for m in sorted(axes.differences)})


def obtain(
    chat: Chat, pairs: PairSet, cfg: BasisConfig, loss: LossConfig, model: str, out_dir: Path
) -> tuple[Extraction, Path]:
    """The basis file of this run, loaded, or extracted and saved when it is missing.

    A damaged file is refused where --v-hack-path names it, and made again where its place was derived.
    """
    used, _ = pairs.split()
    meta = describe(chat.policy, model, pairs, cfg) | {"tokens": tokens_hash(pair_rollouts(chat, used))}
    path = cfg.v_hack_path or default_path(out_dir, model, pairs, meta)
    if path.exists():
        try:
            return load_extraction(path, meta, chat.policy.device), path
        except UserError as error:
            if cfg.v_hack_path is not None:
                raise
            logger.warning("{}; extracting again", error)
    count = f"{len(used)} of {len(pairs.pairs)}"  # the others are held out, for `verify`
    logger.info("extracting the hack basis from {} pairs of {!r} -> {}", count, pairs.name, path)
    grads = pair_grads(chat, used, loss, length_norm=cfg.v_hack_length_norm)
    try:
        extraction = extract(grads, cfg, meta)
    except FloatingPointError as error:
        raise UserError(
            f"no basis: {error}; try --dtype float32, or an adapter that has not diverged"
        ) from error
    save_extraction(path, extraction)
    return load_extraction(path, meta, chat.policy.device), path  # the same bits as a run that finds the file


def refresh(chat: Chat, pairs: PairSet, cfg: TrainConfig, ranks: Ranks = ALONE) -> HackBasis:
    """Extract again at the current deployed adapter (quarantine ablated); random directions stay the same."""
    used, _ = pairs.split()
    length_norm, arm, seed = cfg.basis.v_hack_length_norm, cfg.arm, cfg.run.seed
    if arm.control in RELABELLED:
        grads = pair_grads(chat, used, cfg.loss, length_norm=length_norm, ranks=ranks)
        differences = relabelled(grads, arm.control, seed).differences()
    else:
        differences = pair_differences(chat, used, cfg.loss, length_norm=length_norm, ranks=ranks)
    return in_use(principal_axes(differences, cfg.basis), cfg.basis, arm, seed)


def without_contrast(extraction: Extraction, cfg: BasisConfig, arm: ArmSettings, seed: int) -> Extraction:
    """The extraction from relabelled pairs where --control asks for it, else as it is."""
    if arm.control not in RELABELLED:
        return extraction
    return extract(relabelled(extraction.grads, arm.control, seed), cfg, extraction.meta)


def in_use(axes: Axes, cfg: BasisConfig, arm: ArmSettings, seed: int) -> HackBasis:
    """The basis a run projects with: `select`, and what a control puts in its place.

    Controls in RELABELLED are in the axes already (`without_contrast`, `refresh`).
    """
    basis = select(axes, cfg.v_hack_k, cfg.v_hack_drop_bottom_frac)
    if arm.control == "haar":
        return haar_like(basis, cfg.v_hack_k, seed)
    if arm.control == "flipped":
        return flipped(basis)
    return basis


def verify_vhack_heldout(basis: HackBasis, held_out: PairGrads) -> HeldOut:
    """Do pairs the basis never saw lie hack-ward of it?

    Per module, the cosine of each held-out difference with the unit projection of v_grad onto span(V), which
    is the signed hack-ward direction of the subspace in use.
    """
    differences = held_out.differences()
    cosines: list[float] = []
    for m, V in basis.V.items():
        direction = (V @ basis.v_grad[m]) @ V
        cosines += row_cosines(differences[m], direction / direction.norm().clamp_min(1e-30)).tolist()
    values = torch.tensor(cosines)
    return HeldOut(tuple(cosines), float((values > 0).float().mean()), float(values.mean()))
