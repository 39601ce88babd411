"""What ``method="projection"`` compiles by numba, where that is installed (projection.md, "Compiled").

The sequential pooling of ``isotonic.py``, sums over its blocks, and a sort of float32 rows (``sort_compiled.py``).
numba is imported at the first use. Where it is absent, or fails at anything, ``compiled`` is None from then on.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings.ordering.sort_compiled import PASSES, SIZE, sort_rows

PARALLEL = 2**15
"""Entries from which rows are shared between as many threads as torch uses; to start one costs as much as some 10^4."""


class Compiled(NamedTuple):
    """The compiled functions, on CPU tensors.

    Attributes:
        pool: y or s, w, weights, wall, as in ``isotonic.py``, to the first and the last index of every block.
        block_sum: (*batch, n) float64, the last index of every block, and whether means are wanted, to the sums or
            means over blocks, at every entry.
        climb: (*batch, n) and (*batch, 1) float64 and a float, as in ``isotonic._climb``.
        sort: (*batch, n) float32 to the entries in rising order, float64, and where each came from.
    """

    pool: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
    block_sum: Callable[[Tensor, Tensor, bool], Tensor]
    climb: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    sort: Callable[[Tensor], tuple[Tensor, Tensor]]


def compiled() -> Compiled | None:
    """The compiled functions, or None."""
    return _attempt()[0]


def status() -> str:
    """Whether pooling is compiled, and if not, why."""
    return _attempt()[1]


@functools.cache
def _attempt() -> tuple[Compiled | None, str]:
    """Compile, and try on one row."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            return None, "plain torch (NUMBA_DISABLE_JIT is set)"
        real, flag, index = "float64[:, ::1]", "boolean[:, ::1]", "int64[:, ::1]"

        def build(function: Callable[..., None], *arguments: str) -> Callable[..., None]:
            signature = f"void({', '.join(arguments)})"
            jit = numba.njit(signature, cache=True, nogil=True, error_model="numpy")
            return jit(function)  # type: ignore[no-any-return]

        pool = build(_pool_rows, real, real, real, flag, index, index, "int64[::1]", real)
        sums = build(_sum_blocks, real, index, "boolean", real)
        climb = build(_climb_rows, real, real, "float64", real, flag)
        sort = build(
            sort_rows,
            *("int32[:, ::1]", "float32[:, ::1]", index, real),
            *(index, "uint32[:, ::1]", "int32[:, ::1]"),
        )
        found = Compiled(
            functools.partial(_pool, pool),
            functools.partial(_sum, sums),
            functools.partial(_climb, climb),
            functools.partial(_sort, sort),
        )
        trial = torch.tensor([[1.0, -2.0]], device="cpu")
        ordered, order = found.sort(trial)
        first, last = found.pool(trial.double(), None, None, None)
        total = found.block_sum(ordered, last, False)
        s, wall = found.climb(ordered, torch.ones_like(total[:, :1]), 2.0)
        results = [t.tolist() for t in (ordered, order, first, last, total, s, wall)]
        if results != [[[-2, 1]], [[1, 0]], [[0, 0]], [[1, 1]], [[-1, -1]], [[0, 2]], [[True, False]]]:
            return None, f"plain torch (numba {numba.__version__} computes something else)"
        return found, f"compiled by numba {numba.__version__}"
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return None, "plain torch (numba is not installed: pip install 'couplings[fast]' makes it faster)"
        return None, f"plain torch (numba does not work here: {error})"
    except Exception as error:  # noqa: BLE001 - whatever a broken numba raises, there is another way
        text = str(error).strip().partition("\n")[0]
        return None, f"plain torch (numba does not work here: {type(error).__name__}: {text})"


def _rows(column: Tensor | None, n: int, dtype: torch.dtype) -> Any:
    """As a (rows, n) array in one piece of memory, of that dtype; no rows of nothing."""
    if column is None:
        return torch.empty((0, n), dtype=dtype, device="cpu").numpy()
    return column.detach().to(dtype).reshape(-1, n).contiguous().numpy()


def _new(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    return torch.empty(shape, dtype=dtype, device="cpu").numpy()


def _shared(work: Callable[[slice], None], rows: int, n: int) -> None:
    """``work`` on all rows, in as many parts as torch has threads; no thread outlives the call, or a fork."""
    parts = min(rows, torch.get_num_threads()) if rows * n >= PARALLEL else 1
    bounds = [rows * part // parts for part in range(parts + 1)]
    own, *others = (slice(low, high) for low, high in itertools.pairwise(bounds))
    failed: list[BaseException] = []

    def guarded(part: slice) -> None:
        try:
            work(part)
        except BaseException as error:  # noqa: BLE001 - raised below, where somebody can see it
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(part,)) for part in others]
    for thread in threads:
        thread.start()
    guarded(own)
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _pool(
    kernel: Callable[..., None], y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = y.shape[-1]
    columns = [_rows(column, n, torch.float64) for column in (y, w, weights)] + [_rows(wall, n, torch.bool)]
    first = torch.empty(y.shape, dtype=torch.int64, device="cpu")
    last = torch.empty_like(first)
    columns += [_rows(first, n, torch.int64), _rows(last, n, torch.int64)]

    def work(part: slice) -> None:
        kernel(*(column[part] for column in columns), _new(n, dtype=torch.int64), _new(3, n))

    _shared(work, len(columns[0]), n)
    return first, last


def _sum(kernel: Callable[..., None], value: Tensor, last: Tensor, mean: bool) -> Tensor:
    n = value.shape[-1]
    out = torch.empty(value.shape, dtype=torch.float64, device="cpu")
    given, ends, found = (
        _rows(t, n, dtype) for t, dtype in ((value, torch.float64), (last, torch.int64), (out, torch.float64))
    )
    _shared(lambda part: kernel(given[part], ends[part], mean, found[part]), len(given), n)
    return out


def _climb(
    kernel: Callable[..., None], ordered: Tensor, rate: Tensor, widest: float
) -> tuple[Tensor, Tensor]:
    n = ordered.shape[-1]
    s = torch.empty(ordered.shape, dtype=torch.float64, device="cpu")
    wall = torch.empty(ordered.shape, dtype=torch.bool, device="cpu")
    given, rates = _rows(ordered, n, torch.float64), _rows(rate, 1, torch.float64)
    upto, closed = _rows(s, n, torch.float64), _rows(wall, n, torch.bool)
    _shared(lambda part: kernel(given[part], rates[part], widest, upto[part], closed[part]), len(given), n)
    return s, wall


def _sort(kernel: Callable[..., None], x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    ordered = torch.empty(x.shape, dtype=torch.float64, device="cpu")
    order = torch.empty(x.shape, dtype=torch.int64, device="cpu")
    values = _rows(x, n, torch.float32)
    arrays = (values.view("int32"), values, _rows(order, n, torch.int64), _rows(ordered, n, torch.float64))

    def work(part: slice) -> None:
        index = _new(2, n, dtype=torch.int32)
        count = _new(PASSES, SIZE, dtype=torch.int64)
        kernel(*(array[part] for array in arrays), count, index.view("uint32"), index.copy())

    _shared(work, len(values), n)
    return ordered, order


def _sum_blocks(value: Any, last: Any, mean: bool, out: Any) -> None:
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


def _climb_rows(ordered: Any, rate: Any, widest: float, s: Any, wall: Any) -> None:
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
