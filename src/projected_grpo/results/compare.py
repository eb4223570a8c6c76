"""Figures over runs: one estimate per setting and metric, per mode, and paired per seed against another arm.

Two runs of one context and seed start from the same model, see the same prompts and draw the same random
numbers until their updates part, so differences are taken per seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, stdev

from projected_grpo.errors import UserError
from projected_grpo.results.files import HELD_OUT
from projected_grpo.results.runs import BASELINE, EndedRun, Groups, Setting
from projected_grpo.results.statistics import FEWEST, Difference, holm_of

LAST_STUDENT, LAST_KL = 5, 25  # steps
TRAINED, DEPLOYED = "as trained", "deployed"
POLICIES = ((TRAINED, "train"), (DEPLOYED, "deploy"))
Metric = Callable[[EndedRun], float | None]


@dataclass(frozen=True)
class Estimate:
    """One figure of one setting: its value per seed; of a difference, also the arm it is taken from.

    `table` and `of` say where it is shown: `of` is a mode or a kind of held-out problems, `policy` whether
    with the quarantine (as trained) or without (deployed). `holm` is the p of a paired difference, adjusted.
    """

    table: str
    setting: Setting
    metric: str
    by_seed: Mapping[int, float]
    seeds: tuple[int, ...]  # of the setting, measured or not
    policy: str = ""
    of: str = ""
    against: str = ""
    holm: float = math.nan

    @property
    def mean(self) -> float | None:
        """Over seeds; None if not measured."""
        return fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def sem(self) -> float | None:
        """Standard error of the mean over seeds; None under two."""
        values = list(self.by_seed.values())
        return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

    @property
    def difference(self) -> Difference | None:
        """The seeds of a difference; None for other figures and without one."""
        return Difference(tuple(self.by_seed.values())) if self.against and self.by_seed else None


def of_summary(key: str) -> Metric:
    return lambda run: run.summary.get(key)


def of_steps(column: str, last: int | None) -> Metric:
    return lambda run: run.mean(column, last)


def safe_pass(policy: str, run: EndedRun) -> float | None:
    solve, hack = run.summary.get(f"solve_{policy}"), run.summary.get(f"hack_{policy}")
    return None if solve is None or hack is None else solve - hack


RATES: Mapping[str, Metric] = {
    **{key: of_summary(key) for key in ("hack_rate_student", "pass_rate_student", *HELD_OUT)},
    "hack_last5": lambda run: run.rate("hack_s", LAST_STUDENT),
    "pass_last5": lambda run: run.rate("gt_s", LAST_STUDENT),
}
DIAGNOSTICS: Mapping[str, tuple[str, int | None]] = {  # a column of the steps, over its last ones or all
    "KL": ("kl", LAST_KL),
    "cos_pre": ("cos_pre", None),
    "fired": ("fired", None),
    "|g|": ("gn", None),
}
DELTA_SAFE = "ΔSafePass"


def measured(seeds: Mapping[int, EndedRun], metric: Metric) -> dict[int, float]:
    """A metric of the seeds that have it."""
    found = {seed: metric(run) for seed, run in seeds.items()}
    return {seed: float(value) for seed, value in found.items() if value is not None}


def differences(
    own: Mapping[int, EndedRun], other: Mapping[int, EndedRun], metric: Metric
) -> dict[int, float]:
    """Own minus other, of the seeds that both have."""
    a, b = measured(own, metric), measured(other, metric)
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def rates(groups: Groups) -> list[Estimate]:
    """Student rates over the whole run and its last 5 steps, held-out rates as trained and deployed."""
    return [
        Estimate("rates", setting, name, measured(seeds, metric), tuple(seeds))
        for setting, seeds in groups.items()
        for name, metric in RATES.items()
    ]


def headline(groups: Groups) -> list[Estimate]:
    """The preregistered schema: ΔSafePass, hack, pass, both ways; KL, cosine, share fired, gradient norm."""
    found = []
    for setting, seeds in groups.items():
        other = baseline(groups, setting, BASELINE)
        for policy, key in POLICIES:
            estimate = partial(Estimate, "headline", setting, seeds=tuple(seeds), policy=policy)
            safe = differences(seeds, groups[other], partial(safe_pass, key)) if other else {}
            found.append(estimate(DELTA_SAFE, safe, against=other.label if other else ""))
            found.append(estimate("Hack", measured(seeds, of_summary(f"hack_{key}"))))
            found.append(estimate("Pass", measured(seeds, of_summary(f"solve_{key}"))))
            found += [
                estimate(name, measured(seeds, of_steps(*column)) if policy == TRAINED else {})
                for name, column in DIAGNOSTICS.items()
            ]
    return found


def paired(groups: Groups, arm: str = BASELINE) -> list[Estimate]:
    """Every setting minus `arm` in the same context, seed by seed."""
    metrics: dict[str, Callable[[str], Metric]] = {
        "Δhack": lambda key: of_summary(f"hack_{key}"),
        "Δpass": lambda key: of_summary(f"solve_{key}"),
        DELTA_SAFE: lambda key: partial(safe_pass, key),
    }
    found = []
    for setting, seeds in groups.items():
        other = baseline(groups, setting, arm)
        if other is None:
            continue
        for policy, key in POLICIES:
            for name, metric in metrics.items():
                values = differences(seeds, groups[other], metric(key))
                own = Estimate("paired", setting, name, values, tuple(seeds), policy, against=other.label)
                found.append(own)
    return with_holm(found)


def with_holm(found: Sequence[Estimate]) -> list[Estimate]:
    """Differences with Holm's p. A family is a column of a table: one metric in one context, of one policy.

    An arm without a quarantine is the same as trained and deployed: both in one family would count it twice.
    """
    families: dict[object, list[Estimate]] = {}
    for e in found:
        families.setdefault((e.setting.context, e.metric, e.policy), []).append(e)
    ps = {key: iter(holm_of([e.difference for e in family])) for key, family in families.items()}
    return [replace(e, holm=next(ps[e.setting.context, e.metric, e.policy])) for e in found]


def modes(groups: Groups) -> list[Estimate]:
    """Held-out rates per mode and per kind of held-out problems."""
    found = []
    for setting, seeds in groups.items():
        parts: dict[tuple[str, str], str] = {}
        for run in seeds.values():
            for mode, row in run.summary.get("by_mode", {}).items():
                parts["by_mode", mode] = mode + ("" if row.get("in_distribution", True) else " (held out)")
            parts |= {("by_split", split): split for split in run.summary.get("by_split", {})}
        for (group, part), shown in parts.items():
            for policy, key in POLICIES:
                for name, figure in (("hack", f"hack_{key}"), ("pass", f"solve_{key}")):
                    of_part = {s: run.summary.get(group, {}).get(part, {}) for s, run in seeds.items()}
                    values = {s: float(v[figure]) for s, v in of_part.items() if v.get(figure) is not None}
                    title = f"{name}, {policy}"
                    found.append(Estimate("modes", setting, title, values, tuple(seeds), of=shown))
    return found


def check_arm(groups: Groups, arm: str) -> None:
    """Raises UserError if no run is of that arm."""
    if not any(arm == setting.arm for setting in groups):
        known = ", ".join(dict.fromkeys(setting.arm for setting in groups))
        raise UserError(f"--against {arm}: no run of that arm; there are {known}")


def baseline(groups: Groups, setting: Setting, arm: str) -> Setting | None:
    """The setting of `arm` to compare with: same context, then as far as there is one with the same options.

    None if there is none but itself, or if several fit equally well.
    """
    candidates = [s for s in groups if s.context == setting.context and s.arm == arm]
    own = (setting.basis_options, setting.own_options)
    found = (
        [s for s in candidates if (s.basis_options, s.own_options) == own]
        or [s for s in candidates if s.basis_options == setting.basis_options]
        or [s for s in candidates if not s.basis_options and not s.own_options]
        or candidates
    )
    return found[0] if len(found) == 1 and found[0] != setting else None


def notes(groups: Groups, arm: str = BASELINE) -> list[str]:
    """What a reader of the tables has to know and cannot see in them."""
    found = _context_notes(groups)
    for setting, seeds in groups.items():
        for name in dict.fromkeys((BASELINE, arm)):
            if setting.arm != name:
                found += _pairing_notes(groups, setting, seeds, name)
    return found


def _context_notes(groups: Groups) -> list[str]:
    runs = [run for seeds in groups.values() for run in seeds.values()]
    contexts = {setting.context for setting in groups}
    commits = sorted({str(run.git_commit) for run in runs})
    short = [run.name for run in runs if run.steps and len(run.values("hack_s")) < LAST_KL]
    found = []
    if len(contexts) > 1:
        found.append(
            f"{len(contexts)} contexts (preset, model, problems, modes, steps, options) that are not "
            "comparable with one another; differences are taken inside each"
        )
    if len(commits) > 1:
        found.append(f"runs of {len(commits)} commits: {', '.join(c[:14] for c in commits)}")
    if short:
        found.append(f"KL is over all steps where there are fewer than {LAST_KL}: {', '.join(short)}")
    return found


def _pairing_notes(groups: Groups, setting: Setting, seeds: Mapping[int, EndedRun], arm: str) -> list[str]:
    other = baseline(groups, setting, arm)
    if other is None:
        same = [s.label for s in groups if s.context == setting.context and s.arm == arm]
        why = f"several fit ({'; '.join(same)})" if same else f"no arm {arm} in its context"
        return [f"{setting.label}: no difference from {arm}: {why}"]
    found = []
    shared = seeds.keys() & groups[other].keys()
    if len(shared) < len(seeds):
        found.append(f"{setting.label}: {len(shared)} of {len(seeds)} seeds are also of {other.label}")
    if len(shared) < FEWEST:
        found.append(
            f"{setting.label}: no interval against {other.label}: {len(shared)} of {FEWEST} shared seeds"
        )
    if (other.basis_options, other.own_options) != (setting.basis_options, setting.own_options):
        found.append(f"{setting.label} is compared with {other.label}: options of arm or basis differ")
    return found
