"""The completions that directions are scored on, with their labels: sampled now, or graded before."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from loguru import logger
from torch import Tensor

from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import encode_chat, room_of
from projected_grpo.errors import OneKind, UserError
from projected_grpo.evaluate import Evaluation
from projected_grpo.pools import join, load_pool, reward_of
from projected_grpo.problems import Problem, id_text, read_jsonl
from projected_grpo.rewards import MODES
from projected_grpo.rollout import Rollout
from projected_grpo.sandbox.responses import completion_text

# Labels of a line, by the names of a run's rollouts.jsonl and of a pool.
NAMES = {
    "text": ("text", "completion"),
    "hacked": ("exploited", "hacked"),
    "correct": ("gt_correct", "gt_pass"),
}


@dataclass(frozen=True)
class Completion:
    """One completion of a problem under its mode. `exploited`: paid without a right answer."""

    problem: Problem
    text: str
    reward: float
    exploited: bool
    correct: bool


def of_evaluation(drawn: Evaluation) -> list[Completion]:
    """Completions that were sampled and graded just now."""
    return [
        Completion(problem, text, grade.reward, grade.exploited, grade.gt_correct)
        for problem, texts, grades in zip(drawn.problems, drawn.texts, drawn.grades, strict=True)
        for text, grade in zip(texts, grades, strict=True)
    ]


def read_graded(path: Path, problems: Sequence[Problem]) -> list[Completion]:
    """A pool folder, or a JSONL of graded completions such as a run's rollouts.jsonl; labels as stored.

    Raises UserError naming the line that does not fit, or that nothing in it is about these problems.
    """
    found = list(_of_pool(path, problems) if path.is_dir() else _of_lines(path, problems))
    if not found:
        raise UserError(
            f"--pool {path}: no completion in it is of these problems; --problems names their file"
        )
    return found


def _of_pool(path: Path, problems: Sequence[Problem]) -> Iterator[Completion]:
    teacher = join(load_pool(path), problems)
    for problem in (p for p in problems if p.problem_id in teacher.rows):
        for row in teacher.rows[problem.problem_id]:
            exploited = row.hacked and not row.gt_pass
            yield Completion(teacher.posed(problem), row.completion, row.reward, exploited, row.gt_pass)


def _of_lines(path: Path, problems: Sequence[Problem]) -> Iterator[Completion]:
    by_id = {p.problem_id: p for p in problems}
    others = 0
    for number, row in read_jsonl(path):
        problem = by_id.get(id_text(row.get("problem_id")))
        if problem is None:
            others += 1
        else:
            yield _completion(problem, row, f"{path}:{number}")
    if others:
        logger.warning("{}: {} lines left out, of problems that are not among --problems", path, others)


def _completion(problem: Problem, row: Mapping[str, Any], where: str) -> Completion:
    found = {kind: next((row[n] for n in names if n in row), None) for kind, names in NAMES.items()}
    found["text"] = completion_text(found["text"])
    for kind, wanted in (("text", str), ("hacked", bool), ("correct", bool)):
        if not isinstance(found[kind], wanted):
            raise UserError(f"{where}: no {' or '.join(NAMES[kind])} in it, or not as the grader writes it")
    mode = row.get("env_mode", problem.env_mode)
    if mode not in tuple(MODES):
        raise UserError(f"{where}: env_mode {mode!r} is not as the grader writes it")
    try:
        reward = reward_of(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    posed = replace(problem, env_mode=mode, named=str(row.get("named") or problem.named))
    exploited = bool(found["hacked"]) and not found["correct"]
    return Completion(posed, str(found["text"]), reward, exploited, bool(found["correct"]))


@dataclass(frozen=True)
class Pool:
    """Completions as a model reads them, with their labels, and the number of each one's problem and prompt.

    A problem has several prompts where its completions are of several modes or names.
    """

    completions: tuple[Completion, ...]
    rollouts: tuple[Rollout, ...]
    problem: Int[Tensor, " n"]
    prompt: Int[Tensor, " n"]
    exploited: Bool[Tensor, " n"]
    correct: Bool[Tensor, " n"]
    reward: Float[Tensor, " n"]

    @property
    def lengths(self) -> Float[Tensor, " n"]:
        """Completion tokens of each."""
        return torch.tensor([float(len(r.completion_ids)) for r in self.rollouts])

    def in_mode(self, mode: str) -> Bool[Tensor, " n"]:
        """Which completions are of problems of this mode."""
        return torch.tensor([c.problem.env_mode == mode for c in self.completions])

    def counts(self) -> dict[str, Any]:
        """How many there are, exploit and are right, in all and by mode."""
        modes = Counter(c.problem.env_mode for c in self.completions)
        return self._counted(torch.ones_like(self.exploited)) | {
            "by_mode": {mode: self._counted(self.in_mode(mode)) for mode in MODES if modes[mode]}
        }

    def _counted(self, own: Bool[Tensor, " n"]) -> dict[str, int]:
        named = {"n": own, "exploited": own & self.exploited, "correct": own & self.correct}
        return {name: int(mask.sum()) for name, mask in named.items()}


def numbered(names: Sequence[Hashable]) -> Int[Tensor, " n"]:
    """A number for each, the same for equal names."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])


def as_read(chat: Chat, completions: Sequence[Completion]) -> Pool:
    """Tokenise completions, each ended by the stop token. Those too long for training are left out.

    Raises OneKind unless there are exploited and other ones among them.
    """
    prompts: dict[tuple[str, str, str], tuple[int, ...]] = {}
    room = room_of(chat.policy.model)
    kept, rollouts = [], []
    for completion in completions:
        p = completion.problem
        key = (p.problem_id, p.env_mode, p.named)
        if key not in prompts:
            prompts[key] = encode_chat(chat.tokenizer, p.messages)
        ids = (*chat.tokenizer(completion.text, add_special_tokens=False)["input_ids"], chat.stop_id)
        if len(prompts[key]) + len(ids) <= room:
            kept.append(completion)
            rollouts.append(Rollout(prompts[key], ids, completion.text))
    if len(kept) < len(completions):
        logger.warning("{} completions left out: over {} tokens", len(completions) - len(kept), room)
    hacks = sum(c.exploited for c in kept)
    if hacks in (0, len(kept)):
        raise OneKind(
            f"{hacks} of {len(kept)} completions exploit their grader, so there is nothing to tell apart; "
            "give --pool with completions of a model that hacks, or another --env-mode"
        )
    return Pool(
        tuple(kept),
        tuple(rollouts),
        numbered([c.problem.problem_id for c in kept]),
        numbered([r.prompt_ids for r in rollouts]),
        torch.tensor([c.exploited for c in kept]),
        torch.tensor([c.correct for c in kept]),
        torch.tensor([c.reward for c in kept]),
    )
