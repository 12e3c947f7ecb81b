"""What is in a data set: its numbers, its long tail as a picture, and the images that are broken."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from gif.data.encoded import ALL_BROKEN, EncodedImages, broken_report
from gif.data.images import IdentityDataset
from gif.data.loading import open_data
from gif.data.report import describe
from gif.files import write_text
from gif.ownership import check_folder
from gif.plotting import COLORS, figure, save_figure
from gif.progress import console, progress, say

_BATCH = ALL_BROKEN - 1  # of more, being all broken is an error


def inspect(
    input: str,
    *,
    output: Path | None = None,
    decode: bool = True,
    workers: int = 0,
) -> None:
    """Say what a data set holds: identities, images an identity, the long tail, and which images are broken.

    Args:
        input: the data set: a path or a name, as --data takes it.
        output: folder for a picture, long-tail.png, and for broken.txt, a line for each broken image.
        decode: decode every image, to find the broken ones.
        workers: processes that read images.
    """
    data = open_data(input)
    if output is not None:
        check_folder(output)
    console.print(describe(data))
    if isinstance(data, EncodedImages) and decode:
        _read_all(data, workers)
        say(broken_report(data) or "every image can be decoded")
    if output is None:
        return
    plot_long_tail(data, output / "long-tail.png")
    say(f"drew {output / 'long-tail.png'}")
    if isinstance(data, EncodedImages) and decode:
        broken = data.broken(torch.arange(len(data))).nonzero().flatten().tolist()
        write_text(output / "broken.txt", "".join(f"{data.place(index)}\n" for index in broken))
        say(f"wrote {output / 'broken.txt'}")


def _read_all(data: EncodedImages, workers: int) -> None:
    batches = torch.arange(len(data)).split(_BATCH)
    loader = DataLoader(
        data,
        batch_sampler=(indices.tolist() for indices in batches),
        num_workers=workers,
        collate_fn=data.collate,
    )
    with progress("decoding", len(data), "images") as advance:
        for indices, _ in zip(batches, loader, strict=True):
            advance(len(indices))


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
