"""Sorts, ranks and quantiles as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from couplings.ordering import soft_permutation, soft_quantile, soft_rank, soft_sort


class _Ordering(nn.Module):
    """Settings shared by the ordering modules."""

    def __init__(
        self,
        *,
        dim: int = -1,
        descending: bool = False,
        epsilon: float | None = None,
        method: str = "transport",
        variant: str | None = None,
        num_targets: int | None = None,
        squash: str | None = "logistic",
        standardize: bool = True,
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.descending = descending
        self.epsilon = epsilon
        self.method = method
        self.variant = variant
        self.num_targets = num_targets
        self.squash = squash
        self.standardize = standardize
        self.hard = hard

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _settings(self) -> dict[str, Any]:
        names = ("dim", "descending", "epsilon", "method", "variant", "num_targets", "squash", "standardize")
        return {name: getattr(self, name) for name in (*names, "hard")}


class SoftSort(_Ordering):
    r"""``soft_sort`` as a module.

    Args:
        dim, descending, epsilon, method, variant, num_targets, squash, standardize, hard: as in
            ``couplings.soft_sort``.

    Example:
        >>> import torch
        >>> SoftSort(epsilon=1e-4)(torch.tensor([3.0, 1.0, 2.0]))
        tensor([1., 2., 3.])
    """

    def forward(self, x: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        r"""x (\*batch, n) -> (\*batch, m), in order."""
        return soft_sort(x, weights=weights, mask=mask, **self._settings())


class SoftRank(_Ordering):
    r"""``soft_rank`` as a module.

    Args:
        dim, descending, epsilon, method, variant, num_targets, squash, standardize, hard: as in
            ``couplings.soft_rank``.

    Example:
        >>> import torch
        >>> SoftRank(epsilon=1e-4)(torch.tensor([3.0, 1.0, 2.0]))
        tensor([3., 1., 2.])
    """

    def forward(self, x: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        r"""x (\*batch, n) -> (\*batch, n), ranks from 1."""
        return soft_rank(x, weights=weights, mask=mask, **self._settings())


class SoftPermutation(_Ordering):
    r"""``soft_permutation`` as a module.

    Args:
        dim, descending, epsilon, method, variant, num_targets, squash, standardize, hard: as in
            ``couplings.soft_permutation``.

    Example:
        >>> import torch
        >>> SoftPermutation(epsilon=1e-4)(torch.tensor([2.0, 1.0])).round()
        tensor([[0., 1.],
                [1., 0.]])
    """

    def forward(self, x: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        r"""x (\*batch, n) -> (\*batch, m, n), rows sum to 1."""
        return soft_permutation(x, weights=weights, mask=mask, **self._settings())


class SoftQuantile(nn.Module):
    r"""``soft_quantile`` as a module.

    Args:
        q: levels in [0, 1], a number or several.
        dim, epsilon, squash, standardize, hard: as in ``couplings.soft_quantile``.

    Example:
        >>> import torch
        >>> SoftQuantile(0.5, epsilon=0)(torch.tensor([3.0, 1.0, 2.0]))
        tensor(2.)
    """

    def __init__(
        self,
        q: float | Sequence[float],
        *,
        dim: int = -1,
        epsilon: float | None = None,
        squash: str | None = "logistic",
        standardize: bool = True,
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.q = q
        self.dim = dim
        self.epsilon = epsilon
        self.squash = squash
        self.standardize = standardize
        self.hard = hard

    def extra_repr(self) -> str:
        return (
            f"q={self.q}, dim={self.dim}, epsilon={self.epsilon}, squash={self.squash!r}, "
            f"standardize={self.standardize}, hard={self.hard}"
        )

    def forward(self, x: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        r"""x (\*batch, n) -> (\*batch), several q first."""
        return soft_quantile(
            x,
            self.q,
            dim=self.dim,
            epsilon=self.epsilon,
            weights=weights,
            mask=mask,
            squash=self.squash,
            standardize=self.standardize,
            hard=self.hard,
        )
