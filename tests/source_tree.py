"""A package as syntax trees, and what can be found wrong with it. Reads files; imports nothing of them.

Each check returns complaints, one line each; none means that the promise holds.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "projected_grpo"
DATA = "data"  # a folder of data, whatever its files end in
LONGEST = 80  # lines of a function
LONGEST_BY_NAME = {"train_step": 60}
LONGEST_DOOR_SIGN = 6  # lines
ROW = re.compile(r"^\| (?P<room>\w+)(?P<folder>/?) \|(?P<modules>[\w, ]*)\|", re.MULTILINE)
HEADING = "## Rooms, in import order"


def listed(page: str) -> list[str]:
    """The modules of the page's table, in its order: a row `sandbox/ | encode, host` is two of them."""
    _, _, rest = page.partition(HEADING)
    names = []
    for row in ROW.finditer(rest.partition("\n## ")[0]):
        modules = [module for module in row["modules"].strip().split(", ") if module]
        if row["folder"]:
            names += [f"{row['room']}.{module}" for module in modules]
        elif row["room"] != "room":  # the table's head
            names.append(row["room"])
    return names


@dataclass(frozen=True)
class SourceTree:
    """The modules below `root`, by name (`errors`, `sandbox.encode`), and the order they may import in."""

    root: Path
    order: list[str]
    modules: dict[str, ast.Module] = field(init=False)
    door_signs: dict[str, ast.Module] = field(init=False)  # the __init__.py of each folder, by its name

    def __post_init__(self) -> None:
        modules, door_signs = {}, {}
        for path in sorted(self.root.rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            if parts[0] == DATA:
                continue
            into = door_signs if parts[-1] == "__init__" else modules
            into[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
        object.__setattr__(self, "modules", modules)
        object.__setattr__(self, "door_signs", door_signs)

    def imports(self, module: str) -> set[str]:
        """Modules of the package that one imports; of `a.b.c`, the longest part that is a module."""
        found = set()
        for name in imported_names(self.modules[module]):
            parts = name.split(".")
            if parts[0] == PACKAGE:
                prefixes = [".".join(parts[1:n]) for n in range(len(parts), 1, -1)]
                found.add(next((prefix for prefix in prefixes if prefix in self.modules), "__init__"))
        return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones too."""
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import, wherever it stands."""
    return (n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)))


def imported_names(tree: ast.AST) -> set[str]:
    """Full names of what is imported; `from a import b` is a.b, which may be a module."""
    names = set()
    for node in import_statements(tree):
        before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        names |= {before + alias.name for alias in node.names}
    return names


def not_listed_once(tree: SourceTree) -> list[str]:
    """Modules that the order lacks, repeats or invents."""
    counts = {name: tree.order.count(name) for name in sorted({*tree.order, *tree.modules})}
    wrong = {name: n for name, n in counts.items() if n != 1 or name not in tree.modules}
    return [f"{name}: {n} times in the table, {name in tree.modules} in src" for name, n in wrong.items()]


def backward_imports(tree: SourceTree) -> list[str]:
    """Imports of what does not stand before the importer. A circle has at least one."""
    place = {name: i for i, name in enumerate(tree.order)}
    return [
        f"{module} imports {other}"
        for module in tree.modules
        for other in sorted(tree.imports(module) - {"__init__"})
        if place.get(other, len(place)) >= place.get(module, -1)
    ]


def relative_imports(tree: SourceTree) -> list[str]:
    """Imports that start with a dot, which the other checks would not see."""
    return [
        f"{module}:{node.lineno}"
        for module, parsed in tree.modules.items()
        for node in import_statements(parsed)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def late_imports(tree: SourceTree) -> list[str]:
    """Imports inside of functions, where a circle could hide."""
    return [
        f"{module}:{node.lineno} in {function.name}"
        for module, parsed in tree.modules.items()
        for function in functions(parsed)
        for node in import_statements(function)
    ]


def long_functions(tree: SourceTree) -> list[str]:
    """Functions of more lines than a screen has, their decorators not counted."""
    return [
        f"{module}.{function.name}: {lines} lines"
        for module, parsed in tree.modules.items()
        for function in functions(parsed)
        if (lines := (function.end_lineno or 0) - function.lineno + 1)
        > LONGEST_BY_NAME.get(function.name, LONGEST)
    ]


def bad_door_signs(tree: SourceTree) -> list[str]:
    """Folders without an __init__.py, or with one that is more than a few lines of text."""
    found = []
    for folder in sorted({name.rpartition(".")[0] for name in tree.modules} - {""}):
        body = tree.door_signs[folder].body if folder in tree.door_signs else []
        sign = ast.get_docstring(tree.door_signs[folder]) if folder in tree.door_signs else None
        if sign is None:
            found.append(f"{folder}: no docstring in its __init__.py")
        elif len(body) > 1 or len(sign.splitlines()) > LONGEST_DOOR_SIGN:
            found.append(f"{folder}: its __init__.py is more than a short docstring")
    return found


def foreign_imports(tree: SourceTree, module: str) -> list[str]:
    """What a module imports beside the standard library and its own folder."""
    own = f"{PACKAGE}.{module.rpartition('.')[0]}."
    names = sorted(imported_names(tree.modules[module]))
    return [n for n in names if n.split(".")[0] not in sys.stdlib_module_names and not n.startswith(own)]


def gradient_writers(tree: SourceTree) -> set[str]:
    """Functions that assign to a `.grad`, and every `.backward`, which writes to it, too."""
    found = set()
    for module, parsed in tree.modules.items():
        for function in functions(parsed):
            written = [a for a in attributes(function) if a.attr == "grad" and isinstance(a.ctx, ast.Store)]
            found |= {f"{module}.{function.name}"} if written else set()
        found |= {f"{module}:{a.lineno} backward" for a in attributes(parsed) if a.attr == "backward"}
    return found


def attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Every `x.name`."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def undocumented(tree: SourceTree) -> list[str]:
    """Modules without a docstring, and functions and classes without one that another module imports."""
    wanted: set[str] = set()
    for parsed in tree.modules.values():
        names = imported_names(parsed)
        modules = {node.asname or node.name: name for name, node in aliases(parsed)}
        used = {
            f"{modules[a.value.id]}.{a.attr}"
            for a in attributes(parsed)
            if isinstance(a.value, ast.Name) and a.value.id in modules
        }
        wanted |= names | used
    found = []
    for module, parsed in tree.modules.items():
        if not ast.get_docstring(parsed):
            found.append(module)
        for node in parsed.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                full = f"{PACKAGE}.{module}.{node.name}"
                found += [full.partition(".")[2]] if full in wanted and not ast.get_docstring(node) else []
    return found


def aliases(tree: ast.AST) -> Iterator[tuple[str, ast.alias]]:
    """(full name, alias) of everything that is imported from somewhere."""
    for node in import_statements(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", alias) for alias in node.names)


CHECKS: tuple[Callable[[SourceTree], list[str]], ...] = (
    not_listed_once,
    backward_imports,
    relative_imports,
    late_imports,
    long_functions,
    bad_door_signs,
    undocumented,
)
