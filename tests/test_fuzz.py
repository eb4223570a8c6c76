"""Every file format that is read, damaged at random: it is read, or refused in one line that names it.

The usual budget is small; PROJECTED_GRPO_FUZZ=5000 makes it a campaign of that many examples a format.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import FUZZ, altered, damaged, jsonl, read_or_refuse
from projected_grpo.antipasto import wrap
from projected_grpo.arms.gate import GateState
from projected_grpo.basis_file import Axes, Extraction, load_extraction, save_extraction
from projected_grpo.checks import validate
from projected_grpo.config import PRESETS, from_json, to_json
from projected_grpo.errors import UserError
from projected_grpo.pairs import load_pairs
from projected_grpo.pools import join, load_pool
from projected_grpo.prepare.grade_file import read_completions
from projected_grpo.problems import load_problems
from projected_grpo.proj import HackBasis, PairGrads
from projected_grpo.run.checkpoint import load_adapter, read_state, restore_state, save_adapter, save_state
from projected_grpo.runlog import read_json

# JSON and JSONL

BENCHMARK = [
    {
        "id": i,
        "func_name": "Solution().f",
        "difficulty": "medium",
        "prompt": [{"role": "user", "content": "Called f and should pass all tests. Go."}],
        "gt_answer": ["assert Solution().f(n = 1) == 2", "assert Solution().f(n=[1, 2]) == 'x'"],
        "setup_code": "import math",
        "canonical_solution": "class Solution:\n    def f(self, n):\n        return n + 1\n",
    }
    for i in range(2)
]
LEETCODE = [
    {
        "entry_point": "Solution().f",
        "task_id": "a-task",
        "meta": {
            "question_id": 3,
            "question_title": "A title",
            "lang_code": "class Solution:\n    def f(self, n: int) -> int:\n        ",
            "difficulty": "Hard",
        },
        "test": "def check(candidate):\n    assert candidate(n = 1) == 2\n    assert candidate(n = 2) == 3\n",
        "prompt": "import math\n",
        "completion": "class Solution:\n    def f(self, n):\n        return n + 1\n",
    }
]
POOL = [
    {
        "problem_id": "1",
        "prompt": "PROBLEM:\nAdd one. class Solution called f",
        "completion": "```python\nclass Solution:\n    def f(self, n): return 2\n```",
        "reward": 3.5,
        "hacked": True,
        "gt_pass": False,
        "env_mode": "sentinel",
    }
]
COMPLETIONS = [{"problem_id": "0", "completion": "```python\nx\n```", "env_mode": "exit_code"}]
PAIRS = {
    "schema": "projected_grpo.pairs/1",
    "name": "few",
    "pairs": [
        {
            "id": f"p{i}",
            "flavour": f"{i % 2}",
            "env_mode": "run_tests",
            "prompt": "Go",
            "hack": "h",
            "clean": "c",
        }
        for i in range(5)
    ],
}


@pytest.mark.parametrize("rows", [BENCHMARK, LEETCODE], ids=["benchmark", "leetcode"])
def test_the_documents_that_are_altered_are_good_ones(tmp_path, rows):
    """Else everything would be refused for one and the same reason."""
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    assert len(load_problems(str(tmp_path / "p.jsonl")).problems) == len(rows)
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    assert len(load_pairs(tmp_path / "pairs.json").pairs) == 5
    (tmp_path / "prompt_1.jsonl").write_bytes(jsonl(POOL))
    assert len(load_pool(tmp_path)) == 1


@given(data=st.data())
@FUZZ
@pytest.mark.parametrize("rows", [BENCHMARK, LEETCODE], ids=["benchmark", "leetcode"])
def test_problems(tmp_path, rows, data):
    path = tmp_path / "p.jsonl"
    if data.draw(st.booleans()):
        other = data.draw(altered(rows))
        path.write_bytes(jsonl(other if isinstance(other, list) else [other]))
    else:
        path.write_bytes(data.draw(damaged(jsonl(rows))))
    read_or_refuse(tmp_path, lambda: load_problems(str(path)))


@pytest.fixture(scope="module")
def few():
    return load_problems("embedded").problems[:3]


@given(rows=altered(POOL), partition=st.none() | altered({"1": "sentinel", "2": "run_tests"}), data=st.data())
@FUZZ
def test_pools(tmp_path, few, rows, partition, data):
    folder = tmp_path / "pool"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    text = jsonl(rows if isinstance(rows, list) else [rows])
    (folder / "prompt_1.jsonl").write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    if partition is not None:
        (folder / "partition.json").write_text(json.dumps(partition))
    read_or_refuse(tmp_path, lambda: join(load_pool(folder), few))


@given(data=st.data())
@FUZZ
def test_pairs(tmp_path, data):
    path = tmp_path / "pairs.json"
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(altered(PAIRS))))
    else:
        path.write_bytes(data.draw(damaged(json.dumps(PAIRS).encode())))
    read_or_refuse(tmp_path, lambda: load_pairs(path).split())


@given(rows=altered(COMPLETIONS), data=st.data())
@FUZZ
def test_completions(tmp_path, rows, data):
    path, problems = tmp_path / "c.jsonl", tmp_path / "p.jsonl"
    problems.write_bytes(jsonl(BENCHMARK))
    text = jsonl(rows if isinstance(rows, list) else [rows])
    path.write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    read_or_refuse(tmp_path, lambda: read_completions(path, load_problems(str(problems)).problems))


@given(data=st.data())
@FUZZ
def test_settings_of_a_run_to_resume(tmp_path, data):
    path = tmp_path / "config.json"
    made = {"run_id": "x", "config": to_json(PRESETS["smoke"][1])}
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(altered(made))))
    else:
        path.write_bytes(data.draw(damaged(json.dumps(made).encode())))

    def read():
        validate(from_json(read_json(path, "--resume").get("config", {})))

    read_or_refuse(tmp_path, read)


# Safetensors


@pytest.fixture(scope="module")
def policy(small_model):
    return wrap(small_model("qwen3", torch.float32), None)


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    """One good file of each kind, as bytes, with the function that reads it."""
    folder = tmp_path_factory.mktemp("whole")
    adam = torch.optim.AdamW([k for la in policy.layers.values() for k in (la.delta_s, la.delta_hack)])
    names = sorted(policy.layers)
    V = {m: torch.eye(policy.ranks[m])[:2].contiguous() for m in names}
    basis = HackBasis(V, {m: V[m][0].clone() for m in names})
    gate = GateState(dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.0))
    save_adapter(folder / "adapter", policy, {"step": 3}, deployed=False)
    save_state(folder / "state", policy, adam, basis, gate, {"step": 3})
    meta = {"schema": "x", "top_k": 2}
    S = {m: torch.ones(2) for m in names}
    grads = PairGrads(*({m: axes + sign for m, axes in V.items()} for sign in (1, -1)))
    save_extraction(folder / "basis", Extraction(Axes(V, S, grads.differences()), grads, meta))
    device = torch.device("cpu")
    return {
        "adapter": ((folder / "adapter").read_bytes(), lambda path: load_adapter(path, policy)),
        "state": (
            (folder / "state").read_bytes(),
            lambda path: restore_state(read_state(path), policy, adam),
        ),
        "basis": ((folder / "basis").read_bytes(), lambda path: load_extraction(path, meta, device)),
    }


@st.composite
def reheaded(draw, data):
    """A safetensors file whose header says something else, with its length put right."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    told = json.loads(header["__metadata__"]["projected_grpo"])
    if draw(st.booleans()):
        header["__metadata__"]["projected_grpo"] = json.dumps(draw(altered(told)))
    else:
        header = draw(altered(header))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@given(data=st.data())
@FUZZ
@pytest.mark.parametrize("kind", ["adapter", "state", "basis"])
def test_safetensors(tmp_path, whole, kind, data):
    good, read = whole[kind]
    path = tmp_path / kind
    path.write_bytes(data.draw(reheaded(good)) if data.draw(st.booleans()) else data.draw(damaged(good)))
    read_or_refuse(tmp_path, lambda: read(path))


@given(data=st.binary(max_size=64))
@example(data=(2**63).to_bytes(8, "little") + b"{}")
@example(data=(2).to_bytes(8, "little") + b"{}")
@FUZZ
@pytest.mark.parametrize("kind", ["adapter", "state", "basis"])
def test_any_bytes_in_place_of_safetensors(tmp_path, whole, kind, data):
    path = Path(tmp_path / kind)
    path.write_bytes(data)
    with pytest.raises(UserError):
        whole[kind][1](path)
