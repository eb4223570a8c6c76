"""What a training step costs: a model of its parts, fitted to `bench step`, and what it predicts for GPUs.

    python scripts/cost_model.py --fit BENCH.json...    # CPU seconds measured, and as modelled
    python scripts/cost_model.py                        # predictions, from the assumptions in Machine

    generation   T (layers o + weights/B + b kv/B + 2 N b/F)   T tokens one after another, b rows
    evaluation   the same for its rows, every fifth step
    merging      2 sum(d_out r d_in) / F                       once a step, alike in every process
    grading      b / (cores * responses/s)
    loss         tokens (6 N + 4 |U, Vh|) / F                  frozen weights, there and back; reference
    sending      bytes / bandwidth + rounds * processes * lag  two rows of all deltas, every rollout
    handling     n * seconds of one                            every process reads all n rollouts

b rows and their tokens are one process's. N: weights; U, Vh: their singular bases; F: FLOP/s; B: bytes/s;
o: seconds that a layer takes when it has nothing to do. `bench step` has no reference and no evaluation; on
a CPU it takes the merged path, whose loss has 4 N + 2 |U, Vh|, and weights/B is left out.
"""

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import nnls
from tabulate import tabulate


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """d_out, d_in of a layer's adapted weights."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q)]
        return [*attention, (self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner)]

    @property
    def weights(self) -> int:
        """Adapted weights."""
        return self.layers * sum(o * i for o, i in self.linears)

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocab

    @property
    def bases(self) -> int:
        """Values of U and Vh."""
        return self.layers * sum(min(o, i) * (o + i) for o, i in self.linears)

    @property
    def adapter_parameters(self) -> int:
        """Length of delta_s over all modules."""
        return self.layers * sum(min(o, i) for o, i in self.linears)

    @property
    def merge_flops(self) -> int:
        """Of W + U diag(delta) Vh over all modules."""
        return self.layers * sum(2 * o * i * min(o, i) for o, i in self.linears)

    @property
    def kv_values(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


BENCH = {  # the packaged model, and bench_model.SIZES
    "nano": Shape(160, 426, 4, 4, 2, 40, 512),
    "random-0.3m": Shape(64, 224, 3, 4, 2, 16, 2048),
    "random-21m": Shape(512, 1536, 6, 8, 4, 64, 4096),
}
MODELS = {
    "4 B (Qwen3)": Shape(2560, 9728, 36, 32, 8, 128, 151936),
    "7 B (Qwen2.5)": Shape(3584, 18944, 28, 28, 4, 128, 152064),
    "14 B (Qwen3)": Shape(5120, 17408, 40, 40, 8, 128, 151936),
    "32 B (Qwen3)": Shape(5120, 25600, 64, 64, 8, 128, 151936),
    "70 B (Llama 3)": Shape(8192, 28672, 80, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Machine:
    """A GPU of many. Assumed, but for `graded` and `handled`, which were measured on a CPU."""

    flops: float = 400e12  # 40% of an H100's dense bf16
    bandwidth: float = 2e12  # bytes/s, 60% of its HBM3
    overhead: float = 0.8e-3  # seconds a layer and token, eager PyTorch
    memory: float = 80e9
    cores: int = 8  # per GPU, for the grader
    graded: float = 25.0  # responses/s of a core: docs/grader_speed.md, benchmark without slow ones
    network: float = 1e9  # bytes/s of one process over gloo and TCP
    lag: float = 1e-4  # seconds from one process to the next in a ring
    rounds: int = 8  # rings a step
    handled: float = 2e-4  # seconds of a CPU core for one gathered rollout: pickle.loads, measured


GRAPH = 5e-5  # seconds a layer and token where decoding is replayed from a CUDA graph, as engines do


@dataclass(frozen=True)
class Load:
    """A step: rollouts, and their tokens."""

    rollouts: int = 43 * 6
    prompt: int = 500
    longest: int = 1024
    mean: int = 600
    bytes_each: float = 12e3  # of a rollout with its grade, pickled
    evaluated: int = 8 * 6
    evaluated_every: int = 5


def memory(shape: Shape, load: Load, rows: float) -> float:
    """Bytes while sampling: weights, their merged copies, bases, embeddings, keys and values. bfloat16."""
    held = 2 * (2 * shape.weights + shape.bases + 2 * shape.head)
    return held + 2 * rows * (load.prompt + load.longest) * shape.kv_values


def predict(shape: Shape, load: Load, gpu: Machine, gpus: int) -> dict[str, float]:
    """Seconds of a step's parts on so many GPUs.

    A model that does not fit is given as many GPUs as hold it and an ideal split of all its work among them,
    which this package does not have.
    """
    each = math.ceil(memory(shape, load, 0) / (0.9 * gpu.memory))
    processes = max(1, gpus // each)
    rows = math.ceil(load.rollouts / processes)
    flops, bandwidth = gpu.flops * each, gpu.bandwidth * each
    active = shape.weights + shape.head
    context = load.prompt + load.longest / 2

    def decoding(rows: int) -> float:
        token = shape.layers * gpu.overhead + 2 * active / bandwidth + 2 * active * rows / flops
        return load.longest * (token + 2 * rows * context * shape.kv_values / bandwidth)

    tokens = rows * (load.prompt + load.mean)
    sent = 2 * (2 * 4 * shape.adapter_parameters) + load.rollouts * load.bytes_each
    parts = {
        "generation": decoding(rows),
        "evaluation": decoding(math.ceil(load.evaluated / processes)) / load.evaluated_every,
        "merging": shape.merge_flops / flops,
        "grading": rows / (gpu.cores * each * gpu.graded),
        "loss": tokens * (6 * active + 4 * shape.bases) / flops,
        "sending": sent / gpu.network + gpu.rounds * gpu.lag * processes if processes > 1 else 0.0,
        "handling": load.rollouts * gpu.handled if processes > 1 else 0.0,
    }
    return {"GPUs a process": each, "rows": rows, **parts, "step": sum(parts.values())}


def features(bench: dict) -> list[float]:
    """What CPU seconds of a `bench step` are linear in: layers run, one token after another, and FLOP."""
    shape, size = BENCH[bench["model"]], bench["processes"]
    active = shape.weights + shape.head
    generated = bench["prompts_per_step"] * bench["group"] * bench["max_new"]
    tokens = generated + bench["prompts_per_step"] * bench["prompt_tokens"]  # a prompt is run once
    flops = tokens * (6 * active + 2 * shape.bases) + 2 * size * shape.merge_flops  # 2 N of it are sampling's
    return [size * shape.layers * bench["max_new"], flops]


def fit(paths: list[Path]) -> None:
    """Two constants from the CPU seconds of all processes, which other work moves less than the clock's."""
    runs = [json.loads(path.read_text()) for path in paths]
    seconds = np.array([r["cpu_s"] for r in runs])
    given = np.array([features(r) for r in runs]) / seconds[:, None]  # so that errors are relative
    constants, _ = nnls(given, np.ones(len(runs)))
    print(f"{1e6 * constants[0]:.0f} us a layer and token, {1e-9 / constants[1]:.1f} GFLOP/s")
    rows = []
    for run, share in zip(runs, given @ constants, strict=True):
        work = [run["model"], run["prompts_per_step"] * run["group"], run["max_new"], run["processes"]]
        rows.append([*work, run["cpu_s"], share * run["cpu_s"], run["gen_s"], run["fb_s"], run["send_s"]])
    heads = ["model", "rollouts", "tokens", "processes", "CPU s", "modelled", "gen_s", "fb_s", "send_s"]
    print(tabulate(rows, headers=heads, tablefmt="pipe", floatfmt=".3g"))


def tables() -> None:
    """Predictions: memory, more GPUs for one size of step, and a step that grows with them."""
    gpu, full = Machine(), Load()
    rows = []
    for name, shape in MODELS.items():
        gb = [1e-9 * x for x in (2 * shape.weights, 2 * shape.bases, memory(shape, full, 0))]
        rows.append(
            [name, *gb, 4e-6 * shape.adapter_parameters, 4e-9 * shape.adapter_parameters * full.rollouts]
        )
    heads = [
        "model",
        "weights GB",
        "bases GB",
        "sampling GB",
        "a row of adapter parameters MB",
        "258 rows GB",
    ]
    print(tabulate(rows, headers=heads, tablefmt="pipe", floatfmt=".3g"), "\n")
    for title, scaled in (("the full preset's 258 rollouts", False), ("32 rollouts a GPU", True)):
        rows = []
        for name, shape in MODELS.items():
            for gpus in (1, 8, 64, 512):
                load = Load(rollouts=32 * gpus) if scaled else full
                parts = predict(shape, load, gpu, gpus)
                graph = predict(shape, load, replace(gpu, overhead=GRAPH), gpus)["step"]
                if parts["GPUs a process"] <= gpus:
                    rows.append([name, gpus, *parts.values(), graph])
        print(title)
        heads = ["model", "GPUs", *parts, "step, graph"]
        print(tabulate(rows, headers=heads, tablefmt="pipe", floatfmt=".3g"), "\n")


def main() -> None:
    """Fit, or predict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", nargs="+", type=Path, metavar="BENCH.json")
    asked = parser.parse_args()
    if asked.fit:
        fit(asked.fit)
    else:
        tables()


if __name__ == "__main__":
    main()
