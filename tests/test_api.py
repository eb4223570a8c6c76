"""The public interface: what it promises, what it needs, and the loop of docs/library.md."""

import copy
import importlib
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from doc_commands import ROOT, blocks
from hacks import sentinel_hack
from projected_grpo import antipasto
from projected_grpo.api import grading
from projected_grpo.api.grading import MODES, Grader, UserError, load_pairs, load_problems
from projected_grpo.api.method import ablate_quarantine, extract, project, score, unwrap, wrap
from projected_grpo.config import NANO_PRESET, LossConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import encode_chat, stop_ids
from projected_grpo.extract_vhack_grad import refresh
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.proj import HackBasis, haar_basis
from projected_grpo.rollout import Rollout

sys.path.insert(0, str(ROOT / "docs"))
from api_reference import METHODS, MODULES, PARTS, reference

LOOP = next(content for language, content in blocks((ROOT / "docs/library.md").read_text()) if language)


@pytest.fixture(scope="module")
def few():
    pairs = load_pairs("nano-sampled")
    return replace(pairs, pairs=pairs.pairs[:4])


@pytest.fixture
def live(tiny, svd_cache):
    """A wrapped tiny model, its parameters away from zero."""
    policy = wrap(copy.deepcopy(tiny[0]), svd_cache)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in policy.layers.values():
            for parameter in (layer.delta_s, layer.delta_hack):
                parameter.copy_(0.05 * torch.randn(len(parameter), generator=generator))
    return policy


def logits(policy, ids):
    return policy.model(input_ids=ids).logits


IDS = torch.arange(12)[None] + 20


# The model that other loops train


def test_at_first_the_wrapped_model_is_the_model(tiny, svd_cache):
    policy = wrap(copy.deepcopy(tiny[0]), svd_cache)
    assert torch.equal(logits(policy, IDS), tiny[0](input_ids=IDS).logits)
    trainable = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.{name}" for m in policy.layers for name in ("delta_s", "delta_hack")}


def test_its_parameters_are_in_use_and_autograd_gives_both_the_same_gradient(live):
    with live.bind(live.deltas()):
        assert torch.equal(logits(live, IDS), logits(live, IDS))
        bound = logits(live, IDS).detach()
    out = logits(live, IDS)
    torch.testing.assert_close(out, bound)
    out.square().mean().backward()
    leaves = {m: delta.requires_grad_() for m, delta in live.deltas().items()}
    with live.bind(leaves):
        by_leaves = torch.autograd.grad(logits(live, IDS).square().mean(), list(leaves.values()))
    for layer, gradient in zip(live.layers.values(), by_leaves, strict=True):
        torch.testing.assert_close(layer.delta_s.grad, gradient)
        assert torch.equal(layer.delta_s.grad, layer.delta_hack.grad) and bool(gradient.any())


@pytest.mark.parametrize("before", ["nothing", "parameters", "a parameter", "rows", "the parameters in use"])
def test_what_was_bound_before_changes_nothing(tiny, svd_cache, few, before):
    """A Parameter that an attribute holds is registered, and a later tensor in its place is refused."""
    policy = antipasto.wrap(copy.deepcopy(tiny[0]), svd_cache)
    names = [name for name, _ in policy.model.named_parameters()]
    layers = policy.layers.values()
    for layer in layers:
        if before == "parameters":
            layer.bind(layer.delta_s, layer.delta_hack)
        elif before == "a parameter":
            layer.bind(torch.nn.Parameter(torch.zeros(len(layer.delta_s))))
        elif before == "rows":
            layer.bind(torch.zeros(3, len(layer.delta_s)))
    if before == "the parameters in use":
        policy.use_parameters()
    bound = [layer.bound for layer in layers]
    assert [name for name, _ in policy.model.named_parameters()] == names
    basis = extract(policy, tiny[1], few)
    assert [layer.bound for layer in layers] == bound
    plain = extract(antipasto.wrap(copy.deepcopy(tiny[0]), svd_cache), tiny[1], few)
    assert basis.V.keys() == plain.V.keys()
    assert all(torch.equal(V, plain.V[m]) for m, V in basis.V.items())
    assert all(torch.equal(v, plain.v_grad[m]) for m, v in basis.v_grad.items())
    with pytest.raises(RuntimeError), policy.bind(policy.deltas()):
        raise RuntimeError
    assert [layer.bound for layer in layers] == bound


def test_weights_in_place_of_the_models_hold_the_adapter_once(live):
    """Else the parameters in use would be added to merged weights, in sampling and in every gradient."""
    with torch.no_grad():
        alone = logits(live, IDS)
        with live.merge(live.deltas()):
            torch.testing.assert_close(logits(live, IDS), alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(live, IDS), alone)


def test_without_its_quarantine_the_policy_is_what_deployment_makes_of_it(live):
    with torch.no_grad():
        trained = logits(live, IDS)
        with pytest.raises(ZeroDivisionError), ablate_quarantine(live):
            deployed = logits(live, IDS)
            _ = 1 / 0
        assert torch.equal(logits(live, IDS), trained) and not torch.allclose(deployed, trained)
        model = unwrap(live)
        torch.testing.assert_close(model(input_ids=IDS).logits, deployed, atol=1e-5, rtol=1e-4)
    assert not any("delta" in name for name in model.state_dict())


# Basis, projection, score


def test_extract_is_the_loops_refresh_and_touches_nothing(live, tiny, few):
    cfg = replace(NANO_PRESET, basis=replace(NANO_PRESET.basis, v_hack_k=2, v_hack_drop_bottom_frac=0.5))
    before = live.deltas()
    basis = extract(live, tiny[1], few, k=2, drop=0.5)
    expected = refresh(Chat(live, tiny[1], stop_ids(live.model, tiny[1])), few, cfg)
    assert basis.V.keys() == expected.V.keys() and basis.V.keys() < live.layers.keys()
    assert all(torch.equal(V, expected.V[m]) for m, V in basis.V.items())
    assert all(p.grad is None for p in live.model.parameters())
    assert all(torch.equal(d, before[m]) for m, d in live.deltas().items())


def test_a_model_in_training_mode_that_keeps_no_activations_is_read_as_it_is(live, tiny, few):
    """As other trainers have it: such layers take no cache in training mode."""
    plain, parts = extract(live, tiny[1], few), [*live.model.modules()]
    live.model.gradient_checkpointing_enable()
    live.model.train()
    parts[3].eval()
    modes = [part.training for part in parts]
    basis = extract(live, tiny[1], few)
    score(live, tiny[1], basis, [few.pairs[0].messages] * 2, ["x", "y"])
    assert all(torch.equal(V, plain.V[m]) for m, V in basis.V.items())
    assert [part.training for part in parts] == modes and {*modes} == {True, False}


@pytest.mark.parametrize("preserve", [True, False])
def test_project_is_its_formula_one_module_after_the_other(preserve):
    generator = torch.Generator().manual_seed(1)
    g = {m: torch.randn(9, generator=generator) for m in "abc"}
    basis = HackBasis({m: haar_basis(2, 9, generator) for m in "ab"}, {})
    kept, removed = project(g, basis, preserve_magnitude=preserve)
    assert kept.keys() == g.keys() and removed.keys() == basis.V.keys() and torch.equal(kept["c"], g["c"])
    for m in "ab":
        by_hand = sum(max(float(row @ g[m]), 0.0) * row for row in basis.V[m])
        left = g[m] - by_hand
        torch.testing.assert_close(removed[m], by_hand)
        torch.testing.assert_close(kept[m], left * g[m].norm() / left.norm() if preserve else left)


def test_a_score_is_the_cosine_of_a_completions_own_gradient(live, tiny, few):
    tokenizer = tiny[1]
    basis = extract(live, tokenizer, few)
    asked = [pair.messages for pair in few.pairs]
    found = score(live, tokenizer, basis, asked, [pair.hack for pair in few.pairs])
    ids = tokenizer(few.pairs[1].hack, add_special_tokens=False)["input_ids"]
    chat = Chat(live, tokenizer, stop_ids(live.model, tokenizer))
    one = Rollout(encode_chat(tokenizer, asked[1]), (*ids, chat.stop_id), "")
    rows = per_rollout_grads(live, [one], torch.ones(1), LossConfig(), 8).rows
    g = torch.cat([rows[m][0] for m in basis.v_grad])
    v = torch.cat(list(basis.v_grad.values()))
    torch.testing.assert_close(found[1], torch.cosine_similarity(g, v, dim=0), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="4 prompts but 1 completions"):
        score(live, tokenizer, basis, asked, ["x"])


# Problems and the grader


def test_grading_needs_no_torch():
    said = "import sys, projected_grpo.api.grading; print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", said],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.stdout.strip() == "set()"


def test_problems_have_the_modes_asked_for_and_sides_that_do_not_mix():
    found = load_problems("embedded", ["sentinel", "file_marker"])
    both = (*found.train, *found.held_out)
    assert {p.env_mode for p in both} == {"sentinel", "file_marker"}
    assert found.train and found.held_out and len({p.problem_id for p in both}) == len(both)
    assert MODES["sentinel"].hint in next(p for p in both if p.env_mode == "sentinel").messages[1]["content"]
    for modes, said in ((["all"], "modes all; there are run_tests"), ([], "modes are none")):
        with pytest.raises(UserError, match=said):
            load_problems("embedded", modes)


def test_a_grader_is_opened_and_closed_by_itself():
    problem = load_problems("embedded", ["sentinel"]).train[0]
    hack = sentinel_hack(problem.method)
    with Grader(1) as grader:
        grade = grader.grade(problem.task, hack)
        assert grader.grade(problem.task, hack) is grade, "known by then"
        right = grader.grade(problem.task, f"```python\n{problem.canonical}\n```")
    assert grade.exploited and grade.reward == 3.5 and not grade.gt_correct and right.gt_correct
    with pytest.raises(RuntimeError, match="closed"):
        grader.grade(problem.task, "```python\nx = 1\n```")
    with pytest.raises(UserError, match="wall-seconds"):
        Grader(1, wall_seconds=1.0)


# Its pages


def test_the_loop_of_the_page_runs(unchecked, few, tmp_path, monkeypatch, capsys):
    """One of its four steps, with a fifth of its pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grading, "load_pairs", lambda name: few)
    assert LOOP.count(".train[:4]") == 1
    exec(compile(LOOP.replace(".train[:4]", ".train[:1]"), "docs/library.md", "exec"), {})
    assert capsys.readouterr().out.count("hacked ") == 1
    state = AutoModelForCausalLM.from_pretrained("deployed").state_dict()
    packaged = AutoModelForCausalLM.from_pretrained(ROOT / "src/projected_grpo/data/nano").state_dict()
    assert state.keys() == packaged.keys()
    assert any(not torch.equal(packaged[name], W) for name, W in state.items())


def test_every_entry_says_shapes_units_errors_and_source():
    page = "\n".join(reference())
    for name in MODULES:
        module = importlib.import_module(name)
        for entry in module.__all__:
            value = getattr(module, entry)
            assert f"\n### {entry}\n" in page
            if inspect.isfunction(value) or entry == "Grader":
                said = inspect.getdoc(value)
                assert all(said.count(f"\n{part}: ") == 1 for part in PARTS), f"{entry}: {said}"
    for entry, names in METHODS.items():
        of_it = page.partition(f"\n### {entry}\n")[2].partition("\n### ")[0]
        assert all(f"- `{method}" in of_it for method in names)
    assert "projected_grpo." not in page.replace("## projected_grpo.", "").replace(
        "import projected_grpo.", ""
    )


def test_both_pages_say_what_is_free_to_change():
    for page in ("library", "api"):
        assert "free to change" in Path(ROOT / "docs" / f"{page}.md").read_text()
