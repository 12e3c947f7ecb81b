"""On a CUDA or ROCm device, or in Triton's interpreter on CPU, where test_interpreter.py runs this file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gif_kernels import checks, dispatch, vector_step_
from gif_kernels.dispatch import Impl

kernels = pytest.importorskip("gif_kernels.vector_step.kernels", reason="Triton is not installed")
if not (dispatch.INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a CUDA or ROCm device; test_interpreter.py runs it without one", allow_module_level=True)

DEVICE = "cpu" if dispatch.INTERPRETING else "cuda"
pytestmark = [] if dispatch.INTERPRETING else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(dispatch.INTERPRETING, reason="needs a CUDA or ROCm device, not the interpreter")
ROUNDED = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *ROUNDED]
RATE = 173 / 128  # of eight bits


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def stepped(table: Tensor, rows: Tensor, gradient: Tensor, impl: Impl = "triton", **options) -> tuple[Tensor, Tensor]:
    table = table.clone()
    return table, vector_step_(table, rows, gradient, impl=impl, **{"lr": 0.1, **options})


def units(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1).to(dtype)


@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "count", "d"), [(1, 1, 1), (40, 70, 48), (33, 5, 129)])
def test_steps_like_float64(n, count, d, gradient_dtype, agree):
    table, rows, gradient = units(n, d), torch.randint(-1, n, (count,)), torch.randn(count, d).to(gradient_dtype)
    expected, expected_stayed = stepped(table.double(), rows, gradient, "reference")
    given, stayed = stepped(table, rows, gradient)
    agree(given, expected)
    assert torch.equal(stayed, expected_stayed)
    untouched = torch.ones(n, dtype=torch.bool).index_fill(0, rows[rows >= 0], False)
    assert torch.equal(given[untouched], table[untouched])


def test_float32_is_no_worse_than_pytorch(no_worse_than_pytorch):
    table, rows, gradient = units(40, 64), torch.randint(40, (200,)), torch.randn(200, 64) / 8
    plain, _ = stepped(table, rows, gradient, "blocked")
    truth, _ = stepped(table.double(), rows, gradient, "reference")
    no_worse_than_pytorch(stepped(table, rows, gradient)[0], plain, truth)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_rounds_as_blocked_does(dtype):
    table, rows, gradient = units(60, 130, dtype), torch.randint(-1, 60, (90,)), torch.randn(90, 130)
    given, _ = stepped(table, rows, gradient, seed=5)
    expected, _ = stepped(table, rows, gradient, "blocked", seed=5)
    another, _ = stepped(table, rows, gradient, seed=6)
    # the same random numbers: a norm's last bit, 2^-24, tips a threshold of 2^-8 or 2^-11 in one of some thousands
    assert (given != expected).double().mean() <= 1e-3
    assert (given != another).double().mean() >= 0.1  # of three quarters of the rows
    torch.testing.assert_close(given, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_rounding_is_that_of_blocked_to_the_bit_where_the_values_are(dtype):
    """Numbers of eight bits at a rate of eight bits: their product is exact, and needs rounding."""
    table, rows = torch.zeros(200, 64, dtype=dtype), torch.randperm(200)[:150]
    gradient = torch.zeros(150, 64)
    for filled in (4, 5, 6):
        gradient[:, :filled] = torch.randint(1, 256, (150, filled)) / 64
        given, _ = stepped(table, rows, gradient, lr=RATE, seed=9)
        expected, _ = stepped(table, rows, gradient, "blocked", lr=RATE, seed=9)
        assert torch.equal(given, expected)
    nearest = (-RATE * gradient).to(dtype)
    assert (given[rows] != nearest)[
        :, :filled
    ].double().mean() >= 0.1  # by rounding up or down where it was not the nearest


@pytest.mark.parametrize("seed", [0, -5, 2**40 + 3])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_a_tensor_draws_what_the_number_draws(seed, dtype):
    table, rows, gradient = units(9, 32, dtype), torch.randint(9, (12,)), torch.randn(12, 32)
    given, _ = stepped(table, rows, gradient, seed=seed)
    assert torch.equal(given, stepped(table, rows, gradient, seed=torch.tensor(seed))[0])
    assert not torch.equal(given, stepped(table, rows, gradient, seed=seed + 1)[0])


def test_gathered_rows_round_as_in_the_whole_table():
    table, labels, gradient = units(500, 16, torch.float16), torch.tensor([7, 411, 7, 90]), torch.randn(4, 16)
    whole, _ = stepped(table, labels, gradient, seed=6)
    names, rows = labels.unique(return_inverse=True)
    for row_ids in (names, names.int(), torch.stack([names, names], 1)[:, 0]):
        part, _ = stepped(table[names], rows, gradient, seed=6, row_ids=row_ids)
        assert torch.equal(part, whole[names])
    far, _ = stepped(table[names], rows, gradient, seed=6, row_ids=names + 2**32)
    assert not torch.equal(far, part)


def test_repeated_rows_take_the_sum_in_the_order_in_which_they_stand():
    """Of 40 numbers of all sizes, where another order gives other bits."""
    table, rows = units(3, 16), torch.tensor([1, 2] * 40)
    gradient = torch.randn(80, 16) * torch.logspace(-4, 2, 80)[torch.randperm(80), None]
    sums = torch.zeros(2, 16)
    for place in range(80):
        sums[place % 2] += gradient[place]
    expected, _ = stepped(table, torch.tensor([1, 2]), sums)
    given, _ = stepped(table, rows, gradient)
    backwards, _ = stepped(table, rows.flip(0), gradient.flip(0))
    assert torch.equal(given, expected) and not torch.equal(backwards, expected)


def test_one_row_named_by_all():
    table, gradient = units(2, 8), torch.randn(300, 8)
    given, _ = stepped(table, torch.ones(300, dtype=torch.int64), gradient)
    expected, _ = stepped(table.double(), torch.ones(300, dtype=torch.int64), gradient, "reference")
    assert torch.equal(given[0], table[0])
    torch.testing.assert_close(given[1].double(), expected[1], rtol=0, atol=1e-5)  # 300 sums in float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_finite_step_stay_to_the_bit_and_are_counted_once(dtype):
    table = units(7, 6, dtype)
    table[6] = 0
    rows, gradient = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1]), torch.randn(8, 6)
    gradient[1, 2], gradient[2, 0], gradient[3], gradient[6] = torch.nan, torch.inf, 3e38, 0
    gradient[4] = table[4].float()
    given, stayed = stepped(table, rows, gradient, lr=1.0)
    assert (given != table).any(1).tolist() == [True, False, False, False, False, True, False]
    assert stayed == 5 and stayed.dtype == torch.int64 and stayed.shape == ()


def test_skipped_rows_change_nothing():
    table, rows, gradient = units(9, 6, torch.float16), torch.tensor([3, -1, 8, 3, -7, -(2**63)]), torch.randn(6, 6)
    gradient[[1, 4, 5]] = torch.nan
    expected = stepped(table, rows[rows >= 0], gradient[rows >= 0], seed=2)
    given = stepped(table, rows, gradient, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    for rows in (torch.full((6,), -1), torch.empty(0, dtype=torch.int64)):
        unmoved, stayed = stepped(table, rows, gradient[: len(rows)])
        assert torch.equal(unmoved, table) and stayed == 0


def test_rows_out_of_range_are_skipped(monkeypatch):
    """As on an accelerator, where nobody looks: nothing outside of the table is written."""
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)
    whole, gradient = units(9, 6), torch.randn(4, 6)
    before = whole.clone()
    stayed = vector_step_(whole[:5], torch.tensor([5, 2, 8, 2**62]), gradient, lr=0.1, impl="triton")
    assert (whole != before).any(1).nonzero().flatten().tolist() == [2] and stayed == 0


def test_strided():
    whole, rows = torch.randn(12, 16), torch.tensor([0, 4, 0])
    gradient = torch.randn(8, 3).T
    before, expected = whole.clone(), whole[::2, ::2].contiguous()
    vector_step_(expected, rows, gradient.contiguous(), lr=0.1, impl="triton")
    vector_step_(whole[::2, ::2], rows, gradient, lr=0.1, impl="triton")
    assert torch.equal(whole[::2, ::2], expected)
    whole[::2, ::2] = before[::2, ::2]
    assert torch.equal(whole, before)
    one = torch.randn(1, 8)
    given, _ = stepped(expected, rows, one.expand(3, 8))
    assert torch.equal(given, stepped(expected, rows, one.repeat(3, 1))[0])


def test_integers_of_32_bits_and_rows_that_are_not_contiguous():
    table, rows, gradient = units(9, 5), torch.tensor([[1, 0], [5, 0], [1, 0]]), torch.randn(3, 5)
    expected, _ = stepped(table, rows[:, 0].contiguous(), gradient)
    for given_rows in (rows[:, 0], rows[:, 0].int()):
        assert torch.equal(stepped(table, given_rows, gradient)[0], expected)


def test_compiled_equals_eager(compiled):
    table, rows, gradient = units(20, 8, torch.float16), torch.tensor([7, 0, 7, -1]), torch.randn(4, 8)
    for seed in (4, torch.tensor(4)):
        step = partial(stepped, seed=seed)
        for given, eager in zip(compiled(step)(table, rows, gradient), step(table, rows, gradient), strict=True):
            assert torch.equal(given, eager)


class Launches(TorchDispatchMode):
    """The operations of PyTorch's that run; views, and memory that nobody fills, are none."""

    FREE = ("aten.empty", "aten.detach", "aten.view", "aten.select", "aten.slice", "aten.alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not str(function).startswith(self.FREE):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sort_a_fill_and_one_kernel(dtype, monkeypatch):
    """The README counts launches; of a number as a seed there is another fill, where something is rounded."""
    grids = []

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            grids.append(grid)
            return lambda **arguments: None

    table, rows, gradient = units(40, 16, dtype), torch.randint(40, (50,)), torch.randn(50, 16)
    seed = torch.tensor(3)
    monkeypatch.setattr(kernels, "vector_step", Counted())
    with Launches() as found:
        kernels.step_(table, rows, gradient, None, seed, 0.1)
    assert [name.split(".")[1] for name in found.names] == ["sort", "zeros"]
    with Launches() as found:
        kernels.step_(table, rows, gradient, None, 3, 0.1)
    assert [name.split(".")[1] for name in found.names] == ["sort", "zeros"] + ["full"] * (dtype == torch.float16)
    assert grids == [(50,), (50,)]


@on_a_gpu
def test_waits_for_nothing_and_is_captured_in_a_graph():
    table, rows, gradient = units(500, 64, torch.bfloat16), torch.randint(-1, 500, (300,)), torch.randn(300, 64)
    seed, stayed = torch.tensor(5), torch.zeros((), dtype=torch.int64)

    def step(table: Tensor) -> None:
        stayed.add_(vector_step_(table, rows, gradient, lr=0.1, seed=seed))
        seed.add_(1)

    expected = table.clone()
    for _ in range(3):
        step(expected)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(table.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seed.fill_(5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(table)
    for _ in range(3):
        graph.replay()
    assert torch.equal(table, expected) and seed == 8


@on_a_gpu
def test_offsets_past_int32():
    """The last rows of a table whose elements number more than 2^31."""
    table = torch.zeros(2**22 + 100, 512, dtype=torch.bfloat16)
    table[-100:] = units(100, 512, torch.bfloat16)
    rows, gradient = torch.arange(100) + len(table) - 100, torch.randn(100, 512)
    expected, _ = stepped(table[-100:].float(), torch.arange(100), gradient, "blocked")
    vector_step_(table, rows, gradient, lr=0.1, impl="triton")
    assert (table[-100:].float() - expected).abs().max() <= 2.0**-8
    assert (table[:1000] == 0).all()
