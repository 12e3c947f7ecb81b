"""What `gif run` decides from the data, the device and the budget: every choice with its reason."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gif.backbones import BackboneConfig
from gif.backbones.iresnet import IResNetName
from gif.codes import CodeShape, advise
from gif.data import IdentityDataset, split_identities
from gif.data.loading import HELD_OUT, WORDS
from gif.data.shared_memory import check_workers
from gif.data.survey import Survey
from gif.devices import resolve_device
from gif.errors import InputError
from gif.training import AugmentationName

ALIGNED = 112  # pixels of an aligned face
ALIGNED_SHARE = 0.9  # of the images, that have this size where faces are aligned
STRIDE = 16  # that backbones divide an image's side by
SMALLEST, LARGEST = 32, 112  # pixels that images of other sizes are read in
IN_COLOR = 0.05  # share of the images in colour where the data set is
DRAWN = 0.8  # share of the pixels that are black or white where images are drawings
FEWEST_IDENTITIES = 4  # two to train on and two to judge by
WHOLE_SPLIT = 1000  # identities, below which a number is held out and not a share: a share's number is chance
FAR_OFF = 5  # standard deviations of a share's number: then these identities were chosen by their names before
IMPOSTORS = 10_000  # pairs, at least, to judge by: ten at a false-accept rate of 1e-3
MOST_JUDGED = 20_000  # images: all their pairs take seconds
SHOWN_IMAGES = 40_000  # that training shows at least, where the budget allows
EPOCHS = (16, 60)  # that training has at least and at most, where the budget allows
FEWEST_EPOCHS = 6  # that the network and the image size are to leave time for
STEPS_AN_EPOCH = 10  # at least
BATCHES = (16, 128)
MINUTES = 10.0
FEW_STEPS = 5_000  # where running statistics lag, and taking them anew costs little
STATISTICS_IMAGES = 20_000
SPREAD_EPOCHS = (10, 3)  # of few identities, and of more than
MANY_IDENTITIES = 100_000
LR, LR_BATCH = 0.1, 128  # the rate, and the batch that it is for


@dataclass(frozen=True)
class Choice:
    """A setting, what it is set to, and why."""

    what: str
    value: Any
    why: str


@dataclass(frozen=True)
class Budget:
    """How long training may take: minutes, or so many steps or epochs; the data's own number where none is given.

    Raises ValueError where more than one is given, or a number that is not positive.
    """

    minutes: float | None = None
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are given; give one of minutes, steps and epochs")
        for name, value in given.items():
            if not value > 0:
                raise InputError(f"wanted {name} > 0, got {value}")


@dataclass(frozen=True)
class Held:
    """How many identities are held out, as `held_out` takes it, and why."""

    number: int | float
    why: str


def choose_held_out(data: IdentityDataset, name: str, given: int | float | None) -> Held:
    """Which identities training does not see: enough of them to judge by, and a fifth where that is enough.

    Raises ValueError for fewer than 4 identities, of which none can be held out.
    """
    if given == 1:
        raise InputError("held_out 1 leaves nobody to train on; give a share of the identities, or how many, or 0")
    if given is not None:
        return Held(given, "as given")
    if name in WORDS:
        return Held(HELD_OUT, "words are split by their letters")
    counts = data.image_counts()
    m = len(counts)
    if m < FEWEST_IDENTITIES:
        raise InputError(
            f"{data.origin or name} has {m} {'identity' if m == 1 else 'identities'}, and a judged model needs "
            f"{FEWEST_IDENTITIES} at least: two to train on and two that training never sees; give more, a folder "
            "each, or --held_out 0 to train on all and judge nothing"
        )
    if int(counts.max()) < 2:
        return Held(0, "no identity has two images, so there is no genuine pair to judge by: all are trained on")
    fifth = max(2, round(HELD_OUT * m))
    number = fifth
    while m < WHOLE_SPLIT and number < m // 2 and not _enough(split_identities(data, number, 0)[1].image_counts()):
        number += 1
    held = split_identities(data, number, 0)[1].image_counts()
    if int(held.max()) < 2:
        return Held(0, f"none of {number} identities that could be held out has two images: all are trained on")
    most = max(2, int(MOST_JUDGED / float(counts.double().mean())))
    if number > most:
        return Held(most, f"a fifth would be {number:,}; their pairs are enough with about {MOST_JUDGED:,} images")
    impostors = _impostors(held)
    if number > fifth or impostors < IMPOSTORS:
        return Held(
            number,
            f"more than a fifth, for enough pairs to judge by: {impostors:,} impostor pairs show no false-accept rate "
            f"below {1 / max(impostors, 1):.0e}",
        )
    if m < WHOLE_SPLIT:
        return Held(number, "a fifth, by number: of a share so few would be chance")
    by_name = split_identities(data, HELD_OUT, 0)[1].num_identities
    if abs(by_name - number) > FAR_OFF * math.sqrt(HELD_OUT * (1 - HELD_OUT) * m):
        return Held(number, f"a fifth, by number: by their names it would be {by_name:,}")
    return Held(HELD_OUT, "a fifth, by the identities' names: more identities later move nobody")


def _enough(counts: Tensor) -> bool:
    return _impostors(counts) >= IMPOSTORS and int(counts.max()) >= 2


def _impostors(counts: Tensor) -> int:
    images = int(counts.sum())
    return (images * images - int(counts.square().sum())) // 2


def choose_channels(seen: Survey, data: IdentityDataset) -> Choice:
    """Colours or grey levels."""
    if seen.fixed:
        return Choice("channels", data.image_shape[0], "what the images have")
    if seen.colored >= IN_COLOR:
        return Choice("channels", 3, f"{seen.colored:.0%} of {seen.images} images looked at are in colour")
    return Choice("channels", 1, f"{1 - seen.colored:.0%} of {seen.images} images looked at are grey")


def choose_size(seen: Survey, data: IdentityDataset) -> Choice:
    """The side of the square in which images are read."""
    if seen.fixed:
        return Choice("image_size", data.image_shape[1], "what the images have")
    height, width = seen.common
    if seen.common == (ALIGNED, ALIGNED) and seen.common_share >= ALIGNED_SHARE:
        return Choice("image_size", ALIGNED, f"{seen.common_share:.0%} are {ALIGNED} x {ALIGNED}, as aligned faces are")
    size = min(max(seen.sides // STRIDE * STRIDE, SMALLEST), LARGEST)
    sizes = (
        f"all are {width} x {height}" if seen.common_share == 1 else f"the median of the shorter sides is {seen.sides}"
    )
    return Choice("image_size", size, f"{sizes}; in steps of {STRIDE}, from {SMALLEST} to {LARGEST}")


def choose_augmentation(seen: Survey, data: IdentityDataset) -> Choice:
    """What is changed in training images."""
    name: AugmentationName
    aligned = seen.common == (ALIGNED, ALIGNED) and seen.common_share >= ALIGNED_SHARE and not seen.fixed
    if aligned:
        name, why = "mirror", "aligned faces are mirrored, and not moved"
    elif seen.colored < IN_COLOR and seen.extreme >= DRAWN:
        name = "affine"
        why = f"{seen.extreme:.0%} of the pixels are black or white: drawings, of which a mirror image is another"
    else:
        name, why = "photo", "photographs: mirrored, turned, scaled and moved a little, brighter or darker"
    return Choice("augmentation", name, why)


def choose_codes(m: int) -> tuple[CodeShape, str]:
    """The code's shape: of two tokens or more the fewest that are enough."""
    shapes = advise(m)
    shape = next((shape for shape in shapes if shape.length > 1), shapes[0])
    return shape, f"the shortest code of two tokens or more for {m:,} identities ({shape.codes:,} codes)"


def choose_device(given: str | None) -> Choice:
    """Where to compute. Raises what `resolve_device` does where that is not there."""
    if given is not None and given != "auto":
        return Choice("device", str(resolve_device(given)), "as given")
    if torch.cuda.is_available():
        return Choice("device", "cuda", f"there is one: {torch.cuda.get_device_name()}")
    return Choice("device", "cpu", "there is no CUDA or ROCm device")


def choose_batch(images: int, device: str) -> Choice:
    """Images a step: a power of two that leaves enough steps in an epoch."""
    least, most = BATCHES[0], _most_a_step(device)
    fits = 2 ** int(math.log2(max(images / STEPS_AN_EPOCH, 1)))
    size = max(2, min(max(fits, least), most, images))
    why = f"{counted(images // size, 'step')} an epoch of {images:,} images"
    return Choice("batch_size", size, why if size < most else f"{why}, and no more a step on a {device}")


def _most_a_step(device: str) -> int:
    return BATCHES[1] if device == "cpu" else 4 * BATCHES[1]


def choose_workers(given: int | None, seen: Survey, device: str, shape: tuple[int, ...]) -> Choice:
    """Processes that read images of a ``shape`` beside the one that trains."""
    cores = os.cpu_count() or 1
    if given is not None:
        return Choice("workers", given, "as given")
    if seen.fixed:
        return Choice("workers", 0, "the images are in memory")
    number = min(8, cores - 1) if device != "cpu" else (0 if cores <= 2 else min(4, cores // 2))
    try:
        check_workers(number, _most_a_step(device), shape)
    except InputError:
        return Choice("workers", 0, "the shared memory is too small for more")
    return Choice("workers", number, f"{cores} cores, and training on the {device}")


def counted(number: int, what: str) -> str:
    """So many of something: 1 step, 1,200 steps."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def wanted_epochs(images: int) -> int:
    """Passes over the training images that are worth their time: fewer of many images."""
    least, most = EPOCHS
    return min(max(math.ceil(SHOWN_IMAGES / max(images, 1)), least), most)


@dataclass(frozen=True)
class Network:
    """A backbone, and how long a step of it takes here, reading the images included."""

    backbone: BackboneConfig
    seconds: float


def candidates(size: int, channels: int, images: int, device: str) -> list[BackboneConfig]:
    """Networks to try, the largest first: what these images can fill, and then what a slower device can train."""
    if device != "cpu":
        worth: dict[IResNetName, int] = {"iresnet100": 1_000_000, "iresnet50": 50_000, "iresnet18": 0}
        deep = [name for name, least in worth.items() if images >= least]
        large = [BackboneConfig(name=name, embedding_size=512, channels=channels, image_size=size) for name in deep]
        return [*large, BackboneConfig(channels=channels, image_size=size, width=24)]
    if size <= SMALLEST:
        return [BackboneConfig(channels=channels, image_size=size, width=16)]
    sizes = [size, *(side for side in (64, SMALLEST) if side < size)]
    return [BackboneConfig(channels=channels, image_size=side, width=width) for side in sizes for width in (24, 16)]


def choose_network(
    tried: Sequence[BackboneConfig],
    time_step: Callable[[BackboneConfig], float],
    steps: int,
    seconds: float,
) -> tuple[Network, str]:
    """The first of the networks, the largest, that makes ``steps`` in ``seconds``, or else the last."""
    why = ""
    for backbone in tried:
        took = time_step(backbone)
        why = f"{1000 * took:.0f} ms a step here, the images included"
        if took * steps <= seconds:
            break
    return Network(backbone, took), why


def choose_steps(budget: Budget, images: int, batch: int, seconds: float) -> Choice:
    """How long to train: what the budget says, or what is worth it within the minutes that there are."""
    steps_an_epoch = max(1, images // batch)
    if budget.steps is not None:
        return Choice("steps", budget.steps, f"as given; {budget.steps / steps_an_epoch:.1f} epochs")
    if budget.epochs is not None:
        return Choice("steps", budget.epochs * steps_an_epoch, f"{counted(budget.epochs, 'epoch')}, as given")
    epochs = wanted_epochs(images)
    worth = epochs * steps_an_epoch
    minutes = budget.minutes or MINUTES
    within = worth if math.isnan(seconds) else max(STEPS_AN_EPOCH, int(60 * minutes / seconds))
    if budget.minutes is not None and not math.isnan(seconds):
        return Choice("steps", within, f"{minutes:g} minutes, as given; {within / steps_an_epoch:.1f} epochs")
    if within < worth:
        why = f"{minutes:g} minutes; {within / steps_an_epoch:.1f} epochs of {epochs} that are worth it: --minutes"
        return Choice("steps", within, why)
    return Choice("steps", worth, f"{epochs} epochs, as many as {images:,} images are worth")
