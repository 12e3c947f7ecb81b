"""What runs here, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import gif_kernels  # noqa: F401 (registers the ops)
from gif.progress import new_table, print_table
from gif.vectors.placement import DEVICE_SHARE, HOST_SHARE, psutil_memory
from gif_kernels import dispatch

ROW_BYTES = 1024
"""Of a code vector 512 wide in bfloat16."""
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "open_clip_torch",
    "timm",
    "scipy",
    "scikit-learn",
)


def doctor() -> None:
    """Show the machine, the versions, and which implementation each kernel will use, and why."""
    facts = new_table(title="machine", show_header=False)
    facts.add_row("python", platform.python_version())
    facts.add_row("platform", platform.platform())
    facts.add_row(
        "CPU",
        f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    )
    for name in devices():
        facts.add_row("device", name)
    facts.add_row("code vectors", "; ".join(room_for_code_vectors()))
    print_table(facts)

    versions = new_table("package", "version", title="packages")
    for package in PACKAGES:
        try:
            versions.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(package, "[yellow]not installed[/]")
    print_table(versions)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = new_table("op", f"impl on {device}", "why", title="kernels")
    for op in dispatch.ops():
        chosen.add_row(op, *dispatch.choose(op, device))
    print_table(chosen)


def room_for_code_vectors() -> list[str]:
    """How many code vectors training puts where, of the widths of `ROW_BYTES`, and where those go that are more."""
    rooms = [f"{1e-6 * DEVICE_SHARE * free / ROW_BYTES:,.1f}M on cuda:{i}" for i, free in enumerate(_free_on_devices())]
    free = psutil_memory().available
    rooms.append(f"{1e-6 * HOST_SHARE * free / ROW_BYTES:,.1f}M on the host")
    return [*rooms, "more in a file (512 wide, bfloat16)"]


def _free_on_devices() -> list[int]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.mem_get_info(i)[0] for i in range(count)]


def devices() -> list[str]:
    """Names and memory of the accelerators, or why there is none."""
    if not torch.cuda.is_available():
        return [f"no accelerator: torch {torch.__version__} sees no CUDA or ROCm device; the CPU paths run"]
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return found
