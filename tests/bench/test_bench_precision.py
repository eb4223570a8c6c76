"""`bench precision`: all of a small adapter survives in bfloat16, and a rounding that loses it is seen."""

import json

import pytest

from projected_grpo import antipasto
from projected_grpo.bench.precision import RHOS, SITES, one_draw
from projected_grpo.bench.step import Work, open_bench_chat
from projected_grpo.cli import main
from projected_grpo.config import ModelConfig


def measured(tmp_path, dtype):
    out = tmp_path / "figures.json"
    size = ("--prompts-per-step=2", "--group=2", "--prompt-tokens=24", "--max-new=4", "--steps=3")
    assert (
        main(["bench", "precision", "--model=random-0.3m", f"--dtype={dtype}", *size, f"--json={out}"]) == 0
    )
    return json.loads(out.read_text())


def test_bfloat16_keeps_what_float32_keeps(tmp_path, unchecked, capsys):
    figures = {dtype: measured(tmp_path, dtype) for dtype in ("float32", "bfloat16")}
    assert [figures[dtype]["dtype"] for dtype in figures] == list(figures)
    for half, whole in zip(figures["bfloat16"]["points"], figures["float32"]["points"], strict=True):
        for site in SITES:
            assert whole[site] == pytest.approx(1, abs=5e-3)
            assert half[site] == pytest.approx(whole[site], rel=0.05), (half["rho"], site)
        assert whole["gap"] < 1e-5 < half["gap"] and half["outside_clip"] == whole["outside_clip"] == 0
    assert [point["rho"] for point in figures["bfloat16"]["points"]] == list(RHOS)
    assert "outside_clip" in capsys.readouterr().out


def test_weights_rounded_to_nearest_would_be_seen(monkeypatch):
    """And the policy is whole after a draw, although its Linears were exported."""
    work = Work(ModelConfig(model="random-0.3m", device="cpu", dtype="bfloat16", svd_cache=None), 1, 2, 12, 2)
    chat = open_bench_chat(work)
    before = {m: (layer, layer.base.weight.data) for m, layer in chat.policy.layers.items()}
    monkeypatch.setattr(antipasto, "rounded", lambda values, dtype, seed: values.to(dtype))
    sums, _ = one_draw(work, chat, 1e-4, 0)
    assert float((sums[:, 0] / sums[:, 1]).max()) < 0.5
    for m, (layer, weight) in before.items():
        assert (
            chat.policy.model.get_submodule(m) is layer and layer.base.weight.data_ptr() == weight.data_ptr()
        )
