"""The oracle reads every assert of the datasets, refuses the rest by name, and compares exactly."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo.sandbox.encode import Encoder, Unencodable
from projected_grpo.sandbox.oracle import (
    Call,
    LinkedList,
    Opaque,
    Subclass,
    Tree,
    as_assert,
    decode,
    parse_asserts,
    parse_check_function,
    same,
)

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "leetcode"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not on this machine")


def test_an_assert_is_split_into_a_call_without_and_a_value_with_the_answer():
    calls, problems = parse_asserts(["assert Solution().f(n = 7, q = [[1, 2]]) == [2, -inf, None]"], "f")
    assert not problems
    assert calls == (Call("Solution().f(n=7, q=[[1, 2]])", [2, float("-inf"), None]),)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("assert candidate(3, x = 'a') == (1, 2.0)", (1, 2.0)),
        ("assert candidate(head = list_node([1,2])) == True", True),
        ("assert candidate(1) == inf", float("inf")),
        ("assert candidate(1) == -float('inf')", float("-inf")),
        ("assert candidate(1) == {'a': {1, 2}}", {"a": {1, 2}}),
        ("assert is_same_list(candidate(1), list_node([3, 4]))", LinkedList((3, 4))),
        ("assert is_same_list(candidate(1), list_node([]))", None),
        ("assert is_same_tree(candidate(1), tree_node([1, None, 2]))", Tree(((1,), None, (2,)))),
        ("assert is_same_tree(candidate(1), tree_node([1, None, None]))", Tree(((1,),))),
        ("assert is_same_tree(candidate(1), tree_node([]))", None),
        ("assert candidate(1) == " + str(10**4000), 10**4000),
    ],
)
def test_check_functions_are_read(line, expected):
    calls, problems = parse_check_function(f"def check(candidate):\n    {line}\n", "f")
    assert not problems
    assert same(expected, calls[0].expected)
    assert calls[0].source.startswith("Solution().f(")


@pytest.mark.parametrize(
    "line",
    [
        "assert candidate(1) != 2",
        "assert candidate(1)",
        "assert candidate(1) == g(2)",
        "assert candidate(open('x')) == 2",
        "assert candidate(**{'a': 1}) == 2",
        "assert other(1) == 2",
        "assert is_same_list(candidate(1), tree_node([1]))",
        "assert candidate(1) == 2 == 2",
        "assert candidate(1) == __import__('os').system('true')",
        "x = candidate(1)",
    ],
)
def test_what_is_not_understood_is_reported_not_judged(line):
    calls, problems = parse_check_function(
        f"def check(candidate):\n    {line}\n    assert candidate(0) == 0", "f"
    )
    assert len(calls) == 1 and len(problems) == 1


def test_unusual_assert_lists_are_reported():
    lines = [
        "Solution().f(1) == 1",
        "assert Solution().g(1) == 1",
        "assert (",
        "",
        "assert Solution(2).f(1) == 1",
    ]
    calls, problems = parse_asserts(lines, "f")
    assert calls == () and len(problems) == len(lines)
    assert parse_check_function("def check(candidate): pass\nx = 1", "f")[1]


@pytest.mark.parametrize(
    ("expected", "got", "equal"),
    [
        (1, True, False),
        (True, 1, False),
        (2, 2.0, False),
        (2.0, 2, True),
        (2.0, True, False),
        ([2.0, -1.0], [2, -1], True),
        ((1,), [1], False),
        ([1], (1,), False),
        (0.1 + 0.2, 0.3, True),
        (1e9, 1e9 + 1, True),
        (1e9, 1e9 + 2, False),
        (4.77778, 4.777777777, True),
        (0.5, 0.5001, False),
        (float("nan"), float("nan"), True),
        (float("inf"), float("-inf"), False),
        (float("inf"), 1e308, False),
        ({1}, {True}, False),
        ({1, 2}, {2, 1}, True),
        ({1: 0.3}, {1: 0.1 + 0.2}, True),
        ({1: 2}, {1.0: 2}, False),
        ({1: 2}, {1: 2, 3: 4}, False),
        ("1", 1, False),
        (None, False, False),
        (None, [], False),
        ([], None, False),
        ([[1], [2]], [[1], [2], [3]], False),
        (1.0, 10**400, False),
        (LinkedList((1, 2)), LinkedList((1, 2)), True),
        (LinkedList((1, 2)), LinkedList((1, True)), False),
        (LinkedList((1, 2)), [1, 2], False),
        (Tree(((1,), None, (2,))), Tree(((1,), (2,))), False),
        (5, Subclass("Five", 5), False),
        (5, Opaque("Always"), False),
    ],
)
def test_comparison_rules(expected, got, equal):
    assert same(expected, got) is equal


def test_integers_beyond_the_decimal_limit_travel_and_compare():
    huge = 10**5000
    got = decode(json.loads(json.dumps(Encoder().encode([huge, -huge]))))
    assert same([huge, -huge], got) and not same([huge + 1, -huge], got) and not same([1.0, 1.0], got)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
        | st.frozensets(st.integers(), max_size=4)
    ),
    max_leaves=15,
)


@given(PLAIN)
def test_a_value_survives_the_trip_and_equals_itself(value):
    got = decode(json.loads(json.dumps(Encoder().encode(value))))
    assert type(got) is type(value) and same(value, got)


class Node:
    def __init__(self, val, next=None):
        self.val, self.next = val, next


class Branch:
    def __init__(self, val, left=None, right=None):
        self.val, self.left, self.right = val, left, right


def test_lists_and_trees_travel_by_structure():
    assert decode(Encoder().encode(Node(1, Node(2)))) == LinkedList((1, 2))
    tree = Branch(1, None, Branch(2, Branch(3)))
    expected = parse_check_function(
        "def check(c):\n    assert is_same_tree(c(1), tree_node([1, None, 2, 3]))", "f"
    )[0][0].expected
    assert same(expected, decode(Encoder().encode(tree)))
    assert not same(expected, decode(Encoder().encode(Branch(1, Branch(2, Branch(3))))))


def test_a_subclass_carries_its_plain_base():
    class Six(int):
        def __add__(self, other):
            return 0

        def __int__(self):
            return 0

    assert decode(Encoder().encode(Six(6))) == Subclass("Six", 6)
    assert decode(Encoder().encode(object())) == Opaque("object")


def test_values_without_end_are_unencodable(unchecked):
    ring = Node(1)
    ring.next = ring
    loop: list = []
    loop.append(loop)
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    for value in (ring, loop, deep, [0] * 300_000, 1 << 2_000_000):
        with pytest.raises(Unencodable):
            Encoder().encode(value)


@pytest.mark.parametrize(
    "payload",
    [
        {"t": "int", "v": "zz"},
        {"t": "set", "v": [[1]]},
        {"t": "dict", "v": [1]},
        {"t": "tree", "v": [3]},
        {"t": "set", "v": list(range(100_000))},
        {"t": ["x"]},
        {},
    ],
)
def test_a_malformed_payload_equals_nothing(payload):
    assert isinstance(decode(payload), Opaque)
    assert isinstance(decode([payload][0]), Opaque)


def test_a_payload_nested_past_the_recursion_limit_is_malformed():
    deep: list = []
    for _ in range(50_000):
        deep = [deep]
    assert decode(deep) == Opaque("malformed")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
hashable = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
values = st.recursive(
    scalars | st.sets(hashable, min_size=1, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(lambda items: LinkedList(tuple(items)))
    ),
    max_leaves=8,
)


def in_order(value):
    """Its repr, whatever order its sets were built in."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__} of {sorted(map(repr, value))}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {[in_order(item) for item in value]}"
    if isinstance(value, dict):
        return f"dict of {[(repr(key), in_order(item)) for key, item in value.items()]}"
    if isinstance(value, LinkedList):
        return f"linked {[in_order(item) for item in value.values]}"
    return repr(value)


@given(value=values)
def test_a_call_written_as_an_assert_reads_back_as_it_was(value):
    call = Call("Solution().f(n=7)", value)
    calls, problems = parse_asserts([as_assert(call)], "f")
    assert not problems and len(calls) == 1
    assert calls[0].source == call.source and in_order(calls[0].expected) == in_order(value)


@pytest.mark.parametrize(
    "levels", ["[1]", "[1, None, 2]", "[1, 2, None, None, 3]", "[5, 4, 8, 11, None, 13]"]
)
def test_a_tree_written_as_an_assert_reads_back_as_it_was(levels):
    calls, _ = parse_asserts([f"assert Solution().f(n=7) == tree_node({levels})"], "f")
    assert isinstance(calls[0].expected, Tree)
    assert parse_asserts([as_assert(calls[0])], "f") == (calls, ())


@needs_data
def test_every_assert_of_both_files_is_understood():
    counts = []
    for line in (DATA / "leetcode_test_medhard.jsonl").read_text().splitlines()[::4]:
        row = json.loads(line)
        calls, problems = parse_asserts(row["gt_answer"], row["func_name"].removeprefix("Solution()."))
        assert not problems, row["id"]
        counts.append(len(calls) == len(row["gt_answer"]))
    with gzip.open(DATA / "LeetCodeDataset-v0.2.0-train.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            calls, problems = parse_check_function(
                row["test"], row["entry_point"].removeprefix("Solution().")
            )
            assert not problems, row["task_id"]
            counts.append(len(calls) == row["test"].count("    assert "))
    assert len(counts) == 1890 + 30 and all(counts)


@pytest.mark.parametrize(
    "text",
    [
        f"assert Solution().f(n = 1) == {hex(10**5000)}",
        f"assert Solution().f(n = {hex(10**5000)}) == 1",
        "assert Solution().f(n = 1) == " + "-" * 5000 + "1",
    ],
    ids=["expected", "argument", "nested"],
)
def test_what_cannot_be_written_out_is_left_out_with_a_reason(text):
    calls, problems = parse_asserts([text], "f")
    assert calls == () and len(problems) == 1
