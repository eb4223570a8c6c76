"""vLLM's sampler on a stand-in engine: the same rollouts as our own, from the right weights at every time."""

import json
import os
import shutil
import sys
import weakref
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fake_runs import few_pairs
from fake_vllm import Model, modules
from projected_grpo.antipasto import Policy, block_name, merged_weight, wrap
from projected_grpo.arm_settings import arm_settings
from projected_grpo.block import random_start
from projected_grpo.checks import validate
from projected_grpo.cli import main
from projected_grpo.config import PRESETS, ModelConfig, SamplingConfig
from projected_grpo.engine.chat import Chat, own_sampler, sampler_opener
from projected_grpo.engine.generate import sample
from projected_grpo.errors import UserError
from projected_grpo.verbs.pools import PoolSampleOptions, sampled_with

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15), (16,), (17, 18, 19, 20, 21)]
SEEDS = [[1, 2**63 - 1], [3], [], [4, 5]]
SAMPLING = SamplingConfig(max_new=8, temperature=0.7, top_k=20, top_p=0.9)
STOP = frozenset(range(0, 2048, 9))
VLLM = ModelConfig(device="cpu", sampler="vllm")
OURS = "projected_grpo.engine.vllm"
STEPS = 2
TRAIN = (
    *("train", "smoke", "--n-problems=6", "--eval-n-prompts=1", "--max-new=8", "--workers=1", "--group=3"),
    *("--device=cpu", "--vhack-pairs-path=pairs.json", "--vhack-refresh-every=0", "--eval-ablate-every=1"),
    *("--intervention=route2", "--quarantine=block", "--mask-unflagged=absorb", "--lr=0.05"),
    *(
        "--mix-ratio=0.25",
        "--save-every=1",
    ),
    f"--steps={STEPS}",
)
ASK = ("--device=cpu", "--workers=1", "--n-problems=1", "--samples=2", "--resamples=9", "--max-new=6")


def install(patch, device_type="cpu"):
    """The stand-in in vLLM's place; our module is loaded anew, with it."""
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    patch.delitem(sys.modules, OURS, raising=False)
    for name, module in modules(device_type).items():
        patch.setitem(sys.modules, name, module)


@pytest.fixture
def fake(monkeypatch):
    install(monkeypatch)
    yield
    sys.modules.pop(OURS, None)


def set_adapter(policy: Policy, s: float, hack: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in policy.layers.values():
        for parameter, scale in ((layer.delta_s, s), (layer.quarantine, hack)):
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def give_blocks(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy.give_blocks(
        {m: random_start(*layer.weight.shape, 2, generator) for m, layer in policy.layers.items()}
    )


def assert_alike(sampler, policy, *, ablate_quarantine=False, seeds=SEEDS, sampling=SAMPLING):
    arguments = (policy, PROMPTS, seeds, sampling, STOP)
    got = sampler(*arguments, ablate_quarantine=ablate_quarantine)
    expected = sample(*arguments, ablate_quarantine=ablate_quarantine)
    assert [len(group) for group in got] == [len(group) for group in seeds]
    for ours, theirs in zip(expected, got, strict=True):
        assert [ids for ids, _ in ours] == [ids for ids, _ in theirs]
        for (_, logps), (_, engine_logps) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(engine_logps, logps, rtol=0, atol=2e-4)
    return [[ids for ids, _ in group] for group in got]


# Rollouts


def test_rollouts_are_our_samplers_as_trained_and_ablated_whenever_the_adapter_changes(fake, tiny_policy):
    set_adapter(tiny_policy, 0.2, 1.0)
    vllm = sampler_opener(VLLM)(tiny_policy)
    seen = [assert_alike(vllm, tiny_policy, ablate_quarantine=ablate) for ablate in (False, True, False)]
    assert seen[0] == seen[2] != seen[1], "the quarantine must show"
    set_adapter(tiny_policy, 0.4, 1.0, seed=1)  # as a step of the optimizer does, in place
    seen += [assert_alike(vllm, tiny_policy, ablate_quarantine=ablate) for ablate in (True, False)]
    assert seen[3] != seen[1] and seen[4] != seen[0]
    ends = {ids[-1] in STOP for group in seen[0] + seen[1] for ids in group}
    assert ends == {True, False}, "some completions stop and some are cut"


def test_a_filter_of_one_token_is_greedy_decoding(fake, tiny_policy):
    set_adapter(tiny_policy, 0.2, 0.0)
    vllm = sampler_opener(VLLM)(tiny_policy)
    greedy = assert_alike(vllm, tiny_policy, seeds=[[1, 2]] * 4, sampling=replace(SAMPLING, top_k=1))
    assert all(first == second for first, second in greedy)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_and_untied_output_layers_are_brought_too(fake, small_model, family):
    policy = wrap(small_model(family, torch.float32), None)
    set_adapter(policy, 0.2, 0.2)
    assert_alike(sampler_opener(VLLM)(policy), policy)


def test_what_is_asked_of_the_engine(fake, tiny_policy):
    vllm = sampler_opener(VLLM)(tiny_policy)
    vllm._engine.requests.clear()  # of the comparison with the model
    assert vllm(tiny_policy, PROMPTS, [[]] * 4, SAMPLING, STOP) == [[]] * 4
    assert not vllm._engine.requests
    vllm(tiny_policy, PROMPTS, SEEDS, SAMPLING, STOP)
    asked = vllm._engine.requests
    assert [request.seed for request in asked] == [seed for group in SEEDS for seed in group]
    assert {(r.temperature, r.top_k, r.top_p, r.max_tokens) for r in asked} == {(0.7, 20, 0.9, 8)}


# Weights


def names_of_loads(model: Model) -> list[list[str]]:
    return [list(load) for load in model.loads]


@pytest.mark.parametrize("blocks", [False, True])
def test_each_weight_is_brought_merged_and_only_when_it_changed(fake, tiny_policy, blocks):
    if blocks:
        give_blocks(tiny_policy, 0)
    set_adapter(tiny_policy, 0.2, 0.5)
    vllm = sampler_opener(VLLM)(tiny_policy)
    model, (first, *others) = vllm._engine.model, tiny_policy.layers
    plain, merged = model.loads
    assert set(merged) == {f"{m}.weight" for m in tiny_policy.layers}
    assert set(plain) | set(merged) == set(model.held) and not set(plain) & set(merged)
    model.loads.clear()

    def bring(ablate_quarantine=False):
        model.loads.clear()
        deltas = tiny_policy.deltas(ablate_quarantine=ablate_quarantine)
        vllm(tiny_policy, PROMPTS, SEEDS, SAMPLING, STOP, ablate_quarantine=ablate_quarantine)
        for m, layer in tiny_policy.layers.items():
            expected = merged_weight(layer, deltas[m], deltas.get(block_name(m)))
            assert torch.equal(model.held[f"{m}.weight"], expected)
        return [name.removesuffix(".weight") for load in model.loads for name in load]

    assert bring() == []
    tiny_policy.layers[first].delta_s.data[0] += 1
    assert bring() == [first]
    assert bring(ablate_quarantine=True) == [first, *others]
    tiny_policy.layers[first].quarantine.data.zero_()
    assert bring() == others, "nothing is routed there"
    if blocks:
        moved = {m: block.moved.data.clone() for m, block in tiny_policy.blocks.items()}
        give_blocks(tiny_policy, 1)  # in place, where they fit
        for m, block in tiny_policy.blocks.items():
            block.moved.data.copy_(moved[m])
        assert bring() == others, "the same displacement from another start is another weight"


def test_weights_are_merged_one_after_another(fake, tiny_policy, monkeypatch):
    set_adapter(tiny_policy, 0.2, 0.0)
    module = import_module(OURS)
    alive, most = [], []

    def counted(layer, delta, moved=None):
        W = merged_weight(layer, delta, moved)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(W))
        most.append(sum(ref() is not None for ref in alive))
        return W

    monkeypatch.setattr(module, "merged_weight", counted)
    monkeypatch.setattr(Model, "load_weights", lambda self, weights: {name for name, _ in weights})
    monkeypatch.setattr(module, "parameter_names", lambda model: set())
    sampler_opener(VLLM)(tiny_policy)
    assert len(most) == len(tiny_policy.layers) and max(most) <= 2


def test_a_model_that_vllm_has_other_weights_for_is_refused(fake, tiny_policy, monkeypatch):
    monkeypatch.setattr(import_module(OURS), "parameter_names", lambda model: {"visual.proj.weight"})
    with pytest.raises(UserError, match=r"visual\.proj\.weight"):
        sampler_opener(VLLM)(tiny_policy)


def test_a_weight_that_vllm_does_not_know_is_told_in_one_line(fake, tiny_policy):
    tiny_policy.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    with pytest.raises(UserError, match="Qwen3ForCausalLM.*'extra'"):
        sampler_opener(VLLM)(tiny_policy)


# What goes wrong


def test_a_completion_that_was_given_up_is_no_rollout(fake, tiny_policy, monkeypatch):
    vllm = sampler_opener(VLLM)(tiny_policy)
    real = vllm._engine.generate

    def aborted(*arguments, **options):
        outputs = real(*arguments, **options)
        outputs[1].outputs[0].finish_reason = "abort"
        return outputs

    monkeypatch.setattr(vllm._engine, "generate", aborted)
    with pytest.raises(RuntimeError, match="abort"):
        vllm(tiny_policy, PROMPTS, SEEDS, SAMPLING, STOP)


def test_a_cache_that_is_not_reset_ends_the_run(fake, tiny_policy, monkeypatch):
    vllm = sampler_opener(VLLM)(tiny_policy)
    monkeypatch.setattr(vllm._engine, "reset_prefix_cache", lambda: False)
    set_adapter(tiny_policy, 0.2, 0.0)
    with pytest.raises(UserError, match="keys and values"):
        vllm(tiny_policy, PROMPTS, SEEDS, SAMPLING, STOP)


def test_an_engine_that_does_not_hold_the_weights_is_refused(fake, monkeypatch, tiny_policy):
    """Names that fit are not enough: an engine may lay its weights out anew and miss what comes later."""
    real = Model.load_weights

    def missed(self, weights):
        loaded = real(self, weights)
        self.held["model.norm.weight"].data.fill_(20.0)
        return loaded

    monkeypatch.setattr(Model, "load_weights", missed)
    with pytest.raises(UserError, match=r"nats.*--sampler=own"):
        sampler_opener(VLLM)(tiny_policy)


def test_an_engine_that_does_not_start_is_told_in_one_line(fake, monkeypatch, tiny_policy):
    def full(**_):
        raise ValueError("Free memory on device is less than desired GPU memory utilization")

    monkeypatch.setattr(sys.modules[OURS] if OURS in sys.modules else import_module(OURS), "LLM", full)
    with pytest.raises(UserError, match=r"Free memory"):
        sampler_opener(VLLM)(tiny_policy)


def test_what_vllm_does_not_take_is_refused(fake, tiny_policy):
    vllm = sampler_opener(VLLM)(tiny_policy)
    with pytest.raises(UserError, match="--temperature 2.5: vLLM takes at most 2"):
        vllm(tiny_policy, PROMPTS, SEEDS, replace(SAMPLING, temperature=2.5), STOP)
    smoke = PRESETS["smoke"][1]
    ablated = replace(smoke, model=VLLM, arm=arm_settings("route", rollout_ablate_frac=0.5))
    with pytest.raises(UserError, match="--rollout-ablate-frac needs --sampler=own"):
        validate(ablated)


def test_a_prompt_without_room_is_refused(fake, small_model):
    policy = wrap(small_model("qwen3", torch.float32), None)  # of 128 positions
    vllm = sampler_opener(VLLM)(policy)
    with pytest.raises(UserError, match="131 tokens, at most 128; lower --max-new"):
        vllm(policy, [(1, 2, 3)], [[1]], replace(SAMPLING, max_new=128), STOP)


def test_a_place_that_vllm_does_not_run_in_is_refused(monkeypatch):
    install(monkeypatch, "cuda")
    with pytest.raises(UserError, match="--device=cuda"):
        sampler_opener(VLLM)
    monkeypatch.setattr(
        sys.modules[OURS], "pick_devices", lambda names: tuple(map(torch.device, names.split(",")))
    )
    with pytest.raises(UserError, match="takes one GPU"):
        sampler_opener(replace(VLLM, device="cuda:0,cuda:1"))
    with pytest.raises(UserError, match="first GPU, the model cuda:1.*CUDA_VISIBLE_DEVICES"):
        sampler_opener(replace(VLLM, device="cuda:1"))
    for device in ("cuda", "cuda:0"):
        sampler_opener(replace(VLLM, device=device))
    with pytest.raises(UserError, match="torchrun"):
        sampler_opener(replace(VLLM, device="cuda"), 2)
    assert sampler_opener(ModelConfig(), 2) is own_sampler
    sys.modules.pop(OURS, None)


def test_a_missing_extra_is_named_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    for verb in (["train", "smoke"], ["pool", "sample", "--out=pool"], ["bench", "generation"]):
        assert main([*verb, "--sampler=vllm"]) == 2
        said = capsys.readouterr().err
        assert "--sampler=vllm needs vllm: pip install 'projected_grpo[vllm]'" in said
    assert not list(tmp_path.iterdir())


def test_a_pool_of_another_sampler_is_another_pool(tmp_path, tiny_policy, tiny):
    own, chat = (
        PoolSampleOptions(tmp_path, model=ModelConfig(device="cpu")),
        Chat(tiny_policy, tiny[1], frozenset()),
    )
    told = sampled_with(own, chat, ())
    assert sampled_with(replace(own, model=VLLM), chat, ()) == told | {"sampler": "vllm"}


# Whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, svd_cache):
    """The same run with our sampler, with the engine, and with the engine from its first save on."""
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    few_pairs(home)
    found = {}
    (home / "out").mkdir()
    (home / "out" / "svd_cache").symlink_to(svd_cache)
    os.chdir(home)
    try:
        with pytest.MonkeyPatch.context() as patch:
            install(patch)
            for name in ("own", "vllm"):
                options = (f"--out-tag=_{name}", f"--sampler={name}")
                assert main([*TRAIN, *options]) == 0
                (found[name],) = (home / "out" / "runs").glob(f"*_{name}")
            found["resumed"] = home / "out" / "runs" / "resumed"
            shutil.copytree(found["vllm"], found["resumed"])
            for step in range(2, STEPS + 1):
                (found["resumed"] / "state" / f"state_step{step:04d}.safetensors").unlink()
            assert main(["train", "smoke", f"--resume={found['resumed']}"]) == 0
    finally:
        os.chdir(before)
        sys.modules.pop(OURS, None)
    return home, found


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_with_the_engine_is_the_run_without_it(runs):
    _, found = runs
    own, vllm = (lines(found[name], "rollouts.jsonl") for name in ("own", "vllm"))
    assert len(own) > STEPS
    assert own == vllm
    for row, other in zip(*(lines(found[name], "steps.jsonl") for name in ("own", "vllm")), strict=True):
        for key in ("loss", "gn", "hack_deploy", "rew", "lp_s"):
            assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), (row["step"], key)
    config = json.loads((found["vllm"] / "config.json").read_text())["config"]
    assert config["model"]["sampler"] == "vllm"


def test_a_resumed_run_samples_from_the_adapter_it_was_saved_with(runs):
    _, found = runs
    whole, resumed = (lines(found[name], "rollouts.jsonl") for name in ("vllm", "resumed"))
    assert resumed == whole
    assert lines(found["resumed"], "steps.jsonl")[-1]["gn"] == lines(found["vllm"], "steps.jsonl")[-1]["gn"]


def test_an_evaluation_with_the_engine_is_the_one_without_it(runs, monkeypatch, fake):
    home, found = runs
    monkeypatch.chdir(home)
    documents = {}
    for name in ("own", "vllm"):
        options = (f"--out={name}.json", f"--completions={name}.jsonl", f"--sampler={name}")
        assert main(["evaluate", str(found["vllm"]), *ASK, *options]) == 0
        documents[name] = json.loads(Path(f"{name}.json").read_text())
        assert documents[name]["settings"].pop("sampler") == name
    assert Path("own.jsonl").read_text() == Path("vllm.jsonl").read_text()
    assert documents["own"]["deployed"] == documents["vllm"]["deployed"]


def test_the_benchmark_measures_the_engine(fake, tmp_path, capsys):
    out = tmp_path / "bench.json"
    size = ("--prompts-per-step=2", "--group=2", "--prompt-tokens=8", "--max-new=4", "--steps=1")
    options = ("--model=tiny-random", "--device=cpu", "--sampler=vllm", f"--json={out}")
    assert main(["bench", "generation", *size, *options]) == 0
    figures = json.loads(out.read_text())
    assert figures["sampler"] == "vllm" and figures["ours_tokens_per_s"] > 0
    assert main(["bench", "backward", *size, *options]) == 2
    assert "bench generation" in capsys.readouterr().err
