"""Tensors on disk: their hashes, and the cache of singular value decompositions."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from projected_grpo.runlog import write_atomically

CACHE_SCHEMA = "projected_grpo.svd/1"
EXACT = 1e-5  # relative; torch's own SVD in float32 is at 1e-6


@dataclass(frozen=True)
class SVD:
    """Thin singular value decomposition of a weight, singular values descending."""

    U: Float[Tensor, "d_out r"]
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r d_in"]


def compute_svd(W: Float[Tensor, "d_out d_in"]) -> SVD:
    """Thin SVD in float32 (float64 stays), on the weight's device.

    On a GPU by `svd_by_gram`, if that is as exact: torch's own takes some 15 to 20 minutes for the weights of
    Qwen3-4B, by estimate.
    """
    wide = W if W.dtype == torch.float64 else W.float()
    if wide.is_cuda and wide.dtype == torch.float32:
        found = svd_by_gram(wide)
        if is_exact(found, wide):
            return found
    return SVD(*torch.linalg.svd(wide, full_matrices=False))


def svd_by_gram(W: Float[Tensor, "d_out d_in"]) -> SVD:
    """Thin SVD of a float32 matrix from the eigenvectors of the smaller of W^T W and W W^T, in float64.

    W V = Q R then gives U and S, of which R is all but diagonal. A QR makes Q orthonormal even where singular
    values are 0 or equal. Those below 1e-8 of the largest are exact to that alone, below float32's rounding.
    """
    if W.shape[0] < W.shape[1]:
        turned = svd_by_gram(W.T)
        return SVD(turned.Vh.T.contiguous(), turned.S, turned.U.T.contiguous())
    A = W.double()
    V = torch.linalg.eigh(A.T @ A).eigenvectors.flip(
        1
    )  # largest first: null vectors would lead the QR astray
    Q, R = torch.linalg.qr(A @ V)
    S, order = R.diagonal().abs().sort(descending=True)
    U = torch.where(R.diagonal() < 0, -Q, Q)[:, order]
    return SVD(U.float().contiguous(), S.float(), V[:, order].T.float().contiguous())


def is_exact(svd: SVD, W: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether W and the bases' inner products come back to within some roundings of float32."""
    eye = torch.eye(len(svd.S), device=W.device)
    skew = max(float((x - eye).abs().max()) for x in (svd.U.T @ svd.U, svd.Vh @ svd.Vh.T))
    error = float(((svd.U * svd.S) @ svd.Vh - W).norm())
    return skew < EXACT and error <= EXACT * float(W.norm())


def tensor_hash(tensor: Tensor) -> str:
    """Hash of dtype, shape and bytes."""
    data = tensor.detach().contiguous().cpu()
    digest = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=16)
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_hash(tensors: Mapping[str, Tensor], meta: object) -> str:
    """Hash of named tensors and a JSON value, for a file that must know whether it is what was written."""
    parts = [json.dumps(meta, sort_keys=True)]
    parts += [f"{name} {tensor_hash(tensors[name])}" for name in sorted(tensors)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def load_svd(W: Float[Tensor, "d_out d_in"], cache_dir: Path | None) -> SVD:
    """The SVD of W from the cache, or computed and cached; a damaged or foreign file is built again.

    The basis is stored in W's dtype (it is used in that dtype), S in at least float32.
    """
    if cache_dir is None:
        return compute_svd(W)
    key = tensor_hash(W)
    path = cache_dir / f"{key}.safetensors"
    if path.exists():
        try:
            return _read_svd(path, key, W)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            logger.warning("SVD cache {} is not usable ({}); computing it again", path, error)
    svd = compute_svd(W)
    tensors = {"U": svd.U.to(W.dtype), "S": svd.S, "Vh": svd.Vh.to(W.dtype)}
    tensors = {name: t.contiguous().cpu() for name, t in tensors.items()}
    meta = {"schema": CACHE_SCHEMA, "weight": key} | {f"hash_{n}": tensor_hash(t) for n, t in tensors.items()}
    write_atomically(path, save(tensors, metadata={"projected_grpo": json.dumps(meta)}))
    return svd


def _read_svd(path: Path, key: str, W: Tensor) -> SVD:
    with safe_open(path, framework="pt") as file:
        meta: dict[str, Any] = json.loads((file.metadata() or {}).get("projected_grpo", "{}"))
        if meta.get("schema") != CACHE_SCHEMA or meta.get("weight") != key:
            raise ValueError("written for another weight or by another version")
        tensors = {name: file.get_tensor(name) for name in ("U", "S", "Vh")}
    for name, tensor in tensors.items():
        if meta.get(f"hash_{name}") != tensor_hash(tensor):
            raise ValueError(f"checksum of {name} differs")
    return SVD(*(tensors[name].to(W.device) for name in ("U", "S", "Vh")))
