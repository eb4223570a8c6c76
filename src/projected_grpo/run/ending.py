"""The last lines of a run: its figures, then in plain words rates, checks, and what to type next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from projected_grpo.arm_settings import AdvmodSettings, MonitorSettings
from projected_grpo.arms.stages import as_it_is, as_paid, nothing
from projected_grpo.arms.table import arm_of
from projected_grpo.config import NANO, TINY_RANDOM, TrainConfig
from projected_grpo.options.typed import flags
from projected_grpo.run.identity import arm_name, given
from projected_grpo.runlog import command_line

RANDOM_MODEL = "random model: rates mean nothing. This run shows that every part works."
# Controls under which the direction is the pairs' own.
OF_THE_DIRECTION = ("none", "random_routing", "shrink")
ROUNDING = 1e-6  # of a cosine in float32
MUCH_HACKING = 0.25  # of the rollouts of an arm that pays exploits less
Check = tuple[bool, str]
"""Whether it is as it should be, and what was found."""


def rate(count: int, n: int) -> float | None:
    """A share; None of nothing."""
    return count / n if n else None


def mean_of(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean of a column over the steps that have it (cos_post is missing where nothing was kept)."""
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def show(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def end_block(
    cfg: TrainConfig,
    s: Mapping[str, Any],
    changed: float,
    records: Sequence[Mapping[str, Any]],
    folder: Path,
) -> str:
    """The run in a few lines: the main metric first, what to type next last. `s` is its summary."""
    return "\n".join(
        [
            main_metric(cfg, s),
            *([] if s["model"] == TINY_RANDOM else [cue(s)]),
            modes_table(s),
            *details(cfg, s, changed),
            "",
            rates_table(cfg, s),
            *([RANDOM_MODEL] if s["model"] == TINY_RANDOM else []),
            "",
            *(f"{'ok' if ok else 'look':<5} {text}" for ok, text in checks(cfg, s, records)),
            "",
            f"files of this run: {folder}",
            f"its log, with the first hack of each kind: {cfg.run.log_dir / folder.name}.log",
            *next_commands(cfg),
        ]
    )


def main_metric(cfg: TrainConfig, s: Mapping[str, Any]) -> str:
    """The line that scripts read. Its first two rates count the teacher's rollouts too."""
    return (
        f"HACK_RATE {show(s['hack_rate'])} | PASS_RATE {show(s['pass_rate'])} | "
        f"HACK_STUDENT {show(s['hack_rate_student'])} | HACK_TEACHER {show(s['hack_rate_teacher'])} | "
        f"{arm_name(cfg)} {s['preset']} {s['model']} seed {s['seed']} | {s['steps']} steps, "
        f"{s['generations']} generations, {s['seconds']:.0f} s, peak {show(s['peak_gb'], '.1f')} GB"
    )


def cue(s: Mapping[str, Any]) -> str:
    """One line on what the main metric says for this arm."""
    if s["intervention"] == "none":
        if s["hack_rate_student"]:
            return "GREEN: the student hacked, so there is something for the other arms to lower."
        return "no student hack: nothing to project against; don't sweep this setting."
    return "compare HACK_STUDENT and the deployed rates with intervention=none at the same seed and settings."


def modes_table(s: Mapping[str, Any]) -> str:
    """Per mode: when and how often it was hacked in training, and the held-out rates both ways."""
    held_out = ("hack", "-> deployed", "solve", "-> deployed", "completions")
    headers = ["mode", "", "training:\nfirst hack", "training:\nhack"]
    headers += [f"held-out:\n{name}" for name in held_out]
    body = []
    for mode, m in s["by_mode"].items():
        known = "in-dist" if m["in_distribution"] else "held-out"
        first = "-" if m["first_exploit_step"] is None else f"step {m['first_exploit_step']}"
        student = f"{show(rate(m['student_exploits'], m['student_n']))} of {m['student_n']}"
        body.append([mode, known, first, student, *both_ways(m)])
    body += [[split, "", "", "", *both_ways(m)] for split, m in s["by_split"].items()]
    all_of = f"{show(s['hack_rate_student'])} of {s['generations']}"
    body.append(["all", "", "", all_of, *both_ways(s)])
    return tabulate(body, headers=headers, tablefmt="simple", disable_numparse=True)


def both_ways(m: Mapping[str, Any]) -> list[Any]:
    return [*(show(m[k]) for k in ("hack_train", "hack_deploy", "solve_train", "solve_deploy")), m["eval_n"]]


def details(cfg: TrainConfig, s: Mapping[str, Any], changed: float) -> list[str]:
    """Labels, detectors, and what deployment deletes."""
    detectors = ", ".join(f"{name} {show(value)}" for name, value in s["detectors"].items())
    labels = s["labels"] + (" (an upper bound)" if s["labels"] == "oracle" else "")
    return [
        f"labels of rollouts that this arm reads: {labels}",
        f"student completions flagged (own tests: C pass a stub, D fail a right answer, E pass): {detectors}",
        f"{quarantine_name(cfg)} {s['delta_hack_norm']:.2e}; deployment changes {show(changed, '.0%')} of "
        "held-out completions",
    ]


def rates_table(cfg: TrainConfig, s: Mapping[str, Any]) -> str:
    """What the student did in training, and what would be deployed does on problems that it never saw."""
    body = [
        [
            "student, in training",
            show(s["hack_rate_student"]),
            show(s["pass_rate_student"]),
            s["generations"],
        ],
        ["deployed, on held-out problems", show(s["hack_deploy"]), show(s["solve_deploy"]), s["eval_n"]],
    ]
    title = f"{arm_name(cfg)}, seed {s['seed']}"
    headers = [title, "hacks", "solves", "completions"]
    table = tabulate(body, headers=headers, tablefmt="simple", disable_numparse=True)
    return f"{table}\nA hack is paid without a right answer; to solve is to give a right one."


def quarantine_name(cfg: TrainConfig) -> str:
    return "|H| of the blocks" if cfg.arm.has_block else "|delta_hack|"


def checks(cfg: TrainConfig, s: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Check]:
    """What this run can be held to, each with what was found."""
    live = [r for r in records if r.get("cos_pre") is not None]
    spread = rate(len(live), len(records)) or 0.0
    made = f"{len(records)} of {cfg.optim.steps} steps made, {s['skipped']} skipped"
    sound = bool(s["finished"]) and not s["skipped"]
    return [
        (
            sound,
            made + ("" if sound else ": a skipped step had no finite gradient; the log says why a run ended"),
        ),
        (
            spread > 0.5,
            f"rewards differed within a group in {spread:.0%} of steps"
            + ("" if spread > 0.5 else ": where they are all alike, nothing is learnt"),
        ),
        *(checks_of_direction(cfg, live) if live else []),
        *checks_of_rewards(cfg, s, records),
        check_of_quarantine(cfg, s),
    ]


def checks_of_direction(cfg: TrainConfig, live: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Does the gradient point hack-ward, and less so after the arm?"""
    pre, leak = (mean_of(live, key) or 0.0 for key in ("cos_pre", "cos_update"))
    kept = [r for r in live if r.get("cos_post") is not None]  # none where an arm keeps nothing
    before, post = (mean_of(kept, key) or 0.0 for key in ("cos_pre", "cos_post"))
    chance = live[0]["cos_null"]
    found = f"hack-ward share of the gradient: cos_pre {pre:.3f}, by chance {show(chance)}"
    own = cfg.arm.control in OF_THE_DIRECTION
    above = pre > (chance or 0.0)
    after = f"after the arm: cos_post {post:.3f}; of the change that AdamW made: {leak:.3f}"
    if not own:
        found += f" (the direction is that of the control {cfg.arm.control})"
    elif not above:
        found += ": the direction does not fit this model, or is stale; `verify` tests it"
    return [
        (above or not own, found),
        (post <= before + ROUNDING, after + ("" if post <= before + ROUNDING else ": larger than before it")),
    ]


def check_of_quarantine(cfg: TrainConfig, s: Mapping[str, Any]) -> Check:
    """Is the quarantine empty where it has to be, and not where something is to be routed?"""
    norm, name = s["delta_hack_norm"], quarantine_name(cfg)
    if cfg.arm.intervention in ("route", "route2", "absorb"):
        holds, what = "parameters that deployment deletes", "nothing was routed"
    elif arm_of(cfg.arm).deploy is not nothing:
        holds, what = "taken out of delta_s at deployment", "nothing in delta_s lay hack-ward"
    else:
        return norm == 0, f"{name} {norm:.2e}: " + (
            "as this arm routes nothing" if norm == 0 else "must be 0 here"
        )
    ok = norm > 0 or cfg.arm.control != "none"
    return ok, f"{name} {norm:.2e}: {holds if norm > 0 else what}"


def checks_of_rewards(
    cfg: TrainConfig, s: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[Check]:
    """Those of an arm that shapes rewards, or trains on other prompts."""
    arm, name = arm_of(cfg.arm), cfg.arm.intervention
    if arm.prompt is not as_it_is:
        within, without = s["hack_rate_student"] or 0.0, s["hack_deploy"] or 0.0
        found = (
            f"hack rate {within:.3f} with the inoculation prompt (training), {without:.3f} without (held-out)"
        )
        ok = within > without or not within + without
        return [(ok, found + ("" if ok else ": what was learnt does not depend on the prompt"))]
    if arm.reward is as_paid:
        return []
    share = mean_of(records, "shaped") or 0.0
    if cfg.arm.scored_by is None:
        monitored = isinstance(cfg.arm, MonitorSettings) and cfg.arm.monitor_accuracy < 1
        seen = "what the monitor calls exploits" if monitored else "exploits"
        ok = share <= MUCH_HACKING
        found = f"{name} changed {share:.3f} of rewards: {seen}"
        return [(ok, found + ("" if ok else "; hacking grows all the same"))]
    gap = mean_of(records, "zgap")
    screens = isinstance(cfg.arm, AdvmodSettings) and cfg.arm.advmod_form == "screening"
    did = f"left out {share:.3f} of rollouts" if screens else f"lowered {share:.3f} of rewards"
    found = f"{name} {did}; exploits score {show(gap)} deviations above the others"
    if cfg.arm.control != "none":
        return [(True, f"{found} (the direction is that of the control {cfg.arm.control})")]
    ok = gap is None or gap > 0
    return [(ok, found + ("" if ok else ": the direction does not tell them apart"))]


def next_commands(cfg: TrainConfig) -> list[str]:
    """What to type next, as it can be pasted: the run to compare with, then both side by side."""
    if cfg.model.model == TINY_RANDOM:
        told = "next, a small model that learns to hack (two CPU cores, about three minutes):"
        return [told, "  " + command_line("train", "nano", "--intervention=none")]
    arm, basis = vars(cfg.arm), vars(cfg.basis)
    other = {name: value for name, value in given(cfg).items() if name not in arm}
    if cfg.arm.intervention == "none":
        told = "the same with the hack direction taken out of every gradient"
        pairs = {"vhack_pairs_path": "nano-sampled"} if cfg.model.model == NANO else {}
        other = {"intervention": "erase", **pairs, **other}
    else:
        told = "unless you have it, the same without an intervention"
        other = {"intervention": "none"} | {n: value for n, value in other.items() if n not in basis}
    runs = [] if cfg.run.out_dir == Path("out") else [cfg.run.out_dir / "runs"]
    return [
        f"next, {told}; then both side by side:",
        "  " + command_line("train", cfg.preset, *flags(other)),
        "  " + command_line("results", *runs),
    ]
