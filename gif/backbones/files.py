"""Backbones in files. A saved one names itself, so that it can be loaded by its path alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gif.backbones.config import BackboneConfig
from gif.backbones.insightface import find_network, plain_names
from gif.data.decoding import Fit, ImageDecoder
from gif.data.identities import Identities
from gif.errors import InputError, in_short
from gif.files import existing_file, load_tensors, read_json, save_tensors
from gif.weights import load_pytorch

FORMAT = "gif.backbone/1"
HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"
IN_FOLDERS = (HUB_WEIGHTS, "best.safetensors", "backbone.safetensors", "gif/backbone.safetensors")
"""Where a folder may have its model: one for a hub, of `gif train`, of `gif run`."""
_TRAINED_ON = "trained_on"  # a tensor beside the weights
PYTORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin")
PYTORCH_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02")  # a zip archive, and a pickle as old versions wrote it


@dataclass(frozen=True, eq=False)
class TrainedOn:
    """Whom a backbone was trained on, as its file says.

    Args:
        digests: (m,) int64, the digest of each name (`Names.digests`).
        images: settings in which the images were decoded.
        data: the data set's name or path.
    """

    digests: Tensor
    images: dict[str, Any]
    data: str


def save_backbone(
    path: str | Path, backbone: nn.Module, config: BackboneConfig, *, trained_on: Identities | None = None
) -> None:
    """Write the weights, and how to build what they belong to, as safetensors, atomically.

    A backbone inside of torch.compile, DataParallel, DistributedDataParallel or an AveragedModel is written as if it
    were by itself. Of ``trained_on`` it holds a digest a name, 8 bytes: enough to tell whether somebody was among them.

    Raises ValueError unless the weights are those of a network that ``config`` builds.
    """
    state = plain_names(_unwrapped(backbone).state_dict())
    with torch.device("meta"):
        wanted = config.build().state_dict()
    shapes, given = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (wanted, state))
    if shapes != given:
        differ = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise InputError(
            f"the backbone is not what its config builds, a {config.name}: {len(differ)} weights differ, such as "
            f"{differ[0]} {given.get(differ[0], 'missing')}; give the config that it was built from"
        )
    metadata = {"config": json.dumps(asdict(config))}
    if trained_on is not None:
        state[_TRAINED_ON] = trained_on.names.digests()
        metadata |= trained_on.metadata()
    save_tensors(path, state, format=FORMAT, **metadata)


def model_file(path: str | Path) -> Path:
    """The file of a model: ``path`` itself, or the one in a folder that is a run, or made for a hub.

    Raises FileNotFoundError, ValueError for another folder.
    """
    path = Path(path)
    if not path.is_dir():
        return existing_file(path)
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} is a folder without a model.safetensors or backbone.safetensors; give a model's file")


def image_fit(path: str | Path) -> Fit:
    """How images are fitted to the model in a file: as those it was trained on, or as the folder of a hub says.

    Raises what `load_trained_on` does, and ValueError where that folder does not say it.
    """
    path = Path(path)
    trained_on, told = load_trained_on(path), path.with_name(HUB_CONFIG)
    if path.name == HUB_WEIGHTS and told.exists():
        try:
            fit: Fit = read_json(told)["preprocessing"]["fit"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{told} does not say how images are prepared; make the folder again") from error
        return fit
    return ImageDecoder.fit if trained_on is None else trained_on.images.get("fit", ImageDecoder.fit)


def fingerprint(backbone: nn.Module) -> str:
    """32 hexadecimal digits that follow from all weights and their names: the same in whichever file they are."""
    digest = hashlib.sha256()
    for name, values in sorted(plain_names(_unwrapped(backbone).state_dict()).items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def load_trained_on(path: str | Path) -> TrainedOn | None:
    """Whom the backbone in a file was trained on; None where the file does not say. Errors are `load_backbone`'s."""
    if _is_pytorch(existing_file(path)):
        return None
    tensors, metadata = load_tensors(path, format=FORMAT)
    if _TRAINED_ON not in tensors:
        return None
    try:
        images = json.loads(metadata["images"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} does not say how images were read ({error}); it is damaged") from error
    return TrainedOn(tensors[_TRAINED_ON], images, metadata.get("data", ""))


def load_backbone(path: str | Path) -> tuple[nn.Module, BackboneConfig]:
    """Build and fill a backbone, in eval mode: what `save_backbone` wrote, or PyTorch's file of an insightface IResNet.

    Raises FileNotFoundError, or ValueError if the file is damaged, of another kind, or its weights do not fit.
    """
    if _is_pytorch(existing_file(path)):
        return load_insightface(path)
    tensors, metadata = load_tensors(path, format=FORMAT)
    tensors.pop(_TRAINED_ON, None)
    try:
        config = BackboneConfig(**json.loads(metadata["config"]))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} names an unknown backbone ({error}); it is damaged, or from a newer version"
        ) from error
    return _filled(path, config, plain_names(tensors)), config


def load_insightface(path: str | Path) -> tuple[nn.Module, BackboneConfig]:
    """Build and fill a network from a checkpoint in PyTorch's format, as insightface's arcface_torch writes it.

    The file holds a state dict, or a mapping with one under some name (``state_dict_backbone``, ``state_dict``,
    ``model``). The names in it may have the prefixes of wrappers. Which network it is, embedding size, channels and
    image size are read off the tensors: an IResNet (r18 to r2060), a MobileFaceNet (mbf, mbf_large), a vision
    transformer (vit_t to vit_h; of names whose tensors are the same, the first). The way back is
    ``torch.save(network.state_dict(), path)``: the names are the same.

    Raises FileNotFoundError, or ValueError for a file that holds anything else.
    """
    path = existing_file(path)
    state, config = find_network(path, load_pytorch(path))
    return _filled(path, config, state), config


def _is_pytorch(path: Path) -> bool:
    """By what the file begins with; by its name where that says nothing, as in a damaged one."""
    with path.open("rb") as file:
        beginning = file.read(9)
    if beginning[8:] == b"{":  # safetensors: eight bytes, and JSON
        return False
    return beginning.startswith(PYTORCH_BEGINNINGS) or path.suffix in PYTORCH_SUFFIXES


def _unwrapped(module: nn.Module) -> nn.Module:
    """Take a module out of those that wrap it, each of which has it as an attribute."""
    inner = getattr(module, "_orig_mod", getattr(module, "module", None))
    return module if inner is None else _unwrapped(inner)


def _filled(path: str | Path, config: BackboneConfig, tensors: dict[str, Tensor]) -> nn.Module:
    try:
        backbone = config.build()
        backbone.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{path} does not fit the backbone it names ({in_short(error)}); another version wrote it"
        ) from error
    return backbone.eval()
