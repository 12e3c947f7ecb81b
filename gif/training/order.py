"""The order in which images are trained on: a function of the seed and the epoch, whatever reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gif.permutation import ComputedOrder
from gif.seeds import seed_of
from gif_kernels.runs import occurrences

_BETWEEN_RANKS = 500_000_003


def begin_epoch(seed: int, epoch: int, rank: int) -> tuple[int, int]:
    """Seed torch's generator with what is an epoch's own; returns the seeds of its loader and of its order.

    These two are the same on every process. What is drawn afterwards, such as augmentation, is each process's own.
    """
    own = seed_of(seed, epoch)
    torch.manual_seed(own)
    loader_seed, order_seed = (int(torch.empty((), dtype=torch.int64).random_()) for _ in range(2))
    if rank > 0:
        torch.manual_seed(own + rank * _BETWEEN_RANKS)
    return loader_seed, order_seed


@dataclass(frozen=True)
class Groups:
    """Images of one identity that stand side by side in an order: for heads that ask for it (`gif.head.Head`).

    Args:
        labels: (n,) the identity of each image.
        size: images in a group; an identity's last group has what is left.
        share: of the groups that stay together, at random; the images of the others come one by one.
    """

    labels: Tensor
    size: int
    share: float = 1.0

    def arrange(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """The permutation ``order`` (n,) in which each group stands where its first image stood."""
        labels = self.labels[order]
        before = occurrences(labels)
        groups = (labels * len(labels) + before // self.size).unique(return_inverse=True)[1]
        numbers = torch.arange(len(order))
        first = torch.full_like(numbers, len(order)).scatter_reduce_(0, groups, numbers, "amin")[groups]
        together = torch.rand(len(order), generator=generator)[first] < self.share
        return order[torch.where(together, first, numbers).argsort(stable=True)]


class EpochOrder:
    """The rows that one process reads in an epoch, batch by batch: a ``batch_sampler`` for a DataLoader.

    All processes together read the batches that one process would: batch i is ``order[i * batch_size:][:batch_size]``
    of one permutation, and process r of p takes its r-th p-th. A position in the epoch is therefore a number of steps,
    or of images, and means the same to any number of processes and of loader workers.

    Args:
        images: n, how many there are; those that fill no batch are left out.
        batch_size: of all processes together, a multiple of ``processes``.
        seed: of the permutation.
        begin: steps of the epoch that are done.
        end: steps of it that are taken at most; all where None.
        rank, processes: which process this is, and of how many.
        groups: images that stand side by side in the permutation, if any do.
        computed: take a permutation that is computed batch by batch, another one, of which no table is kept: for data
            sets that keep none either.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int,
        begin: int,
        end: int | None = None,
        rank: int,
        processes: int,
        groups: Groups | None = None,
        computed: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._order: Tensor | ComputedOrder
        if groups is not None:
            self._order = groups.arrange(torch.randperm(images, generator=generator), generator)
        else:
            self._order = ComputedOrder(images, seed) if computed else torch.randperm(images, generator=generator)
        self._batch_size = batch_size
        steps = images // batch_size
        self._steps = range(begin, steps if end is None else min(end, steps))
        self._share = batch_size // processes
        self._offset = rank * self._share

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            first = step * self._batch_size + self._offset
            yield self._order[first : first + self._share].tolist()

    def __len__(self) -> int:
        return len(self._steps)
