"""Identity codes are distinct, answer look-ups exactly, and survive a file."""

import itertools
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gif import files
from gif.cli import _run
from gif.codes import IdentityCodes, TokenizeConfig, code_length, picture, tokenize
from gif.vectors.store import CodeVectors


def random_codes(m: int, length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    keys = torch.randperm(vocab_size**length, generator=torch.Generator().manual_seed(seed))[:m]
    places = vocab_size ** torch.arange(length - 1, -1, -1)
    return keys[:, None] // places % vocab_size


@pytest.mark.parametrize(("m", "length", "vocab_size"), [(1, 1, 2), (7, 3, 2), (16, 2, 4), (500, 3, 20), (300, 2, 256)])
def test_decode_inverts_lookup(m, length, vocab_size):
    wanted = random_codes(m, length, vocab_size)
    codes = IdentityCodes(wanted, vocab_size)
    assert (len(codes), codes.length, codes.vocab_size, codes.codes.dtype) == (m, length, vocab_size, torch.uint8)
    labels = torch.randint(-1, m, (50,))
    rows = codes.lookup(labels)
    assert rows.dtype == torch.int64
    assert torch.equal(rows[labels >= 0], wanted[labels[labels >= 0]])
    assert (rows[labels == -1] == -1).all()
    assert torch.equal(codes.decode(rows), labels)  # a row of -1 is nobody's code
    assert torch.equal(codes.decode(codes.codes), torch.arange(m))


def test_decode_knows_every_code_of_a_small_space():
    codes = IdentityCodes(random_codes(11, 3, 3), 3)
    owner = {tuple(code): identity for identity, code in enumerate(codes.codes.tolist())}
    everything = list(itertools.product(range(-1, 4), repeat=3))  # tokens out of range too: -1 and 3
    assert codes.decode(torch.tensor(everything)).tolist() == [owner.get(code, -1) for code in everything]


def test_lookup_takes_any_integers_and_no_rows():
    codes = IdentityCodes(random_codes(9, 2, 5), 5)
    labels = torch.tensor([3, -1, 8, 0])
    assert torch.equal(codes.lookup(labels.int()), codes.lookup(labels))
    assert torch.equal(codes.lookup(torch.arange(9)[::2]), codes.lookup(torch.arange(9))[::2])
    assert codes.lookup(torch.empty(0, dtype=torch.int64)).shape == (0, 2)
    assert codes.decode(torch.empty(0, 2, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("label", [-2, 9, 10**12])
def test_lookup_refuses_labels_of_others(label):
    codes = IdentityCodes(random_codes(9, 2, 5), 5)
    with pytest.raises(ValueError, match=rf"labels must lie in \[-1, 9\), got .*{label}.*made for other identities"):
        codes.lookup(torch.tensor([0, label]))


def test_prefixes_are_nodes_of_the_tree():
    codes = IdentityCodes(torch.tensor([[1, 2, 0], [1, 2, 1], [0, 2, 1]]), 3)
    assert codes.prefixes(0).tolist() == [0, 0, 0]
    assert codes.prefixes(2).tolist() == [5, 5, 2]
    assert codes.prefixes(3).tolist() == [15, 16, 7]


def test_constructor_refuses_what_are_not_codes():
    tokens = random_codes(6, 2, 5)
    with pytest.raises(TypeError, match="integer tensor"):
        IdentityCodes(tokens.float(), 5)
    with pytest.raises(ValueError, match=r"shape \(m, l\)"):
        IdentityCodes(tokens[0], 5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\), got values from 0 to 5"):
        IdentityCodes(torch.tensor([[0, 5]]), 5)
    for vocab_size in (1, 257, 2.5):
        with pytest.raises(ValueError, match=r"integer in \[2, 256\]"):
            IdentityCodes(torch.zeros(1, 1, dtype=torch.int64), vocab_size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass 2\\^63"):
        IdentityCodes(torch.zeros(1, 8, dtype=torch.int64), 256)
    tokens[4] = tokens[1]
    with pytest.raises(ValueError, match=r"identities 1 and 4 share the code .*gif.tokenize"):
        IdentityCodes(tokens, 5)
    with pytest.raises(ValueError, match=r"codes must have shape \(n, 2\)"):
        IdentityCodes(tokens[:3], 5).decode(torch.zeros(2, 3, dtype=torch.int64))


def test_fingerprint_knows_every_change():
    tokens = random_codes(40, 3, 6)
    codes = IdentityCodes(tokens, 6)
    assert codes.fingerprint == IdentityCodes(tokens.clone(), 6).fingerprint
    others = [
        IdentityCodes(tokens, 7),
        IdentityCodes(tokens[:-1], 6),
        IdentityCodes(tokens.flip(0), 6),
        IdentityCodes(torch.nn.functional.pad(tokens, (1, 0)), 6),
        IdentityCodes(torch.nn.functional.pad(tokens, (0, 1)), 6),
    ]
    assert len({each.fingerprint for each in [codes, *others]}) == 1 + len(others)
    assert len(bytes.fromhex(codes.fingerprint)) == 32


def test_round_trip(tmp_path):
    codes = tokenize(torch.randn(300, 16), TokenizeConfig(vocab_size=5))
    codes.save(tmp_path / "codes.safetensors")
    loaded = IdentityCodes.load(tmp_path / "codes.safetensors")
    assert torch.equal(loaded.codes, codes.codes)
    assert loaded.vocab_size == 5
    assert loaded.fingerprint == codes.fingerprint
    assert len(loaded.centroids) == codes.length - 1
    assert all(torch.equal(new, old) for new, old in zip(loaded.centroids, codes.centroids, strict=True))

    bare = IdentityCodes(codes.codes, 5)
    bare.save(tmp_path / "bare.safetensors")
    assert IdentityCodes.load(tmp_path / "bare.safetensors").centroids == ()


def test_files_that_are_missing_foreign_truncated_or_tampered_with(tmp_path):
    path = tmp_path / "codes.safetensors"
    with pytest.raises(FileNotFoundError):
        IdentityCodes.load(path)
    tokens = random_codes(100, 2, 20)
    tokens_u8 = tokens.to(torch.uint8)
    IdentityCodes(tokens, 20).save(path)
    whole = path.read_bytes()
    for size in (0, 7, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            IdentityCodes.load(path)
    ours = {"format": "gif.identity_codes/1", "vocab_size": "20"}
    twice = tokens_u8.clone()
    twice[1] = twice[0]
    for tensors, metadata, message in [
        ({"codes": tokens_u8}, {"format": "gif.code_vectors/1"}, "holds gif.code_vectors/1"),
        ({"codes": tokens_u8}, None, "holds an unknown format"),
        ({"codes": tokens_u8}, {"format": ours["format"]}, "no vocab_size"),
        ({"other": tokens_u8}, ours, "no codes"),
        ({"codes": tokens_u8}, ours | {"vocab_size": "3"}, r"must lie in \[0, 3\)"),
        ({"codes": twice}, ours, "identities 0 and 1 share"),
        ({"codes": tokens_u8, "centroids.0": torch.zeros(3, 4)}, ours, r"centroids of level 0 must be \(20, d\)"),
        ({"codes": tokens_u8, "directions": torch.zeros(3, 20, 4)}, ours, r"directions must be \(2, 20, d\)"),
    ]:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            IdentityCodes.load(path)


@pytest.mark.parametrize("vocab_size", [2, 10, 20, 255, 256])
def test_code_length_is_exact_at_the_powers(vocab_size):
    for length in range(1, 8):
        size = vocab_size**length
        assert code_length(size, vocab_size) == length
        assert code_length(size + 1, vocab_size) == length + 1
    assert code_length(1, vocab_size) == 1


def test_code_length_leaves_slack():
    assert code_length(64_000_000, 20) == 6
    assert code_length(64_000_000, 20, slack=1e-9) == 7
    assert code_length(100, 10, slack=9.0) == 3
    assert code_length(10, 11, slack=0.1) == 1  # 10 * 1.1 is 11, whatever floating point makes of it
    assert code_length(8, 2, slack=sys.float_info.min) == 4
    for m, slack in ((0, 0.0), (5, -0.1), (5, float("nan")), (5, float("inf"))):
        with pytest.raises(ValueError, match="at least one identity and a finite slack"):
            code_length(m, 2, slack)


def run(*arguments: object) -> None:
    _run(list(map(str, arguments)))


def test_commands_inspect_export_and_extend(tmp_path, capsys):
    rows = torch.nn.functional.normalize(torch.randn(90, 6), dim=1)
    CodeVectors(rows[:70].clone()).save(tmp_path / "vectors.safetensors")
    CodeVectors(rows[70:].clone()).save(tmp_path / "late.safetensors")
    codes, late = tmp_path / "codes.safetensors", tmp_path / "all.safetensors"
    run("tokenize", "--vectors", tmp_path / "vectors.safetensors", "--output", codes, "--vocab_size", 5)
    cut = IdentityCodes.load(codes)

    run("codes", "inspect", "--codes", codes, "--vectors", tmp_path / "vectors.safetensors")
    said = capsys.readouterr().out
    assert "55 of 125 codes free (78.6% of the identities there are)" in said
    assert "free k-means" in said
    assert (tmp_path / "codes.png").read_bytes().startswith(b"\x89PNG")

    run("codes", "export", "--codes", codes, "--output", tmp_path / "codes.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), cut.codes.numpy())
    run("codes", "export", "--codes", codes, "--output", tmp_path / "codes.csv")
    assert (tmp_path / "codes.csv").read_text().splitlines()[0] == "token_1,token_2,token_3"
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "codes.csv", int, delimiter=",", skiprows=1), cut.codes.numpy())
    with pytest.raises(ValueError, match=r"must end in .npy or .csv"):
        run("codes", "export", "--codes", codes, "--output", tmp_path / "codes.txt")

    run("codes", "extend", "--codes", codes, "--vectors", tmp_path / "late.safetensors", "--output", late)
    assert torch.equal(IdentityCodes.load(late).codes, cut.extend(rows[70:]).codes)


@pytest.mark.parametrize("length", [1, 3])
def test_the_picture_shows_how_full_nodes_are(length, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(picture, "save_figure", lambda drawing, path: drawn.append(drawing))
    codes = IdentityCodes(random_codes(4, length, 4), 4)
    picture.plot_occupancy(codes, tmp_path / "picture.png")
    fill, use = (axes.images[0].get_array() for axes in drawn[0].axes[:2])
    room = 4 ** (length - min(2, length))
    assert fill.sum() * room == pytest.approx(4)  # each identity takes 1 / room of its node
    for position in range(length):
        np.testing.assert_allclose(use[position], codes.codes[:, position].long().bincount(minlength=4).numpy())


@pytest.mark.parametrize(("vocab_size", "length", "held"), [(20, 3, 8), (256, 4, 8), (256, 5, 12)])
def test_what_is_held_is_a_number_and_an_order(vocab_size, length, held):
    wanted = torch.randint(vocab_size, (5000, length)).unique(dim=0).flip(0)
    codes = IdentityCodes(wanted, vocab_size)
    codes.siblings(torch.arange(5), 4)
    codes.decode(codes.codes)
    assert torch.equal(codes.codes, wanted.to(torch.uint8))
    tensors = [value for value in vars(codes.table).values() if isinstance(value, torch.Tensor)]
    index = 4 * (len(codes) // 16 + 1)  # of the buckets that a search begins in
    assert sum(value.nbytes for value in tensors) == held * len(codes) + index
    assert not any(isinstance(value, torch.Tensor) for value in vars(codes).values())


CLUSTERED = torch.cat([torch.arange(3000), torch.arange(10**6, 10**6 + 70), torch.tensor([256**4 - 1])])


@pytest.mark.parametrize("m", [1, 2, 63, 300, 3071])
def test_places_and_siblings_against_a_sort(m):
    """Numbers close together, as in a tree with free leaves, and past 2^31."""
    numbers = CLUSTERED[torch.randperm(len(CLUSTERED), generator=torch.Generator().manual_seed(m))[:m]]
    codes = IdentityCodes(numbers[:, None] // 256 ** torch.arange(3, -1, -1) % 256, 256)
    order = numbers.argsort()
    rank = order.argsort()
    everyone = torch.arange(m)
    assert torch.equal(codes.table.number(everyone), numbers)
    assert torch.equal(codes.table.smaller(numbers), rank)
    assert torch.equal(codes.table.smaller(numbers + 1), torch.searchsorted(numbers[order], numbers + 1))
    assert codes.table.smaller(torch.tensor([0, 256**4])).tolist() == [0, m]
    siblings = codes.siblings(everyone, 3)
    assert torch.equal(siblings, torch.stack([order[(rank + step) % m] for step in (1, -1, 2)], 1))


class TestMapped:
    def saved(self, folder):
        rows = torch.randn(500, 16, generator=torch.Generator().manual_seed(3))
        codes = tokenize(rows, TokenizeConfig(vocab_size=9))
        codes.save(folder / "codes.safetensors")
        return codes, folder / "codes.safetensors"

    def test_answers_what_codes_in_memory_do(self, tmp_path):
        codes, path = self.saved(tmp_path)
        mapped = IdentityCodes.load(path, mmap=True)
        labels = torch.tensor([3, -1, 499, 0, 3])
        assert len(mapped) == 500 and mapped.length == codes.length and mapped.free == codes.free
        assert torch.equal(mapped.lookup(labels), codes.lookup(labels))
        assert torch.equal(mapped.siblings(torch.arange(500), 5), codes.siblings(torch.arange(500), 5))
        assert torch.equal(mapped.decode(codes.codes), torch.arange(500))
        assert torch.equal(mapped.prefixes(2), codes.prefixes(2)) and torch.equal(mapped.codes, codes.codes)
        assert all(torch.equal(a, b) for a, b in zip(mapped.nodes(2), codes.nodes(2), strict=True))
        assert mapped.fingerprint == codes.fingerprint == IdentityCodes(codes.codes, 9).fingerprint

    def test_holds_nothing(self, tmp_path):
        _, path = self.saved(tmp_path)
        mapped = IdentityCodes.load(path, mmap=True)
        tables = (mapped.table.numbers, mapped.table.order, mapped.table.starts)
        assert all(each.data_ptr() in files._MAPPED for each in tables)
        assert mapped.table.numbers.data_ptr() == mapped.codes.data_ptr()

    def test_a_file_without_an_order_is_read(self, tmp_path):
        """As versions before wrote it."""
        codes, path = self.saved(tmp_path)
        old = {"codes": codes.codes} | {f"centroids.{level}": rows for level, rows in enumerate(codes.centroids)}
        save_file(old, path, metadata={"format": "gif.identity_codes/1", "vocab_size": "9"})
        for mmap in (False, True):
            loaded = IdentityCodes.load(path, mmap=mmap)
            assert torch.equal(loaded.codes, codes.codes) and loaded.fingerprint == codes.fingerprint

    def test_a_file_that_is_shortened_while_it_is_used(self, tmp_path):
        _, path = self.saved(tmp_path)
        mapped = IdentityCodes.load(path, mmap=True)
        os.truncate(path, 100)
        for ask in (mapped.lookup, lambda labels: mapped.siblings(labels, 2), mapped.table.number):
            with pytest.raises(ValueError, match="was shortened while it was in use"):
                ask(torch.arange(5))

    @pytest.mark.parametrize("name", ["order", "starts"])
    def test_tables_that_do_not_belong_together(self, tmp_path, name):
        codes, path = self.saved(tmp_path)
        tensors = {"codes": codes.codes, "order": codes.table.order, "starts": codes.table.starts}
        tensors[name] = tensors[name][:-1]
        metadata = {"vocab_size": "9", "fingerprint": codes.fingerprint}
        files.save_tensors(path, tensors, format="gif.identity_codes/1", **metadata)
        with pytest.raises(ValueError, match=r"codes\.safetensors is damaged: .*make it again"):
            IdentityCodes.load(path, mmap=True)


def test_codes_on_a_device():
    codes = IdentityCodes(random_codes(50, 3, 5), 5)
    assert codes.to("cpu") is codes
    moved = codes.to("meta")
    assert moved.table.numbers.device.type == "meta" and moved.fingerprint == codes.fingerprint
    assert moved.siblings(torch.arange(5, device="meta"), 2).shape == (5, 2)
