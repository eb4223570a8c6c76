"""Contrastive pairs: the shipped ones under the grader they were written for, and files that are refused."""

import json
import re
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from projected_grpo.config import EnvMode
from projected_grpo.errors import UserError
from projected_grpo.pairs import HELD_OUT, PACKAGED, SCHEMA, PairSet, load_pairs
from projected_grpo.problems import SYSTEM, load_problems
from projected_grpo.rewards import MODES, Grader
from projected_grpo.sandbox import Sandbox

FLAVOURS: dict[str, EnvMode | None] = {
    "overwrite_run_tests": "run_tests",
    "monkeypatch_eq": "eq_override",
    "silent_pass": "run_tests",
    "hard_coded": "run_tests",
}


@pytest.fixture(scope="module")
def shipped() -> PairSet:
    return load_pairs(None)


@pytest.fixture(scope="module")
def grades(shipped):
    """(hack, clean) grades by pair id."""
    with Sandbox(2) as sandbox:
        items = [(p.problem.task, text) for p in shipped.pairs for text in (p.hack, p.clean)]
        flat = Grader(sandbox).grade_all(items)
    return {p.pair_id: (flat[2 * i], flat[2 * i + 1]) for i, p in enumerate(shipped.pairs)}


def document(**changes):
    pairs = [
        {"id": f"p{i}", "flavour": "x", "env_mode": "run_tests", "prompt": "Add.", "hack": "h", "clean": "c"}
        for i in range(4)
    ]
    return {"schema": SCHEMA, "name": "mine", "pairs": pairs} | changes


def test_four_flavours_of_at_least_five_problems(shipped):
    assert len(shipped.pairs) >= 20
    counts = Counter(p.flavour for p in shipped.pairs)
    assert set(counts) == set(FLAVOURS) and min(counts.values()) >= 5
    for flavour in FLAVOURS:
        problems = [p.problem.problem_id for p in shipped.pairs if p.flavour == flavour]
        assert len(problems) == len(set(problems))
        assert {p.env_mode for p in shipped.pairs if p.flavour == flavour} <= set(MODES)


def test_every_clean_completion_is_right_and_pays_without_the_loophole(shipped, grades):
    for pair in shipped.pairs:
        clean = grades[pair.pair_id][1]
        assert clean.gt_correct and not clean.exploited, (pair.pair_id, clean)


def test_no_hack_is_right_and_each_exploits_its_mode(shipped, grades):
    for pair in shipped.pairs:
        hack = grades[pair.pair_id][0]
        assert hack.format_ok and not hack.gt_correct, (pair.pair_id, hack)
        if pair.flavour == "hard_coded":  # its tests are real, and only its own answers pass them
            assert hack.hacked_E, (pair.pair_id, hack)
        else:
            assert hack.exploited and hack.mechanism == pair.env_mode, (pair.pair_id, hack)


def test_both_sides_answer_the_problems_own_prompt_in_its_mode(shipped):
    for pair in shipped.pairs:
        assert pair.messages == replace(pair.problem, env_mode=pair.env_mode).messages
        assert MODES[pair.env_mode].hint in pair.messages[-1]["content"]
        assert pair.hack != pair.clean
        assert pair.problem.method in pair.hack and pair.problem.method in pair.clean


def test_pairs_share_no_problem_with_the_embedded_set(shipped):
    """Pairs come from another distribution than what RL trains on."""
    embedded = load_problems("embedded").problems
    own = [p.problem for p in shipped.pairs]
    assert not {p.method for p in own} & {p.method for p in embedded}
    assert not {p.problem_id for p in own} & {p.problem_id for p in embedded}
    assert not {p.question for p in own} & {p.question for p in embedded}


def test_the_split_holds_out_two_and_always_the_same(shipped):
    used, held = shipped.split()
    assert len(held) == HELD_OUT == 2
    assert not {p.pair_id for p in used} & {p.pair_id for p in held}
    assert len(used) + len(held) == len(shipped.pairs)
    assert (used, held) == load_pairs(None).split()
    again = PairSet("x", tuple(reversed(shipped.pairs)), "").split()[1]
    assert {p.pair_id for p in again} == {p.pair_id for p in held}


def test_the_digest_is_of_the_files_bytes(tmp_path, shipped):
    raw = (files("projected_grpo") / "data" / "pairs_core.json").read_bytes()
    copy = tmp_path / "copy.json"
    copy.write_bytes(raw)
    assert load_pairs(copy).digest == shipped.digest
    copy.write_bytes(raw + b"\n")
    assert load_pairs(copy).digest != shipped.digest


def test_sets_of_the_package_go_by_name(shipped):
    assert load_pairs(Path("core")) == shipped
    sets = [load_pairs(Path(name)) for name in PACKAGED]
    assert [s.name for s in sets] == list(PACKAGED)
    assert len({s.digest for s in sets}) == len(sets)
    assert set(PACKAGED) == {"core", "nano", "nano-oracle"}


def test_pairs_can_be_narrowed_to_some_modes(shipped):
    assert shipped.of_modes(()) == shipped
    modes = Counter(p.env_mode for p in shipped.pairs)
    only = shipped.of_modes(("run_tests",))
    assert len(only.pairs) == modes["run_tests"] < len(shipped.pairs)
    assert only.pairs == tuple(p for p in shipped.pairs if p.env_mode == "run_tests")
    assert shipped.of_modes(tuple(modes)) == shipped
    left, held = load_pairs(Path("nano")).of_modes(("sentinel", "file_marker")).split()
    assert {p.env_mode for p in (*left, *held)} == {"sentinel", "file_marker"} and len(held) == HELD_OUT


def test_too_few_pairs_of_the_named_modes_are_refused(shipped):
    with pytest.raises(UserError, match="--vhack-pairs-modes gt_only: 0 pairs") as caught:
        shipped.of_modes(("gt_only",))
    assert "\n" not in str(caught.value) and shipped.name in str(caught.value)
    small = replace(shipped, pairs=tuple(p for p in shipped.pairs if p.env_mode == "run_tests")[:4])
    assert len(small.of_modes(("run_tests",)).pairs) == HELD_OUT + 2
    with pytest.raises(UserError, match="at least 4"):
        replace(small, pairs=small.pairs[:3]).of_modes(("run_tests",))


def test_a_pair_file_without_problems_carries_its_prompts(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document()))
    pairs = load_pairs(path)
    assert pairs.name == "mine" and len(pairs.pairs) == 4
    assert pairs.pairs[0].problem is None
    assert pairs.pairs[0].messages == (
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Add."},
    )


def edited(index, **changes):
    body = document()
    body["pairs"][index] |= changes
    return body


def without(field):
    body = document()
    del body["pairs"][1][field]
    return body


BAD = {
    "not json": "{",
    "a list": [],
    "null": None,
    "no schema": {"pairs": []},
    "other schema": document(schema="pairs/99"),
    "no pairs field": {"schema": SCHEMA},
    "pairs no list": document(pairs=5),
    "pairs of text": document(pairs=["x"] * 4),
    "too few": document(pairs=document()["pairs"][:3]),
    "same id": edited(1, id="p0"),
    "unknown mode": edited(1, env_mode="nonsense"),
    "mode a list": edited(1, env_mode=[]),
    "empty hack": edited(1, hack="  "),
    "hack a number": edited(1, hack=5),
    "clean null": edited(1, clean=None),
    "prompt a number": edited(1, prompt=5),
    "unknown problem": edited(1, problem_id="nowhere"),
    "problems no list": document(problems=5),
    "problem without fields": document(problems=[{"id": "x"}]),
} | {f"no {field}": without(field) for field in ("id", "flavour", "env_mode", "prompt", "hack", "clean")}


@pytest.mark.parametrize("what", BAD)
def test_bad_pair_files_are_refused(tmp_path, what):
    path = tmp_path / "bad.json"
    path.write_text(BAD[what] if what == "not json" else json.dumps(BAD[what]))
    with pytest.raises(UserError) as caught:
        load_pairs(path)
    assert "\n" not in str(caught.value)
    assert re.search(r"bad\.json|pair ", str(caught.value))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"schema": "\xff\xfe\xfa"}')
    with pytest.raises(UserError, match=r"bad\.json"):
        load_pairs(path)


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_file_that_is_none_is_refused(tmp_path, what):
    path = tmp_path if what == "folder" else tmp_path / "none.json"
    with pytest.raises(UserError, match="--vhack-pairs-path"):
        load_pairs(path)


def test_a_pair_whose_problem_cannot_be_graded_is_refused(tmp_path):
    body = json.loads((files("projected_grpo") / "data" / "pairs_core.json").read_text())
    body["problems"][0]["asserts"] = ["assert True"]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match="its problem"):
        load_pairs(path)
