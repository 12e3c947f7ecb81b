"""Glyphs: real images of thousands of identities that need no download.

The identity is a character, its images are that character in the fonts that matplotlib ships. Some characters are in
two dozen fonts and many in four, so the data is long-tailed by nature; and since the split is by identity, recognition
is open-set, as with faces. At the defaults, with matplotlib 3.11: 5,569 characters are in at least 4 of the 33 fonts,
50,634 images. They look like 4,987 different ones, of which 4,543 have at least 2 distinct images: 34,553 are left.

**Look-alikes.** Latin A, Greek Alpha and Cyrillic A are one picture, and a pair of them called an impostor would make
every error rate wrong. So an identity is what can be seen:

1. Two images look alike when no pixel differs by more than `TOLERANCE`. One outline at two places on the page is drawn
   up to 1.5 pixels apart on a grid `SUPERSAMPLING` times finer than the image (1 because the box of its ink has whole
   pixels, 0.5 because its centre has), so a straight edge differs by up to 1.5 / 8 of 255: 48. Looked at, all pairs up
   to there are one outline moved or barely redrawn, and the number of identities hardly depends on the value (4,998 at
   32, 4,983 at 56). Above, rods, dots and dashes of other lengths join in; at 64 they chain capital I to small l.
2. Two characters are one identity when they look alike in at least half of the fonts they share and in at least
   `MIN_ALIKE`, and so on from character to character. Not in all, because a font may redraw a letter slightly (STIX:
   Greek Beta, Cyrillic Ve): that would make two identities of which most images are equal. Not in any, because Cyrillic
   Te in italics is the Latin m, and one font has an Iota with breve that lacks the breve. Of the 83 pairs that Unicode
   defines as the same character this finds 80. Every group of four or more was looked at; the largest are the acute
   accents (10), the dots on the line (9) and the macrons (9). Position is not visible: comma and closing quote are one.
3. An image that looks like one of another identity shows neither: both are dropped (the italic Te and its m; 1,129).
4. Of the images of an identity that look alike the first is kept, since a copy is no genuine pair (14,514 dropped).
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import torch
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gif.data.images import IdentityImages
from gif.files import load_tensors, save_tensors
from gif.progress import progress, say

FORMAT = "gif.glyphs/1"  # also the renderer's version: raise it when the images change
SIZES = range(16, 129)
SUPERSAMPLING = 8
TOLERANCE = 48  # of 255; this and the next: see the module's docstring
MIN_ALIKE = 2  # fonts

# Holds no characters (a box for each block of Unicode), or holds other signs under the codes of letters.
_UNUSABLE_FONTS = {"LastResortHE-Regular", "cmex10", "cmsy10"}
_TEX_FONTS = {"cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"}  # only letters and digits have their own codes
# Letters, marks, numbers, punctuation and symbols; no controls, spaces, private or unassigned code points.
_VISIBLE_CATEGORIES = "LMNPS"
_PAIRS_A_BLOCK = 1 << 11
_ROUNDING = 0.01  # more than the error of a mean of pixels in float32


@dataclass(frozen=True)
class GlyphSplit:
    """Glyphs to train on, and glyphs of other characters to evaluate on; labels count from 0 in each."""

    train: IdentityImages
    held_out: IdentityImages


def glyphs(
    *,
    size: int = 32,
    min_fonts: int = 4,
    held_out: float = 0.2,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> GlyphSplit:
    """Render matplotlib's fonts into images of characters, split by identity.

    Args:
        size: height and width of the images in pixels, 16 to 128. One em is ``size`` pixels in every font, larger
            glyphs are scaled down to fit; the ink is white on black, its bounding box centred.
        min_fonts: characters in fewer fonts are left out; at least 2. A font counts when it has the character, even
            where its image is dropped later because it equals another font's.
        held_out: the fraction of identities, in (0, 1), that are held out.
        seed: decides which.
        cache_dir: where the rendered images are kept; default ``$XDG_CACHE_HOME/gif`` or ``~/.cache/gif``.

    Returns the two parts: images (n, 1, size, size) uint8, labels (n,) int64, names. A name is the characters of the
    identity in code point order, so "A" with its look-alikes starts with "A".

    Rendering takes under a minute at 32 pixels, once: later calls read the cache. A damaged cache is rendered again.

    Raises ValueError where an argument is out of range.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size}; give whole pixels from {SIZES[0]} to {SIZES[-1]}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; give a fraction of the identities between 0 and 1, such as 0.2")
    fonts = {path: _characters(path) for path in _font_files()}
    counts = Counter(character for characters in fonts.values() for character in characters)
    if not 2 <= min_fonts <= max(counts.values()):
        raise ValueError(
            f"min_fonts is {min_fonts}; give a number from 2 to {max(counts.values())}, the most any character is in"
        )
    fonts = {path: [c for c in characters if counts[c] >= min_fonts] for path, characters in fonts.items()}

    cache = _cache_path(cache_dir, list(fonts), size, min_fonts)
    data = _load(cache)
    if data is None:
        data = _distinct(_render(fonts, size))
        _save(cache, data)
    return _split(data, held_out, seed)


def _font_files() -> list[Path]:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return sorted(path for path in folder.glob("*.ttf") if path.stem not in _UNUSABLE_FONTS)


def _characters(path: Path) -> list[str]:
    """Return the visible characters a font has, by code point.

    Without letters that are another letter in a style of its own (mathematical italic A): styles are for fonts to give.
    """
    with TTFont(path, lazy=True) as font:
        characters = [chr(code) for code, glyph in sorted((font.getBestCmap() or {}).items()) if glyph != ".notdef"]
    if path.stem in _TEX_FONTS:
        return [c for c in characters if c.isascii() and c.isalnum()]
    return [
        c
        for c in characters
        if unicodedata.category(c)[0] in _VISIBLE_CATEGORIES and not unicodedata.decomposition(c).startswith("<font>")
    ]


@dataclass(frozen=True)
class _Drawings:
    """One image for each character in each font that has it."""

    images: NDArray[np.uint8]  # (n, size, size)
    characters: NDArray[np.int64]  # (n,) code points
    fonts: NDArray[np.int64]  # (n,)


def _render(fonts: dict[Path, list[str]], size: int) -> _Drawings:
    images, characters, numbers = [], [], []
    with progress("rendering glyphs", sum(map(len, fonts.values())), "glyphs") as advance:
        for number, (path, members) in enumerate(fonts.items()):
            font = ImageFont.truetype(str(path), size * SUPERSAMPLING, layout_engine=ImageFont.Layout.BASIC)
            for character in members:
                image = _draw(font, character, size)
                if image is not None:
                    images.append(image)
                    characters.append(ord(character))
                    numbers.append(number)
            advance(len(members), note=path.stem)
    return _Drawings(np.stack(images), np.array(characters), np.array(numbers))


def _draw(font: ImageFont.FreeTypeFont, character: str, size: int) -> NDArray[np.uint8] | None:
    """Return (size, size) white ink on black, its bounding box in the centre; None if there is no ink."""
    left, top, right, bottom = map(int, font.getbbox(character))
    page = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(page).text((-left, -top), character, fill=255, font=font)
    ink = page.getbbox()
    if ink is None:
        return None
    left, top, right, bottom = ink
    side = max(size * SUPERSAMPLING, right - left, bottom - top)
    left -= (side - (right - left)) // 2
    top -= (side - (bottom - top)) // 2
    square = page.crop((left, top, left + side, top + side))  # black beyond the page
    return np.asarray(square.resize((size, size), Image.Resampling.BOX))


def _distinct(drawings: _Drawings) -> IdentityImages:
    """Make characters that look alike one identity, and keep the images that show one identity each, once."""
    say(f"comparing {len(drawings.images):,} glyphs with each other")
    pairs = _alike(drawings.images)
    characters, character = np.unique(drawings.characters, return_inverse=True)
    identity_of = _identities(character, drawings.fonts, pairs)
    identity = identity_of[character]

    keep = np.ones(len(identity), bool)
    same = identity[pairs[:, 0]] == identity[pairs[:, 1]]
    keep[pairs[~same]] = False
    copies = same & keep[pairs].all(axis=1)
    keep[pairs[copies, 1]] = False
    keep &= np.bincount(identity[keep], minlength=identity.max() + 1)[identity] >= 2

    kept, labels = np.unique(identity[keep], return_inverse=True)
    names: list[str] = ["".join(map(chr, characters[identity_of == i])) for i in kept]
    return IdentityImages(torch.from_numpy(drawings.images[keep, None]), torch.from_numpy(labels), names)


def _alike(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the pairs (p, 2), i < j, of images (n, size, size) in which no pixel differs by more than `TOLERANCE`.

    Means over patches differ by no more than their pixels do, so neighbours in a few patches of the middle, where
    glyphs differ most, are all the candidates there are.
    """
    patches = [
        adaptive_avg_pool2d(block.float(), 16)[:, 3:13:2, 3:13:2] for block in torch.from_numpy(images).split(4096)
    ]
    tree = KDTree(torch.cat(patches).flatten(1).numpy())
    pairs = tree.query_pairs(TOLERANCE + _ROUNDING, p=np.inf, output_type="ndarray")

    def close(pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
        first, second = images[pairs[:, 0]].astype(np.int16), images[pairs[:, 1]]
        return np.abs(first - second).max(axis=(1, 2)) <= TOLERANCE

    blocks = np.array_split(pairs, len(pairs) // _PAIRS_A_BLOCK + 1)
    pairs = np.concatenate([block[close(block)] for block in blocks])
    return pairs[np.lexsort(pairs.T[::-1])]


def _identities(character: NDArray[np.int64], fonts: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the identity of each character, (c,): one for those alike in half of the fonts they share.

    ``character`` and ``fonts`` (n,) are those of each image, ``pairs`` (p, 2) the images that look alike.
    """
    has = np.zeros((character.max() + 1, fonts.max() + 1), bool)
    has[character, fonts] = True
    in_one_font = pairs[fonts[pairs[:, 0]] == fonts[pairs[:, 1]]]
    couples, alike = np.unique(np.sort(character[in_one_font], axis=1), axis=0, return_counts=True)
    shared = (has[couples[:, 0]] & has[couples[:, 1]]).sum(axis=1)
    first, second = couples[(alike >= shared / 2) & (alike >= MIN_ALIKE)].T
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(len(has), len(has)))
    return connected_components(edges, directed=False)[1]


def _split(data: IdentityImages, held_out: float, seed: int) -> GlyphSplit:
    order = torch.randperm(data.num_identities, generator=torch.Generator().manual_seed(seed))
    number = round(held_out * data.num_identities)
    if not 2 <= number <= data.num_identities - 2:
        raise ValueError(
            f"held_out is {held_out}, {number} of {data.num_identities} identities; both parts need at least 2"
        )
    return GlyphSplit(train=_select(data, order[number:]), held_out=_select(data, order[:number]))


def _select(data: IdentityImages, identities: Tensor) -> IdentityImages:
    """Return the images of some identities, which are numbered from 0 in the order they had."""
    identities = identities.sort().values
    numbers = torch.full((data.num_identities,), -1)
    numbers[identities] = torch.arange(len(identities))
    labels = numbers[data.labels]
    keep = labels >= 0
    return IdentityImages(data.images[keep], labels[keep], [data.names[i] for i in identities.tolist()])


def _cache_path(cache_dir: str | Path | None, fonts: list[Path], size: int, min_fonts: int) -> Path:
    """Name the cache file after everything its content follows from."""
    versions = (FORMAT, PIL.__version__, features.version("freetype2"))
    digest = hashlib.sha256(repr((size, min_fonts, versions, unicodedata.unidata_version)).encode())
    for path in fonts:
        digest.update(path.name.encode() + path.read_bytes())
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gif")
    return Path(cache_dir, f"glyphs-{size}-{min_fonts}-{digest.hexdigest()[:16]}.safetensors")


def _save(path: Path, data: IdentityImages) -> None:
    tensors, names = {"images": data.images, "labels": data.labels}, json.dumps(data.names)
    save_tensors(path, tensors, format=FORMAT, names=names, sha256=_checksum(tensors, names))


def _load(path: Path) -> IdentityImages | None:
    """Read what `_save` wrote; None if there is no file, or (with a message) if it does not hold what was written."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after rendering
        return None
    try:
        tensors, metadata = load_tensors(path, format=FORMAT)
    except ValueError as error:
        say(f"{error}: rendering the glyphs again")
        return None
    names = metadata.get("names", "")
    if metadata.get("sha256") != _checksum(tensors, names):
        say(f"{path} is damaged, its checksum is wrong: rendering the glyphs again")
        return None
    return IdentityImages(tensors["images"], tensors["labels"], json.loads(names))


def _checksum(tensors: dict[str, Tensor], names: str) -> str:
    digest = hashlib.sha256(names.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
