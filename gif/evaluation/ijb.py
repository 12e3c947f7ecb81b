"""IJB-B and IJB-C: their metadata files, and both protocols on images that are read once and never all held.

Files, as the field hands them around: ``loose_crop/`` with the images, and in ``meta/``

    {ijbb|ijbc}_face_tid_mid.txt             name, template, medium
    {ijbb|ijbc}_name_5pts_score.txt          name, ten landmark coordinates, faceness; the same order of images
    {ijbb|ijbc}_template_pair_label.txt      template, template, 1 for one person and 0 for two
    ijbc_1N_gallery_{G1,G2}.csv, ijbb_1N_gallery_{S1,S2}.csv, {ijbb|ijbc}_1N_probe_mixed.csv
                                             a header row; template, person, and columns that are not needed
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gif.data.decoding import MAX_PIXELS, BrokenImageError, check_max_pixels, decode
from gif.data.encoded import ALL_BROKEN
from gif.data.listing import Tally, printable
from gif.data.shared_memory import shared_flags
from gif.distributed import rank, sum_over_processes
from gif.errors import InputError, MissingFileError
from gif.evaluation.alignment import SIZE, align_face
from gif.evaluation.embedding import Embedder, embed_batch, evaluating
from gif.evaluation.identification import Identification, identify
from gif.evaluation.templates import FARS, PairBlock, TemplateSums, TemplateVerification, verify_templates
from gif.files import existing_file
from gif.progress import say

IjbName = Literal["ijbb", "ijbc"]
IjbProtocol = Literal["1:1", "1:N"]
PROTOCOLS: tuple[IjbProtocol, ...] = ("1:1", "1:N")
GALLERIES: dict[IjbName, tuple[str, str]] = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
TITLES: dict[IjbName, str] = {"ijbb": "IJB-B", "ijbc": "IJB-C"}
_PAIRS_A_BLOCK = 1 << 20
_MEMBERS = "_face_tid_mid.txt"


@dataclass(frozen=True, eq=False)
class Ijb:
    """One benchmark's images: for each of n its file, template, medium, five landmarks (n, 5, 2) and faceness (n,)."""

    folder: Path
    name: IjbName
    files: list[str]
    template_ids: Tensor
    media_ids: Tensor
    landmarks: Tensor
    faceness: Tensor

    @classmethod
    def find(cls, folder: str | Path) -> list[Ijb]:
        """Read the metadata of whichever benchmarks lie in ``folder``: as a rule one.

        Raises FileNotFoundError where there is none, and as `read` does.
        """
        names = [name for name in GALLERIES if (Path(folder) / "meta" / f"{name}{_MEMBERS}").exists()]
        if not names:
            wanted = " or ".join(f"meta/{name}{_MEMBERS}" for name in GALLERIES)
            raise MissingFileError(f"no {wanted} in {folder}; give the folder that holds loose_crop and meta")
        return [cls.read(folder, name) for name in names]

    @classmethod
    def read(cls, folder: str | Path, name: IjbName) -> Ijb:
        """Read the metadata of the images in ``folder``.

        Raises FileNotFoundError for a missing file, ValueError for a damaged one or two that disagree.
        """
        folder = Path(folder)
        members, ids = _named_numbers(folder / "meta" / f"{name}{_MEMBERS}", 2, np.int64)
        found, numbers = _named_numbers(folder / "meta" / f"{name}_name_5pts_score.txt", 11, np.float64)
        if not members:
            raise InputError(f"{name}{_MEMBERS} in {folder / 'meta'} names no image; copy it again")
        if members != found:
            raise InputError(
                f"{name}{_MEMBERS} ({len(members)} images) and {name}_name_5pts_score.txt ({len(found)}) in "
                f"{folder / 'meta'} do not list the same images in one order; take both from one release"
            )
        landmarks, faceness = numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10]
        useless = ~(numbers.isfinite().all(1) & (landmarks != landmarks[:, :1]).flatten(1).any(1))
        if useless.any():
            images = Tally.of(members[place] for place in useless.nonzero().flatten().tolist())
            raise InputError(
                f"{folder / 'meta' / f'{name}_name_5pts_score.txt'}: landmarks that coincide, or NaN or infinity, in "
                f"the lines of {images} images; correct them"
            )
        return cls(folder, name, members, ids[:, 0], ids[:, 1], landmarks, faceness)

    def only(self, images: Tensor) -> Ijb:
        """The same benchmark with some of its images, (n,) bool."""
        files = [file for file, kept in zip(self.files, images.tolist(), strict=True) if kept]
        return replace(
            self,
            files=files,
            template_ids=self.template_ids[images],
            media_ids=self.media_ids[images],
            landmarks=self.landmarks[images],
            faceness=self.faceness[images],
        )

    def check(self, protocols: Sequence[IjbProtocol] = PROTOCOLS) -> None:
        """Look at all that evaluation will read, before the long work: which images there are, a million pairs.

        Raises FileNotFoundError for a missing file or image, ValueError for a damaged file, or one that names a
        template without images.
        """
        folder = self.folder / "loose_crop"
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        missing = Tally.of(file for file in self.files if file not in there and not (folder / file).is_file())
        if missing.number:
            raise MissingFileError(f"{folder} lacks {missing} of {len(self.files):,} images; copy it again")
        named = []
        if "1:1" in protocols:
            named += [torch.from_numpy(ids) for first, second, _ in islice(self.pairs(), 1) for ids in (first, second)]
        if "1:N" in protocols:
            named += [templates for templates, _ in (self.probes(), *map(self.gallery, GALLERIES[self.name]))]
        for templates in named:
            unknown = templates[~torch.isin(templates, self.template_ids)]
            if len(unknown):
                raise InputError(
                    f"{self.folder / 'meta'}: template {int(unknown[0])} has no image ({len(unknown):,} of "
                    f"{len(templates):,} in a list have none); give metadata files of one data set"
                )

    @property
    def _pairs_file(self) -> Path:
        return self.folder / "meta" / f"{self.name}_template_pair_label.txt"

    def pairs(self) -> Iterator[PairBlock]:
        """The 1:1 protocol's pairs of templates, a million at a time: first (n,), second (n,), same (n,) bool.

        Raises FileNotFoundError, or ValueError for a line that is not three whole numbers, the last 0 or 1.
        """
        path = existing_file(self._pairs_file)
        done = 0
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            while lines := list(islice(file, _PAIRS_A_BLOCK)):
                begin, done = done, done + len(lines)
                if not any(map(str.strip, lines)):
                    continue
                try:
                    first, second, same = np.loadtxt(lines, dtype=np.int64, ndmin=2, unpack=True)
                except (ValueError, OverflowError) as error:
                    raise InputError(
                        f"{path}, after line {begin:,}: {error}; wanted 'template template 0|1'"
                    ) from error
                if not np.isin(same, (0, 1)).all():
                    wrong = same[~np.isin(same, (0, 1))][0]
                    raise InputError(f"{path}, after line {begin:,}: a pair is labelled {wrong}, wanted 0 or 1")
                yield first, second, same == 1

    def gallery(self, name: str) -> tuple[Tensor, Tensor]:
        """The 1:N protocol's gallery of a name in `GALLERIES`: template ids (g,), and whose they are (g,)."""
        return self._people(f"{self.name}_1N_gallery_{name}.csv")

    def probes(self) -> tuple[Tensor, Tensor]:
        """The 1:N protocol's probes: template ids (p,), and whose they are (p,)."""
        return self._people(f"{self.name}_1N_probe_mixed.csv")

    def _people(self, file: str) -> tuple[Tensor, Tensor]:
        """The distinct templates that a file names a row an image or a row a template, with their people."""
        path = existing_file(self.folder / "meta" / file)
        people: dict[int, int] = {}
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            rows = csv.reader(lines)
            try:
                for line, row in enumerate(rows, 1):
                    if rows.line_num != line:
                        raise InputError(f"the quotation in line {line} does not end")
                    if line == 1:
                        _check_header(row)
                    elif row:
                        template, person = int(row[0]), int(row[1])
                        if people.setdefault(template, person) != person:
                            raise InputError(f"template {template} is of person {people[template]} and of {person}")
            except (ValueError, IndexError, csv.Error) as error:
                raise InputError(f"{path}, line {rows.line_num}: {error}; wanted 'template,person,...'") from error
        if not people:
            raise InputError(f"{path} names no template; copy it again")
        return torch.tensor(list(people)), torch.tensor(list(people.values()))


def _check_header(row: Sequence[str]) -> None:
    if row and row[0].strip().isdecimal():
        raise InputError(f"it begins with {','.join(row)[:80]!r}, wanted a header, which is no row")


class IjbFaces(Dataset[tuple[Tensor, int]]):
    """The aligned faces of an `Ijb`: (image (3, 112, 112) uint8 RGB, its number).

    Of a batch, those that can be read: the others are noted in ``broken`` (n,) bool, by whichever process. An image
    that declares more than ``max_pixels`` counts as broken.
    """

    def __init__(self, ijb: Ijb, max_pixels: int = MAX_PIXELS) -> None:
        check_max_pixels(max_pixels)
        self.ijb, self.max_pixels = ijb, max_pixels
        self.broken = shared_flags(len(ijb.files))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a face as it is cropped."""
        return 3, SIZE, SIZE

    def __len__(self) -> int:
        return len(self.ijb.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.ijb.folder / "loose_crop" / self.ijb.files[index]
        try:
            pixels = torch.from_numpy(decode(path.read_bytes(), "RGB", turn=False, max_pixels=self.max_pixels))
        except (BrokenImageError, OSError) as error:
            self.broken[index] = True
            raise BrokenImageError(f"{path} is a broken image: {error}; copy it again") from error
        return align_face(pixels.permute(2, 0, 1), self.ijb.landmarks[index]), index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """The readable ones of some. Raises BrokenImageError where of at least 8 none is: then it is not the images."""
        faces = []
        for place, index in enumerate(indices):
            try:
                faces.append(self[index])
            except BrokenImageError:
                if not faces and place + 1 == len(indices) >= ALL_BROKEN:
                    raise
        return faces


@dataclass(frozen=True, eq=False)
class IjbResult:
    """Pairs of templates (1:1), and identification in each gallery by itself (1:N); None or empty where not judged.

    ``broken`` are the images that could not be read, and were left out of their templates; ``lost`` the templates that
    have no other, and are like nobody.
    """

    verification: TemplateVerification | None
    identification: dict[str, Identification]
    broken: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, fit for JSON."""
        return {
            "1:1": self.verification and self.verification.to_dict(),
            "1:N": {name: result.to_dict() for name, result in self.identification.items()},
            "broken images": list(self.broken),
            "templates without an image": list(self.lost),
        }


def evaluate_ijb(
    backbone: nn.Module,
    ijb: Ijb,
    *,
    protocols: Sequence[IjbProtocol] = PROTOCOLS,
    flip: bool = True,
    faceness: bool = True,
    fars: Sequence[float] = FARS,
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
    max_pixels: int = MAX_PIXELS,
) -> IjbResult:
    """Judge a backbone by IJB's protocols. Processes of one group share the images, and each gets the result.

    Memory is a vector for each template, and the ROC of all pairs: for IJB-C 0.2 GB, and 1.3 GB for a moment.

    Args:
        backbone: takes faces (B, 3, 112, 112) in [-1, 1].
        ijb: the benchmark.
        protocols: which to judge.
        flip: add the mirrored image's embedding, not normalised.
        faceness: weigh each image by the face detector's score.
        fars: false-accept rates of the 1:1 protocol.
        batch_size: images embedded at once.
        workers: processes that read and align images.
        device: where to compute.
        max_pixels: an image that declares more counts as broken.

    Broken images are left out, named and counted: a template is then what its others make it, and one without any
    others is zero, like nobody.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, or where none of a process's images can
    be read, or of a batch of at least 8.
    """
    ijb.check(protocols)
    embedder = Embedder(flip, batch_size, workers, device)
    sums = _no_sums(ijb, faceness)
    faces = IjbFaces(ijb, max_pixels)
    for rows, features in embedder.own_share(backbone, faces, TITLES[ijb.name]):
        sums.add(rows, features)
    sums.gather(device)
    broken = sum_over_processes(faces.broken.int().to(device)).cpu() > 0
    lost = _leave_out(sums, faces, broken, backbone, embedder, faceness)
    templates = sums.templates()
    verification = verify_templates(templates, ijb.pairs(), fars=fars) if "1:1" in protocols else None
    identification = {}
    if "1:N" in protocols:
        probes, people = ijb.probes()
        probe_features = templates.of(probes)
        for name in GALLERIES[ijb.name]:
            gallery, subjects = ijb.gallery(name)
            identification[name] = identify(probe_features, people, templates.of(gallery), subjects)
    files = [ijb.files[place] for place in broken.nonzero().flatten().tolist()]
    if files and rank() == 0:
        say(f"{TITLES[ijb.name]}: images that are broken and were left out: {Tally.of(files)}")
        if lost:
            say(f"{TITLES[ijb.name]}: templates without an image, like nobody: {Tally.of(map(str, lost))}")
    return IjbResult(verification, identification, tuple(files), tuple(lost))


def _no_sums(ijb: Ijb, faceness: bool) -> TemplateSums:
    return TemplateSums(ijb.template_ids, ijb.media_ids, ijb.faceness if faceness else None)


def _leave_out(
    sums: TemplateSums, faces: IjbFaces, broken: Tensor, backbone: nn.Module, embedder: Embedder, faceness: bool
) -> list[int]:
    """Make the templates of broken images (n,) bool anew, of their other images; returns those that have none.

    What an image weighs follows from how many its medium has. They are few: every process embeds them all.
    """
    ijb = faces.ijb
    if not broken.any():
        return []
    rest = torch.isin(ijb.template_ids, ijb.template_ids[broken]) & ~broken
    others = None
    if rest.any():
        part = ijb.only(rest)
        others, faces = _no_sums(part, faceness), IjbFaces(part, faces.max_pixels)
        with evaluating(backbone, embedder.device) as network:
            for rows in torch.arange(len(faces)).split(embedder.batch_size):
                images = torch.stack([faces[row][0] for row in rows.tolist()]).to(embedder.device)
                others.add(rows, embed_batch(network, images, flip=embedder.flip))
    return sums.leave_out(broken, others).tolist()


def _named_numbers(path: Path, count: int, dtype: type[np.generic]) -> tuple[list[str], Tensor]:
    """The lines of a file, a name and ``count`` numbers each: the names, and the numbers (n, count). Blank lines are
    none, as to pandas, which the field reads these files with."""
    names, rows = [], []
    with existing_file(path).open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != count + 1:
                raise InputError(
                    f"{path}, line {number} has {len(fields)} columns, wanted {count + 1}: {printable(line[:80])!r}"
                )
            names.append(fields[0])
            try:
                rows.append(np.array(fields[1:], dtype=dtype))
            except (ValueError, OverflowError) as error:
                raise InputError(f"{path}, line {number}: {error}; wanted a name and {count} numbers") from error
    return names, torch.from_numpy(np.stack(rows) if rows else np.empty((0, count), dtype))
