"""A folder of images as people have them: in colour, of mixed sizes, as JPEG and PNG, some damaged; made of glyphs.

`python -m benchmarks.mixed_images --output faces` writes the folder that docs/tutorials/folder.md and the tests use.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from gif.data import IdentityDataset, open_data

IDENTITIES, IMAGES = 62, 758
TRIED = 30  # identities for each that is wanted
ALIKE = 0.75  # correlation of two mean drawings
SIDES = (64, 240)  # pixels, of either side
ASPECTS = (0.8, 1.25)  # height to width
SHARES = (0.75, 0.95)  # of a drawing in the shorter side
COLORFUL = 0.4  # of a background's colour, the rest being its grey
QUALITY = (70, 95)  # of a JPEG


def write_mixed_images(
    folder: Path, *, identities: int = IDENTITIES, images: int = IMAGES, seed: int = 0, data: str = "glyphs"
) -> None:
    """Write drawings of ``identities`` into ``folder``, a folder each, ``images`` in all.

    Identities are those of ``data`` with most drawings, of several that look alike one; the number of their images
    falls, from the first to the last.
    Each drawing is turned, scaled, moved and coloured at random, and lies on a background of two colours, smooth
    patches and noise. All follows from ``seed``.
    """
    drawings = open_data(data)
    part = drawings.of_identities(_unlike(drawings, identities))
    random = np.random.default_rng(seed)
    for label, number in enumerate(_numbers(part.image_counts().tolist(), images)):
        rows = torch.nonzero(part.labels == label).flatten().tolist()
        place = folder / f"person-{label:04d}"
        place.mkdir(parents=True, exist_ok=True)
        for count, row in enumerate(random.permutation(rows)[:number].tolist()):
            _write(_composed(part, row, random), place / f"{count:03d}", random)


def _unlike(data: IdentityDataset, number: int) -> torch.Tensor:
    """So many letters and digits, those with most drawings, whose mean drawings are not alike, mirrored or not.

    O, o and 0 would be one, so would b and d, which are one for whoever trains with mirrored images, and V and v, which
    differ in size.
    """
    most = data.image_counts().argsort(descending=True, stable=True)[: TRIED * number]
    chosen: list[int] = []
    letters: set[str] = set()
    means: list[torch.Tensor] = []
    for label in filter(lambda label: data.names[label].isalnum(), most.tolist()):
        rows = torch.as_tensor(data.images_between(label, label + 1)).tolist()
        mean = data.batch(rows)[0].float().mean((0, 1))
        mean = mean - mean.mean()
        either = [torch.nn.functional.normalize(each.flatten(), dim=0) for each in (mean, mean.flip(1))]
        letter = data.names[label][0].casefold()
        if letter not in letters and all(float(mine @ other) < ALIKE for mine in either for other in means):
            chosen.append(label)
            letters.add(letter)
            means.append(either[0])
        if len(chosen) == number:
            break
    return torch.tensor(chosen)


def _numbers(most: list[int], images: int) -> list[int]:
    """How many images each identity gets: 2 at least, no more than it has drawings, falling, ``images`` in all."""
    wanted = np.linspace(2, 0.25, len(most)) * images / len(most) / 1.125
    numbers = [min(max(2, round(each)), there) for each, there in zip(wanted, most, strict=True)]
    place = 0
    while sum(numbers) != images and place < images * len(most):
        step = 1 if sum(numbers) < images else -1
        index = place % len(most)
        if 2 <= numbers[index] + step <= most[index]:
            numbers[index] += step
        place += 1
    return numbers


def _composed(data: IdentityDataset, row: int, random: np.random.Generator) -> Image.Image:
    """A drawing in colour on a background of its own."""
    width = random.integers(*SIDES).item()
    height = round(width * random.uniform(*ASPECTS))
    ink = Image.fromarray(data[row][0][0].numpy())
    side = int(min(width, height) * random.uniform(*SHARES))
    ink = ink.resize((side, side), Image.Resampling.BICUBIC).rotate(random.uniform(-8, 8), Image.Resampling.BICUBIC)
    mask = Image.new("L", (width, height))
    left, top = (round(random.uniform(0.3, 0.7) * (there - side)) for there in (width, height))
    mask.paste(ink, (left, top))
    background = _background(height, width, random)
    color = random.uniform(0, 255, 3)
    while np.abs(color - background.mean((0, 1))).sum() < 200:  # it can be told from what is behind it
        color = random.uniform(0, 255, 3)
    share = np.asarray(mask, np.float32)[..., None] / 255
    pixels = background * (1 - share) + color * share + random.normal(0, random.uniform(2, 14), (height, width, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.2)))


def _background(height: int, width: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Two colours that run into each other, under a few smooth patches, (h, w, 3) in [0, 255]."""
    patches = random.uniform(0, 255, (3, 3, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    one, other = random.uniform(0, 255, (2, 1, 1, 3))
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    along = ((np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)) + 0.75)[..., None] / 1.5
    colored = 0.6 * (one * along + other * (1 - along)) + 0.4 * smooth
    return (COLORFUL * colored + (1 - COLORFUL) * colored.mean(2, keepdims=True)).astype(np.float32)


def _write(image: Image.Image, place: Path, random: np.random.Generator) -> None:
    if random.uniform() < 0.7:
        image.save(place.with_suffix(".jpg"), quality=random.integers(*QUALITY).item())
    else:
        image.save(place.with_suffix(".png"))


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_images", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--identities", type=int, default=IDENTITIES)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_mixed_images(given.output, identities=given.identities, images=given.images, seed=given.seed)


if __name__ == "__main__":
    main()
