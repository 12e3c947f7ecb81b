"""Data sets of identities."""

from __future__ import annotations

from gif.data.decoding import BrokenImageError, ImageDecoder
from gif.data.encoded import EncodedImages, broken_report, left_out
from gif.data.glyphs import GlyphWords, glyph_word_sets, glyph_word_validation, glyph_words, glyphs, glyphs_80k
from gif.data.identities import Identities, Names
from gif.data.images import IdentityDataset, IdentityImages, IdentitySplit, normalize_pixels, split_identities
from gif.data.loading import HELD_OUT, load_data, open_data
from gif.data.pairs import ImagePairs, read_bin

__all__ = [
    "HELD_OUT",
    "BrokenImageError",
    "EncodedImages",
    "GlyphWords",
    "Identities",
    "IdentityDataset",
    "IdentityImages",
    "IdentitySplit",
    "ImageDecoder",
    "ImagePairs",
    "Names",
    "broken_report",
    "glyph_word_sets",
    "glyph_word_validation",
    "glyph_words",
    "glyphs",
    "glyphs_80k",
    "left_out",
    "load_data",
    "normalize_pixels",
    "open_data",
    "read_bin",
    "split_identities",
]
