"""What other packages import from gif_kernels is published: named in the `__all__` of the module that it comes from."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REACHES_INSIDE = ROOT / "benchmarks" / "gpu" / "internals.py"
"""The one file that is there to do so."""


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """The modules of gif_kernels that a file imports from, and the names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gif_kernels":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("gif_kernels."))


def is_published(module: str, name: str) -> bool:
    """Whether ``name`` is in the module's `__all__`, or is itself a module that has one."""
    if name in getattr(import_module(module), "__all__", ()):
        return True
    try:
        return hasattr(import_module(f"{module}.{name}"), "__all__")
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("package", ["gif", "benchmarks", "examples"])
def test_other_packages_import_what_is_published(package):
    files = sorted(set((ROOT / package).rglob("*.py")) - {REACHES_INSIDE})
    found = {(str(path.relative_to(ROOT)), *names) for path in files for names in imported(path)}
    assert [(path, module, name) for path, module, name in sorted(found) if not is_published(module, name)] == []


def test_what_is_published_exists():
    for path in (ROOT / "gif_kernels").rglob("*.py"):
        if "__all__" in path.read_text():
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
            assert all(hasattr(module, name) for name in module.__all__)
