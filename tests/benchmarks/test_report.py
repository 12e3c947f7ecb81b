"""From what pytest-benchmark wrote to tables, plots and a verdict."""

import csv
import json
import subprocess
import sys

import pytest

from benchmarks.compare import compare
from benchmarks.report import report
from benchmarks.results import read_results


def entry(provider, ratio, *, kernel="head", shape="m10000", **facts):
    """One measurement as pytest-benchmark writes it."""
    known = {"kernel": kernel, "provider": provider, "mode": "step", "shape": shape, "dtype": "float32"}
    numbers = {"ratio": ratio, "ratio_20": ratio * 0.9, "ratio_80": ratio * 1.1, "peak_bytes": 3 << 20}
    more = {"machine": "a machine", "reference_flops": 1000, **facts}
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
        entry("ours", 4.0, kernel="product", shape="m64", flops=3000),
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
    assert "75 % of a product's rate" in (tmp_path / "out" / "product.md").read_text()
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["provider"], row["metric"]): float(row["value"]) for row in rows}
    assert found["full softmax", "ratio"] == 40 and found["ours", "rate"] == 0.75
    for name in ("bench-head.png", "bench-product.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
        assert f"(pictures/{name})" in docs.read_text() and (docs.parent / "pictures" / name).exists()


def test_the_later_result_counts(results, tmp_path):
    head = {"identities": 10_000, "kept_bytes": 0, "needed_bytes": 0}
    report([results, write(tmp_path / "later.json", entry("GIF", 8.0, **head))], output=tmp_path / "out")
    assert "| 8 ms, 3 MiB | 40 ms, 4 MiB, 5 x |" in (tmp_path / "out" / "head.md").read_text()


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
