"""Getting models without a network: the tiny one, a folder, and clear errors."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from projected_grpo.config import TINY_RANDOM, ModelConfig
from projected_grpo.engine import chat, placement
from projected_grpo.engine.chat import Chat, open_chat
from projected_grpo.engine.model_files import POINTER
from projected_grpo.engine.models import encode_chat, load_model, stop_ids
from projected_grpo.engine.placement import attention_choices, pick_device, pick_dtype
from projected_grpo.engine.template import render_chat
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


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def words_in_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "large"}')


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_architecture"}')


def remove_everything(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        *(break_weights, remove_weights, break_config, empty_config, words_in_config),
        *(unknown_architecture, remove_everything),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_it(tiny, tmp_path, damage):
    save(tiny, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(cpu(str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def point_at(name: str):
    def put(folder: Path) -> None:
        (folder / name).write_bytes(POINTER + b" v1\noid sha256:0\nsize 538090408\n")

    return put


def shorten(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def forget_the_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def break_the_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] ")


def spoil(value: float, weight: str):
    def put(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[weight].view(-1)[3] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return put


def add_a_word(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zygote"])
    tokenizer.save_pretrained(folder)


def end_with_a_new_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (point_at("model.safetensors"), "model.safetensors is a git-lfs pointer.*git lfs pull"),
        (point_at("tokenizer.json"), "tokenizer.json is a git-lfs pointer"),
        (shorten, "model.safetensors is cut off or damaged"),
        (forget_the_template, "no chat template"),
        (break_the_template, "chat template fails"),
        (
            spoil(float("nan"), "model.layers.0.self_attn.q_proj.weight"),
            r"1 of .*layers\.0\.self_attn\.q_proj",
        ),
        (spoil(float("-inf"), "model.norm.weight"), r"model\.norm\.weight"),
        (add_a_word, r"1 tokens more than the model's 2048 embeddings \(e.g. 'zygote'\)"),
        (end_with_a_new_token, r"1 tokens more .* \(e.g. '<\|eot\|>'\)"),
    ],
)
def test_what_cannot_be_trained_is_told_before_a_weight_is_decomposed(
    tiny, tmp_path, monkeypatch, damage, says
):
    save(tiny, tmp_path)
    damage(tmp_path)
    monkeypatch.setattr(chat, "wrap", None)
    with pytest.raises(UserError, match=says) as caught:
        open_chat(cpu(str(tmp_path)))
    assert f"--model {tmp_path}" in str(caught.value) and "\n" not in str(caught.value)


def test_special_tokens_that_no_prompt_has_need_no_embedding(tiny, tmp_path):
    save(tiny, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.save_pretrained(tmp_path)
    assert encode_chat(load_model(cpu(str(tmp_path)))[1], CHAT) == encode_chat(tiny[1], CHAT)


def test_attention_that_a_model_does_not_have_is_left_under_auto(tiny, tmp_path):
    """Gemma 2 caps its attention's logits, which sdpa cannot."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=2048, eos_token_id=2, pad_token_id=0, **shape, **heads)
    save((Gemma2ForCausalLM(config), tiny[1]), tmp_path)
    model, _ = load_model(cpu(str(tmp_path)))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="--attention sdpa.*--attention=eager"):
        load_model(replace(cpu(str(tmp_path)), attention="sdpa"))


def test_a_cached_text_ends_with_the_templates_end_of_turn(tiny, tiny_policy):
    """Phi 3.5's and Gemma 3's tokenizers call another token the end of a sequence."""
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.eos_token = "<|endoftext|>"
    end, other = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    stops = stop_ids(tiny[0], tokenizer)
    assert stops == {end, other}
    assert Chat(tiny_policy, tokenizer, stops).stop_id == end
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    assert Chat(tiny_policy, tokenizer, stops).stop_id == other


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
        attention_choices("flash_attention_2", torch.device("cpu"), torch.bfloat16)
    assert attention_choices("auto", torch.device("cuda"), torch.bfloat16) == (None,)
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: object())
    assert attention_choices("auto", torch.device("cuda"), torch.bfloat16) == ("flash_attention_2", None)
    assert attention_choices("auto", torch.device("cpu"), torch.bfloat16) == (None,)
    assert attention_choices("eager", torch.device("cuda"), torch.bfloat16) == ("eager",)


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
