"""Predicted memory of the loss against what torch's profiler counts, and the figures the documents quote."""

import json
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from projected_grpo.antipasto import wrap
from projected_grpo.bench import growth as bench_growth
from projected_grpo.bench.step import SIZES, Work, bench_model, loss_pass, nudge_adapter, open_bench_chat
from projected_grpo.cli import main
from projected_grpo.config import PRESETS, LossConfig, ModelConfig
from projected_grpo.engine import logps, memory
from projected_grpo.engine.memory import Load, Shape, loss_memory, measured_peak, shape_of
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.rollout import Rollout

CPU = torch.device("cpu")
MODEL = {
    **{"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 4, "vocab_size": 2048},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
QWEN3_4B = Shape(36, 2560, 9728, 32, 8, 128, 151936, width=2)


def test_the_profiler_counts_what_is_alive_at_once():
    def three_then_two() -> None:
        a = torch.ones(1000, 1000)
        b = a + 1
        c = b + 1
        del a, b
        d = c + 1
        del c, d

    assert measured_peak(three_then_two, [CPU]) == pytest.approx(3 * 4e6, rel=1e-3)


@pytest.mark.parametrize(
    ("way", "chunk"),
    [("summed", 2**26), ("summed", 2**16), ("each", 2**26), ("each", 2**16), ("checkpointed", 2**16)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_is_within_a_tenth_of_what_is_counted(monkeypatch, dtype, way, chunk):
    monkeypatch.setattr(logps, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(memory, "CHUNK_LOGITS", chunk)
    model = ModelConfig(model="random-0.3m", device="cpu", dtype=dtype, svd_cache=None)
    work = Work(model, 2, 4, 48, 48, grad_checkpoint=way == "checkpointed")
    chat = open_bench_chat(work, MODEL)
    nudge_adapter(chat)
    parts = None if way == "each" else [i // 4 for i in range(8)]
    run, predicted = loss_pass(work, chat, parts)
    assert predicted == pytest.approx(measured_peak(run, [CPU]), rel=0.1)


@pytest.mark.parametrize("chunk", [2**26, 2**16])
def test_the_formula_knows_of_prompts_of_different_lengths(monkeypatch, chunk):
    monkeypatch.setattr(logps, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(memory, "CHUNK_LOGITS", chunk)
    chat = open_bench_chat(Work(ModelConfig(model="random-0.3m", device="cpu", svd_cache=None)), MODEL)
    nudge_adapter(chat)
    rollouts = [Rollout(tuple(range(n)), tuple(range(48)), "") for n in (16, 48, 80, 112)]
    loss = LossConfig(tokens_per_microbatch=4096)

    def run() -> None:
        per_rollout_grads(chat.policy, rollouts, torch.ones(4), loss, 48)

    predicted = memory.predicted_peak(chat.policy.model, rollouts, loss)
    assert predicted == pytest.approx(measured_peak(run, [CPU]), rel=0.1)


def resting(shape: Shape) -> int:
    """Bytes of weights (output layer tied to the embedding), SVD bases and adapter parameters."""
    bases = shape.layers * sum(min(a, b) * (a + b) for a, b in shape.linears) * shape.width
    adapter = 4 * 4 * shape.layers * shape.ranks  # two in float32, and AdamW's moments of one
    return shape.adapted + bases + adapter + shape.vocabulary * shape.hidden * shape.width


def test_what_rests_is_every_parameter_and_basis():
    model, _ = bench_model(ModelConfig(model="random-0.3m", device="cpu"))
    shape, policy = shape_of(model), wrap(model, None)
    tensors = {id(t): t for t in (*policy.model.parameters(), *policy.model.buffers())}
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    moments = sum(2 * 4 * r for r in policy.ranks.values())
    assert resting(shape) == pytest.approx(held + moments, rel=2e-3), "but for the norms"


def quoted(row: str) -> list[float]:
    """The two figures of a row of the table of docs/benchmarks.md."""
    lines = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row}")]
    return [float(cell) for cell in line.strip("| ").split("|")[1:]]


def test_the_documents_quote_what_the_formula_says():
    rest = resting(QWEN3_4B)
    loads = {
        "loss, `full`": Load(3, 1, 1024, 1024),
        "loss, all 6": Load(6, 1, 1024, 1024),
        "loss, 6 rollouts with": Load(6, 6, 1024, 1024, shared=False, grad_checkpoint=True),
    }
    for row, load in loads.items():
        peak = loss_memory(QWEN3_4B, load).total
        assert quoted(row) == [round(peak / 1e9, 1), round((peak + rest) / 1e9, 1)]
    full = PRESETS["full"][1]
    per_token = QWEN3_4B.layers * 2 * QWEN3_4B.kv_heads * QWEN3_4B.head_dim * QWEN3_4B.width
    assert full.sampling.rows_per_batch == 0 and full.sampling.prompts_per_step * full.sampling.group == 258
    for row, rows in (("generation, 129", 129), ("generation, all 258", 258)):
        head = 4 * QWEN3_4B.vocabulary * QWEN3_4B.hidden
        peak = rows * 2048 * per_token + QWEN3_4B.adapted + head
        assert quoted(row) == [round(peak / 1e9, 1), round((peak + rest) / 1e9, 1)]
    assert full.loss.tokens_per_microbatch == 1024 + 3 * 1024, "the load of the first row"
    assert quoted("loss, `full`")[1] < 60 and quoted("generation, 129")[1] < 80


def test_growth_compares_points_with_the_base(monkeypatch, tmp_path, capsys):
    real, stepped = bench_growth.points, []

    @contextmanager
    def stepper(work, chat):
        yield lambda: stepped.append((work.group, sum(range(100_000))))

    monkeypatch.setattr(bench_growth, "points", lambda work: islice(real(work), 2))
    monkeypatch.setattr(bench_growth, "open_stepper", stepper)
    out = tmp_path / "growth.json"
    sizes = ["--prompts-per-step", "2", "--group", "2", "--prompt-tokens", "12", "--max-new", "4"]
    command = ["bench", "growth", "--model", "random-0.3m", *sizes, "--steps", "1", "--json", str(out)]
    assert main(command) == 0
    assert [group for group, _ in stepped] == [2, 4] * 2, "in turns, the first not counted"
    found = json.loads(out.read_text())
    base, more = found["points"]
    assert (base["axis"], base["group"], more["axis"], more["group"]) == ("base", 2, "rollouts", 4)
    assert base["step_over_base"] == base["peak_over_base"] == 1
    assert more["step_over_base"] == more["step_s"] / base["step_s"]
    assert more["peak_over_base"] == more["peak_mb"] / base["peak_mb"] > 1.3
    assert base["rank"] == 64 and found["clock"] == "cpu" and "rollouts" in capsys.readouterr().out


def test_growth_scales_a_named_size_only(capsys):
    work = Work(ModelConfig(model="random-0.3m"))
    shapes = {(p.axis, p.factor): (p.work, p.shape) for p in bench_growth.points(work)}
    assert len(shapes) == 7
    assert shapes["completion", 4][0] == replace(work, max_new=256)
    assert shapes["layers", 2][1] == {**SIZES["random-0.3m"], "num_hidden_layers": 6}
    assert shapes["rank", 2][1]["hidden_size"] == 128 and shapes["rank", 2][1]["head_dim"] == 16
    assert main(["bench", "growth", "--model", "tiny-random", "--steps", "1"]) == 2
    assert "random-0.3m" in capsys.readouterr().err
