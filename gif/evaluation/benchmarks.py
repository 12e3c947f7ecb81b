"""What a backbone is judged by: pairs in .bin files, IJB, the held-out identities of a data set.

Each is opened first, which looks at its files and raises whatever is wrong with them; `judge` then does the work and
gives an `Outcome`: numbers, tables and curves in one form, whichever benchmark they are of.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from gif.data import IdentityDataset, ImageDecoder, ImagePairs, read_bin
from gif.errors import InputError, MissingFileError
from gif.evaluation.alignment import SIZE
from gif.evaluation.curves import Verified
from gif.evaluation.embedding import Embedder, ReadableImages
from gif.evaluation.identification import Identification
from gif.evaluation.ijb import TITLES, Ijb, evaluate_ijb
from gif.evaluation.open_set import judge
from gif.evaluation.tables import identification_table, pairs_table, verification_table
from gif.evaluation.thresholds import Thresholds, thresholds_of
from gif.evaluation.verification import (
    FOLDS,
    PairAccuracy,
    one_kind_folds,
    require_both,
    resolution,
    roc,
    tar_at,
    thin,
    turns,
    unresolved,
    verify_pairs,
)

if TYPE_CHECKING:
    from rich.table import Table

PAIRS_FAR = 1e-3  # LFW and its successors have 3,000 impostor pairs
HELD_OUT_FAR = 1e-3
IJB_FAR = 1e-4
CHANNELS = 3

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one benchmark found.

    Args:
        kind: its key in results.
        numbers: all of them, fit for JSON.
        scores: the few that validation follows, by name; more is better.
        tables: to print.
        curves: verification, by name.
        identification: by name.
        notes: what keeps a number from being what it seems, a line each.
        thresholds: of the cosine of two images, by name.
        flip: whether these cosines are of embeddings with the mirrored image's added.
    """

    kind: str
    numbers: dict[str, Any]
    scores: dict[str, float]
    tables: list[Table]
    curves: dict[str, Verified]
    identification: dict[str, Identification] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    thresholds: dict[str, Thresholds] = field(default_factory=dict)
    flip: bool = False


class Benchmark(ABC):
    """Something to judge a backbone by, whose files are there and fit it."""

    @abstractmethod
    def judge(self, backbone: nn.Module, embedder: Embedder) -> Outcome:
        """Judge a backbone; each process of a group calls this, and gets the outcome."""


class PairFiles(Benchmark):
    """Verification .bin files: LFW, CFP-FP, AgeDB and their like.

    Args:
        paths: of .bin files, or folders, of which each .bin file is taken.
        decoder: size and colours that the backbone takes.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, one without pairs for each fold and of
    both kinds, or two of one name.
    """

    def __init__(self, paths: Paths, decoder: ImageDecoder) -> None:
        self.decoder = decoder
        self.pairs: dict[str, ImagePairs] = {}
        for path in _bin_files(paths):
            if path.stem in self.pairs:
                raise InputError(f"two files are called {path.name}; rename one, for results go by the name")
            pairs = read_bin(path)
            if len(pairs.issame) < FOLDS:
                raise InputError(f"{path} has {len(pairs.issame)} pairs, fewer than the {FOLDS} folds of the protocol")
            try:
                require_both(int(pairs.issame.sum()), int((~pairs.issame).sum()))
                pairs.check(decoder)
            except ValueError as error:
                raise InputError(f"{path}: {error}") from error
            self.pairs[path.stem] = pairs

    def judge(self, backbone: nn.Module, embedder: Embedder) -> Outcome:
        results: dict[str, PairAccuracy] = {}
        numbers: dict[str, Any] = {}
        curves: dict[str, Verified] = {}
        notes: list[str] = []
        thresholds: dict[str, Thresholds] = {}
        for name, pairs in self.pairs.items():
            _, embeddings = embedder.all_shares(backbone, _PairImages(pairs, self.decoder), name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the notes say it
                results[name] = verify_pairs(embeddings, pairs.issame)
            scores_of_pairs = cosine_similarity(embeddings[::2].double(), embeddings[1::2].double())
            genuine, impostor = int(pairs.issame.sum()), int((~pairs.issame).sum())
            curve = roc(scores_of_pairs, pairs.issame)
            curves[name] = thin(curve, impostor)
            thresholds[name] = thresholds_of(curve, genuine, impostor)
            tar = tar_at(turns(curve, genuine, impostor), PAIRS_FAR)
            if low := unresolved([PAIRS_FAR], impostor):
                notes.append(f"{name}: {resolution(low, impostor)}")
            if results[name].one_kind:
                notes.append(f"{name}: {one_kind_folds(results[name].one_kind, FOLDS)}")
            numbers[name] = {
                **results[name].to_dict(),
                "tar": {f"{PAIRS_FAR:g}": tar},
                "pairs": len(pairs.issame),
                "thresholds": thresholds[name].to_dict(),
            }
        scores = {name: result.accuracy for name, result in results.items()}
        tables = [pairs_table(results), *(found.table(f"{name}: thresholds") for name, found in thresholds.items())]
        return Outcome("pairs", numbers, scores, tables, curves, notes=notes, thresholds=thresholds, flip=embedder.flip)


class IjbFolders(Benchmark):
    """IJB-B and IJB-C, 1:1 and 1:N, each from the folder that holds its loose_crop and meta.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, for a benchmark given twice, or unless
    the backbone takes aligned faces of 112 x 112 in colour.
    """

    def __init__(self, folders: Paths, decoder: ImageDecoder) -> None:
        if (decoder.size, decoder.channels) != (SIZE, CHANNELS):
            raise InputError(
                f"IJB's faces are aligned to {SIZE} x {SIZE} in {CHANNELS} channels, and the backbone takes "
                f"{decoder.size} x {decoder.size} in {decoder.channels}; give a backbone for aligned faces"
            )
        self.max_pixels = decoder.max_pixels
        self.benchmarks: dict[str, Ijb] = {}
        for folder in _listed(folders):
            for ijb in Ijb.find(folder):
                if TITLES[ijb.name] in self.benchmarks:
                    raise InputError(f"{folder} holds {TITLES[ijb.name]} once more; give each once")
                ijb.check()
                self.benchmarks[TITLES[ijb.name]] = ijb

    def judge(self, backbone: nn.Module, embedder: Embedder) -> Outcome:
        results = {
            name: evaluate_ijb(
                backbone,
                ijb,
                flip=embedder.flip,
                batch_size=embedder.batch_size,
                workers=embedder.workers,
                device=embedder.device,
                max_pixels=self.max_pixels,
            )
            for name, ijb in self.benchmarks.items()
        }
        verified = {name: found.verification for name, found in results.items() if found.verification is not None}
        return Outcome(
            "ijb",
            {name: found.to_dict() for name, found in results.items()},
            {f"{name} TAR@{IJB_FAR:g}": found.tar[IJB_FAR] for name, found in verified.items()},
            [verification_table(results), identification_table(results)],
            dict(verified),
            {f"{name} {gallery}": found for name in results for gallery, found in results[name].identification.items()},
        )


class HeldOutIdentities(Benchmark):
    """All pairs of images of identities that training never saw. They are not mirrored: not all data is faces.

    Raises ValueError without a genuine or an impostor pair.
    """

    def __init__(self, images: IdentityDataset) -> None:
        if images.num_identities < 2:
            raise InputError(
                f"{images.num_identities} identities are held out, wanted 2 or more; set held_out to their share of "
                "the data set, or to 1 to judge all of it"
            )
        sizes = images.labels.bincount()
        genuine = int((sizes * (sizes - 1) // 2).sum())
        require_both(genuine, len(images) * (len(images) - 1) // 2 - genuine)
        self.images = images

    def judge(self, backbone: nn.Module, embedder: Embedder) -> Outcome:
        embedder = replace(embedder, flip=False)
        numbers, embeddings = embedder.all_shares(backbone, ReadableImages(self.images), "embedding")
        found = judge(embeddings.to(embedder.device), self.images.labels[numbers])
        scores = {f"held-out TAR@{HELD_OUT_FAR:g}": found.tar[HELD_OUT_FAR]}
        tables, name = [found.table(), found.thresholds.table()], "held-out identities"
        return Outcome("held_out", found.to_dict(), scores, tables, {name: found}, thresholds={name: found.thresholds})


class HeldOutSets(Benchmark):
    """Several sets of identities that training never saw, each by itself, as `HeldOutIdentities` judges one.

    Args:
        sets: by name; scores are those of the first.

    Raises ValueError as `HeldOutIdentities` does.
    """

    def __init__(self, sets: Mapping[str, IdentityDataset]) -> None:
        self.sets = {name: HeldOutIdentities(images) for name, images in sets.items()}

    def judge(self, backbone: nn.Module, embedder: Embedder) -> Outcome:
        outcomes = {name: held_out.judge(backbone, embedder) for name, held_out in self.sets.items()}
        for name, outcome in outcomes.items():
            for table in outcome.tables:
                table.title = f"{name}: {table.title}"
        return Outcome(
            "held_out",
            {name: outcome.numbers for name, outcome in outcomes.items()},
            next(iter(outcomes.values())).scores,
            [table for outcome in outcomes.values() for table in outcome.tables],
            {name: curve for name, outcome in outcomes.items() for curve in outcome.curves.values()},
            thresholds={name: found for name, outcome in outcomes.items() for found in outcome.thresholds.values()},
        )


class _PairImages:
    """The images of pairs, each with its number."""

    def __init__(self, pairs: ImagePairs, decoder: ImageDecoder) -> None:
        self._pairs, self._decoder = pairs, decoder

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._decoder.channels, self._decoder.size, self._decoder.size

    def __len__(self) -> int:
        return len(self._pairs.encoded)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._pairs.image(index, self._decoder), index


def _listed(paths: Paths) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _bin_files(paths: Paths) -> list[Path]:
    files = []
    for path in _listed(paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(path.glob("*.bin"))
        if not found:
            raise MissingFileError(f"no .bin file in {path}; give verification .bin files, or a folder of them")
        files += found
    return files
