"""Argument checks. Every message has one grammar: argument, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
REAL = (torch.float64, torch.float32, *HALF)
SHOWN = 80  # characters of a value in a message


def reject(
    argument: str, expected: str, got: object, remedy: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise ``error`` with the library's message grammar."""
    raise error(f"{argument}: expected {expected}, got {got}. {remedy}")


def describe(value: object) -> str:
    """Say in a few words what came: dtype and shape of a tensor, type and value of the rest."""
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"a {name} tensor of shape {tuple(value.shape)} on {value.device}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # an array of another library
        return f"{type(value).__name__} {value.dtype} of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= SHOWN else text[:SHOWN] + '..'}"


def real_tensor(argument: str, value: object) -> None:
    """A real floating tensor (float64, float32, bfloat16 or float16)."""
    if not isinstance(value, Tensor):
        reject(
            argument,
            "a floating-point torch.Tensor",
            describe(value),
            f"Pass {argument}.log_plan() or .plan(), as the function asks."
            if type(value).__name__ == "Coupling"
            else f"Convert with torch.as_tensor({argument}, dtype=torch.float32).",
            TypeError,
        )
    if value.dtype not in REAL:
        reject(
            argument,
            "dtype float64, float32, bfloat16 or float16",
            describe(value),
            "Complex numbers have no order." if value.is_complex() else f"Call {argument}.float().",
            TypeError,
        )


def bool_tensor(argument: str, value: object) -> None:
    """A bool tensor; True means that the entry takes part."""
    if not isinstance(value, Tensor):
        reject(argument, "a bool tensor, True = takes part", describe(value), "Pass a tensor.", TypeError)
    if value.dtype != torch.bool:
        reject(
            argument,
            "a bool tensor, True = takes part",
            describe(value),
            f"Pass {argument}.bool(), or {argument} != 0.",
            TypeError,
        )


def same_device(argument: str, value: Tensor, reference: Tensor, of: str = "x") -> None:
    """``value`` lives where ``reference`` lives."""
    if value.device != reference.device:
        reject(
            argument,
            f"a tensor on {reference.device}, where {of} is",
            describe(value),
            f"Call {argument}.to({of}.device).",
        )


def same_dtype(argument: str, value: Tensor, reference: Tensor, of: str = "x") -> None:
    """``value`` has the dtype of ``reference``."""
    if value.dtype != reference.dtype:
        reject(
            argument,
            f"dtype {str(reference.dtype).removeprefix('torch.')}, as {of} has",
            describe(value),
            f"Call {argument}.to({of}.dtype).",
            TypeError,
        )


def broadcastable(argument: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """``value.shape`` broadcasts to ``shape`` (without growing it)."""
    try:
        fits = torch.broadcast_shapes(value.shape, tuple(shape)) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        reject(
            argument,
            f"a shape that broadcasts to {tuple(shape)} ({meaning})",
            describe(value),
            f"Reshape {argument}.",
        )


def dimension(argument: str, dim: object, ndim: int) -> int:
    """A valid dimension of an ``ndim``-dimensional tensor, as a non-negative int."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        reject(argument, "an int", describe(dim), "Pass dim=-1 for the last dimension.", TypeError)
    if ndim == 0:
        reject("x", "at least one dimension", "a 0-dimensional tensor", "Call x.reshape(1).")
    if not -ndim <= dim < ndim:
        reject(argument, f"an int in [{-ndim}, {ndim - 1}]", dim, "Pick a dimension that x has.")
    return dim % ndim


def choice(argument: str, value: object, allowed: Sequence[str]) -> None:
    """One of the names in ``allowed``."""
    if value not in allowed:
        reject(argument, "one of " + ", ".join(map(repr, allowed)), repr(value), "Pick one of these.")
