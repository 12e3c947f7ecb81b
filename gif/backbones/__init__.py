"""Backbones: images to embeddings. A saved backbone names itself, so that it can be loaded by its path alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from gif.backbones.small import SmallConvNet
from gif.files import load_tensors, save_tensors

__all__ = ["BackboneConfig", "SmallConvNet", "load_backbone", "save_backbone"]

FORMAT = "gif.backbone/1"


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone to build.

    Args:
        name: "small", a convolutional network for small images.
        embedding_size: d of its output.
        channels: of its input images.
        image_size: height and width of its input images.
        width: channels of its first stage.
    """

    name: Literal["small"] = "small"
    embedding_size: int = 128
    channels: int = 1
    image_size: int = 32
    width: int = 24

    def build(self) -> nn.Module:
        """The backbone, with fresh weights."""
        return SmallConvNet(self.embedding_size, self.channels, self.image_size, self.width)


def save_backbone(path: str | Path, backbone: nn.Module, config: BackboneConfig) -> None:
    """Write the weights, and how to build what they belong to, as safetensors, atomically."""
    save_tensors(path, backbone.state_dict(), format=FORMAT, config=json.dumps(asdict(config)))


def load_backbone(path: str | Path) -> tuple[nn.Module, BackboneConfig]:
    """Build and fill the backbone that `save_backbone` wrote, in eval mode.

    Raises FileNotFoundError, or ValueError if the file is damaged, of another kind, or its weights do not fit.
    """
    tensors, metadata = load_tensors(path, format=FORMAT)
    config = BackboneConfig(**json.loads(metadata["config"]))
    backbone = config.build()
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the backbone it names ({error}); it was written by another version"
        ) from error
    return backbone.eval(), config
