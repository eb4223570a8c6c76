"""Held-out evaluation: how often the policy hacks and solves, as trained and with its quarantine deleted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from projected_grpo.config import SamplingConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import decode, encode_chat
from projected_grpo.problems import Problem
from projected_grpo.rewards import Grade, Grader
from projected_grpo.seeds import stream_seed


@dataclass(frozen=True)
class Rates:
    """Counts of exploits and correct answers among n completions."""

    hacks: int
    solves: int
    n: int

    @property
    def hack(self) -> float | None:
        """Exploit rate, None without completions."""
        return self.hacks / self.n if self.n else None

    @property
    def solve(self) -> float | None:
        """Truly-correct rate, None without completions."""
        return self.solves / self.n if self.n else None


@dataclass(frozen=True)
class Evaluation:
    """All completions of one evaluation, a tuple per problem, with their grades."""

    problems: tuple[Problem, ...]
    texts: tuple[tuple[str, ...], ...]
    grades: tuple[tuple[Grade, ...], ...]

    def rates(self, mode: str | None = None, split: str | None = None) -> Rates:
        """Overall, or of the problems of one mode, of one kind of held-out problems, or of both."""
        picked = [
            g
            for p, group in zip(self.problems, self.grades, strict=True)
            if mode in (None, p.env_mode) and split in (None, p.split)
            for g in group
        ]
        return Rates(sum(g.exploited for g in picked), sum(g.gt_correct for g in picked), len(picked))

    def share_changed(self, other: "Evaluation") -> float:
        """Share of completions whose text differs from the other evaluation's, same problems and seeds."""
        here = [text for group in self.texts for text in group]
        there = [text for group in other.texts for text in group]
        return sum(a != b for a, b in zip(here, there, strict=True)) / len(here)


@dataclass(frozen=True)
class Samples:
    """How completions are drawn: `count` of each problem, from streams of `seed`.

    Problems are generated together up to `tokens_at_once` padded tokens (0: all of them).
    """

    sampling: SamplingConfig
    count: int
    seed: int
    tokens_at_once: int = 0


def evaluate(
    chat: Chat,
    grader: Grader,
    problems: Sequence[Problem],
    how: Samples,
    *,
    ablate_quarantine: bool,
    on_chunk: Callable[[Evaluation], object] = lambda part: None,
) -> Evaluation:
    """Sample and grade. Seeds depend on (seed, problem, row) alone, so that two evaluations are paired.

    `on_chunk` is given each part when it is graded.
    """
    prompts = [encode_chat(chat.tokenizer, p.messages) for p in problems]
    sizes = [how.count * (len(prompt) + how.sampling.max_new) for prompt in prompts]
    parts = []
    for chunk in chunks(sizes, how.tokens_at_once):
        own = problems[chunk]
        seeds = [[stream_seed(how.seed, "eval", p.problem_id, i) for i in range(how.count)] for p in own]
        drawn = chat.sample(prompts[chunk], seeds, how.sampling, ablate_quarantine=ablate_quarantine)
        texts = [tuple(decode(chat.tokenizer, ids) for ids, _ in group) for group in drawn]
        flat = grader.grade_all([(p.task, t) for p, group in zip(own, texts, strict=True) for t in group])
        grades = tuple(tuple(flat[i * how.count : (i + 1) * how.count]) for i in range(len(own)))
        parts.append(Evaluation(tuple(own), tuple(texts), grades))
        on_chunk(parts[-1])
    return Evaluation(
        tuple(p for part in parts for p in part.problems),
        tuple(group for part in parts for group in part.texts),
        tuple(group for part in parts for group in part.grades),
    )


def chunks(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive items whose count times their largest size stays in the budget (0: all), at least one."""
    start, largest = 0, 0
    for end, size in enumerate(sizes):
        largest = max(largest, size)
        if budget and end > start and (end + 1 - start) * largest > budget:
            yield slice(start, end)
            start, largest = end, size
    if sizes:
        yield slice(start, len(sizes))
