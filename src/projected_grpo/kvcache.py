"""A key-value cache with room for the tokens to come: a decoding step writes one token behind the others.

transformers' own dynamic cache joins old and new tokens into a new tensor at every step; its static one has
attention look at the empty places too.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Rows of a layer's cache, in tensors that have room for this many more tokens.

    For decoding: tokens are appended and rows chosen, and nothing else is done.

    `keys` and `values` are views of what is written so far. IndexError when the room is used up.
    """

    def __init__(self, layer: DynamicLayer, rows: Int[Tensor, " n"], room: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.length = layer.keys.shape[-2]
        self.capacity = self.length + room
        self.held = (layer.keys, layer.values)
        self.reorder_cache(rows)

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order, once for every time they are named."""
        keys, values = self.held
        self.held = (self._rows(keys, beam_idx), self._rows(values, beam_idx))
        self._show()

    def update(
        self,
        key_states: Float[Tensor, "n heads t d"],
        value_states: Float[Tensor, "n heads t d"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "n heads all d"], Float[Tensor, "n heads all d"]]:
        """Write new tokens behind the others; returns all."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.capacity:
            raise IndexError(f"{self.length} tokens for a cache of {self.capacity}")
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, start : self.length] = new
        return self._show()

    def _rows(
        self, states: Float[Tensor, "b heads held d"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, "n heads {self.capacity} d"]:
        _, heads, _, width = states.shape
        out = states.new_empty(len(rows), heads, self.capacity, width)
        out[:, :, : self.length] = states[rows.to(states.device), :, : self.length]
        return out

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self.held
        self.keys, self.values = keys[:, :, : self.length], values[:, :, : self.length]
        return self.keys, self.values


def reserve(cache: Any, rows: Int[Tensor, " n"], room: int) -> None:
    """Keep these rows of a model's cache, with room for this many tokens in layers that would copy them all.

    Layers of other kinds (a window, a state) hold little, and stay of their kind.
    """
    if not hasattr(cache, "layers"):  # a model's own kind of cache, in early releases of transformers 5
        cache.reorder_cache(rows)
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, rows, room)
        else:
            layer.reorder_cache(rows)
