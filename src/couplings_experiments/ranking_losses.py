"""Learning to rank, written from the papers: the pointwise, pairwise and listwise losses that soft ranks compete with.

All take scores (..., n) and grades that broadcast to them, and return one loss for each list, (...).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def squared_error(scores: Tensor, grades: Tensor) -> Tensor:
    """Pointwise regression on the grades."""
    return (scores - grades).square().mean(-1)


def ranknet(scores: Tensor, grades: Tensor) -> Tensor:
    """Logistic loss of every pair in which one entry has the higher grade (Burges et al. 2005), mean over pairs."""
    better, cost = _pairs(scores, grades)
    return (cost * better).sum((-2, -1)) / better.sum((-2, -1)).clamp_min(1)


def lambdarank(scores: Tensor, grades: Tensor) -> Tensor:
    """RankNet's pairs, each weighted by how much NDCG changes if the two trade places (Burges et al. 2006).

    The weights are constants to the gradient, so that the gradient is the sum of the paper's lambdas.
    """
    better, cost = _pairs(scores, grades)
    with torch.no_grad():
        n = scores.shape[-1]
        discounts = 1 / torch.arange(2, n + 2, dtype=scores.dtype, device=scores.device).log2()
        gains = torch.exp2(grades.to(scores.dtype)) - 1
        ideal = (gains.sort(dim=-1, descending=True).values * discounts).sum(-1)
        place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        discount = discounts[place]
        change = (gains.unsqueeze(-1) - gains.unsqueeze(-2)) * (
            discount.unsqueeze(-1) - discount.unsqueeze(-2)
        )
        weight = change.abs() * better / torch.where(ideal > 0, ideal, 1)[..., None, None]
    return (cost * weight).sum((-2, -1))


def listnet(scores: Tensor, grades: Tensor) -> Tensor:
    """Cross-entropy between the top-one probabilities of grades and of scores (Cao et al. 2007)."""
    return -(grades.to(scores.dtype).softmax(-1) * scores.log_softmax(-1)).sum(-1)


def _pairs(scores: Tensor, grades: Tensor) -> tuple[Tensor, Tensor]:
    """Whether i is better than j, and log(1 + exp(score_j - score_i)), both (..., n, n)."""
    better = grades.unsqueeze(-1) > grades.unsqueeze(-2)
    return better, softplus(scores.unsqueeze(-2) - scores.unsqueeze(-1))
