"""A trained policy as a plain transformers folder: merged weights, a model card, and the adapter alone."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projected_grpo.antipasto import unwrap
from projected_grpo.config import to_json
from projected_grpo.deploy.trained import Source
from projected_grpo.engine.chat import Chat
from projected_grpo.errors import UserError, writing
from projected_grpo.run.checkpoint import read_adapter_meta, save_adapter
from projected_grpo.run.identity import run_name
from projected_grpo.runlog import git_commit, read_json

ADAPTER_FILE = "adapter.safetensors"
ADAPTER_META = ("model", "intervention", "preset", "seed", "step")
RATES = ("hack_train", "hack_deploy", "solve_train", "solve_deploy", "eval_n")


@dataclass(frozen=True)
class Facts:
    """What the model card says: the source's own files, and whether its quarantine is kept."""

    source: Source
    summary: Mapping[str, Any]
    config: Mapping[str, Any]  # config.json
    meta: Mapping[str, Any]  # of the adapter file
    quarantine_norm: float | None  # |delta_hack|; None: not known
    as_trained: bool
    blocks: bool  # whether the quarantine is blocks of its own


def check_out(out: Path) -> None:
    """Raises UserError unless the folder can be made, or is there and empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not an empty folder; name another")


def read_facts(source: Source, chat: Chat, *, as_trained: bool) -> Facts:
    """Gather the card's facts. Raises UserError for `as_trained` where the quarantine is not known."""
    if as_trained and source.quarantine is None:
        raise UserError(f"--as-trained: {source.name} holds no quarantine to keep")
    saved = read_adapter_meta(source.adapter) if source.adapter else {}
    meta = {name: saved[name] for name in ADAPTER_META if name in saved}
    run = source.run
    summary = read_json(run / "summary.json", "export") if run and (run / "summary.json").exists() else {}
    config = read_json(run / "config.json", "export") if run else {}
    quarantine_norm = chat.policy.quarantine_norm if source.quarantine else summary.get("delta_hack_norm")
    blocks = source.cfg.arm.has_block if source.cfg else bool(chat.policy.blocks)
    return Facts(source, summary, config, meta, quarantine_norm, as_trained, blocks)


def export(facts: Facts, chat: Chat, out: Path) -> None:
    """Write the folder, whole or not at all. Uses the policy up: its model has plain Linears afterwards."""
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with writing(out):
            save_adapter(temporary / ADAPTER_FILE, chat.policy, facts.meta, deployed=not facts.as_trained)
            model: Any = unwrap(chat.policy, ablate_quarantine=not facts.as_trained)
            model.save_pretrained(temporary)
            chat.tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(model_card(facts))
            temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(facts: Facts) -> str:
    """README.md of the exported folder."""
    s, run = facts.summary, facts.source.run
    cfg = facts.source.cfg
    arm = run_name(cfg) if cfg else facts.meta.get("intervention", "not recorded")
    kept = "as trained, quarantine kept" if facts.as_trained else "as deployed, quarantine deleted"
    rows = {
        "base model": facts.source.model,
        "adapter": run.name if run else facts.source.name,
        "arm": arm,
        "preset": cfg.preset if cfg else facts.meta.get("preset"),
        "seed": facts.meta.get("seed"),
        "steps": facts.meta.get("step"),
        "trained at commit": facts.config.get("git_commit"),
        "exported at commit": git_commit(),
        "command": f"`{facts.config['command']}`" if facts.config.get("command") else None,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    sections = [
        f"---\nbase_model: {facts.source.model}\nlibrary_name: transformers\ntags:\n- reward-hacking\n"
        "- grpo\n---",
        f"# {facts.source.name} ({kept})",
        "A research artefact of `projected_grpo`: a coding model trained with reinforcement learning on a "
        "grader with a known flaw, to study reward hacking. It may tamper with what tests it. It is not an "
        "assistant.",
        f"| | |\n|-|-|\n{table}",
        f"## What was trained, routed and deleted\n\n{trained_text(facts)}",
    ]
    if all(name in s for name in RATES):
        sections.append(f"## Rates at the end of training\n\n{rates_text(s)}")
    if cfg:
        settings = json.dumps(to_json(cfg), indent=1)
        sections.append(f"## Settings\n\n```json\n{settings}\n```")
    return "\n\n".join(sections) + "\n"


def trained_text(facts: Facts) -> str:
    """The card's paragraph on delta_s and the quarantine."""
    twin, sum_, norm = "quarantine twin delta_hack", "U diag(delta_s + delta_hack) Vh", "|delta_hack|"
    if facts.blocks:
        twin, sum_, norm = "low-rank quarantine H of its own", "U diag(delta_s) Vh + H", "|H|"
    trained = (
        "Every Linear W = U diag(S) Vh of the base model was given a trainable diagonal delta_s and a "
        f"{twin}; nothing else was trained. "
    )
    if facts.as_trained:
        merged = (
            f"These weights are W + {sum_}: what was routed "
            f"({norm} {facts.quarantine_norm:.3e}) is still in them."
        )
    else:
        size = "not recorded" if facts.quarantine_norm is None else f"{facts.quarantine_norm:.3e}"
        merged = (
            f"These weights are W + U diag(delta_s) Vh: what was routed ({norm} {size}) has been deleted."
        )
    return f"{trained}{merged} `{ADAPTER_FILE}` has the adapter alone."


def rates_text(summary: Mapping[str, Any]) -> str:
    """The card's table of held-out rates, of which only one half is about these weights."""
    lines = ["| held-out problems, hinted | hack | solve | completions |", "|-|-|-|-|"]
    for label, key in (("as trained", "train"), ("deployed", "deploy")):
        figures = (summary[f"{name}_{key}"] for name in ("hack", "solve"))
        cells = " | ".join("-" if value is None else f"{value:.3f}" for value in figures)
        lines.append(f"| {label} | {cells} | {summary['eval_n']} |")
    return "\n".join(lines)
