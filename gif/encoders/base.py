"""What an encoder is, and what the pretrained ones share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from gif.errors import InputError, UnavailableError, in_short
from gif.packages import needs

Precision = Literal["fp32", "bf16"]
"""The dtype that an encoder multiplies in."""
_ROWS_A_BLOCK = 1 << 14


@dataclass(frozen=True)
class AffineMap:
    """x -> matrix (x - center), row by row: what mean features become code vectors by, where they are not yet.

    Args:
        center: (e,) float64.
        matrix: (d, e) float64.
    """

    center: Tensor
    matrix: Tensor

    def __call__(self, means: Tensor) -> Tensor:
        """Rows (m, d) float32 of ``means`` (m, e), computed in float64, on the map's device."""
        centered = (rows.to(torch.float64, copy=True).sub_(self.center) for rows in means.split(_ROWS_A_BLOCK))
        return torch.cat([(rows @ self.matrix.T).float() for rows in centered])

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        return {"center": self.center, "matrix": self.matrix}


class Encoder(Protocol):
    """A frozen map E from images to features whose means, one an identity, become code vectors (METHOD section 1).

    Attributes:
        name: which encoder, with which weights; kept in logs and checkpoints.
        embedding_size: d, the width of the code vectors.
    """

    name: str
    embedding_size: int

    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, e) float32 of raw ``images`` (n, 1 or 3, h, w) uint8, RGB; resizing and scaling are its own."""
        ...

    @property
    def fit(self) -> Callable[[Tensor], AffineMap] | None:
        """A method that finds, from the mean features (k, e) float32 of some identities, what all of them become code
        vectors by; None where mean features are code vectors, of any length, as they are: e = d."""
        ...


def check_images(images: Tensor) -> None:
    """Raise ValueError unless ``images`` is (n, 1 or 3, h, w) uint8."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        raise InputError(f"images must be (n, 1 or 3, h, w) uint8, got {tuple(images.shape)} {images.dtype}")


@dataclass(frozen=True)
class Preprocessing:
    """Raw images to a network's input: resize, crop the centre, scale to [0, 1], normalise with mean and std.

    Args:
        resize: (height, width) to resize to before the crop. The image covers it, its aspect ratio kept, unless
            ``squash``.
        crop: (height, width) of the network's input.
        interpolation: "bicubic" or "bilinear"; antialiased.
        mean, std: of the channels, in [0, 1].
        squash: resize to exactly ``resize``, whatever the aspect ratio.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    interpolation: str
    mean: Sequence[float]
    std: Sequence[float]
    squash: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images (n, 1 or 3, h, w) uint8 for the network: (n, 3, *crop) float32."""
        with needs("torchvision", "resizing images"):
            from torchvision.transforms import InterpolationMode  # here: as slow to import as torch itself
            from torchvision.transforms.v2 import functional as F

        check_images(images)
        images = images.expand(-1, 3, -1, -1)
        size = list(self.resize) if self.squash else self._cover(*images.shape[-2:])
        # resized as uint8, rounded, since that is what the networks were trained on
        images = F.resize(images, size, InterpolationMode(self.interpolation), antialias=True)
        images = F.center_crop(images, list(self.crop))
        return F.normalize(F.to_dtype(images, torch.float32, scale=True), list(self.mean), list(self.std))

    def _cover(self, height: int, width: int) -> list[int]:
        scale = max(self.resize[0] / height, self.resize[1] / width)
        return [max(int(height * scale), self.resize[0]), max(int(width * scale), self.resize[1])]


class NetworkEncoder:
    """An `Encoder` made of a frozen network; its width is what the network gives, never a number in a table.

    Args:
        name: as in `Encoder`.
        network: (n, 3, h, w) float32 on ``device`` to features (n, d).
        preprocessing: raw images to the network's input.
        device: where the network is.
        precision: "fp32", or "bf16" for autocast to bfloat16; features are float32 in either case.

    Raises ValueError for another precision.
    """

    fit = None

    def __init__(
        self,
        name: str,
        network: Callable[[Tensor], Tensor],
        preprocessing: Preprocessing,
        device: str | torch.device,
        precision: Precision = "fp32",
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise InputError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
        self.name = name if precision == "fp32" else f"{name} {precision}"
        self.device = torch.device(device)
        self._autocast = precision == "bf16"
        self._network = network
        self._preprocessing = preprocessing
        self.embedding_size = self(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).shape[1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, d) float32 of ``images`` (n, 1 or 3, h, w) uint8, on the network's device, not normalised.

        Raises ValueError for images of another shape or dtype.
        """
        pixels = self._preprocessing(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self._network(pixels).float()


@contextmanager
def loading(what: str, file: Path | None) -> Iterator[None]:
    """Explain what a model library raises while it loads the weights of ``what`` from ``file``, or from its hub.

    Raises ValueError for a file, RuntimeError for the hub.
    """
    try:
        yield
    except Exception as error:  # pickle's, safetensors', the hub's and its HTTP client's: they share no other class
        reason = in_short(error)
        if file is None:
            raise UnavailableError(
                f"cannot load {what} from its hub; check the network, or download the weights elsewhere and give the "
                f"path of the file ({reason})"
            ) from error
        raise InputError(
            f"{file} does not hold the weights of {what}; give the file or the model that belongs to it ({reason})"
        ) from error
