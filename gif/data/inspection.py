"""What is in a data set: its numbers, its long tail as a picture, and the images that are broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gif.data.decoding import MAX_PIXELS, ImageDecoder
from gif.data.encoded import EncodedImages, left_out, read_all
from gif.data.images import IdentityDataset
from gif.data.loading import open_data
from gif.files import write_text
from gif.ownership import check_folder
from gif.plotting import COLORS, figure, save_figure
from gif.progress import new_table, print_table, say

if TYPE_CHECKING:
    from rich.table import Table


def inspect(
    input: str,
    *,
    output: Path | None = None,
    decode: bool = True,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Say what a data set holds: identities, images an identity, the long tail; which images are broken, and what lies
    there and is passed over.

    Args:
        input: the data set: a path or a name, as --data takes it.
        output: folder for a picture, long-tail.png, and for broken.txt, a line for each broken image.
        decode: decode every image, to find the broken ones.
        workers: processes that read images.
        max_pixels: an image whose file declares more counts as broken, before it is decoded.
    """
    data = open_data(input, decoder=ImageDecoder(max_pixels=max_pixels))
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
    if isinstance(data, EncodedImages) and decode:
        broken = data.broken(torch.arange(len(data))).nonzero().flatten().tolist()
        write_text(output / "broken.txt", "".join(f"{data.place(index)}\n" for index in broken))
        say(f"wrote {output / 'broken.txt'}")


def describe(data: IdentityDataset) -> Table:
    """The numbers of a data set: identities, images, and the quartiles of images an identity."""
    counts = data.labels.bincount(minlength=data.num_identities).double()
    table = new_table("measure", "value")
    table.add_row("identities", f"{data.num_identities:,}")
    table.add_row("images", f"{len(data):,}")
    table.add_row("image", " x ".join(map(str, data.image_shape)))
    quartiles = counts.quantile(torch.linspace(0, 1, 5, dtype=torch.float64)).tolist()
    for name, value in zip(
        ("minimum", "first quartile", "median", "third quartile", "maximum"), quartiles, strict=True
    ):
        table.add_row(f"images an identity, {name}", f"{value:g}")
    return table


def plot_long_tail(data: IdentityDataset, path: str | Path) -> None:
    """Draw how many images identities have: from the most to the fewest, and how many identities have so many."""
    counts = data.labels.bincount(minlength=data.num_identities)
    drawing, (ranked, histogram) = figure(9.6, 4.2, columns=2)
    ranked.loglog(range(1, len(counts) + 1), counts.sort(descending=True).values.numpy(), color=COLORS[0])
    ranked.set(xlabel="rank of the identity", ylabel="images", title="Long tail")
    values, identities = counts.unique(return_counts=True)
    histogram.loglog(values.numpy(), identities.numpy(), ".", color=COLORS[0])
    histogram.set(xlabel="images of an identity", ylabel="identities", title="How many have so many")
    save_figure(drawing, path)
