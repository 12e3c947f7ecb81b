"""Long commands that are killed before any of their writes, and two at once on one output."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.campaign import inputs
from benchmarks.campaign.records import Found, Kind
from gif import CodeVectors, TokenizeConfig, cli, resume, tokenize
from gif.faults import MENDABLE_CODE
from gif.vectors.commands import vectors_command
from gif.vectors.distributed_table import DistributedTable

KILLS, RIVALS = "kills", "two commands"
IDENTITIES, IMAGES_EACH, WIDTH = 20, 3, 8
NEWCOMERS = 6  # the last of them
_MOST_KILLS = 3  # of one command, until it is let to its end
_TOLD = "is being written by "
_WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "campaign.write")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_TRAIN = (
    "train --held_out=0 --backbone.image_size=16 --backbone.width=4 --backbone.embedding_size=8 "
    "--training.epochs=2 --training.batch_size=20 --training.save_steps=2 --training.keep=2"
)
COMMANDS: dict[str, str] = {
    "vectors": "vectors --data=DATA --held_out=0 --width=8 --image_size=16 --batch_size=16 --output=o.safetensors",
    "spread": "spread --vectors=VECTORS --batch=8 --start=whiten --neighbor_epochs=1 --output=o.safetensors",
    "spread in a file": "spread --in_file=true --vectors=VECTORS --batch=8 --start=center --output=o.safetensors",
    "tokenize": "tokenize --vectors=VECTORS --vocab_size=3 --output=o.safetensors",
    "train a softmax": f"{_TRAIN} --data=DATA --head.kind=softmax --output=o",
    "train with codes": f"{_TRAIN} --data=DATA --codes=CODES --vectors=VECTORS --output=o",
    "an experiment of the paper": (
        'experiments encoders --quick=true --data=DATA --encoders=["random"] --heads=["GIF"] --vocab_size=5 '
        "--training.batch_size=8 --backbone.image_size=16 --backbone.width=4 --backbone.embedding_size=8 --output=o"
    ),
    "convert to rec": "data convert --data=DATA --to=rec --output=o",
    "convert to tar": "data convert --data=DATA --to=tar --shard_size=16 --output=o",
    "convert to folder": "data convert --data=DATA --to=folder --output=o",
    "embed": "embed DATA --model=MODEL --batch_size=16 --output=o.npz",
    "give newcomers codes": "codes grow --data=DATA --held_out=0 --codes=OLD --vectors=MADE --made=MADE --output=o",
    "run": "run --data=DATA --epochs=2 --held_out=6 --device=cpu --output=o",
}
"""Each long command, with what `write_inputs` makes in capitals."""
INPUTS = {
    "DATA": "data",
    "VECTORS": "v.safetensors",
    "CODES": "c.safetensors",
    "MODEL": "m.safetensors",
    "MADE": "made.safetensors",
    "OLD": "old.safetensors",
}
_WITH_TIMES = ("run",)
"""Commands whose other files than tables say when and where they were made: of those the names are compared alone."""
_TABLES = ".safetensors"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative for a signal's number; and what it printed."""

    code: int
    printed: str


def kinds(source: Path) -> list[Kind]:
    """A kind a command, of what `write_inputs` has made in ``source``."""
    return [
        *(Kind(KILLS, name, partial(_kill, source, name)) for name in COMMANDS),
        *(Kind(RIVALS, name, partial(_rival, source, name)) for name in COMMANDS),
    ]


def write_inputs(source: Path) -> None:
    """Images, code vectors, codes and a model; and what each command makes of them when nothing disturbs it.

    Of those who were there before the newcomers a folder of their own, code vectors as they were made of it, and codes.
    """
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (IDENTITIES, IMAGES_EACH, 16, 16, 3), generator=generator).to(torch.uint8)
    for identity, images in enumerate(pixels):
        (source / "data" / f"{identity:02d}").mkdir(parents=True)
        for number, image in enumerate(images):
            (source / "data" / f"{identity:02d}" / f"{number}.png").write_bytes(inputs.encoded(image, "PNG"))
    vectors = CodeVectors(torch.randn(IDENTITIES, WIDTH, generator=generator))
    vectors.save(source / "v.safetensors")
    with inputs.unheard():
        tokenize(vectors, TokenizeConfig(vocab_size=3)).save(source / "c.safetensors")
        inputs.write_backbone(source / "m.safetensors")
        for identity in range(IDENTITIES - NEWCOMERS):
            shutil.copytree(source / "data" / f"{identity:02d}", source / "before" / f"{identity:02d}")
        made = source / "made.safetensors"
        vectors_command(made, data=str(source / "before"), held_out=0, width=WIDTH, image_size=16, device="cpu")
        tokenize(CodeVectors.load(made), TokenizeConfig(vocab_size=5)).save(source / "old.safetensors")
    for name in COMMANDS:
        (whole := source / "whole" / name).mkdir(parents=True)
        ended, writes = run(name, source, whole)
        if ended.code:
            raise RuntimeError(f"{name} does not end well undisturbed: {ended}")
        (source / f"{name}.writes").write_text(str(writes))


def run(name: str, source: Path, folder: Path) -> tuple[Ended, int]:
    """A command in a process of its own, in ``folder``; how it ended, and how often it wrote."""
    counted = mmap(-1, 8)
    process = start(name, source, folder, counted=counted)
    return finish(process, folder), int.from_bytes(counted[:], "little")


def start(
    name: str,
    source: Path,
    folder: Path,
    *,
    signal_at: tuple[int, int] | None = None,
    counted: mmap | None = None,
    more: Sequence[str] = (),
    log: str = "",
) -> int:
    """Start a command; returns its process.

    Args:
        name: of `COMMANDS`.
        source: of its inputs.
        folder: where it runs, and writes.
        signal_at: (n, s): before it writes for the time n, from 0, it sends itself the signal s.
        counted: where it keeps how often it has written, 8 bytes.
        more: further options.
        log: beside ``folder``, where what it prints goes; a name of its own for each that runs at once.
    """
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        with (folder.parent / f"{folder.name}.log{log}").open("wb") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115 (until it ends)
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder.parent / "cache")
        torch.set_num_threads(1)
        resume.SECONDS, resume.LARGEST_SHARE = 0.0, math.inf  # whatever may be kept is kept at once
        _watch(folder, signal_at, counted)
        sys.argv = ["gif", *(_filled(word, source) for word in COMMANDS[name].split(" ")), *more]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _filled(word: str, source: Path) -> str:
    """A word of a command, with the path of what is in capitals in it."""
    before, sign, value = word.rpartition("=")
    return f"{before}{sign}{source / INPUTS[value]}" if value in INPUTS else word


def finish(process: int, folder: Path, log: str = "") -> Ended:
    """Wait for a command to end."""
    status = os.waitpid(process, 0)[1]
    printed = (folder.parent / f"{folder.name}.log{log}").read_text(encoding="utf-8", errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), printed.strip())


def _watch(folder: Path, signal_at: tuple[int, int] | None, counted: mmap | None) -> None:
    """Count what this process writes from now on: files it opens to write, renames, removes, syncs; rows of a map."""
    place, writes = str(folder.resolve()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal writes
        if event not in _WRITES or (event == "open" and not arguments[2] & _WRITING):
            return
        path = arguments[0]
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if name.startswith("/") and not name.startswith(place):
            return
        writes += 1
        if counted is not None:
            counted[:] = writes.to_bytes(8, "little")
        if signal_at is not None and writes - 1 == signal_at[0]:  # once, though a signal may be an exception here
            os.kill(os.getpid(), signal_at[1])

    def announced(function: Callable[..., Any]) -> Callable[..., Any]:
        def writing(*arguments: Any) -> Any:
            sys.audit("campaign.write", "")
            return function(*arguments)

        return writing

    os.fsync = announced(os.fsync)
    DistributedTable.put = announced(DistributedTable.put)  # type: ignore[method-assign]
    sys.addaudithook(hook)


def _writes(source: Path, name: str) -> int:
    return int((source / f"{name}.writes").read_text())


def _kill(source: Path, name: str, _: int, random: Random, folder: Path) -> Found:
    """Kill a command up to a few times, then give it again: it makes what it makes undisturbed, and leaves no more."""
    done = []
    for _ in range(random.randint(1, _MOST_KILLS)):
        before = random.randrange(_writes(source, name))
        ended = finish(start(name, source, folder, signal_at=(before, signal.SIGKILL)), folder)
        done.append(f"before write {before}")
        if ended.code == 0:
            break
        if ended.code != -signal.SIGKILL:
            return Found(
                "lost", f"killed {', '.join(done[:-1])}; then it ended with {ended.code}: {ended.printed[-500:]}"
            )
    what = f"killed {', '.join(done)}"
    if ended.code:
        ended = run(name, source, folder)[0]
    if ended.code:
        return Found("lost", f"{what}; given again it ended with {ended.code}: {ended.printed[-500:]}")
    differs = _differences(source / "whole" / name, folder, name)
    return Found("lost", f"{what}: {differs}") if differs else Found("right", what)


def _rival(source: Path, name: str, _: int, random: Random, folder: Path) -> Found:
    """Stop a command before one of its writes, give it once more, and let the first go on."""
    at = random.randrange(_writes(source, name))
    first = start(name, source, folder, signal_at=(at, signal.SIGSTOP), log="1")
    os.waitpid(first, os.WUNTRACED)
    second = finish(start(name, source, folder, log="2"), folder, "2")
    os.kill(first, signal.SIGCONT)
    ended = finish(first, folder, "1")
    what = f"the first stopped before write {at}; the second ended with {second.code}, the first with {ended.code}"
    whom = (f"process {first}", "another process")  # the latter between the lock and the word in it
    told = second.code == MENDABLE_CODE and any(f"{_TOLD}{who}" in second.printed for who in whom)
    if ended.code not in (0, MENDABLE_CODE) or not (told or second.code == 0):
        return Found("traceback", f"{what}: {second.printed[-500:]} / {ended.printed[-500:]}")
    if ended.code and second.code:
        return Found("lost", f"{what}, and there is no result: {ended.printed[-500:]}")
    if differs := _differences(source / "whole" / name, folder, name):
        return Found("lost", f"{what}: {differs}")
    return Found("refused" if told else "right", what)


def _differences(whole: Path, folder: Path, name: str) -> str:
    """What the command ``name`` has not left in a folder as it has in the other; nothing if all is."""
    suffix = _TABLES if name in _WITH_TIMES else ""
    wanted, found = (_contents(of, suffix) for of in (whole, folder))
    lines = [f"{name} is missing" for name in wanted if name not in found]
    lines += [f"{name} is left over" for name in found if name not in wanted]
    lines += [f"{name} is another" for name in wanted if name in found and wanted[name] != found[name]]
    return ", ".join(lines)


def _contents(folder: Path, suffix: str) -> dict[str, bytes | None]:
    """Everything below a folder, by its path; None for a folder, and for a file that does not end in ``suffix``."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and path.name.endswith(suffix) else None
        for path in sorted(folder.rglob("*"))
    }
