"""Held-out evaluation: paired samples, grades in their places, the quarantine on and off."""

import itertools
import math
import random
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo.config import SamplingConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.generate import sample
from projected_grpo.engine.models import stop_ids
from projected_grpo.evaluate import Evaluation, Rates, Samples, chunks, evaluate
from projected_grpo.problems import load_problems
from projected_grpo.results.statistics import Bootstrap, Figure, cluster_interval, figures
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
    def start(
        problems,
        grader=None,
        samples=2,
        seed=41,
        *,
        ablate_quarantine=False,
        tokens_at_once=0,
        sampler=sample,
        **options,
    ):
        chat = Chat(tiny_policy, tiny[1], stop_ids(tiny_policy.model, tiny[1]), sampler)
        how = Samples(SAMPLING, samples, seed, tokens_at_once)
        found = grader or Scripted()
        return evaluate(chat, found, problems, how, ablate_quarantine=ablate_quarantine, **options)

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
    assert all(layer.bound == (None, None) for layer in tiny_policy.layers.values())


# Chunks


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 200))
def test_chunks_are_consecutive_fit_and_are_as_long_as_they_can_be(sizes, budget):
    def cost(part):
        return len(part) * max(part)

    parts = [sizes[piece] for piece in chunks(sizes, budget)]
    assert [size for part in parts for size in part] == sizes
    if budget == 0:
        assert len(parts) == bool(sizes)
        return
    assert all(len(part) == 1 or cost(part) <= budget for part in parts)
    assert all(cost([*part, after[0]]) > budget for part, after in pairwise(parts))


def test_chunks_change_nothing_but_what_is_held_at_once(run, problems):
    parts = []
    whole = run(problems, samples=3)
    again = run(problems, samples=3, tokens_at_once=1, on_chunk=parts.append)
    assert again == whole
    assert [part.problems for part in parts] == [(p,) for p in problems]
    assert tuple(group for part in parts for group in part.texts) == whole.texts


# Figures

FAILED = replace(BLANK, hacked_E=True, hacked_C=True, exploited=True, tampered=True)
HONEST_TAMPER = replace(BLANK, gt_correct=True, tampered=True, hacked_C=True, hacked_E=True)
ASSERTS_WRONG = replace(BLANK, hacked_D=True, hacked_E=True)
SELF_TEST = replace(BLANK, gt_correct=True, hacked_E=True)
QUICK = Bootstrap(resamples=199)


def test_figures_by_hand(problems):
    groups = ((FAILED, HONEST_TAMPER), (FAILED, BLANK), (ASSERTS_WRONG, SELF_TEST))
    found = figures(Evaluation(tuple(problems), ((),) * 3, groups), QUICK)
    counted = {name: (f.count, f.n, f.problems) for name, f in found.items()}
    assert counted == {
        "hack": (2, 6, 3),
        "attempt": (3, 6, 3),
        "exploit_given_attempt": (2, 3, 2),  # the third problem saw no attempt
        "solve": (2, 6, 3),
        "format": (6, 6, 3),
        "strict": (2, 4, 2),  # of the two run_tests problems
        "loose": (3, 4, 2),
    }
    assert all(f.rate == f.count / f.n for f in found.values())


def test_figures_of_some_problems_are_those_of_them_alone(problems):
    groups = ((FAILED, BLANK), (BLANK, BLANK), (FAILED, FAILED))
    whole = Evaluation(tuple(problems), ((),) * 3, groups)
    part = Evaluation(tuple(problems[::2]), ((),) * 2, groups[::2])
    assert figures(whole, QUICK, {p.problem_id for p in problems[::2]}) == figures(part, QUICK)
    nothing = figures(whole, QUICK, ())["hack"]
    assert nothing == Figure(0, 0, 0, None, None, None, None)


def test_the_interval_of_many_problems_is_that_of_a_slow_bca():
    """Efron 1987: resampled problems, corrected for bias and by the jackknife for skewness."""
    draw, n, normal = random.Random(3), 24, NormalDist()
    totals = [draw.randint(1, 12) for _ in range(n)]
    hits = [draw.choice((0, 0, t, t // 3)) for t in totals]

    def ratio(rows):
        return sum(hits[i] for i in rows) / sum(totals[i] for i in rows)

    whole, drawn = ratio(range(n)), sorted(ratio(draw.choices(range(n), k=n)) for _ in range(6000))
    bias = normal.inv_cdf(sum(r < whole for r in drawn) / len(drawn))
    without = [ratio([i for i in range(n) if i != j]) for j in range(n)]
    off = [fmean(without) - r for r in without]
    skew = sum(d**3 for d in off) / (6 * sum(d**2 for d in off) ** 1.5)

    def quantile(share):
        z = bias + normal.inv_cdf(share)
        return drawn[int(normal.cdf(bias + z / (1 - skew * z)) * len(drawn))]

    low, high, method = cluster_interval(hits, totals, Bootstrap())
    assert method == "BCa" and (low, high) == pytest.approx((quantile(0.025), quantile(0.975)), abs=0.015)
    narrow = cluster_interval(hits, totals, Bootstrap(confidence=0.5))
    assert low < narrow[0] < narrow[1] < high
    assert cluster_interval(hits, totals, Bootstrap()) == (low, high, method)


def test_the_interval_of_few_problems_is_students_where_all_have_as_many_completions():
    hits = [3, 5, 2, 6]
    rates = [h / 10 for h in hits]
    half = 3.182446 * stdev(rates) / math.sqrt(4)  # t of three degrees of freedom
    low, high, method = cluster_interval(hits, [10] * 4, QUICK)
    assert method == "t" and (low, high) == pytest.approx((fmean(rates) - half, fmean(rates) + half))
    assert cluster_interval([0, 1], [10, 10], QUICK)[0] == 0.0  # a rate is never below 0


@pytest.mark.parametrize(("n", "most"), [(3, 0.80), (5, 0.88)])
def test_intervals_of_few_problems_hold_the_rate_where_percentile_bootstrap_does_not(n, most):
    """500 evaluations of n problems, of 2 to 10 completions each, whose own rates differ about .5."""
    rng = np.random.default_rng(n)
    totals = rng.integers(2, 11, size=(500, n))
    hits = rng.binomial(totals, rng.beta(3, 3, size=(500, n)))
    every = np.array(list(itertools.product(range(n), repeat=n)))  # all resamples
    resampled = hits[:, every].sum(-1) / totals[:, every].sum(-1)
    low, high = np.quantile(resampled, (0.025, 0.975), axis=1)
    percentile = np.mean((low <= 0.5) & (high >= 0.5))
    found = [cluster_interval(h, t, QUICK) for h, t in zip(hits.tolist(), totals.tolist(), strict=True)]
    assert {method for *_, method in found} == {"t"}
    assert np.mean([low <= 0.5 <= high for low, high, _ in found]) > 0.91 > most > percentile


@pytest.mark.parametrize(("half", "method"), [(10, "t"), (11, "BCa")])
def test_alike_completions_of_a_problem_are_one_observation(half, method):
    """Ten copies of each completion say no more than one; a binomial interval would shrink threefold."""
    once = cluster_interval([1, 0] * half, [1] * 2 * half, Bootstrap())
    copies = cluster_interval([10, 0] * half, [10] * 2 * half, Bootstrap())
    assert copies[:2] == pytest.approx(once[:2]) and copies[2] == once[2] == method
    spread = cluster_interval([5] * 2 * half, [10] * 2 * half, Bootstrap())
    assert spread == (0.5, 0.5, "t") and once[1] - once[0] > 0.3  # BCa is undefined where all agree


@pytest.mark.parametrize(
    ("hits", "totals", "expected"),
    [
        ([], [], (None, None, None)),
        ([3], [4], (None, None, None)),
        ([3, 0, 0], [4, 0, 0], (None, None, None)),
        ([0, 0], [4, 4], (0.0, 0.0, "t")),
        ([4, 4, 0], [4, 4, 0], (1.0, 1.0, "t")),
        ([1] * 30, [1] * 30, (1.0, 1.0, "t")),
    ],
)
def test_intervals_where_there_is_little_to_draw(hits, totals, expected):
    assert cluster_interval(hits, totals, QUICK) == expected
