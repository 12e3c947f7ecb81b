"""Results as the field's papers print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gif.evaluation.identification import Identification
from gif.evaluation.ijb import IjbResult
from gif.evaluation.verification import PairAccuracy, resolution, unresolved
from gif.progress import new_table

if TYPE_CHECKING:
    from rich.table import Table


def pairs_table(results: Mapping[str, PairAccuracy]) -> Table:
    """Accuracy of each named set of pairs and their mean, in per cent: LFW, CFP-FP, AgeDB and so on."""
    table = new_table("pairs", "accuracy (%)", "± over folds", title="Pair verification, ten folds")
    for name, result in results.items():
        note = f" ({result.one_kind} folds of one kind: not the protocol's)" if result.one_kind else ""
        table.add_row(name + note, f"{100 * result.accuracy:.2f}", f"{100 * result.std:.2f}")
    if len(results) > 1:
        table.add_row("mean", f"{100 * np.mean([result.accuracy for result in results.values()]):.2f}", "")
    return table


def verification_table(results: Mapping[str, IjbResult]) -> Table:
    """TAR (%) at each FAR, a row for each named result that has the 1:1 protocol.

    A number at a FAR that a result's impostor pairs do not resolve has a "?", and a line below the table says why.
    """
    judged = {name: result.verification for name, result in results.items() if result.verification is not None}
    fars = sorted({far for result in judged.values() for far in result.tar})
    table = new_table("1:1", *(f"{far:g}" for far in fars), title="Templates: TAR (%) at FAR")
    notes = []
    for name, result in judged.items():
        low = unresolved(list(result.tar), result.impostor)
        cells = {far: f"{100 * tar:.2f}" + " ?" * (far in low) for far, tar in result.tar.items()}
        table.add_row(name, *(cells.get(far, "") for far in fars))
        notes += [f"? {name}: {resolution(low, result.impostor)}"] if low else []
    table.caption = "\n".join(notes) or None
    return table


def identification_table(results: Mapping[str, IjbResult]) -> Table:
    """Rank-k and TPIR at each FPIR in per cent: for each named result a row for each gallery, and their mean.

    The mean of a rank pools the probes of all galleries, as insightface does: a gallery weighs by its mated probes. The
    mean of a TPIR, which has a threshold in each gallery, weighs them alike.
    """
    rows: dict[str, list[float]] = {}
    columns: dict[str, None] = {}
    for name, result in results.items():
        galleries = {
            gallery: {
                **{f"rank-{k}": share for k, share in found.ranks.items()},
                **{f"TPIR@{fpir:g}": share for fpir, share in found.tpir.items()},
            }
            for gallery, found in result.identification.items()
        }
        for gallery, measures in galleries.items():
            columns |= dict.fromkeys(measures)
            rows[f"{name} {gallery}"] = list(measures.values())
        if len(galleries) > 1:
            rows[f"{name} mean"] = _means(list(result.identification.values()))
    table = new_table("1:N", *columns, title="Templates: identification (%)")
    for row, values in rows.items():
        table.add_row(row, *(f"{100 * value:.2f}" for value in values))
    return table


def _means(galleries: Sequence[Identification]) -> list[float]:
    """Average each rank over all mated probes, and each TPIR over the galleries."""
    mated = [found.mated for found in galleries]
    ranks = [np.average([found.ranks[k] for found in galleries], weights=mated) for k in galleries[0].ranks]
    return [*map(float, ranks), *np.mean([list(found.tpir.values()) for found in galleries], 0).tolist()]
