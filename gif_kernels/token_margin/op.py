"""Token-margin loss: the public function."""

from __future__ import annotations

from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.dispatch import Impl
from gif_kernels.margins import AngularMargin
from gif_kernels.reduction import REDUCTIONS, Reduction, reduce_rows
from gif_kernels.sphere import compute_dtype
from gif_kernels.token_margin import blocked, reference

OP = "token_margin_loss"
dispatch.register(
    OP,
    reference=reference.token_margin_rows,
    blocked=blocked.token_margin_rows,
    triton="gif_kernels.token_margin.kernels:token_margin_rows",
)


def token_margin_loss(
    embeddings: Tensor,
    centers: Tensor,
    codes: Tensor,
    *,
    projections: Tensor | None = None,
    token_weights: Tensor | None = None,
    margin: AngularMargin = AngularMargin(),  # noqa: B008 (frozen)
    scale: float = 64.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Cross entropy of every token of the identity code, with an angular margin (the paper's L_C).

    With zhat = z / ||z||, u_j = normalise(P_j zhat) (or zhat) and unit centres what_jk::

        logit_jk = scale * psi(u_j . what_jk) if k = c_j else scale * u_j . what_jk
        loss     = sum_j lambda_j CE(logit_j, c_j)

    Args:
        embeddings: z, (B, d). Rows are normalised inside.
        centers: w, (l, v, d'): v centres for each of l tokens. Normalised inside.
        codes: c, (B, l) integer in [0, v); a row of -1 is ignored (the mean is over the others).
        projections: P, (l, d', d), or None where d' = d.
        token_weights: lambda, (l,), a constant; default 1 / l each.
        margin: psi.
        scale: s, > 0.
        reduction: "mean", "sum" or "none".
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        () for "mean" and "sum", (B,) for "none"; float64 if an input is, else float32. Differentiable
        once, with respect to embeddings, centers and projections.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also NaN, or a code out of range.
    """
    checks.floating("embeddings", embeddings, ("B", "d"))
    checks.floating("centers", centers, ("l", "v", "d'"))
    batch, width = embeddings.shape
    length, vocab, inner = centers.shape
    if projections is not None:
        checks.floating("projections", projections, (length, inner, width))
    elif inner != width:
        raise ValueError(
            f"centers have width {inner} and embeddings {width}; without projections they must agree, otherwise give "
            f"projections of shape ({length}, {inner}, {width})"
        )
    codes = checks.integer(
        "codes", codes, (batch, length), low=-1, high=vocab, hint="-1, in every token, ignores a row"
    )
    counted = codes[:, 0] >= 0
    checks.require(((codes >= 0) == counted.unsqueeze(1)).all(), "a row of codes must be -1 in every token or in none")
    if token_weights is None:
        dtype = compute_dtype(embeddings, centers, projections)
        token_weights = embeddings.new_full((length,), 1 / length, dtype=dtype)
    elif checks.floating("token_weights", token_weights, (length,)).requires_grad:
        raise ValueError("token_weights are constants of the loss; detach them")
    checks.angular_margin(margin)
    checks.positive("scale", scale)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.same_device(
        embeddings=embeddings, centers=centers, codes=codes, projections=projections, token_weights=token_weights
    )
    rows = dispatch.select(OP, impl, embeddings.device, compute_dtype(embeddings, centers, projections))
    with dispatch.full_precision(embeddings.device):
        losses = rows(embeddings, centers, projections, codes, token_weights, margin, float(scale))
        return reduce_rows(losses, counted, reduction)
