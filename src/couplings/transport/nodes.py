"""Nodes that stand for many points on a line, and the two adjoint operators between points and nodes.

    spread       m_q = sum_i w_i l_q(t_i)          moments of the points
    interpolate  f(t_i) = sum_q f_q l_q(t_i)       values at the points

l_q is the cardinal polynomial of node q on its box (ordering.md). Everything is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 2**16
"""Points worked on at a time: their temporaries stay in cache."""


class Nodes(ABC):
    """Nodes (rows, q) for points (rows, n).

    Attributes:
        points: (rows, n) what is stood for.
        nodes: (rows, q) where the nodes are.
        live: (rows, q) bool, False for a node that no point needs.
    """

    points: Tensor
    nodes: Tensor
    live: Tensor

    @abstractmethod
    def spread(self, weight: Tensor) -> Tensor:
        """(rows, n, d) -> (rows, q, d)."""

    @abstractmethod
    def interpolate(self, value: Tensor, *, double: bool = False) -> Tensor:
        """(rows, q, d) -> (rows, n, d); in float64 if ``double``, else as accurate as was asked for."""

    def contract(self, value: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """sum_d w_d(i) f_d(t_i), (rows, n), for values (rows, q, d) and d weights (rows, n)."""
        at = self.interpolate(value)
        total = weights[0] * at[..., 0]
        for column, weight in enumerate(weights[1:], 1):
            total = torch.addcmul(total, weight, at[..., column])
        return total

    @abstractmethod
    def tails(self, density: Tensor) -> Tensor:
        """Of functions (rows, functions, q): (rows, boxes), how far each box leaves them unresolved."""


class Exact(Nodes):
    """Every point is its own node."""

    def __init__(self, points: Tensor) -> None:
        self.points = self.nodes = points
        self.live = torch.ones_like(points, dtype=torch.bool)

    def spread(self, weight: Tensor) -> Tensor:
        """The weights themselves."""
        return weight.double()

    def interpolate(self, value: Tensor, *, double: bool = False) -> Tensor:
        """The values themselves."""
        return value

    def tails(self, density: Tensor) -> Tensor:
        """Nothing is left unresolved."""
        return density.new_zeros(density.shape[0], 0)


@lru_cache(maxsize=16)
def chebyshev(degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First-kind nodes u_q on [-1, 1] and the matrix from values to coefficients, c_k = sum_q matrix[k, q] f(u_q)."""
    order = torch.arange(degree, dtype=torch.float64, device=device)
    angle = math.pi * (order + 0.5) / degree
    matrix = torch.cos(order[:, None] * angle) * (2.0 / degree)
    matrix[0] /= 2
    return torch.cos(angle), matrix


POWERS = 4
"""Up to this degree polynomials are sums of powers, which take fewer passes; above, of Chebyshev polynomials."""


def _series_matrix(degree: int, device: torch.device) -> Tensor:
    """From values at the nodes to the coefficients that ``_moments`` and ``_series`` mean, (degree, degree)."""
    unit, to_coefficients = chebyshev(degree, device)
    if degree > POWERS:
        return to_coefficients
    powers = unit[:, None] ** torch.arange(degree, dtype=torch.float64, device=device)
    inverse: Tensor = torch.linalg.inv(powers)
    return inverse


def _moments(box: Tensor, u: Tensor, weight: Tensor | None, boxes: int, degree: int) -> Tensor:
    """sum_i w_i p_k(u_i) over the points of each box, (boxes, degree, d), p_k the powers or Chebyshev polynomials.

    For box (n,), u (n,) and weight (n, d); without one all weigh 1, d = 1.
    """
    d = 1 if weight is None else weight.shape[-1]
    out = u.new_empty(degree, boxes, d)
    terms = _power_terms if degree <= POWERS else _chebyshev_terms
    for column in range(d if d <= 4 else 0):
        term = None if weight is None else weight[:, column]
        for k, value in enumerate(terms(u, term, degree)):
            out[k, :, column] = torch.bincount(box, value, minlength=boxes)
    if d > 4:
        for k, value in enumerate(terms(u[:, None], weight, degree)):
            out[k] = u.new_zeros(boxes, d).index_add_(0, box, value)  # type: ignore[arg-type]
    return out.transpose(0, 1)


def _chebyshev_terms(u: Tensor, weight: Tensor | None, degree: int) -> Iterator[Tensor | None]:
    """w T_k(u), k = 0 .. degree - 1, by T_(k+1) = 2 u T_k - T_(k-1); the first one None if all weigh 1."""
    yield weight
    before = torch.ones_like(u) if weight is None else weight
    term = u if weight is None else weight * u
    yield term
    twice = u * 2
    for _ in range(degree - 2):
        before, term = term, (twice * term).sub_(before)
        yield term


def _power_terms(u: Tensor, weight: Tensor | None, degree: int) -> Iterator[Tensor | None]:
    """w u^k, k = 0 .. degree - 1, each in the memory of the last; the first one None if all weigh 1."""
    yield weight
    term = u.clone() if weight is None else weight * u
    yield term
    for _ in range(degree - 2):
        yield term.mul_(u)


def _series(box: Tensor, u: Tensor, coefficients: Tensor) -> Tensor:
    """sum_k c_k p_k(u_i), (n,) or (n, d), for coefficients (degree, boxes) or with d."""
    u = u.to(coefficients.dtype)
    if coefficients.dim() == 3:
        u = u[:, None]
    if len(coefficients) <= POWERS:
        out = coefficients[-1].index_select(0, box)
        for row in coefficients[:-1].flip(0):
            out = row.index_select(0, box).addcmul_(u, out)
        return out
    # Clenshaw's recurrence
    twice = u * 2
    one: Tensor | None = None
    two: Tensor | None = None
    for k in range(len(coefficients) - 1, 0, -1):
        new = coefficients[k].index_select(0, box)
        if one is not None:
            new.addcmul_(twice, one)
        if two is not None:
            new.sub_(two)
        one, two = new, one
    out = coefficients[0].index_select(0, box)
    if one is not None:
        out.addcmul_(u, one)
    if two is not None:
        out.sub_(two)
    return out


def _tails(density: Tensor, degree: int, to_coefficients: Tensor) -> Tensor:
    """The larger of the last two coefficients in each box, over all functions (rows, functions, boxes * degree)."""
    rows, functions = density.shape[:2]
    last = density.reshape(rows, functions, density.shape[-1] // degree, degree) @ to_coefficients[-2:].mT
    return last.abs().amax((1, 3)) if functions else last.new_zeros(rows, last.shape[2])


class Boxes(Nodes):
    """Equal boxes over the range of each row, ``degree`` Chebyshev nodes in each.

    Args:
        points: (rows, n), n >= 1.
        ends: (rows, 1) each, what the boxes reach from and to.
        count: boxes a row.
        degree: nodes a box, at least 2.
        present: (rows, n) bool, True for the points that count; the others have no weight, and no value is asked there.
        single: whether values at the points are wanted in float32.
    """

    def __init__(
        self,
        points: Tensor,
        ends: tuple[Tensor, Tensor],
        count: int,
        degree: int,
        present: Tensor | None = None,
        single: bool = False,
    ) -> None:
        self.points, self.count, self.degree = points, count, degree
        self.work = torch.float32 if single else torch.float64
        rows = points.shape[0]
        low, high = ends
        self.low = low
        self.width = torch.where(high > low, (high - low) / count, 1.0)
        unit, self.to_coefficients = chebyshev(degree, points.device)
        self.to_series = _series_matrix(degree, points.device)
        left = torch.arange(count, dtype=torch.float64, device=points.device)[:, None]
        self.nodes = self.low + self.width * (left + (unit + 1) / 2).reshape(1, -1)
        self._whole = next(self._split()) if points.numel() <= CHUNK else None
        if self._whole is None and present is None:
            # one pass tells which boxes are empty and what equal weights spread to
            self.even = torch.zeros(rows * count, degree, 1, dtype=torch.float64, device=points.device)
            for _, box, u in self._pieces():
                self.even += _moments(box, u, None, rows * count, degree)
            population = self.even[:, 0, 0]
        else:
            population = torch.zeros(rows * count, dtype=torch.float64, device=points.device)
            for place, box, _ in self._pieces():
                here = None if present is None else present[place].reshape(-1).double()
                population += torch.bincount(box, here, minlength=rows * count)
        live = population.reshape(rows, count, 1) > 0
        self.live = live.expand(rows, count, degree).reshape(rows, -1)

    def _split(self) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        rows, n = self.points.shape
        height, across = max(1, CHUNK // n), min(n, CHUNK)
        scale = 1 / self.width
        for row in range(0, rows, height):
            down = slice(row, row + height)
            for start in range(0, n, across):
                place = (down, slice(start, start + across))
                u = (self.points[place] - self.low[down]).mul_(scale[down])
                box = u.int().clamp_(0, self.count - 1)
                u.sub_(box).mul_(2).sub_(1)
                if rows > 1:
                    first = torch.arange(row, min(rows, row + height), dtype=torch.int32, device=box.device)
                    box += (first * self.count)[:, None]
                yield place, box.reshape(-1), u.reshape(-1)

    def _pieces(self) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Places in ``points``, box numbers counted over all rows, and positions in the box in [-1, 1]."""
        return self._split() if self._whole is None else iter((self._whole,))

    def spread(self, weight: Tensor) -> Tensor:
        """(rows, n, d) -> (rows, q, d)."""
        rows, d = weight.shape[0], weight.shape[-1]
        boxes = rows * self.count
        if self._whole is not None:
            _, box, u = self._whole
            total = _moments(box, u, weight.reshape(-1, d).double(), boxes, self.degree)
        elif d == 1 and weight.stride(1) == 0 and hasattr(self, "even"):
            total = self.even * weight[:, :1].repeat_interleave(self.count, 0)
        else:
            total = weight.new_zeros(boxes, self.degree, d, dtype=torch.float64)
            for place, box, u in self._pieces():
                total += _moments(box, u, weight[place].reshape(-1, d).double(), boxes, self.degree)
        return torch.matmul(self.to_series.mT, total).reshape(rows, -1, d)

    def interpolate(self, value: Tensor, *, double: bool = False) -> Tensor:
        """(rows, q, d) -> (rows, n, d)."""
        rows, d = value.shape[0], value.shape[-1]
        work = torch.float64 if double else self.work
        if d == 1:
            return self._one_by_one(value, [None], work).unsqueeze(-1)
        series = self._series_of(value, work)
        if self._whole is not None:
            return _series(*self._whole[1:], series).reshape(rows, -1, d)
        out = value.new_empty(rows, self.points.shape[-1], d, dtype=work)
        for place, box, u in self._pieces():
            out[place] = _series(box, u, series).reshape(out[place].shape)
        return out

    def contract(self, value: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """sum_d w_d(i) f_d(t_i), (rows, n), for values (rows, q, d) and d weights (rows, n)."""
        columns: list[Tensor] = []
        varying: list[Tensor | None] = []
        for column, weight in zip(value.unbind(-1), weights, strict=True):
            if weight.stride(-1):
                columns.append(column)
                varying.append(weight)
            elif (
                varying and varying[0] is None
            ):  # the same for all points of a row: one series stands for them all
                columns[0] = columns[0] + weight[:, :1] * column
            else:
                columns.insert(0, weight[:, :1] * column)
                varying.insert(0, None)
        return self._one_by_one(torch.stack(columns, -1), varying, self.work)

    def _series_of(self, value: Tensor, work: torch.dtype) -> Tensor:
        """Coefficients of each box, (degree, rows * boxes, d)."""
        rows, d = value.shape[0], value.shape[-1]
        series = torch.matmul(self.to_series, value.reshape(rows * self.count, self.degree, d))
        return series.transpose(0, 1).to(work)

    def _one_by_one(self, value: Tensor, weights: Sequence[Tensor | None], work: torch.dtype) -> Tensor:
        series = [one.contiguous() for one in self._series_of(value, work).unbind(-1)]
        out = value.new_empty(len(value), self.points.shape[-1], dtype=work)
        for place, box, u in self._pieces():
            total: Tensor | None = None
            u = u.to(work)
            for one, weight in zip(series, weights, strict=True):
                part = _series(box, u, one)
                if weight is not None:
                    here = weight[place].reshape(-1).to(work)
                    part = part.mul_(here) if total is None else total.addcmul_(part, here)
                total = part
            out[place] = total.reshape(out[place].shape)  # type: ignore[union-attr]
        return out

    def tails(self, density: Tensor) -> Tensor:
        """Of functions (rows, functions, q): (rows, boxes), how far each box leaves them unresolved."""
        return _tails(density, self.degree, self.to_coefficients)


class Grid(Nodes):
    """Equal boxes over the even places 0 .. 1: all hold the same places, so that both operators are one product.

    Args:
        places: how many.
        most: boxes at most.
        degree: nodes a box.
        device: where they live.
        single: whether values at the places are wanted in float32.
    """

    def __init__(
        self, places: int, most: int, degree: int, device: torch.device, single: bool = False
    ) -> None:
        self.points = (torch.arange(places, dtype=torch.float64, device=device) / max(1, places - 1))[None]
        self.work = torch.float32 if single else torch.float64
        self.degree, self.each = degree, -(-places // most)
        self.count = -(-places // self.each)
        unit, self.to_coefficients = chebyshev(degree, device)
        left = torch.arange(self.count, dtype=torch.float64, device=device)[:, None]
        self.low = torch.zeros_like(self.points[:, :1])
        self.width = torch.full_like(self.low, self.each / max(1, places - 1))
        self.nodes = self.width * (left + (unit + 1) / 2).reshape(1, -1)
        self.live = torch.ones_like(self.nodes, dtype=torch.bool)
        inside = torch.arange(self.each, dtype=torch.float64, device=device) * (2 / self.each) - 1
        terms = torch.stack(
            [t for t in _chebyshev_terms(inside, torch.ones_like(inside), degree) if t is not None], -1
        )
        self.cardinals = terms @ self.to_coefficients  # (each, degree)

    @property
    def high(self) -> Tensor:
        """Where the last box ends, (1, 1)."""
        return self.low + self.count * self.width

    def spread(self, weight: Tensor) -> Tensor:
        """(1, n, d) -> (1, q, d)."""
        n, d = weight.shape[1:]
        empty = self.count * self.each - n
        whole = (
            weight[0].double() if not empty else torch.nn.functional.pad(weight[0].double(), (0, 0, 0, empty))
        )
        if d == 1:
            return (whole.reshape(self.count, self.each) @ self.cardinals).reshape(1, -1, 1)
        return (self.cardinals.mT @ whole.reshape(self.count, self.each, d)).reshape(1, -1, d)

    def interpolate(self, value: Tensor, *, double: bool = False) -> Tensor:
        """(1, q, d) -> (1, n, d)."""
        n, d = self.points.shape[1], value.shape[-1]
        work = torch.float64 if double else self.work
        cardinals, value = self.cardinals.to(work), value[0].to(work)
        if d == 1:
            at = value.reshape(self.count, self.degree) @ cardinals.mT
        else:
            at = cardinals @ value.reshape(self.count, self.degree, d)
        return at.reshape(1, -1, d)[:, :n]

    def tails(self, density: Tensor) -> Tensor:
        """Of functions (1, functions, q): (1, boxes), how far each box leaves them unresolved."""
        return _tails(density, self.degree, self.to_coefficients)


class Cells(Nodes):
    """Boxes of any width for one row: each shrinks to the hull of its points, few values are nodes themselves.

    Args:
        points: (1, n).
        edges: inner edges of the boxes, rising.
        degree: nodes a box that holds more distinct values than that.
        distinct: the points' values, rising, and each point's number among them; None to find them.
    """

    def __init__(
        self, points: Tensor, edges: Tensor, degree: int, distinct: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.points, self.edges, self.degree = points, edges, degree
        self.distinct = torch.unique(points[0], return_inverse=True) if distinct is None else distinct
        value = self.distinct[0]
        cell = torch.bucketize(value, edges, right=True)
        upto = torch.bincount(cell, minlength=len(edges) + 1).cumsum(0)
        held = upto.diff(prepend=upto.new_zeros(1))
        wide = held > degree
        last = upto[wide] - 1
        self.low, self.high = value[last + 1 - held[wide]], value[last]
        unit, self.to_coefficients = chebyshev(degree, value.device)
        self.to_series = _series_matrix(degree, value.device)
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        curved = (middle[:, None] + half[:, None] * unit).reshape(-1)
        inside = wide[cell]
        self.inside, self.outside = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
        self.box = (wide.cumsum(0) - 1)[cell[self.inside]]
        self.u = (value[self.inside] - middle[self.box]) / half[self.box]
        self.nodes = torch.cat((curved, value[self.outside]))[None]
        self.live = torch.ones_like(self.nodes, dtype=torch.bool)

    def spread(self, weight: Tensor) -> Tensor:
        """(1, n, d) -> (1, q, d)."""
        value, number = self.distinct
        merged = weight.new_zeros(len(value), weight.shape[-1], dtype=torch.float64)
        merged.index_add_(0, number, weight[0].double())
        moments = _moments(self.box, self.u, merged[self.inside], len(self.low), self.degree)
        inner = (self.to_series.mT @ moments).reshape(-1, weight.shape[-1])
        return torch.cat((inner, merged[self.outside]))[None]

    def interpolate(self, value: Tensor, *, double: bool = False) -> Tensor:
        """(1, q, d) -> (1, n, d)."""
        d, curved = value.shape[-1], len(self.low) * self.degree
        out = value.new_empty(len(self.distinct[0]), d)
        out[self.outside] = value[0, curved:]
        series = self.to_series @ value[0, :curved].reshape(-1, self.degree, d)
        out[self.inside] = _series(self.box, self.u, series.transpose(0, 1).contiguous())
        return out.index_select(0, self.distinct[1])[None]

    def tails(self, density: Tensor) -> Tensor:
        """Of functions (1, functions, q): (1, boxes), how far each box leaves them unresolved."""
        return _tails(density[..., : len(self.low) * self.degree], self.degree, self.to_coefficients)

    def bisected(self, bad: Tensor) -> Cells:
        """The same points with the boxes (boxes,) bool cut in the middle of their hulls."""
        middle = ((self.low + self.high) / 2)[bad]
        return Cells(self.points, torch.cat((self.edges, middle)).sort().values, self.degree, self.distinct)


class Chained(Nodes):
    """Fine boxes of low degree next to the points, and nodes for what the fine boxes hold: points are touched once.

    Args:
        fine: boxes over the points.
        coarse: from points (rows, fine nodes) to the nodes that stand for them.
        kept: the fine nodes that are points of ``coarse``, where these are not all (one row only).
    """

    def __init__(self, fine: Boxes | Grid, coarse: Nodes, kept: Tensor | None = None) -> None:
        self.fine, self.coarse, self.kept = fine, coarse, kept
        self.points, self.nodes, self.live = fine.points, coarse.nodes, coarse.live

    def spread(self, weight: Tensor) -> Tensor:
        """(rows, n, d) -> (rows, q, d)."""
        return self.carry(self.fine.spread(weight))

    def carry(self, between: Tensor) -> Tensor:
        """From the fine nodes, (rows, fine nodes, d), to the coarse ones."""
        return self.coarse.spread(between if self.kept is None else between[:, self.kept])

    def interpolate(self, value: Tensor, *, double: bool = False) -> Tensor:
        """(rows, q, d) -> (rows, n, d)."""
        return self.fine.interpolate(self._between(value), double=double)

    def interpolate_between(self, value: Tensor) -> Tensor:
        """At the fine nodes, (fine nodes,), for a value (1, q) of the one row; 0 where no point is."""
        return self._between(value.unsqueeze(-1))[0, :, 0]

    def _between(self, value: Tensor) -> Tensor:
        between = self.coarse.interpolate(value, double=True)
        if self.kept is None:
            return between
        whole = between.new_zeros(1, self.fine.nodes.shape[-1], value.shape[-1])
        whole[:, self.kept] = between
        return whole

    def contract(self, value: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """sum_d w_d(i) f_d(t_i), (rows, n), for values (rows, q, d) and d weights (rows, n)."""
        return self.fine.contract(self._between(value), weights)

    def tails(self, density: Tensor) -> Tensor:
        """As the coarse nodes say."""
        return self.coarse.tails(density)


class Shared(Nodes):
    """One row of points that all rows have: worked on once, the rows standing side by side as columns."""

    def __init__(self, one: Nodes) -> None:
        self.one = one
        self.points, self.nodes, self.live = one.points, one.nodes, one.live

    def spread(self, weight: Tensor) -> Tensor:
        """(rows, n, d) -> (rows, q, d), or (1, q, d) where all rows are the same memory."""
        if weight.shape[0] == 1 or weight.stride(0) == 0:
            return self.one.spread(weight[:1])
        return self._unfold(self.one.spread(self._fold(weight)), weight)

    def interpolate(self, value: Tensor, *, double: bool = False) -> Tensor:
        """(rows, q, d) -> (rows, n, d)."""
        return self._unfold(self.one.interpolate(self._fold(value), double=double), value)

    def tails(self, density: Tensor) -> Tensor:
        """Row by row, as the one says."""
        return self.one.tails(density)

    @staticmethod
    def _fold(t: Tensor) -> Tensor:
        return t.transpose(0, 1).reshape(1, t.shape[1], -1)

    @staticmethod
    def _unfold(t: Tensor, like: Tensor) -> Tensor:
        return t.reshape(t.shape[1], like.shape[0], like.shape[2]).transpose(0, 1)
