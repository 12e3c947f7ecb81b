"""Training: the loop, its checkpoints, its curves."""

from gif.training.augmentation import AUGMENTATIONS, AugmentationName
from gif.training.checkpoint import Checkpoints
from gif.training.config import TrainingConfig
from gif.training.curves import plot_losses, plot_validations
from gif.training.loop import TrainingLog, Validate, check_training, train
from gif.training.validation import ValidationConfig

__all__ = [
    "AUGMENTATIONS",
    "AugmentationName",
    "Checkpoints",
    "TrainingConfig",
    "TrainingLog",
    "Validate",
    "ValidationConfig",
    "check_training",
    "plot_losses",
    "plot_validations",
    "train",
]
