from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gif_kernels import checks, vector_step_
from gif_kernels.rounding import MASK, uniform
from gif_kernels.vector_step import blocked

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""A unit in the last place of 1; coordinates of unit vectors are smaller, and so is theirs."""


def truth(table: Tensor, rows: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """The table in float64 after h - lr g of the rows that are named and whose step is finite."""
    expected = table.double().clone()
    for row in rows.unique().tolist():
        if row >= 0:
            moved = expected[row] - lr * gradient.double()[rows == row].sum(0)
            if moved.isfinite().all() and moved.norm() > 0:
                expected[row] = moved
    return expected


def stepped(table: Tensor, rows: Tensor, gradient: Tensor, lr: float = 0.1, **options) -> tuple[Tensor, Tensor]:
    table = table.clone()
    return table, vector_step_(table, rows, gradient, lr=lr, **options)


def units(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1).to(dtype)


@pytest.fixture(params=["reference", "blocked", "blocked on a device"])
def impl(request, monkeypatch):
    """Also the sizes that no value decides, which `blocked` has on an accelerator without Triton."""
    if request.param == "blocked on a device":
        monkeypatch.setattr(blocked, "_summed", blocked._summed_with_repeats)
        return "blocked"
    return request.param


# ---- the step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "count", "d"), [(1, 1, 1), (9, 4, 5), (20, 41, 32)])
def test_moves_the_named_rows_and_no_other(n, count, d, dtype, gradient_dtype, impl):
    table, rows, gradient = units(n, d, dtype), torch.randint(-1, n, (count,)), torch.randn(count, d).to(gradient_dtype)
    expected = truth(table, rows, gradient, 0.1)
    given, stayed = stepped(table, rows, gradient, seed=3, impl=impl)
    # rounded to a neighbour, from sums of a few float32 numbers of some tens of units in the last place
    compute = torch.float64 if torch.float64 in (dtype, gradient_dtype) else torch.float32
    largest = expected.abs().max().clamp(min=1)
    assert (given.double() - expected).abs().max() <= (EPSILON[dtype] + 64 * EPSILON[compute]) * largest
    assert stayed == 0 and stayed.dtype == torch.int64 and stayed.shape == ()
    untouched = torch.ones(n, dtype=torch.bool).index_fill(0, rows[rows >= 0], False)
    assert torch.equal(given[untouched], table[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_pytorch(dtype, impl, no_worse_than_pytorch):
    table, rows, gradient = units(40, 64, dtype), torch.randint(40, (300,)), torch.randn(300, 64) / 8
    sums = torch.zeros(40, 64).index_add_(0, rows, gradient)
    named = torch.zeros(40, 1, dtype=torch.bool).index_fill_(0, rows, True)
    plain = torch.where(named, table - 0.1 * sums, table).to(dtype)
    given, _ = stepped(table, rows, gradient, impl=impl)
    expected = truth(table, rows, gradient, 0.1)
    # stochastic rounding errs by the root of 1/6 of a unit where rounding to nearest errs by that of 1/12, by 1 for 1/2
    no_worse_than_pytorch(given, plain, expected)


def test_a_row_turns_by_less_the_longer_it_is(impl):
    """The gradient of a function of the direction: each step is at a right angle to the row, and makes it longer."""
    table, target = units(1, 8, torch.float64), units(1, 8, torch.float64)
    lengths, turns = [], []
    for _ in range(3):
        row = table.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((F.normalize(row) * target).sum(), row)
        table, _ = stepped(table, torch.tensor([0]), gradient, 1.0, impl=impl)
        lengths.append(float(table.norm()))
        before = float(row.detach().norm())
        assert lengths[-1] ** 2 == pytest.approx(before**2 + float(gradient.norm()) ** 2)
        turns.append(float(gradient.norm()) / before)
    assert lengths == sorted(lengths) and turns == sorted(turns, reverse=True)


def test_on_a_device_without_triton_the_bits_are_those_of_a_cpu(monkeypatch):
    table, rows, gradient = units(30, 16, torch.bfloat16), torch.randint(-2, 30, (70,)), torch.randn(70, 16)
    gradient[5, 3] = torch.inf
    expected = stepped(table, rows, gradient, seed=4, impl="blocked")
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)
    given = stepped(table, rows, gradient, seed=4, impl="blocked")
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_repeated_rows_take_the_sum_in_the_order_in_which_they_stand(impl):
    """Of 40 numbers of all sizes, where another order gives other bits."""
    table, rows = units(3, 16), torch.tensor([1, 2] * 40)
    gradient = torch.randn(80, 16) * torch.logspace(-4, 2, 80)[torch.randperm(80), None]
    sums = torch.zeros(2, 16)
    for place in range(80):
        sums[place % 2] += gradient[place]
    expected, _ = stepped(table, torch.tensor([1, 2]), sums, impl=impl)
    given, _ = stepped(table, rows, gradient, impl=impl)
    backwards, _ = stepped(table, rows.flip(0), gradient.flip(0), impl=impl)
    assert torch.equal(given, expected) and not torch.equal(backwards, expected)


def test_skipped_rows_change_nothing(impl):
    table, rows, gradient = units(9, 6, torch.bfloat16), torch.tensor([3, -1, 8, 3, -7, -(2**63)]), torch.randn(6, 6)
    gradient[[1, 4, 5]] = torch.nan
    expected = stepped(table, rows[rows >= 0], gradient[rows >= 0], seed=2, impl=impl)
    given = stepped(table, rows, gradient, seed=2, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    unmoved, stayed = stepped(table, torch.full((6,), -1), gradient, impl=impl)
    assert torch.equal(unmoved, table) and stayed == 0


@pytest.mark.parametrize(("n", "count"), [(5, 0), (0, 0), (0, 3)])
def test_nothing_to_do(n, count, impl):
    given, stayed = stepped(torch.empty(n, 4), torch.full((count,), -1), torch.empty(count, 4), impl=impl)
    assert given.shape == (n, 4) and stayed == 0 and stayed.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rows_without_a_finite_step_stay_to_the_bit_and_are_counted_once(dtype, impl):
    table = units(7, 6, dtype)
    table[6] = 0
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1])
    gradient = torch.randn(8, 6)
    gradient[1, 2], gradient[2, 0], gradient[3], gradient[6] = torch.nan, torch.inf, 3e38, 0
    gradient[4] = table[4].float()  # and lr 1: nothing is left of it
    given, stayed = stepped(table, rows, gradient, 1.0, impl=impl)
    assert (given != table).any(1).tolist() == [True, False, False, False, False, True, False]
    assert stayed == 5
    for lr in (1e38, 1e300):  # a rate that float32 does not hold is infinite
        given, stayed = stepped(table, rows, gradient * 1e5, lr, impl=impl)
        assert torch.equal(given, table) and stayed == 7


def test_every_integer_dtype_names_rows(impl):
    table, rows, gradient = units(9, 5), torch.tensor([1, 5, 3, 1]), torch.randn(4, 5)
    expected, _ = stepped(table, rows, gradient, impl=impl)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64):
        given, _ = stepped(table, rows.to(dtype), gradient, impl=impl)
        assert torch.equal(given, expected)


def test_writes_through_a_view(impl):
    whole = torch.randn(6, 8)
    before = whole.clone()
    vector_step_(whole[1:, ::2], torch.tensor([0, 4]), torch.randn(4, 2).T, lr=0.1, impl=impl)
    changed = whole != before
    assert changed[1, ::2].all() and changed[5, ::2].all()
    changed[1, ::2] = changed[5, ::2] = False
    assert not changed.any()


def test_keeps_no_graph(impl):
    table, gradient = torch.nn.Parameter(units(5, 4)), torch.randn(2, 4, requires_grad=True)
    stayed = vector_step_(table, torch.tensor([0, 3]), gradient, lr=0.1, impl=impl)
    assert table.is_leaf and table.grad is None and not stayed.requires_grad


def test_any_finite_rate_is_taken(impl):
    table, rows, gradient = units(5, 4, torch.float64), torch.tensor([0, 3]), torch.randn(2, 4)
    assert torch.equal(stepped(table, rows, gradient, 0, impl=impl)[0][1:3], table[1:3])
    back, _ = stepped(table, rows, gradient, -0.1, impl=impl)
    torch.testing.assert_close(back, truth(table, rows, gradient, -0.1))


# ---- the rounding


@pytest.mark.parametrize("seed", [0, 3, -5, 2**40 + 3, -(2**63), 2**70 + 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_draws_what_the_number_draws(seed, dtype, impl):
    table, rows, gradient = units(9, 32, dtype), torch.randint(9, (12,)), torch.randn(12, 32)
    given, _ = stepped(table, rows, gradient, seed=seed, impl=impl)
    number = torch.tensor(seed if abs(seed) < 2**63 or seed == -(2**63) else seed & MASK)
    kept = number.clone()
    from_tensor, _ = stepped(table, rows, gradient, seed=number, impl=impl)
    other, _ = stepped(table, rows, gradient, seed=seed + 1, impl=impl)
    assert torch.equal(given, from_tensor) and torch.equal(number, kept)
    assert not torch.equal(given, other)


def test_gathered_rows_round_as_in_the_whole_table(impl):
    table, labels, gradient = units(500, 16, torch.bfloat16), torch.tensor([7, 411, 7, 90]), torch.randn(4, 16)
    whole, _ = stepped(table, labels, gradient, seed=6, impl=impl)
    names, rows = labels.unique(return_inverse=True)
    part, _ = stepped(table[names], rows, gradient, seed=6, row_ids=names, impl=impl)
    unnamed, _ = stepped(table[names], rows, gradient, seed=6, impl=impl)
    assert torch.equal(part, whole[names]) and not torch.equal(part, unnamed)
    narrow, _ = stepped(table[names], rows, gradient, seed=6, row_ids=names.int(), impl=impl)
    assert torch.equal(narrow, part)


def test_steps_that_rounding_to_nearest_would_lose_survive_on_average():
    table = F.normalize(torch.ones(1, 512), dim=1).bfloat16()
    gradient = torch.zeros(1, 512)
    gradient[0, :256] = -1e-5  # far below bfloat16's resolution of 1.7e-4 at this size
    start = table.float()
    for seed in range(200):
        vector_step_(table, torch.tensor([0]), gradient, lr=1.0, seed=seed)
    drift = (table.float() - start)[0]
    assert drift[:256].mean() == pytest.approx(2e-3, rel=0.2)
    assert not drift[256:].any()


def test_uniform_takes_a_seed_of_either_kind():
    rows, columns = torch.randint(2**40, (20, 1)), torch.arange(30)
    for seed in (0, 1, -1, 2**33 + 5):
        assert torch.equal(uniform(rows, columns, seed), uniform(rows, columns, torch.tensor(seed)))


# ---- arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.tensor([0, 5])}, ValueError, "rows must lie below 5, got 5; a negative one is skipped"),
        ({"rows": torch.tensor([0, 2**62])}, ValueError, f"rows must lie below 5, got {2**62}"),
        ({"rows": torch.tensor([0.0, 1.0])}, TypeError, "rows must be an integer tensor, got torch.float32"),
        ({"rows": torch.tensor([0, 1, 2])}, ValueError, r"gradient must have shape \(3, 4\), got \(2, 4\)"),
        ({"gradient": torch.zeros(2, 3)}, ValueError, r"gradient must have shape \(2, 4\), got \(2, 3\)"),
        ({"gradient": torch.zeros(2, 4).long()}, TypeError, "gradient must be float32, .* got torch.int64"),
        ({"row_ids": torch.arange(4)}, ValueError, r"row_ids must have shape \(5\), got \(4,\)"),
        ({"row_ids": torch.zeros(5)}, TypeError, "row_ids must be an integer tensor"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got str"),
        ({"lr": float("nan")}, ValueError, "lr must be a finite number, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be a finite number, got inf"),
        ({"seed": 1.5}, TypeError, r"seed must be an int or a \(\) int64 tensor, got float"),
        ({"seed": torch.tensor([1])}, ValueError, r"seed must be an int or \(\) int64, got \(1,\) torch.int64"),
        ({"seed": torch.tensor(1.0)}, ValueError, r"seed must be an int or \(\) int64, got \(\) torch.float32"),
        ({"seed": torch.tensor(1, device="meta")}, ValueError, "all inputs must be on one device, got .*seed on meta"),
    ],
)
def test_arguments_that_do_not_fit(change, error, message):
    table = units(5, 4)
    before = table.clone()
    arguments = {"rows": torch.tensor([0, 3]), "gradient": torch.randn(2, 4), "lr": 0.1}
    with pytest.raises(error, match=message):
        vector_step_(table, **arguments | change)
    assert torch.equal(table, before)


# ---- recorded, and without values


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [4, torch.tensor(4)], ids=["number", "tensor"])
def test_compiled_equals_eager(table_dtype, seed, impl, compiled):
    table, rows, gradient = units(9, 5, table_dtype), torch.tensor([7, 0, -1, 7]), torch.randn(4, 5)
    gradient[1, 1] = torch.nan
    step = partial(stepped, seed=seed, impl=impl)
    for given, eager in zip(compiled(step)(table, rows, gradient), step(table, rows, gradient), strict=True):
        assert torch.equal(given, eager)


def test_compiled_takes_another_rate_seed_and_number_of_rows(compiled):
    step = compiled(stepped)
    table = units(9, 5, torch.bfloat16)
    for seed, (lr, count) in enumerate(((0.1, 4), (0.05, 6), (0.025, 2))):
        arguments = (table, torch.randint(9, (count,)), torch.randn(count, 5), lr)
        for options in ({"seed": seed}, {"seed": torch.tensor(seed)}):
            for given, eager in zip(step(*arguments, **options), stepped(*arguments, **options), strict=True):
                assert torch.equal(given, eager)


@pytest.mark.parametrize("named", [False, True])
def test_custom_op_keeps_its_promises(named, impl):
    table, row_ids = units(9, 5, torch.bfloat16), torch.arange(9) if named else None
    arguments = (table, torch.tensor([7, -1, 7]), torch.randn(3, 5), row_ids, torch.tensor(3), 0.1, impl)
    torch.library.opcheck(torch.ops.gif_kernels.vector_step_.default, arguments)


class Calls(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.fake_cuda
@pytest.mark.parametrize("seed", ["number", "tensor"])
def test_no_value_is_read_on_an_accelerator(seed):
    """Tensors without values: whoever would look at one raises. The op is one node, whatever it runs as."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        table = torch.empty(20, 8, device="cuda", dtype=torch.bfloat16)
        rows, gradient = torch.empty(6, device="cuda", dtype=torch.int64), torch.empty(6, 8, device="cuda")
        given = torch.empty((), device="cuda", dtype=torch.int64) if seed == "tensor" else 3
        with Calls() as calls:
            stayed = vector_step_(
                table, rows, gradient, lr=0.1, seed=given, row_ids=torch.empty(20, device="cuda").long()
            )
        assert "gif_kernels.vector_step_.default" in calls.names
        assert (stayed.device.type, stayed.dtype, stayed.shape) == ("cuda", torch.int64, ())
        with pytest.raises(DataDependentOutputException):
            stayed.item()


@pytest.mark.fake_cuda
def test_blocked_reads_no_value_on_an_accelerator():
    with FakeTensorMode(allow_non_fake_inputs=False):
        table = torch.empty(20, 8, device="cuda", dtype=torch.bfloat16)
        rows, gradient = torch.empty(6, device="cuda", dtype=torch.int64), torch.empty(6, 8, device="cuda")
        stayed = blocked.step_(table, rows, gradient, None, torch.empty((), device="cuda", dtype=torch.int64), 0.1)
        assert stayed.device.type == "cuda"


def test_memory_is_that_of_the_rows_and_not_of_the_table(peak_bytes):
    table = torch.zeros(200_000, 16, dtype=torch.bfloat16)
    rows, gradient = torch.randint(200_000, (256,)), torch.randn(256, 16)
    peak = peak_bytes(partial(vector_step_, table, rows, gradient, lr=0.1))
    assert peak <= table.nbytes // 8
    assert peak <= 32 * 8 * gradient.numel()  # two dozen (B, d) temporaries of 8 bytes
