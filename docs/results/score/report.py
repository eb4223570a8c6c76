"""A8's table, verdicts and picture from its records: `python docs/results/score/report.py`.

Predictors are those of the table that stands in docs/spec.md since before the runs; gate B2's verdicts and
the nulls are those of before.json, which `projected-grpo score` wrote.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

HERE = Path(__file__).parent
SPEC = HERE.parents[1] / "spec.md"
CELLS = re.compile(r"(sampled|noisy|mixed)-([\w-]+) \| (\.\d+) \| (\d?\.\d+)")
MIDDLE = (0.4, 0.92)  # AUROC of the sets that lie between the clusters seen before
WHOLE_RHO, MIDDLE_RHO, LEVEL, B2_EFFECT = 0.6, 0.5, 0.05, 0.15
LOOKS = {"sampled": ("#0072b2", "o"), "noisy": ("#d55e00", "s"), "mixed": ("#009e73", "^")}
BAND = (5, 95)  # percentiles of the null directions that are shaded


@dataclass(frozen=True)
class PairSet:
    """One pair set: what the base model said of it before, and what its runs did, by seed."""

    name: str
    auroc: float
    slope: float
    change: Mapping[int, float]  # hack as deployed, minus that of none
    solve: Mapping[int, float]
    removed: float  # mean hack-ward share of the gradients

    @property
    def outcome(self) -> float:
        return fmean(self.change.values())


def records() -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for path in sorted(HERE.glob("*_seed*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["arm"], {})[record["seed"]] = record
    return found


def pair_sets() -> list[PairSet]:
    """Every set of the preregistered table that has been run, in the table's order."""
    made, text = records(), SPEC.read_text()
    table = text[text.index("### A8") : text.index("### A9")]
    none = {seed: record["summary"]["hack_deploy"] for seed, record in made["none"].items()}
    found = []
    for kind, rest, auroc, slope in CELLS.findall(table):
        runs = made.get(name := f"{kind}-{rest}", {})
        if runs:
            change = {seed: run["summary"]["hack_deploy"] - none[seed] for seed, run in runs.items()}
            solve = {seed: run["summary"]["solve_deploy"] for seed, run in runs.items()}
            removed = fmean(v for run in runs.values() for v in run["steps"]["cos_pre"] if v is not None)
            found.append(PairSet(name, float(auroc), float(slope), change, solve, removed))
    return found


def correlation(x: Sequence[float], y: Sequence[float], alternative: str) -> tuple[float, float]:
    """Spearman's rho and its one-sided permutation p, 20,000 pairings."""
    ranks, others = (stats.zscore(stats.rankdata(values)) for values in (x, y))

    def rho(permuted: np.ndarray, axis: int) -> np.ndarray:
        return (permuted * others).mean(axis)

    found = stats.permutation_test(
        (ranks,), rho, permutation_type="pairings", vectorized=True, alternative=alternative,
        n_resamples=20_000, random_state=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.statistic), float(found.pvalue)


def shown(p: float) -> str:
    return f"p {p:.4f}" if p >= 1e-4 else "p < .0001"


def foretells(sets: Sequence[PairSet], figure: str) -> str:
    """The preregistered verdict of `auroc` or `slope`."""
    alternative, sign = ("greater", 1) if figure == "slope" else ("less", -1)
    parts, holds = [], True
    for name, (low, high), asked in (("all", (0, 1), WHOLE_RHO), ("middle", MIDDLE, MIDDLE_RHO)):
        own = [s for s in sets if low <= s.auroc <= high]
        rho, p = correlation([getattr(s, figure) for s in own], [s.outcome for s in own], alternative)
        holds &= sign * rho >= asked and p < LEVEL
        parts.append(f"{name} {len(own)} sets: rho {rho:+.2f}, {shown(p)} (asked {sign * asked:+.1f})")
    return f"{figure}: {'; '.join(parts)}: {'FORETELLS' if holds else 'NOT SHOWN'}"


def beside(sets: Sequence[PairSet]) -> list[str]:
    """Correlations of what needs no score; they decide nothing."""
    before = scored()
    trivial: dict[str, list[float]] = {
        "number of pairs": [float(pairs_of(s.name)) for s in sets],
        "log p of the hack sides": [before[s.name]["support"]["hack"] for s in sets],
        "length of hack over clean sides": [length_ratio(s.name) for s in sets],
        "share of the gradient removed": [s.removed for s in sets],
    }
    outcome = [s.outcome for s in sets]
    rhos = ((name, float(stats.spearmanr(values, outcome).statistic)) for name, values in trivial.items())
    return [f"{name}: rho {rho:+.2f}" for name, rho in rhos]


def b2(sets: Sequence[PairSet]) -> str:
    """Whether sets that pass gate B2 end with less hacking than those that fail."""
    before = scored()
    passing, failing = (
        [s.outcome for s in sets if before[s.name]["verdict"] == verdict] for verdict in ("passes", "fails")
    )

    def difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - b.mean(axis)

    found = stats.permutation_test(
        (passing, failing), difference, vectorized=True, alternative="less", n_resamples=20_000,
        random_state=np.random.default_rng(0),
    )  # fmt: skip
    holds = found.statistic <= -B2_EFFECT and found.pvalue < LEVEL
    means = f"{len(passing)} pass, Δ hack {fmean(passing):+.3f}; {len(failing)} fail, {fmean(failing):+.3f}"
    return f"gate B2: {means}; {shown(found.pvalue)}: {'OF USE' if holds else 'NOT SHOWN'}"


def scored() -> dict[str, Any]:
    """What `score` said of each set, at the first pool."""
    found: dict[str, Any] = json.loads((HERE / "before.json").read_text())["directions"]
    return found


def document(name: str) -> Any:
    return json.loads((HERE / "sets" / f"{name}.json").read_text())


def pairs_of(name: str) -> int:
    return len(document(name)["pairs"])


def length_ratio(name: str) -> float:
    return fmean(len(pair["hack"]) / len(pair["clean"]) for pair in document(name)["pairs"])


def table(sets: Sequence[PairSet]) -> str:
    before = scored()
    rows = [
        [s.name, f"{s.auroc:.3f}", f"{s.slope:.2f}", before[s.name]["verdict"], len(s.change)]
        + [f"{s.outcome:+.3f}", " ".join(f"{d:+.2f}" for d in s.change.values())]
        + [f"{fmean(s.solve.values()):.3f}", f"{s.removed:.3f}"]
        for s in sorted(sets, key=lambda s: s.slope)
    ]
    headers = ["pairs", "AUROC", "hack slope", "B2", "seeds", "Δ hack", "by seed", "solve", "removed"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def draw(sets: Sequence[PairSet], out: Path) -> None:
    """Δ hack of every run against what the base model said before."""
    nulls = [null for one in scored().values() if one["kind"] == "gradient" for null in nulls_of(one)]
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, index in ((left, "auroc", 0), (right, "slope", 1)):
        low, high = np.percentile([null[index] for null in nulls if null[index] is not None], BAND)
        axes.axvspan(low, high, color="#999999", alpha=0.25, linewidth=0)
        axes.axhline(0, color="#595959", linewidth=1)
        for kind, (colour, marker) in LOOKS.items():
            own = [(getattr(s, name), d) for s in sets if s.name.startswith(kind) for d in s.change.values()]
            axes.scatter(*zip(*own, strict=True), color=colour, marker=marker, s=24, label=kind)
    left.set(xlabel="AUROC of the direction on the base model", ylabel="hack as deployed, minus that of none")
    right.set_xlabel("hack slope left by erase, on the base model")
    right.legend(frameon=False, loc="lower right")
    figure.savefig(out, dpi=120, metadata={"Software": None})


def nulls_of(one: Mapping[str, Any]) -> list[tuple[float, float | None]]:
    kinds = ("haar", "shuffled")
    return [
        pair for kind in kinds for pair in zip(one["nulls"][kind], one["null_hack_slopes"][kind], strict=True)
    ]


def text() -> str:
    """Table and verdicts, as they stand in docs/results.md."""
    sets = pair_sets()
    verdicts = [foretells(sets, "slope"), foretells(sets, "auroc"), b2(sets)]
    lines = [*verdicts, *(f"beside it, {line}" for line in beside(sets))]
    return "\n".join([table(sets), "", *(f"- {line}" for line in lines)])


if __name__ == "__main__":
    print(text())
    draw(
        pair_sets(), Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[1] / "pictures" / "foretold.png"
    )
