"""TRL on rollouts and rewards that depend on prompt, step and place alone, in one process or several.

accelerate launch --multi_gpu --num_processes 2 given_rollouts.py --prompts-per-process 1 --out two.st
python given_rollouts.py --prompts-per-process 2 --out one.st
"""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save_file
from trl import GRPOConfig, GRPOTrainer

from projected_grpo.api.grading import load_pairs, load_problems
from projected_grpo.api.method import wrap
from projected_grpo.arm_settings import EraseSettings, RouteSettings
from projected_grpo.config import TINY_RANDOM, ModelConfig
from projected_grpo.engine.models import load_model
from projected_grpo.integrations.trl import ProjectGradients, dataset

GROUP, LENGTH = 4, 6


class Given(GRPOTrainer):
    """Completions that no process draws."""

    def _generate_single_turn(self, prompt_ids, *rest, **more):
        drawn = []
        for i, prompt in enumerate(prompt_ids):
            seed = zlib.crc32(str((prompt, self.state.global_step, i % GROUP)).encode())
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randint(20, 400, (LENGTH,), generator=generator).tolist())
        return drawn, None


def paid(completion_ids, **other):
    return [float(sum(ids) % 7) for ids in completion_ids]


class Watched(ProjectGradients):
    """Keeps the gradients that it is given, and those it writes."""

    seen: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.note(state, "before")
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.note(state, "after")

    def note(self, state, when):
        for m, layer in self.policy.layers.items():
            for name in ("delta_s", "delta_hack"):
                gradient = getattr(layer, name).grad
                if gradient is not None:
                    self.seen[f"{when} {state.global_step} {m}.{name}"] = gradient.clone()


def main(prompts_per_process: int, out: Path, arm: Literal["erase", "route"] = "route") -> None:
    model, tokenizer = load_model(ModelConfig(model=TINY_RANDOM, device="cpu"))
    pairs = load_pairs("nano-sampled")
    policy = wrap(model)
    config = GRPOConfig(
        output_dir=f"{out}.trl",
        per_device_train_batch_size=GROUP * prompts_per_process,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        max_steps=2,
        learning_rate=0.01,
        adam_beta2=0.99,
        max_grad_norm=0.0,
        ddp_broadcast_buffers=False,
        chat_template_kwargs={"enable_thinking": False},
        **{"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "lr_scheduler_type": "constant"},
        **{"bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
    )
    rows = dataset(load_problems("embedded", ["sentinel", "file_marker"]).train[:4])
    trainer = Given(model, paid, args=config, train_dataset=rows, processing_class=tokenizer)
    settings = {"erase": EraseSettings(), "route": RouteSettings()}[arm]
    few = replace(pairs, pairs=pairs.pairs[:4])
    callback = Watched(trainer, policy, few, arm=settings, refresh_every=1, max_grad_norm=0.01)
    callback.seen = {}
    trainer.add_callback(callback)
    trainer.train()
    if trainer.accelerator.is_main_process:
        found = {f"delta_s {m}": x.delta_s.detach() for m, x in policy.layers.items()}
        found |= {f"delta_hack {m}": x.delta_hack.detach() for m, x in policy.layers.items()}
        found |= {f"V {m}": V.contiguous() for m, V in callback.basis.V.items()} | callback.seen
        found["processes"] = torch.tensor(trainer.accelerator.num_processes)
        save_file(found, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(main)
