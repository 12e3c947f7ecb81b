"""A release: what is written, what is refused before anything is, what the archives are held to."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tomllib
import zipfile
from datetime import date

import pytest
import yaml

from gif.errors import InputError
from tools import matrix, release

ROOT = release.ROOT


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "gif_kernels").mkdir()
    (tmp_path / "gif_kernels" / "__init__.py").write_text('"""Kernels."""\n\n__version__ = "0.1.0"\n__all__ = []\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n- An op.\n\n## 0.1.0 (2026-01-01)\n\nFirst.\n"
    )
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.0\n")
    return tmp_path


def test_version_and_heading_are_written(repository):
    release.write_version("0.2.0", repository, date(2026, 12, 24))
    assert '__version__ = "0.2.0"\n__all__' in (repository / "gif_kernels" / "__init__.py").read_text()
    assert (repository / "CITATION.cff").read_text() == "cff-version: 1.2.0\nversion: 0.2.0\n"
    assert (repository / "CHANGELOG.md").read_text() == (
        "# Changelog\n\n## Unreleased\n\n## 0.2.0 (2026-12-24)\n\n- An op.\n\n## 0.1.0 (2026-01-01)\n\nFirst.\n"
    )


@pytest.mark.parametrize(
    ("version", "changelog", "message"),
    [
        ("v1", None, "'v1' is no version; write 1.2.3"),
        ("0.1.0", None, "has a heading for 0.1.0 already"),
        ("0.2.0", "# Changelog\n\n## Unreleased\n\n## 0.1.0 (2026-01-01)\n\nFirst.\n", "says nothing under"),
        ("0.2.0", "# Changelog\n", "says nothing under"),
    ],
)
def test_what_is_refused_changes_nothing(repository, version, changelog, message):
    if changelog is not None:
        (repository / "CHANGELOG.md").write_text(changelog)
    before = {path: path.read_bytes() for path in repository.rglob("*.*")}
    with pytest.raises(InputError, match=message):
        release.write_version(version, repository)
    assert {path: path.read_bytes() for path in repository.rglob("*.*")} == before


def archives(folder, metadata, without=(), more=()):
    """An sdist and a wheel that hold what is wanted, but ``without`` some and with ``more``."""
    sources = [str(path.relative_to(ROOT)) for package in ("gif", "gif_kernels") for path in release.modules(package)]
    with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
        for name in {*sources, *release.IN_WHEEL, *more} - set(without):
            wheel.writestr(name, "")
        wheel.writestr("gif_recognition-0.1.0.dist-info/METADATA", metadata)
    with tarfile.open(folder / "x.tar.gz", "w:gz") as sdist:
        for name in {*sources, *release.IN_SDIST}:
            sdist.addfile(tarfile.TarInfo(f"gif_recognition-0.1.0/{name}"), io.BytesIO())
    return folder / "x.tar.gz", folder / "x.whl"


GOOD = "Version: 0.1.0\nRequires-Dist: torch>=2.9\nRequires-Dist: numpy>=2.0\nRequires-Dist: triton>=3.5; platform\n"


def test_good_archives_pass(tmp_path):
    sdist, wheel = archives(tmp_path, GOOD + 'Requires-Dist: scipy; extra == "train"\n')
    release.check_files(sdist, wheel, "0.1.0")


@pytest.mark.parametrize(
    ("metadata", "without", "more", "message"),
    [
        (GOOD, ["gif/configs/ms1mv2_r100.yaml"], [], "the wheel lacks gif/configs/ms1mv2_r100.yaml"),
        (GOOD, ["gif/cli.py"], [], "the wheel lacks gif/cli.py"),
        (GOOD, [], ["tests/test_x.py"], "the wheel holds tests, which would be installed"),
        (GOOD.replace("0.1.0", "0.0.9"), [], [], "says version 0.0.9, wanted 0.1.0"),
        (GOOD + "Requires-Dist: scipy>=1\n", [], [], "without extras numpy, scipy, torch, triton would be installed"),
    ],
)
def test_archives_that_are_wrong(tmp_path, metadata, without, more, message):
    sdist, wheel = archives(tmp_path, metadata, without, more)
    with pytest.raises(InputError, match=message):
        release.check_files(sdist, wheel, "0.1.0")


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gif_kernels.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == release.current_version()
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()


def test_workflows_and_hooks_call_what_there_is():
    """Each `make` target that a workflow names exists; pre-commit runs the commands of `make lint`."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE))
    targets = {target for line in targets for target in line.split()}
    called: set[str] = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        called.update(word for run in runs for word in re.findall(r"make ([a-z-]+)", run))
    assert {"test", "docs", "matrix", "gpu", "release-check"} == called <= targets
    hooks = [
        hook["entry"] for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ]
    lint = re.findall(r"^\t\$\(BIN\)/(ruff check|ruff format --check|mypy)", makefile, re.MULTILINE)
    assert [next(hook for hook in hooks if hook.startswith(f".venv/bin/{command}")) for command in lint] == hooks
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text())


class TestMatrix:
    def test_pins_agree_with_the_bounds(self):
        """The oldest pair is what pyproject.toml names as its lower bounds."""
        bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        bounds = {re.split(r"[>;]", line)[0]: line.split(">=")[1].split(";")[0].strip() for line in bounds}
        (oldest,) = [e for e in matrix.ENVIRONMENTS if e.name == "torch-2.9-oldest"]
        assert oldest.resolution == matrix.OLDEST
        assert set(oldest.pins) == {f"torch=={bounds['torch']}.*", f"triton=={bounds['triton']}.*"}

    def test_steps_name_tests_that_exist(self):
        for step in matrix.STEPS.values():
            assert all((ROOT / word).exists() for word in step if word.startswith("tests"))

    def test_results_are_added_to_and_told(self, tmp_path, monkeypatch, capsys):
        document = tmp_path / "compatibility.md"
        document.write_text("<!-- begin matrix -->\n<!-- end matrix -->\n")
        outcomes = {"torch-2.9-oldest": True, "newest": False}

        def tried(environment, steps, output, *, keep, aot):
            day = "2026-11-28" if "kernels" in steps else "2026-11-27"
            told = {"passed": outcomes[environment.name], "seconds": 1, "day": day}
            versions = {"torch": "2.9.0", "triton": "3.5.0", "numpy": "2.0.0"}
            return matrix.Result("3.11", versions, dict.fromkeys(steps, told), day)

        monkeypatch.setattr(matrix, "try_environment", tried)
        common = ["--output", str(tmp_path / "out"), "--docs", str(document), "--steps", "aot", "gif"]
        assert matrix.main([*common, "--only", "torch-2.9-oldest"]) == 0
        assert matrix.main([*common, "--only", "newest"]) == 1
        assert matrix.main([*common[:-2], "kernels", "--only", "torch-2.9-oldest"]) == 0
        text = document.read_text()
        assert "| torch-2.9-oldest | 3.11 | 2.9.0 | 3.5.0 | 2.0.0 | aot, gif, kernels | 2026-11-27 |" in text
        assert "aot FAILED, gif FAILED" in text
        assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == set(outcomes)

    def test_a_missing_interpreter_is_no_failure_and_no_success(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(matrix, "interpreter_of", lambda python: None)
        assert matrix.main(["--output", str(tmp_path), "--only", "newest-python-3.14"]) == 0
        assert "no Python 3.14 here" in capsys.readouterr().out

    def test_an_environment_that_cannot_be_built(self, tmp_path, monkeypatch):
        """A step is not run in it, and what was made of it is gone."""
        environment = matrix.Environment("impossible", ("torch==0.0.1",))
        monkeypatch.setattr(matrix, "ROOT", tmp_path)  # no project there
        result = matrix.try_environment(environment, ["gif"], tmp_path, keep=False, aot="")
        assert result.failed.startswith("cannot be built") and not result.steps and not result.passed
        assert not (tmp_path / "impossible").exists()
        assert "$ " in (tmp_path / "impossible.log").read_text()
