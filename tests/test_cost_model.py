"""The cost model's counts, against a real model; its predictions, against what they must keep to."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from projected_grpo.bench.step import Work, open_bench_chat
from projected_grpo.config import ModelConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "cost_model.py"


@pytest.fixture(scope="module")
def costs():
    spec = importlib.util.spec_from_file_location("cost_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_model"] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cost_model"]


def test_counts_are_those_of_the_model(costs):
    chat = open_bench_chat(Work(model=ModelConfig(model="random-0.3m", device="cpu", svd_cache=None)))
    shape, layers = costs.BENCH["random-0.3m"], chat.policy.layers.values()
    assert shape.weights == sum(layer.weight.numel() for layer in layers)
    assert shape.bases == sum(layer.U.numel() + layer.Vh.numel() for layer in layers)
    assert shape.adapter_parameters == sum(len(layer.delta_s) for layer in layers)
    assert shape.head == chat.policy.model.lm_head.weight.numel()
    products = (2 * layer.U.shape[0] * len(layer.delta_s) * layer.Vh.shape[1] for layer in layers)
    assert shape.merge_flops == sum(products)


def test_more_gpus_never_slow_what_is_shared_and_never_speed_what_is_not(costs):
    shape, load, gpu = costs.MODELS["4 B (Qwen3)"], costs.Load(), costs.Machine()
    each = [costs.predict(shape, load, gpu, gpus) for gpus in (1, 8, 64, 512)]
    for fewer, more in zip(each, each[1:], strict=False):
        assert more["loss"] < fewer["loss"] and more["grading"] < fewer["grading"]
        assert more["generation"] <= fewer["generation"] and more["merging"] == fewer["merging"]
        assert more["sending"] > fewer["sending"] and more["handling"] >= fewer["handling"]
    floor = load.longest * shape.layers * gpu.overhead
    assert all(parts["generation"] > floor for parts in each)
    assert costs.predict(shape, load, replace(gpu, overhead=0.0), 8)["generation"] < each[1]["generation"]
    for parts in each:
        whole = sum(value for name, value in parts.items() if name not in ("GPUs a process", "rows", "step"))
        assert parts["step"] == pytest.approx(whole)
