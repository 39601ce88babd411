"""Validation, dispatch and documentation of the ordering operators; the mathematics is in the files beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from couplings import _checks
from couplings._autocast import full_precision
from couplings._rowwise import seen
from couplings.ordering import entropic
from couplings.ordering.entropic import Targets
from couplings.ordering.methods import METHODS, NAMES, RANDOM, with_options
from couplings.ordering.rows import Real, Rows, prepare
from couplings.transport.moments import LARGEST
from couplings.transport.ordered import OrderCertificate as OrderCertificate


def soft_sort(
    x: Tensor,
    *,
    dim: int = -1,
    descending: bool = False,
    epsilon: float | Tensor | None = None,
    method: str = "transport",
    variant: str | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    num_targets: int | None = None,
    targets: Tensor | None = None,
    target_weights: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Soft sorted values of each row.

    The default is the entropic transport plan P between the scores and m rising targets (Cuturi, Teboul and Vert,
    NeurIPS 2019): S_j = sum_i P_ij x_i / b_j, solved to a certificate in time linear in n.

    Args:
        x: (\*batch, n) scores, float64, float32, bfloat16 or float16.
        dim: the dimension that is sorted.
        descending: whether the largest comes first.
        epsilon: regularisation >= 0; a float, or a tensor that broadcasts to x's shape without ``dim``.
            ``transport``: in units of squared target distance, targets on [0, 1]. The other methods:
            in standard deviations of the row. 0 is the exact answer. None means 0.01 (``transport``), 0.1
            (``softsort``, ``sigmoid``, ``gaussian``, ``network``, ranks by ``projection``; its ``"kl"``: 1),
            1 (``neuralsort``) or 10 (sorted values by ``projection``).
        method: ``"transport"``; ``"projection"`` (Blondel et al. 2020); ``"neuralsort"`` (Grover et al. 2019);
            ``"softsort"`` (Prillo and Eisenschlos 2020); ``"network"`` (Petersen et al. 2021, 2022); and, for ranks
            only, ``"sigmoid"`` (Qin et al. 2008) and ``"gaussian"`` (SoftRank, Taylor et al. 2008).
        variant: of the method: projection ``"l2"``, ``"kl"``; neuralsort ``"deterministic"``, ``"stochastic"``;
            softsort ``"l1"``, ``"l2"``; network ``"bitonic_optimal"``, ``"odd_even_logistic"`` and the like, with swaps
            ``optimal``, ``cauchy``, ``reciprocal``, ``logistic``. None is the first one.
        weights: (\*batch, n), non-negative, of x's dtype, broadcast to x: masses of the entries.
        mask: bool, broadcast to x, True = takes part. With c valid entries the first c values are those of the
            unpadded row, the others 0.
        num_targets: m, how many values are wanted at even targets; None is n.
        targets: (m,) or (\*batch, m) rising places of the targets on the squashed scale, instead of even ones.
        target_weights: (m,) or (\*batch, m), positive: masses of the targets; None is uniform.
        squash: ``"logistic"`` (sigmoid(pi z / sqrt 3) of the standardised score), ``"arctan"`` or None.
        standardize: whether scores are measured in standard deviations of their row first.
        hard: the exact answer with the gradient of the soft one.
        p: the cost is \|x - y\|^p, p >= 1; 2 takes linear time, others the whole n x m plan.
        generator: the random source of ``variant="stochastic"``.

    Returns:
        x's shape with m in place of n at ``dim``, x's dtype, in units of x. A row with NaN or an infinite score is NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range, or that the method does not take; on an eager CPU
            also negative weights and targets that fall.

    Reference:
        Cuturi, Teboul and Vert, "Differentiable Ranks and Sorting using Optimal Transport", NeurIPS 2019, Algorithm 2.

    Example:
        >>> import torch, couplings
        >>> couplings.soft_sort(torch.tensor([3.0, 1.0, 2.0]), epsilon=1e-4)
        tensor([1., 2., 3.])
        >>> couplings.soft_sort(torch.tensor([3.0, 1.0, 2.0]), epsilon=10.0)
        tensor([1.9732, 2.0000, 2.0268])
    """
    call = _Call(
        x, dim, descending, epsilon, method, variant, weights, mask, standardize, squash, hard, p, generator
    )
    with full_precision(x):
        if method == "transport":
            place = call.targets(num_targets, targets, target_weights)
            out = call.values(place, call.rows.x.unsqueeze(-1)).squeeze(-1)
        else:
            call.refuse(num_targets=num_targets, targets=targets, target_weights=target_weights)
            out = call.relaxed(
                "sorted_values", lambda: call.exact_values(call.rows.x.unsqueeze(-1)).squeeze(-1)
            )
        return call.finish(-out if descending else out)


def soft_rank(
    x: Tensor,
    *,
    dim: int = -1,
    descending: bool = False,
    epsilon: float | Tensor | None = None,
    method: str = "transport",
    variant: str | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    num_targets: int | None = None,
    targets: Tensor | None = None,
    target_weights: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Soft ranks of the entries of each row, in [1, n].

    The default is the entropic transport plan P between the scores, of masses a, and rising targets, of masses b
    (Cuturi, Teboul and Vert, NeurIPS 2019): R_i = n sum_j P_ij (b_1 + .. + b_j) / a_i. Ranks keep the order of the
    scores, and equal scores have equal ranks.

    Args:
        x, dim, epsilon, weights, mask, squash, standardize, p, generator: as in ``soft_sort``.
        method, variant: likewise; here every method has its operator.
        num_targets, targets, target_weights: likewise.
        descending: whether the largest entry has rank 1 instead of n.
        hard: the exact ranks (ties: first index first) with the gradient of the soft ones.

    Returns:
        A tensor of x's shape and dtype, in [1, c] with c valid entries, 0 where masked. A row with NaN or an infinite
        score is NaN.

    Raises:
        TypeError, ValueError: as in ``soft_sort``.

    Reference:
        Cuturi, Teboul and Vert, "Differentiable Ranks and Sorting using Optimal Transport", NeurIPS 2019, Algorithm 2.

    Example:
        >>> import torch, couplings
        >>> couplings.soft_rank(torch.tensor([3.0, 1.0, 2.0]), epsilon=1e-4)
        tensor([3., 1., 2.])
    """
    call = _Call(
        x, dim, descending, epsilon, method, variant, weights, mask, standardize, squash, hard, p, generator
    )
    with full_precision(x):
        if method == "transport":
            place = call.targets(num_targets, targets, target_weights)
            out = call.ranks(place)
        else:
            call.refuse(num_targets=num_targets, targets=targets, target_weights=target_weights)
            out = call.relaxed("ranks", call.exact_ranks)
        return call.finish(out)


def soft_permutation(
    x: Tensor,
    *,
    dim: int = -1,
    descending: bool = False,
    epsilon: float | Tensor | None = None,
    method: str = "transport",
    variant: str | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    num_targets: int | None = None,
    targets: Tensor | None = None,
    target_weights: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The matrix that sorts softly: row j holds the soft indicator of the (j+1)-th entry in order.

    Args:
        x: (\*batch, n) scores.
        method, variant: as in ``soft_sort``; ``"projection"`` and ``"sigmoid"`` have no matrix.
        dim, descending, epsilon, weights, mask, squash, standardize, hard, p, generator: as in ``soft_sort``.
        num_targets, targets, target_weights: likewise.

    Returns:
        (\*batch, m, n), batch x's dimensions other than ``dim``; rows sum to 1, and with ``method="transport"`` without
        weights and milestones so do columns. Rows beyond the valid entries and masked columns are 0.

    Raises:
        TypeError, ValueError: as in ``soft_sort``.

    Example:
        >>> import torch, couplings
        >>> couplings.soft_permutation(torch.tensor([3.0, 1.0, 2.0]), epsilon=1e-4).round()
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])
    """
    call = _Call(
        x, dim, descending, epsilon, method, variant, weights, mask, standardize, squash, hard, p, generator
    )
    with full_precision(x):
        unit = torch.eye(call.rows.x.shape[-1], dtype=call.rows.x.dtype, device=x.device)
        unit = unit.expand(*call.rows.x.shape, -1)
        if mask is not None:
            unit = unit * call.rows.mask.unsqueeze(-1)  # type: ignore[union-attr]
        if method == "transport":
            out = call.values(call.targets(num_targets, targets, target_weights), unit, centre=False)
        else:
            call.refuse(num_targets=num_targets, targets=targets, target_weights=target_weights)
            out = call.relaxed("permutation", lambda: call.exact_values(unit))
        return out.to(x.dtype)


def soft_sort_by(
    keys: Tensor,
    values: Tensor,
    *,
    dim: int = -1,
    descending: bool = False,
    epsilon: float | Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    num_targets: int | None = None,
    targets: Tensor | None = None,
    target_weights: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
) -> Tensor:
    r"""Values in the soft order of their keys, in memory linear in n.

    Args:
        keys: (\*batch, n) scores. ``dim`` counts in keys.
        values: keys' shape, followed by any payload shape, in keys' dtype.
        dim, descending, epsilon, weights, mask, num_targets, targets, target_weights, squash, standardize, hard, p: as
            in ``soft_sort``.

    Returns:
        values' shape with m in place of n at ``dim``.

    Raises:
        TypeError, ValueError: as in ``soft_sort``.

    Example:
        >>> import torch, couplings
        >>> pairs = torch.tensor([[3.0, 30.0], [1.0, 10.0], [2.0, 20.0]])
        >>> couplings.soft_sort_by(torch.tensor([3.0, 1.0, 2.0]), pairs, epsilon=1e-4).round(decimals=3)
        tensor([[ 1., 10.],
                [ 2., 20.],
                [ 3., 30.]])
    """
    call = _Call(
        keys,
        dim,
        descending,
        epsilon,
        "transport",
        None,
        weights,
        mask,
        standardize,
        squash,
        hard,
        p,
        None,
        "keys",
    )
    _checks.real_tensor("values", values)
    _checks.same_dtype("values", values, keys, "keys")
    _checks.same_device("values", values, keys, "keys")
    if values.shape[: keys.dim()] != keys.shape:
        _checks.reject(
            "values",
            f"a shape that begins with that of keys, {tuple(keys.shape)}",
            _checks.describe(values),
            "Move the payload dimensions last.",
        )
    payload = values.shape[keys.dim() :]
    moved = values.reshape(*keys.shape, payload.numel()).movedim(call.dim, -2).to(call.rows.x.dtype)
    if call.rows.mask is not None:
        moved = moved.masked_fill(~call.rows.mask.unsqueeze(-1), 0)
    with full_precision(keys):
        out = call.values(call.targets(num_targets, targets, target_weights), moved)
    return (
        out.to(values.dtype)
        .movedim(-2, call.dim)
        .reshape(*keys.shape[: call.dim], out.shape[-2], *keys.shape[call.dim + 1 :], *payload)
    )


def soft_quantile(
    x: Tensor,
    q: float | Sequence[float] | Tensor,
    *,
    dim: int = -1,
    epsilon: float | Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
) -> Tensor:
    r"""Soft quantiles of each row.

    Each is the middle one of three soft sorted values: with c valid entries and h = q (c - 1), targets 0, 1/2, 1 of
    masses h, 1 and c - 1 - h, over c. Time linear in n.

    Args:
        x: (\*batch, n) scores.
        q: levels in [0, 1]: a number, or several in a list or a one-dimensional tensor.
        dim, epsilon, weights, mask, squash, standardize, p: as in ``soft_sort``.
        hard: the exact quantile with the gradient of the soft one.

    Returns:
        x's shape without ``dim``; several q come first, as in ``torch.quantile``. ``epsilon=0`` is
        ``torch.quantile(x, q, interpolation="linear")``. A row without valid entries gives 0.

    Raises:
        TypeError, ValueError: as in ``soft_sort``.

    Example:
        >>> import torch, couplings
        >>> couplings.soft_quantile(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), [0.25, 0.5], epsilon=0)
        tensor([2., 3.])
    """
    call = _Call(x, dim, False, epsilon, "transport", None, weights, mask, standardize, squash, hard, p, None)
    if isinstance(q, Tensor):
        _checks.real_tensor("q", q)
    elif not all(isinstance(level, (int, float)) for level in (q if isinstance(q, (list, tuple)) else (q,))):
        _checks.reject("q", "a number, several or a tensor", _checks.describe(q), "Pass 0.5.", TypeError)
    levels = torch.as_tensor(q, dtype=torch.float64, device=x.device)
    if levels.dim() > 1 or not levels.numel():
        _checks.reject("q", "a number, or one dimension of them", _checks.describe(q), "Flatten q.")
    if seen(~((levels >= 0) & (levels <= 1))):
        _checks.reject("q", "levels in [0, 1]", "some outside", "Divide percentages by 100.")
    with full_precision(x):
        out = torch.stack([call.quantile(level) for level in levels.reshape(-1)])
    return (out if levels.dim() else out[0]).to(x.dtype)


def soft_median(
    x: Tensor,
    *,
    dim: int = -1,
    epsilon: float | Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
) -> Tensor:
    r"""Soft median of each row: ``soft_quantile`` at 1/2; the mean of the middle two where n is even and epsilon is 0.

    Args:
        x, dim, epsilon, weights, mask, squash, standardize, hard, p: as in ``soft_quantile``.

    Returns:
        x's shape without ``dim``.

    Example:
        >>> import torch, couplings
        >>> couplings.soft_median(torch.tensor([3.0, 1.0, 2.0]), epsilon=1e-4)
        tensor(2.)
    """
    return soft_quantile(
        x,
        0.5,
        dim=dim,
        epsilon=epsilon,
        weights=weights,
        mask=mask,
        squash=squash,
        standardize=standardize,
        hard=hard,
        p=p,
    )


def quantile_normalize(
    x: Tensor,
    targets: Tensor,
    *,
    dim: int = -1,
    epsilon: float | Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
) -> Tensor:
    r"""Map each row onto a target distribution, in order: the soft form of replacing x by the target of its rank.

    Args:
        x: (\*batch, n) scores.
        targets: (m,) or (\*batch, m) values of the target distribution in any order, in x's dtype; batch are x's
            dimensions other than ``dim``.
        dim, epsilon, weights, mask, squash, standardize, p: as in ``soft_sort``.
        hard: the exact map with the gradient of the soft one.

    Returns:
        A tensor of x's shape; 0 where masked. Differentiable in x and in targets.

    Raises:
        TypeError, ValueError: as in ``soft_sort``.

    Example:
        >>> import torch, couplings
        >>> couplings.quantile_normalize(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 10.0, 20.0]), epsilon=1e-4)
        tensor([20.,  0., 10.])
    """
    call = _Call(x, dim, False, epsilon, "transport", None, weights, mask, standardize, squash, hard, p, None)
    levels = call.row_of_targets("targets", targets)
    _checks.same_dtype("targets", targets, x)
    levels = levels.double().sort(dim=-1).values
    with full_precision(x):
        even = entropic.even_targets(call.rows, levels.shape[-1])
        return call.finish(call.averages(even, lambda: levels))


def soft_quantize(
    x: Tensor,
    levels: int,
    *,
    dim: int = -1,
    epsilon: float | Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    hard: bool = False,
    p: float = 2.0,
) -> Tensor:
    r"""Round each entry softly to one of ``levels`` values of its row, each shared by equally many entries.

    The levels are the ``levels`` soft sorted values of the row; each entry becomes their mean under its row of
    the plan.

    Args:
        x: (\*batch, n) scores.
        levels: their number, at least 1.
        dim, epsilon, weights, mask, squash, standardize, p: as in ``soft_sort``.
        hard: the exact levels with the gradient of the soft ones.

    Returns:
        A tensor of x's shape; 0 where masked.

    Raises:
        TypeError, ValueError: as in ``soft_sort``.

    Example:
        >>> import torch, couplings
        >>> couplings.soft_quantize(torch.tensor([1.0, 9.0, 2.0, 8.0]), 2, epsilon=0)
        tensor([1.5000, 8.5000, 1.5000, 8.5000])
    """
    call = _Call(x, dim, False, epsilon, "transport", None, weights, mask, standardize, squash, hard, p, None)
    if levels is None:
        _checks.reject("levels", "an int", "None", "Pass a positive int.", TypeError)
    with full_precision(x):
        place = call.targets(levels, None, None, "levels")
        return call.finish(call.quantized(place))


def order_certificate(
    x: Tensor,
    *,
    dim: int = -1,
    descending: bool = False,
    epsilon: float | Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    num_targets: int | None = None,
    targets: Tensor | None = None,
    target_weights: Tensor | None = None,
    squash: str | None = "logistic",
    standardize: bool = True,
    p: float = 2.0,
    samples: int = 64,
) -> OrderCertificate:
    r"""How exact the plan is that ``soft_sort``, ``soft_rank`` and the others use for the same arguments.

    The residual is measured, not assumed: the marginals of ``samples`` entries and targets, evenly in mass, are summed
    up over all targets and entries. Time O(samples (n + m)).

    Args:
        x, dim, descending, epsilon, weights, mask, num_targets, targets, target_weights, squash, standardize, p: as in
            ``soft_sort``; epsilon must be positive.
        samples: how many entries and how many targets.

    Returns:
        An ``OrderCertificate``; every field has x's shape without ``dim``. A row with NaN is NaN.

    Raises:
        TypeError, ValueError: as in ``soft_sort``.

    Example:
        >>> import torch, couplings
        >>> certificate = couplings.order_certificate(torch.linspace(-1, 1, 5000).sin(), epsilon=1e-3)
        >>> bool(certificate.residual < 2e-6)
        True
    """
    call = _Call(
        x, dim, descending, epsilon, "transport", None, weights, mask, standardize, squash, False, p, None
    )
    if call.epsilon == 0:
        _checks.reject("epsilon", "a positive number", 0, "At 0 the answer is exact by sorting.")
    if samples < 1:
        _checks.reject("samples", "at least 1", samples, "Pass a positive int.")
    with full_precision(x), torch.no_grad():
        place = call.targets(num_targets, targets, target_weights)
        return entropic.certificate(call.rows, call.epsilon, place, squash, p, samples)


def _valid(value: Tensor, good: Tensor, name: str, expected: str) -> Tensor:
    """``value``, refused if part of it is not good; NaN there where nobody may look."""
    bad = seen(~good)
    if bad:
        _checks.reject(name, expected, "some that are not", _REMEDY[name])
    return torch.where(good, value, math.nan) if bad is None else value


_REMEDY = {
    "weights": "Clamp or mask them.",
    "epsilon": "Pass 0 as a float.",
    "targets": "Sort them, with their weights.",
    "target_weights": "Drop such targets.",
}


class _Call:
    """The arguments that all operators share, checked, and the row problems that they make."""

    def __init__(
        self,
        x: Tensor,
        dim: int,
        descending: bool,
        epsilon: float | Tensor | None,
        method: str,
        variant: str | None,
        weights: Tensor | None,
        mask: Tensor | None,
        standardize: bool,
        squash: str | None,
        hard: bool,
        p: float,
        generator: torch.Generator | None,
        name: str = "x",
    ) -> None:
        _checks.real_tensor(name, x)
        if x.dim() == 0:
            _checks.reject(name, "at least one dimension", "a 0-dimensional tensor", "Reshape it to (1,).")
        self.dim = _checks.dimension("dim", dim, x.dim())
        if x.shape[self.dim] == 0:
            _checks.reject(
                name,
                f"at least one entry along dim {self.dim}",
                f"shape {tuple(x.shape)}",
                "Drop the empty rows.",
            )
        _checks.choice("method", method, NAMES)
        self.method, self.variant, self.hard, self.p = method, variant, hard, p
        self.options = self._options(variant, generator, descending)
        self.batch = (*x.shape[: self.dim], *x.shape[self.dim + 1 :])
        self.default_epsilon = epsilon is None
        self.epsilon = self._epsilon(epsilon, x)
        if mask is not None:
            _checks.bool_tensor("mask", mask)
            _checks.same_device("mask", mask, x, name)
            _checks.broadcastable("mask", mask, x.shape, f"the shape of {name}")
            mask = mask.expand(x.shape)
        if weights is not None:
            _checks.real_tensor("weights", weights)
            _checks.same_dtype("weights", weights, x, name)
            _checks.same_device("weights", weights, x, name)
            _checks.broadcastable("weights", weights, x.shape, f"the shape of {name}")
            good = (weights >= 0) & (weights < math.inf)
            good = good if mask is None else good | ~mask
            weights = _valid(weights.expand(x.shape), good, "weights", "finite values >= 0")
        entropic.check_squash(squash)
        self.squash = squash
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            _checks.reject("p", "a number >= 1", _checks.describe(p), "Pass a float.", TypeError)
        if not 1 <= p < math.inf:
            _checks.reject("p", "a number >= 1", _checks.describe(p), "The cost |x - y|^p must be convex.")
        self.dtype = x.dtype
        self.rows: Rows = prepare(x, self.dim, descending, weights, mask, standardize)

    def _options(
        self, variant: str | None, generator: torch.Generator | None, descending: bool
    ) -> dict[str, Any]:
        if self.method == "transport":
            if variant is not None:
                _checks.reject("variant", 'None with method="transport"', repr(variant), "Drop it.")
            options: dict[str, Any] = {}
        else:
            variants = METHODS[self.method].variants
            if variant is not None:
                _checks.choice("variant", variant, tuple(variants))
            options = variants[variant] if variant is not None else next(iter(variants.values()))
        if variant in RANDOM:
            # the scores are negated for descending order; the noise draws from the largest on all the same
            return {"noise": -options["noise"] if descending else options["noise"], "generator": generator}
        if generator is not None:
            _checks.reject("generator", "None unless the variant is random", "a generator", "Drop it.")
        return options

    def _epsilon(self, epsilon: float | Tensor | None, x: Tensor) -> Real:
        """A float, or a tensor (*batch, 1)."""
        if epsilon is None:
            return entropic.DEFAULT_EPSILON
        if isinstance(epsilon, Tensor):
            _checks.real_tensor("epsilon", epsilon)
            _checks.same_device("epsilon", epsilon, x)
            _checks.broadcastable("epsilon", epsilon, self.batch, "one value per row, or a scalar")
            epsilon = _valid(
                epsilon, (epsilon > 0) & (epsilon < math.inf), "epsilon", "positive finite values in a tensor"
            )
            work = torch.float32 if x.dtype in _checks.HALF else x.dtype
            return epsilon.to(work).expand(self.batch).unsqueeze(-1)
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
        return float(epsilon)

    def refuse(self, **given: object) -> None:
        """Arguments that only ``method="transport"`` takes."""
        for name, value in given.items():
            if value is not None:
                _checks.reject(
                    name, f"None with method={self.method!r}", "a value", 'Use method="transport".'
                )

    def row_of_targets(self, name: str, given: Tensor) -> Tensor:
        """(m,) or (*batch, m), checked and spread over the rows."""
        _checks.real_tensor(name, given)
        _checks.same_device(name, given, self.rows.x)
        if given.dim() == 0 or not given.shape[-1]:
            _checks.reject(
                name, "(m,) or (*batch, m) with m >= 1", _checks.describe(given), "Pass one at least."
            )
        shape = (*self.batch, given.shape[-1])
        _checks.broadcastable(name, given, shape, "one row of targets per row of x")
        return given.expand(shape)

    def targets(
        self, count: int | None, places: Tensor | None, weights: Tensor | None, name: str = "num_targets"
    ) -> Targets:
        """The targets that were asked for."""
        if count is not None:
            if isinstance(count, bool) or not isinstance(count, int):
                _checks.reject(name, "an int", _checks.describe(count), "Pass a positive int.", TypeError)
            if count < 1:
                _checks.reject(name, "at least 1", count, "Pass a positive int.")
        y = None if places is None else self.row_of_targets("targets", places).double()
        b = None if weights is None else self.row_of_targets("target_weights", weights).double()
        for one, other, names in ((y, b, "targets"), (y, count, "targets"), (b, count, "target_weights")):
            size = other if isinstance(other, int) else None if other is None else other.shape[-1]
            if one is not None and size is not None and one.shape[-1] != size:
                _checks.reject(
                    names, f"{size} entries", one.shape[-1], "Give targets, weights and num_targets alike."
                )
        if y is None and b is None:
            place = entropic.even_targets(self.rows, count)
        else:
            m = (y if y is not None else b).shape[-1]  # type: ignore[union-attr]
            even = entropic.even_targets(self.rows, m)
            if y is not None:
                y = _valid(y, y.isfinite(), "targets", "finite places")
                rising = (y.detach().diff(dim=-1) >= 0).all(-1, keepdim=True)
                y = _valid(y, rising, "targets", "rising places")
            if b is not None:
                b = _valid(b, (b > 0) & (b < math.inf), "target_weights", "positive finite values")
                b = b / b.sum(-1, keepdim=True)
            place = Targets(even.y if y is None else y, even.b if b is None else b, None, False)
        pairs = self.rows.x.shape[-1] * place.y.shape[-1]
        if self.p != 2 and self.epsilon != 0 and pairs > LARGEST:
            _checks.reject("p", f"2 for more than {LARGEST} pairs of entry and target", self.p, "Use p=2.")
        return place

    # the answers: soft, exact at epsilon = 0, or exact with the soft gradient

    def _choose(self, soft: Callable[[], Tensor], exact: Callable[[], Tensor]) -> Tensor:
        if not isinstance(self.epsilon, Tensor) and self.epsilon == 0:
            return self._nan_rows(exact())
        relaxed = soft() if self.rows.standardize else self._nan_rows(soft())
        return self._nan_rows(exact().detach()) + (relaxed - relaxed.detach()) if self.hard else relaxed

    def _nan_rows(self, exact: Tensor) -> Tensor:
        """Rows with NaN or infinite scores are NaN; and a zero gradient rather than none."""
        link = (0 * self.rows.x).sum(-1)
        return exact + link.reshape(*link.shape, *(1,) * (exact.dim() - link.dim())).to(exact.dtype)

    def ranks(self, place: Targets) -> Tensor:
        """Ranks, (*batch, n); 0 where masked."""
        rows = self.rows
        if place.even:  # an affine function of the target: its ends are enough
            m = place.y.shape[-1]
            ends = rows.x.new_tensor([1 / m, 1.0], dtype=torch.float64) * rows.count
        else:
            ends = None
        return self.averages(place, lambda: place.ranks(rows), ends)

    def averages(
        self, place: Targets, of_targets: Callable[[], Tensor], ends: Tensor | None = None
    ) -> Tensor:
        """E[of_targets_J | entry], (*batch, n); 0 where masked. ``ends``: (*batch, 2), if it is affine in even y."""
        rows = self.rows
        out = self._choose(
            lambda: entropic.solve(
                rows,
                self.epsilon,
                place,
                self.squash,
                self.p,
                of_targets() if ends is None else ends,
                None,
                ends is not None,
            )[0],
            lambda: entropic.exact_ranks(rows, place, of_targets()),
        )
        return self._clear(out.to(rows.x.dtype))

    def values(self, place: Targets, of_entries: Tensor, centre: bool = True) -> Tensor:
        """E[of_entries_I | target], (*batch, m, d); 0 at targets that a row lacks. ``centre``: digits far from 0."""

        def soft() -> Tensor:
            if not centre:
                return self._soft_values(place, of_entries)
            # In float64: the gradient sees values of one cluster by their differences, which float32 rounds away.
            entries = of_entries.double()
            total = entries.detach().sum(-2, keepdim=True)  # what is masked is 0
            middle = total / self.rows.count.unsqueeze(-1).clamp_min(1)
            away = entries - middle
            if self.rows.mask is not None:
                away = away.masked_fill(~self.rows.mask.unsqueeze(-1), 0)
            return self._soft_values(place, away) + middle

        out = self._choose(soft, lambda: entropic.exact_values(self.rows, place, of_entries))
        return place.clear(out.to(self.rows.x.dtype))

    def _soft_values(self, place: Targets, of_entries: Tensor) -> Tensor:
        return entropic.solve(self.rows, self.epsilon, place, self.squash, self.p, None, of_entries)[1]

    def quantized(self, place: Targets) -> Tensor:
        """E[S_J | entry], S the soft sorted values, (*batch, n); 0 where masked."""
        rows, x = self.rows, self.rows.x.unsqueeze(-1)

        def soft() -> Tensor:
            levels = self._soft_values(place, x).squeeze(-1)
            return entropic.solve(rows, self.epsilon, place, self.squash, self.p, levels, None)[0]

        def exact() -> Tensor:
            levels = entropic.exact_values(rows, place, x).squeeze(-1)
            return entropic.exact_ranks(rows, place, levels)

        return self._clear(self._choose(soft, exact).to(rows.x.dtype))

    def quantile(self, level: Tensor) -> Tensor:
        """One quantile of every row, (*batch,)."""
        count = self.rows.count.double()
        low = level * (count - 1).clamp_min(0)
        b = torch.cat((low, torch.ones_like(low), (count - 1 - low).clamp_min(0)), -1) / count.clamp_min(1)
        y = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, device=b.device).expand(*self.batch, 3)
        place = Targets(y, b, None, False)
        return self.values(place, self.rows.x.unsqueeze(-1))[..., 1, 0]

    def relaxed(self, name: str, exact: Callable[[], Tensor]) -> Tensor:
        """An operator of a method other than transport."""
        operator = getattr(METHODS[self.method], name)
        if operator is None:
            having = ", ".join(
                repr(key) for key, method in METHODS.items() if getattr(method, name) is not None
            )
            what = {"sorted_values": "sorted values", "permutation": "a matrix", "ranks": "ranks"}[name]
            _checks.reject(
                "method",
                f"one that defines {what}: 'transport', {having}",
                repr(self.method),
                "Pick one of these.",
            )
        if self.default_epsilon:
            defaults = METHODS[self.method].epsilon
            self.epsilon = defaults.get(f"{name} {self.variant}", defaults[name])
        operator = with_options(operator, self.options)
        out = self._choose(lambda: operator(self.rows, self.epsilon), exact)
        return out.to(self.rows.x.dtype)

    def exact_ranks(self) -> Tensor:
        """Ranks at epsilon = 0."""
        place = entropic.even_targets(self.rows, None)
        return self._clear(entropic.exact_ranks(self.rows, place, place.ranks(self.rows)))

    def exact_values(self, of_entries: Tensor) -> Tensor:
        """Values in order at epsilon = 0."""
        place = entropic.even_targets(self.rows, None)
        return place.clear(entropic.exact_values(self.rows, place, of_entries))

    def _clear(self, out: Tensor) -> Tensor:
        return out if self.rows.mask is None else out.masked_fill(~self.rows.mask, 0)

    def finish(self, out: Tensor) -> Tensor:
        """Back in x's dtype and place."""
        return out.to(self.dtype).movedim(-1, self.dim)
