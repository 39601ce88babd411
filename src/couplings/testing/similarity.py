"""MaxSim by its definition: float64, one pair of a query and a document at a time, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def maxsim_by_pairs(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.0,
    topk: int | None = None,
    empty: float = 0.0,
) -> Tensor:
    """sum_q max_l <Q_iq, D_jl> over the tokens that take part.

    Args:
        queries: (Nq, Lq, d).
        documents: (Nd, Ld, d).
        query_mask: (Nq, Lq) bool, or None.
        document_mask: (Nd, Ld) bool, or None.
        temperature: t > 0 for t log sum_l exp(<Q_iq, D_jl> / t) in place of the maximum.
        topk: only similarities that fewer than k of the query token's over all documents exceed count.
        empty: the score of a document without tokens, or of which nothing counts.

    Returns:
        (Nq, Nd) float64.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> maxsim_by_pairs(x, x)
        tensor([[2.]], dtype=torch.float64)
    """
    queries, documents = queries.double(), documents.double()
    rows = []
    for i in range(len(queries)):
        q = queries[i] if query_mask is None else queries[i][query_mask[i]]
        kept = [
            documents[j] if document_mask is None else documents[j][document_mask[j]]
            for j in range(len(documents))
        ]
        grids = [(q.unsqueeze(1) * d.unsqueeze(0)).sum(-1) for d in kept]
        bar = None
        if topk is not None:
            everything = torch.cat(grids, 1).detach()
            at = min(topk, everything.shape[1]) - 1
            bar = everything.sort(dim=1, descending=True).values[:, at]
        scores = []
        for grid in grids:
            if grid.shape[1] == 0:
                scores.append(queries.new_tensor(empty))
            elif bar is not None:
                best = grid.max(1).values
                scores.append(best[best >= bar].sum() if (best >= bar).any() else queries.new_tensor(empty))
            elif isinstance(temperature, Tensor) or temperature > 0:
                scores.append((temperature * torch.logsumexp(grid / temperature, 1)).sum())
            else:
                scores.append(grid.max(1).values.sum())
        rows.append(torch.stack(scores))
    return torch.stack(rows)
