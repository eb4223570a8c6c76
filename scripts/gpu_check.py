"""Measure this package on a GPU and set each figure beside what was predicted of it by estimate.

    python scripts/gpu_check.py               # again and again, until it says that no part is left
    python scripts/gpu_check.py --dry-run     # every part, tiny, on a CPU: does the script work?

Needs a CUDA device, this package and nothing from a network: models are the packaged nano and random weights
of Qwen3-4B's shape. By estimate half an hour, in calls of under 9 minutes; each part is written when it ends,
and the next call goes on. A part that fails is written with its error, and the others are made all the same;
`--part NAME` makes one again. Writes check.json and check.md.
"""

import argparse
import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from loguru import logger
from tabulate import tabulate

from projected_grpo import tensor_files, train
from projected_grpo.antipasto import wrap
from projected_grpo.arm_settings import SETTINGS
from projected_grpo.bench import step as bench
from projected_grpo.bench.grader import machine
from projected_grpo.bench.precision import bench_precision
from projected_grpo.config import NANO, PRESETS, ModelConfig, SamplingConfig
from projected_grpo.engine.attention import decoding
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.generate import BLOCK, Decoding
from projected_grpo.engine.logps import wide_head
from projected_grpo.engine.models import load_model
from projected_grpo.engine.passes import rollout_logps
from projected_grpo.extract_vhack_grad import pair_differences, refresh
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.options.verbs import Work
from projected_grpo.pairs import PairSet, load_pairs
from projected_grpo.run.start import start_state
from projected_grpo.runlog import read_json, start_logging, versions, write_json
from projected_grpo.step import train_step
from projected_grpo.tensor_files import SVD, compute_svd

Figures = dict[str, Any]
SAME = ("gpu", "git_commit", "dry_run")  # in what is gone on with


@dataclass(frozen=True)
class Size:
    """What is measured: on a GPU, or tiny on a CPU."""

    device: str
    model: str
    rows: tuple[int, ...]  # decoded together
    context: int  # tokens before the ones that are decoded
    prompts: int
    group: int
    prompt_tokens: int
    max_new: int
    shapes: tuple[tuple[int, int, int], ...]  # d_out, d_in of a weight, and how many the model has
    cases: int | None  # arms and controls that are run; None is all
    repeats: int


FULL = Size(
    *("cuda", "random-4b", (96, 258), 700, 43, 6, 500, 1024),
    ((1024, 2560, 72), (2560, 4096, 36), (4096, 2560, 36), (9728, 2560, 72), (2560, 9728, 36)),
    *(None, 5),
)
TINY = Size("cpu", "random-0.3m", (2, 3), 12, 2, 2, 24, 4, ((96, 64, 3), (64, 96, 1)), 1, 1)


@dataclass(frozen=True)
class Prediction:
    """One figure, what it was said to be, and whether it is."""

    part: str
    figure: str
    said: str
    holds: Callable[[float], bool]


PREDICTIONS = (
    Prediction("arms", "failed", "0", lambda x: x == 0),
    Prediction("equal", "float32_logps", "under 1e-3", lambda x: x < 1e-3),
    Prediction("equal", "float32_gradients", "under 1e-2", lambda x: x < 1e-2),
    Prediction("precision", "least_share", "within 5% of 1", lambda x: abs(x - 1) < 0.05),
    Prediction("precision", "gap", "under 2e-2", lambda x: x < 2e-2),
    Prediction("svd", "minutes_of_the_model", "1 to 2", lambda x: x <= 2),
    Prediction("svd", "largest_error", "under 1e-5", lambda x: x < 1e-5),
    Prediction("decode", "rows_96_graph_ms", "at most 15", lambda x: x <= 15),
    Prediction("decode", "rows_258_eager_ms", "at most 35 (27 is what the host takes)", lambda x: x <= 35),
    Prediction("loss", "us_per_token", "at most 214 (96 on an H200, 115 on an H100)", lambda x: x <= 214),
    Prediction("loss", "peak_over_formula", "within 10% of 1", lambda x: abs(x - 1) < 0.1),
    Prediction("step", "sec", "at most 60 (48 on an H200)", lambda x: x <= 60),
    Prediction("step", "gap", "under 2e-2", lambda x: x < 2e-2),
)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], repeats: int) -> float:
    """Mean, after one call that does not count; the device is waited for on both sides."""
    function()
    synchronise()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronise()
    return (time.perf_counter() - started) / repeats


def work_of(size: Size, **changes: Any) -> Work:
    model = ModelConfig(model=size.model, device=size.device, dtype="bfloat16", svd_cache=None)
    own = {"prompts_per_step": size.prompts, "group": size.group, "max_new": size.max_new, "steps": 1}
    shape = {"prompt_tokens": size.prompt_tokens, "tokens_per_microbatch": 4096}
    return Work(model=model, **{**own, **shape, **changes})


@contextmanager
def cheap_bases() -> Iterator[None]:
    """Orthonormal factors that are not a weight's own: time and memory are the same, and no SVD is made."""
    made: dict[tuple[int, ...], SVD] = {}

    def cheap(W: torch.Tensor) -> SVD:
        if W.shape not in made:
            r = min(W.shape)
            U, V = (torch.linalg.qr(torch.randn(n, r, device=W.device))[0] for n in W.shape)
            made[W.shape] = SVD(U.to(W.dtype), torch.ones(r, device=W.device), V.T.to(W.dtype).contiguous())
        return made[W.shape]

    with patch.object(tensor_files, "compute_svd", cheap):
        yield


def ceilings(size: Size) -> Figures:
    """What the machine gives at best: products, copies, and launches from Python."""
    n, length = (8192, 2**31) if size.device == "cuda" else (256, 2**20)
    a, b = (torch.randn(n, n, device=size.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(length, device=size.device, dtype=torch.uint8)
    target, one = torch.empty_like(source), torch.ones(1, device=size.device)
    return {
        "tflops": 2 * n**3 / seconds_of(lambda: a @ b, size.repeats) / 1e12,
        "copied_tb_per_s": 2 * length / seconds_of(lambda: target.copy_(source), size.repeats) / 1e12,
        "launch_us": seconds_of(lambda: one.add_(1), 200 * size.repeats) * 1e6,
    }


def arms(size: Size) -> Figures:
    """Two steps of every arm with every control, by the command line."""
    cases = [
        (arm, control)
        for arm, kind in SETTINGS.items()
        for control in get_args({f.name: f.type for f in kind.__dataclass_fields__.values()}["control"])
    ]
    failed = []
    for arm, control in cases[: size.cases]:
        with tempfile.TemporaryDirectory() as home:
            given = [
                *("smoke", "--steps=2", "--n-problems=6", "--eval-n-prompts=1", "--max-new=6", "--workers=2"),
                *("--eval-ablate-every=2", "--vhack-refresh-every=1", f"--device={size.device}"),
                *(f"--intervention={arm}", f"--control={control}", f"--out-dir={home}/out"),
            ]
            try:
                code: object = train.main(given)
            except Exception as error:  # which is what is looked for
                code = f"{type(error).__name__}: {error}"
        start_logging(None)  # the run's own log is gone
        if code:
            failed.append(f"{arm} {control}: {str(code)[:200]}")
    return {"cases": len(cases[: size.cases]), "failed": len(failed), "which": failed}


def equal(size: Size) -> Figures:
    """Relative differences of this device from the CPU: log-probabilities and gradients of the nano model."""
    figures: Figures = {}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as cache:  # one SVD for both, as its signs are free
            here, there = (on_device(size, dtype, device, Path(cache)) for device in ("cpu", size.device))
        for name, reference in here.items():
            figures[f"{dtype}_{name}"] = float((there[name] - reference).norm() / reference.norm())
    return figures


def on_device(size: Size, dtype: str, device: str, cache: Path) -> dict[str, torch.Tensor]:
    model, tokenizer = load_model(ModelConfig(model=NANO, device="cpu", dtype=dtype))  # type: ignore[arg-type]
    policy = wrap(model.to(device), cache)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.delta_s.copy_(0.02 * torch.randn(layer.delta_s.shape, generator=draw))
    work = work_of(size, prompts_per_step=2, group=2, prompt_tokens=40, max_new=8)
    rollouts = bench.random_rollouts(work, Chat(policy, tokenizer, frozenset()))
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5], device=device)
    settings = bench.bench_config(work, Path()).loss
    rows = per_rollout_grads(policy, rollouts, advantage, settings, work.max_new).rows
    gradients = torch.cat([g.flatten().float().cpu() for g in rows.values()])
    return {"logps": rollout_logps(policy, rollouts, 4096), "gradients": gradients}


def precision(size: Size) -> Figures:
    """`bench precision` on the nano model in bfloat16."""
    model = ModelConfig(model=NANO, device=size.device, dtype="bfloat16", svd_cache=None)
    shape = {"prompts_per_step": 2, "group": 2, "prompt_tokens": 60, "max_new": 32, "steps": 5}
    work = Work(model=model, **(shape if size.cases is None else shape | {"max_new": 3, "steps": 1}))
    points = bench_precision(work)["points"]
    shares = [point[site] for point in points for site in ("sampler", "loss", "export")]
    least = max(shares, key=lambda share: abs(share - 1))
    return {"least_share": least, "gap": max(point["gap"] for point in points), "points": points}


def svd(size: Size) -> Figures:
    """Ours and torch's default, of each shape of the model, and ours for all of them."""
    figures: Figures = {}
    minutes = largest = 0.0
    for d_out, d_in, count in size.shapes:
        W = (0.03 * torch.randn(d_out, d_in, device=size.device)).to(torch.bfloat16)
        ours = seconds_of(lambda W=W: compute_svd(W), 1)
        theirs = seconds_of(lambda W=W: torch.linalg.svd(W.float(), full_matrices=False), 1)
        found = compute_svd(W)
        error = float(((found.U * found.S) @ found.Vh - W.float()).norm() / W.float().norm())
        eye = torch.eye(len(found.S), device=W.device)
        skew = max(float((x - eye).abs().max()) for x in (found.U.T @ found.U, found.Vh @ found.Vh.T))
        figures[f"{d_out}x{d_in}"] = {"ours_s": ours, "torch_s": theirs, "W": error, "orthogonal": skew}
        minutes += count * ours / 60
        largest = max(largest, error, skew)
    return figures | {"minutes_of_the_model": minutes, "largest_error": largest}


@torch.no_grad()
def decode(size: Size) -> Figures:
    """Milliseconds of one decoded token: our loop's own step, and the same replayed from a CUDA graph."""
    figures: Figures = {}
    model, _ = bench.bench_model(work_of(size).model)
    for rows in size.rows:
        prompts = [
            tuple(i % 100 + 1 for i in range(size.context - p % 7)) for p in range(-(-rows // size.group))
        ]
        copies = [size.group] * (rows // size.group) + ([rows % size.group] if rows % size.group else [])
        sampling = SamplingConfig(max_new=BLOCK, temperature=0.7, top_k=20)
        with decoding(model) as packed, wide_head(model):
            draws = torch.rand(rows, BLOCK)
            batch = Decoding(model, prompts, copies, draws, sampling, frozenset(), packed)
            batch.grow()
            figures[f"rows_{rows}_eager_ms"] = 1e3 * seconds_of(batch.step, size.repeats * 4)
            figures[f"rows_{rows}_fixed_shapes"] = batch.fixed
            if size.device == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    batch.step()
                figures[f"rows_{rows}_graph_ms"] = 1e3 * seconds_of(graph.replay, size.repeats * 4)
                del graph
        del batch
        free()
    return figures


def generation(size: Size) -> Figures:
    """Our sampling beside transformers' generate."""
    work = work_of(size, prompts_per_step=min(16, size.prompts), max_new=min(128, size.max_new))
    with cheap_bases():
        found = bench.bench_generation(work)
    return {name: found[name] for name in ("ours_tokens_per_s", "floor_tokens_per_s", "ratio")}


def loss(size: Size) -> Figures:
    """The loss at full's shapes for four groups: time of a padded token, peak against the formula."""
    work = work_of(size, prompts_per_step=min(4, size.prompts))
    with cheap_bases():
        found = bench.bench_backward(work)
    tokens = work.prompts_per_step * (work.prompt_tokens + work.group * work.max_new)
    return {
        "us_per_token": found["per_group_s"] / tokens * 1e6,
        "us_per_token_of_route2": found["per_rollout_s"] / tokens * 1e6,
        "over_frozen_base": found["per_group_s"] / found["floor_s"],
        "peak_gb": found["per_rollout_peak_gb"],
        "peak_over_formula": found["per_rollout_peak_gb"] / found["per_rollout_predicted_gb"],
    }


def first_pairs(pairs: PairSet, size: Size) -> PairSet:
    """All of them, or in a dry run the first four."""
    return pairs if size.cases is None else replace(pairs, pairs=pairs.pairs[:4])


def step(size: Size) -> Figures:
    """One step of `full` at its own size, of route2, with random rewards and completions of full length."""
    work = work_of(size, intervention="route2")
    with cheap_bases(), tempfile.TemporaryDirectory() as out:
        chat = bench.open_bench_chat(work)
        exp = bench.bench_experiment(work, chat, Path(out))
        exp = replace(exp, pairs=first_pairs(exp.pairs, size))
        exp = replace(
            exp, cfg=replace(exp.cfg, loss=replace(PRESETS["full"][1].loss, tokens_per_microbatch=4096))
        )
        started = time.perf_counter()
        state = start_state(exp)
        synchronise()
        extraction = time.perf_counter() - started
        bench.nudge_adapter(chat)
        record, _ = train_step(exp, state)
        synchronise()
    kept = ("sec", "gen", "fb", "gap", "kl", "gn", "loss", "peak_gb", "skipped")
    return {"extraction_s": extraction} | {name: record[name] for name in kept}


def refreshing(size: Size) -> Figures:
    """What a refresh of the basis takes: the pairs' gradients, and all of it."""
    work = work_of(size)
    with cheap_bases():
        chat = bench.open_bench_chat(work)
    pairs = first_pairs(load_pairs(None), size)
    cfg = bench.bench_config(work, Path())
    used = pairs.split()[0]
    return {
        "gradients_s": seconds_of(lambda: pair_differences(chat, used, cfg.loss), 1),
        "whole_s": seconds_of(lambda: refresh(chat, pairs, cfg), 1),
    }


PARTS: Mapping[str, tuple[Callable[[Size], Figures], float]] = {  # and the minutes that it may take
    "ceilings": (ceilings, 0.5),
    "equal": (equal, 1),
    "precision": (precision, 1),
    "arms": (arms, 8),
    "svd": (svd, 3),
    "decode": (decode, 2),
    "generation": (generation, 2),
    "loss": (loss, 3),
    "step": (step, 5),
    "refreshing": (refreshing, 3),
}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make(name: str, size: Size) -> dict[str, Any]:
    """A part's figures, or its error, and its seconds."""
    started = time.monotonic()
    try:
        found: dict[str, Any] = {"figures": PARTS[name][0](size)}
    except Exception as error:  # a figure that cannot be had is a finding, and the others are wanted too
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:300]}"
        found = {"error": f"{text} ({Path(place.filename).name}:{place.lineno})"}
    free()
    return found | {"seconds": time.monotonic() - started}


def about(size: Size) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0) if size.device == "cuda" else None
    return {
        "gpu": gpu.name if gpu else None,
        "gpu_gb": gpu.total_memory / 1e9 if gpu else None,
        "cuda": torch.version.cuda,
        "versions": versions(),
        "dry_run": size is TINY,
        "size": asdict(size),
    } | machine()


def page(found: Mapping[str, Any]) -> str:
    """The predictions beside what was measured, and every other figure under them."""
    who, parts = found["about"], found["parts"]
    title = f"{who['gpu']}, {who['gpu_gb']:.0f} GB" if who["gpu"] else "dry run on a CPU: no figure counts"
    rows = []
    for one in PREDICTIONS:
        value = parts.get(one.part, {}).get("figures", {}).get(one.figure)
        verdict = "not measured" if value is None else "yes" if one.holds(value) else "NO"
        shown = "-" if value is None else f"{value:.3g}"
        rows.append([f"{one.part}: {one.figure}", one.said, shown, "-" if who["dry_run"] else verdict])
    heads = ["figure", "predicted", "measured", "holds"]
    lines = [f"# GPU check: {title}", "", f"torch {who['versions']['torch']}, commit {who['git_commit']}."]
    lines += ["", tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)]
    for name, (function, _) in PARTS.items():
        lines += ["", f"## {name}", "", str(function.__doc__), ""]
        part = parts.get(name, {"error": "not made yet"})
        if "error" in part:
            lines.append(part["error"])
        for key, value in part.get("figures", {}).items():
            lines.append(f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}")
    return "\n".join(lines) + "\n"


def check(out: Path, size: Size, wanted: Sequence[str], minutes: float) -> bool:
    """Make the parts that are not there, while there is time; whether all are there. Writes after each."""
    started, file = time.monotonic(), out / "check.json"
    here = about(size)
    found: dict[str, Any] = {"parts": {}}
    if file.exists():
        found = read_json(file, "--out")
        if any(found["about"][name] != here[name] for name in SAME):
            logger.info("{} is of another machine, commit or size: all parts are made again", file)
            found = {"parts": {}}
    found["about"] = here
    todo = wanted or [name for name in PARTS if name not in found["parts"]]
    for name in todo:
        spent = (time.monotonic() - started) / 60
        if spent and spent + PARTS[name][1] > minutes and name != todo[0]:
            logger.info("{:.1f} minutes are over: the same command goes on with {}", spent, name)
            break
        logger.info("{}: {}", name, PARTS[name][0].__doc__)
        found["parts"][name] = make(name, size)
        write_json(file, found)
        (out / "check.md").write_text(page(found))
    return all(name in found["parts"] for name in PARTS)


def main() -> int:
    """Exit 0 when every part is there and none has failed, 1 before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check"))
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=[])
    parser.add_argument("--minutes", type=float, default=8.5, help="of one call")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")
    asked = parser.parse_args()
    if not asked.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run tries the script on a CPU")
    asked.out.mkdir(parents=True, exist_ok=True)
    whole = check(asked.out, TINY if asked.dry_run else FULL, asked.part, asked.minutes)
    parts = read_json(asked.out / "check.json", "--out")["parts"]
    failed = [name for name, part in parts.items() if "error" in part]
    left = [name for name in PARTS if name not in parts]
    print(f"{asked.out / 'check.md'}: {len(parts)} of {len(PARTS)} parts; failed: {failed}; left: {left}")
    return 0 if whole and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
