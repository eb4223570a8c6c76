"""Settings: what is refused, what survives JSON, and the two tables of the documentation."""

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arm_lists import CONTROLS_OF, INTERVENTIONS, SIGNALS
from projected_grpo.arm_settings import SETTINGS, arm_settings
from projected_grpo.checks import validate
from projected_grpo.config import (
    PRESETS,
    REMOVED,
    TrainConfig,
    env_modes,
    from_json,
    teacher_rows,
    to_json,
)
from projected_grpo.errors import UserError
from projected_grpo.options.train import USUAL, descriptions, parse

MOST_OPTIONS = 67  # of `train full --help`; there were 87
SMOKE, FAST, FULL = (PRESETS[name][1] for name in ("smoke", "fast", "full"))


def changed(cfg: TrainConfig, **values: object) -> TrainConfig:
    """A config with some options changed, whichever groups they are in."""
    if "intervention" in values:
        cfg = replace(cfg, arm=arm_settings(str(values["intervention"])))
    for group in dataclasses.fields(cfg):
        part = getattr(cfg, group.name)
        if dataclasses.is_dataclass(part):
            own = {f.name for f in dataclasses.fields(part)} & set(values)
            cfg = replace(cfg, **{group.name: replace(part, **{name: values.pop(name) for name in own})})
    assert not values
    return cfg


def flat(cfg: TrainConfig) -> dict[str, object]:
    groups = [getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "preset"]
    return {f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    assert PRESETS[preset][1].preset == preset
    validate(PRESETS[preset][1])


# design.md section 9; of nano see below.
TABLE = {
    "model": ("tiny-random", "Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
    "steps": (30, 60, 200),
    "group": (4, 8, 6),
    "prompts_per_step": (1, 4, 43),
    "max_new": (32, 512, 1024),
    "n_problems": (100, 200, 992),
    "lr": (7e-5, 3e-3, 3e-3),
    "adam_beta1": (0.9, 0.5, 0.9),
    "adam_beta2": (0.99, 0.9, 0.99),
    "beta": (0, 0, 1e-3),
    "mix_ratio": (0.5, 0.125, 0),
}
# protocol.md's option table and design.md's line of what all presets have in common.
COMMON = {
    "intervention": "erase",
    "clip": 0.2,
    "weight_decay": 0.1,
    "warmup_frac": 0.1,
    "grad_clip": 10,
    "seed": 41,
    "preserve_magnitude": True,
    "gate_mode": "one_sided",
    "project_overshoot": 1.0,
    "unbiased": True,
    "v_hack_path": None,
    "v_hack_extract_top_k": 12,
    "v_hack_k": 5,
    "v_hack_tau_axis": 0,
    "v_hack_drop_bottom_frac": 0.25,
    "vhack_refresh_every": 5,
    "vhack_pairs_path": None,
    "eval_ablate_every": 5,
    "eval_n_prompts": 8,
    "save_eval_ckpts": True,
    "vhack_pairs_modes": (),
    "final_n_prompts": 0,
    "control": "none",
    "project": "gradient",
    "cos_pre_split_every": 1,
    "teacher_pool_dir": None,
    "teacher_off_step": None,
    "teacher_modes": (),
    "half_a": (),
    "out_tag": "",
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 20,
    "out_dir": Path("out"),
}


@pytest.mark.parametrize("option", TABLE)
def test_presets_match_the_table(option):
    assert tuple(flat(cfg)[option] for cfg in (SMOKE, FAST, FULL)) == TABLE[option]


@pytest.mark.parametrize("option", COMMON)
def test_defaults_match_the_protocol(option):
    for cfg in (SMOKE, FAST, FULL):
        assert flat(cfg)[option] == COMMON[option]


def test_the_rest_of_the_protocols_defaults():
    assert flat(FAST)["env_mode"] == flat(FULL)["env_mode"] == "run_tests"
    assert flat(TrainConfig("x"))["mix_ratio"] == 0.125
    assert flat(SMOKE)["problems"] == "embedded"
    assert flat(changed(FULL, intervention="route2"))["gate_anchor_teacher_only"] is False
    assert flat(FULL)["problems"].startswith("external/rl-rewardhacking/results/data/")


def test_options_have_one_flat_name_each():
    names = [
        f.name for g in dataclasses.fields(SMOKE) if g.name != "preset" for f in dataclasses.fields(g.type)
    ]
    assert len(names) == len(set(names))


REFUSED = [
    ("--steps", {"steps": 0}),
    ("--prompts-per-step", {"prompts_per_step": 0}),
    ("--max-new", {"max_new": 0}),
    ("--max-new", {"max_new": 2048}),
    ("--n-problems", {"n_problems": 0}),
    ("--v-hack-k", {"v_hack_k": 0}),
    ("--v-hack-extract-top-k", {"v_hack_extract_top_k": -1}),
    ("--eval-n-prompts", {"eval_n_prompts": 0}),
    ("--tokens-per-microbatch", {"tokens_per_microbatch": 0}),
    ("--lr", {"lr": -1.0}),
    ("--beta", {"beta": -1e-9}),
    ("--clip", {"clip": -0.1}),
    ("--clip", {"clip": 2.1}),
    ("--rollout-ablate-frac", {"intervention": "route", "rollout_ablate_frac": 0.5, "sampler": "vllm"}),
    ("--weight-decay", {"weight_decay": -0.1}),
    ("--project-overshoot", {"project_overshoot": -1.0}),
    ("--vhack-refresh-every", {"vhack_refresh_every": -1}),
    ("--eval-ablate-every", {"eval_ablate_every": -1}),
    ("--cos-pre-split-every", {"cos_pre_split_every": -1}),
    ("--teacher-off-step", {"teacher_off_step": -1}),
    ("--save-every", {"save_every": -1}),
    ("--top-k", {"top_k": -1}),
    ("--workers", {"workers": -1}),
    ("--group", {"group": 1}),
    ("--mix-ratio", {"mix_ratio": 1.0}),
    ("--mix-ratio", {"mix_ratio": -0.1}),
    ("--mix-ratio", {"mix_ratio": 0.9, "group": 4}),  # round(3.6) = 4: nobody left
    ("--temperature", {"temperature": 0.0}),
    ("--top-p", {"top_p": 0.0}),
    ("--top-p", {"top_p": 1.5}),
    ("--rollout-ablate-frac", {"intervention": "absorb", "rollout_ablate_frac": 1.5}),
    ("--v-hack-drop-bottom-frac", {"v_hack_drop_bottom_frac": 1.0}),
    ("--v-hack-tau-axis", {"v_hack_tau_axis": -0.1}),
    ("--adam-beta1", {"adam_beta1": 1.0}),
    ("--adam-beta2", {"adam_beta2": -0.1}),
    ("--warmup-frac", {"warmup_frac": 1.1}),
    ("--grad-clip", {"grad_clip": 0.0}),
    ("--cpu-seconds", {"cpu_seconds": 0}),
    ("--wall-seconds 10 ends a program before its --cpu-seconds 11", {"cpu_seconds": 11}),
    ("--wall-seconds", {"wall_seconds": math.inf}),
    ("--final-n-prompts", {"final_n_prompts": -1}),
    ("--control", {"intervention": "route", "control": "haar_matched", "project": "update"}),
    ("--control", {"intervention": "route", "control": "shrink", "project": "update"}),
    ("--control", {"intervention": "erase", "control": "haar_matched", "project": "purge"}),
    ("--advmod-depth", {"intervention": "advmod", "advmod_depth": 0.0}),
    ("--advmod-depth", {"intervention": "advmod", "advmod_depth": 1.01}),
    ("--advmod-alpha", {"intervention": "advmod", "advmod_alpha": -1.0}),
    ("--advmod-buffer", {"intervention": "advmod", "advmod_buffer": -1}),
    ("--advmod-depth", {"intervention": "advmod", "advmod_signal": "gradient", "advmod_depth": 0.5}),
    ("--advmod-alpha", {"intervention": "advmod", "advmod_form": "screening", "advmod_alpha": 1.0}),
    ("--advmod-depth", {"intervention": "route2", "advmod_depth": 0.5}),
    (
        "--gate-clean-anchors",
        {"intervention": "route2", "gate_signal": "oracle", "gate_clean_anchors": "labelled"},
    ),
    (
        "--gate-anchor-teacher-only",
        {"intervention": "route2", "gate_signal": "oracle", "gate_anchor_teacher_only": True},
    ),
    ("--penalty", {"intervention": "gt_penalty", "penalty": -1.0}),
    ("--monitor-accuracy", {"intervention": "gt_screening", "monitor_accuracy": 1.1}),
    ("--inoculation-prompt", {"intervention": "inoculation", "inoculation_prompt": " \n"}),
    ("--env-mode", {"env_mode": "run_test"}),
    ("--env-mode", {"env_mode": "run_tests,"}),
    ("--env-mode", {"env_mode": ""}),
]


@pytest.mark.parametrize(("option", "values"), REFUSED, ids=lambda v: str(v))
def test_refusals_name_their_option(option, values):
    with pytest.raises(UserError, match=f"{option}\\b") as caught:
        validate(changed(SMOKE, **values))
    assert "\n" not in str(caught.value)


def test_teacher_modes_without_a_pool_are_refused_where_none_is_baked():
    with pytest.raises(UserError, match="--teacher-modes"):
        validate(changed(FAST, teacher_modes=("run_tests",)))
    validate(changed(SMOKE, teacher_modes=("run_tests",)))


FLOATS = [name for name, value in flat(SMOKE).items() if isinstance(value, float)]


@pytest.mark.parametrize("option", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(option, value):
    with pytest.raises(UserError, match="--" + option.replace("_", "-")):
        validate(changed(SMOKE, **{option: value}))


EDGES = [
    {"steps": 1, "group": 2, "mix_ratio": 0.5},
    {"mix_ratio": 0.0},
    {"top_k": 0, "top_p": 1.0},
    {
        "eval_ablate_every": 0,
        "vhack_refresh_every": 0,
        "save_every": 0,
        "ref_every": 0,
        "cos_pre_split_every": 0,
    },
    {"intervention": "route2", "rollout_ablate_frac": 1.0},
    {"v_hack_drop_bottom_frac": 0.0, "v_hack_tau_axis": 1.0},
    {"clip": 2.0, "lr": 0.0, "project_overshoot": 1.1},
    {"env_mode": " run_tests , gt_only "},
    {"teacher_off_step": 0},
    {"final_n_prompts": 1, "vhack_pairs_modes": ("run_tests", "sentinel")},
    {"intervention": "advmod", "advmod_depth": 1.0, "advmod_alpha": 0.0, "advmod_form": "additive"},
    {"intervention": "gt_screening", "monitor_accuracy": 0.0},
    {"intervention": "route2", "gate_signal": "activation", "advmod_depth": 0.5, "quarantine": "block"},
]


@pytest.mark.parametrize("values", EDGES, ids=str)
def test_values_at_the_edge_are_accepted(values):
    validate(changed(SMOKE, **values))


# Which control says something about which arm; a cross where it would do nothing, or not what it says.
CONTROLS = """
               none gt_only gt_penalty gt_screening inoculation advmod posthoc erase route route2 absorb
none           ok   ok      ok         ok           ok          ok     ok      ok    ok    ok     ok
haar           -    -       -          -            -           ok     ok      ok    ok    ok     -
haar_matched   -    -       -          -            -           -      ok      ok    ok    -      -
shuffled       -    -       -          -            -           ok     ok      ok    ok    ok     -
clean_clean    -    -       -          -            -           ok     ok      ok    ok    ok     -
flipped        -    -       -          -            -           ok     ok      ok    ok    ok     -
random_routing -    -       -          -            -           -      -       -     -     ok     -
shrink         -    -       -          -            -           -      -       -     ok    ok     -
"""
HEAD, *ROWS = [line.split() for line in CONTROLS.strip().splitlines()]
CELLS = [(arm, row[0], cell) for row in ROWS for arm, cell in zip(HEAD, row[1:], strict=True)]


@pytest.mark.parametrize(("arm", "control", "cell"), CELLS)
def test_an_arm_takes_the_controls_that_mean_something_for_it(arm, control, cell, capsys):
    argv = ["smoke", f"--intervention={arm}", f"--control={control}"]
    if cell == "ok":
        return validate(parse(argv))
    with pytest.raises(
        (SystemExit, UserError)
    ) as refused:  # the latter: absorb, without --block-init=direction
        validate(parse(argv))
    said = capsys.readouterr().err or str(refused.value)
    assert "--control" in said and control in said


@pytest.mark.parametrize(
    ("arm", "signal"), [(arm, signal) for arm, (_, signals) in SIGNALS.items() for signal in signals]
)
def test_a_signal_takes_the_controls_that_mean_something_for_it(arm, signal):
    option, signals = SIGNALS[arm]
    for control in CONTROLS_OF[arm]:
        settings = arm_settings(arm, control=control, **{option: signal})
        if control in signals[signal]:
            settings.check()
            continue
        with pytest.raises(UserError, match=f"^--control {control} is of a direction"):
            settings.check()


def test_the_table_of_controls_is_whole():
    assert set(HEAD) == set(INTERVENTIONS) == set(CONTROLS_OF)
    assert {row[0] for row in ROWS} == set().union(*CONTROLS_OF.values())
    assert {(a, c) for a, c, cell in CELLS if cell == "ok"} <= {
        (a, c) for a in CONTROLS_OF for c in CONTROLS_OF[a]
    }


@pytest.mark.parametrize("arm", INTERVENTIONS)
@pytest.mark.parametrize("project", ["update", "purge"])
def test_only_erase_and_route_can_project_more_than_the_gradient(arm, project):
    argv = ["smoke", f"--intervention={arm}", f"--project={project}"]
    if arm in ("erase", "route"):
        for control in ("none", "haar", "shuffled", "clean_clean", "flipped"):
            validate(parse([*argv, f"--control={control}"]))
    else:
        with pytest.raises(
            UserError, match=f"--project is an option of --intervention=erase or route, not of {arm}"
        ):
            parse(argv)


NAMES = {arm: {f.name for f in dataclasses.fields(kind)} for arm, kind in SETTINGS.items()}
FOREIGN = [(arm, option) for arm in NAMES for option in sorted(set().union(*NAMES.values()) - NAMES[arm])]


@pytest.mark.parametrize(("arm", "option"), FOREIGN)
def test_an_option_of_another_arm_is_an_error_that_names_it(arm, option):
    takes = " or ".join(name for name in NAMES if option in NAMES[name])
    with pytest.raises(UserError, match=f"is an option of --intervention={takes}, not of {arm}"):
        parse(["smoke", f"--intervention={arm}", f"--{option.replace('_', '-')}=1"])
    with pytest.raises(TypeError):
        arm_settings(arm, **{option: 1})


@pytest.mark.parametrize("option", REMOVED)
def test_an_option_that_is_gone_says_what_to_use(option):
    with pytest.raises(UserError) as caught:
        parse(["smoke", f"--{option.replace('_', '-')}=1"])
    assert str(caught.value) == f"--{option.replace('_', '-')} is gone: {REMOVED[option].instead}"


def test_the_page_of_changed_options_is_the_table():
    page = (Path(__file__).parents[1] / "docs" / "changed_options.md").read_text()
    told = dict(re.findall(r"^\| `--([\w-]+)` \| (.*) \|$", page, flags=re.M))
    assert told == {name.replace("_", "-"): removed.instead for name, removed in REMOVED.items()}


# The parts of the preset nano that are no matter of tuning.
NANO_TABLE = {
    "model": "nano",
    "problems": "nano",
    "env_mode": "run_tests,sentinel,stdout_marker,file_marker",
    "vhack_pairs_path": Path("nano"),
    "prompts_per_step": 8,
    "group": 8,
    "max_new": 72,
    "temperature": 1.0,
    "top_k": 0,
    "weight_decay": 0.0,
    "mix_ratio": 0.0,
    "intervention": "erase",
    "control": "none",
}


@pytest.mark.parametrize("option", NANO_TABLE)
def test_the_nano_preset(option):
    assert flat(PRESETS["nano"][1])[option] == NANO_TABLE[option]


def test_env_modes_keep_their_order():
    assert env_modes("sentinel, run_tests") == ("sentinel", "run_tests")


@given(group=st.integers(2, 64), mix=st.floats(0, 1, exclude_max=True))
def test_an_accepted_mix_leaves_a_live_rollout(group, mix):
    cfg = changed(SMOKE, group=group, mix_ratio=mix)
    try:
        validate(cfg)
    except UserError:
        assert round(group * mix) >= group
    else:
        assert 0 <= teacher_rows(cfg) == round(group * mix) < group


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    cfg = PRESETS[preset][1]
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg


floats = st.floats(allow_nan=False, allow_infinity=False)
ROUND_TRIP = {
    "seed": st.integers(),
    "lr": floats,
    "problems": st.text(),
    "svd_cache": st.sampled_from([Path("a b/ü"), Path("/x"), Path(".")]),
    "v_hack_path": st.none() | st.just(Path("x.safetensors")),
    "resume": st.none() | st.just(Path("runs/y")),
    "teacher_pool_dir": st.none() | st.just(Path("p")),
    "teacher_off_step": st.none() | st.integers(),
    "teacher_modes": st.sampled_from([(), ("run_tests",), ("run_tests", "sentinel")]),
    "half_a": st.sampled_from([(), ("E",), ("C", "D")]),
    "control": st.sampled_from(CONTROLS_OF["erase"]),
    "project": st.sampled_from(["gradient", "update"]),
    "vhack_pairs_path": st.none() | st.just(Path("nano")),
    "vhack_pairs_modes": st.sampled_from([(), ("run_tests",), ("sentinel", "gt_only")]),
    "leave_out": st.sampled_from(["", "run_tests", "run_tests,sentinel"]),
    "final_n_prompts": st.integers(),
    "unbiased": st.booleans(),
}


@given(values=st.fixed_dictionaries({}, optional=ROUND_TRIP))
def test_any_settings_survive_json(values):
    cfg = changed(FULL, **values)
    again = from_json(json.loads(json.dumps(to_json(cfg))))
    assert again == cfg
    assert {k: type(v) for k, v in flat(again).items()} == {k: type(v) for k, v in flat(cfg).items()}


def test_an_unknown_field_is_refused():
    data = to_json(SMOKE)
    data["optim"]["momentum"] = 0.9
    with pytest.raises(UserError, match="momentum"):
        from_json(data)


def test_an_unknown_group_is_refused():
    with pytest.raises(UserError, match="nonsense"):
        from_json(to_json(SMOKE) | {"nonsense": {}})


@pytest.mark.parametrize("group", [f.name for f in dataclasses.fields(TrainConfig)])
def test_a_missing_group_is_refused(group):
    data = to_json(SMOKE)
    del data[group]
    with pytest.raises(UserError, match=group):
        from_json(data)


def test_a_missing_field_is_refused():
    """A default could have changed since: a resumed run must not quietly take the new one."""
    data = to_json(SMOKE)
    del data["optim"]["lr"]
    with pytest.raises(UserError, match="lr"):
        from_json(data)


def test_an_older_file_is_read_with_the_defaults_of_later_options():
    data = to_json(changed(SMOKE, lr=0.5, steps=7))
    del data["optim"]["init_adapter"], data["arm"]["control"], data["teacher"]
    cfg = from_json(data, older=True)
    assert (cfg.optim.lr, cfg.optim.steps, cfg.optim.init_adapter, cfg.arm.control) == (0.5, 7, None, "none")
    del data["arm"]["project"]
    older = data | {"arm": {"intervention": "route2"}}  # whose clean anchors were the labelled ones
    assert from_json(older, older=True).arm == arm_settings("route2", gate_clean_anchors="labelled")
    for broken in ({}, data | {"nonsense": {}}, data | {"optim": data["optim"] | {"nonsense": 1}}):
        with pytest.raises(UserError, match=r"config\.json"):
            from_json(broken, older=True)


@pytest.mark.parametrize("broken", [None, [], 5, "x"], ids=repr)
def test_a_group_that_is_no_object_is_refused(broken):
    with pytest.raises(UserError, match=r"config\.json"):
        from_json(to_json(SMOKE) | {"optim": broken})


@pytest.mark.parametrize("broken", [{}, [], 0, False, 5], ids=repr)
def test_an_arm_file_that_is_no_name_is_refused_in_one_line(broken):
    data = to_json(SMOKE)
    data["arm"]["arm_file"] = broken
    for older in (True, False):
        with pytest.raises(UserError, match=r"config\.json .*arm_file.* is [^\n]*$"):
            from_json(data, older=older)


@pytest.mark.parametrize("arm", INTERVENTIONS)
def test_the_command_line_reaches_every_option(arm):
    """Each option by its flat name, as a user types it; no positional, no prefix."""

    def typed(*words):
        return flat(parse(["smoke", f"--intervention={arm}", *words]))

    plain = flat(changed(SMOKE, intervention=arm))
    assert typed() == plain
    words, expected = [], dict(plain)
    for name, value in plain.items():
        if name in REMOVED:  # a field that the preset alone sets
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option.replace("--", "--no-") if value else option)
            expected[name] = not value
        elif isinstance(value, (int, float)):
            words += [option, str(number := 7 + len(words))]  # one that no other option has
            expected[name] = number
    assert typed(*words) == expected


@pytest.mark.parametrize("arm", INTERVENTIONS)
def test_every_option_has_a_line_of_help(arm):
    cfg = changed(SMOKE, intervention=arm)
    groups = [type(getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if f.name != "preset"]
    assert [
        f.name for kind in groups for f in dataclasses.fields(kind) if not descriptions(kind).get(f.name)
    ] == []


def test_the_help_opens_with_the_usual_ten(capsys):
    with pytest.raises(SystemExit):
        parse(["full", "--help"])
    listed = re.findall(r"^\W +(--[a-z][a-z0-9-]*)", capsys.readouterr().out, flags=re.M)
    assert listed[:10] == ["--" + name.replace("_", "-") for name in USUAL]
    assert len(set(listed)) == len(listed) <= MOST_OPTIONS
