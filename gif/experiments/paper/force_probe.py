"""The forces on each identity's centre while a head trains, by the number of images the identity has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.data import IdentityDataset
from gif.errors import InputError
from gif.evaluation.embedding import embed_batch, evaluating
from gif.evaluation.rarity import Group
from gif.losses import Forces, GIFLoss, MarginSoftmax, PartialFC, pull_and_push
from gif.losses.sampling import brought, stratified
from gif_kernels import AngularMargin

MEASURES = ("pull", "push", "push cosine")


class ForceProbe:
    """What one pass over the training images exerts on the centres' directions, while nothing moves.

    The pass goes in batches, each against the identities that the head would contrast it with: all, those that Partial
    FC draws, those of GIF's contrast with code vectors. Centres are taken at unit length, so that heads compare whose
    centres have other norms; images are not augmented. Called with a backbone it gives, of each group,

    - ``pull NAME`` and ``push NAME``: mean over its identities of ||f_pull|| and ||f_push||, summed over the pass;
    - ``push cosine NAME``: mean cosine between the pushes of two of its identities.

    Args:
        head: a `MarginSoftmax`, a `PartialFC`, or a `GIFLoss` whose recipe has a contrast.
        data: the training images.
        groups: of its identities.
        batch_size: images at a time, as in training.
        seed: of the order of the images.

    Raises ValueError for a head that exerts no force on a centre of an identity.
    """

    def __init__(
        self, head: nn.Module, data: IdentityDataset, groups: Sequence[Group], batch_size: int, seed: int = 0
    ) -> None:
        if not isinstance(head, MarginSoftmax | PartialFC) and not (
            isinstance(head, GIFLoss) and head.recipe.contrast_weight > 0
        ):
            raise InputError(f"{type(head).__name__} has no centre of an identity that images pull or push")
        self._head, self._data, self._groups = head, data, groups
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self._batches = order.split(batch_size)

    @torch.no_grad()
    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        forces = self.forces(backbone)
        found: dict[str, float] = {}
        for group in self._groups:
            pull, push = (force[group.identities] for force in forces)
            total, k = normalize(push, dim=1).sum(0), len(push)
            values = pull.norm(dim=1).mean(), push.norm(dim=1).mean(), (total.square().sum() - k) / (k * (k - 1))
            found |= {f"{name} {group.name}": float(value) for name, value in zip(MEASURES, values, strict=True)}
        return found

    @torch.no_grad()
    def forces(self, backbone: nn.Module) -> Forces:
        """Of each identity, (m, d) float64, summed over the pass."""
        centers = normalize(self._centers().double(), dim=1)
        total = Forces(torch.zeros_like(centers), torch.zeros_like(centers))
        device = next(backbone.parameters()).device
        with evaluating(backbone, device) as network:
            for number, batch in enumerate(self._batches):
                images, labels = self._data.batch(batch.tolist())
                embeddings = embed_batch(network, images.to(device), flip=False)
                classes = self._candidates(labels, number).unique()
                found = self._of_batch(embeddings, labels, classes, centers[classes].float())
                for sum_, force in zip(total, found, strict=True):
                    sum_.index_add_(0, classes, force.double().cpu())
        return total

    def _of_batch(self, embeddings: Tensor, labels: Tensor, classes: Tensor, centers: Tensor) -> Forces:
        margin, scale, weight = self._softmax()
        labels, classes, centers = (tensor.to(embeddings.device) for tensor in (labels, classes, centers))
        cosine = normalize(embeddings, dim=1) @ centers.T
        logits = scale * torch.where(labels[:, None] == classes, margin(cosine), cosine)
        found = pull_and_push(
            logits, embeddings, labels, candidates=classes, centers=centers, margin=margin, scale=scale
        )
        return Forces(*(weight * force for force in found))

    def _centers(self) -> Tensor:
        if isinstance(self._head, GIFLoss):
            assert self._head.vectors is not None  # its recipe has a contrast
            self._head.settle()
            return self._head.vectors.table.detach().cpu()
        return self._head.weight.detach().cpu()

    def _softmax(self) -> tuple[AngularMargin, float, float]:
        """Margin, scale and weight of the cross entropy over identities."""
        if isinstance(self._head, GIFLoss):
            recipe = self._head.recipe
            return recipe.contrast_margin, recipe.contrast_scale, recipe.contrast_weight
        return self._head.margin, self._head.scale, 1.0

    def _candidates(self, labels: Tensor, number: int) -> Tensor:
        """Identities that the batch of this ``number`` is contrasted with, on the CPU; some may stand there twice."""
        if isinstance(self._head, GIFLoss):
            return self._head.candidates(labels, number)[0].cpu()
        if isinstance(self._head, PartialFC):
            drawn = stratified(self._head.samples, self._head.num_classes, self._head.draws.cpu() + number)
            return torch.cat([brought(labels), drawn])
        return torch.arange(self._data.num_identities)
