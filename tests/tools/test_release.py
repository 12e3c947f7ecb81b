"""A release: what is written, what is refused before anything is, what the archives are held to."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from datetime import date
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("dependabot", ".github/dependabot.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_what_others_read_has_their_form(schema, pattern):
    """By the schemas that check-jsonschema brings along: no network."""
    paths = [str(path) for path in ROOT.glob(pattern)]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *paths]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert paths and checked.returncode == 0, checked.stdout + checked.stderr


def test_actions_are_pinned():
    """To a commit, which nobody can move; but for PyPI's own, which is a branch that its makers move."""
    text = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    used = set(re.findall(r"uses: (\S+)", text)) - {"pypa/gh-action-pypi-publish@release/v1"}
    assert used and all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action) for action in used), used


class TestMatrix:
    def test_pins_agree_with_the_bounds(self):
        """The oldest pair is what pyproject.toml names as its lower bounds."""
        bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        bounds = {re.split(r"[>;]", line)[0]: line.split(">=")[1].split(";")[0].strip() for line in bounds}
        (oldest,) = [e for e in matrix.ENVIRONMENTS if e.name == "torch-2.9-oldest"]
        assert oldest.resolution == matrix.OLDEST
        pairs = {f"torch=={bounds['torch']}.*", f"triton=={bounds['triton']}.*"}
        assert set(oldest.pins) == {*pairs, matrix.OF_THE_INTERPRETER}

    def test_steps_name_tests_that_exist(self):
        words = [word for step in matrix.STEPS.values() for word in step.command if word.startswith("tests")]
        assert all((ROOT / word).exists() for word in words)
        assert sum(word.startswith("tests/gif_kernels/test_triton_") for word in words) > 5

    def test_the_workflow_tries_every_environment(self):
        """Those of the first Python by `make matrix`, those of the others by `make test`."""
        jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
        first = [e.name for e in matrix.ENVIRONMENTS if e.python == matrix.PYTHONS[0]]
        assert jobs["matrix"]["strategy"]["matrix"]["environment"] == first
        assert jobs["test"]["strategy"]["matrix"]["python"] == list(matrix.PYTHONS)

    @pytest.mark.parametrize(
        ("printed", "counts"),
        [
            ("....\n237 passed, 2 skipped, 1 warning in 12.30s\n", "237 passed, 2 skipped"),
            ("FAILED tests/x.py\n==== 3 failed, 234 passed in 610.21s (0:10:10) ====\n", "3 failed, 234 passed"),
            ("1 passed in 2.0s\n4 passed in 2.0s\n", "4 passed"),
            ("Triton 3.5.0: 292 of 293 hold their limits\n", "292 of 293"),
            ("INFO - Documentation built in 3 seconds\n", ""),
        ],
    )
    def test_what_a_step_counts(self, printed, counts):
        assert matrix.counts(printed) == counts

    @pytest.fixture
    def tried(self, monkeypatch):
        """Environments are not built: ``tried.outcomes`` says what comes of a step, ``tried.steps`` which were run."""
        tried = SimpleNamespace(outcomes={}, steps=[], numpy="2.0.0")

        def try_environment(environment, steps, output, *, keep, aot):
            versions = {"torch": "2.9.0", "triton": "3.5.0", "numpy": tried.numpy}
            result = matrix.Result(environment.python, versions)
            yield "", result
            for step in steps:
                passed = tried.outcomes.get((environment.name, step), True)
                tried.steps.append((environment.name, step))
                told = {"passed": passed, "counts": "1 passed" if passed else "1 failed, 2 passed", "seconds": 90}
                told |= {"options": aot if step == "aot" else "", "code": matrix.code_now()}
                result.steps[step] = told | {"day": f"2026-11-{len(tried.steps):02d}"}
                yield step, result

        monkeypatch.setattr(matrix, "try_environment", try_environment)
        monkeypatch.setattr(matrix, "interpreter_of", lambda python: None if python == "3.14" else "python")
        monkeypatch.setattr(matrix, "code_now", lambda: "now")
        return tried

    def test_results_are_added_to_and_told(self, tmp_path, tried):
        document = tmp_path / "compatibility.md"
        document.write_text("<!-- begin matrix -->\n<!-- end matrix -->\n")
        common = ["--output", str(tmp_path / "out"), "--docs", str(document), "--steps", "aot", "gif"]
        tried.outcomes["newest", "gif"] = False
        assert matrix.main([*common, "--only", "torch-2.9-oldest"]) == 0
        assert matrix.main([*common, "--only", "newest"]) == 1
        assert matrix.main([*common[:-2], "kernels", "--only", "torch-2.9-oldest"]) == 0
        text = document.read_text()
        assert "| environment | Python | PyTorch | Triton | NumPy | aot | kernels | gif | minutes | since |" in text
        assert (
            "| torch-2.9-oldest | 3.11 | 2.9.0 | 3.5.0 | 2.0.0 | 1 passed | 1 passed | 1 passed | 4 | 2026-11-01 |"
            in text
        )
        assert "| 1 passed | - | FAILED 1 failed, 2 passed | 3 | 2026-11-03 |" in text
        assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == {"torch-2.9-oldest", "newest"}

    def test_it_goes_on_where_it_was(self, tmp_path, tried, monkeypatch, capsys):
        """What passed with the same code is not run again, unless asked for; what failed is, and all of other code."""
        command = ["--output", str(tmp_path), "--only", "newest", "--steps", "aot", "gif"]
        tried.outcomes["newest", "gif"] = False
        assert matrix.main(command) == 1
        del tried.outcomes["newest", "gif"]
        assert matrix.main(command) == 0
        assert "newest: aot passed with this code before" in capsys.readouterr().out
        assert matrix.main(command) == 0
        assert tried.steps == [("newest", "aot"), ("newest", "gif"), ("newest", "gif")]
        assert matrix.main([*command, "--again"]) == 0
        monkeypatch.setattr(matrix, "code_now", lambda: "later")
        assert matrix.main(command) == 0
        assert len(tried.steps) == 7

    def test_a_part_of_the_compilations_is_not_all_of_them(self, tmp_path, tried, capsys):
        command = ["--output", str(tmp_path), "--only", "newest", "--steps", "aot"]
        assert matrix.main([*command, "--aot", "--target sm_90"]) == 0
        assert "| 1 passed --target sm_90 |" in capsys.readouterr().out
        assert matrix.main([*command, "--aot", "--target sm_90"]) == 0
        assert len(tried.steps) == 1
        assert matrix.main(command) == 0
        assert len(tried.steps) == 2
        assert matrix.main([*command, "--aot", "--target sm_90"]) == 0
        assert len(tried.steps) == 2

    def test_other_versions_keep_nothing_of_what_passed(self, tmp_path, tried):
        common = ["--output", str(tmp_path), "--only", "newest", "--steps"]
        assert matrix.main([*common, "aot"]) == 0
        tried.numpy = "2.0.1"
        assert matrix.main([*common, "gif"]) == 0
        assert list(json.loads((tmp_path / "results.json").read_text())["newest"]["steps"]) == ["gif"]

    def test_a_missing_interpreter_is_said(self, tmp_path, tried, capsys):
        """It is left out of all environments; one that is named is refused before anything is built."""
        with pytest.raises(SystemExit):
            matrix.main(["--output", str(tmp_path), "--only", "newest", "newest-python-3.14"])
        assert "newest-python-3.14 needs Python 3.14, and there is none here" in capsys.readouterr().err
        assert tried.steps == []
        assert matrix.main(["--output", str(tmp_path), "--steps", "gif"]) == 0
        assert "newest-python-3.14: left out, no Python 3.14 here" in capsys.readouterr().out
        assert {name for name, _ in tried.steps} == {e.name for e in matrix.ENVIRONMENTS if e.python != "3.14"}

    def test_an_environment_that_cannot_be_built(self, tmp_path, monkeypatch):
        """A step is not run in it, and what was made of it is gone."""
        environment = matrix.Environment("impossible", ("torch==0.0.1",))
        monkeypatch.setattr(matrix, "ROOT", tmp_path)  # no project there
        ((step, result),) = matrix.try_environment(environment, ["gif"], tmp_path)
        assert step == "" and result.failed.startswith("cannot be built") and not result.steps and not result.passed
        assert not (tmp_path / "impossible").exists()
        assert "$ " in (tmp_path / "impossible.log").read_text()
        assert "| impossible | 3.11 | cannot be built |" in matrix.table({"impossible": result})

    def test_steps_are_run_in_the_environment(self, tmp_path, monkeypatch):
        """Of two steps one passes; each has its counts, and what they print is in the log."""
        monkeypatch.setitem(matrix.STEPS, "good", matrix.Step(("-c", "print('3 passed in 0.1s')"), {"X": "1"}))
        monkeypatch.setitem(matrix.STEPS, "bad", matrix.Step(("-c", "print('1 failed, 2 passed in 0.1s'); exit(1)")))
        real = subprocess.run

        def run(command, **options):  # of uv's commands none, and of the rest with this interpreter
            if "uv" in command:
                return SimpleNamespace(returncode=0)
            return real([sys.executable, *command[1:]], **options)

        monkeypatch.setattr(matrix, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
        told = list(matrix.try_environment(matrix.ENVIRONMENTS[0], ["good", "bad"], tmp_path))
        result = told[-1][1]
        assert [step for step, _ in told] == ["", "good", "bad"]
        assert [result.steps[step]["passed"] for step in ("good", "bad")] == [True, False]
        assert [result.steps[step]["counts"] for step in ("good", "bad")] == ["3 passed", "1 failed, 2 passed"]
        assert "torch" in result.versions and not result.passed
