"""The field's heads whose cost does not grow with the identities, or is said not to: what GIFLoss is compared with.

Each is a head of this library, by the margin softmax of `gif_kernels.code_contrast_loss`; docs/accuracy.md says whence.
None learns a centre an identity, so none has anything that could start from code vectors.
"""

from gif.losses.peers.class_queue import DynamicClassQueue
from gif.losses.peers.dynamic_class_pool import DynamicClassPool
from gif.losses.peers.prototype_memory import PrototypeMemory
from gif.losses.peers.virtual_fc import VirtualFC

__all__ = ["DynamicClassPool", "DynamicClassQueue", "PrototypeMemory", "VirtualFC"]
