"""Files are whole or not there, and say what is wrong with them."""

import shutil

import psutil
import pytest
import torch

from gif.files import allocate_tensors, atomic_path, load_tensors, locate_tensor, map_tensor, save_tensors

FORMAT = "test/1"


def test_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.uint8)}
    save_tensors(tmp_path / "x.safetensors", tensors, format=FORMAT, note="hello")
    loaded, metadata = load_tensors(tmp_path / "x.safetensors", format=FORMAT)
    assert metadata == {"format": FORMAT, "note": "hello"}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_foreign_and_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no file .*make the file first"):
        load_tensors(path, format=FORMAT)
    save_tensors(path, {"a": torch.zeros(1000)}, format="other/1")
    with pytest.raises(ValueError, match=r"holds other/1, wanted test/1"):
        load_tensors(path, format=FORMAT)
    with pytest.raises(ValueError, match=r"holds other/1, wanted test/1"):
        locate_tensor(path, "a", format=FORMAT)
    with pytest.raises(ValueError, match="no tensor named b"):
        locate_tensor(path, "b", format="other/1")
    whole = path.read_bytes()
    for kept in (0, 3, 60, len(whole) - 1):
        path.write_bytes(whole[:kept])
        for read in (load_tensors, lambda p, format: locate_tensor(p, "a", format=format)):
            with pytest.raises(ValueError, match=r"damaged|truncated"):
                read(path, format="other/1")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" * 20)
    for read in (load_tensors, lambda p, format: locate_tensor(p, "a", format=format)):
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            read(path, format=FORMAT)


@pytest.mark.parametrize("writable", [False, True])
def test_changes_of_a_mapped_tensor_reach_the_file_or_stay_private(tmp_path, writable):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(3, 2), "b": torch.arange(5)}, format=FORMAT)
    mapped = map_tensor(path, "b", format=FORMAT, writable=writable)
    mapped[2] = 70
    assert mapped.tolist() == [0, 1, 70, 3, 4]
    del mapped
    assert load_tensors(path, format=FORMAT)[0]["b"].tolist() == [0, 1, 70 if writable else 2, 3, 4]


def test_a_table_larger_than_memory_is_mapped(tmp_path, monkeypatch):
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    rows = 2 * memory // 4096
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 4 * memory))  # it is sparse
    path = tmp_path / "x.safetensors"
    allocate_tensors(path, {"a": ((rows, 1024), torch.float32)}, format=FORMAT)
    mapped = map_tensor(path, "a", format=FORMAT)
    mapped[rows // 2] = 1.0
    assert mapped[rows // 2].sum() == 1024 and mapped[-1].sum() == 0


def test_the_same_content_gives_the_same_bytes(tmp_path):
    metadata = {"b": 'quotes " \\ and é', "a": "line\nbreak \x01 \x7f", "c": "", "zażółć": "€ 😀 \u2028"}
    contents = set()
    for number in range(12):  # the order of the library's metadata is another each time
        path = tmp_path / f"{number}.safetensors"
        save_tensors(path, {"x": torch.arange(3)}, format="gif.test/1", **metadata)
        tensors, found = load_tensors(path, format="gif.test/1")
        assert found == {"format": "gif.test/1", **metadata} and tensors["x"].tolist() == [0, 1, 2]
        contents.add(path.read_bytes())
    assert len(contents) == 1
