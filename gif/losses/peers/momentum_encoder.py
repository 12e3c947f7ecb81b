"""What the peers share whose class weights come from a momentum encoder: the encoder, and the two halves of a batch."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.distributed import gather_rows, rank
from gif.errors import InputError
from gif.head import Head
from gif.losses.peers.finite import finite_rows
from gif_kernels import checks
from gif_kernels.runs import occurrences

PAIR = 2


class MomentumEncoder(nn.Module):
    """A copy of a backbone that follows it: theta' <- momentum theta' + (1 - momentum) theta. It has no gradient.

    Batch normalisation takes the statistics of its own batch, as in training.
    """

    def __init__(self, backbone: nn.Module, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise InputError(f"momentum must lie in [0, 1], got {momentum}; 0 copies the backbone before each step")
        self.momentum = momentum
        self.network = copy.deepcopy(backbone).requires_grad_(False)

    @torch.no_grad()
    def follow(self, backbone: nn.Module) -> None:
        """Take a step towards the backbone."""
        for own, its in zip(self.network.parameters(), backbone.parameters(), strict=True):
            own.lerp_(its, 1 - self.momentum)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Unit features (B, d) float32 of images (B, c, h, w)."""
        return normalize(finite_rows(self.network(images)), dim=1)


class HeadWithEncoder(nn.Module, Head):
    """A head whose class weights are a momentum encoder's features of other images of the batch's identities.

    A batch has two halves: of the images of an identity that stand in it, the first, third, ... are in the first half
    and the others in the second. Each half is classified by weights that the encoder made from the other, so no image
    is its own target; an image whose identity has no other in the batch stands in the first half.

    Training calls `before_step` and then the loss of the same rows, whole or in parts (`gif.training.train` does).
    """

    under_autocast = True  # it rounds the operands of its products, and nothing else
    group_size = PAIR

    def __init__(self, num_classes: int, backbone: nn.Module, embedding_size: int, momentum: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.encoder = MomentumEncoder(backbone, momentum)
        self._labels = torch.empty(0, dtype=torch.int64)
        self._halves = torch.empty(0, dtype=torch.bool)

    @torch.no_grad()
    def before_step(self, backbone: nn.Module, views: Callable[[], Tensor], labels: Tensor) -> None:
        """Let the encoder follow ``backbone``, and give its features of all processes' images to `receive`."""
        labels = self._checked(labels, len(labels))
        self.encoder.follow(backbone)
        features, identities = gather_rows(self.encoder(views())), gather_rows(labels)
        halves = occurrences(identities) % PAIR == 1
        begin = int(gather_rows(labels.new_tensor([len(labels)]))[: rank()].sum())
        self._labels, self._halves = labels, halves[begin : begin + len(labels)]
        known = identities >= 0
        self.receive(features[known], identities[known], halves[known])

    @abstractmethod
    def receive(self, features: Tensor, identities: Tensor, halves: Tensor) -> None:
        """Take the encoder's features (B, d) of all processes' images, whose ``identities`` and ``halves`` are (B,)."""

    def next_rows(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The labels (B,) int64 and halves (B,) bool of the next rows of the batch that `before_step` has seen.

        Raises ValueError where they are others.
        """
        checks.floating("embeddings", embeddings, ("B", self.embedding_size), finite=False)
        labels = self._checked(labels, len(embeddings))
        count = len(labels)
        if not torch.equal(labels, self._labels[:count]):
            raise InputError(
                "these are not the rows of the step that has begun; before each step call "
                "head.before_step(backbone, views, labels), and then the loss of the same rows in the same order"
            )
        halves = self._halves[:count]
        self._labels, self._halves = self._labels[count:], self._halves[count:]
        return labels, halves

    def _checked(self, labels: Tensor, count: int) -> Tensor:
        hint = "this head is for other classes (-1 marks a row to ignore)"
        return checks.integer("labels", labels, (count,), low=-1, high=self.num_classes, hint=hint)
