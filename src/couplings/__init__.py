"""Differentiable discrete operators for PyTorch: exact to a certificate, differentiable to any order, fast."""

from importlib.metadata import version as _version

from couplings import losses, nn, testing
from couplings.selection import soft_topk, soft_topk_mask
from couplings.transport import Coupling, Status, solve

__version__ = _version("couplings")

__all__ = [
    "Coupling",
    "Status",
    "losses",
    "nn",
    "soft_topk",
    "soft_topk_mask",
    "solve",
    "testing",
]
