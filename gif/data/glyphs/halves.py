"""The halves of glyph words: letters of glyphs-80k at half their width, kept apart by who trains and who is judged.

1. A letter takes part that at least `MIN_DRAWINGS` families draw; letters alone, for a dot squeezed is little to see.
   An identity of several characters goes by its first.
2. Each has a place that follows from its name. The first `LETTERS` are those to train on, as many after them are held
   out, and as many again are for validation: no two of the three share a letter.
3. Squeezed, some look alike. Of two letters of which any two drawings differ by no more than `TOLERANCE` in any pixel
   the later is dropped, and of two such drawings of one letter the later too, so that no image is there twice.
4. Letters that look alike are grouped: a letter drawn at random with those nearest to it, by the cosine of their mean
   drawings, less the mean of all. Words of two such groups are the hard ones.

What is decided at 32 pixels holds at 64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from gif.data.cache import cache_folder
from gif.data.glyphs.from_debian import JUDGED_SIZE, SIZES, all_glyphs_80k
from gif.data.glyphs.look_alikes import Integers, alike
from gif.data.images import IdentityImages
from gif.errors import InputError
from gif.files import load_tensors, locate_tensor, map_tensor, save_tensors
from gif.permutation import ComputedOrder
from gif.progress import say

FORMAT = "gif.glyph_halves/1"  # raise it when the halves change
PARTS = ("train", "held_out", "validation")
MIN_DRAWINGS = 4
LETTERS = 10_000  # of each part
TOLERANCE = 24  # of 255, half of what makes drawings of full width look alike
GROUP = 10  # letters that look alike
GROUPS = 60  # of each part

_SPARE = 1.05  # letters looked at for each that is wanted, as some are dropped
_BLOCK = 1 << 14  # drawings squeezed at a time


@dataclass(frozen=True, eq=False)
class Halves:
    """Letters, each with several drawings of half the width of a word.

    Args:
        drawings: (D, h, w) uint8, those of one letter after another; may be memory-mapped.
        ends: (C,) int64, where each letter's end.
        letters: the C letters.
        groups: (g, GROUP) int64, letters that look alike; no letter is in two groups.
    """

    drawings: Tensor
    ends: Tensor
    letters: str
    groups: Tensor

    def __len__(self) -> int:
        return len(self.letters)

    @cached_property
    def counts(self) -> Integers:
        """How many drawings each letter has, (C,)."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).numpy()

    @cached_property
    def begins(self) -> Integers:
        """The first drawing of each letter, (C,)."""
        return self.ends.numpy() - self.counts

    @property
    def lines(self) -> NDArray[np.void]:
        """The drawings (D, h), of which a line of pixels is one element: copied as a whole, not pixel by pixel."""
        return self.drawings.numpy().view(f"V{self.drawings.shape[2]}")[..., 0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the letters and all their drawings."""
        digest = hashlib.sha256(self.letters.encode())
        for tensor in (self.ends, self.drawings):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()


def glyph_halves(
    *, size: int = JUDGED_SIZE, letters: int = LETTERS, cache_dir: str | Path | None = None
) -> dict[str, Halves]:
    """The halves of each of `PARTS`, memory-mapped: made from glyphs-80k at first, and kept in the cache folder.

    Args:
        size: height and width of a word in pixels, 32 or 64.
        letters: of each part.
        cache_dir: as for `all_glyphs_80k`.

    Raises ValueError for another size, and as `all_glyphs_80k` does where glyphs have to be drawn.
    """
    if size not in SIZES:
        raise InputError(f"size is {size}; give 32 or 64")
    path = cache_folder(cache_dir) / f"glyph-halves-{size}-{letters}.safetensors"
    with FileLock(f"{path}.lock"):
        if (halves := _load(path)) is not None:
            return halves
        glyphs = all_glyphs_80k(size=size, cache_dir=cache_dir)
        if size == JUDGED_SIZE:
            save_halves(path, glyphs, *choose_letters(glyphs, letters))
        else:
            glyph_halves(letters=letters, cache_dir=cache_dir)
            save_in_another_size(path, glyphs, path.with_name(f"glyph-halves-{JUDGED_SIZE}-{letters}.safetensors"))
        return load_halves(path)


def _load(path: Path) -> dict[str, Halves] | None:
    """What is there; None if there is no file, or (with a message) if it is damaged."""
    try:
        return load_halves(path) if path.exists() else None
    except ValueError as error:
        say(f"{error}: the halves of glyph words are made again")
        return None


def choose_letters(glyphs: IdentityImages, letters: int = LETTERS) -> tuple[str, Tensor, Tensor]:
    """The letters of the three parts, one part after another, the images (D,) of ``glyphs`` that draw them, letter
    after letter, and where each letter's end (3 C,). Each part has C of them: ``letters``, or fewer where there are not
    so many.

    Raises ValueError where there are too few for the groups.
    """
    names, rows, owners = _candidates(glyphs, round(len(PARTS) * letters * _SPARE))
    keep, dropped = _distinct(squeeze(glyphs, rows).numpy(), owners)
    counts = np.bincount(owners[keep], minlength=len(names))
    left = np.flatnonzero(counts >= MIN_DRAWINGS)
    each = min(letters, len(left) // len(PARTS))
    if each < 2 * GROUP:
        raise InputError(
            f"{len(left)} letters have {MIN_DRAWINGS} drawings, too few for three parts of {2 * GROUP}; give more fonts"
        )
    chosen = left[: len(PARTS) * each]
    say(
        f"of {len(names):,} letters {dropped:,} look like others at half their width; {each:,} are to train on, and as "
        "many are held out and for validation"
    )
    kept = keep & np.isin(owners, chosen)
    return (
        "".join(names[letter] for letter in chosen),
        torch.from_numpy(rows[kept]),
        torch.from_numpy(counts[chosen].cumsum()),
    )


def _candidates(glyphs: IdentityImages, number: int) -> tuple[list[str], Integers, Integers]:
    """The letters of the lowest places, so many at most; the images (D,) of each in turn, and whose they are (D,)."""
    counts = glyphs.image_counts().numpy()
    places = glyphs.names.digests("halves").numpy().view(np.uint64)
    enough = np.array([n >= MIN_DRAWINGS and name[0].isalpha() for n, name in zip(counts, glyphs.names, strict=True)])
    chosen = [identity for identity in places.argsort(kind="stable") if enough[identity]][:number]
    ordered = np.split(glyphs.labels.numpy().argsort(kind="stable"), counts.cumsum()[:-1])
    rows = np.concatenate([ordered[identity] for identity in chosen] or [np.empty(0, np.int64)])
    return [glyphs.names[identity][0] for identity in chosen], rows, np.repeat(np.arange(len(chosen)), counts[chosen])


def _distinct(drawings: NDArray[np.uint8], owners: Integers) -> tuple[NDArray[np.bool_], int]:
    """Which drawings (D,) are left where nothing looks alike, and how many letters are dropped for that."""
    pairs = alike(drawings, np.arange(len(drawings)))
    first, second = (drawings[side].astype(np.int16) for side in pairs.T)
    pairs = pairs[np.abs(first - second).max(axis=(1, 2), initial=0) <= TOLERANCE]
    same = owners[pairs[:, 0]] == owners[pairs[:, 1]]
    dropped = np.unique(owners[pairs[~same, 1]])
    keep = ~np.isin(owners, dropped)
    keep[pairs[same, 1]] = False
    return keep, len(dropped)


def squeeze(glyphs: IdentityImages, rows: Integers) -> Tensor:
    """Images ``rows`` (D,) at half their width, (D, h, w / 2) uint8: the means of columns two by two."""
    height, width = glyphs.image_shape[1:]
    squeezed = torch.empty(len(rows), height, width // 2, dtype=torch.uint8)
    for begin in range(0, len(rows), _BLOCK):
        images = glyphs.batch(rows[begin : begin + _BLOCK].tolist())[0][:, 0].short()
        squeezed[begin : begin + _BLOCK] = (images[..., ::2] + images[..., 1::2] + 1) // 2
    return squeezed


def group_alike(drawings: Tensor, ends: Tensor, *, groups: int = GROUPS) -> Tensor:
    """Groups (g, GROUP) of letters that look alike, as the module's docstring says; fewer where letters are few."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    letters = torch.arange(len(ends)).repeat_interleave(counts)
    means = torch.zeros(len(ends), drawings[0].numel())
    for rows in torch.arange(len(drawings)).split(_BLOCK):
        means.index_add_(0, letters[rows], drawings[rows].flatten(1).float())
    means /= counts[:, None]
    unit = normalize(means - means.mean(0), dim=1)
    free = torch.ones(len(ends), dtype=torch.bool)
    found: list[Tensor] = []
    for letter in ComputedOrder(len(ends), seed=0)[:].tolist():
        if len(found) == min(groups, len(ends) // GROUP):
            break
        if free[letter]:
            cosines = (unit @ unit[letter]).masked_fill(~free, -2)
            cosines[letter] = 2
            found.append(cosines.topk(GROUP).indices)
            free[found[-1]] = False
    return torch.stack(found)


def save_halves(path: Path, glyphs: IdentityImages, letters: str, rows: Tensor, ends: Tensor) -> None:
    """Write the parts' drawings, letters and groups."""
    drawings, each = squeeze(glyphs, rows.numpy()), len(letters) // len(PARTS)
    groups = []
    for begin in range(0, len(letters), each):
        first = int(ends[begin - 1]) if begin else 0
        own = ends[begin : begin + each]
        groups.append(group_alike(drawings[first : own[-1]], own - first))
    tensors = {"drawings": drawings, "ends": ends, "rows": rows, "groups": torch.stack(groups)}
    save_tensors(path, tensors, format=FORMAT, letters=letters)


def save_in_another_size(path: Path, glyphs: IdentityImages, judged: Path) -> None:
    """Write what ``judged`` holds, drawn by ``glyphs`` of another size."""
    tensors, metadata = load_tensors(judged, format=FORMAT)
    drawings = squeeze(glyphs, tensors["rows"].numpy())
    save_tensors(path, {**tensors, "drawings": drawings}, format=FORMAT, letters=metadata["letters"])


def load_halves(path: Path) -> dict[str, Halves]:
    """What `save_halves` wrote, by part. Raises ValueError where the file is damaged."""
    letters = locate_tensor(path, "drawings", format=FORMAT).metadata["letters"]
    drawings, ends, groups = (map_tensor(path, name, format=FORMAT) for name in ("drawings", "ends", "groups"))
    each = len(letters) // len(PARTS)
    found = {}
    for number, part in enumerate(PARTS):
        begin = number * each
        first, own = int(ends[begin - 1]) if begin else 0, ends[begin : begin + each]
        found[part] = Halves(drawings[first : own[-1]], own - first, letters[begin : begin + each], groups[number])
    return found
