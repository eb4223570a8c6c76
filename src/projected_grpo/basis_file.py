"""The file of a hack basis: its tensors, what it was made from, and the check on held-out pairs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.config import BasisConfig
from projected_grpo.errors import UserError
from projected_grpo.pairs import PairSet
from projected_grpo.proj import PairGrads
from projected_grpo.runlog import file_name, write_atomically
from projected_grpo.tensor_files import content_hash, tensor_hash

SCHEMA = "projected_grpo.vhack/1"
HARD_GATE, SOFT_GATE = 0.50, 0.20  # held-out cosine: fraction above zero, mean (docs/spec.md)


@dataclass(frozen=True)
class Axes:
    """Principal axes V of each module's pair differences, with their singular values S."""

    V: Mapping[str, Float[Tensor, "k r"]]
    S: Mapping[str, Float[Tensor, " k"]]
    differences: Mapping[str, Float[Tensor, "pairs r"]]


@dataclass(frozen=True)
class Extraction:
    """What a basis file holds: all saved axes, the pair gradients, its metadata."""

    axes: Axes
    grads: PairGrads
    meta: Mapping[str, Any]


def weights_hash(policy: Policy) -> str:
    """One hash over the frozen weights of all adapted modules."""
    hashes = [list(bytes.fromhex(tensor_hash(layer.weight))) for layer in policy.layers.values()]
    return tensor_hash(torch.tensor(hashes, dtype=torch.uint8))


def describe(policy: Policy, model: str, pairs: PairSet, cfg: BasisConfig) -> dict[str, Any]:
    """The metadata that makes a basis file fit a run; every field must agree at load."""
    deployed = torch.cat([p.flatten() for p in policy.deltas(ablate_quarantine=True).values()])
    started = {"knobs": tensor_hash(deployed)} if bool(deployed.any()) else {}  # a run with --init-adapter
    return started | {
        "schema": SCHEMA,
        "model": model,
        "weights": weights_hash(policy),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "pairs": pairs.digest,
        "extracted_from": [p.pair_id for p in pairs.split()[0]],
        "top_k": cfg.v_hack_extract_top_k,
        "tau_axis": cfg.v_hack_tau_axis,
        "mean_diff": False,  # of an option that is gone; files that have it stay valid
        "length_norm": cfg.v_hack_length_norm,
    }


def default_path(out_dir: Path, model: str, pairs: PairSet, meta: Mapping[str, Any]) -> Path:
    """Where a basis with this metadata lives when --v-hack-path is not given."""
    digest = tensor_hash(torch.tensor(list(json.dumps(meta, sort_keys=True).encode()), dtype=torch.uint8))
    safe = "".join(c if c.isalnum() or c in "-." else "_" for c in Path(model).name or model)
    return out_dir / "vhack" / f"{safe[:100]}_{file_name(pairs.name)}_{digest[:12]}.safetensors"


def save_extraction(path: Path, extraction: Extraction) -> None:
    """Write a basis file atomically."""
    tensors: dict[str, Tensor] = {}
    for m, V in extraction.axes.V.items():
        tensors |= {f"V/{m}": V, f"S/{m}": extraction.axes.S[m]}
        tensors |= {f"hack/{m}": extraction.grads.hack[m], f"clean/{m}": extraction.grads.clean[m]}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    meta = dict(extraction.meta)
    text = json.dumps(meta | {"checksum": content_hash(tensors, meta)})
    write_atomically(path, save(tensors, metadata={"projected_grpo": text}))


def load_extraction(path: Path, expected: Mapping[str, Any], device: torch.device) -> Extraction:
    """Read a basis file. Raises UserError naming the field that differs, or that the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            meta = json.loads(text.get("projected_grpo", "{}"))
            names = list(file.keys())
            # Copied, so that they are aligned, unlike the file.
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in names}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a basis file ({error}); delete it to extract again") from error
    checksum = meta.pop("checksum", None) if isinstance(meta, dict) else ""
    if checksum not in (None, content_hash(tensors, meta)):  # files had none at first
        raise UserError(f"{path}: damaged: its checksum differs from its content; delete it to extract again")
    for field, value in {"knobs": None, **expected}.items():
        if field == "tokens" and field not in meta:  # files had none at first
            continue
        if meta.get(field) != value:
            raise UserError(
                f"{path}: made for another run: {field} is {_short(meta.get(field))}, this run has "
                f"{_short(value)}; delete it, or drop --v-hack-path"
            )
    parts: dict[str, dict[str, Tensor]] = {"V": {}, "S": {}, "hack": {}, "clean": {}}
    for name, tensor in tensors.items():
        kind, _, module = name.partition("/")
        parts.setdefault(kind, {})[module] = tensor
    if len(parts) > 4 or len({frozenset(modules) for modules in parts.values()}) != 1:
        raise UserError(f"{path}: tensors are missing from it; delete it to extract again")
    grads = PairGrads(parts["hack"], parts["clean"])
    return Extraction(Axes(parts["V"], parts["S"], grads.differences()), grads, meta)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class HeldOut:
    """Cosines of held-out pair differences with the basis' hack-ward direction, one per (module, pair)."""

    cosines: tuple[float, ...]
    fraction_positive: float
    mean: float

    @property
    def passed(self) -> bool:
        """The hard gate: more than half of them point hack-ward."""
        return self.fraction_positive > HARD_GATE


def heldout_json(result: HeldOut) -> dict[str, Any]:
    """The verification as it is written next to the basis file."""
    return asdict(result) | {"passed": result.passed, "hard_gate": HARD_GATE, "soft_gate": SOFT_GATE}
