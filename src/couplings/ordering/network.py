"""``method="network"``: differentiable sorting networks (Petersen, Borgelt, Kuehne and Deussen 2021 and 2022).

A sorting network is a fixed list of layers of comparators. A comparator between wires a < b of values z_a, z_b becomes

    v = F((z_b - z_a) / epsilon),   z_a <- v z_a + (1 - v) z_b,   z_b <- (1 - v) z_a + v z_b

with a sigmoid F (2021), 1 / epsilon their inverse temperature. The ``swap`` functions, with u = (z_b - z_a) / epsilon:

    logistic     1 / (1 + exp(-u))                                         (2021)
    reciprocal   1/2 + u / (1 + 2 |u|)                                     (2022, section 4.2, as the next two)
    cauchy       1/2 + arctan(u) / pi
    optimal      1/2 + u for |u| <= 1/4, beyond it 1 - 1 / (16 u) or -1 / (16 u)

All but the logistic make every sorted value a non-decreasing function of every score, in units of which epsilon is
fixed (2022).

The answer depends on the order in which entries meet, hence on the order of the input: as long as epsilon > 0, neither
do tied entries share equally nor do ranks always keep the order of the scores (relaxations.md, "Networks").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import RowFunction, apply
from couplings.ordering.rows import Real, Rows
from couplings.ordering.softmaxes import places, unweighted

DEFAULT_EPSILON = 0.1
NETWORKS = ("odd_even", "bitonic")
SWAPS = ("logistic", "cauchy", "reciprocal", "optimal")

Layer = tuple[int, int]
"""Odd-even: (1, number of the layer). Bitonic: (half of the merged block, the bits in which the partner differs)."""


def _layers(network: str, n: int) -> list[Layer]:
    """The layers of a network with n wires."""
    if network == "odd_even":
        return [(1, step) for step in range(n)]
    layers = []
    half = 1
    while half < n:
        layers.append((half, 2 * half - 1))  # the last of the block against the first, and so on inwards
        step = half // 2
        while step:
            layers.append((half, step))
            step //= 2
        half *= 2
    return layers


def _partner(network: str, layer: Layer, n: int, device: torch.device) -> Tensor:
    """Which wire each wire is compared with, (n,); itself where with none."""
    wire = torch.arange(n, device=device)
    if network == "odd_even":
        other = wire + 1 - 2 * ((wire + layer[1]) % 2)
    else:
        other = wire ^ layer[1]
    return torch.where((other >= 0) & (other < n), other, wire)


def _at_work(network: str, layer: Layer, partner: Tensor, count: Tensor) -> Tensor:
    """Which comparators a row with ``count`` entries has: (*batch, n), or (1, n) if all have the same count.

    Every comparator puts the smaller value on the lower wire, so that padding, which counts as +infinity, never leaves
    the upper wires. The comparators that touch it, the merges of blocks whose upper half is padding and the odd-even
    layers beyond the count change nothing in a hard network: a soft one leaves them out.
    """
    wire = torch.arange(partner.shape[-1], device=partner.device)
    busy = (torch.maximum(wire, partner) < count) & (wire != partner)
    if network == "odd_even":
        return busy & (layer[1] < count)
    half = layer[0]
    return busy & ((wire // (2 * half)) * (2 * half) + half < count)


def _swap(u: Tensor, swap: str) -> Tensor:
    """How far a comparator keeps its two values where they are, in [0, 1]."""
    if swap == "logistic":
        return torch.sigmoid(u)
    if swap == "cauchy":
        return 0.5 + torch.atan(u) / math.pi
    if swap == "reciprocal":
        return 0.5 + u / (1 + 2 * u.abs())
    near = u.abs() <= 0.25
    tail = 1 / (16 * torch.where(near, 1.0, u))
    return torch.where(near, 0.5 + u, torch.where(u > 0, 1 - tail, -tail))


class _Network:
    """One sweep of the scores through the network, and what it does to whatever travels along."""

    def __init__(self, rows: Rows, epsilon: Real, network: str, swap: str, art_lambda: float) -> None:
        unweighted(rows, "network")
        _checks.choice("network", network, NETWORKS)
        _checks.choice("swap", swap, SWAPS)
        if not 0 <= art_lambda < 1 or (art_lambda and swap != "logistic"):
            _checks.reject(
                "art_lambda",
                'a float in [0, 1), 0 unless swap="logistic"',
                f"{art_lambda} with swap={swap!r}",
                "Pass art_lambda=0, which replaces nothing.",
            )
        self.rows, self.n, self.name = rows, rows.x.shape[-1], network
        self.layers = _layers(network, self.n)
        device = rows.x.device
        self.partners = [_partner(network, layer, self.n, device) for layer in self.layers]
        self.order: Tensor | None = None
        count = torch.full((1,), self.n, device=device)
        if rows.mask is not None:  # valid entries go to the lower wires, in the order in which they come
            self.order = (~rows.mask).to(torch.uint8).argsort(dim=-1, stable=True)
            count = rows.mask.sum(-1, keepdim=True)
        z = self._enter(rows.z)
        largest = torch.finfo(z.dtype).max ** 0.4  # squares must not overflow in any derivative
        self.values = z
        self.keep: list[Tensor] = []
        sign = torch.ones(self.n, dtype=z.dtype, device=device)
        wire = torch.arange(self.n, device=device)
        for layer, partner in zip(self.layers, self.partners):
            # both ends of a comparator see the same difference, so that they agree to the last bit
            rise = torch.where(partner < wire, -sign, sign) * (self.values[..., partner] - self.values)
            if art_lambda:  # their activation replacement trick, differentiable at 0
                rise = rise * torch.hypot(rise, rise.new_full((), 1e-6)) ** -art_lambda
            keep = _swap((rise / epsilon).clamp(-largest, largest), swap)
            keep = torch.where(_at_work(network, layer, partner, count), keep, 1.0)
            self.keep.append(keep)
            self.values = _layer(self.values, keep, partner)

    def _enter(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.gather(-1, self.order)

    def sort(self) -> Tensor:
        """The payload rows.x, (*batch, n), led along the way of the scores; padding is 0 and stays behind."""
        if not self.rows.standardize:
            return self.values
        x = self._enter(self.rows.x)
        for keep, partner in zip(self.keep, self.partners):
            x = _layer(x, keep, partner)
        return x

    def rank(self) -> Tensor:
        """P' (1, .., n), (*batch, n): every layer is symmetric, so the transpose is the network backwards."""
        place = torch.arange(1, self.n + 1, device=self.rows.x.device, dtype=self.rows.x.dtype)
        place = place.expand(self.rows.x.shape)
        for keep, partner in zip(reversed(self.keep), reversed(self.partners)):
            place = _layer(place, keep, partner)
        place = place + 0 * self.values  # one valid entry meets no comparator through which NaN could come
        if self.order is None or self.rows.mask is None:
            return place
        return place.gather(-1, self.order.argsort(-1)).masked_fill(~self.rows.mask, 0)

    def matrix(self) -> Tensor:
        """P, (*batch, n, n)."""
        x = self.rows.x
        if self.keep:
            keep = torch.stack([keep.expand(x.shape) for keep in self.keep], -2)
            out: Tensor = apply(_Product, keep, self.name)
        else:
            out = torch.eye(self.n, dtype=x.dtype, device=x.device).expand(*x.shape, self.n)
        out = out + 0 * self.values.unsqueeze(-1)  # as above
        if self.order is None or self.rows.mask is None:
            return out
        back = self.order.argsort(-1).unsqueeze(-2).expand(out.shape)
        live = places(self.rows) <= self.rows.count.unsqueeze(-1)
        return torch.where(live & self.rows.mask.unsqueeze(-2), out.gather(-1, back), 0.0)


def _layer(x: Tensor, keep: Tensor, partner: Tensor) -> Tensor:
    """One layer of comparators on (*batch, n)."""
    return keep * x + (1 - keep) * x[..., partner]


def _layer_of_rows(p: Tensor, keep: Tensor, partner: Tensor) -> Tensor:
    """One layer of comparators on the rows of (*batch, n, n)."""
    keep = keep.unsqueeze(-1)
    return keep * p + (1 - keep) * p[..., partner, :]


class _Product(RowFunction):
    """Product of all layers, (*batch, n, n), from keep, (*batch, layers, n).

    Kept is only ``keep``. Backward builds the product once more, with a matrix noted down every sqrt(layers) layers,
    and between two of them once more: O(n^2 sqrt(layers)) memory. It is ordinary differentiable code; a gradient of the
    gradient keeps O(n^2 layers).
    """

    @staticmethod
    def forward(keep: Tensor, network: str) -> Tensor:
        p = _identity(keep)
        for step, partner in enumerate(_partners(keep, network)):
            p = _layer_of_rows(p, keep[..., step, :], partner)
        return p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep, network = inputs
        ctx.save_for_backward(keep)
        ctx.network = network

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        partners = _partners(keep, ctx.network)
        stride = math.isqrt(len(partners)) + 1
        starts = range(0, len(partners), stride)
        heads = [_identity(keep)]
        for start in starts[:-1]:
            heads.append(_before(heads[-1], keep, partners, range(start, start + stride + 1))[-1])
        slopes: list[Tensor] = []
        for start in reversed(starts):
            steps = range(start, min(start + stride, len(partners)))
            before = _before(heads.pop(), keep, partners, steps)
            for step in reversed(steps):
                partner, p = partners[step], before.pop()
                slopes.append((grad * (p - p[..., partner, :])).sum(-1))
                grad = _layer_of_rows(grad, keep[..., step, :], partner)  # a layer is its own transpose
        return torch.stack(slopes[::-1], -2), None


def _before(p: Tensor, keep: Tensor, partners: list[Tensor], steps: range) -> list[Tensor]:
    """The product as it is before each of ``steps``; ``p`` is the first."""
    out = [p]
    for step in steps[:-1]:
        out.append(_layer_of_rows(out[-1], keep[..., step, :], partners[step]))
    return out


def _identity(keep: Tensor) -> Tensor:
    n = keep.shape[-1]
    return torch.eye(n, dtype=keep.dtype, device=keep.device).expand(*keep.shape[:-2], n, n)


def _partners(keep: Tensor, network: str) -> list[Tensor]:
    n = keep.shape[-1]
    return [_partner(network, layer, n, keep.device) for layer in _layers(network, n)]


def permutation(
    rows: Rows, epsilon: Real, *, network: str = "bitonic", swap: str = "optimal", art_lambda: float = 0.0
) -> Tensor:
    """P[j, i], (*batch, n, n): soft indicator that entry i stands at place j + 1; rows and columns sum to 1.

    ``network`` is "bitonic" (about log2(n)^2 / 2 layers) or "odd_even" (n layers, each of which softens: it needs an
    epsilon that falls like 1 / n). ``swap`` is the sigmoid of a comparator. ``art_lambda`` > 0, for the logistic one,
    divides differences by |z_b - z_a|^art_lambda first (the activation replacement trick of 2021; 0.25 is usual), so
    that small differences count for more.
    """
    return _Network(rows, epsilon, network, swap, art_lambda).matrix()


def ranks(
    rows: Rows, epsilon: Real, *, network: str = "bitonic", swap: str = "optimal", art_lambda: float = 0.0
) -> Tensor:
    """sum_j (j + 1) P[j, i], (*batch, n), in 1..count; 0 where masked.

    Columns sum to 1, so nothing is normalised, and the ranks add up to c (c + 1) / 2. O(n layers) work and memory: the
    matrix is never formed.
    """
    return _Network(rows, epsilon, network, swap, art_lambda).rank()


def sorted_values(
    rows: Rows, epsilon: Real, *, network: str = "bitonic", swap: str = "optimal", art_lambda: float = 0.0
) -> Tensor:
    """P x, (*batch, n), in the units of x; 0 beyond the count. O(n layers) work and memory."""
    return _Network(rows, epsilon, network, swap, art_lambda).sort()
