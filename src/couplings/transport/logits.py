"""Logits of dense costs, formed in float64 and then rounded: near a solution they are small where they matter."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

LOG2E = 1 / math.log(2)  # exp2 takes half to a third of exp's time on a CPU
BLOCK = 2**17  # entries in float64 at a time on a CPU: they stay in cache, and memory is not touched anew
GOOD = 1e4  # factor by which a guess of a sum of exponentials may be off


def logits(
    cost: Tensor, left: Tensor, right: Tensor, slope: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """``left_j + right_l + slope C_jl``.

    Args:
        cost: ``(*batch, s, l)`` float64 or float32.
        left: ``(*batch, s)`` float64.
        right: ``(*batch, l)`` float64.
        slope: ``(*batch,)`` float64.
        dtype: Of the result.
        out: Contiguous memory for the result, if there is some to spare: touching new memory takes as long as the rest.

    Returns:
        ``(*batch, s, l)``: ``out``, or new memory.
    """
    if out is None and not cost.is_contiguous() and cost.mT.is_contiguous():
        return logits(cost.mT, right, left, slope, dtype).mT
    short, long = cost.shape[-2:]
    if (
        cost.device.type != "cpu"
        or torch.compiler.is_compiling()
        or short * long <= BLOCK
        or not cost.numel()
    ):
        whole = cost.to(torch.float64, copy=True).mul_(slope[..., None, None])
        whole.add_(left[..., :, None]).add_(right[..., None, :])
        return whole.to(dtype) if out is None else out.copy_(whole)
    if out is None:
        out = torch.empty(cost.shape, dtype=dtype, device=cost.device)
    for _ in filled(cost, left, right, slope, out):
        pass
    return out


def _alone(cost: Tensor) -> bool:
    """One problem on a CPU that does not stay in cache."""
    large = cost.numel() > BLOCK and cost.shape[:-2].numel() == 1
    return large and cost.device.type == "cpu" and cost.is_contiguous() and not torch.compiler.is_compiling()


def filled(cost: Tensor, left: Tensor, right: Tensor, slope: Tensor, out: Tensor) -> Iterator[Tensor]:
    """:func:`logits` on a CPU: the rows of ``out``, any memory, that have just been written, block by block."""
    batch, (short, long) = cost.shape[:-2], cost.shape[-2:]
    height = max(1, BLOCK // long)
    block = torch.empty(min(height, short), long, dtype=torch.float64, device=cost.device)
    items = (t.reshape(batch.numel(), *t.shape[len(batch) :]) for t in (out, cost, left, right, slope))
    for into, x, rows, columns, factor in zip(*items, strict=True):
        for start in range(0, short, height):
            part = slice(start, start + height)
            piece = block[: min(height, short - start)].copy_(x[part])
            torch.addcmul(columns, piece, factor, out=piece)
            yield into[part].copy_(piece.add_(rows[part, None]))


def marginals(plan: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums ``(*batch, n)`` and column sums ``(*batch, m)`` in float64; of a large plan on a CPU block by block."""
    if plan.stride(-1) != 1 and plan.stride(-2) == 1:
        columns, rows = marginals(plan.mT)
        return rows, columns
    n = plan.shape[-2]
    if plan.device.type != "cpu" or torch.compiler.is_compiling() or plan.numel() <= BLOCK:
        whole = plan.to(torch.float64)
        return whole.sum(-1), whole.sum(-2)
    parts = []
    columns = torch.zeros_like(plan[..., 0, :], dtype=torch.float64)
    for part in plan.split(max(1, BLOCK * n // plan.numel()), -2):
        piece = part.to(torch.float64)
        parts.append(piece.sum(-1))
        columns = columns + piece.sum(-2)
    return torch.cat(parts, -1), columns


def log_sum(cost: Tensor, left: Tensor, right: Tensor, slope: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``logsumexp(left_j + right_l + slope C_jl)`` along ``dim``, with exponentials in ``dtype``; the rest float64."""
    raw = logits(cost, left, right, slope, torch.float64)
    top = raw.amax(dim, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    sums = raw.sub_(top).to(dtype).exp_().sum(dim, dtype=torch.float64)
    return sums.log() + top.squeeze(dim)


def kernel(
    cost: Tensor,
    shift: Tensor,
    guess: Tensor,
    slope: Tensor,
    dtype: torch.dtype,
    floor: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax_j(shift_j + slope C_jl)``.

    Args:
        cost: As in :func:`logits`.
        shift: ``(*batch, s)`` float64, ``-inf`` leaves a row out.
        guess: About what ``log sum_j exp(..)`` is, ``(*batch, l)`` float64: only logits less this are rounded.
        slope: ``(*batch,)`` float64.
        dtype: Of the exponentials.
        floor: Logits below it, counted from about the largest of their column, are cut off.
        out: As in :func:`logits`.

    Returns:
        ``(*batch, s, l)``, and the logarithm of what the exponentials were divided by ``(*batch, l)``.
    """
    left, right, scale, least = shift * LOG2E, guess * -LOG2E, slope * LOG2E, floor * LOG2E
    if _alone(cost):
        # where the guess is good nothing has to be subtracted, and all but the division is done while in cache
        terms = torch.empty(cost.shape, dtype=dtype, device=cost.device) if out is None else out
        z = torch.zeros_like(guess, dtype=dtype)
        for part in filled(cost, left, right, scale, terms):
            z += part.clamp_(min=least).exp2_().sum(0)
        if bool(((z > 1 / GOOD) & (z < GOOD)).all()):
            return terms.div_(z[..., None, :]), guess + z.to(guess.dtype).log()
    raw = logits(cost, left, right, scale, dtype, out)
    top = raw.amax(-2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)  # a column without an allowed pair has no mass
    terms = raw.sub_(top).clamp_(min=least).exp2_()
    z = terms.sum(-2, keepdim=True)
    return terms.div_(z), guess + (top + z.log2())[..., 0, :].to(guess.dtype) / LOG2E
