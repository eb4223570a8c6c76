"""Separation and foretold steps against slow loops, scipy, and steps that are really made."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from projected_grpo.proj import pooled_cosines
from projected_grpo.score.foretold import grouped_advantages, halves, slopes
from projected_grpo.score.separation import auroc, clustered_interval, flags, stratified_auroc


@st.composite
def labelled(draw, least=2):
    """Scores with ties, labels of both kinds, and clusters."""
    n = draw(st.integers(least, 30))
    score = draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    hit = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < len(x)))
    cluster = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    return torch.tensor(score).float(), torch.tensor(hit), torch.tensor(cluster)


def by_pairs(score, hit, allowed=lambda i, j: True):
    """AUROC by its definition."""
    pairs = [(i, j) for i in range(len(score)) for j in range(len(score)) if hit[i] and not hit[j]]
    won = [float(score[i] > score[j]) + 0.5 * float(score[i] == score[j]) for i, j in pairs if allowed(i, j)]
    return float(np.mean(won)) if won else math.nan


@given(labelled())
def test_auroc_is_its_definition_and_mann_whitneys(data):
    score, hit, _ = data
    assert auroc(score, hit) == pytest.approx(by_pairs(score, hit))
    u = stats.mannwhitneyu(score[hit].numpy(), score[~hit].numpy()).statistic
    assert auroc(score, hit) == pytest.approx(u / (int(hit.sum()) * int((~hit).sum())))


@given(labelled())
def test_within_strata_only_pairs_of_one_stratum_count(data):
    score, hit, by = data
    edges = np.quantile(by.numpy(), [0.5])
    side = np.searchsorted(edges, by.numpy())
    expected = by_pairs(score, hit, lambda i, j: side[i] == side[j])
    assert stratified_auroc(score, hit, by.float(), strata=2) == pytest.approx(expected, nan_ok=True)


def test_one_kind_alone_has_no_figure():
    score, none = torch.arange(3.0), torch.zeros(3, dtype=torch.bool)
    assert math.isnan(auroc(score, none)) and clustered_interval(score, none, torch.arange(3)) is None
    assert clustered_interval(score, torch.tensor([True, False, False]), torch.zeros(3).long()) is None


def test_single_clusters_give_delongs_variance():
    """With a cluster per completion it is the variance of DeLong et al., up to their degrees of freedom."""
    rng = np.random.default_rng(0)
    hit = torch.tensor(rng.random(400) < 0.3)
    score = torch.tensor(rng.normal(size=400)) + hit
    pos, neg = score[hit].numpy(), score[~hit].numpy()
    wins = (pos[:, None] > neg).astype(float)
    variance = wins.mean(1).var(ddof=1) / len(pos) + wins.mean(0).var(ddof=1) / len(neg)
    low, high = clustered_interval(score, hit, torch.arange(400))
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 399) * variance**0.5, rel=0.02)


def test_clustered_intervals_cover_where_independent_ones_do_not():
    """40 problems whose 8 completions share label and score: the interval must see 40 draws, not 320."""
    rng, covered, naive = np.random.default_rng(1), 0, 0
    for _ in range(100):
        hit = np.arange(40) < 20
        score = rng.normal(size=40) + hit
        rows = torch.tensor(np.repeat(score, 8)), torch.tensor(np.repeat(hit, 8))
        truth = stats.norm.cdf(1 / 2**0.5)
        for clusters, count in ((torch.arange(40).repeat_interleave(8), "c"), (torch.arange(320), "n")):
            low, high = clustered_interval(*rows, clusters)
            inside = low <= truth <= high
            covered, naive = (covered + inside, naive) if count == "c" else (covered, naive + inside)
    assert covered >= 90 and naive < 75


@given(labelled())
def test_flags_are_counts(data):
    score, hit, _ = data
    found, flagged = flags(score > 0, hit), score > 0
    both = int((flagged & hit).sum())
    assert found.precision == (both / int(flagged.sum()) if flagged.any() else None)
    assert found.recall == both / int(hit.sum())
    if both:
        p, r = found.precision, found.recall
        assert found.f_half == pytest.approx(1.25 * p * r / (0.25 * p + r))


def test_pooled_cosine_is_that_of_all_modules_end_to_end():
    torch.manual_seed(0)
    rows = {"a": torch.randn(5, 3), "b": torch.randn(5, 4), "unused": torch.randn(5, 2)}
    v = {"a": torch.randn(3), "b": torch.randn(4)}
    flat, direction = torch.cat([rows["a"], rows["b"]], 1), torch.cat([v["a"], v["b"]])
    expected = torch.nn.functional.cosine_similarity(flat, direction[None])
    torch.testing.assert_close(pooled_cosines(rows, v), expected)
    assert float(pooled_cosines({"a": torch.zeros(1, 3)}, {"a": torch.ones(3)})) == 0


def test_advantages_of_uneven_groups():
    reward, problem = torch.tensor([1.0, 0.0, 3.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 1, 2])
    assert grouped_advantages(reward, problem).tolist() == [0.5, -0.5, 0.0, 0.0, 0.0]


def test_slopes_are_derivatives_of_log_likelihood_along_the_step():
    """A softmax model with one weight per answer: the slope is d log p(hack) / d t of logits - t keep."""
    torch.manual_seed(1)
    answers = torch.randint(0, 6, (64,))
    logits = torch.randn(6, dtype=torch.double)
    probabilities = logits.softmax(0)
    rows = {"m": probabilities[None] - torch.eye(6, dtype=torch.double)[answers]}  # gradient of -log p
    problem, hack, solve = torch.arange(64) // 4, answers == 0, answers == 1
    reward = hack.double() * 3 + solve.double()
    advantage = grouped_advantages(reward, problem)
    both = halves(rows, problem, hack, solve)
    assert {int(i) for half in both for i in problem[half.index].unique()} == set(range(16))
    assert not set(problem[both[0].index].tolist()) & set(problem[both[1].index].tolist())

    def arm(g):
        return {"m": g["m"] * torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.double)}

    expected = dict.fromkeys(("hack", "solve", "hack_sign", "solve_sign"), 0.0)
    for makes in both:
        keep = arm({"m": advantage[makes.index].double() @ makes.rows["m"]})["m"]
        for name, answer in (("hack", 0), ("solve", 1)):
            for suffix, step in (("", keep), ("_sign", keep.sign())):
                t = 1e-6
                ahead, behind = ((logits - s * t * step).log_softmax(0)[answer] for s in (1, -1))
                expected[name + suffix] += float(ahead - behind) / (2 * t)
    found = slopes(both, advantage, arm)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6)
    plain = slopes(both, advantage, lambda g: g)
    assert plain.over(plain)["hack_slope"] == 1.0 and found.over(plain)["hack_slope"] < 1
    assert plain.over(slopes(both, -advantage, lambda g: g))["hack_slope"] is None
