"""Sums over all pairs of a list, tile by tile: O(n^2) work, O(n) memory, nothing kept for the backward pass.

With s = tanh(z_i - z_j) and t = clip(y_i - y_j, -1, 1), and sums over pairs of valid entries,

    N = sum_ij s t        dN/dz_k = 2 P_k,  P_k = sum_j s' t        sum_k v_k dP_k/dz_l = sum_j s'' t (v_l - v_j)
    Q = sum_ij s^2        dQ/dz_k = 4 W_k,  W_k = sum_j s s'        sum_k v_k dW_k/dz_l = sum_j (s s')' (v_l - v_j)

where s' = 1 - s^2, s'' = -2 s s' and (s s')' = s' (1 - 3 s^2). Since s, s'' and t are odd in the difference, s' and
(s s')' even, a pair of different entries is worked out once for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import BLOCK, RowFunction, apply

TILE = BLOCK
"""Pairs that a tile holds at most on a CPU: its buffers stay in cache."""

GPU_TILE = 2**24


def agreement(
    z: Tensor, apart: tuple[Tensor, Tensor], y: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """N and Q above, both (*batch, 1) and differentiable to any order in z.

    Args:
        z: (*batch, n).
        apart: t (*batch, n) and rate (*batch, 1), constants with z_i - z_j = rate (t_i - t_j) for differences that are
            not rounded like z.
        y: (*batch, n), of z's dtype, not differentiated; different values lie at least 1 apart, so that t is a sign.
        mask: (*batch, n) bool or None.
    """
    together, size = apply(_Agreement, z, *apart, y, mask)
    return together, size


class _Tile(NamedTuple):
    """Pairs of the entries [left, right) of some lists with the entries [0, right), in buffers to be overwritten.

    Attributes:
        lists: slice of the flattened batch.
        left, right: the entries.
        s: (lists, right - left, right) 2 (z_i - z_j), to be made soft signs by ``soft``.
        t: (lists, right - left, right) signs of the target, 0 where one of the two entries is masked.
        spare: an uninitialised buffer of that shape.
        valid: (lists, 1, right) 1 or 0, or None.
    """

    lists: slice
    left: int
    right: int
    s: Tensor
    t: Tensor
    spare: Tensor
    valid: Tensor | None

    def soft(self) -> Tensor:
        """Soft signs s, in the place of s."""
        return self.s.sigmoid_().mul_(2).sub_(1)  # tanh of half the argument, in a fifth of the time

    def soft_and_slope(self) -> tuple[Tensor, Tensor]:
        """Soft signs s and (1 - s^2) / 4, in the places of s and spare; 1 - s^2 itself would lose far pairs."""
        tail = torch.abs(self.s, out=self.spare).neg_().sigmoid_()
        s = self.s.sign_()
        s.addcmul_(s, tail, value=-2)
        return s, tail.addcmul_(tail, tail, value=-1)

    def rows_and_columns(self, out: Tensor, terms: Tensor) -> None:
        """Add to ``out`` (batch, n) what each entry gets from these pairs; ``terms`` are odd in the difference."""
        if self.valid is not None:
            terms = terms.mul_(self.valid)
        out[self.lists, self.left : self.right] += terms.sum(-1)
        if self.left:
            columns = terms[..., : self.left]
            if self.valid is not None:
                columns = columns * self.valid[..., self.left :].mT
            out[self.lists, : self.left] -= columns.sum(-2)


def _tiles(t: Tensor, rate: Tensor, y: Tensor, mask: Tensor | None) -> Iterator[_Tile]:
    """All pairs of the lists (batch, n), each pair of different entries in one tile only."""
    z, rate = t, 2 * rate.unsqueeze(-1)
    count, n = z.shape
    most = TILE if z.device.type == "cpu" else GPU_TILE
    height = min(max(1, most // (n * n)), max(1, count))
    width = n if height > 1 else max(1, min(n, most // n))
    buffers = [z.new_empty(height * width * n) for _ in range(3)]
    for top in range(0, count, height):
        lists = slice(top, min(top + height, count))
        for left in range(0, n, width):
            right = min(left + width, n)
            shape = (lists.stop - top, right - left, right)
            size = shape[0] * shape[1] * shape[2]
            s, t, spare = (buffer[:size].view(shape) for buffer in buffers)
            for out, values in ((s, z), (t, y)):
                torch.sub(
                    values[lists, left:right].unsqueeze(-1), values[lists, :right].unsqueeze(-2), out=out
                )
            s.mul_(rate[lists])
            t.clamp_(-1, 1)
            valid = None if mask is None else mask[lists, :right].unsqueeze(-2).to(z.dtype)
            yield _Tile(lists, left, right, s, t, spare, valid)


class _Agreement(RowFunction):
    @staticmethod
    def forward(z: Tensor, t: Tensor, rate: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        shape, n = z.shape[:-1], z.shape[-1]
        t, rate, y = t.reshape(-1, n), rate.reshape(-1, 1), y.reshape(-1, n)
        mask = None if mask is None else mask.reshape(-1, n)
        together, size = z.new_zeros((2, t.shape[0]), dtype=torch.float64)
        for tile in _tiles(t, rate, y, mask):
            s = tile.soft()
            for out, terms in ((together, torch.mul(s, tile.t, out=tile.spare)), (size, s.mul_(s))):
                if tile.valid is not None:
                    terms.mul_(tile.valid).mul_(tile.valid[..., tile.left :].mT)
                out[tile.lists] += terms[..., tile.left :].sum((-2, -1))
                if tile.left:
                    out[tile.lists] += 2 * terms[..., : tile.left].sum((-2, -1))
        return tuple(out.to(z.dtype).view(*shape, 1) for out in (together, size))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, together_grad: Tensor, size_grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = apply(_Slopes, *ctx.saved_tensors)
        return 2 * together_grad * first + 4 * size_grad * second, None, None, None, None


class _Slopes(RowFunction):
    """P and W. Its backward is differentiable torch code, which keeps O(n^2) from the third order on."""

    @staticmethod
    def forward(z: Tensor, t: Tensor, rate: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = z.shape
        t, rate, y = t.reshape(-1, shape[-1]), rate.reshape(-1, 1), y.reshape(-1, shape[-1])
        mask = None if mask is None else mask.reshape(-1, shape[-1])
        first, second = torch.zeros_like(t), torch.zeros_like(t)
        for tile in _tiles(t, rate, y, mask):
            s, quarter = tile.soft_and_slope()
            tile.rows_and_columns(first, tile.t.mul_(quarter))
            tile.rows_and_columns(second, s.mul_(quarter))
        first, second = 4 * first, 4 * second
        if mask is not None:
            first, second = first * mask, second * mask
        return first.view(shape), second.view(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, ...]:
        z, _, _, y, mask = ctx.saved_tensors
        n = z.shape[-1]
        most = TILE if z.device.type == "cpu" else GPU_TILE
        width = max(1, min(n, most // max(1, z.numel())))
        strips = [_curved(z, y, mask, left, right, a, a + width) for a in range(0, n, width)]
        return torch.cat(strips, -1), None, None, None, None


def _curved(
    z: Tensor, y: Tensor, mask: Tensor | None, left: Tensor | None, right: Tensor | None, start: int, end: int
) -> Tensor:
    """The sums over j above for the entries l in [start, end), of all lists."""

    def difference(a: Tensor) -> Tensor:
        return a[..., start:end].unsqueeze(-1) - a.unsqueeze(-2)

    s = difference(z).tanh()
    slope = 1 - s * s
    terms = torch.zeros_like(s)
    if left is not None:
        terms = terms - 2 * s * slope * difference(y).clamp(-1, 1) * difference(left)
    if right is not None:
        terms = terms + slope * (1 - 3 * s * s) * difference(right)
    if mask is None:
        return terms.sum(-1)
    return (terms * mask.unsqueeze(-2)).sum(-1) * mask[..., start:end]
