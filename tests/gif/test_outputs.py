"""Outputs: one command at a time, whole at any moment, looked at before work; nothing is lost, nothing is silent."""

import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gif import CodeVectors, cli, files
from gif.codes import commands as codes_commands
from gif.data.glyphs import all_glyphs
from gif.data.workers import SIGNALS, batches_of, leave_signals_to_the_command
from gif.errors import InputError, Interrupted, OutputError
from gif.files import allocate_tensors, atomic_path, load_tensors, map_tensor, remove_temporaries, save_tensors
from gif.ownership import check_output, hold
from gif.resume import RECORD, claim_folder
from gif.training import command as training_command
from gif.training import stop as stop_module
from gif.training.stop import StopRequest
from gif.vectors import commands as vectors_commands

FORMAT = "test/1"
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def table(tmp_path):
    """A file of 200 code vectors."""
    path = tmp_path / "v.safetensors"
    CodeVectors(torch.randn(200, 8, generator=torch.Generator().manual_seed(0))).save(path)
    return path


def left_over(path: Path) -> list[str]:
    return [
        found.name for found in path.rglob("*") if files.is_temporary(found) or found.suffix in (".lock", ".partial")
    ]


def hold_until(path, event, release):
    with hold(path):
        event.set()
        release.wait(30)


class TestHold:
    def test_the_second_is_told_which_process_has_it(self, tmp_path):
        event, release = FORK.Event(), FORK.Event()
        process = FORK.Process(target=hold_until, args=(tmp_path / "run", event, release))
        process.start()
        assert event.wait(30)
        with pytest.raises(InputError, match=f"written by process {process.pid} "), hold(tmp_path / "run"):
            pass
        with hold(tmp_path / "another"):
            pass
        release.set()
        process.join()
        with hold(tmp_path / "run"), hold(tmp_path / "run"):  # within one process again
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_dead_process_holds_nothing(self, tmp_path):
        event, release = FORK.Event(), FORK.Event()
        process = FORK.Process(target=hold_until, args=(tmp_path / "run", event, release))
        process.start()
        assert event.wait(30)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with hold(tmp_path / "run"):
            pass
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("command", ["vectors", "spread", "spread --in_file=true", "tokenize", "train", "convert"])
    def test_every_long_command(self, gif, table, tmp_path, png, command):
        output = tmp_path / ("o" if command in ("train", "convert") else "o.safetensors")
        (tmp_path / "data" / "a").mkdir(parents=True)
        (tmp_path / "data" / "a" / "1.png").write_bytes(png(torch.zeros(3, 8, 8, dtype=torch.uint8)))
        arguments = {
            "vectors": ["--data", tmp_path / "data"],
            "train": ["--data", tmp_path / "data", "--head.kind=softmax"],
            "convert": ["--data", tmp_path / "data"],
        }.get(command, ["--vectors", table])
        event, release = FORK.Event(), FORK.Event()
        process = FORK.Process(target=hold_until, args=(output, event, release))
        process.start()
        assert event.wait(30)
        words = ["data", "convert"] if command == "convert" else command.split()
        code, printed = gif(*words, *arguments, "--output", output)
        release.set()
        process.join()
        assert code == 1 and f"is being written by process {process.pid}" in printed
        assert not output.exists()

    def test_two_commands_at_once_give_one_result(self, table, tmp_path):
        command = [sys.executable, "-m", "gif.cli", "spread", "--vectors", str(table), "--in_file=true", "--epochs=40"]
        outputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        subprocess.run([*command, "--output", str(outputs[1])], check=True, capture_output=True)
        both = [subprocess.Popen([*command, "--output", str(outputs[0])], stdout=subprocess.PIPE) for _ in range(2)]
        codes = sorted((process.communicate()[0], process.returncode)[1] for process in both)
        assert codes in ([0, 1], [0, 0])  # refused, or after the other
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


class TestKilledWhileWriting:
    def test_an_unfinished_file_is_removed_by_the_next_write(self, tmp_path):
        process = FORK.Process(target=killed_in_a_write, args=(tmp_path / "x",))
        process.start()
        process.join()
        assert len(left_over(tmp_path)) == 1
        files.write_text(tmp_path / "x", "whole")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_a_live_process_keeps_its_unfinished_file(self, tmp_path):
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("half")
            remove_temporaries(tmp_path)
            assert temporary.exists()
            (tmp_path / ".mine.tmp").touch()
            remove_temporaries(tmp_path, held=True)
            assert not temporary.exists() and (tmp_path / ".mine.tmp").exists()
            temporary.write_text("whole")

    def test_killed_in_its_first_write_a_run_is_not_refused(self, tmp_path):
        process = FORK.Process(target=killed_in_a_write, args=(tmp_path / "run" / RECORD,))
        process.start()
        process.join()
        (tmp_path / "run" / f".{RECORD}.4194305.tmp").touch()  # as versions before named it
        claim_folder(tmp_path / "run", {"a": 1})
        assert [path.name for path in (tmp_path / "run").iterdir()] == [RECORD]
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine").touch()
        with pytest.raises(InputError, match="no run of this command"):
            claim_folder(tmp_path / "other", {"a": 1})

    @pytest.mark.parametrize("command", ["vectors", "spread", "spread --in_file=true", "tokenize", "convert", "train"])
    def test_killed_before_any_write_the_same_command_comes_to_the_same_result(self, tiny_folder, tmp_path, command):
        """SIGKILL before the first rename, then before the second, ... until a run comes to its end."""
        wanted = tmp_path / "wanted"
        wanted.mkdir()
        assert run_command(command, tiny_folder, wanted, kill_at=None) == 0
        folder = tmp_path / "killed"
        folder.mkdir()
        kills = 0
        while run_command(command, tiny_folder, folder, kill_at=kills) != 0:
            kills += 1
            assert kills < 30, "it never comes to its end"
        assert kills >= 2
        found = {path.relative_to(folder) for path in folder.rglob("*")}
        assert found == {path.relative_to(wanted) for path in wanted.rglob("*")}
        for path in found:
            if path.suffix in (".safetensors", ".json", ".png") and (wanted / path).is_file():
                assert (folder / path).read_bytes() == (wanted / path).read_bytes(), path
        assert left_over(folder) == []


def killed_in_a_write(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """Thirty identities of four images in folders, and their code vectors."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("input")
    pixels = torch.randint(256, (30, 4, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    for identity in range(30):
        (folder / "data" / f"{identity:02d}").mkdir(parents=True)
        for number in range(4):
            Image.fromarray(pixels[identity, number].numpy()).save(
                folder / "data" / f"{identity:02d}" / f"{number}.png"
            )
    CodeVectors(torch.randn(30, 8, generator=torch.Generator().manual_seed(0))).save(folder / "v.safetensors")
    return folder


def run_command(command, source, folder, kill_at):
    """In a process of its own, killed before its rename number ``kill_at``; returns its exit code."""
    process = FORK.Process(target=killed_command, args=(command, source, folder, kill_at))
    process.start()
    process.join()
    return process.exitcode


def killed_command(command, source, folder, kill_at):
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(source / "cache")
    words = ["data", "convert"] if command == "convert" else command.split()
    arguments = {
        "vectors": ["--data", source / "data", "--width=8", "--batch_size=16"],
        "convert": ["--data", source / "data", "--to=rec"],
        "tokenize": ["--vectors", source / "v.safetensors", "--vocab_size=3"],
        "train": [
            "--data",
            source / "data",
            "--head.kind=softmax",
            "--backbone.image_size=16",
            "--backbone.width=4",
            "--backbone.embedding_size=8",
            "--training.epochs=2",
            "--training.batch_size=32",
        ],
    }.get(words[0] if words[0] != "data" else "convert", ["--vectors", source / "v.safetensors", "--batch=8"])
    output = folder / ("o" if words[0] in ("data", "train") else "o.safetensors")
    replace, rename, calls = os.replace, Path.rename, []

    def counted(act):
        def acting(*paths):
            calls.append(1)
            if kill_at is not None and len(calls) == kill_at + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*paths)

        return acting

    os.replace, Path.rename = counted(replace), counted(rename)
    sys.argv = ["gif", *words, *map(str, arguments), "--output", str(output)]
    cli.main()


class TestPlacesThatCannotBeWritten:
    @pytest.mark.parametrize("command", ["vectors", "spread", "spread --in_file=true", "tokenize"])
    @pytest.mark.parametrize("place", ["folder", "below a file", "/proc/none/o.safetensors"])
    def test_before_work(self, gif, table, tiny_folder, tmp_path, monkeypatch, command, place):
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        output = {"folder": tmp_path / "folder", "below a file": tmp_path / "file" / "o.safetensors"}.get(place, place)

        def work(*_, **__):
            raise AssertionError("work began")

        for name in ("fitted_code_vectors", "spread_code_vectors", "load_data"):
            monkeypatch.setattr(vectors_commands, name, work)
        monkeypatch.setattr(codes_commands, "tokenize", work)
        arguments = ["--data", tiny_folder / "data"] if command == "vectors" else ["--vectors", table]
        code, printed = gif(*command.split(), *arguments, "--output", output)
        assert code == 1 and printed.startswith("error:") and str(output).split("/")[-1][:4] in printed
        assert {path.name for path in tmp_path.iterdir()} == {"folder", "file", "v.safetensors"}

    @pytest.mark.parametrize("command", ["vectors", "spread", "tokenize", "spread --in_file=true"])
    def test_a_disk_that_is_full_in_the_end_loses_nothing(self, gif, tiny_folder, tmp_path, monkeypatch, command):
        """The last write fails; given again, the command does no work but writes."""
        output = tmp_path / "o.safetensors"
        arguments = (
            ["--data", tiny_folder / "data"] if command == "vectors" else ["--vectors", tiny_folder / "v.safetensors"]
        )
        replace = os.replace

        def full(source, target):
            if Path(target) == output:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        code, printed = gif(*command.split(), *arguments, "--output", output)
        assert code == 1 and f"cannot write {output}: No space left on device" in printed
        monkeypatch.setattr(os, "replace", replace)
        assert (tmp_path / "o.partial").exists() and not output.exists()

        def work(*_, **__):
            raise AssertionError("it is done again")

        monkeypatch.setattr("gif.encoders.pixels.PixelEncoder.__call__", work)
        monkeypatch.setattr("gif.vectors.stages.uniformity_step_", work)
        monkeypatch.setattr("gif.codes.tree.Level.tokens", work)
        code, printed = gif(*command.split(), *arguments, "--output", output)
        assert code == 0, printed
        assert output.exists() and left_over(tmp_path) == []

    def test_a_file_that_its_own_report_would_overwrite(self, gif, table, tmp_path):
        for command, ending in (("spread", "json"), ("spread", "png"), ("spread", "partial"), ("tokenize", "partial")):
            code, printed = gif(command, "--vectors", table, "--output", tmp_path / f"s.{ending}")
            assert code == 1 and "would be overwritten" in printed
        code, printed = gif("vectors", "--output", tmp_path / "s.partial")
        assert code == 1 and "would be overwritten" in printed
        code, printed = gif("codes", "inspect", "--codes", tmp_path / "c.png")
        assert code == 1 and "written over what is read" in printed
        code, printed = gif("tokenize", "--vectors", table, "--output", table)
        assert code == 1 and "written over what is read" in printed
        table.rename(tmp_path / "s.json")
        code, printed = gif("spread", "--vectors", tmp_path / "s.json", "--output", tmp_path / "s.safetensors")
        assert code == 1 and "s.json, which is read, would be overwritten" in printed
        assert [path.name for path in tmp_path.iterdir()] == ["s.json"]

    def test_no_room(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: files.shutil._ntuple_diskusage(0, 0, 100))
        for write in (
            lambda: save_tensors(tmp_path / "x", {"a": torch.zeros(100)}, format=FORMAT),
            lambda: allocate_tensors(tmp_path / "x", {"a": ((100,), torch.float32)}, format=FORMAT),
        ):
            with pytest.raises(OutputError, match=r"has 0\.0 GB free; make room"):
                write()
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_start_leaves_the_folder_free(self, gif, tiny_folder, tmp_path, monkeypatch):
        arguments = ["--data", tiny_folder / "data", "--head.kind=softmax", "--output", tmp_path / "run"]
        arguments += ["--backbone.image_size=16", "--training.batch_size=16"]

        def fails(*_, **__):
            raise RuntimeError("0 active drivers")

        monkeypatch.setattr(training_command, "train", fails)
        with contextlib.suppress(RuntimeError):
            gif("train", *arguments)
        assert not (tmp_path / "run").exists()
        if not torch.cuda.is_available():
            code, printed = gif("train", *arguments, "--training.device=cuda")
            assert code == 1 and 'device "cuda" was asked for, and PyTorch sees 0 GPUs' in printed
            assert not (tmp_path / "run").exists()

    def test_what_can_be_written_is_not_refused(self, tmp_path):
        check_output(tmp_path / "a.safetensors", [tmp_path / "a.json"], [tmp_path / "b.safetensors", None])


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_the_umask_decides_the_mode(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)}, format=FORMAT)
        allocate_tensors(tmp_path / "b.safetensors", {"a": ((3,), torch.float32)}, format=FORMAT)
        files.write_text(tmp_path / "c.json", "{}")
        with atomic_path(tmp_path / "d") as temporary:
            temporary.unlink()  # as a library that puts a file of its own there
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_cache_that_cannot_be_written(gif, tiny_folder, tmp_path, monkeypatch):
    """Data is read without it, and what is in it is used."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert gif("data", "convert", "--data", tiny_folder / "data", "--to=tar", "--output", tmp_path / "tar")[0] == 0
    code, printed = gif("data", "inspect", "--data", tmp_path / "tar")
    assert code == 0 and "cannot be made" in printed and "is not kept" in printed
    kept = all_glyphs(size=16, min_fonts=24, cache_dir=tmp_path / "cache")
    assert torch.equal(all_glyphs(size=16, min_fonts=24, cache_dir=tmp_path / "file" / "x").images, kept.images)


class TestChecksums:
    def test_every_changed_byte_is_found(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_tensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, format=FORMAT, note="hello")
        whole = path.read_bytes()
        wanted = load_tensors(path, format=FORMAT)
        for place in range(len(whole)):
            for flip in (0x01, 0x20, 0xFF):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
                with pytest.raises(InputError, match=r"x\.safetensors"):
                    load_tensors(path, format=FORMAT)
                with pytest.raises(InputError, match=r"x\.safetensors"):
                    map_tensor(path, "a", format=FORMAT)
        path.write_bytes(whole)
        assert torch.equal(load_tensors(path, format=FORMAT)[0]["a"], wanted[0]["a"])

    def test_a_checksum_whose_name_is_damaged_too(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_tensors(path, {"a": torch.arange(6.0)}, format=FORMAT, identities="0" * 64)
        whole = path.read_bytes()
        for place in range(whole.index(b"checksum"), whole.index(b"checksum") + len(b"checksum")):
            changed = bytearray(whole)
            changed[place] ^= 0x08
            changed[-1] ^= 0x08
            path.write_bytes(changed)
            with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
                load_tensors(path, format=FORMAT)

    @pytest.mark.parametrize("change", ["insert", "append", "shorten", "swap"])
    def test_bytes_inserted_or_lost(self, tmp_path, monkeypatch, change):
        monkeypatch.setattr(files, "CHECKED_WHEN_MAPPED", 0)  # as a table of many GB
        path = tmp_path / "x.safetensors"
        save_tensors(path, {"a": torch.arange(1000.0)}, format=FORMAT)
        whole = path.read_bytes()
        changed = {
            "insert": whole[:-100] + b"\0" * 8 + whole[-100:],
            "append": whole + b"\0",
            "shorten": whole[:-8],
            "swap": whole[:-8] + whole[-4:] + whole[-8:-4],
        }[change]
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"damaged|truncated"):
            load_tensors(path, format=FORMAT)
        if change == "swap":
            map_tensor(path, "a", format=FORMAT)  # a table too large to be read: only its form is looked at
            with pytest.raises(InputError, match="checksum"):
                files.check_file(path)
        else:
            with pytest.raises(InputError, match=r"damaged|truncated"):
                map_tensor(path, "a", format=FORMAT)

    def test_headers_that_lie(self, tmp_path):
        def with_header(text):
            (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)

        entry = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
        for wrong in (
            "[" * 100_000,
            "{}",
            "[]",
            "{" + entry.replace("[4]", "[5]") + "}",
            "{" + entry.replace("[4]", "[-4]") + "}",
            "{" + entry.replace("[4]", "[true,4]") + "}",
            "{" + entry.replace("[0,16]", "[0]") + "}",
            "{" + entry.replace("F32", "F31") + "}",
            "{" + entry.replace("0,16", "4,20") + "}",
            "{" + entry + "," + entry.replace('"a"', '"b"') + "}",
            "{"
            + entry
            + ","
            + entry.replace('"a"', '"b"').replace("[4]", f"[0,{2**62},4]").replace("0,16", "16,16")
            + "}",
            '{"__metadata__":{"format":3},' + entry + "}",
            '{"__metadata__":7,' + entry + "}",
            '{"a":null}',
        ):
            with_header(wrong.encode())
            with pytest.raises(InputError, match=f"{tmp_path / 'x'}"):
                load_tensors(tmp_path / "x", format=FORMAT)
            with pytest.raises(InputError, match=f"{tmp_path / 'x'}"):
                map_tensor(tmp_path / "x", "a", format=FORMAT)

    def test_files_without_a_checksum_are_read(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"a": torch.arange(3)}, tmp_path / "x", metadata={"format": FORMAT})
        assert load_tensors(tmp_path / "x", format=FORMAT)[0]["a"].tolist() == [0, 1, 2]
        assert not files.check_file(tmp_path / "x")

    def test_a_file_written_through_a_map_is_sealed(self, tmp_path):
        path = tmp_path / "x"
        save_tensors(path, {"a": torch.zeros(3)}, format=FORMAT)
        map_tensor(path, "a", format=FORMAT, writable=True).fill_(2)
        assert load_tensors(path, format=FORMAT)[0]["a"].tolist() == [2, 2, 2] and not files.check_file(path)
        files.seal(path)
        assert files.check_file(path)
        save_tensors(tmp_path / "y", {"a": torch.full((3,), 2.0)}, format=FORMAT)
        assert path.read_bytes() == (tmp_path / "y").read_bytes()

    def test_other_readers_of_safetensors_agree(self, tmp_path):
        from safetensors.torch import load_file

        tensors = {
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 4),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "half": torch.randn(3, 5).to(torch.bfloat16),
            "flags": torch.tensor([True, False]),
            "view": torch.arange(12).view(3, 4).T,
        }
        tensors["same"] = tensors["view"]  # tied weights share their memory
        save_tensors(tmp_path / "x", tensors, format=FORMAT)
        for read in (load_file(tmp_path / "x"), load_tensors(tmp_path / "x", format=FORMAT)[0]):
            assert read.keys() == tensors.keys()
            assert all(
                torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items()
            )

    def test_a_damaged_record_is_named(self, tmp_path):
        claim_folder(tmp_path / "run", {"a": 1})
        (tmp_path / "run" / RECORD).write_bytes(b'{"a": \xff')
        with pytest.raises(InputError, match=r"settings\.json is damaged"):
            claim_folder(tmp_path / "run", {"a": 1})


class TestShortenedInUse:
    def test_a_mapped_table(self, table):
        vectors = CodeVectors.load(table, mmap=True)
        part = vectors.part(10, 190)
        os.truncate(table, 4096)
        for use in (
            lambda: vectors.lookup(torch.tensor([199])),
            lambda: part.lookup(torch.tensor([170])),
            lambda: vectors.move_(torch.tensor([199]), torch.ones(1, 8), 0.1),
        ):
            with pytest.raises(InputError, match="was shortened while it was in use"):
                use()

    def test_a_table_that_was_replaced_is_still_read(self, table, tmp_path):
        vectors = CodeVectors.load(table, mmap=True)
        (tmp_path / "new").write_bytes(b"")
        os.replace(tmp_path / "new", table)
        assert vectors.lookup(torch.tensor([199])).norm().item() == pytest.approx(1)

    def test_a_loaded_table_does_not_need_its_file(self, table):
        vectors = CodeVectors.load(table)
        os.truncate(table, 0)
        assert vectors.table.sum().isfinite()


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(index)


class TestInterrupts:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_training_writes_a_checkpoint_first(self, tiny_folder, tmp_path, number):
        command = [sys.executable, "-m", "gif.cli", "train", "--data", str(tiny_folder / "data"), "--head.kind=softmax"]
        command += ["--backbone.image_size=16", "--backbone.width=4", "--training.epochs=3000", "--training.workers=1"]
        command += ["--training.batch_size=32", "--output", str(tmp_path / "run"), "--training.save_minutes=1000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, number)  # the terminal's and a scheduler's signals go to the workers too
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 128 + number
        (place,) = (tmp_path / "run" / "checkpoints").glob("step-*")
        step = int(place.name.removeprefix("step-"))
        assert f"continues after step {step:,} of " in printed
        assert left_over(tmp_path) == []

    def test_a_signal_waits_while_workers_start(self):
        """One that came before a worker has said that it ignores it would end that worker."""
        seen = []
        before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in SIGNALS}
        try:
            loader = torch.utils.data.DataLoader(
                Numbers(), batch_size=2, num_workers=1, worker_init_fn=leave_signals_to_the_command
            )
            start, started = multiprocessing.process.BaseProcess.start, []

            def start_and_send(process):
                start(process)
                for number in SIGNALS:  # at once: the worker has hardly begun
                    os.kill(process.pid, number)
                    signal.raise_signal(number)
                started.append((process, list(seen)))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(multiprocessing.process.BaseProcess, "start", start_and_send)
                batches = batches_of(loader)
            assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3]]
            ((_, at_once),) = started
            assert at_once == [] and sorted(seen) == sorted(SIGNALS)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def test_workers_leave_a_signal_to_the_command(self, tiny_folder, tmp_path):
        """One that a signal ended would be an error in the command, in the midst of saving."""
        code = f"""
import time
from pathlib import Path
from gif import cli, resume
from gif.encoders.pixels import PixelEncoder

def delayed(function, seconds):
    def later(*arguments, **options):
        outcome = function(*arguments, **options)
        seen.append(function)
        if len(seen) > 2:  # the first image's features are kept by now
            Path({str(tmp_path / "begun")!r}).touch()
        time.sleep(seconds)
        return outcome
    return later

seen = []
PixelEncoder.__call__ = delayed(PixelEncoder.__call__, 0.1)
resume.save_tensors = delayed(resume.save_tensors, 1)
cli.main()
"""
        command = [sys.executable, "-c", code, "vectors", "--data", str(tiny_folder / "data"), "--width=8"]
        command += ["--workers=1", "--batch_size=1", "--output", str(tmp_path / "o.safetensors")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 143, printed
        assert f"continues from what {tmp_path / 'o.partial'} holds" in printed

    def test_a_signal_that_comes_again_through_a_launcher_is_the_same_one(self, monkeypatch):
        with pytest.raises(Interrupted), StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert stop.number == stop.agreed(True) == signal.SIGINT
        monkeypatch.setattr(stop_module, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt) as stopped, StopRequest():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on")
        assert not isinstance(stopped.value, Interrupted)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_command_that_keeps_nothing_says_so(self, gif, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("gif.doctor.doctor", interrupted)
        code, printed = gif("doctor")
        assert code == 130 and "keeps nothing" in printed

    def test_what_is_kept_is_named(self, gif, table, tmp_path, monkeypatch):
        from gif.vectors import stages

        step, calls = stages.uniformity_step_, []

        def interrupted(*arguments, **options):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return step(*arguments, **options)

        monkeypatch.setattr(stages, "uniformity_step_", interrupted)
        command = ["spread", "--vectors", table, "--batch=50", "--output", tmp_path / "o.safetensors"]
        code, printed = gif(*command)
        assert code == 130 and f"continues from what {tmp_path / 'o.partial'} holds" in printed
        monkeypatch.setattr(stages, "uniformity_step_", step)
        assert gif(*command)[0] == 0
