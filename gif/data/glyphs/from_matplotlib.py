"""Glyphs: real images of thousands of identities that need no download.

The identity is a character, its images are that character in the fonts that matplotlib ships. Some characters are in
two dozen fonts and many in four, so the data is long-tailed by nature; and since the split is by identity, recognition
is open-set, as with faces. At the defaults, with matplotlib 3.11: 5,569 characters are in at least 4 of the 33 fonts,
50,634 images. They look like 4,987 different ones (see `gif.data.glyphs.look_alikes`): 1,129 images show two of them
and 14,514 are copies. 4,543 identities have at least 2 images, 34,553 in all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gif.data.cache import cache_folder, checksum
from gif.data.glyphs.drawing import draw, font_characters, is_letter_form, open_font, renderer_versions
from gif.data.glyphs.look_alikes import SUPERSAMPLING, distinct
from gif.data.images import IdentityImages, IdentitySplit, check_held_out, split_identities
from gif.errors import InputError, OutputError
from gif.files import load_tensors, save_tensors
from gif.packages import needs
from gif.progress import progress, say

FORMAT = "gif.glyphs/1"  # also the renderer's version: raise it when the images change
SIZES = range(16, 129)

# Holds no characters (a box for each block of Unicode), or holds other signs under the codes of letters.
_UNUSABLE_FONTS = {"LastResortHE-Regular", "cmex10", "cmsy10"}
_TEX_FONTS = {"cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"}  # only letters and digits have their own codes


def glyphs(
    *,
    size: int = 32,
    min_fonts: int = 4,
    held_out: float = 0.2,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> IdentitySplit:
    """Render matplotlib's fonts into images of characters, split by identity.

    Arguments and errors are those of `all_glyphs` and `split_identities`.
    """
    check_held_out(held_out)
    return IdentitySplit(
        *split_identities(all_glyphs(size=size, min_fonts=min_fonts, cache_dir=cache_dir), held_out, seed)
    )


def all_glyphs(*, size: int = 32, min_fonts: int = 4, cache_dir: str | Path | None = None) -> IdentityImages:
    """Render matplotlib's fonts into images of characters.

    Args:
        size: height and width of the images in pixels, 16 to 128. One em is ``size`` pixels in every font, larger
            glyphs are scaled down to fit; the ink is white on black, its bounding box centred.
        min_fonts: characters in fewer fonts are left out; at least 2. A font counts when it has the character, even
            where its image is dropped later because it equals another font's.
        cache_dir: where the rendered images are kept; default ``$XDG_CACHE_HOME/gif`` or ``~/.cache/gif``.

    Returns images (n, 1, size, size) uint8, labels (n,) int64, names. A name is the characters of the identity in code
    point order, so "A" with its look-alikes starts with "A".

    Rendering takes under a minute at 32 pixels, once: later calls read the cache. A damaged cache is rendered again.

    Raises ValueError where an argument is out of range.
    """
    if size not in SIZES:
        raise InputError(f"size is {size}; give whole pixels from {SIZES[0]} to {SIZES[-1]}")
    fonts = {path: _characters(path) for path in _font_files()}
    counts = Counter(character for characters in fonts.values() for character in characters)
    if not 2 <= min_fonts <= max(counts.values()):
        raise InputError(
            f"min_fonts is {min_fonts}; give a number from 2 to {max(counts.values())}, the most any character is in"
        )
    fonts = {path: [c for c in characters if counts[c] >= min_fonts] for path, characters in fonts.items()}

    cache = _cache_path(cache_dir, list(fonts), size, min_fonts)
    data = _load(cache)
    if data is None:
        data = _render(fonts, size)
        try:
            _save(cache, data)
        except OutputError as error:
            say(f"{error}; the glyphs are not kept")
    return data


def _font_files() -> list[Path]:
    with needs("matplotlib", "its fonts, of which glyphs are drawn"):
        import matplotlib
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return sorted(path for path in folder.glob("*.ttf") if path.stem not in _UNUSABLE_FONTS)


def _characters(path: Path) -> list[str]:
    wanted = (lambda c: c.isascii() and c.isalnum()) if path.stem in _TEX_FONTS else is_letter_form
    return list(filter(wanted, font_characters(path)))


def _render(fonts: dict[Path, list[str]], size: int) -> IdentityImages:
    drawn: list[NDArray[np.uint8]] = []
    characters, numbers = [], []
    with progress("rendering glyphs", sum(map(len, fonts.values())), "glyphs") as advance:
        for number, (path, members) in enumerate(fonts.items()):
            font = open_font(path, size * SUPERSAMPLING)
            for character in members:
                image = draw(font, character, size)
                if image is not None:
                    drawn.append(image)
                    characters.append(ord(character))
                    numbers.append(number)
            advance(len(members), note=path.stem)
    images = np.stack(drawn)
    found = distinct(images, np.array(characters), np.array(numbers))
    return IdentityImages(torch.from_numpy(images[found.rows, None]), torch.from_numpy(found.labels), found.names)


def _cache_path(cache_dir: str | Path | None, fonts: list[Path], size: int, min_fonts: int) -> Path:
    """Name the cache file after everything its content follows from."""
    pillow, freetype, unicode = renderer_versions()
    digest = hashlib.sha256(repr((size, min_fonts, (FORMAT, pillow, freetype), unicode)).encode())
    for path in fonts:
        digest.update(path.name.encode() + path.read_bytes())
    return cache_folder(cache_dir) / f"glyphs-{size}-{min_fonts}-{digest.hexdigest()[:16]}.safetensors"


def _save(path: Path, data: IdentityImages) -> None:
    tensors, names = {"images": data.images, "labels": data.labels}, json.dumps(list(data.names))
    save_tensors(path, tensors, format=FORMAT, names=names, sha256=checksum(tensors, names))


def _load(path: Path) -> IdentityImages | None:
    """Read what `_save` wrote; None if there is no file, or (with a message) if it does not hold what was written."""
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path, format=FORMAT)
    except ValueError as error:
        say(f"{error}: rendering the glyphs again")
        return None
    names = metadata.get("names", "")
    if metadata.get("sha256") != checksum(tensors, names):
        say(f"{path} is damaged, its checksum is wrong: rendering the glyphs again")
        return None
    return IdentityImages(tensors["images"], tensors["labels"], json.loads(names))
