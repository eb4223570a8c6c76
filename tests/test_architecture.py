"""What the source tree promises: import order, small functions, one writer of gradients, one test command."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from projected_grpo import config, rewards

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "projected_grpo"
TABLE = re.compile(r"^\| (?P<room>\w+)(?P<folder>/?) \|(?P<modules>[\w, ]*)\|", re.MULTILINE)


def listed() -> list[str]:
    """Every module, in the order of the page's table: `errors`, ..., `sandbox.encode`, ..."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    _, _, table = page.partition("## Rooms, in import order")
    names: list[str] = []
    for row in TABLE.finditer(table.partition("\n## ")[0]):
        inside = [f"{row['room']}.{module}" for module in row["modules"].strip().split(", ") if module]
        names += inside if row["folder"] else [row["room"]] if row["room"] != "room" else []
    return names


def module_name(path: Path) -> str:
    """`sandbox.encode` for sandbox/encode.py, `sandbox` for the folder."""
    inside = path.relative_to(SOURCE)
    return ".".join((*inside.parent.parts, inside.stem)) if inside.name else ""


ORDER = listed()
LONGEST = 80
LONGEST_BY_NAME = {"train_step": 60}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if "data" not in path.relative_to(SOURCE).parts]
TREES = {module_name(path): ast.parse(path.read_text()) for path in FILES if path.name != "__init__.py"}
DOOR_SIGNS = {module_name(path.parent): path for path in FILES if path.name == "__init__.py"}


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def imported(node: ast.AST) -> set[str]:
    """Full names of what an import statement may bind; `from a import b` may be the module a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def project_imports(tree: ast.AST) -> set[str]:
    """Modules of the project that a module imports: of `a.b.c`, the longest part that is one."""
    names = {name for node in ast.walk(tree) for name in imported(node)}
    found = set()
    for parts in (name.split(".")[1:] for name in names if name.split(".")[0] == "projected_grpo"):
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        found.add(next((prefix for prefix in prefixes if prefix in TREES), "__init__"))
    return found


def test_the_page_lists_every_module_once():
    assert sorted(ORDER) == sorted(TREES)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_before_it(module):
    assert project_imports(TREES[module]) <= {"__init__", *ORDER[: ORDER.index(module)]}


def test_the_top_level_is_read_at_a_glance():
    assert len(list(SOURCE.glob("*.py"))) <= 30


def test_a_folders_init_is_its_door_sign_and_no_more():
    folders = {path.parent for path in FILES} - {SOURCE}
    assert {module_name(folder) for folder in folders} | {module_name(SOURCE)} == set(DOOR_SIGNS)
    for name, path in DOOR_SIGNS.items():
        if name != module_name(SOURCE):
            (only,) = ast.parse(path.read_text()).body
            assert isinstance(only, ast.Expr) and "\n\n\n" not in ast.literal_eval(only.value)


@pytest.mark.parametrize("module", ORDER)
def test_nothing_is_imported_inside_a_function(module):
    inside = [
        (function.name, node.lineno)
        for function in functions(TREES[module])
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not inside


@pytest.mark.parametrize("module", ORDER)
def test_functions_fit_a_screen(module):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[module])}
    assert not {n: size for n, size in lengths.items() if size > LONGEST_BY_NAME.get(n, LONGEST)}


def test_train_step_is_where_its_limit_is_looked_for():
    assert "train_step" in {f.name for f in functions(TREES["step"])}


@pytest.mark.parametrize(
    "module", [f"sandbox.{name}" for name in ("child", "run", "contain", "seccomp", "encode")]
)
def test_the_sandboxed_interpreter_needs_the_standard_library_alone(module):
    """Beside its own parts: it runs without site-packages, in every untrusted child."""
    names = {name for node in ast.walk(TREES[module]) for name in imported(node)}
    foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("projected_grpo.sandbox.")} == set()


def test_one_function_writes_gradients():
    """Of a run, that is: pretraining makes the packaged model, and nothing but its verb may reach it."""
    pretraining = "prepare.pretrain_nano"
    importers = {module for module, tree in TREES.items() if pretraining in project_imports(tree)}
    assert importers <= {"verbs.study"}
    of_a_run = {module: tree for module, tree in TREES.items() if module != pretraining}
    writers = set()
    for module, tree in of_a_run.items():
        for function in functions(tree):
            for node in ast.walk(function):
                targets = (
                    node.targets
                    if isinstance(node, ast.Assign)
                    else [node.target]
                    if isinstance(node, (ast.AugAssign, ast.AnnAssign))
                    else []
                )
                attributes = [a for t in targets for a in ast.walk(t) if isinstance(a, ast.Attribute)]
                if any(a.attr == "grad" for a in attributes):
                    writers.add((module, function.name))
    assert writers == {("step", "write_gradients")}
    calls = {n.attr for tree in of_a_run.values() for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert "backward" not in calls, "Tensor.backward() writes .grad too"


@pytest.mark.parametrize("module", ORDER)
def test_public_names_have_docstrings(module):
    tree = TREES[module]
    named = [n for n in tree.body if isinstance(n, (*FUNCTION, ast.ClassDef)) and not n.name.startswith("_")]
    assert ast.get_docstring(tree)
    assert [n.name for n in named if not ast.get_docstring(n)] == []


def test_both_lists_of_modes_agree():
    """The grader does not import the configuration, so it has its own."""
    assert get_args(config.EnvMode) == get_args(rewards.EnvMode) == tuple(rewards.MODES)


def test_ci_runs_the_readmes_test_command():
    commands = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv ")
    ]
    smoke = [line for line in commands if line.endswith("just smoke")]
    tests = [line for line in commands if line.endswith("just test")]
    assert len(commands) == 2 and len(smoke) == len(tests) == 1
    assert tests[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_both_commands_stand_on_the_readmes_first_screen():
    head = (ROOT / "README.md").read_text().splitlines()[:40]
    assert sum(line.startswith("python3 -m venv ") for line in head) == 2


SOUGHT_BY_THE_HOOK = """
import sys
import projected_grpo.train
specs = [(name, getattr(module, "__spec__", None)) for name, module in sys.modules.items()]
print(*(name for name, spec in specs if "jaxtyping" in str(getattr(spec, "cached", None)).rpartition("/")[2]))
"""


def test_checking_shapes_leaves_the_bytecode_of_libraries_alone():
    """A module imported for the first time while one of ours runs under the hook is compiled anew."""
    checked = {**os.environ, "PROJECTED_GRPO_CHECK_SHAPES": "1"}
    listing = subprocess.run(
        [sys.executable, "-c", SOUGHT_BY_THE_HOOK], capture_output=True, text=True, check=True, env=checked
    ).stdout.split()
    ours = [name for name in listing if name.startswith("projected_grpo.")]
    assert "projected_grpo.proj" in ours  # the hook is at work
    assert not {"scipy.stats", "matplotlib"} & {*listing}  # what only other verbs need
    # Of three thousand; the rest are small ones that are not worth a name in BEFORE_THE_HOOK.
    assert len(listing) - len(ours) < 60, sorted(set(listing) - set(ours))


def test_a_run_with_checked_shapes_leaves_no_bytecode_that_others_cannot_load(tmp_path):
    """`python -m` loads its module past the place where jaxtyping's hook names bytecode of its own."""
    copy = tmp_path / "projected_grpo"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "PYTHONPATH": str(tmp_path),
        "PROJECTED_GRPO_CHECK_SHAPES": "0",
    }
    command = [sys.executable, "-m", "projected_grpo.train", "--help"]
    for env in (plain | {"PROJECTED_GRPO_CHECK_SHAPES": "1"}, plain):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    cached = {path.name for path in (copy / "__pycache__").iterdir()}
    assert {name.count("jaxtyping") for name in cached if name.startswith("proj.")} == {
        0,
        1,
    }  # both ran in here


HOSTS = ("github.com", "www.w3.org")  # any other, by name or number, is refused


def test_tracked_files_name_no_machine_and_no_registry():
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True
    ).stdout
    forbidden = re.compile(
        r"(?<![\w.])/(work|home/\w+|root/\w+|Users/\w+)/"  # somebody's folders
        rf"|(extra-)?index{'-'}url|find{'-'}links"
        rf"|://(?!({'|'.join(map(re.escape, HOSTS))})(?![\w.:@-]))(?!\[\^)\S"  # [^ is a pattern, not a host
    )
    found = []
    for name in listing.decode().split("\0"):
        path = ROOT / name
        if not name or path == Path(__file__) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if forbidden.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found
