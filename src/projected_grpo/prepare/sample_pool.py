"""Sampling a teacher pool from a model: resumable, and the same rows however often it was stopped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import Loaded, encode_chat, room_of, too_long_ones
from projected_grpo.errors import UserError
from projected_grpo.evaluate import Samples, evaluate
from projected_grpo.options.verbs import PoolSampling
from projected_grpo.pools import prompt_path, write_partition, write_prompt
from projected_grpo.problems import Problem
from projected_grpo.rewards import Grader
from projected_grpo.runlog import read_json, write_json


def begin(folder: Path, made_with: Mapping[str, Any]) -> None:
    """Write down what the pool is sampled with. Raises UserError if the folder holds anything else's."""
    path = folder / "sampled.json"
    if path.exists():
        there = read_json(path, "--out")
        others = [name for name in (*made_with, *there) if there.get(name) != made_with.get(name)]
        if others:
            saw = ", ".join(
                f"{n} ({there.get(n)} there, {made_with.get(n)} here)" for n in dict.fromkeys(others)
            )
            raise UserError(
                f"--out {folder}: holds a pool sampled with other settings: {saw}; name another folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder}: not empty, and not a pool that this verb began")
    write_json(path, made_with)


def sample_pool(
    folder: Path,
    made_with: Mapping[str, Any],
    chat: Chat,
    grader: Grader,
    problems: Sequence[Problem],
    how: PoolSampling,
) -> Counter[str]:
    """Sample and grade the prompts that are not there yet; those that are stay as they are, labels included.

    Returns counts of what was made now: rows, hacked, correct. A row depends on (seed, problem, row) alone.
    Raises UserError if the folder holds something else.
    """
    begin(folder, made_with)
    counts: Counter[str] = Counter()
    todo = [p for p in problems if not prompt_path(folder, p).exists()]
    samples = Samples(how.sampler, how.samples, how.seed)
    with tqdm(total=len(problems), initial=len(problems) - len(todo), desc="sampling", disable=None) as bar:
        for start in range(0, len(todo), how.batch):
            batch = todo[start : start + how.batch]
            drawn = evaluate(chat, grader, batch, samples, ablate_quarantine=False)
            for problem, texts, grades in zip(drawn.problems, drawn.texts, drawn.grades, strict=True):
                counts += write_prompt(folder, problem, texts, grades)
                bar.update()
    write_partition(folder, problems)
    return counts


def fitting_prompts(loaded: Loaded, problems: Sequence[Problem], max_new: int) -> list[Problem]:
    """The problems whose prompts leave room for a completion. Raises UserError if there is none."""
    model, tokenizer = loaded
    sizes = {p.problem_id: len(encode_chat(tokenizer, p.messages)) for p in problems}
    skipped = too_long_ones(sizes, max_new, room_of(model))
    return [p for p in problems if p.problem_id not in skipped]
