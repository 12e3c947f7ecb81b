"""Glyphs: real images of thousands of identities, drawn from fonts."""

from gif.data.glyphs.from_debian import all_glyphs_80k, glyphs_80k
from gif.data.glyphs.from_matplotlib import all_glyphs, glyphs
from gif.data.glyphs.word_sets import glyph_word_sets, glyph_word_validation, glyph_words
from gif.data.glyphs.words import GlyphWords

__all__ = [
    "GlyphWords",
    "all_glyphs",
    "all_glyphs_80k",
    "glyph_word_sets",
    "glyph_word_validation",
    "glyph_words",
    "glyphs",
    "glyphs_80k",
]
