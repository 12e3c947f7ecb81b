"""A race that Triton compiles into pipelined loops on Hopper, found in the compiler's output.

A pipelined loop copies the operands of later products into shared memory while the matrix units, which work on their
own, may still read those of earlier ones: `warp_group_dot_wait {pendings = p}` lets the last p products run on. Copies
that are d iterations ahead therefore need d + 1 buffers. Triton 3.5 to 3.8 count d where a load feeds registers as well
as a product: the copy then overwrites what the units are reading, and the numbers are wrong now and then, on a full
device, without an error. compute-sanitizer's racecheck does not see what the matrix units read.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

_NAME = r"(%[\w#]+)"
_BUFFERS = re.compile(_NAME + r" = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x")
_VIEW = re.compile(_NAME + r" = ttg\.memdesc_(?:index|trans|subslice|subview|reshape|reinterpret)\s*" + _NAME)
_COPY = re.compile(r"ttg\.async_copy_global_to_local [^,]+, " + _NAME)
_PRODUCT = re.compile(rf"ttng\.warp_group_dot {_NAME}, {_NAME},")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")


def overwritten_operands(ttgir: str) -> list[str]:
    """The buffers, by name, that a loop of ``ttgir`` copies into while a product may read them; none is right."""
    buffers: dict[str, int] = {}
    base: dict[str, str] = {}  # of a view: the memory it is a view of
    copies: dict[str, Counter[int]] = defaultdict(Counter)  # by memory, then by the loop they stand in; -1 is no loop
    read: dict[int, set[str]] = defaultdict(set)
    pending: dict[int, int] = {}
    open_regions: list[int] = []  # the loop that each is in
    for number, line in enumerate(ttgir.splitlines()):
        if line.lstrip().startswith("}") and open_regions:
            open_regions.pop()
        loop = open_regions[-1] if open_regions else -1
        if line.rstrip().endswith("{"):
            open_regions.append(number if re.search(r"scf\.(for|while) ", line) else loop)
        if found := _BUFFERS.search(line):
            base[found[1]], buffers[found[1]] = found[1], int(found[2])
        elif found := _VIEW.search(line):
            base[found[1]] = base.get(found[2], "")
        elif found := _COPY.search(line):
            copies[base.get(found[1], "")][loop] += 1
        elif found := _PRODUCT.search(line):
            read[loop].update(base.get(operand, "") for operand in found.groups())
        elif found := _WAIT.search(line):
            pending[loop] = int(found[1])
    return sorted(
        memory
        for loop, operands in read.items()
        if pending.get(loop, 0) > 0
        for memory in operands & buffers.keys()
        if copies[memory][loop] and buffers[memory] <= copies[memory].total() - copies[memory][loop]
    )
