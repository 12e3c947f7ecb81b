"""Glyphs: real identities, split so that an error rate measured on them is true."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gif.data.glyphs import from_matplotlib as module
from gif.data.glyphs import glyphs, look_alikes
from gif.data.glyphs.drawing import draw, open_font
from gif.data.images import IdentityImages, IdentitySplit

# Letters, digits and punctuation of Latin, Greek and Cyrillic: everything the defaults do, in seconds.
COMMON: Any = {"min_fonts": 13}
# Latin letters and digits only: for what has to be rendered again.
FEW: Any = {"min_fonts": 20}


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="session")
def split(cache_dir: Path) -> IdentitySplit:
    return glyphs(**COMMON, cache_dir=cache_dir)


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each rendering made so far."""
    sizes: list[int] = []
    render = module._render

    def counted(fonts: dict[Path, list[str]], size: int) -> IdentityImages:
        sizes.append(size)
        return render(fonts, size)

    monkeypatch.setattr(module, "_render", counted)
    return sizes


def parts(split: IdentitySplit) -> list[IdentityImages]:
    found = [split.train, split.held_out]
    assert all(isinstance(part, IdentityImages) for part in found)
    return found  # type: ignore[return-value]


def identity_of(split: IdentitySplit, character: str) -> str:
    (name,) = [name for part in parts(split) for name in part.names if character in name]
    return name


def same(one: IdentitySplit, other: IdentitySplit) -> bool:
    return all(
        a.names == b.names and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(parts(one), parts(other), strict=True)
    )


def test_counts(split: IdentitySplit) -> None:
    identities = split.train.num_identities + split.held_out.num_identities
    assert 1000 < identities < 1300
    spread = (identities * 0.2 * 0.8) ** 0.5  # each identity is held out by its own name, with probability 0.2
    assert abs(split.held_out.num_identities - 0.2 * identities) < 4 * spread
    assert 8 * identities < len(split.train) + len(split.held_out) < 16 * identities


def test_images_and_labels(split: IdentitySplit) -> None:
    for part in parts(split):
        assert part.images.shape[1:] == (1, 32, 32) and part.images.dtype == torch.uint8
        counts = part.labels.bincount(minlength=part.num_identities)
        assert len(counts) == part.num_identities and counts.min() >= 2
        assert part.images.flatten(1).any(1).all()


def test_ink_is_centred(split: IdentitySplit) -> None:
    for axis in (2, 3):
        ink = parts(split)[0].images[:, 0].amax(4 - axis) > 0  # (n, size): rows or columns with ink
        before = ink.int().argmax(1)
        after = ink.flip(1).int().argmax(1)
        assert (before - after).abs().max() <= 1  # the grid's rounding


def test_glyphs_wider_than_the_canvas_are_scaled_to_fit() -> None:
    (path,) = [path for path in module._font_files() if path.stem == "DejaVuSans"]
    image = draw(open_font(path, 32 * look_alikes.SUPERSAMPLING), "Ǆ", 32)  # 1.5 em wide
    assert image is not None
    rows: Any
    columns: Any
    rows, columns = image.any(axis=1), image.any(axis=0)
    assert columns.all() and not rows[0] and not rows[-1]
    assert 0 < image.min(where=image > 0, initial=255) < 255  # smooth, not subsampled


@pytest.mark.parametrize(
    "characters",
    ["AΑА", "oοо", "IΙІ", "BΒВ", "µμ", ",’", "\N{MACRON}\N{COMBINING MACRON BELOW}"],
)
def test_look_alikes_are_one_identity(split: IdentitySplit, characters: str) -> None:
    assert set(characters) <= set(identity_of(split, characters[0]))


@pytest.mark.parametrize("characters", ["Il1|", "O0Qo", "cç", "ÀÁÄ", "mт", "ЗЭ", "E€", ".:,;"])
def test_what_differs_stays_apart(split: IdentitySplit, characters: str) -> None:
    assert len({identity_of(split, character) for character in characters}) == len(characters)


def test_no_identity_is_in_both_parts(split: IdentitySplit) -> None:
    characters = [c for part in parts(split) for name in part.names for c in name]
    assert len(set(characters)) == len(characters)


def test_no_image_occurs_twice(split: IdentitySplit) -> None:
    """Neither under two identities (a false impostor) nor under one (a trivial genuine pair)."""
    images = torch.cat([part.images for part in parts(split)])
    assert len(look_alikes.alike(images[:, 0].numpy(), np.arange(len(images)))) == 0
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_look_alike_pairs_are_those_of_brute_force() -> None:
    """Of more images than are compared each with each, mostly black and white as glyphs are, in an odd size."""
    generator = np.random.default_rng(0)
    originals = generator.choice([0, 60, 128, 200, 255], (300, 17, 17), p=[0.4, 0.05, 0.1, 0.05, 0.4])
    noise = generator.integers(-1, 2, (2, 300, 17, 17)) * generator.choice([1, 24, 47, 48, 49], (2, 300, 1, 1))
    images = np.concatenate([originals, *(originals + noise)]).clip(0, 255).astype(np.uint8)
    images[:100] = images[0]  # no cut tells them apart
    rows = np.flatnonzero(generator.random(len(images)) < 0.8)
    difference = np.stack([np.abs(images.astype(int) - image).max(axis=(1, 2)) for image in images])
    expected = np.argwhere(np.triu(difference <= look_alikes.TOLERANCE, 1))
    expected = expected[np.isin(expected, rows).all(axis=1)]
    found = look_alikes.alike(images, rows)
    assert 2500 < len(expected) < 5000 and len(np.unique(expected)) > 250
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("alike_in", "merged"), [((), False), ((0,), False), ((0, 1), True), ((0, 1, 2, 3), True), ((4,), False)]
)
def test_characters_merge_when_alike_in_half_of_their_fonts(alike_in: tuple[int, ...], merged: bool) -> None:
    """Character 0 is in fonts 0 to 4, character 1 in fonts 0 to 3 (images 5 to 8): they share four."""
    character, fonts = np.array([0] * 5 + [1] * 4), np.array([0, 1, 2, 3, 4, 0, 1, 2, 3])
    pairs = np.array([(font, min(5 + font, 8)) for font in alike_in], dtype=int).reshape(-1, 2)
    identity = look_alikes.identities(character, fonts, pairs)
    assert (identity[0] == identity[1]) == merged


def test_seed_decides_the_split(split: IdentitySplit, cache_dir: Path) -> None:
    assert same(split, glyphs(**COMMON, cache_dir=cache_dir))
    other = glyphs(**COMMON, seed=1, cache_dir=cache_dir)
    assert set(other.held_out.names) != set(split.held_out.names)
    assert sorted(other.train.names + other.held_out.names) == sorted(split.train.names + split.held_out.names)


def test_held_out_and_size_are_obeyed(cache_dir: Path) -> None:
    split = glyphs(**FEW, size=16, held_out=0.5, cache_dir=cache_dir)
    assert abs(split.train.num_identities - split.held_out.num_identities) <= 1
    assert parts(split)[0].images.shape[1:] == (1, 16, 16)


def test_rendered_once(tmp_path: Path, renderings: list[int]) -> None:
    first = glyphs(**FEW, cache_dir=tmp_path)
    assert same(first, glyphs(**FEW, cache_dir=tmp_path))
    assert renderings == [32]


def test_other_images_are_cached_apart(tmp_path: Path, renderings: list[int]) -> None:
    glyphs(**FEW, cache_dir=tmp_path)
    glyphs(**FEW, size=16, cache_dir=tmp_path)
    glyphs(min_fonts=21, cache_dir=tmp_path)
    assert renderings == [32, 16, 32] and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit flipped", "another file"])
def test_damaged_cache_is_rendered_again(
    tmp_path: Path, renderings: list[int], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    first = glyphs(**FEW, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"truncated": content[:-100], "empty": b"", "a bit flipped": flipped, "another file": b"hello" * 100}
    file.write_bytes(damaged[damage])
    capsys.readouterr()

    assert same(first, glyphs(**FEW, cache_dir=tmp_path))
    assert "rendering the glyphs again" in " ".join(capsys.readouterr().out.split())
    assert same(first, glyphs(**FEW, cache_dir=tmp_path))
    assert renderings == [32, 32]


def test_default_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    glyphs(**FEW)
    assert [file.suffix for file in (tmp_path / "gif").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "size is 15"),
        ({"size": 129}, "size is 129"),
        ({"held_out": 0.0}, "held_out is 0.0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"held_out": float("nan")}, "held_out is nan"),
        ({**FEW, "held_out": 0.001}, "both parts need at least 2"),
        ({"min_fonts": 1}, "min_fonts is 1"),
        ({"min_fonts": 1000}, "min_fonts is 1000"),
    ],
)
def test_bad_arguments(cache_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**options, cache_dir=cache_dir)
