"""How long a step takes here, from a few of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from gif.backbones import BackboneConfig

WARM_UP, TIMED = 1, 2  # steps


def seconds_a_step(backbone: BackboneConfig, batch: int, augment: Callable[[Tensor], Tensor], device: str) -> float:
    """Seconds that a forward and a backward pass of a backbone take, of ``batch`` images that are made of noise.

    The head's share is left out: it is small beside a network's. Random numbers go on as if it had not been called.
    """
    place = torch.device(device)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        network = backbone.build().to(place).train()
        images = torch.rand(batch, backbone.channels, backbone.image_size, backbone.image_size, device=place) * 2 - 1
        for step in range(WARM_UP + TIMED):
            if step == WARM_UP:
                _wait(place)
                begin = time.monotonic()
            network(augment(images)).square().mean().backward()
        _wait(place)
    return (time.monotonic() - begin) / TIMED


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
