"""IResNet: the residual network most published face-recognition numbers are measured with.

The names and shapes of the state dict are insightface's (arcface_torch), so that weights go from one to the other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gif.backbones.shapes import map_size

IResNetName = Literal["iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet200", "iresnet2060"]
BLOCKS: dict[IResNetName, tuple[int, int, int, int]] = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
    "iresnet2060": (3, 128, 896, 3),
}
"""Residual blocks in each of the four stages."""

WIDTHS = (64, 128, 256, 512)
_CONV_STD = 0.1  # of the convolutions' initial weights: the published recipes start there


class IResNet(nn.Module):
    """Four stages of residual blocks, each halving the image, then dropout and one linear layer on the flattened map.

    Args:
        blocks: in each stage; `BLOCKS` names the usual ones.
        embedding_size: d of the output.
        channels: of the input image.
        image_size: height and width of the input, a multiple of 16.
        dropout: probability, before the linear layer.

    Input (B, channels, image_size, image_size) float, output (B, embedding_size), not normalised; the last batch norm
    has no scale to learn. Under autocast the linear layer and that norm stay in float32.

    Raises ValueError for an image size that is not a multiple of 16.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        embedding_size: int = 512,
        channels: int = 3,
        image_size: int = 112,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        stem = WIDTHS[0]
        self.conv1 = _conv3x3(channels, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.prelu = nn.PReLU(stem)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(inputs, outputs, count)
            for inputs, outputs, count in zip((stem, *WIDTHS), WIDTHS, blocks, strict=False)
        )
        self.bn2 = nn.BatchNorm2d(WIDTHS[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(WIDTHS[-1] * map_size(image_size) ** 2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=_CONV_STD)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x).flatten(1))
        with torch.autocast(x.device.type, enabled=False):
            embeddings: Tensor = self.features(self.fc(x.to(self.fc.weight.dtype)))
        return embeddings


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = _conv3x3(outputs, outputs, stride)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + self.downsample(x)


def _stage(inputs: int, outputs: int, count: int) -> nn.Sequential:
    return nn.Sequential(_Block(inputs, outputs, 2), *(_Block(outputs, outputs, 1) for _ in range(count - 1)))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
