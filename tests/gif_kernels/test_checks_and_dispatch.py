"""What every op promises alike: which arguments it refuses and how, which implementation runs, layouts, autocast."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import gif_kernels
from gif_kernels import checks, dispatch


@dataclass(frozen=True)
class Op:
    """An op, valid arguments for it, and how it shows what it found."""

    function: Callable[..., Any]
    tensors: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True
    in_place: str | None = None
    """The argument that it changes."""
    takes_not_finite: bool = False
    """NaN and infinity are no mistake: it says what they do."""

    def trained(self) -> list[str]:
        """The arguments that get a gradient."""
        tensors = self.tensors() if self.differentiable else {}
        return [name for name, x in tensors.items() if x.is_floating_point() and name != "token_weights"]

    def leaves(self, tensors: dict[str, Tensor], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """``tensors``, of which ``names`` (all that are trained) require a gradient."""
        names = self.trained() if names is None else names
        return {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}

    def __call__(
        self, tensors: dict[str, Tensor], *, forward_in: AbstractContextManager[Any] | None = None, **options: Any
    ) -> list[Tensor]:
        """Outputs, then the changed argument, then gradients of the trained arguments."""
        given = self.leaves(tensors)
        if self.in_place:
            given[self.in_place] = given[self.in_place].clone()
        with forward_in or nullcontext():
            found = self.function(**given, **self.options, **options)
        outputs = list(found) if isinstance(found, tuple) else [found]
        if self.in_place:
            outputs.append(given[self.in_place])
        if self.differentiable:
            outputs += torch.autograd.grad(outputs[0], [given[name] for name in self.trained()])
        return outputs


def token_margin_tensors() -> dict[str, Tensor]:
    return {
        "embeddings": torch.randn(4, 6),
        "centers": torch.randn(2, 3, 5),
        "codes": torch.tensor([[0, 2], [-1, -1], [1, 1], [2, 0]]),
        "projections": torch.randn(2, 5, 6),
        "token_weights": torch.tensor([0.25, 0.75]),
    }


CONTRAST_SCALE = 8.0
"""At 64, three random rows may all be right to the last digit: nothing is left of their gradients to compare."""


def code_contrast_tensors() -> dict[str, Tensor]:
    return {
        "embeddings": torch.randn(3, 6),
        "vectors": torch.randn(4, 6),
        "labels": torch.tensor([5, 2, -1]),
        "candidates": torch.tensor([2, 5, 9, 2]),
    }


OPS = {
    "token_margin_loss": Op(gif_kernels.token_margin_loss, token_margin_tensors),
    "code_regression_loss": Op(
        gif_kernels.code_regression_loss, lambda: {"embeddings": torch.randn(4, 6), "targets": torch.randn(4, 6)}
    ),
    "code_contrast_loss": Op(gif_kernels.code_contrast_loss, code_contrast_tensors, {"scale": CONTRAST_SCALE}),
    "code_contrast_gradients": Op(
        lambda **given: gif_kernels.code_contrast_gradients(**given)[0],  # its gradients have tests of their own
        code_contrast_tensors,
        {"scale": CONTRAST_SCALE},
        differentiable=False,
    ),
    "gaussian_potential": Op(gif_kernels.gaussian_potential, lambda: {"vectors": torch.randn(5, 6)}),
    "uniformity_step_": Op(
        gif_kernels.uniformity_step_,
        lambda: {"table": torch.randn(5, 6), "index": torch.tensor([3, 0, 4])},
        {"lr": 0.1},
        differentiable=False,
        in_place="table",
    ),
    "vector_step_": Op(
        gif_kernels.vector_step_,
        lambda: {
            "table": torch.randn(5, 6),
            "rows": torch.tensor([3, 0, -1, 3]),
            "gradient": torch.randn(4, 6),
            "row_ids": torch.tensor([7, 2, 9, 4, 1]),
        },
        {"lr": 0.1},
        differentiable=False,
        in_place="table",
        takes_not_finite=True,
    ),
    "nearest_centroid": Op(
        gif_kernels.nearest_centroid,
        lambda: {
            "vectors": torch.randn(5, 6),
            "centroids": torch.randn(2, 3, 6),
            "offsets": torch.tensor([0, 2, 5]),
        },
        differentiable=False,
    ),
    "max_cosine": Op(
        gif_kernels.max_cosine,
        lambda: {"vectors": torch.randn(5, 6), "others": torch.randn(4, 6)},
        differentiable=False,
    ),
}

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_differentiable_op = pytest.mark.parametrize(
    "op", [pytest.param(op, id=name) for name, op in OPS.items() if op.differentiable]
)
every_tensor = pytest.mark.parametrize(
    ("op", "name"),
    [pytest.param(op, name, id=f"{key}-{name}") for key, op in OPS.items() for name in op.tensors()],
)
every_float = pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{key}-{name}")
        for key, op in OPS.items()
        for name, x in op.tensors().items()
        if x.is_floating_point()
    ],
)
every_integer = pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{key}-{name}")
        for key, op in OPS.items()
        for name, x in op.tensors().items()
        if not x.is_floating_point()
    ],
)


def test_every_public_op_is_here_and_registered():
    assert set(OPS) == set(dispatch.ops()) <= set(gif_kernels.__all__)


# ---- arguments


@every_tensor
def test_not_a_tensor(op, name):
    tensors = op.tensors()
    tensors[name] = tensors[name].tolist()
    with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got list"):
        op.function(**tensors, **op.options)


@every_float
@pytest.mark.parametrize("wrong", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_not_floating_point(op, name, wrong):
    tensors = op.tensors()
    tensors[name] = tensors[name].to(wrong)
    with pytest.raises(TypeError, match=rf"{name} must be float32, .*, got {re.escape(str(wrong))}; convert it"):
        op.function(**tensors, **op.options)


@every_integer
@pytest.mark.parametrize("wrong", [torch.float32, torch.bool], ids=str)
def test_not_integer(op, name, wrong):
    tensors = op.tensors()
    tensors[name] = tensors[name].to(wrong)
    with pytest.raises(TypeError, match=rf"{name} must be an integer tensor, got {re.escape(str(wrong))}; convert it"):
        op.function(**tensors, **op.options)


@every_integer
@pytest.mark.parametrize("narrow", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_every_integer_dtype_will_do(op, name, narrow):
    tensors = op.tensors()
    if narrow == torch.uint8:  # has no -1
        tensors[name] = torch.where(tensors[name] < 0, tensors[name][0], tensors[name])
    expected = op(tensors)
    tensors[name] = tensors[name].to(narrow)
    assert all(torch.equal(a, b) for a, b in zip(op(tensors), expected, strict=True))


@every_tensor
def test_wrong_number_of_dimensions(op, name):
    tensors = op.tensors()
    tensors[name] = tensors[name].unsqueeze(0)
    shape = re.escape(str(tuple(tensors[name].shape)))
    with pytest.raises(ValueError, match=rf"{name} must have shape \(.*\), got {shape}"):
        op.function(**tensors, **op.options)


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        ("token_margin_loss", "embeddings", (4, 0)),
        ("token_margin_loss", "centers", (2, 0, 5)),
        ("token_margin_loss", "codes", (4, 3)),
        ("token_margin_loss", "codes", (3, 2)),
        ("token_margin_loss", "projections", (2, 6, 5)),
        ("token_margin_loss", "token_weights", (3,)),
        ("code_regression_loss", "targets", (4, 5)),
        ("code_regression_loss", "targets", (3, 6)),
        ("code_contrast_loss", "vectors", (4, 5)),
        ("code_contrast_loss", "labels", (4,)),
        ("code_contrast_loss", "candidates", (3,)),
        ("code_contrast_loss", "vectors", (0, 6)),
        ("gaussian_potential", "vectors", (5, 0)),
        ("nearest_centroid", "centroids", (2, 3, 5)),
        ("nearest_centroid", "centroids", (2, 0, 6)),
        ("nearest_centroid", "offsets", (4,)),
        ("max_cosine", "others", (4, 5)),
        ("max_cosine", "others", (0, 6)),
    ],
)
def test_sizes_that_do_not_fit(op, name, shape):
    tensors = OPS[op].tensors()
    tensors[name] = tensors[name].new_zeros(shape)
    with pytest.raises(ValueError, match=rf"must have shape \(.*\), got {re.escape(str(shape))}"):
        OPS[op].function(**tensors, **OPS[op].options)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{key}-{name}")
        for key, op in OPS.items()
        for name, x in op.tensors().items()
        if x.is_floating_point() and not op.takes_not_finite
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(op, name, value):
    tensors = op.tensors()
    tensors[name].flatten()[0] = value
    with pytest.raises(ValueError, match=rf"{name} hold NaN or infinity, wanted finite numbers; look for"):
        op.function(**tensors, **op.options)


@pytest.mark.parametrize(
    ("op", "name", "values", "message"),
    [
        ("token_margin_loss", "codes", [[0, 3]] * 4, r"codes must lie in \[-1, 3\), got values from 0 to 3; -1"),
        ("token_margin_loss", "codes", [[-2, 0]] * 4, r"codes must lie in \[-1, 3\), got values from -2 to 0"),
        ("token_margin_loss", "codes", [[0, -1]] * 4, "a row of codes must be -1 in every entry or in none"),
        ("code_contrast_loss", "labels", [5, 2, -2], r"labels must lie in \[-1, .*got values from -2 to 5; -1 ignores"),
        ("code_contrast_loss", "labels", [5, 3, 2], "every label must be among the candidates; add the batch's own"),
        ("code_contrast_loss", "labels", [5, 10, 2], "every label must be among the candidates"),
        ("code_contrast_loss", "candidates", [5, 2, -1, 0], r"candidates must lie in \[0, .*got values from -1 to 5"),
        ("uniformity_step_", "index", [0, 5], r"index must lie in \[0, 5\), got values from 0 to 5; name rows"),
        ("uniformity_step_", "index", [0, -1], r"index must lie in \[0, 5\), got values from -1 to 0"),
        ("uniformity_step_", "index", [3, 0, 3], "index names a row more than once; give distinct rows"),
        ("uniformity_step_", "index", [3], "index must name at least 2 rows to form a pair, got 1"),
        ("nearest_centroid", "offsets", [0, 2, 6], r"offsets must lie in \[0, 6\), got values from 0 to 6; rows"),
        ("nearest_centroid", "offsets", [0, 2, 4], "offsets must go from 0 to 5, the number of vectors, and never"),
        ("nearest_centroid", "offsets", [1, 2, 5], "offsets must go from 0 to 5"),
        ("nearest_centroid", "offsets", [0, 6, 5], r"offsets must lie in \[0, 6\)"),
    ],
)
def test_integers_out_of_range(op, name, values, message):
    tensors = OPS[op].tensors()
    tensors[name] = torch.tensor(values)
    with pytest.raises(ValueError, match=message):
        OPS[op].function(**tensors, **OPS[op].options)


def test_no_integers_are_in_every_range():
    none = torch.zeros(0, 2, dtype=torch.int32)
    given = checks.integer("codes", none, ("B", 2), low=0, high=0, hint="", whole_rows=True)
    assert (given.shape, given.dtype) == ((0, 2), torch.int64)


def test_offsets_that_decrease():
    centroids, offsets = torch.randn(3, 2, 6), torch.tensor([0, 4, 3, 5])
    with pytest.raises(ValueError, match="offsets must go from 0 to 5, the number of vectors, and never decrease"):
        gif_kernels.nearest_centroid(torch.randn(5, 6), centroids, offsets=offsets)


def test_labels_without_candidates_number_the_vectors():
    tensors: dict[str, Any] = code_contrast_tensors() | {"candidates": None}
    message = r"labels must lie in \[-1, 4\), got values from -1 to 5; .* give candidates where"
    with pytest.raises(ValueError, match=message):
        gif_kernels.code_contrast_loss(**tensors)


def test_widths_that_need_projections():
    tensors: dict[str, Any] = token_margin_tensors() | {"projections": None}
    message = r"centers have width 5 and embeddings 6; .* give projections of shape \(2, 5, 6\)"
    with pytest.raises(ValueError, match=message):
        gif_kernels.token_margin_loss(**tensors)


def test_token_weights_are_not_trained():
    tensors: dict[str, Any] = token_margin_tensors()
    tensors["token_weights"].requires_grad_()
    with pytest.raises(ValueError, match="token_weights are constants of the loss; detach them"):
        gif_kernels.token_margin_loss(**tensors)


@pytest.mark.parametrize(
    ("call", "rows"),
    [(gif_kernels.gaussian_potential, 1), (gif_kernels.max_cosine, 1)],
)
def test_too_few_rows(call, rows):
    with pytest.raises(ValueError, match=f"vectors must have at least 2 rows.*got {rows}"):
        call(torch.randn(rows, 6))


@pytest.mark.parametrize(
    ("op", "option"),
    [
        ("token_margin_loss", "scale"),
        ("code_contrast_loss", "scale"),
        ("gaussian_potential", "t"),
        ("uniformity_step_", "t"),
        ("uniformity_step_", "lr"),
    ],
)
def test_numbers_that_must_be_positive(op, option):
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"{option} must be a finite number > 0, got {value}"):
            OPS[op].function(**OPS[op].tensors(), **(OPS[op].options | {option: value}))
    with pytest.raises(TypeError, match=rf"{option} must be a number, got str; convert it"):
        OPS[op].function(**OPS[op].tensors(), **(OPS[op].options | {option: "64"}))


@pytest.mark.parametrize("op", ["token_margin_loss", "code_contrast_loss"])
def test_margin_of_another_type(op):
    with pytest.raises(TypeError, match=r"margin must be an AngularMargin, got float; give AngularMargin\(m2="):
        OPS[op].function(**OPS[op].tensors(), margin=0.5)


@pytest.mark.parametrize("op", ["token_margin_loss", "code_contrast_loss", "code_regression_loss"])
def test_unknown_reduction(op):
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'average'"):
        OPS[op].function(**OPS[op].tensors(), reduction="average")


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{key}-{name}")
        for key, op in OPS.items()
        for name in op.tensors()
        if len(op.tensors()) > 1
    ],
)
def test_tensors_on_two_devices(op, name):
    tensors = op.tensors()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=rf"all inputs must be on one device, got .*{name} on meta.*; move them"):
        op.function(**tensors, **op.options)


def test_bad_values_under_compilation_fail_on_the_device(compiled):
    loss = compiled(gif_kernels.token_margin_loss)
    tensors = token_margin_tensors()
    loss(**tensors)
    tensors["codes"][0] = 3
    with pytest.raises(RuntimeError, match=r"codes must lie in \[-1, 3\)"):
        loss(**tensors)


def test_a_check_that_cannot_look_says_so():
    assert checks.looks_at_values(torch.zeros(1))
    assert not checks.looks_at_values(torch.zeros(1, device="meta"))


# ---- implementations


@pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter runs Triton on the CPU")
@every_op
def test_triton_cannot_run_on_the_cpu(op):
    message = r'cannot run with impl="triton": .*; use impl="auto" or impl="blocked"'
    with pytest.raises(ValueError, match=message):
        op.function(**op.tensors(), **op.options, impl="triton")


@every_op
def test_unknown_implementation(op):
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'blocked', 'reference', got 'fast'"):
        op.function(**op.tensors(), **op.options, impl="fast")


@pytest.mark.parametrize("name", OPS)
def test_auto_is_blocked_on_the_cpu_and_says_why(name):
    chosen, reason = dispatch.choose(name, torch.device("cpu"))
    assert chosen == "blocked" and reason
    tensors = OPS[name].tensors()
    automatic, blocked = OPS[name](tensors), OPS[name](tensors, impl="blocked")
    assert all(torch.equal(a, b) for a, b in zip(automatic, blocked, strict=True))


@every_op
def test_same_inputs_give_the_same_bits(op, impl):
    tensors = op.tensors()
    first, second = op(tensors, impl=impl), op(tensors, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_op
def test_inputs_are_left_as_they_were(op, impl):
    tensors = op.tensors()
    before = {name: x.clone() for name, x in tensors.items()}
    op.function(**tensors, **op.options, impl=impl)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors if name != op.in_place)


@every_op
def test_autocast_rounds_operands_of_products_and_nothing_else(op, impl):
    """Each dtype stays; ops that learn multiply in 11 bits instead of 24, the others keep their precision."""
    tensors = op.tensors()
    expected = op(tensors, impl=impl)
    given = op(tensors, impl=impl, forward_in=torch.autocast("cpu", torch.float16))
    assert [x.dtype for x in given] == [x.dtype for x in expected]
    learns = op in [OPS[name] for name in ("token_margin_loss", "code_contrast_loss", "code_contrast_gradients")]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)) is not learns
    for a, b in zip(given, expected, strict=True):  # 64 times a rounding of 2^-11, times the slope near a pole
        assert (a.double() - b.double()).norm() <= 0.5 * b.double().norm()


@every_op
def test_autocast_around_the_backward_pass_changes_nothing_else(op):
    tensors = op.tensors()
    expected = op(tensors, impl="blocked", forward_in=torch.autocast("cpu", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        given = op(tensors, impl="blocked")
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@every_tensor
def test_non_contiguous(op, name, impl, agree):
    tensors = op.tensors()
    expected = op(tensors, impl=impl)
    for strided in (transposed_storage(tensors[name]), every_other(tensors[name])):
        assert not strided.is_contiguous()
        given = op(tensors | {name: strided}, impl=impl)
        for a, b in zip(given, expected, strict=True):
            agree(a.double(), b.double()) if not a.is_floating_point() else agree(a, b)  # sums in another order


def transposed_storage(x: Tensor) -> Tensor:
    """The same values, stored with the first dimension fastest."""
    if x.ndim == 1:
        return every_other(x)
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_other(x: Tensor) -> Tensor:
    """The same values, one in every two places of the storage."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


@every_op
def test_output_dtype(op, impl, low_dtype):
    tensors = op.tensors()
    for wanted, given in ((torch.float32, low_dtype), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        cast = {name: x.to(given) if x.is_floating_point() else x for name, x in tensors.items()}
        outputs = op.function(**cast, **op.options, impl=impl)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            assert output.dtype == (wanted if output.is_floating_point() else torch.int64)


@every_differentiable_op
def test_no_grad(op, impl):
    tensors = op.tensors()
    expected = op(tensors, impl=impl)[0]
    with torch.no_grad():
        given = op.function(**op.leaves(tensors), **op.options, impl=impl)
    assert not given.requires_grad and torch.equal(given, expected)


@every_differentiable_op
def test_gradients_where_they_are_asked_for_alone(op, impl):
    tensors, names = op.tensors(), op.trained()
    complete = dict(zip(names, op(tensors, impl=impl)[1:], strict=True))
    for subset in range(1, 2 ** len(names)):
        wanted = [name for i, name in enumerate(names) if subset >> i & 1]
        given = op.leaves(tensors, wanted)
        op.function(**given, **op.options, impl=impl).backward()
        for name in names:
            gradient = given[name].grad
            assert torch.equal(gradient, complete[name]) if name in wanted else gradient is None


@every_differentiable_op
def test_backward_twice_gives_the_same_twice(op):
    leaves = op.leaves(op.tensors())
    trained = [leaves[name] for name in op.trained()]
    loss = op.function(**leaves, **op.options)
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, trained)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))


@every_differentiable_op
def test_second_derivative_is_refused_not_wrong(op):
    leaves = op.leaves(op.tensors())
    for name in op.trained():
        loss = op.function(**leaves, **op.options, impl="blocked")
        (gradient,) = torch.autograd.grad(loss, leaves[name], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once, a second derivative was wanted; use impl="):
            (loss + gradient.square().sum()).backward()  # a gradient penalty


@every_differentiable_op
def test_gradient_with_create_graph_is_the_gradient(op):
    tensors = op.tensors()
    leaves = op.leaves(tensors)
    loss = op.function(**leaves, **op.options, impl="blocked")
    given = torch.autograd.grad(loss, [leaves[name] for name in op.trained()], create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(given, op(tensors, impl="blocked")[1:], strict=True))
