"""`make matrix`: what is supported, tried. An environment for each PyTorch and Triton, with oldest and newest packages.

    python -m tools.matrix --list
    python -m tools.matrix --only torch-2.9-oldest --steps interpreter gif
    python -m tools.matrix --docs docs/compatibility.md      # writes what passed into the document

Each environment is built by uv, used, and removed; results stay in `--output` and are added to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from gif.documents import markdown_table, replace_block, require_block

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


PAIRS = {
    "torch-2.9": ("torch==2.9.*", "triton==3.5.*"),
    "torch-2.11": ("torch==2.11.*", "triton==3.6.*", "numpy<2.4"),  # Triton 3.6 interprets with NumPy before 2.4 alone
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
STEPS: dict[str, list[str]] = {
    "interpreter": ["-m", "pytest", "tests/gif_kernels/test_interpreter.py"],
    "aot": ["-m", "gif_kernels.aot"],
    "kernels": ["-m", "pytest", "tests/gif_kernels", "--ignore=tests/gif_kernels/test_interpreter.py"],
    "gif": ["-m", "pytest", *(f"tests/gif/test_{part}.py" for part in ("packages", "losses", "tokenize", "readme"))],
    "all": ["-m", "pytest", "tests", "-n", "auto"],
}
"""What is run: the interpreter and the ahead-of-time compiler on every kernel, the ops, what stands on them; or all."""
USUAL = ("interpreter", "aot", "kernels", "gif")
SHOWN = ("torch", "triton", "numpy")


@dataclass
class Result:
    """What came of an environment: versions, and for each step whether it passed and how long it took."""

    python: str
    versions: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    day: str = ""
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


def try_environment(environment: Environment, steps: Sequence[str], output: Path, *, keep: bool, aot: str) -> Result:
    """Build ``environment``, run all ``steps`` in it, whichever fail, and remove it."""
    result = Result(environment.python, day=date.today().isoformat())
    interpreter = interpreter_of(environment.python)
    if interpreter is None:
        result.failed = f"no Python {environment.python} here"
        return result
    place = output / environment.name
    log = output / f"{environment.name}.log"
    python = place / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    with log.open("w", encoding="utf-8") as out:

        def run(command: Sequence[str]) -> bool:
            out.write(f"$ {' '.join(command)}\n")
            out.flush()
            where = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            return subprocess.run(command, cwd=ROOT, env=where, stdout=out, stderr=subprocess.STDOUT).returncode == 0

        try:
            install = [*uv, "pip", "install", "--python", str(python), "--resolution", environment.resolution]
            if not run([*uv, "venv", "--clear", "--python", interpreter, str(place)]) or not run(
                [*install, "--editable", ".[test]", *environment.pins]
            ):
                result.failed = f"cannot be built, see {log}"
                return result
            result.versions = versions(python)
            for step in steps:
                start = time.monotonic()
                command = [str(python), *STEPS[step], *(aot.split() if step == "aot" else [])]
                passed = run(command)
                seconds = round(time.monotonic() - start)
                result.steps[step] = {"passed": passed, "seconds": seconds, "day": result.day}
                print(f"{environment.name}: {step} {'passed' if passed else f'FAILED, see {log}'}", flush=True)
        finally:
            if not keep:
                shutil.rmtree(place, ignore_errors=True)
    return result


def versions(python: Path) -> dict[str, str]:
    """The version of every package of an environment."""
    code = "import json; from importlib.metadata import distributions as d; "
    code += "print(json.dumps({x.metadata['Name'].lower(): x.version for x in d()}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def table(results: dict[str, Result]) -> str:
    """What was tried and what came of it, in Markdown."""
    rows = []
    for name, result in results.items():
        seen = [result.versions.get(package, "") for package in SHOWN]
        steps = ", ".join(f"{step}{'' if told['passed'] else ' FAILED'}" for step, told in result.steps.items())
        day = min((told["day"] for told in result.steps.values()), default=result.day)
        rows.append((name, result.python, *seen, result.failed.partition(", see")[0] or steps, day))
    return markdown_table(("environment", "Python", "PyTorch", "Triton", "NumPy", "passed", "since"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the environments that are asked for; 0 where all of them passed."""
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=str(__doc__).splitlines()[0])
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="of --list")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(USUAL), help="what to run in each")
    parser.add_argument("--aot", default="", help="options of the ahead-of-time compiler, such as '--target sm_90'")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they are")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--docs", type=Path, help=f"a document whose block {BLOCK} gets the table")
    parser.add_argument("--list", action="store_true", help="say which environments there are, and try none")
    given = parser.parse_args(arguments)
    if given.list:
        for environment in ENVIRONMENTS:
            there = "" if interpreter_of(environment.python) else " (no such interpreter here)"
            packages = "oldest" if environment.resolution == OLDEST else "newest"
            print(f"{environment.name}: Python {environment.python}{there}, {packages}, {' '.join(environment.pins)}")
        return 0
    if given.docs:
        require_block(given.docs, BLOCK)
    given.output.mkdir(parents=True, exist_ok=True)
    kept = given.output / "results.json"
    results = {name: Result(**told) for name, told in json.loads(kept.read_text()).items()} if kept.exists() else {}
    chosen = [environment for environment in ENVIRONMENTS if environment.name in given.only]
    for environment in chosen:
        found = try_environment(environment, given.steps, given.output, keep=given.keep, aot=given.aot)
        before = results.get(environment.name)
        if before is not None and before.versions == found.versions:  # what passed there before still has
            found.steps = {**before.steps, **found.steps}
        results[environment.name] = found
        ordered = {name: results[name] for name in names if name in results}
        kept.write_text(json.dumps({name: vars(result) for name, result in ordered.items()}, indent=1) + "\n")
    print(table(ordered))
    if given.docs:
        replace_block(given.docs, BLOCK, table(ordered))
    missing = [e.name for e in chosen if results[e.name].failed.startswith("no Python")]
    return int(not all(results[e.name].passed for e in chosen if e.name not in missing))


if __name__ == "__main__":
    sys.exit(main())
