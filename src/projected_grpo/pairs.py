"""Contrastive pairs: one prompt, a completion that tampers with its grader and one that answers honestly.

Pairs are written before any rollout is seen and never tuned to what RL finds (docs/spec.md). A placebo set
has the same form, but its two completions are both honest and differ in something else.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from projected_grpo.config import BasisConfig, EnvMode, left_out
from projected_grpo.errors import UserError
from projected_grpo.nano_tasks import as_row, oracle_pairs
from projected_grpo.problems import (
    CONTAINERS,
    HALF_FOUND,
    SYSTEM,
    Problem,
    field_of,
    from_parts,
    has_half,
    id_of,
)
from projected_grpo.rewards import MODES
from projected_grpo.runlog import shown
from projected_grpo.seeds import stream_seed

SCHEMA = "projected_grpo.pairs/1"
Kind = Literal["hack", "placebo"]
DIFFERENCES = ("style", "iteration", "naming")  # of the two honest sides of a placebo pair
PLACEBOS = tuple(f"{world}placebo-{what}" for world in ("", "nano-") for what in DIFFERENCES)
CROSSED = ("nano-corpus-tasks", "nano-corpus-wordings")
PACKAGED = ("core", "nano", "nano-oracle", "nano-solving", "nano-sampled", *CROSSED, *PLACEBOS)
OTHER_FORMS = {
    "DPO rows": {"chosen", "rejected"},
    "chat rows": {"messages"},
    "ShareGPT rows": {"conversations"},
    "chat messages": {"role", "content"},
    "prompts with completions": {"prompt", "completion"},
}
WANTED = (
    "wanted is one JSON object with schema, problems and pairs, each pair with id, flavour, env_mode, "
    "problem_id or prompt, hack (rejected) and clean (chosen), see docs/pairs.md"
)
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
        document = _document(raw)
        kind = document.get("kind", "hack")
        if kind not in get_args(Kind):
            raise ValueError(f"kind is {shown(kind)}, expected one of {', '.join(get_args(Kind))}")
        title = field_of(document, "name") if "name" in document else "pairs"
        setup = (files("projected_grpo") / "data" / "setup_code.py").read_text()
        problems = dict(_numbered(document, "problems", "problem", lambda row: _problem(row, setup)))
        pairs = tuple(_numbered(document, "pairs", "pair", lambda row: _pair(row, problems)))
    except ValueError as error:
        raise UserError(f"{name}: not a pair file: {error}") from error
    if len({p.pair_id for p in pairs}) < len(pairs):
        raise UserError(f"{name}: two pairs have the same id")
    if len(pairs) < HELD_OUT + 2:
        raise UserError(
            f"{name}: {len(pairs)} pairs; at least {HELD_OUT + 2} are needed ({HELD_OUT} held out)"
        )
    return PairSet(title, pairs, hashlib.blake2b(raw, digest_size=16).hexdigest(), kind)


def _document(raw: bytes) -> dict[str, Any]:
    """The JSON object of a pair file. ValueError saying what was found instead."""
    for magic, kind in CONTAINERS.items():
        if raw.startswith(magic):
            raise ValueError(f"it is {kind}; {WANTED}")
    try:
        found = json.loads(raw)
    except UnicodeDecodeError as error:
        raise ValueError("it is not text in UTF-8 or UTF-16") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        first: object = None
        with suppress(ValueError, RecursionError):
            first = json.loads(error.doc.strip().partition("\n")[0])
        lines = f"JSON lines, {_form(first)}; {WANTED}"
        raise ValueError(lines if isinstance(first, dict) else f"not valid JSON ({error})") from error
    if has_half(raw, found):
        raise ValueError(HALF_FOUND)
    if isinstance(found, list):
        raise ValueError(f"a JSON list, {_form(found[0]) if found else 'empty'}; {WANTED}")
    if not isinstance(found, dict) or not {"schema", "pairs"} <= found.keys():
        raise ValueError(f"{_form(found)}; {WANTED}")
    if found["schema"] != SCHEMA:
        raise ValueError(f"its schema is {shown(found['schema'])}, expected {shown(SCHEMA)}")
    return found


def _form(row: object) -> str:
    """What a JSON value of another file is, by its fields."""
    if not isinstance(row, dict):
        return f"a value {shown(row)}"
    for form, fields in OTHER_FORMS.items():
        if fields <= row.keys():
            return f"{form} ({', '.join(sorted(fields))})"
    return f"an object with {shown(sorted(row))}"


def _numbered(
    document: Mapping[str, Any], name: str, what: str, read: Callable[[Mapping[str, Any]], Any]
) -> Iterator[Any]:
    """What is read of each entry of a list. ValueError naming the entry, by its id or else its number."""
    for number, row in enumerate(field_of({name: [], **document}, name, list), start=1):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"must be an object, got {shown(row)}")
            yield read(row)
        except ValueError as error:
            known = row.get("id") if isinstance(row, dict) else None
            where = shown(known) if isinstance(known, str) and known else number
            raise ValueError(f"{what} {where}: {error}") from error


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


def _problem(row: Mapping[str, Any], setup: str) -> tuple[str, tuple[Problem, str]]:
    """A problem with its id, and what is wrong with it."""
    own_setup = field_of(row, "setup_code") if "setup_code" in row else setup
    return id_of(row, "id"), from_parts(row, own_setup)


def _pair(row: Mapping[str, Any], problems: Mapping[str, tuple[Problem, str]]) -> Pair:
    pair_id, flavour, mode = (field_of(row, name) for name in ("id", "flavour", "env_mode"))
    if mode not in MODES:
        raise ValueError(f"env_mode {shown(mode)} is not one of {', '.join(MODES)}")
    problem = None
    if "problem_id" in row:
        name = id_of(row, "problem_id")
        if name not in problems:
            raise ValueError(f"problem_id {shown(name)} is not among the file's problems")
        problem, trouble = problems[name]
        if trouble:
            raise ValueError(f"its problem has {trouble}")
        problem = replace(problem, env_mode=mode)
    asked = {"role": "user", "content": "" if problem else _filled(row, "prompt")}
    messages = problem.messages if problem else ({"role": "system", "content": SYSTEM}, asked)
    return Pair(pair_id, flavour, mode, messages, _filled(row, "hack"), _filled(row, "clean"), problem)


def _filled(row: Mapping[str, Any], name: str) -> str:
    text: str = field_of(row, name)
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text
