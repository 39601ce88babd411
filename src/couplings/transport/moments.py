"""Entropic transport between points and targets on a line, solved between nodes that stand for them.

With gamma = g / epsilon at the targets' nodes Y and D_qr = -|X_q - Y_r|^p / epsilon,

    L_q = log sum_r my_r exp(D_qr + gamma_r),   M_r = log sum_q mx_q exp(D_qr - L_q),   gamma + M = 0

(ordering.md). The moments mx and my may be negative at single nodes. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from couplings.transport.nodes import Boxes, Cells, Chained, Exact, Grid, Nodes, Shared

STEPS = 16
"""Most Newton steps; 4 are the rule, whatever epsilon."""

ROUNDS = 24
"""Most refinements of the boxes; each halves some of them."""

FINE = 2048
"""Fine boxes of a long row."""

LONG = 2**15
"""Rows with more points go through fine boxes."""

ROUNDING = 1e-15
"""Relative error of a logit."""

LEAST = -600.0
"""Logits below it are exponentiated to 0: far below any share of a sum, and far above denormal numbers."""

NOTHING = 1e-30
"""In a float32 matrix of shares, what counts as 0: its rounding is 1e-7 of a share."""


@dataclass(frozen=True)
class Accuracy:
    """What the solution must resolve.

    Attributes:
        degree: nodes a box.
        width: of a box, in units of sqrt(epsilon).
        tail: what may be left of a density, times its box's mass.
        fine_degree: nodes a fine box.
        error: weighted mean of |gamma + M| that needs no further Newton step.
    """

    degree: int
    width: float
    tail: float
    fine_degree: int
    error: float

    @property
    def work(self) -> torch.dtype:
        """Of the Newton matrix and of values at the points."""
        return torch.float32 if self.error > 1e-11 else torch.float64


ACCURACY = {
    torch.float32: Accuracy(degree=16, width=2.0, tail=1e-5, fine_degree=4, error=5e-11),
    torch.float64: Accuracy(degree=24, width=2.0, tail=1e-9, fine_degree=8, error=1e-12),
}
FOR_VALUES = {
    torch.float32: Accuracy(degree=20, width=2.0, tail=5e-7, fine_degree=4, error=5e-11),
    torch.float64: ACCURACY[torch.float64],
}
"""Sorted values feel what a box of little mass leaves unresolved; ranks do not."""


class Problem(NamedTuple):
    """Rows of points and rising targets.

    Attributes:
        x: (rows, n) points.
        a: (rows, n) masses of the points, >= 0, of sum 1.
        y: (rows, m) rising targets.
        b: (rows, m) masses of the targets, >= 0, of sum 1.
        epsilon: (rows, 1), positive.
        power: the cost is |x - y|^power, power >= 1.
        even: whether every row has the same targets of equal mass, evenly on [0, 1].
    """

    x: Tensor
    a: Tensor
    y: Tensor
    b: Tensor
    epsilon: Tensor
    power: float
    even: bool = False

    def rows(self, pick: Tensor | slice) -> Problem:
        """Some of the rows."""
        x, a, y, b, epsilon = (t[pick] for t in self[:5])
        return Problem(x, a, y, b, epsilon, self.power, self.even)


@dataclass(frozen=True)
class Solved:
    """Rows that share a layout of nodes, and their solution.

    Attributes:
        rows: (r,) indices of these rows in the batch.
        x, y: nodes of the points and of the targets.
        mx, my: (r, qx) and (r, qy), moments of the masses.
        kernel: (r, qx, qy), exp(D + gamma - L), the density of the plan between nodes; 0 at nodes without points.
        slope: (r, qx, qy), dD / dX.
        gamma: (r, qy), potentials of the targets' nodes over epsilon.
        log_norm: (r, qx), L.
        error: (r,), weighted mean of |gamma + M|.
        unresolved: (r,), largest mass of a box times what it leaves unresolved of a density.
        steps: (r,), Newton steps.
        every: whether these are all rows of the batch, in order.
    """

    rows: Tensor
    x: Nodes
    y: Nodes
    mx: Tensor
    my: Tensor
    kernel: Tensor
    slope: Tensor
    gamma: Tensor
    log_norm: Tensor
    error: Tensor
    unresolved: Tensor
    steps: Tensor
    every: bool = False


def start(x: Tensor, a: Tensor, y: Tensor, b: Tensor, at: Tensor, power: float) -> Tensor:
    """The potential of the targets at epsilon = 0, at any places ``at``, (rows, q); the others are as in ``Problem``.

    ordering.md, "One-dimensional start". Points may come in any order.
    """
    x, order = x.sort(dim=-1)
    upto = a.gather(-1, order).cumsum(-1)
    cut = b.cumsum(-1)[:, :-1]
    last = x.shape[-1] - 1
    # the points on either side of each cut; the same one where the cut splits its mass
    below = torch.searchsorted(upto, cut - 1e-13).clamp_(max=last)
    above = torch.searchsorted(upto, cut + 1e-13, right=True).clamp_(max=last)
    between = (x.gather(-1, below) + x.gather(-1, above)) / 2
    rise = (between - y[:, 1:]).abs().pow(power) - (between - y[:, :-1]).abs().pow(power)
    potential = torch.nn.functional.pad(rise.cumsum(-1), (1, 0))
    if y.shape[-1] == 1:
        return torch.zeros_like(at)
    # between two targets it follows the plan's map, which is constant there
    j = torch.searchsorted(y[:, 1:-1].contiguous(), at.contiguous(), right=True)
    here = between.gather(-1, j)
    return potential.gather(-1, j) + (here - at).abs().pow(power) - (here - y.gather(-1, j)).abs().pow(power)


class _System:
    """gamma + M(gamma) = 0 for fixed nodes and moments."""

    def __init__(
        self, x: Nodes, y: Nodes, mx: Tensor, my: Tensor, problem: Problem, accuracy: Accuracy
    ) -> None:
        apart = x.nodes.unsqueeze(-1) - y.nodes.unsqueeze(-2)
        rate, power = problem.epsilon.unsqueeze(-1), problem.power
        if power == 2:
            self.exponent = apart.square().div_(-rate)
            self.slope = apart.mul_(-2 / rate)
        else:
            self.exponent = apart.abs().pow(power) / -rate
            self.slope = apart.sign() * apart.abs().pow(power - 1) * (-power / rate)
        self.mx, self.my = mx, my
        # added to logits: nodes that stand for nothing take no part
        self.dead_x, self.dead_y = (
            None if bool(side.live.all()) else torch.where(side.live, 0.0, -math.inf) for side in (x, y)
        )
        size = self.my.abs()
        self.share = size / size.sum(-1, keepdim=True)
        # logits of pairs that matter are rounded to this
        far = (x.points.mean(-1) - y.points.mean(-1)).abs() + 0.3
        self.tolerance = (ROUNDING * far**power / problem.epsilon.squeeze(-1)).clamp_min(accuracy.error)
        self.good = 100 * self.tolerance  # needs no more care

    def evaluate(self, gamma: Tensor) -> _Values:
        """L, gamma + M without its mean, its size, and the row-normalised kernels."""
        log_norm, w = _weighted_softmax(self.exponent + self._at_y(gamma), self.my.unsqueeze(-2), -1)
        log_sum, v = _weighted_softmax(self.exponent - self._at_x(log_norm), self.mx.unsqueeze(-1), -2)
        balance = gamma + log_sum
        balance = balance - (self.share * balance).sum(-1, keepdim=True)  # a constant in gamma means nothing
        error = (self.share * balance.abs().clamp_(max=50)).sum(-1)
        return _Values(log_norm, balance, error, w, v)

    def _at_y(self, gamma: Tensor) -> Tensor:
        return (gamma if self.dead_y is None else gamma + self.dead_y).unsqueeze(-2)

    def _at_x(self, log_norm: Tensor) -> Tensor:
        return (log_norm if self.dead_x is None else log_norm - self.dead_x).unsqueeze(-1)

    def jacobian(self, values: _Values, work: torch.dtype) -> Tensor:
        """I - V W, made regular by what it does to constants."""
        share = self.share.unsqueeze(-2).to(work)
        v, w = values.v.to(work), values.w.to(work)
        if work == torch.float32:  # denormal numbers slow the product down
            v, w = (torch.nn.functional.hardshrink(part, NOTHING) for part in (v, w))
        matrix = torch.baddbmm(share, v.mT, w, alpha=-1)
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        return matrix

    def kernel(self, gamma: Tensor, log_norm: Tensor) -> Tensor:
        """exp(D + gamma - L), 0 at nodes that stand for nothing."""
        return _exp((self.exponent + self._at_y(gamma)).sub_(self._at_x(log_norm)))


class _Values(NamedTuple):
    """What a system is at some gamma.

    Attributes:
        log_norm: (rows, qx), L.
        balance: (rows, qy), gamma + M without its mean.
        error: (rows,), weighted mean of the size of the balance.
        w: (rows, qx, qy), W.
        v: (rows, qx, qy), the transpose of V.
    """

    log_norm: Tensor
    balance: Tensor
    error: Tensor
    w: Tensor
    v: Tensor


def _exp(z: Tensor) -> Tensor:
    """exp(z) in place; 0 for what would be denormal or nearly so, where a CPU takes many times as long."""
    return torch.nn.functional.threshold(z, LEAST, -math.inf, inplace=True).exp_()


def _weighted_softmax(z: Tensor, weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """log sum w exp(z) and w exp(z) / sum along ``dim``; in the memory of z."""
    most = z.amax(dim, keepdim=True)
    part = _exp(z.sub_(most)).mul_(weight)
    # a sum that is not positive belongs to boxes that resolve nothing; `unresolved` says so
    total = part.sum(dim, keepdim=True).clamp_min_(1e-300)
    return (most + total.log()).squeeze(dim), part.div_(total)


def newton(system: _System, gamma: Tensor, accuracy: Accuracy) -> _Found:
    """Plain Newton steps; a row freezes when it has converged.

    In float32 the matrix is a float32 one: that takes half the time, and the steps converge as well.
    """
    work = accuracy.work
    steps = torch.zeros(gamma.shape[0], dtype=torch.int64, device=gamma.device)
    values = system.evaluate(gamma)
    live = values.error < math.inf
    for _ in range(STEPS):
        live &= values.error > system.tolerance
        if not bool(live.any()):
            break
        matrix, wanted = system.jacobian(values, work), values.balance.to(work).unsqueeze(-1)
        change = torch.linalg.solve_ex(matrix, wanted)[0].squeeze(-1).clamp_(-20, 20)
        gamma = torch.where(live.unsqueeze(-1), gamma - change, gamma)
        steps += live
        values = system.evaluate(gamma)
    return _Found(gamma, values.log_norm, values.error, steps)


def careful_newton(system: _System, gamma: Tensor) -> _Found:
    """As ``newton``, one row, with a Levenberg term and shorter steps where the full step does not help.

    Gaps between the points let blocks of targets move almost freely: I - V W then has a near null vector a block.
    """
    values = system.evaluate(gamma)
    error, damping, steps = values.error.item(), 0.0, 0
    tolerance = system.tolerance.item()
    while steps < 3 * STEPS and error > tolerance:
        steps += 1
        matrix, wanted = system.jacobian(values, torch.float64), values.balance.unsqueeze(-1)
        best: tuple[float, Tensor, _Values, float] | None = None
        for term in (damping, *(max(damping * up, low) for up, low in _DAMPING), 0.1, 1.0):
            damped = matrix.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_(term)
            change = torch.linalg.solve_ex(damped, wanted)[0].squeeze(-1)
            if not bool(change.isfinite().all()):
                continue
            change.clamp_(-20, 20)
            for length in (1.0, 0.4, 0.16):
                trial = gamma - length * change
                there = system.evaluate(trial)
                after = there.error.item()
                if best is None or after < best[0]:
                    best = after, trial, there, term
                if after < error * (1 - 0.6 * length) or after < tolerance:
                    break
            if best is not None and (best[0] < 0.75 * error or best[0] < tolerance):
                break
        if best is None or not best[0] < error:
            break  # rounding
        error, gamma, values, damping = best
        damping = damping / 100 if damping > 1e-12 else 0.0
    return _Found(gamma, values.log_norm, values.error, torch.tensor([steps], device=gamma.device))


class _Found(NamedTuple):
    """gamma and L where Newton stopped, the error that is left, and its steps."""

    gamma: Tensor
    log_norm: Tensor
    error: Tensor
    steps: Tensor


_DAMPING = ((1e2, 1e-10), (1e4, 1e-6), (1e6, 1e-3))


def solve(problem: Problem, accuracy: Accuracy) -> Iterator[Solved]:
    """Solutions, a few rows at a time.

    Each holds rows that share a layout of nodes; a later one replaces the same row in an earlier one.
    """
    even = torch.zeros_like(problem.epsilon), torch.ones_like(problem.epsilon)
    ends = [_ends(problem.x), even if problem.even else _ends(problem.y)]
    sides = (problem.x, problem.y)
    counts = [_boxes_wanted(t, end, problem, accuracy) for t, end in zip(sides, ends, strict=True)]
    wanted = torch.stack(counts, -1)
    if bool((wanted == wanted[:1]).all()):  # as a rule; unique takes as long as a Newton step of a small row
        layouts, layout_of = wanted[:1], torch.zeros_like(counts[0])
    else:
        layouts, layout_of = torch.unique(wanted, dim=0, return_inverse=True)
    for number, layout in enumerate(layouts.tolist()):
        nodes = [boxes * accuracy.degree or t.shape[-1] for boxes, t in zip(layout, sides, strict=True)]
        if nodes[0] * nodes[1] > LARGEST:
            raise RuntimeError(
                f"epsilon: expected one that {LARGEST} pairs of nodes are enough for, got one that takes {nodes[0]} "
                f"nodes for {sides[0].shape[-1]} entries and {nodes[1]} for {sides[1].shape[-1]} targets. Raise "
                "epsilon, pass num_targets, or standardise the scores."
            )
        height = max(1, PAIRS // (nodes[0] * nodes[1]))
        rows = (layout_of == number).nonzero()[:, 0]
        if len(layout_of) > 1 and problem.epsilon.stride(0) != 0:
            # other rows' values may have a say in who is alike: batches of one size, or bits would change with it
            height = min(height, ALIKE)
            rows = torch.cat((rows, rows[-1:].expand(-len(rows) % height)))
        elif len(layout_of) <= height:
            for solved in _solve_alike(rows, problem, ends, accuracy, *layout):
                yield replace(solved, every=len(solved.rows) == len(layout_of))
            continue
        for some in rows.split(height):
            part = [(low[some], high[some]) for low, high in ends]
            yield from _solve_alike(some, problem.rows(some), part, accuracy, *layout)


ALIKE = 8
"""Rows in a batch where batches depend on values."""

PAIRS = 2**22
"""Pairs of nodes that are worked on at a time."""

LARGEST = 2**27
"""Pairs of nodes of one row beyond which it is refused: each array of them takes 1 GiB."""

Ends = tuple[Tensor, Tensor]
"""The least and the largest point of each row, (rows, 1) each."""


def _ends(t: Tensor) -> Ends:
    return t.amin(-1, keepdim=True), t.amax(-1, keepdim=True)  # aminmax takes four times as long


def _boxes_wanted(t: Tensor, ends: Ends, problem: Problem, accuracy: Accuracy) -> Tensor:
    """Boxes for each row of points, (rows,); 0 if their nodes would be no fewer than the points."""
    low, high = ends
    if problem.power != 2 or t.shape[-1] <= 2 * accuracy.degree:
        return torch.zeros_like(low[:, 0], dtype=torch.int64)
    extent = torch.where((low >= 0) & (high <= 1), 1.0, torch.exp2((high - low).log2().ceil()))
    extent = torch.where(extent.isfinite(), extent, 1.0)  # a row that is NaN anyway
    count = (extent / (accuracy.width * problem.epsilon.sqrt()) - 1e-9).ceil().clamp(1, 2**20).long()
    return torch.where(count * accuracy.degree < t.shape[-1], count, 0).squeeze(-1)


def _solve_alike(
    rows: Tensor, problem: Problem, ends: Sequence[Ends], accuracy: Accuracy, boxes_x: int, boxes_y: int
) -> Iterator[Solved]:
    """All rows between equal boxes; then the rows that this does not resolve, one by one, on top."""
    x, a, y, b, epsilon, power, _ = problem
    if not boxes_x and not boxes_y:  # small, and often ill-conditioned: epsilon is tiny for so few points
        accuracy = ACCURACY[torch.float64]
    side_x = _equal(x, ends[0], boxes_x, accuracy)
    mx, place_x, held_x = _masses(side_x, a)
    if problem.even and boxes_y:
        side_y, my, place_y, held_y = _even_targets(y.shape[-1], boxes_y, accuracy, y.device)
        place_y, held_y = place_y.expand(len(x), -1), held_y.expand(len(x), -1)
    else:
        side_y = _equal(y, ends[1], boxes_y, accuracy)
        my, place_y, held_y = _masses(side_y, b)
    system = _System(side_x, side_y, mx, my, problem, accuracy)
    at = side_y.nodes.expand(len(x), -1)
    gamma = start(place_x, held_x, place_y, held_y, at, power) / epsilon
    solved = _finish(rows, side_x, side_y, system, newton(system, gamma, accuracy))
    yield solved
    lost = ~((solved.error < system.good) & (solved.unresolved < accuracy.tail))
    for row in lost.nonzero()[:, 0].tolist():
        alone = problem.rows(slice(row, row + 1))
        if all(bool(t.isfinite().all()) for t in alone[:5]):
            yield _refined(alone, accuracy, boxes_x, boxes_y, solved, row)


def solve_exactly(problem: Problem) -> Solved:
    """All rows with every point and target its own node: the kernel is the whole plan's density."""
    x, a, y, b, epsilon, power, _ = problem
    rows, side_x, side_y = torch.arange(x.shape[0]), Exact(x), Exact(y)
    accuracy = ACCURACY[torch.float64]
    system = _System(side_x, side_y, a, b, problem, accuracy)
    found = newton(system, start(x, a, y, b, y, power) / epsilon, accuracy)
    for row in (~(found.error < system.good)).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        alone = _System(Exact(x[one]), Exact(y[one]), a[one], b[one], problem.rows(one), accuracy)
        for whole, part in zip(
            found,
            careful_newton(alone, start(x[one], a[one], y[one], b[one], y[one], power) / epsilon[one]),
            strict=True,
        ):
            whole[one] = part
    return _finish(rows, side_x, side_y, system, found)


def _equal(t: Tensor, ends: Ends, boxes: int, accuracy: Accuracy) -> Nodes:
    if boxes == 0:
        return Exact(t)
    single = accuracy.work == torch.float32
    if t.shape[-1] <= LONG:
        return Boxes(t, ends, boxes, accuracy.degree, single=single)
    fine = Boxes(t, ends, FINE, accuracy.fine_degree, single=single)
    return Chained(fine, Boxes(fine.nodes, ends, boxes, accuracy.degree, present=fine.live))


def _masses(side: Nodes, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the masses, and few places and masses that tell where they are.

    These are the points themselves, or what each fine box holds at its middle.
    """
    if not isinstance(side, Chained):
        return side.spread(mass.unsqueeze(-1)).squeeze(-1), side.points, mass
    fine = side.fine
    between = fine.spread(mass.unsqueeze(-1))
    held = between.reshape(mass.shape[0], fine.count, fine.degree).sum(-1)
    place = torch.arange(fine.count, dtype=torch.float64, device=mass.device) + 0.5
    return side.carry(between).squeeze(-1), fine.low + fine.width * place, held


@lru_cache(maxsize=8)
def _even_targets(
    count: int, boxes: int, accuracy: Accuracy, device: torch.device
) -> tuple[Nodes, Tensor, Tensor, Tensor]:
    """Nodes and masses of even targets, which do not depend on the points."""
    if count > LONG:
        fine = Grid(count, FINE, accuracy.fine_degree, device, single=accuracy.work == torch.float32)
        ends = fine.low, fine.high
        side: Nodes = Chained(fine, Boxes(fine.nodes, ends, boxes, accuracy.degree, present=fine.live))
    else:
        y = (torch.arange(count, dtype=torch.float64, device=device) / max(1, count - 1))[None]
        side = _equal(y, (y[:, :1], y[:, -1:]), boxes, accuracy)
    mass = torch.full((1, 1), 1 / count, dtype=torch.float64, device=device)
    return Shared(side), *_masses(side, mass.expand(1, count))


def _finish(rows: Tensor, side_x: Nodes, side_y: Nodes, system: _System, found: _Found) -> Solved:
    gamma, log_norm, error, steps = found
    kernel = system.kernel(gamma, log_norm)
    left = [_unresolved(side_x, kernel.mT, system.mx), _unresolved(side_y, kernel, system.my)]
    unresolved = torch.cat((torch.zeros_like(error).unsqueeze(-1), *left), -1).amax(-1)
    mx, my = system.mx, system.my
    return Solved(
        rows, side_x, side_y, mx, my, kernel, system.slope, gamma, log_norm, error, unresolved, steps
    )


def _unresolved(side: Nodes, density: Tensor, mass: Tensor) -> Tensor:
    """What each box leaves of a density, times its mass, (rows, boxes): its cardinal polynomials sum to 1."""
    boxes = side.one if isinstance(side, Shared) else side
    boxes = boxes.coarse if isinstance(boxes, Chained) else boxes
    if not isinstance(boxes, (Boxes, Cells)):
        return mass.new_zeros(mass.shape[0], 0)
    curved = len(boxes.low) * boxes.degree if isinstance(boxes, Cells) else mass.shape[-1]
    held = mass[:, :curved].reshape(mass.shape[0], curved // boxes.degree, boxes.degree).sum(-1)
    return side.tails(density) * held.abs()


def _refined(
    problem: Problem, accuracy: Accuracy, boxes_x: int, boxes_y: int, equal: Solved, row: int
) -> Solved:
    """One row, its boxes cut on both sides wherever they leave a density unresolved, beginning with equal boxes.

    A long row's fine boxes go on standing for its points if they resolve the densities that are found.
    """
    if max(problem.x.shape[-1], problem.y.shape[-1]) > LONG:
        solved = _refined_on(problem, accuracy, boxes_x, boxes_y, equal, row, True)
        if max(_unresolved_finely(solved, problem)) < accuracy.tail:
            return solved
    return _refined_on(problem, accuracy, boxes_x, boxes_y, equal, row, False)


def _refined_on(
    problem: Problem,
    accuracy: Accuracy,
    boxes_x: int,
    boxes_y: int,
    equal: Solved,
    row: int,
    fine: bool,
) -> Solved:
    x, a, y, b, epsilon, power, _ = problem
    one = slice(row, row + 1)
    side_x, side_y = (_cells(t, boxes, accuracy, fine) for t, boxes in ((x, boxes_x), (y, boxes_y)))
    if equal.error[row] < 1e-3:
        gamma = _extended(equal.x.nodes[one], equal.mx[one], equal.log_norm[one], side_y, problem)
    else:
        gamma = start(x, a, y, b, side_y.nodes, power) / epsilon
    total = 0
    for round_ in range(ROUNDS):
        mx, my = _masses(side_x, a)[0], _masses(side_y, b)[0]
        system = _System(side_x, side_y, mx, my, problem, accuracy)
        solved = _finish(equal.rows[one], side_x, side_y, system, careful_newton(system, gamma))
        total += int(solved.steps)
        bad_x = _unresolved(side_x, solved.kernel.mT, system.mx)[0] >= accuracy.tail
        bad_y = _unresolved(side_y, solved.kernel, system.my)[0] >= accuracy.tail
        if round_ == ROUNDS - 1 or not (bool(bad_x.any()) or bool(bad_y.any())):
            break
        old = side_x.nodes
        side_x, side_y = _bisected(side_x, bad_x), _bisected(side_y, bad_y)
        gamma = _extended(old, system.mx, solved.log_norm, side_y, problem)
    return replace(solved, steps=torch.tensor([total], device=x.device))


def _bisected(side: Nodes, bad: Tensor) -> Nodes:
    if isinstance(side, Cells):
        return side.bisected(bad)
    if isinstance(side, Chained) and isinstance(side.coarse, Cells):
        return Chained(side.fine, side.coarse.bisected(bad), side.kept)
    return side


def _unresolved_finely(solved: Solved, problem: Problem) -> tuple[float, float]:
    """The most that a fine box leaves of a density, times its mass, on either side."""
    x, a, _, b, epsilon, power, _ = problem
    left = []
    for side, mass, others, shift in (
        (solved.x, a, solved.y.nodes, solved.gamma),
        (solved.y, b, solved.x.nodes, -solved.log_norm),
    ):
        if not isinstance(side, Chained):
            left.append(0.0)
            continue
        fine = side.fine
        held = fine.spread(mass.unsqueeze(-1)).reshape(fine.count, fine.degree).sum(-1)
        own = side.interpolate_between(solved.log_norm if side is solved.x else -solved.gamma)
        worst = 0.0
        for some in torch.arange(fine.count, device=x.device)[held > 0].split(128):
            place = (some[:, None] * fine.degree + torch.arange(fine.degree, device=x.device)).reshape(-1)
            apart = fine.nodes[0, place][:, None] - others
            density = (apart.abs().pow(power) / -epsilon + shift - own[place][:, None]).exp()
            # of a cubic, the last coefficient: the next one, which is left out, is smaller still
            last = density.reshape(len(some), fine.degree, -1).mT @ fine.to_coefficients[-1]
            worst = max(worst, float((last.abs().amax(-1) * held[some].abs()).max()))
        left.append(worst)
    return left[0], left[1]


def _extended(nodes: Tensor, mass: Tensor, log_norm: Tensor, side_y: Nodes, problem: Problem) -> Tensor:
    """gamma = -M at new nodes of the targets."""
    exponent = (nodes.unsqueeze(-1) - side_y.nodes.unsqueeze(-2)).abs().pow(problem.power)
    exponent = exponent / -problem.epsilon.unsqueeze(-1) - log_norm.unsqueeze(-1)
    return -_weighted_softmax(exponent, mass.unsqueeze(-1), -2)[0]


def _cells(t: Tensor, boxes: int, accuracy: Accuracy, fine: bool) -> Nodes:
    if boxes == 0:
        return Exact(t)
    low, high = _ends(t)
    edges = low[0] + (high - low)[0] * torch.arange(1, boxes, dtype=torch.float64, device=t.device) / boxes
    if not fine or t.shape[-1] <= LONG:
        return Cells(t, edges, accuracy.degree)
    between = Boxes(t, (low, high), FINE, accuracy.fine_degree, single=accuracy.work == torch.float32)
    kept = between.live[0].nonzero()[:, 0]
    return Chained(between, Cells(between.nodes[:, kept], edges, accuracy.degree), kept)
