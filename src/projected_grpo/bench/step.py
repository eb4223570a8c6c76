"""Timings of the parts of training, each with a floor measured in the same run on the same tokens.

Models may be random weights of a named size, so that a figure needs no download. Completions never stop early
and rewards are random, so that every step does all of its work and no group is flat.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from projected_grpo.antipasto import wrap
from projected_grpo.arm_settings import arm_settings
from projected_grpo.arms.table import ARMS
from projected_grpo.bench.grader import machine
from projected_grpo.checks import validate
from projected_grpo.config import EMBEDDED, FAST, ModelConfig, TrainConfig
from projected_grpo.engine.batch import PAD, collate, left_padded
from projected_grpo.engine.chat import Chat, SamplerOpener, own_sampler, sampler_opener
from projected_grpo.engine.memory import measured_peak, predicted_peak
from projected_grpo.engine.models import QWEN3_4B, load_model
from projected_grpo.engine.placement import pick_devices, place
from projected_grpo.errors import UserError
from projected_grpo.experiment import Data, Experiment
from projected_grpo.extract_vhack_grad import pair_differences, pair_grads, pair_rollouts
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.options.verbs import Work
from projected_grpo.pairs import load_pairs
from projected_grpo.pools import NO_TEACHER
from projected_grpo.problems import load_problems
from projected_grpo.ranks import ALONE, Ranks
from projected_grpo.rewards import Grade, Grader, Task
from projected_grpo.rollout import Rollout
from projected_grpo.run.start import start_state
from projected_grpo.seeds import stream_seed
from projected_grpo.state import TrainState
from projected_grpo.step import train_step
from projected_grpo.tensor_files import compute_svd

SIZES: Mapping[str, Mapping[str, Any]] = {
    "random-0.3m": {
        **{"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 3, "vocab_size": 2048},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    },
    "random-21m": {
        **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    },
    "random-4b": QWEN3_4B,
}
WARM_UP = 1
SHOWN = (  # of the work, beside its figures
    "prompts_per_step", "group", "prompt_tokens", "max_new", "steps", "grad_checkpoint", "intervention",
)  # fmt: skip


class RandomGrader(Grader):
    """Pays at random, so that no group is flat."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def submit(self, task: Task, text: str) -> Future[Grade]:
        future: Future[Grade] = Future()
        reward = float(torch.rand(1, generator=self.generator))
        future.set_result(Grade(reward, False, False, False, None, True, False, False, False, None))
        return future


def bench_model(
    cfg: ModelConfig, shape: Mapping[str, Any] | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model by name or folder, or random weights of a size in SIZES with the tiny model's tokenizer.

    `shape` is random weights of another size.
    """
    shape = SIZES.get(cfg.model) if shape is None else shape
    if shape is None:
        return load_model(cfg)
    devices = pick_devices(cfg.device)
    alone = cfg if len(devices) == 1 else replace(cfg, device=str(devices[0]))
    model, tokenizer = load_model(replace(alone, model="tiny-random"))
    template: Any = model.config
    config = Qwen3Config(
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        pad_token_id=template.pad_token_id,
        eos_token_id=template.eos_token_id,
    )
    config._attn_implementation = template._attn_implementation
    weight = next(model.parameters())
    begun_on = weight.device if len(devices) == 1 else "cpu"  # it may not fit on one of several
    with torch.random.fork_rng(devices=[]), torch.device(begun_on):
        torch.manual_seed(0)
        random: nn.Module = Qwen3ForCausalLM(config)
    place(random.to(dtype=weight.dtype), devices)
    return random.eval(), tokenizer


def open_bench_chat(
    work: Work, shape: Mapping[str, Any] | None = None, open_sampler: SamplerOpener | None = None
) -> Chat:
    """The adapted model; no token stops a completion. UserError for a --sampler where none is opened."""
    if open_sampler is None:
        if work.model.sampler != "own":
            raise UserError("--sampler: only `bench step` and `bench generation` take it; leave it out")
        open_sampler = own_sampler
    model, tokenizer = bench_model(work.model, shape)
    policy = wrap(model, work.model.svd_cache)
    return Chat(policy, tokenizer, frozenset(), open_sampler(policy))


def bench_prompts(work: Work, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of about prompt_tokens tokens: problem statements, one after another."""
    statements = "\n\n".join(p.messages[-1]["content"] for p in load_problems(EMBEDDED).problems)
    ids = tokenizer(statements, add_special_tokens=False)["input_ids"]
    if len(ids) < work.prompts_per_step + work.prompt_tokens:
        raise UserError(f"--prompt-tokens {work.prompt_tokens}: at most {len(ids) - work.prompts_per_step}")
    shift = (len(ids) - work.prompt_tokens) // work.prompts_per_step
    pieces = [ids[i * shift : i * shift + work.prompt_tokens] for i in range(work.prompts_per_step)]
    return [str(tokenizer.decode(piece)) for piece in pieces]


def bench_prompt_ids(work: Work, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """The same texts as both trainers' tokenizers see them."""
    texts = bench_prompts(work, tokenizer)
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def bench_experiment(work: Work, chat: Chat, out: Path, ranks: Ranks = ALONE) -> Experiment:
    """The loop's own experiment on these prompts, with random rewards."""
    ids = bench_prompt_ids(work, chat.tokenizer)
    problems = load_problems(EMBEDDED).problems
    train, held_out = problems[: len(ids)], problems[len(ids) : len(ids) + 1]
    prompts = dict(zip((p.problem_id for p in train), ids, strict=True))
    cfg = bench_config(work, out)
    data = Data(train, held_out, held_out, NO_TEACHER)
    return Experiment(cfg, chat, data, prompts, load_pairs(None), RandomGrader(work.seed), ranks)


def bench_config(work: Work, out: Path) -> TrainConfig:
    """`fast`'s settings at this size, without the extraction and the reference pass of some steps."""
    cfg = replace(
        FAST,
        model=work.model,
        run=replace(FAST.run, out_dir=out, seed=work.seed),
        problems=replace(FAST.problems, problems=EMBEDDED, n_problems=work.prompts_per_step),
        sampling=replace(
            FAST.sampling, prompts_per_step=work.prompts_per_step, group=work.group, max_new=work.max_new
        ),
        loss=replace(
            FAST.loss,
            ref_every=0,
            tokens_per_microbatch=work.tokens_per_microbatch,
            grad_checkpoint=work.grad_checkpoint,
        ),
        optim=replace(FAST.optim, steps=work.steps + WARM_UP),
        arm=arm_settings(work.intervention),
        basis=replace(FAST.basis, vhack_refresh_every=0),
        teacher=replace(FAST.teacher, mix_ratio=0.0),
    )
    validate(cfg)
    return cfg


@contextmanager
def open_stepper(work: Work, chat: Chat, ranks: Ranks = ALONE) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function that makes one training step and returns its line of steps.jsonl, with its CPU seconds."""
    with tempfile.TemporaryDirectory() as out:
        exp = bench_experiment(work, chat, Path(out), ranks)
        state: TrainState = start_state(exp)

        def step() -> dict[str, Any]:
            started = time.process_time()
            record, _ = train_step(exp, state)
            synchronise(chat.policy.devices)
            state.step += 1
            return record | {"cpu": time.process_time() - started}

        yield step


def synchronise(devices: Sequence[torch.device]) -> None:
    """Wait for GPUs, so that a clock read next is honest."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def alternated(
    functions: Mapping[str, Callable[[], object]],
    devices: Sequence[torch.device],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each by the clock, called in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + WARM_UP):
        for name, function in functions.items():
            started = clock()
            function()
            synchronise(devices)
            if i >= WARM_UP:
                seconds[name].append(clock() - started)
    return {name: median(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class RivalFigures:
    """Seconds of each of another trainer's steps, and the bytes its loss needs above the resting model."""

    seconds: Sequence[float]
    loss_peak: int


Rival = Callable[[Work, Sequence[str], Callable[[], object]], RivalFigures]


def bench_step(work: Work, rival: Rival | None = None, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Seconds of a whole step, ours and the rival's in turns: generate, score, loss, update.

    `parts` are ours: generation, and what follows grading. Medians; the first step of each is not counted.
    CPU seconds are those of all processes together; `send_s` is what adding up two rows of all deltas takes.
    Beside a rival, the loss's peak memory above the resting model is counted for both, outside timed steps.
    """
    chat = open_bench_chat(work, open_sampler=sampler_opener(work.model, ranks.size))
    ours: list[dict[str, Any]] = []
    with open_stepper(work, chat, ranks) as step:
        if rival is None:
            ours = [step() for _ in range(work.steps + WARM_UP)]
        else:
            theirs = rival(work, bench_prompts(work, chat.tokenizer), lambda: ours.append(step()))
    ours = ours[WARM_UP:]
    parts = {name: median(record[key] for record in ours) for name, key in (("gen_s", "gen"), ("fb_s", "fb"))}
    seconds = median(record["sec"] for record in ours)
    cpu = sum(ranks.gather(median(record["cpu"] for record in ours)))
    rows = torch.zeros(2, sum(chat.policy.ranks.values()))
    sent = alternated({"send": lambda: ranks.total(rows)}, (torch.device("cpu"),), work.steps)
    figures: dict[str, Any] = {"ours_s": seconds, **parts, "cpu_s": cpu, "send_s": sent["send"]}
    figures |= {"processes": ranks.size}
    if rival is not None:
        trl_s = median(theirs.seconds[WARM_UP:])
        run, predicted = loss_pass(
            work, chat, None if ARMS[work.intervention].per_rollout else by_group(work)
        )
        peak = measured_peak(run, chat.policy.devices)
        figures |= {"trl_s": trl_s, "ratio": trl_s / seconds, "loss_peak_gb": peak / 1e9}
        figures |= {"loss_predicted_gb": predicted / 1e9, "trl_loss_peak_gb": theirs.loss_peak / 1e9}
    return figures | {"peak_gb": ours[-1]["peak_gb"]} | describe(work, chat)


def bench_generation(work: Work) -> dict[str, Any]:
    """Our sampling with a trained adapter, against transformers' own generate on the base model, in turns."""
    chat = open_bench_chat(work, open_sampler=sampler_opener(work.model))
    policy = chat.policy
    nudge_adapter(chat)
    prompts = bench_prompt_ids(work, chat.tokenizer)
    seeds = [[stream_seed(work.seed, i, j) for j in range(work.group)] for i in range(len(prompts))]
    sampling = bench_config(work, Path()).sampling
    every = [p for p in prompts for _ in range(work.group)]
    ids, attention = left_padded(every, policy.device)
    model: Any = policy.model

    options = {
        "max_new_tokens": work.max_new, "min_new_tokens": work.max_new, "do_sample": True,
        "temperature": sampling.temperature, "top_k": sampling.top_k, "pad_token_id": PAD,
    }  # fmt: skip
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: chat.sample(prompts, seeds, sampling),
        "floor": lambda: model.generate(ids, attention_mask=attention.long(), **options),
    }
    seconds = alternated(functions, policy.devices, work.steps)
    tokens = len(ids) * work.max_new
    figures = {f"{name}_s": s for name, s in seconds.items()}
    figures |= {f"{name}_tokens_per_s": tokens / s for name, s in seconds.items()}
    return figures | {"ratio": seconds["floor"] / seconds["ours"]} | describe(work, chat)


def random_rollouts(work: Work, chat: Chat) -> list[Rollout]:
    """Rollouts of full length with random completions, group by group."""
    config: Any = chat.policy.model.config
    generator = torch.Generator().manual_seed(work.seed)

    def completion() -> tuple[int, ...]:
        return tuple(torch.randint(config.vocab_size, (work.max_new,), generator=generator).tolist())

    prompts = bench_prompt_ids(work, chat.tokenizer)
    return [Rollout(p, completion(), "") for p in prompts for _ in range(work.group)]


def loss_pass(work: Work, chat: Chat, parts: Sequence[int] | None) -> tuple[Callable[[], object], int]:
    """The loss's forward and backward on random rollouts, and the bytes that it should need."""
    rollouts = random_rollouts(work, chat)
    generator = torch.Generator().manual_seed(work.seed)
    advantage = torch.randn(len(rollouts), generator=generator).to(chat.policy.device)
    loss = bench_config(work, Path()).loss

    def run() -> None:
        per_rollout_grads(chat.policy, rollouts, advantage, loss, work.max_new, parts=parts)

    return run, predicted_peak(chat.policy.model, rollouts, loss)


def by_group(work: Work) -> list[int]:
    """The group of each rollout."""
    return [i // work.group for i in range(work.prompts_per_step * work.group)]


def nudge_adapter(chat: Chat) -> None:
    """Away from zero, where merging would cost nothing."""
    for layer in chat.policy.layers.values():
        layer.delta_s.data.normal_(std=1e-3)


def bench_backward(work: Work) -> dict[str, Any]:
    """The loss's forward and backward, a gradient per rollout or per group, against the frozen base's.

    The floor runs the same padded tokens through the base model forward and backward to its input embeddings.
    Peaks are of tensors above the resting model, next to what docs/benchmarks.md says they should be.
    """
    chat = open_bench_chat(work)
    policy = chat.policy
    nudge_adapter(chat)
    parts = {"per_rollout": None, "per_group": by_group(work)}
    passes = {name: loss_pass(work, chat, own) for name, own in parts.items()}
    rollouts = random_rollouts(work, chat)
    functions: dict[str, Callable[[], object]] = {
        **{name: run for name, (run, _) in passes.items()},
        "floor": lambda: frozen_pass(policy.model, rollouts, policy.device, work.tokens_per_microbatch),
    }
    figures = over_floor(functions, work, chat)
    for name, (run, _) in passes.items():
        figures[f"{name}_peak_gb"] = measured_peak(run, policy.devices) / 1e9
    for name, (_, predicted) in passes.items():
        figures[f"{name}_predicted_gb"] = predicted / 1e9
    return figures | describe(work, chat)


def frozen_pass(model: nn.Module, rollouts: Sequence[Rollout], device: torch.device, budget: int) -> None:
    """Forward through frozen weights and backward to the input embeddings, in batches of `budget` tokens."""
    tokens = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    size = max(1, budget // tokens)
    for start in range(0, len(rollouts), size):
        batch = collate(rollouts[start : start + size], device)
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedded = table(batch.ids).detach().requires_grad_()
        kept = batch.completion.shape[1] + 1
        out = model(inputs_embeds=embedded, logits_to_keep=kept, use_cache=False)
        torch.autograd.grad(out.logits.float().logsumexp(-1).sum(), embedded)


def bench_extraction(work: Work) -> dict[str, Any]:
    """Gradients of the packaged pairs' sides (an extraction) and of their differences alone (a refresh).

    Beside the frozen base's forward and backward on the same tokens.
    """
    chat = open_bench_chat(work)
    pairs = load_pairs(None).split()[0]
    loss = bench_config(work, Path()).loss
    rollouts = pair_rollouts(chat, pairs)
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: pair_grads(chat, pairs, loss),
        "differences": lambda: pair_differences(chat, pairs, loss),
        "floor": lambda: frozen_pass(
            chat.policy.model, rollouts, chat.policy.device, work.tokens_per_microbatch
        ),
    }
    return over_floor(functions, work, chat) | {"pairs": len(pairs)} | describe(work, chat)


def bench_svd(work: Work) -> dict[str, Any]:
    """The SVDs of all adapted weights, against one product of each weight with its transpose."""
    chat = open_bench_chat(replace(work, model=replace(work.model, svd_cache=None)))
    weights = [layer.weight.data.float() for layer in chat.policy.layers.values()]
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: [compute_svd(W) for W in weights],
        "floor": lambda: [W @ W.T for W in weights],
    }
    return over_floor(functions, work, chat) | {"modules": len(weights)} | describe(work, chat)


def over_floor(functions: Mapping[str, Callable[[], object]], work: Work, chat: Chat) -> dict[str, Any]:
    """Median seconds of each in turns, and their ratios to `floor`."""
    seconds = alternated(functions, chat.policy.devices, work.steps)
    ratios = {name: s / seconds["floor"] for name, s in seconds.items() if name != "floor"}
    return {f"{name}_s": s for name, s in seconds.items()} | {
        "over_floor" if name == "ours" else f"{name}_over_floor": ratio for name, ratio in ratios.items()
    }


def describe(work: Work, chat: Chat) -> dict[str, Any]:
    """What was measured, and on what."""
    parameters = sum(p.numel() for p in chat.policy.model.parameters())
    adapter = sum(2 * r for r in chat.policy.ranks.values())
    return {
        "model": work.model.model,
        "parameters": parameters - adapter,
        **{name: getattr(work, name) for name in SHOWN},
        "sampler": work.model.sampler,
        "device": ",".join(map(str, chat.policy.devices)),
        "dtype": str(next(chat.policy.model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    } | machine()
