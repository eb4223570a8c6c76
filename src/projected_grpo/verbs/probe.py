"""The verbs of a probe: extract -> verify -> none -> an arm at one seed, gated; and a gate alone."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from projected_grpo.config import TrainConfig
from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.options.verbs import GateOptions, ProbeOptions
from projected_grpo.sweep.gates import GATES
from projected_grpo.sweep.jobs import SIGNALLED, Job, Launch, in_process, jobs_of, make, write_job
from projected_grpo.sweep.spec import Spec, SweepArm, SweepLimits, basis_options, expand, split_pair, typed
from projected_grpo.verbs.basis import ExtractOptions, extract_verb, verify_verb

VERBS = {"extract": extract_verb, "verify": verify_verb}


def check(gate: str, files: Sequence[Path]) -> bool:
    """Print what a gate says of these files; whether all of them pass. Raises UserError without files."""
    if not files:
        raise UserError(f"gate {gate}: no files to check")
    verdicts = GATES[gate](files)
    for verdict in verdicts:
        print(verdict.lines(), flush=True)
    return all(verdict.passed for verdict in verdicts)


def gate_verb(options: GateOptions) -> int:
    """Check one gate of a probe on its files, for a queue to stop behind. Exit 1 if it does not hold."""
    return 0 if check(options.gate, options.files) else GATE_FAILED


def planned(options: ProbeOptions) -> tuple[Job, Job, TrainConfig]:
    """None and the arm as jobs of one folder, and the settings of the arm."""
    given = {name: typed(value) for name, value in map(split_pair, options.set)}
    given |= {"model": options.model} if options.model else {}
    arms = tuple(SweepArm(arm, {"intervention": arm}) for arm in ("none", options.arm))
    spec = Spec("probe", options.preset, options.out, arms, given, {"seed": (options.seed,)})
    baseline, arm = expand(spec)
    home = options.out / f"{options.preset}_{options.arm}_seed{options.seed}_{arm.id}"
    first, second = jobs_of((baseline, arm), home, SweepLimits())
    return first, second, arm.cfg


def basis_stage(verb: str, cfg: TrainConfig, home: Path, *, in_process: bool) -> int:
    """Run extract or verify for this basis; the exit code."""
    if in_process:
        return VERBS[verb](ExtractOptions(cfg.model, cfg.basis, cfg.loss, home))
    command = [sys.executable, "-m", "projected_grpo.cli", verb, *basis_options(cfg), f"--out-dir={home}"]
    return subprocess.run(command).returncode


def attached(argv: Sequence[str], output: Path, held: int) -> int | None:
    """Train in a process that shares this terminal; None if a signal ended it."""
    command = [sys.executable, "-m", "projected_grpo.train", *argv]
    code = subprocess.run(command, pass_fds=(held,)).returncode
    return code if 0 <= code < SIGNALLED else None


def train_stage(job: Job, launch: Launch) -> bool:
    """Make one run; whether it ended."""
    write_job(job)
    outcome = make(job, launch)
    if outcome.kind != "done":
        logger.error("{}: {} {}", job.name, outcome.kind, outcome.why)
    return outcome.kind == "done"


def probe_verb(options: ProbeOptions) -> int:
    """Extract, verify, baseline, arm: one seed before any sweep. Exit 1 at the first gate that fails."""
    baseline, arm, cfg = planned(options)
    home, launch = Path(baseline.home), in_process if options.in_process else attached
    print(f"probe of {options.preset}, seed {options.seed}, in {home}", flush=True)
    basis = cfg.basis.v_hack_path
    bases = [basis] if basis else sorted((home / "vhack").glob("*.safetensors"))
    if not bases or not bases[0].exists():
        if basis_stage("extract", cfg, home, in_process=options.in_process):
            return GATE_FAILED
        bases = [basis] if basis else sorted((home / "vhack").glob("*.safetensors"))
    if not check("A", bases):
        return GATE_FAILED
    heldout = [path.with_suffix(".heldout.json") for path in bases]
    if not all(path.exists() for path in heldout):
        code = basis_stage("verify", cfg, home, in_process=options.in_process)
        if code not in (0, GATE_FAILED):
            return GATE_FAILED
    if not check("B", heldout):
        return GATE_FAILED
    if not train_stage(baseline, launch) or not check("C", baseline.folders()):
        return GATE_FAILED
    if not train_stage(arm, launch) or not check("D", [*baseline.folders(), *arm.folders()]):
        return GATE_FAILED
    print(f"probe passed; `projected-grpo results {home / 'runs'}` has its table")
    return 0
