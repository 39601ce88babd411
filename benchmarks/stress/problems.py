"""Drawing: a seed gives a batch, and a row of it can be drawn alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("normal", "uniform", "heavy", "clustered", "tied", "mostly tied", "outlier", "geometric", "constant")
MAGNITUDES = (0, 0, 3, -3, 12, -12, 30, -30)
"""Powers of ten that a row is multiplied by."""


@dataclass(frozen=True)
class Batch:
    """Problems that one call solves; row i of batch ``seed`` is the same whatever other rows there are."""

    seed: int
    rows: range
    n: int
    m: int
    dtype: torch.dtype
    epsilon: float

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(1_000_003 * self.seed + row) for row in self.rows]


def scores(batch: Batch, columns: int | None = None, magnitude: bool = True) -> tuple[Tensor, Tensor]:
    """Scores and mask, (rows, n) or (rows, n, columns): distribution, magnitude and mask change from row to row."""
    shape = (batch.n,) if columns is None else (batch.n, columns)
    drawn, masks = [], []
    for generator in batch.generators():
        x = _one(shape, generator)
        share = torch.rand((), generator=generator)
        mask = torch.rand(batch.n, generator=generator) < (1 if share < 0.5 else share)
        mask[int(torch.randint(batch.n, (), generator=generator))] = True
        power = MAGNITUDES[int(torch.randint(len(MAGNITUDES), (), generator=generator))]
        drawn.append(x * 10.0**power if magnitude else x)
        masks.append(mask)
    return torch.stack(drawn).to(batch.dtype), torch.stack(masks)


def weights(batch: Batch, mask: Tensor, salt: int) -> Tensor:
    """Masses over three orders of magnitude, some of them 0, with sum 1 over what is valid."""
    rows = []
    for row, valid in zip(batch.rows, mask, strict=True):
        generator = torch.Generator().manual_seed(1_000_003 * batch.seed + row + 31 * salt)
        w = torch.exp(7 * torch.rand(len(valid), generator=generator, dtype=torch.float64)) * valid
        if int(torch.randint(4, (), generator=generator)) == 0:
            w = w * (torch.rand(len(valid), generator=generator) < 0.8)
        if not w.any():
            w = valid.double()
        rows.append(w / w.sum())
    return torch.stack(rows)


def _one(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "uniform":
        return uniform
    if kind == "heavy":
        return x / uniform.clamp_min(1e-3) ** 1.5
    if kind == "clustered":
        return (3 * uniform).floor() + 10 ** float(-6 * torch.rand((), generator=generator)) * 0.1 * x
    if kind == "tied":
        return (5 * uniform).floor()
    if kind == "mostly tied":
        return torch.where(uniform < 0.3, x, 0.0)
    if kind == "outlier":
        x.view(-1)[-1] = 1e4
    if kind == "geometric":
        return 10 ** (-12 * uniform) * x.sign()
    if kind == "constant":
        return torch.full_like(x, 3.7)
    return x
