"""Solving in the dtype that was asked for, whatever autocast would make of a matrix product."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

USUAL = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Devices that need not be asked whether they know autocast: torch 2.8 cannot compile the question."""


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for ``x``'s device."""
    kind = x.device.type
    known = kind in USUAL or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which no operation on ``x``'s device is cast."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
