"""GIF in the Hugging Face Trainer.

python examples/hugging_face_trainer.py (needs pip install 'gif-recognition[transformers]')
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gif import GIFLoss, SpreadConfig, TokenizeConfig, initial_code_vectors, spread_code_vectors, tokenize
from gif.backbones import BackboneConfig, save_backbone
from gif.data import IdentityDataset, glyphs, normalize_pixels
from gif.encoders import PixelEncoder
from gif.integrations.state import TablesInState
from gif.training.augmentation import RandomAffine


class Recognition(TablesInState):
    """A backbone and its loss, as the Trainer wants a model: a forward pass gives the loss.

    The state that the Trainer saves and restores holds the code vectors that training moves.
    """

    def __init__(self, backbone: BackboneConfig, loss: GIFLoss) -> None:
        super().__init__()
        self.backbone = backbone.build().to(memory_format=torch.contiguous_format)  # as the Trainer's files want it
        self.loss = loss
        self.augment = RandomAffine()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pixels = normalize_pixels(images)
        embeddings = self.backbone(self.augment(pixels) if self.training else pixels)
        return {"loss": self.loss(embeddings, labels), "embeddings": embeddings}


class Schedule(TrainerCallback):
    """Tells the loss where the run is: its code vectors follow the learning rate, tokens and pull fade."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        rate = given["optimizer"].param_groups[0]["lr"]
        given["model"].loss.begin_step(rate, rate / args.learning_rate, state.global_step / state.max_steps)


def collate(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch by the names of the model's arguments."""
    images, labels = IdentityDataset.collate(pairs)
    return {"images": images, "labels": labels}


def prepare(images: IdentityDataset, width: int) -> GIFLoss:
    """Code vectors and codes of a data set, and the loss that predicts them."""
    vectors = initial_code_vectors(images, PixelEncoder(width))
    spread_code_vectors(vectors, SpreadConfig(epochs=10))
    return GIFLoss(tokenize(vectors, TokenizeConfig(vocab_size=12)), vectors, width)


def trainer_of(images: IdentityDataset, config: BackboneConfig, output: Path, **options: Any) -> Trainer:
    """A Trainer; ``options`` are TrainingArguments'."""
    given: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 128,
        "num_train_epochs": 4,
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_grad_norm": 5.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "report_to": "none",
    }
    return Trainer(
        model=Recognition(config, prepare(images, config.embedding_size)),
        args=TrainingArguments(**{**given, **options}),
        train_dataset=images,
        data_collator=collate,
        callbacks=[Schedule()],
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    folder, backbone = Path("runs/hugging-face"), BackboneConfig()
    trainer = trainer_of(glyphs().train, backbone, folder)
    trainer.train()
    save_backbone(folder / "backbone.safetensors", trainer.model.backbone, backbone)  # gif evaluate --model takes it
