"""One step and the loop around it: what may move the adapter, what is recorded, that runs can be repeated."""

import copy
import json
import math
import random
from collections import Counter
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from threading import Timer

import pytest
import torch

from arm_lists import CONTROLS_OF
from fake_runs import few_pairs
from projected_grpo import step as step_module
from projected_grpo.antipasto import Policy
from projected_grpo.arm_settings import arm_settings
from projected_grpo.arms import table
from projected_grpo.arms.route2 import find_anchors
from projected_grpo.collect import (
    collect,
    gather_evidence,
    pick_problems,
    pick_teacher,
    rollout_rows,
    teacher_rollout,
)
from projected_grpo.config import MAX_SEQUENCE, PRESETS, OptimConfig
from projected_grpo.engine.generate import sample
from projected_grpo.errors import UserError
from projected_grpo.experiment import fit_prompts, prepare, read_data
from projected_grpo.pools import TeacherRow
from projected_grpo.rewards import Grade, Grader
from projected_grpo.run.columns import complete
from projected_grpo.run.resume import start_digest
from projected_grpo.run.start import start_state
from projected_grpo.state import Tripwire, learning_rate
from projected_grpo.step import adapter_parameters, as_deployed, loss_grads, train_step
from projected_grpo.train import final_evaluations

ARMS = ("none", "inoculation", "advmod", "posthoc", "erase", "route", "route2", "absorb")  # no skyline
UNCONTROLLED = [(arm, "none") for arm in ARMS]  # what all other tests here are about
TIMINGS = {"gen", "fb", "t_rew", "sec"}
CPU = torch.device("cpu")


def changed(cfg, **values):
    """A config with some options changed, whichever groups they are in."""
    if "intervention" in values:
        cfg = replace(cfg, arm=arm_settings(values["intervention"]))
    for name, part in vars(cfg).items():
        own = {k: values.pop(k) for k in list(values) if name != "preset" and hasattr(part, k)}
        if own:
            cfg = replace(cfg, **{name: replace(part, **own)})
    assert not values
    return cfg


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return changed(
        PRESETS["smoke"][1],
        **{"out_dir": home / "out", "svd_cache": home / "svd", "device": "cpu"},
        **{
            "vhack_pairs_path": few_pairs(home, 8),
            "workers": 1,
            "n_problems": 6,
            "eval_n_prompts": 2,
            "max_new": 8,
            "steps": 6,
        },
    )


@pytest.fixture(scope="module")
def experiment(settings):
    with ExitStack() as stack:
        yield prepare(settings, stack)


@pytest.fixture
def begin(experiment):
    """(experiment, state) at the start of a run with some options changed."""

    def start(**options):
        exp = replace(experiment, cfg=changed(experiment.cfg, **options))
        for parameter in adapter_parameters(exp):
            parameter.data.zero_()
            parameter.grad = None
        return exp, start_state(exp)

    return start


def test_what_processes_compare_at_the_start_tells_all_of_it(begin):
    """One that began with another sign of a singular vector would add gradients in other coordinates."""
    exp, state = begin(intervention="absorb")
    whole = start_digest(exp, state)
    assert start_digest(exp, state) == whole
    name, layer = next(iter(exp.chat.policy.layers.items()))
    block = layer.block
    told = [layer.base.weight, layer.U[:, -1], layer.Vh[0], block.A0, block.B0, layer.delta_s, block.moved]
    for part in [*told, state.basis.V[next(iter(state.basis.V))]]:
        before = part.detach().clone()
        with torch.no_grad():
            part.neg_() if bool(part.any()) else part.add_(1.0)
        assert start_digest(exp, state) != whole, name
        with torch.no_grad():
            part.copy_(before)
    state.step += 1
    assert start_digest(exp, state) != whole


def values(exp):
    return [parameter.detach().clone() for parameter in adapter_parameters(exp)]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def quarantine(exp):
    return math.sqrt(
        sum(float(layer.quarantine.detach().square().sum()) for layer in exp.chat.policy.layers.values())
    )


# Schedules and pickers


def test_the_learning_rate_in_closed_form():
    cfg = OptimConfig(steps=20, lr=2.0, warmup_frac=0.1)
    got = [learning_rate(s, cfg) for s in range(20)]
    assert got[:3] == [1.0, 2.0, 2.0]
    assert got[11] == pytest.approx(1.0)  # half of the cosine: 9 of 18
    assert got[2:] == pytest.approx([2 * math.cos(math.pi * i / 36) ** 2 for i in range(18)])
    assert learning_rate(20, cfg) == pytest.approx(0)


def test_a_constant_learning_rate_stays_after_its_warm_up():
    cfg = OptimConfig(steps=20, lr=2.0, warmup_frac=0.2, lr_schedule="constant")
    assert [learning_rate(s, cfg) for s in range(20)] == [0.5, 1.0, 1.5, 2.0] + [2.0] * 16


def test_the_learning_rate_without_warm_up_and_of_one_step():
    assert learning_rate(0, OptimConfig(steps=10, lr=3.0, warmup_frac=0.0)) == 3.0
    assert learning_rate(0, OptimConfig(steps=1, lr=3.0, warmup_frac=0.1)) == 3.0
    assert learning_rate(0, OptimConfig(steps=1, lr=3.0, warmup_frac=1.0)) == 3.0
    ramp = OptimConfig(steps=4, lr=4.0, warmup_frac=1.0)
    assert [learning_rate(s, ramp) for s in range(4)] == [1, 2, 3, 4]


def test_the_tripwire_warns_at_three_nats_and_trips_after_two_steps_at_five():
    wire = Tripwire().after(-2.0).after(-1.0)
    assert wire.best == -1.0
    assert not wire.warns(-4.0) and wire.warns(-4.1) and not wire.warns(None)
    once = wire.after(-6.1)
    assert (once.tripped, once.after(None), once.after(-6.1).tripped) == (False, once, True)
    assert not once.after(-5.9).after(-6.1).tripped  # two in a row
    assert once.best == -1.0
    assert not Tripwire().warns(-99.0) and not Tripwire().after(-99.0).after(-99.0).tripped


# Grading while the next rollouts are generated


class Late(Grader):
    """Grades come when they like: after a random wait, in no order."""

    def submit(self, task, text):
        late, real = Future(), super().submit(task, text)
        Timer(random.random() / 20, lambda: late.set_result(real.result())).start()
        return late


def bytes_of_a_run(exp, state):
    """Every rollout and grade of two steps, and the adapter parameters after them."""
    lines = []
    for _ in range(2):
        record, data = train_step(exp, state)
        kept = {name: value for name, value in record.items() if name not in TIMINGS}
        lines += [json.dumps(kept), json.dumps(rollout_rows(state.step, data, exp.cfg.sampling.group))]
        state.step += 1
    return "\n".join(lines).encode() + b"".join(value.numpy().tobytes() for value in values(exp))


def test_the_order_in_which_grades_come_changes_no_byte(begin):
    options = {"intervention": "none", "prompts_per_step": 3, "rows_per_batch": 2, "lr": 0.01}
    exp, state = begin(**options)
    in_order = bytes_of_a_run(exp, state)
    assert any(bool(value.any()) for value in values(exp))
    exp, state = begin(**options)
    assert bytes_of_a_run(replace(exp, grader=Late(exp.grader.sandbox)), state) == in_order


def test_a_batch_is_with_the_grader_before_the_next_is_generated(begin):
    exp, _ = begin(
        intervention="route", prompts_per_step=3, rows_per_batch=3, mix_ratio=0.25, rollout_ablate_frac=0.34
    )
    events = []

    class Seen(Future):
        def result(self, timeout=None):
            events.append("asked")
            return super().result(timeout)

    class Watched(Grader):
        def submit(self, task, text):
            events.append("given")
            seen = Seen()
            seen.set_result(super().submit(task, text).result())
            return seen

    def generate(policy, prompts, seeds, *more, **options):
        events.append(sum(map(len, seeds)))
        return sample(policy, prompts, seeds, *more, **options)

    watched = replace(exp.chat, sampler=generate)
    data = collect(replace(exp, grader=Watched(exp.grader.sandbox), chat=watched), 0)
    given = ["given"] * 3
    assert events == [3, *given, 3, *given, 3, *given, *["asked"] * 9], "6 as trained, 3 without quarantine"
    for i, (rollout, grade) in enumerate(zip(data.rollouts, data.grades, strict=True)):
        assert grade is None or grade == exp.grader.grade(data.problems[i // 4].task, rollout.text)


@pytest.mark.parametrize(
    ("sampler", "dtype", "truncated"),
    [("own", torch.float32, False), ("vllm", torch.float32, True), ("own", torch.bfloat16, True)],
)
def test_the_loss_weighs_tokens_as_sampler_and_dtype_ask(begin, monkeypatch, sampler, dtype, truncated):
    exp, _ = begin()
    data, seen, real = collect(exp, 0), [], step_module.per_rollout_grads

    def watched(*arguments, **options):
        seen.append(options["truncated"])
        return real(*arguments, **options)

    monkeypatch.setattr(step_module, "per_rollout_grads", watched)
    monkeypatch.setattr(Policy, "dtype", dtype)
    cfg = replace(exp.cfg, model=replace(exp.cfg.model, sampler=sampler))
    loss_grads(replace(exp, cfg=cfg), 0, data, torch.ones(len(data.rollouts)))
    assert seen == [truncated]


def test_an_epoch_shows_every_problem_once(begin):
    exp, _ = begin(prompts_per_step=2)
    epochs = []
    for epoch in range(3):
        steps = [pick_problems(exp, epoch * 3 + i) for i in range(3)]
        assert Counter(p for s in steps for p in s) == Counter(exp.data.train)
        epochs.append([p.problem_id for s in steps for p in s])
    assert epochs[0] != epochs[1]
    other = replace(exp, cfg=changed(exp.cfg, seed=42))
    assert [p.problem_id for i in range(3) for p in pick_problems(other, i)] != epochs[0]


def test_a_step_never_repeats_a_problem_where_the_count_does_not_divide(begin):
    exp, _ = begin(prompts_per_step=4)  # of 6 problems
    for step in range(12):
        assert len({p.problem_id for p in pick_problems(exp, step)}) == 4


def test_the_teacher_leaves_at_its_step_and_for_good(begin):
    exp, _ = begin(teacher_off_step=2)
    problem = exp.data.train[0]
    assert [len(pick_teacher(exp, problem, s)) for s in range(5)] == [2, 2, 0, 0, 0]
    assert len(pick_teacher(begin()[0], problem, 5)) == 2
    assert pick_teacher(begin(mix_ratio=0.0)[0], problem, 0) == ()


def test_teacher_rows_come_from_the_pool_without_repeats_while_there_are_enough(begin):
    exp, _ = begin(group=8)
    problem = exp.data.train[0]
    pool = exp.data.teacher.rows[problem.problem_id]
    assert Counter(pick_teacher(exp, problem, 3)) == Counter(pool)
    more, _ = begin(group=12)
    assert set(Counter(pick_teacher(more, problem, 3)).values()) == {1, 2}


def test_teacher_modes_keep_the_other_problems_on_policy(settings, experiment):
    only = read_data(changed(settings, teacher_modes=("sentinel",)), experiment.grader)
    taught = {p.problem_id for p in only.train if p.env_mode == "sentinel"}
    assert taught and set(only.teacher.rows) == taught
    assert {p.env_mode for p in only.train} > {"sentinel"}
    with pytest.raises(UserError, match="--teacher-modes"):
        read_data(changed(settings, teacher_modes=("exit_code",)), experiment.grader)


def test_train_and_held_out_are_disjoint_and_covered(experiment):
    train, held = ({p.problem_id for p in side} for side in (experiment.data.train, experiment.data.held_out))
    assert len(train) == 6 and len(held) == 2 and not train & held
    assert set(experiment.data.teacher.rows) == train
    assert train | held <= set(experiment.prompts)


def test_the_final_evaluation_has_its_own_number_of_held_out_problems(settings, experiment):
    assert experiment.data.final == experiment.data.held_out
    more = read_data(changed(settings, final_n_prompts=5), experiment.grader)
    assert more.held_out == experiment.data.held_out and len(more.final) == 5
    ids = {side: {p.problem_id for p in getattr(more, side)} for side in ("train", "held_out", "final")}
    assert ids["held_out"] < ids["final"] and not ids["train"] & ids["final"]
    few = read_data(changed(settings, final_n_prompts=1), experiment.grader)
    assert len(few.final) == 1 and few.final[0] in few.held_out


def test_every_final_problem_has_its_prompt(settings, experiment):
    data = read_data(changed(settings, final_n_prompts=5), experiment.grader)
    fitted, prompts = fit_prompts(data, experiment.chat.tokenizer, MAX_SEQUENCE, 8)
    assert fitted.final == data.final and {p.problem_id for p in data.final} <= set(prompts)
    longest = max(len(prompts[p.problem_id]) for p in data.final)
    cut, _ = fit_prompts(data, experiment.chat.tokenizer, longest + 7, 8)
    kept = [p for p in data.final if len(prompts[p.problem_id]) < longest]
    assert list(cut.final) == kept and len(kept) < 5
    shortest = min(len(prompts[p.problem_id]) for p in data.train)
    for room, change in ((shortest + 7, "lower --max-new"), (shortest, "another model")):
        said = rf"the model's {room} positions \(the shortest prompt has {shortest}\); .*{change}"
        with pytest.raises(UserError, match=said):
            fit_prompts(data, experiment.chat.tokenizer, room, 8)


def test_one_final_evaluation_is_enough_where_nothing_was_routed(begin, monkeypatch):
    exp, _ = begin()
    exp = replace(exp, data=replace(exp.data, final=exp.data.train[:1]))
    both = final_evaluations(exp)
    assert both["as_trained"] is both["deployed"]
    assert both["deployed"].problems == exp.data.final
    assert len(both["deployed"].texts[0]) == exp.cfg.sampling.group
    for layer in exp.chat.policy.layers.values():
        layer.delta_hack.data.normal_(generator=torch.Generator().manual_seed(0))
    routed = final_evaluations(exp)
    assert routed["deployed"].texts == both["deployed"].texts != routed["as_trained"].texts


def test_a_teacher_row_is_the_cached_text_behind_the_live_prompt(experiment):
    tokenizer, problem = experiment.chat.tokenizer, experiment.data.train[0]
    got = teacher_rollout(experiment, problem, TeacherRow("def f(): pass", 3.5, True, False))
    assert got.is_teacher and got.logp_old is None and not got.ablated
    assert got.prompt_ids == experiment.prompts[problem.problem_id]
    assert tokenizer.decode(list(got.completion_ids)) == "def f(): pass" + tokenizer.eos_token


# What a step collects


def test_collected_rows_line_up_with_their_labels(begin):
    exp, _ = begin(prompts_per_step=2)
    data = collect(exp, 0)
    assert data.problems == pick_problems(exp, 0)
    assert data.rewards.shape == (2, 4)
    assert data.is_teacher.tolist() == [False, False, True, True] * 2
    for i, (rollout, grade) in enumerate(zip(data.rollouts, data.grades, strict=True)):
        problem, reward = data.problems[i // 4], float(data.rewards[i // 4, i % 4])
        assert rollout.prompt_ids == exp.prompts[problem.problem_id]
        assert (grade is None) == rollout.is_teacher == bool(data.is_teacher[i])
        if grade is None:
            row = next(r for r in exp.data.teacher.rows[problem.problem_id] if r.completion == rollout.text)
            expected = (row.reward, row.hacked, row.gt_pass)
        else:
            again = exp.grader.grade(problem.task, rollout.text)
            expected = (again.reward, again.exploited, again.gt_correct)
            assert len(rollout.logp_old) == len(rollout.completion_ids) <= 8
        assert (reward, bool(data.hacked[i]), bool(data.correct[i])) == expected


def test_what_a_step_draws_hangs_on_its_number_alone(begin):
    exp, _ = begin()
    texts = [[r.text for r in collect(exp, s).rollouts] for s in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_ablated_rollouts_are_marked_and_drawn_from_the_deployed_policy(begin):
    exp, _ = begin(intervention="route", rollout_ablate_frac=0.5, mix_ratio=0.0, temperature=1.0, max_new=16)
    clean = collect(exp, 0)
    assert [r.ablated for r in clean.rollouts] == [False, False, True, True]
    for layer in exp.chat.policy.layers.values():
        layer.delta_hack.data.normal_(generator=torch.Generator().manual_seed(0))
    moved = collect(exp, 0)
    changed_ids = [
        a.completion_ids != b.completion_ids for a, b in zip(clean.rollouts, moved.rollouts, strict=True)
    ]
    assert changed_ids == [True, True, False, False]


# Controls, gt_only and projected updates

CELLS = [(a, c, {}) for a, cs in CONTROLS_OF.items() for c in cs if (a, c) not in UNCONTROLLED]
CELLS += [("advmod", control, {"advmod_signal": "gradient"}) for control in ("none", "haar")]
CELLS += [("route2", control, {"gate_signal": "activation"}) for control in ("none", "haar", "shuffled")]
CELLS += [("route2", "none", {"gate_signal": "oracle"})]
CELLS += [
    ("erase", "none", {"project": "update"}),
    ("route", "haar", {"project": "update"}),
    ("route", "shuffled", {"project": "purge"}),
]


def reached(exp, state):
    """All that a control can make different: the adapter as trained and as deployed, what scores."""
    trained = values(exp)
    with as_deployed(exp, state):
        deployed = values(exp)
    scoring = state.concept is not None and (state.concept.direction, *state.basis.v_grad.values())
    return [*trained, *deployed, *(d for d in scoring or () if d is not None)]


@pytest.mark.parametrize(("arm", "control", "own"), CELLS, ids=str)
def test_every_control_takes_a_step_that_hangs_on_the_seed_alone(begin, arm, control, own):
    options = {"intervention": arm, "control": control, **own}
    options |= {"block_init": "direction"} if arm == "absorb" else {}
    outcomes = []
    for _ in range(2):
        exp, state = begin(**options)
        record = complete(train_step(exp, state)[0])
        outcomes.append(reached(exp, state))
    assert same(*outcomes) and any(bool(parameter.any()) for parameter in outcomes[0])
    assert (quarantine(exp) > 0) == (arm in ("route", "route2", "absorb"))
    assert record["gn"] > 0 and record["cos_update"] is not None
    assert (set(state.frames) == set(exp.chat.policy.layers)) == (control == "haar_matched")
    if "project" in own and own["project"] == "update":
        assert record["cos_update"] < 1e-5 and record["cos_pre"] == record["cos_post"]
    if control in ("haar", "haar_matched", "shuffled", "random_routing"):
        exp, state = begin(**options)
        data = collect(exp, 0)
        other = replace(exp, cfg=changed(exp.cfg, seed=12))  # other draws for the same rollouts
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "collect", lambda exp, step: data)
            state = start_state(other)
            train_step(other, state)
        assert not same(reached(other, state), outcomes[0])


# Anchors


def grade(**flags):
    blank = Grade(0.5, False, False, False, None, True, False, False, False, None)
    return replace(blank, **flags)


@pytest.fixture
def labelled(begin):
    """Student rows: C, D, E, nothing; teacher rows: hack, clean."""
    exp, _ = begin()
    data = collect(exp, 0)
    grades = (
        *(grade(**{f"hacked_{d}": True}) for d in "CDE"),
        grade(gt_correct=True, exploited=True),
        None,
        None,
    )
    rollouts = (data.rollouts[0],) * 4 + (data.rollouts[-1],) * 2
    teacher = torch.tensor([False] * 4 + [True] * 2)
    hacked = torch.tensor([True] * 4 + [True, False])
    labels = {"is_teacher": teacher, "hacked": hacked, "correct": ~hacked, "rewards": torch.zeros(1, 6)}
    return exp.cfg, replace(data, grades=grades, rollouts=rollouts, **labels)


@pytest.mark.parametrize(
    ("options", "students"),
    [
        ({}, [True, False, False, False]),
        ({"half_a": ("E",)}, [False, False, True, False]),
        ({"half_a": ("C", "D")}, [True, True, False, False]),
        ({"gate_anchor_teacher_only": True}, [False] * 4),
        ({"gate_anchor_teacher_only": True, "half_a": ("E",)}, [False] * 4),
    ],
    ids=str,
)
def test_anchors_are_teacher_labels_and_weak_detectors(labelled, options, students):
    cfg, data = labelled
    advantage = torch.tensor([1.0, -2.0, 0.0, 1.0, 0.5, -0.5])
    cfg = changed(cfg, intervention="route2", **options)
    got = find_anchors(gather_evidence(cfg, data, 0), advantage, cfg.arm)
    assert got.hack.tolist() == [*students, True, False]
    assert got.clean.tolist() == [not hack for hack in got.hack.tolist()]
    assert got.advantage_sign.tolist() == [1, -1, 0, 1, 1, -1]
    assert got.labels(data.is_teacher) <= table.ARMS["route2"].reads(cfg.arm)
    cfg = replace(cfg, arm=replace(cfg.arm, gate_clean_anchors="labelled"))
    old = find_anchors(gather_evidence(cfg, data, 0), advantage, cfg.arm)
    assert old.hack.equal(got.hack) and old.clean.tolist() == [False] * 4 + [False, True]


def test_the_anchors_of_an_oracle_are_its_verdicts_alone(labelled):
    cfg, data = labelled
    cfg = replace(cfg, arm=arm_settings("route2", gate_signal="oracle"))
    data = replace(data, correct=torch.tensor([False, True, False, False, False, True]))
    got = find_anchors(gather_evidence(cfg, data, 0), torch.ones(6), cfg.arm)
    assert got.hack.tolist() == [True, False, True, True, True, False]  # paid and not right
    assert got.labels(data.is_teacher) == {"oracle"} == table.ARMS["route2"].reads(cfg.arm)


# What may move the adapter parameters


@pytest.mark.parametrize("arm", ARMS)
def test_oracle_labels_of_the_student_never_reach_the_update(begin, monkeypatch, arm):
    exp, state = begin(intervention=arm, ref_every=0)
    data = collect(exp, 0)
    flipped = replace(
        data,
        hacked=torch.where(data.is_teacher, data.hacked, ~data.hacked),
        correct=~data.correct,
        grades=tuple(
            g
            and replace(
                g, gt_correct=not g.gt_correct, exploited=not g.exploited, mechanism="sentinel", passed=True
            )
            for g in data.grades
        ),
    )
    outcomes = []
    for seen in (data, flipped):
        exp, state = begin(intervention=arm, ref_every=0)
        monkeypatch.setattr(step_module, "collect", lambda exp, step, seen=seen: seen)
        record, _ = train_step(exp, state)
        outcomes.append((values(exp), record, state.gate))
    (one, first, gate_one), (two, second, gate_two) = outcomes
    assert same(one, two) and gate_one == gate_two
    assert any(bool(parameter.any()) for parameter in one)
    assert first["hack_s"] != second["hack_s"] and first["gn"] == second["gn"]


@pytest.mark.parametrize("arm", ARMS)
def test_rewards_do_reach_the_update(begin, monkeypatch, arm):
    """The test above could not fail if nothing did."""
    outcomes = []
    for sign in (1, -1):
        exp, state = begin(intervention=arm, ref_every=0)
        data = collect(exp, 0)
        seen = replace(data, rewards=sign * data.rewards)
        monkeypatch.setattr(step_module, "collect", lambda exp, step, seen=seen: seen)
        train_step(exp, state)
        monkeypatch.undo()
        outcomes.append(values(exp))
    assert not same(*outcomes)


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_of_flat_groups_leaves_everything_alone(begin, monkeypatch, arm):
    exp, state = begin(intervention=arm, weight_decay=0.5)
    train_step(exp, state)  # moments and adapter parameters that a careless step would move
    state.step = 1
    before, gate = values(exp), state.gate
    moments = [
        {k: v.clone() for k, v in state.optimizer.state[parameter].items()}
        for parameter in adapter_parameters(exp)
    ]
    data = collect(exp, 1)
    flat = replace(data, rewards=torch.zeros_like(data.rewards))
    monkeypatch.setattr(step_module, "collect", lambda exp, step: flat)
    record, _ = train_step(exp, state)
    assert same(before, values(exp)) and state.gate == gate
    for parameter, old in zip(adapter_parameters(exp), moments, strict=True):
        assert all(torch.equal(state.optimizer.state[parameter][k], v) for k, v in old.items())
    assert record["zerovar"] == 1 and record["rew"] == 0.0
    assert all(
        complete(record)[k] is None for k in ("loss", "gn", "cos_pre", "cos_post", "cos_update", "q_egy")
    )


@pytest.mark.parametrize("arm", ARMS)
def test_what_each_arm_moves(begin, arm):
    exp, state = begin(intervention=arm)
    records = []
    for state.step in range(3):
        records.append(complete(train_step(exp, state)[0]))
    deltas, deployed = (exp.chat.policy.deltas(ablate_quarantine=a) for a in (False, True))
    ids = torch.tensor([next(iter(exp.prompts.values()))])
    logits = []
    for bound in (deltas, deployed):
        with torch.no_grad(), exp.chat.policy.bind(bound):
            logits.append(exp.chat.policy.model(input_ids=ids).logits)
    if arm in ("route", "route2", "absorb"):
        assert quarantine(exp) > 0 and not torch.equal(*logits)
        assert all(0 < r["q_egy"] <= 1 for r in records)
    else:
        assert quarantine(exp) == 0.0 and torch.equal(*logits)
        assert all(r["q_egy"] == 0 for r in records)
    assert any(bool(delta.any()) for delta in deployed.values())
    if arm in ("erase", "route"):
        assert all(r["cos_post"] < 1e-5 < r["cos_pre"] for r in records)
    if arm == "none":
        assert all(r["cos_post"] == r["cos_pre"] for r in records)
    for key in ("tau", "hkgap", "resid"):
        assert all((r[key] is not None) == (arm == "route2") for r in records)
    assert all(math.isfinite(r["loss"]) and r["gn"] > 0 for r in records)


def test_the_leak_is_measured_on_the_parameter_change(begin):
    exp, state = begin(intervention="erase", weight_decay=0.1)
    train_step(exp, state)
    state.step = 1
    before = {m: layer.delta_s.detach().clone() for m, layer in exp.chat.policy.layers.items()}
    record, _ = train_step(exp, state)
    shares = []
    for m, V in state.basis.V.items():
        descent = (before[m] - exp.chat.policy.layers[m].delta_s.detach()).double()
        shares.append(float((V.double() @ descent).clamp_min(0).norm() / descent.norm()))
    assert record["cos_update"] == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    assert record["cos_update"] > record["cos_post"]  # AdamW turns a projected gradient back


def test_gn_is_the_norm_before_the_clip(begin, monkeypatch):
    exp, state = begin(intervention="route", grad_clip=1e-6)
    seen = {}
    real = state.optimizer.step

    def spy():
        seen["clipped"] = math.sqrt(
            sum(float(k.grad.square().sum()) for k in adapter_parameters(exp) if k.grad is not None)
        )
        return real()

    monkeypatch.setattr(state.optimizer, "step", spy)
    record, _ = train_step(exp, state)
    assert seen["clipped"] == pytest.approx(1e-6, rel=1e-3) and record["gn"] > 1e-3
    assert all(parameter.grad is None for parameter in adapter_parameters(exp))


def test_a_refresh_of_an_unmoved_policy_overlaps_wholly(begin):
    exp, state = begin(intervention="route2", lr=0.0, weight_decay=0.0, vhack_refresh_every=2)
    overlaps = []
    for state.step in range(5):
        overlaps.append(train_step(exp, state)[0]["refr"])
    assert [o is not None for o in overlaps] == [False, False, True, False, True]
    assert overlaps[2] == pytest.approx(1, abs=1e-3)
    frozen, state = begin(vhack_refresh_every=0)
    state.step = 2
    assert train_step(frozen, state)[0]["refr"] is None


def test_the_gate_and_v_grad_are_of_every_module(begin):
    """The noise floor is of axes: it changes with each refresh, and takes no module out of route2's sight."""
    exp, state = begin(intervention="route2", vhack_refresh_every=1, v_hack_drop_bottom_frac=0.9)
    state.step = 1
    train_step(exp, state)
    whole = set(exp.chat.policy.layers)
    assert set(state.gate.hack) == set(state.gate.clean) == set(state.basis.v_grad) == whole
    assert set(state.basis.V) < whole


def test_counts_of_a_line_are_those_of_its_rollouts(begin):
    exp, state = begin(intervention="route", prompts_per_step=3, rollout_ablate_frac=0.5)
    record, data = train_step(exp, state)
    student = [g for g in data.grades if g is not None]
    taught = [i for i, g in enumerate(data.grades) if g is None]
    assert record["N"] == 12
    assert record["hack_s"] == [sum(g.exploited for g in student), len(student)]
    assert record["gt_s"] == [sum(g.gt_correct for g in student), len(student)]
    assert record["hack_t"] == [sum(bool(data.hacked[i]) for i in taught), len(taught)]
    assert record["gt_t"] == [sum(bool(data.correct[i]) for i in taught), len(taught)]
    assert record["hack_abl"][1] == record["solve_abl"][1] == sum(r.ablated for r in data.rollouts) == 3
    assert record["rew"] == pytest.approx(float(data.rewards.mean()))
    assert record["rew_s"] == pytest.approx(sum(g.reward for g in student) / len(student))
    assert state.generations == len(student) and record["ref_eq"] == len(student) / 256
    by_mode = Counter(p.env_mode for p in data.problems)
    codes = {"rt": "run_tests", "so": "stdout_marker", "se": "sentinel", "fm": "file_marker"}
    for code, mode in codes.items():
        assert (
            record[f"hk_{code}"] == (None if not by_mode[mode] else [0, 2 * by_mode[mode]])
            or by_mode[mode] == 0
        )
    own = [float(r.logp_old.mean()) for r in data.rollouts if r.logp_old is not None]
    assert record["lp_s"] == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_the_split_of_the_cosine_can_be_turned_off(begin):
    exp, state = begin(cos_pre_split_every=2)
    split = []
    for state.step in range(3):
        record = complete(train_step(exp, state)[0])
        split.append((record["cos_pre_s"] is not None, record["cos_pre_t"] is not None))
    assert split == [(True, True), (False, False), (True, True)]
    exp, state = begin(cos_pre_split_every=0)
    assert complete(train_step(exp, state)[0])["cos_pre_t"] is None


# What is not finite


def poison(patch, steps, *, loss=None, size=float("nan")):
    """Let these steps (as given by the run's own count) see a gradient or a loss that is not finite."""
    real = step_module.per_rollout_grads
    seen = iter(range(99))

    def poisoned(*arguments, **options):
        grads = real(*arguments, **options)
        if next(seen) not in steps:
            return grads
        if loss is not None:
            return replace(grads, loss=loss)
        rows = dict(grads.rows)
        last = list(rows)[-1]
        rows[last] = rows[last].clone()
        rows[last][0, 0] = size
        return replace(grads, rows=rows)

    patch.setattr(step_module, "per_rollout_grads", poisoned)


@pytest.mark.parametrize(
    "how", [{}, {"size": math.inf}, {"size": 3e38}, {"loss": math.nan}, {"loss": -math.inf}], ids=str
)
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(begin, monkeypatch, how):
    exp, state = begin(intervention="route2", steps=4)
    train_step(exp, state)
    before, gate = values(exp), state.gate
    moments = copy.deepcopy(state.optimizer.state_dict())
    state.step = 1
    with monkeypatch.context() as patch:
        poison(patch, {0}, **how)
        record, _ = train_step(exp, state)
    assert record["skipped"] == 1 and record.get("gn") is None
    assert same(values(exp), before) and state.gate is gate
    after = state.optimizer.state_dict()
    assert after["param_groups"] == moments["param_groups"]
    for key, old in moments["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in old.items())
    state.step = 2
    record, _ = train_step(exp, state)
    assert record["skipped"] == 0 and record["gn"] > 0 and not same(values(exp), before)
