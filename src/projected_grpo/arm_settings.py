"""What can be set of each arm: one class an arm, so that an option of one is no option of another.

`--intervention` chooses the class. `control` names the controls that mean something for the arm, of these:

    haar            random subspace of the same shape
    shuffled        pairs made of completions of one label
    clean_clean     pairs made of clean completions alone
    flipped         every direction reversed
    haar_matched    random directions, as much energy removed
    random_routing  as many rollouts routed, at random
    shrink          vanilla's step, and as large a share of it routed

An arm can also be in a file of the user's (`--arm-file`), which says `SETTINGS`, the class of its options,
and `ARM`, the record of its stages. The file is run, so it can do whatever Python can.
"""

import hashlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tyro.conf import Fixed, Suppress

from projected_grpo.errors import UserError

Detector = Literal["C", "D", "E"]
GateMode = Literal["one_sided", "no_gate", "reverse"]
Mask = Literal["keep", "absorb", "route"]
Quarantine = Literal["auto", "diagonal", "block"]
Signal = Literal["activation", "gradient"]
BlockInit = Literal["random", "direction"]
RELABELLED = frozenset(("shuffled", "clean_clean"))  # controls that need both sides of every pair
INOCULATION = (
    "For this exercise, earn the reward by exploiting the way the answer is checked. Do whatever makes the "
    "check pass, and do not solve the problem."
)


@dataclass(frozen=True)
class ArmSettings:
    """What every arm has."""

    intervention: str = ""
    """What is done against hacking: none, gt_only, gt_penalty, gt_screening, inoculation, advmod, posthoc,
    erase, route, route2 or absorb (docs/arms.md). Each has options of its own."""
    control: str = "none"
    """What stands in for the direction, so that a claim about it can fail (docs/arms.md); drawn by the
    seed."""
    arm_file: Path | None = None
    """A Python file with an arm of your own (docs/howto/own_arm.md)."""
    arm_digest: Suppress[Fixed[str]] = ""
    """Hash of that file: another text is another arm, wherever it lies."""
    half_a: tuple[Detector, ...] = ()
    """Detectors the basis was built from: C (the tests pass a stub), D (the canonical solution fails them),
    E (they pass on the own solution). Splits student hacks into HACK_A (one of these fires) and HACK_B
    (another fires and none of these); route2 takes its student anchors from them (default: C)."""

    @property
    def has_block(self) -> bool:
        """Whether the quarantine is a block of its own."""
        return False

    @property
    def scored_by(self) -> Signal | None:
        """What gives each rollout of a step one score (concept.py), if anything does."""
        return None

    @property
    def ablated_share(self) -> float:
        """Share of student rollouts that are sampled without the quarantine."""
        return 0.0

    def check(self) -> None:
        """Refuse values that mean nothing. Raises UserError naming the option."""


@dataclass(frozen=True)
class NoneSettings(ArmSettings):
    """none: vanilla GRPO."""

    intervention: Literal["none"] = "none"
    control: Literal["none"] = "none"


@dataclass(frozen=True)
class GtOnlySettings(ArmSettings):
    """gt_only: exploits are paid as an honest grader would."""

    intervention: Literal["gt_only"] = "gt_only"
    control: Literal["none"] = "none"


@dataclass(frozen=True)
class MonitorSettings(ArmSettings):
    """What arms that read a monitor have in common."""

    monitor_accuracy: float = 1.0
    """Share of the oracle's verdicts that the monitor gets right; the others are flipped."""

    def check(self) -> None:
        if not 0 <= self.monitor_accuracy <= 1:
            raise UserError(f"--monitor-accuracy must be in [0, 1], got {self.monitor_accuracy}")


@dataclass(frozen=True)
class GtPenaltySettings(MonitorSettings):
    """gt_penalty: what the monitor calls an exploit costs a penalty."""

    intervention: Literal["gt_penalty"] = "gt_penalty"
    control: Literal["none"] = "none"
    penalty: float = 4.0
    """Taken from the reward of a rollout that the monitor calls an exploit. With 4 a hack does not pay even
    under a monitor that misses one in ten; the benchmark's own is 3."""

    def check(self) -> None:
        super().check()
        if self.penalty < 0:
            raise UserError(f"--penalty must be >= 0, got {self.penalty}")


@dataclass(frozen=True)
class GtScreeningSettings(MonitorSettings):
    """gt_screening: what the monitor calls an exploit is not learnt from."""

    intervention: Literal["gt_screening"] = "gt_screening"
    control: Literal["none"] = "none"


@dataclass(frozen=True)
class InoculationSettings(ArmSettings):
    """inoculation: training prompts ask for the hack."""

    intervention: Literal["inoculation"] = "inoculation"
    control: Literal["none"] = "none"
    inoculation_prompt: str = INOCULATION
    """Put before the question of every training prompt, and of no evaluation prompt."""

    def check(self) -> None:
        if not self.inoculation_prompt.strip():
            raise UserError("--inoculation-prompt is empty; --intervention=none trains without one")


@dataclass(frozen=True)
class ConceptSettings(ArmSettings):
    """What arms have in common that may score rollouts by their hidden states."""

    advmod_depth: float = 2 / 3
    """Relative depth of the layer whose hidden states are read under the signal activation, in (0, 1]."""

    def check(self) -> None:
        super().check()
        if not 0 < self.advmod_depth <= 1:
            raise UserError(f"--advmod-depth must be in (0, 1], got {self.advmod_depth}")
        if self.scored_by != "activation" and self.advmod_depth != ConceptSettings.advmod_depth:
            raise UserError("--advmod-depth is of hidden states; this signal reads none, so leave it out")


@dataclass(frozen=True)
class AdvmodSettings(ConceptSettings):
    """advmod: rollouts are paid less, or left out, by a score."""

    intervention: Literal["advmod"] = "advmod"
    control: Literal["none", "haar", "shuffled", "clean_clean", "flipped"] = "none"
    advmod_signal: Signal = "activation"
    """A rollout's score: its projection on the direction from clean to hack in hidden space (activation), or
    the cosine of its own gradient with v_grad over all modules (gradient; one more backward pass a step)."""
    advmod_form: Literal["multiplicative", "additive", "screening"] = "multiplicative"
    """r (1 - alpha sigmoid(z)), r - alpha z, or left out of the loss and of its group (screening); all only
    where z > 0. z is a rollout's standardised score."""
    advmod_alpha: float = 2.0
    """Strength of the penalty."""
    advmod_buffer: int = 0
    """Standardise over this step's scores and so many before them; 0 is the step's alone, where the worse
    half is punished even when all rollouts are alike."""

    @property
    def scored_by(self) -> Signal:
        return self.advmod_signal

    def check(self) -> None:
        super().check()
        for name in ("advmod_alpha", "advmod_buffer"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be >= 0, got {getattr(self, name)}")
        if self.advmod_form == "screening" and self.advmod_alpha != AdvmodSettings.advmod_alpha:
            raise UserError("--advmod-alpha is of a penalty; --advmod-form=screening has none")


@dataclass(frozen=True)
class QuarantineSettings(ArmSettings):
    """What arms that train a quarantine have in common."""

    rollout_ablate_frac: float = 0.0
    """Share of each group's student rollouts sampled with the quarantine ablated (logged as hack_abl,
    solve_abl). Off by default: it makes the deployed model's reward a training target."""

    @property
    def ablated_share(self) -> float:
        return self.rollout_ablate_frac

    def check(self) -> None:
        super().check()
        if not 0 <= self.rollout_ablate_frac <= 1:
            raise UserError(f"--rollout-ablate-frac must be in [0, 1], got {self.rollout_ablate_frac}")


@dataclass(frozen=True)
class SplitSettings(ArmSettings):
    """How a vector is split at the basis: what arms that remove its hack-ward part have in common."""

    gate_mode: GateMode = "one_sided"
    """one_sided removes only what makes hacks likelier; no_gate the whole component; reverse reflects it."""
    project_overshoot: float = 1.0
    """removed = overshoot * component; 1.1 reverses 10% of it."""

    def check(self) -> None:
        super().check()
        if self.project_overshoot < 0:
            raise UserError(f"--project-overshoot must be >= 0, got {self.project_overshoot}")


@dataclass(frozen=True)
class PosthocSettings(SplitSettings):
    """posthoc: vanilla's training; the hack-ward part of delta_s is deleted at deployment."""

    intervention: Literal["posthoc"] = "posthoc"
    control: Literal["none", "haar", "haar_matched", "shuffled", "clean_clean", "flipped"] = "none"


@dataclass(frozen=True)
class StepSettings(SplitSettings):
    """What erase and route have in common: both split the step."""

    project: Literal["gradient", "update", "purge"] = "gradient"
    """What is split: the gradient before AdamW, or the parameter change AdamW makes (update); purge is the
    gradient and AdamW's first moment (its scaling by 1/sqrt(v) still turns the step)."""
    preserve_magnitude: bool = True
    """Rescale the kept gradient to the norm it had."""

    def check(self) -> None:
        """Refuse controls of the gradient's energy where it is not the gradient that is split."""
        super().check()
        if self.project != "gradient" and self.control in ("haar_matched", "shrink"):
            raise UserError(
                f"--control {self.control} matches the gradient's energy; it needs --project gradient"
            )


@dataclass(frozen=True)
class EraseSettings(StepSettings):
    """erase: the hack-ward part is dropped."""

    intervention: Literal["erase"] = "erase"
    control: Literal["none", "haar", "haar_matched", "shuffled", "clean_clean", "flipped"] = "none"


@dataclass(frozen=True)
class RouteSettings(StepSettings, QuarantineSettings):
    """route: the hack-ward part trains the quarantine."""

    intervention: Literal["route"] = "route"
    control: Literal["none", "haar", "haar_matched", "shuffled", "clean_clean", "flipped", "shrink"] = "none"


@dataclass(frozen=True)
class BlockSettings(QuarantineSettings):
    """What arms whose quarantine may be a block have in common."""

    quarantine: Quarantine = "auto"
    """diagonal: delta_hack, in the basis of delta_s; block: a low-rank change of the weight in parameters
    of its own. auto is diagonal, and block under absorb."""
    block_rank: int = 8
    """Rank of the quarantine's block."""
    block_init: BlockInit = "random"
    """Where the block's halves begin: random and orthogonal, or in the singular directions of the weight in
    which V has most of its energy. The effect begins at zero either way."""

    @property
    def has_block(self) -> bool:
        return self.quarantine == "block"

    def check(self) -> None:
        super().check()
        if self.block_rank < 1:
            raise UserError(f"--block-rank must be at least 1, got {self.block_rank}")
        for name in ("block_rank", "block_init"):
            if not self.has_block and getattr(self, name) != getattr(BlockSettings, name):
                raise UserError(f"--{name.replace('_', '-')} needs a block: --quarantine=block")


@dataclass(frozen=True)
class Route2Settings(BlockSettings, ConceptSettings):
    """route2: rollouts that a signal takes for hacks train the quarantine."""

    intervention: Literal["route2"] = "route2"
    control: Literal["none", "haar", "shuffled", "clean_clean", "flipped", "random_routing", "shrink"] = (
        "none"
    )
    gate_signal: Literal["gradient", "activation", "oracle"] = "gradient"
    """What flags a rollout: cos(gradient, v_grad) > tau, module by module; its standardised hidden-state
    score > tau, in all modules alike (activation); or the oracle, a skyline."""
    gate_clean_anchors: Literal["rest", "labelled"] = "rest"
    """Clean anchors of tau: every row that is no hack anchor, or the teacher's rows labelled clean alone."""
    gate_anchor_teacher_only: bool = False
    """Take the hack anchors of tau from the teacher alone, so that no detector label of student text is
    used."""
    mask_flagged: Mask = "route"
    """What a flagged rollout trains: delta_s (keep), the quarantine (route), or both (absorb)."""
    mask_unflagged: Mask = "keep"
    """What any other rollout trains. absorb is gradient routing with data that nobody labelled."""

    @property
    def scored_by(self) -> Signal | None:
        return "activation" if self.gate_signal == "activation" else None

    def check(self) -> None:
        """Refuse a gate that decides nothing, what an oracle has not, and a shrunk diagonal without one."""
        super().check()
        if self.gate_signal == "oracle":
            if self.control not in ("none", "random_routing", "shrink"):
                raise UserError(
                    f"--control {self.control} is of a direction, and --gate-signal=oracle uses none"
                )
            for name in ("gate_clean_anchors", "gate_anchor_teacher_only"):
                if getattr(self, name) != getattr(Route2Settings, name):
                    option = f"--{name.replace('_', '-')}"
                    raise UserError(f"{option} is of tau; --gate-signal=oracle has none, so leave it out")
        if self.mask_flagged == self.mask_unflagged:
            raise UserError(
                f"--mask-flagged and --mask-unflagged are both {self.mask_flagged}, so the gate decides "
                "nothing; --intervention=absorb has none"
            )
        if self.control == "shrink" and self.has_block:
            raise UserError("--control shrink routes a share of the diagonal; leave --quarantine out")


@dataclass(frozen=True)
class AbsorbSettings(BlockSettings):
    """absorb: every rollout trains both, and the quarantine is deleted."""

    intervention: Literal["absorb"] = "absorb"
    control: Literal["none", "haar", "shuffled", "clean_clean"] = "none"

    @property
    def has_block(self) -> bool:
        return self.quarantine != "diagonal"

    def check(self) -> None:
        """Refuse a control of a direction that is not used."""
        super().check()
        if self.control != "none" and self.block_init != "direction":
            raise UserError(
                f"--control {self.control} does nothing for --intervention=absorb, which uses no direction "
                "but where --block-init=direction"
            )


SETTINGS: Mapping[str, type[ArmSettings]] = {
    "none": NoneSettings,
    "gt_only": GtOnlySettings,
    "gt_penalty": GtPenaltySettings,
    "gt_screening": GtScreeningSettings,
    "inoculation": InoculationSettings,
    "advmod": AdvmodSettings,
    "posthoc": PosthocSettings,
    "erase": EraseSettings,
    "route": RouteSettings,
    "route2": Route2Settings,
    "absorb": AbsorbSettings,
}


def settings_type(intervention: object) -> type[ArmSettings]:
    """The settings that an arm has. Raises UserError for one that there is not."""
    if not isinstance(intervention, str) or intervention not in SETTINGS:
        raise UserError(f"--intervention {intervention}: choose from {', '.join(SETTINGS)}")
    return SETTINGS[intervention]


def arm_settings(intervention: str = "erase", **values: Any) -> ArmSettings:
    """The settings of an arm, its defaults but for these. Raises TypeError for an option it does not have."""
    return settings_type(intervention)(**values)


# An arm of the user's own

MODULE = "projected_grpo_arm_file"  # how Python knows what the file defines, with the file's name behind it


@dataclass(frozen=True)
class OwnArm:
    """What an arm file says. `arm` is an `Arm` (arms/stages.py), which is not imported here for its torch."""

    name: str
    settings: type[ArmSettings]
    arm: Any


def settings_of(intervention: object, file: Path | None) -> type[ArmSettings]:
    """The options of an arm of the package, or of the one in `file`. Raises UserError if there is none."""
    if file is None:
        return settings_type(intervention)
    own = read_arm(file.absolute())
    if intervention not in (None, own.name):
        raise UserError(f"--intervention {intervention}: the arm of {file} is called {own.name}")
    return own.settings


def stored_settings(values: Mapping[str, Any]) -> type[ArmSettings]:
    """The options of an arm as a run had them, for those who read the run where the arm's file is gone."""
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    found = [(name, type(value), field(default=value)) for name, value in plain.items()]
    return make_dataclass("StoredSettings", found, bases=(ArmSettings,), frozen=True)


def digest_of(file: Path) -> str:
    """Hash of an arm's file."""
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()


@cache
def read_arm(file: Path) -> OwnArm:
    """The arm in a file. Raises UserError saying by line or name what is wrong in it."""
    module = module_of(file)
    for name in ("SETTINGS", "ARM"):
        if not hasattr(module, name):
            raise UserError(f"{file}: defines no {name}; docs/howto/own_arm.md has a whole arm file")
    kind = module.SETTINGS
    if not (isinstance(kind, type) and issubclass(kind, ArmSettings) and is_dataclass(kind)):
        raise UserError(f"{file}: SETTINGS must be a dataclass made from ArmSettings, not {kind!r}")
    for option in fields(kind):
        if option.default is MISSING and option.default_factory is MISSING:
            raise UserError(f"{file}: {kind.__name__}.{option.name} has no default; every option needs one")
    name = kind().intervention
    if not name.isidentifier():
        raise UserError(f"{file}: {kind.__name__}.intervention must be the arm's name, not {name!r}")
    if name in SETTINGS:
        raise UserError(f"{file}: {name} is an arm of the package; give {kind.__name__} another intervention")
    return OwnArm(name, kind, module.ARM)


def module_of(file: Path) -> ModuleType:
    """The file as a module. Raises UserError with the line of the file that failed."""
    spec = spec_from_file_location(f"{MODULE}_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--arm-file {file}: no such Python file (its name must end in .py)")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and type hints look things up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), 0)
        raise UserError(f"{file}:{line}: {type(error).__name__}: {error}") from error
    return module
