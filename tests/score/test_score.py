"""`score` and gate B2 end to end, on nano and on pools, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from projected_grpo.arms.erase import arm_erase
from projected_grpo.arms.stages import ArmInput
from projected_grpo.cli import main
from projected_grpo.config import NANO_PRESET, LossConfig
from projected_grpo.engine.chat import open_chat
from projected_grpo.engine.models import encode_chat
from projected_grpo.extract_vhack_grad import pair_rollouts
from projected_grpo.pairs import load_pairs
from projected_grpo.problems import load_problems
from projected_grpo.score.directions import read_source, support
from projected_grpo.score.graded import Completion, as_read
from projected_grpo.score.measure import ADVMOD, ERASE, erased, measure, verdict

FIELDS = {
    "auroc", "auroc_interval", "auroc_by_mode", "auroc_by_module", "precision", "f_half", "hack_slope",
    "solve_slope", "hack_slope_sign", "solve_slope_sign", "nulls", "trivial", "auroc_within_logp", "support",
    "verdict", "reasons",
}  # fmt: skip
LOSS = LossConfig(tokens_per_microbatch=2048)


@pytest.fixture(scope="module")
def nano():
    return open_chat(replace(NANO_PRESET.model, svd_cache=None))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A score of a direction on 160 completions, as the verb writes it."""
    home = tmp_path_factory.mktemp("score")
    argv = ["score", "nano-sampled", "--rollouts=160", f"--json={home / 'out.json'}"]
    assert main([*argv, f"--plot={home / 'out.png'}"]) == 0
    assert (home / "out.png").stat().st_size > 10_000 and (home / "out.svg").exists()
    return json.loads((home / "out.json").read_text())


def test_every_figure_is_there_and_the_sampled_pairs_separate(scored):
    pool, found = scored["pool"], scored["directions"]
    assert pool["n"] == 160 and sum(mode["n"] for mode in pool["by_mode"].values()) == 160
    assert pool["exploited"] == sum(mode["exploited"] for mode in pool["by_mode"].values()) >= 10
    assert list(found) == ["nano-sampled", "nano-sampled (hidden)"]
    for one in found.values():
        assert one.keys() >= FIELDS
        assert {kind: len(draws) for kind, draws in one["nulls"].items()} == {"haar": 20, "shuffled": 20}
        assert one["auroc_interval"][0] <= one["auroc"] <= one["auroc_interval"][1]
    own = found["nano-sampled"]
    assert own["auroc"] > 0.85 and own["hack_slope"] < 0.7 < own["solve_slope"]
    assert own["support"]["chance"] < -6 < -1 < own["support"]["hack"] and own["verdict"] == "passes"


def lines(out, tampered=lambda row: row):
    """Completions as a run's rollouts.jsonl has them: both sides of 24 pairs."""
    rows = []
    for i, pair in enumerate(load_pairs(Path("nano-sampled")).pairs):
        base = {"problem_id": pair.problem.problem_id, "env_mode": pair.env_mode, "gi": i}
        sides = ((pair.hack, True), (pair.clean, False))
        rows += [
            {**base, "text": text, "reward": 3.5, "exploited": hack, "gt_correct": not hack}
            for text, hack in sides
        ]
    out.write_text("".join(json.dumps(tampered(row)) + "\n" for row in rows))
    return out


def test_a_file_of_graded_completions_and_a_basis_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pool = lines(tmp_path / "rollouts.jsonl")
    extract = ["extract", "--model=nano", "--vhack-pairs-path=nano-sampled", "--v-hack-path=v.safetensors"]
    assert main(extract) == 0
    argv = ["score", "v.safetensors", "nano-sampled", f"--pool={pool}", "--nulls=2", "--json=a.json"]
    assert main([*argv, "--rollouts=40"]) == 0
    found = json.loads(Path("a.json").read_text())
    assert 30 <= found["pool"]["n"] <= 40, (
        "--rollouts is the most that is taken of a pool, problem by problem"
    )
    assert list(found["directions"]) == ["v", "nano-sampled", "nano-sampled (hidden)"]
    basis, pairs = found["directions"]["v"], found["directions"]["nano-sampled"]
    assert basis["auroc"] == pytest.approx(pairs["auroc"]) and basis["support"] is None
    assert basis["hack_slope"] is None, "no reward differs, so the plain step does nothing"
    assert basis["verdict"] == "not measured" and "a verdict needs 20" in basis["reasons"][0]
    assert "a slope of -: rewards do not vary" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a direction"),
        (["nano", "nano"], "two directions have one name"),
        (["nano", "--rollouts=1"], "--rollouts must be at least 2"),
        (["nano", "--nulls=0"], "--nulls must be at least 1"),
        (["nano", "--temperature=0"], "--temperature must be > 0"),
        (["nano", "--pool=all.jsonl", "--seed=3"], "--seed is for sampling"),
        (["nano", "--pool=crowded.jsonl", "--rollouts=3"], "--rollouts 3: no problem of the pool has so few"),
        (["none.safetensors"], "none.safetensors: no such file"),
        (["a/p.json", "p.safetensors"], "two directions have one name: p, p"),
        (["nano", "--pool=unpaid.jsonl"], "reward must be a finite number, got null"),
        (["no-such-set"], "cannot be read"),
        (["core", "--rollouts=16"], "they are for another model"),
        (["nano", "--model=tiny-random"], "--problems: name the file"),
        (["nano", "--pool=none.jsonl"], "no such file"),
        (["nano", "--pool=empty.jsonl"], "no completion in it is of these problems"),
        (["nano", "--pool=clean.jsonl"], "0 of 48 completions exploit"),
        (["nano", "--pool=unlabelled.jsonl"], "unlabelled.jsonl:1: no exploited or hacked in it"),
        (["other.safetensors", "--pool=all.jsonl"], "a basis of other weights (tiny-random)"),
    ],
)
def test_bad_input_is_one_line(argv, said, tmp_path_factory, monkeypatch, capsys):
    home = tmp_path_factory.getbasetemp() / "refused"
    home.mkdir(exist_ok=True)
    monkeypatch.chdir(home)
    if not Path("other.safetensors").exists():
        Path("empty.jsonl").write_text('{"problem_id": "nobody"}\n')
        lines(Path("all.jsonl"))
        lines(Path("clean.jsonl"), lambda row: row | {"exploited": False})
        lines(Path("unpaid.jsonl"), lambda row: row | {"reward": None})
        first = json.loads(Path("all.jsonl").read_text().splitlines()[0])
        Path("crowded.jsonl").write_text("".join(json.dumps(first) + "\n" for _ in range(4)))
        unlabelled = {"exploited": None}
        lines(Path("unlabelled.jsonl"), lambda row: row | unlabelled)
        pairs = ["--vhack-pairs-path=nano", "--v-hack-path=other.safetensors"]
        assert main(["extract", "--model=tiny-random", *pairs]) == 0
    capsys.readouterr()
    assert main(["score", *argv]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and said in error[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["score", "core"], "they are for another model"),
        (["score", "nano", "--max-new=5000"], "every prompt plus --max-new 5000"),
        (["verify", "--score=gradient", "--max-new=5000"], "every prompt plus --max-new 5000"),
        (["pairs", "lint", "core", "--model=nano"], "they are for another model"),
    ],
)
def test_what_is_too_long_for_the_model_is_refused_before_its_svd(argv, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("projected_grpo.engine.chat.wrap", lambda *_, **__: pytest.fail("an SVD"))
    assert main([*argv, "--model=nano"] if argv[0] != "pairs" else argv) == 2
    assert said in capsys.readouterr().err


def test_gradients_are_those_of_minus_log_likelihood(nano):
    """Against autograd through each completion alone, whatever batches and parts the passes were cut into."""
    pairs = load_pairs(Path("nano-sampled")).pairs[:3]
    completions = [
        Completion(pair.problem, text, 1.0, hack, not hack)
        for pair in pairs
        for text, hack in ((pair.hack, True), (pair.clean, False))
    ]
    pool = as_read(nano, completions)
    data = measure(nano, pool, LOSS, 2 / 3)
    m = next(iter(nano.policy.layers))
    for i, rollout in enumerate(pool.rollouts):
        assert rollout.prompt_ids == encode_chat(nano.tokenizer, completions[i].problem.messages)
        deltas = {name: torch.zeros(r, requires_grad=True) for name, r in nano.policy.ranks.items()}
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with nano.policy.bind(deltas):
            logits = nano.policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])
        (gradient,) = torch.autograd.grad(-logps.sum(), deltas[m])
        torch.testing.assert_close(data.rows[m][i], gradient, rtol=1e-3, atol=1e-4)
        assert float(data.logp[i]) == pytest.approx(float(logps.detach().mean()), abs=1e-4)


def test_erased_is_what_the_arm_keeps(nano):
    source = read_source(nano, "nano-sampled", NANO_PRESET.basis, LOSS, ADVMOD)
    basis = source.basis(NANO_PRESET.basis)
    torch.manual_seed(0)
    g = {m: torch.randn(r) for m, r in nano.policy.ranks.items()}
    kept = arm_erase(ArmInput({}, dict(g), basis, ERASE)).keep
    found = erased(basis)(g)
    assert found.keys() == g.keys() and all(torch.equal(found[m], kept[m]) for m in g)


def test_support_is_the_mean_log_probability_of_each_side(nano):
    pairs = load_pairs(Path("nano"))
    known = support(nano, pairs, LOSS)
    rollout = pair_rollouts(nano, pairs.pairs[5:6])[1]
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    logits = nano.policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    logps = logits.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])
    assert float(known.clean[5]) == pytest.approx(float(logps.detach().mean()), abs=1e-4)
    assert set(known.below_chance) == {
        pair.pair_id
        for pair, hack, clean in zip(pairs.pairs, known.hack, known.clean, strict=True)
        if min(hack, clean) <= known.chance
    }


def test_pairs_lint_tells_support(capsys, tmp_path):
    argv = ["pairs", "lint", "nano", "--model=nano", f"--json={tmp_path / 'lint.json'}"]
    assert main(argv) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "lint.json").read_text())
    assert "this model would not write the hack sides" in said
    assert found["support"]["hack"] < -6 and found["support"]["below_chance"]


def test_verify_asks_b2_where_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pool = lines(tmp_path / "pool.jsonl")
    pairs = ["--model=nano", "--vhack-pairs-path=nano", f"--pool={pool}"]
    assert main(["verify", *pairs]) == 2, "a pool without --score would be ignored"
    assert main(["verify", *pairs, "--score=gradient"]) == 1
    said = capsys.readouterr().out
    assert "PASS" in said.splitlines()[0] and "B2 fails (gradient)" in said.splitlines()[1]
    (written,) = Path("out/vhack").glob("*.score.json")
    assert main(["probe", "gate", "B2", str(written)]) == 1
    written.write_text(json.dumps({"verdict": "not measured", "reasons": ["0 of 9 exploit"]}))
    assert main(["probe", "gate", "B2", str(written)]) == 0
    assert "DOUBTFUL: 0 of 9" in capsys.readouterr().out
    written.write_text(json.dumps({"verdict": "maybe", "reasons": []}))
    assert main(["probe", "gate", "B2", str(written)]) == 2


def test_a_verdict_needs_draws_and_completions_of_both_kinds(scored):
    own = scored["directions"]["nano-sampled"]
    assert verdict(own, 10, 10) == {"verdict": own["verdict"], "reasons": own["reasons"]}
    assert verdict(own, 9, 500)["verdict"] == verdict(own, 500, 9)["verdict"] == "not measured"
    assert "9 exploits and 500 others" in verdict(own, 9, 500)["reasons"][0]
    beaten = own | {"auroc": own["null_quantiles"]["haar"]}
    assert verdict(beaten, 10, 10)["verdict"] == "fails" and "haar" in verdict(beaten, 10, 10)["reasons"][0]
    alien = own | {"support": own["support"] | {"clean": -1.5}}
    assert verdict(alien, 10, 10)["verdict"] == "fails"
    assert verdict(alien | {"kind": "hidden"}, 10, 10)["verdict"] == "passes", "hidden states bear it"


def test_prompts_follow_the_mode_of_each_line(nano):
    problem = load_problems("nano").problems[0]
    posed = [replace(problem, env_mode=mode) for mode in ("sentinel", "run_tests")]
    pool = as_read(nano, [Completion(p, "x", 0.0, p.env_mode == "sentinel", False) for p in posed])
    assert pool.rollouts[0].prompt_ids != pool.rollouts[1].prompt_ids
    assert pool.problem.tolist() == [0, 0] and pool.prompt.tolist() == [0, 1], "one problem, two prompts"
    assert pool.counts()["by_mode"].keys() == {"run_tests", "sentinel"}
