"""Tensors of the CPU that know a device: real numbers, and an error where an operation mixes devices.

Within `devices()`, what is made on or moved to `cpu:1`, `cpu:2` and so on is `Placed` there, and an operation
on tensors of two devices raises as it would between GPUs, with CUDA's own exceptions: scalars of the CPU go
with all, and indices may be on the CPU. Plain `cpu` is the machine's memory. PyTorch itself ignores these
numbers and its fake tensors have no values, so neither would do for whole runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CPU = torch.device("cpu")
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class MixedDevices(RuntimeError):
    """An operation on tensors of several devices."""


class Placed(Tensor):
    """A tensor of this value, on this device."""

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device) -> "Placed":
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=device,
        )
        self.value = value
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if new.device != self.device:
            raise MixedDevices(f"data of {new.device} for a tensor of {self.device}")
        self.value = new.value

    def tolist(self) -> Any:
        return self.value.tolist()


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation, if all its tensors are on one device, with a result that is there too."""
    flat, form = tree_flatten((args, kwargs))
    device = kwargs.get("device") or common_device(func, flat)
    if device == CPU and not any(isinstance(x, Placed) for x in flat):
        return func(*args, **kwargs)
    wrappers = {id(x.value): x for x in flat if isinstance(x, Placed)}  # what works in place gives the same
    values = [x.value if isinstance(x, Placed) else CPU if isinstance(x, torch.device) else x for x in flat]
    inner_args, inner_kwargs = tree_unflatten(values, form)

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else x if device == CPU else Placed(x, device)

    return tree_map(placed, func(*inner_args, **inner_kwargs))


def common_device(func: Any, flat: list[Any]) -> torch.device:
    """Where an operation runs. Raises MixedDevices if its arguments do not agree."""
    tensors = [x for x in flat if isinstance(x, Tensor)]
    found = [x.device for x in tensors if x.device != CPU or (x.ndim > 0 and func not in INDEXED)]
    if len(set(found)) > 1 and func not in MOVES:
        raise MixedDevices(f"{func} of tensors on {' and '.join(sorted(set(map(str, found))))}")
    return tensors[0].device if func in MOVES else found[0] if found else CPU


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` moves what it has made where no operation is seen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or "device" not in kwargs:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


@contextmanager
def devices() -> Iterator[None]:
    """Numbered devices of the CPU are told apart."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a plain parameter cannot become Placed
    try:
        with _Literals(), _Operations():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
