"""What is kept of runs: written once, of the run and the data it names, and never over another's."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_runs import made, summary
from projected_grpo.config import from_json
from projected_grpo.errors import UserError
from projected_grpo.options.train import parse
from projected_grpo.pairs import packaged_pairs
from projected_grpo.results.runs import read_runs
from projected_grpo.run.identity import identity, settings
from projected_grpo.sweep.jobs import Job, make, states
from projected_grpo.sweep.keep import LATER, kept_data, rounded

ARGV = ("smoke", "--intervention=route2", "--seed=41")


@pytest.fixture
def job(tmp_path):
    """A run that is kept, and its folder as it ended."""
    cfg = parse(ARGV)
    kept = tmp_path / "kept" / "route2_seed41.json"
    one = Job(
        id=identity(cfg), name="route2 seed=41", argv=ARGV, steps=30, home=str(tmp_path / "home"),
        cwd=str(tmp_path), retries=0, max_failures=0, submitted=0.0, record=str(kept), data=kept_data(cfg),
    )  # fmt: skip
    one.file("").parent.mkdir(parents=True)
    made(tmp_path / "home" / "runs", f"20260101T000000_smoke_route2_seed41_{one.id}", seconds=12.345678)
    return one


def never(*_):
    raise AssertionError("a run was started")


def test_a_run_that_ended_is_kept_and_the_record_alone_is_enough(job):
    assert states([job])[0].state != "finished"  # its record is missing
    assert make(job, never).kind == "done"
    kept = Path(job.record)
    record = json.loads(kept.read_text())
    assert (record["arm"], record["seed"], record["wall_s"]) == ("route2", 41, 12.35)
    assert record["command"] == "projected-grpo train smoke --intervention=route2 --seed=41"
    (folder,), before = job.folders(), kept.read_bytes()
    (one,), (two,) = read_runs([folder]), read_runs([kept])
    assert one.setting == two.setting and one.rate("hack_s") == two.rate("hack_s")
    assert str(Path.home()) not in kept.read_text() and "out_dir" not in kept.read_text()
    (folder / "summary.json").unlink()
    assert states([job])[0].state == "finished" and make(job, never).kind == "done"
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("group", "option", "value", "said"),
    [
        ("optim", "lr", 0.5, "lr (0.5 there, "),
        ("run", "seed", 7, "seed (7 there, "),
        ("loss", "abolished", 1, "abolished"),
        ("arm", "gate_clean_anchors", ..., "gate_clean_anchors (labelled there, rest here)"),
    ],
)
def test_a_record_of_another_run_is_refused_and_stays(job, group, option, value, said):
    make(job, never)
    kept = Path(job.record)
    record = json.loads(kept.read_text())
    record["config"][group][option] = value
    if value is ...:  # of before the option was there
        del record["config"][group][option]
    kept.write_text(json.dumps(record))
    before = kept.read_bytes()
    with pytest.raises(UserError) as refused:
        states([job])
    assert said in str(refused.value) and kept.read_bytes() == before


def test_a_record_of_other_data_is_refused(job):
    make(job, never)
    with pytest.raises(UserError, match="of another run: the packaged data or the pairs"):
        replace(job, data="x").kept()


def test_a_record_from_before_an_option_counts_as_made_with_its_default(job):
    make(job, never)
    kept = Path(job.record)
    record = json.loads(kept.read_text())
    del record["config"]["loss"]["clip"], record["config"]["evaluation"]
    kept.write_text(json.dumps(record))
    assert job.kept() == record
    del record["config"]["optim"]["lr"]  # the preset's is not the default
    kept.write_text(json.dumps(record))
    with pytest.raises(UserError, match="lr "):
        job.kept()


def test_a_record_from_before_kl_and_gradient_norm_were_kept_counts(job):
    make(job, never)
    kept = Path(job.record)
    record = json.loads(kept.read_text())
    assert record["steps"]["kl"] == [0.5] * 30 and LATER == ("kl", "gn")
    for name in LATER:
        del record["steps"][name]
    kept.write_text(json.dumps(record))
    assert job.kept() == record and states([job])[0].state == "finished"


def test_what_is_kept_of_settings_is_enough_to_tell_the_run():
    cfg = parse(ARGV)
    assert identity(from_json(json.loads(json.dumps(settings(cfg))), older=True)) == identity(cfg)
    assert summary(cfg)["name"] == "route2"


def test_pairs_that_lie_elsewhere_count_as_data_of_the_run(tmp_path, monkeypatch):
    def digest(*options):
        return kept_data(parse(["nano", *options]))

    path = tmp_path / "pairs.json"
    path.write_bytes(packaged_pairs("nano-sampled"))
    assert digest() == digest("--vhack-pairs-path=nano-oracle") != digest("--vhack-pairs-path=nano-sampled")
    before = digest(f"--vhack-pairs-path={path}")
    assert before == digest("--vhack-pairs-path=nano-sampled")
    path.write_bytes(path.read_bytes() + b" ")
    assert digest(f"--vhack-pairs-path={path}") != before
    with pytest.raises(UserError, match="no-such"):
        digest("--vhack-pairs-path=no-such.json")


@given(
    st.recursive(
        st.floats() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_rounding_keeps_four_digits_and_makes_plain_json(value):
    text = json.dumps(rounded(value), allow_nan=False)
    again = rounded(json.loads(text))
    assert again == json.loads(text)
    if isinstance(value, float) and math.isfinite(value) and 1e-300 < abs(value) < 1e300:
        assert math.isclose(rounded(value), value, rel_tol=1e-3)
