"""Validation, dispatch and documentation of MaxSim; the mathematics is in the files beside."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from couplings import _checks
from couplings._autocast import autocasts, full_precision
from couplings._rowwise import apply, seen
from couplings.similarity import ragged
from couplings.similarity.hard import MaxSim
from couplings.similarity.ragged import Tokens
from couplings.similarity.smooth import LN2, SmoothMaxSim
from couplings.similarity.tiles import working

LAYOUTS = ("all_pairs", "pairwise", "candidates")
Mask = Tensor | list[Tensor] | tuple[Tensor, ...] | None


class _Options(NamedTuple):
    """Settings that have been checked; temperature, topk and chunk_bytes are 0 if there is none."""

    layout: str
    reduction: str
    normalize: bool
    temperature: float | Tensor
    topk: int
    empty: float
    chunk_bytes: int


def maxsim(
    queries: Tokens,
    documents: Tokens,
    *,
    query_mask: Mask = None,
    document_mask: Mask = None,
    layout: str = "all_pairs",
    reduction: str = "sum",
    normalize: bool = False,
    temperature: float | Tensor | None = None,
    topk: int | None = None,
    empty: float = 0.0,
    chunk_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Late-interaction scores S_ij = sum_q max_l <Q_iq, D_jl>: each query token finds its best document token.

    The grid of all token pairs is worked through in tiles and never stored; a backward pass needs the winners only,
    and every order of derivative goes through them. Documents are independent: no value in one changes another's
    score.

    Args:
        queries: (\*batch, Nq, Lq, d), float64, float32, bfloat16 or float16; (\*batch, Lq, d) in the layouts
            ``"pairwise"`` and ``"candidates"``. Or ragged: a list of tensors (length, d), or a tuple (tokens (T, d),
            offsets (N + 1,)) with offsets as in ``cu_seqlens``, whose values are read on the host.
        documents: (\*batch, Nd, Ld, d), (\*batch, Ld, d) with ``"pairwise"``, (\*batch, K, Ld, d) with
            ``"candidates"``; or ragged. Batch dimensions broadcast.
        query_mask: bool, broadcasts to queries' shape without d, True = takes part. Any pattern. A masked query token
            adds nothing. For ragged queries a list of tensors (length,), or (T,).
        document_mask: the same for documents. A masked token is never the best one, whatever the others are.
        layout: ``"all_pairs"``; ``"pairwise"``, the i-th query with the i-th document; or ``"candidates"``, each query
            with documents of its own (not ragged).
        reduction: over a query's tokens, ``"sum"`` or ``"mean"``. A query without tokens scores 0.
        normalize: cosines instead of inner products. A token of zeros has cosine 0 to everything.
        temperature: t > 0 replaces the maximum by t log sum_l exp(<Q_iq, D_jl> / t), which is larger than it by at most
            t log Ld; a float or a 0-dimensional tensor (differentiable). None and 0 are the maximum.
        topk: only the k largest similarities of a query token over the tokens of *all* documents (of a query's
            candidates) count, and those that tie with the k-th; ``"mean"`` then divides by the number of query tokens
            that retrieved something from the document (Lee et al. 2023). Documents are not independent then.
        empty: the score of a document all of whose tokens are masked, or of which nothing is retrieved; for example 0
            or -inf.
        chunk_bytes: size of a tile of the token grid. None follows the processor's caches.
        dtype: of the result; None is the inputs' (the wider one, where autocast lets two meet). Similarities are
            summed in float32 at least and rounded once, but scores of about 30 are 0.125 apart in bfloat16: pass
            torch.float32 to rank.

    Returns:
        (\*batch, Nq, Nd), (\*batch) with ``"pairwise"``, (\*batch, K) with ``"candidates"``. Among equal maxima the
        first token gets the gradient. A document (query) that holds NaN has NaN scores, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Khattab and Zaharia, "ColBERT", SIGIR 2020, equation 3. Lee et al., "Rethinking the Role of Token Retrieval in
        Multi-Vector Retrieval", NeurIPS 2023, equation 4 (``topk``).

    Example:
        >>> import torch, couplings.similarity
        >>> queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> documents = torch.tensor([[[0.5, 0.0], [0.0, 0.2]], [[-1.0, -1.0], [9.0, 9.0]]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> couplings.similarity.maxsim(queries, documents, document_mask=mask)
        tensor([[ 0.7000, -2.0000]])
    """
    options = _check_options(layout, reduction, normalize, temperature, topk, empty, chunk_bytes, dtype)
    names = ("queries", "documents")
    queries, documents = _agreed(queries, documents)
    scores = _filled(*_scores(queries, documents, query_mask, document_mask, options, names), options.empty)
    return scores.to(dtype or _dtype(queries))


def chamfer(
    x: Tokens,
    y: Tokens,
    *,
    x_mask: Mask = None,
    y_mask: Mask = None,
    layout: str = "all_pairs",
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float | Tensor | None = None,
    empty: float = 0.0,
    chunk_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Symmetric MaxSim: the mean of both directions, (maxsim(x, y) + maxsim(y, x)) / 2.

    With ``reduction="mean"`` and unit vectors, 4 - 4 chamfer is the Chamfer distance: the mean squared distance of the
    points of either set to the nearest of the other, both directions added.

    Args:
        x: (\*batch, N, L, d), or (\*batch, L, d) with ``layout="pairwise"``; or ragged, as in ``maxsim``.
        y: (\*batch, M, K, d), or (\*batch, K, d).
        x_mask: bool, broadcasts to x's shape without d, True = takes part.
        y_mask: the same for y.
        layout: ``"all_pairs"`` or ``"pairwise"``.
        reduction: over a set's points in each direction.
        normalize: as in ``maxsim``.
        temperature: as in ``maxsim``.
        empty: the score where either set has no points.
        chunk_bytes: as in ``maxsim``.
        dtype: as in ``maxsim``.

    Returns:
        (\*batch, N, M), or (\*batch) with ``"pairwise"``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Example:
        >>> import torch, couplings.similarity
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> couplings.similarity.chamfer(x, x, layout="pairwise")
        tensor(1.)
    """
    _checks.choice("layout", layout, LAYOUTS[:2])
    options = _check_options(layout, reduction, normalize, temperature, None, empty, chunk_bytes, dtype)
    x, y = _agreed(x, y)
    there, no_y = _scores(x, y, x_mask, y_mask, options, ("x", "y"))
    back, no_x = _scores(y, x, y_mask, x_mask, options, ("y", "x"))
    if layout == "all_pairs":
        back, no_x = back.mT, None if no_x is None else no_x.mT
    void = no_x if no_y is None else no_y if no_x is None else no_x | no_y
    return _filled((there + back) / 2, void, options.empty).to(dtype or _dtype(x))


def _dtype(tokens: Tokens) -> torch.dtype:
    return tokens.dtype if isinstance(tokens, Tensor) else tokens[0].dtype


def _agreed(queries: Tokens, documents: Tokens) -> tuple[Tokens, Tokens]:
    """Under autocast tokens of two dtypes meet in the wider one, which loses nothing; elsewhere they are an error."""
    left, right = ragged.dtype_of(queries), ragged.dtype_of(documents)
    if left is None or right is None or left == right or not {left, right} <= {*_checks.REAL}:
        return queries, documents
    if not autocasts(queries if isinstance(queries, Tensor) else queries[0]):
        return queries, documents
    dtype = torch.promote_types(left, right)
    return ragged.cast(queries, dtype), ragged.cast(documents, dtype)


def _filled(scores: Tensor, void: Tensor | None, empty: float) -> Tensor:
    """The scores, and ``empty`` where there is nothing to score."""
    return scores if void is None else scores.masked_fill(void, empty)


def _scores(
    queries: Tokens,
    documents: Tokens,
    query_mask: Mask,
    document_mask: Mask,
    options: _Options,
    names: tuple[str, str],
) -> tuple[Tensor, Tensor | None]:
    """Scores in the working dtype, and where a document has nothing to score (None: nowhere)."""
    if ragged.is_ragged(queries) or ragged.is_ragged(documents):
        return _ragged(queries, documents, query_mask, document_mask, options, names)
    _check_tokens(queries, documents, options.layout, names)
    if not isinstance(queries, Tensor) or not isinstance(documents, Tensor):
        raise TypeError(names)  # unreachable: what is not ragged has been checked to be a tensor
    seen_mask = _check_mask(ragged.mask_name(names[0]), query_mask, queries, names[0])
    live_mask = _check_mask(ragged.mask_name(names[1]), document_mask, documents, names[1])
    return _padded(queries, documents, seen_mask, live_mask, options, names)


def _padded(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    options: _Options,
    names: tuple[str, str],
) -> tuple[Tensor, Tensor | None]:
    """Every layout is all pairs of some batch: (*batch, I, Lq, d) queries, (*batch, J, Ld, d) documents."""
    if options.layout != "all_pairs":
        queries, query_mask = queries.unsqueeze(-3), None if query_mask is None else query_mask.unsqueeze(-2)
    if options.layout == "pairwise":
        documents = documents.unsqueeze(-3)
        document_mask = None if document_mask is None else document_mask.unsqueeze(-2)
    try:
        batch = torch.broadcast_shapes(queries.shape[:-3], documents.shape[:-3])
    except RuntimeError:
        _checks.reject(
            names[1],
            f"batch dimensions that broadcast against those of {names[0]}, {tuple(queries.shape[:-3])}",
            f"{tuple(documents.shape[:-3])}",
            f"In layout {options.layout!r} the i-th query meets the i-th entry of {names[1]}.",
        )
    with full_precision(queries):
        if options.normalize:
            queries, documents = _unit(queries, query_mask), _unit(documents, document_mask)
        queries = queries.expand(*batch, *queries.shape[-3:])
        documents = documents.expand(*batch, *documents.shape[-3:])
        if query_mask is not None:
            query_mask = query_mask.expand(queries.shape[:-1])
        if document_mask is not None:
            document_mask = document_mask.expand(documents.shape[:-1])
        scores, void = _core(queries, documents, query_mask, document_mask, options)
    if options.layout != "all_pairs":
        scores, void = scores.squeeze(-2), None if void is None else void.squeeze(-2)
    if options.layout == "pairwise":
        scores, void = scores.squeeze(-1), None if void is None else void.squeeze(-1)
    return scores, void


def _core(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    limit = options.chunk_bytes
    smooth = isinstance(options.temperature, Tensor) or options.temperature > 0
    void = count = None
    if document_mask is not None:
        void = ~document_mask.any(-1).unsqueeze(-2)
    elif documents.shape[-2] == 0:
        void = torch.ones(1, 1, dtype=torch.bool, device=documents.device)
    if smooth:
        # base-2 logits; in the working dtype, since dividing by a temperature would round half precision again
        warm = queries.to(working(queries.dtype)) / (options.temperature * LN2)
        scores = apply(SmoothMaxSim, warm, documents, query_mask, document_mask, limit)
        scores = scores * (options.temperature * LN2)
    else:
        tracked = torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad)
        keep = tracked or options.topk > 0
        scores, winners = apply(
            MaxSim, queries, documents, query_mask, document_mask, options.topk, keep, limit
        )
        if options.topk:
            count = (winners >= 0).sum(-1).mT
            void = count == 0
    if options.reduction == "mean":
        if count is None and query_mask is not None:
            count = query_mask.sum(-1).unsqueeze(-1)
        scores = scores / (max(1, queries.shape[-2]) if count is None else count.clamp(min=1).to(scores))
    return scores, None if void is None else void.expand(scores.shape)


def _unit(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rows of length 1 in the working dtype, and 0 for a row of zeros, whose gradient is 0, and for a masked one."""
    x = x.to(working(x.dtype))
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0)
    if x.shape[-1] == 0:
        return x
    size = x.detach().abs().amax(-1, keepdim=True)  # squares of what is left neither overflow nor vanish
    zero = size == 0
    x = x / size.masked_fill(zero, 1)
    length = x.square().sum(-1, keepdim=True).masked_fill(zero, 1).sqrt()
    return (x / length).masked_fill(zero, 0)


def _ragged(
    queries: Tokens,
    documents: Tokens,
    query_mask: Mask,
    document_mask: Mask,
    options: _Options,
    names: tuple[str, str],
) -> tuple[Tensor, Tensor | None]:
    """Groups of documents of similar lengths, one padded problem each."""
    if options.layout == "candidates":
        _checks.reject(
            names[1],
            'padded tensors in layout "candidates"',
            "a list or offsets",
            'Repeat the queries and use layout "pairwise".',
        )
    sides = []
    for name, tokens, mask in ((names[0], queries, query_mask), (names[1], documents, document_mask)):
        sides.append(
            ragged.read(name, tokens, mask) if ragged.is_ragged(tokens) else _rows(name, tokens, mask)
        )
    left, right = sides
    _checks.same_dtype(names[1], right.values, left.values, names[0])
    _checks.same_device(names[1], right.values, left.values, names[0])
    if right.values.shape[-1] != left.values.shape[-1]:
        _reject_features(names, left.values.shape[-1], right.values)
    pairwise = options.layout == "pairwise"
    if pairwise and len(left.lengths) != len(right.lengths):
        _checks.reject(
            names[1],
            f"{len(left.lengths)} sets, one for each of {names[0]}",
            f"{len(right.lengths)}",
            'Use layout="all_pairs", or pair them up.',
        )
    everyone = list(range(len(right.lengths)))
    # what competes for the k largest similarities must stay together
    parts = [everyone] if options.topk or not everyone else ragged.groups(right)
    scores, voids = [], []
    all_queries = None if pairwise else ragged.pad(left, list(range(len(left.lengths))))
    for members in parts:
        q = ragged.pad(left, members) if all_queries is None else all_queries
        d = ragged.pad(right, members)
        score, void = _padded(q.values, d.values, q.mask, d.mask, options, names)
        scores.append(score)
        voids.append(torch.zeros_like(score, dtype=torch.bool) if void is None else void)
    back = sorted(everyone, key=[one for part in parts for one in part].__getitem__)
    place = torch.tensor(back, device=left.values.device, dtype=torch.int64)
    return torch.cat(scores, -1).index_select(-1, place), torch.cat(voids, -1).index_select(-1, place)


def _rows(name: str, tokens: Tokens, mask: Mask) -> ragged.Ragged:
    """A padded tensor beside a ragged partner: sets of one length, whose padding is a hole."""
    _checks.real_tensor(name, tokens)
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        _checks.reject(name, "shape (N, L, d) beside a list", _checks.describe(tokens), "Flatten the batch.")
    count, length = tokens.shape[:2]
    known = _check_mask(ragged.mask_name(name), mask, tokens, name)
    begins = [length * one for one in range(count)]
    flat = None if known is None else known.reshape(-1)
    return ragged.Ragged(tokens.reshape(-1, tokens.shape[-1]), flat, begins, [length] * count)


def _check_tokens(queries: object, documents: object, layout: str, names: tuple[str, str]) -> None:
    least = {"all_pairs": (3, 3), "pairwise": (2, 2), "candidates": (2, 3)}[layout]
    forms = {2: "(*batch, length, d)", 3: "(*batch, number, length, d)"}
    for name, tokens, dims in zip(names, (queries, documents), least, strict=True):
        _checks.real_tensor(name, tokens)
        if isinstance(tokens, Tensor) and tokens.dim() < dims:
            _checks.reject(
                name, f"shape {forms[dims]} in layout {layout!r}", _checks.describe(tokens), "Unsqueeze it."
            )
    if isinstance(queries, Tensor) and isinstance(documents, Tensor):
        _checks.same_dtype(names[1], documents, queries, names[0])
        _checks.same_device(names[1], documents, queries, names[0])
        if documents.shape[-1] != queries.shape[-1]:
            _reject_features(names, queries.shape[-1], documents)


def _reject_features(names: tuple[str, str], features: int, documents: Tensor) -> None:
    _checks.reject(
        names[1],
        f"{features} features per token, as {names[0]} has",
        _checks.describe(documents),
        "Compute both with the same network.",
    )


def _check_mask(name: str, mask: Mask, tokens: Tensor, of: str) -> Tensor | None:
    if mask is None:
        return None
    _checks.bool_tensor(name, mask)
    if not isinstance(mask, Tensor):
        raise TypeError(name)  # unreachable: bool_tensor has raised
    _checks.same_device(name, mask, tokens, of)
    _checks.broadcastable(name, mask, tokens.shape[:-1], f"the shape of {of} without features")
    return mask.expand(tokens.shape[:-1])


def _check_options(
    layout: str,
    reduction: str,
    normalize: bool,
    temperature: float | Tensor | None,
    topk: int | None,
    empty: float,
    chunk_bytes: int | None,
    dtype: torch.dtype | None,
) -> _Options:
    _checks.choice("layout", layout, LAYOUTS)
    _checks.choice("reduction", reduction, ("sum", "mean"))
    if not isinstance(normalize, bool):
        _checks.reject(
            "normalize", "a bool", _checks.describe(normalize), "Pass True for cosines.", TypeError
        )
    if isinstance(temperature, Tensor):
        _checks.real_tensor("temperature", temperature)
        if temperature.dim():
            _checks.reject("temperature", "one number", _checks.describe(temperature), "Pass a scalar.")
        if seen(~((temperature > 0) & (temperature < math.inf))):
            _checks.reject("temperature", "a positive number in a tensor", temperature.item(), "Pass None.")
    elif temperature is not None:
        _number("temperature", temperature, "Pass None for the maximum.")
        if not 0 <= temperature < math.inf:
            _checks.reject("temperature", "a finite number >= 0", temperature, "0 is the maximum.")
    for name, value in (("topk", topk), ("chunk_bytes", chunk_bytes)):
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                _checks.reject(name, "an int or None", _checks.describe(value), "Pass None.", TypeError)
            if value < 1:
                _checks.reject(name, "at least 1", value, "Pass None.")
    if topk is not None and layout == "pairwise":
        _checks.reject("topk", 'None in layout "pairwise"', topk, "One document has nothing to compete with.")
    if topk is not None and (isinstance(temperature, Tensor) or temperature):
        _checks.reject("topk", "None with a temperature", topk, "Pick one of the two.")
    _number("empty", empty, "Pass 0.0 or -inf.")
    if math.isnan(empty):
        _checks.reject("empty", "a number", empty, "Pass 0.0 or -inf.")
    if dtype is not None and dtype not in _checks.REAL:
        known = isinstance(dtype, torch.dtype)
        _checks.reject(
            "dtype",
            "float64, float32, bfloat16, float16 or None",
            dtype if known else _checks.describe(dtype),
            "Pass torch.float32.",
            ValueError if known else TypeError,
        )
    temperature = 0.0 if temperature is None else temperature
    return _Options(layout, reduction, normalize, temperature, topk or 0, float(empty), chunk_bytes or 0)


def _number(name: str, value: object, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _checks.reject(name, "a float", _checks.describe(value), remedy, TypeError)
