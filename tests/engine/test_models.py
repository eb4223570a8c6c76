"""Getting models without a network: the tiny one, a folder, and clear errors."""

from pathlib import Path

import pytest
import torch

from projected_grpo.config import TINY_RANDOM, ModelConfig
from projected_grpo.engine import placement
from projected_grpo.engine.models import encode_chat, load_model, render_chat, stop_ids
from projected_grpo.engine.placement import pick_attention, pick_device, pick_dtype
from projected_grpo.errors import UserError

CHAT = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "Add two numbers."}]


def cpu(model: str, dtype: str = "auto") -> ModelConfig:
    return ModelConfig(model=model, device="cpu", dtype=dtype)


def test_tiny_random_is_one_model_whatever_the_global_seed(tiny):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model, tokenizer = load_model(cpu(TINY_RANDOM))
    assert torch.equal(torch.get_rng_state(), before)
    states = model.state_dict(), tiny[0].state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert tokenizer.get_vocab() == tiny[1].get_vocab()
    assert len(tokenizer) <= model.config.vocab_size


def test_tiny_random_in_bfloat16_has_the_same_weights_rounded(tiny):
    model, _ = load_model(cpu(TINY_RANDOM, "bfloat16"))
    for (name, a), b in zip(tiny[0].named_parameters(), model.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b), name


def save(tiny, folder: Path) -> None:
    tiny[0].save_pretrained(folder)
    tiny[1].save_pretrained(folder)


def test_a_saved_folder_loads_as_the_same_model(tiny, tmp_path, monkeypatch):
    save(tiny, tmp_path / "saved")
    ids = torch.tensor([encode_chat(tiny[1], CHAT)])
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "saved"), "./saved", "saved"):
        model, tokenizer = load_model(cpu(name))
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, tiny[0](input_ids=ids).logits)
        assert encode_chat(tokenizer, CHAT) == tuple(ids[0].tolist())
        assert stop_ids(model, tokenizer) == stop_ids(*tiny)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/folder", "no such folder"),
        ("./missing", "no such folder"),
        ("~/no-such-projected-grpo-folder", "no such folder"),
        ("nobody/no-such-model", "just download-model nobody/no-such-model"),
        ("no-such-model", "just download-model no-such-model"),
        ("not a name!", "--model"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(cpu(name))
    message = str(caught.value)
    assert says in message and name in message and "\n" not in message


def break_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_architecture"}')


def remove_everything(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "damage", [break_weights, remove_weights, break_config, unknown_architecture, remove_everything]
)
def test_a_damaged_folder_is_one_line_that_names_it(tiny, tmp_path, damage):
    save(tiny, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(cpu(str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_a_chat_template_is_refused(tiny, tmp_path):
    save(tiny, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_model(cpu(str(tmp_path)))


def test_a_chat_ends_where_the_assistant_answers_with_thinking_closed(tiny):
    text = render_chat(tiny[1], CHAT)
    assert "Write Python." in text and "Add two numbers." in text
    assert text.rstrip().endswith("</think>") and text.index("assistant") < text.index("<think>")
    ids = encode_chat(tiny[1], CHAT)
    assert tiny[1].decode(list(ids)) == text
    marker = tiny[1].convert_tokens_to_ids("<|im_start|>")
    assert ids.count(marker) == 3  # the template's markers are single tokens


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(tiny):
    model, tokenizer = tiny
    assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id}
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [5, 7]
        assert stop_ids(model, tokenizer) == {5, 7, tokenizer.eos_token_id}
        model.generation_config.eos_token_id = None
        assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id}
    finally:
        model.generation_config.eos_token_id = before


def test_choices_that_this_machine_cannot_serve_are_refused(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device"):
        pick_device("no-such-device")
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash-attn"):
        pick_attention("flash_attention_2", torch.device("cpu"))
    assert pick_attention("auto", torch.device("cuda")) == "sdpa"
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: object())
    assert pick_attention("auto", torch.device("cuda")) == "flash_attention_2"
    assert pick_attention("auto", torch.device("cpu")) == "sdpa"


def test_auto_dtype_is_float32_on_a_cpu_and_bfloat16_on_a_gpu():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_a_checkpoint_with_a_missing_weight_is_refused(tiny, tmp_path):
    model, tokenizer = tiny
    kept = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=kept)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"up_proj"):
        load_model(ModelConfig(model=str(tmp_path)))
