"""Verification .bin files: pickles of both Pythons, written here opcode by opcode, and what must not be unpickled."""

import pickle
import random
import struct
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from gif.data import BrokenImageError, ImageDecoder, read_bin
from gif.data.convert import convert
from gif.data.pairs import read_pairs
from gif.errors import InputError

IMAGES = [b"first", b"second \x80\xff", b"third" * 99, b""]
ISSAME = [True, False]


ARRAYS = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
KINDS = {
    "bytes": (IMAGES, ISSAME),
    "bytearrays": ([bytearray(image) for image in IMAGES], ISSAME),
    "arrays": (ARRAYS, [np.bool_(same) for same in ISSAME]),
    "arrays of others' memory": ([np.frombuffer(image, np.uint8) for image in IMAGES], ISSAME),
    "array of objects": (np.array([*IMAGES, None], dtype=object)[:-1], np.array(ISSAME)),
    "array of strings": (np.array(IMAGES), np.array([1, 0], np.uint8)),
    "numbers": (tuple(IMAGES), [1, 0]),
    "NumPy's numbers": (IMAGES, [np.int64(1), np.uint8(0)]),
    "whole numbers": (IMAGES, np.array([1, 0])),
    "the other end first": (IMAGES, np.array([1, 0], ">i4")),
}


def python2(images, issame, arrays=False):
    """What Python 2's cPickle writes at protocol 2: its str are BINSTRING, its arrays hold str."""

    def text(data):
        return b"T" + struct.pack("<i", len(data)) + data

    def array(data):
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return new + b"(K\x01(J" + struct.pack("<i", len(data)) + b"t" + dtype + b"\x89" + text(data) + b"tb"

    items = b"".join(map(array if arrays else text, images))
    flags = b"".join(b"\x88" if same else b"\x89" for same in issame)
    return b"\x80\x02(](" + items + b"e](" + flags + b"et."


def write(folder, content):
    (folder / "lfw.bin").write_bytes(content)
    return folder / "lfw.bin"


@pytest.mark.parametrize("arrays", [False, True])
def test_python_2(tmp_path, arrays):
    pairs = read_bin(write(tmp_path, python2(IMAGES, ISSAME, arrays)))
    assert pairs.encoded == IMAGES and pairs.issame.tolist() == ISSAME and pairs.issame.dtype == torch.bool


PYTHON_2_TEXT = (  # protocol 0: (list of str, list of bool and numpy.bool_), as Python 2.7 with NumPy 1.16 writes it
    rb"""((lp0
S'first'
p1
aS"second \x80\xff'"
p2
ag1
aS''
p3
a(lp4
I01
acnumpy.core.multiarray
scalar
p5
(cnumpy
dtype
p6
(S'b1'
p7
I0
I1
tp8
Rp9
(I3
S'|'
p10
NNNI-1
I-1
I0
tp11
bS'\x00'
p12
tp13
Rp14
atp15
."""
)


def test_python_2_in_text(tmp_path):
    pairs = read_bin(write(tmp_path, PYTHON_2_TEXT))
    assert pairs.encoded == [b"first", b"second \x80\xff'", b"first", b""]
    assert pairs.issame.tolist() == [True, False]


def test_python_2_scalars(tmp_path):
    """numpy.bool_ as cPickle writes it at protocol 2: the dtype once, then from the memo."""
    strings = b"".join(b"U" + bytes([len(image)]) + image for image in IMAGES[:2])
    dtype = b"cnumpy\ndtype\nq\x01U\x02b1q\x02K\x00K\x01\x87q\x03Rq\x04"
    dtype += b"(K\x03U\x01|q\x05NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x06b"
    same = b"cnumpy.core.multiarray\nscalar\nq\x07" + dtype + b"U\x01\x01q\x08\x86q\x09Rq\x0a"
    other = b"h\x07h\x04U\x01\x00\x86R"
    for flag, expected in ((same, True), (same + b"0" + other, False)):
        content = b"\x80\x02]q\x00(" + strings + b"e](" + flag + b"e\x86."
        pairs = read_bin(write(tmp_path, content))
        assert pairs.encoded == IMAGES[:2] and pairs.issame.tolist() == [expected]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_python_3(tmp_path, protocol, kind):
    pairs = read_bin(write(tmp_path, pickle.dumps(KINDS[kind], protocol)))
    assert pairs.encoded == IMAGES and pairs.issame.tolist() == ISSAME


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(("old", "new"), [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")])
def test_numpy_by_its_old_and_new_names(tmp_path, protocol, old, new):
    content = pickle.dumps(KINDS["arrays"], protocol)
    if protocol >= 4:  # names are counted strings there
        counted = [
            (b"\x8c" + bytes([len(o)]) + o, b"\x8c" + bytes([len(n)]) + n)
            for o, n in ((old + end, new + end) for end in (b".multiarray", b".numeric"))
        ]
        content = content[:2] + content[11:]  # without the frame, whose length changes
        for before, after in counted:
            content = content.replace(before, after)
    else:
        content = content.replace(old, new)
    pairs = read_bin(write(tmp_path, content))
    assert pairs.encoded == IMAGES and pairs.issame.tolist() == ISSAME


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        Evil(print, "ran"),
        Evil(eval, "print('ran')"),
        Evil(__import__("os").system, "echo ran"),
        Evil(np.load, "lfw.bin"),
        Evil(getattr, "x", "upper"),
        Evil(__import__("codecs").encode, "ran", "rot13"),
    ],
)
def test_nothing_else_is_unpickled(tmp_path, capfd, evil):
    path = write(tmp_path, pickle.dumps(([evil, b""], [True])))
    with pytest.raises(ValueError, match=r"no verification \.bin file: (it refers to|the codec rot13)"):
        read_bin(path)
    assert "ran" not in capfd.readouterr().out


def name(module, attribute):
    return b"c" + module + b"\n" + attribute + b"\n"


def text(data):
    return b"X" + struct.pack("<I", len(data)) + data


def binary(data):
    return b"B" + struct.pack("<I", len(data)) + data


POINTER = b"A" * 8
OBJECTS = name(b"numpy", b"dtype") + b"(" + text(b"O") + b"tR"
CALLS = {
    "an array over bytes": name(b"numpy", b"ndarray") + b"(K\x01\x85" + OBJECTS + binary(POINTER) + b"tR",
    "an array's constructor": name(b"numpy", b"ndarray") + b"(J\xff\xff\xff\x7f\x85tR",
    "pointers in an array's state": name(b"numpy.core.multiarray", b"_reconstruct")
    + b"(" + name(b"numpy", b"ndarray") + b"K\x00\x85" + binary(b"b") + b"tR(K\x01K\x01\x85"
    + OBJECTS + b"\x89" + binary(POINTER) + b"tb",
    "a dtype of any size": name(b"numpy", b"dtype") + b"(" + text(b"V1") + b"tR(K\x03" + text(b"|")
    + b"NNNJ\xff\xff\xff\x7fK\x01K\x00tb",
    "a scalar of pointers": name(b"numpy.core.multiarray", b"scalar") + b"(" + OBJECTS + binary(POINTER) + b"tR",
    "bytes of a number": name(b"builtins", b"bytes") + b"(J\xff\xff\xff\x7ftR",
    "a subclass": name(b"numpy.core.multiarray", b"_reconstruct")
    + b"(" + name(b"numpy", b"dtype") + b"K\x00\x85" + binary(b"b") + b"tR",
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_numpy_is_not_called(tmp_path, call):
    content = b"\x80\x03(](" + binary(b"a") + binary(b"b") + b"e](" + CALLS[call] + b"et."
    with pytest.raises(ValueError, match=r"damaged, or no verification \.bin file|truth value 0 is a"):
        read_bin(write(tmp_path, content))


BOMBS = {
    "nine bytes that name a place in the memo": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "a length that is not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a number of a million bytes": b"\x80\x02\x8b" + struct.pack("<I", 1_000_000) + b"\xff" * 1_000_000 + b".",
    "lists of nothing": b"]" * 2_000_000 + b".",
    "one text, encoded anew each time": text(b"x" * 100_000) + b"q\x000"
    + (name(b"_codecs", b"encode") + b"(h\x00X\x06\0\0\0latin1tR0") * 4_000 + b".",
    "strings of no length": name(b"numpy.core.multiarray", b"_reconstruct") + b"(" + name(b"numpy", b"ndarray")
    + b"K\x00\x85" + binary(b"b") + b"tR(K\x01J\xff\xff\xff\x7f\x85" + name(b"numpy", b"dtype") + b"("
    + text(b"S0") + b"tR\x89" + binary(b"") + b"tb.",
    "rows of no length": name(b"numpy.core.multiarray", b"_reconstruct") + b"(" + name(b"numpy", b"ndarray")
    + b"K\x00\x85" + binary(b"b") + b"tR(K\x01J\xff\xff\xff\x7fK\x00\x86" + name(b"numpy", b"dtype") + b"("
    + text(b"u1") + b"tR\x89" + binary(b"") + b"tb.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_follows_the_files_size(tmp_path, bomb):
    path = write(tmp_path, BOMBS[bomb])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"lfw\.bin"):
            read_bin(path)
        assert tracemalloc.get_traced_memory()[1] < 200e6  # bytes, of files of up to 2 MB
    finally:
        tracemalloc.stop()


def test_damage_of_any_kind_is_one_error(tmp_path):
    """Bytes changed, removed, inserted, moved from one file into another: an error of ours, or pairs."""
    files = [python2(IMAGES, ISSAME), python2(IMAGES, ISSAME, arrays=True), PYTHON_2_TEXT]
    files += [pickle.dumps(content, protocol) for content in KINDS.values() for protocol in range(6)]
    rng = random.Random(0)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that are none, in strings of protocol 0
        for _ in range(1_500):
            content = bytearray(rng.choice(files))
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(content))
                other = rng.choice(files)
                begin = rng.randrange(len(other))
                part = [b"", rng.randbytes(rng.randint(1, 6)), other[begin : begin + rng.randint(1, 60)]]
                content[place : place + rng.choice((0, 1, 9))] = rng.choice(part)
            try:
                read_bin(write(tmp_path, content))
            except InputError:
                refused += 1
    assert refused > 750


def test_damage(tmp_path):
    whole = pickle.dumps((IMAGES, ISSAME))
    for content in (b"", whole[:-40], whole[:1], b"\x80\x04" + b"\xff" * 30, b"not a pickle", python2(IMAGES, [])[:-9]):
        with pytest.raises(ValueError, match=r"lfw\.bin is damaged, or no verification \.bin file"):
            read_bin(write(tmp_path, content))
    for content, message in (
        (IMAGES, "no two lists"),
        ({"bins": IMAGES}, "no two lists"),
        ((IMAGES, 2), "no two lists"),
        ((IMAGES, [True]), "4 images and 1 truth values; wanted 2n"),
        (([], []), "0 images and 0 truth values"),
        (([1, b""], [True]), "image 0 is a int, wanted bytes"),
        (([b"", np.zeros((2, 2), np.uint8)], [True]), "image 1 is a ndarray"),
        (([b"", np.zeros(2)], [True]), "image 1 is a ndarray"),
        (([b"", b""], [2]), "truth value 0 is 2"),
        (([b"", b""], [None]), "truth value 0 is None"),
    ):
        with pytest.raises(ValueError, match=message):
            read_bin(write(tmp_path, pickle.dumps(content)))
    with pytest.raises(FileNotFoundError):
        read_bin(tmp_path / "none.bin")


@pytest.fixture
def people(tmp_path, png):
    """Images name/name_0001.png and so on of two people, each of one colour."""
    for y, name in enumerate(("Ann", "Bob")):
        (tmp_path / name).mkdir()
        for i in (1, 2):
            image = torch.full((3, 4, 4), 100 * y + i, dtype=torch.uint8)
            (tmp_path / name / f"{name}_000{i}.png").write_bytes(png(image))
    return tmp_path


@pytest.mark.parametrize(
    "lines",
    [
        "Ann/Ann_0001.png Ann/Ann_0002.png 1\nBob/Bob_0001.png\tAnn/Ann_0002.png\t0\n",
        "1\t300\nAnn\t1\t2\nBob\t1\tAnn\t2\n",
    ],
)
def test_from_a_folder_and_pairs(people, lines):
    (people / "pairs.txt").write_text(lines)
    convert(str(people), people / "own.bin", pairs=people / "pairs.txt")
    pairs = read_bin(people / "own.bin")
    assert pairs.issame.tolist() == [True, False]
    batches = list(pairs.batches(3, ImageDecoder(4)))
    assert [len(batch) for batch in batches] == [3, 1]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [1, 2, 101, 2]
    images, issame = pickle.loads((people / "own.bin").read_bytes(), encoding="bytes")  # as insightface reads it
    assert images == pairs.encoded and issame == [True, False]


def test_a_list_with_a_byte_order_mark(people):
    (people / "pairs.txt").write_bytes(b"\xef\xbb\xbfAnn/Ann_0001.png Ann/Ann_0002.png 1\r\n")
    assert read_pairs(people / "pairs.txt", people)[0][0] == people / "Ann/Ann_0001.png"
    (people / "pairs.txt").write_bytes(b"Jos\xe9 1 2\n")
    with pytest.raises(InputError, match=r"pairs\.txt is no UTF-8 text"):
        read_pairs(people / "pairs.txt", people)


def test_pair_errors(people):
    path = people / "pairs.txt"
    for text, message in (("", "names no pair"), ("1 300\n\nAnn 1 Bob\n", "line 3: 'Ann 1 Bob'"), ("a b 2", "line 1")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs(path, people)
    path.write_text("Ann 1 7\n")
    with pytest.raises(FileNotFoundError, match=r"Ann_0007\.jpg"):
        convert(str(people), people / "own.bin", pairs=path)
    assert not (people / "own.bin").exists()


def test_a_broken_image_is_named(tmp_path, png):
    image = png(torch.zeros(3, 4, 4, dtype=torch.uint8))
    pairs = read_bin(write(tmp_path, pickle.dumps(([image] * 3 + [image[:40]], ISSAME))))
    with pytest.raises(BrokenImageError, match="image 1 of pair 1 is broken"):
        list(pairs.batches(2, ImageDecoder(4)))
    with pytest.raises(BrokenImageError, match=r"of 4 images are broken: 1 \(image 1 of pair 1\)"):
        pairs.check(ImageDecoder(4))


def test_a_name_in_a_file_controls_no_terminal(tmp_path):
    (tmp_path / "p.bin").write_bytes("cos\x1b[2J\r\x85".encode() + b"x" * 5000 + b"\nsystem\n.")
    with pytest.raises(InputError, match=r"refers to os\\x1b\[2J\\r\\x85x+, which") as raised:
        read_bin(tmp_path / "p.bin")
    assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 500
