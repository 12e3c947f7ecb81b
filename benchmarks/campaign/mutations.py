"""How a file is damaged: by a disk, a network, a program that was killed, or a hand."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

BLOCKS = (1, 4, 16, 64, 512, 4096)
"""Bytes that are lost, zeroed or swapped together."""
_FLIPS = 4
_EDGE = 128  # bytes from either end, where headers and ends lie
_TRIES = 100


def mutate(content: bytes, random: Random) -> tuple[bytes, str]:
    """``content`` damaged at one place, and how in words; never what it was."""
    for _ in range(_TRIES):
        name = random.choice(list(MUTATIONS))
        changed, what = MUTATIONS[name](content, random)
        if changed != content:
            return changed, f"{name}: {what}"
    return content + b"\0", "insert: a zero at the end"  # of content that is all the same


def _place(content: bytes, random: Random) -> int:
    """Anywhere, near the beginning or near the end."""
    size = max(len(content), 1)
    edge = min(_EDGE, size)
    return random.choice([random.randrange(size), random.randrange(edge), size - 1 - random.randrange(edge)])


def _block(content: bytes, random: Random) -> tuple[int, int]:
    """A place and a length; often that of a whole block of a disk or a tar file."""
    length = random.choice(BLOCKS)
    place = _place(content, random)
    return place // length * length if random.random() < 0.5 else place, length


def _flip(content: bytes, random: Random) -> tuple[bytes, str]:
    changed, places = bytearray(content), []
    for _ in range(random.randint(1, _FLIPS)):
        place, bit = _place(content, random), random.randrange(8)
        if content:
            changed[place] ^= 1 << bit
            places.append(f"bit {bit} of byte {place}")
    return bytes(changed), ", ".join(places)


def _cut(content: bytes, random: Random) -> tuple[bytes, str]:
    place, length = _block(content, random)
    if random.random() < 0.5:
        return content[:place], f"behind byte {place}"
    return content[:place] + content[place + length :], f"bytes {place} to {place + length}"


def _insert(content: bytes, random: Random) -> tuple[bytes, str]:
    place, length = _block(content, random)
    there = _place(content, random)
    more, what = random.choice(
        [
            (random.randbytes(length), f"{length} random bytes"),
            (bytes(length), f"{length} zeros"),
            (content[there : there + length], f"bytes {there} to {there + length} again"),
        ]
    )
    return content[:place] + more + content[place:], f"{what} at byte {place}"


def _zero(content: bytes, random: Random) -> tuple[bytes, str]:
    place, length = _block(content, random)
    if random.random() < 0.3:
        length = len(content) - place
    end = min(place + length, len(content))
    return content[:place] + bytes(end - place) + content[end:], f"bytes {place} to {end}"


def _swap(content: bytes, random: Random) -> tuple[bytes, str]:
    place, length = _block(content, random)
    other = _place(content, random) // length * length
    first, second = sorted((place, other))
    if first + length > second or second + length > len(content):
        return content, ""
    one, two = content[first : first + length], content[second : second + length]
    changed = content[:first] + two + content[first + length : second] + one + content[second + length :]
    return changed, f"{length} bytes at {first} and {second}"


MUTATIONS: dict[str, Callable[[bytes, Random], tuple[bytes, str]]] = {
    "flip": _flip,
    "cut": _cut,
    "insert": _insert,
    "zero": _zero,
    "swap": _swap,
}
