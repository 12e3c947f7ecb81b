"""Glyphs: real images of thousands of identities, drawn from fonts."""

from gif.data.glyphs.from_debian import all_glyphs_80k, glyphs_80k
from gif.data.glyphs.from_matplotlib import all_glyphs, glyphs

__all__ = ["all_glyphs", "all_glyphs_80k", "glyphs", "glyphs_80k"]
