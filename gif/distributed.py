"""What the processes of one training run share. Where there is no process group, each function is the one process's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train together: 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, (n_0 + n_1 + ..., ...) in the order of their ranks, on each of them.

    No gradient flows back. The tensor's device must suit the process group: CUDA for nccl.
    """
    if world_size() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor that every process has in the same shape; the same bits on each."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def shared_seed(device: torch.device) -> int:
    """A fresh seed in [0, 2^31) from rank 0's default generator, the same on each process."""
    seed = torch.randint(1 << 31, (1,))
    if world_size() > 1:
        seed = seed.to(device)
        dist.broadcast(seed, 0)
    return int(seed)
