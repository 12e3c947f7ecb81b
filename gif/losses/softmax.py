"""The softmax heads that GIFLoss is measured against: one centre an identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gif.errors import InputError
from gif.head import Head
from gif.losses.health import against_others
from gif_kernels import AngularMargin, checks, code_contrast_loss

DEVIATION = 0.01  # of a random centre's coordinates


class MarginSoftmax(nn.Module, Head):
    """Margin softmax over all identities (ArcFace, CosFace, SphereFace), or over a sample of them (Partial FC).

    Its weight, its gradient and its momentum are (m, d) each: what GIFLoss does without.

    Args:
        num_classes: m.
        embedding_size: d.
        margin: of the target logit.
        scale: s of the logits.
        sample_rate: share of the classes that take part in a step, in (0, 1]: the batch's own, and others at random
            (Partial FC; An et al., 2022). 1 is the full softmax.
        centers: directions (m, d) that the centres start from; random where None. All start with the same length.

    Raises ValueError for a sample rate outside (0, 1], or centres of another shape.
    """

    under_autocast = True  # it rounds the operands of its products, and nothing else

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        *,
        margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
        scale: float = 64.0,
        sample_rate: float = 1.0,
        centers: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 0 < sample_rate <= 1:
            raise InputError(f"sample_rate must lie in (0, 1], got {sample_rate}; 1 is the full softmax")
        self.num_classes = num_classes
        self.margin = margin
        self.scale = scale
        self.sample_rate = sample_rate
        self.weight = nn.Parameter(torch.normal(0.0, DEVIATION, (num_classes, embedding_size)))
        if centers is not None:
            checks.floating("centers", centers, self.weight.shape)
            length = DEVIATION * embedding_size**0.5
            self.weight.data.copy_(length * nn.functional.normalize(centers.float(), dim=1))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; -1 is ignored."""
        checks.floating("embeddings", embeddings, ("B", self.weight.shape[1]), finite=False)
        hint = "this softmax is over other classes (-1 marks a row to ignore)"
        labels = checks.integer("labels", labels, (len(embeddings),), low=-1, high=self.num_classes, hint=hint)
        if self.sample_rate == 1:
            return code_contrast_loss(embeddings, self.weight, labels, margin=self.margin, scale=self.scale)
        chosen = self._sample(labels)
        return code_contrast_loss(
            embeddings, self.weight[chosen], labels, candidates=chosen, margin=self.margin, scale=self.scale
        )

    def _sample(self, labels: Tensor) -> Tensor:
        """The batch's own classes and enough others, at random: (max(those, sample_rate m),) in order."""
        priority = torch.rand(self.num_classes, device=labels.device)
        own = labels[labels >= 0].unique()
        priority[own] = 2.0
        count = max(len(own), int(self.sample_rate * self.num_classes))
        return priority.topk(count).indices.sort().values

    @torch.no_grad()
    def health(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`gif.losses.health.against_others` of embeddings (B, d), among the centres of the batch's identities."""
        embeddings, labels = embeddings[labels >= 0], labels[labels >= 0].long()
        return against_others(embeddings, labels, self.weight[labels], labels)

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, {self.margin}, scale={self.scale}, sample_rate={self.sample_rate}"
