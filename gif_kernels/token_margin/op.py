"""Token-margin loss: the public function."""

from __future__ import annotations

from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.code_regression.op import CodeRegression, check_targets, looked_up
from gif_kernels.device.tuning import MAX_VOCAB
from gif_kernels.dispatch import Impl
from gif_kernels.errors import InputError
from gif_kernels.margins import AngularMargin
from gif_kernels.precision import compute_dtype, in_range, operand_dtype
from gif_kernels.reduction import REDUCTIONS, Reduction
from gif_kernels.token_margin import blocked, reference
from gif_kernels.token_margin.options import TokenMarginOptions

OP = "token_margin_loss"


def _triton() -> dispatch.Implementation:
    from gif_kernels.token_margin.function import token_margin

    return token_margin


dispatch.register(
    OP,
    reference=reference.token_margin,
    blocked=blocked.token_margin,
    triton=_triton,
)


def token_margin_loss(
    embeddings: Tensor,
    centers: Tensor,
    codes: Tensor,
    *,
    projections: Tensor | None = None,
    token_weights: Tensor | None = None,
    regression: CodeRegression | None = None,
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
        regression: adds `code_regression_loss` to each row, in the same pass over the embeddings. Rows that count are
            those with a code.
        margin: psi.
        scale: s, > 0.
        reduction: "mean", "sum" or "none".
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        () for "mean" and "sum", (B,) for "none"; float64 if an input is, else float32. Differentiable
        once, with respect to embeddings, centers and projections.

    Products take operands in autocast's dtype where it is on, else in the dtype that the inputs share, else in float32.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also NaN, or a code out of range (on an
            accelerator its loss is NaN).
    """
    checks.floating("embeddings", embeddings, ("B", "d"), finite=False)
    checks.floating("centers", centers, ("l", "v", "d'"), finite=False)
    batch, width = embeddings.shape
    length, vocab, inner = centers.shape
    if projections is not None:
        checks.floating("projections", projections, (length, inner, width), finite=False)
    elif inner != width:
        raise InputError(
            f"centers have width {inner} and embeddings {width}; without projections they must agree, otherwise give "
            f"projections of shape ({length}, {inner}, {width})"
        )
    obstacle = f"at most {MAX_VOCAB} centers a token, got {vocab}" if vocab > MAX_VOCAB else ""
    dtype = compute_dtype(embeddings, centers, projections)
    name = dispatch.resolve(OP, impl, embeddings.device, dtype, obstacle=obstacle)
    asserted = name != "triton"
    hint = "-1, in every token, ignores a row"
    codes = checks.integer(
        "codes", codes, (batch, length), low=-1, high=vocab, hint=hint, asserted=asserted, whole_rows=True
    )
    if (
        token_weights is not None
        and checks.floating("token_weights", token_weights, (length,), finite=False).requires_grad
    ):
        raise InputError("token_weights are constants of the loss; detach them")
    targets, target_rows, pull = regression or (None, None, 0.0)
    if targets is not None:
        target_rows = check_targets(embeddings, targets, target_rows, asserted=asserted)
        if targets.requires_grad:
            raise InputError("targets are constants of this loss; detach them, or add code_regression_loss")
        checks.positive("weight", pull)
    checks.angular_margin(margin)
    checks.positive("scale", scale)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.same_device(
        embeddings=embeddings, centers=centers, codes=codes, projections=projections, token_weights=token_weights
    )
    operand = operand_dtype(embeddings, centers, projections)
    embeddings, centers = in_range(embeddings, operand), in_range(centers, operand)
    with dispatch.full_precision(embeddings.device):
        loss: Tensor = dispatch.implementation(OP, name)(
            embeddings=embeddings,
            centers=centers,
            projections=projections,
            codes=codes,
            token_weights=token_weights,
            targets=targets,
            target_rows=target_rows,
            options=TokenMarginOptions(
                margin=margin, scale=float(scale), pull=float(pull), reduction=reduction, operand=operand
            ),
        )
    if checks.seen_not_finite(loss):
        checks.refuse_not_finite(
            embeddings=embeddings,
            centers=centers,
            projections=projections,
            token_weights=token_weights,
            targets=None if targets is None else looked_up(targets, target_rows),
        )
    return loss
