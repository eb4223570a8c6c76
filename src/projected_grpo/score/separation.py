"""How well a score tells exploits from other completions: the area under the ROC curve and what goes with it.

    AUROC = P(score of an exploit > score of another) + P(equal) / 2        by midranks

Its interval treats all completions of a problem as one draw. AUROC is a mean over exploits of their
placements among the others, and the reverse; linearised, each problem c contributes

    u_c = sum over its exploits (p_i - AUROC) / m + sum over its others (q_j - AUROC) / n

with p_i the share of others below exploit i, q_j the share of exploits above the other j, and
var(AUROC) = C / (C - 1) sum u_c^2 over C problems (Obuchowski 1997; DeLong et al. 1988 where C = m + n).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

STRATA = 5


def auroc(score: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Area under the ROC curve; NaN unless there are both kinds."""
    m = int(positive.sum())
    if m in (0, len(positive)):
        return math.nan
    ranks = stats.rankdata(score.double().numpy())[positive.numpy()]
    return float((ranks.sum() - m * (m + 1) / 2) / (m * (len(positive) - m)))


def clustered_interval(
    score: Float[Tensor, " n"], positive: Bool[Tensor, " n"], cluster: Int[Tensor, " n"]
) -> tuple[float, float] | None:
    """95% t interval of the AUROC over clusters, cut to [0, 1].

    None where it says nothing: one kind alone, one cluster, or a perfect separation, which has no variance.
    """
    area, names = auroc(score, positive), cluster.unique()
    if math.isnan(area) or area in (0, 1) or len(names) < 2:
        return None
    values, hit = score.double().numpy(), positive.numpy()
    ranks = stats.rankdata(values)
    placed = np.empty(len(values))
    for kind, other in ((hit, ~hit), (~hit, hit)):
        below = (ranks[kind] - stats.rankdata(values[kind])) / other.sum()
        placed[kind] = (below if kind is hit else 1 - below) - area
    share = placed / np.where(hit, hit.sum(), (~hit).sum())
    own = np.array([share[(cluster == name).numpy()].sum() for name in names])
    count = len(names)
    half = stats.t.ppf(0.975, count - 1) * float(np.sqrt(count / (count - 1) * np.square(own).sum()))
    return max(0.0, float(area - half)), min(1.0, float(area + half))


def stratified_auroc(
    score: Float[Tensor, " n"], positive: Bool[Tensor, " n"], by: Float[Tensor, " n"], strata: int = STRATA
) -> float:
    """AUROC over pairs whose `by` lies in the same quantile: what a score tells that `by` does not."""
    edges = torch.quantile(by.double(), torch.linspace(0, 1, strata + 1, dtype=torch.double)[1:-1])
    stratum = torch.bucketize(by.double(), edges)
    won, pairs = 0.0, 0
    for number in stratum.unique():
        own = stratum == number
        area, hits = auroc(score[own], positive[own]), int(positive[own].sum())
        if not math.isnan(area):
            weight = hits * (int(own.sum()) - hits)
            won, pairs = won + area * weight, pairs + weight
    return won / pairs if pairs else math.nan


@dataclass(frozen=True)
class Flags:
    """What a gate would do: share flagged, precision and recall of exploits, and F0.5."""

    fired: float
    precision: float | None
    recall: float | None
    f_half: float | None


def flags(flagged: Bool[Tensor, " n"], positive: Bool[Tensor, " n"]) -> Flags:
    """Figures of a threshold. F0.5 weighs precision twice recall: a wrong routing costs more than a miss."""
    hits, fired, wanted = int((flagged & positive).sum()), int(flagged.sum()), int(positive.sum())
    return Flags(
        fired / len(flagged),
        hits / fired if fired else None,
        hits / wanted if wanted else None,
        1.25 * hits / (0.25 * wanted + fired) if wanted else None,
    )
