"""Templates: many images of a person as one vector, and pairs of templates judged (the 1:1 protocol of IJB).

A template's images come in media (a photograph, or the frames of a video). The template is the sum over its media of
the mean over each one's images, normalised. That is a sum over images i of w_i f_i with w_i = faceness_i / (images of
i's medium in the template), known before any f_i is: images are added one by one, and none is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize

from gif.distributed import sum_over_processes
from gif.errors import InputError
from gif.evaluation.identification import whole_numbers
from gif.evaluation.thresholds import Thresholds, thresholds_of
from gif.evaluation.verification import Roc, check_fars, known, roc, tar_at, thin, truth_values, turns

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""The false-accept rates IJB results are given at."""

PairBlock = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]
"""First templates, second templates, and whether they are of one person; each (n,)."""

_IMAGES_A_BLOCK = 1 << 14
_PAIRS_A_BLOCK = 1 << 12  # whose vectors fit a cache


@dataclass(frozen=True, eq=False)
class Templates:
    """Unit vectors ``features`` (t, d) of the templates ``ids`` (t,) int64, which ascend."""

    ids: Tensor
    features: Tensor

    def rows(self, ids: ArrayLike | Tensor) -> Tensor:
        """Which row of ``features`` each of ``ids`` (n,) is, (n,) int64.

        Raises TypeError unless they are integers, ValueError for an unknown template.
        """
        wanted = whole_numbers("ids", ids).contiguous()
        rows = torch.searchsorted(self.ids, wanted).clamp_(max=len(self.ids) - 1)
        unknown = self.ids[rows] != wanted
        if unknown.any():
            raise InputError(
                f"template {int(wanted[unknown][0])} has no image ({int(unknown.sum())} of {len(wanted)} have none); "
                "give metadata files of one data set"
            )
        return rows

    def of(self, ids: ArrayLike | Tensor) -> Tensor:
        """The vectors of some templates ``ids`` (n,), as (n, d). Raises ValueError for an unknown one."""
        return self.features.index_select(0, self.rows(ids))


class TemplateSums:
    """Templates in the making; images may be added in any order and in batches of any size.

    Args:
        template_ids: (n,) integer, the template of each image.
        media_ids: (n,) integer, its medium.
        faceness: (n,) the weight of each image, a face detector's score; 1 where not given.

    Memory is a vector of float64 for each template, and a few numbers for each image.

    Raises TypeError for ids that are not integers, ValueError where shapes disagree, or a weight is NaN or infinite.
    """

    def __init__(
        self,
        template_ids: ArrayLike | Tensor,
        media_ids: ArrayLike | Tensor,
        faceness: ArrayLike | Tensor | None = None,
    ) -> None:
        templates, media = whole_numbers("template_ids", template_ids), whole_numbers("media_ids", media_ids)
        weights = torch.ones(len(templates)) if faceness is None else torch.as_tensor(faceness)
        if templates.ndim != 1 or not len(templates) or not templates.shape == media.shape == weights.shape:
            wanted = "wanted template_ids, media_ids and faceness (n,), n > 0"
            raise InputError(f"{wanted}, got {tuple(templates.shape)}, {tuple(media.shape)}, {tuple(weights.shape)}")
        if not weights.isfinite().all():
            raise InputError("faceness holds NaN or infinity, wanted finite weights; look into the detector's scores")
        self.ids, self._place = templates.unique(return_inverse=True)
        _, medium, images = torch.stack([templates, media]).unique(dim=1, return_inverse=True, return_counts=True)
        self._weights = weights.double() / images[medium]
        self._times = torch.zeros(len(templates), dtype=torch.int64)
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor, features: Tensor) -> None:
        """Add the features (b, d), not normalised, of images ``rows`` (b,). Raises ValueError for NaN or infinity."""
        if features.ndim != 2 or rows.shape != features.shape[:1]:
            raise InputError(f"wanted rows (b,) and features (b, d), got {tuple(rows.shape)}, {tuple(features.shape)}")
        features = features.detach().cpu().double()
        if not features.isfinite().all():
            raise InputError("features hold NaN or infinity, wanted finite numbers; look for a diverged training run")
        if self._sums is None:
            self._sums = torch.zeros(len(self.ids), features.shape[1], dtype=torch.float64)
        self._sums.index_add_(0, self._place[rows], self._weights[rows, None] * features)
        self._times[rows] += 1

    def gather(self, device: str | torch.device) -> None:
        """Add up what the processes of a group have, each some images; ``device`` suits the group. Alone: nothing."""
        assert self._sums is not None  # each process added some
        self._times = sum_over_processes(self._times.to(device)).cpu()
        self._sums = sum_over_processes(self._sums.to(device)).cpu()

    def leave_out(self, images: Tensor, others: TemplateSums | None) -> Tensor:
        """Make the templates of some images (n,) bool, which were not added, of their other images alone.

        Args:
            images: which.
            others: sums of all other images of these templates; None where there are none.

        Returns the templates that have no other image, whose sums are zero.
        """
        assert self._sums is not None  # other images were added
        places = self._place[images].unique()
        self._sums[places] = 0
        self._times[images] = 1
        if others is None:
            return self.ids[places]
        assert others._sums is not None
        self._sums[torch.searchsorted(self.ids, others.ids)] = others._sums
        return self.ids[places][~torch.isin(self.ids[places], others.ids)]

    def templates(self, dtype: torch.dtype = torch.float32) -> Templates:
        """The templates (a sum of zero stays zero). Raises ValueError unless each image has been added once."""
        if self._sums is None or not bool((self._times == 1).all()):
            wrong = int((self._times != 1).nonzero()[0])
            raise InputError(f"image {wrong} was added {int(self._times[wrong])} times, wanted once; add each image")
        return Templates(self.ids, normalize(self._sums, dim=1).to(dtype))


def template_features(
    features: ArrayLike | Tensor,
    template_ids: ArrayLike | Tensor,
    media_ids: ArrayLike | Tensor,
    faceness: ArrayLike | Tensor | None = None,
) -> Templates:
    """Templates of features that are all there: normalise(sum over media of the mean of faceness_i f_i).

    Args:
        features: (n, d), not normalised; with flips, f(x) + f(flip x).
        template_ids: (n,) integer.
        media_ids: (n,) integer; one number may stand for other media in other templates.
        faceness: (n,) weights of the images, the detector's scores; 1 where not given.

    Returns vectors in the order of their template ids, float64 where the features are, else float32.

    Raises TypeError for ids that are not integers, ValueError where shapes disagree, or for NaN or infinity.
    """
    vectors = torch.as_tensor(features)
    sums = TemplateSums(template_ids, media_ids, faceness)
    if vectors.shape[:1] != sums._place.shape:
        raise InputError(f"wanted features ({len(sums._place)}, d), a row an image, got {tuple(vectors.shape)}")
    for rows in torch.arange(len(vectors)).split(_IMAGES_A_BLOCK):
        sums.add(rows, vectors[rows])
    return sums.templates(torch.float64 if vectors.dtype == torch.float64 else torch.float32)


@dataclass(frozen=True, eq=False)
class TemplateVerification:
    """``tar``: true-accept rate at each false-accept rate; how many pairs; at most 2,000 points of the ROC curve;
    the cosines of templates that accept at FARs from 1e-2 to 1e-6, and at the EER."""

    tar: dict[float, float]
    genuine: int
    impostor: int
    roc: Roc
    thresholds: Thresholds

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curve, fit for JSON: None is the TAR at a FAR that the impostor pairs do not resolve."""
        return {
            "tar": known(self.tar, self.impostor),
            "genuine": self.genuine,
            "impostor": self.impostor,
            "thresholds": self.thresholds.to_dict(),
        }


def verify_templates(
    templates: Templates, pairs: Iterable[PairBlock], *, fars: Sequence[float] = FARS
) -> TemplateVerification:
    """Judge pairs of templates by their cosine: TAR at each FAR, as `tar_at_far` takes it, and the ROC.

    Args:
        templates: unit vectors.
        pairs: blocks of (first ids (n,), second ids (n,), same (n,) bool, or 0 and 1), as `Ijb.pairs` reads them; only
            their scores are kept.
        fars: false-accept rates in [0, 1].

    Raises ValueError for an unknown template, a wrong rate, or without a genuine or an impostor pair.
    """
    check_fars(fars)
    scores, labels = [np.empty(0, np.float32)], [np.empty(0, bool)]
    for first, second, same in pairs:
        for begin in range(0, len(same), _PAIRS_A_BLOCK):
            part = slice(begin, begin + _PAIRS_A_BLOCK)
            left, right = templates.of(first[part]), templates.of(second[part])
            scores.append((left.unsqueeze(1) @ right.unsqueeze(2)).flatten().numpy())
        labels.append(truth_values("same", same))
    same_person = np.concatenate(labels)
    curve = roc(np.concatenate(scores), same_person)
    genuine = int(same_person.sum())
    impostor = len(same_person) - genuine
    kept = turns(curve, genuine, impostor)
    return TemplateVerification(
        {far: tar_at(kept, far) for far in fars},
        genuine,
        impostor,
        thin(curve, impostor),
        thresholds_of(curve, genuine, impostor),
    )
