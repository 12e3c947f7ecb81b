"""The check that users run on their own shapes."""

import pytest
import torch

from gif_kernels import (
    AngularMargin,
    code_contrast_loss,
    code_regression_loss,
    gaussian_potential,
    gradcheck,
    token_margin_loss,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_loss_agrees(dtype, reduction, capsys):
    def normal(*size):
        return torch.randn(*size).to(dtype).requires_grad_()

    codes = torch.randint(5, (9, 3))
    projections = normal(3, 6, 12)
    margin = AngularMargin(m2=0.3)
    runs = [
        gradcheck(token_margin_loss, normal(9, 12), normal(3, 5, 12), codes, margin=margin, reduction=reduction),
        gradcheck(token_margin_loss, normal(9, 12), normal(3, 5, 6), codes, projections=projections),
        gradcheck(code_regression_loss, normal(9, 12), normal(9, 12), reduction=reduction),
        gradcheck(code_contrast_loss, normal(9, 12), normal(7, 12), torch.arange(9) % 7, reduction=reduction),
        gradcheck(gaussian_potential, normal(9, 12), t=1.0),
    ]
    assert all(result.ok for run in runs for result in run)
    assert [result.name for result in runs[1]] == ["value", "d/d embeddings", "d/d centers", "d/d projections"]
    printed = capsys.readouterr().out
    assert printed.count("relative errors against float64") == len(runs) and "TOO LARGE" not in printed


def test_a_wrong_gradient_is_found():
    def wrong(embeddings, targets, *, impl="auto"):
        loss = code_regression_loss(embeddings, targets, impl="reference")
        if impl != "reference":
            loss = loss + 1e-3 * (embeddings - embeddings.detach()).sum()  # the right value, a wrong slope
        return loss

    inputs = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    value, of_embeddings, of_targets = gradcheck(wrong, *inputs, show=False)
    assert value.ok and of_targets.ok and not of_embeddings.ok


def test_swapped_rows_are_found():
    def swapped(embeddings, targets, *, impl="auto"):
        rows = code_regression_loss(embeddings, targets, reduction="none", impl="reference")
        return rows if impl == "reference" else rows.flip(0)

    inputs = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    assert not gradcheck(swapped, *inputs, show=False)[0].ok


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match=r"call requires_grad_\(\)"):
        gradcheck(code_regression_loss, torch.randn(2, 3), torch.randn(2, 3))
