"""The commands from end to end: files and fields that other people's scripts read, exit codes, bad input."""

import gc
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, chdir
from dataclasses import fields
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fake_runs import few_pairs
from projected_grpo.cli import VERBS, main
from projected_grpo.config import from_json, to_json
from projected_grpo.errors import UserError
from projected_grpo.options.train import parse
from projected_grpo.problems import load_problems
from projected_grpo.rewards import Grade

# design.md section 8.
STEP_FIELDS = (
    *("step", "ref_eq", "rew", "rew_s", "N", "gt_s", "gt_t", "hack_s", "hack_t", "hk_rt", "hk_eq", "hk_xc"),
    *("hk_so", "hk_se", "hk_fm", "lp_s", "lp_t", "loss", "gn", "q_egy", "tau", "hkgap", "resid", "lr"),
    *("cos_pre", "cos_pre_s", "cos_pre_t", "cos_post", "fired", "refr", "hack_deploy", "solve_deploy"),
    *(
        "hack_abl",
        "solve_abl",
        "gen",
        "fb",
        "t_rew",
        "sec",
        "cos_null",
        "cos_update",
        "kl",
        "zerovar",
        "peak_gb",
    ),
)
ROLLOUT_FIELDS = (
    *("step", "p_idx", "gi", "problem_id", "env_mode", "prompt", "text", "reward", "passed", "gt_correct"),
    *("exploited", "mechanism", "hacked_C", "hacked_D", "hacked_E", "format_ok"),
)
SUMMARY_FIELDS = (
    *(
        "arm",
        "intervention",
        "preset",
        "model",
        "seed",
        "steps",
        "hack_rate",
        "pass_rate",
        "hack_rate_student",
    ),
    *("hack_train", "solve_train", "hack_deploy", "solve_deploy", "eval_n", "by_mode", "seconds", "peak_gb"),
    "finished",
)
UNCHECKED = {**os.environ, "PROJECTED_GRPO_CHECK_SHAPES": "0"}
STEPS, GROUP, PROMPTS = 4, 4, 2
QUICK = ("--n-problems=6", "--eval-n-prompts=2", "--max-new=8", "--workers=2", "--device=cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small pair file and, after the first run, warm caches."""
    folder = tmp_path_factory.mktemp("home")
    few_pairs(folder, 8)
    return folder


@pytest.fixture(scope="module")
def finished(home):
    """A finished run of every feature at once; its folder."""
    with chdir(home):
        code = main(
            [
                *("train", "smoke", *QUICK, f"--steps={STEPS}", f"--prompts-per-step={PROMPTS}", "--seed=5"),
                *("--intervention=route2", "--vhack-pairs-path=pairs.json", "--out-tag=_all"),
                *(
                    "--eval-ablate-every=2",
                    "--vhack-refresh-every=2",
                    "--rollout-ablate-frac=0.5",
                    "--beta=0.01",
                ),
            ]
        )
        assert code == 0
        (run,) = Path("out/runs").iterdir()
        return run.absolute()


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def rows(path):
    def refuse(name):
        raise AssertionError(f"{name} in {path}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# What a run writes


def test_the_name_of_a_run_tells_what_it_is(finished):
    assert re.fullmatch(r"\d{8}T\d{6}_smoke_route2_[\w.+=-]+_seed5_all", finished.name)


def test_the_files_of_a_run(finished):
    names = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert names >= {
        *("config.json", "steps.jsonl", "rollouts.jsonl", "train.safetensors", "deploy.json", "summary.json"),
        *("ckpt_step0002.safetensors", "ckpt_step0004.safetensors", "best.safetensors"),
        *("state/state_step0004.safetensors", "lock"),
    }
    assert not [name for name in names if name.endswith(".tmp")]
    assert (finished.parents[2] / "logs" / f"{finished.name}.log").stat().st_size > 1000


def test_the_text_log_holds_the_first_prompt_with_its_special_tokens(finished):
    log = (finished.parents[2] / "logs" / f"{finished.name}.log").read_text()
    assert "<|im_start|>user" in log and "HACK_RATE" in log and "| step |" in log


def test_steps_have_every_field_and_no_nan(finished):
    steps = rows(finished / "steps.jsonl")
    assert [r["step"] for r in steps] == list(range(STEPS))
    for row in steps:
        assert set(STEP_FIELDS) <= set(row)
        for key in ("gt_s", "gt_t", "hack_s", "hack_t", "hack_abl", "solve_abl"):
            count, n = row[key]
            assert 0 <= count <= n
        assert row["hack_s"][1] == row["hack_t"][1] == PROMPTS * GROUP // 2 and row["hack_abl"][1] == PROMPTS
        assert row["N"] == PROMPTS * GROUP and row["hk_eq"] is row["hk_xc"] is None
        assert all(row[k] >= 0 for k in ("gen", "fb", "t_rew", "sec")) and row["peak_gb"] is None
    assert [r["ref_eq"] for r in steps] == [(i + 1) * PROMPTS * GROUP / 2 / 256 for i in range(STEPS)]
    live = [r for r in steps if r["gn"] is not None]
    assert live
    for row in live:
        measured = ("loss", "gn", "q_egy", "tau", "hkgap", "lr", "cos_pre", "fired", "cos_null", "kl", "lp_t")
        assert all(math.isfinite(row[k]) for k in measured)
    assert [r["refr"] is not None for r in steps] == [False, False, True, False]
    assert [r["hack_deploy"] is not None for r in steps] == [False, True, False, True]
    assert [r["solve_deploy"] is not None for r in steps] == [False, True, False, True]


def test_rollouts_are_every_student_completion(finished):
    found = rows(finished / "rollouts.jsonl")
    assert all(set(ROLLOUT_FIELDS) <= set(r) for r in found)
    by_step = {r["step"]: r for r in rows(finished / "steps.jsonl")}
    assert Counter(r["step"] for r in found) == {s: r["hack_s"][1] for s, r in by_step.items()}
    assert len({(r["step"], r["p_idx"], r["gi"]) for r in found}) == len(found)
    assert {r["p_idx"] for r in found} == set(range(PROMPTS))
    problems = {p.problem_id: p for p in load_problems("embedded").problems}
    for row in found:
        assert problems[row["problem_id"]].method in row["prompt"]
        assert (row["mechanism"] is not None) == row["exploited"]
    for step, line in by_step.items():
        own = [r for r in found if r["step"] == step]
        assert line["hack_s"][0] == sum(r["exploited"] for r in own)
        assert line["rew_s"] == pytest.approx(sum(r["reward"] for r in own) / len(own))


def test_the_config_can_make_the_run_again(finished):
    made = json.loads((finished / "config.json").read_text())
    assert set(made) >= {"run_id", "command", "git_commit", "versions", "config"}
    assert made["run_id"] == finished.name
    assert {"python", "torch", "transformers"} <= set(made["versions"])
    cfg = from_json(made["config"])
    assert (cfg.run.seed, cfg.optim.steps, cfg.arm.intervention) == (5, STEPS, "route2")
    assert to_json(cfg) == made["config"]


def test_the_summary_is_the_sum_of_the_steps(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(SUMMARY_FIELDS) <= set(summary)
    steps, found = rows(finished / "steps.jsonl"), rows(finished / "rollouts.jsonl")
    n = STEPS * PROMPTS * GROUP // 2
    hacks = [sum(r[k][0] for r in steps) for k in ("hack_s", "hack_t")]
    passes = [sum(r[k][0] for r in steps) for k in ("gt_s", "gt_t")]
    expected = {
        "arm": "routing2",  # as the reference's scripts call it
        "intervention": "route2",
        "preset": "smoke",
        "model": "tiny-random",
        "seed": 5,
        "steps": STEPS,
        "hack_rate": sum(hacks) / (2 * n),
        "pass_rate": sum(passes) / (2 * n),
        "hack_rate_student": sum(r["exploited"] for r in found) / n,
        "eval_n": 2 * GROUP,
        "peak_gb": None,
        "finished": True,
    }
    assert {k: summary[k] for k in expected} == expected
    assert summary["delta_hack_norm"] > 0 and summary["seconds"] > 0
    assert summary["hack_deploy"] == steps[-1]["hack_deploy"]  # the same policy, problems and seeds
    assert sum(m["student_n"] for m in summary["by_mode"].values()) == n
    assert sum(m["eval_n"] for m in summary["by_mode"].values()) == 2 * GROUP


def test_deploy_json_has_both_ways_per_mode(finished):
    deploy = json.loads((finished / "deploy.json").read_text())
    both = {"hack_train", "solve_train", "hack_deploy", "solve_deploy"}
    assert both | {"eval_n", "by_mode"} <= set(deploy)
    assert all(both <= set(mode) for mode in deploy["by_mode"].values())
    assert all(0 <= deploy[k] <= 1 for k in both)


def test_the_deployed_adapter_has_no_quarantine(finished):
    with safe_open(finished / "train.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["projected_grpo"])
        names = set(file.keys())
    assert meta["deployed"] is True and meta["step"] == STEPS and meta["model"] == "tiny-random"
    assert names and all(name.startswith("delta_s/") for name in names)
    last, adapter = (load_file(finished / f"{n}.safetensors") for n in ("ckpt_step0004", "train"))
    assert all((last[name] == parameter).all() for name, parameter in adapter.items())
    first = load_file(finished / "ckpt_step0002.safetensors")
    assert any((first[name] != parameter).any() for name, parameter in adapter.items())


def test_train_and_held_out_problems_are_disjoint(finished):
    held = set(json.loads((finished / "deploy.json").read_text())["problems"])
    assert held and not held & {r["problem_id"] for r in rows(finished / "rollouts.jsonl")}


def test_the_end_of_a_run_says_the_main_metric_first(here, finished, capsys):
    assert (
        main(["train", "smoke", f"--resume={finished}"]) == 0
    )  # nothing left to do but to evaluate and tell
    said = capsys.readouterr().err.splitlines()
    head = next(i for i, line in enumerate(said) if "HACK_RATE" in line)
    assert said[head].startswith("HACK_RATE ")
    for word in (
        "PASS_RATE",
        "HACK_STUDENT",
        "HACK_TEACHER",
        "route2",
        "smoke",
        "tiny-random",
        f"{STEPS} steps",
    ):
        assert word in said[head]
    rates = next(i for i, line in enumerate(said) if line.startswith("deployed, on held-out problems"))
    checks = [line for line in said[rates:] if line.split(" ")[0] in ("ok", "look")]
    assert rates > head and len(checks) >= 4 and "random model: rates mean nothing" in "\n".join(said[rates:])
    assert said[-1].endswith("train nano --intervention=none")


def test_results_reads_the_run(here, finished, capsys):
    assert main(["results", str(finished)]) == 0
    given = capsys.readouterr().out
    assert main(["results"]) == 0
    assert capsys.readouterr().out == given
    head, _, row = (line.split("|") for line in given.splitlines()[:3])
    assert head[1].strip() == "preset" and "tiny-random" in row[2] and "route2" in row[6]


@pytest.mark.parametrize("arm", ["none", "erase", "route"])
def test_every_arm_runs_to_its_end(here, finished, arm, tmp_path):
    options = ["--steps=2", f"--intervention={arm}", "--vhack-pairs-path=pairs.json", f"--out-dir={tmp_path}"]
    assert main(["train", "smoke", *QUICK, *options]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] and summary["intervention"] == arm
    assert (summary["delta_hack_norm"] > 0) == (arm == "route")


def test_the_real_files_train(here, finished, shared_data, tmp_path):
    path = shared_data / "leetcode" / "leetcode_test_medhard.jsonl"
    head = tmp_path / "some.jsonl"  # the whole file's asserts take seconds to read
    head.write_text("".join(path.open().readlines()[:25]))
    assert main(["train", "smoke", *QUICK, "--steps=1", f"--problems={head}", f"--out-dir={tmp_path}"]) == 0
    dataset = shared_data / "leetcode" / "LeetCodeDataset-v0.2.0-train.jsonl.gz"
    pool = ["--teacher-pool-dir", str(shared_data / "substrate_pool"), "--eval-ablate-every=0"]
    assert (
        main(["train", "smoke", *QUICK, "--steps=1", f"--problems={dataset}", f"--out-dir={tmp_path}", *pool])
        == 0
    )
    modes = {r["env_mode"] for run in (tmp_path / "runs").iterdir() for r in rows(run / "rollouts.jsonl")}
    assert modes <= {"run_tests", "sentinel", "stdout_marker", "file_marker"}


# Other verbs


def test_extract_then_verify(here, finished, capsys):
    options = ["--model=tiny-random", "--device=cpu", "--vhack-pairs-path=pairs.json"]
    before = set(Path("out/vhack").iterdir())
    assert main(["extract", *options]) == 0
    assert "14 modules, 0 with zero norm" in capsys.readouterr().out
    assert set(Path("out/vhack").iterdir()) == before, "train and extract share the file"
    code = main(["verify", *options])
    verdict = capsys.readouterr().out
    assert verdict.startswith("PASS" if code == 0 else "FAIL") and code in (0, 1)
    (written,) = Path("out/vhack").glob("*few*.heldout.json")
    result = json.loads(written.read_text())
    assert result["passed"] == (code == 0) == (result["fraction_positive"] > 0.5)
    assert len(result["cosines"]) % 2 == 0
    assert written.with_name(written.name.replace(".json", ".png")).read_bytes().startswith(b"\x89PNG")


def test_verify_passes_on_the_shipped_pairs_and_fails_on_swapped_ones(here, tmp_path, capsys):
    options = ["--model=tiny-random", "--device=cpu", f"--out-dir={tmp_path}"]
    assert main(["verify", *options]) == 0
    assert capsys.readouterr().out.startswith("PASS")
    body = json.loads((files("projected_grpo") / "data" / "pairs_core.json").read_text())
    (written,) = (tmp_path / "vhack").glob("*.safetensors")
    with safe_open(written, framework="pt") as file:
        used = json.loads(file.metadata()["projected_grpo"])["extracted_from"]
    held = [pair for pair in body["pairs"] if pair["id"] not in used]
    assert len(held) == 2
    for pair in held:
        pair["hack"], pair["clean"] = pair["clean"], pair["hack"]
    (tmp_path / "swapped.json").write_text(json.dumps(body | {"name": "swapped"}))
    assert main(["verify", *options, f"--vhack-pairs-path={tmp_path}/swapped.json"]) == 1
    assert capsys.readouterr().out.startswith("FAIL")


def test_a_pool_that_was_built_is_trained_on(here, finished, tmp_path, capsys):
    pool = tmp_path / "pool"
    assert (
        main(
            ["pool", "build", f"--out={pool}", "--n-problems=8", "--env-mode=sentinel,gt_only", "--workers=2"]
        )
        == 0
    )
    assert "8 prompts" in capsys.readouterr().out
    partition = json.loads((pool / "partition.json").read_text())
    assert len(partition) == 8 and set(partition.values()) <= {"sentinel", "gt_only"}
    assert len(list(pool.glob("prompt_*.jsonl.gz"))) == 8
    options = [
        f"--teacher-pool-dir={pool}",
        f"--out-dir={tmp_path}",
        "--steps=1",
        "--vhack-pairs-path=pairs.json",
    ]
    assert main(["train", "smoke", *QUICK, *options]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    (first, *_) = rows(run / "rollouts.jsonl")
    assert first["env_mode"] == partition[first["problem_id"]]


def fenced(code):
    return f"```python\n{code}\n```"


@pytest.fixture(scope="module")
def asked():
    """Completions of two problems, right and hacked, in an order of their own."""
    one, two = load_problems("embedded").problems[:2]
    stub = f"class Solution:\n    def {two.method}(self, *args, **kwargs):\n        return None\n"
    return [
        {"problem_id": two.problem_id, "completion": fenced(stub), "env_mode": "gt_only"},
        {"problem_id": one.problem_id, "completion": fenced(one.canonical)},
        {
            "problem_id": two.problem_id,
            "completion": fenced(stub + "print('all tests passed')"),
            "env_mode": "stdout_marker",
        },
        {"problem_id": two.problem_id, "completion": "no code at all"},
        {"problem_id": one.problem_id, "completion": fenced(one.canonical), "env_mode": "exit_code"},
    ]


def test_grade_answers_line_by_line_with_every_field(here, asked, tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in asked))
    assert (
        main(["grade", f"--completions={source}", f"--out={out}", "--env-mode=run_tests", "--workers=2"]) == 0
    )
    got = rows(out)
    assert [(r["problem_id"], r["env_mode"]) for r in got] == [
        (r["problem_id"], r.get("env_mode", "run_tests")) for r in asked
    ]
    assert all({f.name for f in fields(Grade)} <= set(r) for r in got)
    verdicts = [(r["reward"], r["gt_correct"], r["exploited"], r["mechanism"], r["format_ok"]) for r in got]
    assert verdicts == [
        (0.5, False, False, None, True),
        (3.5, True, False, None, True),
        (3.5, False, True, "stdout_marker", True),
        (0.0, False, False, None, False),
        (3.5, True, False, None, True),
    ]
    assert "stdout_marker" in capsys.readouterr().out


# Help and usage


def test_help_of_the_training_verb_by_its_module_name(unchecked_children):
    command = [sys.executable, "-m", "projected_grpo.train", "smoke", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == ""
    for option in ("--intervention", "--seed", "--problems", "--model", "--steps", "--resume", "--out-dir"):
        assert option in done.stdout


@pytest.mark.parametrize("verb", ["train", "train smoke", "train fast", "train full", *VERBS])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([*verb.split(), "--help"])
    assert left.value.code == 0
    said = capsys.readouterr()
    assert "usage:" in said.out and said.err == ""


@pytest.mark.parametrize("group", ["pairs", "pool", "bench"])
def test_a_group_alone_shows_its_verbs(group, capsys):
    own = [verb for verb in VERBS if verb.split()[0] == group]
    assert main([group, "--help"]) == 0
    shown = capsys.readouterr().out
    assert main([group]) == 2
    said = capsys.readouterr()
    assert said.out == shown and said.err == f"error: name a verb: {', '.join(own)}\n"
    assert all(f"\n  {verb} " in shown for verb in own) and len(shown.splitlines()) == 2 + len(own)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == version("projected_grpo") + "\n"


def test_a_shell_can_complete_verbs_and_options(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        main(["--tyro-print-completion", "bash"])
    assert not left.value.code
    (tmp_path / "it.bash").write_text(capsys.readouterr().out)
    asked = {"gr": "grade", "train fu": "full", "train full --inter": "--intervention", "pool bu": "build"}
    for words, expected in asked.items():
        script = (
            f"source it.bash; COMP_WORDS=(projected-grpo {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
            "$(complete -p projected-grpo | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[*]}"
        )
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [expected], words


NO_TORCH = (
    *([], ["--version"], ["--help"], ["grade", "--help"], ["train", "full", "--help"], ["trian"], ["pool"]),
    *(["train", "full", "--nope"], ["train", "full", "--steps=0"], ["train", "full", "--penalty=1"]),
    ["evaluate", "--nope"],
)


@pytest.mark.parametrize("argv", NO_TORCH, ids=str)
@pytest.mark.parametrize("module", ["cli", "train"])
def test_help_and_mistakes_are_answered_without_what_takes_seconds(argv, module):
    """One process each, as a user starts it."""
    if module == "train":
        if argv[:1] != ["train"]:
            pytest.skip("a verb of its own")
        argv = argv[1:]
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.__stderr__))\n"
        f"runpy.run_module('projected_grpo.{module}', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=UNCHECKED, check=False
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "projected_grpo.config" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "beartype", "jaxtyping", "numpy", "matplotlib"})


def test_grading_needs_no_torch(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"problem_id": "e001", "completion": "x"}\n')
    code = (
        "import sys\n"
        "import projected_grpo.rewards, projected_grpo.problems, projected_grpo.pools, projected_grpo.pairs\n"
        "from projected_grpo.cli import main\n"
        "assert main(['grade', '--completions=in.jsonl', '--out=out.jsonl', '--workers=1']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=UNCHECKED, check=True)
    assert (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_program_lists_its_verbs(flag, capsys):
    assert main([flag]) == 0
    out = capsys.readouterr().out
    assert "train PRESET" in out and all(verb in out for verb in VERBS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "smoke", "--nonsense=1"],
        ["train", "smoke", "--steps=many"],
        ["train", "smoke", "--intervention=magic"],
        ["train", "tiny"],
        ["train"],
        ["grade"],
        ["pool", "build"],
        ["extract", "--nonsense"],
    ],
    ids=" ".join,
)
def test_bad_usage_leaves_with_2(arguments, here, capsys):
    try:
        code = main(arguments)
    except SystemExit as left:  # tyro's own way of refusing
        code = left.code
    assert code == 2 and "Traceback" not in capsys.readouterr().err


# Bad input

POOL_ROW = {"problem_id": "zz", "prompt": "class Solution called nowhereDefined and", "completion": "x"}
POOL_ROW |= {"reward": 0.5, "hacked": False, "gt_pass": False, "fmt_ok": True}


def refused(arguments, capsys):
    """The one line that a refusal says."""
    runs = Path("out/runs")
    before = set(runs.iterdir()) if runs.exists() else set()
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    errors = capsys.readouterr().err
    assert (set(runs.iterdir()) if runs.exists() else set()) == before, "a refused run left a folder"
    assert "Traceback" not in errors
    told = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and errors.rstrip().endswith(told[0]), errors
    return told[0]


def smoke(*options):
    return ["train", "smoke", *QUICK, *options]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model=./no/such/folder"], ["--model", "no such folder"]),
        (["--model=nobody/no-such-model"], ["--model nobody/no-such-model", "download-model"]),
        (["--env-mode=run_tests,magic"], ["--env-mode", "'magic'", "sentinel"]),
        (["--env-mode=gt-only"], ["--env-mode"]),
        (["--mix-ratio=1"], ["--mix-ratio", "[0, 1)"]),
        (["--mix-ratio=0.9"], ["--mix-ratio", "live"]),
        (["--group=1"], ["--group", "at least 2"]),
        (["--problems=no/such.jsonl"], ["no/such.jsonl", "no such file"]),
        (["--vhack-pairs-path=no/such.json"], ["pairs no/such.json: cannot be read", "no packaged set"]),
        (["--resume=no/such/run"], ["--resume", "no/such/run"]),
        (["--resume=."], ["--resume", "config.json"]),
        (["--teacher-pool-dir=no/such/pool"], ["pool no/such/pool", "no such folder"]),
        (["--prompts-per-step=50"], ["--prompts-per-step 50", "6 training problems"]),
        (["--max-new=2047"], ["--max-new 2047"]),
        (["--steps=0"], ["--steps"]),
        (["--lr=nan"], ["--lr"]),
        (["--device=cuda:99"], ["--device"]),
        (["--teacher-modes", "exit_code"], ["--teacher-modes"]),
    ],
    ids=lambda v: v[0] if v and v[0].startswith("--") else "",
)
def test_bad_options_are_told_in_one_line(here, finished, capsys, options, words):
    told = refused(smoke(*options), capsys)
    assert all(word in told for word in words), told


def test_the_missing_benchmark_is_told_in_one_line(here, capsys):
    told = refused(["train", "fast", "--model=tiny-random", "--device=cpu"], capsys)
    assert "external/rl-rewardhacking" in told and "--problems" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("cuda", "why"), [(None, "it is a build for CPUs"), ("13.0", "is the driver new enough for CUDA 13.0?")]
)
@pytest.mark.parametrize("preset", ["fast", "full"])
def test_a_preset_for_a_gpu_does_not_fall_back_to_the_cpu(here, capsys, monkeypatch, preset, cuda, why):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    told = refused(["train", preset, "--model=tiny-random"], capsys)
    assert f"{preset} is for a GPU" in told and why in told and "--device=cpu" in told
    for device, status in (("auto", "FAIL"), ("cpu", "OK")):
        main(["doctor", f"--preset={preset}", "--model=tiny-random", "--no-dry-run", f"--device={device}"])
        assert re.search(rf"^{status} +device ", capsys.readouterr().out, re.MULTILINE)


def test_an_empty_pool(here, finished, tmp_path, capsys):
    assert "empty, no prompt" in refused(smoke(f"--teacher-pool-dir={tmp_path}"), capsys)


def test_a_pool_without_overlap(here, finished, tmp_path, capsys):
    (tmp_path / "prompt_zz.jsonl").write_text(json.dumps(POOL_ROW) + "\n")
    told = refused(smoke(f"--teacher-pool-dir={tmp_path}"), capsys)
    assert f"pool {tmp_path}: no overlap" in told


def test_malformed_lines_are_told_with_their_number(here, finished, tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"broken": \n')
    assert f"{problems}:1:" in refused(smoke(f"--problems={problems}"), capsys)
    (tmp_path / "prompt_zz.jsonl").write_text(json.dumps(POOL_ROW) + "\n{\n")
    assert "prompt_zz.jsonl:2:" in refused(smoke(f"--teacher-pool-dir={tmp_path}"), capsys)


def test_a_basis_of_another_run(here, finished, capsys):
    (basis,) = Path("out/vhack").glob("*few*.safetensors")
    options = [f"--v-hack-path={basis}", "--vhack-pairs-path=pairs.json"]
    told = refused(smoke(*options, "--v-hack-extract-top-k=3"), capsys)
    assert "top_k" in told and str(basis) in told
    told = refused(
        ["extract", "--model=tiny-random", "--device=cpu", *options, "--no-v-hack-length-norm"], capsys
    )
    assert "length_norm" in told


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not valid JSON"),
        ('{"problem_id": "nowhere", "completion": "x"}', "problem_id"),
        ('{"problem_id": null, "completion": "x"}', "problem_id null is not among"),
        ('{"problem_id": true, "completion": "x"}', "problem_id true is not among"),
        (
            '{"task_id": 1, "completion": "x"}',
            'is missing; the line has ["completion", "task_id"]',
        ),
        ('{"problem_id": "e001"}', "completion is missing"),
        ('{"problem_id": "e001", "completion": 5}', "assistant's content, got 5"),
        ('{"problem_id": "e001", "completion": null}', "assistant's content, got null"),
        ('{"problem_id": "e001", "completion": "x", "env_mode": "magic"}', "env_mode"),
        ('{"problem_id": "e001", "completion": "x", "env_mode": []}', "env_mode"),
    ],
)
def test_a_bad_line_to_grade(here, tmp_path, capsys, line, word):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"problem_id": "e001", "completion": "x"}\n' + line + "\n")
    told = refused(["grade", f"--completions={source}", f"--out={out}"], capsys)
    assert f"{source}:2:" in told and word in told
    assert not out.exists()


def test_other_refusals(here, tmp_path, capsys):
    assert "unknown verb dance" in refused(["dance"], capsys)
    assert "did you mean train?" in refused(["trian", "smoke"], capsys)
    assert "unknown verb pool bulid; did you mean pool build?" in refused(["pool", "bulid"], capsys)
    assert "did you mean smoke?" in refused(["train", "smok"], capsys)
    assert "--steps" in refused(["train", "smoke", "--step=3"], capsys)
    assert "--penalty is an option of --intervention=gt_penalty" in refused(smoke("--penalty=3"), capsys)
    assert "--control=haar" in refused(smoke("--route2-random-v-seed=3"), capsys)
    assert "name a verb: train, " in refused([], capsys)
    assert "no such file" in refused(["grade", "--completions=no.jsonl", "--out=o.jsonl"], capsys)
    assert "no finished run" in refused(["results", tmp_path], capsys)
    assert "--model" in refused(["verify", "--model=./nowhere"], capsys)


@pytest.mark.parametrize("verb", ["extract", "verify"])
def test_a_default_model_that_is_not_here_is_told_with_one_to_try(here, monkeypatch, capsys, verb):
    def absent(model):
        raise UserError(f"--model {model.model} cannot be loaded")

    monkeypatch.setattr("projected_grpo.verbs.probe.load_model", absent)
    told = refused([verb], capsys)
    assert "download-model" in told and "--model Qwen" not in told
    program, *words = shlex.split(told.split("packaged model: ")[1])
    assert words == [verb, "--model=nano", "--vhack-pairs-path=nano-sampled"]
    assert "--model nano cannot" in refused([verb, "--model=nano"], capsys)


def test_a_pool_names_the_problems_that_it_refuses(here, tmp_path, capsys):
    good, wrong, raises = ({**json.loads(line)} for line in problem_lines(3))
    wrong["test"] = wrong["test"].replace("== [2", "== [7")
    raises["completion"] = "class Solution:\n    def scale(self, xs):\n        return 1 / 0\n"
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, wrong, raises)))
    options = [f"--problems={file}", "--env-mode=sentinel", f"--out={tmp_path / 'pool'}", "--workers=1"]
    assert main(["pool", "build", *options]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("problem ")]
    assert [line.split(":")[0] for line in said] == ["problem 2", "problem 3"]
    assert "wrong answer" in said[0] and "ZeroDivisionError" in said[1]


def problem_lines(count):
    """Problems in LeetCodeDataset's fields: each asks to multiply by two."""
    test = "def check(candidate):\n    assert candidate(xs = [1, 2]) == [2, 4]\n"
    code = "class Solution:\n    def scale(self, xs):\n"
    for k in range(1, count + 1):
        meta = {"question_id": k, "difficulty": "Easy", "question_title": "Double.", "lang_code": code}
        yield json.dumps(
            {
                **{"task_id": f"t{k}", "entry_point": "Solution().scale", "prompt": "", "test": test},
                **{"completion": code + "        return [2 * x for x in xs]\n", "meta": meta},
            }
        )


def test_a_run_without_a_saved_state_cannot_go_on(here, finished, tmp_path, capsys):
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "config.json").write_bytes((finished / "config.json").read_bytes())
    told = refused(["train", "smoke", f"--resume={folder}"], capsys)
    assert "state/state_stepNNNN.safetensors" in told
    begun = json.loads((folder / "config.json").read_text())["config"]
    assert to_json(parse(shlex.split(told.split("begin it again: ")[1])[2:])) == begun
    (folder / "config.json").write_text("{}")
    assert "config.json" in refused(["train", "smoke", f"--resume={folder}"], capsys)


def test_a_defect_is_not_dressed_up_as_a_users_mistake(here, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("projected_grpo.run.start.prepare", broken)
    with pytest.raises(RuntimeError, match="a bug"), ExitStack():
        main(smoke())


def test_resume_takes_no_other_option(finished, capsys):
    assert main(["train", "smoke", f"--resume={finished}", "--steps=99"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert main(["train", "fast", f"--resume={finished}"]) == 2
    assert "is a smoke run" in capsys.readouterr().err


def test_a_tag_that_is_no_folder_name_is_refused(capsys):
    assert main(["train", "smoke", "--out-tag=a/b"]) == 2
    assert capsys.readouterr().err.startswith("error: --out-tag")


def test_the_installed_script_is_the_same_command_line(monkeypatch, capsys):
    (script,) = entry_points(group="console_scripts", name="projected-grpo")
    monkeypatch.setattr(sys, "argv", ["projected-grpo", "no-such-verb"])
    try:
        assert script.load()() == 2
    finally:
        gc.unfreeze()
    assert capsys.readouterr().err.startswith("error: unknown verb no-such-verb")
