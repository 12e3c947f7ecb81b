"""Drawing characters: white ink on black, one em of the font as wide as the image, the ink centred."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gif.packages import needs

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Letters, marks, numbers, punctuation and symbols; no controls, spaces, private or unassigned code points.
_VISIBLE_CATEGORIES = "LMNPS"
DRAWING = "drawing glyphs"


def renderer_versions() -> tuple[str, ...]:
    """What the drawings of a font depend on beside the font: Pillow, FreeType, and what Unicode calls visible."""
    with needs("pillow", DRAWING):
        import PIL
        from PIL import features
    return PIL.__version__, str(features.version("freetype2")), unicodedata.unidata_version


def font_characters(path: Path) -> list[str]:
    """Return the characters that a font, of a collection the first, has a glyph for, by code point."""
    with needs("fonttools", DRAWING):
        from fontTools.ttLib import TTFont
    with TTFont(path, fontNumber=0, lazy=True) as font:
        return [chr(code) for code, glyph in sorted((font.getBestCmap() or {}).items()) if glyph != ".notdef"]


def is_letter_form(character: str) -> bool:
    """Whether a character is visible, and not another letter in a style of its own (mathematical italic A).

    Styles are for fonts to give.
    """
    visible = unicodedata.category(character)[0] in _VISIBLE_CATEGORIES
    return visible and not unicodedata.decomposition(character).startswith("<font>")


def open_font(path: Path, em: int) -> FreeTypeFont:
    """A font, of a collection the first, whose em is ``em`` pixels; kerning and ligatures have no part in it."""
    with needs("pillow", DRAWING):
        from PIL import ImageFont
    return ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC)


def draw(font: FreeTypeFont, character: str, size: int) -> NDArray[np.uint8] | None:
    """Return (size, size), the means over boxes of a square of one em, or larger for a larger glyph.

    The bounding box of the ink is in the centre. None if there is no ink.
    """
    with needs("pillow", DRAWING):
        from PIL import Image, ImageDraw
    left, top, right, bottom = map(int, font.getbbox(character))
    page = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(page).text((-left, -top), character, fill=255, font=font)
    ink = page.getbbox()
    if ink is None:
        return None
    left, top, right, bottom = ink
    side = max(int(font.size), right - left, bottom - top)
    left -= (side - (right - left)) // 2
    top -= (side - (bottom - top)) // 2
    square = page.crop((left, top, left + side, top + side))  # black beyond the page
    return np.asarray(square.resize((size, size), Image.Resampling.BOX))
