"""Solving in the dtype that was asked for, whatever autocast would make of a matrix product."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

USUAL = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Devices that need not be asked whether they know autocast: before torch 2.9, torch.compile cannot trace the question."""


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which no operation on ``x``'s device is cast."""
    kind = x.device.type
    known = kind in USUAL or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
