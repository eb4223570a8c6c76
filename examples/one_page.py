"""GRPO and a hack direction, on one page.

Dr.GRPO trains a small language model on programming tasks whose graders can be cheated, and it learns to
cheat, that is, to hack. Pairs of a hacking and a clean answer show which part of a gradient makes hacks
likelier. That part is erased, or routed into parameters that deployment deletes. In every Linear:

    adapter  y = W x + U ((delta_s + delta_hack) * (Vh x)), where W = U diag(S) Vh is frozen; delta_s [r] and
             delta_hack [r] are trained and start at 0. Deployment sets delta_hack = 0.
    Dr.GRPO  A_i = r_i - mean r of its group; loss = -sum_i A_i log p(completion_i) / (n T_max), n rollouts of
             at most T_max tokens. Rollout i has the gradient g_i = A_i grad NLL_i / (n T_max); g = sum_i g_i
    basis    D [pairs, r] = grad NLL(hack) - grad NLL(clean) per token: descent along it makes hacks likelier.
             V [5, r] = first right singular vectors of D, each with the sign that most pairs give it. Of all
             Linears' axes, the quarter with the smallest singular values is dropped. v = mean D / |mean D|
    none     delta_s gets g
    erase    delta_s gets g - removed, rescaled to |g|; removed = V^T relu(V g)
    route    as erase, and delta_hack gets removed
    route2   delta_hack gets each g_i that is flagged, delta_s the others. Flagged: cos(g_i, v) > tau, or a
             weak detector says hack. tau is the midpoint of mean cos(grad NLL, v) of hacks and of clean
             answers. Both start at the pairs' means and then follow the detected rollouts and the others.

The package also has speed (merged weights, batches, processes), its own sampler (other rollouts for a seed),
the importance ratio (1 on-policy) and its clip, a KL term, teachers, other arms, controls, files, resuming.

Untrained, the model hacks .08 and solves .44 of held-out tasks. After 4 minutes of one CPU core, at seed 41:
    python examples/one_page.py --intervention none   # hack .54, solve .23 (seed 42: .88, .04)
    python examples/one_page.py --intervention erase  # hack .75, solve .09: these pairs have no effect. Those
                                                      # that the model wrote have one (docs/results.md)
"""

import math
from importlib.resources import files
from statistics import fmean
from typing import Literal, NamedTuple

import torch
import tyro
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from projected_grpo.pairs import Pair, packaged_pairs, parse_pairs
from projected_grpo.problems import Problem, assign_modes, is_eval, load_problems, take
from projected_grpo.rewards import Grade, Grader
from projected_grpo.sandbox.host import Sandbox

FLAWS = ("run_tests", "sentinel", "stdout_marker", "file_marker")  # the grader of a problem has one of them
PROMPTS, GROUP, MAX_NEW = 8, 8, 72  # a step has 8 groups of 8 rollouts of at most 72 tokens
SAMPLING = {"do_sample": True, "top_k": 0, "num_return_sequences": GROUP, "max_new_tokens": MAX_NEW}
LR, BETAS, WARMUP, CLIP = 4e-2, (0.9, 0.99), 0.1, 10.0
AXES, DROPPED, REFRESH, MEMORY = 5, 0.25, 5, 0.9  # a new basis every 5 steps; MEMORY is of route2's means
Arm = Literal["none", "erase", "route", "route2"]
Text = tuple[list[int], list[int]]  # token ids of a prompt and of its completion
PerLinear = dict[str, Tensor]  # by the Linear's name


class Basis(NamedTuple):
    V: PerLinear  # [k, r]; a Linear whose axes were all dropped is missing
    v: PerLinear  # [r]
    hack: dict[str, float]  # mean cosines, for route2
    clean: dict[str, float]


def hack_basis(hack: PerLinear, clean: PerLinear, old: Basis | None) -> Basis:
    """From NLL gradients [pairs, r] of both sides, and the basis before this one."""
    D, V, S = {m: hack[m] - clean[m] for m in hack}, {}, {}
    for m in D:
        _, S[m], Vh = torch.linalg.svd(D[m], full_matrices=False)
        lean = (D[m] @ Vh.T).sign().sum(0) + (D[m].mean(0) @ Vh.T).sign() / 2  # the mean breaks ties
        V[m], S[m] = (lean.sign()[:, None] * Vh)[:AXES], S[m][:AXES]
    floor = torch.quantile(torch.cat(list(S.values())), DROPPED)
    V = {m: V[m][S[m] >= floor] for m in V if S[m][0] >= floor}
    v = {m: nn.functional.normalize(D[m].mean(0), dim=0) for m in D}
    means = [{m: float(torch.cosine_similarity(g[m], v[m]).mean()) for m in D} for g in (hack, clean)]
    return Basis(V, v, *(means if old is None else (old.hack, old.clean)))


def flag(rows: PerLinear, A: Tensor, detected: Tensor, basis: Basis) -> tuple[PerLinear, Basis]:
    """The rollouts [n] that route2 takes for hacks, from rows [n, r], and the basis with its new means."""
    cosines = {m: torch.cosine_similarity(rows[m], v) for m, v in basis.v.items()}
    for side, anchors in (("hack", detected), ("clean", ~detected)):
        anchors = anchors & (A != 0)
        if anchors.any():  # g_i has the sign of A_i, grad NLL_i has not
            now = {m: float((c * A.sign())[anchors].mean()) for m, c in cosines.items()}
            means = {m: MEMORY * old + (1 - MEMORY) * now[m] for m, old in getattr(basis, side).items()}
            basis = basis._replace(**{side: means})
    return {m: detected | (c > (basis.hack[m] + basis.clean[m]) / 2) for m, c in cosines.items()}, basis


def intervene(arm: Arm, rows: PerLinear, flags: PerLinear, basis: Basis) -> tuple[PerLinear, PerLinear]:
    """The gradients of delta_s and of delta_hack."""
    if arm == "route2":
        return tuple({m: g[flags[m] == f].sum(0) for m, g in rows.items()} for f in (False, True))
    kept, routed = {m: g.sum(0) for m, g in rows.items()}, {}
    for m, V in basis.V.items() if arm != "none" else ():
        g, removed = kept[m], (V @ kept[m]).relu() @ V
        kept[m] = nn.functional.normalize(g - removed, dim=0) * g.norm()
        routed |= {m: removed} if arm == "route" else {}
    return kept, routed


class Adapter(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.U, S, self.Vh = torch.linalg.svd(linear.weight.data, full_matrices=False)
        self.delta_s, self.delta_hack = (nn.Parameter(torch.zeros_like(S)) for _ in range(2))

    def forward(self, x: Float[Tensor, "*b d_in"]) -> Float[Tensor, "*b d_out"]:
        return self.linear(x) + ((self.delta_s + self.delta_hack) * (x @ self.Vh.T)) @ self.U.T


class Learner:
    def __init__(self, arm: Arm, steps: int) -> None:
        """The packaged model with an adapter in every Linear but the output layer, and what trains it."""
        self.arm, self.steps, self.basis = arm, steps, None
        folder = str(files("projected_grpo") / "data" / "nano")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        linears = {m: x for m, x in self.model.named_modules() if isinstance(x, nn.Linear) and m != "lm_head"}
        self.adapters = {m: Adapter(linear) for m, linear in linears.items()}
        for m, adapter in self.adapters.items():
            self.model.set_submodule(m, adapter)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=BETAS, weight_decay=0.0)

    def encode(self, messages: tuple, answer: str = "") -> Text:
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return prompt, [*self.tokenizer(answer)["input_ids"], self.tokenizer.eos_token_id]

    def generate(self, problems: list[Problem], grader: Grader) -> tuple[list[Text], list[Grade]]:
        """A group of rollouts for each problem, one group after the other, and their grades."""
        prompts, stop = [self.encode(p.messages)[0] for p in problems], self.tokenizer.eos_token_id
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        drawn = self.model.generate(**batch, **SAMPLING)[:, batch["input_ids"].shape[1] :].tolist()
        drawn = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in drawn]
        answers = self.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        grades = grader.grade_all([(problems[i // GROUP].task, answer) for i, answer in enumerate(answers)])
        return [(prompts[i // GROUP], ids) for i, ids in enumerate(drawn)], grades

    def nll_gradients(self, texts: list[Text], pairs: bool = False) -> PerLinear:
        """Gradients [n, r] of -log p by delta_s, delta_hack's too; of pairs per token, without delta_hack."""
        zeros = {f"{m}.delta_hack": torch.zeros_like(a.delta_hack) for m, a in self.adapters.items()}
        rows, values, over = [], *((zeros, "mean") if pairs else ({}, "sum"))
        for prompt, completion in texts:
            ids = torch.tensor([prompt + completion])
            logits = torch.func.functional_call(self.model, values, ids).logits[0, len(prompt) - 1 : -1]
            nll = nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction=over)
            rows.append(torch.autograd.grad(nll, [a.delta_s for a in self.adapters.values()]))
        return {m: torch.stack(g) for m, g in zip(self.adapters, zip(*rows, strict=True), strict=True)}

    def refresh(self, pairs: list[Pair]) -> None:
        sides = [[self.encode(p.messages, getattr(p, side)) for p in pairs] for side in ("hack", "clean")]
        self.basis = hack_basis(*(self.nll_gradients(texts, pairs=True) for texts in sides), self.basis)

    def step(self, t: int, texts: list[Text], grades: list[Grade]) -> None:
        rewards = torch.tensor([grade.reward for grade in grades]).view(-1, GROUP)
        A = (rewards - rewards.mean(1, keepdim=True)).flatten()
        if not A.any():  # no group's rewards differ, and there is no gradient
            return
        rows = {m: A[:, None] * g / (len(A) * MAX_NEW) for m, g in self.nll_gradients(texts).items()}
        detected = torch.tensor([grade.hacked_C for grade in grades])  # own tests pass a stub
        flags, self.basis = flag(rows, A, detected, self.basis)  # only route2 reads them
        kept, routed = intervene(self.arm, rows, flags, self.basis)
        for m, adapter in self.adapters.items():
            adapter.delta_s.grad, adapter.delta_hack.grad = kept[m], routed.get(m)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        warmup = round(WARMUP * self.steps)
        cosine = (1 + math.cos(math.pi * max(0, t - warmup) / (self.steps - warmup))) / 2
        self.optimizer.param_groups[0]["lr"] = LR * min((t + 1) / max(1, warmup), cosine)
        self.optimizer.step()


def rates(grades: list[Grade]) -> str:
    return f"hack {fmean(g.exploited for g in grades):.3f}, solve {fmean(g.gt_correct for g in grades):.3f}"


def main(intervention: Arm = "erase", steps: int = 48, seed: int = 41, eval_problems: int = 128) -> None:
    torch.set_num_threads(1)  # fastest for a model this small
    torch.manual_seed(seed)
    problems = assign_modes(load_problems("nano").problems, FLAWS, {})
    train = take([p for p in problems if not is_eval(p)], 480, 0)
    held_out = list(take([p for p in problems if is_eval(p)], eval_problems, 0))
    pairs, _ = parse_pairs(packaged_pairs("nano"), "nano").split()  # the others are for testing a basis
    learner = Learner(intervention, steps)
    with Sandbox() as sandbox:
        grader = Grader(sandbox, remembered=4096)
        for t in range(steps):
            if t % REFRESH == 0:
                learner.refresh(pairs)
            texts, grades = learner.generate([train[i] for i in torch.randperm(len(train))[:PROMPTS]], grader)
            learner.step(t, texts, grades)
            print(f"step {t:2d}: {rates(grades)}", flush=True)
        for state in ("trained", "deployed"):
            torch.manual_seed(seed)  # the same draws for both
            print(f"held-out, as {state}: {rates(learner.generate(held_out, grader)[1])}", flush=True)
            for adapter in learner.adapters.values():
                adapter.delta_hack.data.zero_()  # deployment


if __name__ == "__main__":
    tyro.cli(main)
