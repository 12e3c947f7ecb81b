"""The documentation's site: the repository's Markdown at its own paths, and a reference made from what modules export.

A hook of mkdocs (`mkdocs.yml`), and a list of the pages for the tests. A page lies on the site where it lies in the
repository, so that one relative link serves both. Formulas are LaTeX, as GitHub shows it ($...$ and fences named math);
here they become MathML, which browsers render without a script.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("gif_kernels", "gif")
HOME = "README.md"
REFERENCE, PROJECT = "Reference", "Project"
SECTIONS: dict[str, tuple[str, ...]] = {
    "Tutorials": ("docs/tutorials/*.md", "docs/coming-from-*.md"),
    "How to": (
        *("docs/data.md", "docs/spreading.md", "docs/training.md", "docs/evaluation.md"),
        *("docs/inference.md", "docs/gpu.md"),
    ),
    "The method": ("docs/method.md", "docs/paper.md", "docs/architecture.md", "docs/reliability.md"),
    "Measured": ("docs/accuracy.md", "docs/benchmarks.md"),
    "Kernels": ("gif_kernels/*/README.md",),
    PROJECT: (
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/compatibility.md",
        "RELEASING.md",
        "SECURITY.md",
        "CODE_OF_CONDUCT.md",
    ),
    "More": ("docs/**/*.md",),
}
"""What stands under which heading, by pattern. A page stands under the first that fits; a new one needs no entry."""
FILES = ("LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", "docs/**/*", "examples/*.py", "gif/configs/*.yaml")
"""What pages may link to beside each other."""
WITHOUT_EXPORTS = ("gif.integrations.insightface", "gif.integrations.metric_learning")
"""Modules whose interface is all that they define."""


class Exports(NamedTuple):
    """A module of the reference, and the names that are described there: those it exports and no module before it."""

    module: str
    names: tuple[str, ...]


def pages() -> dict[str, list[str]]:
    """The Markdown pages under each heading, as paths from the repository's root."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {"": [HOME]}
    for section, patterns in SECTIONS.items():
        paths = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        found[section] = [path for path in dict.fromkeys(paths) if path not in seen]
        seen.update(paths)
    return {section: paths for section, paths in found.items() if paths}


def reference() -> list[Exports]:
    """Every module with a public interface, the packages before their parts."""
    described: set[tuple[str, str]] = set()
    result = []
    for module, path in _modules():
        origins = _origins(path, module)
        new = exports = list(origins)
        if module != "gif":  # whose names are links to where its parts describe them
            new = [name for name in exports if (origins[name], name) not in described]
            described.update((origins[name], name) for name in exports)
        if new or module in WITHOUT_EXPORTS:
            result.append(Exports(module, tuple(new)))
    return result


def place_of(module: str, name: str) -> str:
    """The dotted path under which ``name``, an export of ``module``, is described.

    Where a part of the package has the same name, as the folder of `gif.codes.tokenize`, that path is the part's, and
    the function has the one of its definition.
    """
    folder = ROOT.joinpath(*module.split("."))
    if (folder / name).is_dir() or (folder / f"{name}.py").is_file():
        return f"{_definition(module, name)}.{name}"
    return f"{module}.{name}"


def _modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        files = sorted((ROOT / package).rglob("*.py"), key=lambda path: (len(path.parts), path))
        for path in files:
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


class Interface(NamedTuple):
    """What a module's text says of it: `__all__`, and where its imports from these packages come from."""

    exports: tuple[str, ...]
    imports: dict[str, str]


@cache
def _interface(text: str) -> Interface:
    tree = ast.parse(text)
    imports = {
        alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return Interface(tuple(ast.literal_eval(node.value)), imports)
    return Interface((), imports)


def _origins(path: Path, module: str) -> dict[str, str]:
    """For each name that ``module`` exports, the first module of the packages that it comes from."""
    exports, imports = _interface(path.read_text(encoding="utf-8"))
    return {name: _definition(imports[name], name) if name in imports else module for name in exports}


def _definition(module: str, name: str) -> str:
    """Where ``name`` of ``module`` comes from: another module where this one exports it and imports it itself."""
    folder = ROOT.joinpath(*module.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return _origins(path, module).get(name, module)


def _page_of(exports: Exports) -> str:
    """The Markdown of a module's page."""
    lines = [f"# {exports.module}", "", f"::: {exports.module}", "    options:", "      show_root_heading: false"]
    if exports.module in WITHOUT_EXPORTS:
        return "\n".join(lines)
    lines += ["      members: false", ""]
    homes = {}
    if exports.module == "gif":  # what its parts describe is a link
        pages = [page for page in reference() if page.module != "gif"]
        homes = {name: place_of(page.module, name) for page in pages for name in page.names}
        lines += [f"- [`gif.{name}`][{homes[name]}]" for name in exports.names if name in homes]
        lines.append("")
    for name in exports.names:
        if name not in homes:
            options = ["    options:", f"      heading: {exports.module}.{name}", f"      toc_label: {name}"]
            lines += [f"::: {place_of(exports.module, name)}", *options, ""]
    return "\n".join(lines)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, and how a fence named math is written."""
    from pymdownx.arithmatex import arithmatex_fenced_format

    nav: list[Any] = []
    described = sorted(reference(), key=lambda page: page.module)
    for section, paths in pages().items():
        if section == PROJECT:
            nav.append({REFERENCE: [{page.module: f"reference/{page.module}.md"} for page in described]})
        nav += [{section: paths}] if section else [{"Home": path} for path in paths]
    config.nav = nav
    fence = {"name": "math", "class": "arithmatex", "format": arithmatex_fenced_format(mode="generic")}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The repository's pages and what they link to, at their own paths; the reference; the look."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    linked = {str(path.relative_to(ROOT)) for pattern in FILES for path in ROOT.glob(pattern) if path.is_file()}
    for path in sorted({*linked, *(path for paths in pages().values() for path in paths)}):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for page in reference():
        files.append(File.generated(config, f"reference/{page.module}.md", content=_page_of(page)))
    files.append(File.generated(config, "site.css", abs_src_path=str(Path(__file__).with_name("site.css"))))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, and no second colon where a docstring begins a block as reStructuredText does."""
    content = content.replace("::</p>", ":</p>")
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m[1], "inline"), content)
    block = r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>'
    return re.sub(block, lambda m: f'<div class="formula">{_mathml(m[1], "block")}</div>', content, flags=re.DOTALL)


def _mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return str(convert(html.unescape(latex).strip(), display=display))
