"""Matching as modules: the layer with a learned dustbin, its loss, doubly stochastic matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from couplings import losses
from couplings.matching import gumbel_sinkhorn, match_with_dustbin, sinkhorn_normalize


class DustbinMatching(nn.Module):
    r"""``match_with_dustbin`` with a learned dustbin score, the last layer of a matching network.

    Args:
        dustbin: initial score of staying unmatched; a parameter.
        method, iterations, epsilon: as in ``couplings.match_with_dustbin``.

    Example:
        >>> import torch
        >>> layer = DustbinMatching(2.0)
        >>> layer(torch.tensor([[8.0, 0.0], [0.0, 9.0]])).exp().argmax(-1)
        tensor([0, 1, 2])
    """

    def __init__(
        self,
        dustbin: float = 1.0,
        *,
        method: str = "transport",
        iterations: int | None = None,
        epsilon: float = 1.0,
    ) -> None:
        super().__init__()
        self.dustbin = nn.Parameter(torch.tensor(float(dustbin)))
        self.method = method
        self.iterations = iterations
        self.epsilon = epsilon

    def extra_repr(self) -> str:
        return f"method={self.method!r}, iterations={self.iterations}, epsilon={self.epsilon}"

    def forward(
        self, scores: Tensor, *, row_mask: Tensor | None = None, column_mask: Tensor | None = None
    ) -> Tensor:
        r"""scores (\*batch, N, M) -> the log plan (\*batch, N + 1, M + 1), dustbins last."""
        return match_with_dustbin(
            scores,
            self.dustbin,
            row_mask=row_mask,
            column_mask=column_mask,
            method=self.method,
            iterations=self.iterations,
            epsilon=self.epsilon,
        ).log_plan()


class MatchingLoss(nn.Module):
    r"""``losses.matching_loss`` as a module: negative log plan at true matches and dustbins.

    Args:
        reduction: as in ``couplings.losses.matching_loss``.

    Example:
        >>> import torch
        >>> log_plan = DustbinMatching(2.0)(torch.tensor([[8.0, 0.0], [0.0, 9.0]]))
        >>> MatchingLoss()(log_plan, torch.tensor([0, 1])) < 0.1
        tensor(True)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"

    def forward(
        self,
        log_plan: Tensor,
        matches: Tensor,
        *,
        column_matches: Tensor | None = None,
        row_mask: Tensor | None = None,
        column_mask: Tensor | None = None,
    ) -> Tensor:
        r"""log_plan (\*batch, N + 1, M + 1), matches (\*batch, N) -> a scalar, or (\*batch)."""
        return losses.matching_loss(
            log_plan,
            matches,
            column_matches=column_matches,
            row_mask=row_mask,
            column_mask=column_mask,
            reduction=self.reduction,
        )


class SinkhornNormalize(nn.Module):
    r"""``sinkhorn_normalize`` as a module: logits to a doubly stochastic matrix.

    Args:
        iterations: as in ``couplings.sinkhorn_normalize``.

    Example:
        >>> import torch
        >>> SinkhornNormalize()(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """

    def __init__(self, *, iterations: int | None = None) -> None:
        super().__init__()
        self.iterations = iterations

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"

    def forward(self, logits: Tensor) -> Tensor:
        r"""logits (\*batch, n, m) -> the same shape."""
        return sinkhorn_normalize(logits, iterations=self.iterations)


class GumbelSinkhorn(nn.Module):
    r"""``gumbel_sinkhorn`` as a module: noisy doubly stochastic matrices in training, without noise in evaluation.

    Args:
        epsilon, noise, iterations: as in ``couplings.gumbel_sinkhorn``.

    Example:
        >>> import torch
        >>> layer = GumbelSinkhorn(0.5)
        >>> layer.eval()(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """

    def __init__(self, epsilon: float, *, noise: float = 1.0, iterations: int | None = None) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.noise = noise
        self.iterations = iterations

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, noise={self.noise}, iterations={self.iterations}"

    def forward(self, scores: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        r"""scores (\*batch, n, n) -> the same shape."""
        noise = self.noise if self.training else 0.0
        return gumbel_sinkhorn(
            scores, epsilon=self.epsilon, noise=noise, generator=generator, iterations=self.iterations
        )
