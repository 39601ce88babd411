"""The debiased divergence of point clouds too large for a plan: value and first derivative, item by item, in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._rowwise import RowFunction, apply
from couplings.transport.tiles import LOG2E, Clouds, Solution, distances, solve_clouds


class CloudDivergence(RowFunction):
    """``W(x, y) - W(x, x) / 2 - W(y, y) / 2`` for weights of sum 1 (or 0), and how it was solved."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, p: float, goal: float, entropy: bool
    ) -> tuple[Tensor, ...]:
        """Value, residual, passes, and the potentials of the three problems; opaque to ``torch.compile``."""
        if torch.compiler.is_compiling():
            out: list[Tensor] = _opaque_divergence(x, y, a, b, epsilon, p, goal)
            return tuple(out)
        return tuple(_divergence(x, y, a, b, epsilon, p, goal))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep points, weights and potentials; the backward pass forms the plans once more."""
        *tensors, ctx.p, _, ctx.entropy = inputs  # is a derivative in epsilon wanted?
        ctx.save_for_backward(*tensors, *output[3:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """The envelope theorem: no linear solve."""
        if cotangent is None:
            return (None,) * 8
        x, y, a, b, epsilon, f, g, fx, gy = ctx.saved_tensors
        grads = apply(_Derivative, cotangent, x, y, a, b, epsilon, f, g, fx, gy, ctx.p, ctx.entropy)
        return (*grads, None, None, None)


class _Derivative(RowFunction):
    """The first derivative, which has none itself: that would need the plans."""

    @staticmethod
    def forward(
        cotangent: Tensor,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        f: Tensor,
        g: Tensor,
        fx: Tensor,
        gy: Tensor,
        p: float,
        entropy: bool,
    ) -> tuple[Tensor, ...]:
        """Opaque to ``torch.compile``, as its tiles are no business of a graph."""
        if torch.compiler.is_compiling():
            out: list[Tensor] = _opaque_derivative(cotangent, x, y, a, b, epsilon, f, g, fx, gy, p, entropy)
            return tuple(out)
        return tuple(_derivative(cotangent, x, y, a, b, epsilon, f, g, fx, gy, p, entropy))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "sinkhorn_divergence: second derivatives are implemented where the plans fit into memory "
            "(n, m <= 2048), got larger point clouds. Differentiate once, or take a sample of the points."
        )


def _empty(clouds: Clouds) -> bool:
    return not (bool((clouds.a > 0).any()) and bool((clouds.b > 0).any()))


def _kept(clouds: Clouds) -> tuple[Clouds, Tensor, Tensor]:
    """Without the points that have no weight, and which ones are left."""
    rows, columns = clouds.a > 0, clouds.b > 0
    if bool(rows.all()) and bool(columns.all()):
        return clouds, rows, columns
    kept = Clouds(
        clouds.x[rows], clouds.y[columns], clouds.a[rows], clouds.b[columns], clouds.epsilon, clouds.p
    )
    return kept, rows, columns


def _solved(clouds: Clouds, goal: float, itself: bool) -> Solution:
    """The solution with ``f`` and ``g`` of every point: of those without weight by the optimality condition."""
    if _empty(clouds):
        zero = clouds.a.new_zeros(())
        return Solution(torch.zeros_like(clouds.a), torch.zeros_like(clouds.b), zero, zero, 0)
    kept, rows, columns = _kept(clouds)
    found = solve_clouds(kept, goal, itself)
    f, g = torch.empty_like(clouds.a), torch.empty_like(clouds.b)
    f[rows], g[columns] = found.f, found.g
    if len(kept.a) < len(f):
        other = Clouds(clouds.x[~rows], kept.y, clouds.a[~rows], kept.b, clouds.epsilon, clouds.p)
        f[~rows] = other.softmin(found.g, torch.float64)
    if itself:
        g = f
    elif len(kept.b) < len(g):
        other = Clouds(clouds.y[~columns], kept.x, clouds.b[~columns], kept.a, clouds.epsilon, clouds.p)
        g[~columns] = other.softmin(found.f, torch.float64)
    return found._replace(f=f, g=g)


def _three(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: float, p: float
) -> tuple[Clouds, Clouds, Clouds]:
    """The three problems, the symmetric ones centred each by itself: the norms of the points are rounded, too."""
    own_x, own_y = x - (a[:, None] * x).sum(0), y - (b[:, None] * y).sum(0)
    return (
        Clouds(x, y, a, b, epsilon, p),
        Clouds(own_x, own_x, a, a, epsilon, p),
        Clouds(own_y, own_y, b, b, epsilon, p),
    )


def _divergence(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, p: float, goal: float
) -> list[Tensor]:
    """Value, residual, passes, and ``f``, ``g``, the potential of ``x`` with itself, that of ``y``."""
    batch = epsilon.shape
    if batch.numel() == 0:
        empty = [torch.zeros_like(t) for t in (epsilon, epsilon, a, b, a, b)]
        return [*empty[:2], torch.zeros_like(epsilon, dtype=torch.int64), *empty[2:]]
    columns: list[list[Tensor]] = [[] for _ in range(7)]
    items = zip(*(_flat(t, k) for t, k in ((x, 2), (y, 2), (a, 1), (b, 1), (epsilon, 0))), strict=True)
    with full_precision(x):
        for xi, yi, ai, bi, eps in items:
            cross, own_x, own_y = _three(xi, yi, ai, bi, float(eps), p)
            both, first, second = (
                _solved(problem, goal, problem is not cross) for problem in (cross, own_x, own_y)
            )
            value = both.value - 0.5 * (first.value + second.value)
            residual = torch.stack([both.residual, first.residual, second.residual]).amax()
            passes = torch.tensor(max(both.passes, first.passes, second.passes), device=x.device)
            entries = (value, residual, passes, both.f, both.g, first.f, second.f)
            for column, entry in zip(columns, entries, strict=True):
                column.append(entry)
    return [torch.stack(column).reshape((*batch, *column[0].shape)) for column in columns]


def _derivative(
    cotangent: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    fx: Tensor,
    gy: Tensor,
    p: float,
    entropy: bool,
) -> list[Tensor]:
    given = ((x, 2), (y, 2), (a, 1), (b, 1), (epsilon, 0), (f, 1), (g, 1), (fx, 1), (gy, 1))
    out = [t.new_zeros(_flat(t, k).shape) for t, k in ((x, 2), (y, 2), (epsilon, 0))]
    with full_precision(x):
        items = zip(*(_flat(t, k) for t, k in given), strict=True)
        for i, (xi, yi, ai, bi, eps, fi, gi, fxi, gyi) in enumerate(items):
            cross, own_x, own_y = _three(xi, yi, ai, bi, float(eps), p)
            by_x, by_y, kl = _pull(cross, fi, gi, entropy)
            half_x, _, kl_x = _pull(own_x, fxi, fxi, entropy)
            half_y, _, kl_y = _pull(own_y, gyi, gyi, entropy)
            out[0][i], out[1][i] = by_x - half_x, by_y - half_y
            out[2][i] = kl - 0.5 * (kl_x + kl_y)
    along = cotangent[..., None]
    return [
        out[0].reshape(x.shape) * along[..., None],
        out[1].reshape(y.shape) * along[..., None],
        (f - fx) * along,
        (g - gy) * along,
        out[2].reshape(epsilon.shape) * cotangent,
    ]


def _pull(whole: Clouds, f: Tensor, g: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of one problem with respect to both clouds and to epsilon, in one pass in float64."""
    p = whole.p
    if _empty(whole):
        return torch.zeros_like(whole.x), torch.zeros_like(whole.y), f.new_zeros(())
    clouds, rows, columns = _kept(whole)
    f, g = f[rows], g[columns]
    x, y, a, b = clouds.x, clouds.y, clouds.a, clouds.b
    grad_x, grad_y, kl = torch.zeros_like(whole.x), torch.zeros_like(whole.y), f.new_zeros(())
    weighted_y = torch.cat([y, torch.ones_like(y[:, :1])], -1) * b[:, None]
    weighted_x = torch.cat([x, torch.ones_like(x[:, :1])], -1) * a[:, None]
    pulled_x, pulled_y = torch.zeros_like(weighted_x), torch.zeros_like(weighted_y)
    for part, logits in clouds.logits(f, g, f.dtype):
        tile = logits.clamp(-1000.0, 1000.0).exp2_()
        if entropy:
            kl = kl + (a[part] * ((logits * tile) @ b)).sum() / LOG2E
        if p != 2:
            apart = distances(x[part], y)
            tile.mul_(torch.where(apart > 0, torch.where(apart > 0, apart, 1.0).pow_(p - 2), 0.0))
        pulled_x[part] = tile @ weighted_y
        pulled_y += tile.mT @ weighted_x[part]
    grad_x[rows] = p * a[:, None] * (pulled_x[:, -1:] * x - pulled_x[:, :-1])
    grad_y[columns] = p * b[:, None] * (pulled_y[:, -1:] * y - pulled_y[:, :-1])
    return grad_x, grad_y, kl


def _flat(tensor: Tensor, inner: int) -> Tensor:
    """One batch dimension in front of the last ``inner`` ones."""
    shape = tensor.shape[tensor.dim() - inner :]
    return tensor.reshape(-1, *shape)


_opaque_divergence = torch.library.custom_op("couplings::cloud_divergence", _divergence, mutates_args=())
_opaque_derivative = torch.library.custom_op("couplings::cloud_derivative", _derivative, mutates_args=())


@_opaque_divergence.register_fake
def _(x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, p: float, goal: float) -> list[Tensor]:
    value = torch.empty_like(epsilon)
    steps = torch.empty_like(epsilon, dtype=torch.int64)
    each = [torch.empty_like(t) for t in (a, b, a, b)]
    return [value, torch.empty_like(value), steps, *each]


@_opaque_derivative.register_fake
def _(
    cotangent: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    fx: Tensor,
    gy: Tensor,
    p: float,
    entropy: bool,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, y, a, b, epsilon)]
