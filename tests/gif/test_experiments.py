"""Comparisons of heads: several runs at once, equal processor time, data that several sets judge."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gif.backbones import BackboneConfig
from gif.data.glyphs import word_sets
from gif.data.glyphs.halves import PARTS
from gif.data.glyphs.word_sets import SETS
from gif.experiments import curves, glyph_bench, runs
from gif.experiments.comparison import Comparison
from gif.experiments.runs import Budget, Length, Machine
from gif.files import read_json

HEADS = '--heads=["GIF", "full softmax"]'


@pytest.fixture
def folder(tmp_path, png):
    """A folder of 30 identities of 4 noisy images each, which a process of its own finds too."""
    generator = torch.Generator().manual_seed(0)
    for identity in range(30):
        pattern = torch.randint(0, 200, (1, 32, 32), generator=generator)
        (tmp_path / "data" / f"{identity:02}").mkdir(parents=True)
        for number in range(4):
            noise = torch.randint(0, 55, (1, 32, 32), generator=generator)
            image = (pattern + noise).to(torch.uint8).expand(3, -1, -1)
            (tmp_path / "data" / f"{identity:02}" / f"{number}.png").write_bytes(png(image))
    return tmp_path / "data"


@pytest.fixture
def small(monkeypatch):
    """A backbone of a moment."""
    monkeypatch.setattr(glyph_bench, "BACKBONE", BackboneConfig(embedding_size=16, image_size=32, width=4))
    monkeypatch.setattr(glyph_bench, "VOCAB_SIZE", 5)


@pytest.fixture
def words(monkeypatch, make_halves):
    """The commands find tiny halves."""
    found = {part: make_halves(n, begin=0x4E00 + 100 * n, size=32) for n, part in enumerate(PARTS)}
    monkeypatch.setattr(word_sets, "glyph_halves", lambda size, cache_dir=None: found)


def scores(output):
    return {path.relative_to(output): read_json(path)["tar"] for path in output.rglob("result.json")}


def test_several_runs_at_once_are_those_one_after_the_other(folder, gif, tmp_path):
    command = ["accuracy", "--data", folder, "--budgets=1", "--seeds=2", "--batch_size=16", HEADS]
    assert gif(*command, "--output", tmp_path / "one")[0] == 0
    code, printed = gif(*command, "--output", tmp_path / "two", "--jobs=2")
    assert code == 0 and printed.count("rank-1 ") >= 4 and "4 runs: 4/4 epochs" in printed
    assert scores(tmp_path / "one") == scores(tmp_path / "two") and len(scores(tmp_path / "one")) == 4
    log = tmp_path / "two" / "gif" / "epochs-1" / "seed-0" / "log.txt"
    assert "training with GIF" in log.read_text()
    code, printed = gif(*command, "--output", tmp_path / "three", "--jobs=0")
    assert code == 1 and "at least one job" in printed and not (tmp_path / "three").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process_and_the_same_command_continues(folder, gif, tmp_path, number):
    output = tmp_path / "out"
    command = ["accuracy", "--data", folder, "--budgets=300", "--seeds=1", "--batch_size=16", HEADS, "--jobs=2"]
    line = [sys.executable, "-m", "gif.cli", *map(str, command), "--output", str(output)]
    running = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    logs = [output / head / "epochs-300" / "seed-0" / "log.txt" for head in ("gif", "full-softmax")]
    end = time.monotonic() + 120
    while not all(log.exists() and "training with" in log.read_text() for log in logs):
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.1)
    os.kill(running.pid, number)  # of the command alone: it has its processes to end
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 128 + number and "the same command continues" in printed
    saved = [list((log.parent / "checkpoints").glob("step-*")) for log in logs]
    assert all(saved)
    assert all("stopping after this step" in log.read_text() for log in logs)
    assert _ends(running.pid)  # none of its processes is left


def _ends(group: int, seconds: float = 20.0) -> bool:
    """Whether every process of a group ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_process_that_is_killed_is_told_of(folder, gif, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_in_process", _dies)
    command = ["accuracy", "--data", folder, "--budgets=1", "--seeds=1", "--batch_size=16", HEADS, "--jobs=2"]
    code, printed = gif(*command, "--output", tmp_path / "out")
    assert code == 1 and "give fewer --jobs" in printed


def _dies(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_heads_get_the_same_processor_time(folder, small, gif, tmp_path, monkeypatch):
    command = ["accuracy", "--data", folder, "--seconds=1,2", "--seeds=1", "--batch_size=16", HEADS]
    assert gif(*command, "--output", tmp_path / "a")[0] == 0
    found = {path.parent: read_json(path) for path in (tmp_path / "a").rglob("result.json")}
    assert len(found) == 4
    for run, result in found.items():
        wanted = float(run.parent.name.removeprefix("seconds-"))
        assert result["steps"] == round(wanted / read_json(run.parents[1] / "pace.json")["processor_seconds_a_step"])
        assert result["processor_seconds"] > 0  # how long so many steps take depends on what runs beside them
    assert "| head | 1 s | 2 s | MiB |" in (tmp_path / "a" / "curves.md").read_text()
    assert (tmp_path / "a" / "curves-time.png").exists() and not (tmp_path / "a" / "curves-epochs.png").exists()
    monkeypatch.setattr(glyph_bench.GlyphBench, "seconds_a_step", lambda *_: [])  # of a run that goes on it is known
    path = next(iter(found))
    (path / "result.json").unlink()
    assert gif(*command, "--output", tmp_path / "a")[0] == 0
    assert read_json(path / "result.json")["tar"] == found[path]["tar"]


def test_words_are_judged_by_each_of_their_sets(words, small, gif, tmp_path):
    command = ["accuracy", "--data=glyph-words", "--identities=200", "--budgets=1", "--seeds=1", "--batch_size=16"]
    assert gif(*command, '--heads=["GIF"]', "--output", tmp_path / "a")[0] == 0
    result = read_json(tmp_path / "a" / "gif" / "epochs-1" / "seed-0" / "result.json")
    assert set(result["sets"]) == set(SETS) and all(0 <= of["rank1"] <= 1 for of in result["sets"].values())
    assert result["sets"]["alike"]["rank1"] == result["rank1"]
    assert result["head_bytes"] > 200 * 16 * 4
    report = (tmp_path / "a" / "curves.md").read_text()
    assert all(title in report for title in ("Alike: rank-1", "New: TAR@0.00001", "Alike-recombined: TAR@0.001"))
    code, printed = gif(*command, '--heads=["GIF"]', "--output", tmp_path / "b", "--validation=true")
    assert code == 0, printed
    result = read_json(tmp_path / "b" / "gif" / "epochs-1" / "seed-0" / "result.json")
    assert set(result["sets"]) == {"alike", "new"}  # of letters that neither training nor the judges have


def test_time_is_of_one_kind_of_processor(tmp_path):
    """Of two heads whose longest runs were on two machines: at the pace of where both were."""
    seconds = {
        ("GIF", 1): [("old", 10.0), ("old", 14.0), ("old", 12.0)],
        ("GIF", 4): [("new", 4.0)],
        ("full softmax", 1): [("old", 8.0), ("new", 1.0)],
        ("full softmax", 4): [("old", 32.0), ("", None)],
    }
    found = {Length("epochs", count): Comparison({"GIF": [], "full softmax": []}) for count in (1, 4)}
    for (name, count), timed in seconds.items():
        for seed, (processor, taken) in enumerate(timed):
            folder = tmp_path / name / str(count) / str(seed)
            folder.mkdir(parents=True)
            result = {"tar": {}, "steps": 100 * count, "processor_seconds": taken, "processor": processor}
            (folder / "result.json").write_text(json.dumps(result))
            found[Length("epochs", count)].folders[name].append(folder)
    paces = curves._paces(found, ["GIF", "full softmax"], None)
    assert paces == {"GIF": 0.12, "full softmax": 0.08}
    four = Length("epochs", 4)
    assert curves._minutes(four, found[four], "GIF", paces) == pytest.approx(400 * 0.12 / 60)
    for name, taken in {"gif": 32.0, "full-softmax": 16.0}.items():  # runs of a longer length that are on record
        known = {"epochs-16/seed-0": {"steps": 1600, "processor_seconds": taken, "processor": "new"}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": {}, "runs": known}))
    assert curves._paces(found, ["GIF", "full softmax"], tmp_path) == {"GIF": 0.02, "full softmax": 0.01}
    shorter = {length: runs for length, runs in found.items() if length.count == 4}
    assert curves._paces(shorter, ["GIF", "full softmax"], None) == {}
    assert curves._told(curves._minutes(four, found[four], "GIF", {})) == "-"
    assert curves._told(curves._minutes(Length("seconds", 90), found[four], "GIF", {})) == "1.5"  # what it was given


@pytest.mark.parametrize(
    ("unit", "counts", "processors", "pictures", "minutes"),
    [
        ("epochs", (60, 240), ("old", "new"), {"epochs"}, "- | -"),
        ("epochs", (60,), ("old", "new"), {"epochs"}, "-"),
        ("epochs", (60, 240), ("old", "old"), {"epochs", "time"}, "0.2 | 0.8"),
        ("epochs", (60,), ("old", "old"), {"time"}, "0.8"),
        ("seconds", (60, 240), ("old", "new"), {"time"}, "1.0 | 4.0"),
        ("seconds", (60,), ("old", "old"), {"time"}, "0.8"),
    ],
)
def test_runs_are_drawn_as_far_as_they_tell(unit, counts, processors, pictures, minutes, tmp_path, monkeypatch):
    """The time of equal seconds is known; of epochs, where one kind of processor has all. One budget is no curve."""
    lengths = [Length(unit, count) for count in counts]
    found = {length: Comparison({"GIF": [], "full softmax": []}) for length in lengths}
    for name, processor in zip(("GIF", "full softmax"), processors, strict=True):
        for length in lengths:
            folder = tmp_path / name / length.folder
            folder.mkdir(parents=True)
            measured = {"rank1": 0.9, "tar": {"0.001": 0.8, "0.0001": 0.7}, "steps": length.count}
            cost = {"head_bytes": 2**20, "processor_seconds": 50.0, "processor": processor}
            (folder / "result.json").write_text(json.dumps(measured | cost))
            found[length].folders[name].append(folder)
    monkeypatch.setattr(curves, "compare_lengths", lambda *_: found)
    curves.accuracy_curves(tmp_path, list(found[lengths[0]].folders), Budget("glyphs"), lengths, None, Machine())
    assert {path.name for path in tmp_path.glob("*.png")} == {f"curves-{picture}.png" for picture in pictures}
    assert f"| GIF | {minutes} | 1.0 |" in (tmp_path / "curves.md").read_text()


@pytest.mark.parametrize("wrong", [lambda: Length("epochs", 0), lambda: Machine(0)])
def test_wrong_numbers(wrong):
    with pytest.raises(ValueError, match="wanted"):
        wrong()


def test_what_a_run_leaves_is_read_again(folder, gif, tmp_path):
    command = ["accuracy", "--data", folder, "--budgets=1", "--batch_size=16", '--heads=["GIF"]']
    assert gif(*command, "--seeds=1", "--output", tmp_path / "a")[0] == 0
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "data").glob("*.safetensors")}
    assert {path.name for path in kept} == {"vectors.safetensors", "codes.safetensors"}
    assert gif(*command, "--seeds=2", "--output", tmp_path / "a")[0] == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert gif(*command, "--seeds=2", "--output", tmp_path / "b")[0] == 0
    assert scores(tmp_path / "a") == scores(tmp_path / "b")
    record = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert "jobs" not in record and "compile" not in record


def test_records_let_other_machines_add_to_a_comparison(folder, gif, tmp_path, monkeypatch):
    command = ["accuracy", "--data", folder, "--budgets=1", "--batch_size=16", '--heads=["GIF"]']
    records = ["--records", tmp_path / "records"]
    assert gif(*command, *records, "--seeds=1", "--output", tmp_path / "a")[0] == 0
    first = read_json(tmp_path / "records" / "gif.json")["runs"]
    assert list(first) == ["epochs-1/seed-0"] and first["epochs-1/seed-0"]["processor"]
    code, printed = gif(*command, *records, "--seeds=2", "--output", tmp_path / "b")
    assert code == 0 and "1 run known from" in printed
    assert not (tmp_path / "b" / "gif" / "epochs-1" / "seed-0" / "backbone.safetensors").exists()  # not trained again
    both = read_json(tmp_path / "records" / "gif.json")["runs"]
    assert list(both) == ["epochs-1/seed-0", "epochs-1/seed-1"] and both["epochs-1/seed-0"] == first["epochs-1/seed-0"]
    assert (tmp_path / "records" / "gif.json").read_text().count("\n") == 5  # a line a run
    assert gif(*command, "--seeds=2", "--output", tmp_path / "c")[0] == 0
    tables = [(tmp_path / name / "curves.md").read_text() for name in "bc"]
    assert tables[0].split("Processor time")[0] == tables[1].split("Processor time")[0]

    monkeypatch.setitem(glyph_bench.CONTENDERS, "GIF", glyph_bench.Contender(glyph_bench.HeadConfig(), lr=0.05))
    code, printed = gif(*command, *records, "--seeds=1", "--output", tmp_path / "d")
    assert code == 0 and printed.count("contender.lr is 0.1 there and 0.05 here") == 1
    assert list(read_json(tmp_path / "records" / "gif.json")["runs"]) == ["epochs-1/seed-0"]

    (tmp_path / "records" / "gif.json").write_text("[]")
    code, printed = gif(*command, *records, "--seeds=1", "--output", tmp_path / "e")
    assert code == 1 and "is no record of runs" in printed
    code, printed = gif("accuracy", "--data", folder, *records, "--output", tmp_path / "f")
    assert code == 1 and "--budgets or --seconds" in printed and not (tmp_path / "f").exists()
