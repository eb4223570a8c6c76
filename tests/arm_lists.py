"""The arms and the controls of each, as their settings have them."""

from dataclasses import fields
from typing import get_args

from projected_grpo.arm_settings import SETTINGS

CONTROLS_OF = {
    arm: get_args({f.name: f.type for f in fields(kind)}["control"]) for arm, kind in SETTINGS.items()
}
INTERVENTIONS = tuple(SETTINGS)
SIGNALS = {  # of each arm with a choice of them: the option, and the controls under each value
    "advmod": ("advmod_signal", dict.fromkeys(("activation", "gradient"), CONTROLS_OF["advmod"])),
    "route2": (
        "gate_signal",
        dict.fromkeys(("gradient", "activation"), CONTROLS_OF["route2"])
        | {"oracle": ("none", "random_routing", "shrink")},
    ),
}
