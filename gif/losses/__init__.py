"""Losses with one contract: ``loss_fn(embeddings, labels) -> scalar``."""

from gif.losses.config import HeadConfig
from gif.losses.gif_loss import GIFLoss
from gif.losses.recipes import RECIPES, Recipe
from gif.losses.softmax import MarginSoftmax
from gif.losses.token_weights import TokenWeights, token_weights

__all__ = ["RECIPES", "GIFLoss", "HeadConfig", "MarginSoftmax", "Recipe", "TokenWeights", "token_weights"]
