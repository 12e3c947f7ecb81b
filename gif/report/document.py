"""One document, written twice: as HTML that needs nothing beside it, and as Markdown beside its pictures."""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from os.path import relpath
from pathlib import Path

from gif.documents import markdown_table

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 54rem; padding: 1.5rem; background: #fff; color: #222;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ddd; }
nav { font-size: .9rem; margin: 1rem 0; }
nav a { margin-right: 1rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { background: #f3f3f3; padding: 0 .2em; font-size: .9em; overflow-wrap: anywhere; }
"""
_NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?( ?(%|x|s|ms|min|[kMGT]B|[kMGT]?FLOP|±.*|\?))?|")


class _Part(ABC):
    """A piece of a document."""

    @abstractmethod
    def html(self) -> str: ...

    @abstractmethod
    def markdown(self, folder: Path) -> str: ...


@dataclass(frozen=True)
class _Heading(_Part):
    text: str

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.text.lower()).strip("-")

    def html(self) -> str:
        return f'<h2 id="{self.anchor}">{escape(self.text)}</h2>'

    def markdown(self, folder: Path) -> str:
        return f"## {self.text}"


@dataclass(frozen=True)
class _Paragraph(_Part):
    text: str
    note: bool

    def html(self) -> str:
        return f"<p{' class=note' if self.note else ''}>{_inline(self.text)}</p>"

    def markdown(self, folder: Path) -> str:
        return self.text


@dataclass(frozen=True)
class _Table(_Part):
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        numeric = [all(_NUMBER.fullmatch(row[place]) for row in self.rows) for place in range(len(self.columns))]
        kinds = [' class="number"' if number else "" for number in numeric]
        head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, self.columns, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{kind}>{_inline(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
            for row in self.rows
        )
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def markdown(self, folder: Path) -> str:
        return markdown_table(self.columns, [[cell.replace("|", "\\|") for cell in row] for row in self.rows]).rstrip()


@dataclass(frozen=True)
class _Picture(_Part):
    path: Path
    title: str
    caption: str

    def html(self) -> str:
        data = base64.b64encode(self.path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(self.title, quote=True)}">'
        return f"<figure>{image}<figcaption>{_inline(self.caption)}</figcaption></figure>"

    def markdown(self, folder: Path) -> str:
        place = Path(relpath(self.path, folder)).as_posix()
        return f"![{self.title}]({place})" + (f"\n\n*{self.caption}*" if self.caption else "")


class Document:
    """A report in the making: its parts in order.

    Texts are plain, but for `code` between backticks.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[_Part] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(_Heading(text))

    def paragraph(self, text: str, *, note: bool = False) -> None:
        """Add a paragraph; a ``note`` in smaller letters."""
        self._parts.append(_Paragraph(text, note))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; columns of numbers are aligned to the right."""
        self._parts.append(_Table(columns, rows))

    def picture(self, path: Path, title: str, caption: str = "") -> None:
        """Add a PNG; ``title`` is for who does not see it. Raises FileNotFoundError when it is written out."""
        self._parts.append(_Picture(path, title, caption))

    def html(self) -> str:
        """A whole page with its pictures in it: nothing is loaded from anywhere."""
        headings = [part for part in self._parts if isinstance(part, _Heading)]
        links = "".join(f'<a href="#{part.anchor}">{escape(part.text)}</a> ' for part in headings)
        title = escape(self.title)
        parts = "\n".join(part.html() for part in self._parts)
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<nav>{links}</nav>\n{parts}\n</body>\n</html>\n"
        )

    def markdown(self, folder: Path) -> str:
        """The same, to be written into ``folder``, from which its pictures are found."""
        return "\n\n".join([f"# {self.title}", *(part.markdown(folder) for part in self._parts)]) + "\n"


def _inline(text: str) -> str:
    """Text for HTML, with `code` between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
