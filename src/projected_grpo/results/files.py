"""The files of an ended run, checked where they are read: invalid files are reported by name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard

from projected_grpo.basis_file import HeldOut
from projected_grpo.errors import UserError
from projected_grpo.run.columns import COLUMNS
from projected_grpo.runlog import complete_lines, read_json

LARGEST = 1e300  # of a figure; NaN is not below it
Check = type | UnionType | Callable[[object], bool]


def is_whole(value: object) -> TypeGuard[int]:
    """A whole number, not beyond what a float can be."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def is_number(value: object) -> TypeGuard[float]:
    """A finite number."""
    return is_whole(value) or (isinstance(value, float) and abs(value) < LARGEST)


def is_figure(value: object) -> bool:
    return value is None or is_number(value)


def is_pair(value: object) -> bool:
    """[count, n], or null."""
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_whole, value)):
        return value is None
    return bool(0 <= value[0] <= value[1])


def is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def is_figures(value: object) -> bool:
    return isinstance(value, list) and all(map(is_figure, value))


def is_lengths(value: object) -> bool:
    return isinstance(value, list) and all(is_whole(n) and n >= 0 for n in value)


def is_words(value: object) -> bool:
    """A list of strings."""
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


HELD_OUT: Mapping[str, Check] = dict.fromkeys(
    ("hack_train", "hack_deploy", "solve_train", "solve_deploy"), is_figure
)
SUMMARY: Mapping[str, Check] = {
    **dict.fromkeys(("arm", "preset", "model", "problems", "env_mode"), str),
    **dict.fromkeys(("seed", "steps", "eval_n"), is_whole),
    **HELD_OUT,
    **{"by_mode": dict, "finished": bool},
}
LATER: Mapping[str, Check] = {  # what not every run has, of those before it came
    **dict.fromkeys(("hack_rate_student", "pass_rate_student", "seconds"), is_figure),
    "by_split": dict,
}
MADE: Mapping[str, Check] = {"config": dict}
RECORD: Mapping[str, Check] = {"summary": dict, "steps": dict, "config": dict}
KEPT: Mapping[str, Check] = {"arm": str, "seed": is_whole, "wall_s": is_number}
ROLLOUT: Mapping[str, Check] = {"step": is_whole, "text": str}
GRADED: Mapping[str, Check] = dict.fromkeys(("p_idx", "gi", "reward"), is_figure)
TOKENS: Mapping[str, Check] = {
    **dict.fromkeys(("step", "p_idx", "gi"), is_whole),
    **{"chars": is_lengths, "logp": is_figures, "hackward": is_figures},
}
FOUND: Mapping[str, Check] = {"cosines": is_numbers, "fraction_positive": is_number, "mean": is_number}
COMMIT: Mapping[str, Check] = {"git_commit": str | None}


def read_ended(folder: Path, option: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """An ended run's summary, config.json and steps. Raises UserError naming a file that no run wrote."""
    summary, made = (read_json(folder / name, option) for name in ("summary.json", "config.json"))
    check_summary(summary, f"{option}: {folder / 'summary.json'}")
    where = f"{option}: {folder / 'config.json'}"
    check_fields(made, MADE, COMMIT, where)
    check_settings(made["config"], where)
    return summary, made, read_steps(folder, option)


def read_steps(folder: Path, option: str) -> list[dict[str, Any]]:
    """A run's steps with every column, null where one was not measured. Raises UserError for no figure."""
    rows = complete_lines(folder / "steps.jsonl")
    columns = {c.key: [row.get(c.key) for row in rows] for c in COLUMNS}
    check_columns(columns, f"{option}: {folder / 'steps.jsonl'}")
    return [{key: row.get(key) for key in columns} for row in rows]


def read_rollouts(folder: Path, option: str) -> list[dict[str, Any]]:
    """A run's completions with their grades. Raises UserError for one without a step or a text."""
    rows = complete_lines(folder / "rollouts.jsonl")
    for line, row in enumerate(rows, start=1):
        check_fields(row, ROLLOUT, GRADED, f"{option}: {folder / 'rollouts.jsonl'}, line {line}")
    return rows


def read_tokens(folder: Path, option: str) -> dict[tuple[int, int, int], dict[str, Any]]:
    """A run's scores of tokens by step, prompt and sample; {} where it kept none.

    Raises UserError for a line that no run wrote.
    """
    rows = complete_lines(folder / "tokens.jsonl")
    for line, row in enumerate(rows, start=1):
        check_fields(row, TOKENS, {}, f"{option}: {folder / 'tokens.jsonl'}, line {line}")
    return {(row["step"], row["p_idx"], row["gi"]): row for row in rows}


def read_heldout(path: Path, option: str) -> HeldOut:
    """What `verify` found of held-out pairs. Raises UserError if the file does not say."""
    data = read_json(path, option)
    check_fields(data, FOUND, {}, f"{option}: {path} is not the .heldout.json of `verify`")
    return HeldOut(tuple(map(float, data["cosines"])), float(data["fraction_positive"]), float(data["mean"]))


def check_record(record: Mapping[str, Any], columns: Sequence[str], where: str) -> None:
    """Raises UserError unless a study's record holds a summary, settings and these columns of the steps."""
    check_fields(record, RECORD, COMMIT, where)
    check_summary(record["summary"], f"{where}: summary")
    check_settings(record["config"], f"{where}: config")
    steps = f"{where}: steps"
    kept = dict.fromkeys(record["steps"], list)
    check_fields(record["steps"], dict.fromkeys(columns, list), kept, steps)
    check_columns(record["steps"], steps)


def check_summary(summary: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless these are the figures of an ended run."""
    check_fields(summary, SUMMARY, LATER, where)
    check_parts(summary["by_mode"], f"{where}: by_mode")
    splits = summary.get("by_split", {})
    check_parts(splits, f"{where}: by_split")
    for split, rates in splits.items():
        check_fields(rates, {}, {"by_mode": dict}, f"{where}: {split}")
        check_parts(rates.get("by_mode", {}), f"{where}: {split}")


def check_parts(parts: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless these are held-out rates by mode, or by kind of problems."""
    check_fields(parts, dict.fromkeys(parts, dict), {}, where)
    for name, rates in parts.items():
        check_fields(rates, {}, HELD_OUT, f"{where}: {name}")


def check_settings(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless this is a run's settings, group by group, of whichever version."""
    groups = [group for group in config if group != "preset"]
    check_fields(config, dict.fromkeys(groups, dict), {}, where)
    check_fields(config.get("optim", {}), {}, {"steps": is_whole}, where)
    check_fields(config.get("basis", {}), {}, {"v_hack_path": str | None}, where)


def check_columns(columns: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless each known column holds what its form asks for, or null, at every step."""
    for column in COLUMNS:
        for step, value in enumerate(columns.get(column.key, ())):
            if not (is_pair(value) if column.form == "pair" else is_figure(value)):
                raise UserError(f"{where}: {column.key} of step {step} cannot be {str(value)[:40]!r}")


def is_right(kind: Check, value: object) -> bool:
    return isinstance(value, kind) if isinstance(kind, (type, UnionType)) else kind(value)


def check_fields(
    values: Mapping[str, Any], needed: Mapping[str, Check], known: Mapping[str, Check], where: str
) -> None:
    """Raises UserError for a needed field that is not there, or any field that is not of its kind."""
    for name, kind in {**needed, **known}.items():
        if name in values and not is_right(kind, values[name]):
            raise UserError(f"{where}: {name[:40]!r} cannot be {str(values[name])[:40]!r}")
        if name in needed and name not in values:
            raise UserError(f"{where}: {name!r} is missing")
