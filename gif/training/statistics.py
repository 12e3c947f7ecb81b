"""Running statistics of a network, which a forward pass changes and a loss scaler does not undo."""

from __future__ import annotations

from collections.abc import Iterable

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


@torch.no_grad()
def recompute_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take the means and variances of batch normalisation anew: of ``batches`` alone, each with the same weight.

    Running ones are of the weights of the last steps, the latest counting most. Where a run has few steps, they are
    behind the weights that it ends with; these are not. The network stays in the mode it was in.

    Args:
        network: whose weights are done.
        batches: of images (B, c, h, w) as they were trained on, on the network's device, each of 2 or more.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    layers = [layer for layer in layers if layer.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    was_training = network.training
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches
    network.train()
    for batch in batches:
        network(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.train(was_training)
