"""One model over several devices: the same numbers, every operation on one device, the adapter at home.

No machine with two GPUs has run this. `tests/engine/devices.py` stands in for one: real numbers on the CPU,
and an error wherever tensors of two devices would meet.
"""

import copy
import json
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from arm_lists import CONTROLS_OF, SIGNALS
from devices import MixedDevices, devices
from fake_runs import few_pairs
from projected_grpo import antipasto, concept, experiment, extract_vhack_grad
from projected_grpo import step as step_module
from projected_grpo.antipasto import Policy, unwrap, wrap
from projected_grpo.arm_settings import arm_settings
from projected_grpo.block import random_start
from projected_grpo.cli import main
from projected_grpo.collect import collect
from projected_grpo.concept import completion_states
from projected_grpo.config import PRESETS, LossConfig, SamplingConfig
from projected_grpo.engine import logps, passes
from projected_grpo.engine.capacity import layers_on
from projected_grpo.engine.generate import sample
from projected_grpo.engine.memory import Load, loss_memory, predicted_peak, shape_of
from projected_grpo.engine.placement import even_cuts, outermost_layers, pick_devices, place, values_held
from projected_grpo.errors import UserError
from projected_grpo.experiment import prepare
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.record import peak_gb
from projected_grpo.rollout import Rollout
from projected_grpo.run.start import start_state
from projected_grpo.step import adapter_parameters, as_deployed, train_step

CPU, META = torch.device("cpu"), torch.device("meta")
ONE, TWO = (CPU,), (torch.device("cpu:1"), torch.device("cpu:2"))
PAD = 0


# The stand-in for GPUs


def test_operations_on_two_devices_raise_and_moves_carry_gradients():
    with devices():
        a = torch.arange(4.0, device="cpu:1").view(2, 2).requires_grad_()
        b = torch.eye(2, device="cpu:2") * torch.tensor(3.0)  # a scalar of the CPU goes with all
        for mixed in (
            lambda: a @ b,
            lambda: a + torch.ones(2, 2),
            lambda: a[torch.tensor([0], device=TWO[1])],
        ):
            with pytest.raises(MixedDevices):
                mixed()
        out = (a.to("cpu:2") @ b).to("cpu:1")
        (gradient,) = torch.autograd.grad(out.sum(), [a])
        assert out.device == gradient.device == TWO[0] and a[torch.tensor([1])].tolist() == [[2.0, 3.0]]
        assert type(gradient.cpu()) is torch.Tensor and gradient.cpu().tolist() == [[3.0, 3.0], [3.0, 3.0]]


# Which layer goes where


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 20), st.data())
def test_cuts_are_as_even_as_any(costs, first, data):
    parts = data.draw(st.integers(1, len(costs)))

    def unevenness(cuts: tuple[int, ...]) -> int:
        sums = [sum(costs[start:stop]) for start, stop in pairwise((0, *cuts))]
        return sum(x * x for x in (sums[0] + first, *sums[1:]))

    cuts = even_cuts(costs, first, parts)
    assert len(cuts) == parts and cuts[-1] == len(costs) and all(a < b for a, b in pairwise((0, *cuts)))
    ways = [(*way, len(costs)) for way in combinations(range(1, len(costs)), parts - 1)]
    assert unevenness(cuts) == min(map(unevenness, ways))


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_5", "qwen3_next"])
def test_the_layers_of_every_family_are_found_in_their_order(small_model, family):
    model = small_model(family)
    assert list(outermost_layers(model)) == list(model.base_model.layers)


def test_what_a_module_will_hold_is_what_its_adapters_then_hold(tiny):
    policy = wrap(copy.deepcopy(tiny[0]), None)
    adapters = [(a.base.weight, a.U, a.Vh) for a in policy.layers.values()]  # the first stands for its copy
    expected = [*tiny[0].parameters(), *(part for adapter in adapters for part in adapter)]
    assert values_held(tiny[0]) == sum(part.numel() for part in expected)


def test_a_model_is_never_whole_on_one_of_several_devices(small_model):
    model = small_model("qwen3", torch.float32)
    place(model, (META, CPU))  # nothing comes back from there, so a layer that went by home would be lost
    first, second = model.model.layers
    there = {name for name, p in model.named_parameters() if p.device == CPU}
    assert there == {f"model.layers.1.{name}" for name, _ in second.named_parameters()}
    assert {p.device for p in (*first.parameters(), model.model.rotary_emb.inv_freq)} == {META}
    assert set(layers_on(model).values()) == {1}


def test_tied_weights_stay_one(small_model):
    model = small_model("qwen3", torch.float32)
    model.lm_head.weight = model.model.embed_tokens.weight
    place(model, (CPU, META))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_memory_is_predicted_for_the_fullest_device(small_model):
    model = small_model("qwen3", torch.float32)
    rollouts, loss = [Rollout((1, 2, 3), (4, 5), "")] * 2, LossConfig()
    load = Load(rows=2, prompts=1, prompt_tokens=3, max_new=2, padded=False)
    assert predicted_peak(model, rollouts, loss) == loss_memory(shape_of(model), load).total
    place(model, (CPU, META))
    assert (
        predicted_peak(model, rollouts, loss) == loss_memory(replace(shape_of(model), layers=1), load).total
    )


def test_the_peak_is_that_of_the_fullest_gpu(monkeypatch):
    seen = {torch.device("cuda:0"): 3e9, torch.device("cuda:1"): 5e9}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", seen.__getitem__)
    assert peak_gb(tuple(seen)) == 5.0 and peak_gb(tuple(seen)[:1]) == 3.0 and peak_gb(ONE) is None


# The same numbers on two devices as on one


def policy_on(model: nn.Module, where: tuple[torch.device, ...]) -> Policy:
    """The model there, with adapter parameters and blocks that are not zero."""
    place(model, where)
    policy = wrap(model, None)
    draw = torch.Generator().manual_seed(1)
    sizes = {m: (len(layer.U), layer.Vh.shape[1]) for m, layer in policy.layers.items()}
    policy.give_blocks({m: random_start(*size, 2, draw) for m, size in list(sizes.items())[::3]})
    with torch.no_grad():
        for layer in policy.layers.values():
            for parameter in (layer.delta_s, layer.quarantine):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return policy


def outcome(policy: Policy, way: str) -> dict[str, object]:
    """What a run asks of a policy, on the CPU."""
    rollouts = [
        Rollout((3, 4, 5, 6)[: 4 - i // 2], tuple(range(7 + i, 10 + 2 * i)), "", -torch.ones(3 + i))
        for i in range(3)
    ]
    loss = LossConfig(beta=0.1, grad_checkpoint=way == "checkpointed")
    parts = [0, 0, 1] if way == "shared" else None
    grads = per_rollout_grads(policy, rollouts, torch.tensor([1.0, -1.0, 0.5]), loss, 8, parts=parts)
    assert {rows.device for rows in grads.rows.values()} == {policy.device}
    states = completion_states(policy, rollouts, 0.5, 100)
    sampling = SamplingConfig(max_new=5, temperature=1.0, top_k=0)
    said = sample(policy, [(1, 2, 3), (4, 5)], [[1, 2], [3]], sampling, frozenset([5]))
    routed = policy.quarantine_norm, policy.quarantine_used
    model = unwrap(policy, ablate_quarantine=False)
    logits = model(input_ids=torch.arange(6, device=policy.device)[None]).logits
    found = {m: rows.cpu() for m, rows in grads.rows.items()}
    found |= {"kl": grads.kl, "last": states.last, "mean": states.mean, "logits": logits.cpu()}
    found |= {f"logp {p} {i}": logp for p, group in enumerate(said) for i, (_, logp) in enumerate(group)}
    return found | {
        "loss": grads.loss,
        "said": [[ids for ids, _ in group] for group in said],
        "routed": routed,
    }


@pytest.mark.parametrize(
    ("family", "dtype", "way"),
    [
        ("qwen3", torch.float32, "shared"),
        ("qwen3", torch.float32, "checkpointed"),
        ("qwen3", torch.bfloat16, "apart"),
        ("qwen3", torch.bfloat16, "a row each"),
        ("qwen3_5", torch.float32, "apart"),
    ],
)
def test_two_devices_compute_what_one_does_bit_for_bit(monkeypatch, small_model, family, dtype, way):
    if way == "checkpointed":
        monkeypatch.setattr(logps, "CHUNK_LOGITS", 2 * 48)  # the output layer two tokens at a time
    if way == "apart":
        monkeypatch.setattr(passes, "can_share", lambda model: False)
    one = outcome(policy_on(small_model(family, dtype), ONE), way)
    with devices():
        policy = policy_on(small_model(family, dtype), TWO)
        assert policy.devices == TWO
        assert {layer.U.device for m, layer in policy.layers.items() if ".layers.1." in m} == {TWO[1]}
        two = outcome(policy, way)
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        assert same, name


@pytest.mark.parametrize("broken", ["a weight", "an adapter parameter's basis", "no hooks"])
def test_anything_misplaced_is_noticed(small_model, broken):
    with devices():
        policy = policy_on(small_model("qwen3", torch.float32), TWO)
        layer = policy.model.model.layers[1]
        if broken == "a weight":
            layer.input_layernorm.to(TWO[0])
        elif broken == "an adapter parameter's basis":
            layer.self_attn.q_proj.U = nn.Buffer(layer.self_attn.q_proj.U.to(TWO[0]), persistent=False)
        else:
            layer._forward_pre_hooks.clear()
        with pytest.raises(MixedDevices):
            outcome(policy, "apart")


def test_a_whole_run_on_two_devices_is_the_run_on_one(tmp_path, unchecked, monkeypatch):
    """route2 with a block where V lies uses every part that knows devices: basis, gate, block, files."""
    monkeypatch.chdir(tmp_path)
    argv = (
        *("train", "smoke", "--intervention=route2", "--quarantine=block", "--block-init=direction"),
        *("--steps=2", "--n-problems=6", "--eval-n-prompts=1", "--max-new=6", "--eval-ablate-every=0"),
        *("--workers=1", f"--vhack-pairs-path={few_pairs(tmp_path)}", "--v-hack-drop-bottom-frac=0"),
        *("--vhack-refresh-every=0", "--v-hack-extract-top-k=2"),
    )
    found = []
    for home, where in ((tmp_path / "one", "cpu"), (tmp_path / "two", "cpu:1,cpu:2")):
        places = (f"--device={where}", f"--out-dir={home / 'out'}")
        if where == "cpu":
            assert main([*argv, *places]) == 0
        else:
            with devices():
                assert main([*argv, *places]) == 0
        (run,) = (home / "out" / "runs").iterdir()
        steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        for step in steps:
            for clock in ("gen", "fb", "t_rew", "sec"):
                del step[clock]
        state = load_file(run / "state" / "state_step0002.safetensors")
        found.append((steps, (run / "rollouts.jsonl").read_text(), state))
    (steps, texts, state), two = found[0], found[1]
    assert steps == two[0] and texts == two[1]
    assert any(name.startswith("adamw/") for name in state) and state.keys() == two[2].keys()
    assert all(torch.equal(value, two[2][name]) for name, value in state.items())


# Every arm with every control

CELLS = [
    (arm, control, {}) for arm, controls in CONTROLS_OF.items() for control in controls if arm not in SIGNALS
]
CELLS += [
    (arm, control, {option: signal})
    for arm, (option, signals) in SIGNALS.items()
    for signal, controls in signals.items()
    for control in controls
]


@pytest.fixture(scope="module")
def run_there(tiny, tmp_path_factory):
    """A run's experiment on a device that is not the CPU; of two Linears, since the arms matter here."""
    home = tmp_path_factory.mktemp("there")
    model = copy.deepcopy(tiny[0])
    model.config.num_hidden_layers, model.model.layers = 1, model.model.layers[:1]
    cfg = PRESETS["smoke"][1]
    cfg = replace(
        cfg,
        run=replace(cfg.run, out_dir=home, workers=1),
        problems=replace(cfg.problems, n_problems=4),
        sampling=replace(cfg.sampling, max_new=4),
        basis=replace(cfg.basis, vhack_pairs_path=few_pairs(home), vhack_refresh_every=1),
        evaluation=replace(cfg.evaluation, eval_n_prompts=1),
    )
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack, devices():
        place(model, TWO[:1])
        patch.setattr(antipasto, "TARGETS", {"o_proj", "down_proj"})
        patch.setattr(experiment, "load_model", lambda cfg: (model.eval(), tiny[1]))
        for module, name in ((step_module, "per_rollout_grads"), (concept, "per_rollout_grads")):
            patch.setattr(module, name, once(getattr(module, name)))
        for name in ("pair_grads", "pair_differences"):
            patch.setattr(extract_vhack_grad, name, once(getattr(extract_vhack_grad, name)))
        exp = prepare(cfg, stack)
        data = collect(exp, 0)
        patch.setattr(step_module, "collect", lambda exp, step: data)
        yield exp


def once(function):
    """What it returned to the first such call, which is the same as long as the adapter is zero."""
    known = {}

    def remembered(owner, items, *more, **options):
        policy = getattr(owner, "policy", owner)
        key = len(policy.blocks), str(options.get("parts")), len(items)
        if key not in known:
            known[key] = function(owner, items, *more, **options)
        return known[key]

    return remembered


@pytest.mark.parametrize(("arm", "control", "own"), CELLS, ids=str)
def test_every_arm_with_every_control_takes_a_step_on_its_device(run_there, unchecked, arm, control, own):
    """Basis, gate and scores at the start; then a refresh, the step, and what is deployed."""
    with devices():
        exp = replace(run_there, cfg=replace(run_there.cfg, arm=arm_settings(arm, control=control, **own)))
        for parameter in adapter_parameters(exp):
            parameter.data.zero_()
        state = start_state(exp)
        state.step = 1
        record, _ = train_step(exp, state)
        with as_deployed(exp, state):
            found = [*exp.chat.policy.deltas().values(), *state.basis.V.values(), *state.frames.values()]
        assert record["refr"] is not None and record["gn"] > 0
        assert {value.device for value in found} == {TWO[0]}


# What is refused


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("cpu,no-such-device", "--device no-such-device"),
        ("cpu,cuda:99", "--device cuda:99"),
        ("cpu,", "--device : not usable"),
        ("cpu,cpu", "each device once"),
        ("auto,cpu:1", "each device once"),
    ],
)
def test_devices_that_cannot_be_had_are_named(wanted, says):
    with pytest.raises(UserError, match=says):
        pick_devices(wanted)


def test_devices_are_read_in_their_order():
    assert pick_devices("cpu:2, cpu:1") == tuple(map(torch.device, ("cpu:2", "cpu:1")))
    assert pick_devices("cpu") == ONE


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device=cpu,cpu",), "each device once"),
        (("--device=cpu,cpu:1,cpu:2,cpu:3",), "names 4 devices, but Qwen3ForCausalLM has 3 layers"),
    ],
)
def test_a_bad_list_of_devices_is_a_line_and_exit_2(tmp_path, capsys, options, says):
    argv = ["bench", "svd", "--model=random-0.3m", f"--json={tmp_path / 'out.json'}", *options]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said


def test_another_trainer_gets_one_device(capsys):
    assert main(["bench", "step", "--vs=trl", "--device=cpu,cpu:1"]) == 2
    assert "--vs trl" in capsys.readouterr().err
