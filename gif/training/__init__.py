"""Training: the loop, its checkpoints, its curves."""

from gif.training.augmentation import AUGMENTATIONS, AugmentationName
from gif.training.checkpoint import Checkpoints
from gif.training.config import TrainingConfig
from gif.training.curves import plot_losses
from gif.training.loop import TrainingLog, check_training, train

__all__ = [
    "AUGMENTATIONS",
    "AugmentationName",
    "Checkpoints",
    "TrainingConfig",
    "TrainingLog",
    "check_training",
    "plot_losses",
    "train",
]
