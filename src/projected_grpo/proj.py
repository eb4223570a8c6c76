"""The maths of the hack subspace: pure functions of gradients, no model, no optimiser, no I/O.

For one module of rank r, with g [r] the gradient of the loss and V [k, r] orthonormal rows, each oriented so
that a positive coefficient means "a descent step along this makes hacks likelier":

    c        = V g
    c_use    = relu(c)  one_sided  |  c  no_gate  |  2 c  reverse
    removed  = overshoot * V^T c_use                     in span(V)
    keep     = g - removed                               rescaled to |g| under preserve_magnitude (default)
    cin      = |relu(V g)| / |g|,  cout = the same of keep

    arm      keep                      park
    none     g                         -            (and every arm that acts elsewhere: arms.py)
    erase    g - removed               -
    route    g - removed               removed
    route2   sum of unflagged rows     sum of rows with cos(row, v_grad) > tau, and of known-hack rows
    absorb   sum of all rows           sum of all rows

keep becomes the gradient of delta_s, park that of the quarantine: of delta_hack, whose rows are those of
delta_s, or of a block (block.py), which has rows of its own. For a direction drawn at random cin is
sqrt(k / 2r) on average in square, because half of the coefficients are negative and relu drops them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from projected_grpo.config import ArmConfig, GateMode, Mask

Action = Literal["measure", "erase", "route"]
EMA = 0.9  # of route2's running anchor cosines


@dataclass(frozen=True)
class HackBasis:
    """Directions per module. V rows are orthonormal and hack-ward; v_grad is the unit mean difference."""

    V: Mapping[str, Float[Tensor, "k r"]]
    v_grad: Mapping[str, Float[Tensor, " r"]]


@dataclass(frozen=True)
class Projection:
    """One module's split of a gradient. Stats are 0-dim tensors, so that nothing waits for the device."""

    keep: Float[Tensor, " r"]
    removed: Float[Tensor, " r"]
    park: Float[Tensor, " r"]
    cin: Float[Tensor, ""]
    cout: Float[Tensor, ""]
    fired: Float[Tensor, ""]


@dataclass(frozen=True)
class Anchors:
    """What route2 may know of the rollouts: labelled hack, labelled clean, or neither, and the sign of A."""

    hack: Bool[Tensor, " n"]
    clean: Bool[Tensor, " n"]
    advantage_sign: Float[Tensor, " n"]


@dataclass(frozen=True)
class GateState:
    """route2's running mean cosine with v_grad over hack and clean anchors, per module of the basis."""

    hack: Mapping[str, float]
    clean: Mapping[str, float]

    def tau(self, module: str) -> float:
        """Threshold of a module: the midpoint of both running means."""
        return (self.hack[module] + self.clean[module]) / 2

    def covering(self, modules: Sequence[str]) -> "GateState":
        """The state for these modules; one that was below the noise floor starts at the others' mean."""

        def fill(known: Mapping[str, float]) -> dict[str, float]:
            mean = fmean(known.values())
            return {m: known.get(m, mean) for m in modules}

        return GateState(fill(self.hack), fill(self.clean))


@dataclass(frozen=True)
class Draws:
    """What the controls draw: a Haar-random orthonormal frame per module, and an order of the rollouts."""

    frames: Mapping[str, Float[Tensor, "r r"]] = field(default_factory=dict)
    order: Int[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Update:
    """What an arm decided: gradients of delta_s and quarantine, the next gate state, figures for the log."""

    keep: Mapping[str, Float[Tensor, " r"]]
    park: Mapping[str, Float[Tensor, " q"]]
    gate: GateState | None
    stats: Mapping[str, float | None]
    shrink: Mapping[str, Float[Tensor, ""]] = field(
        default_factory=dict
    )  # share of the realised change to park


def per_token_logps(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """log p(ids) under logits, in nats, at least float32; no second [b, t, v] tensor of log-softmax."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


def used_coefficients(c: Float[Tensor, " k"], gate_mode: GateMode) -> Float[Tensor, " k"]:
    """The part of the coefficients c = V g that is taken out."""
    if gate_mode == "one_sided":
        return c.relu()
    return c if gate_mode == "no_gate" else 2 * c


def hackward_share(g: Float[Tensor, " r"], V: Float[Tensor, "k r"]) -> Float[Tensor, ""]:
    """|relu(V g)| / |g|: cin of a gradient, and of minus a parameter change. 0 for a zero gradient."""
    return (V @ g).relu().norm() / g.norm().clamp_min(torch.finfo(g.dtype).tiny)


def null_share(V: Float[Tensor, "k r"]) -> float:
    """Root mean square of `hackward_share` over random directions: sqrt(k / 2r)."""
    k, r = V.shape
    return math.sqrt(k / (2 * r))


def project_delta_S_grad(
    g: Float[Tensor, " r"],
    V: Float[Tensor, "k r"],
    action: Action,
    *,
    gate_mode: GateMode = "one_sided",
    overshoot: float = 1.0,
    preserve_magnitude: bool = False,
) -> Projection:
    """Split one module's delta_s gradient by the hack subspace (equations at the top of this file).

    `measure` only reports what would fire. Without preserve_magnitude, keep + removed = g.
    """
    removed = overshoot * (used_coefficients(V @ g, gate_mode) @ V)
    return split(g, V, torch.zeros_like(g) if action == "measure" else removed, action, preserve_magnitude)


def split(
    g: Float[Tensor, " r"],
    V: Float[Tensor, "k r"],
    removed: Float[Tensor, " r"],
    action: Action,
    preserve_magnitude: bool,
) -> Projection:
    """g without `removed`, rescaled to |g| if asked, with the hack-ward shares before and after.

    When nearly all of g is removed there is nothing trustworthy left to blow up, so keep is not rescaled.
    """
    keep = g - removed
    if preserve_magnitude and action != "measure":
        scale = g.norm() / keep.norm().clamp_min(torch.finfo(g.dtype).tiny)
        keep = torch.where(keep.norm() > 1e-3 * g.norm(), keep * scale, keep)
    return Projection(
        keep=keep,
        removed=removed,
        park=removed if action == "route" else torch.zeros_like(g),
        cin=hackward_share(g, V),
        cout=hackward_share(keep, V),
        fired=(V @ g > 0).to(g.dtype).mean(),
    )


def matched_removal(
    g: Float[Tensor, " r"],
    size: Float[Tensor, ""],
    frame: Float[Tensor, "r r"],
    gate_mode: GateMode,
) -> Float[Tensor, " r"]:
    """A component of g of norm `size` in a random subspace: the frame's first axes, as many as it takes.

    The control for "it merely removes more gradient". The last axis is taken in part, to meet the norm;
    where the whole frame has less to give, all of it is taken and scaled up.
    """
    used = used_coefficients(frame @ g, gate_mode)
    energy = used.square()
    before = energy.cumsum(0) - energy
    share = ((size.square() - before) / energy.clamp_min(torch.finfo(g.dtype).tiny)).clamp(0, 1)
    removed = (used * share.sqrt()) @ frame
    norm = removed.norm()
    return torch.where(norm > 0, removed * (size / norm), torch.zeros_like(g))  # the frame may have none


def row_cosines(rows: Float[Tensor, "n r"], v: Float[Tensor, " r"]) -> Float[Tensor, " n"]:
    """Cosine of each row with the unit vector v; 0 for a zero row."""
    return (rows @ v) / rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)


def update_gate(gate: GateState, cosines: Mapping[str, Float[Tensor, " n"]], anchors: Anchors) -> GateState:
    """Move the running means towards this step's anchors (EMA 0.9); unchanged where a kind has no anchor.

    A row is the gradient of A * log-likelihood, so a hack with A < 0 points away from the hack: the sign of A
    is divided out, which makes every anchor vote for "making this rollout likelier". Rows with A = 0 carry no
    gradient and do not vote.
    """

    def moved(old: Mapping[str, float], mask: Bool[Tensor, " n"]) -> dict[str, float]:
        voting = mask & (anchors.advantage_sign != 0)
        if not bool(voting.any()):
            return dict(old)
        means = torch.stack([(c * anchors.advantage_sign)[voting].mean() for c in cosines.values()]).tolist()
        return {m: EMA * old[m] + (1 - EMA) * mean for m, mean in zip(cosines, means, strict=True)}

    return GateState(hack=moved(gate.hack, anchors.hack), clean=moved(gate.clean, anchors.clean))


@dataclass(frozen=True)
class ArmInput:
    """All that an arm may look at: per-rollout gradients, their sum, the basis, settings, route2's memory."""

    rows: Mapping[str, Float[Tensor, "n r"]]
    total: dict[str, Float[Tensor, " r"]]
    basis: HackBasis
    settings: ArmConfig
    anchors: Anchors | None = None
    gate: GateState | None = None
    draws: Draws = Draws()
    block: Mapping[str, Float[Tensor, "n p"]] = field(default_factory=dict)

    @property
    def parkable(self) -> Mapping[str, Float[Tensor, "n q"]]:
        """Rows of the quarantine: of its blocks, or of delta_hack, which are those of delta_s."""
        return self.block or self.rows


def measured(
    update: Update,
    rows: Mapping[str, Float[Tensor, "n r"]],
    total: Mapping[str, Float[Tensor, " r"]],
    basis: HackBasis,
    is_teacher: Bool[Tensor, " n"],
    split: bool,
) -> Update:
    """The update with the figures that every arm has; `split`: of student and teacher rows apart, too.

    A row is a rollout's gradient, or the sum over rollouts of one source.
    """
    stats = _cosine_stats(total, update.keep, basis)
    if split:
        by_source = {
            "cos_pre_s": {m: rows[m][~is_teacher].sum(0) for m in basis.V},
            "cos_pre_t": {m: rows[m][is_teacher].sum(0) for m in basis.V},
        }
        stats |= {name: mean_hackward_share(g, basis) for name, g in by_source.items()}
    stats |= {"q_egy": parked_share(update.keep, update.park)}
    return replace(update, stats=stats | dict(update.stats))


def arm_none(x: ArmInput) -> Update:
    """Vanilla, and every arm that acts elsewhere: the gradient as it is."""
    return Update(keep=x.total, park={}, gate=x.gate, stats={})


def arm_erase(x: ArmInput) -> Update:
    """Projected: the hack-ward component is dropped."""
    splits = _project_all(x)
    return Update(keep=x.total | {m: s.keep for m, s in splits.items()}, park={}, gate=x.gate, stats={})


def arm_route(x: ArmInput) -> Update:
    """Routing: the hack-ward component trains the quarantine."""
    splits = _project_all(x)
    keep = x.total | {m: s.keep for m, s in splits.items()}
    return shrunk(x, Update(keep, {m: s.park for m, s in splits.items()}, x.gate, {}))


def arm_route2(x: ArmInput) -> Update:
    """Routing of whole rollouts, module by module, by a threshold calibrated on anchors."""
    if x.anchors is None or x.gate is None:
        raise ValueError("route2 needs anchors and a gate state")
    cosines = {m: row_cosines(x.rows[m], v) for m, v in x.basis.v_grad.items()}
    gate = update_gate(x.gate, cosines, x.anchors)
    flagged = {m: (c > gate.tau(m)) | x.anchors.hack for m, c in cosines.items()}
    parked = {m: flagged.get(m, x.anchors.hack) for m in x.rows}  # forcing needs no direction
    live = x.anchors.advantage_sign != 0
    if x.settings.control == "random_parking":
        parked = {m: _dealt_again(f, live, x.draws) for m, f in parked.items()}
    park = {m: (x.parkable[m] * _all_but("keep", f, x.settings)[:, None]).sum(0) for m, f in parked.items()}
    keep = {m: (x.rows[m] * _all_but("route", f, x.settings)[:, None]).sum(0) for m, f in parked.items()}
    residual = [row_cosines(keep[m][None], v)[0] for m, v in x.basis.v_grad.items()]
    stats = {
        "tau": fmean(gate.tau(m) for m in flagged),
        "hkgap": fmean(gate.hack[m] - gate.clean[m] for m in flagged),
        "resid": float(torch.stack(residual).mean()),
        "fired": float(torch.stack([f[live].float().mean() for f in flagged.values()]).mean()),
    }
    return shrunk(x, Update(keep=keep, park=park, gate=gate, stats=stats))


def _all_but(mask: Mask, flagged: Bool[Tensor, " n"], settings: ArmConfig) -> Bool[Tensor, " n"]:
    """The rollouts that have another mask: all but `keep` train the quarantine, all but `route` delta_s."""
    return torch.where(flagged, settings.mask_flagged != mask, settings.mask_unflagged != mask)


def arm_absorb(x: ArmInput) -> Update:
    """No gate: everything trains both knobs, so that the quarantine takes what it takes fastest."""
    return Update(x.total, {m: rows.sum(0) for m, rows in x.parkable.items()}, x.gate, {})


def shrunk(x: ArmInput, update: Update) -> Update:
    """Under the control `shrink`: vanilla's gradient, and the share of each realised change to park instead.

    AdamW ignores the scale of a gradient, so a gradient that is shrunk would shrink nothing.
    """
    if x.settings.control != "shrink":
        return update
    share = {
        m: parked.norm() / (parked.norm() + update.keep[m].norm()).clamp_min(torch.finfo(parked.dtype).tiny)
        for m, parked in update.park.items()
    }
    return replace(update, keep=x.total, park={}, shrink=share)


def _dealt_again(flags: Bool[Tensor, " n"], live: Bool[Tensor, " n"], draws: Draws) -> Bool[Tensor, " n"]:
    """As many flags among the rows that carry gradient, in the step's random order, alike in all modules."""
    if draws.order is None:
        raise ValueError("random_parking needs an order of the rollouts")
    candidates = draws.order[live[draws.order]]
    dealt = torch.zeros_like(flags)
    dealt[candidates[: int((flags & live).sum())]] = True
    return dealt


def split_by_arm(
    g: Float[Tensor, " r"],
    V: Float[Tensor, "k r"],
    settings: ArmConfig,
    frame: Float[Tensor, "r r"] | None = None,
) -> Projection:
    """One module's split under erase or route with their settings; haar_matched removes as much at random."""
    action: Action = "route" if settings.intervention == "route" else "erase"
    gate_mode, preserve = settings.gate_mode, settings.preserve_magnitude
    real = project_delta_S_grad(
        g,
        V,
        action,
        gate_mode=gate_mode,
        overshoot=settings.project_overshoot,
        preserve_magnitude=preserve,
    )
    if settings.control != "haar_matched":
        return real
    if frame is None:
        raise ValueError("haar_matched needs a random frame")
    return split(g, V, matched_removal(g, real.removed.norm(), frame, gate_mode), action, preserve)


def _project_all(x: ArmInput) -> dict[str, Projection]:
    if x.settings.project == "update":  # then it is the realised change that is split, after AdamW
        return {}
    return {m: split_by_arm(x.total[m], V, x.settings, x.draws.frames.get(m)) for m, V in x.basis.V.items()}


def mean_hackward_share(g: Mapping[str, Tensor], basis: HackBasis) -> float | None:
    """Mean over modules of `hackward_share`; relu acts per module, before this mean. None if all g are 0."""
    shares = [hackward_share(g[m], V) for m, V in basis.V.items()]
    norms = [g[m].norm() for m in basis.V]
    if not shares:
        return None
    share, live = torch.stack(shares), torch.stack(norms) > 0
    return float(share[live].mean()) if bool(live.any()) else None


def _cosine_stats(
    total: Mapping[str, Tensor], keep: Mapping[str, Tensor], basis: HackBasis
) -> dict[str, float | None]:
    if not basis.V:
        return dict.fromkeys(("cos_pre", "cos_post", "cos_null", "fired"))
    fired = [(V @ total[m] > 0).float().mean() for m, V in basis.V.items()]
    return {
        "cos_pre": mean_hackward_share(total, basis),
        "cos_post": mean_hackward_share(keep, basis),
        "cos_null": fmean(null_share(V) for V in basis.V.values()),
        "fired": float(torch.stack(fired).mean()),
    }


def parked_share(keep: Mapping[str, Tensor], park: Mapping[str, Tensor]) -> float:
    """Norm of what is parked over the sum of both norms."""
    if not park:
        return 0.0
    kept = torch.stack([g.norm() for g in keep.values()]).norm()
    parked = torch.stack([g.norm() for g in park.values()]).norm()
    both = float(kept + parked)
    return float(parked) / both if both > 0 else 0.0


def svd_basis(
    D: Float[Tensor, "pairs r"], top_k: int, tau_axis: float = 0.0
) -> tuple[Float[Tensor, "k r"], Float[Tensor, " k"]]:
    """Right singular vectors of the pair differences and their singular values, largest first.

    Each row is turned so that most pairs have a positive coefficient (ties: the mean decides). Axes with
    S_i / S_0 < tau_axis, or at rounding level, are left out, so k can be smaller than top_k.
    """
    _, S, Vh = torch.linalg.svd(D, full_matrices=False)
    floor = max(tau_axis, max(D.shape) * torch.finfo(D.dtype).eps)  # as numpy's matrix_rank
    k = min(top_k, int((S >= S[0] * floor).sum())) if float(S[0]) > 0 else 0
    V, S = Vh[:k], S[:k]
    coefficients = D @ V.T
    votes = (coefficients > 0).sum(0) - (coefficients < 0).sum(0)
    lean = torch.where(votes == 0, coefficients.mean(0), votes.to(D.dtype))
    return V * torch.where(lean < 0, -1.0, 1.0)[:, None].to(D.dtype), S


def mean_difference(D: Float[Tensor, "pairs r"]) -> Float[Tensor, " r"]:
    """Unit mean of the pair differences (zero if they cancel)."""
    mean = D.mean(0)
    return mean / mean.norm().clamp_min(torch.finfo(D.dtype).tiny)


def haar_basis(k: int, r: int, generator: torch.Generator) -> Float[Tensor, "k r"]:
    """k orthonormal rows, uniform over the Stiefel manifold (QR with the signs of R fixed, Mezzadri 2007)."""
    Q, R = torch.linalg.qr(torch.randn(r, k, generator=generator, dtype=torch.float64))
    return (Q * R.diagonal().sign()).T.to(torch.float32).contiguous()


def basis_overlap(old: HackBasis, new: HackBasis) -> float | None:
    """Mean over shared modules of |V_old V_new^T|_F^2 / min(k): 1 same subspace, about k/r unrelated."""
    shared = [m for m in new.V if m in old.V]
    if not shared:
        return None
    shares = [(old.V[m] @ new.V[m].T).square().sum() / min(len(old.V[m]), len(new.V[m])) for m in shared]
    return float(torch.stack(shares).mean())


def assert_orthonormal(V: Float[Tensor, "k r"], module: str) -> None:
    """The projection formulas need orthonormal rows. Raises ValueError naming the module."""
    eye = torch.eye(len(V), dtype=V.dtype, device=V.device)
    error = float((V @ V.T - eye).abs().max()) if len(V) else 0.0
    if not error < 1e-4:
        raise ValueError(f"basis of {module} is not orthonormal (largest error {error:.1e})")


@dataclass(frozen=True)
class PairGrads:
    """Per module, each pair's loss gradients with advantage +1 on the hack and -1 on the clean completion."""

    hack: Mapping[str, Float[Tensor, "pairs r"]]
    clean: Mapping[str, Float[Tensor, "pairs r"]]

    def differences(self) -> dict[str, Float[Tensor, "pairs r"]]:
        """grad NLL(hack) - grad NLL(clean) per pair and module."""
        return {m: self.hack[m] + self.clean[m] for m in self.hack}
