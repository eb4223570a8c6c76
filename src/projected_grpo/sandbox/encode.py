"""Any Python object, however hostile, as plain JSON data; oracle.decode is the inverse.

Standard library only: it runs in the sandboxed process, where a response may have replaced anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 100
MAX_NODES = 200_000
MAX_INT_BITS = 1_000_000
MAX_HELD = 16  # attributes of a foreign object that are looked at
EXACT_TYPES = (type(None), bool, int, float, str, list, tuple, dict, set, frozenset, bytes)


class Unencodable(Exception):
    """The value is too deep, too large or cyclic."""


class Encoder:
    """Turns one returned value into JSON data, spending from a node budget; oracle.decode is the inverse."""

    def __init__(self) -> None:
        self.left = MAX_NODES

    def encode(self, value: Any, depth: int = 0) -> Any:
        """JSON data: exact builtins by value, ListNode and TreeNode shapes by structure, the rest opaque."""
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            raise Unencodable("result too large, too deep or cyclic")
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is int:
            return self.integer(value)
        if kind is str:
            self.left -= len(value) // 8
            return value
        if kind is list:
            return [self.encode(item, depth + 1) for item in list.__iter__(value)]
        if kind in EXACT_TYPES:
            return {"t": kind.__name__, "v": self.members(kind, value, depth)}
        return self.other(kind, value, depth)

    def integer(self, value: int) -> Any:
        if -(1 << 63) <= value < 1 << 63:
            return value
        if value.bit_length() > MAX_INT_BITS:
            raise Unencodable("integer too large")
        return {"t": "int", "v": hex(value)}  # decimal would meet Python's 4300-digit limit in the parent

    def members(self, kind: Any, value: Any, depth: int) -> Any:
        if kind is bytes:
            self.left -= len(value) // 4
            return value.hex() if self.left > 0 else ""
        if kind is dict:
            return [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in dict.items(value)]
        return [self.encode(item, depth + 1) for item in kind.__iter__(value)]

    def other(self, kind: Any, value: Any, depth: int) -> Any:
        name = str(type.__dict__["__name__"].__get__(kind))[:80]
        base = next((b for b in type.__dict__["__mro__"].__get__(kind) if b in EXACT_TYPES), None)
        if base is not None:
            return {"t": "sub", "type": name, "v": self.encode(exact_base(base, value), depth + 1)}
        fields = {field: read(value, field) for field in ("val", "next", "left", "right")}
        if MISSING not in (fields["val"], fields["left"], fields["right"]):
            return {"t": "tree", "v": self.tree(value, depth)}
        if MISSING not in (fields["val"], fields["next"]):
            return {"t": "list_node", "v": self.chain(value, depth)}
        return {"t": "opaque", "type": name}

    def chain(self, node: Any, depth: int) -> list[Any]:
        values = []
        while node is not None and node is not MISSING:
            values.append(self.encode(read(node, "val"), depth + 1))  # the budget ends a cycle
            node = read(node, "next")
        return values

    def tree(self, root: Any, depth: int) -> list[Any]:
        nodes: list[Any] = []
        queue = [root]
        for node in queue:
            if node is None or node is MISSING:
                nodes.append(None)
                continue
            nodes.append([self.encode(read(node, "val"), depth + 1)])
            queue += [read(node, "left"), read(node, "right")]
        return nodes


MISSING: Any = object()  # what `read` gives for an attribute that is absent or raises


def read(value: Any, name: str) -> Any:
    """An attribute of any object, or MISSING when it is absent or raises."""
    try:
        return getattr(value, name, MISSING)
    except BaseException:
        return MISSING


def exact_base(base: Any, value: Any) -> Any:
    """The plain builtin inside an instance of a subclass, without calling methods it may override."""
    nothing = {int: 0, float: 0.0, str: "", bytes: b""}
    if base in nothing:
        return base.__add__(value, nothing[base])
    if base is dict:
        return dict(dict.items(value))
    return base(base.__iter__(value))


def always_equal_to(value: Any) -> list[str]:
    """Names of builtin types whose fresh random members all equal `value`, an object of some other type."""
    rng = random.SystemRandom()
    numbers = [rng.getrandbits(60) + 7 for _ in range(3)]
    decoys: dict[str, list[Any]] = {
        "NoneType": [None],
        "bool": [True, False],
        "int": numbers,
        "float": [n / 7 for n in numbers],
        "str": [f"{n:x}" for n in numbers],
        "list": [[n, n + 1] for n in numbers] + [[]],
        "tuple": [(n,) for n in numbers],
        "dict": [{n: n} for n in numbers],
        "set": [{n} for n in numbers],
    }
    found = []
    for name, members in decoys.items():
        try:
            if all(bool(value == member) for member in members):
                found.append(name)
        except BaseException:  # a hostile __eq__ only spoils its own case
            continue
    return found


def held_and_equal(value: Any) -> list[Any]:
    """The plain values among a foreign object's attributes that it equals, encoded."""
    attributes = read(value, "__dict__")
    held = list(dict.values(attributes)) if type(attributes) is dict else []
    slots = read(type(value), "__slots__")
    held += [read(value, name) for name in slots if type(name) is str] if type(slots) in (tuple, list) else []
    found = []
    for item in held[:MAX_HELD]:
        try:
            if type(item) in EXACT_TYPES and bool(value == item):
                found.append(Encoder().encode(item))
        except BaseException:
            continue
    return found


def describe(error: BaseException) -> str:
    """One short line for an exception, whatever its __str__ does."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return type(error).__name__[:200]


def attempt(action: Callable[[], Any]) -> str | None:
    """Run `action`; the description of what it raised, or None."""
    try:
        action()
    except BaseException as error:
        return describe(error)
    return None
