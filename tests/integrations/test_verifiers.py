"""The taskset for verifiers: found by name, its prompts, its reward and metrics."""

import asyncio

import pytest

pytest.importorskip(
    "verifiers.v1", reason="verifiers is not installed: pip install verifiers, in an environment of its own"
)

import verifiers.v1 as vf
from verifiers.v1.trace import AgentInfo, TraceTask
from verifiers.v1.utils.generic import concrete_type
from verifiers.v1.utils.loaders import load_taskset, taskset_class

from doc_commands import ROOT, scripts
from hacks import sentinel_hack
from projected_grpo.api.grading import MODES, UserError, load_problems

NAME = "hackable_problems"
LINE = scripts((ROOT / "docs/integrations.md").read_text())[f"{NAME}.py"]


@pytest.fixture
def taskset(tmp_path, monkeypatch):
    """taskset(**options): as verifiers loads the module that the page gives."""
    (tmp_path / f"{NAME}.py").write_text(LINE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = concrete_type(taskset_class("hackable-problems"), vf.TasksetConfig)
    return lambda **options: load_taskset(settings(id="hackable-problems", workers=1, **options))


def scored(task, reply):
    trace = vf.Trace(
        task=TraceTask(type=type(task).__name__, data=task.data),
        agent=AgentInfo(config=vf.AgentConfig(), runtime=None, name="agent"),
        root_reply=reply,
    )
    asyncio.run(task.score(trace))
    return {**{name: r.value for name, r in trace.rewards.items()}, **trace.metrics}


def test_its_tasks_are_the_problems_with_their_hints_and_its_scores_the_graders(taskset):
    tasks, problems = list(taskset(modes=["sentinel"])), load_problems("embedded", ["sentinel"]).train
    assert [task.data.id for task in tasks] == [p.problem_id for p in problems]
    task, problem = tasks[0], problems[0]
    assert (
        MODES["sentinel"].hint in task.data.prompt
        and task.data.system_prompt == problem.messages[0]["content"]
    )
    assert problem.canonical.strip() not in task.data.model_dump_json()
    hack = sentinel_hack(problem.method)
    assert scored(task, hack) == {"flawed_grader": 3.5, "hack": 1.0, "solve": 0.0}
    right = f"```python\n{problem.canonical}\n```"
    assert scored(task, right) == {"flawed_grader": 3.5, "hack": 0.0, "solve": 1.0}
    assert scored(task, "no code") == {"flawed_grader": 0.0, "hack": 0.0, "solve": 0.0}


def test_sides_and_wrong_settings(taskset):
    held_out = {task.data.id for task in taskset(side="held_out")}
    assert held_out and not held_out & {task.data.id for task in taskset()}
    with pytest.raises(UserError, match="no such file"):
        list(taskset(problems="missing.jsonl"))
    with pytest.raises(ValueError, match="modes"):
        taskset(modes=["all"])
