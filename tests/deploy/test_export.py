"""A policy as a plain transformers folder: the same logits, loadable by name, written whole or not at all."""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from projected_grpo.antipasto import unwrap, wrap
from projected_grpo.config import NANO, TINY_RANDOM, ModelConfig
from projected_grpo.deploy.export import ADAPTER_FILE, export, read_facts
from projected_grpo.deploy.trained import find_source, open_source
from projected_grpo.engine.models import load_model, stop_ids
from projected_grpo.engine.template import render_chat
from projected_grpo.errors import UserError
from projected_grpo.run.checkpoint import load_adapter, read_adapter_meta, save_adapter

IDS = torch.tensor([[5, 9, 200, 31, 7, 340]])
CPU = {"device": "cpu", "svd_cache": None}


@torch.no_grad()
def logits(policy, *, ablate_quarantine):
    with policy.bind(policy.deltas(ablate_quarantine=ablate_quarantine)):
        return policy.model(input_ids=IDS).logits


@pytest.fixture(params=[TINY_RANDOM, NANO])
def adapter(request, tmp_path, svd_cache):
    """An adapter file of a model, both adapter parameters far from zero."""
    policy = wrap(load_model(ModelConfig(model=request.param, **CPU))[0], svd_cache)
    generator = torch.Generator().manual_seed(3)
    for layer in policy.layers.values():
        for parameter in (layer.delta_s, layer.delta_hack):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "both.safetensors"
    save_adapter(path, policy, {"model": request.param, "intervention": "route", "seed": 7}, deployed=False)
    return path


def opened(path):
    source = find_source(path, "")
    return source, open_source(source, ModelConfig(model="", **CPU))


@pytest.mark.parametrize("as_trained", [False, True])
def test_the_exported_model_is_the_policy(adapter, tmp_path, as_trained):
    source, chat = opened(adapter)
    expected = logits(chat.policy, ablate_quarantine=not as_trained)
    other = logits(chat.policy, ablate_quarantine=as_trained)
    routed, out = chat.policy.quarantine_norm, tmp_path / "new" / "model"
    export(read_facts(source, chat, as_trained=as_trained), chat, out)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        got = model(input_ids=IDS).logits
    assert (got - expected).abs().max() < 1e-4 < (got - other).abs().max()
    config = model.config
    assert config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    base, tokenizer = load_model(ModelConfig(model=source.model, **CPU))
    assert GenerationConfig.from_pretrained(out).eos_token_id == base.generation_config.eos_token_id
    again = AutoTokenizer.from_pretrained(out)
    chat_messages = [{"role": "user", "content": "Add two numbers."}]
    assert render_chat(again, chat_messages) == render_chat(tokenizer, chat_messages)
    assert stop_ids(model, again) == stop_ids(base, tokenizer)

    card = (out / "README.md").read_text()
    assert f"base_model: {source.model}" in card and "| seed | 7 |" in card and f"{routed:.3e}" in card
    assert ("still in them" in card) == as_trained == ("has been deleted" not in card)
    assert set(load_file(out / ADAPTER_FILE)) == {
        name for name in load_file(adapter) if as_trained or name.startswith("delta_s/")
    }
    assert read_adapter_meta(out / ADAPTER_FILE)["deployed"] is not as_trained
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_the_folder_is_a_model_and_its_adapter_fits_the_base_alone(adapter, tmp_path, svd_cache):
    source, chat = opened(adapter)
    expected = logits(chat.policy, ablate_quarantine=True)
    out = tmp_path / "model"
    out.mkdir()
    export(read_facts(source, chat, as_trained=False), chat, out)
    policy = wrap(load_model(ModelConfig(model=str(out), **CPU))[0], svd_cache)
    assert (logits(policy, ablate_quarantine=True) - expected).abs().max() < 1e-4
    with pytest.raises(UserError, match="made for another model"):
        load_adapter(out / ADAPTER_FILE, policy)
    base = open_source(find_source(out / ADAPTER_FILE, source.model), ModelConfig(model="", **CPU))
    assert torch.equal(logits(base.policy, ablate_quarantine=True), expected)


def test_a_folder_that_holds_something_is_left_alone(adapter, tmp_path):
    source, chat = opened(adapter)
    out = tmp_path / "model"
    out.mkdir()
    (out / "note").write_text("mine")
    with pytest.raises(UserError, match="--out"):
        export(read_facts(source, chat, as_trained=False), chat, out)
    assert [p.name for p in out.iterdir()] == ["note"]


def test_an_export_that_fails_leaves_nothing(adapter, tmp_path, monkeypatch):
    source, chat = opened(adapter)

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(chat.tokenizer), "save_pretrained", full)
    before = set(os.listdir(tmp_path))
    with pytest.raises(OSError, match="No space"):
        export(read_facts(source, chat, as_trained=False), chat, tmp_path / "model")
    assert set(os.listdir(tmp_path)) == before


def test_a_deployed_file_has_no_quarantine_to_keep(adapter, tmp_path):
    _, chat = opened(adapter)
    path = tmp_path / "deployed.safetensors"
    save_adapter(path, chat.policy, {"model": "tiny-random"}, deployed=True)
    with pytest.raises(UserError, match="--as-trained"):
        read_facts(find_source(path, ""), chat, as_trained=True)


def test_a_half_precision_export_has_the_weights_that_were_sampled_from(tiny, svd_cache):
    """Without deltas they are the base's own bits; with small ones they move by as much on average."""
    model = copy.deepcopy(tiny[0]).bfloat16()
    names = dict(model.state_dict())
    policy = wrap(model, svd_cache)
    (name, layer), *_ = policy.layers.items()
    draw = torch.Generator().manual_seed(0)
    W, U, Vh = (t.detach().float() for t in (layer.base.weight, layer.U, layer.Vh))
    layer.delta_s.data.copy_(1e-3 * float(W.norm()) * torch.randn(len(U.T), generator=draw) / 8)
    D = U @ torch.diag(layer.delta_s.data) @ Vh
    with policy.merge(policy.deltas()):
        sampled = layer.base.weight.data
    plain = unwrap(policy, ablate_quarantine=True).state_dict()
    assert plain.keys() == names.keys()
    assert torch.equal(plain[f"{name}.weight"], sampled)
    share = ((sampled.float() - W) * D).sum() / D.square().sum()
    assert float(share) == pytest.approx(1, abs=0.15)  # of 4096 values; to nearest it is .5
    assert all(torch.equal(plain[n], t) for n, t in names.items() if n != f"{name}.weight")
