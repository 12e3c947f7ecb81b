"""A backbone by name, as configs and the command line give it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn

from gif.backbones.insightface_mobile import VARIANTS, InsightFaceMobileNet, MobileName
from gif.backbones.insightface_vit import TRANSFORMERS, InsightFaceTransformer, TransformerName
from gif.backbones.iresnet import BLOCKS, IResNet, IResNetName
from gif.backbones.mobilefacenet import MobileFaceNet
from gif.backbones.small import SmallConvNet
from gif.backbones.vit import vision_transformer
from gif.errors import InputError

BackboneName = Literal["small", IResNetName, "mobilefacenet", MobileName, "vit", TransformerName]
"""The networks that `BackboneConfig` knows by name."""
Color = Literal["rgb", "bgr"]


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone to build.

    Whatever the name, it takes images (B, channels, image_size, image_size) in RGB and in [-1, 1], that is
    (x / 255 - 0.5) / 0.5, and gives embeddings (B, embedding_size) that are not normalised. For aligned faces set
    channels 3 and image_size 112; the defaults are for glyphs.

    Args:
        name: "small" is for small images; "iresnet18" to "iresnet2060" are insightface's R18 to R2060, "mbf" and
            "mbf_large" its MobileFaceNets, "vit_t" to "vit_h" its vision transformers, by its names; "mobilefacenet" is
            the published one, for phones; "vit" is a vision transformer of timm.
        embedding_size: d of its output.
        channels: of its input images.
        image_size: height and width of its input images.
        width: small: channels of its first stage.
        model: vit: its name in timm.
        dropout: iresnet: probability, before the last linear layer.
        color: the order of channels its weights are for. It is given RGB in either case, and one for "bgr" turns the
            channels round itself.

    Raises ValueError for an option that does not belong to the name, or "bgr" without three channels.
    """

    name: BackboneName = "small"
    embedding_size: int = 128
    channels: int = 1
    image_size: int = 32
    width: int = 24
    model: str = "vit_small_patch8_224"
    dropout: float = 0.0
    color: Color = "rgb"

    def __post_init__(self) -> None:
        for option, owner in (("width", "small"), ("model", "vit"), ("dropout", "iresnet")):
            default = next(entry.default for entry in fields(self) if entry.name == option)
            owns = self.name.startswith(owner) if owner == "iresnet" else self.name == owner
            if not owns and getattr(self, option) != default:
                raise InputError(f"backbone {self.name} does not use {option}; it is for {owner}")
        if self.color not in ("rgb", "bgr") or (self.color == "bgr" and self.channels != 3):
            raise InputError(f'color must be "rgb", or "bgr" with 3 channels, got {self.color!r} with {self.channels}')

    def build(self) -> nn.Module:
        """The backbone, with fresh weights.

        Raises ValueError for an unknown name or model, or an image size the network cannot take.
        """
        network = self._network()
        if self.color == "bgr":
            network.register_forward_pre_hook(_turn_channels)
        return network

    def _network(self) -> nn.Module:
        if self.name == "small":
            return SmallConvNet(self.embedding_size, self.channels, self.image_size, self.width)
        if self.name == "mobilefacenet":
            return MobileFaceNet(self.embedding_size, self.channels, self.image_size)
        if self.name in VARIANTS:
            blocks, scale = VARIANTS[self.name]
            return InsightFaceMobileNet(blocks, scale, self.embedding_size, self.channels, self.image_size)
        if self.name in TRANSFORMERS:
            kind = TRANSFORMERS[self.name]
            return InsightFaceTransformer(kind, self.embedding_size, self.channels, self.image_size)
        if self.name == "vit":
            return vision_transformer(self.model, self.embedding_size, self.channels, self.image_size)
        if self.name in BLOCKS:
            return IResNet(BLOCKS[self.name], self.embedding_size, self.channels, self.image_size, self.dropout)
        known = ("small", *BLOCKS, "mobilefacenet", *VARIANTS, "vit", *TRANSFORMERS)
        raise InputError(f"unknown backbone {self.name!r}; there are: {', '.join(known)}")


def _turn_channels(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
    (images,) = inputs
    return (images.flip(1),)
