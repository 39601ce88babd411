"""Tiles of the token grid: how large, how they are filled, what is hidden in them.

A tile holds whole documents, (pairs of a batch item and a document, Ld, query tokens): tokens of a document run along
the middle dimension, so that a reduction over them is vectorised over query tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from couplings._checks import HALF

L2_BYTES = 2**20
"""A core's second-level cache where torch does not say: right or half of it on what is sold."""

ACCELERATOR_BYTES = 2**28
"""A tile on an accelerator: large enough that launches do not count, small beside its memory."""

ROWS = 1024
"""Query tokens of a tile at most: with more the product is no faster, and fewer documents fit."""


class Tile(NamedTuple):
    """Some documents of some batch items, and how many query tokens are met at a time."""

    items: slice
    documents: slice
    rows: int


def budget(limit: int, device: torch.device) -> int:
    """Bytes of a tile: what was asked for, or for 0 twice the second-level caches that work on it."""
    if limit:
        return limit
    if device.type != "cpu":
        return ACCELERATOR_BYTES
    return 2 * _processor().get("l2_cache_size", L2_BYTES) * torch.get_num_threads()


@functools.cache
def _processor() -> dict[str, int]:
    """What torch knows of this processor; older versions say nothing."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return {name: int(value) for name, value in known.items() if isinstance(value, (bool, int)) and value}


@functools.cache
def _has_bfloat16_units() -> bool:
    known = _processor()
    if known:
        return "avx512_bf16" in known or "amx_bf16" in known
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def tiles(items: int, documents: int, width: int, rows: int, limit: int) -> Iterator[Tile]:
    """Cut (items, documents, rows) cells of ``width`` bytes into tiles of about ``limit`` bytes.

    Several batch items share a tile only when it holds them whole. A tile has at least one document and one row.
    """
    width = max(1, width)
    whole = max(1, documents * rows * width)
    if whole <= limit:
        step = limit // whole
        for start in range(0, items, step):
            yield Tile(slice(start, min(items, start + step)), slice(0, documents), rows)
        return
    most = max(1, min(ROWS, limit // width))
    height = -(-rows // -(-rows // most))  # parts of equal height
    step = max(1, limit // (height * width))
    for item in range(items):
        for start in range(0, documents, step):
            yield Tile(slice(item, item + 1), slice(start, min(documents, start + step)), height)


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are formed in."""
    return torch.float32 if dtype in HALF else dtype


def grid_dtype(queries: Tensor, documents: Tensor) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively: its products come out rounded, fit to compare only.

    Else the dtype of the sums: float16 and bfloat16 are raised tile by tile. (On CUDA the products of half
    operands come out in float32.)
    """
    both = queries.dtype == documents.dtype == torch.bfloat16
    if both and queries.device.type == "cpu" and _has_bfloat16_units():
        return torch.bfloat16
    return torch.promote_types(working(queries.dtype), working(documents.dtype))


class Scratch:
    """Memory that tile after tile is written to: pages fresh from the system cost more than the numbers on them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.memory = torch.empty(0, dtype=dtype, device=device)

    def view(self, *shape: int) -> Tensor:
        """A tensor of any content, valid until the next call."""
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """``x`` in this dtype, valid until the next call."""
        return self.view(*x.shape).copy_(x)


class Products:
    """Fills one buffer with the inner products of tile after tile."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.rounds = dtype == torch.bfloat16
        self.grid = Scratch(dtype, device)
        self.documents = Scratch(dtype, device)
        self.queries = Scratch(dtype, device)

    def operand(self, x: Tensor, scratch: Scratch) -> Tensor:
        """A tile in the dtype that it is multiplied in, valid until the next one in this scratch."""
        return x if x.dtype == self.dtype or (x.is_cuda and x.dtype in HALF) else scratch.copy(x)

    def __call__(self, documents: Tensor, queries: Tensor) -> Tensor:
        """(items, n, Ld, d) documents and (items, r, d) queries to (items n, Ld, r), valid until the next call."""
        items, count, length, dim = documents.shape
        rows = queries.shape[1]
        left, right = documents.reshape(items, count * length, dim), queries.mT
        if left.dtype != self.dtype:  # CUDA, half operands of one kind
            return torch.bmm(left, right, out_dtype=self.dtype).view(items * count, length, rows)
        out = self.grid.view(items, count * length, rows)
        if items == 1:
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.bmm(left, right, out=out)
        return out.view(items * count, length, rows)


def hide(grid: Tensor, mask: Tensor, value: float = -torch.inf) -> Tensor:
    """Write over the tokens (pairs, Ld) that do not take part, whatever stands there, NaN included."""
    if grid.device.type != "cpu":
        return grid.masked_fill_(~mask.unsqueeze(-1), value)
    hidden = mask.logical_not().view(-1).nonzero().view(-1)  # touches these rows only
    grid.view(-1, grid.shape[-1]).index_fill_(0, hidden, value)
    return grid


def best(grid: Tensor, where: bool) -> tuple[Tensor, Tensor | None]:
    """Maximum over the tokens, (pairs, r), and the first index that attains it if it is asked for."""
    if not where:
        return grid.amax(1), None
    pairs, length, rows = grid.shape
    if grid.device.type != "cpu":
        found = grid.max(1)
        return found.values, found.indices
    # Query tokens as channels that lie side by side: the pooling finds maximum and index at memory's speed there,
    # seven times as fast as max(dim), and keeps the first of equals.
    image = grid.view(pairs, 1, length, rows).permute(0, 3, 1, 2)
    values, index = torch.nn.functional.max_pool2d(image, (1, length), return_indices=True)
    return values.reshape(pairs, rows), index.reshape(pairs, rows)
