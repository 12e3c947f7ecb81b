"""Data sets of identities."""

from __future__ import annotations

from typing import Literal

from gif.data.glyphs import GlyphSplit, glyphs
from gif.data.images import IdentityImages

__all__ = ["DataName", "GlyphSplit", "IdentityImages", "glyphs", "load_data"]

DataName = Literal["glyphs"]


def load_data(name: DataName) -> GlyphSplit:
    """The data set called ``name``, split into training identities and held-out ones.

    Raises ValueError for an unknown name.
    """
    if name != "glyphs":
        raise ValueError(f"unknown data set {name!r}; there is: glyphs")
    return glyphs()
