"""Judging a backbone while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gif.data import IdentityDataset, ImageDecoder
from gif.data.images import some_identities
from gif.errors import InputError
from gif.evaluation import Benchmark, Embedder, HeldOutIdentities, IjbFolders, PairFiles


@dataclass(frozen=True)
class ValidationConfig:
    """What a run is judged by while it trains, by nothing where nothing is named; each time a checkpoint is written.

    Args:
        pairs: verification .bin files, '["lfw.bin", "cfp_fp.bin"]', or a folder of them.
        ijb: the folder of IJB-B or IJB-C, 1:1 and 1:N, or a list of both.
        identities: how many of the data set's held-out identities judge, by TAR@FAR=0.001 of all pairs of their images.
        every: steps between two validations; an epoch where it is not given. The last step is always judged.
        batch_size: images embedded at once, by each process.
        flip: for pairs and IJB, add the embedding of the mirrored image, as their protocols do.

    Raises ValueError for a number out of its range.
    """

    pairs: list[Path] | Path | None = None
    ijb: list[Path] | Path | None = None
    identities: int | None = None
    every: int | None = None
    batch_size: int = 256
    flip: bool = True

    def __post_init__(self) -> None:
        for name, least in (("identities", 2), ("every", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"wanted {name} >= {least}, got {name}={value}")

    def open(
        self, held_out: IdentityDataset, decoder: ImageDecoder, *, workers: int, device: str | torch.device
    ) -> Callable[[nn.Module], dict[str, float]] | None:
        """What `train` takes as ``validate``: named scores of a backbone; None where nothing is to judge by.

        Args:
            held_out: the data set's identities that training does not see.
            decoder: size and colours that the backbone takes.
            workers: processes that read images, for each process that trains.
            device: where to compute.

        All files are looked at. Raises what the benchmarks raise; ValueError for more identities than are held out.
        """
        benchmarks: list[Benchmark] = []
        if self.pairs:
            benchmarks.append(PairFiles(self.pairs, decoder))
        if self.ijb:
            benchmarks.append(IjbFolders(self.ijb, decoder))
        if self.identities is not None:
            benchmarks.append(HeldOutIdentities(_some(held_out, self.identities)))
        if not benchmarks:
            return None
        embedder = Embedder(self.flip, self.batch_size, workers, device)

        def validate(backbone: nn.Module) -> dict[str, float]:
            outcomes = [benchmark.judge(backbone, embedder) for benchmark in benchmarks]
            return {name: score for outcome in outcomes for name, score in outcome.scores.items()}

        return validate


def _some(held_out: IdentityDataset, number: int) -> IdentityDataset:
    """Choose ``number`` of the identities: the same ones each time."""
    if number > held_out.num_identities:
        raise InputError(
            f"{number} identities are to validate and {held_out.num_identities} are held out; raise held_out, or lower "
            "validation.identities"
        )
    return some_identities(held_out, number)
