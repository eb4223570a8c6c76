"""Erase inside of TRL's GRPOTrainer: the packaged model, hack and solve before and after. Needs `trl`.

python examples/trl_erase.py                       # 48 steps of 64 rollouts, one CPU core
python examples/trl_erase.py --intervention none   # the same without the callback
"""

import tempfile
from importlib.resources import files
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from projected_grpo.api.grading import Grader, load_pairs, load_problems
from projected_grpo.api.method import ablate_quarantine, wrap
from projected_grpo.integrations.trl import ProjectGradients, dataset, reward_function

FLAWS = ("run_tests", "sentinel", "stdout_marker", "file_marker")


def rates(trainer: GRPOTrainer) -> str:
    found = trainer.evaluate()
    return f"hack {found['eval_hack']:.3f}, solve {found['eval_solve']:.3f}"


def main(
    intervention: Literal["none", "erase"] = "erase",
    pairs: str = "nano-sampled",
    steps: int = 48,
    warmup: int = 5,
    prompts: int = 8,
    eval_problems: int = 128,
    seed: int = 41,
) -> None:
    torch.set_num_threads(1)  # fastest for a model this small
    name = str(files("projected_grpo") / "data" / "nano")
    tokenizer = AutoTokenizer.from_pretrained(name)
    policy = wrap(AutoModelForCausalLM.from_pretrained(name))
    problems = load_problems("nano", FLAWS)
    held_out = problems.held_out[:: max(1, len(problems.held_out) // eval_problems)]
    with tempfile.TemporaryDirectory() as out, Grader() as grader:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=8 * prompts,
            per_device_eval_batch_size=64,
            num_generations=8,
            num_generations_eval=1,
            max_completion_length=72,
            **{"temperature": 1.0, "top_k": 0, "beta": 0.0},
            **{"loss_type": "dr_grpo", "scale_rewards": "none"},
            **{"learning_rate": 4e-2, "adam_beta2": 0.99, "weight_decay": 0.0},
            **{"lr_scheduler_type": "cosine", "warmup_steps": warmup, "max_steps": steps},
            max_grad_norm=0.0,  # the callback clips, after it has split the gradient
            **{"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
            **{"bf16": False, "use_cpu": True, "seed": seed, "gradient_checkpointing": False},
        )
        trainer = GRPOTrainer(
            policy.model,
            reward_function((*problems.train, *problems.held_out), grader),
            args=config,
            train_dataset=dataset(problems.train),
            eval_dataset=dataset(held_out),
            processing_class=tokenizer,
        )
        if intervention == "erase":
            trainer.add_callback(ProjectGradients(trainer, policy, load_pairs(pairs)))
        print(f"before: {rates(trainer)}", flush=True)
        trainer.train()
        with ablate_quarantine(policy):
            print(f"after, as deployed: {rates(trainer)}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
