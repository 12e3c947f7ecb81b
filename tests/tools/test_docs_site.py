"""The documentation: every link leads somewhere, every public name is described, every block of code is true.

`make docs` builds the site, and holds it to more.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from types import FunctionType
from typing import Any
from urllib.parse import unquote

import griffe
import pytest

from gif import cli
from gif.arguments import ALIASES, DEBUG
from tools import docs_site

ROOT = docs_site.ROOT
PAGES = [path for paths in docs_site.pages().values() for path in paths]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:    .*\n|\n(?=    ))+)")
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each block; of an indented one the language is not said."""
    text = text_of(page)
    yield from FENCE.findall(text)
    for block in INDENTED.findall(FENCE.sub("", text)):
        yield "", re.sub("^    ", "", block, flags=re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The headings of a page as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", text_of(page))):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), f"{page}: {link}; a folder has no page of its own"
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), f"{page}: {link}"


def test_every_page_is_on_the_site():
    written = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "gif_kernels").rglob("*.md")}
    assert {str(path.relative_to(ROOT)) for path in written} == set(PAGES)
    assert len(PAGES) == len(set(PAGES))


@pytest.fixture(scope="module")
def sources():
    """The packages as the site reads them, from their text."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], allow_inspection=False)
    for package in docs_site.PACKAGES:
        loader.load(package)
    loader.resolve_aliases(implicit=False, external=False)
    return loader.modules_collection


def test_every_public_name_is_described(sources):
    """In the reference once, with words of its own; so is every method of a class, unless it has those of its base."""
    described = {(page.module, name) for page in docs_site.reference() for name in page.names}
    elsewhere = {name for module, name in described if module != "gif"}
    described -= {("gif", name) for name in elsewhere}  # links to where they are described
    places = {f"{module}.{name}": sources[docs_site.place_of(module, name)] for module, name in described}
    places = {name: place.final_target if place.is_alias else place for name, place in places.items()}
    assert [name for name, place in places.items() if place.is_module or not place.docstring] == []
    assert [path for path, count in Counter(place.path for place in places.values()).items() if count > 1] == []
    for package in docs_site.PACKAGES:
        assert set(importlib.import_module(package).__all__) <= {name for _, name in described}
    for module, name in described:
        public = getattr(importlib.import_module(module), name)
        for member in vars(public) if isinstance(public, type) else ():
            described_by = getattr(public, member, None)
            if not member.startswith("_") and isinstance(described_by, FunctionType | property):
                assert inspect.getdoc(described_by), f"{module}.{name}.{member}"


def python_blocks(page: str) -> list[str]:
    """Blocks in Python, and those without a language that are it."""
    return [code for language, code in blocks(page) if language == "python" or (not language and is_python(code))]


def is_python(code: str) -> bool:
    try:
        return any(isinstance(node, ast.Import | ast.ImportFrom | ast.Call) for node in ast.walk(ast.parse(code)))
    except SyntaxError:
        return False


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)])
def test_fenced_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "document"}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page, "exec"), scope)


@pytest.mark.parametrize("page", PAGES)
def test_what_python_imports_is_there(page):
    """Of blocks that need a reader's own images, or a GPU, and so do not run here: what they use of this project."""
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in docs_site.PACKAGES:
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: from {node.module} import {alias.name}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in docs_site.PACKAGES:
                assert hasattr(importlib.import_module(ast.unparse(node.value)), node.attr), (
                    f"{page}: {ast.unparse(node)}"
                )


def commands(page: str) -> Iterator[list[str]]:
    """The words of every `gif` command in the blocks of a page."""
    for language, code in blocks(page):
        if language in ("", "bash", "sh", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                found = re.match(
                    r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:gif|torchrun .*-m gif\.cli|python -m gif\.cli) (.*)$", line
                )
                if found:
                    yield shlex.split(found[1], comments=True)


@pytest.fixture(scope="module")
def options():
    """What each command's help lists, by its words."""
    known: dict[tuple[str, ...], set[str]] = {}

    def look(words: tuple[str, ...], capture: Any) -> set[str]:
        if words not in known:
            with pytest.raises(SystemExit):
                cli._run([*words, "--help"])
            known[words] = set(re.findall(r"--[A-Za-z_.0-9]+", capture.readouterr().out))
        return known[words]

    return look


@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in commands(page))])
def test_commands_have_these_options(page, options, capsys):
    for words in commands(page):
        level: Any = cli.COMMANDS
        path = []
        while isinstance(level, dict) and words and words[0] in level:
            path.append(words.pop(0))
            level = level[path[-1]]
        assert not isinstance(level, dict) or not words or words[0].startswith("-"), f"{page}: gif {path} {words}"
        given = [word.split("=")[0] for word in words if word.startswith("--")]
        listed = options(tuple(path), capsys) | {"--help", DEBUG, *ALIASES}
        for option in given:
            parts = option.split(".")
            known = any(".".join(parts[:count]) in listed for count in range(1, len(parts) + 1))
            assert known, f"{page}: gif {' '.join(path)} has no {option}"
