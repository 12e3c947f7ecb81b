"""The losses and both gradients at once: to the bit what autograd gives, in every implementation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gif_kernels import AngularMargin, code_contrast_gradients, code_contrast_loss
from tests.gif_kernels.test_code_contrast import CASES, Case

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def by_autograd(z, h, labels, **options):
    z, h = z.detach().requires_grad_(), h.detach().requires_grad_()
    losses = code_contrast_loss(z, h, labels, reduction="none", **options)
    with torch.autocast("cpu", enabled=False):  # as a backward pass is
        return losses.detach(), *torch.autograd.grad(losses.sum(), (z, h))


def inputs(case, dtype=torch.float64):
    candidates = case.candidates()
    return (*case.tensors(dtype), case.labels(candidates)), {"candidates": candidates, "scale": 8.0}


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and not a.requires_grad
        assert torch.equal(a, b)


@every_case
def test_the_bits_of_autograd(case, impl, dtype, margin):
    tensors, options = inputs(case, dtype)
    options |= {"impl": impl, "margin": margin}
    assert_same_bits(code_contrast_gradients(*tensors, **options), by_autograd(*tensors, **options))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_bits_of_autograd_in_low_precision(impl, low_dtype, autocast):
    (z, h, labels), options = inputs(Case(7, 11, 16), torch.float32)
    z = z * 1e6 if autocast else z  # beyond float16's range
    with torch.autocast("cpu", low_dtype, enabled=autocast):
        tensors = (z, h, labels) if autocast else (z.to(low_dtype), h.to(low_dtype), labels)
        assert_same_bits(
            code_contrast_gradients(*tensors, impl=impl, **options), by_autograd(*tensors, impl=impl, **options)
        )


def test_without_candidates_and_rows(impl):
    z, h = torch.randn(4, 6), torch.randn(5, 6)
    labels = torch.tensor([4, -1, 0, 0])
    assert_same_bits(code_contrast_gradients(z, h, labels, impl=impl), by_autograd(z, h, labels, impl=impl))
    nobody = (z[:0], h, labels[:0])
    assert_same_bits(code_contrast_gradients(*nobody, impl=impl), by_autograd(*nobody, impl=impl))


def test_blocked_against_the_reference(true_margin, agree):
    tensors, options = inputs(Case(7, 11, 13))
    options["margin"] = true_margin
    blocked, reference = (code_contrast_gradients(*tensors, impl=impl, **options) for impl in ("blocked", "reference"))
    for a, b in zip(blocked, reference, strict=True):
        agree(a, b)


def test_no_graph_is_kept_and_none_needed(impl):
    z, h = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    labels = torch.arange(4)
    with torch.inference_mode(impl == "blocked"):
        found = code_contrast_gradients(z, h, labels, impl=impl)
    assert_same_bits(found, by_autograd(z, h, labels, impl=impl))


def test_a_checkpointed_forward_pass_is_repeated_once(impl):
    calls = []

    def forward(z):
        calls.append(1)
        losses, of_z, _ = code_contrast_gradients(z, torch.eye(5, 6), torch.arange(4), impl=impl)
        return (losses + (z * of_z).sum(1)).sum()

    checkpoint(forward, torch.randn(4, 6, requires_grad=True), use_reentrant=False).backward()
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"margin": AngularMargin(m2=0.0, m3=0.2), "scale": 16.0}], ids=str)
def test_compiled_equals_eager(impl, options, compiled, agree):
    (z, h, labels), given = inputs(Case(4, 6, 5), torch.float32)
    options = {**given, **options, "impl": impl}
    expected = code_contrast_gradients(z, h, labels, **options)
    for a, b in zip(compiled(code_contrast_gradients)(z, h, labels, **options), expected, strict=True):
        agree(a, b)


def test_what_was_given_is_said():
    with pytest.raises(TypeError, match=r"embeddings must be a torch\.Tensor, got list"):
        code_contrast_gradients([], torch.eye(3), torch.arange(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every label must be among the candidates"):
        code_contrast_gradients(torch.eye(3), torch.eye(3), torch.arange(3), candidates=torch.tensor([0, 1, 4]))
