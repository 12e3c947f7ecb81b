"""Pictures of the code tree: what identities share a prefix, and how full its nodes are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gif.codes.identity_codes import IdentityCodes
from gif.data.images import IdentityDataset
from gif.data.pictures import Pictures
from gif.plotting import canvas, save_figure

ROOTS, CHILDREN, MEMBERS = 4, 3, 14
GAP = 6  # pixels between images
NARROWEST = 4.5  # inches, for the title


def plot_code_tree(codes: IdentityCodes, dataset: IdentityDataset, path: str | Path) -> None:
    """Draw a few first tokens, a few second tokens under each, and images of identities below those.

    Of codes of two tokens a row is a first token: below both there is one identity.

    Identities that look alike share a prefix where the codes mean something.
    """
    rows = _fullest_prefixes(codes.codes, max(1, min(2, codes.length - 1)))
    pictures = Pictures(dataset)
    height, width = dataset.image_shape[1:]
    columns = max(len(members) for _, members in rows)
    drawing = canvas(max(NARROWEST, 9.5 * columns / MEMBERS), 0.52 * len(rows) + 0.9)
    drawing.suptitle("Identities by the first tokens of their codes", fontsize=12)
    grid = drawing.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (prefix, members) in zip(grid, rows, strict=True):
        strip = np.full((height, columns * (width + GAP), 3), 255, np.uint8)
        for place, identity in enumerate(members.tolist()):
            images = dataset.images_between(identity, identity + 1)
            if len(images):
                strip[:, place * (width + GAP) :][:, :width] = pictures[int(images[0])]
        axes.imshow(strip)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(" ".join(map(str, prefix)) + " …", rotation=0, ha="right", va="center", family="monospace")
        axes.spines[:].set_visible(False)
    save_figure(drawing, path)


def plot_occupancy(codes: IdentityCodes, path: str | Path) -> None:
    """Draw how full the nodes of two tokens are, and how often each position of the code takes each token.

    Fullness is the share of a node's v^(l-2) codes that identities have; of one token, where codes are no longer.
    """
    v, depth = codes.vocab_size, min(2, codes.length)
    _, offsets, paths = codes.nodes(depth)
    fill = np.zeros(v**depth)
    fill[paths.cpu().numpy()] = offsets.diff().cpu().numpy() / v ** (codes.length - depth)
    use = np.stack([column.long().bincount(minlength=v).cpu().numpy() for column in codes.codes.unbind(1)])
    drawing = canvas(10.5, 4.2)
    tree, tokens = drawing.subplots(1, 2)
    drawing.suptitle(f"{len(codes):,} identities in {v}^{codes.length} codes", fontsize=12)
    shown = tree.imshow(fill.reshape(-1, v), vmin=0, vmax=max(fill.max(), 1e-9), aspect="auto", cmap="viridis")
    tree.set(title="share of the codes below that are in use", xlabel=f"token {depth}")
    tree.set_ylabel("token 1" if depth == 2 else "")
    drawing.colorbar(shown, ax=tree)
    shown = tokens.imshow(use / len(codes) * v, vmin=0, aspect="auto", cmap="viridis")
    tokens.set(title="use of a token, 1 = even", xlabel="token", ylabel="position", yticks=range(codes.length))
    tokens.set_yticklabels([str(position + 1) for position in range(codes.length)])
    drawing.colorbar(shown, ax=tokens)
    save_figure(drawing, path)


def _fullest_prefixes(codes: torch.Tensor, depth: int) -> list[tuple[list[int], torch.Tensor]]:
    """The fullest prefixes of ``depth`` tokens under the fullest first tokens, each with its first members."""
    rows = []
    roots = codes[:, 0].long().bincount().argsort(descending=True, stable=True)[:ROOTS].sort().values
    for root in roots.tolist():
        below = (codes[:, 0] == root).nonzero().squeeze(1)
        if depth == 1:
            rows.append(([root], below[:MEMBERS]))
            continue
        tokens = codes[below, 1].long()
        counts = tokens.bincount()
        for token in counts.argsort(descending=True, stable=True)[:CHILDREN].sort().values.tolist():
            if counts[token]:
                rows.append(([root, token], below[tokens == token][:MEMBERS]))
    return rows
