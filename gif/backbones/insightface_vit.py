"""insightface's vision transformers, "vit_t" to "vit_h": every patch goes into the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gif.errors import InputError

TransformerName = Literal[
    "vit_t",
    "vit_t_dp005_mask0",
    "vit_s",
    "vit_s_dp005_mask_0",
    "vit_b",
    "vit_b_dp005_mask_005",
    "vit_l_dp005_mask_005",
    "vit_h",
]
PATCH = 9
HEADS = 8
MLP_RATIO = 4
_INITIAL_STD = 0.02
_NORM_EPS = 2e-5  # of the batch norms of the embedding


@dataclass(frozen=True)
class Transformer:
    """What one name stands for: width, depth; in training the chance to drop a block, and the share of masked patches.

    ``checkpointed``: blocks are computed anew in the backward pass of training, instead of keeping what they need.
    """

    width: int
    depth: int
    drop_path: float
    mask: float
    checkpointed: bool = False


TRANSFORMERS: dict[TransformerName, Transformer] = {
    "vit_t": Transformer(256, 12, 0.1, 0.1),
    "vit_t_dp005_mask0": Transformer(256, 12, 0.05, 0.0),
    "vit_s": Transformer(512, 12, 0.1, 0.1),
    "vit_s_dp005_mask_0": Transformer(512, 12, 0.05, 0.0),
    "vit_b": Transformer(512, 24, 0.1, 0.1, checkpointed=True),
    "vit_b_dp005_mask_005": Transformer(512, 24, 0.05, 0.05, checkpointed=True),
    "vit_l_dp005_mask_005": Transformer(768, 24, 0.05, 0.05, checkpointed=True),
    "vit_h": Transformer(1024, 48, 0.1, 0.0, checkpointed=True),
}
"""arcface_torch's names. Those that differ in training alone have the same tensors."""


class InsightFaceTransformer(nn.Module):
    """Patches of 9 x 9 pixels, attention, and a linear layer on all patches together; the names are arcface_torch's.

    In training a share of the patches is left out of the blocks, and a learnt token stands in their places at the end.

    Args:
        kind: width, depth and what training drops.
        embedding_size: d of the output.
        channels: of the input image.
        image_size: height and width of the input; what is beyond a multiple of 9 is not looked at.

    Input (B, channels, image_size, image_size) float, output (B, embedding_size), not normalised. Norms and the
    attention's softmax stay float32 under autocast.

    Raises ValueError for an image without a whole patch.
    """

    def __init__(self, kind: Transformer, embedding_size: int = 512, channels: int = 3, image_size: int = 112) -> None:
        super().__init__()
        if image_size < PATCH:
            raise InputError(f"image_size must be at least {PATCH}, a patch, got {image_size}; resize the images")
        width, patches = kind.width, (image_size // PATCH) ** 2
        self.mask, self.checkpointed = kind.mask, kind.checkpointed
        self.patch_embed = _Patches(channels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        drops = torch.linspace(0, kind.drop_path, kind.depth).tolist()
        self.blocks = nn.ModuleList(_Block(width, drop) for drop in drops)
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * patches, width, bias=False),
            nn.BatchNorm1d(width, eps=_NORM_EPS),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=_NORM_EPS),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=_INITIAL_STD)
        nn.init.trunc_normal_(self.pos_embed, std=_INITIAL_STD)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed  # (B, patches, width)
        masks = self.training and self.mask > 0
        if masks:
            order = torch.rand(x.shape[:2], device=x.device).argsort(1)
            kept = order[:, : int(x.shape[1] * (1 - self.mask)), None].expand(-1, -1, x.shape[2])
            every, x = x, x.gather(1, kept)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed and self.training else block(x)
        x = self.norm(x.float())
        if masks:
            x = self.mask_token.to(x.dtype).expand_as(every).scatter(1, kept, x)
        embeddings: Tensor = self.feature(x.flatten(1))
        return embeddings


class _Patches(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.relu6(self.fc1(x)))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        """The branch, in training 0 for some images at random, and larger for the others (stochastic depth)."""
        if not self.training or self.drop == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop
        return branch * (kept / (1 - self.drop)).to(branch.dtype)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, patches, width / heads)
        if q.dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return y
