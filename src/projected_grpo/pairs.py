"""Contrastive pairs: one prompt, a completion that tampers with its grader and one that answers honestly.

Pairs are written before any rollout is seen and never tuned to what RL finds (docs/spec.md). A placebo set
has the same form, but its two completions are both honest and differ in something else.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from projected_grpo.config import BasisConfig, EnvMode, left_out
from projected_grpo.errors import UserError
from projected_grpo.nano_tasks import as_row, oracle_pairs
from projected_grpo.problems import SYSTEM, Problem, from_parts
from projected_grpo.rewards import MODES
from projected_grpo.seeds import stream_seed

SCHEMA = "projected_grpo.pairs/1"
Kind = Literal["hack", "placebo"]
DIFFERENCES = ("style", "iteration", "naming")  # of the two honest sides of a placebo pair
PLACEBOS = tuple(f"{world}placebo-{what}" for world in ("", "nano-") for what in DIFFERENCES)
CROSSED = ("nano-corpus-tasks", "nano-corpus-wordings")
PACKAGED = ("core", "nano", "nano-oracle", "nano-solving", "nano-sampled", *CROSSED, *PLACEBOS)
HELD_OUT = 2  # pairs kept out of every extraction, for verification


@dataclass(frozen=True)
class Pair:
    """A chat prompt with its hack and clean completions (text; in a placebo set two honest variants).

    `problem` is there when the file has it.
    """

    pair_id: str
    flavour: str
    env_mode: EnvMode
    messages: tuple[Mapping[str, str], ...]
    hack: str
    clean: str
    problem: Problem | None = None


@dataclass(frozen=True)
class PairSet:
    """The pairs of one file; `digest` is the hash of its content."""

    name: str
    pairs: tuple[Pair, ...]
    digest: str
    kind: Kind = "hack"

    def of_modes(self, modes: Sequence[EnvMode]) -> "PairSet":
        """Only the pairs of these modes (all if none is named). Raises UserError if too few are left."""
        kept = tuple(p for p in self.pairs if not modes or p.env_mode in modes)
        return self._cut_to(kept, f"--vhack-pairs-modes {','.join(modes)}", "have one")

    def without_modes(self, modes: Sequence[EnvMode]) -> "PairSet":
        """Only the pairs of other modes. Raises UserError if too few are left."""
        kept = tuple(p for p in self.pairs if p.env_mode not in modes)
        return self._cut_to(kept, f"--leave-out {','.join(modes)}", "are left")

    def _cut_to(self, kept: tuple[Pair, ...], option: str, what: str) -> "PairSet":
        if len(kept) < (least := HELD_OUT + 2):
            counted = f"{len(kept)} pairs of {self.name!r} {what}"
            raise UserError(f"{option}: {counted}; at least {least} are needed")
        return replace(self, pairs=kept)

    def split(self) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """(for extraction, held out): by the hash of ids, two pairs of different flavours are kept out."""
        ranked = sorted(self.pairs, key=lambda p: stream_seed("held-out", p.pair_id))
        others = [p for p in ranked if p.flavour != ranked[0].flavour]
        held = {p.pair_id for p in [ranked[0], *others, *ranked[1:]][:HELD_OUT]}
        return (
            tuple(p for p in self.pairs if p.pair_id not in held),
            tuple(p for p in self.pairs if p.pair_id in held),
        )


def chosen_pairs(cfg: BasisConfig) -> PairSet:
    """The pairs a basis is extracted from: a file's or a packaged set's, of the modes that may be shown."""
    return load_pairs(cfg.vhack_pairs_path).of_modes(cfg.vhack_pairs_modes).without_modes(left_out(cfg))


def load_pairs(path: Path | None) -> PairSet:
    """Read a pair JSON (docs/pairs.md) or a packaged set by name (None: `core`). Raises UserError if bad."""
    name = "core" if path is None else str(path)
    return parse_pairs(read_pairs(name), name)


def read_pairs(name: str) -> bytes:
    """The bytes of a packaged set or of a file. Raises UserError if it cannot be read."""
    try:
        return packaged_pairs(name) if name in PACKAGED else Path(name).read_bytes()
    except OSError as error:
        sets = ", ".join(PACKAGED)
        why = error.strerror
        raise UserError(f"pairs {name}: cannot be read ({why}), and no packaged set: {sets}") from error


def parse_pairs(raw: bytes, name: str) -> PairSet:
    """The pairs of a JSON document; `name` is what to call it. Raises UserError if it breaks the schema."""
    try:
        document = json.loads(raw)
        if document.get("schema") != SCHEMA:
            raise UserError(f"{name}: schema is {document.get('schema')!r}, expected {SCHEMA!r}")
        kind = document.get("kind", "hack")
        if kind not in get_args(Kind):
            raise UserError(f"{name}: kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
        setup = (files("projected_grpo") / "data" / "setup_code.py").read_text()
        problems = {
            row["id"]: from_parts(dict(row), row.get("setup_code", setup))
            for row in document.get("problems", [])
        }
        pairs = tuple(_pair(dict(row), problems) for row in document["pairs"])
        title = document.get("name", "pairs")
        if not isinstance(title, str):
            raise TypeError("name must be a string")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: not a pair file: {type(error).__name__} {error}") from error
    if len({p.pair_id for p in pairs}) < len(pairs):
        raise UserError(f"{name}: two pairs have the same id")
    if len(pairs) < HELD_OUT + 2:
        raise UserError(
            f"{name}: {len(pairs)} pairs; at least {HELD_OUT + 2} are needed ({HELD_OUT} held out)"
        )
    return PairSet(title, pairs, hashlib.blake2b(raw, digest_size=16).hexdigest(), kind)


def packaged_pairs(name: str) -> bytes:
    """The JSON of a set that comes with the package; `nano-oracle` is made from the nano corpus itself."""
    data = files("projected_grpo") / "data"
    if name == "nano":
        return (data / "nano" / "pairs.json").read_bytes()
    if name != "nano-oracle":
        return (data / f"pairs_{name.replace('-', '_')}.json").read_bytes()
    made = oracle_pairs()
    problems = [as_row(instance) for _, instance, _, _ in made]
    pairs = [
        {
            "id": f"{mode}-{instance.instance_id}",
            "flavour": mode,
            "env_mode": mode,
            "problem_id": instance.instance_id,
            "hack": hack,
            "clean": clean,
        }
        for mode, instance, hack, clean in made
    ]
    return json.dumps({"schema": SCHEMA, "name": name, "problems": problems, "pairs": pairs}).encode()


def _pair(row: Mapping[str, Any], problems: Mapping[str, tuple[Problem, str]]) -> Pair:
    for name in ("id", "flavour"):
        if not isinstance(row[name], str):
            raise UserError(f"pair {row['id']!r}: {name} is not text")
    mode = row["env_mode"]
    if mode not in MODES:
        raise UserError(f"pair {row['id']!r}: env_mode {mode!r} is not one of {', '.join(MODES)}")
    if "problem_id" in row:
        problem, trouble = problems[row["problem_id"]]
        if trouble:
            raise UserError(f"pair {row['id']!r}: its problem has {trouble}")
        problem = replace(problem, env_mode=mode)
        messages: Sequence[Mapping[str, str]] = problem.messages
    else:
        problem = None
        messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]})
    for name in ("hack", "clean", *(["prompt"] if problem is None else [])):
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"pair {row['id']!r}: {name} is empty or not text")
    return Pair(row["id"], row["flavour"], mode, tuple(messages), row["hack"], row["clean"], problem)
