from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels import checks, gaussian_potential, uniformity_step_
from gif_kernels.gaussian_potential import blocked as potential
from gif_kernels.rounding import _floored, stochastic_round, uniform
from gif_kernels.uniformity_step import blocked

LOW = {torch.bfloat16: 8, torch.float16: 11}
"""Digits of a significand, the implicit one counted."""


def truth(table: Tensor, index: Tensor, lr: float, t: float) -> tuple[Tensor, Tensor]:
    """The named rows after normalise(h - lr n dL/dh) in float64, and L before it, by autograd."""
    rows = F.normalize(table[index].double()).requires_grad_()
    loss = gaussian_potential(rows, t=t, impl="reference")
    (gradient,) = torch.autograd.grad(loss, rows)
    return F.normalize(rows.detach() - lr * len(index) * gradient), loss.detach()


def clustered(m: int, d: int) -> Tensor:
    """Directions near one another whose coordinates are all of one size, so that one step is small beside each."""
    return F.normalize(1 + 0.4 * torch.randn(m, d).clamp(-1, 1))


# ---- the step


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("t", [2.0, 0.5])
def test_moves_the_named_rows_and_no_other(n, t, impl, dtype, monkeypatch, agree):
    monkeypatch.setattr(potential, "TILE", 4)
    table = torch.randn(11, 6, dtype=dtype)
    index = torch.randperm(11)[:n]
    before = table.clone()
    expected, expected_loss = truth(table, index, 0.1, t)
    loss = uniformity_step_(table, index, lr=0.1, t=t, impl=impl)
    agree(table[index], expected)
    agree(loss, expected_loss)
    untouched = torch.ones(11, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(table[untouched], before[untouched])
    # unit rows, but for rounding
    assert (table[index].double().norm(dim=1) - 1).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_nothing(impl, bad, monkeypatch):
    """As on an accelerator, where nobody looks for NaN: every row of the subset would become NaN, for good."""
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)
    table = torch.randn(6, 5)
    table[4, 2] = bad
    before = table.clone()
    loss = uniformity_step_(table, torch.tensor([0, 2, 4, 5]), lr=0.1, impl=impl)
    assert loss.isnan() and torch.equal(table.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_every_integer_dtype_names_rows(impl, dtype):
    table = torch.randn(6, 5)
    index, wanted = torch.tensor([1, 5, 3]), table.clone()
    uniformity_step_(wanted, index, lr=0.1, impl=impl)
    uniformity_step_(table, index.to(dtype), lr=0.1, impl=impl)
    assert torch.equal(table, wanted)


def test_the_rate_is_per_vector(impl):
    """Twice the vectors, the same neighbourhood: the same move. A rate on the mean loss would halve it."""
    table = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    moved = []
    for copies in (1, 8):
        # copies of a pair, in planes of their own: what is felt within a pair does not depend on how many there are
        many = torch.block_diag(*[table] * copies)
        uniformity_step_(many, torch.arange(len(many)), lr=1e-6, t=30.0, impl=impl)
        moved.append((many[0, :2] - table[0]).norm().item())
    assert moved[1] == pytest.approx(moved[0], rel=1e-3)


def test_lowers_the_potential(impl):
    table = clustered(32, 8)
    losses = [uniformity_step_(table, torch.arange(32), lr=0.1, impl=impl).item() for _ in range(20)]
    assert all(after < before for before, after in pairwise(losses))


def test_trains_a_parameter_in_place(impl):
    """No graph is kept and none is needed."""
    table = torch.nn.Parameter(torch.randn(5, 4))
    loss = uniformity_step_(table, torch.arange(5), lr=0.1, impl=impl)
    assert table.is_leaf and table.grad is None and not loss.requires_grad


def test_writes_through_a_view(impl):
    whole = torch.randn(6, 8)
    before = whole.clone()
    uniformity_step_(whole[1:, ::2], torch.tensor([0, 4]), lr=0.1, impl=impl)
    changed = whole != before
    assert changed[1, ::2].any() and changed[5, ::2].any()
    changed[1, ::2] = changed[5, ::2] = False
    assert not changed.any()


def test_a_row_of_zeros_stays(impl, dtype):
    table = torch.randn(5, 4, dtype=dtype)
    table[3] = 0
    uniformity_step_(table, torch.arange(5), lr=0.1, impl=impl)
    assert table.isfinite().all() and (table[3] == 0).all()


def test_rows_that_are_not_finite_are_refused_before_anything_is_written(impl):
    table = torch.randn(5, 4)
    table[2, 1] = float("nan")
    before = table.clone()
    with pytest.raises(ValueError, match="the rows of table hold NaN or infinity"):
        uniformity_step_(table, torch.tensor([0, 2]), lr=0.1, impl=impl)
    assert torch.equal(table[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    uniformity_step_(table, torch.tensor([0, 1]), lr=0.1, impl=impl)  # only what is named is looked at


# ---- in low precision


def test_low_precision_is_within_one_unit_of_the_true_step(low_dtype, impl):
    table = torch.randn(9, 16).to(low_dtype)
    index = torch.randperm(9)[:6]
    expected, _ = truth(table, index, 0.1, 2.0)
    uniformity_step_(table, index, lr=0.1, impl=impl)
    unit = torch.ldexp(torch.ones_like(expected), torch.frexp(expected)[1] - LOW[low_dtype]).clamp(min=2.0**-24)
    # 1%: a power of two nearby; 2^-23: float32's rounding, where the step leaves next to nothing of an element
    assert ((table[index].double() - expected).abs() < 1.01 * unit + 2.0**-23).all()


def test_reproducible_for_a_seed_and_only_for_it(low_dtype, impl):
    start = torch.randn(9, 64).to(low_dtype)
    results = []
    for seed in (5, 5, 6):
        table = start.clone()
        uniformity_step_(table, torch.arange(9), lr=0.1, seed=seed, impl=impl)
        results.append(table)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_steps_that_rounding_would_lose_survive_on_average():
    start, index, lr, steps = clustered(64, 32).bfloat16(), torch.arange(64), 1e-4, 60
    stochastic, nearest, exact = start.clone(), start.clone(), start.float()
    for step in range(steps):
        uniformity_step_(stochastic, index, lr=lr, seed=step)
        uniformity_step_(exact, index, lr=lr)
        nearest.copy_(blocked.moved_rows(F.normalize(nearest.float()), lr, 2.0)[0])
    assert torch.equal(nearest, start)
    gain = gaussian_potential(start) - gaussian_potential(exact)
    # the noise of 60 roundings spreads the vectors a little more than the steps did, by a few percent of the gain
    assert gain > 0.01
    assert gaussian_potential(start) - gaussian_potential(stochastic) == pytest.approx(gain.item(), rel=0.15)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounding_gives_a_neighbour_and_the_mean_is_exact(dtype):
    seeds = 1024
    values = torch.randn(4, 64)
    rounded = torch.stack([stochastic_round(values, dtype, torch.arange(4), seed).double() for seed in range(seeds)])
    unit = torch.ldexp(torch.ones_like(values), torch.frexp(values)[1] - LOW[dtype]).double()
    assert ((rounded - values.double()).abs() < unit).all()
    # deviation of one rounding <= unit / 2, of their mean 32 times less; 6 deviations over 256 values: 1e-7
    assert ((rounded.mean(0) - values.double()).abs() <= 6 * unit / 2 / seeds**0.5).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_needs_no_rounding_is_not_rounded(dtype):
    """Of 2e6 random numbers some come within 2^-20 of 1, where a sum with them would round up."""
    values = torch.randn(2**13).to(dtype).view(16, -1)
    for seed in range(256):
        assert torch.equal(stochastic_round(values.float(), dtype, torch.arange(16), seed), values)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float16, 1e-9, 2.0**-14), (torch.bfloat16, 1e-41, 2.0**-126)],
    ids=["float16", "bfloat16"],
)
def test_subnormals_round_like_the_rest(dtype, low, high):
    values = torch.rand(4, 64) * (high - low) + low
    values[1::2] *= -1
    unit = 2.0 ** (-24 if dtype == torch.float16 else -133)
    rounded = torch.stack([stochastic_round(values, dtype, torch.arange(4), seed).double() for seed in range(256)])
    assert torch.equal(rounded, (rounded / unit).round() * unit)
    assert ((rounded - values.double()).abs() < unit).all()
    assert ((rounded.mean(0) - values.double()).abs() <= 6 * unit / 2 / 256**0.5).all()


def test_a_table_of_tiny_coordinates_in_float16(impl):
    table = torch.zeros(4, 16, dtype=torch.float16)
    table[:, 0] = 1
    table[:, 1:] = torch.randn(4, 15).half() * 2**-20  # below the smallest normal number, 2^-14
    for seed in range(50):
        uniformity_step_(table, torch.arange(4), lr=0.01, seed=seed, impl=impl)
    assert table.isfinite().all()
    assert (table.float().norm(dim=1) - 1).abs().max() <= 1e-3


@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5, torch.tensor(2**40 + 123)], ids=str)
def test_the_bits_of_bfloat16_are_cut_as_any_dtype_is_rounded(seed):
    """Of all bits there are, those of infinity, NaN and subnormal numbers among them."""
    any_bits = torch.randint(-(2**31), 2**31, (600, 300)).to(torch.int32).view(torch.float32)
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 1e-40, -1e-40, 1.0]
    )
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1]).to(torch.int32).view(torch.float32)  # NaN
    values = torch.cat([any_bits, torch.randn(400, 300), torch.cat([special, payloads]).expand(300, -1).T.contiguous()])
    rows = torch.randint(10**12, (len(values),))
    cut, defined = stochastic_round(values, torch.bfloat16, rows, seed), _floored(values, torch.bfloat16, rows, seed)
    assert torch.equal(cut.isnan(), values.isnan()) and torch.equal(defined.isnan(), values.isnan())
    assert torch.equal(cut.nan_to_num(0).view(torch.int16), defined.nan_to_num(0).view(torch.int16))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_zeros_and_the_sign_stay(dtype):
    rows = torch.arange(4)
    assert (stochastic_round(torch.zeros(4, 8), dtype, rows, 3) == 0).all()
    values = torch.randn(4, 8)
    assert torch.equal(stochastic_round(values, dtype, rows, 3).sign(), values.to(dtype).sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_dtype_that_holds_the_values_takes_them_as_they_are(dtype):
    values = torch.randn(4, 8, dtype=dtype)
    assert torch.equal(stochastic_round(values, dtype, torch.arange(4), 0), values)


def test_rounding_depends_on_the_row_and_not_on_its_place():
    values, rows = torch.randn(50, 64), torch.randint(10**12, (50,))
    order = torch.randperm(50)
    rounded = stochastic_round(values, torch.bfloat16, rows, 7)
    assert torch.equal(stochastic_round(values[order], torch.bfloat16, rows[order], 7), rounded[order])
    alone = torch.cat([stochastic_round(values[i : i + 1], torch.bfloat16, rows[i : i + 1], 7) for i in range(50)])
    assert torch.equal(alone, rounded)


def test_order_of_the_index_moves_at_most_what_float32_sums_move():
    start = torch.randn(40, 64).bfloat16()
    first, second = start.clone(), start.clone()
    uniformity_step_(first, torch.arange(40), lr=0.1, seed=3)
    uniformity_step_(second, torch.randperm(40), lr=0.1, seed=3)
    # the same random number for each element: they differ where 1e-7 tips a threshold of width 2^-8
    assert (first != second).double().mean() <= 1e-2


def test_random_numbers_are_uniform_and_independent():
    rows, columns = torch.arange(512), torch.arange(512)
    drawn = uniform(rows.unsqueeze(1), columns, 11)
    assert drawn.min() >= 0 and drawn.max() < 1
    deviation = (1 / 12) ** 0.5 / 512  # of the mean of 2^18
    assert abs(drawn.mean().item() - 0.5) <= 6 * deviation
    counts = torch.histc(drawn, 64, 0, 1)
    assert (counts - 4096).abs().max() <= 6 * 64  # Poisson's deviation, the root of 4096
    other_seed, next_row = uniform(rows.unsqueeze(1), columns, 12), uniform(rows.unsqueeze(1) + 1, columns, 11)
    next_column = uniform(rows.unsqueeze(1), columns + 1, 11)
    for other in (other_seed, next_row, next_column):
        assert abs(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]) <= 6 / 512


@pytest.mark.parametrize("far", [2**32, 2**40, 5 * 2**32])
def test_rows_past_32_bits_draw_their_own_numbers(far):
    rows, columns = torch.arange(64).unsqueeze(1), torch.arange(64)
    assert (uniform(rows, columns, 1) == uniform(rows + far, columns, 1)).double().mean() <= 0.01


def test_any_integer_is_a_seed():
    rows, columns = torch.arange(8).unsqueeze(1), torch.arange(8)
    assert not torch.equal(uniform(rows, columns, -1), uniform(rows, columns, 1))
    table = torch.randn(5, 4).bfloat16()
    uniformity_step_(table, torch.arange(5), lr=0.1, seed=-(2**62))
    assert table.isfinite().all()


# ---- compilation


def stepped(table: Tensor, index: Tensor, **options) -> tuple[Tensor, Tensor]:
    table = table.clone()
    loss = uniformity_step_(table, index, **options)
    return table, loss


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compiled_equals_eager(table_dtype, impl, compiled):
    table, index = torch.randn(9, 5).to(table_dtype), torch.tensor([7, 0, 3, 4])
    options = {"lr": 0.1, "t": 1.5, "seed": 4, "impl": impl}
    for given, eager in zip(compiled(stepped)(table, index, **options), stepped(table, index, **options), strict=True):
        assert torch.equal(given, eager)


def test_compiled_takes_another_rate_seed_and_subset(compiled):
    """All change from step to step."""
    step = compiled(stepped)
    table = torch.randn(9, 5).bfloat16()
    for seed, (lr, n) in enumerate(((0.1, 4), (0.05, 6), (0.025, 2))):
        options = {"lr": lr, "seed": seed}
        index = torch.randperm(9)[:n]
        for given, eager in zip(step(table, index, **options), stepped(table, index, **options), strict=True):
            assert torch.equal(given, eager)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_custom_op_keeps_its_promises(table_dtype, impl):
    arguments = (torch.randn(9, 5).to(table_dtype), torch.tensor([7, 0, 3]), 0.1, 2.0, 3, impl)
    torch.library.opcheck(torch.ops.gif_kernels.uniformity_step_.default, arguments)


def test_memory_is_that_of_the_rows_and_not_of_the_table(peak_bytes):
    table = torch.randn(200_000, 16).bfloat16()
    index = torch.randperm(len(table))[:256]
    peak = peak_bytes(partial(uniformity_step_, table, index, lr=0.1))
    assert peak <= table.nbytes // 4
    assert peak <= 4 * 256**2 + 32 * 8 * index.numel() * 16  # the pairs; two dozen (n, d) temporaries of 8 bytes
