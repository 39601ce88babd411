"""What every ranking loss shares: checks of lists, working precision, conventions, reduction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen
from couplings.ordering.methods import NAMES
from couplings.selection.api import MASK_METHODS as ALL_MASK_METHODS
from couplings.selection.api import RANDOM_METHODS

Epsilon = float | Tensor | None

RANK_METHODS = NAMES
MASK_METHODS = tuple(method for method in ALL_MASK_METHODS if method not in RANDOM_METHODS)


def check_lists(name: str, x: Tensor) -> None:
    """Floating-point lists along the last dimension, with at least one entry each."""
    _checks.real_tensor(name, x)
    if x.dim() == 0:
        _checks.reject(name, "lists along the last dimension", _checks.describe(x), "Call .reshape(1).")
    if x.shape[-1] == 0:
        _checks.reject(name, "at least one entry in each list", _checks.describe(x), "Drop the empty lists.")


def check_options(
    name: str,
    x: Tensor,
    mask: Tensor | None,
    epsilon: Epsilon,
    reduction: str,
    methods: tuple[str, ...] = ("transport",),
    method: str = "transport",
) -> None:
    """The settings that all losses have in common; ``name`` is the argument that holds the lists ``x``."""
    if mask is not None:
        _checks.bool_tensor("mask", mask)
        _checks.same_device("mask", mask, x, name)
        _checks.broadcastable("mask", mask, x.shape, f"the shape of {name}")
    if isinstance(epsilon, Tensor):
        _checks.real_tensor("epsilon", epsilon)
        _checks.same_device("epsilon", epsilon, x, name)
        _checks.broadcastable("epsilon", epsilon, x.shape[:-1], "one value per list, or a scalar")
        if seen(~(epsilon > 0)):
            _checks.reject(
                "epsilon", "positive values in a tensor", "some that are not", "Pass 0 as a float."
            )
    elif epsilon is not None:
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            _checks.reject(
                "epsilon",
                "a float, a tensor or None",
                _checks.describe(epsilon),
                "Pass None for the default.",
                TypeError,
            )
        if not 0 <= epsilon < math.inf:
            _checks.reject("epsilon", "a finite number >= 0", epsilon, "0 is the exact metric.")
    _checks.choice("method", method, methods)
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))


def check_beside(name: str, value: object, x: Tensor, of: str, meaning: str) -> Tensor:
    """A real or integer tensor that broadcasts to the lists ``x``."""
    if not isinstance(value, Tensor) or value.is_complex():
        _checks.reject(
            name,
            "a tensor of real numbers",
            _checks.describe(value),
            f"Pass {meaning} as a tensor.",
            TypeError,
        )
    _checks.same_device(name, value, x, of)
    _checks.broadcastable(name, value, x.shape, meaning)
    return value.expand(x.shape)


def check_flags(name: str, value: object, x: Tensor, of: str) -> Tensor:
    """A bool tensor that broadcasts to the lists ``x``."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        remedy = f"Pass {name} != 0." if isinstance(value, Tensor) else "Pass a tensor."
        _checks.reject(name, "a bool tensor, True = relevant", _checks.describe(value), remedy, TypeError)
    _checks.same_device(name, value, x, of)
    _checks.broadcastable(name, value, x.shape, "one flag per score")
    return value.expand(x.shape)


def check_count(name: str, value: object, most: int | None, meaning: str) -> int:
    """An int in [1, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        _checks.reject(name, "an int", _checks.describe(value), f"Pass {meaning}.", TypeError)
    if value < 1 or (most is not None and value > most):
        upper = "at least 1" if most is None else f"between 1 and {most}, the length of the lists"
        _checks.reject(name, upper, value, f"Pass {meaning}.")
    return value


def is_exact(epsilon: Epsilon) -> bool:
    """Whether the discrete metric itself is asked for."""
    return not isinstance(epsilon, Tensor) and epsilon == 0


def working(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x in a dtype that is computed in, 0 where masked; and the mask in its shape."""
    if x.dtype in _checks.HALF:
        x = x.float()
    elif not x.is_floating_point():  # exact up to 2^53
        x = x.double()
    if mask is None:
        return x, None
    mask = mask.expand(x.shape)
    return x.masked_fill(~mask, 0), mask


def count_valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Valid entries of each list, (*batch), in the dtype of x."""
    if mask is None:
        return x.new_full(x.shape[:-1], x.shape[-1])
    return mask.sum(-1).to(x.dtype)


def no_gradient(x: Tensor) -> Tensor:
    """Zero for each list, with a zero gradient rather than none; NaN for a list that holds NaN."""
    limit = torch.finfo(x.dtype).max
    return (0 * x.clamp(-limit, limit)).sum(-1)


def where_defined(defined: Tensor, loss: Tensor, x: Tensor) -> Tensor:
    """``loss``, and 0 for the lists in which there is nothing to rank (NaN where x holds NaN)."""
    return torch.where(defined, loss, 0) + no_gradient(x)


def reduce(loss: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Over all lists: their mean, their sum, or each; back in the dtype of the scores."""
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss.to(dtype)
