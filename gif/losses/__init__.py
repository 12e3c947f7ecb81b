"""Losses with one contract: ``loss_fn(embeddings, labels) -> scalar``."""

from gif.losses.config import HeadConfig
from gif.losses.forces import Forces, pull_and_push
from gif.losses.gif_loss import GIFLoss
from gif.losses.partial_fc import PartialFC
from gif.losses.peers import DynamicClassPool, DynamicClassQueue, PrototypeMemory, VirtualFC
from gif.losses.recipes import RECIPES, Recipe
from gif.losses.softmax import MarginSoftmax
from gif.losses.token_weights import TokenWeights, token_weights

__all__ = [
    "RECIPES",
    "DynamicClassPool",
    "DynamicClassQueue",
    "Forces",
    "GIFLoss",
    "HeadConfig",
    "MarginSoftmax",
    "PartialFC",
    "PrototypeMemory",
    "Recipe",
    "TokenWeights",
    "VirtualFC",
    "pull_and_push",
    "token_weights",
]
