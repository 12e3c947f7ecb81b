"""The margin softmax that GIFLoss is measured against: one centre an identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gif.head import Head
from gif.losses.health import against_others
from gif_kernels import AngularMargin, checks, code_contrast_loss

DEVIATION = 0.01  # of a random centre's coordinates


class MarginSoftmax(nn.Module, Head):
    """Margin softmax over all identities (ArcFace, CosFace, SphereFace); `PartialFC` is that over a sample of them.

    Its weight, its gradient and its momentum are (m, d) each: what GIFLoss does without.

    Args:
        num_classes: m.
        embedding_size: d.
        margin: of the target logit.
        scale: s of the logits.
        centers: directions (m, d) that the centres start from; random where None. All start with the same length.

    Raises ValueError for centres of another shape.
    """

    under_autocast = True  # it rounds the operands of its products, and nothing else

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        *,
        margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
        scale: float = 64.0,
        centers: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(first_centers(num_classes, embedding_size, centers))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; -1 is ignored."""
        checks.floating("embeddings", embeddings, ("B", self.weight.shape[1]), finite=False)
        hint = "this softmax is over other classes (-1 marks a row to ignore)"
        labels = checks.integer("labels", labels, (len(embeddings),), low=-1, high=self.num_classes, hint=hint)
        return code_contrast_loss(embeddings, self.weight, labels, margin=self.margin, scale=self.scale)

    @torch.no_grad()
    def health(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`gif.losses.health.against_others` of embeddings (B, d), among the centres of the batch's identities."""
        embeddings, labels = embeddings[labels >= 0], labels[labels >= 0].long()
        return against_others(embeddings, labels, self.weight[labels], labels)

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, {self.margin}, scale={self.scale}"


def first_centers(num_classes: int, embedding_size: int, directions: Tensor | None) -> Tensor:
    """What centres (m, d) start from: random ones, or ``directions`` (m, d) at the length of random ones.

    Raises TypeError or ValueError where the directions are not (m, d) finite floating point.
    """
    centers = torch.empty(num_classes, embedding_size).normal_(
        0.0, DEVIATION
    )  # on the default device, unlike torch.normal
    if directions is None:
        return centers
    checks.floating("centers", directions, centers.shape)
    return centers.copy_(DEVIATION * embedding_size**0.5 * nn.functional.normalize(directions.float(), dim=1))
