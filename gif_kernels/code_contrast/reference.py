"""Code contrast, specification."""

from __future__ import annotations

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
    own = index[:, None] == torch.arange(len(vectors), device=index.device)  # PyTorch 2.9 compiles no one_hot in vjp
    logits = options.scale * torch.where(own, options.margin(cosine), cosine)
    if competes is not None:
        logits = logits.masked_fill(~competes, -torch.inf)
    return reduce_rows(F.cross_entropy(logits, index, reduction="none"), targets >= 0, options.reduction)


def code_contrast_gradients(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor | None, options: CodeContrastOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (B,), and the gradients of their sum: of the embeddings and of the vectors."""
    if torch.compiler.is_compiling():  # which knows this way of differentiating inside of a graph
        losses, pull, *_ = torch.func.vjp(
            lambda z, h: code_contrast(z, h, targets, competes, options), embeddings, vectors
        )
        return losses, *pull(torch.ones_like(losses))
    with torch.enable_grad(), kept_graph():
        point = embeddings.detach().requires_grad_(), vectors.detach().requires_grad_()
        losses = code_contrast(*point, targets, competes, options)
        of_embeddings, of_vectors = torch.autograd.grad(losses.sum(), point)
    return losses.detach(), of_embeddings, of_vectors
