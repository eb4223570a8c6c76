"""The adapter for verl: its rows and its scores, by hand and through verl's own reward manager."""

import asyncio
import os

import pytest

from hacks import sentinel_hack
from projected_grpo.api.grading import UserError, load_problems
from projected_grpo.integrations import grading
from projected_grpo.integrations.verl import compute_score, rows

PLACE = "pkg://projected_grpo.integrations.verl"


@pytest.fixture(scope="module")
def problem():
    return load_problems("embedded", ["sentinel"]).held_out[0]


def test_a_row_names_the_problem_and_its_score_is_the_graders(problem):
    (row,) = rows("embedded", [problem])
    assert row["prompt"] == list(problem.messages)
    asked = {
        "data_source": row["data_source"],
        "ground_truth": row["reward_model"]["ground_truth"],
        "extra_info": row["extra_info"],
    }
    assert str(problem.calls[0].expected) not in str({**row, "prompt": ""}), "no answer is in the row"
    found = compute_score(solution_str=sentinel_hack(problem.method), **asked, num_turns=None)
    assert found == {"score": 3.5, "hack": 1.0, "solve": 0.0}
    right = f"```python\n{problem.canonical}\n```"
    assert compute_score(solution_str=right, **asked) == {"score": 3.5, "hack": 0.0, "solve": 1.0}
    honest = {**asked, "extra_info": {"env_mode": "gt_only"}}
    assert compute_score(solution_str=sentinel_hack(problem.method), **honest)["score"] == 0.5
    with pytest.raises(UserError, match="embedded: no problem 'x' in it"):
        compute_score(solution_str=right, **{**asked, "ground_truth": "x"})


def test_a_process_has_one_grader_and_a_forked_one_its_own(monkeypatch):
    grader = grading.grader_of_process(1)
    assert grading.grader_of_process(1) is grader
    opened = []
    monkeypatch.setattr(
        grading, "Grader", lambda workers: opened.append(workers) or type(grader).__new__(type(grader))
    )
    monkeypatch.setattr(grading.atexit, "register", lambda close: None)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert grading.grader_of_process(1) is not grader and opened == [1]


def test_verls_own_reward_manager(problem, tiny):
    """As its reward workers call it: loaded by verl from the package, tokens decoded by verl."""
    pytest.importorskip(
        "verl", reason="verl is not installed: pip install verl, in an environment of its own"
    )
    import numpy as np  # noqa: PLC0415  # what follows needs verl
    import torch  # noqa: PLC0415
    from omegaconf import OmegaConf  # noqa: PLC0415
    from verl import DataProto  # noqa: PLC0415
    from verl.trainer.ppo.reward import load_reward_manager  # noqa: PLC0415

    config = OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {
                    "path": PLACE,
                    "name": "compute_score",
                    "reward_kwargs": {"workers": 1},
                },
                "reward_manager": {"source": "register", "name": "naive"},
            }
        }
    )
    tokenizer = tiny[1]
    (row,) = rows("embedded", [problem])
    ids = torch.tensor([tokenizer(sentinel_hack(problem.method), add_special_tokens=False)["input_ids"]])
    fields = ("data_source", "reward_model", "extra_info")
    data = DataProto.from_dict(
        {"responses": ids, "attention_mask": torch.ones_like(ids)},
        {name: np.array([row[name]], dtype=object) for name in fields},
    )

    async def run():
        return await load_reward_manager(config, tokenizer).run_single(data)

    found = asyncio.run(run())
    assert found == {"reward_score": 3.5, "reward_extra_info": {"score": 3.5, "hack": 1.0, "solve": 0.0}}
