"""How much memory the loss needs, from a model's shape and a microbatch's size (docs/benchmarks.md).

Bytes that tensors occupy, for the Qwen3 family under sdpa attention: what autograd keeps of each layer from
the forward to the backward pass, and what is held with it at the moments that can be the highest: when the
last logits are made, when the backward pass is there, and when it is in the last layer. Allocators round up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from projected_grpo.config import LossConfig
from projected_grpo.engine.capacity import layers_on
from projected_grpo.engine.logps import CHUNK_LOGITS
from projected_grpo.engine.passes import microbatches, prompt_numbers
from projected_grpo.rollout import Rollout

FLOAT = 4  # bytes of float32, in which norms, log-probabilities and adapter parameters are computed


@dataclass(frozen=True)
class Shape:
    """A Qwen3-like model: sizes in values, `width` in bytes per value."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    width: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(d_in, d_out) of a layer's adapted Linears: q, k, v, o, gate, up, down."""
        d, f = self.hidden, self.intermediate
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (d, q), (d, k), (d, k), (q, d), (d, f), (d, f), (f, d)

    @property
    def ranks(self) -> int:
        """r, summed over a layer's Linears."""
        return sum(map(min, self.linears))

    @property
    def adapted(self) -> int:
        """Bytes of all adapted weights."""
        return self.layers * sum(a * b for a, b in self.linears) * self.width


@dataclass(frozen=True)
class Load:
    """One microbatch: `rows` rollouts of `max_new` tokens after `prompts` prompts of `prompt_tokens`.

    shared: each prompt is run once. padded: prompts that are run once differ in length, so attention takes a
    mask in them. uneven: by how much prompts that are run per rollout differ; logits begin at the shortest.
    """

    rows: int
    prompts: int
    prompt_tokens: int
    max_new: int
    shared: bool = True
    padded: bool = True
    grad_checkpoint: bool = False
    uneven: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes: what the layers keep, the highest moment above it, and merged weights."""

    layers: int
    moment: int
    merged: int

    @property
    def total(self) -> int:
        """The peak above what rests in memory."""
        return self.layers + self.moment + self.merged


NAMED = (  # by Qwen3's names; what is not named so is not measured
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads"),
)


def names_its_sizes(model: nn.Module) -> bool:
    """Whether `shape_of` can read a model's settings."""
    parts: Any = model
    return all(getattr(parts.config.get_text_config(), name, None) for name in NAMED)


def shape_of(model: nn.Module) -> Shape:
    """The sizes of a model that `names_its_sizes`."""
    parts: Any = model
    config = parts.config.get_text_config()
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.vocab_size,
        torch.empty(0, dtype=next(model.parameters()).dtype).element_size(),
    )


def kept_per_token(shape: Shape) -> int:
    """Bytes that one layer keeps of a token, without its keys and values.

    In the weights' dtype what Linears and activations are given (adapters are merged), in float32 what norms
    are given.
    """
    d, f, h, kv = shape.hidden, shape.intermediate, shape.heads, shape.kv_heads
    q, k = h * shape.head_dim, kv * shape.head_dim
    scales = 2 * h + kv + 2  # the norms' and the attention's, one per head or token
    return shape.width * (2 * d + 4 * f + 2 * q) + FLOAT * (2 * d + q + k + scales)


def kept_by_attention(shape: Shape, rows: int, queries: int, keys: int, masked: bool) -> int:
    """Bytes of keys, values and mask that one layer keeps; with a mask sdpa copies keys to every head."""
    heads = shape.heads if masked else shape.kv_heads
    mask = rows * queries * keys if masked else 0
    return shape.width * (2 * rows * keys * heads * shape.head_dim + mask)


def kept_by_layer(shape: Shape, load: Load) -> int:
    """Bytes that one layer keeps of a microbatch."""
    head, answer = load.prompt_tokens - 1, load.max_new
    if not load.shared:
        length = load.prompt_tokens + answer
        attention = kept_by_attention(shape, load.rows, length, length, masked=False)
        return load.rows * length * kept_per_token(shape) + attention
    tokens = load.prompts * head + load.rows * answer
    before = kept_by_attention(shape, load.prompts, head, head, load.padded)
    after = kept_by_attention(shape, load.rows, answer, head + answer, masked=True)
    return tokens * kept_per_token(shape) + before + after


def loss_memory(shape: Shape, load: Load) -> Memory:
    """Peak of one microbatch's forward and backward pass above the resting model, in bytes."""
    w, d = shape.width, shape.hidden
    length = load.max_new if load.shared else load.prompt_tokens + load.max_new
    tokens = load.rows * length
    answers = load.rows * load.max_new
    layer = kept_by_layer(shape, load)
    kept = shape.layers * layer
    inside = tokens * w * (2 * shape.intermediate + d)  # gradients in the last layer's MLP
    head = 0 if w == FLOAT else FLOAT * shape.vocabulary * d  # the output layer in float32
    cache = 0
    if load.shared:
        keys = load.prompt_tokens - 1 + load.max_new
        cache = shape.layers * load.rows * keys * 2 * shape.kv_heads * shape.head_dim * w
    if load.grad_checkpoint:
        kept = shape.layers * tokens * d * w
        inside += layer
    columns = answers if load.shared else load.rows * (load.max_new + load.uneven + 1)
    if columns * shape.vocabulary <= CHUNK_LOGITS:
        logits = 2 * FLOAT * answers * shape.vocabulary  # and their exponentials
        slopes = max(2 * logits, logits + FLOAT * columns * shape.vocabulary)
    else:
        logits = 2 * FLOAT * (CHUNK_LOGITS // shape.vocabulary) * shape.vocabulary + 2 * answers * d * w
        slopes = 0
    return Memory(kept, max(cache + logits + head, slopes + head, inside), shape.adapted)


def predicted_peak(model: nn.Module, rollouts: Sequence[Rollout], loss: LossConfig) -> int:
    """Bytes above the resting model that the largest microbatch of a step needs, all advantages non-zero.

    Of a model over several devices: the maximum over the devices.
    """
    on = layers_on(model)  # all layers together where their devices are not known
    shape = shape_of(model)
    shape = replace(shape, layers=max(on.values(), default=shape.layers))
    names = prompt_numbers(model, rollouts, loss)
    peaks = []
    for index in microbatches(rollouts, range(len(rollouts)), loss.tokens_per_microbatch, names):
        prompts = len({names[i] for i in index})
        lengths = {len(rollouts[i].prompt_ids) for i in index}
        load = Load(
            rows=len(index),
            prompts=prompts,
            prompt_tokens=max(lengths),
            max_new=max(len(rollouts[i].completion_ids) for i in index),
            shared=prompts < len(index),
            padded=len(lengths) > 1,
            grad_checkpoint=loss.grad_checkpoint,
            uneven=max(lengths) - min(lengths),
        )
        peaks.append(loss_memory(shape, load).total)
    return max(peaks)


def measured_peak(function: Callable[[], object], devices: Sequence[torch.device]) -> int:
    """Bytes of tensors that a call has in a device's memory at once, above what was there before it.

    On GPUs their allocator counts them, for the one that needs most; on a CPU torch's profiler does: other
    processes change nothing.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
        before = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
        function()
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        peaks = map(torch.cuda.max_memory_allocated, gpus)
        return max(peak - rest for peak, rest in zip(peaks, before, strict=True))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    results: Any = seen.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative where a tensor ends
        peak = max(peak, live)
    return peak
