"""Glyphs at scale, on fonts written here: found by family, drawn once, told apart, mapped, and resumed after a kill."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont
from safetensors.torch import load_file, save_file

from gif import cli
from gif.data import IdentityImages, IdentitySplit, glyphs_80k, load_data, loading, split_identities
from gif.data.glyphs import from_debian as module
from gif.data.glyphs import report
from gif.data.glyphs.debian_fonts import FAMILIES, Family, find_fonts
from gif.data.glyphs.from_debian import FORMAT, all_glyphs_80k
from gif.files import allocate_tensors, locate_tensor, map_tensor
from gif.progress import console

COMMON = [chr(0x4E00 + i) for i in range(24)]
RARE = [chr(0x20000 + i) for i in range(6)]  # beyond the basic plane
TWINS = ["丸", "凡"]  # one outline in every font
BLANK = "乙"
FIVE = (
    Family("Square", "fonts-square", ("square.ttf",)),
    Family("Wide", "fonts-wide", ("wide.ttc",)),
    Family("Tall", "fonts-tall", ("tall-a.ttf", "tall-b.ttf")),
    Family("Copy of Square", "fonts-square", ("copy.ttf",)),
    Family("Few", "fonts-few", ("few.ttf",)),
)


def font(width: int, height: int, characters: list[str], blank: str = "") -> TTFont:
    """Glyphs of 5 x 5 cells, filled or not as the character's code point decides."""
    glyphs, cmap = {".notdef": TTGlyphPen(None).glyph()}, {}
    for character in characters:
        pen = TTGlyphPen(None)
        pattern = np.random.default_rng(ord(TWINS[0] if character in TWINS else character)).random((5, 5)) < 0.5
        for row, column in np.argwhere(pattern & (character not in blank)).tolist():
            left, bottom = column * width, row * height
            for place, point in enumerate([(0, 0), (0, height), (width, height), (width, 0)]):
                (pen.lineTo if place else pen.moveTo)((left + point[0], bottom + point[1]))
            pen.closePath()
        name = f"u{ord(character):05X}"
        glyphs[name], cmap[ord(character)] = pen.glyph(), name
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(cmap)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    return builder.font


@pytest.fixture(scope="session")
def font_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fonts")
    (folder / "deep" / "down").mkdir(parents=True)
    everything = [*COMMON, *TWINS, BLANK]
    font(180, 180, [*everything, *RARE]).save(folder / "square.ttf")
    font(180, 180, [*everything, *RARE]).save(folder / "deep" / "copy.ttf")
    collection = TTCollection()
    collection.fonts = [font(190, 110, everything, blank=BLANK), font(60, 60, [*everything, *RARE])]
    collection.save(folder / "deep" / "down" / "wide.ttc")
    font(90, 190, everything, blank=BLANK).save(folder / "tall-a.ttf")
    font(40, 40, [*COMMON[:5], *RARE[:4]]).save(folder / "tall-b.ttf")
    font(150, 60, COMMON[:3]).save(folder / "few.ttf")
    return folder


@pytest.fixture(scope="session")
def make(font_folder: Path) -> Callable[..., IdentityImages]:
    def make(cache_dir: Path, **options: Any) -> IdentityImages:
        defaults = {"families": FIVE, "font_folder": font_folder, "workers": 1}
        return all_glyphs_80k(**{**defaults, "cache_dir": cache_dir, **options})

    return make


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(make: Callable[..., IdentityImages], cache_dir: Path) -> IdentityImages:
    return make(cache_dir)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The font files drawn from so far, one entry a chunk."""
    files: list[str] = []
    draw = module._Chunk.draw

    def counted(chunk: Any, images_file: Path) -> Any:
        files.append(chunk.font.name)
        return draw(chunk, images_file)

    monkeypatch.setattr(module._Chunk, "draw", counted)
    return files


def same(one: IdentityImages, other: IdentityImages) -> bool:
    return one.names == other.names and torch.equal(one.labels, other.labels) and torch.equal(one.images, other.images)


def images_of(data: IdentityImages, name: str) -> torch.Tensor:
    return data.images[data.labels == data.names.index(name)]


def cached_file(folder: Path, size: int = 32) -> Path:
    (file,) = folder.glob(f"glyphs-80k-{size}-*.safetensors")
    return file


def test_identities_are_characters_that_enough_families_draw(data: IdentityImages) -> None:
    assert set(data.names) == {*COMMON, "".join(TWINS), *RARE[:4]}  # BLANK and the other rare ones: two families, alike
    assert data.images.shape[1:] == (1, 32, 32)
    counts = dict(zip(data.names, data.labels.bincount().tolist(), strict=True))
    assert counts[COMMON[0]] == 4 and counts[COMMON[10]] == 3  # the copy of Square is dropped
    assert counts["".join(TWINS)] == 3 and counts[RARE[0]] == 2


def test_the_first_file_and_the_first_face_draw(data: IdentityImages) -> None:
    """Tall's first file has 90 x 190 cells; Wide's first face 190 x 110."""
    wide, tall = images_of(data, COMMON[0])[1:3, 0]
    rows = [int((image > 0).any(dim).sum()) for image in (wide, tall) for dim in (1, 0)]
    assert rows[0] < rows[1] and rows[2] > rows[3] and rows[2] > 20


def test_min_families(make: Callable[..., IdentityImages], tmp_path: Path) -> None:
    assert set(make(tmp_path, min_families=5).names) == set(COMMON[:3])
    assert set(make(tmp_path, min_families=2).names) >= {*COMMON, *RARE[:4]}
    for wrong in (1, 6):
        with pytest.raises(ValueError, match=f"min_families is {wrong}; give a number from 2 to 5"):
            make(tmp_path, min_families=wrong)
    with pytest.raises(ValueError, match="size is 48; give 32 or 64"):
        make(tmp_path, size=48)


def test_missing_fonts_name_the_packages(font_folder: Path, tmp_path: Path) -> None:
    shutil.copy(font_folder / "square.ttf", tmp_path)
    shutil.copy(font_folder / "few.ttf", tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        find_fonts(FIVE, tmp_path)
    message = str(error.value)
    assert "found those of fonts-few of the 4 Debian packages" in message  # of fonts-square one file is missing
    assert message.endswith("sudo apt-get install fonts-square fonts-wide fonts-tall")


def test_debian_families_are_each_named_once() -> None:
    for names in ([family.name for family in FAMILIES], [file for family in FAMILIES for file in family.files]):
        assert len(set(names)) == len(names) > 20


def test_other_size_has_the_same_images(
    make: Callable[..., IdentityImages], data: IdentityImages, cache_dir: Path
) -> None:
    large = make(cache_dir, size=64)
    assert large.names == data.names and torch.equal(large.labels, data.labels)
    halved = torch.nn.functional.avg_pool2d(large.images.double(), 2)
    assert (halved - data.images).abs().max() <= 1  # each size is rounded once
    assert len({image.numpy().tobytes() for image in large.images}) == len(large)


def test_other_size_wants_the_same_fonts(
    make: Callable[..., IdentityImages], font_folder: Path, tmp_path: Path
) -> None:
    fonts = shutil.copytree(font_folder, tmp_path / "fonts")
    make(tmp_path / "cache", font_folder=fonts)
    font(150, 70, COMMON[:3]).save(fonts / "few.ttf")
    with pytest.raises(ValueError, match="rendered from other versions of the fonts"):
        make(tmp_path / "cache", font_folder=fonts, size=64)


def test_parts_share_one_mapped_file(font_folder: Path, cache_dir: Path, data: IdentityImages) -> None:
    split = glyphs_80k(families=FIVE, font_folder=font_folder, cache_dir=cache_dir, held_out=0.25)
    assert isinstance(split, IdentitySplit)
    parts: list[Any] = [split.train, split.held_out]
    assert {*split.train.names, *split.held_out.names} == set(data.names)
    assert parts[0]._images.data_ptr() == parts[1]._images.data_ptr()
    for part in parts:
        for name in part.names:
            assert torch.equal(images_of(part, name), images_of(data, name))
        batch, labels = part.batch([3, 0, 5])
        assert torch.equal(batch, part.images[[3, 0, 5]]) and torch.equal(labels, part.labels[[3, 0, 5]])
        assert torch.equal(torch.cat(list(part.image_batches(7))), part.images)
        assert torch.equal(part[4][0], part.images[4])


def test_split_of_a_split(data: IdentityImages) -> None:
    train, held_out = split_identities(data, 0.3, seed=1)
    train, validation = split_identities(train, 0.3, seed=1)
    names = [*train.names, *validation.names, *held_out.names]
    assert sorted(names) == sorted(data.names)
    assert torch.equal(images_of(validation, validation.names[2]), images_of(data, validation.names[2]))
    few = split_identities(data, 5, seed=2)[1]
    assert few.num_identities == 5 and set(few.labels.tolist()) == set(range(5))


@pytest.mark.parametrize("held_out", [0, 1, -1, 1.0, 2.5, float("nan"), 0.01, 1000])
def test_split_refuses(data: IdentityImages, held_out: float) -> None:
    with pytest.raises(ValueError, match=f"held_out is {held_out}"):
        split_identities(data, held_out, seed=0)


def test_rows_are_checked() -> None:
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert len(IdentityImages(images, torch.tensor([0, 0]), ["a"], torch.tensor([2, 0]))) == 2
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 3\), got \[0, 3\]"):
        IdentityImages(images, torch.tensor([0, 0]), ["a"], torch.tensor([3, 0]))
    with pytest.raises(ValueError, match=r"labels must be \(2,\)"):
        IdentityImages(images, torch.tensor([0, 0, 0]), ["a"], torch.tensor([2, 0]))


def test_rendered_once(make: Callable[..., IdentityImages], tmp_path: Path, drawn: list[str]) -> None:
    first = make(tmp_path)
    assert len(drawn) == 6
    assert same(first, make(tmp_path, font_folder=tmp_path)) and len(drawn) == 6  # needs no fonts any more
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".lock"}


def test_processes_draw_the_same(make: Callable[..., IdentityImages], data: IdentityImages, tmp_path: Path) -> None:
    assert same(make(tmp_path, workers=2), data)


def draw_and_die(chunks: int, **options: Any) -> None:
    """Render, until so many chunks are drawn: then the process is killed."""
    draw, count = module._Chunk.draw, iter(range(chunks))

    def dying(self: Any, images_file: Path) -> Any:
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, images_file)

    module._Chunk.draw = dying
    all_glyphs_80k(**options)


def test_a_killed_run_continues(
    make: Callable[..., IdentityImages], data: IdentityImages, font_folder: Path, tmp_path: Path, drawn: list[str]
) -> None:
    options = {"families": FIVE, "font_folder": font_folder, "cache_dir": tmp_path, "workers": 1}
    process = multiprocessing.get_context("fork").Process(target=draw_and_die, args=(3,), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.safetensors"))
    assert same(make(tmp_path), data)
    assert len(drawn) == 3 and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("change", ["damaged", "other fonts"])
def test_an_unusable_beginning_is_not_continued(
    make: Callable[..., IdentityImages],
    data: IdentityImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn: list[str],
    change: str,
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "distinct", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    if change == "damaged":
        partial.write_bytes(partial.read_bytes()[:-100])
    else:
        tensors = load_file(partial)
        save_file(tensors, partial, metadata={"format": module.PARTIAL_FORMAT, "settings": "another font"})
    with console.capture() as capture:
        assert same(make(tmp_path), data)
    assert "rendering starts anew" in capture.get() and len(drawn) == 12


@pytest.mark.parametrize("damage", ["truncated", "empty", "image", "label", "name", "another file"])
def test_damaged_cache_is_rendered_again(
    make: Callable[..., IdentityImages], cache_dir: Path, data: IdentityImages, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / cached_file(cache_dir).name
    content = bytearray(cached_file(cache_dir).read_bytes())
    if damage in ("image", "label"):
        content[locate_tensor(cached_file(cache_dir), f"{damage}s", format=FORMAT).offset + 50] ^= 1
    elif damage == "name":
        content = content.replace(b"\\\\u4e00", b"\\\\u4e99")
    damaged: dict[str, Any] = {"truncated": content[:-100], "empty": b"", "another file": b"hello" * 100}
    file.write_bytes(damaged.get(damage, content))
    assert file.read_bytes() != cached_file(cache_dir).read_bytes()
    with console.capture() as capture:
        assert same(make(tmp_path), data)
    assert "rendering the glyphs again" in capture.get()
    with console.capture() as capture:
        assert same(make(tmp_path), data)
    assert "again" not in capture.get()


def test_data_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.NAMES["glyphs-80k"] is loading.all_glyphs_80k
    larger: Any = loading.NAMES["glyphs-80k-64"]
    assert larger.keywords == {"size": 64}
    images = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8)
    drawn = IdentityImages(images, torch.arange(40) // 2, [str(i) for i in range(20)])
    monkeypatch.setitem(loading.NAMES, "glyphs-80k", lambda: drawn)
    for part, expected in zip(vars(load_data("glyphs-80k", seed=3)).values(), split_identities(drawn, 0.2, 3)):  # noqa: B905
        assert same(part, expected)
    with pytest.raises(ValueError, match="unknown data set 'faces'; there are: glyphs, glyphs-80k, glyphs-80k-64"):
        load_data("faces")


def test_allocated_tensors_are_zeros_to_fill(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    shapes = {"bytes": ((3, 5), torch.uint8), "numbers": ((7,), torch.int64), "floats": ((2, 2), torch.float32)}
    allocate_tensors(path, shapes, format="test/1", note="Ä")
    assert {name: (tuple(t.shape), t.dtype) for name, t in load_file(path).items()} == shapes
    assert not any(tensor.any() for tensor in load_file(path).values())
    map_tensor(path, "numbers", format="test/1", writable=True)[:] = torch.arange(7)
    private = map_tensor(path, "bytes", format="test/1")
    private += 1
    found = load_file(path)
    assert found["numbers"].tolist() == list(range(7)) and not found["bytes"].any() and private.min() == 1
    assert locate_tensor(path, "floats", format="test/1").metadata["note"] == "Ä"


def test_no_room_is_said_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"needs 1000000.0 GB, and its disk has .* GB free; make room"):
        allocate_tensors(tmp_path / "huge", {"bytes": ((10**15,), torch.uint8)}, format="test/1")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gif(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str]]:
    def run(*arguments: object) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["gif", *map(str, arguments)])
        with console.capture() as capture:
            try:
                cli.main()
                code: Any = 0
            except SystemExit as stop:
                code = stop.code
        return code, capture.get()

    return run


def test_command_says_and_draws_what_there_is(
    gif: Callable[..., tuple[Any, str]],
    font_folder: Path,
    data: IdentityImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "all_glyphs_80k", lambda **options: all_glyphs_80k(families=FIVE, **options))
    command = ["data", "glyphs", "--fonts=debian", f"--font_folder={font_folder}", f"--cache_dir={tmp_path}"]
    code, printed = gif(*command, "--workers=1", "--min_families=3", f"--output={tmp_path / 'pictures'}")
    assert code == 0
    table = {cells[1].strip(): cells[2].strip() for line in printed.splitlines() if len(cells := line.split("│")) == 4}
    assert table["identities"] == str(data.num_identities) and table["images"] == str(len(data))
    assert table["images an identity, minimum"] == "2" and table["images an identity, maximum"] == "4"
    assert (tmp_path / "pictures" / "glyphs.png").stat().st_size > 5000


def test_command_draws_with_matplotlibs_fonts(gif: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    code, printed = gif("data", "glyphs", "--min_families=20", "--size=16", f"--cache_dir={tmp_path}")
    assert code == 0 and "1 x 16 x 16" in printed
    code, printed = gif("data", "glyphs", "--workers=1")
    assert code == 1 and "options of --fonts debian" in printed


def test_command_installs_nothing(gif: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    code, printed = gif(
        "data", "glyphs", "--fonts=debian", f"--font_folder={tmp_path}", f"--cache_dir={tmp_path / 'cache'}"
    )
    assert code == 1 and "found those of none of the 14 Debian packages" in printed
    assert "sudo apt-get install fonts-arphic-ukai" in printed and "fonts-wqy-zenhei" in printed
