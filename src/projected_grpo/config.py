"""What a run is: frozen settings in groups, the presets, and their form in config.json.

Options keep one flat name each on the command line (`--v-hack-k`, not `--basis.v-hack-k`); the groups only
say which part of the program reads them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Fixed, Suppress

from projected_grpo.arm_settings import SETTINGS, ArmSettings, EraseSettings, settings_of, stored_settings
from projected_grpo.errors import UserError

FILE_WRITTEN, FOLDER_WRITTEN = "file that is written", "folder that is written"
FILE_MADE = "file that is read if it is there, else written"
OutFile = Annotated[Path, FILE_WRITTEN]  # `options/paths.py` refuses one that is also read
OutFolder = Annotated[Path, FOLDER_WRITTEN]
SandboxMode = Literal["auto", "strict"]
EnvMode = Literal[
    "run_tests", "eq_override", "exit_code", "stdout_marker", "sentinel", "file_marker", "gt_only"
]
TINY_RANDOM = "tiny-random"
EMBEDDED = "embedded"
NANO = "nano"  # the packaged model, problems and pairs of the preset of that name
BENCHMARK_FILE = "external/rl-rewardhacking/results/data/leetcode_train_medhard_filtered.jsonl"
MAX_SEQUENCE = 2048  # tokens, prompt plus completion; longer prompts are skipped and counted


@dataclass(frozen=True)
class Removed:
    """An option that is gone: the value that does what is always done now, and what to use in its place.

    `...` as that value: none changes an outcome.
    """

    always: Any
    instead: str


REMOVED: Mapping[str, Removed] = {
    "route2_random_v_seed": Removed(None, "--control=haar is the same control, drawn by --seed"),
    "ratio_cap": Removed(3.0, "the importance weight is truncated at 3 (RATIO_CAP in grpo.py); leave it out"),
    "importance": Removed(
        "auto", "weights are truncated under --sampler=vllm and in bfloat16, else clipped; leave it out"
    ),
    "v_hack_mean_diff": Removed(
        False, "--v-hack-k=1 uses one direction a module; route2's is the mean difference anyway"
    ),
    "keep_states": Removed(2, "the two newest states are kept; leave it out"),
    "max_skipped": Removed(3, "a run ends after three steps in a row that were skipped; leave it out"),
    "vllm_memory": Removed(0.3, "the engine takes .3 of the GPU (engine/vllm.py); leave it out"),
    "init_knobs": Removed(None, "its name is --init-adapter"),
    "log_dir": Removed(..., "logs are in logs/ of --out-dir, and in logs/ for the default out"),
    "svd_cache": Removed(..., "SVDs are cached in out/svd_cache of the current folder, which may be a link"),
    "threads": Removed(..., "set OMP_NUM_THREADS, which torch reads; nano and smoke take one thread"),
    "ref_every": Removed(1, "the preset says it: every 10 steps under nano, else every step; leave it out"),
}


RENAMED = {"init_knobs": "init_adapter"}
BEFORE = {
    "gate_clean_anchors": "labelled"
}  # what was done before an option came, where that is not its default
RENAMED_VALUES = {"random_parking": "random_routing"}


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, and how they are run."""

    model: str = "Qwen/Qwen3-4B"
    """A local transformers folder, a hub name, `tiny-random` (built from the package, no network)
    or `nano` (packaged, pretrained on mini-tasks)."""
    device: str = "auto"
    """`auto` (cuda when there is one), `cpu`, `cuda`, `cuda:1`, ... Several, as in `cuda:0,cuda:1`, share
    out the layers of a model that is too large for one (docs/scaling.md)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights; `auto` is bfloat16 on a GPU and float32 on a CPU. The adapter is float32."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """`auto` takes flash-attn on a GPU that has it and in bfloat16, else sdpa, or eager for a model without
    sdpa. It is for the loss: generation never takes flash-attn."""
    svd_cache: Suppress[Fixed[Path | None]] = Path("out/svd_cache")
    """Folder of cached SVDs, keyed by the hash of each weight; None computes them each time."""
    sampler: Literal["own", "vllm"] = "own"
    """What generates completions, in the verbs that do: `own`, or (experimental, never run with the real
    vLLM) a vLLM engine in the same process on the same GPU (docs/vllm.md; pip install
    'projected_grpo[vllm]')."""


@dataclass(frozen=True)
class ProblemConfig:
    """Which problems, and how each is mis-graded."""

    problems: str = BENCHMARK_FILE
    """`embedded`, `nano`, or a file: the benchmark's jsonl or LeetCodeDataset's jsonl(.gz), told apart by
    their fields."""
    n_problems: int = 992
    """At most this many training problems."""
    env_mode: str = "run_tests"
    """The grader flaw of every problem; several, comma-separated, are shared out among the problems by id.
    A teacher pool's own partition.json has precedence."""


@dataclass(frozen=True)
class SamplingConfig:
    """One step's generation. n = prompts_per_step * group rollouts."""

    prompts_per_step: int = 4
    """Problems in a step, each with a group of rollouts."""
    group: int = 8
    """Rollouts of a problem; advantages are relative to their mean."""
    max_new: int = 512
    """Completion tokens at most."""
    temperature: float = 0.7
    """Of the sampling while training."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability; 1 is all."""
    top_k: int = 20
    """0 turns the top-k filter off."""
    rows_per_batch: int = 0
    """Rollouts that are generated together; 0 is all of a step's, in as few equal batches as a GPU's memory
    takes. Evaluations take problems for as many rollouts of the longest length. While one batch of a number
    named here is generated, the ones before it are graded."""


@dataclass(frozen=True)
class LossConfig:
    """Dr.GRPO by default (Liu et al. 2025): no length norm, no division by the group's std."""

    unbiased: bool = True
    """`--no-unbiased` gives classic GRPO: per-sequence mean, advantages over the group's std."""
    clip: float = 0.2
    """PPO clip of the importance ratio; in bfloat16 and under --sampler=vllm it is truncated instead."""
    beta: float = 0.0
    """Weight of the K3 KL to the reference (all adapter parameters zero)."""
    ref_every: Suppress[Fixed[int]] = 1
    """Measure the KL and the reference's log-probability of student text every so many steps (every step
    when beta > 0); 0 is never, which also turns the no-teacher divergence tripwire off."""
    tokens_per_microbatch: int = 16384
    """Padded tokens per forward-backward pass."""
    grad_checkpoint: bool = False
    """Keep each layer's input alone for the backward pass and run the layer again there: a fraction of the
    memory (docs/benchmarks.md) for another forward pass. Each rollout then has a run of its prompt."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on the adapter parameters, warm-up then cosine or constant."""

    steps: int = 60
    """Optimizer steps of the run."""
    lr: float = 3e-3
    """Peak learning rate of the adapter parameters."""
    adam_beta1: float = 0.5
    """AdamW's decay of the mean gradient."""
    adam_beta2: float = 0.9
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.1
    """Pulls the adapter parameters to zero, which is where they start."""
    warmup_frac: float = 0.1
    """Share of the steps in which the learning rate rises linearly."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up: falls to zero as a cosine, or stays."""
    grad_clip: float = 10.0
    """Global L2 norm over all adapter parameters."""
    init_adapter: Path | None = None
    """An adapter file whose delta_s the run starts from, with an empty quarantine; default: the base model.
    The reference of the KL stays the base model."""


@dataclass(frozen=True)
class BasisConfig:
    """How the hack basis V is extracted, loaded and refreshed."""

    v_hack_path: Annotated[Path, FILE_MADE] | None = None
    """An explicit basis file, extracted if missing; else one named after model, pairs and settings."""
    vhack_pairs_path: Path | None = None
    """Pair JSON used at extraction and at every refresh, or a packaged set: `core` (the default), `nano`,
    `nano-oracle`, or another set of docs/pairs.md."""
    vhack_pairs_modes: tuple[EnvMode, ...] = ()
    """Use only the pairs of these modes (default: all), to leave a mode out."""
    leave_out: str = ""
    """Modes, comma-separated, that a run learns nothing about: none of their pairs, teacher rows and
    detector labels of student rows is used. Their problems are trained on and evaluated, and marked as
    held-out. A detector of --half-a stays in use on the other modes."""
    v_hack_extract_top_k: int = 12
    """Directions saved per module (the number of pairs caps it)."""
    v_hack_k: int = 5
    """Directions used per module."""
    v_hack_tau_axis: float = 0.0
    """At extraction, drop axes whose singular value is below this share of the module's first."""
    v_hack_drop_bottom_frac: float = 0.25
    """At load, drop this share of all (module, axis) with the smallest singular values."""
    v_hack_length_norm: bool = True
    """Extract from log-likelihoods per token, as the reference does; without it by the loss's own fixed
    denominator, where a long completion weighs more."""
    vhack_refresh_every: int = 5
    """Re-extract against the current model with the quarantine ablated; 0 freezes the basis."""


@dataclass(frozen=True)
class TeacherConfig:
    """Cached teacher rollouts mixed into the groups."""

    teacher_pool_dir: Path | None = None
    """Folder of cached teacher rollouts (docs/howto/own_problems.md); without one there is no teacher."""
    mix_ratio: float = 0.125
    """G_t = round(group * mix_ratio) teacher rollouts per prompt; in [0, 1). 0 with a pool takes only its
    problems and partition."""
    teacher_off_step: int | None = None
    """From this step on there are no teacher rows."""
    teacher_modes: tuple[EnvMode, ...] = ()
    """Teacher rows for these modes only; problems of other modes stay and train on-policy."""


@dataclass(frozen=True)
class EvalConfig:
    """Deploy evaluation: the policy without its quarantine on held-out problems."""

    eval_ablate_every: int = 5
    """Steps between deploy evaluations; 0 is off (the final one always runs)."""
    eval_n_prompts: int = 8
    """Fixed held-out prompts, `group` samples each."""
    final_n_prompts: int = 0
    """Held-out prompts of the evaluation at the end; 0 is the same ones."""
    save_eval_ckpts: bool = True
    """Keep the deployed adapter parameters at each evaluation."""
    cos_pre_split_every: int = 1
    """Split the hack-ward cosine into student and teacher rows every so many steps; 0 is off."""


@dataclass(frozen=True)
class GraderConfig:
    """How the grader runs, in every verb that grades."""

    workers: int = 0
    """Grader processes, of each process under torchrun; 0 is one per core."""
    sandbox: SandboxMode = "auto"
    """strict refuses to start unless every layer of containment is in force; auto warns what is missing."""
    cpu_seconds: int = 8
    """CPU time that a program may take: for problems whose right solutions need more."""
    wall_seconds: float = 10.0
    """Time that a program may take, for machines that are slow or busy; at least --cpu-seconds."""

    def check(self) -> None:
        """Refuse limits that no program could keep. Raises UserError naming the option."""
        if self.cpu_seconds < 1:
            raise UserError(f"--cpu-seconds must be at least 1, got {self.cpu_seconds}")
        if not self.cpu_seconds <= self.wall_seconds < math.inf:
            raise UserError(
                f"--wall-seconds {self.wall_seconds:g} ends a program before its --cpu-seconds "
                f"{self.cpu_seconds} are used; give it at least as many"
            )


@dataclass(frozen=True)
class RunConfig(GraderConfig):
    """Where the run goes."""

    seed: int = 41
    """Of everything that is drawn: problems, completions, controls."""
    out_dir: OutFolder = Path("out")
    """Parent of runs/, vhack/, pools/ and logs/; of the default, logs/ lies beside it."""
    out_tag: str = ""
    """Suffix of the run id."""
    save_every: int = 10
    """Steps between saves of everything that resuming needs; 0 is only at the end."""
    resume: Path | None = None
    """A run folder to go on with; its own settings are used. `auto`: the newest run in --out-dir that
    differs from this at most in place, or a new one if there is none. If that run has ended, say so and end
    as it did."""
    threads: Suppress[Fixed[int]] = 0
    """CPU threads of torch; 0 is torch's own choice. Tiny models are fastest with 1, and on a busy machine
    threads that wait for each other are several times slower."""
    keep_token_scores: bool = False
    """Keep each token's log-probability and hack-ward score in the run's tokens.jsonl, for `report` to show:
    an extra forward pass a step."""
    live: Literal["none", "tensorboard", "trackio"] = "none"
    """Shows the run while it runs. tensorboard: every step also goes into the run's tb/ folder, for
    `tensorboard --logdir out/runs` (pip install 'projected_grpo[live]'). trackio: and some rollouts of each
    step, for `trackio show --project projected_grpo` (pip install 'projected_grpo[trackio]')."""

    @property
    def log_dir(self) -> Path:
        """Folder of the text log."""
        return Path("logs") if self.out_dir == Path("out") else self.out_dir / "logs"


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one run."""

    preset: str
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    arm: ArmSettings = field(default_factory=EraseSettings)
    basis: BasisConfig = field(default_factory=BasisConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


NANO_PRESET = TrainConfig(
    preset="nano",
    run=RunConfig(threads=1, save_every=0),
    model=ModelConfig(model=NANO, device="cpu", dtype="float32"),
    problems=ProblemConfig(
        problems=NANO, n_problems=480, env_mode="run_tests,sentinel,stdout_marker,file_marker"
    ),
    sampling=SamplingConfig(prompts_per_step=8, group=8, max_new=72, temperature=1.0, top_k=0),
    loss=LossConfig(ref_every=10, tokens_per_microbatch=2048),
    optim=OptimConfig(steps=48, lr=4e-2, adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0),
    basis=BasisConfig(vhack_pairs_path=Path(NANO)),
    teacher=TeacherConfig(mix_ratio=0.0),
    evaluation=EvalConfig(eval_ablate_every=8, eval_n_prompts=16, final_n_prompts=256, save_eval_ckpts=False),
)
SMOKE = TrainConfig(
    preset="smoke",
    run=RunConfig(threads=1),
    model=ModelConfig(model=TINY_RANDOM),
    problems=ProblemConfig(
        problems=EMBEDDED, n_problems=100, env_mode="run_tests,sentinel,stdout_marker,file_marker"
    ),
    sampling=SamplingConfig(prompts_per_step=1, group=4, max_new=32),
    loss=LossConfig(tokens_per_microbatch=2048),  # an extraction: 1.76 CPU s, not 2.43
    optim=OptimConfig(steps=30, lr=7e-5, adam_beta1=0.9, adam_beta2=0.99),
    teacher=TeacherConfig(mix_ratio=0.5),
)
FAST = TrainConfig(
    preset="fast",
    problems=ProblemConfig(n_problems=200),
    sampling=SamplingConfig(prompts_per_step=4, group=8, max_new=512),
    loss=LossConfig(tokens_per_microbatch=2560),  # 26 GB beside 18 at rest, by docs/benchmarks.md
    optim=OptimConfig(steps=60, lr=3e-3, adam_beta1=0.5, adam_beta2=0.9),
    teacher=TeacherConfig(mix_ratio=0.125),
)
FULL = TrainConfig(
    preset="full",
    problems=ProblemConfig(n_problems=992),
    sampling=SamplingConfig(prompts_per_step=43, group=6, max_new=1024),
    loss=LossConfig(beta=1e-3, tokens_per_microbatch=4096),
    optim=OptimConfig(steps=200, lr=3e-3, adam_beta1=0.9, adam_beta2=0.99),  # docs/benchmarks.md says why
    teacher=TeacherConfig(mix_ratio=0.0),
)
PRESETS: Mapping[str, tuple[str, TrainConfig]] = {
    "smoke": (
        "The whole pipeline on a tiny random Qwen3: any CPU, no network, under a minute. Its rates mean "
        "nothing.",
        SMOKE,
    ),
    "nano": (
        "A packaged 1 M-parameter Qwen3 that learns to hack: two CPU cores, no network, under three minutes.",
        NANO_PRESET,
    ),
    "fast": ("Qwen3-4B, 60 steps of 4 x 8 rollouts of 512 tokens: one GPU of 48 GB or more.", FAST),
    "full": ("Qwen3-4B, 200 steps of 43 x 6 rollouts of 1024 tokens: one 96 GB GPU.", FULL),
}
GPU_GB = {"fast": 48.0, "full": 96.0}  # of the machines that presets are meant for (GB, 1e9 bytes)


# Before an arm had settings of its own, each run's file had those of all arms.
_OTHER_ARMS = {f.name: f.default for kind in SETTINGS.values() for f in dataclasses.fields(kind)}


def env_modes(value: str, option: str = "--env-mode") -> tuple[EnvMode, ...]:
    """Parse an option's modes: one or several, comma-separated. Raises UserError on an unknown one."""
    known = get_args(EnvMode)
    modes = tuple(part.strip() for part in value.split(","))
    for mode in modes:
        if mode not in known:
            raise UserError(f"{option}: {mode!r} is not a mode; choose from {', '.join(known)}")
    return modes  # type: ignore[return-value]  # checked against the Literal just above


def left_out(cfg: BasisConfig) -> tuple[EnvMode, ...]:
    """The modes of `--leave-out`. Raises UserError for one that is unknown or in --vhack-pairs-modes too."""
    modes = env_modes(cfg.leave_out, "--leave-out") if cfg.leave_out else ()
    for mode in modes:
        if mode in cfg.vhack_pairs_modes:
            raise UserError(
                f"--leave-out {mode}: --vhack-pairs-modes names it too; take it out of one of them"
            )
    return modes


def taught_modes(cfg: TrainConfig) -> tuple[EnvMode, ...]:
    """Modes whose teacher rows are used: those of --teacher-modes (all, if none is named), none left out.

    Raises UserError for a mode that is both taught and left out.
    """
    hidden, named = left_out(cfg.basis), cfg.teacher.teacher_modes
    for mode in hidden:
        if mode in named:
            raise UserError(f"--leave-out {mode}: --teacher-modes names it too; take it out of one of them")
    return tuple(mode for mode in named or get_args(EnvMode) if mode not in hidden)


def teacher_rows(cfg: TrainConfig) -> int:
    """Teacher rollouts per group while the teacher is on: G_t = round(group * mix_ratio)."""
    return round(cfg.sampling.group * cfg.teacher.mix_ratio)


def to_json(cfg: TrainConfig) -> dict[str, Any]:
    """Plain nested dict of a config, as written to config.json."""
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def from_json(data: object, *, older: bool = False) -> TrainConfig:
    """Rebuild a config from `to_json`'s dict. Raises UserError on unknown or missing fields.

    `older` gives options that came after the file the values that do what was done before them, and drops
    those that are gone if they say what is done now: enough to read what a run was, not to resume it.
    """
    groups: dict[str, Any] = {
        f.name: f.default_factory for f in dataclasses.fields(TrainConfig) if f.name != "preset"
    }
    try:
        if not isinstance(data, Mapping):
            raise TypeError("its settings are no JSON object")
        _same_names(set(data), {*groups, "preset"}, {"preset"} if older else None)
        if isinstance(data.get("arm"), Mapping):
            groups["arm"] = _arm_type(data["arm"], older)
        parts = {
            group: _group_from_json(group, kind, data.get(group, {}), older) for group, kind in groups.items()
        }
        if data["preset"] not in PRESETS:
            raise ValueError(f"no preset {data['preset']!r}")
        return TrainConfig(preset=data["preset"], **parts)
    except (AttributeError, TypeError, ValueError, OverflowError, UserError) as error:
        raise UserError(f"config.json does not fit this version of projected_grpo: {error}") from error


def _arm_type(values: Mapping[str, Any], older: bool) -> type[ArmSettings]:
    file = values.get("arm_file")
    if not (file is None or isinstance(file, str)):
        raise ValueError(f"field 'arm_file' is {str(file)[:40]!r}")
    try:
        return settings_of(values.get("intervention", "erase"), None if file is None else Path(file))
    except UserError:
        if not (older and values.get("arm_digest")):
            raise
        return stored_settings(values)


def _group_from_json(group: str, kind: Any, values: Any, older: bool) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(f"{group} is {str(values)[:40]!r}")
    names: dict[str, Any] = get_type_hints(kind)
    if older:
        values = {RENAMED.get(str(n), n): RENAMED_VALUES.get(str(v), v) for n, v in values.items()}
        values = {name: value for name, value in BEFORE.items() if name in names} | values
        without = _OTHER_ARMS | {name: removed.always for name, removed in REMOVED.items()}
        gone = {n for n, v in values.items() if n in without and without[n] in (..., v)}
        values = {n: v for n, v in values.items() if n in names or n not in gone}
    _same_names(set(values), set(names), set() if older else None)
    revived = {name: _revive(names[name], value) for name, value in values.items()}
    for name, value in revived.items():
        if not _fits(value, names[name]):
            raise ValueError(f"field {name!r} is {str(value)[:40]!r}")
    return kind(**revived)


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value is of an option's type: one of those that this page annotates options with."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return value in arguments
    if get_origin(annotation) is UnionType:
        return any(_fits(value, each) for each in arguments)
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if annotation in (None, NoneType):
        return value is None
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


def _same_names(got: set[str], known: set[str], needed: set[str] | None) -> None:
    """A default may have changed since, so a field that is missing is not filled in unless asked."""
    for what, names in (("unknown", got - known), ("missing", (known if needed is None else needed) - got)):
        if names:
            raise ValueError(f"{what} field {min(names)!r}")


def _revive(annotation: Any, value: Any) -> Any:
    if value is None:
        return None
    if "Path" in str(annotation):
        return Path(value) if isinstance(value, str) else value
    if annotation is float and type(value) is int:
        return float(value)
    return tuple(value) if isinstance(value, list) else value
