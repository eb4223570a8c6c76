"""The pre-flight of a new box: what a preset needs, whether it is there, and what to do where it is not."""

import importlib.util
import io
import platform
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from projected_grpo import train
from projected_grpo.antipasto import TARGETS
from projected_grpo.checks import validate
from projected_grpo.config import GPU_GB, MAX_SEQUENCE, NANO, PRESETS, TINY_RANDOM, TrainConfig
from projected_grpo.engine.cost import gb
from projected_grpo.engine.model_files import absent_files, damage, weight_files, weight_names
from projected_grpo.engine.models import PACKAGED, encode_chat, load_tokenizer, positions
from projected_grpo.engine.placement import FLASH_ATTN, pick_devices, refuse_cpu
from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.experiment import expected_of
from projected_grpo.options.verbs import DoctorOptions
from projected_grpo.pairs import chosen_pairs
from projected_grpo.pools import join, load_pool
from projected_grpo.problems import Problem, load_problems, shortcomings
from projected_grpo.runlog import start_logging
from projected_grpo.sandbox.host import Sandbox

Status = Literal["OK", "WARN", "FAIL"]
PACKAGES = {"torch": (2, 6), "transformers": (5, 0)}  # the oldest that do, as in pyproject.toml
WHOLE = "a whole folder, as save_pretrained writes it"
NAMES = "a Qwen3, Qwen2, Llama or Qwen3.5 style model (docs/howto/own_model.md)"
DRY_RUN = (
    *("smoke", "--steps=2", "--intervention=route2", "--n-problems=6", "--eval-n-prompts=1", "--max-new=8"),
    *("--eval-ablate-every=2", "--vhack-refresh-every=1", "--workers=1"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. FAIL: the preset cannot start. WARN: it can, but not as it is meant to."""

    status: Status
    name: str
    text: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.status:<4} {self.name:<10} {self.text}" + (f" | fix: {self.fix}" if self.fix else "")


def settings_of(options: DoctorOptions) -> TrainConfig:
    cfg = PRESETS[options.preset][1]
    return replace(
        cfg,
        run=replace(cfg.run, out_dir=options.out_dir, sandbox=options.sandbox),
        model=replace(cfg.model, model=options.model or cfg.model.model, device=options.device),
        problems=replace(cfg.problems, problems=options.problems or cfg.problems.problems),
        teacher=replace(cfg.teacher, teacher_pool_dir=options.teacher_pool_dir),
        basis=replace(cfg.basis, vhack_pairs_path=options.vhack_pairs_path or cfg.basis.vhack_pairs_path),
    )


def check_software(cfg: TrainConfig) -> Finding:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    old = [name for name, least in PACKAGES.items() if release(found[name]) < least]
    text = f"Python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in found.items())
    return Finding(
        "FAIL" if old else "OK", "software", text, f"pip install -U {' '.join(old)}" if old else ""
    )


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as 2.13.0+cpu."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_device(cfg: TrainConfig) -> Finding:
    """A GPU where the preset is meant for one (or several), and that nobody else fills its memory."""
    devices = pick_devices(cfg.model.device)
    gpus = [device for device in devices if device.type == "cuda"]
    wanted = GPU_GB.get(cfg.preset) if cfg.model.model not in (TINY_RANDOM, NANO) else None
    if not gpus:
        if wanted is not None:
            fix = f"a machine with a GPU of {wanted:.0f} GB, or a small --model"
            return Finding("FAIL", "device", f"no GPU, which {cfg.preset} was made for", fix)
        try:
            refuse_cpu(cfg.preset, cfg.model.device)
        except UserError as error:
            return Finding("FAIL", "device", str(error), "--device=cpu is enough for this model")
        return Finding("OK", "device", f"{', '.join(map(str, devices))}, which is enough for this model")
    rooms = [tuple(amount / 1e9 for amount in torch.cuda.mem_get_info(gpu)) for gpu in gpus]
    text = "; ".join(
        f"{torch.cuda.get_device_name(gpu)}, {free:.1f} of {total:.1f} GB free"
        for gpu, (free, total) in zip(gpus, rooms, strict=True)
    )
    if any(free < 0.9 * total for free, total in rooms):
        return Finding("WARN", "device", text, "end what else uses it: see nvidia-smi")
    if wanted is not None and sum(free for free, _ in rooms) < 0.95 * wanted:
        fix = f"{cfg.preset} is meant for {wanted:.0f} GB; lower --tokens-per-microbatch"
        return Finding("WARN", "device", text, fix)
    return Finding("OK", "device", text)


def check_attention(cfg: TrainConfig) -> Finding:
    if any(device.type != "cuda" for device in pick_devices(cfg.model.device)):
        return Finding("OK", "attention", "sdpa, eager for a model without it (no GPU to run flash-attn)")
    if importlib.util.find_spec("flash_attn") is None:
        text = "sdpa; flash-attn is not installed, long batches are slower"
        return Finding("WARN", "attention", text, FLASH_ATTN)
    return Finding("OK", "attention", f"flash-attn {importlib.metadata.version('flash_attn')}")


def check_disk(cfg: TrainConfig) -> Finding:
    place = next(p for p in (cfg.run.out_dir.absolute(), *cfg.run.out_dir.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding("FAIL", "disk", f"{place} cannot be written: {error.strerror}", "another --out-dir")
    free, cost = shutil.disk_usage(place).free, expected_of(cfg)
    if cost is None:
        return Finding("OK", "disk", f"{gb(free)} GB free in {place}")
    wanted = cost.disk + cost.cache
    text = f"{gb(free)} GB free in {place}; {cfg.preset} writes up to {gb(wanted)} GB"
    if free < wanted:
        return Finding("FAIL", "disk", text, "make room, or another --out-dir")
    return Finding("OK", "disk", text)


def check_cost(cfg: TrainConfig) -> Finding:
    """Memory, disk and time of a run, and whether the first fits."""
    cost = expected_of(cfg)
    if cost is None:
        return Finding(
            "WARN", "cost", f"not known: {cfg.model.model} is not here, or its sizes are not named"
        )
    gpus = [device for device in pick_devices(cfg.model.device) if device.type == "cuda"]
    room = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    if gpus and room < cost.least:
        fix = "lower --tokens-per-microbatch, or --grad-checkpoint"
        return Finding("WARN", "cost", f"{cost.text()}; there are {gb(room)} GB", fix)
    return Finding("OK", "cost", cost.text())


def check_empty(cfg: TrainConfig) -> Finding:
    """Earlier runs, which tables over out/ would mix with new ones."""
    runs = list((cfg.run.out_dir / "runs").glob("*/config.json"))
    if not runs:
        return Finding("OK", "out", f"no earlier runs in {cfg.run.out_dir}")
    open_ones = sum(not (path.parent / "summary.json").exists() for path in runs)
    text = f"{len(runs)} earlier runs in {cfg.run.out_dir}, {open_ones} of them unfinished"
    return Finding(
        "WARN", "out", text, "`results` reads them too: move them away or name runs with --out-tag"
    )


def check_sandbox(cfg: TrainConfig) -> Finding:
    with Sandbox(1) as sandbox:
        missing = "; ".join(f"{name}: {why}" for name, why in sandbox.missing.items())
        active = ", ".join(name for name, state in sandbox.layers.items() if state is True)
    if not missing:
        return Finding("OK", "sandbox", active)
    status: Status = "FAIL" if cfg.run.sandbox == "strict" else "WARN"
    return Finding(
        status, "sandbox", f"{active or 'nothing'}; without {missing}", "docs/grader.md, each layer"
    )


def check_model(cfg: TrainConfig) -> Finding:
    """The model's files, whole, on this machine; nothing is asked of the network."""
    name = cfg.model.model
    if name in (TINY_RANDOM, NANO):
        return Finding("OK", "model", f"{name} comes with the package")
    folder = model_folder(name)
    local = Path(name).expanduser().is_dir()
    fix = WHOLE if local else f"`just download-model {name}` where there is network"
    if folder is None:
        return Finding("FAIL", "model", f"{name} is neither a folder nor in the local cache", fix)
    if absent := absent_files(folder):
        return Finding("FAIL", "model", f"{folder} lacks {', '.join(absent[:3])}", fix)
    if damaged := damage(folder):
        return Finding("FAIL", "model", damaged)
    changes = load_tokenizer(str(folder))[2]  # which renders a prompt
    linears = {weight.split(".")[-2] for weight in weight_names(folder) if "." in weight}
    if linears and linears.isdisjoint(TARGETS):
        return Finding("FAIL", "model", f"{name} has no Linear of the names that are adapted", NAMES)
    text = f"{name} is here, {len(weight_files(folder))} weight files"
    return Finding("OK", "model", "; ".join([text, *changes]))


def model_folder(name: str) -> Path | None:
    """Where a model's files are: a folder, or the cache of the hub's; None if nowhere here."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def check_problems(cfg: TrainConfig) -> Finding:
    loaded, wanted = load_problems(cfg.problems.problems), cfg.sampling.prompts_per_step * 2
    text = f"{len(loaded.problems)} usable problems of {cfg.problems.problems}"
    if len(loaded.problems) < wanted:
        return Finding("FAIL", "problems", text, f"more: a step takes {cfg.sampling.prompts_per_step}")
    fitting = count_fitting(cfg, loaded.problems)
    if fitting < wanted:
        text += f", {fitting} of them with room for --max-new {cfg.sampling.max_new} in the model's positions"
        return Finding("FAIL", "problems", text, "shorter ones, or another --model")
    if said := shortcomings(cfg.problems.problems, loaded):
        return Finding("WARN", "problems", f"{text}: {said}")
    return Finding("OK", "problems", text)


def count_fitting(cfg: TrainConfig, problems: Sequence[Problem]) -> int:
    """Problems that leave the model room for a completion; all, where it cannot be asked (`check_model`)."""
    name = cfg.model.model
    place = name if name in PACKAGED else model_folder(name)
    if place is None:
        return len(problems)
    try:
        tokenizer, config, _ = load_tokenizer(str(place))
    except UserError:
        return len(problems)
    room = min(MAX_SEQUENCE, positions(config)) - cfg.sampling.max_new
    return sum(len(encode_chat(tokenizer, p.messages)) <= room for p in problems)


def check_pairs(cfg: TrainConfig) -> Finding:
    pairs = chosen_pairs(cfg.basis)
    return Finding("OK", "pairs", f"{len(pairs.pairs)} of set {pairs.name!r}")


def check_direction(cfg: TrainConfig) -> Finding:
    """What doctor cannot tell: whether the direction points at hacks, which one command does in minutes."""
    pairs = cfg.basis.vhack_pairs_path or "core"
    words = ["score", str(pairs), "--model", cfg.model.model, "--problems", cfg.problems.problems]
    words += ["--env-mode", cfg.problems.env_mode]
    pool = cfg.teacher.teacher_pool_dir
    how = shlex.join(["projected-grpo", *words, *(["--pool", str(pool)] if pool else [])])
    return Finding("OK", "direction", f"not measured here; before a long run: `{how}`")


def check_pool(cfg: TrainConfig) -> Finding:
    folder = cfg.teacher.teacher_pool_dir
    if folder is None:
        return Finding("OK", "pool", "none asked for")
    problems = load_problems(cfg.problems.problems).problems
    pool = load_pool(folder)
    covered = len(join(pool, problems).rows)
    text = f"{len(pool)} prompts in {folder} cover {covered} of {len(problems)} problems"
    if covered < cfg.sampling.prompts_per_step * 2:
        return Finding("FAIL", "pool", text, "a pool made for these problems: `projected-grpo pool build`")
    return Finding("OK", "pool", text)


def check_dry_run(cfg: TrainConfig) -> Finding:
    """Two steps of every part with a tiny random model, on the device asked for, in a temporary folder."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="projected-grpo-doctor-") as home, chdir(home):
        devices = cfg.model.device.split(",")[:2]  # tiny-random has no more layers
        argv = [*DRY_RUN, f"--device={','.join(devices)}"]
        try:
            with redirect_stderr(said), redirect_stdout(said):
                code = train.main(argv)
        except Exception as error:  # whatever it is, a real run would meet it too
            return Finding("FAIL", "dry run", f"{type(error).__name__}: {error}", f"train {' '.join(argv)}")
        finally:
            start_logging(None)
    if code:
        last = (said.getvalue().strip().splitlines() or ["nothing said"])[-1]
        return Finding("FAIL", "dry run", f"exit code {code}: {last}", f"train {' '.join(DRY_RUN)}")
    return Finding("OK", "dry run", "two steps of the whole pipeline with a tiny random model")


CHECKS: Sequence[Callable[[TrainConfig], Finding]] = (
    *(check_software, check_device, check_attention, check_cost, check_disk, check_empty, check_sandbox),
    *(check_model, check_problems, check_pairs, check_direction, check_pool),
)


def examine(check: Callable[[TrainConfig], Finding], cfg: TrainConfig) -> Finding:
    """A check's finding; what it raises is one too."""
    try:
        return check(cfg)
    except (UserError, OSError, RuntimeError) as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return Finding("FAIL", name, " ".join(str(error).split()) or type(error).__name__)


def doctor_verb(options: DoctorOptions) -> int:
    """Is this machine ready for a preset? A line per need: OK, WARN or FAIL. Exit 1 on any FAIL."""
    cfg = settings_of(options)
    validate(cfg)
    checks = [*CHECKS, *([check_dry_run] if options.dry_run else [])]
    failed = 0
    for check in checks:
        finding = examine(check, cfg)
        print(finding.line(), flush=True)
        failed += finding.status == "FAIL"
    verdict = f"{failed} of {len(checks)} checks failed" if failed else "ready"
    print(f"{verdict}: `train {options.preset}` {'cannot' if failed else 'can'} start here")
    return GATE_FAILED if failed else 0
