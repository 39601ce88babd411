"""``match_with_dustbin`` and ``log_optimal_transport``: checks, preparation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from couplings import _checks
from couplings._autocast import full_precision
from couplings._rowwise import seen
from couplings.matching.dual_softmax import dual_softmax
from couplings.matching.dustbin import Bordered, bordered
from couplings.transport import Coupling, Status, act_on_failure, solve
from couplings.transport.api import log_plan_after, positive

METHODS = ("transport", "dual_softmax")
Dustbin = float | Tensor | Sequence[float | Tensor]
"""One score for all dustbins, one per problem, or a pair: one per row and one per column."""


def match_with_dustbin(
    scores: Tensor,
    dustbin: Dustbin,
    *,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    method: str = "transport",
    iterations: int | None = None,
    epsilon: float | Tensor = 1.0,
    tolerance: float | None = None,
    on_fail: str = "warn",
) -> Coupling:
    r"""Soft matching of rows to columns in which either may stay unmatched: transport with dustbins.

    The scores get one more row and one more column, the dustbins. The plan maximises ``<P, scores>`` plus epsilon times
    its entropy, with mass 1 for every valid row and column, and for a dustbin as much as there is on the other side
    (Sarlin et al., SuperGlue, CVPR 2020, section 3.2). If the matched mass is p, the four blocks of the plan hold
    p, N - p, M - p and p. The default solver stops at a certificate, not at a number of sweeps, and the gradient is
    implicit.

    Args:
        scores: (\*batch, N, M), any real floating dtype; half precision is solved in float32. -inf forbids a pair. N or
            M may be 0.
        dustbin: score of staying unmatched, in the units of scores: a float or a tensor that broadcasts to batch, for
            all dustbins and their corner, as published; a pair is then worth matching where its score exceeds it. Or
            a pair (r, c), floats or tensors that broadcast to (\*batch, N) and (\*batch, M): row i and column j are
            worth matching where their score exceeds r_i + c_j (the corner's score is 0), so that one score alpha for
            all is the pair (alpha / 2, alpha / 2). -inf in r or c: that row or column must be matched. Usually learned.
        row_mask: (\*batch, N) bool or broadcastable, True = takes part. A masked row has zero plan (-inf in
            ``log_plan``) and zero gradient, and is not counted in any marginal: the answer is that of the unpadded
            problem. Without a valid row every column goes to its dustbin.
        column_mask: (\*batch, M), likewise.
        method: "transport"; or "dual_softmax" (Sun et al., LoFTR, CVPR 2021; with dustbins as in Lindenberger et al.,
            LightGlue, ICCV 2023): the product of both softmaxes and of the matchabilities sigmoid(-dustbin / epsilon),
            a closed form whose marginals are whatever they come to. ``dustbin=-inf`` leaves the matchabilities out; one
            score for all is every row's and every column's.
        iterations: None solves to the certificate. A number makes exactly that many Sinkhorn sweeps, rows first, with
            the gradient of the unrolled sweeps.
        epsilon: regularisation in the units of scores, positive: a float, or a tensor that broadcasts to batch.
        tolerance: as in ``solve``, relative to the total mass N + M: a looser one is quicker.
        on_fail: as in ``solve``: "warn", "raise" or "ignore" where a problem is not solved to its tolerance. With
            ``iterations`` nothing is said: who asks for 20 sweeps knows that they are 20; the residual is to be read.

    Returns:
        A ``Coupling`` of shape (\*batch, N + 1, M + 1), the dustbins last, in the dtype of scores.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device, range or name.
        RuntimeError: ``on_fail="raise"`` and a problem was not solved.

    Example:
        >>> import torch, couplings as cp
        >>> scores = torch.tensor([[8.0, 0.0], [0.0, 0.0], [0.0, 9.0]])
        >>> coupling = cp.match_with_dustbin(scores, 2.0)
        >>> coupling.plan()[:, -1].round(decimals=1)  # the second row stays unmatched, the corner balances
        tensor([0.1000, 1.0000, 0.0000, 1.9000])
    """
    rows, columns, corner = _check_metadata(scores, dustbin, row_mask, column_mask)
    _checks.choice("method", method, METHODS)
    _checks.choice("on_fail", on_fail, ("warn", "raise", "ignore"))
    if tolerance is not None:
        positive("tolerance", tolerance, "Pass a positive relative residual, or None.")
    work = scores.dtype if scores.dtype == torch.float64 else torch.float32
    with full_precision(scores):
        problem = _bordered(scores, rows, columns, corner, row_mask, column_mask)
        if method == "dual_softmax":
            if iterations is not None:
                _checks.reject(
                    "iterations", f"None with method={method!r}", iterations, "It has a closed form."
                )
            _check_epsilon(epsilon, scores)
            coupling = dual_softmax(problem, epsilon, work, scores.dtype)
            if seen(coupling.status != Status.CONVERGED):
                act_on_failure(coupling, on_fail)
            return coupling
        coupling = solve(
            problem.scores.neg_(),  # in place: they are ours
            problem.a,
            problem.b,
            epsilon=epsilon,
            solver="auto" if iterations is None else "sinkhorn",
            iterations=iterations,
            tolerance=tolerance,
            row_mask=None if row_mask is None else problem.rows,
            column_mask=None if column_mask is None else problem.columns,
            on_fail=on_fail if iterations is None else "ignore",
        )
    return coupling.returned_in(scores.dtype)


def log_optimal_transport(scores: Tensor, alpha: float | Tensor, iters: int | None) -> Tensor:
    r"""The dustbin layer under its published signature: the logarithm of the plan.

    It replaces the function of that name in matching networks by a change of import, with the same answer for the same
    number of sweeps; ``iters=None`` solves to the certificate instead, which costs less than 100 sweeps and leaves no
    row sums wrong. For masks, a dustbin per keypoint or the certificate itself see ``match_with_dustbin``.

    Args:
        scores: (B, N, M), or any batch shape. Half precision is computed in float32.
        alpha: the dustbins' score, a float or a tensor that broadcasts to the batch shape.
        iters: number of Sinkhorn sweeps, at least 1, differentiated as unrolled; or None.

    Returns:
        (B, N + 1, M + 1), with total mass N + M (the normalisation log(N + M) undone), in the dtype of scores.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Sarlin et al.: SuperGlue: Learning Feature Matching with Graph Neural Networks, CVPR 2020.

    Example:
        >>> import torch, couplings as cp
        >>> log_plan = cp.log_optimal_transport(torch.zeros(1, 3, 2), torch.tensor(1.0), 100)
        >>> log_plan.exp().sum((-1, -2)).round(decimals=4)
        tensor([5.])
    """
    if isinstance(alpha, Sequence):
        _checks.reject("alpha", "one score", _checks.describe(alpha), "Use match_with_dustbin.", TypeError)
    if iters is not None:
        if isinstance(iters, bool) or not isinstance(iters, int):
            _checks.reject("iters", "an int or None", _checks.describe(iters), "Pass an int.", TypeError)
        if iters < 1:
            _checks.reject("iters", "at least 1", iters, "None solves to the certificate.")
        rows, columns, corner = _check_metadata(scores, alpha, None, None)
        with full_precision(scores):
            problem = _bordered(scores, rows, columns, corner, None, None)
            return log_plan_after(problem.scores.neg_(), problem.a, problem.b, iters).to(scores.dtype)
    return match_with_dustbin(scores, alpha).log_plan()


def _check_metadata(
    scores: Tensor, dustbin: Dustbin, row_mask: Tensor | None, column_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks; returns the dustbin scores of rows, columns and the corner, ready to be expanded."""
    _checks.real_tensor("scores", scores)
    if scores.dim() < 2:
        _checks.reject(
            "scores", "shape (*batch, N, M)", _checks.describe(scores), "Add the missing dimensions."
        )
    batch, (n, m) = scores.shape[:-2], scores.shape[-2:]
    for name, mask, size in (("row_mask", row_mask, n), ("column_mask", column_mask, m)):
        if mask is not None:
            _checks.bool_tensor(name, mask)
            _checks.same_device(name, mask, scores, "scores")
            _checks.broadcastable(name, mask, (*batch, size), "one flag per row or column")
    if isinstance(dustbin, bool) or not isinstance(dustbin, (int, float, Tensor, tuple, list)):
        _checks.reject(
            "dustbin",
            "a number, a tensor, or a pair of tensors",
            _checks.describe(dustbin),
            "Pass one score for all, or (rows, columns).",
            TypeError,
        )
    if isinstance(dustbin, (int, float)):
        one = scores.new_full((), float(dustbin), dtype=torch.float64)
        return one, one, one
    if isinstance(dustbin, Tensor):
        _check_dustbin("dustbin", dustbin, scores, batch, "one score per problem; a pair is one per keypoint")
        return dustbin[..., None], dustbin[..., None], dustbin[..., None]
    if len(dustbin) != 2:
        _checks.reject(
            "dustbin",
            "a pair",
            f"{len(dustbin)} items",
            "Pass (rows, columns), (*batch, N) and (*batch, M).",
        )
    rows, columns = (_as_score(part, scores) for part in dustbin)
    _check_dustbin("dustbin[0]", rows, scores, (*batch, n), "one score per row")
    _check_dustbin("dustbin[1]", columns, scores, (*batch, m), "one score per column")
    return rows, columns, scores.new_zeros(())


def _bordered(
    scores: Tensor,
    rows: Tensor,
    columns: Tensor,
    corner: Tensor,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
) -> Bordered:
    """With all scores expanded, in the precision that is worked in."""
    work = scores.dtype if scores.dtype == torch.float64 else torch.float32
    batch, (n, m) = scores.shape[:-2], scores.shape[-2:]
    return bordered(
        scores.to(work),
        rows.to(device=scores.device, dtype=work).expand(*batch, n),
        columns.to(device=scores.device, dtype=work).expand(*batch, m),
        corner.to(device=scores.device, dtype=work).expand(*batch, 1),
        row_mask,
        column_mask,
    )


def _as_score(part: float | Tensor, scores: Tensor) -> Tensor:
    """A number as a tensor; anything else is for the checks."""
    if isinstance(part, (Tensor, bool)) or not isinstance(part, (int, float)):
        return part
    return scores.new_full((), float(part), dtype=torch.float64)


def _check_epsilon(epsilon: float | Tensor, scores: Tensor) -> None:
    if isinstance(epsilon, Tensor):
        _checks.real_tensor("epsilon", epsilon)
        _checks.broadcastable("epsilon", epsilon, scores.shape[:-2], "one epsilon per problem")
        if seen(~(epsilon > 0)):
            _checks.reject("epsilon", "positive values", float(epsilon.min()), "Pass epsilon > 0.")
    else:
        positive("epsilon", epsilon, "Pass epsilon > 0.")


def _check_dustbin(name: str, value: Tensor, scores: Tensor, shape: Sequence[int], meaning: str) -> None:
    _checks.real_tensor(name, value)
    if value.dim() > 0:
        _checks.same_device(name, value, scores, "scores")
    _checks.broadcastable(name, value, shape, meaning)
