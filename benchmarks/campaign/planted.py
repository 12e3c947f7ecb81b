"""Code planted in every file that a reader opens: it touches a file, which must never come to be."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from io import BytesIO, StringIO
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.campaign import damaged, inputs
from benchmarks.campaign.formats import FORMATS, Format, Judgement, Reading, read_checkpoint
from benchmarks.campaign.records import Found, Kind
from gif import cli
from gif.encoders import CLIPEncoder, DINOEncoder
from gif.encoders.base import NetworkEncoder
from gif.errors import InputError
from gif.faults import BUG_CODE
from gif.progress import console
from gif.training.checkpoint import STATE

PART = "executions"
_FILES = 4  # of a format, in each of which all is planted
_TIMM, _CLIP = "test_vit.r160_in1k", "campaign-clip"  # of the smallest
_CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
Plant = Callable[[Path], bytes]


class Touch:
    """Touches a file where it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def _pickle(protocol: int) -> Plant:
    return lambda marker: pickle.dumps(Touch(Path.touch, marker), protocol)


def _by_name(marker: Path) -> bytes:
    """As Python 2 would."""
    return f"c__builtin__\nopen\n(V{marker}\nVw\ntR.".encode()


def _torch(archive: bool) -> Plant:
    def plant(marker: Path) -> bytes:
        file = BytesIO()
        torch.save({"conv1.weight": Touch(open, str(marker), "w")}, file, _use_new_zipfile_serialization=archive)
        return file.getvalue()

    return plant


def _numpy(marker: Path) -> bytes:
    file = BytesIO()
    np.save(file, np.array([Touch(open, str(marker), "w")], dtype=object), allow_pickle=True)
    return file.getvalue()


def _npz(marker: Path) -> bytes:
    file = BytesIO()
    np.savez(file, weights=np.array([Touch(open, str(marker), "w")], dtype=object))
    return file.getvalue()


def _yaml(marker: Path) -> bytes:
    return f'output: !!python/object/apply:builtins.open ["{marker}", "w"]\n'.encode()


PLANTS: dict[str, Plant] = {
    **{f"a pickle of protocol {protocol}": _pickle(protocol) for protocol in (0, 2, 4, 5)},
    "a pickle of Python 2": _by_name,
    "PyTorch's archive": _torch(True),
    "PyTorch's old format": _torch(False),
    "NumPy's array of objects": _numpy,
    "NumPy's archive of objects": _npz,
    "YAML with a constructor": _yaml,
}
WAYS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "instead": lambda _, plant: plant,
    "before": lambda content, plant: plant + content,
    "behind": lambda content, plant: content + plant,
}


def kinds(folder: Path) -> list[Kind]:
    """A kind a format, and those files that stand in for others."""
    readers = [*FORMATS, *OTHERS]
    return [
        Kind(
            PART,
            format.name,
            partial(_attempt, folder, format),
            _count(format, folder),
        )
        for format in readers
    ]


def write_all(folder: Path) -> None:
    """The files of the formats that are planted alone, each in a folder of its name."""
    for format in OTHERS:
        (place := folder / format.name).mkdir(parents=True)
        with console.capture():
            format.write(place)


def _count(format: Format, folder: Path) -> int:
    return len(PLANTS) * len(WAYS) * min(len(format.places(folder / format.name)), _FILES)


def _attempt(whole: Path, format: Format, number: int, _: Random, folder: Path) -> Found:
    wanted = damaged.undamaged(whole / format.name, format, folder)
    ways = list(product(format.places(folder)[:_FILES], WAYS, PLANTS))
    path, way, name = ways[number]
    marker = folder.with_name("executed")
    path.write_bytes(WAYS[way](path.read_bytes(), PLANTS[name](marker)))
    what = f"{name} {way} of {path.relative_to(folder)}"
    found = damaged.read(whole / format.name, format, folder, wanted, path, what)
    return replace(found, outcome="executed") if marker.exists() else found


def _write_old_checkpoints(folder: Path) -> None:
    """As version 1 kept them, by pickles."""
    inputs.write_checkpoints(folder)
    for place in folder.glob("step-*"):
        (place / STATE).rename(place / "progress.safetensors")
        (place / ".metadata").touch()


def _resume(folder: Path) -> str:
    """Old checkpoints are refused whatever is in them."""
    try:
        read_checkpoint(folder)
    except InputError as error:
        return str(error)
    return "it continues"


def _write_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("codes: none.safetensors\n")


def _end(folder: Path) -> bool:
    """Whether a command with a config ends otherwise than by a bug."""
    given, sys.argv = sys.argv, ["gif", "codes", "inspect", "--config", str(folder / "config.yaml")]
    try:
        with redirect_stderr(StringIO()):
            cli.main()
    except SystemExit as stop:
        return stop.code != BUG_CODE
    finally:
        sys.argv = given
    return True


def _no_bug(reading: Reading) -> Judgement:
    return ("refused", "") if reading.found else ("traceback", reading.said)


def _write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "weights.pt")
    save_file(state, folder / "weights.safetensors")


def _write_clip(folder: Path) -> None:
    import open_clip

    (folder.parent / f"{_CLIP}.json").write_text(json.dumps(_CLIP_CONFIG))
    open_clip.add_model_config(folder.parent / f"{_CLIP}.json")
    _write_weights(folder, open_clip.create_model(_CLIP).state_dict())


def _write_dino(folder: Path) -> None:
    import timm

    _write_weights(folder, timm.create_model(_TIMM, num_classes=7).state_dict())


def _names(encoder: Callable[[str, Path], NetworkEncoder], model: str, folder: Path) -> list[str]:
    return [encoder(model, path).name for path in sorted(folder.glob("weights.*"))]


OTHERS: tuple[Format, ...] = (
    Format("checkpoint of version 1", _write_old_checkpoints, _resume, ["step-*/*", "step-*/.*"]),
    Format("config of a command", _write_config, _end, ["*"], _no_bug),
    Format("weights of CLIP", _write_clip, partial(_names, CLIPEncoder, _CLIP), ["*"]),
    Format("weights of timm", _write_dino, partial(_names, DINOEncoder, _TIMM), ["*"]),
)
