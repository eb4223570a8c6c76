"""Pictures as PNG, SVG and PDF. Colours are safe for the colour-blind; lines and markers tell the same."""

import math
import re
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from projected_grpo.basis_file import HARD_GATE, SOFT_GATE, HeldOut
from projected_grpo.results.statistics import t_interval
from projected_grpo.runlog import write_atomically

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#595959"
# Okabe and Ito's colours, the grey darker, lest it be the pink's; line style and marker tell the same again,
# each alone, for grey print.
COLOURS = ("#000000", "#009e73", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#cc79a7", "#6e6e6e")
DASHES: tuple[Any, ...] = (
    "-", (0, (1, 1.2)), (0, (6, 1.5)), (0, (2.5, 1.5)), "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (9, 2, 2, 2)),
    (0, (4, 3)),
)  # fmt: skip
MORE_DASHES = ((0, (12, 1.5, 1, 1.5)), (0, (7, 4)), (0, (1.5, 2.5)))  # for every further round of colours
MARKERS = ("o", "*", "s", "P", "^", "v", "D", "X")
MORE_MARKERS = ("<", ">", "h", *MARKERS)  # open, the others are full
# Places of arms: a column has one colour, each row after the first is a further round.
FIXED = {
    name: place
    for place, name in enumerate((
        "none", "gt_only", "erase", "erase+haar", "route2", "route",
        "erase pairs=nano-sampled", "erase+haar_matched",
        "", "gt_penalty", "posthoc", "erase+shuffled", "route2+haar", "route+haar", "advmod", "inoculation",
        "", "gt_screening", "", "", "", "", "absorb", "",
    ))
    if name
}  # fmt: skip
RATES = (-0.02, 1.02)  # the axis of a rate: markers at 0 and 1 are whole
MANY = 8  # lines up to which each has its band
LEGEND_WIDTH = 100  # characters of a name in a legend before it goes on below
# A step's columns on one scale of cosines: how each is drawn.
COSINES: Mapping[str, tuple[str, str, str]] = {
    "cos_pre": ("before the arm (cin)", BLUE, "-"),
    "cos_post": ("after the arm (cout)", ORANGE, "--"),
    "cos_update": ("of the change made", "#009e73", "-."),
    "cos_null": ("of a random direction", GREY, ":"),
}


BASE: Mapping[str, Any] = {"color": "black", "marker": "$B$", "markersize": 9, "linestyle": "none"}


@dataclass(frozen=True)
class Series:
    """A figure per step and seed of an arm, NaN where not measured; held out: at some steps, and the last."""

    name: str
    seeds: Sequence[Sequence[float]]
    evaluations: Sequence[Mapping[int, float]] = ()
    final: Sequence[float] = ()


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
    """How an arm is drawn: its line and its marker, full or open."""

    colour: str
    dash: Any
    marker: str
    full: bool = True


def look(index: int) -> Look:
    """Of the arm at this place; every round of colours has lines and markers of its own."""
    place, turn = index % len(COLOURS), index // len(COLOURS)
    if turn == 0:
        return Look(COLOURS[place], DASHES[place], MARKERS[place])
    dash, marker = MORE_DASHES[(turn - 1) % len(MORE_DASHES)], MORE_MARKERS[(turn - 1) % len(MORE_MARKERS)]
    return Look(COLOURS[place], dash, marker, full=False)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """How each arm is drawn, whichever of these a picture shows. Those in FIXED look the same everywhere.

    The colour of another follows from its name, and is neither black nor that of its intervention.
    """
    places: dict[str, int] = {}
    for name in names:
        own = FIXED.get(re.split("[ +]", name)[0], 0) % len(COLOURS)
        others = [place for place in range(1, len(COLOURS)) if place != own]
        place = others[zlib.crc32(name.encode()) % len(others)]
        taken = {*FIXED.values(), *places.values()}
        places[name] = (
            FIXED[name] if name in FIXED else next(i for i in count(place, len(COLOURS)) if i not in taken)
        )
    return {name: look(place) for name, place in places.items()}


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


def dynamics(
    hack: Sequence[Series],
    solve: Sequence[Series],
    path: Path,
    drawn: Mapping[str, Look],
    base: Mapping[str, Any] | None = None,
) -> None:
    """Student hack and solve rate by step, mean over seeds; the final held-out rates end the lines.

    Open markers are held-out evaluations as deployed, mean over the seeds that have one at that step. `base`:
    both rates of the base model. Bars, and the bands of up to 8 lines, are 95% t intervals over seeds.
    """
    figure = _figure(11.0, 4.4)
    for axes, series, title in zip(figure.subplots(1, 2), (hack, solve), ("hack", "solve"), strict=True):
        last = max((len(seed) - 1 for line in series for seed in line.seeds), default=0)
        room = max(last, 1) * min(0.2, 0.05 + 0.005 * len(series))  # beside the lines' ends
        for place, line in enumerate(series):
            style, shift = drawn[line.name], (place - (len(series) - 1) / 2) * min(0.3, 3 / len(series))
            _draw_series(axes, line, style, band=len(series) <= MANY)
            _draw_points(
                axes, line.evaluations, shift, color=style.colour, marker=style.marker, markersize=4,
                markerfacecolor="white",
            )  # fmt: skip
            _draw_final(axes, line, style, last + room * (place + 1) / len(series))
        if base is not None:
            axes.plot([-room / 2], [base[title]], label="base model, held out", **BASE)
        axes.set(title=title, xlabel="step", ylabel=f"{title} rate", ylim=RATES)
        axes.set_xticks([t for t in axes.get_xticks() if 0 <= t <= last])
        axes.axvspan(last + room * 0.5 / len(series), axes.get_xlim()[1], color=GREY, alpha=0.08, linewidth=0)
        axes.grid(alpha=0.3)
    _legend_below(
        figure,
        figure.axes[0],
        "arm (seeds). Lines: student. Small markers: held out, as deployed; on grey: the final figure."
        f"\nBars, and bands of up to {MANY} lines: 95% t intervals over seeds.",
    )
    _save(figure, path)


def by_step(series: Sequence[Series], ylabel: str, path: Path, drawn: Mapping[str, Look]) -> None:
    """One share by step, mean over seeds, with bands as in `dynamics`."""
    figure = _figure(7.0 if len(series) <= MANY else 11.0, 4.4)
    axes = figure.add_subplot()
    for line in series:
        _draw_series(axes, line, drawn[line.name], band=len(series) <= MANY)
    axes.set(xlabel="step", ylabel=ylabel, ylim=RATES)
    axes.grid(alpha=0.3)
    _legend_below(figure, axes, f"arm (seeds). Bands of up to {MANY} lines: 95% t intervals over seeds.")
    _save(figure, path)


def cosines(
    panels: Mapping[str, Mapping[str, Series]],
    overlap: Mapping[str, Sequence[Mapping[int, float]]],
    path: Path,
) -> None:
    """A panel per arm: hack-ward shares before and after it, of the change made, of a random direction.

    `panels` holds series by arm and column; `overlap` that of old and new basis at each seed's refreshes.
    """
    columns = min(len(panels), max(3, min(6, math.ceil(len(panels) ** 0.5))))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.6 * columns + 0.8, 2.8 * rows + 0.8)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, series) in zip(grid.flat, panels.items(), strict=False):
        for column, line in series.items():
            shown, colour, dash = COSINES[column]
            _draw_series(axes, line, Look(colour, dash, ""), f"{column}: {shown}")
        if any(overlap.get(name, ())):
            label = "refr: overlap of old and new basis"
            _draw_points(axes, overlap[name], 0.0, label=label, color="black", marker="x", markersize=5)
        axes.set_title(textwrap.fill(name, 45), fontsize=8)
        axes.set_ylim(RATES)
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
    _legend(figure, [found[text] for text in order], order, "outside upper center")
    _save(figure, path)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats: none hacks as little and solves as much, and one of both better."""

    def beats(q: Point, p: Point) -> bool:
        return q.hack <= p.hack and q.solve >= p.solve and (q.hack, q.solve) != (p.hack, p.solve)

    kept = [p for p in points if not any(beats(q, p) for q in points)]
    return sorted(kept, key=lambda p: (p.solve, p.hack))


def pareto(
    points: Sequence[Point], path: Path, drawn: Mapping[str, Look], base: Mapping[str, Any] | None = None
) -> None:
    """Held-out hack against solve as deployed: a small point per run, their frontier, each arm's mean.

    The mean of two runs or more has its 95% t intervals over seeds. `base` as in `dynamics`.
    """
    names, best = list(dict.fromkeys(p.name for p in points)), frontier(points)
    figure = _figure(6.8 if len(names) <= MANY else 11.0, 5.4)
    axes = figure.add_subplot()
    axes.plot(
        [p.solve for p in best], [p.hack for p in best], drawstyle="steps-pre", color=GREY, linewidth=1,
        linestyle="--", label="Pareto frontier of the runs", zorder=1,
    )  # fmt: skip
    for name in names:
        own, style = [p for p in points if p.name == name], drawn[name]
        solve, hack = [p.solve for p in own], [p.hack for p in own]
        axes.scatter(solve, hack, s=12, marker=style.marker, alpha=0.5, zorder=2, **_face(style))
        axes.errorbar(
            fmean(solve), fmean(hack), _around(hack), _around(solve), label=f"{name} ({len(own)})",
            linestyle="none", marker=style.marker, markersize=8, ecolor=style.colour, elinewidth=1, zorder=3,
            markerfacecolor=_face(style)["facecolors"], markeredgecolor=style.colour,
        )  # fmt: skip
    if base is not None:
        axes.plot([base["solve"]], [base["hack"]], label="base model", zorder=4, **BASE)
    axes.set(
        xlabel="solve rate, deployed (right is better)",
        ylabel="hack rate, deployed (low is better)",
        xlim=RATES,
        ylim=RATES,
    )
    axes.grid(alpha=0.3)
    _legend_below(
        figure, axes, "arm (seeds). Small: a run; large: their mean, with 95% t intervals over seeds."
    )
    _save(figure, path)


def mode_bars(
    hack: Sequence[Bar],
    solve: Sequence[Bar],
    path: Path,
    drawn: Mapping[str, Look],
    base: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Rates per mode and arm: bars as deployed, ticks as trained, open bars where the mode was held out.

    Both have 95% t intervals over seeds. `base`: the base model's rates by mode, dotted lines.
    """
    names = list(dict.fromkeys(bar.name for bar in hack))
    modes = list(dict.fromkeys(bar.mode for bar in hack))
    shown = [textwrap.fill(name, LEGEND_WIDTH) for name in names]
    longest = max(len(line) for text in shown for line in text.splitlines())
    figure = _figure(0.8 + 0.075 * longest + 1.9 * len(modes), 1.8 + 0.44 * max(3, len(names)))
    grid = figure.subplots(2, len(modes), sharex=True, sharey=True, squeeze=False)
    for row, bars, title in zip(grid, (hack, solve), ("hack", "solve"), strict=True):
        for bar in bars:
            _draw_bar(row[modes.index(bar.mode)], bar, names.index(bar.name), drawn[bar.name].colour)
        for axes, mode in zip(row, modes, strict=True):
            if base is not None and mode in base:
                axes.axvline(base[mode][title], color=GREY, linestyle=":", linewidth=1.5, zorder=0)
            axes.set(xlabel=f"{title} rate", xlim=RATES, ylim=(len(names) - 0.4, -0.6))
            axes.set_yticks(range(len(names)), shown, fontsize=8)
            axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
            axes.grid(alpha=0.3, axis="x")
            axes.set_axisbelow(True)
    for axes, mode in zip(grid[0], modes, strict=True):
        axes.set_title(mode, fontsize=9)
    handles: dict[str, Any] = {
        "as deployed": Patch(facecolor=GREY),
        "as trained": Line2D([], [], color="black", lw=2.0),
    }
    if not all(bar.in_distribution for bar in hack):
        handles["open: mode held out"] = Patch(facecolor="white", edgecolor=GREY)
    if base is not None:
        handles["base model"] = Line2D([], [], color=GREY, linestyle=":")
    _legend(
        figure, list(handles.values()), list(handles), "outside lower center", "95% t intervals over seeds"
    )
    _save(figure, path)


def _draw_bar(axes: Axes, bar: Bar, y: int, colour: str) -> None:
    axes.barh(
        y, fmean(bar.deployed), 0.7, xerr=_around(bar.deployed), edgecolor=colour, linewidth=1.2,
        facecolor=(colour, 0.6) if bar.in_distribution else "white", error_kw={"elinewidth": 1},
    )  # fmt: skip
    if bar.trained:
        mean = fmean(bar.trained)
        # Seen on black bars and on white paper.
        for tone, thick in (("white", 4.0), ("black", 2.0)):
            axes.plot([mean] * 2, [y - 0.35, y + 0.35], color=tone, lw=thick, solid_capstyle="butt")
        if bar.trained != bar.deployed:
            axes.errorbar(mean, y + 0.2, xerr=_around(bar.trained), ecolor="black", elinewidth=1)


def _draw_series(axes: Axes, line: Series, style: Look, label: str = "", band: bool = True) -> None:
    length = min(map(len, line.seeds))
    columns = [[v for v in (seed[t] for seed in line.seeds) if not math.isnan(v)] for t in range(length)]
    steps = [t for t, column in enumerate(columns) if column]
    axes.plot(
        steps,
        [fmean(columns[t]) for t in steps],
        label=label or f"{line.name} ({len(line.seeds)})",
        linewidth=1.8,
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markersize=6,
        markerfacecolor=style.colour if style.full else "white",
        markevery=[len(steps) - 1] if steps and not line.final else [],  # at the end, and in the legend
    )
    if band:
        low, high = ([_cut(columns[t])[side] for t in steps] for side in (0, 1))
        axes.fill_between(steps, low, high, color=style.colour, alpha=0.15, linewidth=0)


def _draw_points(axes: Axes, seeds: Sequence[Mapping[int, float]], shift: float, **style: Any) -> None:
    """The mean over the seeds that have a figure at a step, with its interval; `shift` steps beside it."""
    steps = sorted({t for found in seeds for t in found})
    values = [[found[t] for found in seeds if t in found] for t in steps]
    means = [fmean(own) for own in values]
    around = [[abs(_cut(own)[side] - fmean(own)) for own in values] for side in (0, 1)]
    if steps:
        axes.errorbar([t + shift for t in steps], means, around, linestyle="none", elinewidth=0.8, **style)


def _draw_final(axes: Axes, line: Series, style: Look, x: float) -> None:
    """The last figure of all beside the line's end, and what joins them."""
    if not line.final:
        return
    ends = [v for v in (seed[-1] for seed in line.seeds if seed) if not math.isnan(v)]
    if ends:
        joined = [fmean(ends), fmean(line.final)]
        axes.plot([max(map(len, line.seeds)) - 1, x], joined, color=style.colour, linewidth=0.6, alpha=0.6)
    axes.errorbar(
        x, fmean(line.final), _around(line.final), linestyle="none", elinewidth=1.2, color=style.colour,
        marker=style.marker, markersize=7, markerfacecolor=_face(style)["facecolors"], zorder=3,
    )  # fmt: skip


def _face(style: Look) -> dict[str, Any]:
    return {"facecolors": style.colour if style.full else "white", "edgecolors": style.colour}


def _cut(values: Sequence[float]) -> tuple[float, float]:
    """The interval of a mean of rates, within 0 and 1; of one seed without width."""
    low, high = t_interval(values) or (fmean(values),) * 2
    return max(0.0, low), min(1.0, high)


def _around(values: Sequence[float]) -> list[list[float]] | None:
    """How far the interval reaches below and above the mean; None of one seed."""
    if t_interval(values) is None:
        return None
    low, high = _cut(values)
    return [[abs(fmean(values) - low)], [abs(high - fmean(values))]]


def _legend_below(figure: Figure, axes: Axes, title: str) -> None:
    """Under the picture, where it hides nothing."""
    _legend(figure, *axes.get_legend_handles_labels(), "outside lower center", title)


def _legend(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], place: Any, title: str | None = None
) -> None:
    """In as many columns as fit beside one another; the figure grows by its height."""
    names = [textwrap.fill(label, LEGEND_WIDTH) for label in labels]
    wide = figure.bbox.width
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(
            handles, names, loc=place, ncols=columns, frameon=False, fontsize=8, title=title,
            title_fontsize=8, handlelength=4.5,
        )  # fmt: skip
        box = legend.get_window_extent()
        if box.width <= wide or columns == 1:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, box.width / figure.dpi + 0.2), height + box.height / figure.dpi)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """As `path`.png, `path`.svg and `path`.pdf."""
    # The same file for the same numbers, whichever version of the library drew it.
    svg = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    pdf = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    how: dict[str, dict[str, Any]] = {
        "png": {"dpi": 120, "metadata": {"Software": None}},
        "svg": {"metadata": svg},
        "pdf": {"metadata": pdf},
    }
    for kind, options in how.items():
        drawn = BytesIO()
        with rc_context({"svg.hashsalt": "projected_grpo", "pdf.fonttype": 42}):
            figure.savefig(drawn, format=kind, **options)
        write_atomically(path.with_name(f"{path.name}.{kind}"), drawn.getvalue())
