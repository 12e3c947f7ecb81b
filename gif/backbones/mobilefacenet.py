"""MobileFaceNet: about a million parameters, for phones (Chen et al., 2018, table 1)."""

from __future__ import annotations

from torch import Tensor, nn

from gif.backbones.shapes import map_size

STEM = 64
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
"""Expansion, width, how many, and stride of the first: the paper's t, c, n, s."""
HEAD = 512


class MobileFaceNet(nn.Module):
    """Inverted residuals, then a depthwise convolution of the whole map and one linear layer.

    Args:
        embedding_size: d of the output.
        channels: of the input image.
        image_size: height and width of the input, a multiple of 16.

    Input (B, channels, image_size, image_size) float, output (B, embedding_size), not normalised.

    Raises ValueError for an image size that is not a multiple of 16.
    """

    def __init__(self, embedding_size: int = 128, channels: int = 3, image_size: int = 112) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(channels, STEM, 3, stride=2), _conv(STEM, STEM, 3, groups=STEM)]
        inputs = STEM
        for expansion, outputs, count, stride in BOTTLENECKS:
            for place in range(count):
                layers.append(_Bottleneck(inputs, outputs, expansion, 1 if place else stride))
                inputs = outputs
        layers.append(_conv(inputs, HEAD, 1))
        self.layers = nn.Sequential(*layers)
        self.embed = nn.Sequential(
            nn.Conv2d(HEAD, HEAD, map_size(image_size), groups=HEAD, bias=False),
            nn.BatchNorm2d(HEAD),
            nn.Flatten(),
            nn.Linear(HEAD, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.embed(self.layers(images))
        return embeddings


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.body = nn.Sequential(
            _conv(inputs, inner, 1),
            _conv(inner, inner, 3, stride=stride, groups=inner),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def _conv(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.PReLU(outputs),
    )
