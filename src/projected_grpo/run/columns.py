"""The figures of a step: one list of columns gives each its key, width, form and legend."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HEADER_EVERY = 50


@dataclass(frozen=True)
class Column:
    """One figure of a step: its key in steps.jsonl, its form in the table, and what it means."""

    key: str
    form: str
    legend: str
    width: int = 0  # on the terminal; 0: not there


COLUMNS = (
    Column("step", "d", "optimizer step, from 0", 4),
    Column("ref_eq", ".1f", "student rollouts so far / 256, the reference's step size"),
    Column("rew", ".2f", "mean reward of all rollouts, as the arm has it [points, 0 to 3.5 as paid]", 5),
    Column("rew_s", ".2f", "mean reward of student rollouts [points]"),
    Column(
        "rew_paid",
        ".2f",
        "the same as the flawed grader pays it: rew without the arm's reward stage [points]",
    ),
    Column("shaped", ".2f", "share of rollouts whose reward the arm changes or leaves out [0 to 1]"),
    Column(
        "zgap",
        ".2f",
        "advmod: standardised score of student exploits minus that of others; above 0: it tells them apart",
    ),
    Column("N", "d", "rollouts this step"),
    Column(
        "zerovar",
        "d",
        "groups of rollouts that are all paid alike [count]: left out, as they teach nothing",
        7,
    ),
    Column("gt_s", "pair", "student rollouts that are right, of all of this step's", 7),
    Column("gt_t", "pair", "teacher rollouts that are right, of all of this step's"),
    Column(
        "hack_s", "pair", "student rollouts that hack: paid without being right, of all of this step's", 7
    ),
    Column("hack_t", "pair", "teacher rollouts that their pool labels as hacks, of all of this step's"),
    Column("hk_rt", "pair", "student exploits on run_tests problems"),
    Column("hk_eq", "pair", "student exploits on eq_override problems"),
    Column("hk_xc", "pair", "student exploits on exit_code problems"),
    Column("hk_so", "pair", "student exploits on stdout_marker problems"),
    Column("hk_se", "pair", "student exploits on sentinel problems"),
    Column("hk_fm", "pair", "student exploits on file_marker problems"),
    Column("lp_s", ".2f", "mean log-probability of the student's own tokens [nats per token]", 6),
    Column(
        "lp_t", ".2f", "the same of the teacher's rows that teach; a fall by 3 warns, by 5 ends the run", 6
    ),
    Column(
        "lp_ref",
        ".2f",
        "the reference's log-probability of student text, rollouts that teach [nats per token]",
    ),
    Column("gap", ".1e", "mean |log-probability at sampling - in training| [nats]: merged weights, dtype"),
    Column("kl", ".4f", "K3 KL to the reference, mean over student rollouts that teach [nats per token]"),
    Column("skipped", "d", "1 where loss or gradient was not finite: no AdamW step"),
    Column("loss", ".1e", "policy loss plus beta * KL"),
    Column("gn", ".1e", "L2 norm of the adapter's gradient before the clip", 7),
    Column("q_egy", ".2f", "quarantine's share of the gradient norm: routed / (kept + routed) [0 to 1]", 5),
    Column("tau", ".3f", "route2: mean threshold of the gate: a cosine, or a standardised score"),
    Column(
        "hkgap",
        ".3f",
        "route2: running mean of the gate's signal, hack minus clean; above 0 if it tells them apart",
    ),
    Column("resid", ".3f", "route2: cosine of the kept gradient with v_grad"),
    Column("lr", ".1e", "learning rate"),
    Column("cos_pre", ".3f", "hack-ward share of the gradient before the arm: |relu(Vg)|/|g| [0 to 1]", 7),
    Column("cos_pre_s", ".3f", "the same of student rows alone [0 to 1]"),
    Column("cos_pre_t", ".3f", "the same of teacher rows alone [0 to 1]"),
    Column("cos_post", ".3f", "the same after the arm; at most cos_pre, and 0 where erase takes it all", 8),
    Column(
        "cos_null",
        ".3f",
        "what cos_pre is by chance: root mean square over random directions, sqrt(k/2r) [0 to 1]",
    ),
    Column(
        "cos_update",
        ".3f",
        "the same of the parameter change that AdamW made, weight decay and momentum included [0 to 1]",
    ),
    Column(
        "fired",
        ".2f",
        "share of directions hack-ward; route2: of rollouts routed, module by module [0 to 1]",
        5,
    ),
    Column("refr", ".2f", "overlap of the old basis and the one extracted again [0 to 1]"),
    Column(
        "hack_deploy",
        ".3f",
        "hack_dep: hack rate on held-out problems, with the quarantine deleted [0 to 1]",
        8,
    ),
    Column("solve_deploy", ".3f", "solve rate on held-out problems as deployed [0 to 1]"),
    Column("hack_abl", "pair", "exploits among rollouts sampled with the quarantine ablated"),
    Column("solve_abl", "pair", "correct among rollouts sampled with the quarantine ablated"),
    Column("gen", ".1f", "time to generate [s]"),
    Column("t_rew", ".1f", "time to wait for grades [s]"),
    Column("fb", ".1f", "time of forward and backward passes [s]"),
    Column("sec", ".1f", "time of the whole step [s]", 5),
    Column("peak_gb", ".1f", "peak GPU memory so far [GB]"),
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
        self.shown = [column for column in COLUMNS if column.width]
        self.rows = 0

    def legend(self) -> str:
        return "\n".join(f"  {column.key:<12} {column.legend}" for column in self.shown)

    def lines(self, record: Mapping[str, Any]) -> list[str]:
        """The record's row, with the header before it when it is due."""
        row = " ".join(cell(c, record.get(c.key)).rjust(c.width) for c in self.shown)
        header = " ".join(c.key[: c.width].rjust(c.width) for c in self.shown)
        lines = [row] if self.rows % HEADER_EVERY else [header, row]
        self.rows += 1
        return lines


def markdown_table(records: Iterable[Mapping[str, Any]]) -> str:
    """All steps with every column that has a value anywhere, as a markdown table."""
    records = list(records)
    used = [c for c in COLUMNS if any(r.get(c.key) is not None for r in records)]
    head = "| " + " | ".join(c.key for c in used) + " |\n|" + "-|" * len(used)
    body = ["| " + " | ".join(cell(c, r.get(c.key)) for c in used) + " |" for r in records]
    return "\n".join([head, *body])
