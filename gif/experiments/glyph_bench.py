"""What every experiment on glyphs shares: the data, code vectors and codes, and one head trained and judged."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gif.backbones import BackboneConfig, save_backbone
from gif.codes import IdentityCodes, TokenizeConfig, tokenize
from gif.codes.code_table import table_bytes
from gif.data import IdentityDataset, IdentitySplit, ImageDecoder, glyph_word_validation, load_data, split_identities
from gif.data.images import SPLIT_BY
from gif.data.loading import WORDS
from gif.encoders import PixelEncoder
from gif.evaluation import Judgement, embed, groups_by_images, judge, judge_group, spread_of_centers
from gif.head import as_head, own_rows
from gif.losses import RECIPES, GIFLoss, HeadConfig, MarginSoftmax, PartialFC
from gif.progress import say
from gif.resume import claim_folder
from gif.training import TrainingConfig, TrainingLog, Validate, train
from gif.vectors import CodeVectors, SpreadConfig, SpreadReport, initial_code_vectors, spread_code_vectors
from gif_kernels import AngularMargin

VOCAB_SIZE = 12
BATCH_SIZE = 128
SPREAD_EPOCHS = 10
BACKBONE = BackboneConfig(embedding_size=128, width=16)
POOL_SIZE = 2048  # class weights of the heads that hold some identities' at a time
ENCODER_MOMENTUM = 0.99  # of runs of thousands of steps; the class queue's own, 0.999, is for a hundred times as many
VALIDATION = 0.2  # of the training identities
FARS = (1e-3, 1e-4, 1e-5)  # of sets that judge: of 12,000 images, in 72 million pairs
WARMING, TIMED, ROUNDS = 16, 24, 5  # steps, to time one


@dataclass(frozen=True)
class Contender:
    """A head, and the peak learning rate it is trained with."""

    head: HeadConfig
    lr: float = 0.1


def _gif(**overrides: float | AngularMargin) -> Contender:
    return Contender(HeadConfig(kind="gif", overrides=overrides))


def _softmax(**options: Any) -> Contender:
    """Scale and margin are those that `gif sweep` found best for both kinds."""
    return Contender(HeadConfig(scale=12.0, margin=AngularMargin(m2=0.0, m3=0.2), **options))


def _peer(**options: Any) -> Contender:
    """Scale and margin as of the softmax heads, as many class weights for each; `gif sweep` is to find their own."""
    return _softmax(pool_size=POOL_SIZE, **options)


TOKEN_MARGIN = AngularMargin(m2=0.0, m3=0.1)
CONTENDERS = {
    "GIF": _gif(),
    "GIF, no siblings": _gif(siblings=0),
    "GIF, fixed vectors": _gif(vector_lr=0.0),
    "GIF, no tokens": _gif(code_weight=0.0),
    "GIF, published": Contender(
        HeadConfig(kind="gif", recipe="paper", overrides={"scale": 16.0, "margin": TOKEN_MARGIN})
    ),
    "full softmax": _softmax(kind="softmax"),
    "full softmax from code vectors": _softmax(kind="softmax", centers="vectors"),
    "Partial FC 10,000": _softmax(kind="partial_fc", samples=10_000),
    "Partial FC 10,000 from code vectors": _softmax(kind="partial_fc", samples=10_000, centers="vectors"),
    "Partial FC 0.01": _softmax(kind="partial_fc", sample_rate=0.01),
    "Partial FC 0.01 from code vectors": _softmax(kind="partial_fc", sample_rate=0.01, centers="vectors"),
    "Partial FC 0.1": _softmax(kind="partial_fc", sample_rate=0.1),
    "Partial FC 0.1 from code vectors": _softmax(kind="partial_fc", sample_rate=0.1, centers="vectors"),
    "Partial FC 0.3": _softmax(kind="partial_fc", sample_rate=0.3),
    "Partial FC 0.3 from code vectors": _softmax(kind="partial_fc", sample_rate=0.3, centers="vectors"),
    "Dynamic Class Queue": _peer(kind="class_queue", momentum=ENCODER_MOMENTUM),
    "Faster Face Classification": _peer(kind="class_pool", momentum=ENCODER_MOMENTUM),
    "Prototype Memory": _peer(kind="prototype_memory", group_size=4),
    "Virtual FC": _peer(kind="virtual_fc", group_size=4),
}


ON_WORDS = {
    "GIF": replace(CONTENDERS["GIF"], lr=0.2),
    **{
        name: replace(contender, head=replace(contender.head, scale=24.0))
        for name, contender in CONTENDERS.items()
        if name.startswith(("Partial FC", "full softmax"))
    },
}
"""Those whose best setting on words is another: of 40 seconds' training on 100,000 of them, by `gif sweep`.

GIF's is its rate, since its recipe is to be the default; the scale of Partial FC's 10,000 is every softmax's.
"""


def contenders_on(data: str) -> dict[str, Contender]:
    """Every contender by name, with the settings that were found for data of that kind."""
    return {**CONTENDERS, **ON_WORDS} if data in WORDS else CONTENDERS


@dataclass(frozen=True)
class HeadResult:
    """One head's training, its judgement on the other identities, and what it did to rare ones (`rarity`).

    ``sets`` are judgements by name, where the data have several sets to judge by. ``head_bytes`` is what the head keeps
    from step to step: its parameters with their momentum, and its tables.
    """

    log: TrainingLog
    judgement: Judgement
    sets: dict[str, Judgement]
    parameters: int
    head_bytes: int
    rarity: dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class GlyphBench:
    """Glyphs, split by identity, with the training identities' code vectors and codes.

    ``spread`` is how the vectors were spread, None where they were read from where an earlier run kept them, or were
    not spread. ``backbone`` is what is trained; its embeddings are as wide as the vectors.
    """

    data: IdentitySplit
    vectors: CodeVectors
    spread: SpreadReport | None
    codes: IdentityCodes
    backbone: BackboneConfig = field(default_factory=lambda: BACKBONE)

    @classmethod
    def prepare(
        cls,
        seed: int,
        *,
        data: str = "glyphs",
        identities: int | None = None,
        validation: bool = False,
        folder: Path | None = None,
    ) -> GlyphBench:
        """Load glyphs, make code vectors and spread them, cut codes; all from one seed.

        ``identities`` is how many of the data set's there are, as for `load_data`. For ``validation`` the
        identities to judge on are a fifth of those to train on, and the held-out ones are put away: settings are chosen
        there. Vectors and codes are kept in ``folder``, and read from there the next time.

        Raises ValueError where the data set has no more identities than are asked for.
        """
        decoder = ImageDecoder(BACKBONE.image_size, BACKBONE.channels)
        split = load_data(data, identities=identities, seed=seed, decoder=decoder)
        if validation:
            split = _validation(data, split, seed)
        judged = "to validate on" if validation else "held out"
        say(
            f"{data}: {split.train.num_identities:,} identities to train on ({len(split.train):,} images), "
            f"{split.held_out.num_identities:,} {judged} ({len(split.held_out):,} images)"
        )
        if folder is None:
            return cls(split, *_coded(split.train, seed))
        claim_folder(folder, split.train.summary())
        kept = folder / "vectors.safetensors", folder / "codes.safetensors"
        if not all(path.exists() for path in kept):
            vectors, _, codes = _coded(split.train, seed)
            vectors.save(kept[0])
            codes.save(kept[1])
        return cls(split, CodeVectors.load(kept[0], mmap=True), None, IdentityCodes.load(kept[1]))

    def run(self, name: str, contender: Contender, training: TrainingConfig, folder: Path) -> HeadResult:
        """Train a backbone with a head, keep it in ``folder``, judge it; continues a run that was interrupted."""
        backbone, loss_fn, log = self.fit(name, contender, training, folder)
        save_backbone(folder / "backbone.safetensors", backbone, self.backbone, trained_on=self.data.train.identities)
        embeddings = embed(backbone, self.data.held_out)
        judgement = judge(embeddings, self.data.held_out.labels)
        sets = {name: judge(embed(backbone, part), part.labels, fars=FARS) for name, part in self.data.sets.items()}
        parameters = sum(parameter.numel() for parameter in loss_fn.parameters() if parameter.requires_grad)
        rarity = self.rarity(backbone, embeddings, _centers(loss_fn))
        return HeadResult(log, judgement, sets, parameters, _kept_bytes(loss_fn), rarity)

    def fit(
        self,
        name: str,
        contender: Contender,
        training: TrainingConfig,
        folder: Path,
        *,
        watch: Callable[[nn.Module], Validate] | None = None,
        watch_every: int | None = None,
    ) -> tuple[nn.Module, nn.Module, TrainingLog]:
        """Train a backbone with a head, with checkpoints in ``folder``; continues a run that was interrupted.

        ``watch`` makes of the head what `gif.training.train` takes as ``validate``, every so many steps. Returns the
        backbone, the head and the log.
        """
        torch.manual_seed(training.seed)
        backbone = self.backbone.build()
        loss_fn = self._head(contender, backbone)
        log = train(
            backbone,
            loss_fn,
            self.data.train,
            replace(training, lr=contender.lr),
            validate=watch and watch(loss_fn),
            validate_every=watch_every,
            checkpoints=folder / "checkpoints",
            description=f"training with {name}",
        )
        return backbone, loss_fn, log

    def _head(self, contender: Contender, backbone: nn.Module) -> nn.Module:
        """A fresh head; it may move its own copy of the code vectors."""
        own = CodeVectors(self.vectors.table.clone(), normalized=True)
        m = self.data.train.num_identities
        return contender.head.build(m, self.backbone.embedding_size, self.codes, own, backbone=backbone)

    def seconds_a_step(self, contenders: Sequence[Contender], training: TrainingConfig) -> list[float]:
        """Processor time of a step of each of ``contenders``, the median of rounds in which they take turns.

        So what else the machine does falls on all alike.
        """
        seconds: list[list[float]] = [[] for _ in contenders]
        for steps in (WARMING, *[TIMED] * ROUNDS):  # the first warm up: what is compiled or read is there afterwards
            for contender, found in zip(contenders, seconds, strict=True):
                backbone = self.backbone.build()
                tried = replace(training, steps=steps, lr=contender.lr)
                head = self._head(contender, backbone)
                log = train(backbone, head, self.data.train, tried, description="timing a step")
                found.append(log.processor_seconds / steps)
        return [statistics.median(found[1:]) for found in seconds]

    def rarity(
        self, backbone: nn.Module, embeddings: Tensor, centers: Tensor | None
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Scores by the number of images an identity has: of held-out and training images, and of the centres (m, d).

        A head that holds no identity's centre, None, has no scores of them. ``embeddings`` (n, d) are the held-out
        images'. Keys: what, group, measure.
        """
        held_out, train = self.data.held_out, self.data.train
        found: dict[str, dict[str, dict[str, float]]] = {"held-out": {}, "training": {}, "centres": {}}
        for group in groups_by_images(held_out.labels):
            found["held-out"][group.name] = judge_group(embeddings, held_out.labels, group)
        for group in groups_by_images(train.labels):
            part = train.of_identities(group.identities)
            found["training"][group.name] = judge_group(embed(backbone, part), group.identities[part.labels], group)
            if centers is not None:
                found["centres"][group.name] = spread_of_centers(centers, group)
        return found


def _coded(train: IdentityDataset, seed: int) -> tuple[CodeVectors, SpreadReport, IdentityCodes]:
    """Code vectors of the identities to train on, spread, and their codes."""
    vectors = initial_code_vectors(train, PixelEncoder(BACKBONE.embedding_size))
    spread = spread_code_vectors(vectors, SpreadConfig(epochs=SPREAD_EPOCHS, seed=seed))
    say(f"code vectors before: {spread.before}\ncode vectors after:  {spread.after}")
    codes = tokenize(vectors, TokenizeConfig(vocab_size=VOCAB_SIZE, seed=seed))
    say(f"identity codes: {codes}")
    return vectors, spread, codes


def _validation(data: str, split: IdentitySplit, seed: int) -> IdentitySplit:
    """Identities to judge settings by: a fifth of those to train on; words have some of their own."""
    if data in WORDS:
        sets = glyph_word_validation(size=WORDS[data])
        return IdentitySplit(split.train, next(iter(sets.values())), sets)
    return IdentitySplit(*split_identities(split.train, VALIDATION, seed))


def _kept_bytes(loss_fn: nn.Module) -> int:
    """What a head keeps from step to step: parameters and their momentum, buffers, codes and tables that move."""
    parameters = sum((1 + parameter.requires_grad) * parameter.nbytes for parameter in loss_fn.parameters())
    tables = {id(own_rows(table)): own_rows(table) for table in as_head(loss_fn).tables().values()}
    held = tables | {id(buffer): buffer for buffer in loss_fn.buffers()}
    codes = 0
    if isinstance(loss_fn, GIFLoss):
        codes = table_bytes(len(loss_fn.codes), loss_fn.codes.vocab_size, loss_fn.codes.length)
    return parameters + sum(tensor.nbytes for tensor in held.values()) + codes


def _centers(loss_fn: nn.Module) -> Tensor | None:
    """What stands for each training identity, (m, d): a softmax's centres, GIF's code vectors; None where nothing does.

    The heads of `gif.losses.peers` hold the weights of some identities at a time.
    """
    if isinstance(loss_fn, MarginSoftmax | PartialFC):
        return loss_fn.weight.detach()
    return loss_fn.vectors.table if isinstance(loss_fn, GIFLoss) and loss_fn.vectors is not None else None


def folder_name(head: str) -> str:
    """Make a name for a folder of a head's name."""
    return head.lower().replace(",", "").replace(" ", "-")


def bench_settings(contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """What decides the results of ``contenders``, beside the data, a seed and the epochs."""
    return {
        "backbone": asdict(BACKBONE),
        "held_out_by": SPLIT_BY,
        "vocab_size": VOCAB_SIZE,
        "spread_epochs": SPREAD_EPOCHS,
        "contenders": {name: asdict(contender) for name, contender in contenders.items()},
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
    }


def contender_settings(contender: Contender) -> dict[str, Any]:
    """What decides the results of one contender, beside what all have in common."""
    head = contender.head
    return {"contender": asdict(contender), "recipe": asdict(RECIPES[head.recipe]) if head.kind == "gif" else None}
