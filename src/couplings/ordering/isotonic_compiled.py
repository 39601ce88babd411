"""The sequential pooling of ``isotonic.py`` compiled by numba, where that is installed (projection.md, "Pooling").

numba is imported at the first use. Where it is absent, or fails at anything, ``compiled`` is None from then on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pooling = Callable[[Tensor, "Tensor | None", "Tensor | None", "Tensor | None"], tuple[Tensor, Tensor]]
"""Scores y or s, w, weights, wall, as in ``isotonic.py``, on the CPU; the first and last index of every block."""


def compiled() -> Pooling | None:
    """The compiled pooling, or None."""
    return _attempt()[0]


def status() -> str:
    """Whether pooling is compiled, and if not, why."""
    return _attempt()[1]


@functools.cache
def _attempt() -> tuple[Pooling | None, str]:
    """Compile, and try on one row."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            return None, "plain torch (NUMBA_DISABLE_JIT is set)"
        real, flag, index = "float64[:, ::1]", "boolean[:, ::1]", "int64[:, ::1]"
        signature = f"void({real}, {real}, {real}, {flag}, {index}, {index}, int64[::1], {real})"
        rows = numba.njit(signature, cache=True, nogil=True, error_model="numpy")(_pool_rows)
        pooling = functools.partial(_pool, rows)
        first, last = pooling(torch.tensor([[1.0, 0.0]], dtype=torch.float64, device="cpu"), None, None, None)
        if (first.tolist(), last.tolist()) != ([[0, 0]], [[1, 1]]):
            return None, f"plain torch (numba {numba.__version__} computes something else)"
        return pooling, f"compiled by numba {numba.__version__}"
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return None, "plain torch (numba is not installed: pip install 'couplings[fast]' makes it faster)"
        return None, f"plain torch (numba does not work here: {error})"
    except Exception as error:  # noqa: BLE001 - whatever a broken numba raises, there is another way
        text = str(error).strip().partition("\n")[0]
        return None, f"plain torch (numba does not work here: {type(error).__name__}: {text})"


def _pool(
    rows: Callable[..., None], y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = y.shape[-1]

    def array(column: Tensor | None, dtype: torch.dtype) -> Any:
        if column is None:
            return torch.empty((0, n), dtype=dtype, device="cpu").numpy()
        return column.to(dtype).reshape(-1, n).contiguous().numpy()

    first = torch.empty(y.shape, dtype=torch.int64, device="cpu")
    last = torch.empty_like(first)
    rows(
        array(y, torch.float64),
        array(w, torch.float64),
        array(weights, torch.float64),
        array(wall, torch.bool),
        array(first, torch.int64),
        array(last, torch.int64),
        torch.empty(n, dtype=torch.int64, device="cpu").numpy(),
        torch.empty((3, n), dtype=torch.float64, device="cpu").numpy(),
    )
    return first, last


def _pool_rows(
    s: Any, w: Any, weights: Any, wall: Any, first: Any, last: Any, start: Any, block: Any
) -> None:
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
