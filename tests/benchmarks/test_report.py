"""From what pytest-benchmark wrote to tables, plots and a verdict."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import pictures as pictures_module
from benchmarks.compare import compare
from benchmarks.harness import Reference, fastest_products
from benchmarks.headlines import HEADLINES
from benchmarks.heads import BATCH, FULL_SOFTMAX
from benchmarks.pictures import draw_heads, pictures
from benchmarks.report import report
from benchmarks.results import Measurement, read_results


def entry(provider, ratio, *, kernel="head", shape="m10000", **facts):
    """One measurement as pytest-benchmark writes it."""
    known = {"kernel": kernel, "provider": provider, "mode": "step", "shape": shape, "dtype": "float32"}
    numbers = {"ratio": ratio, "ratio_20": ratio * 0.9, "ratio_80": ratio * 1.1, "peak_bytes": 3 << 20}
    more = {"machine": "a machine", "reference_flops": 1000, "reference_bytes": 1000}
    more |= {"copy_ratio": ratio, "ceiling_ratio": ratio, **facts}
    return {"stats": {"median": ratio / 1000}, "extra_info": known | numbers | more}


def write(path, *entries):
    path.write_text(json.dumps({"benchmarks": entries}))
    return path


@pytest.fixture
def results(tmp_path):
    head = {"identities": 10_000, "kept_bytes": 1 << 20, "needed_bytes": 5 << 20}
    return write(
        tmp_path / "results.json",
        entry("GIF", 2.0, **head),
        entry("full softmax", 40.0, **head),
        entry("ours", 4.0, kernel="product", shape="m64", flops=3000, bytes=2000),
        entry("ours", 4.0, kernel="product", shape="m65", flops=1000, bytes=2000, headline=False),
    )


def test_report(results, tmp_path):
    docs = tmp_path / "docs" / "benchmarks.md"
    (docs.parent / "pictures").mkdir(parents=True)
    blocks = "".join(f"<!-- begin bench {kernel} -->\n<!-- end bench {kernel} -->\n" for kernel in ("head", "product"))
    docs.write_text(blocks)
    report([results], output=tmp_path / "out", docs=docs)
    head = (tmp_path / "out" / "head.md").read_text()
    assert "| m10000 step float32 | 2 ms, 4 MiB | 40 ms, 4 MiB, 20 x |" in head
    assert "| 10,000 | Partial FC 0.1 | " in head and "| 10,000 | GIF |" not in head  # what was not measured, and needs
    product = (tmp_path / "out" / "product.md").read_text()
    assert "| m64 step float32 | 4 ms, 3 MiB (75 %) |" in product  # of the product's rate, the larger share
    folded = product[product.index("<details><summary>1 more</summary>") :]
    assert "| m65 step float32 | 4 ms, 3 MiB (50 %) |" in folded and "m64" not in folded  # of the copy's
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["provider"], row["shape"], row["metric"]): float(row["value"]) for row in rows}
    assert found["full softmax", "m10000", "ratio"] == 40 and found["full softmax", "m10000", "kept_bytes"] == 1 << 20
    assert found["ours", "m64", "rate"] == 0.75 and found["ours", "m64", "bandwidth"] == 0.5
    assert found["ours", "m65", "roofline"] == 0.5 and ("GIF", "m10000", "rate") not in found
    for name in ("bench-head.png", "bench-product-roofline.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
        assert f"(pictures/{name})" in docs.read_text() and (docs.parent / "pictures" / name).exists()


def test_a_document_is_small_and_the_numbers_lie_beside_it(tmp_path):
    docs = tmp_path / "docs" / "benchmarks.md"
    docs.parent.mkdir()
    docs.write_text("<!-- begin bench token_margin -->\n<!-- end bench token_margin -->\n")
    points = {"kernel": "token_margin", "flops": 1000, "bytes": 1000}
    found = [
        entry("ours", 2.0, shape="B1", **points) | {"stats": {"median": 0.5}},
        entry("loop", 5.0, shape="B1", **points),
        entry("loop", 7.0, shape="B2", headline=False, **points),
    ]
    for one in found:
        one["extra_info"]["mode"] = "forward+backward"
    forward = entry("ours", 1.0, shape="B1", **points)
    forward["extra_info"]["mode"] = "forward"
    report([write(tmp_path / "tokens.json", forward, *found)], output=tmp_path / "out", docs=docs)
    text = docs.read_text()
    assert "| B1 forward+backward float32 | 500 ms | 2.5 x |" in text
    assert "B2" not in text and "| B1 forward float32" not in text and "(benchmarks/token_margin.csv)" in text
    with (docs.parent / "benchmarks" / "token_margin.csv").open() as file:
        rows = {(row["provider"], row["shape"], row["mode"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4
    assert rows["loop", "B1", "forward+backward"]["of_first"] == "2.5"
    assert rows["loop", "B2", "forward+backward"]["of_first"] == "" and rows["ours", "B1", "forward"]["roofline"] == "1"


def test_the_document_says_what_a_head_would_need(results, tmp_path):
    docs = tmp_path / "docs.md"
    docs.write_text("".join(f"<!-- begin bench {x} -->\n<!-- end bench {x} -->\n" for x in ("head", "product")))
    head = {"identities": 10**7, "kept_bytes": 0}
    more = write(tmp_path / "more.json", entry("GIF", 2.0, shape="m10000000", **head))
    report([results, more], output=tmp_path / "out", docs=docs)
    assert "| m10000000 step float32 | 2 ms, 3 MiB | needs 85.8 GiB |" in docs.read_text()


def test_the_later_result_counts(results, tmp_path):
    head = {"identities": 10_000, "kept_bytes": 0, "needed_bytes": 0}
    report([results, write(tmp_path / "later.json", entry("GIF", 8.0, **head))], output=tmp_path / "out")
    assert "| 8 ms, 3 MiB | 40 ms, 4 MiB, 5 x |" in (tmp_path / "out" / "head.md").read_text()


def whole_steps(path):
    sizes = (10_000, 100_000)
    times = {"backbone alone": (4.0, 4.0), "GIF": (5.0, 5.0), "full softmax": (8.0, 40.0)}
    return write(
        path,
        *(
            entry(name, ratio, kernel="whole_step", shape=f"m{m}", identities=m)
            for name, ratios in times.items()
            for m, ratio in zip(sizes, ratios, strict=True)
        ),
    )


def test_share_of_the_head(tmp_path):
    report([whole_steps(tmp_path / "steps.json")], output=tmp_path / "out")
    table = (tmp_path / "out" / "whole_step.md").read_text()
    assert "| m10000 step float32 | 4 ms, 3 MiB | 5 ms, 3 MiB, 20 % | 8 ms, 3 MiB, 50 % |" in table
    assert "| m100000 step float32 | 4 ms, 3 MiB | 5 ms, 3 MiB, 20 % | 40 ms, 3 MiB, 90 % |" in table


class TestPictures:
    def measured(self, kernel, *points):
        """(provider, identities, ratio)"""
        entries = [entry(name, ratio, kernel=kernel, shape=f"m{m}", identities=m) for name, m, ratio in points]
        return [Measurement.from_entry(one) for one in entries]

    def panels(self, draw, found, monkeypatch, tmp_path):
        """The axes that were drawn, and that the file was written."""
        drawings = []
        monkeypatch.setattr(pictures_module, "save_figure", lambda drawing, path: drawings.append(drawing))
        draw(found, tmp_path / "x.png")
        return drawings[0].axes

    def lines(self, axes, marker, fill):
        """Points of the lines with that marker, filled or hollow, in the order they were drawn."""
        chosen = [line for line in axes.lines if line.get_marker() == marker and line.get_fillstyle() == fill]
        return [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in chosen]

    def test_heads(self, monkeypatch, tmp_path):
        found = self.measured("head", ("GIF", 10_000, 2.0), ("GIF", 64_000_000, 2.5), ("full softmax", 10_000, 40.0))
        time, memory = self.panels(draw_heads, found, monkeypatch, tmp_path)
        assert self.lines(time, "o", "full") == [{10_000: 0.002, 64_000_000: 0.0025}, {10_000: 0.04}]
        beyond, softmax = self.lines(time, "o", "none")
        assert beyond == {} and softmax[64_000_000] == pytest.approx(0.04 * 6400)  # in proportion to its products
        assert self.lines(memory, "o", "none")[1][10**7] == FULL_SOFTMAX.cost(10**7, BATCH).bytes

    def test_only_what_the_measurements_are_enough_for(self):
        one = self.measured("whole_step", ("GIF", 10_000, 1.0))
        assert pictures(one) == {}
        assert list(pictures(self.measured("head", ("GIF", 10_000, 1.0)))) == ["bench-head.png"]
        more = self.measured("whole_step", ("GIF", 10_000, 1.0), ("GIF", 100_000, 1.0))
        assert list(pictures(more)) == ["bench-whole_step.png"]


def test_headlines_say_what_is_wanted_and_whether_it_is_met(tmp_path, capsys):
    points = {"kernel": "live_contrast", "shape": "B256-K4096-d512"}
    codes = {"kernel": "tokenize", "shape": "m10000-d128"}
    tokens = {"kernel": "token_margin", "shape": "B128-d512-l5-v20", "mode": "forward"}
    found = write(
        tmp_path / "results.json",
        *(entry("ours", 6.0, **points), entry("products", 5.0, **points)),
        *(entry("ours", 6.0, **codes), entry("faiss", 3.0, **codes)),
        *(entry("ours", 5.0, **tokens), entry("batched eager", 5.5, **tokens)),
    )
    report([found], output=tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()[-10:]
    assert len(lines) == len(HEADLINES) == 10
    assert "live contrast over its products: 1.20, wanted <= 1.3: met" in lines
    assert "codes of 10K, time over faiss: 2.00, wanted <= 1: NOT MET" in lines
    assert "token loss, B 128, eager's time over ours: 1.10, wanted >= 1.2: NOT MET" in lines
    assert sum(line.endswith("not measured in this run") for line in lines) == 7


def test_the_ceiling_is_no_slower_than_the_reference_product():
    reference = Reference()
    reference()
    assert reference.ceiling_seconds[0] <= reference.seconds[0]


def test_products_of_every_library_are_the_same():
    factor = torch.randn(33, 33)
    for way in fastest_products(factor):
        torch.testing.assert_close(way(), factor @ factor)


def test_compare(results, tmp_path, capsys):
    same = write(tmp_path / "same.json", entry("GIF", 2.2), entry("full softmax", 30.0))
    compare(results, same)
    worse = write(tmp_path / "worse.json", entry("GIF", 2.6))
    with pytest.raises(SystemExit) as stop:
        compare(results, worse)
    assert stop.value.code == 1
    compare(results, worse, tolerance=1.5)
    noisy = entry("GIF", 2.6)
    noisy["extra_info"]["ratio_20"] = 2.1
    compare(results, write(tmp_path / "noisy.json", noisy))  # the quantiles overlap: no verdict
    with pytest.raises(ValueError, match="no measurement in common"):
        compare(results, write(tmp_path / "other.json", entry("nobody", 1.0)))


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="is no result of `make bench`"):
        read_results([write(tmp_path / "x.json", {"stats": {}})])
    with pytest.raises(ValueError, match="no measurement"):
        read_results([write(tmp_path / "empty.json")])
    (tmp_path / "text.json").write_text("not json")
    command = [sys.executable, "-m", "benchmarks.report", str(tmp_path / "text.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
