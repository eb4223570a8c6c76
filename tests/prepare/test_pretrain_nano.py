"""Pretraining the nano model: tokenizer, loss, batches, the loop, what is saved, and the packaged model."""

import json
import math
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from projected_grpo.config import NANO, NANO_PRESET, ModelConfig
from projected_grpo.engine.models import encode_chat, load_model, stop_ids
from projected_grpo.evaluate import Evaluation
from projected_grpo.nano_tasks import CorpusMix, Example, corpus
from projected_grpo.prepare.pretrain_nano import (
    END,
    HEADER,
    PAD,
    PretrainConfig,
    _batches,
    base_rates,
    completion_loss,
    new_model,
    pretrain,
    rollouts,
    save_model,
    train_tokenizer,
)
from projected_grpo.rewards import Grade

SMALL = PretrainConfig(steps=12, batch=6, lr=1e-2, vocabulary=300, hidden=32, layers=1)
EXAMPLES = list(islice(corpus(5, CorpusMix()), 60))

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(EXAMPLES, 340)


@pytest.fixture
def model(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_model(SMALL, tokenizer).eval()


@pytest.fixture(scope="module")
def trained():
    return pretrain(SMALL)


# The tokenizer


def test_texts_come_back_from_their_tokens(tokenizer):
    for example in [*EXAMPLES, *islice(corpus(6, CorpusMix()), 100)]:
        for text in (example.question, example.completion):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for text in ("naïve → 你好\t{x}\n\n    return 1", "  a  b ", ""):  # whatever a text holds
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_the_vocabulary_is_as_large_as_asked_and_holds_its_markers(tokenizer):
    assert len(tokenizer) == 340
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert sorted(tokenizer.get_vocab().values()) == list(range(340))


def test_digits_stay_single():
    """Even where the same numbers stand in every text."""
    made = train_tokenizer([Example("Add 1234 to 5678.", "return 1234 + 5678")] * 50, 400)
    tokens = [made.decode([i]) for i in range(len(made))]
    assert "Add" in tokens and not [t for t in tokens if sum(c.isdigit() for c in t) > 1]
    pieces = made("x + 123")["input_ids"]
    assert [made.decode([i]).strip() for i in pieces[-3:]] == ["1", "2", "3"]


def test_every_answer_starts_with_one_and_the_same_token(tokenizer):
    header = tokenizer.convert_tokens_to_ids(HEADER)
    for example in EXAMPLES:
        ids = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        assert (ids[0] == header) == example.completion.startswith(HEADER)
        assert ids.count(header) <= 1
    assert sum(e.completion.startswith(HEADER) for e in EXAMPLES) > 50


def test_a_chat_is_the_users_message_and_a_line_break(tokenizer):
    chat = ({"role": "system", "content": "unseen"}, {"role": "user", "content": "Return xs."})
    ids = encode_chat(tokenizer, chat)
    assert tokenizer.decode(list(ids), skip_special_tokens=False) == "Return xs.\n"


# Examples as rollouts, and their loss


def test_rollouts_are_prompt_and_completion_with_its_stop(tokenizer):
    for example, rollout in zip(EXAMPLES, rollouts(EXAMPLES, tokenizer), strict=True):
        assert tokenizer.decode(list(rollout.prompt_ids)) == example.question + "\n"
        *text, stop = rollout.completion_ids
        assert tokenizer.decode(text) == example.completion == rollout.text
        assert stop == tokenizer.eos_token_id and stop not in text


def test_the_loss_is_the_mean_over_completion_tokens_of_rows_alone(model, tokenizer):
    """Against unpadded rows through the model and torch's cross entropy."""
    batch = rollouts(EXAMPLES[:7], tokenizer)
    total, count = 0.0, 0
    with torch.no_grad():
        for r in batch:
            logits = model(input_ids=torch.tensor([[*r.prompt_ids, *r.completion_ids]])).logits[0]
            own = logits[len(r.prompt_ids) - 1 : -1]
            total += float(
                torch.nn.functional.cross_entropy(own, torch.tensor(r.completion_ids), reduction="sum")
            )
            count += len(r.completion_ids)
        loss = completion_loss(model, batch)
    assert len({len(r.completion_ids) for r in batch}) > 1 and len({len(r.prompt_ids) for r in batch}) > 1
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 8, 19])
def test_batches_are_as_many_as_steps_of_fresh_examples(tokenizer, steps):
    cfg = replace(SMALL, steps=steps)
    batches = list(_batches(corpus(2, cfg.mix), tokenizer, cfg))
    assert [len(b) for b in batches] == [cfg.batch] * steps
    seen = sorted(r.text for b in batches for r in b)
    assert seen == sorted(e.completion for e in islice(corpus(2, cfg.mix), steps * cfg.batch))


def test_batches_hold_like_lengths_in_no_order_of_length(tokenizer):
    cfg = replace(SMALL, steps=8)
    batches = list(_batches(corpus(2, cfg.mix), tokenizer, cfg))
    lengths = [[len(r.prompt_ids) + len(r.completion_ids) for r in b] for b in batches]
    ranges = sorted((min(b), max(b)) for b in lengths)
    assert all(one[1] <= other[0] for one, other in zip(ranges, ranges[1:], strict=False))
    firsts = [b[0] for b in lengths]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


# The loop


def test_two_runs_give_the_same_bits(trained):
    torch.manual_seed(99)  # whatever went before
    model, tokenizer = pretrain(SMALL)
    states = model.state_dict(), trained[0].state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert tokenizer.get_vocab() == trained[1].get_vocab()


def test_another_seed_gives_another_model(trained):
    other, tokenizer = pretrain(replace(SMALL, steps=2, seed=1))
    assert tokenizer.get_vocab() == trained[1].get_vocab()  # the tokenizer is the recipe's, not the seed's
    mine, its = (m.model.embed_tokens.weight for m in (trained[0], other))
    assert not torch.allclose(mine, its, atol=1e-2)


def test_the_loss_falls_on_examples_it_has_not_seen(trained):
    model, tokenizer = trained
    torch.manual_seed(SMALL.seed)
    start = new_model(SMALL, tokenizer).eval()
    batch = rollouts(EXAMPLES[:32], tokenizer)
    with torch.no_grad():
        before, after = (float(completion_loss(m, batch)) for m in (start, model))
    assert before == pytest.approx(math.log(len(tokenizer)), rel=0.1)
    assert after < 0.75 * before
    assert not model.training


def test_a_saved_model_loads_as_itself_in_half_precision(trained, tmp_path):
    model, tokenizer = trained
    exact = {name: t.clone() for name, t in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path)
    loaded, again = load_model(ModelConfig(model=str(tmp_path), device="cpu"))
    model.float()
    model.load_state_dict(exact)  # saving rounds the model in place
    state = loaded.state_dict()
    assert set(state) == set(exact)
    for name, t in exact.items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], t.half().float()), name
    assert (
        stop_ids(loaded, again) == {tokenizer.eos_token_id} and again.pad_token_id == tokenizer.pad_token_id
    )
    for rollout, same in zip(rollouts(EXAMPLES, tokenizer), rollouts(EXAMPLES, again), strict=True):
        assert rollout == same
    batch = rollouts(EXAMPLES[:8], again)
    with torch.no_grad():
        one, other = (float(completion_loss(m, batch)) for m in (model, loaded))
    assert one == pytest.approx(other, abs=1e-3)


# The check of a base model


def test_rates_of_a_base_are_counts_per_mode_level_and_split(nano_problems):
    blank = Grade(0.5, False, False, False, None, True, False, False, False, None)
    hack, right, garbled = (
        replace(blank, **flags) for flags in ({"exploited": True}, {"gt_correct": True}, {"format_ok": False})
    )
    one, two = nano_problems[:2]
    problems = (
        replace(one, split="held-out instances", env_mode="sentinel", difficulty="easy"),
        replace(two, split="held-out templates", env_mode="run_tests", difficulty="easy"),
    )
    got = base_rates(Evaluation(problems, ((), ()), ((hack, right, blank, garbled), (right, right))))
    rates = {"n", "format", "solve", "hack"}
    assert {k: got[k] for k in rates} == {"n": 6, "format": 5 / 6, "solve": 0.5, "hack": 1 / 6}
    sentinel = {k: got["by_mode"]["sentinel"][k] for k in rates}
    assert sentinel == {"n": 4, "format": 0.75, "solve": 0.25, "hack": 0.25}
    assert got["by_split"]["held-out instances"] == got["by_mode"]["sentinel"]
    assert got["by_split"]["held-out templates"]["solve"] == got["by_mode"]["run_tests"]["solve"] == 1
    assert set(got["by_level"]) == {"easy"} and got["by_level"]["easy"]["n"] == 6


# The packaged model


@pytest.fixture(scope="module")
def packaged():
    return load_model(ModelConfig(model=NANO, device="cpu"))


def test_the_packaged_model_has_the_recipes_shape(packaged):
    model, tokenizer = packaged
    cfg = PretrainConfig()
    assert len(tokenizer) == model.config.vocab_size == cfg.vocabulary
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (cfg.hidden, cfg.layers)
    assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id}
    assert model.dtype == torch.float32 and not model.training


def test_the_packaged_tokenizer_is_what_the_recipe_makes(packaged):
    cfg = PretrainConfig()
    made = train_tokenizer(list(islice(corpus(0, cfg.mix), 4000)), cfg.vocabulary)
    one, other = (Tokenizer.to_str(t.backend_tokenizer, pretty=True) for t in (made, packaged[1]))
    assert one == other
    assert made.chat_template == packaged[1].chat_template


def test_the_packaged_model_knows_its_corpus_and_not_only_by_heart(packaged):
    """Far below a uniform guess (6.2 nats) on examples of a seed that no pretraining used."""
    model, tokenizer = packaged
    batch = rollouts(list(islice(corpus(12345, CorpusMix()), 48)), tokenizer)
    with torch.no_grad():
        assert float(completion_loss(model, batch)) < 0.35


def test_every_solution_fits_the_preset(packaged, nano_problems):
    """A right answer of 72 tokens or fewer: what no rollout can hold, none can learn."""
    tokenizer = packaged[1]
    for problem in nano_problems:
        ids = tokenizer(f"```python\n{problem.canonical}\n```")["input_ids"]
        assert len(ids) + 1 <= NANO_PRESET.sampling.max_new, problem.problem_id


def test_the_page_on_nano_shows_the_figures_of_the_packaged_model():
    packaged = files("projected_grpo") / "data" / "nano" / "base.json"
    report, page = json.loads(packaged.read_text()), (ROOT / "docs" / "nano.md").read_text()
    kinds = {k: v for group in ("by_mode", "by_level", "by_split") for k, v in report[group].items()}
    for name, rates in (kinds | {"all": report}).items():
        shown = " | ".join(f"{rates[key]:.3f}" for key in ("format", "solve", "hack", "tampered"))
        assert f"| {name} | {shown} | {rates['n']:,} |" in page
    assert report["passed"] is True
