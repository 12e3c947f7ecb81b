"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gif_kernels import AngularMargin, CodeRegression, dispatch, token_margin_loss
from gif_kernels.device.tuning import MAX_VOCAB
from gif_kernels.dispatch import Impl
from gif_kernels.reduction import Reduction
from gif_kernels.token_margin.options import TokenMarginOptions

kernels = pytest.importorskip("gif_kernels.token_margin.kernels", reason="Triton is not installed")
function = pytest.importorskip("gif_kernels.token_margin.function", reason="Triton is not installed")
cosine_gradients = pytest.importorskip("gif_kernels.device.cosine_gradients", reason="Triton is not installed")
shared_reduction = pytest.importorskip("gif_kernels.device.reduction", reason="Triton is not installed")
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
    """Random inputs of one shape; ``inner`` is d' where there are projections."""

    batch: int
    length: int
    vocab: int
    width: int
    inner: int | None = None

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """embeddings, centers and, where there are any, projections."""
        z = torch.randn(self.batch, self.width)
        w = torch.randn(self.length, self.vocab, self.inner or self.width)
        p = [] if self.inner is None else [torch.randn(self.length, self.inner, self.width) / self.width**0.5]
        return [x.to(dtype) for x in (z, w, *p)]

    def codes(self) -> Tensor:
        """Random codes; every third row is ignored."""
        codes = torch.randint(self.vocab, (self.batch, self.length))
        codes[1::3] = -1
        return codes

    def weights(self) -> Tensor:
        return torch.rand(self.length).softmax(0)


# widths under, over and between the chunks (16 to 64); batches of one row, a few, over a block (32 or 64); vocabularies
# that fill 16 columns, 32 and more; l v under and over a block of columns (64, 128)
CASES = {
    "one of each": Case(1, 1, 2, 7),
    "few": Case(5, 2, 5, 48),
    "over a block": Case(67, 4, 20, 130),
    "wide vocabulary": Case(5, 3, 33, 48),
    "one row projected": Case(1, 1, 2, 7, 7),
    "projected to fewer": Case(67, 4, 5, 48, 7),
    "projected to more": Case(5, 2, 33, 7, 130),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SMALL = [CASES["few"], replace(CASES["few"], inner=7)]
MANY = [Case(67, 4, 20, 130), Case(67, 4, 33, 48), Case(67, 4, 5, 48, 7), Case(67, 2, 33, 7, 130)]
many_rows = pytest.mark.parametrize("case", MANY, ids=str)  # enough to compare two errors: one may be zero by chance
plain_and_projected = pytest.mark.parametrize("case", SMALL, ids=["plain", "projected"])


def loss_of(codes: Tensor, impl: Impl = "triton", **options):
    """token_margin_loss of (embeddings, centers) or (embeddings, centers, projections)."""

    def loss(z: Tensor, w: Tensor, p: Tensor | None = None) -> Tensor:
        return token_margin_loss(z, w, codes, projections=p, impl=impl, **options)

    return loss


def plain_loss(codes: Tensor, margin: AngularMargin):
    """What a user would write, in the inputs' own dtype; CosFace's margin, which needs no acos."""

    def loss(z: Tensor, w: Tensor, p: Tensor | None = None) -> Tensor:
        u = F.normalize(z)[:, None].expand(-1, len(w), -1)
        if p is not None:
            u = F.normalize(torch.einsum("bld,lid->bli", u, p), dim=-1)
        cosine = torch.einsum("bli,lvi->blv", u, F.normalize(w, dim=-1))
        own = F.one_hot(codes.clamp(min=0), w.shape[1]).bool()
        logits = 64.0 * torch.where(own, cosine - margin.m3, cosine)
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), ignore_index=-1, reduction="none")
        return losses.view(codes.shape).mean(1)

    return loss


# ---- values and gradients against float64


@every_case
def test_values_and_gradients(case, differentiate, agree):
    tensors, codes = case.tensors(), case.codes()
    options = {"token_weights": case.weights(), "reduction": "none"}
    truth = differentiate(loss_of(codes, "reference", **options), *(x.double() for x in tensors))
    given = differentiate(loss_of(codes, **options), *tensors)
    assert (given[0][codes[:, 0] < 0] == 0).all()
    for a, b in zip(given, truth, strict=True):
        agree(a, b)


def test_every_margin(margin, differentiate, agree):
    case = CASES["few"]
    tensors, codes = case.tensors(), case.codes()
    truth = differentiate(loss_of(codes, "reference", margin=margin), *(x.double() for x in tensors))
    for a, b in zip(differentiate(loss_of(codes, margin=margin), *tensors), truth, strict=True):
        agree(a, b)


@pytest.mark.parametrize("m2", [-4.0, -0.2, 0.5, 3.0, 3.5, 7.0])
def test_shifts_past_pi(m2, differentiate, agree):
    """Angles all over (0, pi), so that the shifted angle passes pi on some rows and not on others."""
    angle = torch.linspace(0.2, 3.0, 67)[:, None]
    w = F.normalize(torch.randn(1, 5, 8), dim=-1)
    codes = torch.randint(5, (67, 1))
    own = w[0, codes[:, 0]]
    across = torch.randn(67, 8)
    across = F.normalize(across - (across * own).sum(1, keepdim=True) * own)
    z = angle.cos() * own + angle.sin() * across
    options: dict[str, Any] = {"margin": AngularMargin(m2=m2), "scale": 4.0, "reduction": "none"}
    truth = differentiate(loss_of(codes, "reference", **options), z.double(), w.double())
    for a, b in zip(differentiate(loss_of(codes, **options), z, w), truth, strict=True):
        agree(a, b)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cosines_of_exactly_one(sign, margin, differentiate, agree):
    w = torch.randn(1, 3, 8)
    codes = torch.tensor([[0], [2], [1]])
    z = 2 * sign * w[0, codes[:, 0]]
    truth = differentiate(loss_of(codes, "reference", margin=margin), z.double(), w.double())
    given = differentiate(loss_of(codes, margin=margin), z, w)
    agree(given[0], truth[0])
    # the margin's slope, some hundreds there, multiplies a tangent that is zero but for rounding
    slope = abs(margin.value_and_slope(torch.tensor(sign))[1].item())
    for a, b in zip(given[1:], truth[1:], strict=True):
        agree(a, b, noise=4 * torch.finfo(torch.float32).eps * 64 * slope)


@many_rows
def test_float16(case, differentiate, no_worse_than_pytorch):
    check_low_precision(case, torch.float16, differentiate, no_worse_than_pytorch)


@on_a_gpu
@many_rows
def test_bfloat16(case, differentiate, no_worse_than_pytorch):
    check_low_precision(case, torch.bfloat16, differentiate, no_worse_than_pytorch)


def check_low_precision(case, dtype, differentiate, no_worse_than_pytorch):
    margin, codes = AngularMargin(m2=0.0, m3=0.35), case.codes()
    tensors = case.tensors(dtype)
    loss = partial(loss_of, codes, margin=margin, reduction="none")
    truth = differentiate(loss(impl="reference"), *(x.double() for x in tensors))
    naive = differentiate(plain_loss(codes, margin), *tensors)
    for a, b, c in zip(differentiate(loss(), *tensors), naive, truth, strict=True):
        no_worse_than_pytorch(a, b, c)


@plain_and_projected
def test_dtypes_may_differ(case, differentiate, agree):
    """float16 embeddings out of autocast, float32 parameters: products in float32, each gradient in its own dtype."""
    (z, *parameters), codes = case.tensors(), case.codes()
    z = z.half()
    truth = differentiate(loss_of(codes, "reference"), z.double(), *(x.double() for x in parameters))
    loss, z_gradient, *gradients = differentiate(loss_of(codes), z, *parameters)
    assert z_gradient.dtype == torch.float16
    torch.testing.assert_close(z_gradient.double(), truth[1], rtol=2**-10, atol=1e-5)  # rounded once to 11 bits
    for a, b in zip((loss, *gradients), (truth[0], *truth[2:]), strict=True):
        agree(a, b)


@plain_and_projected
def test_autocast(case, differentiate, no_worse_than_pytorch):
    """float32 inputs, products in autocast's dtype: errors are those of the plain loss under the same autocast."""
    case, margin = replace(case, batch=67), AngularMargin(m2=0.0, m3=0.35)
    tensors, codes = case.tensors(), case.codes()
    loss = partial(loss_of, codes, margin=margin, reduction="none")
    truth = differentiate(loss(impl="reference"), *(x.double() for x in tensors))
    with torch.autocast(DEVICE, torch.float16):
        given, plain = differentiate(loss(), *tensors), differentiate(plain_loss(codes, margin), *tensors)
    exact = differentiate(loss(), *tensors)
    assert [x.dtype for x in given] == [torch.float32] * len(given)
    for a, b, c, d in zip(given, plain, truth, exact, strict=True):
        assert not torch.equal(a, d)
        no_worse_than_pytorch(a, b, c)


# ---- the pull towards code vectors


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gathered", [True, False], ids=["rows of a table", "row by row"])
@plain_and_projected
def test_pulled(case, gathered, reduction, differentiate, agree):
    case = replace(case, batch=67)
    tensors, codes = case.tensors(), case.codes()
    targets = torch.randn(31 if gathered else case.batch, case.width).half()
    rows = None
    if gathered:
        rows = torch.randint(31, (case.batch,))
        rows[::5] = -1
    options = {"regression": CodeRegression(targets, rows, 0.7), "reduction": reduction}
    truth = differentiate(loss_of(codes, "reference", **options), *(x.double() for x in tensors))
    for a, b in zip(differentiate(loss_of(codes, **options), *tensors), truth, strict=True):
        agree(a, b)


# ---- sums over many blocks


@pytest.mark.parametrize("parts", [1, 3])
@plain_and_projected
def test_parts_of_the_batch(case, parts, monkeypatch, differentiate, agree):
    """Several blocks of rows a part, and parts that do not fill: the sums for the centre gradient."""
    blocks_d = -(-(case.inner or case.width) // 64)
    monkeypatch.setattr(cosine_gradients, "PROGRAMS", parts * blocks_d * (1 if case.inner is None else case.length))
    case = replace(case, batch=257)  # 9 blocks of 32 rows, the last of one row
    tensors, codes = case.tensors(), case.codes()
    options: dict[str, Any] = {"reduction": "none"}
    truth = differentiate(loss_of(codes, "reference", **options), *(x.double() for x in tensors))
    for a, b in zip(differentiate(loss_of(codes, **options), *tensors), truth, strict=True):
        agree(a, b)


@plain_and_projected
def test_same_inputs_give_the_same_bits(case):
    case = replace(case, batch=67)
    tensors, codes = [x.requires_grad_() for x in case.tensors()], case.codes()
    first, second = (torch.autograd.grad(loss_of(codes)(*tensors), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- what is computed and what is left out


@plain_and_projected
def test_gradients_where_they_are_asked_for_alone(case):
    tensors, codes = case.tensors(), case.codes()
    leaves = [x.requires_grad_() for x in tensors]
    complete = torch.autograd.grad(loss_of(codes)(*leaves), leaves)
    for subset in range(1, 2 ** len(tensors)):
        leaves = [x.detach().requires_grad_(bool(subset >> i & 1)) for i, x in enumerate(tensors)]
        loss_of(codes)(*leaves).backward()
        for leaf, gradient in zip(leaves, complete, strict=True):
            assert torch.equal(leaf.grad, gradient) if leaf.requires_grad else leaf.grad is None


def test_without_gradients():
    case = CASES["few"]
    tensors, codes = case.tensors(), case.codes()
    given = loss_of(codes)(*tensors)
    assert not given.requires_grad
    assert torch.equal(given, loss_of(codes)(*(x.requires_grad_() for x in tensors)).detach())


@plain_and_projected
def test_rows_of_zeros_have_no_direction_and_get_no_gradient(case, differentiate):
    for zeroed in range(2 if case.inner is None else 3):
        tensors, codes = case.tensors(), torch.randint(5, (5, 2))
        tensors[zeroed][0] = 0  # an embedding, a token's centres, or a token's projection
        found = differentiate(loss_of(codes), *tensors)
        assert all(x.isfinite().all() for x in found)
        assert (found[1 + zeroed][0] == 0).all()


@pytest.mark.parametrize("rows", [0, 3], ids=["empty batch", "all ignored"])
@plain_and_projected
def test_nothing_to_learn_from(case, rows, differentiate):
    tensors = replace(case, batch=rows).tensors()
    for found in differentiate(loss_of(torch.full((rows, 2), -1)), *tensors):
        assert (found == 0).all()


def test_an_embedding_that_is_not_a_number_reaches_the_loss(monkeypatch):
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)  # as on an accelerator
    (z, w), codes = CASES["few"].tensors(), torch.randint(5, (5, 2))
    z[2, 3] = float("nan")
    losses = loss_of(codes, reduction="none")(z, w)
    assert losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("wrong", [[5, 0], [-2, 0], [0, -1], [-1, 0], [2**40, 0]], ids=str)
def test_codes_out_of_range_make_the_loss_nan(wrong, monkeypatch):
    """On an accelerator values are not looked at; the kernel that reads them answers."""
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
    (z, w), codes = CASES["few"].tensors(), torch.randint(5, (5, 2))
    codes[3] = torch.tensor(wrong)
    losses = loss_of(codes, reduction="none")(z, w)
    assert losses.isnan().tolist() == [False, False, False, True, False]
    assert loss_of(codes)(z, w).isnan()


def test_target_rows_out_of_range_make_the_loss_nan(monkeypatch):
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
    (z, w), codes = CASES["few"].tensors(), torch.randint(5, (5, 2))
    regression = CodeRegression(torch.randn(3, 48), torch.tensor([0, 3, -2, -1, 2]))
    losses = loss_of(codes, regression=regression, reduction="none")(z, w)
    assert losses.isnan().tolist() == [False, True, True, False, False]


@plain_and_projected
def test_non_contiguous(case, differentiate, agree):
    tensors, codes = case.tensors(), case.codes()
    expected = differentiate(loss_of(codes), *tensors)
    strided = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors]
    codes = codes.T.contiguous().T
    for a, b in zip(differentiate(loss_of(codes), *strided), expected, strict=True):
        agree(a, b)


def test_as_many_centers_as_the_kernels_hold_and_no_more(differentiate, agree):
    z, w, codes = torch.randn(2, 8), torch.randn(1, MAX_VOCAB, 8), torch.tensor([[MAX_VOCAB - 1], [0]])
    truth = differentiate(loss_of(codes, "reference"), z.double(), w.double())
    for a, b in zip(differentiate(loss_of(codes), z, w), truth, strict=True):
        agree(a, b)
    with pytest.raises(ValueError, match=r'impl="triton": at most 256 centers a token, got 257; use impl="auto"'):
        loss_of(codes)(z, torch.randn(1, MAX_VOCAB + 1, 8))


@plain_and_projected
def test_second_derivative_is_refused_not_wrong(case):
    tensors = [x.requires_grad_() for x in case.tensors()]
    gradients = torch.autograd.grad(loss_of(case.codes())(*tensors), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradients[0].square().sum().backward()


# ---- compilation


@pytest.mark.parametrize("margin", [AngularMargin(), AngularMargin(1.2, 0.4, 0.1, "straight_through")], ids=str)
@plain_and_projected
def test_compiled_equals_eager(case, margin, compiles):
    compiles(loss_of(case.codes(), margin=margin, token_weights=case.weights(), reduction="none"), *case.tensors())


def test_compiled_gives_the_gradients_asked_for_alone(compiled, agree):
    (z, w), codes = CASES["few"].tensors(), CASES["few"].codes()
    loss = compiled(loss_of(codes))
    for leaf, other in ((z, w), (w, z)):
        leaf.requires_grad_(), other.requires_grad_(False)
        (given,) = torch.autograd.grad(loss(z, w), leaf)
        (expected,) = torch.autograd.grad(loss_of(codes)(z, w), leaf)
        agree(given, expected)


@plain_and_projected
def test_compiled_equals_eager_with_a_pull(case, compiles):
    regression = CodeRegression(torch.randn(7, case.width), torch.tensor([0, 6, -1, 3, 3]), 0.7)
    compiles(loss_of(case.codes(), regression=regression), *case.tensors())


@plain_and_projected
def test_custom_ops_keep_their_word(case):
    """Schemas and fake implementations agree with what runs."""
    z, w, *projections = case.tensors()
    operand = torch.float32
    rows = function._project(z, *projections, operand) if projections else z.unsqueeze(1)
    pulls = [(None, None)] if projections else [(None, None), (torch.randn(3, case.width), torch.arange(5) % 3)]
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    calls: list[tuple[bool, Reduction]] = [(False, "sum"), (True, "none"), (True, "mean")]
    for targets, target_rows in pulls:
        for save, reduction in calls:
            options = TokenMarginOptions(AngularMargin(), 64.0, 0.5, reduction, operand)
            numbers = (*astuple(options.margin), options.scale, options.pull, operand)
            codes, weights = case.codes(), case.weights()
            inputs = (rows, w, targets, reduction, save, codes, weights, target_rows, *numbers)
            check(torch.ops.gif_kernels.token_margin_forward.default, inputs)
        _, share, *saved, pull = kernels.forward(rows, w, codes, weights, targets, target_rows, options, save)
        pulled = (None, None, None) if targets is None else (pull, targets, target_rows)
        for needs in ((True, True), (True, False), (False, True)):
            backward = (rows, w, *needs, *saved, *pulled, torch.ones(()), share, operand)
            check(torch.ops.gif_kernels.token_margin_backward.default, backward)


# ---- launches


class Counted:
    """A kernel that counts its launches by name."""

    def __init__(self, kernel, counts):
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.counts.append(self.kernel.__name__)
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize(
    ("reduction", "pulled", "launches"), [("none", False, 3), ("none", True, 3), ("mean", False, 4), ("mean", True, 4)]
)
def test_launches_of_a_step_without_projections(reduction, pulled, launches, monkeypatch):
    """Three for the loss and its gradients, one more for a mean; around them nothing touches the device."""
    counts: list[str] = []
    for module, names in (
        (kernels, ["token_margin_forward"]),
        (cosine_gradients, ["cosine_backward", "center_gradient"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), counts))
    monkeypatch.setattr(shared_reduction, "reduce_losses", Counted(shared_reduction.reduce_losses, counts))
    monkeypatch.setattr("gif_kernels.checks.looks_at_values", lambda tensor: False)
    case = CASES["few"]
    tensors = [x.requires_grad_() for x in case.tensors()]
    regression = CodeRegression(torch.randn(9, case.width), torch.randint(9, (5,))) if pulled else None
    codes, weights, incoming = case.codes(), case.weights(), torch.ones(5 if reduction == "none" else ())
    with Dispatched() as dispatched:
        loss = loss_of(codes, token_weights=weights, regression=regression, reduction=reduction)(*tensors)
        torch.autograd.grad(loss, tensors, incoming)
    assert len(counts) == launches
    if not dispatch.INTERPRETING:  # which works by such operations itself
        assert dispatched.launching == []


class Dispatched(TorchDispatchMode):
    """PyTorch's own operations that launch something: not allocations and views."""

    def __init__(self):
        super().__init__()
        self.launching = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not (name.startswith(("empty", "new_empty")) or function.is_view):
            self.launching.append(name)
        return function(*args, **(kwargs or {}))


# ---- on a GPU alone


@on_a_gpu
@pytest.mark.parametrize(("batch", "width"), [(1000, 512), (3000, 768)])
def test_sizes_of_training(batch, width, differentiate, no_worse_than_pytorch):
    case = Case(batch, 5, 20, width)
    check_low_precision(case, torch.bfloat16, differentiate, no_worse_than_pytorch)
    check_low_precision(replace(case, inner=width), torch.bfloat16, differentiate, no_worse_than_pytorch)


@on_a_gpu
def test_offsets_past_int32():
    """The last rows of a batch whose elements number more than 2^31."""
    width, rows = 512, 2**22 + 100
    z, w = torch.randn(rows, width, dtype=torch.bfloat16), torch.randn(1, 5, width, dtype=torch.bfloat16)
    codes = torch.randint(5, (rows, 1))
    z.requires_grad_()
    losses = loss_of(codes, reduction="none")(z, w)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    last = z.detach()[-100:].requires_grad_()
    expected = loss_of(codes[-100:], reduction="none")(last, w)
    assert torch.equal(losses[-100:], expected)
    assert torch.equal(gradient[-100:], torch.autograd.grad(expected.sum(), last)[0])


@on_a_gpu
def test_three_launches_forward_and_backward():
    case = Case(512, 5, 20, 512)
    tensors, codes, weights = [x.requires_grad_() for x in case.tensors(torch.bfloat16)], case.codes(), case.weights()

    def step() -> None:
        losses = loss_of(codes, token_weights=weights, reduction="none")(*tensors)
        torch.autograd.grad(losses, tensors, torch.ones(()).expand(512))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in launched if name.startswith(("token_margin", "cosine_backward", "center_gradient"))]
    assert len(ours) == 3
    assert all(name in ours or "fill" in name.lower() for name in launched)  # the ones, and poison


@on_a_gpu
def test_cuda_graph():
    case = Case(512, 5, 20, 512)
    tensors, codes, weights = [x.requires_grad_() for x in case.tensors(torch.bfloat16)], case.codes(), case.weights()
    incoming = torch.ones(())

    def step() -> tuple[Tensor, ...]:
        loss = loss_of(codes, token_weights=weights)(*tensors)
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
