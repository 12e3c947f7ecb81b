"""Compile every shipped kernel for every target, without a GPU, and hold what comes out to limits.

`python -m gif_kernels.aot [--json out.json]` prints registers, spills, shared memory and matrix instructions of each
configuration and exits 1 where a limit is broken: no spill and no stack on NVIDIA, shared memory within the target's,
and the target's matrix instructions where a configuration asks for them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rich
import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gif_kernels  # noqa: F401 (registers the ops)
from gif_kernels import dispatch
from gif_kernels.tuning import Configuration

KIB = 1024
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAUNCH_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Target:
    """What is compiled for, and what it offers."""

    triton: GPUTarget
    shared: int
    """Bytes of shared memory that one program may use."""
    matrix: tuple[str, ...]
    """Instructions of its matrix units, the widest first."""


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB, ("HMMA",)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB, ("HGMMA", "HMMA")),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB, ("UTCHMMA", "HMMA")),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB, ("v_mfma",)),
}


@dataclass(frozen=True)
class Compiled:
    """What a configuration became on a target."""

    architecture: str
    kernel: str
    label: str
    warps: int
    stages: int
    registers: int
    spilled: int
    """Bytes of stack a thread on NVIDIA, registers spilled on AMD."""
    shared: int
    matrix: dict[str, int]
    broken: tuple[str, ...]


def configurations(architecture: str) -> list[Configuration]:
    """Everything that is shipped for ``architecture``: each op's kernels module declares its own."""
    return [found for module in dispatch.triton_modules() for found in import_module(module).shipped(architecture)]


def compile_all(architectures: Iterable[str]) -> Iterator[Compiled]:
    """Compile every shipped configuration, in parallel; results come in order.

    In processes, not threads: `ast.parse`, with which Triton begins, is not safe in threads before Python 3.12.
    """
    jobs = [(name, number) for name in architectures for number in range(len(configurations(name)))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_numbered, *zip(*jobs, strict=True))


def _compile_numbered(architecture: str, number: int) -> Compiled:
    """One of `configurations`, by its place: a kernel cannot be sent to another process."""
    return compile_one(architecture, configurations(architecture)[number])


def compile_one(architecture: str, configuration: Configuration) -> Compiled:
    """Compile one configuration and read back what it needs."""
    target = TARGETS[architecture]
    kernel = configuration.kernel
    options = {name: configuration.constants[name] for name in LAUNCH_OPTIONS if name in configuration.constants}
    constants = {name: x for name, x in configuration.constants.items() if name not in LAUNCH_OPTIONS}
    signature = {name: configuration.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=target.triton, options=options)
    read = _read_amd if target.triton.backend == "hip" else _read_nvidia
    registers, spilled, matrix = read(built.asm, target.matrix)
    found = Compiled(
        architecture,
        kernel.__name__,
        configuration.label,
        built.metadata.num_warps,
        built.metadata.num_stages,
        registers,
        spilled,
        built.metadata.shared,
        matrix,
        (),
    )
    return Compiled(**{**vars(found), "broken": tuple(_broken(found, configuration, target))})


def _broken(found: Compiled, configuration: Configuration, target: Target) -> Iterator[str]:
    if found.spilled and target.triton.backend == "cuda":
        yield f"{found.spilled} bytes spilled, 0 allowed"
    if found.shared > target.shared:
        yield f"{found.shared} bytes of shared memory, {target.shared} available"
    wanted = {"none": (), "any": target.matrix, "widest": target.matrix[:1]}[configuration.matrix]
    if wanted and not any(found.matrix[instruction] for instruction in wanted):
        yield f"no {' or '.join(wanted)}"


def _read_nvidia(assembly: dict[str, Any], matrix: Sequence[str]) -> tuple[int, int, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(assembly["cubin"])
        usage = _run("cuobjdump", "-res-usage", path)
        has_products = "mma" in assembly["ptx"]  # without, the disassembler, slow to start, has nothing to find
        code = _run("nvdisasm", "-c", path) if has_products else ""
    numbers = {name: int(_search(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL")}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], _count(matrix, code)


def _read_amd(assembly: dict[str, Any], matrix: Sequence[str]) -> tuple[int, int, dict[str, int]]:
    code = assembly["amdgcn"]
    registers, spilled = (int(_search(rf"\.{name}:\s+(\d+)", code)) for name in ("vgpr_count", "vgpr_spill_count"))
    return registers, spilled, _count(matrix, code)


def _run(tool: str, option: str, path: Path) -> str:
    return subprocess.run([NVIDIA_TOOLS / tool, option, path], check=True, capture_output=True, text=True).stdout


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in the compiler's report; this Triton's tools write another format")
    return found.group(1)


def _count(instructions: Sequence[str], code: str) -> dict[str, int]:
    return {name: len(re.findall(rf"\b{name}", code)) for name in instructions}


def table(results: Iterable[Compiled]) -> Table:
    """The results for a terminal."""
    columns = ["target", "kernel", "configuration", "warps", "stages", "registers", "spilled", "shared", "matrix"]
    drawn = Table(*columns, "limits")
    for found in results:
        matrix = ", ".join(f"{count} {name}" for name, count in found.matrix.items() if count)
        numbers = map(str, (found.warps, found.stages, found.registers, found.spilled, found.shared))
        verdict = f"[red]{'; '.join(found.broken)}" if found.broken else "[green]held"
        drawn.add_row(found.architecture, found.kernel, found.label, *numbers, matrix, verdict)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 if a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m gif_kernels.aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be given again")
    options = parser.parse_args(arguments)
    results = list(compile_all(options.target or TARGETS))
    rich.print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in results], indent=2) + "\n")
    return int(any(found.broken for found in results))


if __name__ == "__main__":
    sys.exit(main())
