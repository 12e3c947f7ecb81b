"""Train recognition models with millions of identities: structured identity codes instead of a softmax.

Each name is imported when first asked for, so that who uses one part of the package does not wait for the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gif.codes import IdentityCodes, TokenizeConfig, tokenize
    from gif.head import Head
    from gif.losses import GIFLoss, MarginSoftmax, PartialFC
    from gif.recognition import load_model
    from gif.vectors import CodeVectors, SpreadConfig, initial_code_vectors, spread_code_vectors
    from gif_kernels import AngularMargin, __version__

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
    "__version__",
    "initial_code_vectors",
    "load_model",
    "spread_code_vectors",
    "tokenize",
]

_MODULES = {
    "gif.codes": ("IdentityCodes", "TokenizeConfig", "tokenize"),
    "gif.head": ("Head",),
    "gif.losses": ("GIFLoss", "MarginSoftmax", "PartialFC"),
    "gif.recognition": ("load_model",),
    "gif.vectors": ("CodeVectors", "SpreadConfig", "initial_code_vectors", "spread_code_vectors"),
    "gif_kernels": ("AngularMargin", "__version__"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
