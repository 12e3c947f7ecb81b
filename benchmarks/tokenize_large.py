"""`python -m benchmarks.tokenize_large FOLDER`: codes of 64 million memory-mapped vectors, their time and memory.

The vectors are written to the folder once, float16. An interrupted run continues after its last whole level when the
same command is given again, and then times what it did itself.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jsonargparse import auto_cli

from benchmarks.clusters import write_clustered
from benchmarks.resident import ResidentMemory
from gif.codes import IdentityCodes, TokenizeConfig, judge_codes, tokenize
from gif.files import write_text
from gif.progress import say
from gif.vectors.store import CodeVectors

ROWS_A_BLOCK = 1 << 20


def main(
    folder: Path, *, identities: int = 64_000_000, width: int = 8, vocab_size: int = 16, length: int = 7, seed: int = 0
) -> None:
    """Write vectors, cut codes from them, check these, and write what was measured to results.json.

    Args:
        folder: for the vectors, the codes and the results.
        identities: m.
        width: d of the vectors.
        vocab_size: v, the values a token can take.
        length: l, the tokens of a code.
        seed: of the vectors and of the clustering.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vectors-{identities}-{width}-{seed}.safetensors"
    if not path.exists():
        write_clustered(path, identities, width, seed)
    vectors = CodeVectors.load(path, mmap=True)
    with ResidentMemory() as memory, timed() as tokenizing:
        codes = tokenize(
            vectors,
            TokenizeConfig(vocab_size=vocab_size, length=length, seed=seed),
            checkpoint=folder / "codes.partial",
        )
    codes.save(folder / "codes.safetensors")
    results: dict[str, object] = {
        "codes": str(codes),
        "width": width,
        "threads": torch.get_num_threads(),
        **tokenizing,
        "held_bytes": memory.peak,
        "held_bytes_an_identity": memory.peak / identities,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "distinct": distinct(codes),
    }
    say(json.dumps(results, indent=2))
    with timed() as judging:
        quality = judge_codes(codes, vectors)
    results |= {"quality": str(quality)} | {f"judging_{name}": value for name, value in judging.items()}
    write_text(folder / "results.json", json.dumps(results, indent=2))
    say(str(quality))


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds that the block took, by the clock and of this process."""
    seconds: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield seconds
    seconds |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def distinct(codes: IdentityCodes) -> int:
    """How many codes there are, counted in a byte for each that there could be."""
    seen = torch.zeros(codes.vocab_size**codes.length, dtype=torch.bool)
    places = codes.vocab_size ** torch.arange(codes.length - 1, -1, -1)
    for tokens in codes.codes.split(ROWS_A_BLOCK):
        seen[(tokens * places).sum(1)] = True
    return int(seen.sum())


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
