"""Ranking and robust losses as modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from couplings.losses import ranking as losses


class _RankingLoss(nn.Module):
    """Settings shared by the ranking losses; a subclass names its own, which come first in its representation."""

    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("epsilon", "method", "reduction")

    def __init__(
        self, *, epsilon: float | None = None, method: str = "transport", reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.method = method
        self.reduction = reduction

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.own + self.shared}


class TopKLoss(_RankingLoss):
    r"""``losses.topk_loss`` as a module: the soft 0/1 loss (k = 1) and its top-k form.

    Args:
        k, transform, epsilon, method, reduction: as in ``couplings.losses.topk_loss``.

    Example:
        >>> import torch
        >>> TopKLoss(2, epsilon=0)(torch.tensor([[0.1, 2.0, 1.0]]), torch.tensor([0]))
        tensor(1.)
    """

    own = ("k", "transform")

    def __init__(
        self, k: int = 1, *, transform: Callable[[Tensor], Tensor] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.k = k
        self.transform = transform

    def forward(self, scores: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
        r"""scores (\*batch, L), labels (\*batch) or (\*batch, L) -> a scalar, or (\*batch)."""
        return losses.topk_loss(scores, labels, mask=mask, **self._settings())


class SpearmanLoss(_RankingLoss):
    r"""``losses.spearman_loss`` as a module: one minus Spearman's rank correlation.

    Args:
        soft_target, epsilon, method, reduction: as in ``couplings.losses.spearman_loss``.

    Example:
        >>> import torch
        >>> loss = SpearmanLoss(epsilon=0)(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1, 2, 3]))
        >>> round(loss.item(), 3)
        0.5
    """

    own = ("soft_target",)

    def __init__(self, *, soft_target: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.soft_target = soft_target

    def forward(
        self, x: Tensor, y: Tensor, *, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        r"""x and y (\*batch, n) -> a scalar, or (\*batch)."""
        return losses.spearman_loss(x, y, mask=mask, weights=weights, **self._settings())


class KendallLoss(_RankingLoss):
    r"""``losses.kendall_loss`` as a module: one minus Kendall's tau-b.

    Args:
        epsilon, reduction: as in ``couplings.losses.kendall_loss``.

    Example:
        >>> import torch
        >>> loss = KendallLoss(epsilon=0)(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1, 2, 3]))
        >>> round(loss.item(), 3)
        0.667
    """

    shared = ("epsilon", "reduction")

    def __init__(self, *, epsilon: float | None = None, reduction: str = "mean") -> None:
        super().__init__(epsilon=epsilon, reduction=reduction)

    def forward(self, x: Tensor, y: Tensor, *, mask: Tensor | None = None) -> Tensor:
        r"""x and y (\*batch, n) -> a scalar, or (\*batch)."""
        return losses.kendall_loss(x, y, mask=mask, **self._settings())


class NDCGLoss(_RankingLoss):
    r"""``losses.ndcg_loss`` as a module: one minus NDCG.

    Args:
        k, gains, epsilon, method, reduction: as in ``couplings.losses.ndcg_loss``.

    Example:
        >>> import torch
        >>> loss = NDCGLoss(k=1, gains="linear", epsilon=0)
        >>> round(loss(torch.tensor([0.3, 2.0, 1.0]), torch.tensor([2, 1, 0])).item(), 3)
        0.5
    """

    own = ("k", "gains")

    def __init__(
        self,
        *,
        k: int | None = None,
        gains: str | Callable[[Tensor], Tensor] = "exponential",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.k = k
        self.gains = gains

    def forward(self, scores: Tensor, relevance: Tensor, *, mask: Tensor | None = None) -> Tensor:
        r"""scores and relevance (\*batch, n) -> a scalar, or (\*batch)."""
        return losses.ndcg_loss(scores, relevance, mask=mask, **self._settings())


class AveragePrecisionLoss(_RankingLoss):
    r"""``losses.average_precision_loss`` as a module: one minus average precision.

    Args:
        epsilon, method, reduction: as in ``couplings.losses.average_precision_loss``.

    Example:
        >>> import torch
        >>> loss = AveragePrecisionLoss(epsilon=0)
        >>> round(loss(torch.tensor([0.3, 2.0, 1.0]), torch.tensor([True, True, False])).item(), 3)
        0.167
    """

    def forward(self, scores: Tensor, relevance: Tensor, *, mask: Tensor | None = None) -> Tensor:
        r"""scores and relevance (\*batch, n) -> a scalar, or (\*batch)."""
        return losses.average_precision_loss(scores, relevance, mask=mask, **self._settings())


class RecallAtKLoss(_RankingLoss):
    r"""``losses.recall_at_k_loss`` as a module: one minus recall at k.

    Args:
        k, epsilon, method, reduction: as in ``couplings.losses.recall_at_k_loss``.

    Example:
        >>> import torch
        >>> RecallAtKLoss(1, epsilon=0)(torch.tensor([0.3, 2.0, 1.0]), torch.tensor([True, True, False]))
        tensor(0.5000)
    """

    own = ("k",)

    def __init__(self, k: int | Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.k = k

    def forward(self, scores: Tensor, relevance: Tensor, *, mask: Tensor | None = None) -> Tensor:
        r"""scores and relevance (\*batch, n) -> a scalar, or (\*batch)."""
        return losses.recall_at_k_loss(scores, relevance, mask=mask, **self._settings())


class LeastQuantileLoss(_RankingLoss):
    r"""``losses.least_quantile_loss`` as a module: a soft quantile of the losses.

    Args:
        q, epsilon, reduction: as in ``couplings.losses.least_quantile_loss``.

    Example:
        >>> import torch
        >>> LeastQuantileLoss(epsilon=0)(torch.tensor([1.0, 2.0, 50.0]))
        tensor(2.)
    """

    own = ("q",)
    shared = ("epsilon", "reduction")

    def __init__(self, q: float = 0.5, *, epsilon: float | None = None, reduction: str = "mean") -> None:
        super().__init__(epsilon=epsilon, reduction=reduction)
        self.q = q

    def forward(self, losses_: Tensor, *, mask: Tensor | None = None) -> Tensor:
        r"""losses (\*batch, n) -> a scalar, or (\*batch)."""
        return losses.least_quantile_loss(losses_, mask=mask, **self._settings())


class TrimmedLoss(_RankingLoss):
    r"""``losses.trimmed_loss`` as a module: the mean or sum of the smallest losses.

    Args:
        keep, average, detach_weights, epsilon, method, reduction: as in ``couplings.losses.trimmed_loss``.

    Example:
        >>> import torch
        >>> TrimmedLoss(0.75, epsilon=0)(torch.tensor([1.0, 2.0, 50.0, 3.0]))
        tensor(2.)
    """

    own = ("keep", "average", "detach_weights")

    def __init__(
        self, keep: float, *, average: bool = True, detach_weights: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.keep = keep
        self.average = average
        self.detach_weights = detach_weights

    def forward(self, losses_: Tensor, *, mask: Tensor | None = None) -> Tensor:
        r"""losses (\*batch, n) -> a scalar, or (\*batch)."""
        return losses.trimmed_loss(losses_, mask=mask, **self._settings())
