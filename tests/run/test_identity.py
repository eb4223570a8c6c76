"""Which runs are the same, and that names tell apart what ids tell apart."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo.arm_settings import arm_settings
from projected_grpo.config import PRESETS, from_json, to_json
from projected_grpo.errors import UserError
from projected_grpo.options.train import parse
from projected_grpo.run import identity as identity_module
from projected_grpo.run.identity import (
    PLACE,
    chosen,
    differing,
    folder_stem,
    identity,
    reference_name,
    run_id,
    run_name,
    settings,
)

NANO = PRESETS["nano"][1]
OTHERS = (
    "--seed=42",
    "--lr=0.03",
    "--control=haar",
    "--intervention=route2",
    "--env-mode=sentinel",
    "--steps=7",
    "--v-hack-k=3",
    "--vhack-pairs-path=nano-sampled",
    "--vhack-pairs-path=elsewhere/nano-sampled",
    "--vhack-pairs-path=elsewhere-nano-sampled",
    "--init-adapter=a.safetensors",
)


def test_place_decides_nothing():
    elsewhere = replace(
        NANO,
        run=replace(NANO.run, workers=7, threads=3, out_dir=Path("else"), save_every=3, out_tag="_x"),
        model=replace(NANO.model, device="cuda:1", svd_cache=None),
    )
    assert identity(elsewhere) == identity(NANO) and re.fullmatch("[0-9a-f]{10}", identity(NANO))
    assert run_name(elsewhere) == run_name(NANO) and settings(elsewhere) == settings(NANO)
    assert {f.name for f in fields(NANO.run)} - PLACE == {"seed", "cpu_seconds", "wall_seconds"}


def test_every_other_option_makes_another_run_with_another_name():
    runs = [NANO, replace(NANO, preset="fast"), *(parse(["nano", option]) for option in OTHERS)]
    assert len({identity(cfg) for cfg in runs}) == len({folder_stem(cfg) for cfg in runs}) == len(runs)


def test_an_option_that_is_new_changes_no_id_at_its_default(monkeypatch):
    runs = [NANO, *(parse(["nano", option]) for option in OTHERS)]
    before = [identity(cfg) for cfg in runs]

    def with_a_new_option(cfg):
        return settings(cfg) | {"loss": settings(cfg)["loss"] | {"invented_later": 0.5}}

    monkeypatch.setattr(identity_module, "settings", with_a_new_option)
    assert [identity(cfg) for cfg in runs] == before


def test_an_option_that_is_gone_changes_no_id_at_the_value_it_is_fixed_at():
    older = to_json(NANO)
    older["loss"]["ratio_cap"] = 3.0
    del older["loss"]["clip"]  # one that came later
    assert identity(from_json(older, older=True)) == identity(NANO)
    older["loss"]["ratio_cap"] = 2.0
    with pytest.raises(UserError, match="ratio_cap"):
        from_json(older, older=True)


def test_renamed_options_and_values_of_older_runs_are_read():
    older = to_json(NANO)
    del older["optim"]["init_adapter"]
    older["optim"]["init_knobs"] = "a.safetensors"
    older["arm"] = {"intervention": "route2", "control": "random_parking"}
    read = from_json(older, older=True)
    assert str(read.optim.init_adapter) == "a.safetensors" and read.arm.control == "random_routing"


def test_an_older_run_of_route2_is_another_than_one_of_today():
    """Its clean anchors were the labelled ones, as no option said."""
    today, other = parse(["nano", "--intervention=route2"]), parse(["nano", "--intervention=route"])
    older = to_json(today)
    for name in ("gate_clean_anchors", "gate_signal", "advmod_depth"):
        del older["arm"][name]
    read = from_json(older, older=True)
    assert read == parse(["nano", "--intervention=route2", "--gate-clean-anchors=labelled"])
    assert len({identity(read), identity(today), identity(replace(today, arm=other.arm))}) == 3
    assert "gate_clean_anchors" in chosen(today) and "gate_clean_anchors" not in chosen(other)


def test_what_differs_is_named_with_both_values():
    cfg = parse(["nano", "--v-hack-k=3"])
    assert differing(chosen(cfg), chosen(cfg)) == []
    (said,) = differing(chosen(cfg), chosen(NANO))
    assert said.startswith("v_hack_k (3 ") and "default" in said


@pytest.mark.parametrize(
    ("options", "name", "reference"),
    [
        (["--intervention=none"], "none", "vanilla"),
        (["--control=haar"], "erase+haar", "projected-haar"),
        (["--intervention=route"], "route", "routing"),
        (["--intervention=route2", "--seed=9"], "route2", "routing2"),
        (["--control=haar", "--v-hack-k=12"], "erase+haar k=12", "projected-haar"),
        (["--steps=9", "--project=update"], "erase project=update steps=9", "projected"),
    ],
)
def test_a_name_is_the_arm_and_what_differs_from_the_preset(options, name, reference):
    cfg = parse(["nano", *options])
    assert (run_name(cfg), reference_name(cfg)) == (name, reference)


@given(st.text(min_size=1), st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
def test_the_name_of_a_folder_fits_into_one(prompt, tag):
    cfg = replace(NANO, arm=arm_settings("inoculation", inoculation_prompt=prompt))
    stem = folder_stem(cfg)
    assert re.fullmatch(r"nano_[\w.+=-]{1,80}_seed41", stem, re.ASCII)
    other = replace(cfg, arm=replace(cfg.arm, inoculation_prompt=prompt + tag))
    assert folder_stem(other) != stem


def test_run_ids_sort_by_time():
    cfg = replace(NANO, run=replace(NANO.run, out_tag="_x"))
    first, second = run_id(cfg), run_id(cfg)
    assert re.fullmatch(r"\d{8}T\d{6}_nano_erase_seed41_x", first) and first <= second
