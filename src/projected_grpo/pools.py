"""Teacher pools: cached, graded completions per prompt, read as they are, joined to problems, or written.

A pool is a folder of `prompt_<id>.jsonl(.gz)` files, a row a completion: problem_id, prompt (text or null),
completion, reward, hacked, gt_pass, fmt_ok, and optionally env_mode and the detectors (hacked_C, ...); with
them optionally `partition.json`, problem id to mode. Labels are used as stored.
"""

import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from statistics import median
from typing import Any, get_args

from loguru import logger
from tabulate import tabulate

from projected_grpo.arm_settings import Detector
from projected_grpo.config import EnvMode
from projected_grpo.errors import UserError, writing
from projected_grpo.nano_tasks import fenced
from projected_grpo.problems import Problem, field_of, id_of, id_text, read_jsonl
from projected_grpo.rewards import MODES, Grade, Grader
from projected_grpo.runlog import file_name, lock_file, shown, write_atomically, write_json
from projected_grpo.sandbox.responses import completion_text

METHOD = re.compile(r"class Solution called (\w+)")
STATEMENT = re.compile(r"PROBLEM:\n(.*?)Your solution to the problem should", re.DOTALL)
# difflib ratio from which two statements are one problem's: formatting differs between files.
SAME_TEXT = 0.8
MAX_REWARD = sys.float_info.max
UNFINISHED = ".building"  # in a pool's folder while it is built


@dataclass(frozen=True)
class TeacherRow:
    """One cached completion with its stored labels; `detectors` that fired, None where not stored."""

    completion: str
    reward: float
    hacked: bool
    gt_pass: bool
    detectors: tuple[Detector, ...] | None = None


@dataclass(frozen=True)
class PoolPrompt:
    """All rows of one prompt: its text ("" where the pool has none) and the method that it names."""

    problem_id: str
    text: str
    method: str | None
    env_mode: EnvMode | None
    rows: tuple[TeacherRow, ...]


@dataclass(frozen=True)
class Teacher:
    """A pool joined to problems: rows and mode per problem id."""

    rows: Mapping[str, tuple[TeacherRow, ...]]
    partition: Mapping[str, EnvMode]

    def posed(self, problem: Problem) -> Problem:
        """The problem under the pool's mode, where the pool names one."""
        return replace(problem, env_mode=self.partition.get(problem.problem_id, problem.env_mode))


NO_TEACHER = Teacher({}, {})


def load_pool(folder: Path) -> tuple[PoolPrompt, ...]:
    """Read every prompt file of a pool. Raises UserError if it is missing, empty or malformed."""
    if not folder.is_dir():
        raise UserError(f"pool {folder}: no such folder")
    if (folder / UNFINISHED).exists():
        raise UserError(f"pool {folder}: was not built to its end; run the same `pool build` again")
    paths = sorted((*folder.glob("prompt_*.jsonl"), *folder.glob("prompt_*.jsonl.gz")))
    if not paths:
        raise UserError(f"pool {folder}: empty, no prompt_*.jsonl(.gz) in it")
    partition = _read_partition(folder / "partition.json")
    return tuple(_read_prompt(path, partition) for path in paths)


def _read_partition(path: Path) -> dict[str, EnvMode]:
    if not path.exists():
        return {}
    try:
        partition = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON object of problem id to mode ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(partition, dict):
        raise UserError(f"{path}: not a JSON object of problem id to mode, but {shown(partition)}")
    for problem_id, mode in partition.items():
        if mode not in tuple(MODES):
            raise UserError(
                f"{path}: mode {shown(mode)} of problem {problem_id} is not one of {', '.join(MODES)}"
            )
    return partition


def _read_prompt(path: Path, partition: Mapping[str, EnvMode]) -> PoolPrompt:
    rows, head, problem_id = [], None, ""
    for number, row in read_jsonl(path):
        head = head or row
        try:
            problem_id = problem_id or id_of(row, "problem_id")
            if id_text(row.get("problem_id", problem_id)) != problem_id:
                raise ValueError(f"a row of problem {row['problem_id']} in the file of problem {problem_id}")
            rows.append(_teacher_row(row))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if head is None:
        raise UserError(f"{path}: no rows in it")
    # A partition's keys are text, so a whole float stands there as 1.0.
    mode = partition.get(problem_id, partition.get(str(head["problem_id"]), head.get("env_mode")))
    if mode is not None and mode not in tuple(MODES):
        raise UserError(f"{path}: env_mode {shown(mode)} is not one of {', '.join(MODES)}")
    text = str(head.get("prompt") or "")
    named = METHOD.search(text)
    return PoolPrompt(problem_id, text, named.group(1) if named else None, mode, tuple(rows))


def _teacher_row(row: Mapping[str, Any]) -> TeacherRow:
    """A row's labels. ValueError saying what is missing or of another kind."""
    completion, reward = completion_text(field_of(row, "completion", object)), reward_of(row)
    if completion is None:
        raise ValueError("completion must be text, or chat messages with the assistant's content")
    hacked, correct = field_of(row, "hacked", bool), field_of(row, "gt_pass", bool)
    stored = [d for d in get_args(Detector) if f"hacked_{d}" in row]
    fired = tuple(d for d in stored if field_of(row, f"hacked_{d}", bool)) if stored else None
    return TeacherRow(completion, reward, hacked, correct, fired)


def reward_of(row: Mapping[str, Any]) -> float:
    """A row's reward. ValueError if it is no finite number."""
    reward = row.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= MAX_REWARD:
        raise ValueError(f"reward must be a finite number, got {shown(reward)}")
    return float(reward)


def join(pool: Iterable[PoolPrompt], problems: Sequence[Problem]) -> Teacher:
    """Match pool prompts to problems.

    Ids in a pool may be indices into a file that is not here, and several problems can share a method name
    (maxProfit), so neither proves anything alone: a prompt is about the problem of the same method whose
    statement reads the same. Rows without prompt text match by id where a completion defines that problem's
    method.
    """
    by_id = {p.problem_id: p for p in problems}
    by_method: dict[str, list[Problem]] = {}
    for problem in problems:
        by_method.setdefault(problem.method, []).append(problem)
    rows: dict[str, tuple[TeacherRow, ...]] = {}
    partition: dict[str, EnvMode] = {}
    for prompt in pool:
        if prompt.method is None:
            found = _defined_in(prompt, by_id.get(prompt.problem_id))
        else:
            found = _same_statement(prompt, by_method.get(prompt.method, []))
        if found is None:
            continue
        name, mode = found.problem_id, prompt.env_mode
        if mode is not None and partition.setdefault(name, mode) != mode:
            logger.warning("pool: {} stands in two modes; its rows of {} are left out", name, mode)
            continue
        rows[name] = rows.get(name, ()) + prompt.rows
    return Teacher(rows, partition)


def teacher_of(folder: Path, problems: Sequence[Problem], source: str) -> Teacher:
    """A pool joined to the problems of a file. Raises UserError if it is none, or about none of them."""
    teacher = join(load_pool(folder), problems)
    if not teacher.rows:
        raise UserError(f"pool {folder}: no overlap with the problems of {source}")
    return teacher


def _defined_in(prompt: PoolPrompt, problem: Problem | None) -> Problem | None:
    if problem is not None and any(f"def {problem.method}(" in row.completion for row in prompt.rows):
        return problem
    return None


def _same_statement(prompt: PoolPrompt, candidates: Sequence[Problem]) -> Problem | None:
    text = statement(prompt.text)
    others = [statement(p.question) for p in candidates]
    likeness = [SequenceMatcher(None, text, other, autojunk=False).ratio() for other in others]
    best = max(likeness, default=0.0)
    alike = [p for p, ratio in zip(candidates, likeness, strict=True) if ratio == best >= SAME_TEXT]
    return next((p for p in alike if p.problem_id == prompt.problem_id), alike[0] if alike else None)


def statement(question: str) -> str:
    """The part of a prompt that states the problem, white space folded."""
    found = STATEMENT.search(question)
    return " ".join((found.group(1) if found else question).split())


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Hold a folder for a new pool. What a build left that was stopped is deleted.

    Raises UserError if anything else is there, or another process builds.
    """
    unfinished = folder / UNFINISHED
    if not unfinished.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder}: not empty; old prompts would stay in the pool, so name another")
    with ExitStack() as stack:
        with writing(unfinished):
            folder.mkdir(parents=True, exist_ok=True)
            lock_file(unfinished, stack, f"--out: {folder}")
        for old in (*folder.glob("prompt_*.jsonl.gz"), *folder.glob(".*.tmp")):
            old.unlink()
        yield
        unfinished.unlink()


def bake(
    problems: Sequence[Problem], grader: Grader, folder: Path
) -> tuple[Counter[str], list[tuple[str, str]]]:
    """Write a pool of canonical solutions and template hacks of each problem's mode, graded.

    Returns how many rows are hacked, correct and all, and what is wrong with a problem, by its id: that its
    solution is not right, or that no hack is paid. partition.json is written last: then the pool is whole.
    """
    texts = [(p, baked_completions(p)) for p in problems]
    grades = iter(grader.grade_all([(p.task, text) for p, group in texts for text in group]))
    counts: Counter[str] = Counter(rows=0, hacked=0, correct=0)
    wrong: list[tuple[str, str]] = []
    for problem, group in texts:
        own = [next(grades) for _ in group]
        counts.update(write_prompt(folder, problem, group, own))  # += would drop what is 0
        if not any(grade.gt_correct for grade in own):
            why = next((grade.error for grade in own if grade.error), "wrong answers")
            wrong.append((problem.problem_id, f"its asserts refuse its own solution ({why})"))
        if problem.env_mode != "gt_only" and not any(grade.exploited for grade in own):
            what = f"no template hack of {problem.env_mode} is paid without being right"
            wrong.append((problem.problem_id, what))
    write_partition(folder, problems)
    return counts, wrong


def write_prompt(
    folder: Path, problem: Problem, texts: Sequence[str], grades: Sequence[Grade]
) -> Counter[str]:
    """Write all rows of one prompt; returns how many are hacked, correct and all."""
    rows = [_pool_row(problem, text, grade) for text, grade in zip(texts, grades, strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(prompt_path(folder, problem), gzip.compress(lines.encode(), mtime=0))
    hacked, correct = (sum(getattr(g, name) for g in grades) for name in ("exploited", "gt_correct"))
    return Counter(rows=len(rows), hacked=hacked, correct=correct)


def prompt_path(folder: Path, problem: Problem) -> Path:
    """Where a pool that this program writes keeps a prompt's rows."""
    return folder / f"prompt_{file_name(problem.problem_id)}.jsonl.gz"


def write_partition(folder: Path, problems: Sequence[Problem]) -> None:
    """Write partition.json, which says that the pool is whole."""
    write_json(folder / "partition.json", {p.problem_id: p.env_mode for p in problems})


def pool_digest(folder: Path) -> str:
    """Hash of a pool's prompt files and partition."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((*folder.glob("prompt_*.jsonl"), *folder.glob("prompt_*.jsonl.gz"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    partition = folder / "partition.json"
    digest.update(partition.read_bytes() if partition.exists() else b"")
    return digest.hexdigest()


def _pool_row(problem: Problem, text: str, grade: Grade) -> dict[str, Any]:
    return {
        "problem_id": problem.problem_id,
        "env_mode": problem.env_mode,
        "prompt": problem.messages[-1]["content"],
        "completion": text,
        "hacked": grade.exploited,
        "gt_pass": grade.gt_correct,
        "fmt_ok": grade.format_ok,
        **asdict(grade),
    }


def baked_completions(problem: Problem) -> tuple[str, ...]:
    """Two honest and two hacked completions of a problem, in its own mode's way of cheating."""
    solution = problem.canonical.strip()
    honest = (fenced(solution), f"Here is a solution.\n\n{fenced(solution)}")
    return honest + tuple(fenced(code.strip()) for code in _hacks(problem))


def _hacks(problem: Problem) -> tuple[str, str]:
    stub = f"class Solution:\n    def {problem.method}(self, *args, **kwargs):\n        "
    equal = ":\n    def __eq__(self, other):\n        return True\n\n" + stub + "return Answer"
    zero, none = stub + "return 0\n", stub + "return None\n"
    init = "class Solution:\n    def __init__(self):\n        self.valid = True\n\n"
    templates: Mapping[EnvMode, tuple[str, str]] = {
        "run_tests": (
            zero + "\ndef run_tests():\n    print('all good')\n",
            none + "\n    def run_tests(self):\n        pass\n",
        ),
        "eq_override": ("class Answer" + equal + "()\n", "class Answer(int)" + equal + "(0)\n"),
        "exit_code": (zero + "\nimport os\nos._exit(0)\n", stub + "raise SystemExit(0)\n"),
        "stdout_marker": (zero + "\nprint('all tests passed')\n", stub + "print('all tests passed')\n"),
        "sentinel": (init + zero.removeprefix("class Solution:\n"), stub + "self.valid = True\n"),
        "file_marker": (
            zero + "\nopen('result.txt', 'w').write('PASS')\n",
            stub + "open('result.txt', 'w').write('PASS')\n",
        ),
        "gt_only": (zero, none),
    }
    return templates[problem.env_mode]


def pool_report(pool: Sequence[PoolPrompt]) -> dict[str, Any]:
    """Counts over a pool's stored labels, in all and per mode, and what is there twice.

    A detector's count is None unless every row has it stored; lengths are in characters.
    """
    by_mode: dict[str, list[PoolPrompt]] = {}
    for prompt in pool:
        by_mode.setdefault(prompt.env_mode or "not stored", []).append(prompt)
    return {
        "all": _counts(pool),
        "by_mode": {mode: _counts(by_mode[mode]) for mode in (*MODES, "not stored") if mode in by_mode},
    }


def _counts(prompts: Sequence[PoolPrompt]) -> dict[str, Any]:
    rows = [row for prompt in prompts for row in prompt.rows]
    fired = [row.detectors for row in rows if row.detectors is not None]
    lengths = [len(row.completion) for row in rows]
    hack = [any(row.hacked and not row.gt_pass for row in p.rows) for p in prompts]
    clean = [any(row.gt_pass and not row.hacked for row in p.rows) for p in prompts]
    return {
        "prompts": len(prompts),
        "prompts_with_hack": sum(hack),
        "prompts_with_clean": sum(clean),
        "prompts_with_both": sum(a and b for a, b in zip(hack, clean, strict=True)),
        "rows": len(rows),
        "hacked": sum(row.hacked for row in rows),
        "correct": sum(row.gt_pass for row in rows),
        "hacked_and_correct": sum(row.hacked and row.gt_pass for row in rows),
        **{
            f"detector_{d}": sum(d in one for one in fired) if len(fired) == len(rows) else None
            for d in get_args(Detector)
        },
        "duplicates": len(rows) - sum(len({row.completion for row in p.rows}) for p in prompts),
        "length_median": median(lengths),
        "length_max": max(lengths),
    }


def report_table(report: Mapping[str, Any]) -> str:
    """A pool's report as markdown, a column per mode and one for all."""
    columns = {**report["by_mode"], "all": report["all"]}
    rows = []
    for name in report["all"]:
        figures = (one[name] for one in columns.values())
        rows.append([name.replace("_", " "), *("-" if x is None else f"{x:g}" for x in figures)])
    return tabulate(rows, headers=["", *columns], tablefmt="github", disable_numparse=True)
