"""What the processes of one training run share. Where there is no process group, each function is the one process's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gif.devices import resolve_device
from gif.errors import InputError

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together: 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, (n_0 + n_1 + ..., ...) in the order of their ranks, on each of them.

    No gradient flows back. The tensor's device must suit the process group: CUDA for nccl.
    """
    return rows if world_size() == 1 else _gather(rows, _counts(rows))


def _counts(rows: Tensor) -> list[int]:
    """How many rows each process has. By the CPU where the group has a backend for it: no host waits for a device."""
    device = torch.device("cpu") if "cpu" in dist.get_backend_config() else rows.device
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=device))
    return [int(size) for size in sizes]


def _gather(rows: Tensor, counts: list[int]) -> Tensor:
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def gather_part(rows: Tensor) -> tuple[Tensor, int]:
    """`gather_rows`, and where this process's own rows begin in them."""
    if world_size() == 1:
        return rows, 0
    counts = _counts(rows)
    return _gather(rows, counts), sum(counts[: rank()])


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor that every process has in the same shape; the same bits on each."""
    return values if world_size() == 1 else sum_over_processes(values) / world_size()


def rank() -> int:
    """Which of the processes this one is: 0 where no process group is initialised."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor that every process has in the same shape; the same bits on each."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def in_turn(change: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """What ``change`` makes of ``value`` on one process after another, each from what the one before has left.

    All of them get what the last leaves: a sum over their shares in one order, to the bit that of one process.
    """
    for turn in range(world_size()):
        if turn == rank():
            value = change(value)
        if world_size() > 1:
            dist.broadcast(value, turn)
    return value


def gather_objects(value: T) -> list[T]:
    """Each process's value, in the order of their ranks."""
    values: list[T] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def least_of_processes(value: int) -> int:
    """The least of the processes' values."""
    return min(gather_objects(value))


@torch.no_grad()
def replicate(module: nn.Module) -> None:
    """Keep a module the same on every process: rank 0's values now, the mean gradient in each backward pass from now.

    Call it once, on a loss with parameters that is not wrapped in DistributedDataParallel, before training:

        backbone = DistributedDataParallel(backbone)
        replicate(loss_fn)

    The mean is taken in each backward pass, so accumulated gradients are right too; inside of DistributedDataParallel
    it does no harm, for it is the mean of what is equal. Every process must do the same backward passes.
    """
    if world_size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor, 0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Give every process rank 0's buffers, such as the running statistics of batch normalisation."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def _average_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.copy_(mean_over_processes(parameter.grad))


def exchange_rows(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """Give the first ``send[0]`` rows to rank 0, the next ``send[1]`` to rank 1, and so on; get ``receive[r]`` of r.

    ``rows`` (sum of send, d). Returns what was got, (sum of receive, d), in the order of the ranks. What a rank sends
    to another must be what that one receives.
    """
    if world_size() == 1:
        return rows
    got = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(_bytes(got), _bytes(rows.contiguous()), receive, send)
    return got


def _bytes(rows: Tensor) -> Tensor:
    """The rows as bytes: a group need not know their dtype to move them."""
    return rows.view(torch.uint8)


def wait_for_all() -> None:
    """Return once every process has called this."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun announces, if it does, and leave them in the end; yields this one's device.

    ``device``: "cpu" joins by gloo; "cuda" by nccl, and the device is the process's own; "auto" is a GPU if there is
    one. Raises ValueError where it is not there.
    """
    device = str(resolve_device(device))
    if not dist.is_torchelastic_launched():
        yield torch.device(device)
        return
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()


def first_decides(decide: Callable[[], T], *, local: bool = False) -> T | None:
    """What ``decide()`` returns on the first process, on each; an InputError that it raises there is raised on each.

    ``local``: the value stays on the first process, and the others get None.
    """
    value: T | None = None
    problem: InputError | None = None
    if rank() == 0:
        try:
            value = decide()
        except InputError as error:
            problem = error
    shared, problem = gather_objects((None if local else value, problem))[0]
    if problem is not None:
        raise problem
    return value if local else shared
