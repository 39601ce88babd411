"""Exact retrieval from documents that lie on many ranks: each ranks its own, and the best of all are merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from couplings import similarity
from couplings._checks import reject
from couplings.distributed.collectives import Group, agree, gathered, position
from couplings.similarity import MaxSimTopK

Progress = Callable[[int, int | None], None]


def maxsim_topk(
    queries: Any,
    documents: Any,
    k: int,
    *,
    group: Group = None,
    progress: Progress | None = None,
    **options: Any,
) -> MaxSimTopK:
    """The k best documents of each query, exactly, where every rank holds a part of the documents.

    Each rank scores its own documents, ``couplings.maxsim_topk`` on its shard, and sends its k best of each query to
    all others: O(ranks Nq k) numbers travel, no document does. Without an initialised process group, and in a group of
    one, it is ``couplings.maxsim_topk``.

    Args:
        queries: as in ``couplings.maxsim_topk``, the same on every rank.
        documents: this rank's documents, in any of the forms that ``couplings.maxsim_topk`` takes; ranks may differ in
            number and form, and an array may have none.
        k: how many, at least 1; at most the number of documents of all ranks where all know theirs beforehand. With
            fewer documents from iterables there are that many columns.
        group: a process group (gloo, nccl); None is the default one. With nccl queries lie on a CUDA device.
        progress: as in ``couplings.maxsim_topk``, of this rank's documents.
        options: the other arguments of ``couplings.maxsim_topk``, alike on every rank but for ``document_mask``.

    Returns:
        values and indices, (Nq, k), the same on every rank. A document's index is its place among the documents of all
        ranks, those of rank 0 first. Order and ties are those of one process with all documents; so are the scores up
        to the rounding of a matrix product, whose blocks are other ones.

    Raises:
        TypeError, ValueError: as ``couplings.maxsim_topk``; ranks that differ in k, in the number of queries, or in the
            dtype of the scores. Where one rank is at fault, every rank raises.

    Example:
        >>> import torch
        >>> documents = torch.eye(5).unsqueeze(1)  # one process: all there are
        >>> maxsim_topk(documents[3:4] + documents[1:2] / 2, documents, 2).indices
        tensor([[3, 1]])
    """
    rank, size = position(group)
    if size == 1:
        return similarity.maxsim_topk(queries, documents, k, progress=progress, **options)
    found, scored, error = None, 0, None
    known = _known(documents)
    try:
        found, scored = _local(queries, documents, known, k, progress, options)
    except (TypeError, ValueError) as wrong:
        error = wrong
    rows = agree({"scores": None if found is None else found.values.mT}, group, error)["scores"]
    if found is None:
        raise RuntimeError("agree raises the error that there is")
    facts = torch.tensor([[scored, known is not None, k]], device=found.values.device)
    counts, stated, asked = gathered(facts, [1] * size, group).T.tolist()
    if len(set(asked)) > 1:
        reject("k", "the same on every rank", asked, "Pass the same.")
    if all(stated) and k > sum(counts):
        reject("k", f"at most {sum(counts)}, the number of documents of all ranks", k, "Lower k.")
    values = gathered(found.values.mT.contiguous(), rows, group).mT
    indices = gathered((found.indices + sum(counts[:rank])).mT.contiguous(), rows, group).mT
    # ranks follow one another as their documents do, and each rank's equal scores are in order already
    values, order = values.sort(dim=1, descending=True, stable=True)
    return MaxSimTopK(values[:, :k].clone(), indices.gather(1, order[:, :k]))


def _local(
    queries: Any,
    documents: Any,
    known: int | None,
    k: int,
    progress: Progress | None,
    options: dict[str, Any],
) -> tuple[MaxSimTopK, int]:
    """The best of this rank's documents, and how many documents there are."""
    scored = 0

    def count(done: int, total: int | None) -> None:
        nonlocal scored
        scored = done
        if progress is not None:
            progress(done, total)

    if known == 0:
        # one block with nothing in it: an iterable may have fewer documents than k
        documents, options = [documents], {**options, "document_mask": None}
    elif known is not None and isinstance(k, int):
        k = min(k, known)
    return similarity.maxsim_topk(queries, documents, k, progress=count, **options), scored


def _known(documents: Any) -> int | None:
    """How many documents there are, where their form tells."""
    if isinstance(documents, tuple) and len(documents) == 2 and getattr(documents[1], "ndim", 0) == 1:
        return len(documents[1]) - 1
    shape = getattr(documents, "shape", None)
    return int(shape[0]) if shape else None
