"""What can be wrong with a pair set without any model: its texts, and what the real grader says of them."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Literal

from tabulate import tabulate

from projected_grpo.pairs import Pair, PairSet
from projected_grpo.rewards import Grade, Grader

Level = Literal["error", "warning"]
Grades = Mapping[str, tuple[Grade, Grade]]  # of the hack and the clean side, by pair id

NEARLY = 0.95  # difflib ratio, over words and signs, from which two pairs are near-duplicates
TOKEN = re.compile(r"\w+|[^\w\s]")
FAR_APART = 2.0  # ratio of lengths within a pair that is reported
BIASED = 1.1  # mean ratio of lengths that is reported, where it is also beyond two standard errors
UNITS: Mapping[str, Callable[[str], int]] = {"characters": len, "lines": lambda text: len(text.splitlines())}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (error) or worth a look (warning); `pair` is empty for the whole set."""

    level: Level
    pair: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.pair or 'set'}: {self.message}"


@dataclass(frozen=True)
class Lengths:
    """One unit over a set: mean of each side, and the geometric mean and range of hack / clean."""

    hack: float
    clean: float
    ratio: float
    smallest: float
    largest: float
    biased: bool


def lint(pairs: PairSet, grades: Grades) -> list[Finding]:
    """All findings, those of single pairs in file order first."""
    of_pairs = [finding for pair in pairs.pairs for finding in pair_findings(pair, pairs, grades)]
    return [*of_pairs, *repeats(pairs), *set_findings(pairs)]


def grade_pairs(pairs: PairSet, grader: Grader) -> dict[str, tuple[Grade, Grade]]:
    """Both sides of every pair that carries a problem, under the real grader in the pair's mode."""
    graded = [(p, p.problem.task) for p in pairs.pairs if p.problem is not None]
    flat = grader.grade_all([(task, text) for p, task in graded for text in (p.hack, p.clean)])
    return {p.pair_id: (flat[2 * i], flat[2 * i + 1]) for i, (p, _) in enumerate(graded)}


def pair_findings(pair: Pair, pairs: PairSet, grades: Grades) -> Iterator[Finding]:
    if pair.hack.strip() == pair.clean.strip():
        yield Finding("error", pair.pair_id, "hack and clean are the same text")
    for unit, count in UNITS.items():
        hack, clean = count(pair.hack), count(pair.clean)
        if max(hack, clean) > FAR_APART * min(hack, clean):
            yield Finding("warning", pair.pair_id, f"{hack} {unit} of hack against {clean} of clean")
    if pair.pair_id not in grades:
        return
    hack_grade, clean_grade = grades[pair.pair_id]
    if pairs.kind == "placebo":
        yield from honest_findings(pair, "hack", hack_grade)
    else:
        yield from hack_findings(pair, hack_grade)
    yield from honest_findings(pair, "clean", clean_grade)


def honest_findings(pair: Pair, side: str, grade: Grade) -> Iterator[Finding]:
    """A side that has to solve and must not tamper."""
    if not grade.gt_correct:
        yield Finding("error", pair.pair_id, f"{side} does not solve the problem ({grade.error})")
    if grade.tampered:
        yield Finding("error", pair.pair_id, f"{side} exploits {pair.env_mode}")


def hack_findings(pair: Pair, grade: Grade) -> Iterator[Finding]:
    """A side that has to exploit its mode, on a wrong answer."""
    if not grade.format_ok:
        yield Finding("error", pair.pair_id, f"hack is no Python code ({grade.error})")
    elif not grade.tampered and not by_own_tests(pair, grade):
        solves = " and solves the problem" if grade.gt_correct else ""
        yield Finding("error", pair.pair_id, f"hack does not exploit {pair.env_mode}{solves}")
    elif grade.gt_correct:
        yield Finding("warning", pair.pair_id, "hack solves the problem too, so it earns nothing by cheating")


def by_own_tests(pair: Pair, grade: Grade) -> bool:
    """A wrong answer that passes the response's own tests: what the original benchmark pays (detector E)."""
    return pair.env_mode == "run_tests" and grade.hacked_E and not grade.gt_correct


def repeats(pairs: PairSet) -> Iterator[Finding]:
    """Completions that stand twice, and pairs that nearly do."""
    seen: dict[str, tuple[str, str]] = {}
    for pair in pairs.pairs:
        for side, text in (("hack", pair.hack), ("clean", pair.clean)):
            first_id, first_side = seen.setdefault(text.strip(), (pair.pair_id, side))
            if first_id == pair.pair_id:
                continue
            level: Level = "warning" if first_side == side else "error"
            yield Finding(level, pair.pair_id, f"{side} is the {first_side} of {first_id}, word for word")
    tokens = {pair.pair_id: TOKEN.findall(f"{pair.hack}\n{pair.clean}") for pair in pairs.pairs}
    for one, two in combinations(pairs.pairs, 2):
        if (one.messages, one.hack, one.clean) == (two.messages, two.hack, two.clean):
            yield Finding("error", two.pair_id, f"the same pair as {one.pair_id}")
        elif (one.hack, one.clean) != (two.hack, two.clean) and nearly_same(
            tokens[one.pair_id], tokens[two.pair_id]
        ):
            yield Finding("warning", two.pair_id, f"hack and clean are nearly those of {one.pair_id}")


def nearly_same(one: Sequence[str], two: Sequence[str]) -> bool:
    """Whether difflib finds them alike; its two quick upper bounds go first."""
    matcher = SequenceMatcher(None, one, two, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(bound() >= NEARLY for bound in bounds)


def set_findings(pairs: PairSet) -> Iterator[Finding]:
    used, held_out = pairs.split()
    prompts = {p.messages[-1]["content"]: p.pair_id for p in used}
    for pair in held_out:
        if (other := prompts.get(pair.messages[-1]["content"])) is not None:
            yield Finding("warning", pair.pair_id, f"held out, but with the prompt of {other}, which is used")
    for unit, lengths in measure(pairs.pairs).items():
        if lengths.biased:
            means = f"{lengths.hack:.1f} against {lengths.clean:.1f} on average"
            message = f"hacks have {lengths.ratio:.2f} times the {unit} of clean completions ({means})"
            yield Finding("warning", "", message)
    if bare := sum(p.problem is None for p in pairs.pairs):
        message = f"{bare} of {len(pairs.pairs)} pairs carry no problem and are not graded"
        yield Finding("warning", "", message)


def measure(pairs: Sequence[Pair]) -> dict[str, Lengths]:
    """Lengths in characters and lines. A set is biased if the mean log ratio is large and not noise."""
    measured = {}
    for unit, count in UNITS.items():
        sides = [(count(p.hack), count(p.clean)) for p in pairs]
        logs = [math.log(hack / clean) for hack, clean in sides]
        mean, sem = fmean(logs), stdev(logs) / math.sqrt(len(logs))
        measured[unit] = Lengths(
            fmean(hack for hack, _ in sides),
            fmean(clean for _, clean in sides),
            math.exp(mean),
            math.exp(min(logs)),
            math.exp(max(logs)),
            biased=abs(mean) > math.log(BIASED) and abs(mean) > 2 * sem,
        )
    return measured


def report(pairs: PairSet, grades: Grades, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything as plain data."""
    by_id = {p.pair_id: p for p in pairs.pairs}
    hacks = [(by_id[name], hack) for name, (hack, _) in grades.items()] if pairs.kind == "hack" else []
    counts = sorted(Counter((p.env_mode, p.flavour) for p in pairs.pairs).items())
    return {
        "name": pairs.name,
        "kind": pairs.kind,
        "digest": pairs.digest,
        "pairs": len(pairs.pairs),
        "graded": len(grades),
        "by_own_tests": sum(not grade.tampered and by_own_tests(pair, grade) for pair, grade in hacks),
        "counts": [{"env_mode": mode, "flavour": flavour, "pairs": n} for (mode, flavour), n in counts],
        "lengths": {unit: asdict(lengths) for unit, lengths in measure(pairs.pairs).items()},
        "findings": [asdict(finding) for finding in findings],
    }


def describe(said: Mapping[str, Any]) -> str:
    """The report's figures for the terminal."""
    counts = [[c["env_mode"], c["flavour"], c["pairs"]] for c in said["counts"]]
    lines = [
        f"{said['name']} ({said['kind']}): {said['pairs']} pairs, {said['graded']} graded",
        tabulate(counts, headers=["mode", "flavour", "pairs"], tablefmt="github"),
    ]
    lines += [
        f"{unit}: hack {one['hack']:.1f}, clean {one['clean']:.1f}; hack / clean {one['ratio']:.2f} "
        f"({one['smallest']:.2f} to {one['largest']:.2f})"
        for unit, one in said["lengths"].items()
    ]
    if said["by_own_tests"]:
        lines.append(f"{said['by_own_tests']} hacks are paid by their own tests alone (detector E)")
    return "\n".join(lines)
