"""Backbones in files. A saved one names itself, so that it can be loaded by its path alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from gif.backbones.config import BackboneConfig
from gif.backbones.iresnet import BLOCKS, WIDTHS
from gif.backbones.shapes import STRIDE
from gif.errors import InputError
from gif.files import existing_file, load_tensors, save_tensors
from gif.weights import load_pytorch

FORMAT = "gif.backbone/1"
PYTORCH_SUFFIXES = (".pt", ".pth")


def save_backbone(path: str | Path, backbone: nn.Module, config: BackboneConfig) -> None:
    """Write the weights, and how to build what they belong to, as safetensors, atomically."""
    save_tensors(path, backbone.state_dict(), format=FORMAT, config=json.dumps(asdict(config)))


def load_backbone(path: str | Path) -> tuple[nn.Module, BackboneConfig]:
    """Build and fill a backbone, in eval mode: what `save_backbone` wrote, or insightface's IResNet in a .pt file.

    Raises FileNotFoundError, or ValueError if the file is damaged, of another kind, or its weights do not fit.
    """
    if Path(path).suffix in PYTORCH_SUFFIXES:
        return load_insightface(path)
    tensors, metadata = load_tensors(path, format=FORMAT)
    try:
        config = BackboneConfig(**json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} names an unknown backbone ({error}); it is from a newer version") from error
    return _filled(path, config, tensors), config


def load_insightface(path: str | Path) -> tuple[nn.Module, BackboneConfig]:
    """Build and fill an IResNet from a state dict in PyTorch's format, as insightface's arcface_torch writes it.

    Depth, embedding size, channels and image size are read off the tensors. The way back is
    ``torch.save(network.state_dict(), path)``: the names are the same.

    Raises FileNotFoundError, or ValueError for a file that holds anything else.
    """
    path = existing_file(path)
    state = load_pytorch(path)
    if isinstance(state, dict):
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")  # saved from inside DDP
    if not isinstance(state, dict) or not {"conv1.weight", "fc.weight"} <= state.keys():
        raise InputError(f"{path} is no state dict of an IResNet; give one that insightface's arcface_torch wrote")
    config = _config_of(path, state)
    return _filled(path, config, state), config


def _config_of(path: Path, state: dict[str, Tensor]) -> BackboneConfig:
    blocks = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    name = next((name for name, known in BLOCKS.items() if known == blocks), None)
    if name is None:
        raise InputError(f"{path} has {blocks} blocks a stage; the known networks are {BLOCKS}")
    embedding_size, flat = state["fc.weight"].shape
    return BackboneConfig(
        name=name,
        embedding_size=embedding_size,
        channels=state["conv1.weight"].shape[1],
        image_size=STRIDE * math.isqrt(flat // WIDTHS[-1]),
    )


def _filled(path: str | Path, config: BackboneConfig, tensors: dict[str, Tensor]) -> nn.Module:
    backbone = config.build()
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the backbone it names ({error}); another version wrote it") from error
    return backbone.eval()
