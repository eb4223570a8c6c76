"""What the source tree promises: import order, small functions, one writer of gradients, one test command."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

import source_tree
from projected_grpo import rewards
from projected_grpo.config import EnvMode
from source_tree import (
    CHECKS,
    HEADING,
    SourceTree,
    foreign_imports,
    functions,
    gradient_writers,
    listed,
)

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "projected_grpo"
TREE = SourceTree(SOURCE, listed((ROOT / "docs" / "architecture.md").read_text()))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_source_keeps_its_promises(check):
    assert check(TREE) == []


def test_the_top_level_is_read_at_a_glance():
    assert len(list(SOURCE.glob("*.py"))) <= 30


def test_train_step_is_where_its_limit_is_looked_for():
    assert "train_step" in {f.name for f in functions(TREE.modules["step"])}


@pytest.mark.parametrize("module", ["child", "run", "contain", "seccomp", "encode"])
def test_the_sandboxed_interpreter_needs_the_standard_library_alone(module):
    """Beside its own parts: it runs without site-packages, in every untrusted child."""
    assert foreign_imports(TREE, f"sandbox.{module}") == []


def test_one_function_writes_gradients():
    """Of a run, that is: pretraining makes the packaged model, and nothing but its verb may reach it."""
    pretraining = "prepare.pretrain_nano"
    assert {module for module in TREE.modules if pretraining in TREE.imports(module)} <= {"verbs.study"}
    writers = {writer for writer in gradient_writers(TREE) if not writer.startswith(pretraining)}
    assert writers == {"antipasto.write_gradients"}


def test_every_mode_of_the_settings_has_its_rules():
    assert set(get_args(EnvMode)) == set(rewards.MODES)


# The checks themselves, each on a small package that breaks what it is there for

SOUND = {
    "__init__.py": "import os\n\nVERSION = os.name\n",
    "low.py": '"""Low."""\nLIMIT = 1\n\ndef helper():\n    pass\n',
    "room/__init__.py": '"""A room."""\n',
    "room/inner.py": '"""Inner."""\nfrom projected_grpo.low import LIMIT\n',
    "high.py": '"""High."""\nfrom projected_grpo import low\nfrom projected_grpo.room.inner import LIMIT\n',
    "data/odd.py": "import projected_grpo.high\n",
}
PAGE = f"""# Page
| other | | a table above |
{HEADING}

| room | modules, in order | one idea |
|-|-|-|
| low | | x |
| room/ | inner | y |
| high | | z |

## After
| late | | a table below |
"""


@pytest.fixture
def build(tmp_path):
    """build(FILE=SOURCE, ...): a sound package but for these files; None leaves one out."""

    def write(changes, page=PAGE):
        for name, text in {**SOUND, **changes}.items():
            if text is not None:
                path = tmp_path / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
        return SourceTree(tmp_path, listed(page))

    return write


def complaints(tree):
    return {check.__name__: found for check in CHECKS if (found := check(tree))}


def test_a_sound_package_has_no_complaints(build):
    tree = build({})
    assert tree.order == ["low", "room.inner", "high"] and set(tree.modules) == set(tree.order)
    assert tree.imports("high") == {"low", "room.inner"}
    assert complaints(tree) == {} and gradient_writers(tree) == set()


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("not_listed_once", {"new.py": '"""New."""\n'}),
        ("not_listed_once", {"room/new.py": '"""New."""\n'}),
        ("not_listed_once", {"high.py": None}),
        ("backward_imports", {"low.py": '"""Low."""\nimport projected_grpo.high\n'}),
        ("backward_imports", {"low.py": '"""Low."""\nfrom projected_grpo.room import inner\n'}),
        ("backward_imports", {"room/inner.py": '"""Inner."""\nfrom projected_grpo.high import LIMIT\n'}),
        ("backward_imports", {"room/inner.py": '"""Inner."""\nif 1:\n    from projected_grpo import high\n'}),
        ("backward_imports", {"low.py": '"""Low."""\nfrom projected_grpo import low\n'}),
        ("relative_imports", {"room/inner.py": '"""Inner."""\nfrom . import other\n'}),
        ("late_imports", {"low.py": '"""Low."""\ndef f():\n    import json\n'}),
        (
            "late_imports",
            {"low.py": '"""Low."""\nclass A:\n    async def f(self):\n        from os import path\n'},
        ),
        ("long_functions", {"low.py": '"""Low."""\ndef f():\n' + "    x = 1\n" * 80}),
        ("long_functions", {"low.py": '"""Low."""\ndef train_step():\n' + "    x = 1\n" * 60}),
        ("bad_door_signs", {"room/__init__.py": None}),
        ("bad_door_signs", {"room/__init__.py": ""}),
        ("bad_door_signs", {"room/__init__.py": '"""A room."""\nimport os\n'}),
        ("bad_door_signs", {"room/__init__.py": '"""A room.\n' + "long\n" * 6 + '"""\n'}),
        ("undocumented", {"low.py": "LIMIT = 1\n"}),
        ("undocumented", {"high.py": '"""High."""\nfrom projected_grpo.low import helper\n'}),
        ("undocumented", {"high.py": '"""High."""\nfrom projected_grpo import low as l\nl.helper()\n'}),
    ],
    ids=str,
)
def test_a_broken_promise_is_seen_by_its_check_alone(build, check, changes):
    assert list(complaints(build(changes))) == [check]


def test_a_circle_is_seen_whatever_the_order(build):
    changes = {"low.py": '"""Low."""\nfrom projected_grpo import high\n'}
    tree = build(changes)
    for order in (
        ["low", "room.inner", "high"],
        ["high", "low", "room.inner"],
        ["room.inner", "high", "low"],
    ):
        assert source_tree.backward_imports(replace(tree, order=order))


def test_a_module_that_the_table_repeats_or_invents_is_seen(build):
    for row in ("| low | | x |\n", "| room/ | inner, ghost | y |\n"):
        tree = build({}, PAGE.replace("| high |", f"{row}| high |"))
        assert source_tree.not_listed_once(tree)


@pytest.mark.parametrize(
    "body",
    ["p.grad = None", "p.grad += 1", "p.grad: int = 1", "a, (p.grad, b) = x", "for p.grad in x: pass"],
)
def test_a_writer_of_gradients_is_seen(build, body):
    tree = build({"low.py": f'"""Low."""\ndef f(p):\n    {body}\n'})
    assert gradient_writers(tree) == {"low.f"}


def test_backward_is_seen_and_reading_a_gradient_is_no_writing(build):
    reads = '"""Low."""\ndef f(p):\n    return p.grad\n'
    assert gradient_writers(build({"low.py": reads})) == set()
    assert gradient_writers(build({"low.py": reads + "\ndef g(x):\n    x.backward()\n"})) == {
        "low:6 backward"
    }


def test_a_library_in_the_sandbox_is_seen(build):
    lines = ("import os", "import numpy", "from projected_grpo.room import x", "import projected_grpo.low")
    tree = build({"room/inner.py": "\n".join(lines)})
    assert foreign_imports(tree, "room.inner") == ["numpy", "projected_grpo.low"]


# The commands that the pages give


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


# The hook that checks shapes

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


def test_a_module_run_with_checked_shapes_leaves_no_bytecode_that_others_cannot_load(tmp_path):
    """`python -m` loads its module past the place where jaxtyping's hook names bytecode of its own."""
    copy = tmp_path / "projected_grpo"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "data"))
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "PYTHONPATH": str(tmp_path),
        "PROJECTED_GRPO_CHECK_SHAPES": "0",
    }
    command = [sys.executable, "-m", "projected_grpo.rewards"]  # imports config, and no torch by itself
    for env in (plain | {"PROJECTED_GRPO_CHECK_SHAPES": "1"}, plain):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    cached = {path.name for path in (copy / "__pycache__").iterdir()}
    of_config = {name.count("jaxtyping") for name in cached if name.startswith("config.")}
    assert of_config == {0, 1}  # both ran in here


# What no tracked file says

HOSTS = ("github.com", "www.w3.org")  # any other, by name or number, is refused


def test_tracked_files_name_no_machine_and_no_registry():
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True
    ).stdout
    forbidden = re.compile(
        r"(?<![\w.])/(work|home/\w+|root/\w+|Users/\w+)/"  # somebody's folders
        rf"|(extra-)?index{'-'}url|find{'-'}links"
        rf"|(?<!pkg)://(?!({'|'.join(map(re.escape, HOSTS))})(?![\w.:@-]))(?!\[\^)\S"
        # pkg:// is verl's way to name a module, and [^ a pattern, not a host
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
