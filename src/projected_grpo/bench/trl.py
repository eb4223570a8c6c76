"""TRL's GRPOTrainer with LoRA on the benchmark's model and prompts (needs the `bench` extra)."""

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from projected_grpo.bench.step import WARM_UP, RivalFigures, Work, bench_model, synchronise
from projected_grpo.engine.memory import measured_peak

RANK = 32


class StepClock(TrainerCallback):
    """Times every optimizer step of a trainer, and gives the floor to someone else after each."""

    def __init__(self, device: torch.device, between: Callable[[], object]) -> None:
        self.device, self.between = device, between
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's data are fetched; generation, scoring, loss and update follow."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, then let the other side make its step."""
        synchronise((self.device,))
        self.seconds.append(time.perf_counter() - self.started)
        self.between()


class Remembering(GRPOTrainer):
    """Keeps the batch of its last loss, so that the loss can be run again by itself."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.batch = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)


def trl_steps(work: Work, prompts: Sequence[str], between: Callable[[], object]) -> RivalFigures:
    """TRL's steps, and the memory of one more of its losses; `between` is called after each step.

    Same model, prompts, group and completion length (no early stop), random rewards, AdamW, one update per
    batch, no reference model, Dr.GRPO's loss; LoRA of rank 32 on all Linears in place of our adapter.
    """
    model, tokenizer = bench_model(work.model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(work.seed)
    clock = StepClock(device, between)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    def random_reward(completions: Sequence[object], **kwargs: object) -> list[float]:
        return torch.rand(len(completions), generator=generator).tolist()

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=work.prompts_per_step * work.group,
            num_generations=work.group,
            max_completion_length=work.max_new,
            generation_kwargs={"min_new_tokens": work.max_new},
            max_steps=work.steps + WARM_UP,
            loss_type="dr_grpo",
            beta=0.0,
            temperature=0.7,
            top_k=20,
            learning_rate=7e-5,
            gradient_checkpointing=work.grad_checkpoint,
            bf16=next(model.parameters()).dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=work.seed,
        )
        trainer = Remembering(
            model=model,
            args=config,
            reward_funcs=random_reward,
            train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
            callbacks=[clock],
        )
        trainer.train()
        adapter = [p for p in trainer.model.parameters() if p.requires_grad]
        peak = measured_peak(
            lambda: torch.autograd.grad(trainer.compute_loss(trainer.model, trainer.batch), adapter),
            (device,),
        )
    return RivalFigures(clock.seconds, peak)
