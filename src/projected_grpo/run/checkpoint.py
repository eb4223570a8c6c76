"""Adapter parameters and run state on disk: safetensors only, one file each, written whole or not at all."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from projected_grpo.antipasto import Policy, weights_digest
from projected_grpo.arms.gate import GateState
from projected_grpo.block import Start
from projected_grpo.errors import UserError
from projected_grpo.proj import HackBasis
from projected_grpo.runlog import plain, write_atomically
from projected_grpo.tensor_files import content_hash

ADAPTER_SCHEMA = "projected_grpo.knobs/1"
STATE_SCHEMA = "projected_grpo.state/2"
BLOCK = ("block/", "block_A0/", "block_B0/")  # what a block's displacement and its two starts are saved as
STATE_NAME = re.compile(r"state_step(\d+)\.safetensors")


def save_adapter(path: Path, policy: Policy, meta: Mapping[str, Any], *, deployed: bool) -> None:
    """Write delta_s, and the quarantine too unless `deployed` (deployment is its deletion)."""
    made_for = {"schema": ADAPTER_SCHEMA, "deployed": deployed, "weights": weights_digest(policy)}
    starts = {} if deployed else _starts(policy)
    _write(path, {**_adapter(policy, quarantine=not deployed), **starts}, {**meta, **made_for})


def load_adapter(path: Path, policy: Policy) -> dict[str, Any]:
    """Put the adapter of an adapter file, or of a run's state, into a policy; returns the metadata.

    A file's blocks take the place of the policy's; a deployed file empties the quarantine. Raises UserError
    for a damaged file or adapter parameters of other modules, ranks or weights.
    """
    tensors, meta = _read(path, ADAPTER_SCHEMA, STATE_SCHEMA)
    made_for = meta.get("weights")
    if made_for is None:
        logger.warning(
            "{}: from an older version, so it does not say which weights its adapter parameters fit", path
        )
    elif made_for != weights_digest(policy):
        raise UserError(
            f"{path}: made for another model: it does not fit these weights; name its own with --model, or "
            "load them in the --dtype it was trained in"
        )
    _fill(path, policy, tensors, quarantine=not meta.get("deployed", False))
    return meta


def read_adapter_meta(path: Path) -> dict[str, Any]:
    """What an adapter file or a run's state says of itself.

    Raises UserError if it is neither, or does not hold what its arm deploys.
    """
    meta = _read(path, ADAPTER_SCHEMA, STATE_SCHEMA)[1]
    if meta.get("intervention") == "posthoc" and not meta.get("deployed"):
        raise UserError(
            f"{path}: an adapter of posthoc before its ablation; "
            "give the run's folder or its train.safetensors"
        )
    return meta


def _fill(path: Path, policy: Policy, tensors: Mapping[str, Tensor], *, quarantine: bool) -> None:
    starts = _read_starts(path, policy, tensors) if quarantine else {}
    kinds = ("delta_s/", "delta_hack/", *BLOCK)
    adapter = _adapter(policy, quarantine=quarantine)
    wanted = {name: tuple(k.shape) for name, k in adapter.items() if not name.startswith("block/")}
    wanted |= {f"block/{m}": (start.A.numel() + start.B.numel(),) for m, start in starts.items()}
    known = {*wanted, *(f"{half}{m}" for m in starts for half in BLOCK[1:])}
    extra = sorted(n for n in tensors if n.startswith(kinds) and n not in known)
    if extra:
        raise UserError(f"{path}: made for another model: this one has no {extra[0]}")
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            raise UserError(f"{path}: made for another model: {name} is missing or has another shape")
    policy.give_blocks(starts)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.delta_hack.zero_()
        for name, parameter in _adapter(policy, quarantine=quarantine).items():
            parameter.copy_(tensors[name])


def _read_starts(path: Path, policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Start]:
    """Where the blocks of a file begin. Raises UserError if one does not fit its module."""
    starts = {}
    for m, layer in policy.layers.items():
        A, B = (tensors.get(f"{half}{m}") for half in BLOCK[1:])
        if A is None or B is None:
            continue  # a half alone is one too many, which `_fill` refuses
        d_out, d_in = len(layer.U), layer.Vh.shape[1]
        k = A.numel() // d_in
        if A.shape != (k, d_in) or B.shape != (d_out, k):
            raise UserError(f"{path}: made for another model: the block of {m} has another shape")
        starts[m] = Start(A, B)
    return starts


@dataclass(frozen=True)
class SavedState:
    """A state file that was read whole and agrees with its checksum."""

    path: Path
    tensors: Mapping[str, Tensor]
    gate: GateState | None
    facts: Mapping[str, Any]


def state_path(run_dir: Path, step: int) -> Path:
    """Where a run's state after `step` steps is."""
    return run_dir / "state" / f"state_step{step:04d}.safetensors"


def state_paths(run_dir: Path) -> list[Path]:
    """A run's state files, newest first."""
    steps = {
        path: int(match.group(1))
        for path in (run_dir / "state").glob("*.safetensors")
        if (match := STATE_NAME.fullmatch(path.name))
    }
    return sorted(steps, key=steps.__getitem__, reverse=True)


def save_state(
    path: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    basis: HackBasis,
    gate: GateState | None,
    facts: Mapping[str, Any],
) -> None:
    """Write all that resuming needs as one file: adapter, AdamW, basis, gate, and `facts` as JSON."""
    adapter = _adapter(policy, quarantine=True)
    tensors: dict[str, Tensor] = {**adapter, **_starts(policy)}
    for name, parameter in adapter.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adamw/{key}/{name}"] = value
    tensors |= {f"V/{m}": V for m, V in basis.V.items()}
    tensors |= {f"v_grad/{m}": v for m, v in basis.v_grad.items()}
    gates = None if gate is None else {"hack": dict(gate.hack), "clean": dict(gate.clean)}
    made_for = {"schema": STATE_SCHEMA, "weights": weights_digest(policy)}
    _write(path, tensors, {**facts, "gate": gates, **made_for})


def read_state(path: Path) -> SavedState:
    """Read and verify a state file. Raises UserError saying why it cannot be used."""
    tensors, facts = _read(path, STATE_SCHEMA)
    try:
        gates = facts.pop("gate")
        gate = None if gates is None else GateState(gates["hack"], gates["clean"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: written by another version, its gate cannot be read") from error
    return SavedState(path, tensors, gate, facts)


def restore_state(saved: SavedState, policy: Policy, optimizer: torch.optim.Optimizer) -> HackBasis:
    """Put adapter and AdamW back in place; returns the basis. Raises UserError for another model's state."""
    tensors = saved.tensors
    modules = sorted(policy.layers)  # in the order of `select`
    for m in modules:
        V, v = tensors.get(f"V/{m}"), tensors.get(f"v_grad/{m}")
        if v is None:
            raise UserError(f"{saved.path}: of another model or an older version: it has no v_grad of {m}")
        if (V is not None and V.shape[1:] != (policy.ranks[m],)) or v.shape != (policy.ranks[m],):
            raise UserError(f"{saved.path}: made for another model: its basis of {m} has another shape")
    _fill(saved.path, policy, tensors, quarantine=True)
    for name, parameter in _adapter(policy, quarantine=True).items():
        state = {
            key: tensors[f"adamw/{key}/{name}"].to(parameter.device if key != "step" else "cpu", copy=True)
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"adamw/{key}/{name}" in tensors
        }
        if state:
            optimizer.state[parameter] = state
    return HackBasis(  # copied, as AdamW's: BLAS rounds otherwise in a file's unaligned memory
        V={m: tensors[f"V/{m}"].to(policy.device, copy=True) for m in modules if f"V/{m}" in tensors},
        v_grad={m: tensors[f"v_grad/{m}"].to(policy.device, copy=True) for m in modules},
    )


def _adapter(policy: Policy, *, quarantine: bool) -> dict[str, torch.nn.Parameter]:
    adapter = {f"delta_s/{m}": layer.delta_s for m, layer in policy.layers.items()}
    if quarantine:
        adapter |= {f"delta_hack/{m}": layer.delta_hack for m, layer in policy.layers.items()}
        adapter |= {f"block/{m}": block.moved for m, block in policy.blocks.items()}
    return adapter


def _starts(policy: Policy) -> dict[str, Tensor]:
    """What a block's displacement means nothing without."""
    starts: dict[str, Tensor] = {}
    for m, block in policy.blocks.items():
        starts |= {f"block_A0/{m}": block.A0, f"block_B0/{m}": block.B0}
    return starts


def _write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    facts = plain(meta)
    facts["checksum"] = content_hash(data, facts)
    write_atomically(path, save(data, metadata={"projected_grpo": json.dumps(facts)}))


def _read(path: Path, *schemas: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("projected_grpo", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from error
    found = meta.get("schema") if isinstance(meta, dict) else None
    if found not in schemas:
        raise UserError(f"{path}: schema is {found!r}, expected {' or '.join(map(repr, schemas))}")
    checksum = meta.pop("checksum", None)
    # Adapter parameter files were written without one at first.
    if (checksum is not None or found == STATE_SCHEMA) and checksum != content_hash(tensors, meta):
        raise UserError(f"{path}: damaged: its checksum differs from its content")
    del meta["schema"]
    return tensors, meta
