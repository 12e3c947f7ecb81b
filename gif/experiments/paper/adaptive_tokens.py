"""Weights of a code's tokens that training finds, beside the patterns that are given: what the paper did not try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gif.errors import InputError
from gif.head import Head
from gif.losses import GIFLoss, HeadConfig
from gif_kernels import token_margin_loss

Adaptive = Literal["learned", "difficulty"]
MEMORY = 0.98  # of the running mean of a token's loss, a step


class AdaptiveTokens(nn.Module, Head):
    """L_C = sum_j lambda_j CE_j of a `GIFLoss`, with weights lambda, of sum 1, that follow the tokens' losses.

    - "learned" weighs by uncertainty (Kendall et al., CVPR 2018): with a parameter s_j a token it minimises
      sum_j exp(-s_j) CE_j + s_j in s, and lambda_j ~ exp(-s_j). At rest lambda_j ~ 1 / CE_j: easy tokens weigh most.
    - "difficulty" takes lambda_j ~ the running mean of CE_j: hard tokens weigh most.

    Embeddings and centres get the gradient of sum_j lambda_j CE_j.

    Args:
        codes: a loss with L_C alone.
        adaptive: which of the two.

    Raises ValueError for a loss that has other terms.
    """

    under_autocast = True

    def __init__(self, codes: GIFLoss, adaptive: Adaptive) -> None:
        super().__init__()
        if codes.recipe.needs_vectors:
            raise InputError("token weights are compared with L_C alone; give a loss without regression and contrast")
        self.codes = codes
        self.adaptive = adaptive
        length = codes.codes.length
        self.log_losses = nn.Parameter(torch.zeros(length), requires_grad=adaptive == "learned")
        self.register_buffer("mean_losses", torch.ones(length))
        self.mean_losses: Tensor

    @property
    def token_weights(self) -> Tensor:
        """lambda (l,) as it is now."""
        if self.adaptive == "learned":
            return (-self.log_losses.detach()).softmax(0)
        return self.mean_losses / self.mean_losses.sum()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,)."""
        losses = self.token_losses(embeddings, labels)
        known = losses.detach()
        if self.training and torch.is_grad_enabled():
            self.mean_losses.lerp_(known, 1 - MEMORY)
        loss = (self.token_weights * losses).sum()
        if self.adaptive == "learned":
            own = ((-self.log_losses).exp() * known + self.log_losses).mean()
            loss = loss + own - own.detach()  # its gradient alone: the loss that is shown is the weighted one
        return loss

    def token_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """CE_j, the mean over the batch of each token's loss, (l,)."""
        codes, tokens = self.codes, self.codes.codes.lookup(labels).to(embeddings.device)
        losses = []
        for place in range(codes.codes.length):
            one = slice(place, place + 1)
            losses.append(
                token_margin_loss(
                    embeddings,
                    codes.centers[one],
                    tokens[:, one],
                    projections=None if codes.projections is None else codes.projections[one],
                    margin=codes.recipe.margin,
                    scale=codes.recipe.scale,
                )
            )
        return torch.stack(losses)

    def health(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Those of the codes."""
        return self.codes.health(embeddings, labels)


@dataclass(frozen=True)
class LearnedTokens(HeadConfig):
    """A head of kind "gif" with L_C alone, whose token weights are learned."""

    adaptive: ClassVar[Adaptive] = "learned"

    def build(self, *arguments: Any, **options: Any) -> nn.Module:
        codes = super().build(*arguments, **options)
        assert isinstance(codes, GIFLoss)  # of its kind
        return AdaptiveTokens(codes, self.adaptive)


@dataclass(frozen=True)
class DifficultTokens(LearnedTokens):
    """The same with weights in proportion to the tokens' losses."""

    adaptive: ClassVar[Adaptive] = "difficulty"
