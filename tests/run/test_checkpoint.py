"""Adapter parameters and state on disk: what comes back is what was saved, and nothing else is taken."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from projected_grpo.antipasto import weights_digest, wrap
from projected_grpo.arms.gate import GateState
from projected_grpo.errors import UserError
from projected_grpo.proj import HackBasis
from projected_grpo.run.checkpoint import (
    load_adapter,
    read_adapter_meta,
    read_state,
    restore_state,
    save_adapter,
    save_state,
    state_path,
    state_paths,
)

META = {"model": "tiny-random", "step": 7, "seed": 41}
FACTS = {"step": 3, "generations": 12, "best": None, "seen": ["sentinel"]}
IDS = torch.tensor([[5, 9, 200, 31, 7]])


@dataclass
class Saved:
    """A policy whose adapter parameters moved, and how to get a fresh one."""

    policy: object
    fresh: object


@pytest.fixture
def two(tiny, svd_cache):
    """A policy whose adapter parameters have moved and one whose adapter parameters are at zero."""
    policies = [wrap(copy.deepcopy(tiny[0]), svd_cache) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for layer in policies[0].layers.values():
        for parameter in (layer.delta_s, layer.delta_hack):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return Saved(*policies)


@torch.no_grad()
def logits(policy, *, ablate_quarantine=False):
    with policy.bind(policy.deltas(ablate_quarantine=ablate_quarantine)):
        return policy.model(input_ids=IDS).logits


def optimizer(policy):
    adapter = [k for layer in policy.layers.values() for k in (layer.delta_s, layer.delta_hack)]
    return torch.optim.AdamW(adapter, lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1)


def step(policy, adam, seed, *, quarantine=True):
    generator = torch.Generator().manual_seed(seed)
    for layer in policy.layers.values():
        layer.delta_s.grad = torch.randn(layer.delta_s.shape, generator=generator)
        layer.delta_hack.grad = torch.randn(layer.delta_s.shape, generator=generator) if quarantine else None
    adam.step()


def edit(path, change):
    """Rewrite a safetensors file with its tensors and metadata changed."""
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["projected_grpo"])
    tensors = load_file(path)
    change(tensors, meta)
    save_file(tensors, path, {"projected_grpo": json.dumps(meta)})


def test_the_adapter_comes_back_bit_for_bit(two, tmp_path):
    path = tmp_path / "new" / "k.safetensors"
    save_adapter(path, two.policy, META, deployed=False)
    assert load_adapter(path, two.fresh) == META | {"deployed": False, "weights": weights_digest(two.policy)}
    assert read_adapter_meta(path) == META | {"deployed": False, "weights": weights_digest(two.policy)}
    assert torch.equal(logits(two.fresh), logits(two.policy))
    for m, layer in two.policy.layers.items():
        assert torch.equal(two.fresh.layers[m].delta_s, layer.delta_s)
        assert torch.equal(two.fresh.layers[m].delta_hack, layer.delta_hack)


def test_a_deployed_file_has_no_quarantine(two, tmp_path):
    path = tmp_path / "k.safetensors"
    save_adapter(path, two.policy, META, deployed=True)
    assert {name.split("/")[0] for name in load_file(path)} == {"delta_s"}
    for layer in two.fresh.layers.values():
        layer.delta_hack.data.fill_(9.0)
    load_adapter(path, two.fresh)
    assert all(not layer.delta_hack.any() for layer in two.fresh.layers.values())
    assert torch.equal(logits(two.fresh), logits(two.policy, ablate_quarantine=True))
    assert not torch.equal(logits(two.fresh), logits(two.policy))


def drop(tensors, meta):
    tensors.popitem()


def reshape(tensors, meta):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1].clone()


def rename(tensors, meta):
    tensors["delta_s/elsewhere"] = tensors.pop(next(n for n in tensors if n.startswith("delta_s/")))


def enlarge(tensors, meta):
    """All of ours and one more: a deeper model of the same shape."""
    tensors["delta_s/model.layers.2.mlp.up_proj"] = torch.zeros(64)


def other_schema(tensors, meta):
    meta["schema"] = "projected_grpo.knobs/99"


@pytest.mark.parametrize("deployed", [True, False])
@pytest.mark.parametrize("change", [drop, reshape, rename, enlarge, other_schema])
def test_an_adapter_of_another_model_is_refused_whole(two, tmp_path, change, deployed):
    path = tmp_path / "k.safetensors"
    save_adapter(path, two.policy, META, deployed=deployed)
    edit(path, change)
    with pytest.raises(UserError, match=r"k\.safetensors") as caught:
        load_adapter(path, two.fresh)
    assert "\n" not in str(caught.value)
    assert all(not k.any() for layer in two.fresh.layers.values() for k in (layer.delta_s, layer.delta_hack))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "folder"])
def test_a_damaged_file_is_refused(two, tmp_path, damage):
    path = tmp_path / "k.safetensors"
    save_adapter(path, two.policy, META, deployed=True)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-100], "text": b"nothing" * 20}[damage])
    with pytest.raises(UserError, match=r"k\.safetensors"):
        load_adapter(path, two.fresh)


def test_a_foreign_safetensors_file_is_refused(two, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "k.safetensors")
    with pytest.raises(UserError, match="schema"):
        load_adapter(tmp_path / "k.safetensors", two.fresh)


def test_an_adapter_of_other_weights_is_refused(two, tmp_path):
    """Of the same shapes: a fine-tuned model, for example."""
    path = tmp_path / "k.safetensors"
    save_adapter(path, two.policy, META, deployed=True)
    for layer in two.fresh.layers.values():
        layer.base.weight.data += 1e-4
    with pytest.raises(UserError, match=r"k\.safetensors: .*another model") as caught:
        load_adapter(path, two.fresh)
    assert "\n" not in str(caught.value)
    assert all(not layer.delta_s.any() for layer in two.fresh.layers.values())


def test_an_older_adapter_file_loads_with_a_warning(two, tmp_path):
    path = tmp_path / "k.safetensors"
    save_adapter(path, two.policy, META, deployed=True)
    said = []
    sink = logger.add(said.append, level="WARNING", format="{message}")
    try:
        load_adapter(path, two.fresh)
        assert not said
        edit(path, lambda tensors, meta: [meta.pop(name) for name in ("weights", "checksum")])
        load_adapter(path, two.fresh)
    finally:
        logger.remove(sink)
    assert len(said) == 1 and "k.safetensors" in said[0]
    assert torch.equal(logits(two.fresh), logits(two.policy, ablate_quarantine=True))


def test_the_digest_tells_weights_apart_and_not_their_dtype(tiny, svd_cache):
    half = copy.deepcopy(tiny[0]).bfloat16()
    wide = wrap(copy.deepcopy(half).float(), svd_cache)
    assert weights_digest(wrap(half, svd_cache)) == weights_digest(wide)
    for layer in wide.layers.values():
        before = weights_digest(wide)
        layer.base.weight.data[0, 0] += 0.5  # the first value is always in the sample
        assert weights_digest(wide) != before


# State


def basis_of(policy):
    names = sorted(policy.layers)  # not all have axes
    V = {m: torch.eye(policy.ranks[m])[: i + 1].contiguous() for i, m in enumerate(names[:3])}
    return HackBasis(V, {m: torch.full((policy.ranks[m],), 0.125) for m in names})


@pytest.mark.parametrize("quarantine", [True, False], ids=["route", "erase"])
def test_the_next_step_after_a_resume_is_the_same(two, tmp_path, quarantine):
    """Moments and step counts of AdamW come back, and are absent where a parameter never had a gradient."""
    adam, again = optimizer(two.policy), optimizer(two.fresh)
    for seed in range(3):
        step(two.policy, adam, seed, quarantine=quarantine)
    basis = basis_of(two.policy)
    gate = GateState(dict.fromkeys(basis.V, 0.25), dict.fromkeys(basis.V, -0.125))
    save_state(tmp_path / "s", two.policy, adam, basis, gate, FACTS)
    saved = read_state(tmp_path / "s")
    assert saved.facts == FACTS | {"weights": weights_digest(two.policy)} and saved.gate == gate
    found_basis = restore_state(saved, two.fresh, again)
    assert list(found_basis.V) == list(basis.V) and list(found_basis.v_grad) == list(basis.v_grad)
    assert all(torch.equal(found_basis.V[m], V) for m, V in basis.V.items())
    assert all(torch.equal(found_basis.v_grad[m], v) for m, v in basis.v_grad.items())
    assert torch.equal(logits(two.fresh), logits(two.policy))
    for seed in range(3, 6):
        step(two.policy, adam, seed, quarantine=quarantine)
        step(two.fresh, again, seed, quarantine=quarantine)
        for m, layer in two.policy.layers.items():
            assert torch.equal(two.fresh.layers[m].delta_s, layer.delta_s)
            assert torch.equal(two.fresh.layers[m].delta_hack, layer.delta_hack)


def test_moments_are_what_makes_the_next_step_the_same(two, tmp_path):
    """The check above could not fail if the moments did not matter."""
    adam, cold = optimizer(two.policy), optimizer(two.fresh)
    step(two.policy, adam, 0)
    save_adapter(tmp_path / "k.safetensors", two.policy, META, deployed=False)
    load_adapter(tmp_path / "k.safetensors", two.fresh)
    step(two.policy, adam, 1)
    step(two.fresh, cold, 1)
    assert any(
        not torch.equal(two.fresh.layers[m].delta_s, layer.delta_s) for m, layer in two.policy.layers.items()
    )


def test_a_state_without_gate_has_none(two, tmp_path):
    save_state(tmp_path / "s", two.policy, optimizer(two.policy), basis_of(two.policy), None, FACTS)
    assert read_state(tmp_path / "s").gate is None


@pytest.fixture
def state(two, tmp_path):
    """A whole state file."""
    path = state_path(tmp_path, 7)
    save_state(path, two.policy, optimizer(two.policy), basis_of(two.policy), None, FACTS)
    return path


@pytest.mark.parametrize("damage", ["missing", "cut", "adapter", "old"])
def test_a_state_that_is_none_is_refused(two, state, damage):
    if damage == "missing":
        state.unlink()
    elif damage == "adapter":
        save_adapter(state, two.policy, META, deployed=False)
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-1])
    else:
        edit(state, lambda tensors, meta: meta.update(schema="projected_grpo.state/1"))
    with pytest.raises(UserError, match=r"state_step0007\.safetensors"):
        read_state(state)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_of_a_state_is_found(state, where, bit):
    """Of the tensors, of their names and shapes, and of the facts."""
    whole = state.read_bytes()
    damaged = bytearray(whole)
    damaged[int(where * len(damaged))] ^= 1 << bit
    other = state.with_name("flipped")
    other.write_bytes(damaged)
    try:
        saved = read_state(other)
    except UserError as error:
        assert "\n" not in str(error) and "flipped" in str(error)
    else:  # white space that pads the header, say
        intact = read_state(state)
        assert saved.facts == intact.facts and saved.tensors.keys() == intact.tensors.keys()
        assert all(torch.equal(saved.tensors[n], t) for n, t in intact.tensors.items())


def test_a_state_without_its_checksum_is_refused(state):
    edit(state, lambda tensors, meta: meta.pop("checksum"))
    with pytest.raises(UserError, match="checksum"):
        read_state(state)


@pytest.mark.parametrize("change", [drop, reshape, rename, enlarge])
def test_a_state_whose_tensors_changed_is_refused(state, change):
    edit(state, change)
    with pytest.raises(UserError, match="checksum"):
        read_state(state)


def test_a_state_of_another_model_changes_nothing(two, state, small_model):
    saved = read_state(state)
    other = wrap(small_model("qwen3", torch.float32), None)
    adam = optimizer(other)
    with pytest.raises(UserError, match="another model"):
        restore_state(saved, other, adam)
    assert not adam.state
    assert not any(k.any() for layer in other.layers.values() for k in (layer.delta_s, layer.delta_hack))


def test_an_adapter_written_before_there_were_checksums_is_read(two, tmp_path):
    path = tmp_path / "k.safetensors"
    save_adapter(path, two.policy, META, deployed=True)
    edit(path, lambda tensors, meta: meta.pop("checksum"))
    assert load_adapter(path, two.fresh) == META | {"deployed": True, "weights": weights_digest(two.policy)}


def test_states_are_listed_by_step_newest_first(tmp_path):
    (tmp_path / "state").mkdir()
    for step in (8, 10, 9_998, 10_002):
        state_path(tmp_path, step).touch()
    for other in ("state_step0009.safetensors.refused", "notes.txt", ".state_step0011.safetensors.1.tmp"):
        (tmp_path / "state" / other).touch()
    assert state_paths(tmp_path) == [state_path(tmp_path, step) for step in (10_002, 9_998, 10, 8)]
    assert state_paths(tmp_path / "nowhere") == []


def test_a_runs_state_holds_an_adapter_too(two, state):
    load_adapter(state, two.fresh)
    assert torch.equal(logits(two.fresh), logits(two.policy))
    assert not torch.equal(logits(two.fresh), logits(two.policy, ablate_quarantine=True))


def test_an_adapter_of_posthoc_before_its_ablation_is_not_what_it_deploys(two, tmp_path):
    path = tmp_path / "k.safetensors"
    save_adapter(path, two.policy, META | {"intervention": "posthoc"}, deployed=False)
    with pytest.raises(UserError, match="before its ablation"):
        read_adapter_meta(path)
    save_adapter(path, two.policy, META | {"intervention": "posthoc"}, deployed=True)
    assert read_adapter_meta(path)["deployed"]
