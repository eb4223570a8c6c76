"""What is kept of a sweep's runs: a small JSON file each, with settings, summary and a few columns of steps.

A run is done when its record is of the same run (run/identity.py) and of the same data: what is packaged for
nano, and its pairs. A record of another run or of other data is never overwritten.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from projected_grpo.config import NANO, TrainConfig, from_json
from projected_grpo.errors import UserError
from projected_grpo.options.train import parse
from projected_grpo.pairs import read_pairs
from projected_grpo.results.files import KEPT, check_fields, check_record
from projected_grpo.run.identity import chosen, differing, identity, settings
from projected_grpo.runlog import complete_lines, plain, read_json, write_atomically

SERIES = (
    "hack_s", "gt_s", "cos_pre", "cos_post", "cos_update", "cos_null", "fired", "q_egy", "refr",
    "hack_deploy", "solve_deploy", "zerovar", "lp_s",
)  # fmt: skip
LATER = ("kl", "gn")  # not in records that were kept before December 2026
NOT_READ = ("base.json",)
PAIRS_OF_NANO = ("nano", "nano-oracle")  # made from what lies in data/nano
DIGITS = 4  # kept of every figure


@cache
def nano_data() -> "hashlib.blake2b":
    """The hash so far of what is packaged for nano: model, tasks, pairs."""
    digest = hashlib.blake2b(digest_size=8)
    with as_file(files("projected_grpo") / "data" / NANO) as folder:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in NOT_READ):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest


def kept_data(cfg: TrainConfig) -> str:
    """Hash of the packaged nano data and of a pair set that is not part of it; of a pair file, its bytes.

    Raises UserError for a pair file that cannot be read.
    """
    digest, pairs = nano_data().copy(), cfg.basis.vhack_pairs_path
    if pairs is not None and str(pairs) not in PAIRS_OF_NANO:
        digest.update(read_pairs(str(pairs)))
    return digest.hexdigest()


def read_record(path: Path, run: str, argv: Sequence[str], data: str) -> dict[str, Any] | None:
    """The record of the run of this id, which `train` makes of these arguments and data; None without a file.

    Raises UserError if the file is no record, or that of another run: then it names what differs.
    """
    if not path.exists():
        return None
    record = read_json(path, "sweep")
    check_fields(record, KEPT, {}, f"sweep: {path}")
    check_record(record, SERIES, f"sweep: {path}")
    kept = from_json(record["config"], older=True)
    others = differing(chosen(kept), chosen(parse(argv))) if identity(kept) != run else []
    if record.get("data") != data:
        others.append("the packaged data or the pairs")
    if others:
        raise UserError(
            f"{path} is of another run: {', '.join(others)}; move it away, or name another folder to keep in"
        )
    return record


def write_record(path: Path, folder: Path, argv: Sequence[str], data: str) -> None:
    """Keep what is worth keeping of a run that has ended. The file's name tells its arm and seed."""
    steps, made = complete_lines(folder / "steps.jsonl"), read_json(folder / "config.json", "sweep")
    summary = read_json(folder / "summary.json", "sweep")
    arm, _, seed = path.stem.rpartition("_seed")
    series = {name: [step.get(name) for step in steps] for name in (*SERIES, *LATER)}
    record = {
        "arm": arm,
        "seed": int(seed),
        "command": shlex.join(["projected-grpo", "train", *argv]),
        "git_commit": made.get("git_commit"),
        **rounded({"wall_s": summary["seconds"], "summary": summary, "steps": series}),
        "config": settings(from_json(made["config"])),
        "data": data,
    }
    write_atomically(path, (json.dumps(record, separators=(",", ":")) + "\n").encode())


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return plain(float(f"{value:.{DIGITS}g}"))
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
