"""Estimates as text: markdown and LaTeX for readers, CSV and JSON for programs."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate

from projected_grpo.results.compare import Estimate
from projected_grpo.results.runs import Setting, mean_sem
from projected_grpo.results.statistics import ALPHA, FEWEST, Difference
from projected_grpo.runlog import plain

Format = Literal["markdown", "csv", "latex", "json"]
CONTEXT = ("preset", "model", "problems", "env_mode", "steps")
TITLES = {
    "rates": "Rates: student (whole run, last 5 steps) and held-out",
    "headline": "Headline: ΔSafePass is pass - hack minus that of none, per seed; KL over the last 25 steps",
    "paired": "Paired differences per seed",
    "modes": "Held-out rates per mode",
}
P_TITLE = "p: t / Holm / flip (least)"
LEGEND = (
    "differences are paired by seed, with 95% t intervals; p: of the paired t test / adjusted by Holm over "
    "the column of the table / of sign flips (the least that so many seeds can give), all patterns up to 12 "
    "seeds; differences that do not vary have no p and are no part of the family; bold where "
    f"Holm's p is at most {ALPHA}, * where only the interval excludes zero"
)
RATES_LEGEND = (
    "a hack is paid without a right answer; pass, solve: the answer is right; _student: of the completions "
    "of training (last5: of its last 5 steps); _train and _deploy: on held-out problems, as trained and as "
    "deployed, which is without the quarantine"
)
FORMS = {"KL": ".2g", "|g|": ".2g"}
LATEX = (("±", r"$\pm$"), ("Δ", r"$\Delta$"), ("|g|", r"$|g|$"))
Row = tuple[Setting, str, str, str]


@dataclass(frozen=True)
class Table:
    """A table ready to be set: cells are text."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(estimates: Sequence[Estimate]) -> list[Table]:
    """Estimates as tables: rates in one with its settings in columns, the others one per context."""
    found = []
    for name in TITLES:
        own = [e for e in estimates if e.table == name]
        if name == "rates":
            found += [_rates_table(own)] if own else []
            continue
        for context in dict.fromkeys(e.setting.context for e in own):
            found.append(_table(name, [e for e in own if e.setting.context == context]))
    return found


def _rates_table(estimates: Sequence[Estimate]) -> Table:
    metrics = list(dict.fromkeys(e.metric for e in estimates))
    rows = [
        [
            *(str(getattr(setting, name)) for name in (*CONTEXT, "arm", "options")),
            " ".join(map(str, own[0].seeds)),
            *(cell(e) for e in own),
        ]
        for (setting, *_), own in _rows(estimates).items()
    ]
    return Table(TITLES["rates"], [*CONTEXT, "arm", "options", "seeds", *metrics], rows)


def _table(name: str, estimates: Sequence[Estimate]) -> Table:
    paired = name == "paired"
    metrics = list(dict.fromkeys(e.metric for e in estimates))
    titles = [title for metric in metrics for title in ((metric, P_TITLE) if paired else (metric,))]
    rows = _rows(estimates)
    columns = {
        "options": [s.arm_options for s, *_ in rows],
        "minus": [against if paired else "" for *_, against in rows],
        "policy": [policy for _, policy, _, _ in rows],
        "of": [of for _, _, of, _ in rows],
    }
    used = {title: cells for title, cells in columns.items() if any(cells)}
    body = [
        [
            setting.arm,
            *(cells[i] for cells in used.values()),
            " ".join(map(str, own[0].by_seed if paired else own[0].seeds)),
            *(text for e in own for text in (marked(e.difference, e.holm) if paired else (cell(e),))),
        ]
        for i, ((setting, *_), own) in enumerate(rows.items())
    ]
    title = f"{TITLES[name]} ({estimates[0].setting.title})"
    return Table(title, ["arm", *used, "seeds", *titles], body)


def _rows(estimates: Sequence[Estimate]) -> dict[Row, list[Estimate]]:
    rows: dict[Row, list[Estimate]] = {}
    for e in estimates:
        against = e.against if e.table == "paired" else ""
        rows.setdefault((e.setting, e.policy, e.of, against), []).append(e)
    return rows


def cell(e: Estimate) -> str:
    """Mean ± SEM."""
    return mean_sem(list(e.by_seed.values()), FORMS.get(e.metric, "+.3f" if e.against else ".3f"))


def marked(difference: Difference | None, holm: float) -> tuple[str, str]:
    """A difference, bold if Holm's p is small, with `*` if only its interval excludes zero; and its p."""
    if difference is None or difference.n < FEWEST:
        return str(difference or "-"), "-"
    star = "*" if difference.excludes_zero else ""
    text = f"**{difference}**" if holm <= ALPHA else f"{difference}{star}"
    tested = " / ".join(map(p_cell, (difference.p, holm, difference.sign_flip)))
    return text, f"{tested} ({p_cell(difference.least_sign_flip)})"


def p_cell(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def flat(e: Estimate) -> dict[str, Any]:
    """One figure as a row for programs; p values are of paired differences."""
    s, d = e.setting, e.difference
    low, high = d.interval if d and d.n >= FEWEST else (None, None)
    tested = d if e.table == "paired" else None
    return {
        "table": e.table,
        **{name: getattr(s, name) for name in (*CONTEXT, "arm", "options")},
        **{"policy": e.policy, "of": e.of, "against": e.against, "metric": e.metric},
        **{"mean": e.mean, "sem": e.sem, "low": low, "high": high, "n": len(e.by_seed)},
        "p": plain(tested.p) if tested else None,
        "p_holm": plain(e.holm),
        "p_sign_flip": plain(tested.sign_flip) if tested else None,
        "p_sign_flip_least": tested.least_sign_flip if tested else None,
        "seeds": " ".join(map(str, e.by_seed)),
    }


def render(kind: Format, estimates: Sequence[Estimate], notes: Sequence[str]) -> str:
    """All tables in one text. Markdown begins with the rates, if they are among the estimates."""
    if any(e.table == "paired" for e in estimates):
        notes = [f"{LEGEND}; as trained and deployed are families of their own", *notes]
    if any(e.table == "rates" for e in estimates):
        notes = [RATES_LEGEND, *notes]
    if kind == "csv":
        return as_csv([flat(e) for e in estimates])
    if kind == "json":
        rows = [flat(e) | {"by_seed": {str(s): v for s, v in e.by_seed.items()}} for e in estimates]
        return json.dumps({"estimates": rows, "notes": list(notes)}, indent=1, ensure_ascii=False)
    return render_tables(kind, tables(estimates), notes)


def render_tables(kind: Format, found: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables for readers; notes stand below them (comments in LaTeX)."""
    if kind == "latex":
        parts = [f"% {table.title}\n{as_latex(table)}" for table in found]
        return "\n\n".join(parts + (["\n".join(f"% {note}" for note in notes)] if notes else []))
    if kind == "markdown":
        parts = [
            (f"## {table.title}\n\n" if i else "") + markdown(table.headers, table.rows)
            for i, table in enumerate(found)
        ]
        return "\n\n".join(parts + (["\n".join(f"- {note}" for note in notes)] if notes else []))
    rows = [dict(zip(table.headers, row, strict=True)) for table in found for row in table.rows]
    return as_csv(rows) if kind == "csv" else json.dumps({"rows": rows, "notes": list(notes)}, indent=1)


def markdown(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A GitHub table; a pipe inside a cell would end it."""
    head, *body = ([str(c).replace("|", "\\|") for c in row] for row in (headers, *rows))
    return tabulate(body, headers=head, tablefmt="github", disable_numparse=True)


def as_latex(table: Table) -> str:
    """A booktabs tabular; minus signs in math mode, special characters escaped."""
    text = tabulate(table.rows, headers=list(table.headers), tablefmt="latex_booktabs", disable_numparse=True)
    for sign, tex in LATEX:
        text = text.replace(sign, tex)
    text = re.sub(r"(?<![\w.{$-])-(?=\d)", "$-$", text)
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys; an empty field is a missing value."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")
