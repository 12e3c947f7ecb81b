"""Dynamic Class Queue."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gif.errors import InputError
from gif.losses.peers.momentum_encoder import HeadWithEncoder
from gif_kernels import AngularMargin, checks, code_contrast_loss


class DynamicClassQueue(HeadWithEncoder):
    """Margin softmax over class weights made on the fly and kept in a queue (Li et al., CVPR 2021, arXiv 2105.11113).

    The weight of a class is the momentum encoder's feature of another image of it::

        w_y    = normalise(f'(x'_y)),   theta' <- momentum theta' + (1 - momentum) theta
        loss_i = CE(scale psi(zhat_i . w_k), y_i)   over k = the batch's classes and those in the queue

    psi is the margin at k = y_i, as in a softmax. The weights of each batch are queued, and the oldest leave. A class
    that stands in the queue more than once counts once, by its newest weight: the authors' program counts each, and
    leaves out those of the own class. The weight of an image is made from the other image of its pair, and vice versa;
    of an image alone in the batch it is made from that image, augmented anew. Labels are never outside of the queue:
    the batch's own weights join it before the loss.

    Cost of a step: a second forward pass of the backbone without gradients, and B x queue_size products. The queue is
    (queue_size, d) and the encoder as large as the backbone; nothing depends on the number of identities m, unless the
    queue is made a share of it: the paper's is a tenth of m.

    Several processes share one queue, which gets the weights of all; batch normalisation in the encoder sees each
    process's own images, in order, where the authors shuffle them between processes.

    Args:
        num_classes: m, for which labels are checked.
        backbone: what is trained; its weights at this moment are the encoder's first.
        embedding_size: d.
        queue_size: weights in the queue; the authors take 8,192 for MS1MV2's 85,742 classes.
        momentum: of the encoder. 0.999 is for runs of hundreds of thousands of steps: of 1,000 steps the encoder would
            remember its random start by 0.37.
        margin: psi, of the target logit.
        scale: s of the logits.

    Raises ValueError for a queue smaller than a batch, or a number out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: nn.Module,
        embedding_size: int = 512,
        *,
        queue_size: int = 8192,
        momentum: float = 0.999,
        margin: AngularMargin = AngularMargin(m2=0.0, m3=0.3),  # noqa: B008 (frozen)
        scale: float = 50.0,
    ) -> None:
        super().__init__(num_classes, backbone, embedding_size, momentum)
        checks.positive("queue_size", queue_size)
        self.margin = margin
        self.scale = scale
        self.register_buffer("weights", torch.zeros(queue_size, embedding_size))
        self.register_buffer("identities", torch.full((queue_size,), -1))
        self.register_buffer("next_slot", torch.zeros((), dtype=torch.int64))
        self.weights: Tensor
        self.identities: Tensor
        self.next_slot: Tensor
        self._fresh = (self.weights[:0], self.identities[:0], self.identities[:0] < 0)

    def receive(self, features: Tensor, identities: Tensor, halves: Tensor) -> None:
        """Queue the features, in the places of the oldest."""
        size = len(self.identities)
        if len(features) > size:
            raise InputError(
                f"a batch has {len(features)} images and the queue {size} places; give a queue_size of at least that"
            )
        places = (self.next_slot + torch.arange(len(features), device=features.device)) % size
        self.weights[places] = features
        self.identities[places] = identities
        self.next_slot.copy_((self.next_slot + len(features)) % size)
        self._fresh = features, identities, halves

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; -1 is ignored."""
        labels, halves = self.next_rows(embeddings, labels)
        loss = embeddings[labels < 0].sum(dtype=torch.float32) * 0  # differentiable where every row is ignored
        for half in (False, True):
            rows = (halves == half) & (labels >= 0)
            weights, identities = self._candidates(half)
            if len(identities):
                loss = loss + code_contrast_loss(
                    embeddings[rows],
                    weights,
                    labels[rows],
                    candidates=identities,
                    margin=self.margin,
                    scale=self.scale,
                    reduction="sum",
                )
        return loss / (labels >= 0).sum().clamp(min=1)

    def _candidates(self, half: bool) -> tuple[Tensor, Tensor]:
        """Class weights (C, d) and identities (C,): those of the batch's other half, then the queue, newest first."""
        features, identities, halves = self._fresh
        size = len(self.identities)
        places = (self.next_slot - 1 - torch.arange(size, device=self.identities.device)) % size
        places = places[self.identities[places] >= 0]
        others = halves != half
        return (
            torch.cat([features[others], self.weights[places]]),
            torch.cat([identities[others], self.identities[places]]),
        )

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, queue of {len(self.identities)}, {self.margin}, scale={self.scale}"
