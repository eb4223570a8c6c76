"""The training benchmarks: that they do the work they say, and report what they measured."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch

from projected_grpo import cli
from projected_grpo.bench import step as bench_model
from projected_grpo.bench.step import (
    WARM_UP,
    RandomGrader,
    RivalFigures,
    Work,
    bench_prompts,
    bench_step,
    loss_pass,
    open_bench_chat,
    open_stepper,
    random_rollouts,
)
from projected_grpo.config import ModelConfig
from projected_grpo.pairs import load_pairs
from projected_grpo.problems import load_problems

SMALL = ("--model", "tiny-random", "--prompts-per-step", "2", "--group", "2", "--prompt-tokens", "12")
SMALL = (*SMALL, "--max-new", "3", "--steps", "1")


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(ModelConfig(model="tiny-random", device="cpu", svd_cache=None), 2, 3, 12, 5, steps=2)


def test_rewards_differ_within_every_group():
    grades = RandomGrader(0).grade_all([(load_problems("embedded").problems[0].task, "")] * 64)
    rewards = torch.tensor([g.reward for g in grades]).view(16, 4)
    assert bool((rewards.amax(1) > rewards.amin(1)).all())
    assert not any(g.exploited or g.gt_correct for g in grades)


def test_a_step_generates_and_updates_what_was_asked_for(work):
    chat = open_bench_chat(work)
    with open_stepper(work, chat) as step:
        records = [step() for _ in range(2)]
    for record in records:
        assert record["N"] == 6 and record["zerovar"] == 0 and record["loss"] is not None
    assert any(bool(layer.delta_s.any()) for layer in chat.policy.layers.values())


def test_prompts_and_completions_have_the_lengths_asked_for(work):
    chat = open_bench_chat(work)
    texts = bench_prompts(work, chat.tokenizer)
    assert len(set(texts)) == work.prompts_per_step
    lengths = [len(chat.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    assert all(abs(length - work.prompt_tokens) <= 2 for length in lengths)
    rollouts = random_rollouts(work, chat)
    assert len(rollouts) == 6 and all(len(r.completion_ids) == work.max_new for r in rollouts)


@pytest.mark.parametrize("intervention", ["erase", "route2"])
def test_the_rival_and_we_take_turns(work, intervention):
    turns: list[str] = []
    work = replace(work, intervention=intervention)

    def rival(asked, prompts, between):
        assert asked is work and len(prompts) == work.prompts_per_step
        for _ in range(work.steps + WARM_UP):
            turns.append("theirs")
            between()
        return RivalFigures([9.0, 2.0, 4.0], 3_000_000)

    figures = bench_step(work, rival)
    assert len(turns) == 3
    assert figures["trl_s"] == 3.0  # the median without the first
    assert figures["ratio"] == figures["trl_s"] / figures["ours_s"]
    assert figures["trl_loss_peak_gb"] == 3e-3
    chat = open_bench_chat(work)
    parts = None if intervention == "route2" else [0, 0, 0, 1, 1, 1]  # a gradient per rollout, or per group
    _, predicted = loss_pass(work, chat, parts)
    assert figures["loss_predicted_gb"] == predicted / 1e9
    assert figures["loss_peak_gb"] == pytest.approx(predicted / 1e9, rel=0.1)


@pytest.mark.parametrize("verb", ["step", "generation", "backward", "extraction", "svd"])
def test_each_verb_writes_its_figures(verb, tmp_path, monkeypatch, capsys):
    pairs = load_pairs(None)
    monkeypatch.setattr(bench_model, "load_pairs", lambda path: replace(pairs, pairs=pairs.pairs[:5]))
    out = tmp_path / "figures.json"
    assert cli.main(["bench", verb, *SMALL, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    seconds = {name: value for name, value in figures.items() if name.endswith("_s")}
    assert seconds and all(value > 0 for value in seconds.values())
    assert figures["model"] == "tiny-random" and figures["max_new"] == 3 and "git_commit" in figures
    if verb == "backward":
        assert figures["per_group_over_floor"] == figures["per_group_s"] / figures["floor_s"]
        assert all(figures[f"{name}_peak_gb"] > 0 for name in ("per_rollout", "per_group"))
        assert all(figures[f"{name}_predicted_gb"] > 0 for name in ("per_rollout", "per_group"))
    if verb == "extraction":
        assert figures["differences_over_floor"] == figures["differences_s"] / figures["floor_s"]
    assert "tiny-random" in capsys.readouterr().out


def test_a_model_of_a_named_size_needs_no_files(capsys):
    assert cli.main(["bench", "generation", *SMALL, "--model", "random-0.3m"]) == 0
    parameters = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters"))
    assert 250_000 < int(parameters.split()[1]) < 350_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--group", "1"), "--group must be at least 2"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--prompt-tokens", "10000000"), "--prompt-tokens 10000000: at most"),
    ],
)
def test_sizes_that_make_no_step_are_refused(options, said, capsys):
    assert cli.main(["bench", "step", *SMALL, *options]) == 2
    assert said in capsys.readouterr().err


def test_trl_is_an_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "projected_grpo.bench.trl", raising=False)
    assert cli.main(["bench", "step", *SMALL, "--vs", "trl"]) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("trl", "peft")), reason="the bench extra is not installed"
)
def test_trl_makes_its_steps_in_turns_with_ours(tmp_path):
    out = tmp_path / "figures.json"
    assert cli.main(["bench", "step", *SMALL, "--vs", "trl", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["ratio"] == pytest.approx(figures["trl_s"] / figures["ours_s"])
    assert 1e-3 < figures["trl_loss_peak_gb"] < 1  # its output layer alone takes megabytes, whatever the size
