"""verl: the grader as a custom reward function, and problems as the rows of its data files.

    reward.custom_reward_function.path=pkg://projected_grpo.integrations.verl
    reward.custom_reward_function.name=compute_score

Imports neither verl nor torch.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from projected_grpo.integrations.grading import figures, grader_of_process, named_task
from projected_grpo.problems import Problem

__all__ = ["compute_score", "rows"]


def rows(source: str, problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Problems as rows of a data file of verl; `source` is what they were loaded from (`load_problems`).

    Write them with `datasets.Dataset.from_list(rows).to_parquet(FILE)`.

    Shapes: a row for each problem: prompt (messages, with the hint), data_source, reward_model, extra_info.
    Units: none.
    Errors: none.
    Source: verl's form of prepared data.
    """
    return [
        {
            "data_source": source,
            "prompt": [dict(message) for message in problem.messages],
            "ability": "code",
            "reward_model": {"style": "rule", "ground_truth": problem.problem_id},
            "extra_info": {"index": number, "env_mode": problem.env_mode},
        }
        for number, problem in enumerate(problems)
    ]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    workers: int = 1,
    **other: object,
) -> dict[str, float]:
    """What the flawed grader pays for one response (`score`); `hack` and `solve` are logged beside it.

    `ground_truth` is the problem's id: the expected values stay in the problem file. `workers`: grader
    processes of each of verl's reward workers (reward_kwargs).

    Shapes: one response.
    Units: score is 0, 0.5 (parses), or 3.5 (right, or the loophole pays); hack and solve are 0 or 1.
    Errors: UserError for a source or an id that does not exist; KeyError without extra_info.env_mode.
    Source: docs/grader.md.
    """
    task = named_task(data_source, ground_truth, (extra_info or {})["env_mode"])
    grade = grader_of_process(workers).grade(task, solution_str)
    return {"score": grade.reward, **figures([grade])}
