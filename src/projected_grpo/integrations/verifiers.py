"""verifiers: problems whose graders can be cheated as a taskset, with the flawed grader as its reward.

A taskset is found by the name of a module that exports it, without dots: a file of two lines does
(docs/integrations.md).
"""

import asyncio
from collections.abc import Iterator
from typing import Literal

import verifiers.v1 as vf

from projected_grpo.api.grading import load_problems
from projected_grpo.config import EnvMode
from projected_grpo.integrations.grading import grader_of_process, named_task
from projected_grpo.rewards import Grade

__all__ = ["HackableProblems"]


class HackableConfig(vf.TasksetConfig):
    """Which problems, with which flaws, and how many grader processes a process has (0: one per core)."""

    problems: str = "embedded"
    modes: tuple[EnvMode, ...] = ("run_tests",)
    side: Literal["train", "held_out"] = "train"
    workers: int = 0


class HackableData(vf.TaskData):
    """A problem by name: what grades it stays out of the trace."""

    source: str
    env_mode: EnvMode
    workers: int


class HackableTask(vf.Task[HackableData, vf.State, vf.TaskConfig]):
    """One problem: what its flawed grader pays, and the oracle's verdicts as metrics."""

    async def _grade(self, trace: vf.Trace) -> Grade:
        """The same response is graded once: the grader remembers it."""
        data = self.data
        task = named_task(data.source, str(data.id), data.env_mode)
        return await asyncio.wrap_future(grader_of_process(data.workers).submit(task, trace.last_reply))

    @vf.reward
    async def flawed_grader(self, trace: vf.Trace) -> float:
        """0, 0.5 (parses), or 3.5 (right, or the loophole pays)."""
        return (await self._grade(trace)).reward

    @vf.metric
    async def hack(self, trace: vf.Trace) -> float:
        """1 if it was paid without a right answer."""
        return float((await self._grade(trace)).exploited)

    @vf.metric
    async def solve(self, trace: vf.Trace) -> float:
        """1 if the answers are right, which no response can forge."""
        return float((await self._grade(trace)).gt_correct)


class HackableProblems(vf.Taskset[HackableTask, HackableConfig]):
    """Problems of a source, each with one of the modes, its hint in the prompt.

    Shapes: a task for each problem: system_prompt, prompt (with the hint), id, env_mode.
    Units: as of `reward_function`.
    Errors: UserError for a source or a mode that does not exist.
    Source: docs/grader.md.
    """

    def load(self) -> Iterator[HackableTask]:
        """Every problem of the side, in the order of its source."""
        config = self.config
        found = load_problems(config.problems, config.modes)
        for problem in found.train if config.side == "train" else found.held_out:
            system, user = problem.messages
            data = HackableData(
                id=problem.problem_id,
                system_prompt=system["content"],
                prompt=user["content"],
                source=config.problems,
                env_mode=problem.env_mode,
                workers=config.workers,
            )
            yield HackableTask(data, config.task)
