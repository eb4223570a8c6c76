"""TRL: a callback that erases or routes in GRPOTrainer, the grader as a reward function, problems as rows.

    trainer = GRPOTrainer(policy.model, reward_function(problems, grader), train_dataset=dataset(problems))
    trainer.add_callback(ProjectGradients(trainer, policy, load_pairs("nano")))

TRL generates, grades, runs backward and averages gradients over microbatches and processes (DDP). Then the
callback splits the average at the basis, writes it back and clips; then TRL's optimizer steps. TRL would clip
before the split, by a norm that holds what is removed, and counts the gradient twice (delta_s and delta_hack
both have it), so it must be told not to (max_grad_norm=0).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from projected_grpo.antipasto import Policy
from projected_grpo.arm_settings import ArmSettings, EraseSettings, RouteSettings
from projected_grpo.arms.table import intervene
from projected_grpo.config import BasisConfig, RunConfig, TrainConfig
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import evaluating, stop_ids
from projected_grpo.errors import UserError
from projected_grpo.extract_vhack_grad import refresh
from projected_grpo.integrations.grading import Completion, figures, task_of, tasks_by_id, text_of
from projected_grpo.pairs import PairSet
from projected_grpo.problems import Problem
from projected_grpo.proj import HackBasis, basis_overlap, mean_hackward_share
from projected_grpo.rewards import Grader
from projected_grpo.runlog import write_atomically
from projected_grpo.tensor_files import tensor_hash

__all__ = ["ProjectGradients", "dataset", "reward_function"]

FILE = "hack_basis.safetensors"  # in each of TRL's checkpoints
GIVEN = ("v_hack_path", "vhack_pairs_path", "vhack_refresh_every")  # of BasisConfig, otherwise
BY_CALLBACK = ("none", "haar", "shuffled", "clean_clean", "flipped")  # controls that replace the basis alone
LOGGED = {"cos_pre": "cos_pre", "cos_post": "cos_post", "cos_null": "cos_null", "q_egy": "routed_share"}


def dataset(problems: Iterable[Problem]) -> Dataset:
    """Problems as TRL's rows, which `reward_function` can grade.

    A template that thinks is told not to by GRPOConfig(chat_template_kwargs={"enable_thinking": False}).

    Shapes: a row for each problem: prompt (chat messages, with the mode's hint), problem_id, env_mode.
    Units: none.
    Errors: none.
    Source: TRL's conversational prompt-only form.
    """
    return Dataset.from_list(
        [
            {"prompt": [dict(m) for m in p.messages], "problem_id": p.problem_id, "env_mode": p.env_mode}
            for p in problems
        ]
    )


def reward_function(problems: Iterable[Problem], grader: Grader) -> Callable[..., list[float]]:
    """The flawed graders of these problems as one of TRL's `reward_funcs`; it logs `hack` and `solve`.

    Shapes: n completions -> n rewards.
    Units: 0, 0.5 (parses), or 3.5 (right, or the loophole pays); hack and solve are shares in [0, 1].
    Errors: UserError for a problem in two modes, and for an id that is not among them.
    Source: docs/grader.md.
    """
    tasks = tasks_by_id(problems)

    def flawed_grader(
        completions: list[Completion],
        problem_id: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **other: object,
    ) -> list[float]:
        items = [
            (task_of(tasks, name), text_of(said)) for name, said in zip(problem_id, completions, strict=True)
        ]
        grades = grader.grade_all(items)
        if log_metric is not None:
            for name, value in figures(grades).items():
                log_metric(name, value)
        return [grade.reward for grade in grades]

    return flawed_grader


class ProjectGradients(TrainerCallback):
    """Erase or route the hack-ward part of GRPOTrainer's gradients, between backward and the optimizer.

    The basis is extracted when training begins and before every `refresh_every`-th step (0: never again).
    TRL's own metrics get projection/cos_pre, cos_post, cos_null, routed_share, cos_update (of what the
    optimizer did), norm (before the clip), overlap (of a new basis with the last). A gradient that is 0 or
    not finite is dropped, and the optimizer left alone. Each of TRL's checkpoints gets the basis, and a
    resumed run goes on with it; `resume_from`: the checkpoint's folder, where it is not in output_dir. `arm`:
    EraseSettings or RouteSettings, with those controls that replace the basis alone. `seed`: of the controls.

    Shapes: as of `project`.
    Units: cosines in [0, 1], shares in [0, 1], the norm as of the gradients.
    Errors: UserError before the first step where TRL clips by itself, in fp16, under FSDP or DeepSpeed, for a
    policy whose parameters are not in use (`wrap`), for another arm, and for a checkpoint without a basis of
    its parameters.
    Source: docs/arms.md; step.py is the loop that it is tested against.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        policy: Policy,
        pairs: PairSet,
        *,
        arm: ArmSettings | None = None,
        basis: BasisConfig | None = None,
        refresh_every: int = 5,
        max_grad_norm: float = 10.0,
        seed: int = 41,
        resume_from: Path | None = None,
    ) -> None:
        arm, basis = arm or EraseSettings(), basis or BasisConfig()
        if not isinstance(arm, EraseSettings | RouteSettings) or arm.ablated_share > 0:
            raise UserError("arm is EraseSettings or RouteSettings, without rollout_ablate_frac: TRL samples")
        if any(getattr(basis, name) != getattr(BasisConfig(), name) for name in GIVEN):
            raise UserError(f"{', '.join(GIVEN)} of basis are not read; give pairs and refresh_every")
        arm.check()
        if arm.project != "gradient" or arm.control not in BY_CALLBACK:
            raise UserError(
                f"--project {arm.project} with --control {arm.control} is more than a callback does; "
                f"take project 'gradient' and a control of {', '.join(BY_CALLBACK)}"
            )
        self.trainer, self.policy, self.pairs = trainer, policy, pairs
        self.refresh_every, self.max_grad_norm, self.resume_from = refresh_every, max_grad_norm, resume_from
        self.settings = TrainConfig("trl", run=RunConfig(seed=seed), arm=arm, basis=basis)
        self.basis: HackBasis | None = None
        self.before: dict[str, Tensor] | None = None  # delta_s, while the optimizer steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot be done; then the checkpoint's basis, or a new one."""
        self._check(args)
        if state.global_step == 0:
            self.basis = self._extract()
            return
        at = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.basis = load_basis(self.resume_from or at, self.policy)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Extract again where it is due, before the step's rollouts are drawn."""
        step = state.global_step
        if step == 0 or self.refresh_every == 0 or step % self.refresh_every:
            return
        old, self.basis = self.basis, self._extract()
        if old is not None:
            self._log({"overlap": basis_overlap(old, self.basis)})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Split the averaged gradients, write them back and clip."""
        if self.basis is None:
            raise RuntimeError("on_train_begin did not come first")
        grads = {m: layer.delta_s.grad for m, layer in self.policy.layers.items()}
        rows = {m: g.detach().clone()[None] for m, g in grads.items() if g is not None}
        norm = torch.stack([g.norm() for g in rows.values()]).norm() if rows else torch.zeros(())
        if not bool(norm.isfinite()) or float(norm) == 0:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            self.before = None
            return
        own = torch.zeros(1, dtype=torch.bool, device=norm.device)
        update = intervene(rows, self.basis, self.settings.arm, own, split=False)
        self.policy.write_gradients(update.keep, update.routed)
        parameters = [p for x in self.policy.layers.values() for p in (x.delta_s, x.quarantine)]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.before = self.policy.deltas(ablate_quarantine=True)
        self._log({"norm": float(norm), **{LOGGED[name]: update.stats[name] for name in LOGGED}})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what the optimizer made of it."""
        if self.before is None or self.basis is None:
            return
        after = self.policy.deltas(ablate_quarantine=True)
        change = {m: self.before[m] - after[m] for m in after}
        self._log({"cos_update": mean_hackward_share(change, self.basis)})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the basis into the checkpoint that TRL has just written."""
        if args.should_save and self.basis is not None:
            save_basis(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.basis, self.policy)

    def _extract(self) -> HackBasis:
        """The basis at the parameters as they are; the first process's, so that all have the same."""
        model, tokenizer = self.policy.model, self.trainer.processing_class
        chat = Chat(self.policy, tokenizer, stop_ids(model, tokenizer))
        with evaluating(model):
            basis = refresh(chat, self.pairs, self.settings)
        return broadcast_object_list([basis])[0]

    def _check(self, args: Any) -> None:
        """Refuse, in one line, what would quietly give another method."""
        if args.max_grad_norm:
            raise UserError(
                f"TRL would clip at max_grad_norm={args.max_grad_norm:g} before gradients are split; "
                "set max_grad_norm=0 in GRPOConfig, and give ProjectGradients its own max_grad_norm"
            )
        if args.fp16:
            raise UserError("fp16 scales gradients when they are split; take bf16 or float32")
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise UserError(
                "FSDP and DeepSpeed shard gradients before they are split; use DDP (docs/scaling.md)"
            )
        if any(layer.bound is not None for layer in self.policy.layers.values()):
            raise UserError(
                "the policy's parameters are not in use; make it with projected_grpo.api.method.wrap"
            )

    def _log(self, values: Mapping[str, float | None]) -> None:
        """Into TRL's own metrics, which it averages and logs with its others."""
        for name, value in values.items():
            if value is not None:
                self.trainer._metrics["train"][f"projection/{name}"].append(value)


def adapter_hash(policy: Policy) -> str:
    """Hash of all adapter parameters."""
    layers = policy.layers.values()
    return tensor_hash(torch.cat([p.detach().cpu() for x in layers for p in (x.delta_s, x.quarantine)]))


def save_basis(folder: Path, basis: HackBasis, policy: Policy) -> None:
    """Write the basis into a checkpoint, with the hash of the parameters it goes with."""
    tensors = {f"V/{m}": V for m, V in basis.V.items()} | {f"v_grad/{m}": v for m, v in basis.v_grad.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / FILE, save(tensors, metadata={"adapter": adapter_hash(policy)}))


def load_basis(folder: Path, policy: Policy) -> HackBasis:
    """The basis of a checkpoint. Raises UserError if it has none, or one of other parameters."""
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(policy.device) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder}: no hack basis in it ({error}); give ProjectGradients the resumed checkpoint's folder "
            "as resume_from, or begin anew"
        ) from error
    if meta.get("adapter") != adapter_hash(policy):
        raise UserError(f"{folder}: its hack basis goes with other adapter parameters; give resume_from")
    V = {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith("V/")}
    v_grad = {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith("v_grad/")}
    return HackBasis(dict(sorted(V.items())), dict(sorted(v_grad.items())))
