"""Sampling against decoding row by row without a cache, and its seeds by coordinates."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache

from projected_grpo.antipasto import Policy, wrap
from projected_grpo.config import SamplingConfig
from projected_grpo.engine import capacity
from projected_grpo.engine import generate as generating
from projected_grpo.engine.attention import decoding
from projected_grpo.engine.batch import PAD, collate, left_padded, positions
from projected_grpo.engine.generate import Decoding, RoomyLayer, generate, pick_tokens, reserve, sample
from projected_grpo.engine.logps import completion_logps
from projected_grpo.errors import UserError
from projected_grpo.rollout import Completion, Rollout, batches, uniforms
from projected_grpo.seeds import stream_seed

CPU = torch.device("cpu")
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15), (16,), (17, 18, 19, 20, 21)]


# One token


def slow_pick(logits: np.ndarray, u: float, temperature: float, top_k: int, top_p: float) -> int:
    """Sort, cut to the k likeliest, cut to the smallest set of mass top_p, walk until u is used up."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total, kept, mass = sum(weights), [], 0.0
    for i, w in zip(order, weights, strict=True):
        if mass >= top_p:
            break
        kept.append((i, w / total))
        mass += w / total
    left = u * sum(p for _, p in kept)
    for i, p in kept:
        left -= p
        if left < 0:
            return i
    return kept[-1][0]


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    st.sampled_from([0, 1, 3, 8, 50]),
    st.sampled_from([1.0, 0.9, 0.5, 0.05]),
)
def test_pick_tokens_is_the_inverse_cdf_of_the_filtered_distribution(seed, temperature, top_k, top_p):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(6, 11))).astype(np.float32)
    u = rng.random(6).astype(np.float32)
    got = pick_tokens(torch.tensor(logits), torch.tensor(u), temperature, top_k, top_p)
    expected = [
        slow_pick(row.astype(float), float(x), temperature, top_k, top_p)
        for row, x in zip(logits, u, strict=True)
    ]
    assert got.tolist() == expected


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.8), (4, 0.6)])
def test_the_share_of_u_that_gives_a_token_is_its_probability(top_k, top_p):
    logits = np.random.default_rng(1).normal(size=9)
    count = 20000
    u = (torch.arange(count) + 0.5) / count
    picked = pick_tokens(torch.tensor(logits).expand(count, -1), u, 0.7, top_k, top_p)
    p = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    order = np.argsort(-p)
    kept = order[: top_k or None]
    inside = p[kept] / p[kept].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(inside), top_p)) + 1] if top_p < 1 else kept
    expected = np.zeros(9)
    expected[kept] = p[kept] / p[kept].sum()
    np.testing.assert_allclose(np.bincount(picked.numpy(), minlength=9) / count, expected, atol=2 / count)


def test_streams_are_uniform_by_a_chi_square_test():
    draws = torch.cat([uniforms(stream_seed(0, "train", step, 0, 0), 20) for step in range(1000)])
    counts = torch.histc(draws, bins=20, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 45.3  # 99.94% point at 19 degrees of freedom; the draws are fixed by their seeds


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_draw_at_either_end_stays_among_tokens_that_have_probability(u, top_p):
    logits = torch.tensor([[0.0, 5.0, -1e4, 4.0, 3.9]])
    token = int(pick_tokens(logits, torch.tensor([u]), 1.0, 0, top_p))
    allowed = {1} if top_p == 0.5 else {0, 1, 3, 4}
    assert token in allowed


# Seeds


def test_a_stream_seed_is_a_fixed_hash_of_its_coordinates():
    digest = hashlib.blake2b(b"41/train/3/0/7", digest_size=8).digest()
    assert stream_seed(41, "train", 3, 0, 7) == int.from_bytes(digest, "big") // 2
    nearby = [(1, 2), (12,), (2, 1), (1, "2x"), (1, 2, 0), ("1", 23)]
    assert len({stream_seed(*c) for c in nearby}) == len(nearby)
    assert all(0 <= stream_seed(i) < 2**63 for i in range(100))


def test_a_stream_does_not_touch_or_follow_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = uniforms(9, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(uniforms(9, 5), first)
    assert torch.equal(uniforms(9, 9)[:5], first)


# Batches


def test_collate_pads_on_the_right_and_knows_where_completions_are():
    batch = collate([Rollout((1, 2), (3, 4, 5), ""), Rollout((6, 7, 8), (9,), "")], CPU)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.completion.tolist() == [[True] * 3, [True, False, False]]
    assert batch.answers.tolist() == [3, 4, 5, 9] and batch.first == 1
    columns = torch.arange(10.0).reshape(2, 5, 1)
    assert batch.at_answers(columns)[:, 0].tolist() == [2, 3, 4, 8]
    assert batch.before_answers(columns)[:, 0].tolist() == [1, 2, 3, 7]
    assert torch.equal(batch.before_answers(columns[:, 1:], 1), batch.before_answers(columns))
    assert batch.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_left_padded_prompts_end_at_one_column():
    ids, attention = left_padded([(1, 2), (6, 7, 8), ()], CPU)
    assert ids.tolist() == [[0, 1, 2], [6, 7, 8], [0, 0, 0]]
    assert attention.tolist() == [[False, True, True], [True] * 3, [False] * 3]
    assert positions(attention).tolist() == [[0, 0, 1], [0, 1, 2], [0, 0, 0]]
    assert left_padded([()], CPU)[0].tolist() == [[PAD]]


def test_padding_is_told_from_a_real_pad_token():
    batch = collate([Rollout((0, 0), (0,), ""), Rollout((1, 1, 1), (1, 1), "")], CPU)
    assert batch.completion.tolist() == [[True, False], [True, True]] and batch.answers.tolist() == [0, 1, 1]
    assert left_padded([(0, 0), (1, 1, 1)], CPU)[1].tolist() == [[False, True, True], [True] * 3]


def test_an_empty_completion_has_one_masked_column_and_an_empty_prompt_is_refused():
    batch = collate([Rollout((1, 2), (), "")], CPU)
    assert batch.completion.tolist() == [[False]] and batch.ids.shape == (1, 3)
    with pytest.raises(ValueError, match="no prompt"):
        collate([Rollout((), (1,), "")], CPU)


@pytest.mark.parametrize("chunk", [None, 3])
def test_without_padding_on_the_left_no_mask_is_asked_for(small_model, chunk):
    """With one, sdpa takes slower kernels and more memory: what right padding is for."""
    seen = []
    model = small_model("qwen3").requires_grad_(False)
    handle = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    rollouts = [Rollout((1, 2), (3, 4, 5), ""), Rollout((6, 7, 8), (9,), "")]
    completion_logps(model, collate(rollouts, CPU), chunk)
    handle.remove()
    assert len(seen) == 1 and seen[0].get("attention_mask") is None and seen[0].get("position_ids") is None


def slow_logps(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """One sequence alone, no padding, whole logits, log-softmax."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    table = torch.log_softmax(logits.double(), -1)
    return torch.stack([table[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


@pytest.mark.parametrize(
    ("family", "atol"),
    [("qwen3", 1e-10), ("qwen2", 1e-10), ("llama", 1e-10), ("qwen3_5", 1e-5), ("qwen3_next", 1e-5)],
)
def test_completion_logps_do_not_depend_on_padding(small_model, family, atol):
    model = small_model(family).requires_grad_(False)
    completions = [(3, 1, 4, 1, 5, 9), (2,), (), (8, 9, 7)]
    rollouts = [Rollout(p, c, "") for p, c in zip(PROMPTS, completions, strict=True)]
    with torch.no_grad():
        together = [completion_logps(model, collate(rollouts, CPU), chunk) for chunk in (None, 3)]
    for row, in_chunks, rollout in zip(*together, rollouts, strict=True):
        expected = slow_logps(model, rollout.prompt_ids, rollout.completion_ids or (0,))
        expected = expected[: len(rollout.completion_ids)]
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=atol)
        torch.testing.assert_close(in_chunks, row, rtol=0, atol=atol)
        assert not row[len(expected) :].any()


# Generation

STOPS = frozenset(range(0, 48, 7))  # a seventh of all tokens, so that rows end at different times
SAMPLING = SamplingConfig(temperature=0.9, top_k=0, top_p=0.95)


def slow_generate(
    model: nn.Module, prompt: Sequence[int], draws: Tensor, stop: frozenset[int], sampling: SamplingConfig
) -> tuple[tuple[int, ...], Tensor]:
    """Decode one row alone, running the whole sequence again for each token."""
    ids: list[int] = []
    for u in draws:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1]
        ids.append(
            slow_pick(logits.double().numpy(), float(u), sampling.temperature, sampling.top_k, sampling.top_p)
        )
        if ids[-1] in stop:
            break
    return tuple(ids), slow_logps(model, prompt, ids)


def random_draws(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.stack([uniforms(stream_seed(seed, row), length) for row in range(rows)])


@pytest.mark.parametrize("copies", [[3, 2, 4, 1], [1, 5, 1, 1]])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_5", "qwen3_next"])
def test_batched_decoding_is_decoding_each_row_alone(small_model, family, copies):
    model = small_model(family, torch.float32)
    draws = random_draws(sum(copies), 12)
    got = generate(model, PROMPTS, copies, draws, SAMPLING, STOPS)
    prompts = [p for p, count in zip(PROMPTS, copies, strict=True) for _ in range(count)]
    assert len({len(ids) for ids, _ in got}) > 2  # rows do end at different times
    assert max(len(ids) for ids, _ in got) > 6
    for (ids, logps), prompt, u in zip(got, prompts, draws, strict=True):
        expected_ids, expected_logps = slow_generate(model, prompt, u, STOPS, SAMPLING)
        assert ids == expected_ids
        torch.testing.assert_close(logps.double(), expected_logps, rtol=0, atol=2e-4)


def test_rows_end_at_their_first_stop_token_or_at_the_limit(small_model):
    got = generate(small_model("qwen3"), PROMPTS, [5] * 4, random_draws(20, 10), SAMPLING, STOPS)
    for ids, logps in got:
        assert len(ids) == len(logps) <= 10
        assert not set(ids[:-1]) & STOPS
        assert ids[-1] in STOPS or len(ids) == 10
    assert any(len(ids) == 10 for ids, _ in got) and any(ids[-1] in STOPS for ids, _ in got)


def test_log_probabilities_are_those_of_a_full_forward_at_temperature_one(tiny):
    model, _ = tiny
    sampling = SamplingConfig(temperature=0.7, top_k=20)
    got = generate(model, PROMPTS, [2] * 4, random_draws(8, 16), sampling, frozenset(range(0, 2048, 9)))
    prompts = [p for p in PROMPTS for _ in range(2)]
    rollouts = [Rollout(p, ids, "") for p, (ids, _) in zip(prompts, got, strict=True)]
    with torch.no_grad():
        rescored = completion_logps(model, collate(rollouts, CPU))
    for row, (_, logps) in zip(rescored, got, strict=True):
        torch.testing.assert_close(logps, row[: len(logps)], rtol=0, atol=1e-4)


def test_the_model_is_run_on_fewer_rows_once_rows_have_ended(small_model):
    model = small_model("qwen3")
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    got = generate(model, PROMPTS, [6] * 4, random_draws(24, 12), SAMPLING, STOPS, look_every=1)
    handle.remove()
    assert rows[0] == 4  # each prompt is prefilled once
    assert rows[1] <= 24 and rows[-1] < 24 and rows[1:] == sorted(rows[1:], reverse=True)
    for t, width in enumerate(rows[1:], start=1):
        unfinished = sum(len(ids) > t for ids, _ in got)
        assert unfinished <= width <= max(unfinished / (1 - 0.125), unfinished + 1)


def test_generate_refuses_rows_that_do_not_match_the_copies(tiny):
    with pytest.raises(ValueError, match="copies"):
        generate(tiny[0], PROMPTS[:2], [1, 1], random_draws(3, 4), SAMPLING, STOPS)


def test_finished_rows_are_looked_for_every_so_many_tokens(small_model):
    model = small_model("qwen3")
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    often = generate(model, PROMPTS, [6] * 4, random_draws(24, 40), SAMPLING, STOPS, look_every=1)
    last = len(rows)
    seldom = generate(model, PROMPTS, [6] * 4, random_draws(24, 40), SAMPLING, STOPS, look_every=16)
    handle.remove()
    longest = max(len(ids) for ids, _ in often)
    assert 16 < longest < 32 and last == longest, "so the second run looks twice, and all are done then"
    assert rows[last:] == [4, *[24] * 15, *[sum(len(ids) > 16 for ids, _ in often)] * 16]
    for (ids, logps), (same, near) in zip(often, seldom, strict=True):
        assert ids == same
        torch.testing.assert_close(logps, near, rtol=0, atol=1e-5)


@given(
    st.lists(
        st.one_of(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.sampled_from(["write", "grow"])),
        max_size=10,
    ),
    st.data(),
)
def test_a_cache_with_room_holds_what_the_one_that_copies_holds(actions, data):
    """Over any sequence of rows kept (a list), tokens written and blocks added."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plain, roomy = DynamicCache(), DynamicCache()
    states = torch.randn(2, 3, 2, 4, 5)  # layers, rows, heads, tokens, width
    for layer in range(2):
        plain.update(states[layer], -states[layer], layer)
        roomy.update(states[layer], -states[layer], layer)
    first = torch.tensor([0, 0, 1, 2, 2, 2])
    plain.reorder_cache(first)
    (place,) = reserve(roomy, first, 4).values()
    assert all(isinstance(layer, RoomyLayer) for layer in roomy.layers)
    rows, length, capacity = 6, 4, 4
    for action in actions:
        if isinstance(action, list):
            kept = torch.tensor([row for row in action if row < rows] or [0])
            plain.reorder_cache(kept)
            roomy.reorder_cache(kept)
            rows = len(kept)
        elif action == "grow" or length == capacity:
            for grown in roomy.layers:
                grown.grow(3)
            capacity += 3
        else:
            length += 1
            for layer in range(2):
                new = torch.randn(rows, 2, 1, 5)
                pairs = zip(roomy.update(new, -new, layer), plain.update(new, -new, layer), strict=True)
                assert all(torch.equal(got[:, :, :length], expected) for got, expected in pairs)
            place += 1
    assert roomy.get_seq_length() == plain.get_seq_length() == length
    for got, expected in zip(roomy.layers, plain.layers, strict=True):
        for held, all_of_it in ((got.keys, expected.keys), (got.values, expected.values)):
            assert held.shape[2] == capacity
            assert torch.equal(held[:, :, :length], all_of_it) and not held[:, :, length:].any()
    with pytest.raises(IndexError, match="for a cache of"):
        for _ in range(capacity - length + 1):
            roomy.update(torch.zeros(rows, 2, 1, 5), torch.zeros(rows, 2, 1, 5), 0)


def test_a_cache_grows_in_blocks_and_is_written_in_place_between(small_model, monkeypatch):
    """No key is copied to make room for another but once a block; nothing is held for what may never come."""
    monkeypatch.setattr(generating, "BLOCK", 5)
    seen: list[tuple[int, int]] = []

    def note(module, args, kwargs):
        layer = kwargs["past_key_values"].layers[0] if kwargs.get("past_key_values") is not None else None
        if isinstance(layer, RoomyLayer):
            seen.append((layer.keys.shape[2], layer.keys.data_ptr()))

    model = small_model("qwen3", torch.float32)
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    got = generate(model, PROMPTS, [2] * 4, random_draws(8, 14), SAMPLING, frozenset())
    handle.remove()
    assert [capacity for capacity, _ in seen] == [13] * 5 + [18] * 5 + [21] * 3
    for block in (seen[:5], seen[5:10], seen[10:]):
        assert len({place for _, place in block}) == 1
    monkeypatch.setattr(generating, "BLOCK", 256)
    whole = generate(model, PROMPTS, [2] * 4, random_draws(8, 14), SAMPLING, frozenset())
    assert [ids for ids, _ in got] == [ids for ids, _ in whole]


# What a GPU would wait for


class Tape(TorchDispatchMode):
    """Every operation in it; `replay` runs them again on the same tensors, as a CUDA graph would."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        made: dict[int, Any] = {}

        def now(x: Any) -> Any:
            return made.get(id(x), x)

        for func, args, kwargs, out in self.operations:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            made |= {id(old): new for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True)}

    def waits(self) -> list[str]:
        """Operations whose result, or its size, the host must know."""
        aten = torch.ops.aten
        reads = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
        reads |= {aten.equal.default, aten.is_nonzero.default, aten.repeat_interleave.Tensor}
        return [
            str(func)
            for func, args, _, _ in self.operations
            if func in reads or any(t.dtype == torch.bool for t in indices(func, args))
        ]


def indices(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    names = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")
    return [t for t in args[1] if t is not None] if str(func) in names else []


@pytest.mark.parametrize("prompts", [PROMPTS, [(5, 6, 7)] * 4])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_host_waits_once_in_sixteen_tokens(small_model, family, prompts):
    model, tape = small_model(family, torch.float32), Tape()
    draws = random_draws(8, 65)
    with tape:
        generate(model, prompts, [2] * 4, draws, SAMPLING, frozenset([1]))
    before = Tape()  # what the prompts alone wait for
    with before:
        generate(model, prompts, [2] * 4, draws[:, :1], SAMPLING, frozenset([1]))
    assert len(tape.waits()) - len(before.waits()) == 4 == 65 // 16


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_recorded_step_decodes_what_steps_decode(small_model, family):
    """So a captured one would: shapes are fixed, and nothing that changes is the host's."""
    model, draws = small_model(family, torch.float32), random_draws(8, 10)
    expected = generate(model, PROMPTS, [2] * 4, draws, SAMPLING, frozenset([1]))
    with torch.no_grad(), decoding(model) as packed:
        rows = Decoding(model, PROMPTS, [2] * 4, draws, SAMPLING, frozenset([1]), packed)
        assert rows.fixed
        rows.grow()
        rows.step()
        with Tape() as tape:
            rows.step()
        for _ in range(7):
            tape.replay()
        got = rows.completions()
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, logps), (_, same) in zip(got, expected, strict=True):
        assert torch.equal(logps, same)


# Sampling from a policy


def draw(
    policy: Policy,
    seeds: Sequence[Sequence[int]],
    prompts: Sequence[tuple[int, ...]] = PROMPTS,
    *,
    ablate_quarantine: bool = False,
) -> list[list[Completion]]:
    sampling = SamplingConfig(max_new=10, temperature=1.0, top_k=50)
    stop = frozenset(range(0, 2048, 11))
    return sample(policy, prompts, seeds, sampling, stop, ablate_quarantine=ablate_quarantine)


def texts(drawn: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[ids for ids, _ in group] for group in drawn]


def set_adapter(policy: Policy, s: float, hack: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in policy.layers.values():
        for parameter, scale in ((layer.delta_s, s), (layer.delta_hack, hack)):
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def test_the_same_seeds_give_the_same_rollouts_whatever_happened_before(tiny_policy):
    seeds = [[1, 2], [3], [4, 5, 6], [7]]
    first = draw(tiny_policy, seeds)
    torch.manual_seed(99)
    draw(tiny_policy, [[8]] * 4)
    again = draw(tiny_policy, seeds)
    for a, b in zip(first, again, strict=True):
        for (ids, logps), (other_ids, other_logps) in zip(a, b, strict=True):
            assert ids == other_ids and torch.equal(logps, other_logps)
    assert texts(draw(tiny_policy, [[11, 12], [13], [14, 15, 16], [17]])) != texts(first)


def test_a_row_depends_on_its_own_seed_and_prompt_only(tiny_policy):
    set_adapter(tiny_policy, 0.1, 0.0)
    seeds = [[1, 2, 3], [4], [5, 6], [7, 8]]
    together = texts(draw(tiny_policy, seeds))
    alone = [
        [texts(draw(tiny_policy, [[s]], [p]))[0][0] for s in g] for p, g in zip(PROMPTS, seeds, strict=True)
    ]
    assert alone == together
    backwards = texts(draw(tiny_policy, [g[::-1] for g in seeds[::-1]], PROMPTS[::-1]))
    assert [g[::-1] for g in backwards[::-1]] == together


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=5), st.integers(0, 7))
def test_batches_hold_each_seed_once_in_order(seeds, rows):
    got = list(batches(seeds, rows))
    sizes = [sum(map(len, batch)) for batch in got]
    total = sum(map(len, seeds))
    assert [[s for batch in got for s in batch[p]] for p in range(len(seeds))] == (
        seeds if got else [[]] * len(seeds)
    )
    if rows == 0:
        assert sizes == ([total] if total else [])
    else:
        assert sizes == [rows] * (total // rows) + [total % rows] * (total % rows > 0)


def test_batches_of_rows_sample_what_one_batch_does(tiny_policy):
    set_adapter(tiny_policy, 0.1, 0.0)
    seeds = [[1, 2, 3], [4], [], [7, 8]]
    whole = texts(draw(tiny_policy, seeds))
    parts = [texts(draw(tiny_policy, batch)) for batch in batches(seeds, 2)]
    assert len(parts) == 3
    assert [[ids for part in parts for ids in part[p]] for p in range(4)] == whole


def test_prompts_without_seeds_generate_nothing(tiny_policy):
    full = texts(draw(tiny_policy, [[1], [2], [3], [4]]))
    assert texts(draw(tiny_policy, [[], [2], [], [4]])) == [[], full[1], [], full[3]]
    calls: list[int] = []
    handle = tiny_policy.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert draw(tiny_policy, [[]] * 4) == [[]] * 4
    handle.remove()
    assert not calls


def test_ablated_sampling_is_that_of_a_policy_without_its_quarantine(tiny_policy):
    seeds = [[1, 2], [3, 4], [5, 6], [7, 8]]
    set_adapter(tiny_policy, 0.2, 1.0)
    weights = {m: layer.base.weight.clone() for m, layer in tiny_policy.layers.items()}
    trained, deployed = draw(tiny_policy, seeds), draw(tiny_policy, seeds, ablate_quarantine=True)
    assert texts(trained) != texts(deployed)
    for layer in tiny_policy.layers.values():
        layer.delta_hack.data.zero_()
    assert texts(draw(tiny_policy, seeds)) == texts(deployed)
    assert all(torch.equal(layer.base.weight, weights[m]) for m, layer in tiny_policy.layers.items())


def test_what_merged_weights_sample_is_scored_the_same_by_a_bound_adapter(small_model):
    policy = wrap(small_model("qwen3", torch.float32), None)
    set_adapter(policy, 0.3, 0.3)
    sampling = SamplingConfig(max_new=8, temperature=1.0, top_k=0)
    drawn = sample(policy, PROMPTS, [[1, 2]] * 4, sampling, STOPS)
    with policy.bind(policy.deltas()):
        for prompt, group in zip(PROMPTS, drawn, strict=True):
            for ids, logps in group:
                torch.testing.assert_close(
                    logps.double(), slow_logps(policy.model, prompt, ids), rtol=0, atol=2e-3
                )


# Memory


def short_of_memory(patch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """`generate` has memory for at most so many rows; returns the rows of each of its runs."""
    tried: list[int] = []

    def real(model, prompts, copies, *more):
        tried.append(sum(copies))
        if sum(copies) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return generate(model, prompts, copies, *more)

    patch.setattr(generating, "generate", real)
    return tried


def test_a_batch_that_does_not_fit_is_generated_in_halves(tiny_policy, monkeypatch):
    set_adapter(tiny_policy, 0.1, 0.0)
    seeds = [[1, 2, 3], [4], [], [7, 8, 9]]
    weights = {m: layer.base.weight.clone() for m, layer in tiny_policy.layers.items()}
    whole = texts(draw(tiny_policy, seeds))
    tried = short_of_memory(monkeypatch, 2)
    assert texts(draw(tiny_policy, seeds)) == whole
    assert tried == [7, 4, 2, 2, 3, 2, 1]
    short_of_memory(monkeypatch, 0)
    with pytest.raises(UserError, match="lower --max-new"):
        draw(tiny_policy, seeds)
    assert all(torch.equal(layer.base.weight, weights[m]) for m, layer in tiny_policy.layers.items())


def test_all_rows_are_one_batch_where_memory_allows_and_else_equal_parts(tiny_policy, monkeypatch):
    seeds = [[1, 2, 3], [4], [], [7, 8, 9]]
    whole = texts(draw(tiny_policy, seeds))
    tried = short_of_memory(monkeypatch, 99)
    model, config = tiny_policy.model, tiny_policy.model.config
    token = 2 * 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    row = (8 + 10) * token + 40 * config.vocab_size
    for rows, parts in ((7, [7]), (6, [4, 3]), (3, [3, 2, 2]), (0, [1] * 7)):
        monkeypatch.setattr(capacity, "free_bytes", lambda device, rows=rows: int((rows + 0.5) * row / 0.9))
        tried.clear()
        assert texts(draw(tiny_policy, seeds)) == whole and tried == parts
    monkeypatch.setattr(capacity, "free_bytes", lambda device: None)
    assert capacity.rows_that_fit(model, 10**9, 10**6) == 10**6, "a CPU's memory is not asked for"
