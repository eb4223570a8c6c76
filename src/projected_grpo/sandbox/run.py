"""One untrusted program in its own, contained process: loads it, drives it, reports on a pipe.

Standard library only. The process belongs to the response as soon as its first line runs, so nothing said
after that is more than the response's word.
"""

from __future__ import annotations

import ast
import atexit
import binascii
import builtins
import contextlib
import json
import marshal
import os
import sys
import threading
import types
from typing import Any

from projected_grpo.sandbox.encode import (
    EXACT_TYPES,
    MISSING,
    Encoder,
    always_equal_to,
    attempt,
    describe,
    held_and_equal,
    read,
)

RESULT_FD = 3
LOADED = b'{"loaded": true}\n'
MAX_CODE = 1 << 16  # bytes of compiled response that are handed back, for the response's other programs


def find_tests(tree: ast.Module, name: str) -> str | None:
    """Where the response defines its test function: 'module', 'class', 'guarded' (voided) or None."""
    places = [("module", tree.body)]
    places += [("class", n.body) for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Solution"]
    for place, body in places:
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                guarded = any(isinstance(n, ast.Constant) and n.value == "__main__" for n in ast.walk(node))
                return "guarded" if guarded else place
    return None


class Setup:
    """A setup code that has run in a fresh __main__ module.

    A plain one runs before forking, and every child has its own copy by copy-on-write.
    """

    def __init__(self, source: str) -> None:
        self.code = compile(source, "<setup>", "exec", dont_inherit=True)
        self.module = types.ModuleType("__main__")
        self.space = self.module.__dict__
        self.space["__builtins__"] = builtins
        exec(self.code, self.space)
        self.names = dict(self.space)  # what the calls see, whatever the response binds


class Run:
    """One program in its own process: loads it, drives it, and reports on RESULT_FD."""

    def __init__(self, job: dict[str, Any], setup: Setup | None) -> None:
        self.job = job
        self.setup = setup
        self.instances: list[Any] = []

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, Any], types.CodeType]:
        """Run the setup, compile the response; returns (namespace, names that calls see, response code)."""
        setup = self.setup = self.setup or Setup(self.job["setup"])
        space, names = setup.space, setup.names
        sys.modules["__main__"] = setup.module
        space["__name__"] = name
        names["Solution"] = lambda: self.instance(space)
        code, line = self.compiled()
        write(line)  # before any line of the response runs, so the response cannot change it
        return space, names, code

    def compiled(self) -> tuple[types.CodeType, bytes]:
        """The response's code, and what is said of it: where its test function is, and the code itself.

        A response's other programs are sent that code, so that only the first has to parse.
        """
        if self.job["code"]:
            return marshal.loads(self.job["code"]), b'{"compiled": true}\n'
        sources: list[str] = [self.job["source"], *self.job["others"]]
        for source in sources[:-1]:
            with contextlib.suppress(SyntaxError, ValueError):
                return self.compiled_from(source)
        return self.compiled_from(sources[-1])

    def compiled_from(self, source: str) -> tuple[types.CodeType, bytes]:
        name = self.job["test_name"]
        if self.job["action"] != "calls" or (name not in source and source.isascii()):
            code = compile(source, "<response>", "exec", dont_inherit=True)
            return code, b'{"compiled": true, "tests": null, "code": ""}\n'
        tree = ast.parse(source)
        code = compile(tree, "<response>", "exec", dont_inherit=True)
        place = json.dumps(find_tests(tree, name)).encode()
        return code, b'{"compiled": true, "tests": %b, "code": "%b"}\n' % (place, portable(code))

    def instance(self, space: dict[str, Any]) -> Any:
        """What `Solution()` in a call stands for: a new instance, remembered."""
        made = space["Solution"]()
        self.instances.append(made)
        return made

    def calls(self) -> None:
        """Drive every ground-truth call and report the encoded results with the side channels."""
        space, names, code = self.load("__main__")
        load_error = attempt(lambda: exec(code, space))
        write(LOADED)
        results: list[Any] = []
        found: set[str] = set()
        for call in self.job["calls"]:
            self.instances.clear()
            results.append(self.one_call(call, names))
            holders = self.instances or [space.get("Solution")]
            found.update(
                name for name in self.job["watch"] if any(truthy(holder, name) for holder in holders)
            )
        report({"load_error": load_error, "calls": results, "attributes": sorted(found)})

    def one_call(self, call: str | types.CodeType, names: dict[str, Any]) -> dict[str, Any]:
        """Evaluate one call: its encoded value, or what it raised."""
        try:
            value = eval(compiled(call, "<call>", "eval"), names)
            if type(value) in EXACT_TYPES:
                return {"value": Encoder().encode(value)}
            equal, held = always_equal_to(value), held_and_equal(value)
            return {"value": Encoder().encode(value), "equal": equal, "held": held}
        except BaseException as error:
            return {"error": describe(error)}

    def tests(self) -> None:
        """Call the response's own test function after putting the stub or the canonical method in place."""
        space, names, code = self.load("<graded>")
        attempt(lambda: exec(code, space))
        write(LOADED)
        report({"tests_error": attempt(lambda: self.call_tests(space))})

    def call_tests(self, space: dict[str, Any]) -> None:
        """Substitute the method, then call the test function without arguments; returning is passing."""
        job = self.job
        solution = space.setdefault("Solution", type("Solution", (), {}))
        if job["substitute"] == "stub":
            setattr(solution, job["method"], lambda *args, **kwargs: 0)
        elif job["substitute"] == "canonical":
            other: dict[str, Any] = {"__name__": "<canonical>", "__builtins__": builtins}
            assert self.setup is not None
            exec(self.setup.code, other)  # classes of its own, which the response has not touched
            exec(compiled(job["canonical"], "<canonical>", "exec"), other)
            for name, value in vars(other["Solution"]).items():
                if name == "__init__" or not (name.startswith("__") and name.endswith("__")):
                    setattr(solution, name, value)
        name = job["test_name"]
        test = space[name] if job["test_place"] == "module" else getattr(solution(), name)
        test()

    def script(self) -> None:
        """Run response, calls and a forced failure as a script would run; the exit code is the result."""
        space, names, code = self.load("__main__")
        status = 1
        try:
            exec(code, space)
            for call in self.job["calls"]:
                eval(compiled(call, "<call>", "eval"), names)
            raise AssertionError("forced failure")
        except SystemExit as error:
            status = exit_status(error)
        except BaseException:
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as error:
                status = exit_status(error)
            except BaseException:
                status = 1
        attempt(threading._shutdown)  # type: ignore[attr-defined]
        attempt(atexit._run_exitfuncs)
        flush()
        os._exit(status)


def compiled(source: str | types.CodeType, name: str, kind: str) -> types.CodeType:
    """The dataset's code, which the trusted side sends compiled if it can."""
    return compile(source, name, kind, dont_inherit=True) if isinstance(source, str) else source


def exit_status(error: SystemExit) -> int:
    """The exit code CPython gives a SystemExit."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def truthy(holder: Any, name: str) -> bool:
    """Whether an attribute is set and true; methods do not count, honest helpers are called is_valid too."""
    value = read(holder, name)
    try:
        return value is not MISSING and not callable(value) and bool(value)
    except BaseException:
        return False


def portable(code: types.CodeType) -> bytes:
    """The code as text for another process of the same Python; empty when it is too large or too deep."""
    try:
        data = marshal.dumps(code)
    except ValueError:
        return b""
    return binascii.b2a_base64(data, newline=False) if len(data) <= MAX_CODE else b""


def report(data: dict[str, Any]) -> None:
    """Append one line of JSON to the result pipe."""
    write(json.dumps(data).encode() + b"\n")


def write(data: bytes | memoryview, fd: int = RESULT_FD) -> None:
    """All of the data to a pipe, the result pipe if no other is named."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def flush() -> None:
    """Hand over what Python still buffers, also where the program has replaced sys.stdout."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        attempt(stream.flush)  # type: ignore[union-attr]
