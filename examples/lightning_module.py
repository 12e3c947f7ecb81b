"""GIF in Lightning: python examples/lightning_module.py (needs pip install 'gif-recognition[lightning]')"""

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gif import GIFLoss, SpreadConfig, TokenizeConfig, initial_code_vectors, spread_code_vectors, tokenize
from gif.backbones import BackboneConfig
from gif.data import IdentityDataset, glyphs, normalize_pixels
from gif.encoders import PixelEncoder
from gif.integrations.state import TablesInState
from gif.training.augmentation import RandomAffine


class Recognition(TablesInState, lightning.LightningModule):
    """A backbone and its loss. The loss is a part of the module, so DDP averages its gradients with the backbone's.

    Checkpoints hold the code vectors that training moves.
    """

    def __init__(self, backbone: BackboneConfig, loss: GIFLoss, lr: float = 0.1) -> None:
        super().__init__()
        self.backbone = backbone.build()
        self.loss = loss
        self.lr = lr
        self.augment = RandomAffine()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        rate = self.lr_schedulers().get_last_lr()[0]
        self.loss.begin_step(rate, rate / self.lr, self.global_step / self.trainer.estimated_stepping_batches)
        loss: Tensor = self.loss(self.backbone(self.augment(normalize_pixels(images))), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def prepare(images: IdentityDataset, width: int) -> GIFLoss:
    """Code vectors and codes of a data set, and the loss that predicts them."""
    vectors = initial_code_vectors(images, PixelEncoder(width))
    spread_code_vectors(vectors, SpreadConfig(epochs=10))
    return GIFLoss(tokenize(vectors, TokenizeConfig(vocab_size=12)), vectors, width)


if __name__ == "__main__":
    lightning.seed_everything(0)
    images, config = glyphs().train, BackboneConfig()
    loader = DataLoader(images, 128, shuffle=True, drop_last=True, collate_fn=images.collate)
    trainer = lightning.Trainer(max_epochs=4, accelerator="auto", gradient_clip_val=5.0)
    trainer.fit(Recognition(config, prepare(images, config.embedding_size)), loader)
