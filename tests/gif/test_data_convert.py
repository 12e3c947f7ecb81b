"""Converting data sets, whatever happens on the way, and saying what is in them."""

import os
import struct
import subprocess
import sys
import tarfile
from typing import Any

import pytest
import torch

from gif import cli, resume
from gif.data import IdentityImages, ImageDecoder, load_data, loading, open_data
from gif.data import convert as convert_module
from gif.data.convert import convert
from gif.data.inspection import inspect
from gif.data.loading import find_data
from gif.errors import InputError
from gif.progress import console

FORMATS = ("folder", "rec", "tar")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def faces(tmp_path, jpeg):
    """4 identities with 3 to 6 images; an image of the third is broken."""
    for y, name in enumerate(("ann", "bob", "çan", "d/dee")):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for i in range(3 + y):
            (tmp_path / "faces" / name / f"{i}.jpg").write_bytes(jpeg(16, 16))
    (tmp_path / "faces" / "çan" / "1.jpg").write_bytes(b"not an image")
    return tmp_path / "faces"


def contents(path):
    """Each identity's images, as they are stored."""
    found = find_data(str(path))
    images: dict[str, Any] = {}
    for row, label in enumerate(found.labels.tolist()):
        images.setdefault(found.names[label], []).append(found.source.read(row))
    return images


@pytest.fixture
def whole(faces):
    expected = contents(faces)
    expected["çan"] = [image for image in expected["çan"] if image != b"not an image"]
    return expected


@pytest.mark.parametrize("to", FORMATS)
def test_there_and_back(faces, whole, tmp_path, to):
    with console.capture() as capture:
        convert(str(faces), tmp_path / "out", to=to, shard_size=4)
    assert contents(tmp_path / "out") == whole
    assert "wrote 17 images of 4 identities" in capture.get() and "1 of 18 images were broken" in capture.get()
    convert(str(tmp_path / "out"), tmp_path / "back")
    assert contents(tmp_path / "back") == whole
    assert not list(tmp_path.glob(".*"))


def test_rec_is_insightfaces(faces, tmp_path):
    """The bytes, read here: the first record, an image's, an identity's, the .idx, and `property`."""
    convert(str(faces), tmp_path / "out", to="rec")
    content = (tmp_path / "out" / "train.rec").read_bytes()
    index = (tmp_path / "out" / "train.idx").read_text().splitlines()
    offsets = {int(key): int(offset) for key, offset in (line.split("\t") for line in index)}
    assert sorted(offsets) == list(range(22)) and offsets[0] == 0
    assert struct.unpack_from("<IIIfQQ2f", content) == (0xCED7230A, 32, 2, 0.0, 0, 0, 18.0, 22.0)
    magic, length, flag, label, key, other = struct.unpack_from("<IIIfQQ", content, offsets[4])
    assert (magic, flag, label, key, other) == (0xCED7230A, 0, 1.0, 4, 0)
    assert content[offsets[4] + 32 :][: length - 24] == (faces / "bob" / "0.jpg").read_bytes()
    ranges = [struct.unpack_from("<I4xIfQQ2f", content, offsets[key])[-2:] for key in range(18, 22)]
    assert ranges == [(1.0, 4.0), (4.0, 8.0), (8.0, 14.0), (14.0, 18.0)]
    assert (tmp_path / "out" / "property").read_text().strip() == "4,112,112"


def test_shards_are_webdatasets(faces, tmp_path):
    convert(str(faces), tmp_path / "out", to="tar", shard_size=10)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.tar", "000001.tar", "identities.txt"]
    with tarfile.open(tmp_path / "out" / "000001.tar") as shard:
        assert shard.getnames()[:2] == ["000000010.jpg", "000000010.cls"] and len(shard.getnames()) == 14
        assert shard.extractfile("000000016.cls").read() == b"3"


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("stopped_at", [2, 5, 9, 17])
def test_a_stopped_conversion_continues(faces, whole, tmp_path, monkeypatch, to, stopped_at):
    class Stopped(BaseException):
        """As if killed: nothing is kept on the way out."""

    convert(str(faces), tmp_path / "once", to=to, shard_size=4)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "once").rglob("*") if path.is_file()}
    read, suffix = [], convert_module.suffix

    def counted(encoded):
        read.append(encoded)
        if len(read) == stopped_at:
            raise Stopped
        return suffix(encoded)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "suffix", counted)
        patch.setattr(resume, "LARGEST_SHARE", float("inf"))
        patch.setattr(resume, "SECONDS", 0.0)  # the state is kept after each image
        with pytest.raises(Stopped):
            convert(str(faces), tmp_path / "out", to=to, shard_size=4)
        assert not (tmp_path / "out").exists()
        with pytest.raises(ValueError, match="checkpoint of another run"):
            convert(str(faces), tmp_path / "out", to=to, shard_size=5)
        for path in sorted((tmp_path / ".out.partial").glob("*.tar"))[-1:]:
            path.write_bytes(path.read_bytes() + b"half an image")  # which was not kept
        convert(str(faces), tmp_path / "out", to=to, shard_size=4)
    assert len(read) == 18 + 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == expected
    assert contents(tmp_path / "out") == whole


def test_interrupted_before_anything_was_kept(faces, whole, tmp_path, monkeypatch):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "leftover.tar").write_bytes(b"x")
    convert(str(faces), tmp_path / "out", to="tar")
    assert contents(tmp_path / "out") == whole


def test_drawn_images_become_files(tmp_path, monkeypatch):
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    data = IdentityImages(images, torch.tensor([1, 0, 1, 0, 1, 0]), ["A", "Б"])
    monkeypatch.setitem(loading.NAMES, "glyphs", lambda: data)
    convert("glyphs", tmp_path / "out")
    back = open_data(str(tmp_path / "out"), decoder=ImageDecoder(8, channels=1))
    assert back.names == ["A", "Б"]
    assert torch.equal(back.batch(list(range(6)))[0], images[[1, 3, 5, 0, 2, 4]])


def test_errors(faces, tmp_path, jpeg):
    with pytest.raises(ValueError, match=r"output .*train\.rec looks like a file; give a folder"):
        convert(str(faces), tmp_path / "train.rec", to="rec")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(str(faces), faces)
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        convert(str(faces), tmp_path / "out", to="tar", shard_size=0)
    with pytest.raises(ValueError, match=r"çan/1\.jpg is a broken image: it is no JPEG"):
        convert(str(faces), tmp_path / "out", on_broken="raise")
    with pytest.raises(ValueError, match="no file or folder"):
        convert(str(tmp_path / "none"), tmp_path / "out")
    with pytest.raises(ValueError, match="to must be"):
        convert(str(faces), tmp_path / "out", to="lmdb")  # type: ignore[arg-type]
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as shard:
        for name, data in (("0.jpg", jpeg()), ("0.cls", b"../../elsewhere")):
            (tmp_path / name).write_bytes(data)
            shard.add(tmp_path / name, name)
    with pytest.raises(ValueError, match=r"identity '\.\./\.\./elsewhere' cannot name a folder"):
        convert(str(tmp_path / "shards"), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def folder_called(name, image, root):
    os.makedirs(os.path.join(os.fsencode(root), name))
    with open(os.path.join(os.fsencode(root), name, b"0.jpg"), "wb") as file:
        file.write(image)


@pytest.mark.parametrize("to", FORMATS)
def test_names_that_are_no_line(faces, tmp_path, jpeg, to):
    """A line break in a name would shift all others in identities.txt: refused before anything is written."""
    folder_called(b"a\nb", jpeg(), faces)
    if to == "folder":
        convert(str(faces), tmp_path / "out", to=to)
        assert open_data(str(tmp_path / "out")).names == open_data(str(faces)).names
    else:
        with pytest.raises(InputError, match=r"identity 'a\\nb' is no line of identities\.txt"):
            convert(str(faces), tmp_path / "out", to=to)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_names_that_are_no_utf_8(faces, tmp_path, jpeg, to):
    image = jpeg()
    folder_called(b"jos\xe9", image, faces)
    convert(str(faces), tmp_path / "out", to=to)
    assert contents(tmp_path / "out")["jos\\xe9"] == [image]
    assert open_data(str(tmp_path / "out")).names == open_data(str(faces)).names


def test_names_that_a_folder_cannot_have(faces, tmp_path):
    convert(str(faces), tmp_path / "rec", to="rec")
    for names, message in ((".ann\nbob", "'.ann' cannot name a folder"), ("ann\nann", "2 identities are called 'ann'")):
        (tmp_path / "rec" / "identities.txt").write_text(f"{names}\nx\ny\n")
        with pytest.raises(InputError, match=message):
            convert(str(tmp_path / "rec"), tmp_path / "out")


def test_what_was_left_out_is_named(faces, tmp_path, gif):
    for path in (faces / "bob").iterdir():
        path.write_bytes(b"?")
    (faces / "eve").mkdir()
    code, printed = gif("data", "convert", "--data", faces, "--output", tmp_path / "out", "--to", "tar")
    assert code == 0 and "wrote 13 images of 3 identities" in printed
    assert "1 identities have no image that could be read and were left out: bob" in printed
    assert "folders without an image: 1 (eve)" in printed


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_commands_with_names_of_any_bytes(faces, tmp_path, jpeg, encoding):
    """Each in a process of its own, whose output knows the encoding: nothing fails when the work is done."""
    folder_called(b"jos\xe9", jpeg(), faces)
    (faces / "bob" / "new\nline.jpg").write_bytes(b"?")
    data = ["--data", str(faces), "--held_out", "2"]
    for arguments in (
        ["data", "inspect", "--data", str(faces), "--output", str(tmp_path / "report")],
        ["vectors", *data, "--output", str(tmp_path / "v.safetensors"), "--width", "16"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", "gif.cli", *arguments],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    lines = (tmp_path / "report" / "broken.txt").read_text().splitlines()
    assert lines == [f"{faces}/bob/new\\nline.jpg", f"{faces}/çan/1.jpg"]


def test_vectors_need_an_image_of_each(faces, tmp_path, gif):
    for path in (faces / "bob").iterdir():
        path.write_bytes(b"?")
    data = ("--data", faces, "--held_out", "0")
    code, printed = gif("vectors", *data, "--output", tmp_path / "v.safetensors", "--width", "16")
    assert code == 1 and "identities without an image that can be read: 1 (bob)" in printed
    assert "encoding images" not in printed


@pytest.mark.parametrize("workers", [0, 2])
def test_inspect(faces, tmp_path, workers):
    with console.capture() as capture:
        inspect(str(faces), output=tmp_path / "report", workers=workers)
    text = capture.get()
    for line in ("identities", "4", "images an identity, median", "4.5", "1 of 18 images are broken", "çan/1.jpg"):
        assert line in text
    assert (tmp_path / "report" / "broken.txt").read_text() == f"{faces}/çan/1.jpg\n"
    assert (tmp_path / "report" / "long-tail.png").read_bytes()[:4] == b"\x89PNG"


def test_inspect_where_everything_is_broken(faces):
    for path in faces.rglob("*.jpg"):
        path.write_bytes(b"BM")
    with console.capture() as capture:
        inspect(str(faces))
    assert "18 of 18 images are broken" in capture.get()


def test_the_way_of_a_user(faces, tmp_path, monkeypatch):
    """A folder of images to a trained and judged backbone, by the commands alone."""

    def gif(*arguments):
        monkeypatch.setattr("sys.argv", ["gif", *map(str, arguments)])
        cli.main()

    gif("data", "inspect", "--data", faces)
    gif("data", "convert", "--data", faces, "--output", tmp_path / "rec", "--to", "rec")
    run, data = tmp_path / "run", ["--data", tmp_path / "rec", "--held_out", "2"]
    vectors, codes = tmp_path / "vectors.safetensors", tmp_path / "codes.safetensors"
    gif("vectors", *data, "--output", vectors, "--width", "16")
    gif("tokenize", "--vectors", vectors, "--output", codes, "--vocab_size", "5")
    network = [
        "--backbone.embedding_size=16",
        "--backbone.image_size=16",
        "--backbone.width=4",
        "--backbone.channels=3",
    ]
    gif("train", *data, "--codes", codes, "--vectors", vectors, "--output", run, *network, "--training.epochs=1",
        "--training.batch_size=4")  # fmt: skip
    gif("evaluate", *data, "--model", run / "backbone.safetensors")
    assert (run / "evaluation.json").exists()
    assert len(load_data(str(tmp_path / "rec"), held_out=2).train.names) == 2
