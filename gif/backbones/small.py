"""A small convolutional backbone: enough for glyphs on a laptop, with the shape of the large ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gif.backbones.shapes import map_size


class SmallConvNet(nn.Module):
    """Four residual stages, each halving the image, then one linear layer on the flattened map, as IResNet ends.

    Args:
        embedding_size: d of the output.
        channels: of the input image.
        image_size: height and width of the input, a multiple of 16.
        width: channels of the first stage; each later stage has more.

    Input (B, channels, image_size, image_size) float, output (B, embedding_size), not normalised.

    Raises ValueError for an image size that is not a multiple of 16.
    """

    def __init__(self, embedding_size: int = 128, channels: int = 1, image_size: int = 32, width: int = 24) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 6 * width)
        stages: list[nn.Module] = []
        inputs = channels
        for outputs in widths:
            stages += [_conv(inputs, outputs, stride=2), _Residual(outputs)]
            inputs = outputs
        self.features = nn.Sequential(*stages)
        flat = widths[-1] * map_size(image_size) ** 2
        self.embed = nn.Sequential(
            nn.Flatten(), nn.Linear(flat, embedding_size, bias=False), nn.BatchNorm1d(embedding_size)
        )
        self.embedding_size = embedding_size
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images.contiguous(memory_format=torch.channels_last))
        embeddings: Tensor = self.embed(features)
        return embeddings


def _conv(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.PReLU(outputs)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y
