"""Pictures. Only what a run or a check writes by itself; colours are safe for colour-blind readers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from projected_grpo.extract_vhack_grad import HARD_GATE, SOFT_GATE, HeldOut

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#595959"
# Okabe and Ito's colours; line style and marker tell the same again, for grey print.
COLOURS = ("#000000", "#009e73", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#cc79a7", "#999999")
DASHES = ("-", ":", "-", "--", "-", "--", "-", "--")
MARKERS = ("o", "*", "s", "s", "^", "^", "D", "D")


@dataclass(frozen=True)
class Series:
    """A rate per step for every seed of an arm."""

    name: str
    seeds: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Point:
    """One run: held-out hack and solve rates as deployed."""

    name: str
    hack: float
    solve: float


def heldout_histogram(result: HeldOut, title: str, path: Path) -> None:
    """Histogram of the held-out cosines with zero, the mean and both gates, as PNG."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(result.cosines, bins=40, range=(-1, 1), color=BLUE)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.axvline(
        result.mean, color=ORANGE, linewidth=2, label=f"mean {result.mean:+.2f} (soft gate {SOFT_GATE})"
    )
    axes.set(
        xlabel="cosine of a held-out pair's difference with the hack-ward direction of its module",
        ylabel="modules x pairs",
        title=f"{title}\n{result.fraction_positive:.0%} above 0 (hard gate {HARD_GATE:.0%})",
        xlim=(-1, 1),
    )
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def dynamics(hack: Sequence[Series], solve: Sequence[Series], path: Path) -> None:
    """Student hack and solve rate by step, mean over seeds with a band of one SEM, as PNG and SVG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, series, title in zip(figure.subplots(1, 2), (hack, solve), ("hack", "solve"), strict=True):
        for i, line in enumerate(series):
            length = min(map(len, line.seeds))
            columns = [[seed[t] for seed in line.seeds] for t in range(length)]
            mean = [fmean(c) for c in columns]
            sem = [stdev(c) / len(c) ** 0.5 if len(c) > 1 else 0.0 for c in columns]
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            axes.plot(range(length), mean, label=f"{line.name} ({len(line.seeds)})", linewidth=1.8, **style)
            low = [m - s for m, s in zip(mean, sem, strict=True)]
            high = [m + s for m, s in zip(mean, sem, strict=True)]
            axes.fill_between(range(length), low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel=f"student {title} rate", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8, title="arm (seeds)", title_fontsize=8)
    _save(figure, path)


def pareto(points: Sequence[Point], path: Path) -> None:
    """Held-out hack against solve as deployed, a point per run, as PNG and SVG."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(p.name for p in points))
    for i, name in enumerate(names):
        own = [p for p in points if p.name == name]
        axes.scatter(
            [p.solve for p in own],
            [p.hack for p in own],
            label=name,
            marker=MARKERS[i % len(MARKERS)],
            facecolors="none" if "+" in name else COLOURS[i % len(COLOURS)],
            edgecolors=COLOURS[i % len(COLOURS)],
        )
    axes.set(xlabel="solve rate, deployed (right is better)", ylabel="hack rate, deployed (low is better)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    with rc_context({"svg.hashsalt": "projected_grpo"}):  # the same file for the same numbers
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
