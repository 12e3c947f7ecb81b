"""The average of a backbone's weights over its steps: judged and kept in place of the last ones."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

WARM_UP = 10  # steps by which the average of the first few is shortened, so that initial weights do not stay in it


class AverageBackbone(nn.Module):
    """An exponential moving average of a backbone's weights and running statistics (Polyak averaging).

        average <- decay_t average + (1 - decay_t) weights,        decay_t = min(decay, (1 + t) / (10 + t))

    after step t. It is a network of its own, in eval mode, whose state goes into checkpoints.

    Args:
        backbone: what is averaged; copied as it is now.
        decay: in (0, 1); 0.999 averages about the last thousand steps.
    """

    def __init__(self, backbone: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.network = copy.deepcopy(backbone).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, backbone: nn.Module, step: int) -> None:
        """Take the weights after ``step`` steps into the average; nothing waits for the device."""
        share = 1 - min(self.decay, (1 + step) / (WARM_UP + step))
        own, new = _tensors(self.network), _tensors(backbone)
        floating = [place for place, value in enumerate(own) if value.is_floating_point()]
        torch._foreach_lerp_([own[place] for place in floating], [new[place] for place in floating], share)
        for place in set(range(len(own))) - set(floating):  # counts of batches
            own[place].copy_(new[place])

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: it is never trained."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.network(images)
        return embeddings


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
