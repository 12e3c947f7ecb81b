"""Train recognition models with millions of identities: structured identity codes instead of a softmax."""

from gif.codes import IdentityCodes, TokenizeConfig, tokenize
from gif.head import Head
from gif.losses import GIFLoss, MarginSoftmax, PartialFC
from gif.vectors import CodeVectors, SpreadConfig, initial_code_vectors, spread_code_vectors
from gif_kernels import AngularMargin

__all__ = [
    "AngularMargin",
    "CodeVectors",
    "GIFLoss",
    "Head",
    "IdentityCodes",
    "MarginSoftmax",
    "PartialFC",
    "SpreadConfig",
    "TokenizeConfig",
    "initial_code_vectors",
    "spread_code_vectors",
    "tokenize",
]
