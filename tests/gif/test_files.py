"""Files are whole or not there, and say what is wrong with them."""

import pytest
import torch

from gif.files import atomic_path, load_tensors, locate_tensor, save_tensors

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
