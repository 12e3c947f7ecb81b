"""What is in a set of glyphs: its numbers, and a picture of its identities and of its long tail."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gif.data.glyphs.from_debian import all_glyphs_80k
from gif.data.glyphs.from_matplotlib import all_glyphs
from gif.data.images import IdentityImages
from gif.data.inspection import describe
from gif.errors import InputError
from gif.plotting import COLORS, figure, save_figure
from gif.progress import print_table, say
from gif.spacing import evenly_spaced

SHEET_ROWS, SHEET_COLUMNS = 16, 16
GAP = 2  # pixels between images


def glyph_report(
    fonts: Literal["matplotlib", "debian"] = "matplotlib",
    *,
    size: int = 32,
    min_families: int | None = None,
    font_folder: Path | None = None,
    cache_dir: Path | None = None,
    workers: int | None = None,
    output: Path | None = None,
) -> None:
    """Render glyphs, or find them in the cache, and say what there is.

    A rendering that was interrupted continues when the same command is given again.

    Args:
        fonts: "matplotlib" are there wherever this project is, the data set "glyphs"; "debian" are packages to install
            first, named where one is missing, the data sets "glyphs-80k" and "glyphs-80k-64".
        size: pixels, 16 to 128 for matplotlib's fonts, 32 or 64 for Debian's.
        min_families: leave out characters in fewer fonts (matplotlib, by default 4) or families (debian, by default 3).
        font_folder: where Debian's fonts are, by default /usr/share/fonts.
        cache_dir: where the images are kept; by default $XDG_CACHE_HOME/gif or ~/.cache/gif.
        workers: processes that render Debian's fonts; one a core where it is not given.
        output: folder for a picture, glyphs.png: images of some identities, and how many images identities have.
    """
    if fonts == "matplotlib":
        if font_folder is not None or workers is not None:
            raise InputError("font_folder and workers are options of --fonts debian; leave them out")
        data = all_glyphs(size=size, cache_dir=cache_dir, **_given(min_fonts=min_families))
    else:
        options = _given(min_families=min_families, font_folder=font_folder, workers=workers)
        data = all_glyphs_80k(size=size, cache_dir=cache_dir, **options)
    print_table(describe(data))
    if output is not None:
        plot_glyphs(data, output / "glyphs.png")
        say(f"drew {output / 'glyphs.png'}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None: the others keep the data set's own defaults."""
    return {name: value for name, value in options.items() if value is not None}


def plot_glyphs(data: IdentityImages, path: str | Path) -> None:
    """Draw a contact sheet, a row an identity, from many images to few, beside a histogram of images an identity."""
    counts = data.labels.bincount(minlength=data.num_identities)
    drawing, (sheet, histogram) = figure(11, 5.2, columns=2)
    sheet.imshow(_contact_sheet(data, counts), cmap="gray_r", vmin=0, vmax=255)
    sheet.set(xticks=[], yticks=[], title="Identities (rows), their images in the order of the fonts")
    sheet.grid(visible=False)
    sheet.spines[:].set_visible(False)
    values, identities = counts.unique(return_counts=True)
    histogram.bar(values.numpy(), identities.numpy(), color=COLORS[0])
    histogram.set(yscale="log", xlabel="images of an identity", ylabel="identities", title="Long tail")
    save_figure(drawing, path)


def _contact_sheet(data: IdentityImages, counts: torch.Tensor) -> np.ndarray:
    """Images of identities evenly spaced in the order of their number of images, a row each."""
    order = counts.argsort(descending=True, stable=True)
    shown = order[evenly_spaced(len(order), SHEET_ROWS)]
    size = data[0][0].shape[-1]
    cell = size + GAP
    sheet = np.zeros((len(shown) * cell, SHEET_COLUMNS * cell), np.uint8)
    for row, identity in enumerate(shown):
        places = (data.labels == identity).nonzero().flatten()[:SHEET_COLUMNS].tolist()
        for column, image in enumerate(data.batch(places)[0].numpy()):
            sheet[row * cell :, column * cell :][:size, :size] = image.mean(0)
    return sheet
