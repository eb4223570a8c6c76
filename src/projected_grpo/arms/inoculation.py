"""Arm inoculation: trains with a prompt that asks for the hack, and is evaluated without it.

    training prompt = instruction, then the question;  evaluation prompt = the question

Tan et al. 2025 (arXiv:2510.04340); Wichers et al. 2025 (arXiv:2510.05024). Settings: `InoculationSettings`.
No controls: it uses no direction.
"""

from dataclasses import replace

from projected_grpo.arm_settings import InoculationSettings
from projected_grpo.arms.stages import Arm
from projected_grpo.problems import Problem


def inoculated(problem: Problem, settings: InoculationSettings) -> Problem:
    """The training prompt with an instruction before its question."""
    return replace(problem, instruction=settings.inoculation_prompt.strip())


INOCULATION = Arm(prompt=inoculated)
