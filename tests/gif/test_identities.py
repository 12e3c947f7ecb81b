"""Identities are known by their names: who is held out, whose row is whose, whom a backbone was trained on."""

import hashlib
import json
import os
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gif.backbones import BackboneConfig, load_backbone, load_trained_on, save_backbone
from gif.codes import IdentityCodes, TokenizeConfig, tokenize
from gif.data import IdentityImages, ImageDecoder, load_data, open_data, split_identities
from gif.data.identities import FORMAT, Identities, Names, require_same_names
from gif.data.images import some_identities
from gif.encoders import PixelEncoder
from gif.files import load_tensors
from gif.losses import GIFLoss, HeadConfig, MarginSoftmax
from gif.resume import UnfinishedWork, claim_folder, differences
from gif.vectors import CodeVectors, SpreadConfig, initial_code_vectors, spread_code_vectors
from gif.vectors.distributed_table import DistributedTable

SIZE = 16
TINY = ["--backbone.embedding_size=16", f"--backbone.image_size={SIZE}", "--backbone.width=4", "--backbone.channels=3"]
OFF: dict[str, Any] = {"regression_weight": 0.0}
NAMES = ["anna", "bob", "Čeněk", "d/dora", "", "emil\nx", "f\udce9"]


@pytest.fixture
def people(tmp_path, png):
    """Write a folder of people, three noisy pictures each: (their names, the folder's name) -> the folder."""

    def write(names, folder="people"):
        for name in names:
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
            place = tmp_path / folder / name
            place.mkdir(parents=True)
            pattern = torch.randint(0, 150, (3, SIZE, SIZE), generator=generator)
            for number in range(3):
                noise = torch.randint(0, 100, (3, SIZE, SIZE), generator=generator)
                (place / f"{number}.png").write_bytes(png((pattern + noise).to(torch.uint8)))
        return tmp_path / folder

    return write


def in_memory(names):
    return IdentityImages(torch.zeros(len(names), 1, 2, 2, dtype=torch.uint8), torch.arange(len(names)), names)


def someone(*numbers):
    return [f"person {number}" for number in (numbers or range(60))]


class TestNames:
    def test_is_a_sequence_of_strings(self):
        names = Names.of(NAMES)
        assert list(names) == NAMES and names == NAMES and names == tuple(NAMES) and len(names) == len(NAMES)
        assert names[0] == "anna" and names[-1] == NAMES[-1] and names[1:3] == NAMES[1:3] and "bob" in names
        assert names.index("bob") == 1 and Names.of(names) is names and names + names == NAMES * 2
        assert names != NAMES[:-1] and names != [*NAMES[:-1], "g"]
        numbers: Any = range(3)
        assert Names.of(numbers) == ["0", "1", "2"]
        assert Names.of([]) == [] and repr(Names.of("ab")) == "Names(['a', 'b'], 2)"
        for index in (7, -8):
            with pytest.raises(IndexError):
                names[index]

    def test_some_of_them(self):
        keep = torch.tensor([False, True, True, False, True, True, False])
        assert Names.of(NAMES).where(keep) == [name for name, kept in zip(NAMES, keep, strict=True) if kept]

    def test_a_digest_is_of_the_name_alone(self):
        """The values are BLAKE2b's, so that a split made today is made by every version."""
        found = Names.of(NAMES).digests("7 0")
        for name, digest in zip(NAMES, found.tolist(), strict=True):
            encoded = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=b"7 0").digest()
            assert digest == int.from_bytes(encoded, "little", signed=True)
        assert torch.equal(Names.of(NAMES[::-1]).digests("7 0"), found.flip(0))
        assert Names.of([]).digests().shape == (0,)

    def test_a_file_keeps_them(self, tmp_path):
        who = Identities(Names.of(NAMES), {"size": 8}, "faces")
        who.save(tmp_path / "i.safetensors")
        found = Identities.load(tmp_path / "i.safetensors")
        assert found.names == who.names and found.images == who.images and found.data == "faces"
        assert set(load_tensors(tmp_path / "i.safetensors", format=FORMAT)[0]) == {"names", "name_ends"}


class TestSplit:
    @pytest.mark.parametrize("held_out", [0.2, 0.5, 0.07])
    def test_one_identity_more_moves_nobody(self, held_out):
        _, before = split_identities(in_memory(someone()), held_out, seed=3)
        for number in range(60, 90):
            newcomer = f"a person {number}"  # the first in the order of the names
            train, after = split_identities(in_memory([newcomer, *someone()]), held_out, seed=3)
            assert set(after.names) - {newcomer} == set(before.names)
            assert sorted([*train.names, *after.names]) == sorted([newcomer, *someone()])

    def test_nor_does_one_fewer_or_another_order(self):
        _, before = split_identities(in_memory(someone()), 0.3, seed=0)
        for gone in someone():
            left = [name for name in reversed(someone()) if name != gone]
            assert set(split_identities(in_memory(left), 0.3, seed=0)[1].names) == set(before.names) - {gone}

    def test_the_seed_and_the_share_decide(self):
        names = someone(*range(4000))
        held = {seed: set(split_identities(in_memory(names), 0.2, seed)[1].names) for seed in range(5)}
        for found in held.values():  # binomial: a deviation of 25
            assert abs(len(found) - 800) < 100
        for seed in range(1, 5):  # independent: 160 in common
            assert abs(len(held[0] & held[seed]) - 160) < 60
        assert held[0] < set(split_identities(in_memory(names), 0.3, 0)[1].names)

    def test_a_whole_number_holds_out_so_many_and_never_one_that_was_trained_on(self):
        train, held = split_identities(in_memory(someone()), 7, seed=1)
        assert held.num_identities == 7 and train.num_identities == 53
        for newcomer in range(60, 90):
            _, after = split_identities(in_memory(someone(*range(60), newcomer)), 7, seed=1)
            assert after.num_identities == 7 and not set(after.names) & set(train.names)
            assert len(set(after.names) & set(held.names)) >= 6

    def test_small_sets_have_two_on_either_side(self):
        for number in range(4, 12):
            for seed in range(30):
                parts = split_identities(in_memory(someone(*range(number))), 0.5, seed)
                assert min(part.num_identities for part in parts) >= 2

    def test_a_part_can_be_split_again_by_the_same_seed(self):
        names = someone(*range(500))
        train, held = split_identities(in_memory(names), 0.2, seed=0)
        _, validation = split_identities(train, 0.2, seed=0)
        assert abs(validation.num_identities - 80) < 40
        more = split_identities(in_memory([*names, "newcomer"]), 0.2, seed=0)
        again = split_identities(more[0], 0.2, seed=0)[1]
        assert set(again.names) - {"newcomer"} == set(validation.names)
        some = some_identities(held, 10)
        assert some.num_identities == 10
        assert len(set(some_identities(more[1], 10).names) & set(some.names)) >= 9

    @pytest.mark.parametrize("held_out", [0.3, 4])
    def test_every_format_holds_out_the_same(self, gif, people, tmp_path, held_out):
        folder = people(someone(*range(20)))
        wanted = load_data(str(folder), held_out=held_out).held_out.names
        assert 2 <= len(wanted) < 18
        for format in ("rec", "tar"):
            assert gif("data", "convert", "--data", folder, "--output", tmp_path / format, "--to", format)[0] == 0
            assert sorted(load_data(str(tmp_path / format), held_out=held_out).held_out.names) == sorted(wanted)

    def test_a_folder_more_moves_no_other(self, people):
        folder = people(someone(*range(20)))
        before = load_data(str(folder)).held_out.names
        people(["aaron"])
        after = load_data(str(folder)).held_out.names
        assert [name for name in after if name != "aaron"] == list(before)


READ_AS = {"channels": 3, "size": SIZE, "fit": "squash"}


@pytest.fixture
def chain(gif, people, tmp_path):
    """A folder of 24 people, 20 of them or so trained on: code vectors, spread ones, codes, and how to train."""
    folder = people(someone(*range(24)))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("vectors", "spread", "codes")}
    data = ["--data", folder]
    assert gif("vectors", *data, "--output", files["vectors"], "--width=16", f"--image_size={SIZE}")[0] == 0
    assert gif("spread", "--vectors", files["vectors"], "--output", files["spread"], "--epochs=1")[0] == 0
    assert gif("tokenize", "--vectors", files["spread"], "--output", files["codes"], "--vocab_size=5")[0] == 0

    def train(*more, output=tmp_path / "run", vectors=files["spread"]):
        command = ["train", *data, "--output", output, "--codes", files["codes"], "--vectors", vectors, *TINY]
        return gif(*command, "--training.epochs=1", "--training.batch_size=8", *more)

    return folder, files, train


class TestTables:
    def test_every_file_says_whose_rows_it_has(self, gif, chain, tmp_path):
        folder, files, train = chain
        names = load_data(str(folder)).train.names
        for mmap in (False, True):
            for name in ("vectors", "spread"):
                who = CodeVectors.load(files[name], mmap=mmap).identities
                assert who.names == names and who.images == READ_AS and who.data == str(folder)
        in_file = tmp_path / "in_file.safetensors"
        command = ["spread", "--vectors", files["vectors"], "--output", in_file, "--epochs=1", "--in_file=true"]
        assert gif(*command)[0] == 0
        assert CodeVectors.load(in_file).identities.names == names
        codes = IdentityCodes.load(files["codes"])
        assert codes.identities.names == names and codes.identities.images == READ_AS

        assert train()[0] == 0
        run = tmp_path / "run"
        assert CodeVectors.load(run / "vectors.safetensors").identities.names == names
        assert Identities.load(run / "identities.safetensors").names == names
        head = load_tensors(run / "head.safetensors", format="gif.head/1")
        assert head[1]["identities"] == codes.identities.metadata()["identities"]
        trained = load_trained_on(run / "backbone.safetensors")
        assert torch.equal(trained.digests, names.digests()) and trained.images == READ_AS
        assert trained.data == str(folder)
        load_backbone(run / "backbone.safetensors")

    def test_a_renamed_folder_is_refused(self, chain, tmp_path):
        folder, _, train = chain
        names = list(load_data(str(folder)).train.names)
        renamed = next(name for name in map("zoe {}".format, range(99)) if name in _trained_of([*names, name]))
        (folder / names[0]).rename(folder / renamed)
        code, printed = train()
        assert code == 1 and "the codes" in printed and "the data set" in printed
        assert f'1 not in the data set ("{names[0]}")' in printed and f'1 not in the codes ("{renamed}")' in printed
        assert f'identity 0 is "{names[0]}" in the codes and "{names[1]}" in the data set' in printed
        assert not (tmp_path / "run").exists()

    def test_one_folder_more_and_another_share_are_refused(self, chain, people):
        folder, _, train = chain
        names = list(load_data(str(folder)).train.names)
        code, printed = train("--held_out=0")
        assert code == 1 and f"{24 - len(names)} not in the codes" in printed
        newcomer = next(name for name in someone(*range(100, 200)) if name in _trained_of([*names, name]))
        people([newcomer])
        code, printed = train()
        assert code == 1 and f'1 not in the codes ("{newcomer}")' in printed

    def test_vectors_of_others_than_the_codes(self, gif, chain, tmp_path):
        folder, files, train = chain
        other = tmp_path / "other.safetensors"
        command = ["vectors", "--data", folder, "--output", other, "--width=16"]
        assert gif(*command, "--image_size=20")[0] == 0
        code, printed = train(vectors=other)
        assert code == 1 and "read in different settings (size 16 and 20)" in printed
        code, printed = gif("codes", "inspect", "--codes", files["codes"], "--vectors", other)
        assert code == 1 and "size 16 and 20" in printed

    def test_swapped_rows(self):
        who = [Identities(Names.of(names)) for names in (["a", "b", "c"], ["b", "a", "c"])]
        vectors = [CodeVectors(torch.eye(3) + 1, identities=identities) for identities in who]
        codes = tokenize(vectors[0], TokenizeConfig(vocab_size=3))
        with pytest.raises(ValueError, match=r'identity 0 is "a" in the codes and "b" in the code vectors'):
            GIFLoss(codes, vectors[1], 3)
        with pytest.raises(ValueError, match='identity 0 is "b" in the code vectors and "a" in the data set'):
            HeadConfig(kind="softmax", centers="vectors").build(3, 3, None, vectors[1], identities=who[0])
        with pytest.raises(ValueError, match='identity 0 is "a" in the codes and "b" in the data set'):
            HeadConfig().build(3, 3, codes, vectors[0], identities=who[1])
        GIFLoss(codes, vectors[0], 3)
        assert isinstance(HeadConfig(kind="softmax").build(3, 3, None, vectors[1], identities=who[0]), MarginSoftmax)

    def test_a_head_knows_whose_codes_it_was_trained_with(self):
        table = torch.eye(3) + 1
        known, others, bare = (
            GIFLoss(
                tokenize(CodeVectors(table, identities=who), TokenizeConfig(vocab_size=3)),
                None,
                3,
                recipe="paper",
                **OFF,
            )
            for who in (Identities(Names.of("abc")), Identities(Names.of("abd")), None)
        )
        with pytest.raises(ValueError, match="trained with the codes of identities of other names"):
            others.load_state_dict(known.state_dict())
        for one, other in ((known, known), (known, bare), (bare, known)):  # of a version before, or of bare tensors
            other.load_state_dict(one.state_dict())
        with pytest.raises(ValueError, match="trained with another code table"):
            known.load_state_dict({**known.state_dict(), "_extra_state": torch.empty(0, dtype=torch.uint8)})

    def test_any_name_can_be_told(self):
        """A name may hold anything that a file's name can: the message is one line of UTF-8."""
        one, other = (Identities(Names.of(names)) for names in (["a", "f\udce9\n"], ["a", 'é"']))
        with pytest.raises(ValueError) as raised:
            require_same_names("the codes", one, "the data set", other)
        message = str(raised.value)
        assert "\n" not in message and message.encode() and r"f\\udce9\n" in message and r'"é\""' in message

    def test_bare_tables_have_no_names_and_fit_every_data_set(self, tmp_path):
        who = Identities(Names.of("abc"))
        vectors = CodeVectors(torch.eye(3) + 1)
        codes = tokenize(vectors.table, TokenizeConfig(vocab_size=3))
        assert vectors.identities is None and codes.identities is None
        HeadConfig().build(3, 3, codes, vectors, identities=who)
        vectors.save(tmp_path / "v.safetensors")
        codes.save(tmp_path / "c.safetensors")
        assert CodeVectors.load(tmp_path / "v.safetensors", mmap=True).identities is None
        assert IdentityCodes.load(tmp_path / "c.safetensors").identities is None
        assert load_file(tmp_path / "v.safetensors").keys() == {"vectors"}
        with pytest.raises(ValueError, match="there are 3 vectors and 2 identities"):
            CodeVectors(torch.eye(3), identities=Identities(Names.of("ab")))
        with pytest.raises(ValueError, match="there are 3 codes and 2 identities"):
            IdentityCodes(codes.codes, 3, identities=Identities(Names.of("ab")))

    @pytest.mark.parametrize("mmap", [False, True])
    def test_damaged_names_are_found(self, tmp_path, mmap):
        path = tmp_path / "v.safetensors"
        CodeVectors(torch.eye(3), identities=Identities(Names.of(["anna", "bob", "eva"]), {"size": 8})).save(path)
        content = path.read_bytes()
        for old, new in ((b"bob", b"rob"), (b'\\"size\\": 8', b'\\"size\\": 9')):
            assert content.count(old) == 1
            path.write_bytes(content.replace(old, new))
            with pytest.raises(ValueError, match="is damaged: "):
                CodeVectors.load(path, mmap=mmap)
        tensors = load_file(path)
        metadata = {"format": "gif.code_vectors/1", **Identities(Names.of(["anna", "bob", "eva"])).metadata()}
        del tensors["names"]
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=r"no tensor named names|is damaged"):
            CodeVectors.load(path, mmap=mmap)


class TestExtend:
    def test_newcomers_keep_their_names(self, gif, chain, people, tmp_path):
        _, files, _ = chain
        newcomers, output = tmp_path / "new.safetensors", tmp_path / "all.safetensors"
        folder = people(["zoe", "yan", "xaver"], "newcomers")
        command = ["vectors", "--data", folder, "--held_out=0", "--output", newcomers, "--width=16"]
        assert gif(*command, f"--image_size={SIZE}")[0] == 0
        extend = ["codes", "extend", "--codes", files["codes"], "--output", output]
        assert gif(*extend, "--vectors", newcomers)[0] == 0
        before, after = (IdentityCodes.load(path).identities for path in (files["codes"], output))
        assert after.names == [*before.names, "xaver", "yan", "zoe"] and after.images == READ_AS
        code, printed = gif(*extend, "--vectors", files["vectors"])
        assert code == 1 and f"{len(before)} of {len(before)} newcomers are there already" in printed
        assert gif(*command, "--image_size=20")[0] == 0
        code, printed = gif(*extend, "--vectors", newcomers)
        assert code == 1 and "size 16 and 20" in printed

    def test_without_names_there_are_none(self, gif, chain, tmp_path):
        _, files, _ = chain
        table = torch.nn.functional.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=1)
        CodeVectors(table).save(tmp_path / "bare.safetensors")
        assert IdentityCodes.load(files["codes"]).extend(table).identities is None
        command = ["codes", "extend", "--codes", files["codes"], "--vectors", tmp_path / "bare.safetensors"]
        code, printed = gif(*command, "--output", tmp_path / "all.safetensors")
        assert code == 0 and "does not say whose vectors they are" in printed


class TestContinuing:
    """What is continued must be what was begun: a replaced input is refused, and says what differs."""

    @pytest.fixture
    def interrupted(self, gif, people, tmp_path, monkeypatch):
        """`gif vectors` that was interrupted after two batches of eight."""
        folder = people(someone(*range(12)))
        command = ["vectors", "--data", folder, "--held_out=0", "--output", tmp_path / "v.safetensors", "--width=16"]
        command += ["--batch_size=8"]
        encode, calls = PixelEncoder.__call__, []

        def interrupt(self, images):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encode(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(PixelEncoder, "__call__", interrupt)
            assert gif(*command, f"--image_size={SIZE}")[0] == 130
        assert (tmp_path / "v.partial").exists()
        return folder, lambda *more: gif(*command, *(more or [f"--image_size={SIZE}"]))

    def test_vectors_of_another_image_size(self, interrupted, tmp_path):
        _, again = interrupted
        code, printed = again("--image_size=20")
        assert code == 1 and "data.read as.size is 16 there and 20 here" in printed
        assert again()[0] == 0

    def test_vectors_of_another_image(self, interrupted, png):
        folder, again = interrupted
        path = folder / "person 5" / "1.png"
        before = path.read_bytes()
        path.write_bytes(png(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)))
        code, printed = again()
        assert code == 1 and "checkpoint of another run (data.sample of the images is " in printed
        path.write_bytes(before)
        os.utime(path, (0, 0))  # the data set was copied anew: it is the same
        assert again()[0] == 0

    def test_vectors_of_another_name(self, interrupted):
        folder, again = interrupted
        (folder / "person 5").rename(folder / "person 50")  # at the same place in the order of the names
        code, printed = again()
        assert code == 1 and "data.names is " in printed and "data.labels" not in printed

    def test_spread_in_file_of_a_replaced_source(self, gif, tmp_path, monkeypatch):
        source, output = tmp_path / "v.safetensors", tmp_path / "s.safetensors"
        CodeVectors(torch.randn(300, 8, generator=torch.Generator().manual_seed(0))).save(source)
        command = ["spread", "--vectors", source, "--output", output, "--epochs=2", "--batch=50", "--in_file=true"]
        assert gif(*command)[0] == 0
        wanted = output.read_bytes()
        output.unlink()
        self.interrupt_rounds(gif, command, monkeypatch)
        begun = source.read_bytes()
        table = CodeVectors.load(source).table.clone()
        table[137] = -table[137]  # one row
        CodeVectors(table, normalized=True).save(source)
        code, printed = gif(*command)
        assert code == 1 and "holds a run with other settings (vectors is " in printed and not output.exists()
        source.write_bytes(begun)
        assert gif(*command)[0] == 0 and output.read_bytes() == wanted

    def test_spread_in_memory_of_a_replaced_source(self, gif, tmp_path, monkeypatch):
        source, output = tmp_path / "v.safetensors", tmp_path / "s.safetensors"
        CodeVectors(torch.randn(300, 8, generator=torch.Generator().manual_seed(0))).save(source)
        command = ["spread", "--vectors", source, "--output", output, "--epochs=2", "--batch=50"]
        self.interrupt_rounds(gif, command, monkeypatch)
        CodeVectors(torch.randn(300, 8, generator=torch.Generator().manual_seed(1))).save(source)
        code, printed = gif(*command)
        assert code == 1 and "checkpoint of another run (vectors is " in printed

    def test_a_table_that_was_replaced_in_its_file_is_left_alone(self, tmp_path, monkeypatch):
        path = tmp_path / "v.safetensors"
        CodeVectors(torch.randn(1200, 8, generator=torch.Generator().manual_seed(0))).save(path)
        begun = path.read_bytes()
        mapped = CodeVectors.load(path, mmap=True, writable=True)
        put, calls = DistributedTable.put, []

        def interrupt(self, rows, vectors):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            put(self, rows, vectors)

        with monkeypatch.context() as patch:
            patch.setattr(DistributedTable, "put", interrupt)
            with pytest.raises(KeyboardInterrupt):
                spread_code_vectors(mapped, SpreadConfig(epochs=2, batch=50), checkpoint=tmp_path / "journal")
        half = path.read_bytes()
        assert half != begun
        CodeVectors(torch.randn(1200, 8, generator=torch.Generator().manual_seed(1))).save(path)
        replaced = CodeVectors.load(path).table
        other = CodeVectors.load(path, mmap=True, writable=True)
        with pytest.raises(ValueError, match="is not the table that"):
            spread_code_vectors(other, SpreadConfig(epochs=2, batch=50), checkpoint=tmp_path / "journal")
        assert torch.equal(CodeVectors.load(path).table, replaced)
        path.write_bytes(half)
        again = CodeVectors.load(path, mmap=True, writable=True)
        spread_code_vectors(again, SpreadConfig(epochs=2, batch=50), checkpoint=tmp_path / "journal")
        whole = CodeVectors(torch.randn(1200, 8, generator=torch.Generator().manual_seed(0)))
        spread_code_vectors(whole, SpreadConfig(epochs=2, batch=50))
        assert torch.equal(again.table, whole.table)

    def test_tokenizing_another_table(self, tmp_path, monkeypatch):
        table = torch.nn.functional.normalize(torch.randn(9000, 4, generator=torch.Generator().manual_seed(0)), dim=1)
        UnfinishedWork.remove, remove = (lambda self: None), UnfinishedWork.remove
        try:
            tokenize(table, TokenizeConfig(vocab_size=10), checkpoint=tmp_path / "t.partial")
        finally:
            UnfinishedWork.remove = remove
        other = table.clone()
        other[4321] = -other[4321]
        with pytest.raises(ValueError, match=r"another run \(vectors is "):
            tokenize(other, TokenizeConfig(vocab_size=10), checkpoint=tmp_path / "t.partial")

    def test_training_on_replaced_vectors_or_data(self, chain, png, tmp_path):
        folder, files, train = chain
        assert train()[0] == 0
        weights = (tmp_path / "run" / "backbone.safetensors").read_bytes()
        given = files["spread"].read_bytes()
        vectors = CodeVectors.load(files["spread"])
        table = vectors.table.clone()
        table[3] = -table[3]
        CodeVectors(table, normalized=True, identities=vectors.identities).save(files["spread"])
        code, printed = train()
        assert code == 1 and "holds a run with other settings (vectors is " in printed
        files["spread"].write_bytes(given)
        path = folder / vectors.identities.names[2] / "1.png"
        before = path.read_bytes()
        path.write_bytes(png(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)))
        code, printed = train()
        assert code == 1 and "data.sample of the images is " in printed
        path.write_bytes(before)
        code, printed = train("--training.lr=0.2", "--head.overrides.scale=17")
        assert code == 1 and "training.lr is 0.1 there and 0.2 here" in printed
        assert "head.overrides.scale is not set there and 17" in printed and "training.momentum" not in printed
        moved = folder.rename(tmp_path / "elsewhere")
        moved.rename(folder)
        assert train()[0] == 0
        assert (tmp_path / "run" / "backbone.safetensors").read_bytes() == weights

    def test_a_run_names_who_differs(self, chain, tmp_path):
        folder, _, train = chain
        names = list(load_data(str(folder)).train.names)
        run = ["--head.kind=softmax"]
        bare = ["--codes=null", "--vectors=null"]
        assert train(*run, *bare)[0] == 0
        gone = names[4]
        shutil.rmtree(folder / gone)
        code, printed = train(*run, *bare)
        assert code == 1 and f'1 not in the data set ("{gone}")' in printed and "the run in" in printed

    def interrupt_rounds(self, gif, command, monkeypatch):
        collect, calls = DistributedTable.collect, []

        def interrupt(self, round, rows):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return collect(self, round, rows)

        with monkeypatch.context() as patch:
            patch.setattr(DistributedTable, "collect", interrupt)
            assert gif(*command)[0] == 130


class TestDifferences:
    def test_each_setting_is_named_with_both_values(self):
        old = {"lr": 0.1, "head": {"scale": 64.0, "kind": "gif", "overrides": {}}, "gone": None, "fars": [1, 2]}
        new = {"lr": 0.2, "head": {"scale": 64.0, "kind": "softmax", "overrides": {"a": 1}}, "fars": (1, 2), "é": "ü"}
        assert differences(json.dumps(old), json.dumps(new)) == (
            'lr is 0.1 there and 0.2 here, head.kind is "gif" there and "softmax" here, head.overrides is {} there and '
            "not set here, gone is null there and not set here, head.overrides.a is not set there and 1 here, é is not "
            'set there and "ü" here'
        )
        assert differences(json.dumps(old), json.dumps(dict(reversed(old.items())))) == ""
        assert "cannot be read: 'spam'" in differences("spam", json.dumps(new))

    def test_folders_and_checkpoints_say_it(self, tmp_path):
        claim_folder(tmp_path / "run", {"command": "x", "lr": 0.1})
        with pytest.raises(ValueError, match=r"other settings \(lr is 0\.1 there and 0\.2 here; all of them are in"):
            claim_folder(tmp_path / "run", {"command": "x", "lr": 0.2})
        claim_folder(tmp_path / "run", {"lr": 0.1, "command": "x"})
        UnfinishedWork(tmp_path / "w", "gif.test/1", {"seed": 1, "m": 5}).save({"a": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"another run \(seed is 1 there and 2 here\)"):
            UnfinishedWork(tmp_path / "w", "gif.test/1", {"seed": 2, "m": 5}).load()


class TestOverlap:
    """A backbone is judged on those it never saw, or it is said."""

    @pytest.fixture
    def model(self, people, tmp_path):
        """A folder of 24 people, and a backbone that says it was trained on four fifths of them."""
        folder = people(someone(*range(24)))
        config = BackboneConfig(embedding_size=16, image_size=SIZE, width=4, channels=3)
        torch.manual_seed(0)
        train = load_data(str(folder), decoder=ImageDecoder(SIZE)).train
        save_backbone(tmp_path / "b.safetensors", config.build(), config, trained_on=train.identities)
        return tmp_path / "b.safetensors", folder, train

    def run(self, gif, model, folder, *more):
        code, printed = gif("evaluate", "--model", model, "--data", folder, *more)
        found = json.loads((model.parent / "evaluation.json").read_text()) if code == 0 else {}
        return code, printed, found

    def test_held_out_identities_are_judged_before_and_after_others_came(self, gif, model, people):
        path, folder, _ = model
        code, printed, found = self.run(gif, path, folder)
        assert code == 0 and found["settings"]["of them trained on"] == 0 and "trained on (" not in printed
        people(someone(*range(100, 130)))
        code, _, more = self.run(gif, path, folder)
        assert code == 0 and more["settings"]["identities"] > found["settings"]["identities"]

    def test_an_overlap_is_refused_dropped_or_named(self, gif, model):
        path, folder, train = model
        count, told = train.num_identities, f"{train.num_identities} of the 24 identities to be judged"
        code, printed, _ = self.run(gif, path, folder, "--held_out=1")
        assert code == 1 and told in printed and f'"{train.names[0]}"' in printed and "--overlap drop" in printed
        assert not (path.parent / "evaluation.json").exists()
        code, printed, found = self.run(gif, path, folder, "--held_out=1", "--overlap=drop")
        assert code == 0 and told in printed and "left out" in printed
        assert found["settings"]["identities"] == 24 - count and found["settings"]["of them trained on"] == 0
        _, _, right = self.run(gif, path, folder)
        assert found["held_out"] == right["held_out"]
        code, printed, found = self.run(gif, path, folder, "--held_out=1", "--overlap=keep")
        assert code == 0 and told in printed and found["settings"]["of them trained on"] == count

    def test_numbers_of_another_data_set_are_named_and_of_the_same_refused(self, gif, people, tmp_path):
        config = BackboneConfig(embedding_size=16, image_size=SIZE, width=4, channels=3)
        folder = people(map(str, range(8)), "numbers")
        for other, expected in ((people(map(str, range(6)), "others"), 0), (folder, 1)):
            who = open_data(str(folder), decoder=ImageDecoder(SIZE)).identities
            save_backbone(tmp_path / "n.safetensors", config.build(), config, trained_on=who)
            code, printed, _ = self.run(gif, tmp_path / "n.safetensors", other, "--held_out=1")
            assert code == expected and "identities to be judged are called as ones" in printed

    def test_a_backbone_that_does_not_say(self, gif, model, tmp_path):
        _, folder, _ = model
        config = BackboneConfig(embedding_size=16, image_size=SIZE, width=4, channels=3)
        save_backbone(tmp_path / "old.safetensors", config.build(), config)
        assert load_trained_on(tmp_path / "old.safetensors") is None
        code, printed, found = self.run(gif, tmp_path / "old.safetensors", folder, "--held_out=1")
        assert code == 0 and "does not say whom it was trained on" in printed
        assert found["settings"]["of them trained on"] is None

    def test_images_are_read_as_in_training(self, gif, people, tmp_path, png, monkeypatch):
        folder = people(someone(*range(8)))
        config = BackboneConfig(embedding_size=16, image_size=SIZE, width=4, channels=3)
        train = load_data(str(folder), held_out=4, decoder=ImageDecoder(SIZE, fit="crop")).train
        save_backbone(tmp_path / "c.safetensors", config.build(), config, trained_on=train.identities)
        seen = []
        monkeypatch.setattr(
            "gif.evaluation.command.load_data", lambda *a, **k: seen.append(k["decoder"]) or load_data(*a, **k)
        )
        assert self.run(gif, tmp_path / "c.safetensors", folder, "--held_out=4")[0] == 0
        assert seen == [ImageDecoder(SIZE, fit="crop")]


def test_vectors_of_a_data_set_know_it():
    data = IdentityImages(torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8), torch.arange(6) // 2, list("abc"))
    made = initial_code_vectors(data, PixelEncoder(4))
    assert made.identities.names == ["a", "b", "c"]
    assert made.identities.images == {"channels": 1, "height": 8, "width": 8}
    assert made.fingerprint() != CodeVectors(made.table, normalized=True).fingerprint()


def test_sixty_four_million_names_cost_bytes_not_objects():
    """Packed, a million names take what their bytes and ends take; a split touches them once."""
    names = Names.of(f"{number:07d}" for number in range(200_000))
    assert names.data.nbytes + names.ends.nbytes == 200_000 * (7 + 8)
    found = names.digests()
    assert found.nbytes == 8 * 200_000 and len(np.unique(found.numpy())) == 200_000


def _trained_of(names):
    return set(split_identities(in_memory(names), 0.2, 0)[0].names)
