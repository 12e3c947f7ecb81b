"""Data sets of identities."""

from __future__ import annotations

from typing import Literal

from gif.data.glyphs import GlyphSplit, glyphs
from gif.data.glyphs_80k import glyphs_80k
from gif.data.images import IdentityImages, split_identities

__all__ = ["DataName", "GlyphSplit", "IdentityImages", "glyphs", "glyphs_80k", "load_data", "split_identities"]

DataName = Literal["glyphs", "glyphs-80k", "glyphs-80k-64"]


def load_data(name: DataName, *, seed: int = 0) -> GlyphSplit:
    """The data set called ``name``, split into training identities and held-out ones.

    "glyphs" is drawn by matplotlib's fonts, "glyphs-80k" by Debian's, in 32 pixels, and "glyphs-80k-64" in 64.

    ``seed`` decides which identities are held out.

    Raises ValueError for an unknown name, FileNotFoundError where fonts are missing.
    """
    if name == "glyphs":
        return glyphs(seed=seed)
    if name == "glyphs-80k":
        return glyphs_80k(seed=seed)
    if name == "glyphs-80k-64":
        return glyphs_80k(size=64, seed=seed)
    raise ValueError(f"unknown data set {name!r}; there are: glyphs, glyphs-80k, glyphs-80k-64")
