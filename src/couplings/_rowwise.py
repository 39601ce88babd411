"""What every row-by-row ``autograd.Function`` of the library shares: vmap, blocks of rows, looking at values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, which torch leaves untyped."""
    return function.apply(*args)


class _Given(inspect.BoundArguments):
    """Arguments that need no binding: all are given, in order."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._given = args

    @property
    def args(self) -> tuple[Any, ...]:
        return self._given

    @property
    def kwargs(self) -> dict[str, Any]:
        return {}

    def apply_defaults(self) -> None:
        """Nothing is left to fill in."""


class _InOrder(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return _Given(args) if not kwargs else super().bind(*args, **kwargs)


class RowFunction(torch.autograd.Function):
    """A function all of whose tensors carry the same leading batch dimensions: vmap is one more of them.

    Its ``forward`` has no ctx and no defaults. torch builds the signature of such a forward and binds to it at every
    call, which takes longer than a small row; here there is nothing to build or bind.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parameters = list(inspect.signature(cls.forward).parameters.values())
        cls.forward.__signature__ = _InOrder(parameters)  # type: ignore[attr-defined]

        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            moved = [
                arg
                if not isinstance(arg, Tensor)
                else arg.movedim(dim, 0)
                if dim is not None
                else arg.expand(info.batch_size, *arg.shape)
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            out = apply(cls, *moved)
            return out, (0,) * len(out) if isinstance(out, tuple) else 0

        cls.vmap = staticmethod(vmap)  # type: ignore[method-assign]


BLOCK = 2**18
"""Entries that a block of rows holds at most on a CPU: a handful of float32 temporaries of that size stay in cache."""


def by_rows(
    function: Callable[..., tuple[Tensor | None, ...]], *args: Tensor | None
) -> tuple[Tensor | None, ...]:
    """``function(*args)``, block of rows by block of rows on a CPU where nothing is recorded.

    The tensors (*batch, width) share their batch dimensions and no row needs another. The blocks follow from the shapes
    alone, so that a row's result does not depend on other rows' values.
    """
    first = next(arg for arg in args if arg is not None)
    batch = first.shape[:-1]
    widest = max(arg.shape[-1] for arg in args if arg is not None)
    if (
        batch.numel() < 2
        or batch.numel() * widest <= 4 * BLOCK
        or first.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return function(*args)
    rows = [None if arg is None else arg.reshape(batch.numel(), arg.shape[-1]) for arg in args]
    height = max(1, BLOCK // widest)
    out: list[Tensor | None] = []
    for start in range(0, batch.numel(), height):
        part = function(*(None if row is None else row[start : start + height] for row in rows))
        if start == 0:
            out = [None if p is None else p.new_empty((batch.numel(), p.shape[-1])) for p in part]
        for whole, piece in zip(out, part, strict=True):
            if whole is not None and piece is not None:
                whole[start : start + height] = piece
    return tuple(None if whole is None else whole.view(*batch, whole.shape[-1]) for whole in out)


def seen(flag: Tensor) -> bool | None:
    """The truth of ``flag.any()`` where looking is free (eager CPU); None on an accelerator, under vmap or compile."""
    if torch.compiler.is_compiling() or flag.device.type != "cpu":
        return None
    try:
        return bool(flag.any())
    except RuntimeError:  # vmap forbids looking; there is no public way to ask it beforehand
        return None


def extent(values: Tensor) -> tuple[float, float] | None:
    """Least and largest value, both NaN if one is, where ``seen`` would look; None elsewhere and of nothing."""
    if torch.compiler.is_compiling() or values.device.type != "cpu" or values.numel() == 0:
        return None
    try:
        least, largest = values.aminmax()
        return float(least), float(largest)
    except RuntimeError:
        return None
