"""Exact retrieval without an index: every document is scored, a block at a time, and only the best are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings import _checks
from couplings.similarity import ragged
from couplings.similarity.api import Mask, maxsim
from couplings.similarity.ragged import Tokens
from couplings.similarity.tiles import working

BLOCK_BYTES = 2**25
"""Documents that are in memory at a time; their tokens' grid is tiled again."""


class MaxSimTopK(NamedTuple):
    """The best documents of each query, best first; equal scores in the order of the documents."""

    values: Tensor
    indices: Tensor


def maxsim_topk(
    queries: Tokens,
    documents: Any,
    k: int,
    *,
    query_mask: Mask = None,
    document_mask: Any = None,
    reduction: str = "sum",
    normalize: bool = False,
    temperature: float | None = None,
    empty: float = float("-inf"),
    block_bytes: int = BLOCK_BYTES,
    chunk_bytes: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> MaxSimTopK:
    """The k documents with the largest ``maxsim`` of each query, exactly, from a set of any size.

    Memory is one block of documents and (Nq, k) results, whatever the number of documents. Nothing is differentiated.

    Args:
        queries: (Nq, Lq, d), or ragged, as in ``maxsim``.
        documents: one of

            * a tensor (Nd, Ld, d), or an array that slices like one (a NumPy array or memory map) in any of the
              library's dtypes; only a block of it is read at a time;
            * a tuple (tokens (T, d), offsets (Nd + 1,)): all documents' tokens behind one another, both tensors or
              arrays, the tokens possibly a memory map;
            * an iterable of blocks, each a tensor or array (n, Ld, d), a list of tensors (length, d), or a tuple
              (block, mask (n, Ld)). A generator is consumed once.
        k: how many, at least 1; at most Nd where that is known beforehand. An iterable with fewer documents gives that
            many columns.
        query_mask: as in ``maxsim``.
        document_mask: (Nd, Ld) bool tensor or array, True = takes part; only for documents in the first form.
        reduction: as in ``maxsim``.
        normalize: as in ``maxsim``.
        temperature: as in ``maxsim``.
        empty: the score of a document without tokens; -inf ranks it last.
        block_bytes: how much of the documents is read at a time.
        chunk_bytes: as in ``maxsim``.
        progress: called after each block with the number of documents scored and their total (None if unknown).

    Returns:
        values and indices, both (Nq, k), best first; float32 scores (float64 for float64), int64 indices. Equal scores
        keep the order of the documents; NaN comes first, as in ``torch.sort``, so that it is noticed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or range.

    Example:
        >>> import torch, couplings.similarity
        >>> documents = torch.eye(5).unsqueeze(1)
        >>> couplings.similarity.maxsim_topk(documents[3:4] + documents[1:2] / 2, documents, 2).indices
        tensor([[3, 1]])
    """
    for name, value in (("k", k), ("block_bytes", block_bytes)):
        if isinstance(value, bool) or not isinstance(value, int):
            _checks.reject(name, "an int", _checks.describe(value), "Pass how many.", TypeError)
        if value < 1:
            _checks.reject(name, "at least 1", value, "Pass a larger one.")
    if progress is not None and not callable(progress):
        _checks.reject("progress", "a function of two numbers", _checks.describe(progress), "", TypeError)
    if not ragged.is_ragged(queries):
        _checks.real_tensor("queries", queries)
    if isinstance(queries, Tensor) and queries.dim() != 3:
        _checks.reject("queries", "shape (Nq, Lq, d)", _checks.describe(queries), "Flatten the batch.")
    blocks, total = _open(documents, document_mask, block_bytes)
    if total is not None and k > total:
        _checks.reject("k", f"at most {total}, the number of documents", k, "Lower k.")
    first = queries if isinstance(queries, Tensor) else queries[0]
    values = indices = None
    done = 0
    with torch.no_grad():
        for block, mask in blocks:
            known, found = _agree(queries, block, first)
            scores = maxsim(
                known,
                found,
                query_mask=query_mask,
                document_mask=mask,
                reduction=reduction,
                normalize=normalize,
                temperature=temperature,
                empty=empty,
                chunk_bytes=chunk_bytes,
                dtype=working(_dtype(known)),
            )
            place = torch.arange(done, done + scores.shape[1], device=scores.device).expand(scores.shape)
            if values is not None and indices is not None:
                scores, place = torch.cat([values.to(scores), scores], 1), torch.cat([indices, place], 1)
            values, order = scores.sort(dim=1, descending=True, stable=True)
            values, indices = values[:, :k].clone(), place.gather(1, order[:, :k])
            done += _size(found)
            if progress is not None:
                progress(done, total)
    if values is None or indices is None:
        _checks.reject("documents", "at least one block", "an empty iterable", "Pass documents.")
    return MaxSimTopK(values, indices)


def _dtype(tokens: Tokens) -> torch.dtype:
    return tokens.dtype if isinstance(tokens, Tensor) else tokens[0].dtype


def _size(block: Tokens) -> int:
    if isinstance(block, tuple) and len(block) == 2 and block[1].dim() == 1:
        return len(block[1]) - 1
    return len(block)


def _agree(queries: Tokens, block: Tokens, first: Tensor) -> tuple[Tokens, Tokens]:
    """Queries and block on one device and, where their dtypes differ, in the one that holds both."""
    dtype = torch.promote_types(first.dtype, _dtype(block))

    def moved(tokens: Tokens) -> Tokens:
        if isinstance(tokens, Tensor):
            return tokens.to(first.device, dtype)
        return type(tokens)(
            one.to(first.device, dtype if one.is_floating_point() else None) for one in tokens
        )

    return moved(queries), moved(block)


def _tensor(array: Any, name: str) -> Tensor:
    """A tensor, or a copy of an array's slice: what lies behind it may be read-only."""
    if isinstance(array, Tensor):
        return array
    reason = ""
    try:
        return torch.tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = f"Convert it: {error}."
    return _checks.reject(name, "tensors or numeric arrays", _checks.describe(array), reason, TypeError)


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or (hasattr(value, "shape") and hasattr(value, "__getitem__"))


Block = tuple[Tokens, Any]


def _open(documents: Any, mask: Any, block_bytes: int) -> tuple[Iterator[Block], int | None]:
    """The documents' blocks with their masks, and the number of documents if it is known."""
    if _is_array(documents):
        if len(documents.shape) != 3:
            _checks.reject(
                "documents",
                "shape (Nd, Ld, d)",
                f"shape {tuple(documents.shape)}",
                "For tokens with offsets pass the tuple (tokens, offsets).",
            )
        if mask is not None and (not _is_array(mask) or tuple(mask.shape) != tuple(documents.shape[:2])):
            _checks.reject(
                "document_mask",
                f"shape {tuple(documents.shape[:2])}",
                f"shape {tuple(mask.shape)}" if _is_array(mask) else _checks.describe(mask),
                "One flag for each token.",
            )
        return _slices(documents, mask, block_bytes), documents.shape[0]
    if mask is not None:
        _checks.reject(
            "document_mask", "None unless documents is one array", "a mask", "Yield (block, mask) tuples."
        )
    if (
        isinstance(documents, tuple)
        and len(documents) == 2
        and all(map(_is_array, documents))
        and len(documents[1].shape) == 1
    ):
        offsets = _tensor(documents[1], "documents").tolist()
        lengths = [after - before for before, after in pairwise(offsets)]
        if (
            not offsets
            or offsets[0] != 0
            or offsets[-1] != documents[0].shape[0]
            or min(lengths, default=0) < 0
        ):
            _checks.reject(
                "documents",
                f"offsets that rise from 0 to {documents[0].shape[0]}, the number of tokens",
                f"{len(offsets)} numbers that do not",
                "Pass cumulative lengths with a leading 0.",
            )
        return _runs(documents[0], offsets, block_bytes), len(lengths)
    if isinstance(documents, Iterable):
        return _given(documents), None
    return _checks.reject(
        "documents",
        "an array (Nd, Ld, d), a tuple (tokens, offsets) or an iterable of blocks",
        _checks.describe(documents),
        "Pass one of these.",
        TypeError,
    )


def _row_bytes(array: Any) -> int:
    """Bytes of one row of an array or tensor."""
    size = array.element_size() if isinstance(array, Tensor) else getattr(array, "itemsize", 4)
    for extent in array.shape[1:]:
        size *= extent
    return max(1, int(size))


def _slices(documents: Any, mask: Any, block_bytes: int) -> Iterator[Block]:
    step = max(1, block_bytes // _row_bytes(documents))
    for start in range(0, max(1, documents.shape[0]), step):
        at = slice(start, start + step)
        yield (
            _tensor(documents[at], "documents"),
            None if mask is None else _tensor(mask[at], "document_mask"),
        )


def _runs(tokens: Any, offsets: list[int], block_bytes: int) -> Iterator[Block]:
    most = max(1, block_bytes // _row_bytes(tokens))
    start, total = 0, len(offsets) - 1
    while start < total:
        stop = start + 1
        while stop < total and offsets[stop + 1] - offsets[start] <= most:
            stop += 1
        values = _tensor(tokens[offsets[start] : offsets[stop]], "documents")
        yield (values, torch.tensor([end - offsets[start] for end in offsets[start : stop + 1]])), None
        start = stop


def _given(blocks: Iterable[Any]) -> Iterator[Block]:
    for block in blocks:
        if isinstance(block, tuple) and len(block) == 2 and all(map(_is_array, block)):
            if len(block[1].shape) == 1:
                yield (_tensor(block[0], "documents"), _tensor(block[1], "documents")), None
            else:
                yield _tensor(block[0], "documents"), _tensor(block[1], "document_mask")
        elif ragged.is_ragged(block):
            yield [_tensor(one, "documents") for one in block], None
        else:
            yield _tensor(block, "documents"), None
