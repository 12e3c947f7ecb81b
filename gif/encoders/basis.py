"""The basis of code vectors: which encoder made them and what it was fitted to, so that later ones are made alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gif.encoders import make_encoder
from gif.encoders.base import AffineMap, Encoder, Precision
from gif.errors import InputError, MissingFileError
from gif.files import load_tensors, save_tensors

FORMAT = "gif.encoder/1"
SUFFIX = ".encoder.safetensors"


@dataclass(frozen=True)
class EncoderOptions:
    """What `gif.encoders.make_encoder` was asked for, and the size in which images were read."""

    name: Literal["clip", "dino", "pixels"]
    width: int
    model: str | None
    weights: str | None
    precision: Precision
    image_size: int


class FittedEncoder:
    """An encoder that is not fitted anew: mean features become code vectors by the map that is known.

    Args:
        encoder: a frozen encoder.
        known: what it was fitted to; None for one that is not fitted.
    """

    def __init__(self, encoder: Encoder, known: AffineMap | None) -> None:
        self._encoder, self._known = encoder, known
        self.name, self.embedding_size = encoder.name, encoder.embedding_size

    def __call__(self, images: Tensor) -> Tensor:
        return self._encoder(images)

    @property
    def fit(self) -> Callable[[Tensor], AffineMap] | None:
        known = self._known
        return None if known is None else lambda means: known


@dataclass(frozen=True, eq=False)
class Basis:
    """An encoder, and the affine map that it was fitted to, None where it is not fitted."""

    options: EncoderOptions
    known: AffineMap | None

    def encoder(self, device: str | torch.device) -> FittedEncoder:
        """The encoder again. Raises what `make_encoder` raises."""
        options = self.options
        made = make_encoder(
            options.name,
            width=options.width,
            model=options.model,
            weights=options.weights,
            device=device,
            precision=options.precision,
        )
        return FittedEncoder(made, self.known)

    def save(self, vectors: str | Path) -> None:
        """Write it beside code vectors, atomically."""
        tensors = {} if self.known is None else self.known.tensors()
        save_tensors(basis_path(vectors), tensors, format=FORMAT, options=json.dumps(asdict(self.options)))

    @classmethod
    def load(cls, vectors: str | Path) -> Basis:
        """The basis beside code vectors. Raises FileNotFoundError, ValueError for a damaged file."""
        path = basis_path(vectors)
        if not path.exists():
            raise MissingFileError(
                f"no file {path}, which says how {vectors} were made; make them again with gif vectors, which writes it"
            )
        tensors, metadata = load_tensors(path, format=FORMAT)
        try:
            stored: dict[str, Any] = json.loads(metadata["options"])
            known = AffineMap(tensors["center"], tensors["matrix"]) if tensors else None
            return cls(EncoderOptions(**stored), known)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} names no encoder ({error}); make it again with gif vectors") from error


def basis_path(vectors: str | Path) -> Path:
    """The file of the basis of code vectors, beside them."""
    return Path(vectors).with_suffix(SUFFIX)
