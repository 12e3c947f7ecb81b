"""The thresholds of a model, in a file beside it: `gif evaluate` writes them, and whoever verifies reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gif.errors import InputError
from gif.evaluation.thresholds import Thresholds
from gif.files import read_json, write_text

FORMAT = "gif.thresholds/1"
SUFFIX = ".thresholds.json"


@dataclass(frozen=True)
class Calibrated:
    """Thresholds that a judgement found, and of what.

    Args:
        thresholds: of the cosine of two images.
        flip: whether embeddings had the mirrored image's added: then those to be compared must have it too.
        data: what was judged: a data set, a file of pairs.
    """

    thresholds: Thresholds
    flip: bool
    data: str


@dataclass(frozen=True)
class Calibration:
    """All thresholds of a model.

    Args:
        model: fingerprint of its weights (`gif.backbones.fingerprint`).
        sets: what it was judged by, by name.
    """

    model: str
    sets: Mapping[str, Calibrated]

    @property
    def best(self) -> str:
        """The set that is taken where none is named: of the most impostor pairs."""
        return max(self.sets, key=lambda name: self.sets[name].thresholds.impostor)

    def named(self, name: str | None) -> Calibrated:
        """One of the sets, the `best` where none is named. Raises ValueError where there is none of that name."""
        if name is not None and name not in self.sets:
            raise InputError(f"this model has no thresholds called {name!r}; there are {', '.join(self.sets)}")
        return self.sets[name or self.best]

    def to_json(self) -> str:
        """Everything, as text."""
        sets = {
            name: {"data": one.data, "flip": one.flip, **one.thresholds.to_dict()} for name, one in self.sets.items()
        }
        return json.dumps({"format": FORMAT, "model": self.model, "sets": sets}, indent=2, allow_nan=False)

    @classmethod
    def from_stored(cls, where: str | Path, stored: Any) -> Calibration:
        """What `to_json` made, once it is read. Raises ValueError, naming ``where`` it was, for anything else."""
        try:
            if stored["format"] != FORMAT:
                raise ValueError(f"it is of format {stored['format']!r}")
            sets = {
                str(name): Calibrated(Thresholds.from_dict(one), bool(one["flip"]), str(one["data"]))
                for name, one in stored["sets"].items()
            }
            if not sets:
                raise ValueError("there are none")
            return cls(str(stored["model"]), sets)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{where} holds no thresholds of a model ({error}); make them with gif evaluate, or remove the file"
            ) from error


def calibration_path(model: str | Path) -> Path:
    """The file of a model's thresholds, beside it."""
    return Path(model).with_suffix(SUFFIX)


def load_calibration(model: str | Path, fingerprint: str) -> Calibration | None:
    """The thresholds stored with the model at a path, whose weights have this fingerprint; None where there are none.

    Raises ValueError where they are damaged, or another model's.
    """
    path = calibration_path(model)
    if not path.exists():
        return None
    found = Calibration.from_stored(path, read_json(path))
    if found.model != fingerprint:
        raise InputError(
            f"{path} holds the thresholds of other weights than {model}'s, which may have been trained on since: "
            f"remove it, and make them anew with gif evaluate --model {model}"
        )
    return found


def add_calibration(model: str | Path, found: Calibration) -> Path:
    """Store thresholds with the model, beside those of other judgements of the same weights; returns where.

    Raises OutputError where nothing can be written there.
    """
    path = calibration_path(model)
    if path.exists():
        before = Calibration.from_stored(path, read_json(path))
        if before.model == found.model:
            found = replace(found, sets={**before.sets, **found.sets})
    write_text(path, found.to_json())
    return path
