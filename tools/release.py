"""`make release VERSION=1.2.3`: version, changelog heading, sdist and wheel, and both tried in clean environments.

    python -m tools.release 1.2.3             # writes version and heading, builds, checks
    python -m tools.release --check           # builds and checks what is there, changes nothing
    python -m tools.release 1.2.3 --check     # and is it that version, with its heading?

RELEASING.md has the checklist that this is a step of.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from email import message_from_bytes
from email.message import Message
from pathlib import Path

from gif.errors import InputError
from gif.files import write_text

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
WANTED = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")
UNRELEASED = "## Unreleased\n"
UV = (sys.executable, "-m", "uv")
IN_WHEEL = (
    "gif/py.typed",
    "gif_kernels/py.typed",
    "gif/configs/ms1mv2_r100.yaml",
    "gif_kernels/token_margin/README.md",
)
IN_SDIST = (
    *("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile", "mkdocs.yml", ".pre-commit-config.yaml"),
    *(".github/workflows/test.yml", "docs/method.md", "tests/gif_kernels/conftest.py", "tools/release.py"),
    *IN_WHEEL,
)
"""The packages, and what MANIFEST.in adds: enough for `make test`."""
ALONE = """
import sys
import torch
import gif, gif_kernels
table = torch.randn(40, 16)
codes = gif.IdentityCodes(torch.cartesian_prod(torch.arange(7), torch.arange(7))[:40].to(torch.uint8), 7)
loss_fn = gif.GIFLoss(codes, gif.CodeVectors(table), embedding_size=16)
loss_fn(torch.randn(8, 16, requires_grad=True), torch.arange(8)).backward()
assert gif.__file__.startswith(sys.prefix), gif.__file__
assert gif.__version__ == gif_kernels.__version__ == "{version}", gif.__version__
print("kernels and losses alone:", gif.__version__)
"""
"""What an install without extras must do."""
UNASKED = ("scipy", "matplotlib", "jsonargparse", "rich", "timm", "torchvision")


def current_version() -> str:
    """The version that both packages say."""
    (found,) = VERSION.findall((ROOT / "gif_kernels" / "__init__.py").read_text(encoding="utf-8"))
    return str(found)


def write_version(version: str, root: Path = ROOT, day: date | None = None) -> None:
    """Write ``version`` where it is read from, and its heading over what the changelog has as unreleased.

    Raises InputError, before anything is written, for no version, one that has a heading already, or a changelog
    without a word on what is new.
    """
    if not WANTED.fullmatch(version):
        raise InputError(f"{version!r} is no version; write 1.2.3, or 1.2.3rc1")
    changelog, package, citation = root / "CHANGELOG.md", root / "gif_kernels" / "__init__.py", root / "CITATION.cff"
    text = changelog.read_text(encoding="utf-8")
    if heading_of(version, text):
        raise InputError(f"{changelog.name} has a heading for {version} already; take the next version")
    before, found, after = text.partition(UNRELEASED)
    if not found or not after.partition("\n## ")[0].strip():
        raise InputError(f"{changelog.name} says nothing under {UNRELEASED.strip()!r}; write there what is new")
    heading = f"## {version} ({(day or date.today()).isoformat()})\n"
    write_text(changelog, f"{before}{UNRELEASED}\n{heading}{after}")
    write_text(package, VERSION.sub(f'__version__ = "{version}"', package.read_text(encoding="utf-8")))
    write_text(citation, re.sub("(?m)^version: .*$", f"version: {version}", citation.read_text(encoding="utf-8")))


def heading_of(version: str, changelog: str) -> str:
    """The changelog's heading for ``version``; empty where it has none."""
    found = re.search(rf"^## {re.escape(version)} .*$", changelog, re.MULTILINE)
    return found[0] if found else ""


def build(output: Path) -> tuple[Path, Path]:
    """sdist and, from it, wheel, in an emptied ``output``."""
    shutil.rmtree(output, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(output), str(ROOT)])
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def check_files(sdist: Path, wheel: Path, version: str) -> None:
    """Both hold what they must and nothing that is not to be installed; the metadata say the same version."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as packed:
        files = set(packed.namelist())
    metadata = metadata_of(wheel)
    sources = {str(path.relative_to(ROOT)) for package in ("gif", "gif_kernels") for path in modules(package)}
    for archive_name, held, wanted in (
        ("sdist", inside, {*IN_SDIST, *sources}),
        ("wheel", files, {*IN_WHEEL, *sources}),
    ):
        if missing := sorted(wanted - held):
            raise InputError(f"the {archive_name} lacks {', '.join(missing[:5])}; see pyproject.toml and MANIFEST.in")
    folders = {name.split("/")[0] for name in files if not name.split("/")[0].endswith(".dist-info")}
    strangers = sorted(folders - {"gif", "gif_kernels"})
    if strangers:
        raise InputError(f"the wheel holds {', '.join(strangers)}, which would be installed beside other packages'")
    if metadata["Version"] != version:
        raise InputError(f"the wheel says version {metadata['Version']}, wanted {version}")
    required = {
        re.split(r"[>;\[ ]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    if required != {"torch", "triton", "numpy"}:
        raise InputError(
            f"without extras {', '.join(sorted(required))} would be installed, wanted numpy, torch, triton"
        )


def modules(package: str) -> Iterator[Path]:
    """The modules of a package as they are in the repository."""
    return (ROOT / package).rglob("*.py")


def metadata_of(wheel: Path) -> Message:
    """The metadata of a wheel, which name its version and what it requires."""
    with zipfile.ZipFile(wheel) as packed:
        (path,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(packed.read(path))


@contextmanager
def environment(wheel: Path, extra: str, torch: bool) -> Iterator[Path]:
    """The interpreter of a fresh environment with ``wheel`` installed, in an empty folder.

    ``torch``: installs it and the other dependencies. Without, they are those of the environment that this runs in,
    which saves gigabytes; what is asked is then what the wheel's own files do.
    """
    with tempfile.TemporaryDirectory(prefix="gif-release-") as folder:
        python = Path(folder) / "env" / "bin" / "python"
        run(
            [
                *UV,
                "venv",
                "--python",
                sys.executable,
                *([] if torch else ["--system-site-packages"]),
                str(python.parents[1]),
            ]
        )
        install(python, f"{wheel}{extra}", *([] if torch else ["--no-deps"]))
        if not torch:
            site = next((python.parents[1] / "lib").glob("python*/site-packages"))
            packages = Path(next(path for path in sys.path if path.endswith("site-packages")))
            (site / "borrowed.pth").write_text(f"{packages}\n")
        yield python


def install(python: Path, package: str, *options: str) -> None:
    """Install ``package`` into the environment of ``python``."""
    run([*UV, "pip", "install", "--python", str(python), *options, package])


def try_wheel(wheel: Path, version: str, *, full: bool) -> None:
    """Import and use the wheel where nothing of the repository is at hand: without extras, and the command line."""
    with environment(wheel, "", full) as python:
        run([str(python), "-c", ALONE.format(version=version)], cwd=python.parents[2])
        if full:
            code = f"from importlib.util import find_spec; print([n for n in {UNASKED!r} if find_spec(n)])"
            came = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
            if came != "[]":
                raise InputError(f"an install without extras brought {came}")
    with environment(wheel, "[train]", full) as python:
        folder = python.parents[2]
        if full:
            every = ",".join(metadata_of(wheel).get_all("Provides-Extra", []))
            install(python, f"{wheel}[{every}]", "--dry-run")  # their bounds go together
        for arguments in (["--help"], ["train", "--config", "glyphs", "--print_config"], ["doctor"]):
            run([str(python), "-m", "gif.cli", *arguments], cwd=folder)
        if full:
            run([str(python), "-m", "gif.cli", "quickstart", "--epochs", "1", "--output", "run"], cwd=folder)


def run(command: Sequence[str], cwd: Path = ROOT) -> None:
    """Run a command to its end; what it prints is shown if it fails."""
    print("$", " ".join(command).strip().splitlines()[0], flush=True)
    where = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the version where one is given, build, check; 0 where all is well."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=str(__doc__).splitlines()[0])
    parser.add_argument("version", nargs="?", help="of the release; without one, that of the packages as they are")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; a version that is given must be there already"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--quick", action="store_true", help="borrow PyTorch and the rest from this environment, and train nothing"
    )
    given = parser.parse_args(arguments)
    try:
        if given.version and not given.check:
            write_version(given.version)
        version = current_version()
        if given.version not in (None, version):
            raise InputError(f"the packages say {version}, not {given.version}; run this without --check first")
        if given.version and not heading_of(version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")):
            raise InputError(f"CHANGELOG.md has no heading for {version}; run this without --check first")
        sdist, wheel = build(given.output)
        check_files(sdist, wheel, version)
        run([*UV, "tool", "run", "twine", "check", "--strict", str(sdist), str(wheel)])
        try_wheel(wheel, version, full=not given.quick)
    except InputError as error:
        print(f"error: {error}")
        return 1
    print(f"{sdist.name} and {wheel.name} are good: RELEASING.md says what comes next")
    return 0


if __name__ == "__main__":
    sys.exit(main())
