"""The ground-truth oracle: reads a dataset's asserts and compares returned values, in the trusted parent.

An assert `assert Solution().f(n = 7) == [2, 2]` is split in two: the call, which an untrusted child process
evaluates, and the expected value, which never leaves this process. Nothing here evaluates code.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from projected_grpo.sandbox.encode import Encoder, Unencodable

FLOAT_REL_TOL = 1e-9
FLOAT_ABS_TOL = 1e-5  # LeetCode's own rule: "answers within 10^-5 of the actual answer will be accepted"
MAX_HASHED = 4096  # members of a set or dict that a child may return
# By their source, answers that try nothing.
TRIVIAL: Mapping[str, object] = {"None": None, "0": 0, "[]": [], '""': "", "True": True, "False": False}


@dataclass(frozen=True)
class LinkedList:
    """A non-empty singly linked list, by its values."""

    values: tuple[object, ...]


@dataclass(frozen=True)
class Tree:
    """A non-empty binary tree in level order: `(value,)` for a node, None for an absent child."""

    nodes: tuple[tuple[object] | None, ...]


@dataclass(frozen=True)
class Subclass:
    """An instance of a subclass of a builtin type. Equal to nothing; `base` is what plain == might see."""

    type_name: str
    base: object


@dataclass(frozen=True)
class Opaque:
    """A value that plain data cannot carry (an object, a generator, something too deep). Equal to nothing."""

    type_name: str


@dataclass(frozen=True)
class Call:
    """One ground-truth call: `source` is sent to the child, `expected` stays in the parent."""

    source: str
    expected: object


NOT_PARSED = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last two: nested too deeply


class _NotUnderstood(ValueError):
    """The assert has a shape this module does not read."""


def parse_asserts(asserts: Sequence[str], method: str) -> tuple[tuple[Call, ...], tuple[str, ...]]:
    """Read `assert Solution().method(...) == literal` lines; returns calls and what was not understood."""
    calls: list[Call] = []
    problems: list[str] = []
    for text in asserts:
        try:
            statements = ast.parse(text.strip()).body
        except NOT_PARSED as error:
            problems.append(f"{_shorten(text)}: does not parse ({error})")
            continue
        if not statements:
            problems.append(f"{_shorten(text)}: holds no assert")
        _read_all(statements, method, f"Solution().{method}", calls, problems)
    return tuple(calls), tuple(problems)


def as_assert(call: Call) -> str:
    """The call as an assert that `parse_asserts` reads back."""
    return f"assert {call.source} == {_source(call.expected)}"


def _source(value: object) -> str:
    if isinstance(value, LinkedList):
        return f"list_node({_source(list(value.values))})"
    if isinstance(value, Tree):
        return f"tree_node([{', '.join('None' if n is None else _source(n[0]) for n in value.nodes)}])"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_source(k)}: {_source(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | set) and value:
        members = list(map(_source, value))
        opening, closing = "[]" if isinstance(value, list) else "{}"
        # A set of texts has another order in each process.
        return opening + ", ".join(members if isinstance(value, list) else sorted(members)) + closing
    if isinstance(value, tuple) and value:
        return "(" + "".join(f"{_source(item)}, " for item in value) + ")"
    return repr(value)


def parse_check_function(test_source: str, method: str) -> tuple[tuple[Call, ...], tuple[str, ...]]:
    """Read a `def check(candidate):` block of asserts; returns the calls and what was not understood."""
    try:
        body = ast.parse(test_source).body
    except NOT_PARSED as error:
        return (), (f"test source does not parse ({error})",)
    checks = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(body) != 1 or len(checks) != 1 or len(checks[0].args.args) != 1:
        return (), ("test source is not exactly one `def check(candidate)` function",)
    calls: list[Call] = []
    problems: list[str] = []
    _read_all(checks[0].body, method, checks[0].args.args[0].arg, calls, problems)
    return tuple(calls), tuple(problems)


def _read_all(
    statements: Sequence[ast.stmt], method: str, called: str, calls: list[Call], problems: list[str]
) -> None:
    for statement in statements:
        try:
            call = _read_assert(statement, method, called)
            as_assert(call)
            calls.append(call)
        except _NotUnderstood as error:
            problems.append(f"{_shorten(ast.unparse(statement))}: {error}")
        except ValueError as error:  # an integer of more digits than Python writes
            problems.append(f"an assert that cannot be written out again ({error})")


def _read_assert(statement: ast.stmt, method: str, called: str) -> Call:
    if not isinstance(statement, ast.Assert):
        raise _NotUnderstood("no assert")
    match statement.test:
        case ast.Compare(left=got, ops=[ast.Eq()], comparators=[right]):
            expected = literal(right)
        case ast.Call(func=ast.Name(id=name), args=[got, right], keywords=[]):
            builder = {"is_same_list": "list_node", "is_same_tree": "tree_node"}.get(name)
            if builder is None or _builder(right) != builder:
                raise _NotUnderstood(f"a call of {name} that is no list or tree comparison")
            expected = literal(right)
        case _:
            raise _NotUnderstood("neither `call == literal` nor is_same_list / is_same_tree")
    if not isinstance(got, ast.Call) or ast.unparse(got.func) != called:
        raise _NotUnderstood("the left side is not a call of the solution method")
    for argument in (*got.args, *(keyword.value for keyword in got.keywords)):
        literal(argument)
    if any(keyword.arg is None for keyword in got.keywords):
        raise _NotUnderstood("** in the arguments")
    target = ast.Attribute(ast.Call(ast.Name("Solution"), [], []), method)
    return Call(ast.unparse(ast.Call(target, got.args, got.keywords)), expected)


def _builder(node: ast.AST) -> str | None:
    """The name that is called, if with one positional argument and nothing else."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[_], keywords=[]):
            return name
    return None


def literal(node: ast.expr) -> object:
    """The value of a literal, inf, nan, list_node([...]) or tree_node([...]); all else is not understood."""
    if isinstance(node, ast.Constant) and (node.value is None or type(node.value) in (bool, int, float, str)):
        return node.value
    if isinstance(node, ast.List):
        return [literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(literal(item) for item in node.elts)
    if isinstance(node, ast.Set):
        return {literal(item) for item in node.elts}
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {literal(k): literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = literal(node.operand)
        if type(value) in (int, float):
            assert isinstance(value, int | float)
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call):
        return _built(node)
    raise _NotUnderstood(f"`{_shorten(ast.unparse(node))}` is no literal")


def _built(node: ast.Call) -> object:
    """The structure that `float('inf')`, `list_node([...])` or `tree_node([...])` stands for."""
    name = _builder(node)
    if name in ("float", "list_node", "tree_node"):
        value = literal(node.args[0])
        if name == "float" and value in ("inf", "-inf", "nan"):
            return float(str(value))
        if name == "list_node" and isinstance(value, list):
            return LinkedList(tuple(value)) if value else None
        if name == "tree_node" and isinstance(value, list):
            return _tree(value)
    raise _NotUnderstood(f"`{_shorten(ast.unparse(node))}` is no literal")


def _tree(values: list[object]) -> Tree | None:
    """LeetCode's level order (absent children are None and have no children listed) in normal form."""
    if not values:
        return None
    nodes: list[tuple[object] | None] = [(values[0],)]
    open_nodes, i = 1, 1
    while open_nodes and i < len(values):
        open_nodes -= 1
        for value in values[i : i + 2]:
            nodes.append(None if value is None else (value,))
            open_nodes += value is not None
        i += 2
    return Tree(_trimmed(nodes))


def _trimmed(nodes: list[tuple[object] | None]) -> tuple[tuple[object] | None, ...]:
    end = len(nodes)
    while end and nodes[end - 1] is None:
        end -= 1
    return tuple(nodes[:end])


def decode(payload: object) -> object:
    """The value behind the encoding of sandbox/encode.py. Malformed input gives Opaque, never an error."""
    try:
        return _decode(payload)
    except (TypeError, ValueError, RecursionError):  # unhashable members, odd pairs, bad hex, too deep
        return Opaque("malformed")


def _decode(payload: object) -> object:
    if isinstance(payload, list):
        return [_decode(item) for item in payload]
    if not isinstance(payload, dict):
        return payload
    tag, value = payload.get("t"), payload.get("v")
    if tag == "int" and isinstance(value, str):
        return int(value, 16)
    if tag == "bytes" and isinstance(value, str):
        return bytes.fromhex(value)
    if tag == "sub":
        return Subclass(str(payload.get("type")), _decode(value))
    if isinstance(tag, str) and tag in _CONTAINERS and isinstance(value, list):
        return _CONTAINERS[tag](value)
    return Opaque(str(payload.get("type")))


def _hashable(value: list[object]) -> list[object]:
    """Decoded members of a set; refuses large ones, whose hashes a child could make collide."""
    if len(value) > MAX_HASHED:
        raise ValueError("too many members")
    return [_decode(item) for item in value]


def _pairs(value: list[object]) -> dict[object, object]:
    pairs: dict[object, object] = {}
    for pair in _hashable(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("not a key and a value")
        pairs[pair[0]] = pair[1]
    return pairs


def _level_order(value: list[object]) -> Tree:
    nodes: list[tuple[object] | None] = []
    for node in value:
        if node is not None and not (isinstance(node, list) and len(node) == 1):
            raise ValueError("a tree node is a list of one value")
        nodes.append(None if node is None else (_decode(node[0]),))
    return Tree(_trimmed(nodes))


_CONTAINERS: dict[str, Callable[[list[object]], object]] = {
    "tuple": lambda value: tuple(_decode(item) for item in value),
    "set": lambda value: set(_hashable(value)),
    "frozenset": lambda value: frozenset(_hashable(value)),
    "dict": _pairs,
    "list_node": lambda value: LinkedList(tuple(_decode(item) for item in value)),
    "tree": _level_order,
}


def same(expected: object, got: object) -> bool:
    """Exact-type recursive equality: bool, int, list and tuple are distinct, nan is nan, floats within 1e-5.

    One widening: an exact int answers for an expected float, as in LeetCode's judge and in six of the
    dataset's own solutions (`return -1` where -1.0 is expected). A float never answers for an expected int.
    """
    if type(expected) is float and type(got) is int:
        got = float(got) if abs(got) < 1 << 53 else got
    if type(expected) is not type(got) or isinstance(expected, Subclass | Opaque):
        return False
    if isinstance(expected, float) and isinstance(got, float):
        if math.isnan(expected) or math.isnan(got):
            return math.isnan(expected) and math.isnan(got)
        return math.isclose(expected, got, rel_tol=FLOAT_REL_TOL, abs_tol=FLOAT_ABS_TOL)
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        return len(expected) == len(got) and all(map(same, expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        found = {_frozen(key): value for key, value in got.items()}
        return len(expected) == len(got) and all(
            _frozen(key) in found and same(value, found[_frozen(key)]) for key, value in expected.items()
        )
    if isinstance(expected, set | frozenset):
        return _frozen(expected) == _frozen(got)
    if isinstance(expected, LinkedList) and isinstance(got, LinkedList):
        return same(expected.values, got.values)
    if isinstance(expected, Tree) and isinstance(got, Tree):
        return same(expected.nodes, got.nodes)
    return expected == got


def _frozen(value: object) -> object:
    """A hashable stand-in for a set member or dict key that keeps 1, 1.0 and True apart; floats are exact."""
    if isinstance(value, tuple):
        return ("tuple", *map(_frozen, value))
    if isinstance(value, set | frozenset):
        return (type(value).__name__, frozenset(map(_frozen, value)))
    return (type(value).__name__, "nan" if value != value else value)


def trivial_answers(calls: Sequence[Call]) -> list[str]:
    """Answers that try nothing and yet are right in every call: those in TRIVIAL, an argument as it came."""
    if not calls:
        return []
    found = [name for name, value in TRIVIAL.items() if all(same(call.expected, value) for call in calls)]
    for name in _arguments(calls[0]):
        if all(name in (given := _arguments(call)) and same(call.expected, given[name]) for call in calls):
            found.append(f"argument {name}")
    return found


def _arguments(call: Call) -> dict[str, object]:
    """The values of a call's arguments by name, or by place where they have none."""
    node = ast.parse(call.source, mode="eval").body
    assert isinstance(node, ast.Call)
    placed = {str(i): literal(value) for i, value in enumerate(node.args, start=1)}
    return placed | {str(keyword.arg): literal(keyword.value) for keyword in node.keywords}


def out_of_reach(calls: Sequence[Call], most: int) -> str:
    """Why no program can give back what the calls expect, in `most` bytes for all answers; "" if one can."""
    size = 0
    for i, call in enumerate(calls):
        value = _without_nodes(call.expected)
        try:
            sent = json.dumps(Encoder().encode(value))
        except Unencodable:
            sent = ""
        if not sent or not same(value, decode(json.loads(sent))):
            return f"call {i} expects a value that is too large or too deep to give back"
        size += len(sent)
    return "" if size <= most else f"the values it expects are too large to give back, {size} of {most} bytes"


def _without_nodes(value: object) -> object:
    """Linked lists and trees as plain lists, which take as much room."""
    if isinstance(value, LinkedList):
        return _without_nodes(list(value.values))
    if isinstance(value, Tree):
        return [None if node is None else [_without_nodes(node[0])] for node in value.nodes]
    return list(map(_without_nodes, value)) if isinstance(value, list) else value


def _shorten(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
