"""The campaign, small: a few cases of each part, and whether it finds what is wrong."""

import json
import os
import signal
from random import Random

import pytest

from benchmarks.campaign import __main__ as campaign
from benchmarks.campaign import commands, damaged, formats, planted
from benchmarks.campaign.isolation import Isolated
from benchmarks.campaign.mutations import MUTATIONS, mutate
from benchmarks.campaign.records import FILE, OUTCOMES, Found, Kind, Record, Records, rows

FEW = ("code vectors", "identities", "RecordIO: .idx", "image folder", "settings.json", ".bin of Python 3")


@pytest.fixture
def few(monkeypatch):
    """Formats that are quickly made, and two commands."""
    some = tuple(format for format in formats.FORMATS if format.name in FEW)
    monkeypatch.setattr(damaged, "FORMATS", some)
    monkeypatch.setattr(planted, "FORMATS", some)
    monkeypatch.setattr(planted, "OTHERS", ())
    monkeypatch.setattr(damaged, "kinds", lambda folder, kinds=damaged.kinds: kinds(folder)[:-1])  # the cache's index
    monkeypatch.setattr(
        commands, "COMMANDS", {name: commands.COMMANDS[name] for name in ("spread in a file", "tokenize")}
    )


def run(folder, *arguments):
    return campaign.main(["--output", str(folder), "--cases", "1", *arguments])


def test_every_part(few, tmp_path, capfd):
    assert run(tmp_path) == 0
    printed = capfd.readouterr().out
    records = Records(tmp_path / FILE).all
    assert {part for part, _ in (record.kind for record in records)} == set(campaign.SHARES)
    assert len(records) == len(FEW) + len(FEW) + 2 + 2 and "executions" in printed
    assert run(tmp_path, "--parts", "mutations") == 0  # there is nothing left to try
    assert len(Records(tmp_path / FILE).all) == len(records)
    again = next(record for record in records if record.case.startswith("0/mutations/code vectors/"))
    assert campaign.main(["--repeat", again.case]) == 0
    assert f"{again.outcome}: {again.note[:20]}" in capfd.readouterr().out


def test_what_is_silent_is_found(few, monkeypatch, tmp_path, capfd):
    """A checksum that nobody compares."""
    monkeypatch.setattr("gif.files._compare", lambda *_: None)
    assert campaign.main(["--output", str(tmp_path), "--cases", "12", "--parts", "mutations"]) == 1
    assert "silent" in {record.outcome for record in Records(tmp_path / FILE).violations}
    assert "--repeat '0/mutations/code vectors/" in capfd.readouterr().out


def test_what_is_executed_is_found(few, monkeypatch, tmp_path):
    def read(folder):
        import pickle

        return pickle.loads((folder / "v").read_bytes())

    monkeypatch.setattr(
        planted, "FORMATS", (formats.Format("open", lambda at: (at / "v").write_bytes(b"N."), read, ["*"]),)
    )
    monkeypatch.setattr(damaged, "FORMATS", planted.FORMATS)
    assert run(tmp_path, "--parts", "executions") == 1
    assert [record.outcome for record in Records(tmp_path / FILE).all] == ["executed"]


def test_what_is_lost_is_found(few, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "_differences", lambda whole, folder, name: "o is another")
    assert run(tmp_path, "--parts", "kills") == 1
    assert {record.outcome for record in Records(tmp_path / FILE).all} == {"lost"}


def test_differences(tmp_path):
    for name, content in (("a/same", "1"), ("a/other", "1"), ("a/gone", ""), ("b/same", "1"), ("b/other", "2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "b" / "more").mkdir()
    assert commands._differences(tmp_path / "a", tmp_path / "b", "train with codes") == (
        "gone is missing, more is left over, other is another"
    )
    assert commands._differences(tmp_path / "a", tmp_path / "b", "run") == "gone is missing, more is left over"


def test_a_case_that_crashes_or_hangs_is_a_record(tmp_path):
    def crash(number, random, folder):
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        while number == 2:
            pass
        return Found("right")

    with Isolated({"p/k": Kind("p", "k", crash)}, limit=2) as isolated:
        found = [isolated.attempt(f"0/p/k/{number}") for number in range(4)]
    with Isolated({}):  # and ended before it has begun
        pass
    assert [one.outcome for one in found] == ["right", "traceback", "traceback", "right"]
    assert found[1].note.endswith("-11") and "2 s" in found[2].note


def test_an_unnamed_error_is_none(tmp_path):
    from gif.errors import InputError

    path = tmp_path / "v"
    path.touch()
    refuse = damaged._refusal
    assert refuse(InputError(f"{path} is damaged"), tmp_path, path, "cut").outcome == "refused"
    assert refuse(InputError("something is damaged"), tmp_path, path, "cut").outcome == "traceback"
    assert refuse(ValueError(f"{path}"), tmp_path, path, "cut").outcome == "traceback"


def test_mutations_change_something_and_repeat():
    content = bytes(range(256)) * 3
    for seed in range(200):
        changed, what = mutate(content, Random(seed))
        assert changed != content and (changed, what) == mutate(content, Random(seed))
    for empty in (b"", b"\0"):
        assert mutate(empty, Random(0))[0] != empty
    assert {mutate(content, Random(seed))[1].partition(":")[0] for seed in range(200)} == set(MUTATIONS)


def test_half_a_record_is_forgotten(tmp_path):
    records = Records(tmp_path / FILE)
    records.add(Record("0/p/k/0", "right", ""))
    with (tmp_path / FILE).open("a") as file:
        file.write(json.dumps({"case": "0/p/k/1"})[:-5])
    found = Records(tmp_path / FILE)
    assert found.tried() == {"0/p/k/0"}
    found.add(Record("0/p/k/1", "lost", "o"))
    assert rows(Records(tmp_path / FILE).all)[-1][2] == [2, 1, *[0] * (len(OUTCOMES) - 2), 1]
