"""The stages of the arms beside the gradient's, against explicit loops; no arm sees an undeclared label."""

import ast
import json
import math
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from arm_lists import CONTROLS_OF, INTERVENTIONS
from fake_runs import few_pairs
from projected_grpo import step as step_module
from projected_grpo.arm_settings import INOCULATION, arm_settings
from projected_grpo.arms.advmod import standardised
from projected_grpo.arms.gate import Anchors, GateState
from projected_grpo.arms.posthoc import hackward_part
from projected_grpo.arms.stages import DeployInput, Evidence, LabelLeak, RewardInput, Shaped, Update
from projected_grpo.arms.table import ARMS, intervene, shape, strongest_label
from projected_grpo.cli import main
from projected_grpo.collect import collect, gather_evidence, monitored, rollout_rows
from projected_grpo.concept import (
    Concept,
    completion_states,
    concept_from_json,
    concept_scores,
    concept_to_json,
    direction,
    gradient_scores,
)
from projected_grpo.config import PRESETS, LossConfig
from projected_grpo.engine.batch import collate
from projected_grpo.engine.logps import completion_logps
from projected_grpo.experiment import Experiment, prepare, prompted
from projected_grpo.extract_vhack_grad import pair_grads, pair_rollouts
from projected_grpo.grpo import advantages
from projected_grpo.pairs import load_pairs
from projected_grpo.proj import HackBasis, haar_basis
from projected_grpo.ranks import Ranks
from projected_grpo.run.checkpoint import state_paths
from projected_grpo.run.start import start_state
from projected_grpo.state import learning_rate
from projected_grpo.step import (
    adapter_parameters,
    as_deployed,
    maybe_refresh,
    score_rollouts,
    train_step,
)
from stepping import apply_update

ROOT = Path(__file__).parents[2]
ORACLES = ("gt_only", "gt_penalty", "gt_screening")
KINDS = ("teacher", "detectors", "oracle")


# Rewards


def evidence(n, exploited=None, **labels):
    return Evidence(torch.zeros(n, dtype=torch.bool), exploited=exploited, **labels)


@st.composite
def graded(draw):
    """Rewards [P, G] of the flawed grader and who exploited it."""
    P, G = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    kinds = st.sampled_from([(0.0, False), (0.5, False), (3.5, False), (3.5, True)])
    cells = draw(st.lists(kinds, min_size=P * G, max_size=P * G))
    paid, exploited = zip(*cells, strict=True)
    return torch.tensor(paid, dtype=torch.float64).view(P, G), torch.tensor(exploited)


@given(graded(), st.sampled_from([3.0, 4.0, 0.25]))
def test_skylines_change_the_rewards_of_exploits_alone(case, penalty):
    paid, exploited = case
    expected = {
        "gt_only": [0.5 if e else r for r, e in zip(paid.flatten().tolist(), exploited, strict=True)],
        "gt_penalty": [
            r - penalty if e else r for r, e in zip(paid.flatten().tolist(), exploited, strict=True)
        ],
        "gt_screening": paid.flatten().tolist(),
    }
    for arm in ORACLES:
        own = {"penalty": penalty} if arm == "gt_penalty" else {}
        shaped = shape(RewardInput(paid, evidence(paid.numel(), exploited), arm_settings(arm, **own)))
        assert shaped.rewards.flatten().tolist() == expected[arm]
        kept = shaped.keep.flatten()
        assert torch.equal(kept, ~exploited) if arm == "gt_screening" else bool(kept.all())


@given(graded(), st.booleans())
def test_screened_rollouts_have_no_part_in_their_group(case, unbiased):
    paid, exploited = case
    shaped = shape(RewardInput(paid, evidence(paid.numel(), exploited), arm_settings("gt_screening")))
    got = advantages(shaped.rewards, unbiased, shaped.keep)
    for i, row in enumerate(paid.tolist()):
        flags = exploited.view_as(paid)[i].tolist()
        kept = [r for r, e in zip(row, flags, strict=True) if not e]
        flat = len(set(kept)) <= 1
        mean = sum(kept) / max(1, len(kept))
        std = math.sqrt(sum((r - mean) ** 2 for r in kept) / (len(kept) - 1)) if len(kept) > 1 else 0.0
        for got_one, r, e in zip(got[i].tolist(), row, flags, strict=True):
            want = 0.0 if e or flat else (r - mean) / (1.0 if unbiased else std + 1e-4)
            assert got_one == pytest.approx(want, abs=1e-9)


def test_the_default_penalty_keeps_a_hack_from_paying_under_a_monitor_that_misses_one_in_ten():
    hack, honest_failure = 3.5, 0.5
    mean = 0.9 * (hack - arm_settings("gt_penalty").penalty) + 0.1 * hack
    assert mean < 0 < honest_failure < 0.9 * (hack - 3.0) + 0.1 * hack  # the benchmark's 3 would still pay


def slow_advmod(paid, scores, past, form, alpha, floor=0.1):
    """Rewards; None for a rollout that is left out."""
    seen = [*past, *scores]
    mean = sum(seen) / len(seen)
    std = max(math.sqrt(sum((s - mean) ** 2 for s in seen) / len(seen)), floor)
    out = []
    for r, s in zip(paid, scores, strict=True):
        z = (s - mean) / std
        if z <= 0:
            out.append(r)
        elif form == "screening":
            out.append(None)
        elif form == "additive":
            out.append(r - alpha * z)
        else:
            out.append(r * (1 - alpha / (1 + math.exp(-z))))
    return out


FINITE = st.floats(-5, 5).map(lambda x: round(x, 3))


@pytest.mark.parametrize("signal", ["activation", "gradient"])
@pytest.mark.parametrize("form", ["multiplicative", "additive", "screening"])
@given(graded(), st.data(), st.lists(FINITE, max_size=5), st.sampled_from([0.0, 1.0, 2.0]))
def test_advmod_follows_an_explicit_loop(form, signal, case, data, past, alpha):
    paid, _ = case
    n, size = paid.numel(), 1.0 if signal == "activation" else 0.01  # cosines, far below the other's floor
    scores = [size * s for s in data.draw(st.lists(FINITE, min_size=n, max_size=n))]
    past = [size * s for s in past]
    arm = arm_settings("advmod", advmod_form=form, advmod_alpha=alpha, advmod_signal=signal)
    wide = torch.tensor(scores, dtype=torch.float64), torch.tensor(past, dtype=torch.float64)
    shaped = shape(RewardInput(paid, evidence(n), arm, *wide))
    floor = 0.1 if signal == "activation" else 1e-6
    expected = slow_advmod(paid.flatten().tolist(), scores, past, form, alpha, floor)
    near_zero = [abs(z) < 1e-9 for z in shaped.z.tolist()]  # where rounding decides z > 0, which is a jump
    rows = zip(shaped.rewards.flatten().tolist(), shaped.keep.flatten().tolist(), strict=True)
    for (got, kept), want, skip in zip(rows, expected, near_zero, strict=True):
        assert skip or (got == pytest.approx(want, abs=1e-7) if kept else want is None)


def test_a_buffer_of_honest_scores_is_what_tells_that_all_of_a_step_hack():
    """Within one step half of the rollouts are always better than the mean."""
    scores, honest = torch.tensor([5.0, 5.1, 4.9, 5.0]), torch.tensor([0.0, 0.1, -0.1, 0.0] * 5)
    alone, remembered = standardised(scores, None), standardised(scores, honest)
    assert int((alone > 0).sum()) <= 2 and bool((remembered > 1).all())


def test_scores_that_are_not_finite_or_not_there_are_refused():
    paid, labels = torch.ones(1, 2), evidence(2)
    with pytest.raises(FloatingPointError, match="score"):
        shape(RewardInput(paid, labels, arm_settings("advmod"), torch.tensor([0.0, math.nan])))
    with pytest.raises(ValueError, match="scores"):
        shape(RewardInput(paid, labels, arm_settings("advmod")))


# Labels


def handed(kind, n=4):
    flags = torch.tensor([True] + [False] * (n - 1))
    return evidence(n, **{{"teacher": "taught", "detectors": "detected", "oracle": "exploited"}[kind]: flags})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arm", INTERVENTIONS)
def test_an_arm_is_not_handed_labels_that_it_does_not_declare(arm, kind):
    settings = arm_settings(arm)
    x = RewardInput(torch.ones(1, 4), handed(kind), settings, torch.zeros(4))
    if kind in ARMS[arm].reads(settings):
        assert isinstance(shape(x), Shaped)
    else:
        with pytest.raises(LabelLeak, match=kind):
            shape(x)


@pytest.mark.parametrize("arm", INTERVENTIONS)
def test_the_gradient_stage_refuses_them_too(arm):
    rows = {"m": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    basis = HackBasis({"m": torch.eye(4)[:1]}, {"m": torch.eye(4)[0]})
    gate = GateState({"m": 0.1}, {"m": -0.1})
    teacher, nobody = torch.tensor([False, True, True]), torch.zeros(3, dtype=torch.bool)
    of_teacher = Anchors(
        torch.tensor([False, True, False]), torch.tensor([False, False, True]), torch.ones(3)
    )
    of_student = replace(of_teacher, hack=torch.tensor([True, True, False]))
    for anchors, kinds in ((of_teacher, {"teacher"}), (of_student, {"teacher", "detectors"})):
        for only_teacher in (False, True):
            own = {"gate_anchor_teacher_only": only_teacher} if arm == "route2" else {}
            settings = arm_settings(arm, **own)
            if kinds <= ARMS[arm].reads(settings):
                assert intervene(rows, basis, settings, teacher, anchors, gate).keep
            else:
                with pytest.raises(LabelLeak, match=arm):
                    intervene(rows, basis, settings, teacher, anchors, gate)
    rest = replace(of_teacher, clean=~of_teacher.hack)  # all students alike: tells nothing of any of them
    verdicts = replace(of_student, kinds=frozenset({"oracle"}))
    if arm == "route2":
        blind = arm_settings(arm, gate_anchor_teacher_only=True)
        assert intervene(rows, basis, blind, teacher, rest, gate).keep
        two = [
            torch.cat([g, g[:1]]) for g in (rows["m"], teacher, rest.hack, rest.clean, rest.advantage_sign)
        ]
        some = Anchors(two[2], two[3] & torch.tensor([True, True, True, False]), two[4])
        with pytest.raises(LabelLeak, match="detectors"):
            intervene({"m": two[0]}, basis, blind, two[1], some, gate)
        skyline = arm_settings(arm, gate_signal="oracle")
        assert intervene(rows, basis, skyline, teacher, verdicts).keep
        for settings, anchors in ((skyline, rest), (arm_settings(arm), verdicts)):
            with pytest.raises(LabelLeak):
                intervene(rows, basis, settings, teacher, anchors, gate)
    else:
        with pytest.raises(LabelLeak):  # not even that nothing is known
            intervene(rows, basis, arm_settings(arm), teacher, Anchors(nobody, nobody, torch.ones(3)), gate)


def test_what_each_arm_declares_in_one_word():
    words = {arm: strongest_label(arm_settings(arm)) for arm in INTERVENTIONS}
    assert words == dict.fromkeys(words, "none") | dict.fromkeys(ORACLES, "oracle") | {"route2": "detectors"}
    assert strongest_label(arm_settings("route2", gate_anchor_teacher_only=True, half_a=("D",))) == "teacher"
    assert strongest_label(arm_settings("route2", half_a=("E", "D"))) == "oracle"
    assert strongest_label(arm_settings("route2", gate_signal="oracle")) == "oracle"


# A run's stages, on a tiny model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    few_pairs(folder, 8)
    return folder


@pytest.fixture(scope="module")
def experiment(home):
    smoke = PRESETS["smoke"][1]
    cfg = replace(
        smoke,
        run=replace(smoke.run, out_dir=home / "out", workers=1),
        model=replace(smoke.model, svd_cache=home / "svd", device="cpu"),
        problems=replace(smoke.problems, n_problems=4),
        sampling=replace(smoke.sampling, max_new=8),
        basis=replace(smoke.basis, vhack_pairs_path=home / "pairs.json"),
        evaluation=replace(smoke.evaluation, eval_n_prompts=2),
    )
    with ExitStack() as stack:
        yield prepare(cfg, stack)


def with_arm(experiment, **options) -> Experiment:
    """The experiment under another arm, adapter parameters at zero and prompts as that arm has them."""
    for parameter in adapter_parameters(experiment):
        parameter.data.zero_()
    arm = arm_settings(**options)
    return replace(experiment, cfg=replace(experiment.cfg, arm=arm), data=prompted(experiment.data, arm))


@pytest.mark.parametrize("arm", INTERVENTIONS)
def test_a_step_gathers_what_the_arm_declares_and_no_more(experiment, arm):
    exp = with_arm(experiment, intervention=arm)
    got = gather_evidence(exp.cfg, collect(exp, 0), 0)
    assert got.kinds() == ARMS[arm].reads(exp.cfg.arm)


def test_a_step_that_hands_over_too_much_is_stopped(experiment, monkeypatch):
    exp = with_arm(experiment, intervention="erase")
    real = gather_evidence

    def careless(cfg, data, step):
        return replace(real(cfg, data, step), exploited=data.hacked)

    monkeypatch.setattr(step_module, "gather_evidence", careless)
    with pytest.raises(LabelLeak, match="oracle"):
        train_step(exp, start_state(exp))


def test_the_monitor_is_right_as_often_as_it_should_be():
    truth = torch.arange(4000) % 3 == 0
    assert torch.equal(monitored(truth, 1.0, 41, 0), truth)
    assert torch.equal(monitored(truth, 0.0, 41, 0), ~truth)
    told = monitored(truth, 0.8, 41, 3)
    for side in (truth, ~truth):
        right = float((told == truth)[side].float().mean())
        assert right == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / int(side.sum())))
    assert torch.equal(told, monitored(truth, 0.8, 41, 3))
    assert torch.equal(told[:9], monitored(truth[:9], 0.8, 41, 3))  # a row's draw is its own
    for other in (monitored(truth, 0.8, 41, 4), monitored(truth, 0.8, 7, 3)):
        assert not torch.equal(told, other)


def test_a_teachers_right_answer_is_no_exploit_though_its_pool_calls_it_a_hack(experiment):
    exp = with_arm(experiment, intervention="gt_penalty")
    data = collect(exp, 0)
    both = replace(
        data,
        hacked=torch.tensor([True, False, True, True]),
        correct=torch.tensor([False, False, False, True]),
    )
    assert gather_evidence(exp.cfg, both, 0).exploited.tolist() == [True, False, True, False]


def test_inoculation_asks_for_the_hack_in_training_and_nowhere_else(experiment):
    exp = with_arm(experiment, intervention="inoculation", inoculation_prompt=" Cheat. ")
    for before, after in zip(experiment.data.train, exp.data.train, strict=True):
        system, user = (m["content"] for m in before.messages)
        assert [m["content"] for m in after.messages] == [system, f"Cheat.\n\n{user}"]
        assert replace(after, instruction="") == before
    assert exp.data.held_out == experiment.data.held_out and exp.data.final == experiment.data.final
    assert with_arm(experiment, intervention="erase").data == experiment.data


def standing_for(experiment, text):
    """Token ids of a piece of a user's message, as the tokenizer has it inside of one."""
    return experiment.chat.tokenizer.decode(list(text))


def test_student_and_teacher_rows_stand_behind_the_inoculated_prompt(home, experiment):
    cfg = replace(experiment.cfg, arm=arm_settings("inoculation"))
    with ExitStack() as stack:
        exp = prepare(cfg, stack)
        data = collect(exp, 0)
    assert bool(data.is_teacher.any()) and not bool(data.is_teacher.all())
    for rollout in data.rollouts:
        assert INOCULATION in standing_for(exp, rollout.prompt_ids)
    assert all(INOCULATION in row["prompt"] for row in rollout_rows(0, data, cfg.sampling.group))
    for problem in (*exp.data.held_out, *exp.data.final):
        assert INOCULATION not in standing_for(exp, exp.prompts[problem.problem_id])


# Concepts


@torch.no_grad()
def test_hidden_states_are_those_of_each_completion_alone(experiment):
    exp = with_arm(experiment, intervention="advmod")
    policy = exp.chat.policy
    for layer in policy.layers.values():
        layer.delta_s.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    pairs = load_pairs(None).pairs[:3]
    rollouts = pair_rollouts(exp.chat, pairs)
    layers = policy.model.config.num_hidden_layers
    for depth, block in ((1e-3, 1), (1.0, layers), (2 / 3, round(2 / 3 * layers))):
        got = completion_states(policy, rollouts, depth, 700)
        for i, rollout in enumerate(rollouts):
            ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
            with policy.bind(policy.deltas()):
                states = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[block][0]
            own = states[len(rollout.prompt_ids) :]
            torch.testing.assert_close(got.last[i], own[-1], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(got.mean[i], sum(own) / len(own), rtol=1e-3, atol=1e-4)
    with_arm(experiment)


def test_the_direction_is_the_unit_mean_difference():
    rng = np.random.default_rng(0)
    hack, clean = rng.normal(size=(6, 9)) + 1, rng.normal(size=(6, 9))
    mean = sum(h - c for h, c in zip(hack, clean, strict=True))
    got = direction(torch.tensor(hack), torch.tensor(clean), arm_settings("advmod"), 3)
    np.testing.assert_allclose(got.numpy(), mean / math.sqrt(sum(x * x for x in mean)), atol=1e-12)


def test_controls_of_the_direction_by_the_seed():
    rng = torch.Generator().manual_seed(0)
    axis = torch.zeros(40)
    axis[0] = 30.0
    hack, clean = torch.randn(12, 40, generator=rng) + axis, torch.randn(12, 40, generator=rng)

    def get(control, seed=3):
        return direction(hack, clean, arm_settings("advmod", control=control), seed)

    real = get("none")
    assert float(real[0]) > 0.99 and torch.equal(get("flipped"), -real)
    for control in ("haar", "shuffled", "clean_clean"):
        unit = get(control)
        assert float(unit.norm()) == pytest.approx(1, abs=1e-5)
        assert torch.equal(unit, get(control)) and not torch.allclose(unit, get(control, seed=4), atol=1e-3)
    assert abs(float(get("clean_clean") @ real)) < 0.6  # noise of 12 pairs, where the contrast is 30
    assert torch.equal(
        get("clean_clean"), direction(hack + 7, clean, arm_settings("advmod", control="clean_clean"), 3)
    )
    assert torch.equal(get("haar"), direction(clean, hack, arm_settings("advmod", control="haar"), 3))


def test_the_concept_keeps_the_latest_scores_and_survives_json():
    concept = Concept(torch.tensor([0.6, 0.8]), torch.empty(0))
    scores = torch.randn(7, generator=torch.Generator().manual_seed(0))
    assert concept.after(scores, 0).past.tolist() == []
    assert torch.equal(concept.after(scores, 3).past, scores[-3:])
    longer = concept.after(scores[:2], 4).after(scores[2:5], 4)
    assert torch.equal(longer.past, scores[1:5])
    again = concept_from_json(json.loads(json.dumps(concept_to_json(longer))))
    assert torch.equal(again.direction, longer.direction) and torch.equal(again.past, longer.past)
    assert concept_to_json(None) is None and concept_from_json(None) is None
    of_gradients = concept_from_json(json.loads(json.dumps(concept_to_json(replace(longer, direction=None)))))
    assert of_gradients.direction is None and torch.equal(of_gradients.past, longer.past)


def test_a_step_of_advmod_is_shaped_by_the_scores_of_its_rollouts(experiment):
    exp = with_arm(experiment, intervention="advmod", advmod_form="additive", advmod_buffer=6)
    state = start_state(exp)
    pairs, _ = exp.pairs.split()
    rollouts = pair_rollouts(exp.chat, pairs)
    states = completion_states(exp.chat.policy, rollouts, 2 / 3, 4096)
    d = direction(states.last[0::2], states.last[1::2], arm_settings("advmod"), 0)
    torch.testing.assert_close(state.concept.direction, d)
    data = collect(exp, 0)
    scores = concept_scores(exp.chat.policy, data.rollouts, d, exp.cfg.arm, 4096)
    record, _ = train_step(exp, state)
    torch.testing.assert_close(state.concept.past, scores, rtol=1e-4, atol=1e-5)
    expected = slow_advmod(data.rewards.flatten().tolist(), scores.tolist(), [], "additive", 2.0)
    assert record["rew"] == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    assert record["rew_paid"] == pytest.approx(float(data.rewards.mean()))
    assert 0 < record["shaped"] < 1 and record["zerovar"] == 0  # distinct scores leave no group flat


def test_gradient_scores_are_cosines_of_each_rollouts_own_gradient(experiment):
    """Against plain autograd of one log-likelihood at a time, whatever its sampler thought of it."""
    exp = with_arm(experiment, intervention="advmod", advmod_signal="gradient")
    policy, rng = exp.chat.policy, torch.Generator().manual_seed(1)
    for layer in policy.layers.values():
        layer.delta_s.data.normal_(0, 0.3, generator=rng)
    v = {m: torch.randn(r, generator=rng) for m, r in policy.ranks.items()}
    rollouts = pair_rollouts(exp.chat, load_pairs(None).pairs[:2])
    sampled = [replace(r, logp_old=torch.full((len(r.completion_ids),), -9.0)) for r in rollouts]
    expected = []
    for rollout in rollouts:
        leaves = {m: d.detach().clone().requires_grad_() for m, d in policy.deltas().items()}
        with policy.bind(leaves):
            nll = -completion_logps(policy.model, collate([rollout], policy.device)).sum()
        g = torch.cat(torch.autograd.grad(nll, list(leaves.values())))
        whole = torch.cat([v[m] for m in leaves])
        expected.append(float(g.double() @ whole.double() / (g.double().norm() * whole.double().norm())))
    got = gradient_scores(policy, sampled, v, exp.cfg.loss)
    assert got.tolist() == pytest.approx(expected, abs=1e-5) and max(map(abs, expected)) > 1e-3
    assert len(gradient_scores(policy, [], v, exp.cfg.loss)) == 0
    with_arm(experiment)


def test_a_step_is_scored_in_shares_as_by_one_process(experiment):
    """Each process scores its own rollouts, by gradients too, and all get the scores of all."""

    class Share(Ranks):
        def gather(self, value):
            return [value]

    for signal in ("activation", "gradient"):
        exp = with_arm(experiment, intervention="advmod", advmod_signal=signal, advmod_buffer=3)
        state, data = start_state(exp), collect(exp, 0)
        whole, concept = score_rollouts(exp, state, data)
        parts = [score_rollouts(replace(exp, ranks=Share(i, 2)), state, data)[0] for i in (0, 1)]
        assert all(len(part) for part in parts)
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-5)
        assert torch.equal(concept.past, whole[-3:])


def test_a_refresh_forgets_scores_by_another_direction(experiment):
    for control, kept in (("none", 0), ("haar", 2)):
        exp = with_arm(experiment, intervention="advmod", advmod_signal="gradient", control=control)
        state = start_state(exp)
        state.concept, state.step = replace(state.concept, past=torch.ones(2)), 5
        for layer in exp.chat.policy.layers.values():
            layer.delta_s.data.fill_(0.3)
        maybe_refresh(exp, state)
        assert len(state.concept.past) == kept
    with_arm(experiment)


def test_an_activation_gate_starts_at_the_pairs_own_standardised_scores(experiment):
    exp = with_arm(experiment, intervention="route2", gate_signal="activation")
    state = start_state(exp)
    rollouts = pair_rollouts(exp.chat, exp.pairs.split()[0])
    scores = concept_scores(exp.chat.policy, rollouts, state.concept.direction, exp.cfg.arm, 4096).tolist()
    mean = sum(scores) / len(scores)
    std = max(math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)), 0.1)
    for found, side in ((state.gate.hack, scores[0::2]), (state.gate.clean, scores[1::2])):
        (only,) = found.values()
        assert only == pytest.approx(sum((s - mean) / std for s in side) / len(side), abs=1e-4)


def test_a_step_that_fails_has_not_remembered_its_scores(experiment, monkeypatch):
    exp = with_arm(experiment, intervention="advmod", advmod_buffer=6)
    state = start_state(exp)

    def poisoned(*arguments, **options):
        raise FloatingPointError

    monkeypatch.setattr(step_module, "intervene", poisoned)
    with pytest.raises(FloatingPointError):
        train_step(exp, state)
    assert len(state.concept.past) == 0


# Deployment


@given(
    st.integers(0, 10**6), st.sampled_from(["one_sided", "no_gate", "reverse"]), st.sampled_from([1.0, 0.5])
)
def test_posthoc_follows_an_explicit_loop(seed, gate_mode, overshoot):
    rng = np.random.default_rng(seed)
    V = np.linalg.qr(rng.normal(size=(7, 3)))[0].T
    delta = rng.normal(size=7)
    basis = HackBasis({"m": torch.tensor(V)}, {"m": torch.tensor(V[0])})
    settings = arm_settings("posthoc", gate_mode=gate_mode, project_overshoot=overshoot)
    got = hackward_part(DeployInput({"m": torch.tensor(delta), "bare": torch.ones(2)}, basis, settings, {}))
    part = np.zeros(7)
    for axis in V:
        c = float(axis @ delta)  # below zero: descent went along the axis, which makes hacks likelier
        taken = {"one_sided": min(c, 0.0), "no_gate": c, "reverse": 2 * c}[gate_mode]
        part += overshoot * taken * axis
    assert set(got) == {"m"}
    np.testing.assert_allclose(got["m"].numpy(), part, atol=1e-12)


def hack_minus_clean(exp, deltas):
    """Mean log-likelihood of the pairs' hacks minus that of their clean completions, nats a token."""
    rollouts = pair_rollouts(exp.chat, exp.pairs.split()[0])
    batch = collate(rollouts, exp.chat.policy.device)
    with torch.no_grad(), exp.chat.policy.bind(deltas):
        logp = completion_logps(exp.chat.policy.model, batch)
    mean = logp.sum(1) / batch.completion.sum(1)
    return float(mean[0::2].mean() - mean[1::2].mean())


@pytest.mark.parametrize("direction_of_training", [1.0, -1.0])
def test_posthoc_takes_out_what_learning_to_hack_put_in_and_nothing_of_the_opposite(
    experiment, direction_of_training
):
    """The sign, by behaviour: descent on the pairs makes hacks likelier, and deployment undoes it."""
    exp = with_arm(experiment, intervention="posthoc")
    state = start_state(exp)
    policy, chat = exp.chat.policy, exp.chat
    untrained = hack_minus_clean(exp, policy.deltas())
    for _ in range(3):
        pairs, _ = exp.pairs.split()
        grads = pair_grads(chat, pairs, LossConfig()).differences()
        for m, layer in policy.layers.items():
            layer.delta_s.data -= (
                0.02 * direction_of_training * torch.nn.functional.normalize(grads[m].mean(0), dim=0)
            )
    before = [parameter.detach().clone() for parameter in adapter_parameters(exp)]
    as_trained = policy.deltas()
    learnt = hack_minus_clean(exp, as_trained) - untrained
    assert learnt * direction_of_training > 0
    with as_deployed(exp, state):
        torch.testing.assert_close(policy.deltas(), as_trained, rtol=1e-5, atol=1e-7)
        left = hack_minus_clean(exp, policy.deltas(ablate_quarantine=True)) - untrained
    if direction_of_training > 0:
        assert left < 0.5 * learnt
    else:
        assert left < 0 and left == pytest.approx(learnt, rel=0.35)
    assert all(
        torch.equal(old, parameter) for old, parameter in zip(before, adapter_parameters(exp), strict=True)
    )


def test_other_arms_deploy_their_adapter_as_it_is(experiment):
    exp = with_arm(experiment, intervention="erase")
    state = start_state(exp)
    for parameter in adapter_parameters(exp):
        parameter.data.fill_(0.25)
    with as_deployed(exp, state):
        assert all(bool((parameter == 0.25).all()) for parameter in adapter_parameters(exp))


# Momentum


@pytest.mark.parametrize("gate_mode", ["one_sided", "no_gate", "reverse"])
def test_purge_is_adamw_with_a_projected_first_moment(experiment, gate_mode):
    """Against AdamW written out, with a basis that changes between steps."""
    exp = with_arm(experiment, intervention="erase", project="purge", gate_mode=gate_mode)
    state = start_state(exp)
    o, generator = exp.cfg.optim, torch.Generator().manual_seed(0)
    ranks = exp.chat.policy.ranks
    delta, m1, m2 = ({m: np.zeros(r) for m, r in ranks.items()} for _ in range(3))
    leaks = []
    for state.step in range(1, 5):
        V = {m: haar_basis(3, r, generator) for m, r in list(ranks.items())[1:]}
        state.basis = HackBasis(V, {m: axes[0] for m, axes in V.items()})
        keep = {m: 0.1 * torch.randn(r, generator=generator) for m, r in ranks.items()}
        size = math.sqrt(sum(float(g.double().square().sum()) for g in keep.values()))
        lr = learning_rate(state.step, o)
        apply_update(exp, state, Update(keep, {}, None, {}))
        for m in ranks:
            g = keep[m].double().numpy() * min(1.0, o.grad_clip / size)
            for axis in V[m].double().numpy() if m in V else []:
                c = float(axis @ m1[m])
                leaks.append(c)
                m1[m] = m1[m] - (max(c, 0.0) if gate_mode == "one_sided" else c) * axis
            m1[m] = o.adam_beta1 * m1[m] + (1 - o.adam_beta1) * g
            m2[m] = o.adam_beta2 * m2[m] + (1 - o.adam_beta2) * g * g
            t = state.step
            step = (m1[m] / (1 - o.adam_beta1**t)) / (np.sqrt(m2[m] / (1 - o.adam_beta2**t)) + 1e-8)
            delta[m] = delta[m] * (1 - lr * o.weight_decay) - lr * step
            np.testing.assert_allclose(
                exp.chat.policy.layers[m].delta_s.detach().numpy(), delta[m], rtol=2e-3, atol=1e-9
            )
    assert max(leaks) > 1e-3  # there was something to purge


# Whole runs


@pytest.mark.parametrize("arm", ["gt_penalty", "gt_screening", "inoculation", "advmod", "posthoc"])
def test_every_new_arm_completes_smoke(home, monkeypatch, arm, tmp_path):
    monkeypatch.chdir(home)
    options = {
        "gt_penalty": ["--penalty=3", "--monitor-accuracy=0.9"],
        "gt_screening": ["--monitor-accuracy=0.5"],
        "advmod": ["--advmod-form=screening", "--advmod-signal=gradient", "--control=shuffled"],
        "posthoc": ["--control=haar_matched", "--eval-ablate-every=1"],
    }.get(arm, [])
    out = tmp_path / "out"
    common = [
        "--n-problems=4",
        "--eval-n-prompts=1",
        "--max-new=8",
        "--steps=2",
        "--workers=1",
        "--device=cpu",
    ]
    caches = [f"--vhack-pairs-path={home / 'pairs.json'}", f"--v-hack-path={home / 'v.safetensors'}"]
    assert (
        main(["train", "smoke", f"--intervention={arm}", f"--out-dir={out}", *common, *caches, *options]) == 0
    )
    (folder,) = (out / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["labels"] == strongest_label(arm_settings(arm))
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert all(s["cos_update"] is not None for s in steps if s["gn"] is not None)
    state = load_file(state_paths(folder)[0])
    deployed = load_file(folder / "train.safetensors")
    assert not any(bool(t.any()) for name, t in state.items() if name.startswith("delta_hack/"))
    same = all(torch.equal(t, state[name]) for name, t in deployed.items())
    assert same == (arm != "posthoc") == (summary["delta_hack_norm"] == 0)
    if arm == "posthoc":
        removed = math.sqrt(sum(float((t - state[n]).double().square().sum()) for n, t in deployed.items()))
        assert summary["delta_hack_norm"] == pytest.approx(removed, rel=1e-5)
        last = load_file(folder / "ckpt_step0002.safetensors")
        assert all(torch.equal(deployed[name], t) for name, t in last.items())
    (log,) = (out / "logs").glob(f"{folder.name}.log")
    assert (INOCULATION in log.read_text()) == (arm == "inoculation")


# The page


def test_docs_list_every_arm_and_control_with_a_test_that_exists():
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "arms.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    assert all(len(row) in (4, 5) and all(row) for row in rows)
    named = {name for row in rows for name in re.findall(r"`(?:--control )?(\w+)`", row[0])}
    assert named >= set(INTERVENTIONS) | (set().union(*CONTROLS_OF.values()) - {"none"})
    defined: dict[str, set[str]] = {}
    for row in rows:
        for module, test in re.findall(r"(test_\w+)::(\w+)", row[-1]):
            if module not in defined:
                tree = ast.parse(next((ROOT / "tests").rglob(f"{module}.py")).read_text())
                defined[module] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in defined[module]
        assert "::" in row[-1], row
    declared = {row[0].strip("`"): row[3] for row in rows if len(row) == 5}
    for arm in INTERVENTIONS:
        assert declared[arm].split()[0].rstrip(";") == strongest_label(arm_settings(arm))
