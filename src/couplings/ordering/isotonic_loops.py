"""The loops of ``method="projection"`` over sorted rows, for numba to compile (isotonic_compiled.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

RANGE = 600.0
"""Natural logarithm of what double holds beside 1, and of its inverse; some of it is left to weights."""


def climb_rows(ordered: Any, rate: Any, widest: float, s: Any, wall: Any) -> None:
    """``isotonic._climb``.

    Args:
        ordered: (rows, n), rising.
        rate: (rows, 1).
        widest: what a gap counts at most.
        s: (rows, n), written.
        wall: (rows, n) bool, written.
    """
    n = ordered.shape[1]
    for row in range(len(ordered)):
        total = 0.0
        s[row, 0] = total
        for i in range(1, n):
            gap = (ordered[row, i] - ordered[row, i - 1]) * rate[row, 0]
            wide = gap >= widest
            wall[row, i - 1] = wide
            total += widest if wide else gap
            s[row, i] = total
        wall[row, n - 1] = False


def pool_rows(s: Any, w: Any, weights: Any, wall: Any, first: Any, last: Any, start: Any, block: Any) -> None:
    """One row after the other, each from left to right; the blocks so far lie on a stack and rise.

    Args:
        s: y or s, (rows, n).
        w: (rows, n), or no rows: least squares; likewise weights and wall.
        weights: (rows, n) or (0, n).
        wall: (rows, n) or (0, n).
        first: (rows, n), written.
        last: (rows, n), written.
        start: (n,), memory for the first indices of the blocks.
        block: (3, n), memory for their values, numerators and denominators (``isotonic._Problem``).
    """
    n = s.shape[1]
    entropic, weighted, walled = len(w) > 0, len(weights) > 0, len(wall) > 0
    value, over, under = block[0], block[1], block[2]
    for row in range(len(s)):
        count = 0
        for i in range(n):
            begin = i
            denominator = weights[row, i] if weighted else 1.0
            numerator = denominator if entropic else denominator * s[row, i]
            mean = s[row, i] - w[row, i] if entropic else s[row, i]
            while count > 0 and value[count - 1] >= mean:
                end = begin - 1
                if walled and wall[row, end]:
                    break
                count -= 1
                if entropic:
                    numerator += over[count] * math.exp(s[row, end] - s[row, i])
                    denominator += under[count] * math.exp(w[row, end] - w[row, i])
                    mean = math.log(numerator / denominator) + (s[row, i] - w[row, i])
                else:
                    numerator += over[count]
                    denominator += under[count]
                    mean = numerator / denominator
                begin = start[count]
            start[count] = begin
            value[count], over[count], under[count] = mean, numerator, denominator
            count += 1
        end = n - 1
        for k in range(count - 1, -1, -1):
            for i in range(start[k], end + 1):
                first[row, i] = start[k]
                last[row, i] = end
            end = start[k] - 1


def fit_rows(
    s: Any, w: Any, wall: Any, entropic: bool, first: Any, last: Any, start: Any, block: Any, memory: Any
) -> None:
    """One row of ``isotonic._solve`` without weights.

    Args:
        s: (1, n).
        w: (1, n).
        wall: (1, n) bool.
        entropic: whether the loss is that of ``isotonic.pool_entropic``; else that of ``pool`` for s - w.
        first: (1, n), written.
        last: (1, n), written.
        start: as in ``pool_rows``.
        block: as in ``pool_rows``.
        memory: (2, n), memory.
    """
    n = s.shape[1]
    none = memory[:0]
    if not entropic:
        for i in range(n):
            memory[0, i] = s[0, i] - w[0, i]
        pool_row(memory[:1], none, none, wall, first, last, start, block)
    elif s[0, n - 1] - s[0, 0] < RANGE and w[0, n - 1] - w[0, 0] < RANGE:
        for i in range(n):
            low = w[0, i] - w[0, n - 1]
            memory[0, i] = math.exp((s[0, i] - s[0, n - 1]) - low)
            memory[1, i] = math.exp(low)
        pool_row(memory[:1], none, memory[1:2], wall, first, last, start, block)
    else:
        pool_row(s, w, none, wall, first, last, start, block)


def rank_rows(
    ordered: Any,
    rate: Any,
    target: Any,
    widest: float,
    entropic: bool,
    first: Any,
    last: Any,
    start: Any,
    block: Any,
    memory: Any,
    wall: Any,
) -> None:
    """``isotonic._RankBlocks`` without weights, all entries valid.

    Args:
        ordered: (rows, n), rising.
        rate: (rows, 1).
        target: (1, n).
        widest: as in ``climb_rows``.
        entropic: as in ``fit_rows``.
        first: (rows, n), written.
        last: (rows, n), written.
        start: as in ``pool_rows``.
        block: as in ``pool_rows``.
        memory: (4, n), memory.
        wall: (1, n) bool, memory.
    """
    for row in range(len(ordered)):
        here = slice(row, row + 1)
        climb_row(ordered[here], rate[here], widest, memory[:1], wall)
        fit_row(memory[:1], target, wall, entropic, first[here], last[here], start, block, memory[2:])


def value_rows(
    ordered: Any,
    std: Any,
    inverse: Any,
    entropic: bool,
    first: Any,
    last: Any,
    start: Any,
    block: Any,
    memory: Any,
    wall: Any,
) -> None:
    """``isotonic._ValueBlocks``, all entries valid.

    Args:
        ordered: (rows, n), rising.
        std: (rows, 1).
        inverse: (rows, 1).
        entropic: as in ``fit_rows``.
        first: (rows, n), written.
        last: (rows, n), written.
        start: as in ``pool_rows``.
        block: as in ``pool_rows``.
        memory: (4, n), memory.
        wall: (1, n) bool, memory.
    """
    n = ordered.shape[1]
    wall[:] = False
    for row in range(len(ordered)):
        spread = (ordered[row, n - 1] - ordered[row, 0]) / std[row, 0]
        step = inverse[row, 0]
        if step >= spread:  # no block
            for i in range(n):
                first[row, i] = last[row, i] = i
            continue
        for i in range(n):
            memory[0, i] = i * step
            memory[1, i] = (ordered[row, i] - ordered[row, 0]) / std[row, 0]
        here = slice(row, row + 1)
        fit_row(memory[:1], memory[1:2], wall, entropic, first[here], last[here], start, block, memory[2:])


def sum_blocks(value: Any, last: Any, mean: bool, out: Any) -> None:
    """Sums over runs of neighbours, or their means, at every entry.

    Args:
        value: (rows, n).
        last: (rows, n), the last index of each entry's run.
        mean: whether sums are divided by the number of entries.
        out: (rows, n), written.
    """
    n = value.shape[1]
    for row in range(len(value)):
        begin = 0
        while begin < n:
            end = last[row, begin] + 1
            total = 0.0
            for i in range(begin, end):
                total += value[row, i]
            if mean:
                total /= end - begin
            for i in range(begin, end):
                out[row, i] = total
            begin = end


def centred_rows(x: Any, rate: Any, last: Any, out: Any) -> None:
    """``blocks.centred`` without weights.

    Args:
        x: (rows, n).
        rate: (rows, 1).
        last: (rows, n), the last index of each entry's block.
        out: (rows, n), written.
    """
    n = x.shape[1]
    for row in range(len(x)):
        begin = 0
        while begin < n:
            end = last[row, begin] + 1
            total = 0.0
            for i in range(begin, end):
                offset = (x[row, i] - x[row, begin]) * rate[row, 0]
                out[row, i] = offset
                total += offset
            total /= end - begin
            for i in range(begin, end):
                out[row, i] -= total
            begin = end


def centred_back_rows(grad: Any, rate: Any, last: Any, out: Any, x_grad: Any, rate_grad: Any) -> None:
    """The gradients of ``centred_rows``.

    Args:
        grad: (rows, n), of its result.
        rate: (rows, 1).
        last: (rows, n).
        out: (rows, n), its result.
        x_grad: (rows, n), written.
        rate_grad: (rows, 1), written.
    """
    n = grad.shape[1]
    for row in range(len(grad)):
        begin = 0
        whole = 0.0
        while begin < n:
            end = last[row, begin] + 1
            total = 0.0
            for i in range(begin, end):
                total += grad[row, i]
            total /= end - begin
            for i in range(begin, end):
                inner = grad[row, i] - total
                x_grad[row, i] = inner * rate[row, 0]
                whole += inner * out[row, i]
            begin = end
        rate_grad[row, 0] = whole / rate[row, 0]


def softmax_rows(x: Any, rate: Any, last: Any, out: Any) -> None:
    """``blocks.softmax`` without weights; arguments as in ``centred_rows``."""
    n = x.shape[1]
    for row in range(len(x)):
        begin = 0
        while begin < n:
            end = last[row, begin] + 1
            total = 0.0
            for i in range(begin, end):
                power = math.exp((x[row, i] - x[row, end - 1]) * rate[row, 0])
                out[row, i] = power
                total += power
            for i in range(begin, end):
                out[row, i] /= total
            begin = end


def softmax_back_rows(grad: Any, x: Any, rate: Any, last: Any, out: Any, x_grad: Any, rate_grad: Any) -> None:
    """The gradients of ``softmax_rows``; arguments as there and in ``centred_back_rows``."""
    n = grad.shape[1]
    for row in range(len(grad)):
        begin = 0
        whole = 0.0
        while begin < n:
            end = last[row, begin] + 1
            total = 0.0
            for i in range(begin, end):
                total += grad[row, i] * out[row, i]
            for i in range(begin, end):
                inner = out[row, i] * (grad[row, i] - total)
                x_grad[row, i] = inner * rate[row, 0]
                whole += inner * (x[row, i] - x[row, end - 1])
            begin = end
        rate_grad[row, 0] = whole


def unsort_rows(value: Any, order: Any, out: Any) -> None:
    """Each entry (rows, n) to where ``order`` says that it came from."""
    for row in range(len(value)):
        for i in range(value.shape[1]):
            out[row, order[row, i]] = value[row, i]


def resort_rows(value: Any, order: Any, out: Any) -> None:
    """Each entry (rows, n) from where ``order`` says that it came from."""
    for row in range(len(value)):
        for i in range(value.shape[1]):
            out[row, i] = value[row, order[row, i]]


# What the loops above call. A compiled function can only call compiled ones: isotonic_compiled.py puts them here.
climb_row: Callable[..., None] = climb_rows
pool_row: Callable[..., None] = pool_rows
fit_row: Callable[..., None] = fit_rows
