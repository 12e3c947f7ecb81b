"""`python -m benchmarks.head_precision`: what heads lose by products of narrow operands.

Glyphs, the same images, initial values and steps; the backbone is float32 throughout, so that nothing but the operands
of the head's products differs. Says the loss of the last tenth of the steps, and TAR on held-out identities.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from gif.documents import markdown_table
from gif.evaluation import embed, judge
from gif.experiments.glyph_bench import BACKBONE, BATCH_SIZE, CONTENDERS, GlyphBench
from gif.progress import say
from gif.training import TrainingConfig, train
from gif.vectors import CodeVectors

OPERANDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FARS = (1e-3, 1e-4)


class Rounded(nn.Module):
    """A head under autocast to ``operand``, the backbone aside."""

    def __init__(self, head: nn.Module, operand: torch.dtype) -> None:
        super().__init__()
        self.head, self.operand = head, operand

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, self.operand, enabled=self.operand != torch.float32):
            loss: Tensor = self.head(embeddings, labels)
        return loss


def head_precision(
    *, heads: tuple[str, ...] = ("GIF", "GIF, published", "full softmax"), identities: int = 1500, epochs: int = 4,
    seeds: int = 2,
) -> None:  # fmt: skip
    """Train each head with operands of each dtype, and print a table.

    Args:
        heads: names of `gif.experiments.glyph_bench.CONTENDERS`.
        identities: of the glyphs, at random.
        epochs: passes over their images.
        seeds: runs of each.
    """
    rows = []
    found: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(seeds):
        bench = GlyphBench.prepare(seed, identities=identities)
        for head in heads:
            for name, operand in OPERANDS.items():
                found.setdefault((head, name), []).append(_run(bench, head, operand, seed, epochs))
    for (head, name), runs in found.items():
        numbers = torch.tensor(runs)
        deviation = numbers.std(0) if seeds > 1 else torch.zeros(numbers.shape[1])
        rows.append((head, name, *(f"{x:.4f} ± {s:.4f}" for x, s in zip(numbers.mean(0), deviation, strict=True))))
    say(markdown_table(("head", "operands", "loss", *(f"TAR@FAR={far:g}" for far in FARS)), rows))


def _run(bench: GlyphBench, head: str, operand: torch.dtype, seed: int, epochs: int) -> list[float]:
    torch.manual_seed(seed)
    backbone, contender = BACKBONE.build(), CONTENDERS[head]
    vectors = CodeVectors(bench.vectors.table.clone(), normalized=True)
    loss_fn = contender.head.build(bench.data.train.num_identities, BACKBONE.embedding_size, bench.codes, vectors)
    config = TrainingConfig(epochs=epochs, batch_size=BATCH_SIZE, lr=contender.lr, seed=seed)
    log = train(backbone, Rounded(loss_fn, operand), bench.data.train, config, description=f"{head}, {operand}")
    judgement = judge(embed(backbone, bench.data.held_out), bench.data.held_out.labels)
    last = log.losses[-max(1, len(log.losses) // 10) :].mean()
    return [float(last), *(judgement.tar[far] for far in FARS)]


if __name__ == "__main__":
    auto_cli(head_precision, as_positional=False)
