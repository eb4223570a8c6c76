"""examples/one_page.py and the package find the same numbers from the same rollouts, rewards and pairs.

The page is the oracle: it is short enough to be checked by eye, and shares none of the package's mathematics.
"""

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from projected_grpo import step as step_module
from projected_grpo.arm_settings import SETTINGS
from projected_grpo.collect import Collected
from projected_grpo.config import NANO_PRESET
from projected_grpo.engine.batch import collate
from projected_grpo.engine.chat import open_chat
from projected_grpo.engine.logps import completion_logps
from projected_grpo.engine.models import encode_chat
from projected_grpo.experiment import Data, Experiment
from projected_grpo.grpo import advantages, per_rollout_grads
from projected_grpo.pairs import load_pairs
from projected_grpo.pools import NO_TEACHER
from projected_grpo.rewards import Grade, Grader
from projected_grpo.rollout import Rollout
from projected_grpo.run.start import start_state
from projected_grpo.step import adapter_parameters, train_step

PAGE = Path(__file__).parents[1] / "examples" / "one_page.py"
TOLERANCE = 2e-4  # of each Linear's tensor, relative to its norm; float32 comes to 5e-5
# Of parameters; float32 comes to 2e-4. AdamW divides a gradient by its own size, which magnifies the rounding
# of components near zero.
TOLERANCE_OF_PARAMETERS = 1e-3
GROUP, SCHEDULE, REFRESH = 4, 20, 2
# Of two groups in each step. They are large so that no gradient is near AdamW's eps, where its step would
# magnify rounding.
REWARDS = (
    ((70, 10, 0, 70), (70, 70, 10, 0)),
    ((70, 70, 70, 70), (10, 10, 10, 10)),  # no gradient
    ((9000, 10, 70, 0), (70, 70, 70, 70)),  # to be clipped; and one group without a gradient
    ((70, 10, 70, 70), (10, 10, 70, 0)),
)
DETECTED = ((0, 2, 4), (2, 3), (1, 2, 5), (3, 6))  # hacks that the detector finds: A is > 0, < 0 or 0


@pytest.fixture(scope="module")
def page():
    """The example, its shapes checked as the package's are."""
    with pytest.MonkeyPatch.context() as patch, install_import_hook("one_page", "beartype.beartype"):
        patch.syspath_prepend(str(PAGE.parent))
        return importlib.import_module("one_page")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The nano preset with eight of its pairs and without a grader: rollouts are given."""
    cfg = replace(
        NANO_PRESET,
        run=replace(NANO_PRESET.run, out_dir=tmp_path_factory.mktemp("out")),
        model=replace(NANO_PRESET.model, svd_cache=None),
        loss=replace(NANO_PRESET.loss, ref_every=0),
        sampling=replace(NANO_PRESET.sampling, group=GROUP),
        optim=replace(NANO_PRESET.optim, steps=SCHEDULE),
        basis=replace(NANO_PRESET.basis, vhack_refresh_every=REFRESH),
    )
    pairs = load_pairs(cfg.basis.vhack_pairs_path)
    pairs = replace(pairs, pairs=pairs.pairs[::3])
    problems = tuple(pair.problem for pair in pairs.pairs)
    data = Data(problems, problems, problems, NO_TEACHER)
    return Experiment(cfg, open_chat(cfg.model), data, {}, pairs, object.__new__(Grader))


class Both:
    """The page and the package at the start of an arm, and what last went through `intervene` of each."""

    def __init__(self, page, experiment, arm, monkeypatch):
        cfg = replace(experiment.cfg, arm=SETTINGS[arm]())
        self.exp = replace(experiment, cfg=cfg)
        self.layers = experiment.chat.policy.layers
        for parameter in adapter_parameters(self.exp):
            parameter.data.zero_()
        self.state = start_state(self.exp)
        self.learner = page.Learner(arm, SCHEDULE)
        self.data = self.rows = self.ours = self.theirs = None
        monkeypatch.setattr(page, "GROUP", GROUP)
        at_page, at_package = page.intervene, step_module.intervene

        def page_intervene(arm, rows, *more):
            kept, routed = at_page(arm, rows, *more)
            self.rows, self.ours = rows, (copied(kept), copied(routed))  # clipping writes into them
            return kept, routed

        def package_intervene(*arguments, **options):
            update = at_package(*arguments, **options)
            self.theirs = copied(update.keep), copied(update.routed)
            return update

        monkeypatch.setattr(page, "intervene", page_intervene)
        monkeypatch.setattr(step_module, "intervene", package_intervene)
        monkeypatch.setattr(step_module, "collect", lambda exp, step: self.data)

    def take_step(self):
        """One step of both on the same rollouts; returns the package's record and per-rollout gradients."""
        step = self.state.step
        self.data = given(self.exp, step)
        if step % REFRESH == 0:
            self.learner.refresh(list(self.exp.pairs.split()[0]))
        texts = [(list(r.prompt_ids), list(r.completion_ids)) for r in self.data.rollouts]
        chat, cfg = self.exp.chat, self.exp.cfg
        A = advantages(self.data.rewards).flatten()
        size = cfg.sampling.max_new
        single = per_rollout_grads(chat.policy, self.data.rollouts, A, cfg.loss, size)
        self.learner.step(step, texts, list(self.data.grades))
        record, _ = train_step(self.exp, self.state)
        self.state.step += 1
        return record, single.rows


def given(exp, step):
    """Two groups of rollouts as if collected now: to each prompt, hacks and clean answers of two pairs."""
    policy, tokenizer, pairs = exp.chat.policy, exp.chat.tokenizer, exp.pairs.pairs
    firsts, rollouts = (2 * step % len(pairs), (2 * step + 1) % len(pairs)), []
    for first in firsts:
        prompt = encode_chat(tokenizer, pairs[first].messages)
        for i in range(GROUP):
            pair = pairs[(first + i // 2) % len(pairs)]
            text = pair.clean if i % 2 else pair.hack
            rollouts.append(Rollout(prompt, (*tokenizer(text)["input_ids"], exp.chat.stop_id), text))
    with torch.no_grad(), policy.merge(policy.deltas()):  # as the sampler does
        logps = completion_logps(policy.model, collate(rollouts, policy.device))
    rollouts = [replace(r, logp_old=p[: len(r.completion_ids)]) for r, p in zip(rollouts, logps, strict=True)]
    rewards = torch.tensor(REWARDS[step], dtype=torch.float32)
    grades = [
        Grade(float(r), r > 10, False, False, None, True, i in DETECTED[step], False, False, None)
        for i, r in enumerate(rewards.flatten().tolist())
    ]
    no = torch.zeros(len(rollouts), dtype=torch.bool)
    problems = tuple(pairs[first].problem for first in firsts)
    return Collected(problems, tuple(rollouts), tuple(grades), rewards, no, no, no, 0.0, 0.0)


def copied(tensors):
    return {m: tensor.clone() for m, tensor in tensors.items()}


def values(layers, name):
    return {m: getattr(layer, name).detach().clone() for m, layer in layers.items()}


def error(ours, theirs):
    """The largest relative error of any Linear, by norms. A wrong shape or name fails at once."""
    assert ours.keys() == theirs.keys()
    assert all(ours[m].shape == theirs[m].shape for m in ours)
    errors = [float((ours[m] - theirs[m]).norm() / theirs[m].norm().clamp_min(1e-30)) for m in ours]
    return max(errors, default=0.0)


def share_moving(gradients):
    return sum(bool(g.any()) for g in gradients.values()) / len(gradients)


def compare(both, single):
    """That the page and the package agree about the step just taken."""
    learner, state = both.learner, both.state
    assert error(learner.basis.V, state.basis.V) < TOLERANCE
    assert error(learner.basis.v, state.basis.v_grad) < TOLERANCE
    assert error(both.rows, single) < TOLERANCE
    for ours, theirs in zip(both.ours, both.theirs, strict=True):
        assert error(ours, theirs) < TOLERANCE
    if state.gate is not None:
        assert learner.basis.hack == pytest.approx(state.gate.hack, abs=TOLERANCE)
        assert learner.basis.clean == pytest.approx(state.gate.clean, abs=TOLERANCE)
    for setting in ("lr", "betas", "eps", "weight_decay"):
        at_page, at_package = (o.param_groups[0][setting] for o in (learner.optimizer, state.optimizer))
        assert at_page == pytest.approx(at_package)
    for name in ("delta_s", "delta_hack"):
        theirs = values(both.layers, name)
        assert error(values(learner.adapters, name), theirs) < TOLERANCE_OF_PARAMETERS


@pytest.mark.parametrize("arm", ["none", "erase", "route", "route2"])
def test_every_step_is_the_same(page, experiment, monkeypatch, arm):
    both, norms, absent = Both(page, experiment, arm, monkeypatch), [], set()
    for _ in REWARDS:
        before = values(both.learner.adapters, "delta_s")
        record, single = both.take_step()
        norms.append(record.get("gn"))
        if norms[-1] is None:
            assert error(values(both.learner.adapters, "delta_s"), before) == 0
            assert error(values(both.layers, "delta_s"), before) < TOLERANCE_OF_PARAMETERS
            continue
        compare(both, single)
        # None of what agrees is trivial.
        kept, routed = both.ours
        absent |= kept.keys() - both.state.basis.V.keys()
        changed = error(kept, {m: g.sum(0) for m, g in both.rows.items()})
        assert changed == 0 if arm == "none" else changed > 0.1
        assert len(routed) == {"route": len(both.state.basis.V), "route2": len(kept)}.get(arm, 0)
        assert all(share_moving(part) > 0.1 for part in (kept, routed) if part)
        assert error(values(both.learner.adapters, "delta_s"), before) > 0.01
    assert norms[0] < page.CLIP < norms[2] and norms[1] is None
    assert absent and {len(V) for V in both.state.basis.V.values()} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("constant", "value", "arm"),
    [("DROPPED", 0.2, "none"), ("LR", 4.01e-2, "none"), ("MEMORY", 0.8, "route2")],
)
def test_a_wrong_constant_is_noticed_in_the_first_step(page, experiment, monkeypatch, constant, value, arm):
    both = Both(page, experiment, arm, monkeypatch)
    monkeypatch.setattr(page, constant, value)
    _, single = both.take_step()
    with pytest.raises(AssertionError):
        compare(both, single)


def test_the_command_trains_and_evaluates(unchecked_children):
    command = [sys.executable, str(PAGE), "--steps", "2", "--eval-problems", "2", "--intervention", "route2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rates = re.findall(r"^(.*): hack (\d\.\d{3}), solve (\d\.\d{3})$", done.stdout, re.MULTILINE)
    assert [line for line, *_ in rates] == [
        "step  0",
        "step  1",
        "held-out, as trained",
        "held-out, as deployed",
    ]
    assert float(rates[0][2]) > 0.2, "the base model solves two in five"


def test_the_page_is_a_page():
    assert len(PAGE.read_text().splitlines()) <= 200
