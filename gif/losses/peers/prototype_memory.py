"""Prototype Memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.distributed import gather_rows
from gif.errors import InputError
from gif.head import Head
from gif.losses.peers.finite import finite_rows
from gif.losses.peers.pool import Places
from gif_kernels import AngularMargin, checks, code_contrast_loss


class PrototypeMemory(nn.Module, Head):
    """Margin softmax over prototypes of recent classes (Smirnov et al., IEEE Access 2022, arXiv 2105.02103).

    A batch holds several images of a class, side by side in an epoch's order. Their mean is its prototype, made without
    gradient before the loss::

        e_y    = normalise(mean of zhat_i over the batch's images of y)
        p_y    = e_y where y is not in the memory, else normalise((1 - refresh) p_y + refresh e_y)
        loss_i = CE(scale psi(zhat_i . p_k), y_i)   over the classes k in the memory

    New and refreshed prototypes are the newest, and the oldest leave. Labels are never outside of the memory. An image
    whose class has no other in the batch, and is new, is its own prototype: it is pushed off the others and pulled
    nowhere. Choosing a batch's classes by which prototypes are alike is left out: the order of images is what it is for
    every head.

    Cost of a step: B x memory_size products; the memory is (memory_size, d). Nothing depends on the number of
    identities m, and there is no second forward pass.

    Several processes share one memory, which gets the embeddings of all.

    Args:
        num_classes: m, for which labels are checked.
        embedding_size: d.
        memory_size: prototypes in the memory; at least the classes of a batch.
        group_size: images of a class side by side in an epoch's order; of a class that has fewer, all.
        refresh: what a class that is in the memory takes of its new prototype, in (0, 1]; 1 replaces the old one.
        margin: psi, of the target logit.
        scale: s of the logits.

    Written from the paper's abstract: how a prototype is refreshed, and that it takes no gradient, are this library's
    reading of it, and sizes, refresh, margin and scale its own defaults.

    Raises ValueError for a memory smaller than a batch's classes, or a number out of its range.
    """

    under_autocast = True  # it rounds the operands of its products, and nothing else

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        *,
        memory_size: int = 8192,
        group_size: int = 4,
        refresh: float = 0.5,
        margin: AngularMargin = AngularMargin(m2=0.0, m3=0.4),  # noqa: B008 (frozen)
        scale: float = 64.0,
    ) -> None:
        super().__init__()
        if not 0 < refresh <= 1:
            raise InputError(f"refresh must lie in (0, 1], got {refresh}; 1 replaces a prototype by the batch's")
        checks.positive("memory_size", memory_size)
        checks.positive("group_size", group_size)
        self.num_classes = num_classes
        self.group_size = group_size
        self.refresh = refresh
        self.margin = margin
        self.scale = scale
        empty = Places.empty(memory_size)
        self.register_buffer("prototypes", torch.zeros(memory_size, embedding_size))
        self.register_buffer("identities", empty.identities)
        self.register_buffer("used", empty.used)
        self.prototypes: Tensor
        self.identities: Tensor
        self.used: Tensor

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; -1 is ignored.

        In training the memory is brought up to date first; otherwise identities that are not in it are ignored.
        """
        checks.floating("embeddings", embeddings, ("B", self.prototypes.shape[1]), finite=False)
        hint = "this memory is for other classes (-1 marks a row to ignore)"
        labels = checks.integer("labels", labels, (len(embeddings),), low=-1, high=self.num_classes, hint=hint)
        if self.training:
            self._refresh(gather_rows(finite_rows(embeddings)), gather_rows(labels))
        held = self.identities >= 0
        if not bool(held.any()):
            return embeddings.sum(dtype=torch.float32) * 0
        places = Places(self.identities, self.used)
        return code_contrast_loss(
            embeddings,
            self.prototypes[held],
            torch.where(places.find(labels) >= 0, labels, -1),
            candidates=self.identities[held],
            margin=self.margin,
            scale=self.scale,
        )

    @torch.no_grad()
    def _refresh(self, embeddings: Tensor, labels: Tensor) -> None:
        """Bring the memory up to date with the embeddings (B, d) of all processes."""
        embeddings, labels = embeddings[labels >= 0], labels[labels >= 0]
        if len(labels) == 0:
            return
        places, where, new = Places(self.identities, self.used).take(labels)
        sums = torch.zeros_like(self.prototypes).index_add_(0, where, normalize(embeddings, dim=1))
        here = where.unique()
        means = normalize(sums[here], dim=1)
        is_new = torch.zeros_like(self.identities, dtype=torch.bool).index_fill_(0, where[new], True)[here, None]
        refreshed = normalize((1 - self.refresh) * self.prototypes[here] + self.refresh * means, dim=1)
        self.prototypes[here] = torch.where(is_new, means, refreshed)
        self.identities.copy_(places.identities)
        self.used.copy_(places.used)

    def extra_repr(self) -> str:
        size = len(self.identities)
        return f"{self.num_classes} classes, {size} prototypes, {self.margin}, scale={self.scale}"
