"""Numbers in the documentation, written there by the command that measured them.

A document marks the place with two comments, which Markdown does not show::

    <!-- begin NAME -->
    anything, replaced by the command
    <!-- end NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gif.errors import InputError
from gif.files import existing_file, write_text


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, ending in a newline."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def replace_block(document: str | Path, name: str, text: str) -> None:
    """Put ``text`` where ``document`` (Markdown) marks the block ``name``, atomically. Errors are `require_block`'s."""
    before, after = require_block(document, name)
    write_text(document, f"{before}\n{text.rstrip()}\n{after}")


def require_block(document: str | Path, name: str) -> tuple[str, str]:
    """What ``document`` holds up to and from the two comments of the block ``name``: for a look before long work.

    Raises FileNotFoundError for a missing document, ValueError unless it has exactly one block of that name.
    """
    path = existing_file(document)
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = path.read_text(encoding="utf-8")
    found = re.findall(f"^(.*{re.escape(begin)})\n(?:.*\n)?({re.escape(end)}.*)$", text, re.DOTALL)
    if len(found) != 1 or text.count(begin) != 1:
        raise InputError(
            f"{path} has {text.count(begin)} blocks named {name}, wanted one: write {begin} and {end} on two lines"
        )
    before, after = found[0]
    return before, after
