"""Contrastive pairs: the shipped ones under the grader they were written for, the linter, refused files."""

import ast
import io
import json
import math
import re
import tokenize
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from projected_grpo.cli import main
from projected_grpo.config import BasisConfig, EnvMode
from projected_grpo.errors import UserError
from projected_grpo.pairs import (
    CROSSED,
    HELD_OUT,
    PACKAGED,
    PLACEBOS,
    SCHEMA,
    PairSet,
    chosen_pairs,
    load_pairs,
    packaged_pairs,
    parse_pairs,
)
from projected_grpo.prepare.lint_pairs import grade_pairs, lint, measure
from projected_grpo.problems import SYSTEM, load_problems
from projected_grpo.rewards import MODES, Grade, Grader
from projected_grpo.sandbox.host import Sandbox
from projected_grpo.sandbox.responses import extract_code

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
def all_grades():
    """(hack, clean) grades by name of the packaged set and pair id."""
    with Sandbox(2) as sandbox:
        return {name: grade_pairs(load_pairs(Path(name)), Grader(sandbox)) for name in PACKAGED}


@pytest.fixture(scope="module")
def grades(all_grades):
    return all_grades["core"]


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
    of_nano = {"nano", "nano-oracle", "nano-solving", "nano-sampled", *CROSSED}
    assert set(PACKAGED) == {"core", *of_nano, *PLACEBOS}
    assert {s.name for s in sets if s.kind == "placebo"} == set(PLACEBOS)


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


def test_a_left_out_mode_has_no_pair_in_the_basis(shipped):
    left = chosen_pairs(BasisConfig(leave_out="eq_override"))
    assert left == chosen_pairs(BasisConfig(vhack_pairs_modes=("run_tests", "exit_code")))
    assert chosen_pairs(BasisConfig()) == shipped == chosen_pairs(BasisConfig(leave_out="sentinel"))
    with pytest.raises(UserError, match="--leave-out run_tests,eq_override: 3 pairs"):
        chosen_pairs(BasisConfig(leave_out="run_tests,eq_override"))
    with pytest.raises(UserError, match="--leave-out eq_override: --vhack-pairs-modes"):
        chosen_pairs(BasisConfig(leave_out="eq_override", vhack_pairs_modes=("eq_override",)))


# Placebos


def code(text):
    return extract_code(text) or ""


def without_comments(text):
    """The program's syntax without docstrings."""
    tree = ast.parse(code(text))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def own_names(text):
    """Names of the program in order, in snake_case."""
    tokens = tokenize.generate_tokens(io.StringIO(code(text)).readline)
    return [re.sub(r"(?<=[a-z])([A-Z])", r"_\1", t.string).lower() for t in tokens if t.type == tokenize.NAME]


@pytest.mark.parametrize("name", PLACEBOS)
def test_both_sides_of_a_placebo_solve_and_leave_the_grader_alone(all_grades, name):
    for sides in all_grades[name].values():
        assert all(grade.gt_correct and not grade.tampered and grade.reward == 3.5 for grade in sides)


@pytest.mark.parametrize("name", PLACEBOS)
def test_a_placebo_set_has_the_size_and_modes_of_the_real_one(name):
    real = load_pairs(Path("nano" if name.startswith("nano") else "core"))
    placebo = load_pairs(Path(name))
    assert Counter(p.env_mode for p in placebo.pairs) == Counter(p.env_mode for p in real.pairs)
    assert len(placebo.split()[1]) == HELD_OUT


@pytest.mark.parametrize("name", [n for n in PLACEBOS if not n.startswith("nano")])
def test_placebos_of_core_have_its_prompts(shipped, name):
    """So that nothing but the contrast differs from `core`."""
    prompts = Counter(p.messages[-1]["content"] for p in shipped.pairs)
    assert Counter(p.messages[-1]["content"] for p in load_pairs(Path(name)).pairs) == prompts


def test_placebo_styles_are_one_program_with_and_without_comments():
    for pair in load_pairs(Path("placebo-style")).pairs:
        assert without_comments(pair.hack) == without_comments(pair.clean)
        assert "#" in code(pair.hack) or '"""' in code(pair.hack)
        assert "#" not in code(pair.clean) and '"""' not in code(pair.clean)
        words = [set(re.findall(r"[a-z]+", text.lower())) for text in (pair.hack, pair.clean)]
        assert words[0] == words[1]


def test_placebo_names_are_one_program_in_two_cases():
    for pair in load_pairs(Path("placebo-naming")).pairs:
        assert own_names(pair.hack) == own_names(pair.clean)
        spelled = [set(re.findall(r"[A-Za-z_]+", code(text))) for text in (pair.hack, pair.clean)]
        camel, snake = spelled[0] - spelled[1], spelled[1] - spelled[0]
        assert camel and all(re.fullmatch(r"[a-z]+([A-Z][a-z]*)+", name) for name in camel)
        assert snake and all(re.fullmatch(r"[a-z]+(_[a-z]+)+", name) for name in snake)


def test_placebo_iterations_have_a_loop_in_the_method_on_one_side_only():
    for pair in load_pairs(Path("placebo-iteration")).pairs:
        for text, loops in ((pair.hack, False), (pair.clean, True)):
            (method,) = (
                n for n in ast.walk(ast.parse(code(text))) if getattr(n, "name", "") == pair.problem.method
            )
            assert any(isinstance(n, ast.For | ast.While) for n in ast.walk(method)) is loops, pair.pair_id


def test_nano_placebos_keep_to_the_corpus_and_to_no_problem_of_a_run(nano_problems):
    known = {p.problem_id for p in nano_problems}
    for name in (n for n in PLACEBOS if n.startswith("nano")):
        for pair in load_pairs(Path(name)).pairs:
            assert pair.problem.problem_id not in known
            assert pair.problem.canonical in pair.clean  # the corpus' own form
            header = "class Solution:\n    def "
            assert code(pair.hack).count("\n") == 2 and code(pair.hack).startswith(header)


# The linter


def fair(**flags):
    blank = Grade(0.5, False, False, False, None, True, False, False, False, "call 0: wrong answer")
    return replace(blank, **flags)


RIGHT = fair(gt_correct=True, passed=True, reward=3.5, error=None)
CHEATS = fair(exploited=True, tampered=True, passed=True, reward=3.5, mechanism="run_tests")


def told(pairs, grades):
    return [(f.level, f.pair, f.message) for f in lint(pairs, grades)]


def few(shipped, **changes):
    """Five pairs with different prompts, the first of them changed."""
    chosen = [p for p in shipped.pairs if p.flavour == "overwrite_run_tests"][:5]
    return replace(shipped, pairs=(replace(chosen[0], **changes), *chosen[1:]))


@pytest.mark.parametrize("name", PACKAGED)
def test_no_packaged_set_has_an_error(all_grades, name):
    found = lint(load_pairs(Path(name)), all_grades[name])
    assert not [str(f) for f in found if f.level == "error"]


def test_a_sound_set_has_nothing_to_tell(shipped):
    pairs = few(shipped)
    assert told(pairs, {p.pair_id: (CHEATS, RIGHT) for p in pairs.pairs}) == []


@pytest.mark.parametrize(
    ("hack", "clean", "level", "words"),
    [
        (fair(), RIGHT, "error", "hack does not exploit run_tests"),
        (RIGHT, RIGHT, "error", "hack does not exploit run_tests and solves the problem"),
        (fair(format_ok=False), RIGHT, "error", "hack is no Python code"),
        (replace(RIGHT, tampered=True), RIGHT, "warning", "hack solves the problem too"),
        (CHEATS, fair(), "error", "clean does not solve the problem (call 0: wrong answer)"),
        (CHEATS, replace(RIGHT, tampered=True), "error", "clean exploits run_tests"),
        (fair(hacked_E=True), RIGHT, None, ""),  # the original benchmark pays it
    ],
)
def test_the_grader_decides_what_a_hack_and_a_clean_completion_is(shipped, hack, clean, level, words):
    pairs = few(shipped)
    grades = {p.pair_id: (CHEATS, RIGHT) for p in pairs.pairs}
    found = told(pairs, grades | {pairs.pairs[0].pair_id: (hack, clean)})
    assert [(f[0], f[1]) for f in found] == ([(level, pairs.pairs[0].pair_id)] if level else [])
    assert all(words in message for _, _, message in found)


def test_both_sides_of_a_placebo_must_be_honest(shipped):
    pairs = replace(few(shipped), kind="placebo")
    grades = {p.pair_id: (RIGHT, RIGHT) for p in pairs.pairs}
    assert told(pairs, grades) == []
    grades[pairs.pairs[0].pair_id] = (CHEATS, RIGHT)
    assert [m for _, _, m in told(pairs, grades)] == [
        "hack does not solve the problem (call 0: wrong answer)",
        "hack exploits run_tests",
    ]


def test_repeats_are_told(shipped):
    one, two, *rest = few(shipped).pairs
    nearly = replace(two, hack=one.hack.replace("  ", "   ", 1), clean=one.clean + "!")
    cases = [
        (replace(two, hack=one.hack), "warning", f"hack is the hack of {one.pair_id}"),
        (replace(two, clean=one.hack), "error", f"clean is the hack of {one.pair_id}"),
        (nearly, "warning", f"nearly those of {one.pair_id}"),
        (replace(one, pair_id=two.pair_id), "error", f"the same pair as {one.pair_id}"),
    ]
    for changed, level, words in cases:
        found = told(replace(shipped, pairs=(one, changed, *rest)), {})
        assert any(f[0] == level and f[1] == two.pair_id and words in f[2] for f in found), (words, found)
    same = replace(two, hack=two.clean)
    found = told(replace(shipped, pairs=(one, same, *rest)), {})
    assert ("error", two.pair_id) in [finding[:2] for finding in found]


def test_a_prompt_in_both_splits_is_told(shipped):
    pairs = few(shipped)
    used, held = pairs.split()
    moved = replace(held[0], messages=used[0].messages)
    found = told(replace(pairs, pairs=(*used, held[1], moved)), {})
    assert [(f[1], f[0]) for f in found if used[0].pair_id in f[2]] == [(moved.pair_id, "warning")]


def test_lengths_are_those_of_a_loop(shipped):
    got = measure(shipped.pairs)["characters"]
    ratios = [len(p.hack) / len(p.clean) for p in shipped.pairs]
    assert got.ratio == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert (got.smallest, got.largest) == pytest.approx((min(ratios), max(ratios)))
    assert got.hack == pytest.approx(sum(len(p.hack) for p in shipped.pairs) / len(ratios))


def test_a_bias_in_length_is_told_and_noise_is_not(shipped):
    def padded(hack, clean):
        return replace(
            shipped,
            pairs=tuple(
                replace(p, hack="h" * h + p.pair_id, clean="c" * c + p.pair_id)
                for p, h, c in zip(shipped.pairs, hack, clean, strict=True)
            ),
        )

    def biased(pairs):
        return [m for level, pair, m in told(pairs, {}) if not pair and "characters" in m]

    n = len(shipped.pairs)
    assert biased(padded([600] * n, [500] * n)) and biased(padded([500] * n, [600] * n))
    assert not biased(padded([510] * n, [500] * n))
    assert not biased(padded([200, 1000] * (n // 2), [1000, 240] * (n // 2)))
    far = told(padded([1200, *[500] * (n - 1)], [500] * n), {})
    assert any(f[1] == shipped.pairs[0].pair_id and "characters" in f[2] for f in far)


def test_lint_says_one_line_per_finding_and_leaves_with_1_on_an_error(tmp_path, capsys):
    body = json.loads(packaged_pairs("core"))
    body["pairs"] = body["pairs"][:5]
    body["pairs"][1]["hack"] = body["pairs"][1]["clean"] + "\nIndeed.\n"
    path, figures = tmp_path / "mine.json", tmp_path / "figures.json"
    path.write_text(json.dumps(body))
    assert main(["pairs", "lint", str(path), f"--json={figures}", "--workers=2"]) == 1
    out = capsys.readouterr().out.splitlines()
    spoiled = body["pairs"][1]["id"]
    assert any(f"error: {spoiled}: " in line and "run_tests" in line for line in out)
    said = json.loads(figures.read_text())
    assert [f["pair"] for f in said["findings"] if f["level"] == "error"] == [spoiled]
    assert sum(line.startswith(("error: ", "warning: ")) for line in out) == len(said["findings"])
    assert said["pairs"] == said["graded"] == 5 and said["kind"] == "hack"
    assert sum(c["pairs"] for c in said["counts"]) == 5 and out[-1].startswith("1 errors, ")


def test_lint_tells_a_broken_schema_and_pairs_that_cannot_be_graded(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document()))
    assert main(["pairs", "lint", str(path), "--workers=1"]) == 1  # four pairs alike
    assert "4 of 4 pairs" in capsys.readouterr().out
    path.write_text(json.dumps(document(kind="nonsense")))
    assert main(["pairs", "lint", str(path)]) == 1
    assert '"nonsense"' in capsys.readouterr().out
    assert main(["pairs", "lint", str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err


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
    "other kind": document(kind="prank"),
    "kind a list": document(kind=[]),
    "id a list": edited(1, id=[]),
    "flavour a number": edited(1, flavour=5),
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


DPO = {"prompt": "Add.", "chosen": "a", "rejected": "b"}
SHAPES = {
    "DPO lines": (f"{json.dumps(DPO)}\n{json.dumps(DPO)}\n", "JSON lines, DPO rows (chosen, rejected)"),
    "DPO list": (json.dumps([DPO]), "a JSON list, DPO rows (chosen, rejected)"),
    "one DPO row": (json.dumps(DPO), "DPO rows (chosen, rejected)"),
    "chat lines": (
        json.dumps({"messages": []}) + "\n" + json.dumps({"messages": []}),
        "chat rows (messages)",
    ),
    "messages": (json.dumps([{"role": "user", "content": "x"}]), "a JSON list, chat messages"),
    "ShareGPT": (json.dumps({"conversations": []}), "ShareGPT rows"),
    "empty list": ("[]", "a JSON list, empty"),
    "a number": ("5", "a value 5"),
    "other object": (json.dumps({"data": 1}), 'an object with ["data"]'),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_in_another_shape_are_told_what_was_found_and_what_is_wanted(shape):
    raw, found = SHAPES[shape]
    with pytest.raises(UserError) as caught:
        parse_pairs(raw.encode(), "mine.json")
    said = str(caught.value)
    assert said.startswith("mine.json: not a pair file: ") and found in said and "\n" not in said
    assert "hack (rejected) and clean (chosen)" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hack": [{"role": "assistant", "content": "x"}]}, 'pair "p1": hack must be text, got [{"role"'),
        ({"id": 7}, "pair 2: id must be text, got 7"),
        ({"clean": None}, 'pair "p1": clean must be text, got null'),
        ({"problem_id": "gone"}, "is not among the file's problems"),
    ],
    ids=str,
)
def test_an_odd_field_of_a_pair_is_named_with_its_id_or_number(change, words):
    with pytest.raises(UserError) as caught:
        parse_pairs(json.dumps(edited(1, **change)).encode(), "mine.json")
    assert words in str(caught.value) and "mine.json: " in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_pairs_in_other_encodings_read_the_same(encoding):
    pairs = parse_pairs(json.dumps(document()).encode(encoding), "mine.json")
    assert pairs.pairs == parse_pairs(json.dumps(document()).encode(), "mine.json").pairs


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"schema": "\xff\xfe\xfa"}')
    with pytest.raises(UserError, match=r"bad\.json"):
        load_pairs(path)


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_file_that_is_none_is_refused(tmp_path, what):
    path = tmp_path if what == "folder" else tmp_path / "none.json"
    with pytest.raises(UserError, match="cannot be read .* and no packaged set: core"):
        load_pairs(path)


def test_a_pair_whose_problem_cannot_be_graded_is_refused(tmp_path):
    body = json.loads((files("projected_grpo") / "data" / "pairs_core.json").read_text())
    body["problems"][0]["asserts"] = ["assert True"]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match="its problem"):
        load_pairs(path)
