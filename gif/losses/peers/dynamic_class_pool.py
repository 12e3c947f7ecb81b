"""Faster Face Classification: the Dynamic Class Pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.losses.peers.momentum_encoder import HeadWithEncoder
from gif.losses.peers.pool import Places
from gif_kernels import AngularMargin, checks, code_contrast_loss
from gif_kernels.runs import occurrences

FEATURES = 2  # that the pool keeps of an identity
HARD_SHARE, LEAST_HARD, MOST_HARD = 0.0002, 3, 10  # of the pool, that an image outside of it is pushed off


@dataclass(frozen=True)
class Pool:
    """Who is in the pool, (2, K, d) unit features of each, and which of the two is written next, (K,) int64."""

    places: Places
    features: Tensor
    turn: Tensor

    def updated(self, features: Tensor, identities: Tensor) -> tuple[Pool, Tensor]:
        """The pool after features (n, d) of ``identities`` (n,) came in, in order; whose second weight counts, (K,).

        A new identity takes the place of the one that was not seen for longest, and its first feature is written. Each
        further one is written in turns, and then the second counts.
        """
        places, where, new = self.places.take(identities)
        turn, before = self.turn.clone(), occurrences(identities)
        turn[where[new]] = 0
        row = (turn[where] + before) % FEATURES
        kept = self.features.clone()
        for which in range(
            int(before.max()) + 1 if len(before) else 0
        ):  # each place once at a time: the last one stays
            now = before == which
            kept[row[now], where[now]] = features[now]
        turn.index_add_(0, where, torch.ones_like(where))
        again = torch.zeros_like(turn, dtype=torch.bool)
        again[where[~new | (before > 0)]] = True
        return Pool(places, kept, turn % FEATURES), again


class DynamicClassPool(HeadWithEncoder):
    """Margin softmax over a pool of recent identities (Faster Face Classification; Wang et al., arXiv 2105.10375).

    A gallery network, which follows the trained probe network, fills the pool with two features an identity, T_0 and
    T_1, written in turns; who was not seen for longest leaves. W is T_1 where it was written in this step, else T_0::

        theta' <- momentum theta' + (1 - momentum) theta
        loss_i = (CE(scale psi(zhat_i . T_0k), y_i) + CE(scale psi(zhat_i . W_k), y_i)) / 2   where y_i is in the pool
        loss_i = mean of max(0, the h largest of zhat_i . T_0k), likewise of W_k, halved      where it is not

    each averaged over its own images, and the two means added; h = 0.0002 K, at least 3 and at most 10. As the authors,
    each half of a batch is classified by the pool that the other half has just joined, and what the first half brought
    stays. They draw a batch by two loaders, pairs by identity and images one by one, two to one: here two thirds of the
    pairs in an epoch's order stay together, so that each image comes once in an epoch, as for every head. They add the
    two losses of an image where this takes the mean, so that learning rates mean the same as elsewhere.

    Cost of a step: a second forward pass of the backbone without gradients, 2 B x pool_size products, and a copy of the
    pool, (2, pool_size, d), for each half. The encoder is as large as the backbone. Nothing depends on the number of
    identities m, unless the pool is made a share of it: its authors take 7,409.

    Several processes share one pool, which gets the features of all.

    Args:
        num_classes: m, for which labels are checked.
        backbone: what is trained; its weights at this moment are the gallery network's first.
        embedding_size: d.
        pool_size: K, identities in the pool; at least those of a batch.
        momentum: of the gallery network.
        margin: psi, of the target logit.
        scale: s of the logits.

    Raises ValueError for a pool smaller than a batch, or a number out of its range.
    """

    grouped_share = 2 / 3

    def __init__(
        self,
        num_classes: int,
        backbone: nn.Module,
        embedding_size: int = 512,
        *,
        pool_size: int = 8192,
        momentum: float = 0.99,
        margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
        scale: float = 32.0,
    ) -> None:
        super().__init__(num_classes, backbone, embedding_size, momentum)
        checks.positive("pool_size", pool_size)
        self.margin = margin
        self.scale = scale
        empty = Places.empty(pool_size)
        self.register_buffer("identities", empty.identities)
        self.register_buffer("used", empty.used)
        self.register_buffer("features", torch.zeros(FEATURES, pool_size, embedding_size))
        self.register_buffer("turn", torch.zeros(pool_size, dtype=torch.int64))
        self.identities: Tensor
        self.used: Tensor
        self.features: Tensor
        self.turn: Tensor
        self._seen: list[tuple[Pool, Tensor]] = []

    def receive(self, features: Tensor, identities: Tensor, halves: Tensor) -> None:
        """Make the pool that each half is classified by, and keep what the first half brought."""
        pool = Pool(Places(self.identities, self.used), self.features, self.turn)
        first, second = (pool.updated(features[rows], identities[rows]) for rows in (~halves, halves))
        self._seen = [second, first]
        kept, _ = first
        self.identities.copy_(kept.places.identities)
        self.used.copy_(kept.places.used)
        self.features.copy_(kept.features)
        self.turn.copy_(kept.turn)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; -1 is ignored."""
        labels, halves = self.next_rows(embeddings, labels)
        inside = outside = embeddings[labels < 0].sum(dtype=torch.float32) * 0  # differentiable whatever is ignored
        found = strangers = torch.zeros((), device=labels.device)
        for half, (pool, again) in enumerate(self._seen):
            rows = (halves == half) & (labels >= 0)
            known = rows & (pool.places.find(labels) >= 0)
            new = rows & ~known
            found, strangers = found + known.sum(), strangers + new.sum()
            held = pool.places.identities >= 0
            second = torch.where(again[:, None], pool.features[1], pool.features[0])
            for weights in (pool.features[0], second):
                inside = inside + self._classified(embeddings[known], labels[known], weights, pool, held)
                outside = outside + self._pushed_off(embeddings[new], weights[held])
        return (inside / found.clamp(min=1) + outside / strangers.clamp(min=1)) / FEATURES

    def _classified(self, embeddings: Tensor, labels: Tensor, weights: Tensor, pool: Pool, held: Tensor) -> Tensor:
        if len(labels) == 0:
            return embeddings.sum(dtype=torch.float32)
        return code_contrast_loss(
            embeddings,
            weights[held],
            labels,
            candidates=pool.places.identities[held],
            margin=self.margin,
            scale=self.scale,
            reduction="sum",
        )

    def _pushed_off(self, embeddings: Tensor, weights: Tensor) -> Tensor:
        """The sum () over embeddings (n, d) of the mean of their largest cosines to the pool's weights (k, d)."""
        if len(embeddings) == 0 or len(weights) == 0:
            return embeddings.sum(dtype=torch.float32) * 0
        hard = min(max(int(HARD_SHARE * len(self.identities)), LEAST_HARD), MOST_HARD)
        cosines = normalize(embeddings.float(), dim=1) @ weights.T
        return cosines.topk(min(hard, len(weights)), dim=1).values.clamp(min=0).float().mean(1).sum()

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, pool of {len(self.identities)}, {self.margin}, scale={self.scale}"
