"""Every format that is read: how a file of it comes about, what is read from it, and what is promised."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler

from benchmarks.campaign import inputs
from benchmarks.campaign.records import Outcome
from gif import CodeVectors, IdentityCodes
from gif.backbones import load_backbone, load_trained_on
from gif.data import BrokenImageError, EncodedImages, Identities, ImageDecoder, left_out, open_data
from gif.data.pairs import read_pairs
from gif.evaluation.benchmarks import PairFiles
from gif.evaluation.ijb import GALLERIES, Ijb
from gif.files import load_tensors
from gif.resume import UnfinishedWork, claim_folder
from gif.training import Checkpoints
from gif.training.checkpoint import TrainingState
from gif.training.increments import TableIncrements
from gif.weights import load_pytorch

_DECODER = ImageDecoder(inputs.SIZE)
_IN_SIGHT = "data within an image that still decodes, or within a label"
_ZEROS_LIKE_PADDING = 10_240  # bytes: tar's record


@dataclass(frozen=True)
class Reading:
    """What damaged files gave.

    Args:
        wanted: the content that was written.
        found: the content that was read.
        folder: of the damaged files.
        whole: of the files as they were written.
        said: what was printed.
    """

    wanted: Any
    found: Any
    folder: Path
    whole: Path
    said: str


Judgement = tuple[Outcome, str]


def whole(reading: Reading) -> Judgement:
    """The judge of formats with a checksum: the content, or nothing."""
    if reading.found == reading.wanted:
        return "right", reading.said
    return "silent", f"other content; it said {reading.said!r}"


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        name: of it.
        write: makes its files in an empty folder.
        read: what is read from the folder, to be compared.
        files: which of the files are damaged, as patterns.
        judge: what that is worth which damaged files gave, and why.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    files: Sequence[str]
    judge: Callable[[Reading], Judgement] = whole

    def places(self, folder: Path) -> list[Path]:
        """The files that are damaged, below a folder that was written."""
        return sorted(path for pattern in self.files for path in folder.glob(pattern) if path.is_file())


def _same(tensors: Mapping[str, Any]) -> str:
    """A digest of named tensors, or of what is in their place."""
    digest = hashlib.sha256()
    for name in sorted(tensors, key=str):
        value = tensors[name]
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode() + array.tobytes())
        else:
            digest.update(f"{name} {value!r};".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _of(who: Identities | None) -> dict[str, Any]:
    return {} if who is None else {"names": list(who.names), "images": who.images, "data": who.data}


def _vectors(path: Path, *, mmap: bool) -> Any:
    vectors = CodeVectors.load(path, mmap=mmap)
    return _same({"table": vectors.table}), _of(vectors.identities)


def _codes(path: Path) -> Any:
    codes = IdentityCodes.load(path)
    tensors = {"codes": codes.codes, "directions": codes.directions, **dict(enumerate(codes.centroids))}
    return codes.vocab_size, _same(tensors), _of(codes.identities)


def _head(path: Path) -> Any:
    tensors, metadata = load_tensors(path, format="gif.head/1")
    head = inputs.head()
    head.load_state_dict(tensors)
    return _same(head.state_dict()), metadata


def _backbone(path: Path) -> Any:
    network, config = load_backbone(path)
    trained_on = load_trained_on(path)
    who = trained_on and (_same({"": trained_on.digests}), trained_on.images, trained_on.data)
    return _same(network.state_dict()), repr(config), who


def _work(path: Path) -> Any:
    return _same(UnfinishedWork(path, inputs.WORK_FORMAT, inputs.SETTINGS).load() or {})


def _settings(folder: Path) -> Any:
    claim_folder(folder, inputs.SETTINGS)
    return json.loads((folder / "settings.json").read_text(encoding="utf-8"))


def read_checkpoint(folder: Path) -> Any:
    """The step that a run continues from, and a digest of all that it continues with."""
    backbone, head = inputs.untrained()
    model = torch.nn.ModuleDict({"backbone": backbone, "head": head})
    tables = {name: TableIncrements(folder / name, table) for name, table in head.tables().items()}
    optimizer = inputs.TRAINING.make_optimizer(model.parameters())
    steps = inputs.CROWD // inputs.TRAINING.batch_size
    state = TrainingState(model, optimizer, GradScaler("cpu", enabled=False), torch.full((steps,), math.nan), tables)
    random = Checkpoints(folder, keep=2).load(state)
    kept = {f"{index}.{name}": x for index, of in optimizer.state_dict()["state"].items() for name, x in of.items()}
    return state.step, _same({**model.state_dict(), **head.tables(), **kept, **random, "losses": state.losses})


def _older(reading: Reading) -> Judgement:
    """Either checkpoint of the two, the older one only with a word."""
    if reading.found != reading.wanted and "is removed, and the run continues from" in reading.said:
        shutil.rmtree(reading.folder)
        shutil.copytree(reading.whole, reading.folder)
        shutil.rmtree(max(reading.folder.glob("step-*")))
        if reading.found == read_checkpoint(reading.folder):
            return "fell back", reading.said
    return whole(reading)


@dataclass(frozen=True)
class _Images:
    """A data set: (identity, digest of the pixels or None of a broken one) of each image, and what was left out."""

    names: list[str]
    images: list[tuple[str, str | None]]
    told: str


def _data(path: Path) -> _Images:
    data = open_data(str(path), decoder=_DECODER)
    assert isinstance(data, EncodedImages)
    images: list[tuple[str, str | None]] = []
    for index, label in enumerate(data.labels.tolist()):
        try:
            images.append((data.names[label], _same({"": data[index][0]})))
        except BrokenImageError:
            images.append((data.names[label], None))
    return _Images(list(data.names), images, left_out(data) or "")


def _told(reading: Reading) -> Judgement:
    """Images may be left out with a word; what no reader can see is not promised (docs/data.md)."""
    wanted, found = reading.wanted, reading.found
    if found == wanted:
        return "right", ""
    told = found.told + reading.said
    broken = [place for place, (_, image) in enumerate(found.images) if image is None]
    if broken and "broken" not in found.told:
        return "silent", f"{len(broken)} broken images, and it said {told!r}"
    if len(found.images) == len(wanted.images):
        if (
            _lines(reading.folder) != _lines(reading.whole)
            and found.told == wanted.told
            and found.names != wanted.names
        ):
            return "silent", f"names moved to other identities; it said {told!r}"
        others = [
            (one, other)
            for one, other in zip(wanted.images, found.images, strict=True)
            if one != other and (other[1] is not None or one[0] != other[0])
        ]
        if others or sorted(found.names) != sorted(wanted.names):
            return "not promised", f"{_IN_SIGHT}: {len(others)} images"
        return ("fell back", told) if broken or found.told != wanted.told else ("right", "")
    invented = Counter(found.images) - Counter(wanted.images)
    if found.told != wanted.told and len(found.images) < len(wanted.images) and not any(image for _, image in invented):
        return "fell back", told
    if _ends_early(wanted, found, reading.folder):
        return "not promised", "zeros in place of the last samples of a padded archive"
    return "silent", f"{len(found.images)} images for {len(wanted.images)}, {len(invented)} invented; it said {told!r}"


def _lines(folder: Path) -> list[int]:
    """How many lines there are in lists of names."""
    return [path.read_bytes().removesuffix(b"\n").count(b"\n") for path in folder.rglob("identities.txt")]


def _ends_early(wanted: _Images, found: _Images, folder: Path) -> bool:
    """Whether the last samples of a tar file are missing where as many zeros lie as may fill a record."""
    return any(
        len(content := path.read_bytes()) % _ZEROS_LIKE_PADDING == 0
        and len(content) - len(content.rstrip(b"\0")) <= _ZEROS_LIKE_PADDING + 1024
        for path in folder.rglob("*.tar")
    ) and not Counter(found.images) - Counter(wanted.images)


def _bin(path: Path) -> Any:
    (pairs,) = PairFiles(path, _DECODER).pairs.values()
    return [_same({"": pairs.image(place, _DECODER)}) for place in range(len(pairs.encoded))], pairs.issame.tolist()


def _as_many(reading: Reading) -> Judgement:
    """Without a checksum: as many images and truth values as there were."""
    wanted, found = reading.wanted, reading.found
    if found != wanted and [len(part) for part in found] == [len(part) for part in wanted]:
        return "not promised", "data within an image that still decodes, or a truth value"
    return whole(reading)


def _weights(path: Path) -> Any:
    state = load_pytorch(path)
    return {name: (tuple(x.shape), str(x.dtype)) for name, x in state.items()}, _same(state)


def _legacy(reading: Reading) -> Judgement:
    """PyTorch's old format has no checksum."""
    if reading.found[1] != reading.wanted[1]:
        return "not promised", "weights in PyTorch's old format, which has no checksum"
    return whole(reading)


def _ijb(folder: Path) -> Any:
    (ijb,) = Ijb.find(folder)
    ijb.check()
    members = (ijb.files, _same({"t": ijb.template_ids, "m": ijb.media_ids, "l": ijb.landmarks, "f": ijb.faceness}))
    pairs = [np.stack(block).tolist() for block in ijb.pairs()]
    people = [(a.tolist(), b.tolist()) for a, b in (ijb.probes(), *map(ijb.gallery, GALLERIES["ijbc"]))]
    return members, pairs, people


_LINES = {
    "ijbc_face_tid_mid.txt": r"\s*\S+\s+[+-]?\d+\s+[+-]?\d+\s*",
    "ijbc_name_5pts_score.txt": r"\s*\S+(\s+[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?){11}\s*",
    "ijbc_template_pair_label.txt": r"\s*[+-]?\d+\s+[+-]?\d+\s+[+-]?[01]\s*|\s*#.*",
    "ijbc_1N_.*": r'"?\s*[+-]?\d+\s*"?,"?\s*[+-]?\d+\s*"?(,.*)?',
    "pairs.txt": r"[^\t]+\t[^\t]+\t[01]|.*\s\d+\s*|[\d\s]*",
}
"""Lines that are what they should be: another digit, or a line less, and no reader can see it."""


def _well_formed(reading: Reading) -> Judgement:
    """Lists have no checksum: one that is a list still is taken for what it says."""
    if reading.found == reading.wanted:
        return "right", ""
    for path in reading.folder.rglob("*.*"):
        line = next((line for name, line in _LINES.items() if re.fullmatch(name, path.name)), None)
        if line is None:
            continue
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
        for number, text in enumerate(lines[path.suffix == ".csv" :]):
            if text.strip() and not re.fullmatch(line, text.rstrip("\r"), re.IGNORECASE):
                return "silent", f"line {number} of {path.name} is {text!r}; it said {reading.said!r}"
    return "not promised", "a list that is one still"


def _pairs(folder: Path) -> Any:
    pairs = read_pairs(folder / "pairs.txt", folder / "faces")
    return [(*(os.path.relpath(path, folder) for path in pair[:2]), pair[2]) for pair in pairs]


def _images_bin(path: Path) -> None:
    images = [inputs.encoded(image, "PNG") for image in inputs.pixels().flatten(0, 1)]
    inputs.write_python2_bin(path, images, [place % 3 == 0 for place in range(len(images) // 2)])


FORMATS = (
    Format("code vectors", lambda at: inputs.vectors().save(at / "v.safetensors"),
           lambda at: _vectors(at / "v.safetensors", mmap=False), ["*"]),
    Format("code vectors, mapped", lambda at: inputs.vectors().save(at / "v.safetensors"),
           lambda at: _vectors(at / "v.safetensors", mmap=True), ["*"]),
    Format("identity codes", lambda at: inputs.codes().save(at / "c.safetensors"),
           lambda at: _codes(at / "c.safetensors"), ["*"]),
    Format("identities", lambda at: inputs.identities().save(at / "i.safetensors"),
           lambda at: _of(Identities.load(at / "i.safetensors")), ["*"]),
    Format("head", lambda at: inputs.write_head(at / "h.safetensors"), lambda at: _head(at / "h.safetensors"), ["*"]),
    Format("backbone", lambda at: inputs.write_backbone(at / "b.safetensors"),
           lambda at: _backbone(at / "b.safetensors"), ["*"]),
    Format("PyTorch's checkpoint", lambda at: inputs.write_pytorch(at / "b.pt"),
           lambda at: _weights(at / "b.pt"), ["*"]),
    Format("PyTorch's old checkpoint", lambda at: inputs.write_pytorch(at / "b.pt", archive=False),
           lambda at: _weights(at / "b.pt"), ["*"], _legacy),
    Format("unfinished work", lambda at: inputs.write_work(at / "o.partial"),
           lambda at: _work(at / "o.partial"), ["*"]),
    Format("settings.json", inputs.write_settings, _settings, ["*"]),
    Format("checkpoint", inputs.write_checkpoints, read_checkpoint, ["step-*/*"], _older),
    Format("journal", inputs.write_checkpoints, read_checkpoint, ["vectors/*"], _older),
    Format("RecordIO: .rec", lambda at: inputs.write_records(at / "data"), lambda at: _data(at / "data"),
           ["data/train.rec"], _told),
    Format("RecordIO without .idx", lambda at: (inputs.write_records(at / "data") / "train.idx").unlink(),
           lambda at: _data(at / "data"), ["data/train.rec"], _told),
    Format("RecordIO: .idx", lambda at: inputs.write_records(at / "data"), lambda at: _data(at / "data"),
           ["data/train.idx"], _told),
    Format("RecordIO: property, names", lambda at: inputs.write_records(at / "data"), lambda at: _data(at / "data"),
           ["data/property", "data/identities.txt"], _told),
    Format("tar shards", lambda at: inputs.write_shards(at / "data"), lambda at: _data(at / "data"),
           ["data/*.tar"], _told),
    Format("tar shards: names", lambda at: inputs.write_shards(at / "data"), lambda at: _data(at / "data"),
           ["data/identities.txt"], _told),
    Format("image folder", lambda at: inputs.write_folder(at / "data"), lambda at: _data(at / "data"),
           ["data/*/*"], _told),
    Format(".bin of Python 2", lambda at: _images_bin(at / "p.bin"), lambda at: _bin(at / "p.bin"), ["*"],
           _as_many),
    Format(".bin of Python 3", lambda at: inputs.write_python3_bin(at / "p.bin"), lambda at: _bin(at / "p.bin"),
           ["*.bin"], _as_many),
    Format(".bin of arrays", lambda at: inputs.write_array_bin(at / "p.bin"), lambda at: _bin(at / "p.bin"), ["*"],
           _as_many),
    Format("IJB's lists", lambda at: inputs.write_ijb(at / "ijb", "ijbc", GALLERIES["ijbc"]),
           lambda at: _ijb(at / "ijb"),
           ["ijb/meta/*"], _well_formed),
    Format("list of pairs", inputs.write_pairs, _pairs, ["pairs.txt"], _well_formed),
)  # fmt: skip
