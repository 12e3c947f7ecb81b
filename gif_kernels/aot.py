"""Compile every shipped kernel for every target, without a GPU, and hold what comes out to limits.

`python -m gif_kernels.aot [--target sm_90] [--kernel potential] [--json out.json]` prints registers, spills, shared
memory and matrix instructions of each configuration and exits 1 where a limit is broken: it compiles, no spill and no
stack on NVIDIA, shared memory within the target's, the target's matrix instructions where a configuration asks for
them, and no loop that overwrites what a product still reads (`gif_kernels.device.races`). `make aot-matrix` does so
with each Triton that is supported.
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
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gif_kernels  # noqa: F401 (registers the ops)
from gif_kernels import dispatch
from gif_kernels.device import shipped
from gif_kernels.device.races import overwritten_operands
from gif_kernels.device.shipped import Configuration

KIB = 1024
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAUNCH_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Target:
    """An architecture to compile for, and what it offers a program."""

    triton: GPUTarget
    shared: int
    """Bytes of shared memory that one program may use."""
    matrix: tuple[str, ...]
    """Instructions of its matrix units, the widest first."""


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB, ("HMMA",)),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * KIB, ("HMMA",)),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * KIB, ("HMMA",)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB, ("HGMMA", "HMMA")),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB, ("UTCHMMA", "HMMA")),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB, ("HMMA",)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB, ("v_mfma",)),
}


KNOWN_SPILLS = {
    ("3.5", "sm_90", "gaussian_potential_fused"): 16,
    ("3.5", "sm_90", "max_cosine_search"): 8,
    ("3.8", "sm_90", "token_margin_forward"): 56,
    ("3.9", "sm_90", "gaussian_potential_fused"): 144,
    ("3.9", "sm_90", "max_cosine_search"): 72,
    ("3.9", "sm_90", "token_margin_forward"): 120,
}
"""Bytes of stack that are allowed after all, by Triton's version, target and kernel: of tiles that were measured.

They are the fastest on an H100 with Triton 3.6, with which they do not spill. Each Triton brings another assembler, and
some hold more at once; which tile is then the fastest is for a measurement with that version to say, not for a guess.
The results are right, with a few loads and stores more.
"""


@dataclass(frozen=True)
class Compiled:
    """What a configuration needs on a target, read from the compiled kernel; zeros where it does not compile."""

    architecture: str
    kernel: str
    label: str
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spilled: int = 0
    """Bytes of stack a thread on NVIDIA, registers spilled on AMD."""
    shared: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    broken: tuple[str, ...] = ()


def configurations(architecture: str, kernels: Sequence[str] = ()) -> list[Configuration]:
    """Everything that is shipped for ``architecture``: what the ops share, then what each op's shipped.py declares.

    With ``kernels`` only those whose name contains one of them.
    """
    modules = [shipped, *(import_module(f"{package}.shipped") for package in dispatch.triton_packages())]
    declared = (found for module in modules for found in module.configurations(architecture))
    return [found for found in declared if not kernels or any(name in found.kernel.__name__ for name in kernels)]


def compile_all(architectures: Sequence[str], kernels: Sequence[str] = ()) -> Iterator[Compiled]:
    """Compile every shipped configuration, a process a core; results come in order.

    In processes, not threads: `ast.parse`, with which Triton begins, is not safe in threads before Python 3.12.
    """
    jobs = [(name, kernels, number) for name in architectures for number in range(len(configurations(name, kernels)))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_numbered, *zip(*jobs, strict=True))


def _compile_numbered(architecture: str, kernels: Sequence[str], number: int) -> Compiled:
    """One of `configurations`, by its place: a kernel cannot be sent to another process."""
    return compile_one(architecture, configurations(architecture, kernels)[number])


def compile_one(architecture: str, configuration: Configuration) -> Compiled:
    """Compile one configuration and read back what it needs; a compiler that fails has broken a limit too."""
    target = TARGETS[architecture]
    kernel = configuration.kernel
    found = Compiled(architecture, kernel.__name__, configuration.label)
    options = {name: configuration.constants[name] for name in LAUNCH_OPTIONS if name in configuration.constants}
    constants = {name: x for name, x in configuration.constants.items() if name not in LAUNCH_OPTIONS}
    signature = {name: configuration.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    try:
        built = triton.compile(source, target=target.triton, options=options)
    except Exception as error:  # of any kind: passes raise RuntimeError, the assembler and the language their own
        return replace(found, broken=(f"does not compile: {type(error).__name__}: {error}",))
    read = _read_amd if target.triton.backend == "hip" else _read_nvidia
    registers, spilled, matrix = read(built.asm, target.matrix)
    found = replace(
        found,
        warps=built.metadata.num_warps,
        stages=built.metadata.num_stages,
        registers=registers,
        spilled=spilled,
        shared=built.metadata.shared,
        matrix=matrix,
    )
    races = [f"a product's operand {name} is overwritten" for name in overwritten_operands(built.asm["ttgir"])]
    return replace(found, broken=(*_broken(found, configuration, target), *races))


def _broken(found: Compiled, configuration: Configuration, target: Target) -> Iterator[str]:
    allowed = KNOWN_SPILLS.get((_triton_version(), found.architecture, found.kernel), 0)
    if found.spilled > allowed and target.triton.backend == "cuda":
        yield f"{found.spilled} bytes spilled, {allowed} allowed"
    if found.shared > target.shared:
        yield f"{found.shared} bytes of shared memory, {target.shared} available"
    wanted = {"none": (), "any": target.matrix, "widest": target.matrix[:1]}[configuration.matrix]
    if wanted and not any(found.matrix[instruction] for instruction in wanted):
        yield f"no {' or '.join(wanted)}"


def _triton_version() -> str:
    """Major and minor number: "3.5"."""
    return ".".join(triton.__version__.split(".")[:2])


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


def table(architecture: str, results: Iterable[Compiled]) -> Table:
    """The results for one target, in 80 columns of a terminal."""
    target = TARGETS[architecture]
    title = f"{architecture}: {target.shared // KIB} KiB of shared memory, {' or '.join(target.matrix)}"
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("kernel\n  sizes", overflow="fold")
    for heading in ("warps x\nstages", "regis-\nters", "spill\nbytes", "shared\nKiB", "matrix\nunits"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for kernel, found_of_kernel in groupby(sorted(results, key=_kernel), key=_kernel):
        drawn.add_row(f"[bold]{kernel}")
        for found in found_of_kernel:
            matrix = "\n".join(f"{count} {name}" for name, count in found.matrix.items() if count)
            sizes = Text.assemble(found.label, *((f"\n{reason}", "red") for reason in found.broken))
            numbers = (f"{found.warps} x {found.stages}", str(found.registers), str(found.spilled))
            drawn.add_row(Padding(sizes, (0, 0, 0, 2)), *numbers, f"{found.shared / KIB:.1f}", matrix)
    return drawn


def _kernel(found: Compiled) -> str:
    return found.kernel


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 if a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m gif_kernels.aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be given again")
    parser.add_argument("--kernel", action="append", help="only kernels with this in their name; may be given again")
    options = parser.parse_args(arguments)
    architectures, kernels = options.target or list(TARGETS), options.kernel or []
    total = sum(len(configurations(name, kernels)) for name in architectures)
    if total == 0:
        parser.error(f"no kernel has {' or '.join(kernels)} in its name")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: list[Compiled] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        compiled = bar.track(compile_all(architectures, kernels), total, description=f"Triton {triton.__version__}")
        for architecture, of_target in groupby(compiled, lambda found: found.architecture):
            rows = list(of_target)
            console.print(table(architecture, rows))
            results += rows
    broken = [found for found in results if found.broken]
    for found in broken:
        line = f"{found.architecture} {found.kernel} ({found.label}): {'; '.join(found.broken)}"
        console.print(line, style="red", markup=False)
    console.print(f"Triton {triton.__version__}: {len(results) - len(broken)} of {len(results)} hold their limits")
    if options.json:
        lines = [{"triton": triton.__version__, **asdict(found)} for found in results]
        options.json.write_text(json.dumps(lines, indent=2) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
