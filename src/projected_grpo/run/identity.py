"""Which runs are the same, and what a run is called: both from the options that decide its outcome.

Two runs are the same if they differ in nothing but place: device, folders, processes. An id is a hash of the
preset and of the options that are not at their defaults. So a new option at its default changes no id, unless
its default does something new (config.BEFORE): then it always counts.
A name is the intervention, its control, and what else differs from the preset: `erase+haar k=12`.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from projected_grpo.config import BEFORE, PRESETS, REMOVED, RunConfig, TrainConfig, to_json

PLACE = {f.name for f in fields(RunConfig)} - {"seed", "cpu_seconds", "wall_seconds"}
PLACE |= {"device", "svd_cache", "arm_file"}  # of an arm's file its hash counts
REFERENCE = {"none": "vanilla", "erase": "projected", "route": "routing", "route2": "routing2"}
SHORT = {
    "v_hack_k": "k",
    "vhack_pairs_path": "pairs",
    "vhack_pairs_modes": "modes",
    "vhack_refresh_every": "refresh",
    "v_hack_drop_bottom_frac": "drop",
    "advmod_form": "form",
    "advmod_signal": "signal",
    "gate_signal": "signal",
}
OWN_GROUPS = ("arm", "basis")  # the other groups are also those of the run without an intervention
LONGEST = 60  # characters of a run's name in its folder's


def settings(cfg: TrainConfig) -> dict[str, Any]:
    """What decides a run's outcome, as plain JSON: its config without place."""
    groups = {name: values for name, values in to_json(cfg).items() if name != "preset"}
    kept = {name: {k: v for k, v in values.items() if k not in PLACE} for name, values in groups.items()}
    return {"preset": cfg.preset, **kept}


def changes(cfg: TrainConfig, base: TrainConfig) -> dict[str, dict[str, Any]]:
    """The options of `cfg` that decide its outcome and are not as in `base`, by group.

    An option that only the arm of `cfg` has is compared with that arm's default.
    """
    mine, theirs = settings(cfg), settings(base)
    own = settings(replace(base, arm=type(cfg.arm)()))["arm"]
    theirs["arm"] = own | {name: value for name, value in theirs["arm"].items() if name in own}
    return {
        group: {name: value for name, value in values.items() if value != theirs[group][name]}
        for group, values in mine.items()
        if group != "preset"
    }


def chosen(cfg: TrainConfig) -> dict[str, Any]:
    """The preset, and every option that is not at its default or has one that is new, by name."""
    changed = changes(cfg, TrainConfig(preset=cfg.preset))
    found = {name: v for values in changed.values() for name, v in values.items()}
    new = {name: v for name, v in settings(cfg)["arm"].items() if name in BEFORE}
    return {"preset": cfg.preset, **new, **found}


def given(cfg: TrainConfig) -> dict[str, Any]:
    """The options that are not as in the preset, those of place among them, as they would be typed."""
    preset = PRESETS[cfg.preset][1]
    found = {name: value for values in changes(cfg, preset).values() for name, value in values.items()}
    place = (
        (f.name, getattr(mine, f.name), getattr(theirs, f.name))
        for mine, theirs in ((cfg.model, preset.model), (cfg.run, preset.run), (cfg.arm, preset.arm))
        for f in fields(mine)
        if f.name in PLACE - {"svd_cache", "resume"}
    )
    changed = found | {name: value for name, value, usual in place if value != usual}
    return {name: value for name, value in changed.items() if name not in {*REMOVED, "arm_digest"}}


def differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The options in which a run that is there is another one than this, with both values, from `chosen`."""
    names = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    default = "the default"
    return [f"{name} ({saved.get(name, default)} there, {own.get(name, default)} here)" for name in names]


def identity(cfg: TrainConfig) -> str:
    """Ten hex digits that are the same for the same run, wherever and whenever they are computed."""
    text = json.dumps(chosen(cfg), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def arm_name(cfg: TrainConfig) -> str:
    """The intervention and its control: `erase`, `erase+haar`."""
    arm = cfg.arm
    return arm.intervention if arm.control == "none" else f"{arm.intervention}+{arm.control}"


def reference_name(cfg: TrainConfig) -> str:
    """The arm as the reference's scripts call it: `vanilla`, `projected`, `routing`, `routing2`."""
    name, plus, control = arm_name(cfg).partition("+")
    return REFERENCE.get(name, name) + plus.replace("+", "-") + control


def tags(cfg: TrainConfig, but: Sequence[str] = ()) -> dict[str, list[str]]:
    """Beside the arm's name, what differs from the preset, by group: `k=12`, `pairs=nano-sampled`.

    `but`: options that are shown elsewhere.
    """
    shown_already = {"intervention", "control", "seed", "arm_digest", *but}
    return {
        group: [
            f"{SHORT.get(name, name)}={shown(value)}"
            for name, value in values.items()
            if name not in shown_already
        ]
        for group, values in changes(cfg, PRESETS[cfg.preset][1]).items()
    }


def shown(value: Any) -> str:
    """An option's value in a name."""
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def name_parts(cfg: TrainConfig) -> list[str]:
    """The arm's name, then its tags, those of the arm and its basis first."""
    found = tags(cfg)
    groups = [*OWN_GROUPS, *(group for group in found if group not in OWN_GROUPS)]
    return [arm_name(cfg), *(tag for group in groups for tag in found[group])]


def run_name(cfg: TrainConfig) -> str:
    """A run's name in tables and pictures, whatever its seed: `erase+haar pairs=nano-sampled k=12`."""
    return " ".join(name_parts(cfg))


def folder_stem(cfg: TrainConfig) -> str:
    """The name of a run's folder behind its time stamp: `<preset>_<name>_seed<seed><tag>`.

    Where the name does not fit into a folder's, it is cut, and digits of the id keep it apart from others.
    """
    parts = name_parts(cfg)
    safe = [re.sub(r"[^\w.+=-]+", "-", part, flags=re.ASCII) for part in parts]
    while len("_".join(safe)) > LONGEST:
        safe.pop()
    if safe != parts or any(part.count("=") > 1 for part in parts):
        safe.append(identity(cfg)[:6])
    return f"{cfg.preset}_{'_'.join(safe)}_seed{cfg.run.seed}{cfg.run.out_tag}"


def run_id(cfg: TrainConfig) -> str:
    """`<timestamp>_<preset>_<name>_seed<seed><tag>`, local time to the second."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}_{folder_stem(cfg)}"
