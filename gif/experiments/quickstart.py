"""The whole method on real images in a few minutes: `gif run` on glyphs, with two heads beside."""

from __future__ import annotations

from pathlib import Path

from gif.run import RunConfig, run

DATA = "glyphs"
BESIDE = ["GIF, published", "full softmax"]


def quickstart(output: Path = Path("runs/quickstart"), *, epochs: int = 4, seed: int = 0) -> None:
    """Do everything once, on glyphs: gif run --data glyphs, and beside GIF its published form and the full softmax.

    The identities are the characters of the fonts that come with matplotlib, an image each in every font; a fifth of
    them is held out, never seen in training, and used to judge the heads. All get the same backbone, images and
    steps. Writes a report with pictures. An interrupted run continues when the same command is given again.

    Args:
        output: folder for the report and everything it is made of.
        epochs: passes over the training images, for each head.
        seed: of everything random.
    """
    run(output, RunConfig(data=DATA, epochs=epochs, beside=BESIDE, seed=seed))
