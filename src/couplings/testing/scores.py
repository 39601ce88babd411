"""Rows of scores on which soft top-k and soft sorting go wrong: heavy tails, clusters, ties, outliers, constants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[int, int, torch.Generator], Tensor]


def _normal(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, n, generator=generator, dtype=torch.float64)


def _uniform(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, n, generator=generator, dtype=torch.float64)


def _heavy(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return _normal(rows, n, generator) / _uniform(rows, n, generator).clamp_min(1e-3) ** 1.5


def _clustered(rows: int, n: int, generator: torch.Generator) -> Tensor:
    centres = torch.randint(0, 3, (rows, n), generator=generator).double()
    width = 10 ** (-6 * _uniform(rows, 1, generator))
    return centres + 0.1 * width * _normal(rows, n, generator)


def _tied(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 5, (rows, n), generator=generator).double()


def _mostly_tied(rows: int, n: int, generator: torch.Generator) -> Tensor:
    free = _uniform(rows, n, generator) < 0.3
    return torch.where(free, _normal(rows, n, generator), 0.0)


def _outlier(rows: int, n: int, generator: torch.Generator) -> Tensor:
    x = _normal(rows, n, generator)
    x[:, -1] = 1e4
    return x


def _geometric(rows: int, n: int, generator: torch.Generator) -> Tensor:
    size = 10 ** (-12 * _uniform(rows, n, generator))
    return size * _normal(rows, n, generator).sign()


def _lattice(rows: int, n: int, generator: torch.Generator) -> Tensor:
    points = torch.randint(0, 20, (rows, n), generator=generator).double()
    return points + 10 ** (-8 * _uniform(rows, n, generator)) * _normal(rows, n, generator)


def _cauchy(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return _normal(rows, n, generator) / _normal(rows, n, generator)


def _offset(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return _normal(rows, n, generator) + 100


def _constant(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.full((rows, n), 3.7, dtype=torch.float64)


_DRAWS: dict[str, Draw] = {
    "normal": _normal,
    "uniform": _uniform,
    "heavy": _heavy,
    "clustered": _clustered,
    "tied": _tied,
    "mostly_tied": _mostly_tied,
    "outlier": _outlier,
    "geometric": _geometric,
    "lattice": _lattice,
    "cauchy": _cauchy,
    "offset": _offset,
    "constant": _constant,
}

SCORE_KINDS = tuple(_DRAWS)
"""Names of the distributions that ``score_rows`` draws from."""


def score_rows(kind: str, rows: int, n: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Draw rows of scores of one kind.

    Args:
        kind: one of ``SCORE_KINDS``.
        rows: their number.
        n: entries per row.
        dtype: what the float64 draw is rounded to.
        seed: of the draw.

    Returns:
        A (rows, n) tensor.

    Example:
        >>> score_rows("constant", 1, 3).tolist()
        [[3.7, 3.7, 3.7]]
    """
    generator = torch.Generator().manual_seed(seed)
    return _DRAWS[kind](rows, n, generator).to(dtype)
