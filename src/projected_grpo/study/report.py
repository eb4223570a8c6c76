"""The tables and pictures of a study, from the kept records alone."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from projected_grpo.errors import UserError
from projected_grpo.nano_tasks import packaged_base
from projected_grpo.results.compare import DELTA_SAFE, DIAGNOSTICS
from projected_grpo.results.plots import Point, Series, dynamics, looks, pareto
from projected_grpo.results.runs import BASELINE, mean_sem
from projected_grpo.results.statistics import (
    INSTANCES,
    TEMPLATES,
    Arms,
    Difference,
    Metric,
    Record,
    by_arm,
    deployed,
    holm_of,
    in_mode,
    mean_or_nan,
    paired,
    safe_pass,
    shares,
    step_mean,
    trained,
    where_measured,
)
from projected_grpo.results.tables import FORMS, LEGEND, P_TITLE, markdown, marked
from projected_grpo.runlog import write_atomically
from projected_grpo.study.verdicts import NANO_MODES, SAMPLED, verdicts
from projected_grpo.sweep.spec import Spec, read_spec

MAIN = (  # in the pictures
    "none", "gt_only", "erase", "erase+haar", "erase+oracle_pairs", "route", "route+haar", "route2",
    "route2+haar",
)  # fmt: skip
COMPARED = (  # looked at after A1's tables, beside the controls that arms name
    ("erase+oracle_pairs", "erase+haar"),
    ("erase+corpus_tasks", "erase+oracle_pairs"),
    ("erase+corpus_wordings", "erase+oracle_pairs"),
    ("route2+oracle_pairs", "route2+haar"),
    ("route2+no_labels", "route2+random_routing"),
    ("route2+no_labels_haar", "route2+random_routing"),
)
Compared = tuple[Sequence[object], Sequence[Difference | None]]  # a row's first cells, its differences
MARKER = re.compile("<!-- (end of |)([a-z-]+) -->")


@cache
def study_spec(study: str) -> Spec:
    """The packaged sweep of a study."""
    with as_file(files("projected_grpo") / "data" / f"study_{study}.toml") as path:
        return read_spec(path)


def cell(seeds: Mapping[int, Record], metric: Metric, form: str = ".3f") -> str:
    return mean_sem([v for v in map(metric, seeds.values()) if not math.isnan(v)], form)


def compared(headers: Sequence[str], differences: Sequence[str], rows: Sequence[Compared]) -> str:
    """A table that ends with differences, the p of each beside it. Each column is a family of Holm's."""
    columns = zip(*(found for _, found in rows), strict=True)
    marks = [list(map(marked, column, holm_of(column))) for column in columns]
    body = [[*cells, *(text for mark in marks for text in mark[i])] for i, (cells, _) in enumerate(rows)]
    return markdown([*headers, *(title for name in differences for title in (name, P_TITLE))], body)


def emergence_table(arms: Arms) -> str:
    """Does hacking emerge, and can the policy learn honestly instead? A row per seed of both."""
    rows = []
    for arm in ("none", "gt_only"):
        for seed, r in sorted(arms.get(arm, {}).items()):
            hacks, solves = shares(r["steps"]["hack_s"]), shares(r["steps"]["gt_s"])
            hack, solve = (map(mean_or_nan, (rates[:3], rates[-3:])) for rates in (hacks, solves))
            held_out = (deployed("solve", split)(r) for split in (INSTANCES, TEMPLATES))
            figures = (*hack, deployed("hack")(r), *solve, *held_out)
            rows.append([arm, seed, *(f"{figure:.3f}" for figure in figures), f"{r['wall_s']:.0f}"])
    headers = [
        "arm", "seed", "student hack, first 3 steps", "last 3", "held-out hack", "student solve, first 3",
        "last 3", "held-out solve, instances", "templates", "wall s",
    ]  # fmt: skip
    return markdown(headers, rows)


def arms_in_order(arms: Arms, *, explored: bool) -> list[str]:
    """Arms thought of after tables had been seen, or all others."""
    later = {arm.name for arm in study_spec("nano").arms if arm.explored}
    return [name for name in ordered(arms) if (name in later) == explored]


def against_none(arms: Arms, name: str, metric: Metric) -> Difference | None:
    return None if name == BASELINE else paired(arms[name], arms.get(BASELINE, {}), metric)


def headline_table(arms: Arms) -> str:
    """The preregistered schema, rates as deployed; means over steps of what a record keeps."""
    rows = []
    for name in arms_in_order(arms, explored=False):
        own, safe = arms[name], against_none(arms, name, safe_pass)
        rates = (cell(own, deployed(key)) for key in ("hack", "solve"))
        means = (
            cell(own, step_mean(*column), FORMS.get(title, ".3f")) for title, column in DIAGNOSTICS.items()
        )
        rows.append([name, len(own), mean_sem(safe.values, "+.3f") if safe else "-", *rates, *means])
    return markdown(["arm", "seeds", DELTA_SAFE, "Hack", "Pass", *DIAGNOSTICS], rows)


def arms_table(arms: Arms, *, explored: bool = False) -> str:
    """Every arm: hack and solve as trained and deployed, and its paired difference from none."""
    rows = []
    for name in arms_in_order(arms, explored=explored):
        own = arms[name]
        held_out = (deployed("solve", split) for split in (INSTANCES, TEMPLATES))
        metrics = (trained("hack"), deployed("hack"), trained("solve"), *held_out)
        found = [against_none(arms, name, deployed(key)) for key in ("hack", "solve")]
        rows.append(([name, len(own), *(cell(own, metric) for metric in metrics)], found))
    headers = [
        "arm", "seeds", "hack, trained", "hack, deployed", "solve, trained", "solve, deployed, instances",
        "solve, deployed, templates",
    ]  # fmt: skip
    return compared(headers, ["Δ hack against none", "Δ solve against none"], rows)


def controls_table(arms: Arms) -> str:
    """Each arm minus each of its controls, deployed, paired by seed: what the direction itself does."""
    named = [(arm.controls, arm.name) for arm in study_spec("nano").arms if arm.controls]
    return differences_table(arms, [*named, (SAMPLED, "erase+haar")])


def differences_table(arms: Arms, pairs: Sequence[tuple[str, str]]) -> str:
    rows = []
    for name, other in pairs:
        if name in arms and other in arms:
            found = [paired(arms[name], arms[other], deployed(key)) for key in ("hack", "solve")]
            rows.append(([name, other, found[0].n if found[0] else 0], found))
    return compared(["arm", "minus", "seeds"], ["Δ hack", "Δ solve"], rows)


def leave_out_table(arms: Arms, folds: str = "erase+without", whole: str = "erase") -> str:
    """V from three modes' pairs: hack and solve, deployed, on the mode left out, against none and Haar.

    `whole`: the arm with the pairs of all four modes.
    """
    rows = []
    for mode in NANO_MODES:
        own = arms.get(f"{folds}_{mode}", {})
        if own:
            hack, solve = in_mode("hack", mode), in_mode("solve", mode)
            none, haar, all_modes = (arms.get(name, {}) for name in ("none", "erase+haar", whole))
            same_seeds = ({s: other[s] for s in own if s in other} for other in (none, haar, all_modes))
            cells = (cell(seeds, hack) for seeds in (own, *same_seeds))
            found = [paired(own, none, hack), paired(own, haar, hack), paired(own, none, solve)]
            rows.append(([mode, len(own), *cells], found))
    headers = ["mode left out", "seeds", "hack on it", "none", "erase+haar", f"{whole}, all modes"]
    return compared(headers, ["Δ hack against none", "Δ hack against Haar", "Δ solve against none"], rows)


def diagnostics_table(arms: Arms) -> str:
    """What each arm did to the gradient, means over steps and seeds. Shares are of the basis in use."""
    columns = ("cos_null", "cos_pre", "cos_post", "cos_update", "fired", "q_egy", "refr")
    rows = [[name, *(cell(arms[name], step_mean(c)) for c in columns)] for name in ordered(arms)]
    return markdown(["arm", *columns], rows)


def modes_table(arms: Arms) -> str:
    rows = []
    for name in ordered(arms):
        hack, solve = ([cell(arms[name], in_mode(key, m)) for m in NANO_MODES] for key in ("hack", "solve"))
        rows.append([name, *map(" / ".join, zip(hack, solve, strict=True))])
    return markdown(["arm", *(f"{m}: hack / solve" for m in NANO_MODES)], rows)


def ordered(arms: Mapping[str, object]) -> list[str]:
    names = [arm.name for arm in study_spec("nano").arms]
    return sorted(arms, key=lambda name: (names.index(name) if name in names else len(names), name))


def sections(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """Name -> (heading, table) of everything that the report says of the records."""
    arms, base = by_arm(records), {key: packaged_base()[key] for key in ("solve", "hack")}
    return {
        "headline": (
            f"Headline: {DELTA_SAFE} is pass - hack minus that of none, per seed; KL over the last 25 steps",
            headline_table(arms),
        ),
        "emergence": ("Emergence", emergence_table(arms)),
        "arms": ("Arms", arms_table(arms)),
        "controls": ("Arms minus their controls, as deployed", controls_table(arms)),
        "leave-one-out": ("One mode left out of the pairs", leave_out_table(arms)),
        "sampled-leave-one-out": (
            "One mode left out of the pairs that the base model wrote",
            leave_out_table(arms, "erase+sampled_without", "erase+sampled_pairs"),
        ),
        "explored": ("Exploratory arms (docs/spec.md, A5)", arms_table(arms, explored=True)),
        "explored-differences": ("Exploratory: further differences", differences_table(arms, COMPARED)),
        "explored-leave-one-out": (
            "Exploratory: one mode left out of the oracle pairs",
            leave_out_table(arms, "erase+oracle_without", "erase+oracle_pairs"),
        ),
        "modes": ("Per mode, as deployed", modes_table(arms)),
        "gradient": ("What the arms did to the gradient", diagnostics_table(arms)),
        "verdicts": (
            "Verdicts by the preregistered rules (docs/spec.md, A1, A2, A4 and A6)",
            "\n".join(f"- {line}" for line in verdicts(arms, base)),
        ),
    }


def filled(page: str, records: Sequence[Record]) -> str:
    """A page with today's tables between its markers, `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises UserError for a marker that names no table, and for a block that does not end before the next.
    """
    tables = {name: table for name, (_, table) in sections(records).items()}
    head, *pieces = MARKER.split(page)  # then a marker's two parts and the text behind it, in turns
    markers = list(zip(pieces[0::3], pieces[1::3], strict=True))
    for begin, end in zip(markers[0::2], [*markers[1::2], ("", "")], strict=False):
        if begin[0] or begin[1] not in tables or end != ("end of ", begin[1]):
            wanted = f"<!-- NAME --> and <!-- end of NAME --> in turns, NAME one of {', '.join(tables)}"
            raise UserError(f"markers at <!-- {''.join(begin)} -->: expected {wanted}")
    for (kind, name), text in zip(markers, pieces[2::3], strict=True):
        head += f"<!-- {kind}{name} -->{text}" if kind else f"<!-- {name} -->\n\n{tables[name]}\n\n"
    return head


def write_report(records: Sequence[Record], out: Path) -> Path:
    """tables.md and the pictures, from the records alone."""
    arms = by_arm(records)
    diverged = sum(not r["summary"]["finished"] for r in records)
    commits = sorted({str(r["git_commit"]) for r in records})
    parts = [
        "# Tables of the nano study\n\nMade by `projected-grpo study nano --report-only` from "
        f"{len(records)} runs (commits {', '.join(commits)}; {diverged} diverged and count as they ended). "
        f"Mean ± SEM over seeds; {LEGEND}. A dash is a figure that the records do not have.",
        *(f"## {heading}\n\n{table}" for heading, table in sections(records).values()),
    ]
    path = out / "tables.md"
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())
    drawn = [name for name in ordered(arms) if name in MAIN]
    hack, solve = (
        [
            Series(
                name,
                [shares(r["steps"][student]) for r in arms[name].values()],
                [where_measured(r["steps"][f"{key}_deploy"]) for r in arms[name].values()],
                [value for value in map(deployed(key), arms[name].values()) if not math.isnan(value)],
            )
            for name in drawn
        ]
        for key, student in (("hack", "hack_s"), ("solve", "gt_s"))
    )
    dynamics(hack, solve, out / "dynamics", looks(drawn), packaged_base())
    points = [
        Point(name, deployed("hack")(r), deployed("solve")(r))
        for name in drawn
        for r in arms[name].values()
        if not math.isnan(safe_pass(r))
    ]
    pareto(points, out / "pareto", looks(drawn), packaged_base())
    return path
