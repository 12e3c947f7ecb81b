"""Glyphs at scale: the characters that at least three of 22 families of free fonts have, one image a family.

The families and the Debian packages that hold them are listed in `gif.data.glyphs.debian_fonts`; what is one identity
and which images are dropped is decided by the rules of `gif.data.glyphs.look_alikes`, at 32 pixels. Images of 64 pixels
are drawn for the same characters in the same families, from the same outlines at `EM` pixels: both sizes have the same
images, in the same order, with the same labels.

The images are never in memory as a whole. They are drawn into a memory-mapped file, which a killed run continues, and
what is kept is copied into another that every process maps. That file is all a machine needs: it has no part in which
fonts are installed there.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from gif.data.cache import cache_folder, checksum
from gif.data.glyphs.debian_fonts import FAMILIES, FONT_FOLDER, Family, find_fonts
from gif.data.glyphs.drawing import draw, font_characters, is_letter_form, open_font, renderer_versions
from gif.data.glyphs.look_alikes import SUPERSAMPLING, Integers, distinct
from gif.data.images import IdentityImages, IdentitySplit, check_held_out, split_identities
from gif.errors import InputError, OutputError, UnavailableError
from gif.files import allocate_tensors, atomic_path, fsync, locate_tensor, map_tensor
from gif.packages import needs
from gif.progress import progress, say

FORMAT = "gif.glyphs_80k/1"  # also the renderer's version: raise it when the images change
PARTIAL_FORMAT = "gif.glyphs_80k_partial/1"
SIZES = (32, 64)
JUDGED_SIZE = 32  # at which look-alikes are found
EM = JUDGED_SIZE * SUPERSAMPLING  # pixels

_CHUNK = 2048  # characters drawn by a process at a time
_COPIED = 1 << 14  # images copied at a time
_TENSORS = ("images", "labels", "drawings")


def glyphs_80k(
    *,
    size: int = JUDGED_SIZE,
    min_families: int = 3,
    held_out: float = 0.2,
    seed: int = 0,
    families: Sequence[Family] = FAMILIES,
    font_folder: str | Path = FONT_FOLDER,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
) -> IdentitySplit:
    """Render Debian's fonts into images of characters, split by identity; the parts share one memory-mapped file.

    Arguments and errors are those of `all_glyphs_80k` and `split_identities`.
    """
    check_held_out(held_out)
    data = all_glyphs_80k(
        size=size,
        min_families=min_families,
        families=families,
        font_folder=font_folder,
        cache_dir=cache_dir,
        workers=workers,
    )
    return IdentitySplit(*split_identities(data, held_out, seed))


def all_glyphs_80k(
    *,
    size: int = JUDGED_SIZE,
    min_families: int = 3,
    families: Sequence[Family] = FAMILIES,
    font_folder: str | Path = FONT_FOLDER,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
) -> IdentityImages:
    """Render Debian's fonts into images of characters, or find what was rendered.

    Args:
        size: height and width of the images in pixels, 32 or 64; the em is as wide, as in `all_glyphs`.
        min_families: characters in fewer families are left out; at least 2. A family counts when it draws ink, even
            where its image is dropped later because it equals another's.
        families: which fonts draw.
        font_folder: folder with the fonts, found by file name however deep. Needed only to render.
        cache_dir: where the rendered images are kept; default ``$XDG_CACHE_HOME/gif`` or ``~/.cache/gif``.
        workers: processes that draw; one a core where it is not given.

    Returns images (n, 1, size, size) uint8, memory-mapped, labels (n,) int64, and names as `all_glyphs` has them.
    The first call renders, and continues a call that was killed; later ones check the file and map it. A damaged file
    is rendered again; one rendered from other versions of the fonts is used as it is.

    Raises ValueError where an argument is out of range, FileNotFoundError where there is no file and fonts are missing,
    OSError where the disk is full.
    """
    if size not in SIZES:
        raise InputError(f"size is {size}; give 32 or 64")
    if not 2 <= min_families <= len(families):
        raise InputError(f"min_families is {min_families}; give a number from 2 to {len(families)}, all there are")
    folder = cache_folder(cache_dir)
    digest = hashlib.sha256(repr(tuple(families)).encode()).hexdigest()[:8]
    path, judged = (folder / f"glyphs-80k-{pixels}-{min_families}-{digest}.safetensors" for pixels in (size, SIZES[0]))
    lock = FileLock(f"{path}.lock")
    try:
        held = lock.acquire()
    except OSError as error:  # the folder is read-only; what another user has rendered there can be used
        if (data := _load(path)) is not None:
            return data
        raise OutputError(
            f"{folder} cannot be written ({error.strerror or error}), and the glyphs are kept there; set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    with held:
        data = _load(path)
        if data is not None:
            return data
        drawings = _Drawings.plan(families, find_fonts(families, font_folder), min_families)
        if size == JUDGED_SIZE:
            _render_and_judge(path, drawings, min_families, workers)
        else:
            all_glyphs_80k(
                min_families=min_families,
                families=families,
                font_folder=font_folder,
                cache_dir=cache_dir,
                workers=workers,
            )
            _render_again(path, judged, drawings, size, workers)
        data = _load(path)
    if data is None:
        raise UnavailableError(f"{path} does not hold what was just written to it; check the disk")
    return data


@dataclass(frozen=True, eq=False)
class _Drawings:
    """What to draw: ``characters`` (n,) code points, of ``families`` (n,), from ``files[sources]`` (n,).

    Sorted by source, then by character. ``fonts`` is a digest of the files' contents.
    """

    characters: Integers
    families: Integers
    sources: Integers
    files: tuple[Path, ...]
    fonts: str

    @classmethod
    def plan(cls, families: Sequence[Family], files: Sequence[Sequence[Path]], min_families: int) -> _Drawings:
        """Every character that at least ``min_families`` have, in each family from its first file that has it."""
        sources: list[tuple[int, Path, list[str]]] = []
        with progress("reading fonts", sum(map(len, files)), "files") as advance:
            for number, (family, paths) in enumerate(zip(families, files, strict=True)):
                known: set[str] = set()
                for path in paths:
                    new = [c for c in font_characters(path) if is_letter_form(c) and c not in known]
                    known.update(new)
                    sources.append((number, path, new))
                    advance(1, family.name)
        counts = Counter(character for _, _, characters in sources for character in characters)
        kept = [[ord(c) for c in characters if counts[c] >= min_families] for _, _, characters in sources]
        if not any(kept):
            raise InputError(f"no character is in {min_families} families; lower min_families")
        lengths = [len(characters) for characters in kept]
        digest = hashlib.sha256()
        for _, path, _ in sources:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return cls(
            characters=np.concatenate([np.array(characters, np.int64) for characters in kept]),
            families=np.repeat([number for number, _, _ in sources], lengths),
            sources=np.repeat(np.arange(len(sources)), lengths),
            files=tuple(path for _, path, _ in sources),
            fonts=digest.hexdigest(),
        )

    def __len__(self) -> int:
        return len(self.characters)

    def __getitem__(self, rows: Integers) -> _Drawings:
        return _Drawings(self.characters[rows], self.families[rows], self.sources[rows], self.files, self.fonts)

    def counts_of_ink(self, images: Tensor) -> Integers:
        """In how many families, (n,), the character of each drawing has ink; 0 where the drawing itself has none.

        Some fonts have empty glyphs for thousands of characters that they lack.
        """
        inked = torch.cat([block.flatten(1).amax(1) > 0 for block in images.split(_COPIED)]).numpy()
        counts = np.bincount(self.characters[inked], minlength=self.characters.max() + 1)
        return np.where(inked, counts[self.characters], 0)

    def chunks(self) -> list[_Chunk]:
        """Divide the drawings into pieces of work, each of which needs one font file."""
        bounds = np.searchsorted(self.sources, range(len(self.files) + 1)).tolist()
        begins = [i for begin, end in pairwise(bounds) for i in range(begin, end, _CHUNK)]
        return [
            _Chunk(number, self.files[self.sources[begin]], begin, self.characters[begin:end].tolist())
            for number, (begin, end) in enumerate(pairwise([*begins, len(self)]))
        ]


@dataclass(frozen=True)
class _Chunk:
    """Characters (code points) to draw from one font, into the images from ``begin`` on."""

    number: int
    font: Path
    begin: int
    characters: list[int]

    def draw(self, images_file: Path) -> _Chunk:
        images = map_tensor(images_file, "images", format=PARTIAL_FORMAT, writable=True).numpy()
        font = open_font(self.font, EM)
        for row, character in enumerate(self.characters, self.begin):
            image = draw(font, chr(character), images.shape[-1])
            images[row] = 0 if image is None else image
        return self


def _render_and_judge(path: Path, drawings: _Drawings, min_families: int, workers: int | None) -> None:
    """Draw everything at `JUDGED_SIZE`, decide what is distinct, and write that."""
    partial = _partial(path)
    images = _draw(partial, drawings, JUDGED_SIZE, workers)
    counts = drawings.counts_of_ink(images)
    found = distinct(images.numpy(), drawings.characters, drawings.families, (counts >= min_families).nonzero()[0])
    labels, rows = torch.from_numpy(found.labels), torch.from_numpy(found.rows)
    _write(path, images, rows, labels, rows, json.dumps(found.names), drawings.fonts, json.dumps(found.counts))
    partial.unlink()


def _render_again(path: Path, judged: Path, drawings: _Drawings, size: int, workers: int | None) -> None:
    """Draw in another size what ``judged`` holds, and write that with its labels and names."""
    metadata = locate_tensor(judged, "images", format=FORMAT).metadata
    if metadata["fonts"] != drawings.fonts:
        raise InputError(f"{judged} was rendered from other versions of the fonts; remove it to render both sizes anew")
    labels, kept = (map_tensor(judged, name, format=FORMAT) for name in ("labels", "drawings"))
    partial = _partial(path)
    images = _draw(partial, drawings[kept.numpy()], size, workers)
    _write(path, images, torch.arange(len(kept)), labels, kept, metadata["names"], drawings.fonts, metadata["counts"])
    partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _draw(partial: Path, drawings: _Drawings, size: int, workers: int | None) -> Tensor:
    """Draw into ``partial``, and return its images (n, size, size), memory-mapped.

    A chunk is marked done once its images are on the disk, so a run that was killed goes on from there.
    """
    with needs("joblib", "drawing glyphs in several processes"):
        from joblib import Parallel, cpu_count, delayed
    chunks = drawings.chunks()
    settings = repr((FORMAT, renderer_versions(), EM, size, _CHUNK, drawings.fonts, len(drawings)))
    if not _continues(partial, settings):
        shapes = {"images": ((len(drawings), size, size), torch.uint8), "done": ((len(chunks),), torch.uint8)}
        allocate_tensors(partial, shapes, format=PARTIAL_FORMAT, settings=settings)
    done = map_tensor(partial, "done", format=PARTIAL_FORMAT, writable=True)
    left = [chunk for chunk in chunks if not done[chunk.number]]
    jobs = max(1, min(workers or cpu_count(), len(left)))
    todo = sum(len(chunk.characters) for chunk in left)
    say(f"{len(drawings) - todo:,} of {len(drawings):,} glyphs of {size} pixels are there")
    with progress("rendering glyphs", todo, "glyphs") as advance:
        drawn = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(chunk.draw)(partial) for chunk in left)
        for chunk in drawn:
            fsync(partial)
            done[chunk.number] = 1
            advance(len(chunk.characters), chunk.font.stem)
    return map_tensor(partial, "images", format=PARTIAL_FORMAT)


def _continues(partial: Path, settings: str) -> bool:
    """Whether ``partial`` holds the beginning of this very rendering."""
    if not partial.exists():
        return False
    try:
        found = locate_tensor(partial, "images", format=PARTIAL_FORMAT).metadata.get("settings")
    except ValueError as error:
        say(f"{error}: rendering starts anew")
        return False
    if found != settings:
        say(f"{partial} was begun with other fonts or another renderer: rendering starts anew")
    return found == settings


def _write(
    path: Path, images: Tensor, rows: Tensor, labels: Tensor, drawings: Tensor, names: str, fonts: str, counts: str
) -> None:
    """Write ``images[rows]`` (n, size, size) and what belongs to them, and a checksum over all."""
    n, size = len(rows), images.shape[-1]
    shapes = {
        "images": ((n, 1, size, size), torch.uint8),
        "labels": ((n,), torch.int64),
        "drawings": ((n,), torch.int64),
        "sha256": ((hashlib.sha256().digest_size,), torch.uint8),
    }
    with atomic_path(path) as temporary, progress("writing glyphs", n, "images") as advance:
        allocate_tensors(temporary, shapes, format=FORMAT, names=names, fonts=fonts, counts=counts)
        tensors = {name: map_tensor(temporary, name, format=FORMAT, writable=True) for name in shapes}
        tensors["labels"][:], tensors["drawings"][:] = labels, drawings
        for begin in range(0, n, _COPIED):
            block = rows[begin : begin + _COPIED]
            tensors["images"][begin : begin + _COPIED, 0] = images[block]
            advance(len(block))
        digest = checksum({name: tensors[name] for name in _TENSORS}, names)
        tensors["sha256"][:] = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)


def _load(path: Path) -> IdentityImages | None:
    """Map what `_write` wrote; None if there is no file, or (with a message) if it does not hold what was written."""
    if not path.exists():
        return None
    try:
        metadata = locate_tensor(path, "images", format=FORMAT).metadata
        tensors = {name: map_tensor(path, name, format=FORMAT) for name in (*_TENSORS, "sha256")}
    except ValueError as error:
        say(f"{error}: rendering the glyphs again")
        return None
    names = metadata.get("names", "")
    digest = checksum({name: tensors[name] for name in _TENSORS}, names)
    if bytes(tensors["sha256"].tolist()).hex() != digest:
        say(f"{path} is damaged, its checksum is wrong: rendering the glyphs again")
        return None
    say(f"{path.name}, {digest[:16]}: {_in_words(json.loads(metadata['counts']))}")
    return IdentityImages(tensors["images"], tensors["labels"].clone(), json.loads(names))


def _in_words(counts: dict[str, int]) -> str:
    return (
        "of {drawings:,} drawings of {characters:,} characters, which look like {distinct identities:,} different "
        "ones, {of two identities:,} show two identities, {copies:,} are copies and {alone:,} alone; {images:,} images "
        "of {identities:,} identities are left"
    ).format_map(counts)
