"""Estimates as text: markdown and LaTeX for readers, CSV and JSON for programs."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate

from projected_grpo.results.compare import FEWEST, Estimate
from projected_grpo.results.runs import Setting, mean_sem

Format = Literal["markdown", "csv", "latex", "json"]
CONTEXT = ("preset", "model", "problems", "env_mode", "steps")
TITLES = {
    "rates": "Rates: student (whole run, last 5 steps) and held-out",
    "headline": "Headline: ΔSafePass is pass - hack minus that of none, per seed; KL over the last 25 steps",
    "paired": "Paired differences per seed, with bootstrap 95% intervals",
    "modes": "Held-out rates per mode",
}
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
    metrics = list(dict.fromkeys(e.metric for e in estimates))
    rows = _rows(estimates)
    columns = {
        "options": [s.arm_options for s, *_ in rows],
        "minus": [against if name == "paired" else "" for *_, against in rows],
        "policy": [policy for _, policy, _, _ in rows],
        "of": [of for _, _, of, _ in rows],
    }
    used = {title: cells for title, cells in columns.items() if any(cells)}
    body = [
        [
            setting.arm,
            *(cells[i] for cells in used.values()),
            " ".join(map(str, own[0].by_seed if name == "paired" else own[0].seeds)),
            *(cell(e) for e in own),
        ]
        for i, ((setting, *_), own) in enumerate(rows.items())
    ]
    title = f"{TITLES[name]} ({estimates[0].setting.title})"
    return Table(title, ["arm", *used, "seeds", *metrics], body)


def _rows(estimates: Sequence[Estimate]) -> dict[Row, list[Estimate]]:
    rows: dict[Row, list[Estimate]] = {}
    for e in estimates:
        against = e.against if e.table == "paired" else ""
        rows.setdefault((e.setting, e.policy, e.of, against), []).append(e)
    return rows


def cell(e: Estimate) -> str:
    """Mean ± SEM; of a paired difference its interval, or why there is none."""
    form = FORMS.get(e.metric, "+.3f" if e.against else ".3f")
    if e.table != "paired" or e.mean is None:
        text = mean_sem(list(e.by_seed.values()), form)
        return text.replace("± +", "± ")
    if e.interval is None:
        return f"{e.mean:{form}} (n={len(e.by_seed)} < {FEWEST}: no interval)"
    return f"{e.mean:{form}} [{e.interval[0]:{form}}, {e.interval[1]:{form}}]"


def flat(e: Estimate) -> dict[str, Any]:
    s = e.setting
    low, high = e.interval or (None, None)
    return {
        "table": e.table,
        **{name: getattr(s, name) for name in (*CONTEXT, "arm", "options")},
        **{"policy": e.policy, "of": e.of, "against": e.against, "metric": e.metric},
        **{"mean": e.mean, "sem": e.sem, "low": low, "high": high, "n": len(e.by_seed)},
        "seeds": " ".join(map(str, e.by_seed)),
    }


def render(kind: Format, estimates: Sequence[Estimate], notes: Sequence[str]) -> str:
    """All tables in one text. Markdown begins with the rates, if they are among the estimates."""
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
    for plain, tex in LATEX:
        text = text.replace(plain, tex)
    return re.sub(r"(?<![\w.{$-])-(?=\d)", "$-$", text)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys; an empty field is a missing value."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")
