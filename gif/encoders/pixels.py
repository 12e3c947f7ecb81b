"""Whitened pixels: an encoder that needs no weights and no network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gif.encoders.base import AffineMap, check_images
from gif.errors import InputError

SIDE = 32  # pixels of the small image whose grey levels are the features
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
# Of the mean eigenvalue. Whitening in full makes all identities equally far apart where m <= width + 1, and loses much
# order elsewhere; this much ridge keeps the order of plain pixels, and still only dampens what all images share.
RIDGE = 10.0
ROWS_WHITENED = 1 << 14  # at a time


class PixelEncoder:
    """Grey levels of a 32 x 32 image, averaged over an identity, then whitened: the default without a network.

    Aligned images that look alike get vectors that are near: an order of similarity, which is all that code vectors
    want from an encoder.

    Args:
        width: d of the code vectors, in [1, 1024].

    Raises ValueError for another width.
    """

    def __init__(self, width: int = 128) -> None:
        if not 1 <= width <= SIDE**2:
            raise InputError(f"width must lie in [1, {SIDE**2}], the pixels of a {SIDE} x {SIDE} image, got {width}")
        self.name = "pixels"
        self.embedding_size = width

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Grey levels (n, 1024) float32 in [0, 1] of ``images`` (n, 1 or 3, h, w) uint8, on the images' device.

        Raises ValueError for images of another shape or dtype.
        """
        check_images(images)
        grey = images.float() / 255
        if grey.shape[1] == len(LUMA):
            grey = (grey * grey.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        small = grey if grey.shape[-2:] == (SIDE, SIDE) else interpolate(grey, size=(SIDE, SIDE), mode="area")
        return small.flatten(1)

    def fit(self, means: Tensor) -> AffineMap:
        """What whitens mean images (m, 1024) into (m, width) by principal components of these (k, 1024) float32.

        With mean image mu and covariance C = U diag(w) U^T of the k rows x, w falling, row by row

            h_j = u_j . (x - mu) / sqrt(w_j + ridge),      ridge = RIDGE mean(w),      j = 1 .. width,

        so that coordinate j has variance w_j / (w_j + ridge): near 1 where identities differ much, small elsewhere.
        Computed in float64; the largest entry of each u_j is positive, so the result does not depend on the solver's
        signs. Where k - 1 < width the rank is too small, and coordinates past it are 0. A single identity is its own
        mean: mu = 0 there.

        Raises ValueError if all rows are the same.
        """
        k = len(means)
        blocks = means.split(ROWS_WHITENED)
        center = torch.zeros(means.shape[1], dtype=torch.float64, device=means.device)
        if k > 1:
            center = torch.stack([rows.sum(0, dtype=torch.float64) for rows in blocks]).sum(0) / k
        covariance = torch.zeros(len(center), len(center), dtype=torch.float64, device=means.device)
        for rows in blocks:
            centered = rows - center
            covariance.addmm_(centered.T, centered, alpha=1 / k)
            del centered  # one block at a time
        mean_variance = covariance.diagonal().mean()
        rounding = torch.finfo(means.dtype).eps * center.abs().max()
        if not mean_variance > rounding**2:
            raise InputError(
                f"the mean images of {k} identities are all the same (or black), so nothing tells them apart; check "
                "the images and labels"
            )
        eigenvalues, eigenvectors = _eigh(covariance)  # rising
        kept = slice(-self.embedding_size, None)
        variances, components = eigenvalues[kept].flip(0).clamp_min(0), eigenvectors[:, kept].flip(1)
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        return AffineMap(center, (components * largest.sign() / (variances + RIDGE * mean_variance).sqrt()).T)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` on one thread: its thousands of tiny steps gain nothing from more.

    Where other programs share the cores, waiting for each other at every step makes a quarter of a second 20 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    finally:
        torch.set_num_threads(threads)
    return eigenvalues, eigenvectors
