"""A study: arms x seeds of one preset, each run a process of its own, resumable, and what is kept of each.

What is kept of a run is one small JSON file: its settings, its summary, and a few columns of its steps. A run
counts as done when its file holds the settings and the data (model, problems, pairs) that are asked for now;
so a study that was killed goes on. A file of other settings is never overwritten.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from loguru import logger

from projected_grpo.checks import validate
from projected_grpo.config import NANO, EnvMode, TrainConfig, from_json, settings
from projected_grpo.errors import DIVERGED, UserError
from projected_grpo.pairs import packaged_pairs
from projected_grpo.results.files import PLANNED, check_fields, check_record
from projected_grpo.runlog import complete_lines, plain, read_json, write_atomically
from projected_grpo.sweep.runner import Children, Slot, locked, run_pool
from projected_grpo.train import parse

FIRST_SEED = 41
SERIES = (
    *("hack_s", "gt_s", "cos_pre", "cos_post", "cos_update", "cos_null", "fired", "q_egy", "refr"),
    *("hack_deploy", "solve_deploy", "zerovar", "lp_s"),
)
NOT_READ = ("base.json",)
PAIRS_OF_NANO = ("nano", "nano-oracle")  # made from what lies in data/nano
DIGITS = 4  # kept of every figure
NANO_MODES: tuple[EnvMode, ...] = ("run_tests", "sentinel", "stdout_marker", "file_marker")


@dataclass(frozen=True)
class StudyArm:
    """One row of the study: its name, what it adds to the preset, how many seeds, what it is for, and, for a
    control, the arm it stands against."""

    name: str
    options: tuple[str, ...]
    seeds: int
    purpose: str
    controls: str = ""
    later: bool = False  # made when all others are
    explored: bool = False  # thought of after tables had been seen


def _arm(name: str, seeds: int, purpose: str, *options: str, controls: str = "") -> StudyArm:
    intervention = name.partition("+")[0]
    return StudyArm(name, (f"--intervention={intervention}", *options), seeds, purpose, controls)


def _control(arm: str, control: str, seeds: int, purpose: str) -> StudyArm:
    return _arm(f"{arm}+{control}", seeds, f"control: {purpose}", f"--control={control}", controls=arm)


def _leave_out(mode: EnvMode, name: str = "", *options: str) -> StudyArm:
    purpose = f"V from the other three modes' {name.replace('_', ' ')}pairs, measured on {mode}"
    others = [m for m in NANO_MODES if m != mode]
    return _arm(f"erase+{name}without_{mode}", 3, purpose, *options, "--vhack-pairs-modes", *others)


def _explored(name: str, purpose: str, *options: str, controls: str = "") -> StudyArm:
    return replace(_arm(name, 3, purpose, *options, controls=controls), later=True, explored=True)


def _placebo(name: str) -> StudyArm:
    purpose = "control: pairs whose two sides are both honest"
    pairs = f"--vhack-pairs-path=nano-{name}"
    return _arm(f"erase+{name}", 5, purpose, pairs, controls="erase")


PLACEBOS = ("erase+placebo-style", "erase+placebo-iteration", "erase+placebo-naming")
SOLVING = "erase+solving_pairs"
PAIRS = "--vhack-pairs-path"
ORACLE = f"{PAIRS}=nano-oracle"
SAMPLED = "erase+sampled_pairs"
OF_THE_BASE = f"{PAIRS}=nano-sampled"
TWELVE_AXES = ("--v-hack-k=12", "--v-hack-drop-bottom-frac=0")
REFLECTED = ("--gate-mode=reverse", "--control=haar")
PAIRS_ONLY = "--gate-anchor-teacher-only"  # without a teacher: no label of any rollout reaches the gate
FIRST: tuple[StudyArm, ...] = (  # docs/spec.md, A1
    _arm("none", 10, "vanilla: does hacking emerge, does solve fall"),
    _arm("erase", 10, "the hack-ward part of the gradient dropped, V refreshed every 5 steps"),
    _control("erase", "haar", 10, "a random subspace of the same shape"),
    _arm("route", 10, "the hack-ward part trains the quarantine"),
    _control("route", "haar", 10, "a random subspace of the same shape"),
    _arm("route2", 10, "rollouts routed by their cosine with the mean direction, and those detector C knows"),
    _control("route2", "haar", 10, "random directions; detector C as before"),
    _arm("gt_only", 5, "no loophole pays: can the policy learn honestly in as many steps"),
    _control("erase", "haar_matched", 5, "random directions, as much energy removed"),
    _control("erase", "shuffled", 5, "V from completions paired within their label"),
    _control("erase", "clean_clean", 5, "V from differences of clean completions"),
    _control("erase", "flipped", 5, "every direction reversed; should not suppress"),
    _arm("erase+oracle_pairs", 5, "upper bound: pairs in the corpus' own wordings", ORACLE),
    _arm("erase+frozen", 5, "V never refreshed", "--vhack-refresh-every=0"),
    _arm("erase+refresh1", 5, "V refreshed every step", "--vhack-refresh-every=1"),
    _arm("erase+update", 5, "the realised AdamW change is projected, not the gradient", "--project=update"),
    _arm("erase+no_gate", 5, "the whole component, whatever its sign", "--gate-mode=no_gate"),
    _arm("erase+reverse", 5, "the component reflected", "--gate-mode=reverse"),
    _control("route", "haar_matched", 5, "as much routed, in random directions"),
    _control("route", "shuffled", 5, "V from completions paired within their label"),
    _control("route", "shrink", 5, "vanilla's step, and as large a share of it routed"),
    _control("route2", "random_routing", 5, "as many rollouts routed, at random"),
    _control("route2", "shuffled", 5, "directions from completions paired within their label"),
    _control("route2", "shrink", 5, "vanilla's step, and as large a share of it routed"),
    _arm("route2+no_labels", 5, "route2 from the pairs alone, without detector C", PAIRS_ONLY),
    _arm(
        *("route2+no_labels_haar", 5, "control: random directions", PAIRS_ONLY, "--control=haar"),
        controls="route2+no_labels",
    ),
    *map(_leave_out, NANO_MODES),
)
FURTHER: tuple[StudyArm, ...] = (  # docs/spec.md, A2 to A4
    _arm("advmod", 5, "advantages lowered by hidden states, Wu and Tang, multiplicative"),
    _control("advmod", "haar", 5, "a random direction of hidden states"),
    _arm("advmod+additive", 5, "the same, additive", "--advmod-form=additive"),
    _arm("gt_penalty", 5, "skyline: the oracle's labels lower the reward"),
    _arm("gt_screening", 5, "skyline: rollouts that the oracle flags are left out"),
    _arm("inoculation", 5, "training prompts ask for the hack"),
    _arm("posthoc", 5, "vanilla's training; V taken out of delta_s at deployment"),
    _control("posthoc", "haar", 5, "a random subspace of the same shape"),
    *(_placebo(name.partition("+")[2]) for name in PLACEBOS),
    _arm("route2+block", 5, "the quarantine in a block of its own", "--quarantine=block"),
    _arm("absorb", 5, "no gate: a block that trains on everything is deleted"),
    _arm(SOLVING, 5, "V from pairs whose hacks solve too", f"{PAIRS}=nano-solving"),
)
EXPLORED: tuple[StudyArm, ...] = (  # docs/spec.md, A5
    _explored("erase+k12", "12 axes a module, not 5, and no noise floor", *TWELVE_AXES),
    _explored("erase+reverse_haar", "random directions reflected", *REFLECTED, controls="erase+reverse"),
    _explored("erase+corpus_tasks", "corpus' tasks, hand-written tampering", f"{PAIRS}=nano-corpus-tasks"),
    _explored("erase+corpus_wordings", "own tasks, corpus' tampering", f"{PAIRS}=nano-corpus-wordings"),
    _explored(
        *("erase+oracle_shuffled", "oracle pairs paired within their label", ORACLE, "--control=shuffled"),
        controls="erase+oracle_pairs",
    ),
    _explored(
        *("erase+oracle_haar_matched", "random, as much energy removed", ORACLE, "--control=haar_matched"),
        controls="erase+oracle_pairs",
    ),
    *(replace(_leave_out(mode, "oracle_", ORACLE), later=True, explored=True) for mode in NANO_MODES),
    _explored("route2+oracle_pairs", "route2 with pairs in the corpus' own wordings", ORACLE),
)
OWN_PAIRS: tuple[StudyArm, ...] = (  # docs/spec.md, A6
    _arm(SAMPLED, 5, "V from pairs that the base model wrote", OF_THE_BASE),
    _arm(
        *("erase+sampled_shuffled", 5, "control: sampled pairs paired within their label", OF_THE_BASE),
        "--control=shuffled",
        controls=SAMPLED,
    ),
    _arm(
        *("erase+sampled_haar_matched", 5, "control: random, as much energy removed", OF_THE_BASE),
        "--control=haar_matched",
        controls=SAMPLED,
    ),
    *(_leave_out(mode, "sampled_", OF_THE_BASE) for mode in NANO_MODES),
)
NANO_STUDY = (*FIRST, *(replace(arm, later=True) for arm in (*FURTHER, *OWN_PAIRS)), *EXPLORED)
STUDIES: Mapping[str, tuple[StudyArm, ...]] = {"nano": NANO_STUDY}


@dataclass(frozen=True)
class PlannedRun:
    """One arm and seed, the settings it will run under, and the file that keeps its outcome."""

    preset: str
    arm: StudyArm
    seed: int
    config: dict[str, Any]
    defaults: dict[str, Any]  # of the options, whatever the preset
    data: str  # hash of the packaged model, problems and pairs
    record: Path

    @property
    def name(self) -> str:
        """What it is called in logs and folders."""
        return self.record.stem

    @property
    def done(self) -> bool:
        """Whether its outcome is there. Raises UserError if the file is that of another run."""
        if not self.record.exists():
            return False
        kept = read_json(self.record, "study")
        same = {
            "settings": same_settings(as_of_now(kept.get("config")), self.config, self.defaults),
            "packaged data": kept.get("data") == self.data,
        }
        for what, agrees in same.items():
            if not agrees:
                raise UserError(
                    f"{self.record} was made with other {what}; move it away, or name another --out"
                )
        return True


def plan(
    study: str,
    out: Path,
    arms: Sequence[str] = (),
    max_seeds: int = 0,
    steps: int = 0,
    final_n_prompts: int = 0,
) -> list[PlannedRun]:
    """All runs of a study, first seeds first, later arms last. UserError for an arm it does not have."""
    known = {arm.name: arm for arm in STUDIES[study]}
    for name in arms:
        if name not in known:
            raise UserError(f"--arms {name}: not in this study; it has {', '.join(known)}")
    smaller = [f"--steps={steps}"] if steps else []
    smaller += [f"--final-n-prompts={final_n_prompts}"] if final_n_prompts else []
    runs, nano, defaults = [], nano_data(), settings(TrainConfig(preset=study))
    for arm in STUDIES[study]:
        if arms and arm.name not in arms:
            continue
        chosen = replace(arm, options=(*arm.options, *smaller))
        cfg = parse([study, *chosen.options])
        validate(cfg)
        data = data_digest(nano, str(cfg.basis.vhack_pairs_path))
        for seed in range(FIRST_SEED, FIRST_SEED + min(arm.seeds, max_seeds or arm.seeds)):
            cfg = replace(cfg, run=replace(cfg.run, seed=seed))
            runs.append(
                PlannedRun(
                    study, chosen, seed, settings(cfg), defaults, data, out / f"{arm.name}_seed{seed}.json"
                )
            )
    return sorted(runs, key=lambda run: (run.arm.later, run.seed))


def nano_data() -> "hashlib.blake2b":
    """The hash so far of a run's data: what is packaged for nano."""
    digest = hashlib.blake2b(digest_size=8)
    with as_file(files("projected_grpo") / "data" / NANO) as folder:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in NOT_READ):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest


def data_digest(nano: "hashlib.blake2b", pairs: str) -> str:
    """Hash of the nano data, and of a pair set that is not part of it: a run that would read something else
    is another run.
    """
    digest = nano.copy()
    if pairs not in PAIRS_OF_NANO:
        digest.update(packaged_pairs(pairs))
    return digest.hexdigest()


def same_settings(kept: object, asked: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a record's settings are those asked for now.

    An option that came after the record is one of the program that made it, at its default: a default does
    what was done before there was the option.
    """
    if not isinstance(kept, Mapping) or not kept.keys() <= asked.keys():
        return False
    for name, value in asked.items():
        default = defaults.get(name)
        if name not in kept:
            same = value == default
        elif isinstance(value, Mapping) and isinstance(default, Mapping):
            same = same_settings(kept[name], value, default)
        else:
            same = kept[name] == value
        if not same:
            return False
    return True


def as_of_now(kept: object) -> object:
    """A record's settings with the options that there are now; as they stand where they are no settings."""
    try:
        return settings(from_json(kept, older=True))
    except UserError:
        return kept


def run_study(runs: Sequence[PlannedRun], work: Path, jobs: int) -> list[PlannedRun]:
    """Make every run that is not done, `jobs` at a time; returns those that failed.

    Raises UserError while another study, or a run that one left behind, works in the same folder.
    """
    with locked(work / "lock") as held:
        if held is None:
            raise UserError(
                f"--work {work}: another study, or a run it left behind, works there; wait, or name another"
            )
        todo, children = [run for run in runs if not run.done], Children()
        done = len(runs) - len(todo)
        logger.info("{} runs, {} done, {} to make, {} at a time", len(runs), done, len(todo), jobs)
        return run_pool(
            todo,
            lambda run, slot: make(run, work, partial(children.run, held=held, slot=slot)),
            [Slot()] * jobs,
            children,
            name=lambda run: run.name,
            desc="study",
            done=done,
        )


def make(run: PlannedRun, work: Path, launch: Callable[[Sequence[str], Path], int]) -> str:
    """One run from start to its kept record, or why it has none. A run that diverged counts as it ended."""
    folder = work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "projected_grpo.train", run.preset, *run.arm.options, f"--seed={run.seed}"),
        *(f"--out-dir={folder}", f"--log-dir={folder}", f"--svd-cache={work / 'svd_cache'}"),
        *("--threads=1", "--workers=1"),
    ]
    started = time.monotonic()
    code = launch(command, folder / "output.txt")
    made = list((folder / "runs").glob("*/summary.json"))
    if code not in (0, DIVERGED) or not made:
        return f"its output is in {folder / 'output.txt'}"
    record = keep(run, max(made, key=os.path.getmtime).parent, time.monotonic() - started)
    write_atomically(run.record, (json.dumps(record, separators=(",", ":")) + "\n").encode())
    return ""


def keep(run: PlannedRun, folder: Path, wall_s: float) -> dict[str, Any]:
    """What is kept of a finished run."""
    steps = complete_lines(folder / "steps.jsonl")
    return rounded(
        {
            "arm": run.arm.name,
            "seed": run.seed,
            "command": f"projected-grpo train {run.preset} {' '.join(run.arm.options)} --seed={run.seed}",
            "git_commit": read_json(folder / "config.json", "study").get("git_commit"),
            "wall_s": wall_s,
            "summary": read_json(folder / "summary.json", "study"),
            "steps": {name: [step.get(name) for step in steps] for name in SERIES},
        }
    ) | {"config": run.config, "data": run.data}


def rounded(value: Any) -> Any:
    """Every float with as many digits as a reader needs."""
    if isinstance(value, float):
        return plain(float(f"{value:.{DIGITS}g}"))
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def read_records(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """The records of the runs that are done. Raises UserError if there is none, or one of another run."""
    records = {run.record: read_json(run.record, "study") for run in runs if run.done}
    if not records:
        raise UserError("no finished run of this study; run it without --report-only first")
    for path, record in records.items():
        check_fields(record, PLANNED, {}, f"study: {path}")
        check_record(record, SERIES, f"study: {path}")
    return list(records.values())
