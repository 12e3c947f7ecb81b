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
from gif.files import write_text
from gif.ownership import check_folder
from gif.plotting import COLORS, canvas, figure, save_figure
from gif.progress import new_table, print_table, say

if TYPE_CHECKING:
    from rich.table import Table

SHEET_ROWS, SHEET_COLUMNS = 12, 12
GAP = 2  # pixels between images


def inspect(
    input: str,
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
        input: the data set: a path or a name, as --data takes it.
        identities: how many of the data set's, at random, such as 1e6; all where it is not given, a million of
            glyph-words.
        output: folder for a picture, long-tail.png, and of images on disk for broken.txt, a line for each broken image;
            of those that are made here for identities.png, images of the first identities.
        decode: decode every image, to find the broken ones.
        workers: processes that read images.
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
    """
    data = open_data(input, identities=identities, decoder=ImageDecoder(max_pixels=max_pixels))
    if output is not None:
        check_folder(output)
    print_table(describe(data))
    if isinstance(data, EncodedImages) and decode:
        read_all(data, torch.arange(len(data)), workers, "decoding")
        if not data.broken(torch.arange(len(data))).any():
            say("every image can be decoded")
    if report := left_out(data):
        say(report)
    if output is None:
        return
    plot_long_tail(data, output / "long-tail.png")
    say(f"drew {output / 'long-tail.png'}")
    if not isinstance(data, EncodedImages):
        plot_identities(data, output / "identities.png")
        say(f"drew {output / 'identities.png'}")
    elif decode:
        broken = data.broken(torch.arange(len(data))).nonzero().flatten().tolist()
        write_text(output / "broken.txt", "".join(f"{data.place(index)}\n" for index in broken))
        say(f"wrote {output / 'broken.txt'}")


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
    save_figure(drawing, path)


def plot_identities(data: IdentityDataset, path: str | Path) -> None:
    """Draw images of the first identities, a row each."""
    shown = data.of_identities(torch.arange(min(SHEET_ROWS, data.num_identities)))
    order, counts = shown.labels.argsort(stable=True), shown.image_counts()
    columns = min(int(counts.max()), SHEET_COLUMNS)
    height, width = (side + GAP for side in shown.image_shape[1:])
    sheet = np.zeros((len(counts) * height, columns * width), np.uint8)
    for row, places in enumerate(order.split(counts.tolist())):
        for column, image in enumerate(shown.batch(places[:columns].tolist())[0].numpy()):
            cell = sheet[row * height :, column * width :]
            cell[: image.shape[1], : image.shape[2]] = image.mean(0)
    drawing = canvas(4, 4 * sheet.shape[0] / sheet.shape[1] + 0.4)
    axes = drawing.subplots()
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[], xlabel="images", ylabel="identities", title=data.origin)
    axes.spines[:].set_visible(False)
    save_figure(drawing, path)
