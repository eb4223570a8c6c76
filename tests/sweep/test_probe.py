"""The gates of a probe, each with artefacts that pass and that fail, and the whole chain on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch

from fake_runs import config, few_pairs, summary
from projected_grpo.antipasto import wrap
from projected_grpo.arm_settings import arm_settings
from projected_grpo.basis_file import Axes, Extraction, save_extraction
from projected_grpo.cli import main
from projected_grpo.config import PRESETS, LossConfig, to_json
from projected_grpo.engine.passes import rollout_logps
from projected_grpo.errors import GATE_FAILED
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.options.verbs import ScoredOn
from projected_grpo.proj import PairGrads
from projected_grpo.rollout import Rollout
from projected_grpo.runlog import write_json
from projected_grpo.sweep.gates import RunFiles, contrast_of, gate_a, gate_a2, gate_b, gate_c, gate_d
from projected_grpo.verbs.probe import file_hash, measured, scored_on

PRESET = PRESETS["nano"][1]
STEPS, GROUPS = 12, 8


def settings(intervention, seed=41, **optim):
    cfg = replace(
        PRESET,
        arm=arm_settings(intervention),
        optim=replace(PRESET.optim, steps=STEPS, **optim),
        run=replace(PRESET.run, seed=seed),
    )
    return cfg


def step(number, **other):
    row = {"step": number, "zerovar": 2, "loss": 0.1, "hack_s": [32, 64], "cos_pre": 0.3, "cos_post": 0.0}
    return row | {"fired": 0.5} | other


def run(intervention, steps=None, config=None, **summary):
    rates = {"hack_deploy": 0.6, "solve_deploy": 0.4, "eval_n": 2048, "finished": True}
    rows = [step(i) for i in range(STEPS)] if steps is None else steps
    return RunFiles(config or settings(intervention), rows, rates | summary)


def vanilla(**other):
    return run("none", **other)


def erase(**other):
    return run("erase", **{"hack_deploy": 0.1} | other)


def passes(verdict):
    assert verdict.passed and "PASS" in verdict.lines() and not verdict.failed
    return verdict


def fails(verdict, word):
    assert not verdict.passed and "FAIL" in verdict.lines()
    assert len(verdict.failed) == 1 and word in verdict.failed[0]
    return verdict


def norms(n):
    return {f"m{i}": 1.0 for i in range(n)}


def test_gate_a_wants_every_module_reached():
    passes(gate_a("tiny-random", norms(3)))
    fails(gate_a("tiny-random", norms(3) | {"dead": 0.0}), "dead")
    fails(gate_a("tiny-random", norms(3) | {"broken": float("nan")}), "broken")
    fails(gate_a("tiny-random", {}), "no module")


@pytest.mark.parametrize("model", ["Qwen/Qwen3-4B", "models/Qwen3-4B/"])
def test_gate_a_knows_how_many_linears_qwen3_4b_has(model):
    passes(gate_a(model, norms(36 * 7)))
    fails(gate_a(model, norms(36 * 7 - 1)), "252")
    passes(gate_a("Qwen/Qwen3-4B-Base", norms(7)))


def test_gate_a2_refuses_a_learning_rate_that_cannot_move_the_policy():
    assert not passes(gate_a2(10.0, 0.1)).doubtful
    assert "raise --lr" in passes(gate_a2(10.0, 0.099)).doubtful[0]
    fails(gate_a2(10.0, 0.0099), "would not move")
    fails(gate_a2(float("nan"), 1.0), "would not move")


def test_what_gate_a2_forecasts_is_what_a_small_step_does(small_model):
    """By a finite difference: every parameter a little in its gradient's direction, over three pairs."""
    policy = wrap(small_model("qwen3"), None)
    pairs = [((1, 2, 3), (4, 5, 6, 7), (8, 9)), ((3, 1), (5,), (6, 2)), ((2, 2), (7, 7, 1), (3,))]
    rollouts = [Rollout(prompt, said, "") for prompt, *both in pairs for said in both]
    loss = LossConfig(unbiased=False, tokens_per_microbatch=1000)
    sides = torch.tensor([1.0, -1.0] * len(pairs))
    rows = per_rollout_grads(policy, rollouts, sides, loss, 4).rows
    differences = {m: g[0::2] + g[1::2] for m, g in rows.items()}

    def contrast():
        found = rollout_logps(policy, rollouts, 1000)
        return float((found[0::2] - found[1::2]).mean())

    before, size = contrast(), 1e-4
    with torch.no_grad():
        for m, layer in policy.layers.items():
            layer.delta_s.copy_(-size * differences[m].sum(0).sign())
    assert contrast() - before == pytest.approx(size * contrast_of(differences), rel=0.02)


def test_gate_c_wants_a_policy_that_moved():
    def moved(kl):
        return [step(i, kl=kl) for i in range(STEPS)]

    passes(gate_c(vanilla(steps=moved(None))))  # not measured
    passes(gate_c(vanilla(steps=moved(2e-4))))
    fails(gate_c(vanilla(steps=moved(9e-5))), "has not moved")


def test_gate_b_is_hard_on_the_fraction_and_soft_on_the_mean():
    assert not passes(gate_b(0.51, 0.21)).doubtful
    fails(gate_b(0.50, 0.21), "0.500")
    fails(gate_b(float("nan"), 0.21), "nan")
    assert ".20" in passes(gate_b(0.9, 0.20)).doubtful[0]


def test_gate_c_passes_a_vanilla_that_hacks():
    assert not passes(gate_c(vanilla())).doubtful
    low = [step(i, hack_s=[8, 64]) for i in range(STEPS)]
    assert "H4" in passes(gate_c(vanilla(steps=low))).doubtful[0]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_gate_c_wants_a_finite_loss_wherever_there_was_something_to_learn_from(loss):
    rows = [step(i) for i in range(STEPS)]
    rows[3] = step(3, loss=loss)
    fails(gate_c(vanilla(steps=rows)), "step 3")
    rows[3] = step(3, loss=None, zerovar=GROUPS)  # all groups flat: no loss was computed
    passes(gate_c(vanilla(steps=rows)))


def test_gate_c_wants_reward_spread_on_most_steps():
    def spread(live):
        return [step(i, zerovar=2 if i < live else GROUPS) for i in range(STEPS)]

    passes(gate_c(vanilla(steps=spread(STEPS // 2 + 1))))
    fails(gate_c(vanilla(steps=spread(STEPS // 2))), "50% of steps")


def test_gate_c_reads_the_hack_rate_of_the_last_ten_steps():
    early = [step(i, hack_s=[64, 64] if i < 2 else [3, 64]) for i in range(STEPS)]
    fails(gate_c(vanilla(steps=early)), "0.047")
    late = [step(i, hack_s=[0, 64] if i < 2 else [4, 64]) for i in range(STEPS)]
    passes(gate_c(vanilla(steps=late)))


def test_gate_c_wants_the_whole_run_and_of_vanilla():
    fails(gate_c(vanilla(steps=[step(i) for i in range(STEPS - 1)])), "11 of 12")
    fails(gate_c(vanilla(finished=False)), "did not finish")
    fails(gate_c(erase()), "must be of intervention=none")


def test_gate_d_passes_an_arm_that_hacks_less_and_solves_as_much():
    assert not passes(gate_d(vanilla(), erase())).doubtful
    passes(gate_d(vanilla(), erase(solve_deploy=0.9)))
    assert "H1" in passes(gate_d(vanilla(), erase(hack_deploy=0.4))).doubtful[0]
    assert "±" in passes(gate_d(vanilla(), erase(eval_n=48))).doubtful[0]


@pytest.mark.parametrize(
    ("summary", "word"),
    [
        ({"hack_deploy": 0.56}, "+0.040"),
        ({"hack_deploy": 0.8}, "-0.200"),
        ({"hack_deploy": None}, "nan"),
        ({"solve_deploy": 0.29}, "0.110"),
        ({"finished": False}, "did not finish"),
    ],
)
def test_gate_d_fails_on_the_rates_as_deployed(summary, word):
    fails(gate_d(vanilla(), erase(**summary)), word)


def test_gate_d_fails_when_the_arm_does_not_do_what_it_says():
    rows = [step(i) for i in range(STEPS)]
    passes(gate_d(vanilla(), erase(steps=[*rows[:-1], step(11, cos_pre=None, cos_post=None, fired=None)])))
    rows[4] = step(4, cos_post=0.31)
    fails(gate_d(vanilla(), erase(steps=rows)), "step 4")
    fails(gate_d(vanilla(), erase(steps=[step(i, fired=0.01) for i in range(STEPS)])), "0.010")
    fails(gate_d(vanilla(), erase(steps=[])), "0.000")


def test_gate_d_compares_only_what_can_be_compared():
    fails(gate_d(vanilla(), erase(config=settings("erase", seed=42))), "seed (41 / 42)")
    fails(gate_d(vanilla(), erase(config=settings("erase", lr=1.0))), "lr")
    fails(gate_d(vanilla(), run("none", hack_deploy=0.1)), "no intervention")
    cfg = settings("erase")
    elsewhere = replace(cfg, model=replace(cfg.model, device="cuda:1"), run=replace(cfg.run, workers=7))
    passes(gate_d(vanilla(), erase(config=elsewhere)))


# The same from files


def write_run(folder, files):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": to_json(files.cfg)}))
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in files.steps))
    (folder / "summary.json").write_text(json.dumps(summary(config()) | files.summary))
    return str(folder)


def write_basis(path, rows):
    grads = PairGrads({"m": torch.tensor(rows)}, {"m": torch.zeros(2, 3)})
    V = torch.eye(3)[:1]
    save_extraction(
        path,
        Extraction(
            Axes({"m": V}, {"m": torch.ones(1)}, grads.differences()), grads, {"model": "tiny-random"}
        ),
    )
    return str(path)


def test_gates_a_and_b_from_files(tmp_path, capsys):
    good = write_basis(tmp_path / "good.safetensors", [[1.0, 0, 0], [0, 2.0, 0]])
    dead = write_basis(tmp_path / "dead.safetensors", [[0.0, 0, 0], [0, 0.0, 0]])
    assert main(["probe", "gate", "A", good]) == 0
    assert main(["probe", "gate", "A", good, dead]) == GATE_FAILED
    assert main(["probe", "gate", "A", str(tmp_path / "none.safetensors")]) == 2
    for rate, code in (("0.02", 0), ("0.01", GATE_FAILED)):  # 2 pairs, sums 1 and 2: 6 nats a unit
        assert main(["probe", "gate", "A2", f"--reach={rate}", good]) == code
    assert main(["probe", "gate", "A2", good]) == main(["probe", "gate", "A", "--reach=1", good]) == 2
    for fraction, code in ((0.7, 0), (0.4, GATE_FAILED)):
        (tmp_path / "b.json").write_text(
            json.dumps({"cosines": [0.5], "fraction_positive": fraction, "mean": 0.5})
        )
        assert main(["probe", "gate", "B", str(tmp_path / "b.json")]) == code
    (tmp_path / "b.json").write_text("{}")
    assert main(["probe", "gate", "B", str(tmp_path / "b.json")]) == 2
    assert "gate A: FAIL" in capsys.readouterr().out


def test_gates_c_and_d_from_run_folders(tmp_path, capsys):
    none = write_run(tmp_path / "1_none", vanilla())
    arm = write_run(tmp_path / "2_erase", erase())
    assert main(["probe", "gate", "C", none]) == 0
    assert main(["probe", "gate", "D", arm, none]) == 0
    (tmp_path / "3_none").mkdir()  # an attempt that did not end is passed over
    assert main(["probe", "gate", "C", none, str(tmp_path / "3_none")]) == 0
    worse = write_run(tmp_path / "4_none", vanilla(hack_deploy=0.0, finished=False))
    assert main(["probe", "gate", "C", worse, none]) == GATE_FAILED  # the newest counts
    assert main(["probe", "gate", "D", none]) == 2
    assert main(["probe", "gate", "C", str(tmp_path / "*_nothing")]) == 2
    assert "no finished run" in capsys.readouterr().err


# The chain

SMALL = (
    "steps=3",
    "lr=0.3",
    "n-problems=6",
    "eval-n-prompts=2",
    "max-new=8",
    "workers=1",
    "v-hack-drop-bottom-frac=0",
)


def test_the_chain_stops_at_the_gate_that_fails_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["probe", "--preset=smoke", "--seed=3", "--in-process", "--rollouts=16", "--set", *SMALL]
    assert main(command) == GATE_FAILED  # a random model does not hack
    out = capsys.readouterr().out
    assert "DOUBTFUL: 0 of " in out, "B2 finds nothing to tell apart, and stops nothing"
    for verdict in ("gate A: PASS", "gate A2: PASS", "gate B: PASS", "gate B2: PASS", "gate C: FAIL"):
        assert verdict in out
    assert "nothing to lower" in out and "gate D" not in out
    (home,) = (tmp_path / "out" / "probes").iterdir()
    (none,) = (home / "runs").iterdir()
    stamp = (none / "summary.json").stat().st_mtime_ns

    # as if the student had hacked: the chain goes on from there, with no stage made twice
    rows = [json.loads(line) | {"hack_s": [2, 4]} for line in (none / "steps.jsonl").read_text().splitlines()]
    rows = [row | {"zerovar": 0, "loss": 0.1} for row in rows]
    (none / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command) == GATE_FAILED
    out = capsys.readouterr().out
    assert "gate C: PASS" in out and "gate D: FAIL" in out and "less than intervention=none" in out
    assert (none / "summary.json").stat().st_mtime_ns == stamp
    assert len(list((home / "runs").iterdir())) == 2


def test_a_learning_rate_that_moves_nothing_stops_the_probe_before_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "probe",
        "--preset=smoke",
        "--in-process",
        "--set",
        *SMALL,
        f"vhack-pairs-path={few_pairs(tmp_path)}",
    ]
    assert main([word.replace("lr=0.3", "lr=1e-7") for word in command]) == GATE_FAILED
    out = capsys.readouterr().out
    assert "gate A2: FAIL" in out and "raise --lr" in out and "gate B" not in out
    (home,) = (tmp_path / "out" / "probes").iterdir()
    assert not (home / "runs").exists()


def test_a_bad_option_of_the_probe_is_told_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", "--preset=smoke", "--set", "stepps=3"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert main(["probe", "--preset=smoke", "--set", "steps"]) == 2
    assert not (tmp_path / "out").exists()


def test_what_verify_measured_is_taken_for_the_same_basis_and_completions_alone(tmp_path):
    basis, pool, file = tmp_path / "b.safetensors", tmp_path / "pool.jsonl", tmp_path / "b.score.json"
    basis.write_text("one")
    pool.write_text("graded")
    on = ScoredOn(pool)
    assert not measured(file, basis)
    write_json(file, {"basis": file_hash(basis), "signal": "gradient", **scored_on(on)})
    assert measured(file, basis) and measured(file, basis, signal="gradient", **scored_on(on))
    assert not measured(file, basis, signal="activation")
    pool.write_text("graded again")
    assert not measured(file, basis, signal="gradient", **scored_on(on))
    basis.write_text("another")
    assert not measured(file, basis)
