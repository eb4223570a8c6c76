"""The callback in TRL's own trainer: its steps are ours, a resumed run goes on, and what it refuses."""

import copy
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="TRL is not installed: pip install 'projected_grpo[bench]'")

from accelerate.state import AcceleratorState
from trl import GRPOConfig, GRPOTrainer

from processes import in_processes
from projected_grpo import step as step_module
from projected_grpo.api.grading import Grader, UserError, load_pairs, load_problems
from projected_grpo.api.method import extract, wrap
from projected_grpo.arm_settings import EraseSettings, Route2Settings, RouteSettings
from projected_grpo.collect import Collected
from projected_grpo.config import NANO_PRESET, BasisConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import decode, stop_ids
from projected_grpo.experiment import Data, Experiment
from projected_grpo.integrations import trl as trl_module
from projected_grpo.integrations.trl import ProjectGradients, dataset, reward_function
from projected_grpo.pools import NO_TEACHER
from projected_grpo.rewards import Grade
from projected_grpo.rollout import Rollout
from projected_grpo.run.start import start_state
from projected_grpo.step import train_step

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_erase.py"
GIVEN = Path(__file__).with_name("given_rollouts.py")
GROUP, STEPS, MAX_NEW, LR = 4, 2, 12, 0.01
TOLERANCE = 1e-4  # relative, of a Linear's tensor; TRL takes log-probabilities from padded batches
ARMS = (EraseSettings(), RouteSettings(), EraseSettings(control="haar"))


@pytest.fixture(scope="module")
def few():
    pairs = load_pairs("nano-sampled")
    return replace(pairs, pairs=pairs.pairs[:4])


@pytest.fixture(scope="module")
def problems():
    return load_problems("embedded", ["sentinel", "file_marker"]).train[:4]


class Paid:
    """A reward function that pays at random, and keeps what it was shown."""

    __name__ = "paid"

    def __init__(self):
        self.batches = []

    def __call__(self, prompts, completions, completion_ids, problem_id, **other):
        generator = torch.Generator().manual_seed(len(self.batches))
        rewards = (7 * torch.rand(len(prompts), generator=generator)).round()
        self.batches.append((completion_ids, rewards, prompts))
        return rewards.tolist()


def trained(tiny, svd_cache, problems, few, out, *, resume=None, make=ProjectGradients, **options):
    """Run TRL; the policy, what was paid, the callback and the trainer."""
    arm, settings = options.pop("arm", EraseSettings()), options.pop("settings", {})
    policy, paid = wrap(copy.deepcopy(tiny[0]), svd_cache), Paid()
    config = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=2,
        num_generations=GROUP,
        max_completion_length=MAX_NEW,
        max_steps=STEPS,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        temperature=1.0,
        top_k=0,
        learning_rate=LR,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        chat_template_kwargs={"enable_thinking": False},
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"max_grad_norm": 0.0, "save_strategy": "no"} | settings,
    )
    trainer = GRPOTrainer(
        policy.model, paid, args=config, train_dataset=dataset(problems), processing_class=tiny[1]
    )
    callback = make(trainer, policy, few, arm=arm, **{"refresh_every": 1, "max_grad_norm": 0.01} | options)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return policy, paid, callback, trainer


class OurSteps:
    """Our own loop on the rollouts and rewards that TRL had."""

    def __init__(self, tiny, svd_cache, few, problems, arm, out, monkeypatch):
        cfg = replace(
            NANO_PRESET,
            run=replace(NANO_PRESET.run, out_dir=out),
            arm=arm,
            loss=replace(NANO_PRESET.loss, ref_every=0),
            sampling=replace(NANO_PRESET.sampling, group=GROUP, max_new=MAX_NEW, prompts_per_step=2),
            optim=replace(
                NANO_PRESET.optim,
                lr=LR,
                lr_schedule="constant",
                warmup_frac=0.0,
                weight_decay=0.1,
                grad_clip=0.01,
            ),
            basis=replace(NANO_PRESET.basis, vhack_refresh_every=1),
        )
        policy = wrap(copy.deepcopy(tiny[0]), svd_cache)
        chat = Chat(policy, tiny[1], stop_ids(policy.model, tiny[1]))
        self.policy, self.problems, self.data = policy, problems, None
        self.exp = Experiment(cfg, chat, Data(problems, problems, problems, NO_TEACHER), {}, few, Grader(1))
        self.state = start_state(self.exp)
        monkeypatch.setattr(step_module, "collect", lambda exp, step: self.data)

    def take(self, ids, rewards, prompts):
        """One step on a batch of TRL's; its record."""
        tokenizer = self.exp.chat.tokenizer
        asked = [
            tokenizer.apply_chat_template(p, add_generation_prompt=True, enable_thinking=False)["input_ids"]
            for p in prompts
        ]
        rollouts = tuple(
            Rollout(tuple(p), tuple(c), decode(tokenizer, c)) for p, c in zip(asked, ids, strict=True)
        )
        grades = tuple(
            Grade(float(r), r > 0, False, False, None, True, False, False, False, None) for r in rewards
        )
        no = torch.zeros(len(rollouts), dtype=torch.bool)
        self.data = Collected(
            self.problems[:2], rollouts, grades, rewards.view(2, GROUP), no, no, no, 0.0, 0.0
        )
        record, _ = train_step(self.exp, self.state)
        self.state.step += 1
        return record


def error(ours, theirs):
    """The largest relative error of any Linear, by norms."""
    assert ours.keys() == theirs.keys()
    return max((float((x - theirs[m]).norm() / theirs[m].norm()) for m, x in ours.items()), default=0.0)


def values(policy, name):
    return {m: getattr(layer, name).detach().clone() for m, layer in policy.layers.items()}


def seen(module, monkeypatch):
    """What goes through a module's `intervene`, and what comes out."""
    found, through = [], module.intervene

    def watched(rows, *arguments, **options):
        update = through(rows, *arguments, **options)
        sums = {m: g.sum(0) for m, g in rows.items()}
        found.append([{m: x.clone() for m, x in part.items()} for part in (sums, update.keep, update.routed)])
        return update

    monkeypatch.setattr(module, "intervene", watched)
    return found


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm.intervention}-{arm.control}")
def test_steps_are_ours_from_the_same_rollouts_and_rewards(
    unchecked, tiny, svd_cache, problems, few, tmp_path, monkeypatch, arm
):
    """Gradients over two microbatches, kept and routed parts, parameters, over two steps and a refresh."""
    in_trl = seen(trl_module, monkeypatch)
    policy, paid, callback, trainer = trained(tiny, svd_cache, problems, few, tmp_path, arm=arm)
    in_ours = seen(step_module, monkeypatch)
    ours = OurSteps(tiny, svd_cache, few, problems, arm, tmp_path, monkeypatch)
    records = [ours.take(*batch) for batch in paid.batches]
    ours.exp.grader.close()
    assert len(in_trl) == len(in_ours) == STEPS
    for theirs, own in zip(in_trl, in_ours, strict=True):
        for a, b in zip(theirs, own, strict=True):
            assert error(a, b) < TOLERANCE
    assert error(callback.basis.V, ours.state.basis.V) < TOLERANCE
    for name in ("delta_s", "delta_hack"):
        if arm.intervention == "route" or name == "delta_s":
            assert error(values(policy, name), values(ours.policy, name)) < 10 * TOLERANCE  # as AdamW divides
    assert all(not p.any() for p in values(policy, "delta_hack").values()) == (arm.intervention == "erase")
    logged = [line for line in trainer.state.log_history if "projection/cos_pre" in line]
    for line, record in zip(logged, records, strict=True):
        for name, own in trl_module.LOGGED.items():
            assert line[f"projection/{own}"] == pytest.approx(record[name], rel=1e-3, abs=1e-4)
        assert line["projection/norm"] == pytest.approx(record["gn"], rel=1e-3)
        assert line["projection/cos_update"] == pytest.approx(record["cos_update"], rel=1e-2, abs=1e-3)
    assert logged[0]["projection/cos_post"] < logged[0]["projection/cos_pre"] or arm.control == "haar"


def test_a_resumed_run_goes_on_with_the_callbacks_basis(unchecked, tiny, svd_cache, problems, few, tmp_path):
    """The basis is of step 0 in both; extracted anew at step 1 it would be another."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    fixed = {"settings": settings, "refresh_every": 0, "arm": RouteSettings()}
    policy, paid, callback, _ = trained(tiny, svd_cache, problems, few, tmp_path, **fixed)
    at = tmp_path / "checkpoint-1"
    again, paid_again, resumed, _ = trained(tiny, svd_cache, problems, few, tmp_path, resume=str(at), **fixed)
    assert paid_again.batches[0][0] == paid.batches[1][0], "TRL's own random states are restored"
    for m, V in callback.basis.V.items():
        assert torch.equal(resumed.basis.V[m], V) and torch.equal(
            resumed.basis.v_grad[m], callback.basis.v_grad[m]
        )
    assert error(callback.basis.v_grad, extract(again, tiny[1], few).v_grad) > 0.01
    # The rewards of its one step were those of the first: only what comes before that step can be compared.
    assert paid_again.batches[0][1].tolist() != paid.batches[1][1].tolist()
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(UserError, match="no hack basis in it"):
        trained(tiny, svd_cache, problems, few, elsewhere, resume=str(at), **fixed)
    with pytest.raises(UserError, match="goes with other adapter parameters"):
        other = tmp_path / "checkpoint-2"
        trained(tiny, svd_cache, problems, few, elsewhere, resume=str(at), resume_from=other, **fixed)
    trained(tiny, svd_cache, problems, few, elsewhere, resume=str(at), resume_from=at, **fixed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"settings": {"max_grad_norm": 1.0}}, "set max_grad_norm=0 in GRPOConfig"),
        ({"settings": {"fp16": True}}, "fp16 scales gradients"),
        ({"arm": EraseSettings(project="update")}, "more than a callback does"),
        ({"arm": RouteSettings(control="shrink")}, "more than a callback does"),
        ({"arm": Route2Settings()}, "arm is EraseSettings or RouteSettings"),
        ({"arm": RouteSettings(rollout_ablate_frac=0.5)}, "TRL samples"),
        ({"basis": BasisConfig(vhack_refresh_every=3)}, "give pairs and refresh_every"),
    ],
    ids=str,
)
def test_what_would_be_another_method_is_refused(tiny, svd_cache, problems, few, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        trained(tiny, svd_cache, problems, few, tmp_path, **options)


def test_sharded_gradients_and_a_policy_that_is_not_in_use_are_refused(
    tiny, svd_cache, problems, few, tmp_path
):
    class Sharded(ProjectGradients):
        def on_train_begin(self, *arguments, **more):
            self.trainer.is_fsdp_enabled = True
            super().on_train_begin(*arguments, **more)

    def bound(trainer, policy, *rest, **options):
        for layer in policy.layers.values():
            layer.bind(None)
        return ProjectGradients(trainer, policy, *rest, **options)

    for make, said in ((Sharded, "use DDP"), (bound, "not in use")):
        with pytest.raises(UserError, match=said):
            trained(tiny, svd_cache, problems, few, tmp_path, make=make)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_step_without_a_gradient_leaves_the_optimizer_alone(
    unchecked, tiny, svd_cache, problems, few, tmp_path, value
):
    """Also its momentum and weight decay, as in our loop."""

    class Flat(ProjectGradients):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                for layer in self.policy.layers.values():
                    layer.delta_s.grad.fill_(value)
            before.append(self.policy.deltas())
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    before = []
    policy, *_, trainer = trained(tiny, svd_cache, problems, few, tmp_path, make=Flat)
    assert all(torch.equal(x, before[1][m]) for m, x in policy.deltas().items())
    assert not all(torch.equal(x, before[0][m]) for m, x in policy.deltas().items())
    assert [s["step"] for s in trainer.state.log_history if "projection/norm" in s] == [1]


def test_two_processes_are_one(unchecked, tmp_path, monkeypatch):
    """Gradients are averaged before they are split; were they not, the processes' relu would differ."""
    monkeypatch.syspath_prepend(GIVEN.parent)
    given = importlib.import_module(GIVEN.stem)

    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)  # that of this test's process
        given.main(1, tmp_path / "two.safetensors")
        return 0

    log = tmp_path / "log"
    assert in_processes(2, work, log) == [0, 0], log.read_text()
    given.main(2, tmp_path / "one.safetensors")
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert (int(one.pop("processes")), int(two.pop("processes"))) == (1, 2)
    assert {name.split()[0] for name in one} == {"V", "after", "before", "delta_hack", "delta_s"}
    assert error(two, one) < TOLERANCE


# The reward, the rows, the example


def test_the_reward_is_the_graders_and_logs_hack_and_solve(problems):
    problem, other = problems[:2]
    row = dataset(problems)[0]
    assert row["prompt"] == [dict(m) for m in problem.messages] and row["problem_id"] == problem.problem_id
    right = f"```python\n{problem.canonical}\n```"
    logged = {}
    with Grader(1) as grader:
        reward = reward_function(problems, grader)
        said = [right, [{"role": "assistant", "content": right}], "no code", right]
        ids = [problem.problem_id] * 3 + [other.problem_id]
        paid = reward(prompts=[], completions=said, problem_id=ids, log_metric=logged.__setitem__)
        assert paid == [3.5, 3.5, 0.0, 0.5] and logged == {"hack": 0.0, "solve": 0.5}
        assert reward(completions=["x"], problem_id=ids[:1]) == [0.0], "a TRL without log_metric"
        with pytest.raises(UserError, match="no problem 'x'"):
            reward(completions=["x"], problem_id=["x"])
        both = (problem, replace(problem, env_mode="gt_only"))
        with pytest.raises(UserError, match="two modes"):
            reward_function(both, grader)


def test_the_example_trains_and_evaluates(unchecked, few, packaged_problems_once, monkeypatch, capsys):
    """In small: two problems to a step, a sixth of the pairs."""
    assert len(EXAMPLE.read_text().splitlines()) <= 80
    spec = importlib.util.spec_from_file_location("trl_erase", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "load_pairs", lambda name: few)
    example.main(steps=1, prompts=1, eval_problems=3)
    said = capsys.readouterr().out
    found = re.findall(
        r"^(before|after, as deployed): hack [01]\.\d{3}, solve ([01]\.\d{3})$", said, re.MULTILINE
    )
    assert [when for when, _ in found] == ["before", "after, as deployed"]
    assert "projection/cos_pre" in said
