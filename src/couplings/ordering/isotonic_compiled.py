"""What ``method="projection"`` compiles by numba, where that is installed (projection.md, "Compiled").

The sequential pooling of ``isotonic.py`` and what is computed with its blocks (``isotonic_loops.py``), and a sort of
float32 rows (``sort_compiled.py``), all shared between threads (``threads.py``).
numba is imported at the first use. Where it is absent, or fails at anything, ``compiled`` is None from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings.ordering import isotonic_loops as loops
from couplings.ordering.sort_compiled import PASSES, SIZE, sort_rows
from couplings.ordering.threads import shared


class Compiled(NamedTuple):
    """The compiled functions, on CPU tensors.

    Attributes:
        pool: y or s, w, weights, wall, as in ``isotonic.py``, to the first and the last index of every block.
        block_sum: (*batch, n) float64, the last index of every block, and whether means are wanted, to the sums or
            means over blocks, at every entry.
        rank_blocks: ordered, rate, target (n,), widest, entropic, as in ``isotonic._RankBlocks`` without weights and
            with all entries valid, to the first and the last index of every block.
        value_blocks: ordered, std, inverse, entropic, as in ``isotonic._ValueBlocks`` with all entries valid, likewise.
        climb: (*batch, n) and (*batch, 1) float64 and a float, as in ``isotonic._climb``.
        centred: x, rate and the last index of every block, as in ``blocks.centred`` without weights.
        centred_back: a cotangent, rate, the last index and what ``centred`` returned, to the gradients of x and rate.
        softmax: like ``centred``.
        softmax_back: a cotangent, x, rate, the last index and what ``softmax`` returned, likewise.
        sort: (*batch, n) float32 to the entries in rising order, float64, and where each came from.
        unsort: float64 in order, and that, back to where it came from, float32.
        resort: the reverse of ``unsort``.
    """

    pool: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
    block_sum: Callable[[Tensor, Tensor, bool], Tensor]
    rank_blocks: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    value_blocks: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    climb: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    centred: Callable[[Tensor, Tensor, Tensor], Tensor]
    centred_back: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    softmax: Callable[[Tensor, Tensor, Tensor], Tensor]
    softmax_back: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    sort: Callable[[Tensor], tuple[Tensor, Tensor]]
    unsort: Callable[[Tensor, Tensor], Tensor]
    resort: Callable[[Tensor, Tensor], Tensor]


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

        memory = "int64[::1]", real
        pool = loops.pool_row = build(loops.pool_rows, real, real, real, flag, index, index, *memory)
        sums = build(loops.sum_blocks, real, index, "boolean", real)
        climb = loops.climb_row = build(loops.climb_rows, real, real, "float64", real, flag)
        loops.fit_row = build(loops.fit_rows, real, real, flag, "boolean", index, index, *memory, real)
        ranks = build(
            loops.rank_rows, real, real, real, "float64", "boolean", index, index, *memory, real, flag
        )
        values = build(loops.value_rows, real, real, real, "boolean", index, index, *memory, real, flag)
        centred = build(loops.centred_rows, real, real, index, real)
        centred_back = build(loops.centred_back_rows, real, real, index, real, real, real)
        softmax = build(loops.softmax_rows, real, real, index, real)
        softmax_back = build(loops.softmax_back_rows, real, real, real, index, real, real, real)
        sort = build(
            sort_rows,
            *("int32[:, ::1]", "float32[:, ::1]", index, real),
            *(index, "uint32[:, ::1]", "int32[:, ::1]"),
        )
        unsort = build(loops.unsort_rows, real, index, "float32[:, ::1]")
        resort = build(loops.resort_rows, "float32[:, ::1]", index, real)
        found = Compiled(
            functools.partial(_pool, pool),
            functools.partial(_sum, sums),
            functools.partial(_rank_blocks, ranks),
            functools.partial(_value_blocks, values),
            functools.partial(_climb, climb),
            functools.partial(_centred, centred),
            functools.partial(_centred_back, centred_back),
            functools.partial(_centred, softmax),
            functools.partial(_softmax_back, softmax_back),
            functools.partial(_sort, sort),
            functools.partial(_move, unsort, torch.float64, torch.float32),
            functools.partial(_move, resort, torch.float32, torch.float64),
        )
        if not _works(found):
            return None, f"plain torch (numba {numba.__version__} computes something else)"
        return found, f"compiled by numba {numba.__version__}"
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return None, "plain torch (numba is not installed: pip install 'couplings[fast]' makes it faster)"
        return None, f"plain torch (numba does not work here: {error})"
    except Exception as error:  # noqa: BLE001 - whatever a broken numba raises, there is another way
        text = str(error).strip().partition("\n")[0]
        return None, f"plain torch (numba does not work here: {type(error).__name__}: {text})"


def _works(found: Compiled) -> bool:
    """Whether each does on one row what it should."""
    trial = torch.tensor([[1.0, -2.0]], device="cpu")
    ordered, order = found.sort(trial)
    first, last = found.pool(trial.double(), None, None, None)
    total = found.block_sum(ordered, last, False)
    one = torch.ones_like(total[:, :1])
    offset = found.centred(ordered, one, last)
    outcomes = [
        ((ordered, order), ([-2, 1], [1, 0])),
        ((first, last), ([0, 0], [1, 1])),
        ((total, offset), ([-1, -1], [-1.5, 1.5])),
        (found.climb(ordered, one, 2.0), ([0, 2], [True, False])),
        (found.centred_back(ordered, one, last, offset), ([-1.5, 1.5], [4.5])),
        (found.rank_blocks(ordered, one, offset[0], 2.0, False), ([0, 1], [0, 1])),
        (found.value_blocks(ordered, one, one, True), ([0, 0], [1, 1])),
        (found.softmax_back(one - 1, one, one, last[:, :1] - 1, one), ([0], [0])),
        ((found.unsort(ordered, order), found.resort(trial, order)), ([1, -2], [-2, 1])),
    ]
    return all(
        column.tolist() == [row]
        for columns, rows in outcomes
        for column, row in zip(columns, rows, strict=True)
    )


def _rows(column: Tensor | None, n: int, dtype: torch.dtype) -> Any:
    """As a (rows, n) array in one piece of memory, of that dtype; no rows of nothing."""
    if column is None:
        return torch.empty((0, n), dtype=dtype, device="cpu").numpy()
    return column.detach().to(dtype).reshape(-1, n).contiguous().numpy()


def _new(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    return torch.empty(shape, dtype=dtype, device="cpu").numpy()


def _pool(
    kernel: Callable[..., None], y: Tensor, w: Tensor | None, weights: Tensor | None, wall: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = y.shape[-1]
    columns = [_rows(column, n, torch.float64) for column in (y, w, weights)] + [_rows(wall, n, torch.bool)]
    first = torch.empty(y.shape, dtype=torch.int64, device="cpu")
    last = torch.empty_like(first)
    columns += [_rows(first, n, torch.int64), _rows(last, n, torch.int64)]

    def prepare(part: slice) -> Callable[[], None]:
        return functools.partial(kernel, *(column[part] for column in columns), *_memory(n))

    shared(prepare, len(columns[0]), n)
    return first, last


def _share(kernel: Callable[..., None], n: int, *columns: Any) -> None:
    """The kernel on rows of all columns."""
    shared(lambda part: functools.partial(kernel, *(column[part] for column in columns)), len(columns[0]), n)


def _memory(n: int) -> tuple[Any, Any]:
    """What ``loops.pool_rows`` works in."""
    return _new(n, dtype=torch.int64), _new(3, n)


def _rank_blocks(
    kernel: Callable[..., None], ordered: Tensor, rate: Tensor, target: Tensor, widest: float, entropic: bool
) -> tuple[Tensor, Tensor]:
    n = ordered.shape[-1]
    ends = _rows(target, n, torch.float64)

    def prepare(given: Any, rates: Any, first: Any, last: Any) -> Callable[[], None]:
        memory = *_memory(n), _new(4, n), _new(1, n, dtype=torch.bool)
        return functools.partial(kernel, given, rates, ends, widest, entropic, first, last, *memory)

    return _fitted(prepare, ordered, rate)


def _value_blocks(
    kernel: Callable[..., None], ordered: Tensor, std: Tensor, inverse: Tensor, entropic: bool
) -> tuple[Tensor, Tensor]:
    n = ordered.shape[-1]

    def prepare(given: Any, stds: Any, inverses: Any, first: Any, last: Any) -> Callable[[], None]:
        memory = *_memory(n), _new(4, n), _new(1, n, dtype=torch.bool)
        return functools.partial(kernel, given, stds, inverses, entropic, first, last, *memory)

    return _fitted(prepare, ordered, std, inverse)


def _fitted(
    prepare: Callable[..., Callable[[], None]], ordered: Tensor, *factors: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``prepare`` makes of rows of ordered, of the factors (*batch, 1), and of the results, first and last."""
    n = ordered.shape[-1]
    first = torch.empty(ordered.shape, dtype=torch.int64, device="cpu")
    last = torch.empty_like(first)
    columns = [_rows(ordered, n, torch.float64)]
    columns += [_rows(t.expand(*ordered.shape[:-1], 1), 1, torch.float64) for t in factors]
    columns += [_rows(first, n, torch.int64), _rows(last, n, torch.int64)]
    shared(lambda part: prepare(*(column[part] for column in columns)), len(columns[0]), n)
    return first, last


def _centred(kernel: Callable[..., None], x: Tensor, rate: Tensor, last: Tensor) -> Tensor:
    n = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float64, device="cpu")
    given, found = _rows(x, n, torch.float64), _rows(out, n, torch.float64)
    rates, ends = _rows(rate.expand(*x.shape[:-1], 1), 1, torch.float64), _rows(last, n, torch.int64)
    _share(kernel, n, given, rates, ends, found)
    return out


def _centred_back(
    kernel: Callable[..., None], grad: Tensor, rate: Tensor, last: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    return _back(kernel, (grad,), rate, last, out)


def _softmax_back(
    kernel: Callable[..., None], grad: Tensor, x: Tensor, rate: Tensor, last: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    return _back(kernel, (grad, x), rate, last, out)


def _back(
    kernel: Callable[..., None], given: tuple[Tensor, ...], rate: Tensor, last: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x and rate."""
    n = out.shape[-1]
    x_grad = torch.empty(out.shape, dtype=torch.float64, device="cpu")
    rate_grad = torch.empty((*out.shape[:-1], 1), dtype=torch.float64, device="cpu")
    _share(
        kernel,
        n,
        *(_rows(t, n, torch.float64) for t in given),
        _rows(rate.expand_as(rate_grad), 1, torch.float64),
        _rows(last, n, torch.int64),
        *(_rows(t, n, torch.float64) for t in (out, x_grad)),
        _rows(rate_grad, 1, torch.float64),
    )
    return x_grad, rate_grad


def _sum(kernel: Callable[..., None], value: Tensor, last: Tensor, mean: bool) -> Tensor:
    n = value.shape[-1]
    out = torch.empty(value.shape, dtype=torch.float64, device="cpu")
    given, ends, found = (
        _rows(t, n, dtype) for t, dtype in ((value, torch.float64), (last, torch.int64), (out, torch.float64))
    )
    shared(lambda part: functools.partial(kernel, given[part], ends[part], mean, found[part]), len(given), n)
    return out


def _climb(
    kernel: Callable[..., None], ordered: Tensor, rate: Tensor, widest: float
) -> tuple[Tensor, Tensor]:
    n = ordered.shape[-1]
    s = torch.empty(ordered.shape, dtype=torch.float64, device="cpu")
    wall = torch.empty(ordered.shape, dtype=torch.bool, device="cpu")
    given, rates = _rows(ordered, n, torch.float64), _rows(rate, 1, torch.float64)
    upto, closed = _rows(s, n, torch.float64), _rows(wall, n, torch.bool)
    shared(
        lambda part: functools.partial(kernel, given[part], rates[part], widest, upto[part], closed[part]),
        len(given),
        n,
    )
    return s, wall


def _sort(kernel: Callable[..., None], x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    ordered = torch.empty(x.shape, dtype=torch.float64, device="cpu")
    order = torch.empty(x.shape, dtype=torch.int64, device="cpu")
    values = _rows(x, n, torch.float32)
    arrays = (values.view("int32"), values, _rows(order, n, torch.int64), _rows(ordered, n, torch.float64))

    def prepare(part: slice) -> Callable[[], None]:
        keys, index = _new(2, n, dtype=torch.int32).view("uint32"), _new(2, n, dtype=torch.int32)
        count = _new(PASSES, SIZE, dtype=torch.int64)
        return functools.partial(kernel, *(array[part] for array in arrays), count, keys, index)

    shared(prepare, len(values), n)
    return ordered, order


def _move(
    kernel: Callable[..., None], given: torch.dtype, wanted: torch.dtype, value: Tensor, order: Tensor
) -> Tensor:
    n = value.shape[-1]
    out = torch.empty(value.shape, dtype=wanted, device="cpu")
    _share(kernel, n, _rows(value, n, given), _rows(order, n, torch.int64), _rows(out, n, wanted))
    return out
