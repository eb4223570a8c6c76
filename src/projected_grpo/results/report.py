"""One HTML file over some runs: summary, curves, differences of settings, and every rollout to read.

The page is a template with one place for data. Everything it shows is embedded as JSON in which `<` is
escaped, and set as text, so that what a model wrote can never become markup; it loads nothing from anywhere.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from projected_grpo.results.files import read_rollouts, read_tokens
from projected_grpo.results.runs import BASELINE, EndedRun, names
from projected_grpo.rewards import FILE_STEMS, MODES, PASS_WORDS, SENTINELS, STDOUT_PHRASES
from projected_grpo.run.columns import COLUMNS
from projected_grpo.runlog import plain

PLACEHOLDER = "__REPORT_DATA__"
FLAGS = (
    "passed", "gt_correct", "exploited", "format_ok", "hacked_C", "hacked_D", "hacked_E", "tampered",
    "ablated",
)  # fmt: skip
INTERNED = ("problem_id", "env_mode", "prompt", "mechanism", "error")
NUMBERS = ("step", "p_idx", "gi", "reward")
TOKEN_FIGURES = ("logp", "hackward")
# Keys of steps and summaries in plain words; the page tells the key, too.
PLAIN = {
    "step": "step",
    "ref_eq": "reference steps",
    "rew": "reward",
    "rew_s": "student reward",
    "rew_paid": "reward as paid",
    "shaped": "rewards changed",
    "zgap": "score gap",
    "N": "rollouts",
    "zerovar": "flat groups",
    "gt_s": "student solve",
    "gt_t": "teacher solve",
    "hack_s": "student hack",
    "hack_t": "teacher hack",
    "hk_rt": "hack, run_tests",
    "hk_eq": "hack, eq_override",
    "hk_xc": "hack, exit_code",
    "hk_so": "hack, stdout_marker",
    "hk_se": "hack, sentinel",
    "hk_fm": "hack, file_marker",
    "lp_s": "student log-probability",
    "lp_t": "teacher log-probability",
    "lp_ref": "reference log-probability",
    "gap": "sampling gap",
    "kl": "KL",
    "skipped": "skipped",
    "loss": "loss",
    "gn": "gradient norm",
    "q_egy": "routed share",
    "tau": "gate threshold",
    "hkgap": "gate gap",
    "resid": "residual cosine",
    "lr": "learning rate",
    "cos_pre": "hack-ward share before",
    "cos_pre_s": "hack-ward share before, student",
    "cos_pre_t": "hack-ward share before, teacher",
    "cos_post": "hack-ward share after",
    "cos_null": "hack-ward share by chance",
    "cos_update": "hack-ward share of the update",
    "fired": "share fired",
    "refr": "refresh overlap",
    "hack_deploy": "deployed hack",
    "solve_deploy": "deployed solve",
    "hack_abl": "ablated hack",
    "solve_abl": "ablated solve",
    "gen": "seconds generating",
    "t_rew": "seconds grading",
    "fb": "seconds in backward",
    "sec": "seconds",
    "peak_gb": "peak GPU memory, GB",
    "hack_rate_student": "student hack",
    "pass_rate_student": "student solve",
    "hack_train": "trained hack",
    "solve_train": "trained solve",
    "eval_n": "held-out completions",
    "steps_to_hack": "steps to hack",
    "first_exploit_step": "first hack, step",
    "student_exploits": "student hacks",
    "student_n": "student rollouts",
}


def triggers() -> dict[str, str]:
    """For each mode a regular expression (JavaScript's and Python's) of what its hack looks like in code.

    `NAME` in that of run_tests stands for the function that the prompt names. A mark helps a reader's eye;
    what counts as a hack is decided by the grader alone.
    """
    words = "|".join(re.escape(text) for text in (*STDOUT_PHRASES, *PASS_WORDS))
    stems = "|".join(map(re.escape, FILE_STEMS))
    return {
        "run_tests": r"def[ \t]+NAME\b[^\n]*",
        "eq_override": r"def[ \t]+__eq__[^\n]*",
        "exit_code": r"(?:\bos\._exit|\bsys\.exit|\bexit|\bquit)[ \t]*\([^\n]*|\bSystemExit\b[^\n]*",
        "stdout_marker": rf"(?:\bprint|\.write)[ \t]*\([^\n]*(?:{words})[^\n]*",
        "sentinel": rf"\bself\.(?:{'|'.join(SENTINELS)})\b[ \t]*=[^\n]*",
        "file_marker": rf"[\"'](?:[^\"'\n]*/)?(?:{stems})(?:\.\w+)?[\"'][^\n]*",
    }


def report_data(runs: Sequence[EndedRun], most: int) -> dict[str, Any]:
    """All that the page shows, none first, which gives it the same look in every report.

    Of a run with more than `most` rollouts whole steps are left out, evenly.
    """
    runs = sorted(runs, key=lambda run: run.setting.arm != BASELINE)
    strings: dict[str, int] = {}
    rollouts = [_rollouts(run, most, strings) for run in runs]
    described = zip(map(_described, runs), labels(runs), rollouts, strict=True)
    return {
        "flags": FLAGS,
        "modes": {name: {"hint": m.hint, "looks_like": m.looks_like} for name, m in MODES.items()},
        "triggers": triggers(),
        "columns": {c.key: {"legend": c.legend, "pair": c.form == "pair"} for c in COLUMNS},
        "plain": PLAIN,
        "runs": [about | {"label": label, "rollouts": rows} for about, label, rows in described],
        "strings": list(strings),
    }


def labels(runs: Sequence[EndedRun]) -> list[str]:
    """Each run by arm and seed, then by its folder where others have both."""
    settings = dict.fromkeys(run.setting for run in runs)
    arms = {s: name for own in settings for s, name in names(settings, own.context).items()}
    short = [f"{arms[run.setting]} {run.seed}" for run in runs]
    return [
        f"{text} ({run.name})" if short.count(text) > 1 else text
        for run, text in zip(runs, short, strict=True)
    ]


def _described(run: EndedRun) -> dict[str, Any]:
    options = {
        f"{group}.{name}": value
        for group, values in run.config.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
    }
    used = {c.key: run.values(c.key) for c in COLUMNS if any(v is not None for v in run.values(c.key))}
    made = {"git_commit": run.git_commit, "context": run.setting.title, "label": run.setting.label}
    return {
        "name": run.name,
        "summary": plain(run.summary),
        "steps": plain(used),
        "config": {name: plain(options[name]) for name in sorted(options)} | made,
    }


def _rollouts(run: EndedRun, most: int, strings: dict[str, int]) -> dict[str, Any]:
    """Columns over rollouts; repeated strings as numbers into `strings`, which grows."""
    rows = read_rollouts(run.path, "report") if run.path.is_dir() else []
    kept = thinned(rows, most)

    def number(text: Any) -> int:
        return strings.setdefault("" if text is None else str(text), len(strings))

    columns: dict[str, list[Any]] = {name: [row.get(name) for row in kept] for name in NUMBERS}
    columns |= {name: [number(row.get(name)) for row in kept] for name in INTERNED}
    columns["text"] = [row["text"] for row in kept]
    columns["flags"] = [sum(bool(row.get(flag)) << i for i, flag in enumerate(FLAGS)) for row in kept]
    if tokens := read_tokens(run.path, "report"):
        columns["tokens"] = [_tokens(row, tokens) for row in kept]
    return {"total": len(rows), **columns}


def _tokens(
    row: Mapping[str, Any], tokens: Mapping[tuple[int, int, int], Mapping[str, Any]]
) -> list[Any] | None:
    """Lengths in characters and every figure of a rollout's tokens; None unless they are of this text."""
    own = tokens.get((row["step"], row.get("p_idx", -1), row.get("gi", -1)))
    if own is None or sum(own["chars"]) != len(row["text"]):
        return None
    if any(len(own[figure]) != len(own["chars"]) for figure in TOKEN_FIGURES):
        return None
    return [own["chars"], *(plain(own[figure]) for figure in TOKEN_FIGURES)]


def thinned(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Rows of evenly spaced steps, about `most` of them; the first hack's step and the last always stay."""
    if len(rows) <= most:
        return list(rows)
    steps = sorted({row["step"] for row in rows})
    stride = math.ceil(len(rows) / most)
    first_hack = [row["step"] for row in rows if row.get("exploited")][:1]
    kept = {*steps[::stride], *first_hack, steps[-1]}
    return [row for row in rows if row["step"] in kept]


def embedded(data: Any) -> str:
    """JSON for a script element: without any `<`, so that nothing in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c")


def report_page(runs: Iterable[EndedRun], most: int) -> str:
    """The whole page as text."""
    template = (files("projected_grpo") / "data" / "report.html").read_text(encoding="utf-8")
    before, after = template.split(PLACEHOLDER)
    return before + embedded(report_data(list(runs), most)) + after
