"""Doubly stochastic scaling of many small square matrices at once (normalize.md derives it).

Arrays are ``(n, n, B)``: the batch is the last, contiguous dimension. Every operation is elementwise along it, and sums
over rows and columns are written out as additions. So no matrix can change a bit of another, not even by how many of
them are still being worked on.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction
from couplings.transport._progress import all_true, any_true

LARGEST = 8  # the assignment takes n 2^(n-1) steps; beyond it the general solver is faster
BLOCK = 2**19  # entries worked on together on a CPU: the many small operations have work for several threads
BACK = 2**18  # the same of the gradient, whose temporaries are float64 throughout
QUICK_PASSES = 5  # plain Newton steps in the precision of the result
CAREFUL_PASSES = 60  # logarithmic steps in float64 for what is left
REACH = 80.0  # logits: by no more does a flow count above the row's own entry
CLIP = 8.0  # logits by which one step moves a group of columns against the others
ADJOINT_RIDGE = 1e-15  # as in transport/implicit.py: where a plan is that hard, its equation is 0 = 0


class _Precision(NamedTuple):
    """What depends on the dtype of the passes."""

    dtype: torch.dtype
    floor: float  # a lower logit is a plan of exactly 0: exp of less is slow, and denormal
    enough: float  # a step that moves every group by less, in logits, is the last
    noise: float  # rounding of a sum of flows, relative to these flows
    still: float  # flows as small as this need no balance


SINGLE = _Precision(torch.float32, -80.0, 2e-3, 2e-7, 1e-13)
DOUBLE = _Precision(torch.float64, -600.0, 1e-5, 1e-15, 1e-18)


class SmallPlan(RowFunction):
    """The doubly stochastic ``exp(logits + f + g)`` ``(*batch, n, n)`` with the implicit gradient.

    Also returns the L1 error of its column sums ``(*batch)``, NaN where there is no such matrix.
    """

    @staticmethod
    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        """The solver; opaque to ``torch.compile``, since its loops depend on values."""
        if torch.compiler.is_compiling():
            out: tuple[Tensor, Tensor] = _opaque(logits)
            return out
        return _solve(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        """The plan is all that the gradient needs."""
        plan, residual = output
        ctx.save_for_backward(plan)
        ctx.mark_non_differentiable(residual)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor | None) -> Tensor:
        """Ordinary torch code in the saved plan, hence differentiable to any order."""
        (plan,) = ctx.saved_tensors
        n, batch = plan.shape[-1], plan.shape[:-2]
        plan, cotangent = plan.reshape(-1, n, n), cotangent.reshape(-1, n, n)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or plan.device.type != "cpu":
            return _pull_back(plan, cotangent).reshape(*batch, n, n)
        out = torch.empty_like(plan)
        for block in _blocks(plan, BACK):
            out[block] = _pull_back(plan[block], cotangent[block])
        return out.reshape(*batch, n, n)


def _blocks(matrices: Tensor, entries: int) -> list[slice]:
    """Ranges of a batch (B, n, n) that are worked on together; they follow from shapes alone."""
    count, n, _ = matrices.shape
    size = max(1, entries // (n * n)) if matrices.device.type == "cpu" else max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _fold(terms: Tensor) -> Tensor:
    """The sum over the first dimension, term by term: a reduction's order may depend on where an item stands."""
    return reduce(torch.add, terms.unbind())


# -- the solver


class _Problem(NamedTuple):
    """Matrices with columns renamed so that the best assignment is the diagonal, and logits relative to it.

    Attributes:
        x: (n, n, B) float64 logits, 0 on the diagonal and at most 0 elsewhere, up to rounding.
        column: (n, B), the original column of column j.
        bad: (B), a matrix without a plan, or with NaN in it; zeros stand in for it.
    """

    x: Tensor
    column: Tensor
    bad: Tensor

    def take(self, items: Tensor) -> _Problem:
        """Some of the matrices."""
        return _Problem(*(tensor.index_select(-1, items) for tensor in self))


def _solve(logits: Tensor) -> tuple[Tensor, Tensor]:
    n, batch = logits.shape[-1], logits.shape[:-2]
    flat = logits.reshape(-1, n, n)
    plan = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
    residual = torch.empty(flat.shape[0], dtype=flat.dtype, device=flat.device)
    quick = SINGLE if flat.dtype == torch.float32 else DOUBLE
    rest: list[tuple[Tensor, _Problem, Tensor]] = []
    for block in _blocks(flat, BLOCK):
        problem = _centred(flat[block].permute(1, 2, 0).to(torch.float64).contiguous())
        x = problem.x.to(quick.dtype)
        v, live = _iterate(x, torch.zeros_like(x[0]), ~problem.bad, QUICK_PASSES, quick, careful=False)
        plan[block], residual[block] = _result(x, v, problem, quick)
        if any_true(live):
            items = (
                live.nonzero()[:, 0]
                if live.device.type == "cpu"
                else torch.arange(len(live), device=live.device)
            )
            rest.append((items + block.start, problem.take(items), v.index_select(-1, items)))
    if rest:
        where = torch.cat([items for items, _, _ in rest])
        problem = _Problem(
            *(torch.cat(parts, -1) for parts in zip(*(part for _, part, _ in rest), strict=True))
        )
        v = torch.cat([v for _, _, v in rest], -1).to(torch.float64)
        v, _ = _iterate(problem.x, v, ~problem.bad, CAREFUL_PASSES, DOUBLE, careful=True)
        better, error = _result(problem.x, v, problem, DOUBLE)
        plan[where], residual[where] = better.to(flat.dtype), error.to(flat.dtype)
    return plan.reshape(*batch, n, n), residual.reshape(batch)


_opaque = torch.library.custom_op("couplings::small_plan", _solve, mutates_args=())


@_opaque.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits, memory_format=torch.contiguous_format), logits.new_empty(
        logits.shape[:-2]
    )


def _centred(z: Tensor) -> _Problem:
    """Rename the columns and subtract the central dual of the assignment; z is (n, n, B) float64."""
    n = z.shape[0]
    top = reduce(torch.maximum, z.unbind(1))
    z = z - top[:, None]  # a row of -inf and one with +inf become NaN
    column, best = _assignment(z)
    bad = ~best.isfinite()
    if any_true(bad):
        z = torch.where(bad, 0.0, z)
    a = z.gather(1, column.expand(n, n, -1))
    a = a - a.diagonal(dim1=0, dim2=1).mT[:, None]
    path = a  # the best path from row to column: max-plus closure
    for k in range(n):
        path = torch.maximum(path, path[:, k : k + 1] + path[k : k + 1])
    if any_true(path == -torch.inf):
        # a pair without a way back is in no assignment: the plan is 0 there, whatever its logit
        back = path.transpose(0, 1)
        a = torch.where(back == -torch.inf, -torch.inf, a)
        mutual = (path > -torch.inf) & (back > -torch.inf)
        towards = torch.where(mutual, path, 0.0)
        v = (_fold(towards.transpose(0, 1)) - _fold(towards)) / (2 * _fold(mutual.to(z.dtype)))
    else:
        v = (_fold(path.transpose(0, 1)) - _fold(path)) / (2 * n)
    return _Problem((a + v).sub_(v[:, None]).contiguous(), column, bad)


def _assignment(z: Tensor) -> tuple[Tensor, Tensor]:
    """A best assignment of each matrix: its column of every row (n, B), and its sum (B).

    Dynamic programming over the sets of columns that the first rows take. What was chosen is carried along, three
    bits a row: looking it up afterwards would cost several times as much.
    """
    n, count = z.shape[0], z.shape[-1]
    entries = [row.unbind() for row in z.unbind()]
    nobody = torch.zeros(count, dtype=torch.int32, device=z.device)
    table = [(torch.zeros_like(z[0, 0]), nobody)]

    def extend(chosen: int, row: int, j: int) -> tuple[Tensor, Tensor]:
        """The best way to give row ``row`` the column j and the rows before it the others of ``chosen``."""
        value, taken = table[chosen ^ (1 << j)]
        return value + entries[row][j], taken + (j << 3 * row)

    for chosen in range(1, 2**n):
        first, *others = (j for j in range(n) if chosen >> j & 1)
        row = len(others)
        best, taken = extend(chosen, row, first)
        for j in others:
            value, path = extend(chosen, row, j)
            taken = torch.where(value > best, path, taken)
            best = torch.maximum(best, value)
        table.append((best, taken))
    best, taken = table[-1]
    shifts = torch.arange(0, 3 * n, 3, dtype=torch.int32, device=z.device)
    return ((taken >> shifts[:, None]) & 7).long(), best


class _Flows(NamedTuple):
    """The plan apart from its diagonal, and what flows out of and into each diagonal entry."""

    across: Tensor  # (n, n, B), 0 on the diagonal
    own: Tensor  # (n, B), the diagonal
    out: Tensor  # (n, B), rest of the row: 1 - own, without cancellation
    into: Tensor  # (n, B), rest of the column


def _flows(x: Tensor, v: Tensor, precision: _Precision) -> _Flows:
    """``softmax_j(x_ij + v_j)``: rows sum to 1; columns do where out = into."""
    n = x.shape[0]
    e = (x + v).sub_(v[:, None]).clamp_(max=REACH)
    e = torch.threshold_(e, precision.floor, -math.inf).exp_()
    e.view(n * n, -1)[:: n + 1] = 0
    out = _fold(e.transpose(0, 1))
    own = (1 + out).reciprocal_()
    across = e.mul_(own[:, None])
    return _Flows(across, own, out.mul_(own), _fold(across))


def _plan(flows: _Flows) -> Tensor:
    n = flows.across.shape[0]
    plan = flows.across.clone()
    plan.view(n * n, -1)[:: n + 1] = flows.own
    return plan


def _result(x: Tensor, v: Tensor, problem: _Problem, precision: _Precision) -> tuple[Tensor, Tensor]:
    """The plan (B, n, n) with its columns in place, and the L1 error of its column sums."""
    flows = _flows(x, v, precision)
    plan = torch.empty_like(x).scatter_(1, problem.column.expand_as(x), _plan(flows))
    error = _fold((flows.out - flows.into).abs_())
    if any_true(problem.bad):
        plan, error = torch.where(problem.bad, torch.nan, plan), torch.where(problem.bad, torch.nan, error)
    return plan.permute(2, 0, 1), error


def _iterate(
    x: Tensor, v: Tensor, live: Tensor, passes: int, precision: _Precision, *, careful: bool
) -> tuple[Tensor, Tensor]:
    """Newton steps on v (n, B) from where it is; also says which matrices want more of them."""
    # on a CPU the matrices that are done are left out, elsewhere they are frozen
    whole_v, whole_live, items = v, live, None
    stop = all_true()
    for _ in range(passes):
        if stop(~live):
            break
        if x.device.type == "cpu" and 2 * int(live.count_nonzero()) < len(live):
            keep = live.nonzero()[:, 0]
            if items is None:
                items, whole_v, whole_live = keep, v, live
            else:
                whole_v[:, items], whole_live[items] = v, live
                items = items[keep]
            x, v, live = x.index_select(-1, keep), v.index_select(-1, keep), live.index_select(-1, keep)
        step, moving = _step(_flows(x, v, precision), precision, careful)
        v = torch.where(live, v + step, v)
        live = live & moving
    if items is None:
        return v, live
    whole_v[:, items], whole_live[items] = v, live
    return whole_v, whole_live


class _Pivot(NamedTuple):
    """One column eliminated: it moves with the later ones, and by ``force / stiffness`` against them."""

    share: Tensor  # (n - 1 - k, B): how much it follows each later column; sums to 1, less the ridge
    stiffness: Tensor
    force: Tensor
    ridge: Tensor

    def follow(self, move: Tensor, later: list[Tensor]) -> Tensor:
        """Its own move and what it follows of the later ones."""
        return reduce(torch.add, map(torch.mul, self.share.unbind(), later), move)


def _eliminate(coupling: Tensor, force: Tensor, rounding: Tensor, still: float) -> list[_Pivot]:
    """Solve the graph Laplacian of ``coupling`` (n, n, B) without a subtraction (Grassmann, Taksar, Heyman 1985).

    A diagonal is the sum of what is left of its row. Its ridge is ``still`` and the accumulated ``rounding`` of force.
    """
    pivots = []
    while len(coupling) > 1:
        stiffness = _fold(coupling[0, 1:])
        ridge = rounding[0] + still
        share = coupling[1:, 0] / (stiffness + ridge)
        pivots.append(_Pivot(share, stiffness, force[0], ridge))
        force = force[1:] + share * force[0]
        rounding = rounding[1:] + share * rounding[0]
        coupling = coupling[1:, 1:] + share[:, None] * coupling[0, 1:]
    return pivots


def _step(flows: _Flows, precision: _Precision, careful: bool) -> tuple[Tensor, Tensor]:
    """A Newton step (n, B), and which matrices (B) need another one after it.

    Quick: plain Newton on out - into. Careful: the logarithmic one, cut by cut.
    """
    plan = _plan(flows)
    n = len(plan)
    coupling = plan[0, :, None] * plan[0]
    for row in plan[1:]:
        coupling = coupling + row[:, None] * row
    force = flows.out - flows.into
    pivots = _eliminate(coupling, force, (flows.out + flows.into) * precision.noise, precision.still)
    moving = torch.zeros_like(force[0], dtype=torch.bool)
    step: list[Tensor] = [torch.zeros_like(force[0])]
    for k in reversed(range(n - 1)):
        pivot = pivots[k]
        moving |= pivot.force.abs() > precision.enough * pivot.stiffness + pivot.ridge
        move = _log_move(flows, pivots, k) if careful else pivot.force / (pivot.stiffness + pivot.ridge)
        # clipped here it limits how far a group moves, and leaves the moves inside the group alone
        step.insert(0, pivot.follow(move.clamp_(-CLIP, CLIP), step))
    return torch.stack(step), moving


def _log_move(flows: _Flows, pivots: list[_Pivot], k: int) -> Tensor:
    """How far column k and its followers must move to balance the logarithms of the flows across their cut."""
    pivot = pivots[k]
    member = torch.zeros_like(flows.own)  # how much a column follows k: 1 for k itself, 0 for later ones
    member[k] = 1
    for j in reversed(range(k)):
        member[j] = _fold(pivots[j].share[: k - j] * member[j + 1 : k + 1])
    difference = member[:, None] - member
    out = _fold(_fold(flows.across * difference.clamp(min=0))) + pivot.ridge
    into = _fold(_fold(flows.across * difference.neg_().clamp_(min=0))) + pivot.ridge
    softness = (pivot.stiffness / (out + into)).clamp_(0.05, 1)
    return (out / into).log_() / (2 * softness)


# -- the gradient


def _pull_back(plan: Tensor, cotangent: Tensor) -> Tensor:
    """dL/dlogits from dL/dplan, both (B, n, n)."""
    dtype = plan.dtype
    # rows that sum to 1 in float64: what is left of 1 in a nearly hard row is then right to full relative precision
    p = plan.permute(1, 2, 0).to(torch.float64).contiguous()
    p = p / _fold(p.transpose(0, 1))[:, None]
    g = cotangent.permute(1, 2, 0).to(torch.float64).contiguous()
    g = g - _fold((p * g).transpose(0, 1))[:, None]
    coupling = p[0, :, None] * p[0]
    for row in p[1:]:
        coupling = coupling + row[:, None] * row
    force = _fold(p * g)
    price = [torch.zeros_like(force[0])]
    for pivot in reversed(_eliminate(coupling, force, torch.zeros_like(force), ADJOINT_RIDGE)):
        move = pivot.force / (pivot.stiffness + pivot.ridge)
        price.insert(0, pivot.follow(move, price))
    prices = torch.stack(price)
    paid = _fold((p * prices).transpose(0, 1))
    return (p * (g - prices + paid[:, None])).permute(2, 0, 1).to(dtype)
