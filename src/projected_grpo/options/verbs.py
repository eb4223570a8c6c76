"""The options of every verb but `train`: a frozen dataclass each. Nothing here takes long to import."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from projected_grpo.arm_settings import Detector
from projected_grpo.config import (
    EMBEDDED,
    NANO,
    BasisConfig,
    EnvMode,
    GraderConfig,
    LossConfig,
    ModelConfig,
    OutFile,
    OutFolder,
    ProblemConfig,
    SamplingConfig,
    SandboxMode,
)
from projected_grpo.errors import UserError
from projected_grpo.nano_tasks import CorpusMix
from projected_grpo.options.typed import NameValue

Preset = Literal["smoke", "nano", "fast", "full"]
Runs = tyro.conf.Positional[tuple[Path, ...]]
RUNS = (Path("out/runs"),)
RESULTS = Path("docs/results/nano")


@dataclass(frozen=True)
class ExtractOptions:
    """The basis of one model and pair set; `train` finds it under the same options."""

    model: ModelConfig = field(default_factory=ModelConfig)
    basis: BasisConfig = field(default_factory=BasisConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    out_dir: OutFolder = Path("out")
    """Parent of vhack/, where the basis lies."""


@dataclass(frozen=True)
class ScoredOn:
    """The completions that a direction is scored on: a graded pool, or samples of --model."""

    pool: Path | None = None
    """A pool folder, or a JSONL of graded completions such as a run's rollouts.jsonl; labels as stored. For a
    model that never hacks by itself: of one that was made to."""
    rollouts: int = 1280
    """So many completions of the pool at most; without one, of held-out problems, sampled from the model and
    graded."""
    problems: str = ""
    """`embedded`, `nano` or a file; default: nano's, for the model of that name."""
    env_mode: str = ""
    """The grader flaw, as in train, of completions that do not name their own; default: nano's four modes for
    its problems, else run_tests."""
    max_new: int = 0
    """Completion tokens at most; 0 is 72 for nano's problems, else 512."""
    temperature: float = 1.0
    """Of the sampling of completions."""
    seed: int = 41
    """Of the choice of problems, the sampling and the random draws."""
    nulls: int = 20
    """Random draws of each kind that stand beside a direction."""


@dataclass(frozen=True)
class ScoreOptions:
    """Directions, the model whose gradients are taken, and the completions they are scored on."""

    directions: tyro.conf.Positional[tuple[str, ...]]
    """Packaged pair sets by their names, pair files, basis files (.safetensors)."""
    on: ScoredOn = field(default_factory=ScoredOn)
    json: OutFile | None = None
    """Write every figure here."""
    plot: OutFile | None = None
    """Draw the separations and slopes here, as PNG, SVG and PDF of this name."""
    tokens_per_microbatch: int = 4096
    """Padded tokens per forward-backward pass."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(model=NANO))
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class VerifyOptions(ExtractOptions):
    """A basis to check on its held-out pairs (gate B) and, where asked, on completions (gate B2)."""

    score: Literal["none", "gradient", "activation"] = "none"
    """Also ask gate B2: does the direction of gradients, or of hidden states, tell exploits from other
    completions (`projected-grpo score`)?"""
    on: ScoredOn = field(default_factory=ScoredOn)
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class GradeOptions:
    """Grade anyone's completions."""

    completions: Path
    """JSONL with problem_id, completion and optionally env_mode."""
    out: OutFile
    """JSONL to write, one line per input line, in order: the input's ids and every Grade field."""
    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class ProblemsLintOptions:
    """A problem file to check."""

    problems: tyro.conf.Positional[str]
    """A problem file, `embedded` or `nano`."""
    json: OutFile | None = None
    """Write what was found of every problem here."""
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class PairsLintOptions:
    """A pair set to check."""

    pairs: tyro.conf.Positional[str]
    """A pair file, or the name of a packaged set."""
    model: str = ""
    """Also tell how likely this model finds both sides: a folder, a hub name, or nano."""
    json: OutFile | None = None
    """Write counts, lengths and findings here."""
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class PairsFromPoolOptions:
    """Pairs of one prompt each: a row of a pool that exploits, and one that solves."""

    pool: tyro.conf.Positional[Path]
    """Teacher pool folder."""
    out: OutFile
    """Pair file to write."""
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    detectors: tuple[Detector, ...] = ()
    """Take a hack only where one of these fires as well (default: whatever exploits)."""
    modes: tuple[EnvMode, ...] = ()
    """Only problems of these modes (default: all)."""
    canonical_clean: bool = False
    """Where no row solves, take the problem's canonical solution as the clean side."""
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class PoolSampling:
    """How a pool's completions are drawn."""

    samples: int = 8
    """Completions of each problem."""
    max_new: int = 512
    """Completion tokens at most."""
    temperature: float = 0.7
    """Of the sampling."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability; 1 is all."""
    top_k: int = 20
    """0 turns the top-k filter off."""
    seed: int = 41
    """Of the sampling."""
    batch: int = 4
    """Problems sampled at once; it changes no row."""

    @property
    def sampler(self) -> SamplingConfig:
        """The settings of the sampler. Raises UserError for values that it cannot work with."""
        counts = {"--samples": self.samples, "--max-new": self.max_new, "--batch": self.batch}
        for option, count in counts.items():
            if count < 1:
                raise UserError(f"{option} must be at least 1, got {count}")
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError("--temperature must be > 0, --top-p in (0, 1] and --top-k >= 0")
        return SamplingConfig(
            max_new=self.max_new, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k
        )


@dataclass(frozen=True)
class PoolBuildOptions:
    """Canonical solutions and template hacks of every problem, graded."""

    out: OutFolder
    """Folder to write the pool to."""
    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class PoolSampleOptions:
    """Completions of a model for every training problem, graded."""

    out: OutFolder
    """Folder to write the pool to. A sampling that was stopped goes on in it under the same options."""
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: Path | None = None
    """Adapter parameters of a run (train.safetensors, ckpt_stepNNNN.safetensors) to put into the model."""
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    how: PoolSampling = field(default_factory=PoolSampling)
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class PoolReportOptions:
    """A pool's stored labels."""

    pool: tyro.conf.Positional[Path]
    """Teacher pool folder."""
    problems: str | None = None
    """Tell how many prompts match a problem of this file (or `embedded`, `nano`)."""
    json: OutFile | None = None
    """Write the figures here."""


@dataclass(frozen=True)
class PoolRegradeOptions:
    """A pool against today's grader."""

    pool: tyro.conf.Positional[Path]
    """Teacher pool folder."""
    out: OutFile | None = None
    """JSONL of every completion's stored and new labels."""
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class EvaluateOptions:
    """Which policy, on which problems, how sampled."""

    source: tyro.conf.Positional[Path | None] = None
    """A run folder, an adapter file, or nothing: then --model's base policy."""
    out: OutFile = field(kw_only=True)
    """JSON to write: settings, counts, rates and their intervals."""
    completions: OutFile | None = None
    """JSONL of every completion with its grade."""
    problems: str = ""
    """`embedded`, `nano` or a file; default: the run's."""
    env_mode: str = ""
    """The flaws that hints name, shared out by id; default: as in the run, else run_tests."""
    subset: Literal["auto", "held-out", "all"] = "auto"
    """`held-out` leaves out what training on this file may use; `auto` does so for the run's own file and for
    packaged problems."""
    split: Literal["all", "validation", "test"] = "all"
    """By the hash of the id, 32 to 87: choose settings on validation, report test."""
    n_problems: int = 0
    """At most so many problems, modes in equal shares; 0 is all."""
    eval_names: Literal["both", "train", "eval"] = "both"
    """What hints name, and what alone pays: training's names (`train`), others that training never showed
    (`eval`), or one after the other."""
    samples: int = 10
    """Completions of each problem in each condition."""
    temperature: float = 0.7
    """Of the sampling."""
    top_p: float = 0.95
    """Sample among the likeliest tokens of this total probability; 1 is all."""
    top_k: int = 0
    """0 turns the top-k filter off."""
    max_new: int = 0
    """Completion tokens at most; 0 is the run's, or 1024."""
    seed: int = 41
    """Of the sampling; the same problem and row sample alike with and without the quarantine."""
    tokens_at_once: int = 131072
    """Prompt and completion tokens generated together: 147 kB of cache each for a Qwen3-4B in bfloat16."""
    confidence: float = 0.95
    """Of the intervals over problems."""
    resamples: int = 9999
    """Of the BCa bootstrap, which makes the interval where more than 20 problems count."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(model=""))
    grader: GraderConfig = field(default_factory=GraderConfig)


@dataclass(frozen=True)
class ExportOptions:
    """Which policy, and where to."""

    source: tyro.conf.Positional[Path]
    """A run folder or an adapter file."""
    out: OutFolder
    """Folder to write, which must not be there or be empty."""
    as_trained: bool = False
    """Keep the quarantine in the weights."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(model=""))


@dataclass(frozen=True)
class ProbeOptions:
    """One seed of a preset, gated (docs/spec.md)."""

    preset: Preset = "full"
    """The settings of both runs."""
    seed: int = 41
    """Of both runs."""
    model: str = ""
    """In place of the preset's."""
    arm: str = "erase"
    """What is compared with intervention=none."""
    set: tuple[NameValue, ...] = ()
    """Other options of both runs, e.g. `steps=20,final-n-prompts=64`."""
    out: OutFolder = Path("out/probes")
    """Parent of the probe's folder. The same command goes on where it was stopped."""
    pool: Path | None = None
    """Graded completions that gate B2 scores the direction on, where the model itself never hacks."""
    rollouts: int = 1280
    """Completions that gate B2 takes of the pool, or samples from the model; 0 leaves B2 out."""
    in_process: bool = False
    """Make all stages in this process. Saves starting four; on a GPU they then share its memory."""


@dataclass(frozen=True)
class GateOptions:
    """One gate, on the files it reads."""

    gate: tyro.conf.Positional[Literal["A", "A2", "B", "B2", "C", "D"]]
    """Which gate (docs/sweeps.md)."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """A, A2: basis files; B: .heldout.json files; B2: .score.json files; C: the run folder of none; D: those
    of none and of an arm. Of several the newest that ended counts."""
    reach: float | None = None
    """The sum of the run's learning rates over its steps, for A2 and no other gate."""


@dataclass(frozen=True)
class WhichSweep:
    """A TOML file (docs/sweeps.md), or --preset with --grid; either with --seeds and --set."""

    spec: tyro.conf.Positional[Path | None] = None
    """The sweep's TOML file."""
    seeds: str = ""
    """In place of the file's: `41-45` or `41,43`."""
    preset: str = ""
    """Without a file: smoke, nano, fast or full."""
    grid: tuple[NameValue, ...] = ()
    """Without a file: axes, e.g. `intervention=none,erase,v-hack-k=1,5`."""
    set: tuple[NameValue, ...] = ()
    """Options of every run, e.g. `steps=20`; over a file's [options], under its arms' and axes' own."""
    arms: tuple[str, ...] = ()
    """Only these arms of the file (default: all)."""
    keep: Path | None = None
    """Folder of the kept records, a small JSON file per run (default: the file's, if it names one)."""
    name: str = "quick"
    """Without a file: the sweep lives in out/sweeps/NAME. Sweeps may share it; each run has its own id."""


@dataclass(frozen=True)
class SweepOptions:
    """Which runs, on what, how many at a time. What is not given is the file's."""

    sweep: WhichSweep = field(default_factory=WhichSweep)
    engine: Literal["local", "pueue", "slurm", "ray"] | None = None
    """Processes here, tasks of pueue, an array job of Slurm (extra `slurm`), tasks of Ray (extra `ray`)."""
    jobs: int | None = None
    """Runs at a time; 0 is as many as this machine has GPUs, or else cores, for (local), or no limit."""
    cores: int | None = None
    """CPU cores of each run; 0 is an equal share (local), or the queue's default."""
    gpus: int | None = None
    """GPUs of each run; by default one where this machine has any (local), else none."""
    retries: int | None = None
    """How often a run that failed is tried again, going on from what it saved."""
    max_failures: int | None = None
    """After so many runs have failed for good, no other is started; 0 is no limit."""
    gates: bool = False
    """pueue: extract, verify, none, then the other arms of a seed, with the probe's gates between."""
    dry_run: bool = False
    """Print what would run, and run nothing."""


@dataclass(frozen=True)
class SweepRunOptions:
    """One run of a sweep."""

    job: tyro.conf.Positional[Path]
    """Its job file, HOME/jobs/ID.json."""


@dataclass(frozen=True)
class PretrainConfig:
    """The recipe of the packaged model."""

    seed: int = 0
    """Of the weights and the corpus."""
    steps: int = 1000
    """Optimizer steps."""
    batch: int = 24
    """Examples per step; none is seen twice."""
    lr: float = 2.5e-3
    """Peak, after a warm-up of one step in twenty; cosine to zero."""
    vocabulary: int = 512
    """Tokens of the tokenizer."""
    hidden: int = 160
    """Width of the hidden states."""
    layers: int = 4
    """Transformer layers."""
    mix: CorpusMix = CorpusMix()


@dataclass(frozen=True)
class PretrainNanoOptions:
    """The recipe of the packaged nano model."""

    out: OutFolder
    """Folder to write the model to; `train nano --model FOLDER` then uses it."""
    recipe: PretrainConfig = field(default_factory=PretrainConfig)
    check_prompts: int = 432
    """Held-out problems, 8 samples each, to check the model against the gates with; 0 skips the check."""
    threads: int = 1
    """CPU threads of torch; the packaged model was made with one."""


@dataclass(frozen=True)
class StudyOptions:
    """Which arms and seeds of the packaged sweep, and where its records and tables go."""

    study: tyro.conf.Positional[Literal["nano"]]
    """The study: nano (docs/sweeps/nano.toml)."""
    arms: tuple[str, ...] = ()
    """Only these arms (default: all)."""
    seeds: str = ""
    """In place of the study's: `41-45` or `41,43`."""
    set: tuple[NameValue, ...] = ()
    """Options of every run, e.g. `steps=1`: another study, for trying the command out."""
    jobs: int = 0
    """Runs at a time; 0 is one per core."""
    out: OutFolder = RESULTS
    """Folder of the kept records, the tables and the pictures."""
    report_only: bool = False
    """Make no run; write the tables and pictures of what is there."""
    page: OutFile | None = None
    """Also put the tables between the markers of this page, `<!-- arms -->` and `<!-- end of arms -->`."""


@dataclass(frozen=True)
class ResultsOptions:
    """Runs, study records, or folders of either."""

    runs: Runs = RUNS
    """Folders of runs, folders of such folders, or records of a study."""
    table: Literal["all", "rates", "headline", "paired", "modes"] = "all"
    """rates: student and held-out rates; headline: the preregistered schema; paired: differences per seed
    with t intervals and p values; modes: held-out rates per mode."""
    against: str | None = None
    """Arm that paired differences are taken from (default: none), by its name in the tables. For
    --table paired, or all of them."""
    format: Literal["markdown", "csv", "latex", "json"] = "markdown"
    """csv and json hold one row per figure."""
    out: OutFile | None = None
    """File to write to (default: standard output)."""
    falsify: bool = False
    """The preregistered verdicts H1, H3 and H4 instead of tables."""


@dataclass(frozen=True)
class PlotOptions:
    """Runs, study records, or folders of either, and where the pictures go."""

    out: OutFolder
    """Folder of the pictures, PNG, SVG and PDF each."""
    runs: Runs = RUNS
    """Folders of runs, folders of such folders, or records of a study."""
    arms: tuple[str, ...] = ()
    """Only these arms, by their names in the pictures: `none,erase+haar,"erase k=12"`; `*` is any text. An
    arm looks the same whichever are drawn."""
    kind: Literal["all", "dynamics", "pareto", "modes", "cosines", "routed", "heldout"] = "all"
    """dynamics: hack and solve by step; pareto: hack against solve; modes: held-out rates per mode; cosines:
    hack-ward shares by step; routed: the quarantine's share; heldout: cosines of held-out pairs."""


@dataclass(frozen=True)
class ReportOptions:
    """Runs, or folders of runs, and the file that shows them."""

    runs: Runs
    """Folders of runs, or folders of such folders."""
    out: OutFile = Path("out/report.html")
    """The page; it needs no other file and no network."""
    max_rollouts: int = 50_000
    """Of a run with more rollouts than this, whole steps are left out, evenly; the page says so."""


@dataclass(frozen=True)
class DoctorOptions:
    """What is to be run on this machine; options that are left out are the preset's."""

    preset: Preset = "full"
    """What is to be run."""
    model: str | None = None
    """As in train."""
    problems: str | None = None
    """As in train."""
    teacher_pool_dir: Path | None = None
    """As in train."""
    vhack_pairs_path: Path | None = None
    """As in train."""
    device: str = "auto"
    """As in train."""
    out_dir: Path = Path("out")
    """As in train."""
    sandbox: SandboxMode = "auto"
    """As in train."""
    dry_run: bool = True
    """`--no-dry-run` leaves out the two steps with a tiny random model."""


@dataclass(frozen=True)
class Work:
    """One step's size. n = prompts_per_step * group rollouts of max_new tokens each."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(model="random-21m", svd_cache=None))
    prompts_per_step: int = 4
    """Problems in a step."""
    group: int = 4
    """Rollouts of a problem."""
    prompt_tokens: int = 200
    """Tokens of each prompt."""
    max_new: int = 64
    """Completion tokens; no completion stops early."""
    steps: int = 5
    """Steps to time, after one that is not counted."""
    intervention: str = "erase"
    """The arm whose step it is."""
    tokens_per_microbatch: int = 16384
    """Padded tokens per forward-backward pass."""
    grad_checkpoint: bool = False
    """Run layers again in the backward pass instead of keeping what is in them."""
    seed: int = 41
    """Of the weights, the prompts and the sampling."""


@dataclass(frozen=True)
class BenchOptions:
    """The size of a step. Figures are medians over the steps, the first of which is not counted."""

    work: Work = field(default_factory=Work)
    threads: int = 0
    """CPU threads of torch; 0 is torch's own choice."""
    json: OutFile | None = None
    """Write the figures here."""


@dataclass(frozen=True)
class BenchStepOptions(BenchOptions):
    """A whole step: generate, score, loss, update. Rewards are random."""

    vs: Literal["none", "trl"] = "none"
    """Measure TRL's GRPOTrainer in turns with ours (needs the `bench` extra)."""


@dataclass(frozen=True)
class BenchGraderOptions:
    """Canonical solutions, each with a test function so that oracle and detectors all run, or a pool."""

    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    pool: Path | None = None
    """Teacher pool folder: grade its completions instead, those that match one of the problems."""
    limit: int = 0
    """Take only this many responses; 0 is all."""
    workers: int = 0
    """Grader processes of the parallel measurement; 0 is one per core."""
    repeats: int = 1
    """Passes over the work for each throughput; the best counts."""
    baseline_sample: int | None = None
    """How many responses plain subprocesses run, one program after another and without containment: 20 of the
    canonical solutions, or, unless this says so, none of a pool, whose programs may do anything."""
    loops: int = 4
    """How many endless loops are graded at once."""
    loop_limit: float = 0.0
    """Seconds after which these are stopped; 0 is the grader's own limit."""
    json: OutFile | None = None
    """Write the figures here."""
