"""Identities that come later, from images to a run that goes on with them."""

import pytest
import torch
from torch.nn.functional import normalize

from gif.codes import IdentityCodes
from gif.codes import commands as codes_commands
from gif.codes.newcomers import find_move
from gif.data import IdentityImages, IdentitySplit
from gif.encoders import PixelEncoder
from gif.encoders.basis import Basis
from gif.errors import InputError
from gif.training import command as training_command
from gif.vectors import CodeVectors
from gif.vectors import commands as vectors_commands
from gif.vectors.initial import fitted_code_vectors

TINY = ["--backbone.embedding_size=16", "--backbone.image_size=16", "--backbone.width=4"]


def images_of(names):
    """Six images of each; an identity's are the same in every data set."""
    pictures, labels = [], []
    for label, name in enumerate(names):
        generator = torch.Generator().manual_seed(ord(name))
        pattern = torch.randint(0, 200, (1, 1, 16, 16), generator=generator)
        pictures.append(pattern + torch.randint(0, 55, (6, 1, 16, 16), generator=generator))
        labels += [label] * 6
    return IdentityImages(torch.cat(pictures).to(torch.uint8), torch.tensor(labels), list(names))


@pytest.fixture
def data(monkeypatch):
    """Twenty-four identities, and nine more, whose names stand between theirs."""
    every = [chr(ord("A") + number) for number in range(33)]
    old = [name for number, name in enumerate(every) if number % 4 != 1]
    sets = {"old": images_of(old[:24]), "all": images_of(sorted(old[:24] + every[1::4]))}
    for module in (vectors_commands, training_command, codes_commands):
        monkeypatch.setattr(module, "load_data", lambda name, **_: IdentitySplit(sets[name], images_of("ab")))
    return sets


def test_from_images_to_a_run_that_goes_on(data, gif, tmp_path):
    made, spread, codes, run = (tmp_path / name for name in ("v.safetensors", "s.safetensors", "c.safetensors", "run"))
    gif("vectors", "--data=old", "--output", made, "--width=16")
    gif("spread", "--vectors", made, "--output", spread, "--epochs=2")
    gif("tokenize", "--vectors", spread, "--output", codes, "--vocab_size=6", "--length=3")
    train = ["train", *TINY, "--training.batch_size=16", "--training.epochs=1"]
    tables = ["--codes", codes, "--vectors", spread]
    code, printed = gif(*train, "--data=old", *tables, "--output", run)
    assert code == 0, printed

    grown = tmp_path / "grown"
    grow = ["codes", "grow", "--codes", codes, "--made", made, "--vectors", run / "vectors.safetensors"]
    code, printed = gif(*grow, "--data=all", "--output", grown)
    assert code == 0, printed
    assert f"{len(data['all'].names) - 24} came" in printed
    before, after = IdentityCodes.load(codes), IdentityCodes.load(grown / "codes.safetensors")
    moved, everybody = CodeVectors.load(run / "vectors.safetensors"), CodeVectors.load(grown / "vectors.safetensors")
    assert list(after.identities.names) == list(data["all"].names)
    rows = [list(data["all"].names).index(name) for name in data["old"].names]
    assert torch.equal(after.codes[rows], before.codes) and torch.equal(everybody.table[rows], moved.table)

    tables = ["--codes", grown / "codes.safetensors", "--vectors", grown / "vectors.safetensors"]
    code, printed = gif(*train, "--data=all", *tables, "--init", run, "--output", tmp_path / "run2")
    assert code == 0 and f"the head begins with that of {run}" in printed, printed

    code, printed = gif(*grow, "--data=old", "--output", tmp_path / "none")
    assert code == 1 and "nobody in the data set is new" in printed
    Basis.load(made)
    (tmp_path / "v.encoder.safetensors").unlink()
    code, printed = gif(*grow, "--data=all", "--output", tmp_path / "none")
    assert code == 1 and "which says how" in printed and not (tmp_path / "none").exists()


def test_newcomers_are_encoded_in_the_basis_of_the_others(data):
    _, known = fitted_code_vectors(data["old"], PixelEncoder(16))
    everybody = PixelEncoder(16)(data["all"].images).view(len(data["all"].names), 6, -1).mean(1)
    wanted = normalize(known(everybody), dim=1)
    again, same = fitted_code_vectors(
        data["all"], type("Fitted", (PixelEncoder,), {"fit": lambda self, means: known})(16)
    )
    assert torch.allclose(again.table, wanted, atol=1e-5) and torch.equal(same.matrix, known.matrix)


def test_a_move_that_is_linear_is_found():
    torch.manual_seed(0)
    raw = normalize(torch.randn(400, 12), dim=1)
    matrix = torch.randn(12, 12)
    moved = normalize(raw @ matrix.T * (1 + torch.rand(400, 1)) ** 0, dim=1)
    found = find_move(raw, moved)
    assert found.cosine > 0.97
    fresh = normalize(torch.randn(50, 12), dim=1)
    assert (found(fresh) * normalize(fresh @ matrix.T, dim=1)).sum(1).mean() > 0.97
    with pytest.raises(InputError, match=r"\(400, 12\), and as they are now \(400, 3\)"):
        find_move(raw, moved[:, :3])
