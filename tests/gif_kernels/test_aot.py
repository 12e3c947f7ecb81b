"""Every shipped kernel, compiled for every target without a GPU and held to its limits."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
aot = import_module("gif_kernels.aot")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The exit code and what was written, of everything for every target."""
    path = tmp_path_factory.mktemp("aot") / "report.json"
    return aot.main(["--json", str(path)]), json.loads(path.read_text())


def test_limits_hold(report):
    code, results = report
    assert {r["label"]: r["broken"] for r in results if r["broken"]} == {}
    assert code == 0


def test_every_kernel_is_compiled_for_every_target(report):
    _, results = report
    for target in aot.TARGETS:
        wanted = [(c.kernel.__name__, c.label) for c in aot.configurations(target)]
        assert [(r["kernel"], r["label"]) for r in results if r["architecture"] == target] == wanted


def test_what_is_read_back_is_there(report):
    """A report that failed to find a number would find 0."""
    _, results = report
    assert all(r["registers"] > 0 for r in results)
    for target, widest in (("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")):
        assert any(r["matrix"].get(widest, 0) > 0 for r in results if r["architecture"] == target)


@pytest.mark.parametrize(
    ("limit", "message"),
    [({"shared": 1000}, "bytes of shared memory, 1000 available"), ({"matrix": ("FMA",)}, "no FMA")],
)
def test_a_broken_limit_is_reported(limit, message, monkeypatch):
    monkeypatch.setitem(aot.TARGETS, "sm_90", replace(aot.TARGETS["sm_90"], **limit))
    configuration = next(c for c in aot.configurations("sm_90") if c.matrix == "widest")
    (broken,) = aot.compile_one("sm_90", configuration).broken
    assert message in broken


def test_a_spill_is_reported():
    """Four warps cannot hold a block meant for eight."""
    configuration = next(c for c in aot.configurations("sm_90") if c.kernel.__name__ == "token_margin_forward")
    crowded = replace(configuration, constants={**configuration.constants, "num_warps": 4})
    found = aot.compile_one("sm_90", crowded)
    assert found.spilled > 0
    assert found.broken == (f"{found.spilled} bytes spilled, 0 allowed",)
