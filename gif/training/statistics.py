"""Running statistics of a network, which a forward pass changes and a loss scaler does not undo."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The floating-point buffers of ``network`` as they are now: a batch normalisation's means and variances.

    Where one image overflows in float16, a loss scaler skips the optimizer's step; but the batch's statistics, NaN or
    infinite, have entered the running ones, which would stay so for good.
    """

    def __init__(self, network: nn.Module) -> None:
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._before = self._values()

    @torch.no_grad()
    def restore(self) -> None:
        """Give each number that is no longer finite the value it had; nothing waits for the device."""
        now = self._values()
        kept = torch.where(now.isfinite(), now, self._before)
        for buffer, values in zip(self._buffers, kept.split([b.numel() for b in self._buffers]), strict=False):
            buffer.copy_(values.view_as(buffer))

    def _values(self) -> Tensor:
        """All of them in one vector: hundreds of buffers are a launch each only where they are written."""
        if not self._buffers:
            return torch.empty(0)
        return torch.cat([buffer.detach().flatten() for buffer in self._buffers])
