"""The figures of a step: one list of columns gives each its key, width, form and legend."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HEADER_EVERY = 50


@dataclass(frozen=True)
class Column:
    """One figure of a step: its key in steps.jsonl, its form in the table, and what it means."""

    key: str
    width: int
    form: str
    legend: str
    console: bool = True


COLUMNS = (
    Column("step", 4, "d", "optimizer step"),
    Column("ref_eq", 6, ".1f", "generations so far / 256, the reference's step size", console=False),
    Column("rew", 5, ".2f", "mean reward of all rollouts, as the arm has it"),
    Column("rew_s", 5, ".2f", "mean reward of student rollouts", console=False),
    Column(
        "rew_paid",
        8,
        ".2f",
        "the same as the flawed grader pays it: rew without the arm's reward stage",
        console=False,
    ),
    Column("shaped", 6, ".2f", "share of rollouts whose reward the arm changes or leaves out", console=False),
    Column(
        "zgap",
        6,
        ".2f",
        "advmod: standardised score of student exploits minus that of the others. SHOULD be > 0",
        console=False,
    ),
    Column("N", 4, "d", "rollouts this step", console=False),
    Column("zerovar", 3, "d", "groups without reward variance, dropped before any forward"),
    Column(
        "gt_s",
        7,
        "pair",
        "student rollouts that are truly correct, of n. SHOULD not fall; ELSE over-projected",
    ),
    Column("gt_t", 5, "pair", "teacher rollouts that are truly correct, of n", console=False),
    Column(
        "hack_s",
        7,
        "pair",
        "student rollouts (ablated too) that exploit the grader, of n. Vanilla SHOULD rise",
    ),
    Column("hack_t", 6, "pair", "teacher rollouts that their pool labels as hacks, of n", console=False),
    Column("hk_rt", 5, "pair", "student exploits on run_tests problems", console=False),
    Column("hk_eq", 5, "pair", "student exploits on eq_override problems", console=False),
    Column("hk_xc", 5, "pair", "student exploits on exit_code problems", console=False),
    Column("hk_so", 5, "pair", "student exploits on stdout_marker problems", console=False),
    Column("hk_se", 5, "pair", "student exploits on sentinel problems", console=False),
    Column("hk_fm", 5, "pair", "student exploits on file_marker problems", console=False),
    Column("lp_s", 6, ".2f", "mean log-probability of the student's own tokens, nats"),
    Column(
        "lp_t",
        6,
        ".2f",
        "the same of the teacher's rows with A != 0. SHOULD not drop by nats; ELSE diverging",
    ),
    Column(
        "lp_ref",
        6,
        ".2f",
        "the reference's log-probability of student text, rollouts with A != 0",
        console=False,
    ),
    Column(
        "gap",
        7,
        ".1e",
        "mean |log-probability at sampling - in training|: merged weights, dtype",
        console=False,
    ),
    Column(
        "kl",
        7,
        ".4f",
        "K3 KL to the reference, nats per token, mean over student rollouts with A != 0",
        console=False,
    ),
    Column(
        "skipped",
        3,
        "d",
        "1 where loss or gradient was not finite: no AdamW step. SHOULD be 0",
        console=False,
    ),
    Column("loss", 8, ".1e", "policy loss plus beta * KL", console=False),
    Column("gn", 7, ".1e", "norm of the adapter gradient before the clip"),
    Column("q_egy", 5, ".2f", "quarantine's share of the gradient norm: routed / (kept + routed)"),
    Column("tau", 6, ".3f", "route2: mean threshold of the cosine gate", console=False),
    Column("hkgap", 6, ".3f", "route2: hack minus clean running mean cosine. SHOULD stay > 0", console=False),
    Column("resid", 6, ".3f", "route2: cosine of the kept gradient with v_grad", console=False),
    Column("lr", 7, ".1e", "learning rate", console=False),
    Column("cos_pre", 7, ".3f", "hack-ward share |relu(Vg)|/|g| before the arm. SHOULD exceed cos_null"),
    Column("cos_pre_s", 9, ".3f", "the same of student rows alone", console=False),
    Column("cos_pre_t", 9, ".3f", "the same of teacher rows alone", console=False),
    Column("cos_post", 8, ".3f", "the same after the arm. SHOULD be <= cos_pre, about 0 for one-sided erase"),
    Column("cos_null", 8, ".3f", "its root mean square over random directions, sqrt(k/2r)", console=False),
    Column(
        "cos_update",
        10,
        ".3f",
        "the same of the parameter change made, weight decay and momentum included",
        console=False,
    ),
    Column(
        "fired", 5, ".2f", "share of (module, axis) that point hack-ward; route2: of (module, rollout) routed"
    ),
    Column(
        "refr", 5, ".2f", "subspace overlap of old and new basis at a refresh. SHOULD be > .2", console=False
    ),
    Column("hack_deploy", 8, ".3f", "held-out hack rate with the quarantine deleted"),
    Column("solve_deploy", 12, ".3f", "held-out solve rate with the quarantine deleted", console=False),
    Column(
        "hack_abl", 8, "pair", "exploits among rollouts sampled with the quarantine ablated", console=False
    ),
    Column(
        "solve_abl", 9, "pair", "correct among rollouts sampled with the quarantine ablated", console=False
    ),
    Column("gen", 5, ".1f", "seconds generating", console=False),
    Column("t_rew", 5, ".1f", "seconds waiting for grades", console=False),
    Column("fb", 5, ".1f", "seconds in forward and backward", console=False),
    Column("sec", 5, ".1f", "seconds of the step"),
    Column("peak_gb", 7, ".1f", "peak GPU memory so far, GB", console=False),
)


def complete(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step's line with every column, null where not measured. Raises ValueError on an unknown key."""
    keys = [column.key for column in COLUMNS]
    if set(record) - set(keys):
        raise ValueError(f"no column for {sorted(set(record) - set(keys))}")
    return {key: record.get(key) for key in keys}


def cell(column: Column, value: Any) -> str:
    """One value as the table shows it; a missing one is a dash."""
    if value is None:
        return "-"
    return f"{value[0]}/{value[1]}" if column.form == "pair" else format(value, column.form)


class StepTable:
    """A row a step on the terminal: legend once, header again every 50 rows."""

    def __init__(self) -> None:
        self.shown = [column for column in COLUMNS if column.console]
        self.rows = 0

    def legend(self) -> str:
        """What each shown column means, a line each."""
        return "\n".join(f"  {column.key:<12} {column.legend}" for column in self.shown)

    def lines(self, record: Mapping[str, Any]) -> list[str]:
        """The record's row, with the header before it when it is due."""
        lines = []
        if self.rows % HEADER_EVERY == 0:
            lines.append(
                " ".join(
                    column.key[: max(column.width, 7)].rjust(self._width(column)) for column in self.shown
                )
            )
        self.rows += 1
        lines.append(" ".join(cell(c, record.get(c.key)).rjust(self._width(c)) for c in self.shown))
        return lines

    @staticmethod
    def _width(column: Column) -> int:
        return max(column.width, min(len(column.key), 7))


def markdown_table(records: Iterable[Mapping[str, Any]]) -> str:
    """All steps with every column that has a value anywhere, as a markdown table."""
    records = list(records)
    used = [c for c in COLUMNS if any(r.get(c.key) is not None for r in records)]
    head = "| " + " | ".join(c.key for c in used) + " |\n|" + "-|" * len(used)
    body = ["| " + " | ".join(cell(c, r.get(c.key)) for c in used) + " |" for r in records]
    return "\n".join([head, *body])
