"""Pictures as PNG and SVG. Colours are safe for colour-blind readers; lines and markers tell the same."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from projected_grpo.basis_file import HARD_GATE, SOFT_GATE, HeldOut
from projected_grpo.runlog import write_atomically

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#595959"
# Okabe and Ito's colours; line style, marker and hatch tell the same again, each alone, for grey print.
COLOURS = ("#000000", "#009e73", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#cc79a7", "#999999")
DASHES: tuple[Any, ...] = (
    "-", (0, (1, 1.2)), (0, (6, 1.5)), (0, (2.5, 1.5)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (9, 2, 2, 2)),
    (0, (4, 3)),
)  # fmt: skip
MORE_DASHES = ((0, (1, 3)), (0, (7, 4)), (0, (12, 1.5, 1, 1.5)))  # for every further round of colours
MARKERS = ("o", "*", "s", "P", "^", "v", "D", "X")
MORE_MARKERS = ("<", ">", "h")
HATCHES = ("", "///", "...", "\\\\\\", "xx", "--", "++", "oo")
# A step's columns on one scale of cosines: how each is drawn.
COSINES: Mapping[str, tuple[str, str, str]] = {
    "cos_pre": ("before the arm (cin)", BLUE, "-"),
    "cos_post": ("after the arm (cout)", ORANGE, "--"),
    "cos_update": ("of the change made", "#009e73", "-."),
    "cos_null": ("of a random direction", GREY, ":"),
}


@dataclass(frozen=True)
class Series:
    """A figure per step for every seed of an arm (NaN where not measured), and evaluations at some steps."""

    name: str
    seeds: Sequence[Sequence[float]]
    evaluations: Sequence[Mapping[int, float]] = ()


@dataclass(frozen=True)
class Point:
    """One run: held-out hack and solve rates as deployed."""

    name: str
    hack: float
    solve: float


@dataclass(frozen=True)
class Bar:
    """One arm on one mode: rate per seed as deployed and as trained, and whether the mode was held out."""

    name: str
    mode: str
    deployed: Sequence[float]
    trained: Sequence[float]
    in_distribution: bool


@dataclass(frozen=True)
class Look:
    colour: str
    dash: Any
    marker: str
    hatch: str = ""


def look(index: int) -> Look:
    """Of the arm at this place; every round of colours has lines and markers of its own."""
    place, turn = index % len(COLOURS), index // len(COLOURS)
    if turn == 0:
        return Look(COLOURS[place], DASHES[place], MARKERS[place], HATCHES[place])
    more = (turn - 1) % len(MORE_DASHES)
    return Look(COLOURS[place], MORE_DASHES[more], MORE_MARKERS[more], HATCHES[place] + "*" * (more + 1))


def looks(names: Iterable[str], arms: Iterable[str] = ()) -> dict[str, Look]:
    """Of these arms by their place in `arms`, which pictures of the same runs share; others come behind."""
    order = list(dict.fromkeys([*arms, *(names := list(names))]))
    return {name: look(order.index(name)) for name in dict.fromkeys(names)}


def heldout_histogram(result: HeldOut, title: str, path: Path) -> None:
    """Histogram of the held-out cosines with zero, the mean and both gates."""
    figure = _figure(6.0, 3.6)
    axes = figure.add_subplot()
    axes.hist(result.cosines, bins=40, range=(-1, 1), color=BLUE)
    axes.axvline(0, color=GREY, linewidth=1)
    label = f"mean {result.mean:+.2f} (soft gate {SOFT_GATE})"
    axes.axvline(result.mean, color=ORANGE, linewidth=2, linestyle="--", label=label)
    axes.set(
        xlabel="cosine of a held-out pair's difference with the hack-ward direction of its module",
        ylabel="modules x pairs",
        title=f"{title}\n{result.fraction_positive:.0%} above 0 (hard gate {HARD_GATE:.0%})",
        xlim=(-1, 1),
    )
    axes.legend(frameon=False)
    _save(figure, path)


def separations(directions: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """How well each direction of `score` tells exploits apart, and what erasing it would do to hacks.

    Left: AUROC with its interval, and that of every draw of its nulls. Right: the foretold slopes of hacks
    (full) and of right answers (open), 1 where nothing is changed.
    """
    names = list(directions)[::-1]
    figure = _figure(9.0, 1.6 + 0.45 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(names):
        one = directions[name]
        for control, marker in (("haar", "|"), ("shuffled", "x")):
            draws = one["nulls"][control]
            left.scatter(draws, [place] * len(draws), marker=marker, s=30, linewidths=0.8, color="#999999")
        low, high = one["auroc_interval"] or (one["auroc"], one["auroc"])
        left.plot([low, high], [place, place], color=BLUE, linewidth=2)
        left.scatter([one["auroc"]], [place], color=BLUE, s=36, zorder=3)
        for key, filled in (("hack_slope", ORANGE), ("solve_slope", "white")):
            if one[key] is not None:
                right.scatter([one[key]], [place], facecolor=filled, edgecolor=ORANGE, s=36, zorder=3)
    left.axvline(0.5, color=GREY, linewidth=1)
    right.axvline(1, color=GREY, linewidth=1)
    left.set(
        xlim=(0, 1),
        xlabel="AUROC, exploits against the rest\n| Haar draws, x shuffled pairs",
        ylim=(-0.6, len(names) - 0.4),
        yticks=range(len(names)),
        yticklabels=names,
    )
    right.axvline(0, color=GREY, linewidth=1, linestyle=":")
    right.set_xlabel("first-order slope over that of none\nfull: hacks, open: right answers")
    _save(figure, path)


def dynamics(hack: Sequence[Series], solve: Sequence[Series], path: Path, arms: Iterable[str] = ()) -> None:
    """Student hack and solve rate by step, mean over seeds with a band of one SEM.

    Open markers are held-out evaluations as deployed, mean over the seeds that have one at that step; a full
    one ends each line. `arms` are all that other pictures of these runs may show.
    """
    drawn = looks((line.name for line in hack), arms)
    figure = _figure(11.0, 4.2 + 0.2 * (len(hack) // 4))
    for axes, series, title in zip(figure.subplots(1, 2), (hack, solve), ("hack", "solve"), strict=True):
        for line in series:
            _draw_series(axes, line, drawn[line.name])
        axes.set(xlabel="step", ylabel=f"{title} rate", ylim=(-0.02, 1.02))
        axes.set_title(f"{title}: lines student as trained, open markers held out as deployed", fontsize=9)
        axes.grid(alpha=0.3)
    _legend_below(figure, figure.axes[0], "arm (seeds)")
    _save(figure, path)


def by_step(series: Sequence[Series], ylabel: str, path: Path, arms: Iterable[str] = ()) -> None:
    """One figure by step, mean over seeds with a band of one SEM; `arms` as in `dynamics`."""
    drawn = looks((line.name for line in series), arms)
    figure = _figure(7.0, 4.2 + 0.2 * (len(series) // 3))
    axes = figure.add_subplot()
    for line in series:
        _draw_series(axes, line, drawn[line.name])
    axes.set(xlabel="step", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _legend_below(figure, axes, "arm (seeds)")
    _save(figure, path)


def cosines(
    panels: Mapping[str, Mapping[str, Series]], overlap: Mapping[str, Mapping[int, float]], path: Path
) -> None:
    """A panel per arm: hack-ward shares before and after it, of the change made, of a random direction.

    `panels` holds series by arm and column; `overlap` the mean overlap of old and new basis at each refresh.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(4.2 * columns + 0.8, 3.0 * rows + 0.8)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, series) in zip(grid.flat, panels.items(), strict=False):
        for column, line in series.items():
            shown, colour, dash = COSINES[column]
            _draw_series(axes, line, Look(colour, dash, ""), f"{column}: {shown}")
        steps = overlap.get(name, {})
        if steps:
            label = "refr: overlap of old and new basis"
            axes.plot(list(steps), list(steps.values()), "kx", label=label, markersize=5)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("share of the norm; overlap", fontsize=10)
    found: dict[str, Any] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    order = sorted(found, key=lambda text: [*COSINES, "refr"].index(text.partition(":")[0]))
    figure.legend(
        [found[text] for text in order], order, loc="outside upper center", ncols=min(3, columns), fontsize=8,
        frameon=False,
    )  # fmt: skip
    _save(figure, path)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats: none hacks as little and solves as much, and one of both better."""

    def beats(q: Point, p: Point) -> bool:
        return q.hack <= p.hack and q.solve >= p.solve and (q.hack, q.solve) != (p.hack, p.solve)

    kept = [p for p in points if not any(beats(q, p) for q in points)]
    return sorted(kept, key=lambda p: (p.solve, p.hack))


def pareto(points: Sequence[Point], path: Path, arms: Iterable[str] = ()) -> None:
    """Held-out hack against solve as deployed, a point per run, and the frontier; `arms` as in dynamics."""
    figure = _figure(6.4, 4.8)
    axes = figure.add_subplot()
    best = frontier(points)
    axes.plot(
        [p.solve for p in best], [p.hack for p in best], drawstyle="steps-pre", color=GREY, linewidth=1,
        linestyle="--", label="Pareto frontier", zorder=1,
    )  # fmt: skip
    for name, drawn in looks((p.name for p in points), arms).items():
        own = [p for p in points if p.name == name]
        axes.scatter(
            [p.solve for p in own],
            [p.hack for p in own],
            label=name,
            marker=drawn.marker,
            facecolors="none" if "+" in name or "-" in name else drawn.colour,
            edgecolors=drawn.colour,
            zorder=2,
        )
    axes.set(xlabel="solve rate, deployed (right is better)", ylabel="hack rate, deployed (low is better)")
    axes.grid(alpha=0.3)
    _legend_below(figure, axes, None)
    _save(figure, path)


def mode_bars(hack: Sequence[Bar], solve: Sequence[Bar], path: Path, arms: Iterable[str] = ()) -> None:
    """Rates per mode and arm: bars as deployed, ticks as trained, open bars where the mode was held out.

    Each arm has its hatch; `arms` as in `dynamics`.
    """
    drawn = looks((bar.name for bar in hack), arms)
    names = list(drawn)
    modes = list(dict.fromkeys(bar.mode for bar in hack))
    figure = _figure(max(7.0, 1.0 + len(modes) * max(0.9, 0.24 * len(names))), 6.4)
    panels = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(names)
    for axes, bars, title in zip(panels, (hack, solve), ("hack", "solve"), strict=True):
        for bar in bars:
            x = modes.index(bar.mode) + (names.index(bar.name) + 0.5) * width - 0.4
            axes.bar(
                x,
                fmean(bar.deployed),
                width * 0.92,
                yerr=_sem(bar.deployed) or None,
                **_fill(drawn[bar.name], open_bar=not bar.in_distribution),
                error_kw={"linewidth": 1, "ecolor": GREY},
            )
            if bar.trained:
                ends = [x - width * 0.46, x + width * 0.46]
                # Seen on black bars and on white paper.
                for colour, thick in (("white", 4.0), ("black", 2.0)):
                    axes.plot(ends, [fmean(bar.trained)] * 2, color=colour, lw=thick, solid_capstyle="butt")
        axes.set(ylabel=f"{title} rate", ylim=(0, 1.02), xlim=(-0.6, len(modes) - 0.4))
        axes.set_xticks(range(len(modes)), modes)
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    handles: list[Any] = [Patch(**_fill(drawn[name]), label=name) for name in names]
    handles.append(Line2D([], [], color="black", lw=2.0, label="as trained"))
    if not all(bar.in_distribution for bar in hack):
        handles.append(Patch(facecolor="white", edgecolor="black", label="open: mode held out"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8,
        handlelength=3.0, handleheight=1.6,
    )  # fmt: skip
    _save(figure, path)


def _fill(style: Look, open_bar: bool = False) -> dict[str, Any]:
    """A bar in the arm's colour with its hatch upon it; an open one has colour in edge and hatch alone."""
    face, edge, width = ("white", style.colour, 1.2) if open_bar else (style.colour, "white", 0.6)
    return {"facecolor": face, "edgecolor": edge, "linewidth": width, "hatch": style.hatch}


def _draw_series(axes: Axes, line: Series, style: Look, label: str = "") -> None:
    length = min(map(len, line.seeds))
    columns = [[v for v in (seed[t] for seed in line.seeds) if not math.isnan(v)] for t in range(length)]
    steps = [t for t, column in enumerate(columns) if column]
    mean = [fmean(columns[t]) for t in steps]
    sem = [_sem(columns[t]) for t in steps]
    label = label or f"{line.name} ({len(line.seeds)})"
    evaluated = sorted({t for found in line.evaluations for t in found})
    axes.plot(
        steps,
        mean,
        label=label,
        linewidth=1.8,
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markersize=6,
        markevery=[len(steps) - 1] if steps else [],  # where the line ends, and in the legend
    )
    low = [m - s for m, s in zip(mean, sem, strict=True)]
    high = [m + s for m, s in zip(mean, sem, strict=True)]
    axes.fill_between(steps, low, high, color=style.colour, alpha=0.15, linewidth=0)
    means = [fmean(found[t] for found in line.evaluations if t in found) for t in evaluated]
    axes.plot(
        evaluated, means, linestyle="none", marker=style.marker, markersize=5, markerfacecolor="white",
        markeredgecolor=style.colour,
    )  # fmt: skip


def _sem(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _legend_below(figure: Figure, axes: Axes, title: str | None) -> None:
    """Under the picture, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 4 if figure.get_figwidth() > 8 else 3
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, title=title,
        title_fontsize=8, handlelength=4.5,
    )  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """As `path`.png and `path`.svg."""
    # The same file for the same numbers, whichever version of the library drew it.
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    how: dict[str, Any] = {"png": {"dpi": 120, "metadata": {"Software": None}}, "svg": {"metadata": unsaid}}
    for kind, options in how.items():
        drawn = BytesIO()
        with rc_context({"svg.hashsalt": "projected_grpo"}):
            figure.savefig(drawn, format=kind, **options)
        write_atomically(path.with_name(f"{path.name}.{kind}"), drawn.getvalue())
