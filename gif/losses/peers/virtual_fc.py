"""Virtual FC."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gif.distributed import gather_rows
from gif.errors import InputError
from gif.head import Head
from gif.losses.peers.finite import finite_rows
from gif_kernels import AngularMargin, checks, code_contrast_loss
from gif_kernels.runs import occurrences

SHARE = 0.01  # of the identities, that have a column in the paper


class VirtualFC(nn.Module, Head):
    """Margin softmax over columns that many identities share (Virtual Fully-Connected Layer; Li et al., CVPR 2021).

    Identity y belongs to column y mod C. In a batch, the first identity of each column has it (its anchor), and a
    second one gets a free column, of which the batch has no identity (`columns_of`)::

        w_c    = sum of z_i over the batch's images of the identity that has column c   (before the loss, no gradient)
        loss_i = CE(scale psi(zhat_i . what_c), column of y_i)   over all C columns

    Columns are parameters, so between their identities' batches the loss moves them as any class weight; a column that
    was lent is as before in the next step. A batch holds several images of an identity, side by side in an epoch's
    order, so that a column is more than an image itself. Labels always have a column.

    Cost of a step: B x C products, and C x d weights, gradients and momentum. C is a hundredth of the identities in the
    paper: a hundred times less than a softmax, and still O(m). It is flat where C is fixed, with m / C identities a
    column.

    Several processes share the columns: each gets the sum over the embeddings of all.

    Args:
        num_classes: m.
        embedding_size: d.
        columns: C, at least the identities of a batch; a hundredth of m where None.
        group_size: images of an identity side by side in an epoch's order; of one that has fewer, all.
        margin: psi, of the target logit.
        scale: s of the logits.

    Raises ValueError where a batch has more identities than there are columns, or for a number out of its range.
    """

    under_autocast = True  # it rounds the operands of its products, and nothing else

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        *,
        columns: int | None = None,
        group_size: int = 10,
        margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
        scale: float = 32.0,
    ) -> None:
        super().__init__()
        columns = math.ceil(SHARE * num_classes) if columns is None else columns
        checks.positive("columns", columns)
        checks.positive("group_size", group_size)
        self.num_classes = num_classes
        self.group_size = group_size
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(columns, embedding_size)))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss () of embeddings (B, d) with identities ``labels`` (B,) of any integer dtype; -1 is ignored.

        In training the columns of the batch's anchors change in place.
        """
        checks.floating("embeddings", embeddings, ("B", self.weight.shape[1]), finite=False)
        hint = "this layer is for other classes (-1 marks a row to ignore)"
        labels = checks.integer("labels", labels, (len(embeddings),), low=-1, high=self.num_classes, hint=hint)
        features, everyone = gather_rows(finite_rows(embeddings)), gather_rows(labels)
        features, everyone = features[everyone >= 0], everyone[everyone >= 0]
        identities, inverse = everyone.unique(return_inverse=True)
        columns, anchors = columns_of(everyone, len(self.weight))
        sums = self.weight.new_zeros(len(identities), features.shape[1]).index_add_(0, inverse, features)
        lent = torch.ones_like(anchors)
        if self.training:
            with torch.no_grad():
                self.weight[columns[anchors]] = sums[anchors]
            lent = ~anchors
        weight = self.weight.index_copy(0, columns[lent], sums[lent])
        known = labels >= 0
        targets = labels.clone()
        targets[known] = columns[torch.searchsorted(identities, labels[known])]
        return code_contrast_loss(embeddings, weight, targets, margin=self.margin, scale=self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, {len(self.weight)} columns, {self.margin}, scale={self.scale}"


def columns_of(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The column of each identity among ``labels`` (B,) >= 0, and whether it is the anchor: (n,), identities ascending.

    Of the identities with one remainder by ``count``, the first in the batch is the anchor, and has that column. The
    others, in the batch's order, get the columns of remainders that the batch does not have, ascending.

    Raises ValueError where there are more identities than columns.
    """
    identities, inverse = labels.unique(return_inverse=True)
    if len(identities) > count:
        raise InputError(
            f"a batch has {len(identities)} identities and the layer {count} columns; give more columns, a larger "
            "group_size or smaller batches"
        )
    numbers = torch.arange(len(labels), device=labels.device)
    first = torch.zeros_like(identities).scatter_reduce_(0, inverse, numbers, "amin", include_self=False)
    order = first.argsort()
    columns = identities[order] % count
    anchors = occurrences(columns) == 0
    free = torch.ones(count, dtype=torch.bool, device=labels.device).index_fill_(0, columns, False).nonzero()[:, 0]
    columns[~anchors] = free[: int((~anchors).sum())]
    return torch.empty_like(columns).scatter_(0, order, columns), torch.empty_like(anchors).scatter_(0, order, anchors)
