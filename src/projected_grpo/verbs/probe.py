"""The verbs of the hack basis, of a probe (extract -> verify -> none -> an arm), and of one gate."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from loguru import logger

from projected_grpo.arm_settings import Route2Settings, Signal
from projected_grpo.basis_file import HARD_GATE, SOFT_GATE, heldout_json
from projected_grpo.config import GraderConfig, ModelConfig, TrainConfig
from projected_grpo.deploy.trained import file_hash
from projected_grpo.engine.chat import Chat, open_chat
from projected_grpo.engine.models import Loaded, load_model
from projected_grpo.errors import GATE_FAILED, SIGNALLED, OneKind, UserError, goes_on
from projected_grpo.extract_vhack_grad import obtain, pair_grads, select, verify_vhack_heldout
from projected_grpo.options.typed import flags
from projected_grpo.options.verbs import (
    ExtractOptions,
    GateOptions,
    ProbeOptions,
    ScoredOn,
    VerifyOptions,
)
from projected_grpo.pairs import PairSet, chosen_pairs
from projected_grpo.pools import pool_digest
from projected_grpo.results.pictures import HELD_OUT
from projected_grpo.results.plots import heldout_histogram
from projected_grpo.runlog import command_line, read_json, write_json
from projected_grpo.score.directions import of_pairs
from projected_grpo.score.graded import Completion
from projected_grpo.score.measure import ADVMOD, NOT_MEASURED
from projected_grpo.score.report import SCHEMA, score
from projected_grpo.state import reach
from projected_grpo.sweep.gates import check_gate
from projected_grpo.sweep.jobs import Job, Launch, in_process, jobs_of, make, write_job
from projected_grpo.sweep.spec import Spec, SweepArm, SweepLimits, basis_options, expand, given_options
from projected_grpo.verbs.score import completions_of

SCORE = ".score.json"
HEARD_S = 1.0  # after which a process that still runs may not have heard Ctrl-C
STOPPED = (SIGNALLED + signal.SIGINT, SIGNALLED + signal.SIGTERM)


def loaded_of(options: ExtractOptions, verb: str) -> Loaded:
    """The model asked for. Raises UserError, with one to try where the default is meant and is not here."""
    try:
        return load_model(options.model)
    except UserError as error:
        if options.model.model != ModelConfig.model:
            raise
        tried = command_line(verb, "--model=nano", "--vhack-pairs-path=nano-sampled")
        raise UserError(
            f"{verb} is of {ModelConfig.model} unless --model names another, and that one is not here: `just "
            f"download-model` fetches it. To try {verb} on the packaged model: {tried}"
        ) from error


def extract_verb(options: ExtractOptions) -> int:
    """Extract the hack basis (or check the one that is there) and say what is in it."""
    pairs = chosen_pairs(options.basis)
    chat = open_chat(options.model, loaded=loaded_of(options, "extract"))
    extraction, path = obtain(chat, pairs, options.basis, options.loss, options.model.model, options.out_dir)
    basis = select(extraction.axes, options.basis.v_hack_k, options.basis.v_hack_drop_bottom_frac)
    axes = sum(len(V) for V in basis.V.values())
    dead = sum(not bool(D.any()) for D in extraction.axes.differences.values())
    print(
        f"{path}: {len(extraction.axes.V)} modules, {dead} with zero norm (must be 0); "
        f"in use: {axes} axes of {len(basis.V)} modules"
    )
    return 0


def verify_verb(options: VerifyOptions) -> int:
    """Do held-out pairs lie hack-ward of the basis (gate B), does it separate exploits (B2)? Exit 1 if not.

    B asks that over half of the cosines are above 0; B2, with --score, what `projected-grpo score` does.
    """
    pairs, loss, model = chosen_pairs(options.basis), options.loss, options.model.model
    if options.score == "none" and options.on != ScoredOn():
        raise UserError("completions are for gate B2: --score=gradient or --score=activation asks it")
    asks_b2 = options.score != "none"
    asked = completions_of(options.on, model, options.grader) if asks_b2 else None
    loaded = loaded_of(options, "verify")
    completions = asked(loaded) if asked else None  # prompts that are too long are refused before the SVD
    chat = open_chat(options.model, loaded=loaded)
    extraction, path = obtain(chat, pairs, options.basis, loss, model, options.out_dir)
    basis = select(extraction.axes, options.basis.v_hack_k, options.basis.v_hack_drop_bottom_frac)
    grads = pair_grads(chat, pairs.split()[1], loss, length_norm=options.basis.v_hack_length_norm)
    result = verify_vhack_heldout(basis, grads)
    made_from = {"basis": file_hash(path)}
    write_json(path.with_suffix(HELD_OUT), heldout_json(result) | made_from)
    picture = path.with_suffix(".heldout.png")
    heldout_histogram(result, f"{pairs.name} pairs, {model}", picture.with_suffix(""))
    print(
        f"{'PASS' if result.passed else 'FAIL'}: {result.fraction_positive:.3f} of {len(result.cosines)} "
        f"held-out cosines above 0 (must exceed {HARD_GATE:.2f}), mean {result.mean:+.3f}; "
        f"histogram in {picture}"
    )
    if result.mean < SOFT_GATE:
        logger.warning("mean held-out cosine is under {}: the basis generalises weakly", SOFT_GATE)
    if completions is None:
        return 0 if result.passed else GATE_FAILED
    found = scored(chat, pairs, completions(chat), options)
    write_json(path.with_suffix(SCORE), found | made_from)
    print(f"B2 {found['verdict']} ({options.score}): {'; '.join(found['reasons'])}")
    return 0 if result.passed and found["verdict"] != "fails" else GATE_FAILED


def scored(
    chat: Chat, pairs: PairSet, completions: list[Completion], options: VerifyOptions
) -> dict[str, Any]:
    """What gate B2 reads: the pairs' direction on completions, or why nothing could be measured."""
    basis, loss, on = options.basis, options.loss, options.on
    source = of_pairs(chat, pairs, pairs.name, basis, loss, ADVMOD)
    head = {"signal": options.score, **scored_on(on)}
    try:
        found = score(chat, completions, [source], basis, loss, on.nulls)
    except OneKind as error:
        return head | {"schema": SCHEMA, "verdict": NOT_MEASURED, "reasons": [str(error)]}
    kind = {"gradient": "gradient", "activation": "hidden"}[options.score]
    (own,) = (one for one in found["directions"].values() if one["kind"] == kind)
    return head | found | {"verdict": own["verdict"], "reasons": own["reasons"]}


def check(gate: str, files: Sequence[Path], reached: float = 0.0) -> bool:
    """Print what a gate says of these files; whether all of them pass. Raises UserError without files."""
    if not files:
        raise UserError(f"gate {gate}: no files to check")
    verdicts = check_gate(gate, files, reached)
    for verdict in verdicts:
        print(verdict.lines(), flush=True)
    return all(verdict.passed for verdict in verdicts)


def gate_verb(options: GateOptions) -> int:
    """Check one gate of a probe on its files, for a queue to stop behind. Exit 1 if it does not hold."""
    if (options.gate == "A2") != (options.reach is not None):
        raise UserError(
            "gate A2 needs --reach, the sum of the run's learning rates, and no other gate takes it"
        )
    return 0 if check(options.gate, options.files, options.reach or 0.0) else GATE_FAILED


def planned(options: ProbeOptions) -> tuple[Job, Job, TrainConfig]:
    """None and the arm as jobs of one folder, and the settings of the arm."""
    given = given_options(options.set) | ({"model": options.model} if options.model else {})
    arms = tuple(SweepArm(arm, {"intervention": arm}) for arm in ("none", options.arm))
    spec = Spec("probe", options.preset, options.out, arms, given, {"seed": (options.seed,)})
    baseline, arm = expand(spec)
    home = options.out / f"{options.preset}_{options.arm}_seed{options.seed}_{arm.id}"
    first, second = jobs_of((baseline, arm), home, SweepLimits())
    return first, second, arm.cfg


def extract_stage(cfg: TrainConfig, home: Path, *, in_process: bool) -> int:
    if in_process:
        return extract_verb(ExtractOptions(cfg.model, cfg.basis, cfg.loss, home))
    return verb_process("extract", cfg, home)


def b2_of(cfg: TrainConfig, options: ProbeOptions) -> tuple[Signal | Literal["none"], ScoredOn]:
    """What gate B2 has to judge for this arm, none where it follows no direction, and on what."""
    arm = cfg.arm
    signal = arm.scored_by or "gradient"
    blind = isinstance(arm, Route2Settings) and arm.gate_signal == "oracle"
    if blind or options.rollouts == 0:
        return "none", ScoredOn()
    on = ScoredOn(options.pool, options.rollouts, cfg.problems.problems, cfg.problems.env_mode)
    return signal, on if options.pool else replace(on, max_new=cfg.sampling.max_new)


def verify_stage(cfg: TrainConfig, home: Path, options: ProbeOptions) -> int:
    """Gates B and B2's measurements, on the problems and modes of the run."""
    signal, on = b2_of(cfg, options)
    own = cfg.run
    grader = GraderConfig(own.workers, own.sandbox, own.cpu_seconds, own.wall_seconds)
    if options.in_process:
        return verify_verb(VerifyOptions(cfg.model, cfg.basis, cfg.loss, home, signal, on, grader))
    given = {name: value for name, value in asdict(on).items() if value != getattr(ScoredOn, name)}
    given |= asdict(grader) | {"score": signal}
    return verb_process("verify", cfg, home, *flags(given))


def scored_on(on: ScoredOn) -> dict[str, Any]:
    """Which completions gate B2 is judged on, as JSON; of a pool with its hash."""
    asked: dict[str, Any] = json.loads(json.dumps(asdict(on), default=str))
    if on.pool is None or not on.pool.exists():
        return {"on": asked, "pool_digest": None}
    return {"on": asked, "pool_digest": pool_digest(on.pool) if on.pool.is_dir() else file_hash(on.pool)}


def measured(path: Path, basis: Path, **asked: Any) -> bool:
    """Whether a file of `verify` is there that was made from this basis and what is asked."""
    if not path.exists():
        return False
    found, wanted = read_json(path, "probe"), {"basis": file_hash(basis), **asked}
    return {name: found.get(name) for name in wanted} == wanted


def verb_process(verb: str, cfg: TrainConfig, home: Path, *asked: str) -> int:
    options = [*basis_options(cfg), f"--out-dir={home}", *asked]
    return attended([sys.executable, "-m", "projected_grpo.cli", verb, *options])


def attached(argv: Sequence[str], output: Path, held: int) -> int | None:
    """Train in a process that shares this terminal; None if a signal ended it."""
    code = attended([sys.executable, "-m", "projected_grpo.train", *argv], held)
    return code if 0 <= code < SIGNALLED else None


def attended(command: Sequence[str], *held: int) -> int:
    """The exit code of a process that shares this terminal, and so hears Ctrl-C itself: a run saves first."""
    process = subprocess.Popen(command, pass_fds=held)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(HEARD_S)
        except subprocess.TimeoutExpired:
            process.terminate()
        if process.wait() in STOPPED:  # which it has said
            sys.exit(SIGNALLED + signal.SIGINT)
        raise


def train_stage(job: Job, launch: Launch) -> bool:
    write_job(job)
    outcome = make(job, launch)
    if outcome.kind != "done":
        logger.error("{}: {} {}", job.name, outcome.kind, outcome.why)
    return outcome.kind == "done"


@goes_on()
def probe_verb(options: ProbeOptions) -> int:
    """Extract, verify, baseline, arm: one seed before any sweep. Exit 1 at the first gate that fails."""
    baseline, arm, cfg = planned(options)
    home, launch = Path(baseline.home), in_process if options.in_process else attached
    print(f"probe of {options.preset}, seed {options.seed}, in {home}", flush=True)
    basis = cfg.basis.v_hack_path
    bases = [basis] if basis else sorted((home / "vhack").glob("*.safetensors"))
    if not bases or not bases[0].exists():
        if extract_stage(cfg, home, in_process=options.in_process):
            return GATE_FAILED
        bases = [basis] if basis else sorted((home / "vhack").glob("*.safetensors"))
    if not check("A", bases) or not check("A2", bases, reach(cfg.optim)):
        return GATE_FAILED
    signal, on = b2_of(cfg, options)
    heldout, scores = ([path.with_suffix(suffix) for path in bases] for suffix in (HELD_OUT, SCORE))
    asked = signal != "none"
    if not all(measured(basis.with_suffix(HELD_OUT), basis) for basis in bases) or (
        asked
        and not all(
            measured(basis.with_suffix(SCORE), basis, signal=signal, **scored_on(on)) for basis in bases
        )
    ):
        code = verify_stage(cfg, home, options)
        if code not in (0, GATE_FAILED):
            return GATE_FAILED
    if not check("B", heldout) or (asked and not check("B2", scores)):
        return GATE_FAILED
    if not train_stage(baseline, launch) or not check("C", baseline.folders()):
        return GATE_FAILED
    if not train_stage(arm, launch) or not check("D", [*baseline.folders(), *arm.folders()]):
        return GATE_FAILED
    print(f"probe passed; its tables: {command_line('results', home / 'runs')}")
    return 0
