"""From encoded images to pixels: RGB or grey, one size, and a clear word where an image is broken."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gif.errors import InputError, in_short
from gif.packages import needs
from gif_kernels import checks

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["squash", "crop", "exact"]
Pixels = NDArray[np.uint8]
Align = Callable[[Pixels], Pixels | None]
"""A hook that finds what an image is to be judged by, such as a face, and brings it into its place: pixels (h, w, 3),
RGB, to others (k, l, 3); None where there is nothing to find."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000  # a photograph of today's telephones; 150 MB in RGB
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_SIXTEEN_BITS = "I;16"
_SIGNATURES = {".jpg": (0, b"\xff\xd8\xff"), ".png": (0, b"\x89PNG\r\n\x1a\n"), ".webp": (8, b"WEBP")}
_PNG_BEGIN = 8  # bytes of its signature
_PNG_CHUNK = 12  # bytes of a chunk beside its data: length, kind, checksum
_PNG_KEPT = (b"tRNS", b"eXIf", b"iTXt")  # transparency, and the two that may say which side is up
_ORIENTATION, _UPRIGHT = 0x0112, 1  # EXIF's tag, and its value for an image that needs no turn
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""How an image is turned upright, by EXIF's orientation: names of Pillow's."""


class BrokenImageError(InputError):
    """An image that cannot be read or decoded; the message says which and why."""


@dataclass(frozen=True)
class ImageDecoder:
    """JPEG, PNG or WebP to uint8 (channels, size, size), turned as EXIF says; decoded by Pillow.

    Args:
        size: height and width.
        channels: 3 for RGB, in this order, or 1 for grey levels. Either is made of whatever the file holds.
        fit: an image of another size is resized to exactly ``size``, whatever its aspect ratio ("squash": nothing is
            lost), resized to cover it and its centre kept ("crop"), or counts as broken ("exact"). Resizing is bilinear
            and antialiased, by torchvision.
        max_pixels: an image whose file declares more counts as broken, before anything is decoded: a file of a hundred
            kilobytes can declare gigabytes. At most what Pillow opens, twice its ``Image.MAX_IMAGE_PIXELS``.
        align: called with the pixels of the whole image, in colours, before they are resized. An image in which it
            finds nothing, or that it fails at, counts as broken.

    Raises ValueError for other values.
    """

    size: int = 112
    channels: int = 3
    fit: Fit = "squash"
    max_pixels: int = MAX_PIXELS
    align: Align | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3):
            raise InputError(f"wanted size >= 1 and 1 or 3 channels, got {self.size} and {self.channels}")
        checks.choice("fit", self.fit, get_args(Fit))
        check_max_pixels(self.max_pixels)

    def __call__(self, encoded: bytes) -> Tensor:
        """Pixels (channels, size, size) uint8. Raises BrokenImageError."""
        if self.align is not None:
            return self.prepare(decode(encoded, "RGB", max_pixels=self.max_pixels))
        return self._resize(decode(encoded, self._mode, max_pixels=self.max_pixels))

    def prepare(self, pixels: Pixels) -> Tensor:
        """What `__call__` makes of an image whose pixels (h, w) or (h, w, 3), RGB, are known: (channels, size, size).

        Raises BrokenImageError, TypeError for another dtype, ValueError for another shape.
        """
        if pixels.dtype != np.uint8:
            raise TypeError(f"pixels must be uint8, 0 to 255, got {pixels.dtype}; convert them")
        if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
            raise InputError(f"pixels must be (h, w) or (h, w, 3) in RGB, got {pixels.shape}")
        with needs("pillow", "reading images"):
            from PIL import Image

        if self.align is not None:
            pixels = _aligned(self.align, np.asarray(Image.fromarray(pixels).convert("RGB")))
        return self._resize(np.array(Image.fromarray(pixels).convert(self._mode)))

    @property
    def _mode(self) -> Literal["RGB", "L"]:
        return "RGB" if self.channels == 3 else "L"

    def _resize(self, pixels: Pixels) -> Tensor:
        image = torch.from_numpy(pixels).view(*pixels.shape[:2], self.channels).permute(2, 0, 1)
        if image.shape[1:] == (self.size, self.size):
            return image
        if self.fit == "exact":
            raise BrokenImageError(f"it is {image.shape[1]} x {image.shape[2]}, wanted {self.size} x {self.size}")
        with needs("torchvision", "resizing images"):
            from torchvision.transforms.v2 import functional as F  # here: as slow to import as torch itself

        if self.fit == "squash":
            return F.resize(image, [self.size, self.size], antialias=True)
        return F.center_crop(F.resize(image, [self.size], antialias=True), [self.size, self.size])


def _aligned(align: Align, pixels: Pixels) -> Pixels:
    """What the hook finds. Raises BrokenImageError where that is nothing, or no image."""
    name = getattr(align, "__name__", type(align).__name__)
    try:
        found = align(pixels)
    except Exception as error:  # it is another's code
        raise BrokenImageError(f"{name} failed at it ({type(error).__name__}: {in_short(error)})") from error
    if found is None:
        raise BrokenImageError(f"{name} finds nothing in it")
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3:
        what = f"{found.shape} {found.dtype}" if isinstance(found, np.ndarray) else type(found).__name__
        raise BrokenImageError(f"{name} returned {what}, wanted an array (h, w, 3) uint8, or None")
    return found


def decode(
    encoded: bytes, mode: Literal["RGB", "L"], *, turn: bool = True, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """The pixels of an encoded JPEG, PNG or WebP, (height, width, 3) or (height, width) uint8, in its own size.

    Args:
        encoded: the file.
        mode: colours or grey levels.
        turn: as EXIF says.
        max_pixels: of more, nothing is decoded.

    Raises BrokenImageError.
    """
    with needs("pillow", "reading images"):
        from PIL import Image, UnidentifiedImageError
    if suffix(encoded) == ".png":
        encoded = _without_texts(encoded)
    _check_pixels(_declared(encoded), max_pixels)
    try:
        with Image.open(BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as stored:
            _check_pixels(stored.size, max_pixels)
            turned = _TURNS.get(_orientation(stored)) if turn else None
            image = _eight_bits(stored)
            image = image if image.mode == mode else image.convert(mode)
            return np.array(image if turned is None else image.transpose(Image.Transpose[turned]))
    except MemoryError:
        raise  # nothing is wrong with the image
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"its first bytes are right, and the rest is no {suffix(encoded)[1:]}") from error
    except Exception as error:  # of damaged bytes Pillow's decoders raise almost anything
        raise BrokenImageError(str(error)) from error


def _eight_bits(stored: Image) -> Image:
    """A grey image of 16 bits by its upper eight, as Pillow takes those in colours; others as they are.

    Raises BrokenImageError for other numbers than whole ones of 8 or 16 bits.
    """
    from PIL import Image  # looked for before

    if stored.mode in _EIGHT_BITS:
        return stored
    if not stored.mode.startswith(_SIXTEEN_BITS):
        raise BrokenImageError(f"its pixels are of mode {stored.mode}, wanted 8 or 16 bits a channel")
    return Image.fromarray((np.asarray(stored) >> 8).astype(np.uint8))


def check_max_pixels(max_pixels: int) -> None:
    """Raise ValueError unless an image may have so many pixels: at least 1, at most what Pillow opens."""
    if 1 <= max_pixels <= MAX_PIXELS:  # the usual case, which needs no Pillow
        return
    with needs("pillow", "reading images"):
        from PIL import Image
    most = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
    if max_pixels < 1:
        raise InputError(f"max_pixels must be at least 1, got {max_pixels:,}; {MAX_PIXELS:,} are the default")
    if most is not None and max_pixels > most:
        raise InputError(
            f"max_pixels must be at most {most:,}, which Pillow opens, got {max_pixels:,}; give fewer, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BrokenImageError(
            f"it declares {width:,} x {height:,} = {width * height:,} pixels, more than {max_pixels:,}; raise "
            "max_pixels if it is meant to be so large"
        )


def _orientation(image: Image) -> int:
    """How to turn an image upright, by its EXIF alone; not at all where that cannot be read, for the pixels can."""
    try:
        return int(image.getexif().get(_ORIENTATION, _UPRIGHT))
    except Exception:  # of damaged metadata Pillow raises almost anything
        return _UPRIGHT


def _declared(encoded: bytes) -> tuple[int, int]:
    """Width and height of a PNG or a WebP, of which Pillow makes room for the latter as it opens it; else (0, 0)."""
    kind, body = encoded[12:16], encoded[20:30]
    if kind == b"IHDR":
        return int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    if suffix(encoded) != ".webp" or len(body) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _without_texts(encoded: bytes) -> bytes:
    """A PNG without what says nothing of its pixels and without damaged metadata, either of which Pillow may refuse."""
    at, kept = _PNG_BEGIN, [encoded[:_PNG_BEGIN]]
    while at + _PNG_CHUNK <= len(encoded):
        length = int.from_bytes(encoded[at : at + 4], "big")
        chunk = encoded[at : at + _PNG_CHUNK + length]
        needed = chunk[4:5].isupper()  # by the decoder, and the others are not
        if needed or (chunk[4:8] in _PNG_KEPT and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")):
            kept.append(chunk)
        at += len(chunk)
    return b"".join(kept) + encoded[at:]


def suffix(encoded: bytes) -> str:
    """The suffix of the file an encoded image belongs into, told from its first bytes.

    Raises BrokenImageError if it is no JPEG, PNG or WebP.
    """
    for name, (offset, signature) in _SIGNATURES.items():
        if encoded[offset : offset + len(signature)] == signature:
            return name
    raise BrokenImageError(f"it is no JPEG, PNG or WebP ({len(encoded)} bytes, first {encoded[:8].hex(' ')})")
