"""Identities that come later: code vectors in the basis of those there are, codes down their tree, rows in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gif.codes.identity_codes import IdentityCodes
from gif.data.identities import Identities, Names, quote_some
from gif.errors import InputError
from gif.vectors.store import CodeVectors, unit_rows
from gif_kernels.sphere import unit

RIDGE = 1e-3  # of the mean variance: directions in which the vectors there are hardly differ say nothing
HELD_BACK = 10  # a map is judged on every tenth identity, which it was not fitted to


@dataclass(frozen=True)
class Moved:
    """How code vectors went from where the encoder put them to where spreading and training have: h' = normalise(W h).

    Args:
        matrix: W, (d, d) float64, by least squares with a little ridge, of the identities there are.
        cosine: mean cosine of W h to h' on a tenth of the identities, by a W that was fitted to the others.
    """

    matrix: Tensor
    cosine: float

    def __call__(self, vectors: Tensor) -> Tensor:
        """Unit rows (n, d) float32 of code vectors (n, d) as the encoder makes them."""
        return unit(vectors.double() @ self.matrix.T).float()


def find_move(raw: Tensor, moved: Tensor) -> Moved:
    """Find the `Moved` of code vectors ``raw`` (m, d), as the encoder made them, that are ``moved`` (m, d) now.

    Raises ValueError where shapes differ.
    """
    if raw.shape != moved.shape:
        raise InputError(
            f"the code vectors as they were made are {tuple(raw.shape)}, and as they are now {tuple(moved.shape)}; "
            "give both of the same identities and width"
        )
    raw, moved = raw.double(), unit(moved.double())
    judged = torch.arange(len(raw)) % HELD_BACK == 0
    cosine = float("nan")
    if len(raw) - int(judged.sum()) > 1:
        found = unit(raw[judged] @ _least_squares(raw[~judged], moved[~judged]).T)
        cosine = float((found * moved[judged]).sum(1).mean())
    return Moved(_least_squares(raw, moved), cosine)


def _least_squares(raw: Tensor, moved: Tensor) -> Tensor:
    gram = raw.T @ raw
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, raw.T @ moved).T


def which_are_new(who: Identities, before: Identities) -> np.ndarray:
    """Of the identities ``who`` of a data set, those that are not among ``before``: (n,) bool.

    Raises ValueError where one of those before is not in the data set, or nobody is new.
    """
    there, known = who.names.digests().numpy(), before.names.digests().numpy()
    gone = ~np.isin(known, there)
    if gone.any():
        raise InputError(
            f"{gone.sum()} of {len(before)} identities that have codes are not in the data set's training part "
            f"({quote_some(before.names, gone)}); give the data set of all, old and new, and the held_out of training"
        )
    new: np.ndarray = ~np.isin(there, known)
    if not new.any():
        raise InputError("nobody in the data set is new; everybody has a code")
    return new


def joined(
    codes: IdentityCodes, vectors: CodeVectors, newcomers: CodeVectors, who: Identities
) -> tuple[IdentityCodes, CodeVectors]:
    """Codes and code vectors of everybody, in the order of ``who``: those there are keep theirs.

    Raises what `IdentityCodes.extend` raises.
    """
    assert codes.identities is not None and newcomers.identities is not None  # looked at before
    extended = codes.extend(newcomers)
    names = Names.of([*codes.identities.names, *newcomers.identities.names])
    place = {digest: row for row, digest in enumerate(names.digests().tolist())}
    order = torch.tensor([place[digest] for digest in who.names.digests().tolist()])
    rows = torch.cat([vectors.table, newcomers.table.to(vectors.table.dtype)])[order]
    ordered = IdentityCodes(
        extended.codes[order],
        codes.vocab_size,
        centroids=extended.centroids,
        directions=extended.directions,
        identities=who,
    )
    return ordered, CodeVectors(unit_rows(rows), normalized=True, identities=who)
