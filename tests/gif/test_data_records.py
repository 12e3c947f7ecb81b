"""RecordIO, on files made here from the byte layout with struct alone."""

import os
import pickle
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gif.data import EncodedImages, ImageDecoder, left_out, open_data
from gif.data.records import pack_record, read_record, read_records
from gif.data.stored import MappedFile
from gif.errors import InputError

MAGIC = struct.pack("<I", 0xCED7230A)
JPEG = b"\xff\xd8\xff\xe0"  # how an image begins; what follows is not looked at before decoding


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def part(data, kind=0):
    return MAGIC + struct.pack("<I", kind << 29 | len(data)) + data + bytes(-len(data) % 4)


def header(label, key, *labels):
    flag = len(labels)
    return struct.pack("<IfQQ", flag, label, key, 0) + struct.pack(f"<{flag}f", *labels)


def write(folder, records, keys=None, order=None):
    """A .rec file of (key, bytes of its parts), in this order, and its .idx with the lines in ``order``."""
    content, lines = b"", []
    for key, record in records:
        lines.append(f"{key}\t{len(content)}\n")
        content += record
    (folder / "train.rec").write_bytes(content)
    (folder / "train.idx").write_text("".join(lines[i] for i in order or range(len(lines))))
    return folder / "train.rec"


def insightface(images, labels, start=None):
    """Records in insightface's dialect: the first names where keys end, one an identity follows the images."""
    n, m = len(images), max(labels) + 1
    start = n + 1 if start is None else start
    records = [(0, part(header(0.0, 0, start, n + 1 + m)))]
    records += [(key, part(header(labels[key - 1], key) + images[key - 1])) for key in range(1, n + 1)]
    ends = np.searchsorted(labels, range(m + 1)) + 1
    records += [(n + 1 + y, part(header(0.0, n + 1 + y, ends[y], ends[y + 1]))) for y in range(m)]
    return records


def im2rec(images, labels):
    return [(key, part(header(label, key) + image)) for key, (image, label) in enumerate(zip(images, labels))]  # noqa: B905


IMAGES = [JPEG + bytes([i]) * (i * 3 + 1) for i in range(7)]
LABELS = [0, 0, 1, 1, 1, 2, 3]


def everything(found):
    return [found.source.read(row) for row in range(len(found.source))]


@pytest.mark.parametrize("dialect", [insightface, im2rec])
@pytest.mark.parametrize("index", ["in order", "out of order", "none"])
def test_both_dialects(tmp_path, dialect, index):
    records = dialect(IMAGES, LABELS)
    order = torch.randperm(len(records)).tolist() if index == "out of order" else None
    path = write(tmp_path, records, order=order)
    if index == "none":
        path.with_suffix(".idx").unlink()
    found = read_records(path)
    assert everything(found) == IMAGES
    assert found.labels.tolist() == LABELS and list(found.names) == ["0", "1", "2", "3"]


def test_records_may_lie_in_any_order(tmp_path):
    records = im2rec(IMAGES, LABELS)
    path = write(tmp_path, [records[i] for i in (3, 0, 6, 1, 5, 2, 4)])
    assert everything(read_records(path)) == IMAGES


def test_many_labels_and_gaps(tmp_path):
    """The first of several labels counts; a record 0 with several labels and an image is im2rec's."""
    path = write(tmp_path, [(k, part(header(0.0, k, label, 9.0) + IMAGES[k])) for k, label in enumerate([5, 2, 5])])
    found = read_records(path)
    assert found.labels.tolist() == [1, 0, 1] and found.names == ["2", "5"]
    assert everything(found) == IMAGES[:3]


def test_parts_are_joined_by_the_magic(tmp_path):
    """An image that holds the magic number, aligned, lies in several parts; the first cut may be in the header."""
    one = header(1.0, 7) + JPEG + b"abcd" + MAGIC + b"efgh" + MAGIC + b"xyz"
    first, middle, last = one.split(MAGIC)
    two = header(0.0, 0xCED7230A) + JPEG  # the key is the magic: bytes 8 to 12 of the header
    head, tail = two.split(MAGIC)
    path = write(tmp_path, [(0, part(first, 1) + part(middle, 2) + part(last, 3)), (1, part(head, 1) + part(tail, 3))])
    found = read_records(path)
    assert everything(found) == [one[24:], JPEG] and found.labels.tolist() == [1, 0]


def test_what_is_packed_is_cut_where_the_magic_is_aligned(tmp_path):
    image = JPEG + MAGIC + b"abc" + MAGIC + b"d" + MAGIC  # aligned, not aligned, aligned
    data = struct.pack("<IfQQ", 0, 3.0, 11, 0) + image
    expected = part(data[:28], 1) + part(b"abc" + MAGIC + b"d", 2) + part(b"", 3)
    assert pack_record(image, 11, (3.0,)) == expected
    (tmp_path / "a.rec").write_bytes(expected)
    assert read_record(MappedFile.find(tmp_path / "a.rec"), 0) == (data, len(expected))


def test_beyond_2_24_images_the_first_records_numbers_are_rounded(tmp_path, monkeypatch):
    """float32 rounds 42,474,558 to 42,474,560; the same with 2^24 taken for 2^4 and steps of 4."""
    monkeypatch.setattr("gif.data.records.LARGEST_LABEL", 4)
    monkeypatch.setattr(np, "spacing", lambda value: np.float32(4))
    for start in (6, 8, 10, 12):  # 8 is true
        path = write(tmp_path, insightface(IMAGES, [*LABELS[:-1], 2], start=start))
        found = read_records(path)
        assert everything(found) == IMAGES, start


def test_labels_that_float32_cannot_hold(tmp_path):
    for label in (2.0**24, 1.5, float("nan"), float("inf")):
        path = write(tmp_path, im2rec(IMAGES[:3], [0, label, 1]))
        with pytest.raises(ValueError, match="is no whole number below 2\\^24"):
            read_records(path)


def test_property(tmp_path):
    path = write(tmp_path, insightface(IMAGES, LABELS))
    (tmp_path / "property").write_text("3,112,112\n")
    with pytest.raises(ValueError, match=r"1 of 7 labels lie outside \[0, 3\), first 3 .*property"):
        read_records(path)
    for text in ("", "3,112", "a,b,c", "0,112,112"):
        (tmp_path / "property").write_text(text)
        with pytest.raises(ValueError, match="property holds"):
            read_records(path)
    (tmp_path / "property").write_text("4,112,112")
    assert len(read_records(path).names) == 4
    path = write(tmp_path, im2rec(IMAGES[:2], [0, -1]))
    with pytest.raises(ValueError, match=r"labels lie outside \[0, 4\), first -1"):
        read_records(path)


def test_damage(tmp_path):
    records = insightface(IMAGES, LABELS)
    path = write(tmp_path, records)
    whole, index = path.read_bytes(), path.with_suffix(".idx").read_text()

    def damaged(content, lines=index):
        path.write_bytes(content)
        if lines is None:
            path.with_suffix(".idx").unlink(missing_ok=True)
        else:
            path.with_suffix(".idx").write_text(lines)
        return path

    with pytest.raises(ValueError, match=r"train\.idx names byte .* truncated"):
        read_records(damaged(whole[:-100]))
    with pytest.raises(ValueError, match=r"is truncated"):  # in the last image, for its records end there
        read_records(damaged(whole[:-5], None))
    second = len(records[0][1])
    with pytest.raises(ValueError, match=rf"no record at byte {second} \(magic 0xced7230b"):
        read_records(damaged(whole[:second] + b"\x0b" + whole[second + 1 :]))
    with pytest.raises(ValueError, match="no record at byte 8"):
        read_records(damaged(whole, index.replace("0\t0\n", "0\t8\n", 1)))
    with pytest.raises(ValueError, match=r"is damaged .*wanted a line"):
        read_records(damaged(whole, index + "what\n"))
    with pytest.raises(ValueError, match="a key more than once"):
        read_records(damaged(whole, index + "3\t0\n"))
    with pytest.raises(ValueError, match="lacks 1 of 7 images"):
        read_records(damaged(whole, "".join(line for line in index.splitlines(True) if not line.startswith("4\t"))))
    with pytest.raises(ValueError, match="is empty"):
        read_records(damaged(b""))
    with pytest.raises(ValueError, match="has 8 bytes"):
        read_records(damaged(part(bytes(8)), None))
    with pytest.raises(FileNotFoundError, match=r"no\.rec"):
        read_records(tmp_path / "no.rec")


def cut_index(path, kept):
    index = path.with_suffix(".idx")
    lines = index.read_text().splitlines(True)
    index.write_text("".join(lines[place] for place in kept))
    return path


def test_an_index_cut_short(tmp_path):
    """insightface's first record says how many images there are; im2rec's files do not: what is left out is named."""
    path = write(tmp_path, insightface(IMAGES, LABELS))
    for kept in range(8):
        with pytest.raises(InputError, match=r"train\.idx (names no record|lacks \d of 7 images)"):
            read_records(cut_index(path, range(kept)))
        write(tmp_path, insightface(IMAGES, LABELS))
    found = read_records(cut_index(path, range(9)))  # without the identities, which are not needed
    assert everything(found) == IMAGES
    assert found.passed_over == (f"records that the .idx does not name: 3 ({places(path, [9, 10, 11])})",)
    path = write(tmp_path, im2rec(IMAGES, LABELS))
    starts = places(path, [1, 3, 6])
    found = read_records(cut_index(path, [0, 2, 4, 5]))
    assert everything(found) == [IMAGES[i] for i in (0, 2, 4, 5)]
    assert found.passed_over == (f"records that the .idx does not name: 3 ({starts})",)
    assert left_out(open_data(str(path))) == found.passed_over[0]


def places(path, records):
    offsets = [int(line.split()[1]) for line in path.with_suffix(".idx").read_text().splitlines()]
    if len(offsets) <= max(records):
        offsets = record_offsets(path)
    return ", ".join(f"at byte {offsets[record]:,}" for record in records)


def record_offsets(path):
    content, offsets, at = path.read_bytes(), [], 0
    while at < len(content):
        offsets.append(at)
        length = struct.unpack_from("<II", content, at)[1] & (1 << 29) - 1
        at += 8 + length + -length % 4
    return offsets


@pytest.mark.parametrize("dialect", [insightface, im2rec])
def test_a_file_cut_or_filled_anywhere(tmp_path, dialect):
    """A .rec that lost its end, has zeros there, or more behind it: an error, except in the last record."""
    path = write(tmp_path, dialect(IMAGES, LABELS))
    whole = path.read_bytes()
    last = record_offsets(path)[-1]
    for place in range(0, len(whole), 4):
        for damaged in (whole[:place], whole[:place] + bytes(len(whole) - place), whole + bytes(place + 4)):
            path.write_bytes(damaged)
            if len(damaged) == len(whole) and place >= last + 8:
                assert len(read_records(path).labels) == 7
                continue
            with pytest.raises(InputError, match=r"train\.(rec|idx)"):
                read_records(path)


def test_a_file_that_is_shortened_while_labels_are_read(tmp_path, monkeypatch):
    """To look behind its end would be a bus error."""
    path = write(tmp_path, im2rec(IMAGES, LABELS))

    @contextmanager
    def shorten(description, total, unit):
        os.truncate(path, 8)
        yield lambda n: None

    monkeypatch.setattr("gif.data.records.progress", shorten)
    with pytest.raises(InputError, match=r"train\.rec was shortened while it was in use: 8 bytes"):
        read_records(path)


def test_indexes_that_are_damaged(tmp_path):
    path = write(tmp_path, im2rec(IMAGES, LABELS))
    text = path.with_suffix(".idx").read_text()
    second = int(text.splitlines()[1].split()[1])
    for damaged, message in (
        ("", "names no record"),
        ("\n", "names no record"),
        (text[:-1] + "9\n", "truncated"),
        (text.replace(f"1\t{second}\n", f"1\t{second + 4}\n"), "no record at byte"),
        (text.replace(f"1\t{second}\n", "1\t0\n"), "two keys of one record"),
        (text + "9\t99999999999999999999\n", "truncated"),
        (text + "9\t-1\n", "truncated"),
        (text + "9\n", "is damaged"),
    ):
        path.with_suffix(".idx").write_text(damaged)
        with pytest.raises(InputError, match=message):
            read_records(path)
    path.with_suffix(".idx").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert everything(read_records(path)) == IMAGES


def test_identities_that_are_not_there_are_named(tmp_path):
    path = write(tmp_path, im2rec(IMAGES, [0, 0, 2, 2, 2, 5, 5]))
    (tmp_path / "property").write_bytes(b"\xef\xbb\xbf7,112,112")
    (tmp_path / "identities.txt").write_bytes(b"\xef\xbb\xbf" + b"".join(b"n%d\r\n" % i for i in range(7)))
    found = read_records(path)
    assert found.names == ["n0", "n2", "n5"]
    assert found.passed_over == ("identities of `property` without an image: 4 (1, 3, 4, ...)",)
    (tmp_path / "identities.txt").write_bytes(b"n\n" * 8)
    with pytest.raises(InputError, match=r"identities\.txt names 8 identities, and property says 7"):
        read_records(path)
    (tmp_path / "property").unlink()
    (passed_over,) = read_records(path).passed_over
    assert passed_over == "names in identities.txt of nobody with an image: 5 (n, n, n, ...)"
    (tmp_path / "identities.txt").write_bytes(b"jos\xe9\n" * 7)
    with pytest.raises(InputError, match=r"identities\.txt is no UTF-8 text"):
        read_records(path)


def test_images_beyond_what_the_first_record_says(tmp_path):
    path = write(tmp_path, insightface(IMAGES, LABELS, start=5))
    found = read_records(path)
    assert everything(found) == IMAGES[:4]
    assert found.passed_over == ("images whose keys lie beyond those that the first record says: 3 (5, 6, 7)",)


def test_a_part_without_an_end(tmp_path):
    (tmp_path / "a.rec").write_bytes(part(header(0.0, 0), 1) + part(JPEG))
    with pytest.raises(ValueError, match=r"no record at byte 32 \(magic 0xced7230a"):
        read_record(MappedFile.find(tmp_path / "a.rec"), 0)


def test_the_index_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path, im2rec(IMAGES, LABELS))
    read_records(path)
    with monkeypatch.context() as patch:
        patch.setattr("gif.data.records._find_images", lambda *files: pytest.fail("read again"))
        assert everything(read_records(path)) == IMAGES
    write(tmp_path, im2rec(IMAGES[:4], LABELS[:4]))
    assert everything(read_records(path)) == IMAGES[:4]
    for kept in (tmp_path / "cache" / "gif").glob("index-*.safetensors"):
        kept.write_bytes(kept.read_bytes()[:20])
    assert everything(read_records(path)) == IMAGES[:4]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_many_workers(tmp_path, png, context):
    images = [png(torch.full((3, 4, 4), 20 * i, dtype=torch.uint8)) for i in range(12)]
    images[5] = b"\x89PNG\r\n\x1a\n and no more"
    write(tmp_path, insightface(images, [i // 2 for i in range(12)]))
    data = open_data(str(tmp_path / "train.rec"), decoder=ImageDecoder(4))
    assert isinstance(data, EncodedImages)
    data[0]  # the file is mapped before the workers start
    loader = DataLoader(data, 3, num_workers=2, multiprocessing_context=context, collate_fn=data.collate)
    batches = [(batch[:, 0, 0, 0].tolist(), labels.tolist()) for batch, labels in loader]
    assert batches[1] == ([60, 80], [1, 2])  # without the broken one
    assert [pixel for pixels, _ in batches for pixel in pixels] == [20 * i for i in range(12) if i != 5]
    assert data.broken(torch.arange(12)).nonzero().tolist() == [[5]]  # which a worker found


def test_a_source_is_small_to_send(tmp_path):
    path = write(tmp_path, im2rec([JPEG + bytes(100_000)] * 3, [0, 1, 2]))
    found = read_records(path)
    found.source.read(0)
    assert len(pickle.dumps(found.source)) < 5_000
    assert pickle.loads(pickle.dumps(found.source)).read(2) == found.source.read(2)
