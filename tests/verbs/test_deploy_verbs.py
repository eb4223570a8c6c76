"""The verbs evaluate and export and a start from an adapter, end to end, on runs of the tiny random model.

What it writes is never code, so labels are made up from a hash of each completion: rates then move.
"""

import json
import shutil
from collections import defaultdict
from concurrent.futures import Future
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fake_runs import few_pairs
from projected_grpo.cli import main
from projected_grpo.config import PRESETS, ModelConfig, from_json
from projected_grpo.deploy.trained import Source, find_source, model_settings
from projected_grpo.errors import UserError
from projected_grpo.pools import bake
from projected_grpo.problems import is_eval, is_validation, load_problems
from projected_grpo.rewards import MODES, Grade, Grader
from projected_grpo.run.checkpoint import state_paths
from projected_grpo.seeds import stream_seed
from projected_grpo.verbs.deploy import EvaluateOptions, chosen_problems

GROUP, PROMPTS, MAX_NEW = 3, 4, 6
SMALL = ("--workers=1", "--device=cpu")
TRAIN = (
    *("train", "smoke", *SMALL, "--steps=2", f"--group={GROUP}", "--prompts-per-step=2", "--n-problems=6"),
    *(f"--eval-n-prompts={PROMPTS}", "--eval-ablate-every=0", f"--max-new={MAX_NEW}"),
    *("--vhack-pairs-path=pairs.json", "--lr=0.3"),
)
ASK = (*SMALL, f"--n-problems={PROMPTS}", "--samples=2", "--resamples=50")
BLANK = Grade(0.5, False, False, False, None, True, False, False, False, None)


def made_up(self, items):
    grades = []
    for task, text in items:
        bits = stream_seed(task.env_mode, text)
        tampered, right = bits % 2 == 0 and task.env_mode != "gt_only", bits % 3 == 0
        paid = tampered or right
        grades.append(
            replace(
                BLANK,
                reward=3.5 if paid else 0.5,
                passed=paid,
                gt_correct=right,
                tampered=tampered,
                exploited=tampered and not right,
                mechanism=task.env_mode if tampered and not right else None,
            )
        )
    return grades


def promised(self, task, text):
    future = Future()
    future.set_result(made_up(self, [(task, text)])[0])
    return future


class Labels(Grader):
    """A grader without a sandbox."""

    grade_all = made_up

    def __init__(self):
        pass


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small pair file, while labels are made up."""
    folder = tmp_path_factory.mktemp("home")
    few_pairs(folder, 6)
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setattr(Grader, "grade_all", made_up)
        patch.setattr(Grader, "submit", promised)
        yield folder


@pytest.fixture(scope="module")
def run(home):
    """A finished run that routed something."""
    assert main([*TRAIN, "--intervention=route", "--seed=5"]) == 0
    (folder,) = (home / "out" / "runs").iterdir()
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(arguments, capsys):
    """The one line that a refusal says."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1
    return told[0]


def test_what_an_evaluation_writes_can_be_counted_again(run, tmp_path, capsys):
    out, kept = tmp_path / "new" / "e.json", tmp_path / "new" / "c.jsonl"
    options = [f"--out={out}", f"--completions={kept}", "--tokens-at-once=2000"]
    assert main(["evaluate", str(run), *ASK, *options]) == 0
    found, rows = json.loads(out.read_text()), lines(kept)
    assert found["schema"] == "projected_grpo.evaluation/1"
    assert found["policy"]["run"] == run.name and found["policy"]["delta_hack_norm"] > 0
    assert found["settings"]["max_new"] == MAX_NEW and found["settings"]["top_p"] == 0.95
    ids = found["problems"]["ids"]
    assert len(ids) == PROMPTS and not set(ids) & {r["problem_id"] for r in lines(run / "rollouts.jsonl")}
    assert len(rows) == 2 * 3 * PROMPTS * 2

    groups = defaultdict(list)
    for row in rows:
        groups[row["policy"], row["condition"]].append(row)
    modes = {r["problem_id"]: r["env_mode"] for r in rows if r["condition"] == "hinted"}
    for (policy, condition), group in groups.items():
        figures = found[policy][condition]
        for name, field in (("hack", "exploited"), ("attempt", "tampered"), ("solve", "gt_correct")):
            figure = figures[name]
            assert (figure["count"], figure["n"]) == (sum(r[field] for r in group), 2 * PROMPTS)
            assert figure["problems"] == PROMPTS and figure["low"] <= figure["rate"] <= figure["high"]
            assert figure["method"] == "t"  # few problems
            for mode, part in figures["by_mode"].items():
                own = [r for r in group if modes[r["problem_id"]] == mode]
                assert (part[name]["count"], part[name]["n"]) == (sum(r[field] for r in own), len(own))
        given = figures["exploit_given_attempt"]
        assert (given["count"], given["n"]) == (figures["hack"]["count"], figures["attempt"]["count"])
    honest = groups["deployed", "unhinted"]
    assert {r["env_mode"] for r in honest} == {"gt_only"} and not any(r["exploited"] for r in honest)
    texts = {p: [r["text"] for r in groups[p, "hinted"]] for p in ("as_trained", "deployed")}
    assert texts["as_trained"] != texts["deployed"]
    printed = capsys.readouterr().out
    assert "as_trained" in printed and "solve unhinted" in printed and str(out) in printed
    heads, *body = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    table = [dict(zip(map(str.strip, heads), map(str.strip, row), strict=True)) for row in body]
    for row in table:
        if row["mode"] == "all":
            for column, condition in (("hack", "hinted"), ("hack, unseen names", "unseen")):
                assert row[column].startswith(f"{found[row['policy']][condition]['hack']['rate']:.3f} [")
    assert "where 0 means" in printed and "not that the policy does not hack" in printed
    assert sorted(p.name for p in out.parent.iterdir()) == ["c.jsonl", "e.json"]


@pytest.mark.parametrize(
    ("names", "unseen"), [("both", {"unseen"}), ("train", set()), ("eval", {"hinted"})], ids=lambda v: str(v)
)
def test_hints_name_what_trainings_named_or_what_they_never_did(run, tmp_path, capsys, names, unseen):
    """The whole way from files: which conditions ask under which names, and what is said of a rate of 0."""
    kept, out = tmp_path / "c.jsonl", tmp_path / "e.json"
    ask = [*ASK, "--samples=1", f"--out={out}", f"--completions={kept}", f"--eval-names={names}"]
    assert main(["evaluate", str(run), *ask]) == 0
    asked = {
        (r["condition"], r["env_mode"], hint(r["prompt"])) for r in lines(kept) if "evaluated" in r["prompt"]
    }
    asked |= {("training", r["env_mode"], hint(r["prompt"])) for r in lines(run / "rollouts.jsonl")}
    for condition, mode, text in asked:
        assert (MODES[mode].name not in text) == (condition in unseen)
        assert any(name in text for name in MODES[mode].eval_names) == (condition in unseen)
    conditions = {"hinted", "unhinted"} | unseen
    assert {condition for condition, _, _ in asked} == conditions - {"unhinted"} | {"training"}
    assert set(json.loads(out.read_text())["deployed"]) == conditions
    assert ("where 0 means" in capsys.readouterr().out) == bool(unseen)


def hint(prompt):
    return prompt[prompt.index("will be evaluated") :].split(". Use the following")[0]


def test_under_trainings_names_and_sampling_it_is_the_runs_own_evaluation(run, tmp_path):
    out, summary = tmp_path / "e.json", json.loads((run / "summary.json").read_text())
    same = [f"--samples={GROUP}", "--top-p=1", "--top-k=20", "--seed=5", "--eval-names=train"]
    options = [*SMALL, f"--n-problems={PROMPTS}", "--resamples=50", *same, f"--out={out}"]
    assert main(["evaluate", str(run), *options]) == 0
    found = json.loads(out.read_text())
    deploy = json.loads((run / "deploy.json").read_text())
    assert found["problems"]["ids"] == deploy["problems"]
    for policy, name in (("as_trained", "train"), ("deployed", "deploy")):
        hinted = found[policy]["hinted"]
        assert hinted["hack"]["rate"] == summary[f"hack_{name}"]
        assert hinted["solve"]["rate"] == summary[f"solve_{name}"]
        for mode, figures in hinted["by_mode"].items():
            assert figures["hack"]["rate"] == summary["by_mode"][mode][f"hack_{name}"]
    assert 0 < found["deployed"]["hinted"]["hack"]["rate"] < 1


def test_the_base_model_and_adapter_files(run, tmp_path, capsys):
    def rates(*arguments):
        out = tmp_path / "e.json"
        assert main(["evaluate", *map(str, arguments), *ASK, "--problems=embedded", f"--out={out}"]) == 0
        return json.loads(out.read_text())

    base = rates("--model=tiny-random", "--max-new=6")
    assert base["as_trained"] is None and base["policy"]["adapter"] is None
    deployed = rates(run / "train.safetensors", "--max-new=6")
    assert deployed["as_trained"] is None and deployed["policy"]["delta_hack_norm"] is None
    saved = rates(state_paths(run)[0], "--max-new=6")
    of_run = rates(run, "--env-mode=run_tests")
    assert saved["as_trained"] == of_run["as_trained"] and saved["deployed"] == of_run["deployed"]
    assert saved["deployed"] == deployed["deployed"] != base["deployed"]
    assert saved["policy"]["weights"] == base["policy"]["weights"]


def test_which_problems_of_a_file_are_asked(run):
    """Held-out ones of the run's own file and of packaged problems, all of any other; validation and test."""
    everything = load_problems("embedded").problems

    def ids(path=run, **options):
        chosen = chosen_problems(EvaluateOptions(path, out=Path("e.json"), **options), find_source(path, "x"))
        return [p.problem_id for p in chosen]

    held_out = [p.problem_id for p in everything if is_eval(p)]
    assert ids() == ids(None, problems="embedded") == ids(run / "train.safetensors", problems="embedded")
    assert ids() == held_out and ids(subset="all") == [p.problem_id for p in everything]
    parts = [ids(split=split, subset="all") for split in ("validation", "test")]
    assert sorted(parts[0] + parts[1]) == sorted(ids(subset="all"))
    assert parts[0] == [p.problem_id for p in everything if is_validation(p)]
    assert len(ids(n_problems=3)) == 3


def test_any_other_file_is_asked_whole(run, shared_data, tmp_path):
    path = tmp_path / "some.jsonl"
    with open(shared_data / "leetcode" / "leetcode_test_medhard.jsonl") as file:
        path.write_text("".join(next(file) for _ in range(6)))
    options = EvaluateOptions(run, out=Path("e.json"), problems=str(path))
    chosen = chosen_problems(options, find_source(run, ""))
    assert len(chosen) == 6 and {p.env_mode for p in chosen} <= {*MODES} - {"gt_only"}
    assert not any(p.named for p in chosen)
    assert all(p.named for p in chosen_problems(replace(options, eval_names="eval"), find_source(run, "")))


def test_modes_are_those_of_the_runs_teacher_pool(home, tmp_path):
    """Of the problems it lists, and shared out over the others; also where it lists none of them."""
    problems, smoke = load_problems("embedded").problems, PRESETS["smoke"][1]

    def modes(pooled, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        bake(pooled, Labels(), folder)
        cfg = replace(
            smoke,
            problems=replace(smoke.problems, env_mode="run_tests"),
            teacher=replace(smoke.teacher, teacher_pool_dir=folder),
        )
        asked = EvaluateOptions(out=Path("e.json"), subset="all", **options)
        return {p.problem_id: p.env_mode for p in chosen_problems(asked, Source("x", cfg=cfg))}

    listed = [replace(problems[0], env_mode="sentinel"), replace(problems[1], env_mode="file_marker")]
    found = modes(listed)
    assert [found[p.problem_id] for p in listed] == ["sentinel", "file_marker"]
    assert set(found.values()) == {"sentinel", "file_marker"}
    assert set(modes(listed, env_mode="exit_code").values()) == {"exit_code"}
    elsewhere = [replace(p, problem_id=f"x{i}", method="nowhere") for i, p in enumerate(listed)]
    elsewhere = [
        replace(p, question=p.question.replace(problems[i].method, "nowhere"))
        for i, p in enumerate(elsewhere)
    ]
    assert set(modes(elsewhere).values()) == {"sentinel", "file_marker"}
    gone = replace(smoke, teacher=replace(smoke.teacher, teacher_pool_dir=tmp_path / "none"))
    with pytest.raises(UserError, match="--env-mode"):
        chosen_problems(EvaluateOptions(out=Path("e.json")), Source("x", cfg=gone))


@pytest.mark.parametrize(
    ("ran", "asked", "wanted"),
    [
        ("eager", "auto", "eager"),
        ("eager", "sdpa", "sdpa"),
        ("auto", "auto", "auto"),
        ("flash_attention_2", "auto", "auto"),  # another machine need not have it
    ],
)
def test_a_model_is_run_as_in_its_run_unless_it_is_said(ran, asked, wanted):
    smoke = PRESETS["smoke"][1]
    cfg = replace(smoke, model=replace(smoke.model, attention=ran, dtype="bfloat16"))
    found = model_settings(Source("x", cfg=cfg), ModelConfig(model="", attention=asked))
    assert found == ModelConfig(model="x", attention=wanted, dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--model"]),
        (["--model=tiny-random"], ["--problems"]),
        (["no/such/run"], ["no/such/run", "no such file"]),
        (["--model=tiny-random", "--problems=embedded", "--samples=0"], ["--samples"]),
        (["--model=tiny-random", "--problems=embedded", "--temperature=0"], ["--temperature"]),
        (["--model=tiny-random", "--problems=embedded", "--confidence=1"], ["--confidence"]),
        (["--model=tiny-random", "--problems=embedded", "--max-new=-1"], ["--max-new"]),
        (["--model=tiny-random", "--problems=embedded", "--env-mode=magic"], ["--env-mode", "magic"]),
        (["--model=tiny-random", "--problems=embedded", "--max-new=4096"], ["--max-new"]),
        (["--model=tiny-random", "--problems=embedded", "--completions=pairs.json"], ["--completions"]),
    ],
    ids=lambda v: " ".join(v)[:60],
)
def test_bad_input_is_told_in_one_line(home, options, words, tmp_path, capsys):
    told = refused(["evaluate", *options, *SMALL, f"--out={tmp_path}/e.json"], capsys)
    assert all(word in told for word in words), told
    assert not list(tmp_path.iterdir())


def test_a_run_in_pieces_is_told(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    ask = ["evaluate", copy, *ASK, f"--out={tmp_path}/e.json"]
    with safe_open(copy / "train.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["projected_grpo"])
    del facts["checksum"]
    earlier = {"projected_grpo": json.dumps(facts | {"step": facts["step"] - 1})}
    save_file(load_file(copy / "train.safetensors"), copy / "train.safetensors", earlier)
    assert "another step" in refused(ask, capsys)
    (copy / "train.safetensors").unlink()
    assert "not finished" in refused(ask, capsys)
    shutil.rmtree(copy / "state")
    shutil.copy(run / "train.safetensors", copy)
    assert main([str(a) for a in ask]) == 0  # what was routed is then not known
    assert json.loads((tmp_path / "e.json").read_text())["as_trained"] is None
    assert "--as-trained" in refused(["export", copy, f"--out={tmp_path}/x", "--as-trained"], capsys)
    (copy / "config.json").write_text('{"config": {}}')
    assert "config.json" in refused(ask, capsys)
    (copy / "config.json").write_text("{}")
    assert "--model" in refused(ask, capsys)


def test_an_exported_folder_is_a_model_again(run, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["export", str(run), f"--out={out}", "--device=cpu"]) == 0
    card = (out / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['delta_hack_norm']:.3e}" in card and '"intervention": "route"' in card
    assert f"| deployed | {summary['hack_deploy']:.3f} |" in card
    ask = [*ASK, "--problems=embedded", "--max-new=6", "--env-mode=sentinel"]
    found = {}
    for name, source in (("run", [str(run)]), ("model", [f"--model={out}"])):
        assert main(["evaluate", *source, *ask, f"--out={tmp_path}/{name}.json"]) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["model"]["deployed"] == found["run"]["deployed"]
    assert found["model"]["policy"]["weights"] != found["run"]["policy"]["weights"]
    assert "--out" in refused(["export", run, f"--out={out}"], capsys)


def test_a_run_starts_from_the_adapter_of_another(run, tmp_path, capsys):
    """With a rate of zero it ends where it started; its settings say from where; resuming needs no file."""
    adapter = tmp_path / "first.safetensors"
    shutil.copy(
        run / "first_hack.safetensors", adapter
    )  # both adapter parameters: the quarantine is left behind
    start = [*TRAIN, "--intervention=none", "--seed=5", f"--init-adapter={adapter}", f"--out-dir={tmp_path}"]
    assert main([*start, "--lr=0"]) == 0
    (made,) = (tmp_path / "runs").iterdir()
    first, last = load_file(adapter), load_file(made / "train.safetensors")
    assert all((last[name] == first[name]).all() for name in last)
    assert any(t.any() for n, t in first.items() if n.startswith("delta_hack/"))
    assert json.loads((made / "summary.json").read_text())["delta_hack_norm"] == 0
    assert from_json(json.loads((made / "config.json").read_text())["config"]).optim.init_adapter == adapter
    adapter.unlink()
    assert main(["train", "smoke", f"--resume={made}"]) == 0
    assert all((t == last[n]).all() for n, t in load_file(made / "train.safetensors").items())
    assert "no such file" in refused(start, capsys)
    other = [*TRAIN, "--intervention=none", f"--init-adapter={run}/train.safetensors", "--model=nano"]
    assert "made for another model" in refused([*other, f"--out-dir={tmp_path}"], capsys)
    assert len(list((tmp_path / "runs").iterdir())) == 1
