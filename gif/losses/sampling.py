"""Which identities take part in a step: those that a batch brings, and others at random."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.rounding import uniform


def brought(labels: Tensor) -> Tensor:
    """The identities (B,) that a batch with ``labels`` (B,) brings: an ignored row, of label -1, brings nobody new."""
    largest = torch.cat([labels.new_zeros(1), labels]).max()
    return torch.where(labels >= 0, labels, largest)


def stratified(count: int, total: int, draw: Tensor) -> Tensor:
    """Numbers (min(count, total),) int64 of [0, total), each as likely as any other and hardly any twice.

    One is drawn from each of as many equal parts of [0, total), by a counter-based generator whose counter is ``draw``
    () int64: no process need tell another, no host need wait, and a run that continues draws what it would have drawn.
    """
    count = min(count, total)
    numbers = torch.arange(count, device=draw.device)
    if count == total:
        return numbers
    places = numbers + uniform(draw.view(1), numbers, 0).double()
    return places.mul_(total / count).long().clamp_(max=total - 1)
