"""Small files of every format that is read, always the same bytes."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gif import CodeVectors, GIFLoss, IdentityCodes, TokenizeConfig, tokenize
from gif.backbones import BackboneConfig, save_backbone
from gif.data import Identities, IdentityImages, Names
from gif.data.convert import convert
from gif.data.pairs import write_bin
from gif.evaluation.alignment import FIVE_POINTS
from gif.files import save_tensors, write_text
from gif.progress import console
from gif.resume import UnfinishedWork, claim_folder
from gif.training import TrainingConfig, train
from gif.training.augmentation import RandomAffine

PEOPLE, TEMPLATES_EACH, IMAGES_EACH = 6, 2, 3
HEADER = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
IDENTITIES, CROWD, SIZE, WIDTH = 8, 40, 16, 16
SETTINGS = {"command": "train", "data": {"name": "faces", "identities": 8}, "seed": 0, "lr": 0.1}
BACKBONE = BackboneConfig(embedding_size=WIDTH, image_size=SIZE, width=4, channels=3)
TRAINING = TrainingConfig(epochs=1, batch_size=8, save_steps=1, keep=2)
WORK_FORMAT = "campaign.work/1"


@contextmanager
def unheard() -> Iterator[None]:
    """Nothing is printed."""
    with console.capture():
        yield


def pixels() -> Tensor:
    """(identities, images of each, size, size, 3) uint8."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(256, (IDENTITIES, IMAGES_EACH, SIZE // 4, SIZE // 4, 3), generator=generator)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)


def encoded(image: Tensor, format: str) -> bytes:
    """An image (h, w, 3) as a file."""
    file = BytesIO()
    Image.fromarray(image.numpy()).save(file, format)
    return file.getvalue()


def write_folder(folder: Path) -> Path:
    """A folder an identity; JPEG, PNG and WebP."""
    for identity, images in enumerate(pixels()):
        (folder / f"person {identity}").mkdir(parents=True)
        for number, (image, format) in enumerate(zip(images, ("JPEG", "PNG", "WEBP"), strict=True)):
            path = folder / f"person {identity}" / f"{number}.{format.lower()}"
            path.write_bytes(encoded(image, format))
    return folder


def write_records(folder: Path) -> Path:
    """RecordIO with all that insightface has beside it."""
    convert(str(write_folder(folder.with_name("faces"))), folder, to="rec")
    return folder


def write_shards(folder: Path) -> Path:
    """Three tar shards."""
    convert(str(write_folder(folder.with_name("faces"))), folder, to="tar", shard_size=9)
    return folder


def identities() -> Identities:
    names = Names.of(f"person {identity}" for identity in range(IDENTITIES))
    return Identities(names, {"size": SIZE, "channels": 3, "fit": "squash"}, "faces")


def vectors() -> CodeVectors:
    table = torch.randn(IDENTITIES, WIDTH, generator=torch.Generator().manual_seed(0))
    return CodeVectors(table, identities=identities())


def codes() -> IdentityCodes:
    with unheard():
        return tokenize(vectors(), TokenizeConfig(vocab_size=3))


def head() -> GIFLoss:
    torch.manual_seed(2)
    return GIFLoss(codes(), vectors(), WIDTH, siblings=0)


def write_backbone(path: Path) -> None:
    torch.manual_seed(3)
    save_backbone(path, BACKBONE.build(), BACKBONE, trained_on=identities())


def write_pytorch(path: Path, *, archive: bool = True) -> None:
    """An IResNet's state dict, far narrower than real ones: only its reading is looked at."""
    torch.manual_seed(4)
    state = {"conv1.weight": torch.randn(4, 3, 3, 3), "bn1.weight": torch.ones(4), "fc.weight": torch.randn(8, 16)}
    torch.save(state, path, _use_new_zipfile_serialization=archive)


def crowd() -> IdentityImages:
    """More identities than a step shows: a journal has whole tables and rows."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(256, (CROWD, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
    return IdentityImages(images, torch.arange(CROWD), list(map(str, range(CROWD))))


def untrained() -> tuple[nn.Module, GIFLoss]:
    """The backbone and the head of `write_checkpoints`, before training."""
    torch.manual_seed(5)
    table = torch.randn(CROWD, WIDTH, generator=torch.Generator().manual_seed(0))
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 4)[:CROWD]
    return BACKBONE.build(), GIFLoss(IdentityCodes(tokens, 3), CodeVectors(table), WIDTH, siblings=0)


def write_checkpoints(folder: Path) -> None:
    """The two newest checkpoints of a run that moves its code vectors, and their journal."""
    backbone, moving = untrained()
    train(backbone, moving, crowd(), TRAINING, augment=RandomAffine(), checkpoints=folder)


def write_work(path: Path) -> None:
    """What is kept of long work."""
    UnfinishedWork(path, WORK_FORMAT, SETTINGS).save({"sums": torch.arange(24.0).view(4, 6), "done": torch.tensor(7)})


def write_settings(folder: Path) -> None:
    """The record of what a folder belongs to."""
    claim_folder(folder, SETTINGS)


def write_head(path: Path) -> None:
    save_tensors(path, head().state_dict(), format="gif.head/1", **identities().metadata())


def write_python3_bin(path: Path) -> None:
    """A verification .bin file as this project writes it."""
    images = write_folder(path.with_name("pairs"))
    named = [
        (images / f"person {one}" / "0.jpeg", images / f"person {one if same else 7}" / "1.png", same)
        for one in range(6)
        for same in (True, False)
    ]
    write_bin(path, named, len(named))


def write_array_bin(path: Path) -> None:
    """A verification .bin file whose images are NumPy's arrays."""
    images = [np.frombuffer(encoded(image, "JPEG"), np.uint8) for image in pixels().flatten(0, 1)]
    path.write_bytes(pickle.dumps((images, np.arange(len(images) // 2) % 2 == 0), protocol=2))


def write_pairs(folder: Path) -> None:
    """A list of pairs, as LFW's and as this project's."""
    write_folder(folder / "faces")
    lines = [f"person {one}/0.jpeg\tperson {one + 1}/1.png\t{one % 2}\n" for one in range(IDENTITIES - 1)]
    write_text(folder / "pairs.txt", "".join(lines))


def write_ijb(folder: Path, name: str, galleries: tuple[str, str]) -> Path:
    """Files of the form of "ijbb" or "ijbc", with its galleries: six people, two templates each, of three images."""
    rng = np.random.default_rng(4)
    (folder / "loose_crop").mkdir(parents=True)
    (folder / "meta").mkdir()
    patterns = rng.integers(0, 60, (PEOPLE, 30, 30, 3))
    members, points = [], []
    for number in range(PEOPLE * TEMPLATES_EACH * IMAGES_EACH):
        template = number // IMAGES_EACH
        person = template // TEMPLATES_EACH
        picture = (patterns[person] + rng.integers(0, 150, (30, 30, 3))).astype(np.uint8)
        size = (100 + number, 120 - number)
        Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(
            folder / "loose_crop" / f"{number + 1}.jpg", quality=95
        )
        members.append(f"{number + 1}.jpg {template + 1} {1000 + number % 2}\n")
        landmarks = FIVE_POINTS.numpy() / 112 * size + rng.normal(size=(5, 2))
        points.append(f"{number + 1}.jpg " + " ".join(f"{x:.3f}" for x in landmarks.ravel()) + f" {rng.random():.4f}\n")
    templates = range(1, PEOPLE * TEMPLATES_EACH + 1)
    pairs = [f"{a} {b} {int((a - 1) // 2 == (b - 1) // 2)}\n" for a in templates for b in templates if a < b]
    files = {
        f"{name}_face_tid_mid.txt": "".join(members),
        f"{name}_name_5pts_score.txt": "".join(points),
        f"{name}_template_pair_label.txt": "".join(pairs),
        f"{name}_1N_gallery_{galleries[0]}.csv": f"{HEADER}1,101,a.jpg\n1,101,b.jpg\n3,102,c.jpg\n",
        f"{name}_1N_gallery_{galleries[1]}.csv": f'{HEADER}5,103,"d,e.jpg"\n7,104,f.jpg\n',
        f"{name}_1N_probe_mixed.csv": HEADER + "".join(f"{t},{101 + (t - 1) // 2},x\r\n" for t in range(2, 13, 2)),
    }
    for file, text in files.items():
        (folder / "meta" / file).write_bytes(text.encode("ascii"))
    return folder


def write_python2_bin(path: Path, images: Sequence[bytes], issame: Sequence[bool]) -> Path:
    """A verification .bin file as Python 2 writes it, opcode by opcode."""
    strings = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    flags = b"".join(b"\x88" if same else b"\x89" for same in issame)
    path.write_bytes(b"\x80\x02(](" + strings + b"e](" + flags + b"et.")
    assert pickle.loads(path.read_bytes(), encoding="bytes") == (list(images), [bool(same) for same in issame])
    return path
