"""The pages hold: commands run in small or at least parse, options exist, links lead on, the site builds."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from sphinx.cmd.build import build_main

from doc_commands import (
    OURS,
    ROOT,
    Command,
    blocks,
    commands_in,
    inline_code,
    name,
    pages,
    scripts,
    simple_commands,
)
from projected_grpo import cli, train
from projected_grpo.arm_settings import SETTINGS
from projected_grpo.checks import validate
from projected_grpo.config import REMOVED

sys.path.insert(0, str(ROOT / "docs"))
from cli_reference import help_text

PAGES = {name(page): page.read_text() for page in pages()}
COMMANDS = [command for page, text in PAGES.items() for command in commands_in(page, text)]
SCRIPTS = {page: scripts(text) for page, text in PAGES.items()}
PROGRAMS = Path(sys.executable).parent

# Pages that a reader types from top to bottom: their commands are run, made small by these options.
WALKED = (
    "docs/index.md",
    "docs/howto/read_a_run.md",
    "docs/howto/own_problems.md",
    "docs/howto/own_pairs.md",
    "docs/howto/own_model.md",
    "docs/howto/own_arm.md",
)
TINY_RUN = (
    "--steps=1",
    "--eval-ablate-every=0",
    "--eval-n-prompts=1",
    "--workers=1",
    "--vhack-refresh-every=0",
)
SMALL: Mapping[str, Sequence[str]] = {
    "train nano": (*TINY_RUN, "--prompts-per-step=2", "--group=4", "--final-n-prompts=1", "--max-new=24"),
    "train smoke": (*TINY_RUN, "--n-problems=4", "--max-new=8"),
    "evaluate": ("--n-problems=1", "--samples=1", "--max-new=8", "--resamples=99", "--workers=1"),
    **dict.fromkeys(("grade", "pairs lint", "pool build", "problems lint"), ("--workers=1",)),
    **dict.fromkeys(("export", "plot", "pool report", "report", "results", "sweep", "verify"), ()),
}
# Of those pages, what is parsed like the commands of all others, but not run.
NOT_RUN = {
    "just download-model Qwen/Qwen3-4B": "network",
    "just probe-full-seed 41": "a GPU, hours; test_probe.py runs the verb",
    "projected-grpo doctor --preset=fast --model Qwen/Qwen3-4B": "a GPU; test_doctor.py runs the verb",
    "projected-grpo evaluate --model Qwen/Qwen3-4B --problems embedded --out base.json": "network",
    "projected-grpo train smoke --intervention=erase --vhack-pairs-path placebo-style": "as the one above",
}
# Commands of other programs, which are neither run nor parsed here.
OTHERS = {
    "git": "network, or another checkout",
    "cd": "the test is there already",
    "source": "the shell's own",
    "python -m venv": "this test runs in such an environment",
    "python -m pytest": "the tests themselves",
    "python -m ruff": "runs with the tests",
    "python -m mypy": "runs with the tests",
    "python -m sphinx": "test_the_site_builds",
    "slurm_one_box.sh": "a real Slurm, as root",
    "kill_campaign.py": "half an hour; test_resume.py has its kills",
    "cost_model.py": "test_cost_model.py",
    "trl_erase.py": "tests/integrations/test_trl.py",
    "given_rollouts.py": "tests/integrations/test_trl.py",
    "accelerate": "tests/integrations/test_trl.py starts the two processes itself",
    "tensorboard": "not installed with the package",
}
FOREIGN_OPTIONS = {
    **dict.fromkeys(("--label", "--group", "--after", "--print-task-id", "--json"), "pueue"),
    **dict.fromkeys(("--standalone", "--nproc-per-node", "--shutdown-timeout", "--max-restarts"), "torchrun"),
    **dict.fromkeys(("--multi_gpu", "--num_processes", "--cpu"), "accelerate"),
    "--fit": "scripts/cost_model.py",
    "--warmup": "examples/trl_erase.py",
    "--help": "of every verb",
    "--version": "of the program",
}


# Every command can be typed


def expansion(words: Sequence[str]) -> list[str]:
    """The lines that a recipe would run."""
    said = subprocess.run(
        [PROGRAMS / "just", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return said.stderr.splitlines()


def parse_ours(argv: Sequence[str]) -> None:
    """Parse a command line with the program's own parser; training's settings are checked as well."""
    try:
        code = cli.main(argv)
    except SystemExit as ended:
        code = ended.code or 0
    assert code == 0, f"does not parse: {' '.join(argv)}"


def check_install(words: Sequence[str]) -> None:
    """Files and extras that pip is told of are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for option, value in zip(words, words[1:], strict=False):
        if option == "-c":
            assert (ROOT / value).is_file()
        if option == "-e":
            extras = re.findall(r"\w+", value)
            assert set(extras) <= set(project["optional-dependencies"]), value


def check(command: Command) -> None:
    """Fails unless the command parses, or belongs to a program that is listed. A recipe is what it runs."""
    program, *rest = command.words
    program = program.removeprefix(".venv/bin/").replace("python3", "python")
    if program == "projected-grpo":
        return parse_ours(rest)
    if program == "just":
        for line in expansion(rest):
            for inner in simple_commands(line):
                check(Command(command.page, inner))
        return None
    if program == "pip":
        return check_install(rest)
    if program == "torchrun":  # its options have an = or no value; what it starts is a module of ours
        module = rest.index("-m")
        assert all(option.partition("=")[0] in FOREIGN_OPTIONS for option in rest[:module]), command
        return check(Command(command.page, ("python", *rest[module:])))
    if program == "python" and rest[:2] == ["-m", "projected_grpo.train"]:
        return parse_ours(["train", *rest[2:]])
    if program == "python" and rest[:2] == ["-m", "projected_grpo.cli"]:
        return parse_ours(rest[2:])
    if program == "python" and rest[0] == "-c":
        compile(rest[1], str(command), "exec")
        return None
    if program == "python" and rest[0] in SCRIPTS.get(command.page, {}):
        return None
    script = rest[0] if program == "python" and rest[0].endswith(".py") else program
    if script.startswith(("scripts/", "examples/", "tests/")):
        assert (ROOT / script).is_file()
        program = Path(script).name
    known = f"python -m {rest[1]}" if program == "python" and rest[0] == "-m" else program
    assert known in OTHERS, f"{command}: neither ours nor listed in OTHERS"
    return None


@pytest.fixture
def nothing_is_run(monkeypatch):
    monkeypatch.setattr(cli, "implementation", lambda target: lambda parsed: 0)
    monkeypatch.setattr(cli, "check_paths", lambda parsed: None)  # all placeholders are one file
    monkeypatch.setattr(train, "train", lambda cfg: validate(cfg) or 0)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_parses(nothing_is_run, command, tmp_path, monkeypatch):
    if any(word.endswith("vote.py") for word in command.words):  # an arm's file is read to know its options
        monkeypatch.chdir(tmp_path)
        Path("vote.py").write_text(SCRIPTS[command.page]["vote.py"])
    check(command)


@pytest.mark.parametrize(
    "words",
    [
        "queue-full",
        "queue-full --dry-run",
        "queue-full 41,42 --dry-run",
        "probe-full-seed --rollouts=0",
        "probe-full-seed 43",
    ],
)
def test_a_recipe_takes_options_alone(nothing_is_run, words):
    check(Command("justfile", ("just", *words.split())))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_files_of_the_repository_that_a_command_names_are_there(command):
    for word in command.words:
        if word.startswith(("docs/", "scripts/", "src/", "tests/")):
            assert (ROOT / word).exists() or word in SCRIPTS[command.page]


@pytest.mark.parametrize(
    "words",
    [
        "projected-grpo train nano --intervention=nothing",
        "projected-grpo train nano --intervention=none --control=haar",  # parses, and makes no run
        "projected-grpo train nano --no-such-option=1",
        "projected-grpo grade --problems FILE",
        "projected-grpo no-such-verb",
        "python -m projected_grpo.train nano --seed=x",
        "just no-such-recipe",
        "just smoke --no-such-option",
        "pip install -e '.[no-such-extra]'",
        "pip install -c no-such-file.txt",
        "python no_such_script.py",
        "scripts/no_such_script.sh",
        "unknown-program",
    ],
)
def test_a_wrong_command_is_seen(nothing_is_run, capsys, words):
    (found,) = commands_in("docs/index.md", f"```bash\n{words}   # a comment\n```")
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        check(found)


def test_what_counts_as_a_command():
    text = """
Text `projected-grpo results`.

    projected-grpo grade --out 'a b'   # indented

```bash
A=1 just smoke && cd x; .venv/bin/just \\
  test
# only a comment
```

```text
projected-grpo export RUN
HACK_RATE 0.3
```
"""
    assert [command.words for command in commands_in("page", text)] == [
        ("projected-grpo", "grade", "--out", "a b"),
        ("just", "smoke"),
        ("cd", "x"),
        (".venv/bin/just", "test"),
        ("projected-grpo", "export", "RUN"),
    ]


# What sentences say of the command line


def options_of(verb: str) -> set[str]:
    """Every option that the help of a verb, or of all arms, names."""
    arms = [("train", "full", f"--intervention={arm}") for arm in SETTINGS]
    helps = [help_text(*words) for words in (arms if verb == "train" else [verb.split()])]
    return {option for text in helps for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}


@pytest.fixture(scope="module")
def options():
    return {verb: options_of(verb) for verb in ("train", *cli.VERBS)}


def verb_of(argv: Sequence[str]) -> str:
    """The verb of a command line: the longest that its first words name."""
    named = [verb for verb in ("train", *cli.VERBS) if list(argv[: len(verb.split())]) == verb.split()]
    assert named, f"no verb: {' '.join(argv)}"
    return max(named, key=len)


@pytest.mark.parametrize("page", PAGES)
def test_options_and_verbs_that_sentences_name_exist(page, options):
    every = set().union(*options.values()) | set(FOREIGN_OPTIONS)
    gone = {"--" + name.replace("_", "-") for name in REMOVED}
    for code in inline_code(PAGES[page]):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        if code.startswith("projected-grpo ") and "VERB" not in code:
            assert named <= options[verb_of(code.split()[1:])] | {"--help"}, code
        elif not code.startswith(("git ", "pip ")):
            assert named <= every | (gone if page == "docs/changed_options.md" else set()), code


@pytest.mark.parametrize("page", PAGES)
def test_recipes_that_sentences_name_exist(page):
    recipes = set(
        subprocess.run(
            [PROGRAMS / "just", "--summary"], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
    )
    named = [
        code.split()[1] for code in inline_code(PAGES[page]) if re.match(r"(\.venv/bin/)?just [\w-]+", code)
    ]
    assert set(named) <= recipes


# Pages that are typed from top to bottom


def is_ours(command: Command) -> bool:
    """Whether the program of a command is this project's."""
    return f"{command.words[0].removeprefix('.venv/bin/')} ".startswith(OURS)


def filled_in(words: Sequence[str]) -> list[str]:
    """A command with a run's folder in the place of RUN, and the one before it in that of OTHER_RUN."""
    runs = sorted(map(str, Path("out/runs").glob("*"))) if Path("out/runs").is_dir() else []
    names = {"out/runs/RUN": runs[-1:], "out/runs/OTHER_RUN": runs[-2:-1]}
    return [value for word in words for value in names.get(word, [word])]


def follow(page: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Type a page's commands in the current folder, in small and each once; the verbs that were run."""
    ran = []
    for path, source in SCRIPTS[page].items():
        Path(path).write_text(source)
    for command in dict.fromkeys(commands_in(page, PAGES[page])):
        words = filled_in(command.words)
        if " ".join(command.words) in NOT_RUN:
            continue
        if words[0] == "python" and words[1] in SCRIPTS[page]:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1])
            ran.append(words[1])
        elif is_ours(command):
            (verb,) = [v for v in SMALL if words[1 : 1 + len(v.split())] == v.split()]
            assert cli.main([*words[1:], *SMALL[verb]]) == 0, command
            ran.append(verb)
        else:
            check(command)
    return ran


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of those who have made a run."""
    return tmp_path_factory.mktemp("reader")


def test_the_quick_start(unchecked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = follow("docs/index.md", monkeypatch)
    assert ran[:2] == ["train nano", "plot"] and "report" in ran
    assert Path("pictures/dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert all(Path(run).name in Path("report.html").read_text() for run in Path("out/runs").glob("*"))


def test_reading_a_run(unchecked, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert follow("docs/howto/read_a_run.md", monkeypatch)[:2] == ["train smoke", "read_run.py"]
    assert re.search(r"^route .*hack ", capsys.readouterr().out, re.MULTILINE)
    assert Path("pictures/routed.png").is_file() and json.loads(Path("rates.json").read_text())["deployed"]


def test_ones_own_problems(unchecked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (row,) = (
        content for language, content in blocks(PAGES["docs/howto/own_problems.md"]) if language == "json"
    )
    Path("my_completions.jsonl").write_text(row)
    follow("docs/howto/own_problems.md", monkeypatch)
    (graded,) = map(json.loads, Path("graded.jsonl").read_text().splitlines())
    assert graded["gt_correct"] and graded["problem_id"] == "scale-by-3"
    assert (
        "rows 80, hacked 40, correct 40" in capsys.readouterr().out
    )  # two of each for all 20: none is refused


def test_ones_own_pairs(unchecked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    follow("docs/howto/own_pairs.md", monkeypatch)
    said = capsys.readouterr().out
    assert "0 errors" in said and "PASS" in said
    assert len({run.name.split("_", 2)[2] for run in Path("out/runs").glob("*")}) == 2  # arm, and its control


def test_ones_own_model(unchecked, home, monkeypatch):
    monkeypatch.chdir(home)
    if not Path("out/runs").is_dir():
        assert cli.main(["train", "smoke", "--intervention=route", *SMALL["train smoke"]]) == 0
    follow("docs/howto/own_model.md", monkeypatch)
    configs = [json.loads(path.read_text())["config"] for path in Path("out/runs").glob("*/config.json")]
    assert "FOLDER" in {config["model"]["model"] for config in configs}


def test_ones_own_arm(unchecked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    follow("docs/howto/own_arm.md", monkeypatch)
    runpy.run_path("test_vote.py")["test_vote_follows_an_explicit_loop"]()
    plain, control = sorted(Path("out/runs").glob("*"), key=lambda run: "haar" in run.name)
    assert "smoke_vote_" in plain.name and "nano_vote+haar_vote_share=0.4_" in control.name
    assert (plain / "arm.py").read_bytes() == Path("vote.py").read_bytes()
    assert json.loads((control / "summary.json").read_text())["finished"]


def test_the_lists_above_name_what_the_pages_hold():
    typed = {" ".join(command.words) for command in COMMANDS if command.page in WALKED}
    assert set(NOT_RUN) <= typed
    howto = {page for page in PAGES if page.startswith("docs/howto/")}
    assert howto <= {*WALKED}, "a page of how-tos is typed by a test"


# The site


def build(source: Path, out: Path, *options: str) -> tuple[int, str]:
    """Build a site as `just docs` does; exit code and warnings."""
    said = out.with_suffix(".warnings")
    arguments = ["-q", "-W", "--keep-going", "-E", "-w", str(said), "-d", f"{out}.doctrees", *options]
    return build_main([*arguments, str(source), str(out)]), said.read_text()


def test_the_site_builds(tmp_path, capsys):
    code, warnings = build(ROOT / "docs", tmp_path / "site")
    assert code == 0, warnings
    page = (tmp_path / "site" / "cli.html").read_text()
    for verb in cli.VERBS:
        assert f"<h2>{verb}<a" in page
    assert "--vhack-refresh-every" in page and "--teacher-off-step" in page
    for html in (tmp_path / "site").glob("*.html"):
        fetched = re.findall(r'(?:src|<link[^>]* href)="(https?:[^"]*)"', html.read_text())
        assert not fetched, f"{html.name} fetches {fetched}"


@pytest.mark.parametrize(
    ("link", "missing"),
    [
        ("[text](no_such_page.md)", "no_such_page"),
        ("[text](index.md#no-such-heading)", "no-such-heading"),
        ("[text](index.md#title)", None),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path, link, missing):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", source)
    (source / "index.md").write_text(f"# Title\n\n{link}\n")
    code, warnings = build(source, tmp_path / "site", "-D", "extensions=myst_parser")
    assert (code == 0 and not warnings) if missing is None else (code == 1 and missing in warnings)
