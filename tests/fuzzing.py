"""Damage to files, and what a reader may do with it: read it, or refuse it in one line."""

import copy
import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from projected_grpo.errors import UserError

BUDGET = int(os.environ.get("PROJECTED_GRPO_FUZZ", "25"))
FUZZ = settings(
    max_examples=BUDGET,
    derandomize=BUDGET == 25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EXTREME = st.sampled_from(
    [float("nan"), float("inf"), 1e400, -1, 2**63, 10**400, "", "\x00", "\ud800", "[" * 3000, "9" * 5000]
    + ["../../x", "gt_only", "candidate", "assert Solution().f(", "assert " + "(" * 300 + "1" + ")" * 300]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | EXTREME,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(document, path=()):
    """The paths to all parts of a JSON document, its own first."""
    yield path
    if isinstance(document, (dict, list)):
        for key, part in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places(part, (*path, key))


@st.composite
def altered(draw, document):
    """A JSON document with some of its parts, at any depth, replaced, emptied, dropped or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from(list(places(document)))) or (None,)
        if key is None:
            return draw(JSON)
        parent = document
        for step in above:
            parent = parent[step]
        what = draw(st.sampled_from(["replace", "replace", "null", "empty", "drop", "double"]))
        if what == "drop":
            del parent[key]
        elif what == "double":
            if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = {"replace": draw(JSON), "null": None, "empty": draw(st.sampled_from([[], {}]))}[
                what
            ]
    return document


@st.composite
def damaged(draw, data):
    """Bytes of a file with some flipped, cut out, repeated or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["flip", "flip", "cut", "end", "insert"]))
        if what == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif what == "end":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_or_refuse(folder, read):
    """Do the reading: no exception but a UserError of one line, and no file that was not there."""
    before = sorted(folder.rglob("*"))
    try:
        read()
    except UserError as error:
        assert str(error) and "\n" not in str(error), repr(str(error))
    assert sorted(folder.rglob("*")) == before
