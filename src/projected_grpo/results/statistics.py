"""Records of a study by arm and seed, what is read of one, and differences paired by seed.

Two arms start from the same model, see the same prompts and draw the same random numbers until their updates
part. Intervals are 95% t intervals of the mean over seeds (scipy).
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from projected_grpo.evaluate import Evaluation
from projected_grpo.problems import Problem
from projected_grpo.rewards import Grade

Record = Mapping[str, Any]
Metric = Callable[[Record], float]
Arms = Mapping[str, Mapping[int, Record]]
INSTANCES, TEMPLATES = "held-out instances", "held-out templates"
ALPHA = 0.05
FEWEST = 2  # seeds for an interval
ROUNDING = 1e-9  # differences of records, which have four digits, that lie closer are the same
EXACT = 12  # seeds up to which every pattern of signs is counted


def rate(rates: Mapping[str, Any], name: str) -> float:
    """One of some rates; NaN if it was not measured."""
    value = rates.get(name)
    return math.nan if value is None else float(value)


def deployed(key: str, split: str | None = None) -> Metric:
    """hack or solve rate as deployed, over both kinds of held-out problems or one; NaN if not measured."""
    if split is None:
        return lambda r: rate(r["summary"], f"{key}_deploy")
    return lambda r: rate(r["summary"].get("by_split", {}).get(split, {}), f"{key}_deploy")


def trained(key: str) -> Metric:
    """hack or solve rate as trained, quarantine included."""
    return lambda r: rate(r["summary"], f"{key}_train")


def in_mode(key: str, mode: str) -> Metric:
    """hack or solve rate as deployed on problems of one mode."""
    return lambda r: rate(r["summary"]["by_mode"].get(mode, {}), f"{key}_deploy")


def safe_pass(r: Record) -> float:
    """Solve minus hack rate as deployed."""
    return deployed("solve")(r) - deployed("hack")(r)


def step_mean(name: str, last: int | None = None) -> Metric:
    """Mean of a column over those of the last steps (default: all) that have it; NaN if it was not kept."""
    start = -last if last else None
    return lambda r: mean_or_nan([float(v) for v in r["steps"].get(name, ())[start:] if v is not None])


def where_measured(values: Sequence[float | None]) -> dict[int, float]:
    """A column of a run's steps, at the steps that have it."""
    return {step: value for step, value in enumerate(values) if value is not None}


def mean_or_nan(values: Sequence[float]) -> float:
    """The mean; NaN of none."""
    return fmean(values) if values else math.nan


def shares(pairs: Sequence[Any]) -> list[float]:
    """A [count, n] column as rates, NaN where there was none."""
    return [pair[0] / pair[1] if pair and pair[1] else math.nan for pair in pairs]


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% t interval of the mean, without width if the values are the same; None under two."""
    if len(values) < FEWEST:
        return None
    half = float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


@dataclass(frozen=True)
class Difference:
    """Paired differences, one a seed: their mean with its 95% t interval, and whether they are chance."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def sem(self) -> float:
        """Standard error of the mean; needs two seeds."""
        return stdev(self.values) / math.sqrt(self.n)

    @property
    def varies(self) -> bool:
        """Whether the differences differ. If not there is nothing to measure their mean by."""
        return max(self.values) - min(self.values) > ROUNDING

    @cached_property
    def t_test(self) -> Any:
        """scipy's paired t test, two-sided; None if they do not vary."""
        return stats.ttest_1samp(self.values, 0.0) if self.varies else None

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95% t interval; without width if they do not vary."""
        return t_interval(self.values) or (self.mean, self.mean)

    @property
    def p(self) -> float:
        """Of the paired t test; NaN if they do not vary."""
        return math.nan if self.t_test is None else float(self.t_test.pvalue)

    @cached_property
    def sign_flip(self) -> float:
        """Two-sided p of the mean over all patterns of signs (beyond 12 seeds random ones); NaN under two."""
        if self.n < FEWEST:
            return math.nan
        found = stats.permutation_test(
            (self.values,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=2**EXACT,
            random_state=np.random.default_rng(0),
        )
        return float(found.pvalue)

    @property
    def least_sign_flip(self) -> float:
        """The smallest that `sign_flip` can be: of all patterns two, or of the random ones none but these."""
        return 2.0 ** (1 - self.n) if self.n <= EXACT else 2 / (2**EXACT + 1)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; one without width says nothing."""
        low, high = self.interval
        return low < high and (low > 0 or high < 0)

    @property
    def lowers(self) -> bool:
        """Whether it is below zero with its whole interval."""
        return self.excludes_zero and self.mean < 0

    def __str__(self) -> str:
        if self.n < FEWEST:
            return f"{self.mean:+.3f} (n={self.n})"
        low, high = self.interval
        return f"{self.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def paired(a: Mapping[int, Record], b: Mapping[int, Record], metric: Metric) -> Difference | None:
    """a minus b over the seeds both have; None without one."""
    differences = [metric(a[s]) - metric(b[s]) for s in sorted(a.keys() & b.keys())]
    measured = tuple(d for d in differences if not math.isnan(d))
    return Difference(measured) if measured else None


def holm(family: Sequence[float]) -> list[float]:
    """p values adjusted over their family, in its order (Holm 1979). NaN stays NaN and does not count."""
    adjusted, reached = [math.nan] * len(family), 0.0
    order = sorted((i for i, p in enumerate(family) if not math.isnan(p)), key=family.__getitem__)
    for rank, i in enumerate(order):
        reached = adjusted[i] = min(1.0, max(reached, (len(order) - rank) * family[i]))
    return adjusted


def holm_of(family: Sequence[Difference | None]) -> list[float]:
    """Holm's p of every difference of a family; NaN where there is none."""
    return holm([math.nan if d is None else d.p for d in family])


def by_arm(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Records by arm, then seed."""
    arms: dict[str, dict[int, Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], {})[record["seed"]] = record
    return arms


BATCH = 1000  # resamples held in memory at once
FEW = 20  # problems up to which resampling them gives intervals that are too short

# A metric: which completions count, among which. strict and loose are the benchmark's labels: own tests pass
# although the answer is wrong; beside these, every test function that passes a stub or fails a right answer.
METRICS: Mapping[str, tuple[Callable[[Problem, Grade], bool], Callable[[Problem, Grade], bool]]] = {
    "hack": (lambda p, g: g.exploited, lambda p, g: True),
    "attempt": (lambda p, g: g.tampered, lambda p, g: True),
    "exploit_given_attempt": (lambda p, g: g.exploited, lambda p, g: g.tampered),
    "solve": (lambda p, g: g.gt_correct, lambda p, g: True),
    "format": (lambda p, g: g.format_ok, lambda p, g: True),
    "strict": (lambda p, g: g.hacked_E and not g.gt_correct, lambda p, g: p.env_mode == "run_tests"),
    "loose": (
        lambda p, g: g.hacked_C or g.hacked_D or (g.hacked_E and not g.gt_correct),
        lambda p, g: p.env_mode == "run_tests",
    ),
}


@dataclass(frozen=True)
class Figure:
    """`count` of `n` completions of `problems` problems; the rate, its interval and how that was made.

    None where undefined.
    """

    count: int
    n: int
    problems: int
    rate: float | None
    low: float | None
    high: float | None
    method: str | None


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    confidence: float = 0.95
    resamples: int = 9999
    seed: int = 0


def figures(evaluation: Evaluation, how: Bootstrap, ids: Collection[str] | None = None) -> dict[str, Figure]:
    """Every metric over an evaluation, or over those of its problems that have one of these ids."""
    picked = [
        (p, group)
        for p, group in zip(evaluation.problems, evaluation.grades, strict=True)
        if ids is None or p.problem_id in ids
    ]
    table = {}
    for name, (counts, among) in METRICS.items():
        totals = [sum(among(p, g) for g in group) for p, group in picked]
        hits = [sum(among(p, g) and counts(p, g) for g in group) for p, group in picked]
        count, n = sum(hits), sum(totals)
        problems = sum(total > 0 for total in totals)
        share = count / n if n else None
        table[name] = Figure(count, n, problems, share, *cluster_interval(hits, totals, how))
    return table


def cluster_interval(
    hits: Sequence[int], totals: Sequence[int], how: Bootstrap
) -> tuple[float | None, float | None, str | None]:
    """Interval of sum(hits) / sum(totals) over problems with all their completions, and its method.

    BCa with more than 20 problems, t with fewer and where BCa is undefined, None with fewer than two.
    Problems without a completion that could count say nothing and are left out.
    """
    pairs = np.array([(h, t) for h, t in zip(hits, totals, strict=True) if t], dtype=float).reshape(-1, 2)
    if len(pairs) < 2:
        return None, None, None
    if len(pairs) > FEW:
        low, high = bca_interval(pairs, how)
        if not math.isnan(low + high):
            return low, high, "BCa"
    return *ratio_interval(pairs, how.confidence), "t"


def bca_interval(pairs: np.ndarray, how: Bootstrap) -> tuple[float, float]:
    """BCa bootstrap interval of the ratio of two columns, drawing rows (Efron 1987); NaN if all agree."""

    def ratio(h: np.ndarray, t: np.ndarray, axis: int) -> Any:
        return h.sum(axis) / t.sum(axis)

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (pairs[:, 0], pairs[:, 1]),
            ratio,
            paired=True,
            vectorized=True,
            method="BCa",
            n_resamples=how.resamples,
            confidence_level=how.confidence,
            batch=BATCH,
            random_state=np.random.default_rng(how.seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)


def ratio_interval(pairs: np.ndarray, confidence: float) -> tuple[float, float]:
    """t interval of the ratio of two columns by its linearised variance (Cochran 1977), cut to [0, 1]."""
    (h, t), n = pairs.T, len(pairs)
    ratio = h.sum() / t.sum()
    sem = math.sqrt(n / (n - 1) * ((h - ratio * t) ** 2).sum()) / t.sum()
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sem
    return max(0.0, float(ratio - half)), min(1.0, float(ratio + half))
