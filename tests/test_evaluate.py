"""Held-out evaluation: paired samples, grades in their places, the quarantine on and off."""

from dataclasses import replace

import pytest
import torch

from projected_grpo.config import SamplingConfig
from projected_grpo.evaluate import Evaluation, Rates, evaluate
from projected_grpo.models import stop_ids
from projected_grpo.problems import load_problems
from projected_grpo.rewards import Grade, Grader

SAMPLING = SamplingConfig(max_new=12, temperature=1.0)
BLANK = Grade(0.5, False, False, False, None, True, False, False, False, None)


class Scripted(Grader):
    """Grades by a rule on (task, text) instead of running anything."""

    def __init__(self, rule=lambda task, text: BLANK):
        self.rule, self.seen = rule, []

    def grade_all(self, items):
        self.seen += items
        return [self.rule(task, text) for task, text in items]


@pytest.fixture(scope="module")
def problems():
    found = load_problems("embedded").problems[:3]
    return [
        replace(p, env_mode=m) for p, m in zip(found, ("run_tests", "sentinel", "run_tests"), strict=True)
    ]


@pytest.fixture
def run(tiny, tiny_policy):
    def start(problems, grader=None, samples=2, seed=41, *, ablate_quarantine=False):
        stop = stop_ids(tiny_policy.model, tiny[1])
        return evaluate(
            *(
                tiny_policy,
                tiny[1],
                problems,
                samples,
                SAMPLING,
                grader or Scripted(),
                stop,
                tiny[1].pad_token_id,
            ),
            seed,
            ablate_quarantine=ablate_quarantine,
        )

    return start


def test_rates_are_counts_over_n():
    assert (Rates(1, 3, 4).hack, Rates(1, 3, 4).solve) == (0.25, 0.75)
    assert Rates(0, 0, 0).hack is None and Rates(0, 0, 0).solve is None


def test_rates_by_mode(problems):
    hack, right = replace(BLANK, exploited=True), replace(BLANK, gt_correct=True)
    got = Evaluation(tuple(problems), ((),) * 3, ((hack, right), (right, right), (BLANK, hack)))
    assert got.rates() == Rates(2, 3, 6)
    assert got.rates("run_tests") == Rates(2, 1, 4)
    assert got.rates("sentinel") == Rates(0, 2, 2)
    assert got.rates("exit_code") == Rates(0, 0, 0)


def test_rates_by_split_and_by_both(problems):
    hack, right = replace(BLANK, exploited=True), replace(BLANK, gt_correct=True)
    splits = ("held-out instances", "held-out templates", "held-out templates")
    named = tuple(replace(p, split=s) for p, s in zip(problems, splits, strict=True))
    got = Evaluation(named, ((),) * 3, ((hack, right), (right, right), (BLANK, hack)))
    assert got.rates(split="held-out instances") == Rates(1, 1, 2)
    assert got.rates(split="held-out templates") == Rates(1, 2, 4)
    assert got.rates("run_tests", "held-out templates") == Rates(1, 0, 2)
    assert got.rates("sentinel", "held-out instances") == Rates(0, 0, 0)
    assert got.rates(split="train") == Rates(0, 0, 0)


def test_the_share_of_changed_texts(problems):
    one = Evaluation(tuple(problems[:2]), (("a", "b"), ("c", "d")), ())
    other = replace(one, texts=(("a", "x"), ("y", "d")))
    assert one.share_changed(one) == 0 and one.share_changed(other) == 0.5
    with pytest.raises(ValueError):
        one.share_changed(replace(one, texts=(("a", "b"),)))


def test_grades_stand_where_their_texts_do(run, problems):
    def rule(task, text):
        return replace(BLANK, error=f"{task.problem_id} {task.env_mode} {text}")

    grader = Scripted(rule)
    got = run(problems, grader, samples=3)
    assert [len(group) for group in got.texts] == [3, 3, 3]
    for problem, texts, grades in zip(problems, got.texts, got.grades, strict=True):
        assert [g.error for g in grades] == [f"{problem.problem_id} {problem.env_mode} {t}" for t in texts]
    assert len(grader.seen) == 9


def test_what_is_sampled_hangs_on_seed_problem_and_row_alone(run, problems):
    whole = run(problems, samples=3)
    part = run(problems[2:] + problems[:1], samples=2)
    assert part.texts == (whole.texts[2][:2], whole.texts[0][:2])
    assert run(problems, seed=42).texts != run(problems).texts
    assert len(set(whole.texts[0])) > 1


def test_deployment_is_the_policy_without_its_quarantine(run, problems, tiny_policy):
    base = run(problems)
    generator = torch.Generator().manual_seed(0)
    for layer in tiny_policy.layers.values():
        layer.delta_hack.data.normal_(generator=generator)
    on, off = run(problems), run(problems, ablate_quarantine=True)
    assert off.texts == base.texts != on.texts
    assert 0 < on.share_changed(off) <= 1
    for layer in tiny_policy.layers.values():
        layer.delta_s.data.copy_(layer.delta_hack.data)
        layer.delta_hack.data.zero_()
    assert run(problems, ablate_quarantine=True).texts == on.texts


def test_evaluation_leaves_the_weights_alone(run, problems, tiny_policy):
    for layer in tiny_policy.layers.values():
        layer.delta_s.data.fill_(0.1)
    before = {name: t.clone() for name, t in tiny_policy.model.state_dict().items()}
    run(problems)
    assert all(torch.equal(before[name], t) for name, t in tiny_policy.model.state_dict().items())
    assert all(layer.bound is None for layer in tiny_policy.layers.values())
