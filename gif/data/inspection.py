"""What is in a data set: its numbers, its long tail as a picture, and the images that are broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gif.data.decoding import MAX_PIXELS, ImageDecoder
from gif.data.encoded import EncodedImages, left_out, read_all
from gif.data.images import IdentityDataset
from gif.data.loading import open_data
from gif.data.pictures import Pictures
from gif.files import write_text
from gif.ownership import check_folder
from gif.plotting import COLORS, canvas, figure, legible, plain_numbers, save_figure
from gif.progress import new_table, print_table, say
from gif.spacing import evenly_spaced

if TYPE_CHECKING:
    from rich.table import Table

SHEET_ROWS, SHEET_COLUMNS = 10, 12
SHEET_WIDTH = 7.0  # inches
GAP = 2  # pixels between images


def inspect(
    data: str,
    *,
    identities: float | None = None,
    output: Path | None = None,
    decode: bool = True,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Say what a data set holds: identities, images an identity, the long tail; which images are broken, and what lies
    there and is passed over.

    Args:
        data: the data set, a name or a path (docs/data.md).
        identities: how many of the data set's, at random, such as 1e6; all where it is not given, a million of
            glyph-words.
        output: folder for two pictures, long-tail.png and identities.png, which has images of identities with many and
            with few; and of images on disk for broken.txt, a line for each broken image.
        decode: decode every image, to find the broken ones.
        workers: processes that read images.
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
    """
    images = open_data(data, identities=identities, decoder=ImageDecoder(max_pixels=max_pixels))
    if output is not None:
        check_folder(output)
    print_table(describe(images))
    if isinstance(images, EncodedImages) and decode:
        look_through(images, workers)
    if report := left_out(images):
        say(report)
    if output is not None:
        draw_data(images, output)
        say(f"drew {output / 'long-tail.png'} and {output / 'identities.png'}")
        if isinstance(images, EncodedImages) and decode:
            write_broken(images, output / "broken.txt")
            say(f"wrote {output / 'broken.txt'}")


def look_through(images: EncodedImages, workers: int = 0) -> None:
    """Decode every image, so that the broken ones are known, and say so where there are none."""
    every = torch.arange(len(images))
    read_all(images, every, workers, "decoding")
    if not images.broken(every).any():
        say("every image can be decoded")


def write_broken(images: EncodedImages, path: Path) -> None:
    """Write where each image lies that was found broken, a line each."""
    broken = images.broken(torch.arange(len(images))).nonzero().flatten().tolist()
    write_text(path, "".join(f"{images.place(index)}\n" for index in broken))


def draw_data(images: IdentityDataset, folder: Path) -> None:
    """Draw long-tail.png and identities.png into ``folder``."""
    plot_long_tail(images, folder / "long-tail.png")
    plot_identities(images, folder / "identities.png")


def describe(data: IdentityDataset) -> Table:
    """The numbers of a data set: identities, images, and the quartiles of images an identity."""
    counts = data.image_counts()
    table = new_table("measure", "value")
    table.add_row("identities", f"{data.num_identities:,}")
    table.add_row("images", f"{len(data):,}")
    table.add_row("image", " x ".join(map(str, data.image_shape)))
    quartiles = np.quantile(counts.numpy(), np.linspace(0, 1, 5)).tolist()
    for name, value in zip(
        ("minimum", "first quartile", "median", "third quartile", "maximum"), quartiles, strict=True
    ):
        table.add_row(f"images an identity, {name}", f"{value:g}")
    return table


def plot_long_tail(data: IdentityDataset, path: str | Path) -> None:
    """Draw how many images identities have: from the most to the fewest, and how many identities have so many."""
    values, identities = data.image_counts().unique(return_counts=True)
    drawing, (ranked, histogram) = figure(9.6, 4.2, columns=2)
    last = identities.flip(0).cumsum(0)  # of the ranks that have so many images
    ranks = torch.stack([last - identities.flip(0) + 1, last], dim=1).flatten()
    ranked.loglog(ranks.numpy(), values.flip(0).repeat_interleave(2).numpy(), color=COLORS[0])
    ranked.set(xlabel="rank of the identity", ylabel="images", title="Long tail")
    histogram.loglog(values.numpy(), identities.numpy(), ".", color=COLORS[0])
    histogram.set(xlabel="images of an identity", ylabel="identities", title="How many have so many")
    for axes in (ranked, histogram):
        plain_numbers(axes)
    save_figure(drawing, path)


def plot_identities(data: IdentityDataset, path: str | Path) -> None:
    """Draw images of identities, a row each: of those with most images, with fewest, and evenly between."""
    counts = data.image_counts()
    order = counts.argsort(descending=True, stable=True)
    labels = order[evenly_spaced(len(order), SHEET_ROWS)].tolist()
    rows = [data.images_between(label, label + 1) for label in labels]
    shown = [list(row)[:SHEET_COLUMNS] if isinstance(row, range) else row[:SHEET_COLUMNS].tolist() for row in rows]
    sheet = Pictures(data).sheet(shown, GAP)
    drawing = canvas(SHEET_WIDTH, SHEET_WIDTH * sheet.shape[0] / sheet.shape[1] + 0.5)
    axes = drawing.subplots()
    axes.imshow(sheet)
    axes.set(xticks=[], yticks=[], xlabel="images", ylabel="identities, from most images to fewest")
    axes.set_title(legible(shorten_path(data.origin)), parse_math=False)
    axes.spines[:].set_visible(False)
    save_figure(drawing, path)


def shorten_path(origin: str) -> str:
    """The last two parts of a data set's path, or its name: for a title."""
    return "/".join(Path(origin).parts[-2:])
