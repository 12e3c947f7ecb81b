"""Tables in a file: stepped there, to the result of one in memory, and continued after a kill at any moment."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gif import files
from gif.vectors import CodeVectors, SpreadConfig, recovery, spread_code_vectors, spread_file, stages
from gif.vectors.commands import spread_command
from gif.vectors.distributed_table import DistributedTable, Round, prefetched

OPTIONS: dict[str, Any] = {"epochs": 2, "batch": 200, "start": "center", "neighbor_epochs": 1, "neighbors": 16}


def table(dtype=torch.float32, m=2500, d=32):
    return (torch.randn(m, d, generator=torch.Generator().manual_seed(5)) + 1).to(dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and a journal that a small table needs many of, and no wait for the disk, which a kill does not need."""
    monkeypatch.setattr(files, "fsync", lambda path: None)
    monkeypatch.setattr(recovery, "fsync", lambda path: None)
    monkeypatch.setattr(stages, "ROWS_A_BLOCK", 300)
    monkeypatch.setattr(recovery, "UNDO_BYTES", 4 * 300 * 32 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_spread_as_memory_is(tmp_path, small_blocks, dtype):
    inside = CodeVectors(table(dtype))
    inside.save(tmp_path / "start.safetensors")
    report = spread_code_vectors(inside, SpreadConfig(**OPTIONS))
    output = tmp_path / "spread.safetensors"
    other = spread_file(tmp_path / "start.safetensors", output, SpreadConfig(**OPTIONS), device=torch.device("cpu"))
    assert torch.equal(CodeVectors.load(output).table, inside.table)
    assert other.to_dict() == report.to_dict()
    assert torch.equal(CodeVectors.load(tmp_path / "start.safetensors").table, CodeVectors(table(dtype)).table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spread.safetensors", "start.safetensors"]


def spread_alone(source, output):
    """In a process of its own, forked."""
    torch.set_num_threads(1)
    spread_file(source, output, SpreadConfig(**OPTIONS), device=torch.device("cpu"))


def test_killed_at_any_moment_it_continues_to_the_same_result(tmp_path, small_blocks):
    """SIGKILL after a random part of a run's time, again and again, until a run comes to its end."""
    source, output = tmp_path / "start.safetensors", tmp_path / "spread.safetensors"
    CodeVectors(table()).save(source)
    context = multiprocessing.get_context("fork")

    def begin():
        process = context.Process(target=spread_alone, args=(source, output))
        process.start()
        return process

    started = time.monotonic()
    process = begin()
    process.join()
    assert process.exitcode == 0
    seconds, wanted = time.monotonic() - started, output.read_bytes()

    chance = random.Random(7)
    killed = 0
    for _ in range(2):
        output.unlink()
        while not output.exists():
            process = begin()
            process.join(chance.uniform(0, 0.7 * seconds))
            if process.exitcode is None and not output.exists():
                killed += 1
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            journal = list((tmp_path / "spread.partial" / "journal").glob("undo-*"))
            size = sum(path.stat().st_size for path in journal)
            assert size <= recovery.UNDO_BYTES * 1.5 + 3 * 300 * 32 * 4  # and what was read ahead
        assert output.read_bytes() == wanted
        shutil.rmtree(tmp_path / "spread.partial", ignore_errors=True)
    assert killed >= 2


@pytest.mark.parametrize("moment", [0, 9, 20, 52])  # of 9 blocks, 2 epochs of 12, 20 subsets of neighbours
def test_half_written_rows_are_undone(tmp_path, monkeypatch, small_blocks, moment):
    """The table's file is damaged in the middle of a round's writing: some rows are new, one is garbage."""
    start = CodeVectors(table())
    whole = CodeVectors(table())
    wanted = spread_code_vectors(whole, SpreadConfig(**OPTIONS))
    start.save(tmp_path / "v.safetensors")
    put, calls = DistributedTable.put, []

    def torn(self, rows, vectors):
        calls.append(1)
        if len(calls) == moment + 1:
            half = len(rows) // 2
            put(self, rows[:half], vectors[:half])
            self.own[rows[half]] = torch.nan
            raise KeyboardInterrupt
        put(self, rows, vectors)

    monkeypatch.setattr(DistributedTable, "put", torn)
    mapped = CodeVectors.load(tmp_path / "v.safetensors", mmap=True, writable=True)
    with pytest.raises(KeyboardInterrupt):
        spread_code_vectors(mapped, SpreadConfig(**OPTIONS), checkpoint=tmp_path / "journal")
    monkeypatch.setattr(DistributedTable, "put", put)
    again = CodeVectors.load(tmp_path / "v.safetensors", mmap=True, writable=True)
    with pytest.raises(ValueError, match="checkpoint of another run"):
        spread_code_vectors(again, SpreadConfig(**{**OPTIONS, "lr": 0.2}), checkpoint=tmp_path / "journal")
    report = spread_code_vectors(again, SpreadConfig(**OPTIONS), checkpoint=tmp_path / "journal")
    assert torch.equal(again.table, whole.table)
    assert report.to_dict() == wanted.to_dict()
    assert not (tmp_path / "journal").exists()


def test_a_finished_run_is_not_done_again(tmp_path):
    CodeVectors(table()).save(tmp_path / "v.safetensors")
    mapped = CodeVectors.load(tmp_path / "v.safetensors", mmap=True, writable=True)
    options = {"checkpoint": tmp_path / "journal", "keep_checkpoint": True}
    report = spread_code_vectors(mapped, SpreadConfig(**OPTIONS), **options)
    after = mapped.table.clone()
    assert spread_code_vectors(mapped, SpreadConfig(**OPTIONS), **options).to_dict() == report.to_dict()
    assert torch.equal(mapped.table, after)


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path, monkeypatch):
    """Its folder names the settings that it was given, and the minutes; what it names must be as it was."""
    source, output, cpu = tmp_path / "v.safetensors", tmp_path / "out.safetensors", torch.device("cpu")
    CodeVectors(table()).save(source)
    wanted = CodeVectors(table())
    spread_code_vectors(wanted, SpreadConfig(**OPTIONS))

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "max_cosine", killed)  # in the first round of neighbours
        with pytest.raises(KeyboardInterrupt):
            spread_file(source, output, SpreadConfig(**OPTIONS), device=cpu)
    record = tmp_path / "out.partial" / "settings.json"
    named = json.loads(record.read_text())
    assert named.pop("t") == 2 and named.pop("neighbors") == 16
    record.write_text(json.dumps({**named, "minutes": None}))
    for changed in ({"minutes": 5.0}, {"lr": 0.2}):
        with pytest.raises(ValueError, match="holds a run with other settings"):
            spread_file(source, output, SpreadConfig(**{**OPTIONS, **changed}), device=cpu)
    with pytest.raises(ValueError, match=r"checkpoint of another run .*neighbors is 16 there and 8 here"):
        spread_file(source, output, SpreadConfig(**{**OPTIONS, "neighbors": 8}), device=cpu)
    spread_file(source, output, SpreadConfig(**OPTIONS), device=cpu)
    assert torch.equal(CodeVectors.load(output).table, wanted.table)


def test_a_folder_of_another_run_is_refused(tmp_path):
    CodeVectors(table()).save(tmp_path / "v.safetensors")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(ValueError, match="is no run of this command"):
        spread_file(tmp_path / "v.safetensors", tmp_path / "out.safetensors", device=torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="no file"):
        spread_file(tmp_path / "none.safetensors", tmp_path / "out.safetensors", device=torch.device("cpu"))


def test_the_next_rounds_rows_are_read_ahead():
    events = []

    def load(round):
        events.append(f"read {round.number}")
        return torch.zeros(1)

    rounds = [Round(i, torch.empty(0), [], [], torch.empty(0), i) for i in range(3)]
    for round, _ in prefetched(iter(rounds), load):
        deadline = time.monotonic() + 10
        while len(events) < min(2 * round.number + 2, 5 - (round.number == 2)) and time.monotonic() < deadline:
            time.sleep(0.001)
        events.append(f"step {round.number}")
    assert events == ["read 0", "read 1", "step 0", "read 2", "step 1", "step 2"]


class FakeStream:
    """A CUDA stream that notes what is queued in it."""

    def __init__(self, name):
        self.name, self.waited = name, []

    def wait_stream(self, other):
        self.waited.append(other.name)


class FakeRows:
    """Rows that a GPU holds."""

    is_cuda, device = True, torch.device("cuda", 1)

    def __init__(self):
        self.used_in = []

    def record_stream(self, stream):
        self.used_in.append(stream.name)


@pytest.fixture
def streams(monkeypatch):
    """torch.cuda's streams, as far as they matter: each thread is in the default one until it enters another."""
    default, inside = FakeStream("default"), threading.local()

    @contextmanager
    def enter(stream):
        before = getattr(inside, "stream", default)
        inside.stream = stream or before
        yield
        inside.stream = before

    def current(device):
        assert device.type == "cuda"
        return getattr(inside, "stream", default)

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    return enter


def loads(device, seen):
    def load(round):
        stream: Any = torch.cuda.current_stream(torch.device("cuda"))
        seen.append((round.number, stream.name))
        return FakeRows()

    rounds = [Round(i, torch.empty(0), [], [], torch.empty(0), i) for i in range(3)]
    return prefetched(iter(rounds), load, torch.device(device))


def test_rows_are_read_in_the_stream_that_the_caller_is_in(streams):
    seen: list[Any] = []
    mine = FakeStream("mine")
    with streams(mine):
        taken = [rows for _, rows in loads("cuda:1", seen)]
    assert seen == [(0, "mine"), (1, "mine"), (2, "mine")]
    assert not mine.waited and all(not rows.used_in for rows in taken)  # a stream need not wait for itself
    on_cpu: list[Any] = []
    with streams(mine):
        list(loads("cpu", on_cpu))
    assert on_cpu == [(0, "default"), (1, "default"), (2, "default")]


def test_a_caller_that_changed_its_stream_waits_for_the_rows(streams):
    seen: list[Any] = []
    first, second = FakeStream("first"), FakeStream("second")
    generator = loads("cuda:1", seen)
    with streams(first):
        assert not next(generator)[1].used_in  # read in the first, as the round after it
    with streams(second):
        assert next(generator)[1].used_in == ["second"]
        assert second.waited == ["first"]
        assert not next(generator)[1].used_in
    assert seen == [(0, "first"), (1, "first"), (2, "second")] and second.waited == ["first"]


def test_what_fails_while_reading_ahead_is_raised():
    def load(round):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(prefetched([Round(0, torch.empty(0), [], [], torch.empty(0), 0)], load))


def test_the_command_in_memory_and_in_a_file(tmp_path, monkeypatch):
    CodeVectors(table(m=300)).save(tmp_path / "v.safetensors")
    options = {"epochs": 1, "batch": 100, "start": "center", "neighbor_epochs": 1}
    spread_command(tmp_path / "v.safetensors", tmp_path / "a.safetensors", **options)
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, str(value))  # what torchrun sets
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    spread_command(tmp_path / "v.safetensors", tmp_path / "b.safetensors", **options, in_file=True)
    assert not torch.distributed.is_initialized()
    inside, outside = (CodeVectors.load(tmp_path / f"{name}.safetensors").table for name in "ab")
    assert torch.equal(inside, outside)
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert reports[0] == reports[1] and len(reports[0]["gaps"]) == 1
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"v.safetensors"} | {
        f"{name}{end}" for name in "ab" for end in (".safetensors", ".json", ".png", "-gap.png")
    }
