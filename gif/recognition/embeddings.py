"""Embeddings with their names, in files that other programs read too: NumPy's and Parquet."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gif.errors import DamagedFileError, InputError
from gif.files import atomic_path, existing_file
from gif.packages import needs

FORMAT = "gif.embeddings/1"
SUFFIXES = (".npz", ".parquet")
_UNIT = 1e-3  # how far from 1 a row's length may be: files of others may be of lower precision


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Unit embeddings of named images.

    Args:
        names: of each image.
        vectors: (n, d) float32, of unit length.
        model: the fingerprint of the model that made them.
        flip: whether the mirrored image's were added.

    Raises ValueError unless there is a name for each row.
    """

    names: Sequence[str]
    vectors: Tensor
    model: str
    flip: bool

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.names) != len(self.vectors):
            raise InputError(f"wanted a name for each row, got {len(self.names)} and {tuple(self.vectors.shape)}")

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: str | Path) -> None:
        """Write them, atomically.

        .npz holds the arrays "names" (n,) str, "embeddings" (n, d) float32 and "metadata", which is JSON; .parquet the
        columns "name" and "embedding", a list of d float32, and the metadata under the key "gif" of its schema.

        Raises ValueError for another suffix, OutputError where nothing can be written.
        """
        path = check_suffix(path)
        metadata = json.dumps({"format": FORMAT, "model": self.model, "flip": self.flip})
        rows = self.vectors.float().contiguous().numpy()
        if path.suffix == ".npz":
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, names=np.array(self.names, str), embeddings=rows, metadata=np.array(metadata))
            return
        pyarrow, parquet = _parquet()
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), rows.shape[1])
        table = pyarrow.table({"name": pyarrow.array(self.names, pyarrow.string()), "embedding": column})
        with atomic_path(path) as temporary:
            parquet.write_table(table.replace_schema_metadata({"gif": metadata}), temporary)

    @classmethod
    def load(cls, path: str | Path) -> Embeddings:
        """What `save` wrote. Raises FileNotFoundError, ValueError for another suffix or kind, or a damaged file."""
        path = check_suffix(existing_file(path))
        names, vectors, text = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
        try:
            metadata: Mapping[str, Any] = json.loads(text)
            if metadata["format"] != FORMAT:
                raise ValueError(f"format {metadata['format']!r}")
            model, flip = str(metadata["model"]), bool(metadata["flip"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no embeddings of gif embed ({error!r}); make it with that") from error
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(names) != len(vectors):
            raise DamagedFileError(
                f"{path} is damaged: {len(names)} names, and rows {vectors.shape} {vectors.dtype}; make it again"
            )
        lengths = np.linalg.norm(vectors, axis=1)
        if not (np.abs(lengths - 1) < _UNIT).all():  # of NaN too
            raise DamagedFileError(f"{path} is damaged: some of its rows are not of unit length; make it again")
        return cls(names, torch.from_numpy(vectors), model, flip)


def check_suffix(path: str | Path) -> Path:
    """A path of embeddings. Raises ValueError for another suffix, or where what writes it is not installed."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"a file of embeddings ends in {' or '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".parquet":
        _parquet()
    return path


def _parquet() -> tuple[Any, Any]:
    with needs("gif-recognition[parquet]", "Parquet files (.npz needs nothing)"):
        import pyarrow
        import pyarrow.parquet as parquet
    return pyarrow, parquet


def _read_npz(path: Path) -> tuple[list[str], np.ndarray, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise InputError(f"{path} is packed, and gif embed does not pack; write it with numpy.savez")
        with np.load(path, allow_pickle=False) as stored:
            names, vectors, metadata = (stored[key] for key in ("names", "embeddings", "metadata"))
        return [str(name) for name in names.tolist()], vectors, str(metadata[()])
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} holds no embeddings of gif embed ({error}); make it with that") from error
    except Exception as error:  # of a damaged archive NumPy and zipfile raise almost anything
        raise DamagedFileError(f"{path} is damaged, or no file of NumPy's ({error}); make it again") from error


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray, str]:
    pyarrow, parquet = _parquet()
    try:
        table = parquet.read_table(path)
        column = table["embedding"].combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        text = (table.schema.metadata or {}).get(b"gif", b"").decode()
        return table["name"].to_pylist(), np.array(vectors), text
    except KeyError as error:
        raise InputError(f"{path} holds no embeddings of gif embed ({error}); make it with that") from error
    except (pyarrow.ArrowException, OSError, ValueError, AttributeError) as error:
        raise DamagedFileError(f"{path} is damaged, or no Parquet file ({error}); make it again") from error
