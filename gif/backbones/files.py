"""Backbones in files. A saved one names itself, so that it can be loaded by its path alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gif.backbones.config import BackboneConfig
from gif.backbones.iresnet import BLOCKS, WIDTHS
from gif.backbones.shapes import STRIDE
from gif.data.identities import Identities
from gif.errors import InputError, in_short
from gif.files import existing_file, load_tensors, save_tensors
from gif.weights import load_pytorch

FORMAT = "gif.backbone/1"
_TRAINED_ON = "trained_on"  # a tensor beside the weights
PYTORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin")
PYTORCH_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02")  # a zip archive, and a pickle as old versions wrote it
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DataParallel and DistributedDataParallel, torch.compile, FSDP and checkpointing put into parameters' names."""
FIRST_CONVOLUTION, LAST_LAYER = "conv1.weight", "fc.weight"  # of an IResNet


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
    state = _plain(_unwrapped(backbone).state_dict())
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


def fingerprint(backbone: nn.Module) -> str:
    """32 hexadecimal digits that follow from all weights and their names: the same in whichever file they are."""
    digest = hashlib.sha256()
    for name, values in sorted(_plain(_unwrapped(backbone).state_dict()).items()):
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
    return _filled(path, config, _plain(tensors)), config


def load_insightface(path: str | Path) -> tuple[nn.Module, BackboneConfig]:
    """Build and fill an IResNet from a checkpoint in PyTorch's format, as insightface's arcface_torch writes it.

    The file holds a state dict, or a mapping with one under some name (``state_dict_backbone``, ``state_dict``,
    ``model``). The names in it may have the prefixes of wrappers. Depth, embedding size, channels and image size are
    read off the tensors. The way back is ``torch.save(network.state_dict(), path)``: the names are the same.

    Raises FileNotFoundError, or ValueError for a file that holds anything else.
    """
    path = existing_file(path)
    stored = load_pytorch(path)
    state = _iresnet_in(stored)
    if state is None:
        raise InputError(
            f"{path} is no state dict of an IResNet, and holds none; give one that insightface's arcface_torch wrote"
        )
    config = _config_of(path, state)
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


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose names have no wrapper in them, at the beginning or within."""
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): x for name, x in state.items()}


def _iresnet_in(stored: object) -> dict[str, Tensor] | None:
    """The IResNet's state dict in what a file holds: that itself, or the first of its values that has one."""
    if not isinstance(stored, Mapping):
        return None
    tensors = _plain({name: x for name, x in stored.items() if isinstance(name, str) and isinstance(x, Tensor)})
    outer = [name.removesuffix(LAST_LAYER) for name in tensors if f".{name}".endswith(f".{LAST_LAYER}")]
    for prefix in sorted(outer, key=len):  # of an attribute that the network was, as "backbone." or "model."
        if f"{prefix}{FIRST_CONVOLUTION}" in tensors:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    found = (_iresnet_in(value) for value in stored.values())
    return next((state for state in found if state is not None), None)


def _config_of(path: Path, state: dict[str, Tensor]) -> BackboneConfig:
    blocks = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    name = next((name for name, known in BLOCKS.items() if known == blocks), None)
    if name is None:
        raise InputError(f"{path} has {blocks} blocks a stage; the known networks are {BLOCKS}")
    last, first = state[LAST_LAYER].shape, state[FIRST_CONVOLUTION].shape
    if len(last) != 2 or len(first) != 4:
        raise InputError(f"{path} does not fit an IResNet: {LAST_LAYER} is {tuple(last)}, the first {tuple(first)}")
    return BackboneConfig(
        name=name,
        embedding_size=last[0],
        channels=first[1],
        image_size=STRIDE * math.isqrt(last[1] // WIDTHS[-1]),
    )


def _filled(path: str | Path, config: BackboneConfig, tensors: dict[str, Tensor]) -> nn.Module:
    try:
        backbone = config.build()
        backbone.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{path} does not fit the backbone it names ({in_short(error)}); another version wrote it"
        ) from error
    return backbone.eval()
