"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import AngularMargin, code_contrast_gradients, code_contrast_loss, dispatch
from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.dispatch import Impl
from gif_kernels.reduction import Reduction

kernels = pytest.importorskip("gif_kernels.code_contrast.kernels", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it where determinism is asked for
DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@dataclass(frozen=True)
class Case:
    """Random inputs of one shape: a batch, and candidates of which some stand twice."""

    batch: int
    count: int
    width: int

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(n, self.width).to(dtype) for n in (self.batch, self.count)]

    def candidates(self) -> Tensor:
        """Identities in no order, far apart; a third of the rows repeat another's."""
        identities = torch.randint(10**15, (self.count,))
        repeats = torch.arange(self.count)[2::3]
        identities[repeats] = identities[torch.randint(self.count, repeats.shape)]
        return identities

    def labels(self, candidates: Tensor) -> Tensor:
        """A candidate for each row; every third is ignored."""
        labels = candidates[torch.randint(self.count, (self.batch,))]
        labels[1::3] = -1
        return labels


# widths under, over and between the chunks (32, 64); batches and candidates of one, a few, and over a tile (32 rows and
# 64 columns without a GPU)
CASES = {"one of each": Case(1, 1, 7), "few": Case(5, 11, 48), "over a tile": Case(67, 130, 70)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
MANY = [Case(67, 70, 48), Case(33, 100, 16)]
many_rows = pytest.mark.parametrize("case", MANY, ids=str)  # enough to compare two errors: one may be zero by chance


def loss_of(labels: Tensor, impl: Impl = "triton", **options):
    return lambda z, h: code_contrast_loss(z, h, labels, impl=impl, **options)


def plain_loss(labels: Tensor, margin: AngularMargin):
    """What a user would write, in the inputs' own dtype; CosFace's margin, which needs no acos."""

    def loss(z: Tensor, h: Tensor) -> Tensor:
        cosine = F.normalize(z) @ F.normalize(h).T
        own = F.one_hot(labels, len(h)).bool()
        return F.cross_entropy(64.0 * torch.where(own, cosine - margin.m3, cosine), labels, reduction="none")

    return loss


def check_against_float64(case, differentiate, agree, reduction="none"):
    tensors, candidates = case.tensors(), case.candidates()
    labels = case.labels(candidates)
    options = {"candidates": candidates, "reduction": reduction}
    truth = differentiate(loss_of(labels, "reference", **options), *(x.double() for x in tensors))
    given = differentiate(loss_of(labels, **options), *tensors)
    if reduction == "none":
        assert (given[0][labels < 0] == 0).all()
    for a, b in zip(given, truth, strict=True):
        agree(a, b)


@every_case
def test_values_and_gradients(case, differentiate, agree):
    check_against_float64(case, differentiate, agree)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction, differentiate, agree):
    check_against_float64(CASES["few"], differentiate, agree, reduction)


def test_a_softmax_in_several_steps(monkeypatch, differentiate, agree):
    """As for more candidates than a program takes at once (4,096)."""
    monkeypatch.setattr(kernels, "AT_ONCE", 16)
    kernels.softmax_constants.cache_clear()
    check_against_float64(Case(5, 200, 16), differentiate, agree)
    kernels.softmax_constants.cache_clear()


def test_every_margin(margin, differentiate, agree):
    tensors, labels = CASES["few"].tensors(), torch.tensor([3, 0, -1, 10, 3])
    truth = differentiate(loss_of(labels, "reference", margin=margin), *(x.double() for x in tensors))
    for a, b in zip(differentiate(loss_of(labels, margin=margin), *tensors), truth, strict=True):
        agree(a, b)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cosines_of_exactly_one(sign, margin, differentiate, agree):
    h, labels = torch.randn(3, 8), torch.tensor([0, 2, 1])
    z = 2 * sign * h[labels]
    truth = differentiate(loss_of(labels, "reference", margin=margin), z.double(), h.double())
    given = differentiate(loss_of(labels, margin=margin), z, h)
    agree(given[0], truth[0])
    # the margin's slope, some hundreds there, multiplies a tangent that is zero but for rounding
    slope = abs(margin.value_and_slope(torch.tensor(sign))[1].item())
    for a, b in zip(given[1:], truth[1:], strict=True):
        agree(a, b, noise=4 * torch.finfo(torch.float32).eps * 64 * slope)


@many_rows
def test_float16(case, differentiate, no_worse_than_pytorch):
    check_low_precision(case, torch.float16, differentiate, no_worse_than_pytorch)


@on_a_gpu
@pytest.mark.parametrize("case", [*MANY, Case(1024, 3072, 512)], ids=str)
def test_bfloat16(case, differentiate, no_worse_than_pytorch):
    check_low_precision(case, torch.bfloat16, differentiate, no_worse_than_pytorch)


def check_low_precision(case, dtype, differentiate, no_worse_than_pytorch):
    tensors, labels, margin = case.tensors(dtype), torch.randint(case.count, (case.batch,)), AngularMargin(1, 0, 0.35)
    loss = partial(loss_of, labels, margin=margin, reduction="none")
    truth = differentiate(loss(impl="reference"), *(x.double() for x in tensors))
    plain = differentiate(plain_loss(labels, margin), *tensors)
    for a, b, c in zip(differentiate(loss(), *tensors), plain, truth, strict=True):
        no_worse_than_pytorch(a, b, c)


def test_autocast(differentiate, no_worse_than_pytorch):
    """float32 inputs, products in autocast's dtype: errors are those of the plain loss under the same autocast."""
    case = MANY[1]
    tensors, labels, margin = case.tensors(), torch.randint(case.count, (case.batch,)), AngularMargin(1, 0, 0.35)
    loss = partial(loss_of, labels, margin=margin, reduction="none")
    truth = differentiate(loss(impl="reference"), *(x.double() for x in tensors))
    with torch.autocast(DEVICE, torch.float16):
        given, plain = differentiate(loss(), *tensors), differentiate(plain_loss(labels, margin), *tensors)
    exact = differentiate(loss(), *tensors)
    for a, b, c, d in zip(given, plain, truth, exact, strict=True):
        assert a.dtype == torch.float32 and not torch.equal(a, d)
        no_worse_than_pytorch(a, b, c)


def test_dtypes_may_differ(differentiate, agree):
    """float16 embeddings out of autocast, float32 vectors: products in float32, each gradient in its own dtype."""
    (z, h), labels = CASES["few"].tensors(), torch.tensor([3, 0, -1, 10, 3])
    z = z.half()
    truth = differentiate(loss_of(labels, "reference"), z.double(), h.double())
    loss, z_gradient, h_gradient = differentiate(loss_of(labels), z, h)
    assert z_gradient.dtype == torch.float16
    torch.testing.assert_close(z_gradient.double(), truth[1], rtol=2**-10, atol=1e-5)  # rounded once to 11 bits
    agree(loss, truth[0]), agree(h_gradient, truth[2])


def test_same_inputs_give_the_same_bits():
    case = MANY[0]
    tensors, labels = [x.requires_grad_() for x in case.tensors()], torch.randint(case.count, (case.batch,))
    first, second = (torch.autograd.grad(loss_of(labels)(*tensors), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_where_they_are_asked_for_alone():
    tensors, labels = CASES["few"].tensors(), torch.tensor([3, 0, -1, 10, 3])
    leaves = [x.requires_grad_() for x in tensors]
    complete = torch.autograd.grad(loss_of(labels)(*leaves), leaves)
    for wanted in range(2):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
        loss_of(labels)(*leaves).backward()
        gradient = leaves[wanted].grad
        assert gradient is not None and torch.equal(gradient, complete[wanted])
        assert leaves[1 - wanted].grad is None


def test_without_gradients():
    tensors, labels = CASES["few"].tensors(), torch.tensor([3, 0, -1, 10, 3])
    given = loss_of(labels)(*tensors)
    assert not given.requires_grad
    assert torch.equal(given, loss_of(labels)(*(x.requires_grad_() for x in tensors)).detach())


@pytest.mark.parametrize("zeroed", [0, 1])
def test_rows_of_zeros_have_no_direction_and_get_no_gradient(zeroed, differentiate):
    tensors = CASES["few"].tensors()
    tensors[zeroed][0] = 0
    found = differentiate(loss_of(torch.tensor([3, 0, -1, 10, 3])), *tensors)
    assert all(x.isfinite().all() for x in found)
    assert (found[1 + zeroed][0] == 0).all()


@pytest.mark.parametrize("rows", [0, 3], ids=["empty batch", "all ignored"])
def test_nothing_to_learn_from(rows, differentiate):
    for found in differentiate(loss_of(torch.full((rows,), -1)), *Case(rows, 4, 6).tensors()):
        assert (found == 0).all()


def test_one_identity_that_stands_often_costs_nothing(differentiate):
    """All candidates but the first are masked: a softmax over one."""
    candidates, labels = torch.full((70,), 8), torch.full((3,), 8)
    for found in differentiate(loss_of(labels, candidates=candidates), *Case(3, 70, 6).tensors()):
        assert found.abs().max() <= 1e-5  # 64 times a rounding of 1


@pytest.mark.parametrize("candidates", [None, torch.arange(11)], ids=["numbered", "named"])
def test_labels_that_are_no_candidate_make_the_loss_nan(candidates, monkeypatch):
    """On an accelerator values are not looked at; the kernel that reads them answers."""
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
    candidates = None if candidates is None else candidates.to(DEVICE)
    labels = torch.tensor([0, 11, -1, 10, 3])
    losses = loss_of(labels, candidates=candidates, reduction="none")(*CASES["few"].tensors())
    assert losses.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_a_number_reaches_the_loss(which, monkeypatch):
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
    tensors, labels = CASES["few"].tensors(), torch.tensor([3, 0, -1, 10, 3])
    tensors[which][1 - which, 3] = float("nan")  # embedding 1, or vector 0, with which every row is compared
    losses = loss_of(labels.clamp(min=0), reduction="none")(*tensors)
    assert losses.isnan().tolist() == ([False, True, False, False, False] if which == 0 else [True] * 5)


def test_non_contiguous(differentiate, agree):
    tensors, labels = CASES["few"].tensors(), torch.tensor([3, 0, -1, 10, 3])
    expected = differentiate(loss_of(labels), *tensors)
    strided = [x.T.contiguous().T for x in tensors]
    for a, b in zip(differentiate(loss_of(torch.stack([labels, labels], 1)[:, 0]), *strided), expected, strict=True):
        agree(a, b)


def test_second_derivative_is_refused_not_wrong():
    tensors = [x.requires_grad_() for x in CASES["few"].tensors()]
    loss = loss_of(torch.tensor([3, 0, -1, 10, 3]))(*tensors)
    gradients = torch.autograd.grad(loss, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradients[0].square().sum().backward()


@pytest.mark.parametrize(
    "options",
    [{}, {"margin": AngularMargin(1.2, 0.4, 0.1, "straight_through"), "reduction": "none"}, {"named": True}],
    ids=["default", "rows", "candidates"],
)
def test_compiled_equals_eager(options, compiles):
    labels = torch.tensor([3, 0, -1, 10, 3])
    if options.pop("named", False):
        options = {"candidates": torch.tensor([3, 5, 0, 3, 10, 0, 7, 8, 9, 11, 12])}
    compiles(loss_of(labels, **options), *CASES["few"].tensors())


@pytest.mark.parametrize("masked", [False, True])
def test_custom_ops_keep_their_word(masked):
    """Schemas and fake implementations agree with what runs."""
    (z, h), labels = CASES["few"].tensors(), torch.tensor([3, 0, -1, 10, 3])
    competes = torch.arange(11) != 5 if masked else None
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    calls: list[tuple[bool, Reduction]] = [(False, "sum"), (True, "none"), (True, "mean")]
    for save, reduction in calls:
        options = CodeContrastOptions(AngularMargin(), 64.0, reduction, torch.float32)
        inputs = (z, h, reduction, torch.float32, save, labels, competes, *astuple(options.margin), options.scale)
        check(torch.ops.gif_kernels.code_contrast_forward.default, inputs)
    _, *saved = kernels.forward(z, h, labels, competes, options, save)
    for needs in ((True, True), (True, False), (False, True)):
        backward = (z, h, *needs, *saved, torch.ones(()), 64.0, torch.float32)
        check(torch.ops.gif_kernels.code_contrast_backward.default, backward)


@on_a_gpu
def test_cuda_graph():
    case = Case(512, 1536, 512)
    tensors, candidates = [x.requires_grad_() for x in case.tensors(torch.bfloat16)], case.candidates()
    labels, incoming = case.labels(candidates), torch.ones(())

    def step() -> tuple[Tensor, ...]:
        loss = loss_of(labels, candidates=candidates)(*tensors)
        return loss, *torch.autograd.grad(loss, tensors, incoming)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_gradients_at_once_are_to_the_bit_what_autograd_gives(dtype):
    case = Case(7, 11, 16)
    (z, h), candidates = case.tensors(dtype), case.candidates()
    labels = case.labels(candidates)
    options: dict[str, Any] = {"candidates": candidates, "scale": 16.0, "impl": "triton"}
    z, h = z.requires_grad_(), h.requires_grad_()
    losses = code_contrast_loss(z, h, labels, reduction="none", **options)
    expected = (losses, *torch.autograd.grad(losses.sum(), (z, h)))
    for a, b in zip(code_contrast_gradients(z, h, labels, **options), expected, strict=True):
        assert a.dtype == b.dtype and not a.requires_grad and torch.equal(a, b)


def test_both_gradients_in_a_graph_are_those_of_eager_mode():
    case = Case(4, 6, 5)
    (z, h), candidates = case.tensors(), case.candidates()
    labels = case.labels(candidates)
    compiled = torch.compile(code_contrast_gradients, fullgraph=True, backend="aot_eager")
    given, eager = (
        op(z, h, labels, candidates=candidates, impl="triton") for op in (compiled, code_contrast_gradients)
    )
    assert all(torch.equal(a, b) for a, b in zip(given, eager, strict=True))
