"""Code contrast, specification."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels.autograd import kept_graph
from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.precision import compute_dtype, rounded
from gif_kernels.reduction import reduce_rows
from gif_kernels.sphere import unit


def code_contrast(
    embeddings: Tensor,
    vectors: Tensor,
    targets: Tensor,
    competes: Tensor | None,
    options: CodeContrastOptions,
) -> Tensor:
    """Cross entropy of each row over the vectors that compete (all, if None), reduced over targets >= 0."""
    dtype = compute_dtype(embeddings, vectors)
    z, h = (rounded(unit(x.to(dtype)), options.operand) for x in (embeddings, vectors))
    cosine = z @ h.T  # (B, C)
    index = targets.clamp(min=0)
    own = F.one_hot(index, len(vectors)).bool()
    logits = options.scale * torch.where(own, options.margin(cosine), cosine)
    if competes is not None:
        logits = logits.masked_fill(~competes, -torch.inf)
    return reduce_rows(F.cross_entropy(logits, index, reduction="none"), targets >= 0, options.reduction)


def code_contrast_gradients(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor | None, options: CodeContrastOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (B,), and the gradients of their sum: of the embeddings and of the vectors."""
    if torch.compiler.is_compiling():  # which knows this way of differentiating inside of a graph
        loss_of = partial(code_contrast, targets=targets, competes=competes, options=options)
        losses, pull = torch.func.vjp(loss_of, embeddings, vectors)  # type: ignore[misc]  # three with has_aux alone
        of_embeddings, of_vectors = pull(torch.ones_like(losses))
        return losses, of_embeddings, of_vectors
    with torch.enable_grad(), kept_graph():
        point = embeddings.detach().requires_grad_(), vectors.detach().requires_grad_()
        losses = code_contrast(*point, targets, competes, options)
        of_embeddings, of_vectors = torch.autograd.grad(losses.sum(), point)
    return losses.detach(), of_embeddings, of_vectors
