"""The result of a transport problem: the plan, its potentials, and the certificate that comes with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from couplings._checks import choice, describe, reject
from couplings._rowwise import extent


class Status(IntEnum):
    """How the solver ended, one value per batch item."""

    CONVERGED = 0  #: the residual is below the tolerance
    STALLED = 1  #: no step improves the residual any more, and it is above the tolerance
    MAX_ITERATIONS = 2  #: the iteration budget ran out
    INFEASIBLE = 3  #: no plan has these marginals; the item is NaN
    NONFINITE = 4  #: NaN or infinity in the item's input; the item is NaN


class Potentials(NamedTuple):
    """Dual potentials in cost units: ``P_ij = exp((f_i + g_j - C_ij) / epsilon)``."""

    f: Tensor
    g: Tensor


Lazy = Tensor | Callable[[], Tensor]

_TENSORS = ("a", "b", "epsilon", "residual", "iterations", "status")
_REMEDY = {
    Status.STALLED: "Raise epsilon or the tolerance, or solve in float64.",
    Status.MAX_ITERATIONS: "Raise epsilon, the tolerance or the number of iterations.",
    Status.INFEASIBLE: "Make the masses of a and b equal, and give every row an allowed column.",
    Status.NONFINITE: "Look for NaN or infinity in this item's cost or marginals.",
}


class Coupling:
    """A transport plan with its certificate.

    A solver builds it; a user reads it. Everything a loss may use (:meth:`plan`, :meth:`log_plan`,
    :meth:`apply`, :meth:`transpose_apply`, :attr:`value`, :attr:`potentials`) is differentiable; the
    certificate (:attr:`residual`, :attr:`gap`, :attr:`iterations`, :attr:`status`) is detached.

    Args:
        log_plan: ``log P`` ``(*batch, n, m)``, or a function without arguments that returns it.
        plan: ``P`` likewise, where it is cheaper or more exact than ``exp(log_plan)``.
        a: Row masses ``(*batch, n)``.
        b: Column masses ``(*batch, m)``.
        epsilon: Regularisation, a float or a tensor that broadcasts to ``batch``.
        potentials: The pair ``(f, g)``, ``(*batch, n)`` and ``(*batch, m)``, in cost units, or a
            function that returns it; None where no dual problem was solved.
        value: ``<P, C> + epsilon * sum P (log P - 1)`` ``(*batch,)``, or a function that returns it.
        residual: L1 error of both marginals of the returned plan ``(*batch,)``.
        gap: Duality gap of the plan rounded to exact marginals ``(*batch,)``, or a function likewise;
            None where nothing was minimised.
        iterations: Solver steps ``(*batch,)``, integer.
        status: :class:`Status` values ``(*batch,)``, integer.
        dtype: The dtype in which plans are returned; ``None`` keeps the solver's.

    At least one of ``log_plan`` and ``plan`` is needed.

    Example:
        >>> import torch
        >>> plan = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
        >>> half = torch.full((2,), 0.5)
        >>> zero = torch.zeros(())
        >>> coupling = Coupling(plan=plan, a=half, b=half, epsilon=1.0, potentials=(half, half), value=zero,
        ...     residual=zero, gap=zero, iterations=torch.tensor(0), status=torch.tensor(0))
        >>> coupling.apply(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 1.5000])
    """

    def __init__(
        self,
        *,
        log_plan: Lazy | None = None,
        plan: Lazy | None = None,
        a: Tensor,
        b: Tensor,
        epsilon: float | Tensor,
        potentials: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]] | None,
        value: Lazy,
        residual: Tensor,
        gap: Lazy | None,
        iterations: Tensor,
        status: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        if log_plan is None and plan is None:
            _force(None)
        self._log_plan = log_plan
        self._plan = plan
        self._value = value
        self._gap = gap
        self._dtype = dtype
        self.a = a
        self.b = b
        self.epsilon = epsilon
        self._potentials = potentials
        #: L1 error of both marginals, summed in float64 over the plan the solver returns ``(*batch,)``.
        self.residual = residual.detach()
        #: Solver steps per item ``(*batch,)``.
        self.iterations = iterations.detach()
        #: :class:`Status` per item ``(*batch,)``, an integer tensor.
        self.status = status.detach()

    # -- what a loss uses

    def plan(self) -> Tensor:
        """The plan ``P`` ``(*batch, n, m)``, in units of mass; recomputed at every call, never stored."""
        return self._cast(self._raw_plan())

    def log_plan(self) -> Tensor:
        """``log P`` ``(*batch, n, m)``; ``-inf`` where the plan is exactly zero."""
        if self._log_plan is None:
            plan = self._raw_plan()
            positive = plan > 0
            return self._cast(torch.where(positive, plan, 1).log().masked_fill(~positive, -torch.inf))
        return self._cast(_force(self._log_plan))

    def apply(self, v: Tensor) -> Tensor:
        """``P v``.

        Args:
            v: One value per column ``(*batch, m)``, or one vector per column ``(*batch, m, d)``.

        Returns:
            ``(*batch, n)`` or ``(*batch, n, d)``.

        Raises:
            ValueError: ``v`` does not have one entry per column.
        """
        return self._product("v", self._raw_plan(), v)

    def transpose_apply(self, u: Tensor) -> Tensor:
        """``P' u``.

        Args:
            u: One value per row ``(*batch, n)``, or one vector per row ``(*batch, n, d)``.

        Returns:
            ``(*batch, m)`` or ``(*batch, m, d)``.

        Raises:
            ValueError: ``u`` does not have one entry per row.
        """
        return self._product("u", self._raw_plan().mT, u)

    @property
    def potentials(self) -> Potentials:
        """``(f, g)`` in cost units; ``f`` is ``-inf`` where ``a`` is zero, likewise ``g``.

        They are defined up to a constant; the dense solvers choose ``<b, g> = 0``, so that the derivative of
        :attr:`value` with respect to ``a`` is ``f`` and with respect to ``b`` is ``g``, and return float64
        for every input: in float32 they would not determine the plan to its certified accuracy.
        """
        if self._potentials is None:
            _nothing("potentials")
        pair = self._potentials() if callable(self._potentials) else self._potentials
        return Potentials(*pair)

    @property
    def value(self) -> Tensor:
        """``<P, C> + epsilon * sum P (log P - 1)`` at the solution ``(*batch,)``, differentiable."""
        return self._cast(_force(self._value))

    # -- the certificate

    @property
    def gap(self) -> Tensor:
        """Duality gap ``(*batch,)`` of the plan rounded to exact marginals: a bound on the value's error."""
        if self._gap is None:
            _nothing("gap")
        return _force(self._gap).detach()

    def check(self) -> Coupling:
        """Return this coupling if every item converged, raise otherwise.

        On an accelerator this reads the status and thus waits for the device once.

        Raises:
            RuntimeError: Some item did not converge; the message names the item, its status and its residual.
        """
        message = self._failure()
        if message is not None:
            raise RuntimeError(message)
        return self

    def _failure(self) -> str | None:
        """One sentence on the items that did not converge, or None."""
        status = self.status.reshape(-1).cpu()
        failed = (status != Status.CONVERGED).nonzero()[:, 0].tolist()
        if not failed:
            return None
        residual = self.residual.reshape(-1).cpu()
        first = failed[0]
        code = Status(int(status[first]))
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), self.status.shape))
        where = f"item {index}" if self.status.dim() else "the problem"
        return (
            f"transport: {len(failed)} of {status.numel()} problems did not converge; {where} is {code.name} "
            f"with marginal residual {float(residual[first]):.1e}. {_REMEDY[code]}"
        )

    def returned_in(self, dtype: torch.dtype) -> Coupling:
        """This coupling, with plans, products and value cast to ``dtype``: for solving above the caller's precision."""
        other = object.__new__(Coupling)
        other.__dict__.update(self.__dict__)
        other._dtype, other.a, other.b = dtype, self.a.to(dtype), self.b.to(dtype)
        return other

    # -- plumbing

    def _raw_plan(self) -> Tensor:
        """The plan in the precision the solver returns it in."""
        if self._plan is not None:
            return _force(self._plan)
        return _force(self._log_plan).exp()

    def _product(self, name: str, plan: Tensor, vector: Tensor) -> Tensor:
        single = vector.dim() == plan.dim() - 1
        expected = plan.shape[:-2] + plan.shape[-1:]
        got = vector.shape if single else vector.shape[:-1]
        if vector.dim() not in (plan.dim() - 1, plan.dim()) or got != expected:
            reject(
                name,
                f"a tensor of shape {tuple(expected)} or {tuple(expected)} + (d,)",
                describe(vector),
                f"Expand {name} over the batch dimensions.",
            )
        dtype = torch.promote_types(plan.dtype, vector.dtype)
        matrix = vector.unsqueeze(-1) if single else vector
        out = plan.to(dtype) @ matrix.to(dtype)
        return self._cast(out.squeeze(-1) if single else out)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Pickling, copying and ``torch.save`` evaluate what is lazy and drop the graph."""
        state = {name: getattr(self, name) for name in _TENSORS}
        lazy = ("_log_plan", "_plan", "_value", "_gap")
        state |= {name: None if (x := getattr(self, name)) is None else _force(x) for name in lazy}
        state = {name: x.detach() if isinstance(x, Tensor) else x for name, x in state.items()}
        none = self._potentials is None
        state["_potentials"] = None if none else tuple(x.detach() for x in self.potentials)
        state["_dtype"] = self._dtype
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        shape = (*self.a.shape, self.b.shape[-1])
        measured = ""
        worst = extent(self.residual.detach())  # where looking is free
        if worst is not None:
            states = ", ".join(Status(s).name for s in sorted(set(self.status.flatten().tolist())))
            measured = f", {states}, residual={worst[1]:.1e}"
        return f"Coupling(shape={shape}, dtype={self._dtype or self.a.dtype}{measured})"


def act_on_failure(coupling: Coupling, on_fail: str) -> Coupling:
    """Warn or raise if some item did not converge; called where values can be read without waiting.

    Args:
        coupling: The result.
        on_fail: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Raises:
        RuntimeError: ``on_fail="raise"`` and some item did not converge.
    """
    choice("on_fail", on_fail, ("warn", "raise", "ignore"))
    if on_fail == "raise":
        return coupling.check()
    if on_fail == "warn":
        message = coupling._failure()
        if message is not None:
            warnings.warn(message, RuntimeWarning, stacklevel=3)
    return coupling


def _nothing(name: str) -> NoReturn:
    raise AttributeError(
        f"{name}: expected a transport plan, got the dual softmax, which minimises nothing. Pass method='transport'."
    )


def _force(lazy: Lazy | None) -> Tensor:
    if lazy is None:
        reject("plan", "log_plan or plan", "neither", "Pass at least one of them.")
    return lazy if isinstance(lazy, Tensor) else lazy()
