"""The hack basis: gradients of contrastive pairs, their principal directions, a file that can be trusted.

A pair counts as a group of two rollouts with advantages +1 (hack) and -1 (clean) and goes through the same
`per_rollout_grads` as training, so that

    row(hack) + row(clean) = grad NLL(hack) - grad NLL(clean)

up to the loss's fixed denominator. A descent step along it makes the hack likelier. These differences are
stacked per module, D [pairs, r], and decomposed (proj.svd_basis).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from projected_grpo.antipasto import Policy
from projected_grpo.basis_file import (
    Axes,
    Extraction,
    HeldOut,
    default_path,
    describe,
    load_extraction,
    save_extraction,
)
from projected_grpo.block import Start, direction_start, random_start
from projected_grpo.config import RELABELLED, ArmConfig, BasisConfig, Control, LossConfig, has_block
from projected_grpo.errors import UserError
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.models import encode_chat
from projected_grpo.pairs import Pair, PairSet
from projected_grpo.proj import (
    GateState,
    HackBasis,
    PairGrads,
    assert_orthonormal,
    haar_basis,
    mean_difference,
    row_cosines,
    svd_basis,
)
from projected_grpo.ranks import ALONE, Ranks, over_ranks, own_share
from projected_grpo.rollout import Rollout
from projected_grpo.seeds import stream_seed


def pair_grads(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    loss: LossConfig,
    stop_id: int,
    *,
    length_norm: bool = False,
    ranks: Ranks = ALONE,
) -> PairGrads:
    """Gradients of all pairs, both sides of each, through the training loss at the deployed knobs.

    With `ranks`, which all must call, each process runs its share of them.
    """
    rollouts = pair_rollouts(tokenizer, pairs, stop_id)
    rows = _gradients(policy, rollouts, range(len(rollouts)), loss, stop_id, length_norm, ranks)
    return PairGrads(
        hack={m: g[0::2].contiguous() for m, g in rows.items()},
        clean={m: g[1::2].contiguous() for m, g in rows.items()},
    )


def pair_differences(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    loss: LossConfig,
    stop_id: int,
    *,
    length_norm: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Float[Tensor, "pairs r"]]:
    """`pair_grads(...).differences()`, with one backward pass through a pair's prompt for two."""
    rollouts = pair_rollouts(tokenizer, pairs, stop_id)
    pair = [i // 2 for i in range(len(rollouts))]
    return _gradients(policy, rollouts, pair, loss, stop_id, length_norm, ranks)


def _gradients(
    policy: Policy,
    rollouts: Sequence[Rollout],
    parts: Sequence[int],
    loss: LossConfig,
    stop_id: int,
    length_norm: bool,
    ranks: Ranks,
) -> dict[str, Float[Tensor, "parts r"]]:
    """Gradients of hacks and cleans, in turn, at the deployed knobs, added up by part."""
    advantage = torch.tensor([1.0, -1.0] * (len(rollouts) // 2))
    settings = LossConfig(
        unbiased=not length_norm,
        clip=loss.clip,
        ratio_cap=loss.ratio_cap,
        beta=0.0,
        tokens_per_microbatch=loss.tokens_per_microbatch,
        grad_checkpoint=loss.grad_checkpoint,
    )
    longest = max(len(r.completion_ids) for r in rollouts)
    got = per_rollout_grads(
        policy,
        rollouts,
        own_share(ranks, rollouts, advantage),
        settings,
        longest,
        stop_id,
        deltas=policy.deltas(ablate_quarantine=True),
        parts=parts,
    )
    return {m: rows.float() for m, rows in over_ranks(ranks, got).rows.items()}


def pair_rollouts(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], stop_id: int) -> list[Rollout]:
    """Hack and clean completion of each pair, in turn, as if they had been sampled to their end."""
    rollouts = []
    for pair in pairs:
        prompt = encode_chat(tokenizer, pair.messages)
        for text in (pair.hack, pair.clean):
            ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], stop_id)
            rollouts.append(Rollout(prompt, ids, text))
    return rollouts


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
        if cfg.v_hack_mean_diff:
            V[m], S[m] = mean_difference(D)[None], D.mean(0).norm()[None]
        else:
            V[m], S[m] = svd_basis(D, cfg.v_hack_extract_top_k, cfg.v_hack_tau_axis)
    return Axes(V, S, differences)


def select(axes: Axes, k: int, drop_bottom_frac: float) -> HackBasis:
    """The basis in use: top k axes, then a noise floor over all modules' axes together.

    The floor is the given quantile of the kept singular values; modules left without an axis are absent.
    Raises UserError if nothing is left.
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
    return HackBasis(V, {m: mean_difference(axes.differences[m]) for m in V})


def relabelled(grads: PairGrads, control: Control, seed: int) -> PairGrads:
    """Pair gradients without the contrast: differences of completions of one kind, either way round.

    `clean_clean` sets every clean completion against another; `shuffled` does so with half of the pairs and
    sets hacks against hacks in the rest. (Labels dealt out at random would not do: differences that keep the
    contrast, with either sign, leave its axis on top of an uncentred SVD.)
    A clean row is a gradient at advantage -1, so one that stands for a hack changes sign.
    """
    n = len(next(iter(grads.hack.values())))
    generator = torch.Generator().manual_seed(stream_seed(seed, control))
    order = torch.randperm(n, generator=generator)
    partner = order[(order.argsort() + 1) % n]  # a single cycle, so that nothing meets itself
    side = torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    side[0] = -side[1]  # all alike, the differences around the cycle would cancel
    hacks = torch.randperm(n, generator=generator)[:, None] < (n // 2 if control == "shuffled" else 0)

    def likelier(m: str) -> Float[Tensor, "n r"]:
        return side.to(grads.hack[m]) * torch.where(hacks, grads.hack[m], -grads.clean[m])

    def rival(m: str) -> Float[Tensor, "n r"]:
        own = torch.where(hacks, -grads.hack[m][partner], grads.clean[m][partner])
        return side.to(grads.hack[m]) * own

    return PairGrads({m: likelier(m) for m in grads.hack}, {m: rival(m) for m in grads.hack})


def haar_like(basis: HackBasis, k: int, seed: int) -> HackBasis:
    """Random orthonormal rows of the same shapes, and random unit vectors, the same for the same seed.

    Rows are the first of k, so that a module whose noise floor moves keeps its directions.
    """

    def rows(m: str, V: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(stream_seed(seed, "haar-basis", m))
        return haar_basis(k, V.shape[1], generator)[: len(V)].to(V).contiguous()

    return with_random_v(HackBasis({m: rows(m, V) for m, V in basis.V.items()}, basis.v_grad), seed)


def random_frames(policy: Policy, seed: int) -> dict[str, Float[Tensor, "r r"]]:
    """A whole Haar-random frame per module, for `matched_removal`; the same for the same seed."""
    return {
        m: haar_basis(r, r, torch.Generator().manual_seed(stream_seed(seed, "frame", m))).to(policy.device)
        for m, r in policy.ranks.items()
    }


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


def flipped(basis: HackBasis) -> HackBasis:
    """Every direction reversed: what made hacks likelier now counts as what makes them less likely."""
    return HackBasis({m: -V for m, V in basis.V.items()}, {m: -v for m, v in basis.v_grad.items()})


def with_random_v(basis: HackBasis, seed: int) -> HackBasis:
    """The control of route2: Haar-random unit vectors in place of v_grad, the same for the same seed."""

    def unit(m: str, v: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(stream_seed(seed, "haar", m))
        return haar_basis(1, len(v), generator)[0].to(v)

    return HackBasis(basis.V, {m: unit(m, v) for m, v in basis.v_grad.items()})


def initial_gate(basis: HackBasis, grads: PairGrads) -> GateState:
    """route2's running means before any rollout: the pairs' own cosines with v_grad."""
    return GateState(
        hack={m: float(row_cosines(grads.hack[m].to(v), v).mean()) for m, v in basis.v_grad.items()},
        clean={m: float(row_cosines(-grads.clean[m].to(v), v).mean()) for m, v in basis.v_grad.items()},
    )


def obtain(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
    pairs: PairSet,
    cfg: BasisConfig,
    loss: LossConfig,
    model: str,
    out_dir: Path,
) -> tuple[Extraction, Path]:
    """The basis file of this run, loaded, or extracted and saved when it is missing.

    A damaged file is refused where --v-hack-path names it, and made again where its place was derived.
    """
    meta = describe(policy, model, pairs, cfg)
    path = cfg.v_hack_path or default_path(out_dir, model, pairs, meta)
    if path.exists():
        try:
            return load_extraction(path, meta, policy.device), path
        except UserError as error:
            if cfg.v_hack_path is not None:
                raise
            logger.warning("{}; extracting again", error)
    used, _ = pairs.split()
    logger.info("extracting the hack basis from {} pairs of {!r} -> {}", len(used), pairs.name, path)
    grads = pair_grads(policy, tokenizer, used, loss, stop_id, length_norm=cfg.v_hack_length_norm)
    try:
        extraction = extract(grads, cfg, meta)
    except FloatingPointError as error:
        raise UserError(f"no basis: {error}; try --dtype float32, or knobs that have not diverged") from error
    save_extraction(path, extraction)
    return load_extraction(path, meta, policy.device), path  # the same bits as a run that finds the file


def refresh(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
    pairs: PairSet,
    cfg: BasisConfig,
    loss: LossConfig,
    arm: ArmConfig,
    seed: int,
    ranks: Ranks = ALONE,
) -> HackBasis:
    """Extract again at the current deployed knobs (quarantine ablated); random directions stay the same."""
    used, _ = pairs.split()
    arguments = (policy, tokenizer, used, loss, stop_id)
    length_norm = cfg.v_hack_length_norm
    if arm.control in RELABELLED:
        grads = pair_grads(*arguments, length_norm=length_norm, ranks=ranks)
        differences = relabelled(grads, arm.control, seed).differences()
    else:
        differences = pair_differences(*arguments, length_norm=length_norm, ranks=ranks)
    return in_use(principal_axes(differences, cfg), cfg, arm, seed)


def without_contrast(extraction: Extraction, cfg: BasisConfig, arm: ArmConfig, seed: int) -> Extraction:
    """The extraction from relabelled pairs where --control asks for it, else as it is."""
    if arm.control not in RELABELLED:
        return extraction
    return extract(relabelled(extraction.grads, arm.control, seed), cfg, extraction.meta)


def in_use(axes: Axes, cfg: BasisConfig, arm: ArmConfig, seed: int) -> HackBasis:
    """The basis a run projects with: `select`, and what a control puts in its place.

    Controls in RELABELLED are in the axes already (`without_contrast`, `refresh`).
    """
    basis = select(axes, cfg.v_hack_k, cfg.v_hack_drop_bottom_frac)
    if arm.control == "haar":
        return haar_like(basis, cfg.v_hack_k, seed)
    if arm.control == "flipped":
        return flipped(basis)
    return basis if arm.route2_random_v_seed is None else with_random_v(basis, arm.route2_random_v_seed)


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
