"""``sinkhorn_normalize``: checks, dispatch between many small matrices and the general solver, and the verdict."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._checks import choice, describe, real_tensor, reject
from couplings._rowwise import apply, seen
from couplings.matching import small
from couplings.transport.api import BAR, solve


def sinkhorn_normalize(logits: Tensor, *, iterations: int | None = None, on_fail: str = "warn") -> Tensor:
    r"""The doubly stochastic matrix exp(logits + f + g): rows sum to 1, columns too, to a certificate.

    It is the entropic optimum: of all such matrices P the one with the largest <P, logits> minus sum P log P (Sinkhorn
    1964). Alternating row and column normalisation converges to it, but slowly: after 20 sweeps a row sum is wrong by
    more than 1e-2 in 14 % of random 4 x 4 matrices with logits of deviation 3, in 60 % at 6. Here it is solved by
    Newton's method, with the implicit gradient (``matching/normalize.md``); many small square matrices, as in routing
    and hyper-connections, have their own path. A constant added to a row or a column of logits changes nothing.

    Args:
        logits: (\*batch, n, m), any real floating dtype; half precision is solved in float32. -inf forbids a pair: it
            gets exactly 0 and no gradient. If n differs from m, rows sum to 1 and columns to n / m.
        iterations: None solves to the certificate: an L1 error of both marginals of at most 1e-9 n in float64 and 2e-6
            n in float32. A number makes exactly that many sweeps, rows first, so that the columns' sums are exact,
            with the gradient of the unrolled sweeps; nothing is then said about the error.
        on_fail: "warn", "raise" or "ignore" where a matrix is not solved to the certificate; it acts on the CPU in
            eager mode.

    Returns:
        (\*batch, n, m) in the dtype of logits. A matrix with NaN or +inf in it, or a row or column without an allowed
        pair, is NaN, and no other is; so is an n x n one, n <= 8, whose allowed pairs admit no assignment of all rows.
        An allowed pair that is in no assignment gets 0, which is the limit of the sweeps.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or option.
        RuntimeError: ``on_fail="raise"`` and a matrix is not solved to the certificate.

    Example:
        >>> import torch
        >>> plan = sinkhorn_normalize(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> plan
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """
    real_tensor("logits", logits)
    if logits.dim() < 2 or 0 in logits.shape[-2:]:
        reject(
            "logits", "shape (*batch, n, m), n and m >= 1", describe(logits), "Add the missing dimensions."
        )
    choice("on_fail", on_fail, ("warn", "raise", "ignore"))
    check_iterations(iterations)
    n, m = logits.shape[-2:]
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    plan: Tensor
    with full_precision(logits):
        if logits.shape[:-2].numel() == 0:
            return logits * 1.0  # no matrix: nothing to solve, and the graph stays whole
        if iterations is None and n == m <= small.LARGEST:
            plan, residual = apply(small.SmallPlan, logits.to(work))
        else:
            plan, residual = _general(logits, iterations)
        failed = ~(residual <= BAR[work] * n)
        if iterations is None and on_fail != "ignore" and seen(failed):
            _report(failed, residual, on_fail)
        return plan.to(logits.dtype)


def check_iterations(iterations: object) -> None:
    """None or a positive number of sweeps."""
    if iterations is None:
        return
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        reject("iterations", "an int or None", describe(iterations), "Pass an int.", TypeError)
    if iterations < 1:
        reject("iterations", "at least 1", iterations, "Pass a positive number of sweeps, or None.")


def _general(logits: Tensor, iterations: int | None) -> tuple[Tensor, Tensor]:
    """By ``solve``, in float64 after the largest entries are subtracted: offsets would cost it accuracy and steps."""
    n, m = logits.shape[-2:]
    cost = -logits.to(torch.float64)
    for dim in (-1, -2) if iterations is None else ():
        least = cost.detach().amin(dim, keepdim=True)
        cost = cost - torch.where(least.isfinite(), least, 0.0)
    a = torch.ones(n, dtype=cost.dtype, device=cost.device)
    b = torch.full((m,), n / m, dtype=cost.dtype, device=cost.device)
    solver = "auto" if iterations is None else "sinkhorn"
    coupling = solve(cost, a, b, epsilon=1.0, solver=solver, iterations=iterations, on_fail="ignore")
    plan = coupling.plan()
    # the certificate of an item without a plan is that of the zeros that stood in for it
    return plan, torch.where(plan.detach().isnan().any(-1).any(-1), torch.nan, coupling.residual)


def _report(failed: Tensor, residual: Tensor, on_fail: str) -> None:
    """Say how many matrices failed, and how the first one did."""
    first = int(failed.reshape(-1).to(torch.int8).argmax())
    error = float(residual.reshape(-1)[first])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), failed.shape))
    which = f"matrix {index}" if failed.dim() else "the matrix"
    if error == error:
        remedy = "Divide the logits by a temperature, pass float64, or allow more pairs."
        how = f"has a marginal error of {error:.1e}. {remedy}"
    else:
        how = "is NaN. Look in it for NaN and +inf, and for rows and columns without an allowed partner."
    message = (
        f"sinkhorn_normalize: {int(failed.sum())} of {failed.numel()} matrices are not solved; {which} {how}"
    )
    if on_fail == "raise":
        raise RuntimeError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)
