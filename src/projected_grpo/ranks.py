"""The processes that make one run together, as torchrun starts them: one per GPU, or per share of the cores.

Each does its share of the expensive work (sampling, grading, loss) and gathers what the others found; the
rest is cheap, and all do it alike on the same data. So all processes hold the whole step and the same
adapter, bit for bit, and only the first one writes. After each step they compare a hash of the adapter, and
agree whether one of them got a signal to stop. A saved state does not say how many they were.

What is sent is megabytes a step (more in route2, which sends a row per rollout: docs/scaling.md), so it goes
over gloo between GPUs too: with gloo a process that dies is an error in the others at once, where NCCL leaves
it to a watchdog to kill them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.errors import RankLost, UserError
from projected_grpo.grpo import RolloutGrads
from projected_grpo.rollout import Rollout

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the first process may have to compute all SVDs before the others go on


@dataclass(frozen=True)
class Ranks:
    """This process's place among them. The methods that send are called by all, in the same order.

    These raise RankLost when another process is gone.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1  # of them, those on this machine

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of its machine's CPU cores, at least one."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_size)

    def share(self, costs: Sequence[int]) -> range:
        """Consecutive items that are this process's work: an equal part of the cost, to within one item.

        Without any cost, all are the first one's.
        """
        whole = sum(costs) or 1
        middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
        owners = [min(self.size - 1, int(self.size * middle / whole)) for middle in middles]
        start = sum(owner < self.rank for owner in owners)
        return range(start, start + owners.count(self.rank))

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T | None = None) -> T:
        """The first process's value; that of the others is ignored."""
        values: list[Any] = [value]
        if self.size > 1:
            with _peers():
                dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A UserError that one process meets within it is raised by all, so that the first one can save.

        Nothing is sent within it.
        """
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            own = error
        said = self.gather(None if own is None else str(own))
        if own is not None:
            raise own
        for rank, message in enumerate(said):
            if message is not None:
                raise UserError(f"process {rank}: {message}")

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, the same bits in all."""
        if self.size == 1:
            return tensor
        summed = tensor.detach().to("cpu", copy=True)
        with _peers():
            dist.all_reduce(summed)
        return summed.to(tensor.device)


ALONE = Ranks()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].strip()[:120]
        raise RankLost(f"another process of this run is gone; its own output says why ({reason})") from error


def join_ranks(device: str) -> Ranks:
    """This process's place under torchrun, with the GPU of its own; ALONE without torchrun.

    Raises UserError where the machine has fewer GPUs than processes, or --device names GPUs.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    local = int(os.environ["LOCAL_RANK"])
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    if "," in device:
        raise UserError(
            f"--device {device}: one model over several devices is one process; start it without torchrun"
        )
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {device}: under torchrun each process has its own GPU; leave --device out")
    if device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"{ranks.local_size} processes but {torch.cuda.device_count()} GPUs here; lower torchrun's "
                "--nproc-per-node, or give --device=cpu"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        with _peers():
            dist.init_process_group(
                "gloo", store=_open_store(ranks), rank=ranks.rank, world_size=ranks.size, timeout=PATIENCE
            )
    return ranks


def _open_store(ranks: Ranks) -> dist.Store:
    """Where the processes find each other: torchrun's store, or else one that the first of them opens.

    Under a name of this attempt, since torchrun's still has the addresses of those before a restart.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, port, ranks.size, is_master=ranks.first and not there, timeout=PATIENCE)
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def odd_one(values: Sequence[object]) -> int | None:
    """The first process whose value is not that of process 0; None if all agree."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)


def own_share(
    ranks: Ranks, rollouts: Sequence[Rollout], advantage: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The advantages, but 0, which is not run, for rollouts that are another process's work."""
    tokens = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    own = ranks.share([t if a != 0 else 0 for t, a in zip(tokens, advantage.tolist(), strict=True)])
    out = torch.zeros_like(advantage)
    out[own.start : own.stop] = advantage[own.start : own.stop]
    return out


def by_source(grads: RolloutGrads, is_teacher: Bool[Tensor, " n"]) -> RolloutGrads:
    """Rows added up per source: all that arms read which are not `per_rollout`, and little to send."""
    of_teacher = is_teacher[grads.first]
    picked = [mask for mask in (~of_teacher, of_teacher) if bool(mask.any())]
    rows = {m: torch.stack([g[mask.to(g.device)].sum(0) for mask in picked]) for m, g in grads.rows.items()}
    return replace(grads, rows=rows, first=torch.stack([grads.first[mask][0] for mask in picked]))


def over_ranks(ranks: Ranks, grads: RolloutGrads) -> RolloutGrads:
    """The whole step's gradients and figures, from what each process found for its share."""
    if ranks.size == 1:
        return grads
    flat = ranks.total(torch.cat([rows.flatten() for rows in grads.rows.values()]))
    pieces = flat.split([rows.numel() for rows in grads.rows.values()])
    summed = {m: p.view_as(rows) for (m, rows), p in zip(grads.rows.items(), pieces, strict=True)}
    own = torch.stack([grads.logp, grads.ref_logp, grads.kl, grads.gap])
    losses, found = zip(*ranks.gather((grads.loss, own)), strict=True)
    figures = found[0]
    for other in found[1:]:
        figures = torch.where(figures.isnan(), other, figures)
    return RolloutGrads(summed, grads.first, sum(losses), *figures)
