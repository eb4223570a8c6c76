"""What a run is said to take: bytes against real tensors and files, time against earlier runs."""

from dataclasses import replace

import pytest
import torch

from fake_runs import config, made, steps_of
from projected_grpo.antipasto import wrap
from projected_grpo.config import PRESETS
from projected_grpo.engine import cost
from projected_grpo.engine.cost import all_of, duration, hardware
from projected_grpo.engine.memory import predicted_peak
from projected_grpo.engine.models import load_model, outline
from projected_grpo.experiment import expected, expected_of
from projected_grpo.rollout import Rollout
from projected_grpo.run.folder import Run
from projected_grpo.runlog import read_json, write_json

HERE = hardware("cpu")


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_memory_is_that_of_the_tensors():
    cfg = config("none")  # one prompt and two sources: two rows of gradients
    model, _ = load_model(cfg.model)
    found = expected(model, cfg, prompt_tokens=10)
    policy = wrap(model, None)
    layers = policy.layers.values()
    parameters = [p for layer in layers for p in (layer.delta_s, layer.delta_hack)]
    held = nbytes(policy.model.parameters()) + nbytes(t for layer in layers for t in (layer.U, layer.Vh))
    rows = 2 * nbytes(layer.delta_s for layer in layers)
    assert found.rest == held + 2 * nbytes(parameters) + rows  # AdamW has two moments
    s = cfg.sampling
    rollouts = [Rollout((1,) * 10, (0,) * s.max_new, "") for _ in range(s.group)]
    assert found.loss == predicted_peak(model, rollouts, cfg.loss)
    assert found.sampling > nbytes(layer.weight for layer in layers)  # merged, and a cache
    assert found.peak == found.least == found.rest + max(found.loss, found.sampling)  # a CPU has no batches


def test_qwen3_4b_is_known_without_its_files_as_docs_benchmarks_has_it(tmp_path):
    cfg = PRESETS["full"][1]
    cfg = replace(cfg, run=replace(cfg.run, out_dir=tmp_path))
    found = expected_of(cfg)
    assert found.rest / 1e9 == pytest.approx(17.8, rel=0.01)
    assert found.loss / 1e9 == pytest.approx(36.5, rel=0.02)  # there with prompts of two lengths
    assert found.sampling / 1e9 == pytest.approx(86.7, rel=0.03)
    assert found.least < 60e9 < found.peak
    block = expected_of(replace(cfg, arm=config("route2").arm))
    assert block.rest - found.rest == pytest.approx((258 - 43) * 4 * 534_528)  # a row for every rollout


def test_a_model_that_is_not_here_is_not_guessed_at():
    assert outline("someone/other-model", torch.float32) is None
    assert expected_of(replace(config(), model=replace(config().model, model="/no/such/folder"))) is None


def a_run(runs, name, intervention="none", place=HERE, seconds=None, sec=1.0, steps=4):
    rows = steps_of(steps, sec=lambda i: sec)
    folder = made(runs, name, intervention, steps=rows, seconds=seconds)
    write_json(
        folder / "config.json", read_json(folder / "config.json", "") | {"hardware": place, "processes": 1}
    )
    return folder


def test_time_is_of_earlier_runs_of_this_work_on_this_hardware(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from runs under out/

    def rate(cfg=None):
        return expected_of(cfg or config("none"), [tmp_path]).step_s

    assert rate() is None
    a_run(tmp_path, "1_elsewhere", place="another machine", seconds=8.0)
    (a_run(tmp_path, "1_young", steps=2) / "summary.json").unlink()
    assert rate() is None
    (a_run(tmp_path, "2_running", "erase", sec=3.0) / "summary.json").unlink()
    assert rate() == 3.0  # of another arm, for want of the same
    for number, seconds in enumerate((8.0, 80.0, 12.0)):  # evaluations are in it, over 4 steps
        a_run(tmp_path, f"3_{number}", seconds=seconds)
    assert rate() == 3.0 and "in 3 runs" in expected_of(config("none"), [tmp_path]).text()
    other = config("none")
    assert rate(replace(other, sampling=replace(other.sampling, max_new=64))) is None
    (tmp_path / "3_1" / "config.json").write_text("{")
    assert rate() == 2.5


def test_the_table_is_for_the_gpus_in_it_and_says_that_it_is_an_estimate(monkeypatch, tmp_path):
    cfg = PRESETS["full"][1]
    cfg = replace(cfg, run=replace(cfg.run, out_dir=tmp_path))
    fast = expected_of(cfg)
    monkeypatch.setattr(cost, "hardware", lambda kind: "NVIDIA RTX PRO 6000 Blackwell")
    slow = expected_of(cfg)
    loss = (43 * 1024 + 258 * 1024) * (214e-6 - 96e-6) * 4.022e9 / 4e9
    assert slow.step_s - fast.step_s == pytest.approx(loss, rel=1e-3)
    assert "estimated" in slow.text() and "not measured" in slow.text()
    monkeypatch.setattr(cost, "hardware", lambda kind: "NVIDIA Unknown")
    assert expected_of(cfg).seconds is None


def test_runs_of_a_sweep_together(tmp_path):
    one = replace(expected_of(config("none")), step_s=60.0, steps=60, source="measured")
    text = all_of([one, one, replace(one, step_s=None, source="unknown")])
    assert "2.0 h one after another for the 2 whose time is known (measured; unknown)" in text
    assert f"{cost.gb(3 * one.disk + one.cache)} GB of disk" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (45.2, "45 s"), (192.0, "3.2 min"), (1500.0, "25 min"), (22680.0, "6.3 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_time_left_is_known_from_the_third_step_on(tmp_path, monkeypatch):
    cfg = config("none")
    run = Run(replace(cfg, optim=replace(cfg.optim, steps=10)), tmp_path)
    ends = iter((100.0, 102.0, 106.0, 109.0))  # the first step, with what is made once, does not count
    monkeypatch.setattr("projected_grpo.run.folder.time.monotonic", lambda: next(ends))
    assert [run.seconds_left(step) for step in range(4)] == [None, None, 21.0, 18.0]
