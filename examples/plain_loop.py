"""GIF in a plain PyTorch loop, from images to a judged backbone: python examples/plain_loop.py"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from gif import GIFLoss, SpreadConfig, TokenizeConfig, initial_code_vectors, spread_code_vectors, tokenize
from gif.backbones import BackboneConfig
from gif.data import IdentitySplit, glyphs, normalize_pixels
from gif.encoders import PixelEncoder
from gif.evaluation import Judgement, embed, judge
from gif.training.augmentation import RandomAffine


def run(data: IdentitySplit, config: BackboneConfig, *, epochs: int = 4, batch_size: int = 128) -> Judgement:
    """Train on ``data.train``, judge on the identities of ``data.held_out``, which training never sees."""
    lr = 0.1
    torch.manual_seed(0)
    vectors = initial_code_vectors(data.train, PixelEncoder(config.embedding_size))  # one vector an identity
    spread_code_vectors(vectors, SpreadConfig(epochs=10))  # evenly over the sphere
    codes = tokenize(vectors, TokenizeConfig(vocab_size=12))  # similar identities share a prefix

    backbone = config.build()
    loss_fn = GIFLoss(codes, vectors, config.embedding_size)  # instead of a softmax over all identities
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss_fn.parameters()], lr, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(data.train, batch_size, shuffle=True, drop_last=True, collate_fn=data.train.collate)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    augment = RandomAffine()

    for epoch in range(epochs):
        total = 0.0
        for images, labels in loader:
            rate = schedule.get_last_lr()[0]
            loss_fn.begin_step(rate, rate / lr, schedule.last_epoch / steps)  # its vectors follow the schedule too
            embeddings = backbone(augment(normalize_pixels(images)))
            loss = loss_fn(embeddings, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}")

    embeddings = embed(backbone, data.held_out)
    return judge(embeddings, data.held_out.labels)


if __name__ == "__main__":
    judgement = run(glyphs(), BackboneConfig())
    print(f"rank-1 {judgement.rank1:.3f}, TAR@FAR=1e-3 {judgement.tar[1e-3]:.3f}")
