"""Draw emergence.png from the study's kept records: `python docs/pictures/emergence.py`.

Hacking as it emerges without an intervention, the arm that stops it, and that arm's random control.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RECORDS = HERE.parent / "results" / "nano"
SEEDS = range(41, 46)  # those that every line has
ERASE = "projected-grpo train nano --intervention=erase"
# The command that made a line's runs, but for its seed: name, colour, dash.
LINES: Mapping[str, tuple[str, str, str]] = {
    "projected-grpo train nano --intervention=none": ("none (no intervention)", "#000000", "-"),
    f"{ERASE} --vhack-pairs-path=nano-sampled --control=haar_matched": (
        "erase+haar_matched (random directions)",
        "#6e6e6e",
        "--",
    ),
    f"{ERASE} --vhack-pairs-path=nano-sampled": ("erase (pairs by the base model)", "#0072b2", "-"),
}
PANELS = {"hack_s": "hack", "gt_s": "solve"}


def rates(column: str) -> dict[str, list[list[float]]]:
    """A column of [count, n] as rates: by the command that made the runs, [seed][step]."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    by_command = {record["command"]: record["steps"][column] for record in records}
    return {
        command: [[count / n for count, n in by_command[f"{command} --seed={seed}"]] for seed in SEEDS]
        for command in LINES
    }


def draw(axes: Axes, seeds: Sequence[Sequence[float]], colour: str, dash: str, name: str) -> None:
    """Mean over seeds by step, and a band of one standard error of it."""
    steps = range(len(seeds[0]))
    at = [[seed[t] for seed in seeds] for t in steps]
    mean = [fmean(values) for values in at]
    sem = [stdev(values) / len(values) ** 0.5 for values in at]
    axes.plot(steps, mean, color=colour, linestyle=dash, linewidth=2, label=name)
    low, high = ([m + sign * s for m, s in zip(mean, sem, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def main(out: Path) -> None:
    """Draw both panels into `out`, a PNG file."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (column, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for command, seeds in rates(column).items():
            name, colour, dash = LINES[command]
            draw(axes, seeds, colour, dash, name)
        axes.set(xlabel="step", ylim=(0, 1), xlim=(0, 47), title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the step's 64 completions")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    figure.savefig(out, dpi=95, metadata={"Software": None})  # the same file for the same numbers


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "emergence.png")
