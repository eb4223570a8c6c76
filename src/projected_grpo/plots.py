"""Pictures. Only what a run or a check writes by itself; colours are safe for colour-blind readers."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from projected_grpo.extract_vhack_grad import HARD_GATE, SOFT_GATE, HeldOut

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#595959"


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
