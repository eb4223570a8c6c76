"""The verb that scores directions before any training."""

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from projected_grpo.config import NANO, NANO_PRESET, GraderConfig, LossConfig, ProblemConfig, SamplingConfig
from projected_grpo.engine.chat import Chat, open_chat, sampler_opener
from projected_grpo.engine.models import Loaded, load_model
from projected_grpo.errors import UserError
from projected_grpo.evaluate import Samples, evaluate
from projected_grpo.experiment import SPLIT_SEED
from projected_grpo.options.verbs import ScoredOn, ScoreOptions
from projected_grpo.pairs import load_pairs
from projected_grpo.prepare.sample_pool import fitting_prompts
from projected_grpo.problems import Problem, is_eval, take
from projected_grpo.results.plots import separations
from projected_grpo.rewards import open_grader
from projected_grpo.runlog import git_commit, versions, write_json
from projected_grpo.score.directions import BASIS, check_lengths, name_of, read_source
from projected_grpo.score.graded import Completion, of_evaluation, read_graded
from projected_grpo.score.measure import ADVMOD
from projected_grpo.score.report import score, table
from projected_grpo.seeds import stream_seed
from projected_grpo.verbs.grade import with_modes

OTHERS_MAX_NEW = 512  # completion tokens at most, of problems that are not nano's
PER_PROBLEM = 8  # completions of one problem; more where there are too few problems


def score_verb(options: ScoreOptions) -> int:
    """Does a direction point at hacks? Separation, foretold effect, nulls, support; before any training."""
    if not options.directions:
        raise UserError("name a direction: a pair set (nano-sampled), a pair file, or a basis file")
    names = [name_of(direction) for direction in options.directions]
    if len(set(names)) < len(names):
        raise UserError(f"two directions have one name: {', '.join(names)}")
    for name in options.directions:
        if name.endswith(BASIS) and not Path(name).exists():
            raise UserError(f"{name}: no such file; `projected-grpo extract` makes a basis")
    basis, loss = NANO_PRESET.basis, LossConfig(tokens_per_microbatch=options.tokens_per_microbatch)
    asked = completions_of(options.on, options.model.model, options.grader)
    pair_sets = [load_pairs(Path(name)) for name in options.directions if not name.endswith(BASIS)]
    open_sampler = sampler_opener(options.model)
    loaded = load_model(options.model)
    for pairs in pair_sets:
        check_lengths(loaded, pairs)
    completions = asked(loaded)  # too long ones are refused before the SVD
    chat = open_chat(options.model, open_sampler, loaded)
    sources = [read_source(chat, name, basis, loss, ADVMOD) for name in options.directions]
    document = {
        "command": shlex.join(sys.argv),
        "git_commit": git_commit(),
        "versions": versions(),
        "model": options.model.model,
        "on": asdict(options.on),
    } | score(chat, completions(chat), sources, basis, loss, options.on.nulls)
    print(table(document))
    if options.json is not None:
        write_json(options.json, document)
    if options.plot is not None:
        separations(document["directions"], options.plot.with_suffix(""))
    return 0


Completions = Callable[[Chat], list[Completion]]


def completions_of(on: ScoredOn, model: str, grader: GraderConfig) -> Callable[[Loaded], Completions]:
    """What gives the completions, once there is a model and then its chat.

    A pool is read at once, and refused if it is bad; so are prompts as soon as the model has its positions.
    """
    check(on)
    problems = problems_of(on, model)
    if on.pool is None:
        held_out, max_new = held_out_of(problems, on, model)
        return lambda loaded: partial(
            drawn, problems=fitting_prompts(loaded, held_out, max_new), max_new=max_new, on=on, grader=grader
        )
    stored = stored_completions(on.pool, on.rollouts, problems)
    return lambda loaded: lambda chat: stored


def check(on: ScoredOn) -> None:
    """Refuse settings that mean nothing. Raises UserError naming the option."""
    for name in ("max_new", "temperature", "seed") if on.pool else ():
        if getattr(on, name) != getattr(ScoredOn, name):
            raise UserError(f"--{name.replace('_', '-')} is for sampling; with --pool nothing is sampled")
    for name, least in (("rollouts", 2), ("max_new", 0), ("nulls", 1)):
        if getattr(on, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(on, name)}")
    if not on.temperature > 0:
        raise UserError(f"--temperature must be > 0, got {on.temperature}")


def stored_completions(pool: Path, most: int, problems: tuple[Problem, ...]) -> list[Completion]:
    """At most so many of a pool, whole problems in the order of a hash. UserError if none fits whole."""
    found = read_graded(pool, problems)
    sizes = Counter(c.problem.problem_id for c in found)
    taken: set[str] = set()
    room = most
    for name in sorted(sizes, key=lambda name: stream_seed(SPLIT_SEED, "scored", name)):
        if sizes[name] <= room:
            taken.add(name)
            room -= sizes[name]
    if not taken:
        raise UserError(
            f"--rollouts {most}: no problem of the pool has so few; {min(sizes.values())} fit one"
        )
    return [c for c in found if c.problem.problem_id in taken]


def problems_of(on: ScoredOn, model: str) -> tuple[Problem, ...]:
    """The problems that completions are of, with their modes. Raises UserError if none are named."""
    if not (name := named(on, model)):
        raise UserError("--problems: name the file of the problems (or `embedded`, `nano`)")
    mode = on.env_mode or (NANO_PRESET.problems.env_mode if name == NANO else "run_tests")
    return with_modes(ProblemConfig(problems=name, env_mode=mode))


def named(on: ScoredOn, model: str) -> str:
    return on.problems or (NANO if model == NANO else "")


def held_out_of(problems: Sequence[Problem], on: ScoredOn, model: str) -> tuple[list[Problem], int]:
    """The held-out problems that are sampled, and the tokens of a completion. UserError if there is none."""
    held_out = list(take([p for p in problems if is_eval(p)], max(1, on.rollouts // PER_PROBLEM), SPLIT_SEED))
    if not held_out:
        raise UserError(
            f"no problem of {named(on, model)} is held out; give --pool, or a file with more of them"
        )
    own = NANO_PRESET.sampling.max_new if named(on, model) == NANO else OTHERS_MAX_NEW
    return held_out, on.max_new or own


def drawn(
    chat: Chat, problems: Sequence[Problem], max_new: int, on: ScoredOn, grader: GraderConfig
) -> list[Completion]:
    """Completions of these problems, sampled from the model and graded."""
    sampling = SamplingConfig(max_new=max_new, temperature=on.temperature, top_p=1.0, top_k=0)
    how = Samples(sampling, max(2, on.rollouts // len(problems)), on.seed, tokens_at_once=131072)
    with ExitStack() as stack:
        opened = open_grader(grader, stack)
        return of_evaluation(evaluate(chat, opened, problems, how, ablate_quarantine=False))
