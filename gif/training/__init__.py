"""Training: the loop, its checkpoints, its curves."""

from gif.training.curves import plot_losses
from gif.training.loop import TrainingConfig, TrainingLog, embed, train

__all__ = ["TrainingConfig", "TrainingLog", "embed", "plot_losses", "train"]
