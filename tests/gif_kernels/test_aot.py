"""Every shipped kernel, compiled for every target without a GPU and held to its limits."""

from __future__ import annotations

import io
import json
import re
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gif_kernels.device import tuning

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
    assert all(r["warps"] > 0 and r["stages"] > 0 and r["triton"] == aot.triton.__version__ for r in results)
    for target, described in aot.TARGETS.items():
        widest = described.matrix[0]
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


def test_targets_are_the_cards_people_have():
    """A100; GeForce 30 and A10; GeForce 40 and L4; H100; B200; GeForce 50; MI300."""
    assert list(aot.TARGETS) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
    assert {name for name, target in aot.TARGETS.items() if target.shared == 99 * 1024} == {"sm_86", "sm_89", "sm_120"}


def test_what_is_held_is_what_the_target_offers(report):
    _, results = report
    for r in results:
        assert r["shared"] <= aot.TARGETS[r["architecture"]].shared
        if r["architecture"].startswith("sm_"):
            known = aot.KNOWN_SPILLS.get((aot._triton_version(), r["architecture"], r["kernel"]), 0)
            assert r["spilled"] <= known


def test_known_spills_are_of_tiles_that_were_measured():
    for version, target, kernel in aot.KNOWN_SPILLS:
        assert re.fullmatch(r"\d+\.\d+", version) and version != "3.6"
        assert aot.configurations(target, [kernel])
        tiles = tuning.FUSED_POTENTIAL[target].values() if kernel == "gaussian_potential_fused" else ()
        named = tuning.TILES.get(kernel.removesuffix("_search"), {})
        sources = [t.source for t in tiles] + [t.source for (name, _), t in named.items() if name == target]
        assert any(source.startswith("measured") for source in sources)


def test_a_known_spill_is_allowed_and_no_byte_more(monkeypatch):
    configuration = aot.configurations("sm_90", ["gaussian_potential_fused"])[0]
    found = aot.Compiled("sm_90", "gaussian_potential_fused", "a tile", spilled=16, matrix={"HGMMA": 1})
    target = aot.TARGETS["sm_90"]
    monkeypatch.setattr(aot.triton, "__version__", "3.5.1")
    assert list(aot._broken(found, configuration, target)) == []
    assert list(aot._broken(replace(found, spilled=24), configuration, target)) == ["24 bytes spilled, 16 allowed"]
    monkeypatch.setattr(aot.triton, "__version__", "3.6.0")
    assert list(aot._broken(found, configuration, target)) == ["16 bytes spilled, 0 allowed"]


def test_a_compiler_that_fails_is_reported(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(aot.triton, "compile", fail)
    found = aot.compile_one("sm_100", aot.configurations("sm_100", ["gaussian_potential_pairs"])[0])
    assert found.broken == ("does not compile: RuntimeError: PassManager::run failed",)


def test_a_race_is_reported(monkeypatch):
    monkeypatch.setattr(aot, "overwritten_operands", lambda ttgir: ["%rows"] if "ttg" in ttgir else [])
    found = aot.compile_one("sm_90", aot.configurations("sm_90", ["reduce_losses"])[0])
    assert found.broken == ("a product's operand %rows is overwritten",)


def test_kernels_are_chosen_by_a_part_of_their_name(capsys):
    chosen = {c.kernel.__name__ for c in aot.configurations("sm_80", ["potential_gradient", "uniformity"])}
    assert chosen == {"gaussian_potential_gradient", "uniformity_step"}
    assert aot.main(["--target", "sm_80", "--kernel", "uniformity"]) == 0
    assert "1 of 1 hold their limits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        aot.main(["--kernel", "no such kernel"])
    assert "no kernel has no such kernel in its name" in capsys.readouterr().err


def test_the_table_fits_80_columns():
    """Nothing is cut off: every number, and the reason why a limit is broken, are there."""
    console = Console(width=80, record=True, file=io.StringIO())
    label = "5 x 20 x 512 bfloat16 and float32, pulled, shift"
    found = aot.Compiled("sm_100", "kernel", label, 8, 3, 255, 1234, 227 * 1024, {"UTCHMMA": 768}, ("[1234] spilled",))
    console.print(aot.table("sm_100", [found]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for shown in ("8 x 3", "255", "1234", "227.0", "768 UTCHMMA", "[1234] spilled"):
        assert shown in text
    assert all(word in text for word in label.split())


@pytest.mark.parametrize(
    ("card", "owner"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_86"),
        ("sm_89", "sm_86"),
        ("sm_90", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_86"),
        ("sm_121", "sm_86"),  # not named: the least shared memory
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_a_card_without_tiles_shares_those_of_another(card, owner, monkeypatch):
    owners = ("sm_80", "sm_86", "sm_100", "gfx942")
    rows = {(name, 2): tuning.Tile(16 * i, 16, 16, 4, 1) for i, name in enumerate(owners, 1)}
    monkeypatch.setitem(tuning.TILES, "kernel", rows)
    assert tuning.tile("kernel", torch.bfloat16, card) == rows[owner, 2]


def test_the_last_to_share_have_every_tile():
    for rows in tuning.TILES.values():
        sizes = {size for _, size in rows}
        assert {(last, size) for last in tuning.LAST for size in sizes} <= set(rows)


def test_the_matrix_of_tritons_starts_at_the_lowest_that_is_supported():
    root = Path(__file__).parents[2]
    dependencies = "\n".join(tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"])
    (required,) = re.findall(r"^triton>=([\d.]+)", dependencies, re.MULTILINE)
    (versions,) = re.findall(r"^TRITONS \?= (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    versions = versions.split()
    assert versions[0].startswith(f"{required}.") and versions[-1] == "newest" and len(versions) >= 3


def test_a_spill_is_reported(monkeypatch):
    """Four warps cannot hold a block meant for eight."""
    monkeypatch.setattr(aot, "KNOWN_SPILLS", {})
    configuration = next(c for c in aot.configurations("sm_90") if c.kernel.__name__ == "token_margin_forward")
    crowded = replace(configuration, constants={**configuration.constants, "num_warps": 4})
    found = aot.compile_one("sm_90", crowded)
    assert found.spilled > 0
    assert found.broken == (f"{found.spilled} bytes spilled, 0 allowed",)
