"""Frozen image encoders: where code vectors come from."""

from __future__ import annotations

from typing import Literal

import torch

from gif.encoders.base import AffineMap, Encoder, Precision
from gif.encoders.clip import DEFAULT_MODEL as _CLIP_MODEL
from gif.encoders.clip import DEFAULT_WEIGHTS as _CLIP_WEIGHTS
from gif.encoders.clip import CLIPEncoder
from gif.encoders.dino import DEFAULT_MODEL as _DINO_MODEL
from gif.encoders.dino import DINOEncoder
from gif.encoders.pixels import PixelEncoder
from gif.errors import InputError

__all__ = ["AffineMap", "CLIPEncoder", "DINOEncoder", "Encoder", "PixelEncoder", "Precision", "make_encoder"]


def make_encoder(
    name: Literal["clip", "dino", "pixels"],
    *,
    width: int,
    weights: str | None = None,
    model: str | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
) -> Encoder:
    """Make an encoder by its name.

    Args:
        name: "clip" (`CLIPEncoder`), "dino" (`DINOEncoder`) or "pixels" (`PixelEncoder`).
        width: of the code vectors, for "pixels"; the others have their own.
        weights: a weight file, or for "clip" a tag; None takes the default from the hub. "pixels" has none.
        model: the architecture, None for the default. "pixels" has none.
        device: where a network runs, None for the CPU; "pixels" work where the images are.
        precision: of a network, "fp32" or "bf16"; "pixels" are always float32.

    Raises ValueError for an unknown name, or weights, a model or "bf16" for "pixels"; and whatever the encoder's class
    raises.
    """
    if name == "clip":
        return CLIPEncoder(model or _CLIP_MODEL, weights or _CLIP_WEIGHTS, device=device or "cpu", precision=precision)
    if name == "dino":
        return DINOEncoder(model or _DINO_MODEL, weights, device=device or "cpu", precision=precision)
    if name != "pixels":
        raise InputError(f"no encoder {name!r}; wanted 'clip', 'dino' or 'pixels'")
    if weights is not None or model is not None or precision != "fp32":
        raise InputError(
            "the encoder 'pixels' has no weights, no model and no precision; leave them out, or take 'clip' or 'dino'"
        )
    return PixelEncoder(width)
