"""GIF with pytorch-metric-learning: a miner, a reducer, a memory beside it, and a tester.

python examples/metric_learning.py (needs pip install 'gif-recognition[metric-learning]' faiss-cpu)
"""

import torch
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, MultipleLosses
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import ClassWeightedReducer
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gif import SpreadConfig, TokenizeConfig, initial_code_vectors, spread_code_vectors, tokenize
from gif.backbones import BackboneConfig
from gif.data import IdentityDataset, IdentitySplit, glyphs, normalize_pixels
from gif.encoders import PixelEncoder
from gif.integrations.metric_learning import GIFLoss


class Normalized(Dataset[tuple[Tensor, int]]):
    """Images as the library's testers take them: what the backbone takes, each with its label."""

    def __init__(self, images: IdentityDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return normalize_pixels(image), int(label)


def run(data: IdentitySplit, config: BackboneConfig, *, epochs: int = 4, batch_size: int = 128) -> dict[str, float]:
    """Train on ``data.train``; what the library's tester says of the identities of ``data.held_out``."""
    torch.manual_seed(0)
    width = config.embedding_size
    vectors = initial_code_vectors(data.train, PixelEncoder(width))
    spread_code_vectors(vectors, SpreadConfig(epochs=10))
    codes = tokenize(vectors, TokenizeConfig(vocab_size=12))

    rare_count_more = 1 / data.train.image_counts().float().sqrt()
    loss_func = GIFLoss(
        num_classes=data.train.num_identities,
        embedding_size=width,
        codes=codes,
        vectors=vectors,
        reducer=ClassWeightedReducer(rare_count_more / rare_count_more.mean()),
    )
    memory = CrossBatchMemory(ContrastiveLoss(), width, memory_size=4 * batch_size, miner=MultiSimilarityMiner())
    losses = MultipleLosses([loss_func, memory], weights=[1.0, 0.1])  # a memory is for losses of pairs: beside ours

    backbone = config.build()
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss_func.parameters()], 0.1, momentum=0.9)
    loader = DataLoader(data.train, batch_size, shuffle=True, drop_last=True, collate_fn=data.train.collate)
    steps, done = epochs * len(loader), 0
    for _ in range(epochs):
        for images, labels in loader:
            loss_func.loss.begin_step(0.1, 1.0, done / steps)  # tokens and pull fade over the run
            optimizer.zero_grad()
            losses(backbone(normalize_pixels(images)), labels).backward()
            nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
            optimizer.step()
            done += 1

    tester = GlobalEmbeddingSpaceTester(
        batch_size=batch_size,
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(
            include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count"
        ),
    )
    found = tester.test({"held_out": Normalized(data.held_out)}, 0, backbone.eval())
    return {name: float(value) for name, value in found["held_out"].items() if name != "epoch"}


if __name__ == "__main__":
    print(run(glyphs(), BackboneConfig()))
