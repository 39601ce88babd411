"""Validation, dispatch and documentation of the selection operators; the mathematics is in the files beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from couplings import _checks
from couplings._autocast import full_precision
from couplings._rowwise import apply, seen
from couplings.selection import entropic, families, neuralsort, successive
from couplings.selection.rows import Real, Rows, prepare
from couplings.selection.values import WeightedValues
from couplings.transport.threshold import hard_cut

DEFAULT_EPSILON = {
    "transport": 0.1,
    "laplace": 0.1,
    "gaussian": 0.1,
    "sparse": 0.2,
    "softmax": 0.1,
    "gumbel": 0.1,
    "neuralsort": 1.0,
}
"""epsilon=None: for standardised scores of 10 to 1000 entries, soft enough to train through and far from constant."""

MASK_METHODS = tuple(DEFAULT_EPSILON)
SORTED_METHODS = ("transport", "softmax", "gumbel", "neuralsort")
RANDOM_METHODS = ("gumbel",)


def soft_topk_mask(
    x: Tensor,
    k: int | float | Tensor,
    *,
    dim: int = -1,
    largest: bool = True,
    epsilon: float | Tensor | None = None,
    method: str = "transport",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    standardize: bool = True,
    hard: bool = False,
    p: float = 4 / 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Soft indicator of the k largest entries of each row: values in [0, 1] that sum to k.

    The default is SOFT top-k (Xie et al., NeurIPS 2020): the entropic transport plan between the scores and two
    targets, which is a threshold, A_i = sigmoid((2 x_i - tau) / epsilon) with tau the root of sum_i A_i = k, solved to
    rounding in a few passes. Rows are independent: no value in one row changes another row's result.

    Args:
        x: (\*batch, n) scores, float64, float32, bfloat16 or float16. A score of -inf (+inf with ``largest=False``) is
            masked.
        k: how many to select. An int or float in [0, n], or a tensor that broadcasts to x's shape without ``dim``,
            one k per row, fractional if you like. A row with fewer than k valid entries selects all of them.
        dim: the dimension that is selected from.
        largest: whether to select the largest or the smallest entries.
        epsilon: regularisation >= 0, in units of the row's standard deviation unless ``standardize=False``; a float, a
            scalar tensor, or a tensor that broadcasts to x's shape without ``dim`` (differentiable). 0 is the exact
            discrete answer, whose gradient is zero. None means 0.1 (``transport``, ``laplace``, ``gaussian``,
            ``softmax``, ``gumbel``), 0.2 (``sparse``) or 1.0 (``neuralsort``).
        method: ``"transport"`` (logistic threshold), ``"laplace"``, ``"gaussian"`` (other thresholds),
            ``"sparse"`` (p-norm regularisation with exact zeros and ones, Sander et al. 2023), ``"softmax"``
            (k successive softmaxes, Plotz and Roth 2018), ``"gumbel"`` (RelaxSubSample, Xie and Ermon 2019; random) or
            ``"neuralsort"`` (first k rows of Grover et al. 2019). The last three need an int k and no weights.
        weights: (\*batch, n), non-negative, of x's dtype, broadcast to x: sum_i w_i A_i = k mean(w).
        mask: bool, broadcast to x, True = takes part. A masked entry gets exactly 0 and no gradient.
        standardize: whether scores are divided by their row's standard deviation, so that ``op(c x + d) == op(x)``.
        hard: return the discrete indicator (ties: first index first) with the gradient of the soft one.
        p: the norm of ``method="sparse"``, in (1, 2]; 2 is piecewise linear.
        generator: the random source of ``method="gumbel"``.

    Returns:
        A tensor of x's shape and dtype. A row that holds NaN is NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range; on an eager CPU also negative weights and k out of
            range. Elsewhere those two give NaN rows.

    Reference:
        Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, equations 4 to 8.

    Example:
        >>> import torch, couplings
        >>> x = torch.tensor([0.4, 0.7, 2.3, 1.9, -0.2, 1.4, 0.1])
        >>> couplings.soft_topk_mask(x, 5, largest=False, epsilon=0.01).round()
        tensor([1., 1., 0., 0., 1., 1., 1.])
        >>> round(couplings.soft_topk_mask(x, 2).sum().item(), 5)
        2.0
    """
    dim = _check_common(x, dim, epsilon, method, MASK_METHODS, mask, generator)
    batch = (*x.shape[:dim], *x.shape[dim + 1 :])
    count = _check_k(k, x.shape[dim], batch, x)
    if weights is not None:
        weights = _check_weights(weights, x, mask)
    if method in ("softmax", "gumbel", "neuralsort"):
        if weights is not None or not isinstance(k, int):
            _checks.reject(
                "weights" if weights is not None else "k",
                f"{'no weights' if weights is not None else 'an int'} with method={method!r}",
                _checks.describe(weights if weights is not None else k),
                'Use method="transport", which takes weights and fractional or per-row k.',
            )
    if method == "sparse" and not 1 < p <= 2:
        _checks.reject("p", "a norm in (1, 2]", p, "Use 4/3 (smooth) or 2 (piecewise linear).")
    with full_precision(x):
        if mask is not None:
            mask = mask.expand(x.shape)
        constant = method == "transport" and entropic.follows_spread(weights, epsilon, standardize)
        rows = prepare(x, dim, largest, weights, mask, standardize, constant)
        soft: Callable[[Real], Tensor]
        if method == "transport":
            soft = partial(entropic.mask, rows, count)
        elif method in ("laplace", "gaussian", "sparse"):
            soft = partial(families.mask, rows, count, family=method, p=p)
        else:
            soft = _summed(_indicators(rows, int(k), method, generator))
        plan = _soften(
            lambda: _hard_mask(rows, count), soft, _row_epsilon(epsilon, method, rows.x, dim), hard, rows
        )
        if isinstance(count, Tensor):
            plan = plan.masked_fill(~((count >= 0) & (count <= x.shape[dim])), math.nan)
        if rows.weights is not None and seen(rows.weights < 0) is None:
            plan = plan.masked_fill((rows.weights < 0).any(-1, keepdim=True), math.nan)
        plan = plan.to(x.dtype)
        return plan if dim == x.dim() - 1 else plan.movedim(-1, dim)


def soft_topk(
    x: Tensor,
    k: int,
    *,
    dim: int = -1,
    largest: bool = True,
    epsilon: float | Tensor | None = None,
    method: str = "transport",
    mask: Tensor | None = None,
    standardize: bool = True,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Soft values and soft indicators of the k largest entries of each row, in order.

    The default is sorted SOFT top-k (Xie et al., NeurIPS 2020): the entropic transport plan between the scores and the
    targets 0, 1, .., k, the first k of mass 1/n. Time and memory O(n k).

    Args:
        x: (\*batch, n) scores, float64, float32, bfloat16 or float16. A score of -inf (+inf with ``largest=False``) is
            masked.
        k: how many to select, an int in [1, n].
        dim: the dimension that is selected from.
        largest: whether to select the largest or the smallest entries.
        epsilon: regularisation >= 0, as in ``soft_topk_mask``. 0 is the exact discrete answer: values with the gradient
            of a gather, indicators with none.
        method: ``"transport"``, ``"softmax"``, ``"gumbel"`` or ``"neuralsort"``; see ``soft_topk_mask``.
        mask: bool, broadcast to x, True = takes part. A row with c < k valid entries fills its first c outputs; the
            others are 0.
        standardize: whether scores are divided by their row's standard deviation.
        hard: return the discrete answer (ties: first index first) with the gradient of the soft one.
        generator: the random source of ``method="gumbel"``.

    Returns:
        values, of x's shape with k in place of n at ``dim``; and weights, (\*batch, k, n) with batch x's other
        dimensions in order: weights[.., i, :] sums to 1 and is the soft indicator of the (i+1)-th largest entry, and
        values = weights @ x.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 3.3 (sorted top-k).

    Example:
        >>> import torch, couplings
        >>> x = torch.tensor([0.4, 0.7, 2.3, 1.9, -0.2, 1.4, 0.1])
        >>> values, weights = couplings.soft_topk(x, 2, largest=False, epsilon=0.001)
        >>> values.round(decimals=2), weights.argmax(-1)
        (tensor([-0.2000,  0.1000]), tensor([4, 6]))
    """
    dim = _check_common(x, dim, epsilon, method, SORTED_METHODS, mask, generator)
    if isinstance(k, bool) or not isinstance(k, int):
        _checks.reject(
            "k",
            "an int",
            _checks.describe(k),
            "Only soft_topk_mask takes fractional and per-row k.",
            TypeError,
        )
    if not 1 <= k <= x.shape[dim]:
        _checks.reject(
            "k",
            f"an int in [1, {x.shape[dim]}], the size of dim {dim}",
            k,
            "Raise k." if k < 1 else "Lower k.",
        )
    with full_precision(x):
        if mask is not None:
            mask = mask.expand(x.shape)
        rows = prepare(x, dim, largest, None, mask, standardize)
        indicators = _indicators(rows, k, method, generator)
        weights = _soften(
            lambda: _hard_indicators(rows, k),
            indicators,
            _row_epsilon(epsilon, method, rows.x, dim),
            hard,
            rows,
        )
        # measured from the hard values: the gradient of W @ x cancels between neighbours that nearly tie
        hard_values = (
            rows.x.detach().masked_fill(~rows.mask, -math.inf) if rows.mask is not None else rows.x.detach()
        )
        hard_values = hard_values.topk(k, dim=-1).values.unsqueeze(-1)
        hard_values = hard_values.masked_fill(hard_values.isinf(), 0)
        values = apply(WeightedValues, weights, rows.x, hard_values) + hard_values.squeeze(-1)
        if rows.unit is not None:
            values = values * rows.unit
        if not largest:
            values = -values
        return values.to(x.dtype).movedim(-1, dim), weights.to(x.dtype)


def _indicators(
    rows: Rows, k: int, method: str, generator: torch.Generator | None
) -> Callable[[Real], Tensor]:
    if method == "transport":
        return partial(entropic.indicators, rows, k)
    if method == "neuralsort":
        return partial(neuralsort.indicators, rows, k)
    return partial(successive.indicators, rows, k, noisy=method == "gumbel", generator=generator)


def _summed(indicators: Callable[[Real], Tensor]) -> Callable[[Real], Tensor]:
    """The mask of sorted indicators: each entry's parts added up."""
    return lambda epsilon: indicators(epsilon).sum(-2)


def _soften(
    discrete: Callable[[], Tensor],
    soft: Callable[[Real], Tensor],
    epsilon: Real,
    straight_through: bool,
    rows: Rows,
) -> Tensor:
    """The soft answer, the discrete one at epsilon = 0, or the discrete one with the soft gradient."""
    if not isinstance(epsilon, Tensor) and epsilon == 0:
        exact = discrete()
        link = (0 * rows.x).sum(-1, keepdim=True)  # a zero gradient rather than none; NaN rows stay NaN
        return exact + (link if exact.dim() == link.dim() else link.unsqueeze(-2))
    relaxed = soft(epsilon)
    if not straight_through:
        return relaxed
    return discrete() + (relaxed - relaxed.detach())


def _hard_mask(rows: Rows, k: int | Tensor) -> Tensor:
    cut = hard_cut(rows.x, entropic.cut_mass(rows, k), rows.weights, rows.mask)
    plan = torch.zeros_like(rows.x).scatter(-1, cut.head, cut.share)
    return plan if rows.mask is None else plan.masked_fill(~rows.mask, 0)


def _hard_indicators(rows: Rows, k: int) -> Tensor:
    x = rows.x.detach()
    if rows.mask is not None:
        x = x.masked_fill(~rows.mask, -math.inf)
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k].unsqueeze(-1)
    plan = x.new_zeros((*x.shape[:-1], k, x.shape[-1])).scatter(-1, order, 1.0)
    if rows.mask is None:
        return plan
    live = torch.arange(k, device=x.device).unsqueeze(-1) < rows.valid_count.unsqueeze(-1)
    return plan * live


def _check_common(
    x: Tensor,
    dim: int,
    epsilon: float | Tensor | None,
    method: str,
    methods: tuple[str, ...],
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> int:
    _checks.real_tensor("x", x)
    dim = _checks.dimension("dim", dim, x.dim())
    if x.shape[dim] == 0:
        _checks.reject(
            "x", f"at least one entry along dim {dim}", f"shape {tuple(x.shape)}", "Drop the empty rows."
        )
    _checks.choice("method", method, methods)
    if generator is not None and method not in RANDOM_METHODS:
        _checks.reject("generator", "None unless the method is random", f"method={method!r}", "Drop it.")
    if isinstance(epsilon, Tensor):
        _checks.real_tensor("epsilon", epsilon)
        _checks.same_device("epsilon", epsilon, x)
        _checks.broadcastable(
            "epsilon", epsilon, (*x.shape[:dim], *x.shape[dim + 1 :]), "one value per row, or a scalar"
        )
        if seen(~(epsilon > 0)):
            _checks.reject(
                "epsilon", "positive values in a tensor", "some that are not", "Pass 0 as a float."
            )
    elif epsilon is not None:
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            _checks.reject(
                "epsilon",
                "a float, a tensor or None",
                _checks.describe(epsilon),
                "Pass float(epsilon).",
                TypeError,
            )
        if not 0 <= epsilon < math.inf:
            _checks.reject("epsilon", "a finite number >= 0", epsilon, "0 is the exact discrete answer.")
    if mask is not None:
        _checks.bool_tensor("mask", mask)
        _checks.same_device("mask", mask, x)
        _checks.broadcastable("mask", mask, x.shape, "the shape of x")
    return dim


def _check_k(k: int | float | Tensor, n: int, batch: tuple[int, ...], x: Tensor) -> int | Tensor:
    """An int, or a float tensor (*batch, 1)."""
    if isinstance(k, Tensor):
        if k.dtype == torch.bool or k.is_complex():
            _checks.reject("k", "numbers", _checks.describe(k), "Pass an int or float tensor.", TypeError)
        _checks.same_device("k", k, x)
        _checks.broadcastable("k", k, batch, "one k per row: x's shape without dim")
        if seen(~((k >= 0) & (k <= n))):
            _checks.reject("k", f"values in [0, {n}], the size of dim", "some outside", "Clamp k.")
        return k.expand(batch).unsqueeze(-1)
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        _checks.reject("k", "an int, a float or a tensor", _checks.describe(k), "Pass an int.", TypeError)
    if not 0 <= k <= n:
        _checks.reject("k", f"a number in [0, {n}], the size of dim", k, "Raise k." if k < 0 else "Lower k.")
    if isinstance(k, int):
        return k
    return torch.full((*batch, 1), k, dtype=torch.float64, device=x.device)


def _check_weights(weights: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    _checks.real_tensor("weights", weights)
    _checks.same_dtype("weights", weights, x)
    _checks.same_device("weights", weights, x)
    _checks.broadcastable("weights", weights, x.shape, "the shape of x")
    bad = ~((weights >= 0) & (weights < math.inf))
    if seen(bad if mask is None else bad & mask):
        _checks.reject("weights", "finite values >= 0", "some that are not", "Clamp or mask them.")
    return weights.expand(x.shape)


def _row_epsilon(epsilon: float | Tensor | None, method: str, x: Tensor, dim: int) -> Real:
    """A float, or a tensor that broadcasts to (*batch, 1)."""
    if epsilon is None:
        return DEFAULT_EPSILON[method]
    if isinstance(epsilon, Tensor):
        return epsilon.to(x.dtype).expand(x.shape[:-1]).unsqueeze(-1)
    return float(epsilon)
