"""`make matrix`: what is supported, tried. An environment for each PyTorch and Triton, with oldest and newest packages.

    python -m tools.matrix --list
    python -m tools.matrix --only torch-2.9-oldest --steps interpreter gif
    python -m tools.matrix --docs docs/compatibility.md      # writes what passed into the document

Each environment is built by uv, used, and removed; results stay in `--output` and are added to after every step. A step
that passed with the code as it is now is not run again (`--again` runs it), so that an interrupted matrix goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gif.documents import markdown_table, replace_block, require_block
from gif.files import write_text

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "runs" / "matrix"
BLOCK = "matrix"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OLDEST, NEWEST = "lowest-direct", "highest"
"""How uv chooses among the versions that pyproject.toml allows."""


@dataclass(frozen=True)
class Environment:
    """One of the environments: what is pinned in it, and how the other packages are chosen."""

    name: str
    pins: tuple[str, ...] = ()
    resolution: str = NEWEST
    python: str = PYTHONS[0]

    def __str__(self) -> str:
        packages = "oldest" if self.resolution == OLDEST else "newest"
        return ", ".join((f"Python {self.python}", f"{packages} packages", *self.pins))


OF_THE_INTERPRETER = "numpy<2.4"  # Triton 3.5 and 3.6 interpret kernels with no newer
PAIRS = {
    "torch-2.9": ("torch==2.9.*", "triton==3.5.*", OF_THE_INTERPRETER),
    "torch-2.11": ("torch==2.11.*", "triton==3.6.*", OF_THE_INTERPRETER),
}
ENVIRONMENTS = (
    Environment("torch-2.9-oldest", PAIRS["torch-2.9"], OLDEST),
    Environment("torch-2.9-newest", PAIRS["torch-2.9"]),
    Environment("torch-2.11-oldest", PAIRS["torch-2.11"], OLDEST),
    Environment("torch-2.11-newest", PAIRS["torch-2.11"]),
    *(
        Environment("newest" if python == PYTHONS[0] else f"newest-python-{python}", python=python)
        for python in PYTHONS
    ),
)


class Step(NamedTuple):
    """What is run in an environment: Python's arguments, and variables that are set for it."""

    command: tuple[str, ...]
    variables: Mapping[str, str] = MappingProxyType({})


def _tests(*words: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-n", "auto", "-p", "no:cacheprovider", *words)


STEPS = {
    "interpreter": Step(
        _tests(*(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/gif_kernels/test_triton_*.py")))),
        {"TRITON_INTERPRET": "1"},
    ),
    "aot": Step(("-m", "gif_kernels.aot")),
    "kernels": Step(_tests("tests/gif_kernels", "--ignore=tests/gif_kernels/test_interpreter.py")),
    "gif": Step(_tests(*(f"tests/gif/test_{part}.py" for part in ("packages", "losses", "tokenize", "readme")))),
    "packages": Step(
        _tests(
            *(f"tests/gif/test_{part}.py" for part in ("cli", "options", "encoders", "export", "hub")),
            *(
                f"tests/gif/test_{part}.py"
                for part in ("metric_learning", "data_images", "glyphs", "vectors", "evaluation", "recognition")
            ),
            *(f"tests/gif/test_{part}.py" for part in ("files", "progress", "report", "examples", "continuing")),
        )
    ),
    "docs": Step(("-m", "mkdocs", "build", "--strict"), {"NO_MKDOCS_2_WARNING": "1"}),
    "all": Step(_tests("tests")),
}
"""Every kernel in the interpreter and through the ahead-of-time compiler; the ops; what stands on them; what uses each
package that pyproject.toml names; the site; or all tests."""
USUAL = ("interpreter", "aot", "kernels", "gif", "packages", "docs")
SHOWN = ("torch", "triton", "numpy")
COUNTS = re.compile(r"^=* ?((?:\d+ [a-z]+, )*\d+ [a-z]+) in [\d.]+s|(\d+ of \d+) hold their limits", re.MULTILINE)
"""What a step says of itself in its last lines: pytest, and the ahead-of-time compiler."""


@dataclass
class Result:
    """What came of an environment: its versions, and of each step whether it passed, its counts and its time."""

    python: str
    versions: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: str = ""

    @property
    def passed(self) -> bool:
        return not self.failed and all(step["passed"] for step in self.steps.values())


def interpreter_of(python: str) -> str | None:
    """The path of an interpreter of that version, or None where there is none at hand."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python"))
    on_path = shutil.which(f"python{python}")
    for candidate in (sys.executable, *([on_path] if on_path else []), *map(str, of_pyenv)):
        found = subprocess.run(
            [candidate, "-c", "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
        )
        if found.returncode == 0 and found.stdout.split()[1] == python:
            return found.stdout.split()[0]
    return None


def code_now() -> str:
    """A digest of what the steps run: packages, tests, requirements."""
    folders = ("gif", "gif_kernels", "tests", "tools")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted([ROOT / "pyproject.toml", *sources]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def try_environment(
    environment: Environment, steps: Sequence[str], output: Path, *, keep: bool = False, aot: str = ""
) -> Iterator[tuple[str, Result]]:
    """Build ``environment``, run all ``steps`` in it, whichever fail, and remove it unless ``keep``.

    Yields what is known so far: with "" after the installation, then with the name of each step that ran. ``aot``:
    options of the ahead-of-time compiler.
    """
    result = Result(environment.python)
    place = output / environment.name
    log = output / f"{environment.name}.log"
    python = place / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    with log.open("w", encoding="utf-8") as out:

        def run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> bool:
            out.write(f"$ {' '.join(command)}\n")
            out.flush()
            where = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(variables or {})}
            return subprocess.run(command, cwd=ROOT, env=where, stdout=out, stderr=subprocess.STDOUT).returncode == 0

        try:
            create = [*uv, "venv", "--clear", "--python", str(interpreter_of(environment.python)), str(place)]
            install = [*uv, "pip", "install", "--python", str(python), "--resolution", environment.resolution]
            if not run(create) or not run([*install, "--editable", ".[test]", *environment.pins]):
                result.failed = f"cannot be built, see {log}"
                yield "", result
                return
            result.versions = versions(python)
            yield "", result
            for name in steps:
                start, written, code = time.monotonic(), out.tell(), code_now()
                options = aot if name == "aot" else ""
                passed = run([str(python), *STEPS[name].command, *options.split()], STEPS[name].variables)
                result.steps[name] = {
                    "passed": passed,
                    "counts": counts(log.read_bytes()[written:].decode("utf-8", "replace")),
                    "seconds": round(time.monotonic() - start),
                    "day": date.today().isoformat(),
                    "options": options,
                    "code": code,
                }
                yield name, result
        finally:
            if not keep:
                shutil.rmtree(place, ignore_errors=True)


def counts(printed: str) -> str:
    """What a step says of itself at its end: "237 passed, 2 skipped"; empty where it says nothing."""
    found = [next(filter(None, match)) for match in COUNTS.findall(printed)]
    return re.sub(r", \d+ warnings?", "", found[-1]) if found else ""


def versions(python: Path) -> dict[str, str]:
    """The version of every package of an environment."""
    code = "import json; from importlib.metadata import distributions as d; "
    code += "print(json.dumps({x.metadata['Name'].lower(): x.version for x in d()}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def table(results: Mapping[str, Result]) -> str:
    """What was tried and what came of it, in Markdown."""
    tried = [name for name in STEPS if any(name in result.steps for result in results.values())]
    rows = []
    for name, result in results.items():
        seen = [result.versions.get(package, "") for package in SHOWN]
        if result.failed:
            seen[0] = result.failed.partition(", see")[0]
        told = [_told(result.steps.get(step)) for step in tried]
        minutes = f"{sum(step['seconds'] for step in result.steps.values()) / 60:.0f}" if result.steps else ""
        days = sorted({step["day"] for step in result.steps.values()})
        rows.append((name, result.python, *seen, *told, minutes, days[0] if days else ""))
    return markdown_table(("environment", "Python", "PyTorch", "Triton", "NumPy", *tried, "minutes", "since"), rows)


def _told(step: Mapping[str, Any] | None) -> str:
    if step is None:
        return "-"
    outcome = step["counts"] or "passed" if step["passed"] else f"FAILED {step['counts']}"
    return f"{outcome} {step['options']}".strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the environments that are asked for; 0 where all of them passed, 2 where a named one lacks its Python."""
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=str(__doc__).splitlines()[0])
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="of --list")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(USUAL), help="what to run in each")
    parser.add_argument("--aot", default="", help="options of the ahead-of-time compiler, such as '--target sm_90'")
    parser.add_argument("--again", action="store_true", help="also what passed with this code before")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they are")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--docs", type=Path, help=f"a document whose block {BLOCK} gets the table")
    parser.add_argument("--list", action="store_true", help="say which environments there are, and try none")
    given = parser.parse_args(arguments)
    missing = [environment for environment in ENVIRONMENTS if interpreter_of(environment.python) is None]
    if given.list:
        for environment in ENVIRONMENTS:
            print(f"{environment.name}: {environment}{' (no such interpreter here)' if environment in missing else ''}")
        return 0
    for environment in missing:
        if environment.name in (given.only or ()):
            parser.error(f"{environment.name} needs Python {environment.python}, and there is none here; install it")
        if not given.only:
            print(f"{environment.name}: left out, no Python {environment.python} here")
    if given.docs:
        require_block(given.docs, BLOCK)
    given.output.mkdir(parents=True, exist_ok=True)
    kept = given.output / "results.json"
    results = {name: Result(**told) for name, told in json.loads(kept.read_text()).items()} if kept.exists() else {}
    work = {}
    for environment in ENVIRONMENTS:
        if environment not in missing and environment.name in (given.only or names):
            known = results.get(environment.name, Result(environment.python)).steps
            steps = [name for name in given.steps if given.again or not has_passed(known.get(name), given.aot)]
            work[environment] = steps
            if passed := [name for name in given.steps if name not in steps]:
                print(f"{environment.name}: {', '.join(passed)} passed with this code before")
    total, done, begun = sum(map(len, work.values())), 0, time.monotonic()
    for environment, steps in work.items():
        if not steps:
            continue
        name = environment.name
        print(f"{name}: {environment}; {given.output / name}.log", flush=True)
        before = results.get(name, Result(environment.python))
        for step, found in try_environment(environment, steps, given.output, keep=given.keep, aot=given.aot):
            same = before.versions == found.versions  # then what passed there before still has
            results[name] = replace(found, steps=before.steps | found.steps) if same else found
            ordered = {name: vars(results[name]) for name in names if name in results}
            write_text(kept, json.dumps(ordered, indent=1) + "\n")
            if step:
                done += 1
                left = (time.monotonic() - begun) / done * (total - done) / 60
                told = f"{step} {_told(found.steps[step])}, {found.steps[step]['seconds']} s"
                print(f"{name}: {told} ({done} of {total} steps, about {left:.0f} min left)", flush=True)
            else:
                built = ", ".join(f"{package} {found.versions.get(package)}" for package in SHOWN)
                print(f"{name}: {found.failed or built}", flush=True)
    written = table({name: results[name] for name in names if name in results})
    print(written)
    if given.docs:
        replace_block(given.docs, BLOCK, written)
    return int(not all(results[environment.name].passed for environment in work))


def has_passed(step: Mapping[str, Any] | None, aot: str) -> bool:
    """Whether a step passed with the code as it is, and with no options or those that are asked for."""
    return step is not None and bool(step["passed"]) and step["code"] == code_now() and step["options"] in ("", aot)


if __name__ == "__main__":
    sys.exit(main())
