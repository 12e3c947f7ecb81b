"""insightface's MobileFaceNets, "mbf" and "mbf_large": wider than the published one, under its tensors' names."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from gif.backbones.shapes import map_size

MobileName = Literal["mbf", "mbf_large"]
VARIANTS: dict[MobileName, tuple[tuple[int, int, int, int], int]] = {
    "mbf": ((1, 4, 6, 2), 2),
    "mbf_large": ((2, 8, 12, 4), 4),
}
"""Blocks in each of the four stages, and the factor of the widths."""
STEM_GROUPS, NARROW, WIDE, WIDEST = 64, 128, 256, 512  # groups of the depthwise convolutions, which no factor changes
HEAD = 512


class InsightFaceMobileNet(nn.Module):
    """Inverted residuals whose depthwise convolutions have a width of their own; the names are arcface_torch's.

    Args:
        blocks: in each stage; `VARIANTS` names the known ones.
        scale: factor of the widths 64 and 128 between the blocks.
        embedding_size: d of the output.
        channels: of the input image.
        image_size: height and width of the input, a multiple of 16.

    Input (B, channels, image_size, image_size) float, output (B, embedding_size), not normalised.

    Raises ValueError for an image size that is not a multiple of 16.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        scale: int,
        embedding_size: int = 512,
        channels: int = 3,
        image_size: int = 112,
    ) -> None:
        super().__init__()
        narrow, wide = 64 * scale, 128 * scale
        first = (
            _Convolution(narrow, narrow, 3, groups=STEM_GROUPS) if blocks[0] == 1 else _stage(narrow, NARROW, blocks[0])
        )
        self.layers = nn.ModuleList(
            [
                _Convolution(channels, narrow, 3, stride=2),
                first,
                _Bottleneck(narrow, narrow, NARROW, stride=2),
                _stage(narrow, NARROW, blocks[1]),
                _Bottleneck(narrow, wide, WIDE, stride=2),
                _stage(wide, WIDE, blocks[2]),
                _Bottleneck(wide, wide, WIDEST, stride=2),
                _stage(wide, WIDE, blocks[3]),
            ]
        )
        self.conv_sep = _Convolution(wide, HEAD, 1)
        self.features = _Layers(
            _Convolution(HEAD, HEAD, map_size(image_size), padding=0, groups=HEAD, active=False),
            nn.Flatten(),
            nn.Linear(HEAD, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.layers:
            x = layer(x)
        embeddings: Tensor = self.features(self.conv_sep(x))
        return embeddings


class _Layers(nn.Module):
    """Layers one after another, under the name that they have in the checkpoints."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class _Convolution(_Layers):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        active: bool = True,
    ) -> None:
        padding = size // 2 if padding is None else padding
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            *([nn.PReLU(outputs)] if active else []),
        )


class _Bottleneck(_Layers):
    def __init__(self, inputs: int, outputs: int, inner: int, *, stride: int = 1, residual: bool = False) -> None:
        super().__init__(
            _Convolution(inputs, inner, 1),
            _Convolution(inner, inner, 3, stride=stride, groups=inner),
            _Convolution(inner, outputs, 1, active=False),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.residual else y


def _stage(width: int, inner: int, count: int) -> _Layers:
    return _Layers(*(_Bottleneck(width, width, inner, residual=True) for _ in range(count)))
