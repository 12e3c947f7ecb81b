"""What went wrong, as the `gif` command says it: one line for what a user can mend, and a bug for anything else."""

from __future__ import annotations

import errno
import platform
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from gif.errors import InputError

_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo/transport/")
"""What gloo says, in a plain RuntimeError, when another process is gone."""
MENDABLE_CODE, BUG_CODE = 1, 70  # 70: EX_SOFTWARE of sysexits
_OF_THE_MACHINE = {  # disks and limits; not every system has each
    getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EFBIG", "ENOMEM", "EMFILE", "ENFILE")
}
_IN_A_WORKER = "Original Traceback (most recent call last):"  # of what PyTorch raises again in the main process


def mendable(error: Exception) -> str | None:
    """What to say, in one line, of an error that the user can mend; None of a bug."""
    if _is_out_of_memory(error):
        return (
            f"out of memory ({_line(error)}); lower batch_size (in training micro_batch_size) or workers, or take a "
            "machine with more: `gif plan` says what each stage takes"
        )
    if isinstance(error, InputError) or (isinstance(error, OSError) and _is_of_the_machine(error)):
        return _line(error)
    if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST):
        return f"the processes of this run have lost each other ({_line(error)}); the first error of another says why"
    return None


def bug(error: Exception) -> str:
    """Two lines: what broke and where, and what to do with that."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {_line(error)} ({Path(place.filename).name}, line {place.lineno})"
    return (
        f"bug: {what}\nThis is a fault of gif, not yours (Python {platform.python_version()}, PyTorch "
        f"{torch.__version__}). Please report it in the project's issues, with what the command prints with --debug."
    )


def printable(text: str) -> str:
    """``text`` without what no terminal can show, such as bytes of a file's name that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch's allocator on the CPU raises a plain RuntimeError, which says so."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _is_of_the_machine(error: OSError) -> bool:
    """Whether it names a file, is written by hand (as all that has no number), or is about the disk or a limit."""
    return error.filename is not None or error.errno is None or error.errno in _OF_THE_MACHINE


def _line(error: Exception) -> str:
    """The message in one line: of what a loader's worker raised, without the traceback that PyTorch puts into it."""
    text = str(error).strip()
    if _IN_A_WORKER in text:
        text = text.splitlines()[-1].partition(": ")[2]
    if isinstance(error, MemoryError) and not text:
        text = "the system gave no more"
    return " ".join(line.strip() for line in text.splitlines())
