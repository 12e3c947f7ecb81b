"""The command that proves, times and tunes on a GPU: every stage rehearsed on a CPU, and what becomes of failures."""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import right
from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import Cuda, Rehearsal, tf32
from benchmarks.gpu.internals import shipped_tile, with_tile
from benchmarks.gpu.plan import STAGES, Stage, limit
from benchmarks.gpu.records import (
    ENDED,
    Environment,
    Goal,
    Record,
    Recorder,
    at_least,
    at_most,
    read_records,
    screen,
)
from benchmarks.gpu.stage import Run
from benchmarks.gpu.tune import TASKS
from benchmarks.report import report
from gif.vectors import CodeVectors
from gif_kernels import gaussian_potential
from gif_kernels.device import tuning
from gif_kernels.device.tuning import Tile

NAMES = [stage.name for stage in STAGES]
SECONDS = 600
"""For one stage of a rehearsal, which takes some: other tests run beside it."""
CARD = Environment("a card", "1.2", "2.11.0", "3.6.0", "2.5.0", "3.12.0", "abc", False)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("stage", NAMES)
def test_every_stage_is_rehearsed(stage, tmp_path):
    done = run("--rehearse", "--output", tmp_path, "--seconds", SECONDS, "--stages", stage)
    log = tmp_path / f"{stage}.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    records = [r for r in read_records(tmp_path / "gpu.jsonl") if r.stage == stage]
    assert records[-1].what == ENDED and records[-1].note == "passed"
    assert any(r.value is not None for r in records[:-1])
    assert all(r.environment.rehearsal and r.environment.card == "CPU" for r in records)
    assert not any(r.status == "left out" and "no time" in r.note for r in records), log.read_text()
    assert f"{stage}  {ENDED}" in done.stdout
    report([tmp_path / "gpu.jsonl"], output=tmp_path)
    assert "A rehearsal, which says nothing of speed" in (tmp_path / "gpu.md").read_text()


class TestTheCommand:
    """With stages that do what stages must not."""

    def stage(self, monkeypatch, tmp_path, body, seconds=60.0):
        """How a stage with that code ends: its exit code and its records."""
        script = tmp_path / "stage.py"
        script.write_text(body)
        popen = subprocess.Popen
        monkeypatch.setattr(command.subprocess, "Popen", lambda args, **kw: popen([sys.executable, script], **kw))
        options = command._parse(["--output", str(tmp_path), "--rehearse"])
        record = Recorder(tmp_path / "gpu.jsonl", "right", CARD)
        code = command._run(Stage("right", 1, ""), seconds, options, record)
        return code, read_records(tmp_path / "gpu.jsonl")

    def test_a_crash_is_a_record(self, monkeypatch, tmp_path):
        code, records = self.stage(monkeypatch, tmp_path, "import os; os.abort()")
        assert code != 0 and records[-1].status == "failed" and "crashed by SIGABRT" in records[-1].note

    def test_a_hang_ends_with_all_that_it_started(self, monkeypatch, tmp_path):
        child = f"import time; time.sleep(30); open({str(tmp_path / 'alive')!r}, 'w')"
        body = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
        monkeypatch.setattr(command, "LEAST", 0.0)
        begin = time.monotonic()
        code, records = self.stage(monkeypatch, tmp_path, body, seconds=2.0)
        assert time.monotonic() - begin < 20
        assert code != 0 and "killed at its limit" in records[-1].note
        assert not (tmp_path / "alive").exists()

    def test_too_little_time_is_a_record(self, monkeypatch, tmp_path):
        code, records = self.stage(monkeypatch, tmp_path, "", seconds=1.0)
        assert code != 0 and records[-1].status == "left out"

    def test_what_passes(self, monkeypatch, tmp_path):
        code, records = self.stage(monkeypatch, tmp_path, "print('x')")
        assert code == 0 and records[-1].note == "passed" and (tmp_path / "right.log").read_text() == "x\n"


def test_no_gpu_and_no_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run("--output", tmp_path, "--stages", "ceilings")
    assert done.returncode == command.NO_DEVICE and "torch sees no GPU here" in done.stdout
    again = run("--output", tmp_path)
    assert again.returncode == 2 and "give another --output" in again.stderr


def test_time_that_is_left_flows_on():
    assert limit(STAGES, 420) == pytest.approx(420 * STAGES[0].share / sum(stage.share for stage in STAGES))
    assert limit(STAGES[-1:], 100) == 100


def entry(what="a step", value=2.0, **changes):
    record = Record("losses", what, value, "us", 1.0, None, "ok", "", "2026-01-01T00:00:00+00:00", CARD)
    return replace(record, **changes)


@pytest.fixture
def stage(tmp_path):
    """What a stage works with, on a CPU, with a minute left."""
    return Run(Rehearsal(), Recorder(tmp_path / "gpu.jsonl", "losses", CARD), tmp_path, time.monotonic() + 60)


def written(run):
    return read_records(run.record.path)


class TestWhatIsWrongIsSeen:
    ALLOWED = 1e-3

    def test_a_wrong_result_has_no_speed(self, stage):
        truth = [torch.ones(2)]
        assert stage.correct("right", lambda: [torch.ones(2)], truth, self.ALLOWED)
        for wrong in (torch.tensor([1.0, 1.01]), torch.tensor([1.0, torch.nan])):
            assert not stage.correct("wrong", lambda wrong=wrong: [wrong], truth, self.ALLOWED)
        assert [r.status for r in written(stage)] == ["ok", "wrong", "wrong"]
        assert not stage.correct("theirs", lambda: [2 * torch.ones(2)], truth, self.ALLOWED, ours=False)
        assert written(stage)[-1].status == "left out" and stage.record.failures == 2

    def test_other_bits_have_no_speed(self, stage):
        turns = iter([1.0, 1.0 + 1e-6])
        assert not stage.correct("x", lambda: [torch.full((2,), next(turns))], [torch.ones(2)], self.ALLOWED)
        assert written(stage)[-1].what == "x: the same bits twice"

    def check(self, stage, change):
        """What `right` records of an op whose kernel gives ``change`` of the truth."""

        def op(vectors, *, impl="auto"):
            value = gaussian_potential(vectors, impl="reference")
            return value if impl == "reference" else change(value, vectors)

        vectors = torch.randn(9, 8) + 0.3
        right._check(stage, "case", Case(op, "", {"vectors": vectors}, ("vectors",)), "float32")
        return [r.what for r in written(stage)]

    def test_a_right_op(self, stage):
        assert self.check(stage, lambda value, vectors: value) == []

    def test_a_wrong_op(self, stage):
        assert "case: value, largest" in self.check(stage, lambda value, vectors: 1.01 * value)

    def test_an_op_that_forgets_strides(self, stage):
        found = self.check(stage, lambda value, vectors: value if vectors.is_contiguous() else 1.01 * value)
        assert found and all("strided" in what for what in found)

    def test_an_op_with_other_bits(self, stage):
        turns = iter(range(100))
        found = self.check(stage, lambda value, vectors: value * (1 + 2**-22 * (next(turns) % 2)))
        assert "case, twice: other bits" in found

    def test_an_exception_is_a_record_and_the_rest_goes_on(self, stage):
        with stage.attempt("ours"):
            raise RuntimeError("why")
        with stage.attempt("theirs", ours=False):
            raise RuntimeError("why")
        with stage.attempt("large"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert [(r.what, r.status) for r in written(stage)] == [
            ("ours", "failed"), ("theirs", "left out"), ("large", "left out"),
        ]  # fmt: skip

    def test_a_graph_that_cannot_be_captured(self, stage, monkeypatch):
        def refused(calls, replays):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(stage.device, "seconds", refused)
        monkeypatch.setattr(stage.device, "eager_seconds", lambda call, repeats: 3.0 * len(call()))
        assert stage.timed("x", [int, int]) == 3.0
        assert "as the host launches it" in written(stage)[-1].note

    def test_no_time_is_a_record(self, stage):
        stage.deadline = time.monotonic()
        assert list(stage.points([1, 2])) == []
        assert written(stage)[-1].note == "no time for 1, 2"


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_waits_by_file_and_line(monkeypatch):
    """The warnings of CUDA's debug mode, as torch raises them."""
    for name in ("synchronize", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    vectors = CodeVectors(torch.randn(4, 3))
    aminmax = torch.aminmax

    def waiting(labels):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return aminmax(labels)

    monkeypatch.setattr("gif.vectors.store.torch.aminmax", waiting)
    found = Cuda.waits(Cuda.__new__(Cuda), lambda: vectors.lookup(torch.tensor([1])))
    assert {place.partition(":")[0] for place in found} == {"gif_kernels/checks.py"}
    assert all(place.partition(":")[2].isdigit() and count == 1 for place, count in found.items())


def test_tf32_as_the_kernels_and_torch_compile_read_it():
    matmul = torch.backends.cuda.matmul
    with tf32(True):
        assert matmul.fp32_precision == "tf32" and matmul.allow_tf32
    assert matmul.fp32_precision == "ieee" and not matmul.allow_tf32


def test_a_tile_for_a_while():
    own, other = shipped_tile("max_cosine", 4, "cpu"), Tile(16, 16, 16, 4, 1)
    with with_tile("max_cosine", 4, other, "cpu"):
        assert tuning.tile("max_cosine", torch.float32, "sm_80") == other
    assert tuning.tile("max_cosine", torch.float32, "sm_80") == own


def test_every_kernel_of_the_tables_is_tuned():
    assert set(tuning.TILES) <= {task.kernel for task in TASKS}


class TestRecords:
    def test_they_come_back(self, tmp_path):
        path = tmp_path / "gpu.jsonl"
        assert read_records(path) == []
        record = Recorder(path, "losses", CARD)
        record("a step", 2.0, "us", floor=1.0, goal=at_most(3))
        record("NaN", float("nan"))
        first, second = read_records(path)
        assert first.reached and first.environment == CARD and first.stage == "losses"
        assert second.value is None and second.note == "nan"
        line = json.loads(path.read_text().splitlines()[0])
        assert line["card"] == "a card" and line["goal"] == "<= 3"
        assert first.goal == Goal("<=", 3) and second.goal is None

    @pytest.mark.parametrize(("goal", "reached"), [(at_most(2), True), (at_least(2.5), False), (None, None)])
    def test_goals(self, goal, reached):
        assert entry(goal=goal).reached is reached
        assert entry(goal=goal, value=None).reached is None

    def test_a_goal_is_written_and_read(self):
        for goal in (at_most(1.6), at_least(60), None):
            assert Goal.parse("" if goal is None else str(goal)) == goal
        with pytest.raises(ValueError, match="begins with <= or >="):
            Goal.parse("< 3")

    def test_a_screen_shows_failures_before_goals(self):
        text = screen(
            [entry("good", goal=at_most(3)), entry("bad", status="wrong"), *[entry(goal=at_most(3))] * 50], rows=10
        )
        assert "bad" in text.splitlines()[0] and len(text.splitlines()) == 11

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "x.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match=r"is no result of `python -m benchmarks\.gpu`"):
            read_records(tmp_path / "x.jsonl")


class TestReport:
    def write(self, path, *records):
        path.write_text("".join(record.to_json() + "\n" for record in records))
        return path

    def test_into_a_document(self, tmp_path):
        docs = tmp_path / "gpu.md"
        docs.write_text("".join(f"<!-- begin gpu {n} -->\n<!-- end gpu {n} -->\n" for n in ("goals", "losses")))
        found = self.write(
            tmp_path / "gpu.jsonl",
            entry(goal=at_most(3)),
            entry("slow", 5.0, goal=at_most(3)),
            entry("x: error", 1e-3, detail=True),
            entry("other", None, status="left out", note="no room"),
        )
        report([found], output=tmp_path / "out", docs=docs)
        text = docs.read_text()
        assert "| losses: a step | <= 3 | 2 us | yes |" in text and "| losses: slow | <= 3 | 5 us | **no** |" in text
        assert "| a step | 2 us | 1 us | <= 3 |" in text and "- other: left out. no room" in text
        assert text.index("<details>") < text.index("x: error")
        assert "a card, driver 1.2, torch 2.11.0, Triton 3.6.0" in text

    def test_a_rehearsal_goes_into_no_document(self, tmp_path):
        found = self.write(tmp_path / "gpu.jsonl", entry(environment=replace(CARD, rehearsal=True)))
        with pytest.raises(ValueError, match="is a rehearsal"):
            report([found], output=tmp_path, docs=tmp_path / "gpu.md")

    def test_the_document_has_a_block_for_each_stage(self):
        text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
        assert all(f"<!-- begin gpu {name} -->" in text for name in ("goals", *NAMES))


BARE = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import benchmarks.gpu
for module in pkgutil.iter_modules(benchmarks.gpu.__path__):
    importlib.import_module(f"benchmarks.gpu.{{module.name}}")
"""
NOT_ON_A_GPU = [
    *("pytest_benchmark", "hypothesis", "jsonargparse", "open_clip", "ortools", "faiss", "k_means_constrained"),
    *("safetensors", "onnx", "lightning", "tensorboard", "pytorch_metric_learning"),
]


def test_stages_import_what_a_machine_with_a_gpu_has():
    """Nothing is installed there beside what the command says that it needs."""
    code = BARE.format(absent=NOT_ON_A_GPU)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
