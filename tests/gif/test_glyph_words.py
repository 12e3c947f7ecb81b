"""Words of two glyphs: pairs by a permutation, images by a rule, letters that nobody shares, and every command."""

import json
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
import torch

from gif.codes import IdentityCodes
from gif.data import IdentityDataset, IdentityImages, load_data, open_data
from gif.data.glyphs import halves as halves_module
from gif.data.glyphs import word_sets
from gif.data.glyphs.halves import GROUP, PARTS, Halves, choose_letters, glyph_halves
from gif.data.glyphs.word_sets import SETS, words_to_judge, words_to_train_on
from gif.data.glyphs.words import MOST_IMAGES, GlyphWords
from gif.data.identities import Identities, Names
from gif.permutation import ComputedOrder, PairPermutation
from gif.training.order import EpochOrder
from gif.vectors.store import CodeVectors

LETTERS = 40  # of what `make_halves` makes
PAIRS = LETTERS**2 - 400  # two grids of pairs judge of as many groups, fewer where they share some


@pytest.fixture(scope="module")
def train(make_halves) -> Halves:
    return make_halves(0)


@pytest.fixture
def parts(train, monkeypatch, make_halves):
    """The commands find tiny halves."""
    found = {part: make_halves(n, begin=0x4E00 + 100 * n, size=32) for n, part in enumerate(PARTS)}
    monkeypatch.setattr(word_sets, "glyph_halves", lambda size, cache_dir=None: found)
    return found


def everything(data: IdentityDataset) -> tuple[torch.Tensor, torch.Tensor]:
    return data.batch(list(range(len(data))))


class TestPermutations:
    @pytest.mark.parametrize("n", [1, 2, 3, 31, 100])
    def test_pairs_are_one_to_one_and_can_be_undone(self, n):
        permutation = PairPermutation(n, seed=5)
        numbers = np.arange(len(permutation))
        first, second = permutation.pairs(numbers)
        assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(a, b) for a in range(n) for b in range(n)]
        assert (permutation.numbers(first, second) == numbers).all()

    def test_pairs_follow_from_the_seed_and_look_random(self):
        numbers = np.arange(1000)
        one, again, other = (np.stack(PairPermutation(100, seed).pairs(numbers)) for seed in (1, 1, 2))
        assert (one == again).all() and (one != other).mean() > 0.9
        for side in one:  # 1,000 of 100 letters: 10 each, deviation 3
            assert np.bincount(side, minlength=100).max() < 10 + 6 * 3

    @pytest.mark.parametrize("n", [0, 1, 2, 5, 26, 1000, 9973])
    def test_a_computed_order_has_each_number_once(self, n):
        order = ComputedOrder(n, seed=3)
        assert len(order) == n and order[:].sort().values.equal(torch.arange(n))
        assert torch.cat([order[begin : begin + 7] for begin in range(0, n, 7)] or [order[:]]).equal(order[:])

    def test_an_epoch_in_a_computed_order_is_the_same_for_any_processes(self):
        options: dict[str, Any] = {"seed": 7, "computed": True}
        whole = list(EpochOrder(50, 12, begin=0, rank=0, processes=1, **options))
        assert len(set(chain(*whole))) == 48
        shares = [list(EpochOrder(50, 12, begin=1, rank=r, processes=3, **options)) for r in range(3)]
        assert [list(chain(*step)) for step in zip(*shares, strict=True)] == whole[1:]


class TestWords:
    @pytest.mark.parametrize("number", [2, 15, 16, 17, 33, 500])
    def test_batches_agree_with_labels_counts_and_names(self, train, number):
        data = words_to_train_on(train, number, seed=0)
        counts = data.image_counts()
        assert len(counts) == data.num_identities == len(data.names) == number and counts.sum() == len(data)
        assert data.labels.equal(torch.arange(number).repeat_interleave(counts))
        shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
        images, labels = data.batch(shuffled.tolist())
        assert (
            labels.equal(data.labels[shuffled]) and images.shape == (len(data), 1, 8, 8) and images.dtype is torch.uint8
        )
        assert data.image_shape == (1, 8, 8)
        image, label = data[-1]
        assert image.equal(everything(data)[0][-1]) and label == number - 1
        with pytest.raises(IndexError):
            data[len(data)]
        for begin, end in ((0, number), (1, 2), (number // 2, number)):
            shown = data.labels[data.images_between(begin, end)]
            assert shown.unique().tolist() == list(range(begin, end)) and len(shown) == counts[begin:end].sum()

    def test_an_image_is_two_drawings_of_its_letters(self, train):
        data = words_to_train_on(train, 300, seed=0)
        images, labels = everything(data)
        for side in (0, 1):
            half = images[:, 0, :, 4 * side : 4 * side + 4]
            row = (half[:, None] == train.drawings).flatten(2).all(2).int().argmax(1)
            letter = torch.searchsorted(train.ends, row, right=True)
            assert half.equal(train.drawings[row])
            assert [train.letters[number] for number in letter] == [data.names[label][side] for label in labels]

    def test_words_and_images_are_distinct(self, train):
        data = words_to_train_on(train, PAIRS, seed=0)
        assert len(set(data.names)) == PAIRS
        assert len(everything(data)[0].flatten(1).unique(dim=0)) == len(data)

    def test_images_of_an_identity_are_few_and_at_most_its_letters_drawings(self, train):
        data = words_to_train_on(train, PAIRS, seed=0)
        counts = data.image_counts().tolist()
        drawings = dict(zip(train.letters, train.counts.tolist(), strict=True))
        assert all(
            2 <= n <= min(MOST_IMAGES, *(drawings[a] for a in name)) for n, name in zip(counts, data.names, strict=True)
        )
        assert abs(counts.count(2) / PAIRS - 0.45) < 0.07  # five deviations of a share of 1,200
        assert max(counts) > 6

    def test_the_identities_of_a_small_set_are_the_first_of_a_large_one(self, train):
        small, large = (words_to_train_on(train, number, seed=3) for number in (37, 900))
        assert list(small.names) == large.names[:37]
        images, _ = everything(small)
        assert images.equal(large.batch(list(range(len(small))))[0]) and small.labels.equal(large.labels[: len(small)])

    def test_the_seed_decides(self, train, make_halves):
        one, again, other = (words_to_train_on(train, 100, seed) for seed in (0, 0, 1))
        assert everything(one)[0].equal(everything(again)[0]) and one.summary() == again.summary()
        assert list(one.names) != list(other.names) and one.summary() != other.summary()
        assert words_to_train_on(train, 101, 0).summary() != one.summary()
        assert words_to_train_on(make_halves(1), 100, 0).summary() != one.summary()

    def test_a_part_has_the_same_images(self, train):
        data = words_to_train_on(train, 100, seed=0)
        data.origin, data.splits = "glyph-words", 1
        some = torch.tensor([70, 3, 99])
        part = data.of_identities(some)
        wanted = torch.isin(data.labels, some)
        assert everything(part)[0].equal(everything(data)[0][wanted])
        assert list(part.names) == [data.names[3], data.names[70], data.names[99]]
        assert part.labels.unique_consecutive().tolist() == [0, 1, 2] and (part.origin, part.splits) == (
            "glyph-words",
            1,
        )
        nobody = data.of_identities(torch.empty(0, dtype=torch.int64))
        assert len(nobody) == nobody.num_identities == len(nobody.labels) == len(list(nobody.names)) == 0

    def test_what_is_kept_does_not_grow_with_the_number(self, train, make_halves):
        large = make_halves(0, letters=1500, size=2)
        data = words_to_train_on(large, 2_000_000, seed=0)
        kept = sum(value.nbytes for value in vars(data).values() if isinstance(value, np.ndarray))
        assert kept < 2_000_000 / 16 * 8 + 100
        data.batch([0, len(data) - 1])
        assert "labels" not in vars(data) and "_packed" not in vars(data.names)

    @pytest.mark.parametrize("number", [0, 1, LETTERS**2])
    def test_too_few_or_too_many(self, train, number):
        with pytest.raises(ValueError, match=f"identities is {number:,}; 40 letters give from 2 to 1,"):
            words_to_train_on(train, number, seed=0)


class TestNames:
    def test_they_are_names_as_any_others(self, train):
        data = words_to_train_on(train, 50, seed=0)
        packed = Names.pack(list(data.names))
        assert data.names == packed and packed == data.names and data.names.fingerprint == packed.fingerprint
        assert data.names.digests("key").equal(packed.digests("key"))
        assert data.names[-1] == packed[49] and data.names[1:3] == packed[1:3]
        assert data.names.where(torch.arange(50) < 2) == packed[:2]
        with pytest.raises(IndexError):
            data.names[50]

    def test_letters_of_any_width_in_utf8(self, make_halves):
        letters = "aé丁𠀀" * 10
        halves = make_halves(0)
        data = GlyphWords(
            Halves(halves.drawings, halves.ends, letters, halves.groups), words_to_train_on(halves, 300, 0).pairs
        )
        assert data.names == [data.names[row] for row in range(300)]

    def test_identities_are_kept_in_a_file(self, train, tmp_path):
        who = words_to_train_on(train, 50, seed=0).identities
        who.save(tmp_path / "who.safetensors")
        assert Identities.load(tmp_path / "who.safetensors").names == who.names


class TestJudged:
    def test_grids_of_distinct_images(self, train):
        for words in words_to_judge(train):
            grids = len(train.groups) // 2
            assert words.num_identities == 100 * grids == len(set(words.names))
            assert words.image_counts().tolist() == [4] * words.num_identities
            assert len(everything(words)[0].flatten(1).unique(dim=0)) == len(words)
            for grid in range(grids):
                names = words.names[100 * grid : 100 * grid + 100]
                assert [len({name[side] for name in names}) for side in (0, 1)] == [GROUP, GROUP]

    @pytest.mark.parametrize("seed", [0, 1])
    def test_no_judged_pair_is_trained_on_whatever_the_seed(self, train, seed):
        judged = {name for words in words_to_judge(train) for name in words.names}
        trained = set(words_to_train_on(train, LETTERS**2 - len(judged), seed).names)
        assert not trained & judged and len(trained | judged) == LETTERS**2
        with pytest.raises(ValueError, match=f"to {len(trained):,} words"):
            words_to_train_on(train, len(trained) + 1, seed)

    def test_groups_look_alike_and_share_no_letter(self, make_halves):
        halves = make_halves(0, letters=60)
        means = torch.stack(
            [drawings.flatten(1).float().mean(0) for drawings in halves.drawings.tensor_split(halves.ends[:-1])]
        )
        unit = torch.nn.functional.normalize(means - means.mean(0), dim=1)
        cosines = unit @ unit.T
        within = torch.stack([cosines[group[0], group[1:]].mean() for group in halves.groups[:3]])
        assert halves.groups.shape == (6, GROUP) and len(halves.groups.unique()) == 60
        assert within.mean() > cosines.mean() + 3 * cosines.std() / (3 * GROUP) ** 0.5


def glyphs(characters: list[str], drawings: int = 5) -> IdentityImages:
    """Each character in as many random drawings, in no order."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(2, (len(characters) * drawings, 1, 32, 32), dtype=torch.uint8, generator=generator) * 255
    labels = torch.arange(len(images)) % len(characters)
    return IdentityImages(images, labels, characters)


CHARACTERS = [chr(0x4E00 + i) for i in range(70)]


class TestHalves:
    def test_letters_with_enough_drawings(self):
        data = glyphs([*CHARACTERS, "!", "AА", ".."])
        few = data.labels != 3
        few[:80] = True  # of character 3 two drawings are left
        data = IdentityImages(data.images[few], data.labels[few], data.names)
        letters, rows, ends = choose_letters(data, letters=1000)
        assert (
            set(letters) < {*CHARACTERS, "A"}
            and len(letters) == len(set(letters)) == 69
            and CHARACTERS[3] not in letters
        )
        names = [data.names[label][0] for label in data.labels[rows]]
        assert names == [
            letter for letter, n in zip(letters, ends.diff(prepend=torch.zeros(1)), strict=True) for _ in range(int(n))
        ]

    def test_letters_and_drawings_that_look_alike_when_squeezed_are_dropped(self):
        data = glyphs(CHARACTERS)
        images = data.images.clone()
        twins = ((data.labels == 10).nonzero()[0], (data.labels == 20).nonzero()[2])
        images[twins[1]] = (images[twins[0]] > 0).byte() * 235  # 20 of 255 less, squeezed or not
        copies = (data.labels == 30).nonzero().flatten()[:2]
        images[copies[1]] = images[copies[0]]
        barely = (data.labels == 40).nonzero().flatten()
        images[barely[1:3]] = images[barely[:1]]  # three drawings are left
        letters, rows, _ = choose_letters(IdentityImages(images, data.labels, data.names), letters=1000)
        gone = set(CHARACTERS) - set(letters)
        assert len({CHARACTERS[10], CHARACTERS[20]} & gone) == 1 and CHARACTERS[40] in gone
        assert not {int(copies[0]), int(copies[1])} <= set(rows.tolist())

    def test_parts_share_no_letter_and_are_found_again(self, tmp_path, monkeypatch):
        made = []
        monkeypatch.setattr(
            halves_module, "all_glyphs_80k", lambda size, cache_dir: made.append(size) or glyphs(CHARACTERS)
        )
        found = glyph_halves(letters=20, cache_dir=tmp_path)
        assert tuple(found) == PARTS and [len(part) for part in found.values()] == [20, 20, 20]
        assert not any(set(one.letters) & set(other.letters) for one, other in combinations(found.values(), 2))
        for part in found.values():
            assert (
                part.groups.shape == (2, GROUP)
                and part.drawings.shape[1:] == (32, 16)
                and part.ends[-1] == len(part.drawings)
            )
        again = glyph_halves(letters=20, cache_dir=tmp_path)
        assert made == [32] and all(again[part].fingerprint == found[part].fingerprint for part in PARTS)

    def test_a_damaged_file_is_made_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(halves_module, "all_glyphs_80k", lambda size, cache_dir: glyphs(CHARACTERS))
        found = glyph_halves(letters=20, cache_dir=tmp_path)
        (path,) = tmp_path.glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-100])
        assert glyph_halves(letters=20, cache_dir=tmp_path)["train"].fingerprint == found["train"].fingerprint

    def test_another_size_has_the_same_letters(self, tmp_path, monkeypatch):
        small = glyphs(CHARACTERS)
        large = IdentityImages(small.images.repeat_interleave(2, 2).repeat_interleave(2, 3), small.labels, small.names)
        monkeypatch.setattr(halves_module, "all_glyphs_80k", lambda size, cache_dir: large if size == 64 else small)
        found = glyph_halves(size=64, letters=20, cache_dir=tmp_path)["held_out"]
        judged = glyph_halves(size=32, letters=20, cache_dir=tmp_path)["held_out"]
        assert found.letters == judged.letters and found.groups.equal(judged.groups)
        assert found.drawings.shape[1:] == (64, 32)
        assert found.drawings[:, ::2, ::2].float().sub(judged.drawings).abs().mean() < 64  # blocks of the same pixels

    def test_too_few_letters(self):
        with pytest.raises(
            ValueError, match="50 letters have 4 drawings, too few for three parts of 20; give more fonts"
        ):
            choose_letters(glyphs(CHARACTERS[:50]))
        with pytest.raises(ValueError, match="size is 48; give 32 or 64"):
            glyph_halves(size=48)


class TestLoading:
    def test_by_name(self, parts):
        split = load_data("glyph-words", identities=1e3)
        assert split.train.num_identities == 1000 and split.train.origin == "glyph-words"
        assert tuple(split.sets) == SETS and split.held_out is split.sets["alike"]
        letters = {name: set("".join(part.names)) for name, part in {"train": split.train, **split.sets}.items()}
        assert not letters["train"] & (letters["alike"] | letters["new"])
        assert letters["recombined"] | letters["alike-recombined"] <= letters["train"]
        assert open_data("glyph-words-new").names == split.sets["new"].names
        assert open_data("glyph-words-new").origin == "glyph-words-new"

    def test_held_out_is_by_letter(self, parts):
        everyone = load_data("glyph-words", identities=100, held_out=0)
        assert everyone.train.num_identities == 100 and everyone.held_out.num_identities == 0
        judged = load_data("glyph-words", identities=100, held_out=1)
        assert judged.held_out.num_identities == 100 and judged.train.num_identities == 0
        with pytest.raises(ValueError, match="glyph-words is split by letter"):
            load_data("glyph-words", held_out=0.1)

    def test_identities_is_a_whole_number_of_any_data_set(self, monkeypatch, tmp_path):
        from gif.data import loading

        monkeypatch.setitem(loading.NAMES, "glyphs", lambda: glyphs(CHARACTERS))
        split = load_data("glyphs", identities=35)
        assert split.train.num_identities + split.held_out.num_identities == 35
        assert open_data("glyphs", identities=30).num_identities == 30
        assert open_data("glyphs", identities=70).num_identities == 70
        for wrong, message in ((1.5, "give a whole number from 2"), (71, "identities is 71, and glyphs has 70")):
            with pytest.raises(ValueError, match=message):
                open_data("glyphs", identities=wrong)
            with pytest.raises(ValueError, match=message):
                load_data("glyphs", identities=wrong)


class TestCommands:
    def test_inspect(self, gif, parts, tmp_path):
        code, text = gif("data", "inspect", "--data", "glyph-words", "--identities", "1e3", "--output", tmp_path)
        assert code == 0 and "1,000" in text
        assert (tmp_path / "identities.png").exists() and (tmp_path / "long-tail.png").exists()

    def test_convert_a_part(self, gif, parts, tmp_path):
        command = ("data", "convert", "--data", "glyph-words", "--identities", 30, "--output", tmp_path / "words")
        assert gif(*command)[0] == 0
        found, words = open_data(str(tmp_path / "words")), open_data("glyph-words", identities=30)
        assert sorted(found.names) == sorted(words.names) and len(found) == len(words)
        code, text = gif(
            "data", "convert", "--data", tmp_path / "words", "--identities", 3, "--output", tmp_path / "few"
        )
        assert code == 1 and "leave it out" in text

    def test_vectors_codes_training_and_judgement(self, gif, parts, tmp_path):
        data = ("--data", "glyph-words", "--identities", 200)
        vectors, codes, run = (tmp_path / name for name in ("vectors.safetensors", "codes.safetensors", "run"))
        assert gif("vectors", *data, "--output", vectors, "--width", 16)[0] == 0
        assert CodeVectors.load(vectors).identities.names == load_data("glyph-words", identities=200).train.names
        assert gif("tokenize", "--vectors", vectors, "--output", codes, "--vocab_size", 8)[0] == 0
        assert len(IdentityCodes.load(codes)) == 200
        training = (
            "--backbone.embedding_size",
            16,
            "--backbone.width",
            4,
            "--backbone.image_size",
            32,
            "--backbone.channels",
            1,
        )
        schedule = ("--training.epochs", 1, "--training.batch_size", 64)
        command = ("train", *data, "--codes", codes, "--vectors", vectors, "--output", run, *training, *schedule)
        code, text = gif(*command)
        assert code == 0, text
        code, text = gif(
            "train",
            "--data",
            "glyph-words",
            "--identities",
            201,
            "--codes",
            codes,
            "--vectors",
            vectors,
            "--output",
            tmp_path / "other",
            *training,
            *schedule,
        )
        assert (code == 1 and "the same" in text) or "identities" in text
        code, text = gif("evaluate", "--model", run / "backbone.safetensors", *data, "--output", tmp_path)
        assert code == 0, text
        found = json.loads((tmp_path / "evaluation.json").read_text())
        assert tuple(found["held_out"]) == SETS and found["settings"]["identities"] == 800
        assert found["settings"]["of them trained on"] == 0
        code, text = gif("evaluate", "--model", run / "backbone.safetensors", *data, "--held_out", 1)
        assert code == 1 and "was trained on" in text

    def test_vectors_do_not_depend_on_how_images_are_listed(self, parts):
        from gif.encoders import PixelEncoder
        from gif.vectors import initial_code_vectors

        words = open_data("glyph-words", identities=60)
        images, labels = everything(words)
        table = IdentityImages(images, labels, list(words.names))
        one, other = (initial_code_vectors(data, PixelEncoder(16), batch_size=32) for data in (words, table))
        assert one.table.equal(other.table) and one.identities.names == other.identities.names
