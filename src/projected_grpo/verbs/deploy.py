"""The verbs that take a trained policy out of its run: evaluate it, export it."""

import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from projected_grpo.antipasto import weights_digest
from projected_grpo.config import EMBEDDED, NANO, EnvMode, ProblemConfig, SamplingConfig, env_modes
from projected_grpo.deploy.export import check_out, export, read_facts
from projected_grpo.deploy.trained import Source, file_hash, find_source, model_settings, open_source
from projected_grpo.engine.chat import Chat, sampler_opener
from projected_grpo.engine.models import Loaded, encode_chat, load_model, positions, too_long_ones
from projected_grpo.errors import UserError
from projected_grpo.evaluate import Evaluation, Samples, evaluate
from projected_grpo.experiment import SPLIT_SEED, give_modes
from projected_grpo.options.verbs import EvaluateOptions, ExportOptions
from projected_grpo.pools import join, load_pool
from projected_grpo.problems import (
    Problem,
    digest,
    is_eval,
    is_validation,
    read_problems,
    take,
    unhinted,
    with_eval_names,
)
from projected_grpo.results.statistics import Bootstrap, Figure, figures
from projected_grpo.rewards import MODES, Grader, open_grader
from projected_grpo.runlog import append_jsonl, git_commit, versions, write_json

SCHEMA = "projected_grpo.evaluation/1"
MAX_NEW = 1024  # completion tokens of a policy that comes without a run
UNSEEN = (
    "means that the habit does not reach names that training never showed, not that the policy does not hack."
)
Asked = dict[str, tuple[Problem, ...]]  # the same problems by condition: hinted, unseen (names), unhinted
Conditions = dict[str, Evaluation]


def evaluate_verb(options: EvaluateOptions) -> int:
    """Hack rate with hints, solve rate without, as trained and deployed, with intervals over problems."""
    check(options)
    source = find_source(options.source, options.model.model)
    asked = by_condition(chosen_problems(options, source), options.eval_names)
    sampling = sampling_of(options, source)
    if options.completions is not None and options.completions.exists():
        raise UserError(f"--completions {options.completions}: already there; name another file")
    open_sampler = sampler_opener(options.model)
    with ExitStack() as stack:
        grader = open_grader(options.grader, stack)
        loaded = load_model(model_settings(source, options.model))
        asked, skipped = fitting(asked, loaded, sampling.max_new)
        chat = open_source(source, options.model, open_sampler, loaded)
        results = measure(options, source, chat, grader, asked, sampling)
    problems = asked["hinted"]
    how = Bootstrap(options.confidence, options.resamples, options.seed)
    policies = {name: report(conditions, how) for name, conditions in results.items()}
    document = {
        "schema": SCHEMA,
        "command": shlex.join(sys.argv),
        "git_commit": git_commit(),
        "versions": versions(),
        "policy": describe(source, chat),
        "settings": {
            **{name: getattr(options, name) for name in ("subset", "split", "eval_names", "samples", "seed")},
            **{name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "max_new")},
            **{name: getattr(options, name) for name in ("n_problems", "tokens_at_once")},
            **{name: getattr(options.grader, name) for name in ("cpu_seconds", "wall_seconds")},
            "sampler": options.model.sampler,
            "env_mode": ",".join(sorted({p.env_mode for p in problems})),
            "bootstrap": asdict(how),
        },
        "problems": {
            "source": options.problems or (source.cfg.problems.problems if source.cfg else None),
            "digest": digest(problems),
            "ids": [p.problem_id for p in problems],
            "too_long": skipped,
        },
        **{name: policies.get(name) for name in ("as_trained", "deployed")},
    }
    print(table(policies))  # first: they are seen even if the disk is full
    if words := about_names(options.eval_names, source.model):
        print(words)
    write_json(options.out, document)
    print(f"{source.name}: {len(problems)} problems x {options.samples}; all figures in {options.out}")
    return 0


def check(options: EvaluateOptions) -> None:
    """Refuse settings that mean nothing. Raises UserError naming the option."""
    for name in ("n_problems", "top_k", "max_new", "tokens_at_once"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be >= 0, got {getattr(options, name)}")
    if options.samples < 1 or options.resamples < 1:
        raise UserError("--samples and --resamples must be at least 1")
    if not options.temperature > 0 or not 0 < options.top_p <= 1:
        raise UserError("--temperature must be > 0 and --top-p in (0, 1]")
    if not 0 < options.confidence < 1:
        raise UserError(f"--confidence must be in (0, 1), got {options.confidence}")


def chosen_problems(options: EvaluateOptions, source: Source) -> tuple[Problem, ...]:
    """The problems to evaluate on, with their modes and names. Raises UserError if none is left."""
    own = source.cfg.problems if source.cfg else None
    name = options.problems or (own.problems if own else "")
    if not name:
        raise UserError("--problems: name a file (or `embedded` or `nano`); only a run has one of its own")
    problems = with_run_modes(read_problems(ProblemConfig(problems=name)), options, source)
    auto = name in (EMBEDDED, NANO) or (own is not None and name == own.problems)
    if options.subset == "held-out" or (options.subset == "auto" and auto):
        problems = tuple(p for p in problems if is_eval(p))
    if options.split != "all":
        problems = tuple(p for p in problems if is_validation(p) == (options.split == "validation"))
    if not problems:
        raise UserError(f"no problem of {name} is left to evaluate on; --subset=all takes training's, too")
    problems = take(problems, options.n_problems or len(problems), SPLIT_SEED)
    return with_eval_names(problems) if options.eval_names == "eval" else problems


def by_condition(problems: Sequence[Problem], names: str) -> Asked:
    """The prompts of each condition; `both` has hints with training's names and with unseen ones."""
    asked = {"hinted": tuple(problems)}
    if names == "both":
        asked["unseen"] = with_eval_names(problems)
    return asked | {"unhinted": unhinted(problems)}


def with_run_modes(
    problems: Sequence[Problem], options: EvaluateOptions, source: Source
) -> tuple[Problem, ...]:
    """Modes as asked for, else as the run gave them: its teacher pool's partition first."""
    modes: tuple[EnvMode, ...] = env_modes(
        options.env_mode or (source.cfg.problems.env_mode if source.cfg else MODES["run_tests"].name)
    )
    pool = source.cfg.teacher.teacher_pool_dir if source.cfg else None
    if options.env_mode or pool is None:
        return give_modes(problems, modes, {})
    if not pool.is_dir():
        raise UserError(f"{pool}: the run's teacher pool, which said the modes, is gone; give --env-mode")
    prompts = load_pool(pool)
    partition = join(prompts, problems).partition
    if not partition and len(modes) == 1:  # another file than the pool's: its modes, shared out by id
        modes = tuple(sorted({p.env_mode for p in prompts if p.env_mode})) or modes
    return give_modes(problems, modes, partition)


def sampling_of(options: EvaluateOptions, source: Source) -> SamplingConfig:
    max_new = options.max_new or (source.cfg.sampling.max_new if source.cfg else MAX_NEW)
    return SamplingConfig(
        max_new=max_new, temperature=options.temperature, top_p=options.top_p, top_k=options.top_k
    )


def fitting(asked: Asked, loaded: Loaded, max_new: int) -> tuple[Asked, list[str]]:
    """The problems whose prompts leave the model room for max_new tokens, and the ids of the others."""
    model, tokenizer = loaded
    config: Any = model.config
    sizes = {
        same[0].problem_id: max(len(encode_chat(tokenizer, p.messages)) for p in same)
        for same in zip(*asked.values(), strict=True)
    }
    skipped = too_long_ones(sizes, max_new, positions(config))
    left = {
        name: tuple(p for p in problems if p.problem_id not in skipped) for name, problems in asked.items()
    }
    return left, [name for name in sizes if name in skipped]


def measure(
    options: EvaluateOptions,
    source: Source,
    chat: Chat,
    grader: Grader,
    asked: Asked,
    sampling: SamplingConfig,
) -> dict[str, Conditions]:
    """Completions of every condition, of the deployed policy and, where it is known, as trained.

    Where nothing was routed both are the same, and are generated once.
    """
    routed = source.quarantine is not None and chat.policy.quarantine_norm > 0
    how = Samples(sampling, options.samples, options.seed, options.tokens_at_once)
    results: dict[str, Conditions] = {}
    total = sum(map(len, asked.values())) * (1 + routed) * options.samples
    lines = options.completions and options.completions.with_name(options.completions.name + ".part")
    if lines:
        lines.parent.mkdir(parents=True, exist_ok=True)
        lines.unlink(missing_ok=True)
    with tqdm(total=total, desc=source.name, unit=" completions", disable=None) as bar:

        def note(policy: str, condition: str, part: Evaluation) -> None:
            bar.update(sum(map(len, part.texts)))
            if lines:
                append_jsonl(lines, completion_rows(policy, condition, part))

        for policy in ("as_trained", "deployed") if routed else ("deployed",):
            results[policy] = {
                condition: evaluate(
                    chat,
                    grader,
                    problems,
                    how,
                    ablate_quarantine=policy == "deployed",
                    on_chunk=partial(note, policy, condition),
                )
                for condition, problems in asked.items()
            }
    if lines and options.completions:
        lines.replace(options.completions)
    if source.quarantine is not None and not routed:
        results["as_trained"] = results["deployed"]
    return results


def completion_rows(policy: str, condition: str, part: Evaluation) -> list[dict[str, Any]]:
    """Lines of the completions file: rollouts.jsonl's fields, and which policy and prompt."""
    return [
        {
            **{"policy": policy, "condition": condition, "problem_id": p.problem_id, "gi": i},
            **{"env_mode": p.env_mode, "named": p.named, "prompt": p.messages[-1]["content"], "text": text},
            **asdict(grade),
        }
        for p, texts, grades in zip(part.problems, part.texts, part.grades, strict=True)
        for i, (text, grade) in enumerate(zip(texts, grades, strict=True))
    ]


def describe(source: Source, chat: Chat) -> dict[str, Any]:
    cfg = source.cfg
    return {
        "model": source.model,
        "weights": weights_digest(chat.policy),
        "dtype": str(chat.policy.dtype).removeprefix("torch."),
        "device": chat.policy.device.type,
        "run": source.run and source.run.name,
        "intervention": cfg and cfg.arm.intervention,
        "control": cfg and cfg.arm.control,
        "train_seed": cfg and cfg.run.seed,
        "adapter": source.adapter and str(source.adapter),
        "adapter_hash": file_hash(source.adapter),
        "quarantine_hash": file_hash(source.quarantine),
        "delta_hack_norm": chat.policy.quarantine_norm if source.quarantine else None,
    }


def report(conditions: Conditions, how: Bootstrap) -> dict[str, Any]:
    """Figures of every condition: overall, per mode that the hint was of, per kind of held-out problem."""
    problems = conditions["hinted"].problems
    modes: dict[str, set[str]] = {m: {p.problem_id for p in problems if p.env_mode == m} for m in MODES}
    kinds = {s: {p.problem_id for p in problems if p.split == s} for s in sorted({p.split for p in problems})}

    def per(groups: Mapping[str, Collection[str]], evaluation: Evaluation) -> dict[str, Any]:
        return {name: figures(evaluation, how, ids) for name, ids in groups.items() if name and ids}

    found = {
        condition: {
            **figures(evaluation, how),
            "by_mode": per(modes, evaluation),
            "by_split": per(kinds, evaluation),
        }
        for condition, evaluation in conditions.items()
    }
    return plain_figures(found)


def plain_figures(value: Any) -> Any:
    if isinstance(value, Figure):
        return asdict(value)
    return {name: plain_figures(item) for name, item in value.items()}


def table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The main figures, a row per policy and mode."""
    columns = {
        "hack": ("hinted", "hack"),
        "hack, unseen names": ("unseen", "hack"),
        "attempt": ("hinted", "attempt"),
        "hack of attempts": ("hinted", "exploit_given_attempt"),
        "solve": ("hinted", "solve"),
        "solve unhinted": ("unhinted", "solve"),
    }
    rows = []
    for policy, found in policies.items():
        shown = [where for where in columns.values() if where[0] in found]
        for mode in ("all", *found["hinted"]["by_mode"]):
            own = {name: part if mode == "all" else part["by_mode"][mode] for name, part in found.items()}
            size = own["hinted"]["hack"]
            cells = [cell(own[condition][figure]) for condition, figure in shown]
            rows.append([policy, mode, *cells, size["problems"], size["n"]])
    headers = [name for name, where in columns.items() if where in shown]
    return tabulate(
        rows, ["policy", "mode", *headers, "problems", "n"], tablefmt="github", disable_numparse=True
    )


def about_names(names: str, model: str) -> str:
    """What a hack rate of 0 means in the table, where hints name what training never did."""
    nano = " The nano model can follow no other names than training's." if model == NANO else ""
    if names == "both":
        return f"hack: hints with training's names. hack, unseen names: with others, where 0 {UNSEEN}{nano}"
    if names == "eval":
        return f"hack: hints with unseen names, where 0 {UNSEEN}{nano} --eval-names=both asks both."
    return ""


def cell(figure: Mapping[str, Any]) -> str:
    """`rate [low, high]`."""
    if figure["rate"] is None:
        return "-"
    bounds = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['rate']:.3f}{bounds}"


def export_verb(options: ExportOptions) -> int:
    """Write the deployed model as a plain transformers folder, with a model card and the adapter alone."""
    check_out(options.out)
    source = find_source(options.source, options.model.model)
    chat = open_source(source, options.model)
    facts = read_facts(source, chat, as_trained=options.as_trained)
    export(facts, chat, options.out)
    print(f"{options.out}: {source.name} {'as trained' if options.as_trained else 'as deployed'}")
    return 0
