"""Finished runs that nobody made, with the files that verbs over runs read; a few pairs for real ones."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from projected_grpo.arm_settings import arm_settings
from projected_grpo.config import PRESETS, to_json
from projected_grpo.results.runs import EndedRun
from projected_grpo.run.identity import reference_name, run_name
from projected_grpo.runlog import append_jsonl, write_json

SMOKE = PRESETS["smoke"][1]
STEPS = 30


def few_pairs(folder, count=5):
    """The first of the packaged pairs as a set of their own: extraction takes half of a short run's time."""
    shipped = json.loads((files("projected_grpo") / "data" / "pairs_core.json").read_text())
    path = folder / "pairs.json"
    path.write_text(json.dumps(shipped | {"name": "few", "pairs": shipped["pairs"][:count]}))
    return path


def config(intervention="route2", seed=41, options=None):
    cfg = replace(SMOKE, arm=arm_settings(intervention), run=replace(SMOKE.run, seed=seed))
    for group, changes in (options or {}).items():
        cfg = replace(cfg, **{group: replace(getattr(cfg, group), **changes)})
    return cfg


def a_step(i, **values):
    return {"step": i, "hack_s": [1, 4], "gt_s": [2, 4], "kl": 0.5, "cos_pre": 0.25, "fired": 0.5} | values


def steps_of(count=STEPS, **columns):
    """Steps whose columns are given as functions of the step."""
    return [a_step(i, **{name: f(i) for name, f in columns.items()}) for i in range(count)]


def summary(cfg, *, modes=None, **values):
    rates = {"hack_train": 0.5, "hack_deploy": 0.25, "solve_train": 0.5, "solve_deploy": 0.25, "eval_n": 64}
    body = {
        **{"arm": reference_name(cfg), "name": run_name(cfg), "preset": cfg.preset},
        "intervention": cfg.arm.intervention,
        **{"model": "tiny-random", "problems": "embedded", "env_mode": "run_tests", "seed": cfg.run.seed},
        **{"steps": cfg.optim.steps, "hack_rate_student": 0.5, "pass_rate_student": 0.5, **rates},
        **{"by_mode": {m: {**rates, "in_distribution": m != "sentinel"} for m in modes or ()}},
        **{"by_split": {}, "finished": True},
    }
    return body | values


def made(folder, name, intervention="route2", *, seed=41, options=None, steps=None, modes=None, **values):
    """A run folder with the files that `results` reads."""
    cfg, run = config(intervention, seed, options), folder / name
    run.mkdir(parents=True)
    write_json(run / "config.json", {"config": to_json(cfg), "git_commit": "abc"})
    write_json(run / "summary.json", summary(cfg, modes=modes, **values))
    append_jsonl(run / "steps.jsonl", steps_of() if steps is None else steps)
    return run


def a_run(intervention="none", seed=41, options=None, steps=None, **values):
    """The same without files."""
    cfg = config(intervention, seed, options)
    rows = steps_of() if steps is None else steps
    columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
    name = f"{intervention}_{seed}_{options}"
    return EndedRun(
        name, Path(name), summary(cfg, **values), json.loads(json.dumps(to_json(cfg))), "abc", columns
    )
