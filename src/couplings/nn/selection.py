"""Top-k selection as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from couplings.selection import soft_topk, soft_topk_mask


class _Selection(nn.Module):
    """Settings shared by the two top-k modules."""

    def __init__(
        self,
        k: int | float,
        *,
        dim: int = -1,
        largest: bool = True,
        epsilon: float | None = None,
        method: str = "transport",
        standardize: bool = True,
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.k = k
        self.dim = dim
        self.largest = largest
        self.epsilon = epsilon
        self.method = method
        self.standardize = standardize
        self.hard = hard

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, dim={self.dim}, largest={self.largest}, epsilon={self.epsilon}, "
            f"method={self.method!r}, standardize={self.standardize}, hard={self.hard}"
        )

    def _settings(self) -> dict[str, Any]:
        names = ("dim", "largest", "epsilon", "method", "standardize", "hard")
        return {name: getattr(self, name) for name in names}


class SoftTopKMask(_Selection):
    r"""``soft_topk_mask`` as a module.

    Args:
        k: how many to select, a number in [0, n].
        dim, largest, epsilon, method, standardize, hard: as in ``couplings.soft_topk_mask``.

    Example:
        >>> import torch
        >>> SoftTopKMask(2, epsilon=1e-3)(torch.tensor([0.1, 3.0, 2.0])).round()
        tensor([0., 1., 1.])
    """

    def forward(self, x: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        r"""x (\*batch, n) -> (\*batch, n), summing to k."""
        return soft_topk_mask(x, self.k, weights=weights, mask=mask, **self._settings())


class SoftTopK(_Selection):
    r"""``soft_topk`` as a module.

    Args:
        k: how many to select, an int in [1, n].
        dim, largest, epsilon, method, standardize, hard: as in ``couplings.soft_topk``.

    Example:
        >>> import torch
        >>> values, weights = SoftTopK(2, epsilon=1e-3)(torch.tensor([0.1, 3.0, 2.0]))
        >>> values.round(decimals=2)
        tensor([3., 2.])
    """

    k: int

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""x (\*batch, n) -> values (\*batch, k), weights (\*batch, k, n)."""
        return soft_topk(x, self.k, mask=mask, **self._settings())
