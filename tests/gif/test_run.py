"""`gif run`: choices made from the data, stages that go on where they were, a report that needs nothing beside it."""

import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.mixed_images import write_mixed_images
from gif.backbones import BackboneConfig, load_backbone
from gif.data import Identities, IdentityImages, ImageDecoder, load_data, open_data
from gif.data.glyphs import word_sets
from gif.data.glyphs.halves import PARTS
from gif.data.glyphs.word_sets import SETS
from gif.data.survey import survey
from gif.errors import InputError
from gif.run import RunConfig, choices
from gif.run.choices import Budget
from gif.settings import read_sections, section_of

STAGES = ("vectors", "spread", "tokenize", "train", "evaluate")


def write_folder(folder, counts, size=(40, 48), color=True, seed=0):
    """A folder an identity with so many images of a pattern each, of sizes from ``size`` on."""
    random = np.random.default_rng(seed)
    for identity, count in enumerate(counts):
        (folder / f"{identity:03d}").mkdir(parents=True)
        pattern = random.integers(0, 200, (8, 8, 3 if color else 1))
        for number in range(count):
            height, width = (side + random.integers(0, 9) for side in size)
            noise = random.integers(0, 55, (8, 8, 3 if color else 1))
            pixels = np.broadcast_to(pattern + noise, (8, 8, 3)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            image.save(folder / f"{identity:03d}" / f"{number}.png")
    return folder


@pytest.fixture
def faces(tmp_path):
    return write_folder(tmp_path / "faces", [6] * 12)


def told(printed):
    """What was printed, without the lines that a table is broken into."""
    return " ".join(printed.replace("│", " ").split())


class Page(HTMLParser):
    """What a page holds, and that its elements are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.images += [found["src"]] if tag == "img" else []
        self.loads += [value for name, value in attributes if name in ("src", "href", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_folder_becomes_a_judged_model(faces, gif, tmp_path):
    output = tmp_path / "run"
    command = ["run", "--data", faces, "--output", output, "--epochs=2"]
    (faces / "000" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))  # damaged
    (faces / "notes.txt").write_text("not an image")
    code, printed = gif(*command)
    assert code == 0 and "more than a fifth, for enough pairs to judge by" in told(printed)

    sections = read_sections(output / "config.yaml")
    assert {*STAGES, "run"} == set(sections)
    train = sections["train"]
    assert train["backbone"]["channels"] == 3 and train["backbone"]["image_size"] == 32  # sides from 40 to 48
    assert train["augmentation"] == "photo" and train["statistics"] == "recomputed"
    split = load_data(str(faces), held_out=train["held_out"], decoder=ImageDecoder(32))
    assert split.held_out.num_identities == train["held_out"] == sections["evaluate"]["held_out"]
    trained = set(Identities.load(output / "gif" / "identities.safetensors").names)
    assert trained == set(split.train.names) and not trained & set(split.held_out.names)

    text = (output / "report.html").read_text()
    page = Page(text)
    assert len(page.images) == 12 and all(image.startswith("data:image/png;base64,") for image in page.images)
    assert all(place.startswith(("data:", "#")) for place in page.loads)  # nothing is fetched from anywhere
    for words in ("000/0.png", "notes.txt", "false-accept rate", "Two identities, highest cosines", "because"):
        assert words in page.text or words.lower() in text
    markdown = (output / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(pictures) == 12 and all((output / place).read_bytes()[:4] == b"\x89PNG" for place in pictures)

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    code, printed = gif(*command)
    assert code == 0 and "already finished" in printed and "rank-1" in printed  # the rates once more
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    code, printed = gif(*command[:-1], "--epochs=3")
    assert code == 1 and "epochs is 2 there and 3 here" in printed


def test_every_stage_takes_the_config(faces, gif, tmp_path):
    output = tmp_path / "run"
    assert gif("run", "--data", faces, "--output", output, "--epochs=1", "--until=judge")[0] == 0
    config = output / "config.yaml"
    assert not (output / "report.html").exists()
    for stage in ("vectors", "spread", "tokenize"):
        name = "codes" if stage == "tokenize" else stage
        other = tmp_path / f"{name}.safetensors"
        assert gif(stage, "--config", config, "--output", other)[0] == 0
        assert other.read_bytes() == (output / other.name).read_bytes()
    assert gif("train", "--config", config, "--output", tmp_path / "other")[0] == 0
    mine, theirs = (
        load_backbone(folder / "backbone.safetensors")[0] for folder in (tmp_path / "other", output / "gif")
    )
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert gif("evaluate", "--config", config, "--output", tmp_path / "judged")[0] == 0
    judged = [json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path / "judged", output / "gif")]
    assert judged[0]["held_out"] == judged[1]["held_out"]
    code, printed = gif("plan", "--config", config)
    assert code == 1 and "and none for plan" in printed
    assert gif("run", "--config", config)[0] == 0  # its own section too: the run goes on
    assert (output / "report.html").exists()


def test_words_of_glyphs(gif, tmp_path, monkeypatch, make_halves):
    """A data set that is computed, whose judgement is of letters never seen, in several sets."""
    halves = {
        part: make_halves(seed, letters=20, size=16, begin=0x4E00 + 100 * seed) for seed, part in enumerate(PARTS)
    }
    monkeypatch.setattr(word_sets, "glyph_halves", lambda **options: halves)
    command = ["run", "--data=glyph-words", "--identities=30", "--output", tmp_path / "run", "--steps=4"]
    code, printed = gif(*command)
    assert code == 0 and "words are split by their letters" in told(printed), printed
    found = json.loads((tmp_path / "run" / "gif" / "evaluation.json").read_text())["held_out"]
    assert set(found) == set(SETS)
    train = read_sections(tmp_path / "run" / "config.yaml")["train"]
    assert train["data"] == "glyph-words" and train["identities"] == 30 and train["backbone"]["channels"] == 1
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "30 identities" in page.text and "alike" in page.text
    code, printed = gif(*command)
    assert code == 0 and "already finished" in printed
    code, printed = gif(*command[:3], "--output", tmp_path / "other", "--held_out=0.3")
    assert code == 1 and "split by letter" in printed and not (tmp_path / "other").exists()


def test_choices_may_be_changed_before_the_work(faces, gif, tmp_path):
    output = tmp_path / "run"
    command = ["run", "--data", faces, "--output", output, "--epochs=1"]
    assert gif(*command, "--until=choices")[0] == 0
    config = output / "config.yaml"
    settings = config.read_text()
    for typo, message in (
        ("vocab_sizes:", "tokenize: .*vocab_sizes"),
        ("vocab_size: many #", "tokenize: .*vocab_size"),
    ):
        config.write_text(settings.replace("vocab_size:", typo))
        code, printed = gif(*command)
        assert code == 1 and re.search(f"error: .*config.yaml, {message}", printed), printed
        assert not (output / "vectors.safetensors").exists()  # before any work
    config.write_text(settings.replace("width: 16\n", "width: 4\n"))
    code, printed = gif(*command)
    assert code == 0 and "as they were chosen before" in printed
    assert load_backbone(output / "gif" / "backbone.safetensors")[1].width == 4
    config.write_text("width: [")
    (output / "report.html").unlink()
    code, printed = gif(*command)
    assert code == 1 and "config.yaml is no YAML" in printed


def test_heads_beside(faces, gif, tmp_path):
    output = tmp_path / "run"
    command = ["run", "--data", faces, "--output", output, "--epochs=1"]
    assert gif(*command, "--beside", "full softmax", "GIF, published")[0] == 0
    page = (output / "report.html").read_text()
    assert page.count("full softmax") > 3 and (output / "gif-published" / "evaluation.json").exists()
    code, printed = gif("run", "--data", faces, "--output", tmp_path / "b", "--beside", '["arcface"]')
    assert code == 1 and "beside has arcface" in printed and "full softmax" in printed
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_goes_on_in_the_middle_of_training(faces, tmp_path, number):
    output = tmp_path / "run"
    line = [sys.executable, "-u", "-m", "gif.cli", "run", "--data", str(faces), "--output", str(output), "--steps=3000"]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(output.glob("gif/checkpoints/step-*")):  # after each epoch there is one
        assert running.poll() is None
    os.kill(running.pid, number)
    printed, _ = running.communicate(timeout=120)
    assert running.returncode != 0
    if number == signal.SIGINT:
        assert "the same command continues after step" in printed
    config = (output / "config.yaml").read_bytes()
    sections = read_sections(output / "config.yaml")
    steps = max(int(path.name.removeprefix("step-")) for path in output.glob("gif/checkpoints/step-*"))
    assert sections["train"]["training"]["steps"] == 3000 > steps > 0
    again = subprocess.run([*line, "--until=vectors"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "already done" in again.stdout
    assert (output / "config.yaml").read_bytes() == config


STAGES_CUT_SHORT = {  # what each stage does first: an interrupt there, and what is said of it
    "gif.run.command.survey": "interrupted; nothing was kept",
    "gif.vectors.commands.fitted_code_vectors": "[1/6] code vectors of the training identities: interrupted",
    "gif.vectors.commands.spread_code_vectors": "[2/6] spreading them over the sphere: interrupted",
    "gif.codes.commands.tokenize": "[3/6] identity codes: interrupted",
    "gif.training.command.train": "[4/6] training with GIF: interrupted",
    "gif.evaluation.command.write_outcomes": "[5/6] judging GIF on identities never seen: interrupted",
    "gif.run.command.write_report": "[6/6] the report: interrupted",
}


def test_an_interrupt_in_any_stage_and_files_that_are_gone(faces, gif, tmp_path, monkeypatch):
    """It says where it was and what is kept, exits with 130, and the same command goes on; so where files are gone."""
    command = ["run", "--data", faces, "--output", tmp_path / "run", "--epochs=1"]

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    for number, (place, message) in enumerate(STAGES_CUT_SHORT.items()):
        with monkeypatch.context() as patched:
            patched.setattr(place, interrupt)
            code, printed = gif(*command)
        assert code == 130 and message in printed, printed
        assert printed.count("already done") == max(0, number - 2)  # the one before was not
        if number > 1:
            assert printed.rstrip().endswith("what was done before it is kept") and "nothing was kept" not in printed
    code, printed = gif(*command)
    output = tmp_path / "run"
    assert code == 0 and "[6/6] the report: goes on" in printed and (output / "report.html").exists()

    # What is removed of a finished run the same command makes again, and does no stage that has all it makes.
    before = {path: path.read_bytes() for path in output.rglob("*.safetensors") if "checkpoints" not in path.parts}
    gone = ["data/data.json", "choices.json", "spread.json", "report.html"]
    gone += ["gif/losses.safetensors", "gif/evaluation.json"]
    for name in gone:
        (output / name).unlink()
    code, printed = gif(*command)
    assert code == 0 and "[1/6] code vectors of the training identities: already done" in printed, printed
    assert printed.count("goes on") == 4 and {path: path.read_bytes() for path in before} == before
    assert all((output / name).exists() for name in gone if name != "choices.json")  # whose reasons config.yaml has
    assert "this run is already finished" in gif(*command)[1]


class TestWhatCannotBeRun:
    @pytest.mark.parametrize(
        ("counts", "message"),
        [([], "no folder below"), ([5], "has 1 identity, and a judged model needs 4"), ([3, 3], "has 2 identities")],
    )
    def test_too_few(self, gif, tmp_path, counts, message):
        folder = tmp_path / "few"
        folder.mkdir()
        write_folder(folder, counts)
        code, printed = gif("run", "--data", folder, "--output", tmp_path / "run")
        assert code == 1 and message in printed and not (tmp_path / "run").exists()

    def test_an_identity_of_broken_images(self, faces, gif, tmp_path):
        for path in (faces / "003").iterdir():
            path.write_bytes(b"no image")
        code, printed = gif("run", "--data", faces, "--output", tmp_path / "run")
        assert code == 1 and "identities without an image that can be read: 1 (003)" in printed

    def test_an_output_of_something_else(self, faces, gif, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        code, printed = gif("run", "--data", faces, "--output", tmp_path / "mine")
        assert code == 1 and "holds something that is no run" in printed
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]

    def test_two_budgets(self, faces, gif, tmp_path):
        code, printed = gif("run", "--data", faces, "--output", tmp_path / "run", "--steps=5", "--minutes=1")
        assert code == 1 and "give one of minutes, steps and epochs" in printed

    def test_a_device_that_is_not_there(self, faces, gif, tmp_path, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        code, printed = gif("run", "--data", faces, "--output", tmp_path / "run", "--device=cuda")
        assert code == 1 and "cuda" in printed and not (tmp_path / "run").exists()

    def test_a_try_that_failed_before_its_choices_binds_nobody(self, gif, tmp_path):
        same = write_folder(tmp_path / "same", [1] * 4)
        for path in same.rglob("*.png"):
            path.write_bytes((same / "000" / "0.png").read_bytes())
        (same / "003" / "0.png").write_bytes(b"no image")
        command = ["run", "--data", same, "--output", tmp_path / "run", "--until=choices"]
        assert gif(*command, "--epochs=3")[0] == 1
        (tmp_path / "run" / "data").mkdir(parents=True, exist_ok=True)  # as of one that failed a little later
        (tmp_path / "run" / "settings.json").write_text('{"command": "run", "epochs": 3}')
        (same / "003" / "0.png").write_bytes((same / "000" / "0.png").read_bytes())
        code, printed = gif(*command, "--epochs=2")
        assert code == 0 and "the choices are in" in printed, printed

    def test_several_processes(self, faces, gif, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, printed = gif("run", "--data", faces, "--output", tmp_path / "run")
        assert code == 1 and "each stage to torchrun with --config" in printed


def test_one_image_an_identity_is_trained_on_and_not_judged(gif, tmp_path):
    folder = write_folder(tmp_path / "single", [1] * 20)
    code, printed = gif("run", "--data", folder, "--output", tmp_path / "run", "--epochs=1")
    assert code == 0 and "no genuine pair to judge by" in told(printed)
    assert "nobody was held out, so nothing is judged" in printed and "rank-1" not in printed
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "nothing is judged" in page.text and "Judgement" not in page.text


def images_of(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return IdentityImages(
        torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), labels, [f"i{k}" for k in range(len(counts))]
    )


@pytest.mark.parametrize(
    ("counts", "least", "most"),
    [
        ([12] * 60, 12, 12),  # a fifth: 12 identities of 12 images make 9,504 impostor pairs, and one more is enough
        ([5] * 10, 5, 5),  # a half, where a fifth has 25 pairs
        ([2] * 4, 2, 2),
        ([100] * 2000, 200, 200),  # no more than 20,000 images are judged
    ],
)
def test_held_out_are_enough_and_no_more(counts, least, most):
    data = images_of(counts)
    held = choices.choose_held_out(data, "data", None)
    assert least <= held.number <= most + 1
    assert choices.choose_held_out(data, "data", 0.3).number == 0.3


def test_of_many_identities_a_share_is_held_out():
    held = choices.choose_held_out(images_of([5] * 2000), "data", None)
    assert held.number == 0.2 and "names" in held.why


def test_survey_and_what_follows_from_it(tmp_path):
    gray = open_data(str(write_folder(tmp_path / "gray", [4] * 3, size=(60, 70), color=False)))
    seen = survey(gray)
    assert seen.colored == 0 and 60 <= seen.sides < 70 and not seen.fixed
    assert choices.choose_channels(seen, gray).value == 1
    assert choices.choose_size(seen, gray).value == 64 - 64 % 16
    aligned = open_data(str(write_folder(tmp_path / "aligned", [4] * 3, size=(104, 104))))
    for path in (tmp_path / "aligned").rglob("*.png"):
        Image.open(path).resize((112, 112)).save(path)
    seen = survey(aligned)
    assert choices.choose_size(seen, aligned).value == 112
    assert choices.choose_augmentation(seen, aligned).value == "mirror"
    assert choices.choose_channels(seen, aligned).value == 3
    drawn = images_of([3] * 4)
    assert choices.choose_augmentation(survey(drawn), drawn).value == "affine"
    for path in (tmp_path / "aligned").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="can be read"):
        survey(aligned)


def test_steps_follow_the_budget():
    assert choices.choose_steps(Budget(steps=7), 1000, 100, float("nan")).value == 7
    assert choices.choose_steps(Budget(epochs=3), 1000, 100, float("nan")).value == 30
    assert choices.choose_steps(Budget(minutes=2), 1000, 100, 0.5).value == 240
    assert choices.choose_steps(Budget(), 1000, 100, 6.0).value == 100  # ten minutes
    assert choices.choose_steps(Budget(), 1000, 100, 0.001).value == 10 * choices.wanted_epochs(1000)
    with pytest.raises(InputError, match="one of"):
        Budget(steps=1, epochs=1)


def test_the_largest_network_that_there_is_time_for():
    tried = [BackboneConfig(width=width) for width in (32, 16, 8)]
    took = {32: 10.0, 16: 1.0, 8: 0.1}
    found, why = choices.choose_network(tried, lambda network: took[network.width], 100, 120.0)
    assert found.backbone.width == 16 and "1000 ms" in why
    found, _ = choices.choose_network(tried, lambda network: took[network.width], 10_000, 120.0)
    assert found.backbone.width == 8


def test_a_config_may_hold_sections():
    commands = dict.fromkeys(("train", "spread", "data"))
    text = "train: {lr: 1}\nspread: {epochs: 2}\n"
    assert json.loads(section_of(Path("c"), text, "spread", commands)) == {"epochs": 2}
    assert section_of(Path("c"), "data: glyphs\n", "train", commands) == "data: glyphs\n"
    with pytest.raises(InputError, match="none for data"):
        section_of(Path("c"), text, "data", commands)


def test_config_of_a_run_refuses_an_unknown_head():
    with pytest.raises(InputError, match="beside has nobody"):
        RunConfig(data="glyphs", beside=["nobody"])


def test_mixed_images_are_as_many_as_asked_for(tmp_path, monkeypatch):
    drawings = torch.rand(40, 1, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    data = IdentityImages(drawings, torch.arange(8).repeat_interleave(5), list("abcdefgh"))
    monkeypatch.setattr("benchmarks.mixed_images.open_data", lambda name: data)
    write_mixed_images(tmp_path / "a", identities=6, images=20)
    write_mixed_images(tmp_path / "b", identities=6, images=20)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 20 and len({path.parent for path in files}) == 6
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    assert {path.suffix for path in files} == {".jpg", ".png"}
