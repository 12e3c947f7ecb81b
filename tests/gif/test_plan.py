"""What a run will take: the formulas against the implementations they are of, and the command."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gif.losses import RECIPES
from gif.planning import CARDS, Rates, measure_rates, plan, spread_step_seconds
from gif.planning import command as command_module
from gif.planning.heads import gif_cost, partial_fc_cost, softmax_cost
from gif.planning.measured import StepMeasurement, measure_step, plot_spreading
from gif.planning.rates import pages_of_a_row
from gif.planning.stages import (
    encode_cost,
    head_costs,
    kmeans_rows,
    pixels_cost,
    spread_cost,
    spread_memory,
    spread_report_seconds,
    tokenize_cost,
)
from gif.progress import console
from gif_kernels.gaussian_potential.blocked import TILE

MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "head-memory.csv"
RATES = Rates(products=1e12, exponentials=1e10, memory=1e11, pages=1e5, overhead=1e-4, capacity=80e9)


class TestFormulas:
    def test_a_step_knows_the_subset_and_not_the_table(self):
        small, large = (spread_cost(m, 512, 2, RATES, batch=2000, epochs=3, in_file=False) for m in (10**6, 10**7))
        reports = [spread_report_seconds(m, 512, RATES) for m in (10**6, 10**7)]
        assert large.seconds - reports[1] == pytest.approx(10 * (small.seconds - reports[0]))
        assert large.memory - small.memory == 9 * 10**6 * 512 * 2

    def test_a_report_sorts_where_not_all_are_judged(self):
        judged = spread_report_seconds(20_000, 512, RATES)
        products = 12 * 20_000**2 * 512 / 1e12  # five searches of the nearest, and two potentials
        assert judged == pytest.approx(products + 20_000**2 / 1e10 + 3 * 20_000**2 * 16 / 1e11)
        slow = replace(RATES, sorts=1e5)
        depth = 13  # leaves of at most 128 of a million
        assert spread_report_seconds(10**6, 512, slow) - spread_report_seconds(10**6, 512, RATES) == pytest.approx(
            2 * 10**6 * depth * (1 / 1e5 - 1 / RATES.sorts)
        )
        host = [spread_cost(m, 512, 4, RATES, batch=2000, epochs=1, in_file=True).host for m in (20_000, 10**6)]
        assert host == [8 * 20_000, 10**6 * (4 * depth + 56)]

    def test_pixels_are_read_once_or_those_that_are_fitted_to_twice(self):
        rates = replace(RATES, images=1e4, memory=torch.inf, products=torch.inf)
        assert pixels_cost(60_000, 128, rates, images=3).seconds == pytest.approx(60_000 * 3 / 1e4)
        assert pixels_cost(10**6, 128, rates, images=3).seconds == pytest.approx((10**6 + 65_536) * 3 / 1e4)
        small, large = (pixels_cost(m, 128, RATES, images=3) for m in (10**6, 10**7))
        assert large.host - small.host == 9 * 10**6 * 128 * 4
        assert small.host == 10**6 * 128 * 4 + 4096 * 1024 * (12 + 8)

    def test_rows_of_large_nodes_go_through_kmeans_by_samples(self):
        sample = 256 * 20
        assert kmeans_rows(10**6, 20, 5) == pytest.approx((16 + 20 * 9) * sample + 2 * 10**6)
        assert kmeans_rows(20, 20, 2) == 0
        cut = replace(RATES, cuts=1e3)
        slower = [tokenize_cost(10**6, 512, 4, rates, vocab_size=20, length=5).seconds for rates in (cut, RATES)]
        assert slower[0] > (kmeans_rows(10**6, 20, 5) + 5 * 20_000 * 3) / 1e3 > slower[1]

    def test_a_step_by_hand(self):
        n, d = 2048, 512
        seconds = 3 * n * n * d / 1e12 + n * (n + TILE) / 2 / 1e10 + n * d * (4 * 4 + 48) / 1e11
        assert spread_step_seconds(d, 4, n, RATES, in_file=False) == pytest.approx(1e-4 + seconds)
        pages = n * (1 + 2047 / 4096) / 1e5
        assert spread_step_seconds(d, 4, n, RATES, in_file=True) == pytest.approx(1e-4 + seconds + pages)

    def test_a_file_takes_the_table_out_of_memory(self):
        inside = spread_cost(10**6, 64, 4, RATES, batch=100, epochs=1, in_file=False)
        outside = spread_cost(10**6, 64, 4, RATES, batch=100, epochs=1, in_file=True)
        assert inside.memory - outside.memory == 10**6 * 64 * 4

    def test_tokenising_on_a_cpu_leaves_the_vectors_in_their_file(self):
        mapped, held = (
            tokenize_cost(10**6, 512, 2, RATES, vocab_size=16, length=7, mapped=mapped).memory
            for mapped in (True, False)
        )
        blocks = 10 * 4 * 2**22  # of float32 on a CPU; 32 times as many on a card
        assert mapped == 24e6 + blocks
        assert held == 24e6 + 32 * blocks + 1024e6

    def test_encoding_holds_the_vectors_and_the_sums_of_a_part(self):
        small, large = (encode_cost(m, 512, RATES, images=3, encoder_flops=1e9).host for m in (10**6, 10**7))
        assert large - small == 9 * 10**6 * 512 * 4 and small == 10**6 * 512 * 4 + 4096 * 512 * 12

    def test_the_pages_of_a_mapped_file_are_the_hosts(self):
        hosts = [
            tokenize_cost(10**6, 512, 2, RATES, vocab_size=16, length=7, mapped=mapped).host for mapped in (True, False)
        ]
        assert hosts == [1024e6, 0]

    def test_a_commands_process_takes_its_start_and_its_libraries(self):
        alone = encode_cost(1000, 64, RATES, images=1, encoder_flops=1e9)
        started = alone.in_a_process(replace(RATES, start=3.0, resident=2e9))
        assert started.seconds - alone.seconds == pytest.approx(3) and started.host - alone.host == 2e9
        assert alone.in_a_process(RATES) == alone

    def test_images_that_are_read_take_their_time(self):
        rates = replace(RATES, images=1e4, memory=torch.inf, products=torch.inf)
        assert pixels_cost(1000, 128, rates, images=3, read=500).seconds == pytest.approx(3000 * (1 / 1e4 + 1 / 500))
        assert encode_cost(1000, 128, rates, images=3, encoder_flops=0, read=500).seconds == pytest.approx(6)

    def test_rounds_of_kmeans_are_in_a_sketch(self):
        rates = replace(RATES, memory=torch.inf)  # products alone
        wide, narrow, unsketched = (
            tokenize_cost(10**6, d, 4, rates, vocab_size=20, length=5).seconds for d in (1024, 64, 96)
        )
        assert wide == narrow and unsketched == pytest.approx(1.5 * narrow)

    def test_pages_of_a_row(self):
        begins = torch.arange(4096)
        for size in (64, 2048, 4096, 6000):
            pages = (begins + size - 1) // 4096 + 1
            assert pages_of_a_row(size) == pytest.approx(float(pages.double().mean()))

    def test_heads_in_products_a_second(self):
        costs = head_costs(10**6, 256, RATES, batch=64, vocab_size=12)
        wanted = [
            gif_cost(10**6, width=256, batch=64, vocab_size=12),
            softmax_cost(10**6, width=256, batch=64),
            partial_fc_cost(10**6, 10**5, width=256, batch=64),
        ]
        assert [cost.memory for cost in costs] == [cost.bytes for cost in wanted]
        assert [cost.seconds for cost in costs] == [cost.flops / 1e12 for cost in wanted]

    def test_the_whole_table_fits_one_card_as_bfloat16(self):
        cost = spread_cost(64_000_000, 512, 2, CARDS["h100"], batch=2048, epochs=1, in_file=False)
        assert 64e6 * 512 * 2 < cost.memory < CARDS["h100"].capacity

    def test_encoding_is_linear_in_the_identities(self):
        one, two = (encode_cost(m, 512, RATES, images=20, encoder_flops=1e9).seconds for m in (10**6, 2 * 10**6))
        assert two == pytest.approx(2 * one)


HEADS = {
    "GIF": lambda m, batch: gif_cost(m, batch=batch),
    "GIF, no negatives": lambda m, batch: gif_cost(m, batch=batch, recipe=replace(RECIPES["live"], negatives=0)),
    "GIF, published losses": lambda m, batch: gif_cost(m, batch=batch, recipe=RECIPES["paper"]),
    "full softmax": lambda m, batch: softmax_cost(m, batch=batch),
    "Partial FC 0.1": lambda m, batch: partial_fc_cost(m, 0.1 * m, batch=batch),
    "Partial FC 0.3": lambda m, batch: partial_fc_cost(m, 0.3 * m, batch=batch),
    "Partial FC 10,000": lambda m, batch: partial_fc_cost(m, 10_000, batch=batch),
}


def measured_heads():
    """The points of `python -m benchmarks.head_memory`, but for the one head that only the benchmarks have."""
    with MEASURED.open() as file:
        rows = [row for row in csv.DictReader(file) if row["head"] in HEADS]
    assert {row["head"] for row in rows} == set(HEADS)
    return rows


@pytest.mark.parametrize("row", measured_heads(), ids=lambda row: f"{row['head']}-{row['identities']}-{row['batch']}")
def test_heads_take_the_memory_that_was_measured(row):
    cost = HEADS[row["head"]](int(row["identities"]), int(row["batch"]))
    assert cost.bytes == pytest.approx(int(row["kept_bytes"]) + int(row["peak_bytes"]), rel=0.15)


def test_a_first_step_has_no_momentum_yet():
    """Their optimizers make it at the end of that step; the points are of docs/benchmarks/head-first-step.csv."""
    gif, softmax = gif_cost(64_000_000, batch=256), softmax_cost(10**6, batch=256)
    centres = softmax.parameters  # the backward pass took twice as much beside them when this was measured
    then = 14 * 64_000_000  # bytes of the code table when this was measured: a token a byte, order and rank
    assert gif.bytes - gif.momentum - gif.tables + then == pytest.approx(878 * 2**20, rel=0.15)
    assert softmax.bytes - softmax.momentum + 2 * centres == pytest.approx(10.5 * 2**30, rel=0.15)


def test_measured_rates_are_plausible():
    rates = measure_rates(16, 256)
    for rate, low, high in ((rates.products, 1e7, 1e13), (rates.exponentials, 1e6, 1e12), (rates.memory, 1e7, 1e12)):
        assert low < rate < high
    assert 1e2 < rates.pages < 1e8 and 0 < rates.overhead < 1
    assert all(1e3 < rate < 1e9 for rate in (rates.images, rates.cuts, rates.sorts))
    assert 0.5 < rates.start < 60 and 1e8 < rates.resident < 1e11


def test_the_plan_foretells_a_step(tmp_path):
    """On 64M rows in a sparse file. Within a factor of 4: other work on the machine comes and goes between the two."""
    step = measure_step(64_000_000, 8, 512, tmp_path)
    assert 0.25 < step.planned / step.seconds < 4
    assert step.table_bytes == 64_000_000 * 8 * 4
    assert not list(tmp_path.iterdir())


class TestCommand:
    def run(self, **options):
        with console.capture() as capture:
            plan(**options)
        return capture.get()

    def test_a_card(self):
        printed = self.run()
        assert "64,000,000 identities x 512, bfloat16, h100" in printed
        assert "v = 14, l = 7" in printed
        assert "more than the 80 GB of one h100: head, full softmax; head, Partial FC" in printed

    def test_this_machine_measured(self, monkeypatch, tmp_path):
        monkeypatch.setattr(command_module, "measure_rates", lambda *arguments: RATES)
        points = [
            StepMeasurement(10**6, 32, 2048, 10**6 * 128, 0.02, 0.025),
            StepMeasurement(4 * 10**6, 32, 2048, 5 * 10**8, 0.03, 0.02),
        ]
        monkeypatch.setattr(command_module, "measure_steps", lambda *arguments: points)
        output = tmp_path / "plan.png"
        printed = self.run(device="cpu", dtype="float32", width=32, identities=4e6, measure=True, output=output)
        assert "1,000,000 x 32 float32 in a file: a step of 2048 takes 20.0 ms, planned 25.0 ms (1.25 x)" in printed
        saved = json.loads(output.with_suffix(".json").read_text())
        assert saved["rates"]["products"] == 1e12 and len(saved["measured"]) == 2
        assert output.read_bytes()[:4] == b"\x89PNG"

    def test_errors(self):
        with pytest.raises(ValueError, match="at least 2 identities"):
            plan(identities=1)
        with pytest.raises(ValueError, match="give --device cpu"):
            plan(measure=True)
        with pytest.raises(ValueError, match="pixels are encoded by a CPU"):
            plan(encoder="pixels")
        with pytest.raises(ValueError, match="more than 0 images read a second"):
            plan(read=0)


def test_picture_without_measurements(tmp_path):
    planned = [(m, spread_memory(m, 64, 4, 128), 0.1) for m in (10**6, 10**7)]
    plot_spreading(planned, [], math.inf, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(("m", "width", "length", "took"), [(1_000_000, 512, 5, 2.28), (16_000_000, 64, 6, 16.3)])
def test_a_card_s_plan_is_within_30_percent_of_what_it_took(m, width, length, took):
    """docs/gpu.md: codes of that many float16 rows, and steps of spreading, on an H200."""
    planned = tokenize_cost(m, width, 2, CARDS["h200"], vocab_size=20, length=length).seconds
    assert planned == pytest.approx(took, rel=0.3)
    step = spread_step_seconds(512, 2, 2048, CARDS["h200"], in_file=False)
    assert step == pytest.approx(1 / 3656, rel=0.3)


def test_a_head_on_a_card_waits_for_its_host():
    small, large = (head_costs(m, 512, CARDS["h200"], batch=256, vocab_size=20) for m in (10_000, 10_000_000))
    assert small[0].seconds == large[0].seconds == pytest.approx(9.6e-3, rel=0.3) and "host" in small[0].note
    assert "host" in small[1].note and "host" not in large[1].note
