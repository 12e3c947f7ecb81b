"""What every experiment on glyphs shares: the data, code vectors and codes, and one head trained and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gif.backbones import BackboneConfig, save_backbone
from gif.codes import IdentityCodes, tokenize
from gif.data import GlyphSplit, glyphs
from gif.encoders import PixelEncoder
from gif.evaluation import Judgement, judge
from gif.losses import RECIPES, HeadConfig
from gif.progress import say
from gif.training import TrainingConfig, TrainingLog, embed, train
from gif.vectors import CodeVectors, SpreadReport, initial_code_vectors, spread_code_vectors
from gif_kernels import AngularMargin

VOCAB_SIZE = 12
BATCH_SIZE = 128
SPREAD_EPOCHS = 10  # an epoch is a single step here
BACKBONE = BackboneConfig(embedding_size=128, width=16)

TOKEN_MARGIN = AngularMargin(m2=0.0, m3=0.1)
SOFTMAX_MARGIN = AngularMargin(m2=0.0, m3=0.2)
HEADS = {
    "GIF": HeadConfig(kind="gif"),
    "GIF, no siblings": HeadConfig(kind="gif", overrides={"siblings": 0}),
    "GIF, fixed vectors": HeadConfig(kind="gif", overrides={"vector_lr": 0.0}),
    "GIF, no tokens": HeadConfig(kind="gif", overrides={"code_weight": 0.0}),
    "GIF, published": HeadConfig(kind="gif", recipe="paper", overrides={"scale": 16.0, "margin": TOKEN_MARGIN}),
    "full softmax": HeadConfig(kind="softmax", scale=16.0, margin=SOFTMAX_MARGIN),
    "Partial FC 0.1": HeadConfig(kind="partial_fc", scale=16.0, margin=SOFTMAX_MARGIN, sample_rate=0.1),
}


@dataclass(frozen=True)
class HeadResult:
    """One head's training and its judgement on held-out identities."""

    log: TrainingLog
    judgement: Judgement
    parameters: int


@dataclass(frozen=True)
class GlyphBench:
    """Glyphs, split by identity, with the training identities' code vectors and codes."""

    data: GlyphSplit
    vectors: CodeVectors
    spread: SpreadReport
    codes: IdentityCodes

    @classmethod
    def prepare(cls, seed: int) -> GlyphBench:
        """Load glyphs, make code vectors and spread them, cut codes; all from one seed."""
        data = glyphs(seed=seed)
        say(
            f"glyphs: {data.train.num_identities:,} identities to train on ({len(data.train):,} images), "
            f"{data.held_out.num_identities:,} held out ({len(data.held_out):,} images)"
        )
        vectors = initial_code_vectors(data.train, PixelEncoder(BACKBONE.embedding_size))
        spread = spread_code_vectors(vectors, epochs=SPREAD_EPOCHS, seed=seed)
        say(f"code vectors before: {spread.before}\ncode vectors after:  {spread.after}")
        codes = tokenize(vectors, vocab_size=VOCAB_SIZE, seed=seed)
        say(f"identity codes: {codes}")
        return cls(data, vectors, spread, codes)

    def run(self, name: str, head: HeadConfig, training: TrainingConfig, folder: Path) -> HeadResult:
        """Train a backbone with ``head``, keep it in ``folder``, judge it; continues a run that was interrupted."""
        torch.manual_seed(training.seed)
        backbone = BACKBONE.build()
        own_vectors = CodeVectors(self.vectors.table.clone(), normalized=True)  # the head may move them
        loss_fn = head.build(self.data.train.num_identities, BACKBONE.embedding_size, self.codes, own_vectors)
        log = train(
            backbone,
            loss_fn,
            self.data.train,
            training,
            checkpoints=folder / "checkpoints",
            description=f"training with {name}",
        )
        save_backbone(folder / "backbone.safetensors", backbone, BACKBONE)
        judgement = judge(embed(backbone, self.data.held_out.images), self.data.held_out.labels)
        return HeadResult(log, judgement, sum(parameter.numel() for parameter in loss_fn.parameters()))


def folder_name(head: str) -> str:
    """A head's name, fit for a folder."""
    return head.lower().replace(",", "").replace(" ", "-")


def bench_settings(heads: Mapping[str, HeadConfig]) -> dict[str, Any]:
    """What decides the results of ``heads``, beside a seed and the epochs."""
    return {
        "backbone": asdict(BACKBONE),
        "vocab_size": VOCAB_SIZE,
        "batch_size": BATCH_SIZE,
        "spread_epochs": SPREAD_EPOCHS,
        "heads": {name: asdict(head) for name, head in heads.items()},
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
    }
