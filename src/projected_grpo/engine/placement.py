"""One model over several devices of one process, layer by layer: more memory, not more speed.

    home     the first device: embeddings, final norm and output layer, the adapter, all inputs and outputs
    layers   consecutive ones on each device, U and Vh with the weights they belong to

A layer's inputs are moved to it when it is called, and what the last layer gives is moved home; autograd
moves gradients back the same way. So a step's maths, which works on adapter and log-probabilities, sees one
device. Devices wait for one another: at any time one of them computes.

accelerate's `dispatch_model` (what `device_map` ends in) does the same with hooks. It is no dependency of
this package, sends masks and rotary embeddings again to every layer, and does not know what adapters hold.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from projected_grpo.antipasto import target_linears
from projected_grpo.config import GPU_GB
from projected_grpo.errors import UserError

# It is built against the torch that is there, so no extra of this package can name it.
FLASH_ATTN = "pip install flash-attn --no-build-isolation"


def place(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Move a model to its devices, the first of which is home, without it ever being whole on one of several.

    Raises UserError for more devices than layers.
    """
    if len(devices) == 1:
        model.to(devices[0])
        return
    layers = list(outermost_layers(model))
    if len(layers) < len(devices):
        raise UserError(
            f"--device names {len(devices)} devices, but {type(model).__name__} has {len(layers)} layers to "
            "put on them; name fewer"
        )
    costs = [values_held(layer) for layer in layers]
    cuts = even_cuts(costs, values_held(model) - sum(costs), len(devices))
    own = {
        layer: device
        for device, (start, stop) in zip(devices, pairwise((0, *cuts)), strict=True)
        for layer in layers[start:stop]
    }
    _settle(model, own, devices[0])
    _join(model, own, devices[0])


def outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a transformers model, in the order they run: what it would checkpoint as one."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from outermost_layers(child)


def values_held(module: nn.Module) -> int:
    """Numbers a module will hold while it samples: weights, and of adapted ones a merged copy, U and Vh."""
    held = sum(weight.numel() for weight in module.parameters())
    for part in target_linears(module).values():
        d_out, d_in = part.weight.shape
        held += d_out * d_in + min(d_out, d_in) * (d_out + d_in)
    return held


def even_cuts(costs: Sequence[int], first: int, parts: int) -> tuple[int, ...]:
    """Where each of `parts` runs of consecutive items ends, so that their sums differ least (sum of squares).

    `first` is what the first part holds besides its items; every part gets one item at least.
    """
    sums = [0, *accumulate(costs)]
    n = len(costs)
    least: dict[int, tuple[int, tuple[int, ...]]] = {
        stop: ((first + sums[stop]) ** 2, (stop,)) for stop in range(1, n + 1)
    }
    for part in range(1, parts):
        least = {
            stop: min(
                (least[start][0] + (sums[stop] - sums[start]) ** 2, (*least[start][1], stop))
                for start in range(part, stop)
            )
            for stop in range(part + 1, n + 1)
        }
    return least[n][1]


def _settle(module: nn.Module, own: Mapping[nn.Module, torch.device], home: torch.device) -> None:
    """Move layers to their own devices and the rest home, so that tied weights stay tied."""
    device = own.get(module)
    if device is not None or own.keys().isdisjoint(module.modules()):
        module.to(home if device is None else device)
        return
    for child in module.children():
        _settle(child, own, home)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(home)


def _join(model: Any, own: Mapping[nn.Module, torch.device], home: torch.device) -> None:
    """Hooks by which tensors follow the layers."""
    copies = _Copies()
    for layer, device in own.items():
        layer.register_forward_pre_hook(partial(_enter, copies, device), with_kwargs=True)
    *_, last = own
    last.register_forward_hook(lambda layer, args, out: _moved(out, home))
    model.base_model.register_forward_hook(lambda *_: copies.clear(), always_call=True)


class _Copies(dict[tuple[int, torch.device], tuple[Tensor, Tensor]]):
    """What a pass hands to every layer (mask, positions, rotary embedding), copied to each device once.

    By the identity of the original, which is kept with its copy, so that no other tensor can take it.
    """

    def of(self, value: Any, device: torch.device) -> Any:
        """The value with its tensors on the device."""
        if isinstance(value, tuple):
            return tuple(self.of(part, device) for part in value)
        if not isinstance(value, Tensor) or value.device == device:
            return value
        key = id(value), device
        if key not in self:
            self[key] = value, value.to(device)
        return self[key][1]


def _enter(
    copies: _Copies, device: torch.device, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hidden states, a layer's positional arguments, are its own; keywords are what layers share."""
    return _moved(args, device), {name: copies.of(value, device) for name, value in kwargs.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def pick_device(wanted: str) -> torch.device:
    """Resolve `auto`; raises UserError for a device this machine does not have."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {wanted}: not usable here; try --device=cpu or auto") from error
    return device


def pick_devices(wanted: str) -> tuple[torch.device, ...]:
    """One device, or several separated by commas. UserError for one that is not here or named twice."""
    names = [name.strip() for name in wanted.split(",")]
    found = [pick_device(name) for name in names]
    if len(found) == 1:
        return (found[0],)
    numbered = [
        torch.device("cuda", torch.cuda.current_device()) if d == torch.device("cuda") else d for d in found
    ]
    if "auto" in names or len(set(numbered)) < len(names):
        raise UserError(f"--device {wanted}: name each device once, with its number, as in cuda:0,cuda:1")
    return tuple(numbered)


def refuse_cpu(preset: str, wanted: str) -> None:
    """Raises UserError where a preset for a GPU would run on a CPU that nobody asked for."""
    if preset not in GPU_GB or wanted != "auto" or torch.cuda.is_available():
        return
    cuda = torch.version.cuda
    raise UserError(
        f"{preset} is for a GPU, and torch {torch.__version__} finds none: "
        + (f"is the driver new enough for CUDA {cuda}?" if cuda else "it is a build for CPUs.")
        + " docs/presets.md says what to install; to begin it on the CPU all the same: --device=cpu"
    )


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bfloat16 on a GPU, float32 on a CPU."""
    if wanted == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def attention_choices(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[str | None, ...]:
    """What to load a model with, the next one where it has not the first; None is sdpa, or eager.

    `auto` is flash-attn where installed, a GPU is there to run it and weights are in half precision. It is
    for the loss: generation has attention of its own. Raises UserError where it is wanted and cannot be had.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    half = dtype in (torch.bfloat16, torch.float16)
    if wanted == "flash_attention_2" and not has_flash:
        raise UserError(f"--attention flash_attention_2 needs flash-attn: {FLASH_ATTN}")
    if wanted == "flash_attention_2" and not half:
        raise UserError("--attention flash_attention_2 has no float32: --dtype=bfloat16, or leave it out")
    if wanted != "auto":
        return (wanted,)
    return ("flash_attention_2", None) if has_flash and half and device.type == "cuda" else (None,)
