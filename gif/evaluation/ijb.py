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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from gif.errors import InputError, MissingFileError
from gif.evaluation.alignment import align_face
from gif.evaluation.embedding import Embedder
from gif.evaluation.identification import Identification, identify
from gif.evaluation.templates import FARS, PairBlock, TemplateSums, TemplateVerification, verify_templates
from gif.files import existing_file

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
        members = list(_lines(folder / "meta" / f"{name}{_MEMBERS}", 3))
        found = list(_lines(folder / "meta" / f"{name}_name_5pts_score.txt", 12))
        files = [row[0] for row in members]
        if files != [row[0] for row in found]:
            raise InputError(
                f"{name}{_MEMBERS} ({len(members)} images) and {name}_name_5pts_score.txt ({len(found)}) in "
                f"{folder / 'meta'} do not list the same images in one order; take both from one release"
            )
        try:
            ids = torch.from_numpy(np.array([row[1:] for row in members], dtype=np.int64))
            numbers = torch.from_numpy(np.array([row[1:] for row in found], dtype=np.float64))
        except (ValueError, OverflowError) as error:
            raise InputError(f"{folder / 'meta'}: a template, medium or landmark is no number ({error})") from error
        return cls(folder, name, files, ids[:, 0], ids[:, 1], numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10])

    def check(self, protocols: Sequence[IjbProtocol] = PROTOCOLS) -> None:
        """Look at all that evaluation will read, before the long work: of the images the first, of the pairs a million.

        Raises FileNotFoundError for a missing file, ValueError for a damaged one, or one that names a template without
        images.
        """
        existing_file(self.folder / "loose_crop" / self.files[0])
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
        with path.open(encoding="ascii") as file:
            while lines := _decoded(path, islice(file, _PAIRS_A_BLOCK)):
                try:
                    first, second, same = np.loadtxt(lines, dtype=np.int64, ndmin=2, unpack=True)
                except (ValueError, OverflowError) as error:
                    raise InputError(f"{path}, after line {done:,}: {error}; wanted 'template template 0|1'") from error
                if not np.isin(same, (0, 1)).all():
                    wrong = int(same[~np.isin(same, (0, 1))][0])
                    raise InputError(f"{path}, after line {done:,}: label {wrong}; wanted 'template template 0|1'")
                done += len(lines)
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
        with path.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            try:
                next(rows, None)
                people = {int(row[0]): int(row[1]) for row in rows if row}
            except (ValueError, IndexError, csv.Error) as error:
                raise InputError(f"{path}, line {rows.line_num}: {error}; wanted 'template,person,...'") from error
        return torch.tensor(list(people)), torch.tensor(list(people.values()))


class IjbFaces(Dataset[tuple[Tensor, int]]):
    """The aligned faces of an `Ijb`: (image (3, 112, 112) uint8 RGB, its number)."""

    def __init__(self, ijb: Ijb) -> None:
        self.ijb = ijb

    def __len__(self) -> int:
        return len(self.ijb.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(existing_file(self.ijb.folder / "loose_crop" / self.ijb.files[index])) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return align_face(pixels, self.ijb.landmarks[index]), index


@dataclass(frozen=True, eq=False)
class IjbResult:
    """Pairs of templates (1:1), and identification in each gallery by itself (1:N); None or empty where not judged."""

    verification: TemplateVerification | None
    identification: dict[str, Identification]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves, fit for JSON."""
        return {
            "1:1": self.verification and self.verification.to_dict(),
            "1:N": {name: result.to_dict() for name, result in self.identification.items()},
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

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    ijb.check(protocols)
    embedder = Embedder(flip, batch_size, workers, device)
    sums = TemplateSums(ijb.template_ids, ijb.media_ids, ijb.faceness if faceness else None)
    for rows, features in embedder.own_share(backbone, IjbFaces(ijb), TITLES[ijb.name]):
        sums.add(rows, features)
    sums.gather(device)
    templates = sums.templates()
    verification = verify_templates(templates, ijb.pairs(), fars=fars) if "1:1" in protocols else None
    identification = {}
    if "1:N" in protocols:
        probes, people = ijb.probes()
        probe_features = templates.of(probes)
        for name in GALLERIES[ijb.name]:
            gallery, subjects = ijb.gallery(name)
            identification[name] = identify(probe_features, people, templates.of(gallery), subjects)
    return IjbResult(verification, identification)


def _lines(path: Path, columns: int) -> Iterator[list[str]]:
    with existing_file(path).open(encoding="utf-8") as file:
        for number, line in enumerate(_decoded(path, file), 1):
            fields = line.split()
            if fields and len(fields) != columns:
                raise InputError(f"{path}, line {number} has {len(fields)} columns, wanted {columns}: {line[:80]!r}")
            if fields:
                yield fields


def _decoded(path: Path, lines: Iterable[str]) -> list[str]:
    """The lines of a file that is text. Raises ValueError where it is not."""
    try:
        return list(lines)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text ({error}); give the lists as the benchmark's release has them") from error
