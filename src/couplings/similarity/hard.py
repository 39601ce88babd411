"""The hard maximum: scores, winners, and gradients of every order through them (README.md, "Gradients").

With the winners fixed, the score is one trilinear form in the cotangent, the queries and the documents. It and its two
gradients are three functions whose derivatives are these three again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._rowwise import RowFunction, apply
from couplings.similarity.tiles import Products, Tile, best, budget, grid_dtype, hide, tiles, working
from couplings.similarity.topk import Largest
from couplings.transport._progress import any_true

PAIR = 64
"""Bytes that the gradients hold for a document and a query token, about."""


class MaxSim(RowFunction):
    """Scores (*batch, I, J), and the winning token of each document for each query token, (*batch, J, I, Lq) int32.

    The winner is -1 where a query token adds nothing: one that is masked, a document without a token, with ``topk`` a
    document of which the query token retrieves nothing. Winners are (*batch, 0) unless ``keep``.
    """

    @staticmethod
    def forward(
        queries: Tensor,
        documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        topk: int,
        keep: bool,
        limit: int,
    ) -> tuple[Tensor, Tensor]:
        """(*batch, I, Lq, d), (*batch, J, Ld, d), (*batch, I, Lq) or None, (*batch, J, Ld) or None; topk = 0: all."""
        run = _score_op if torch.compiler.is_compiling() else _score
        return cast(
            tuple[Tensor, Tensor], run(queries, documents, query_mask, document_mask, topk, keep, limit)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs and the winners."""
        queries, documents, query_mask, document_mask, ctx.topk, _, ctx.limit = inputs
        ctx.save_for_backward(queries, documents, query_mask, document_mask, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, documents, query_mask, document_mask, winners = ctx.saved_tensors
        if (
            winners.dim() != queries.dim()
        ):  # a transform that hid from the caller that there would be a backward pass
            _, winners = apply(
                MaxSim,
                queries.detach(),
                documents.detach(),
                query_mask,
                document_mask,
                ctx.topk,
                True,
                ctx.limit,
            )
        wanted = ctx.needs_input_grad
        return (
            apply(_QueryGradient, cotangent, queries, documents, winners, ctx.limit) if wanted[0] else None,
            apply(_DocumentGradient, cotangent, queries, documents, winners, ctx.limit)
            if wanted[1]
            else None,
            None,
            None,
            None,
            None,
            None,
        )


class _Chosen(RowFunction):
    """The scores with the winners given: S_ij = sum_q <Q_iq, D_j,w(j,i,q)>."""

    @staticmethod
    def forward(queries: Tensor, documents: Tensor, winners: Tensor, limit: int) -> Tensor:
        run = _chosen_op if torch.compiler.is_compiling() else _chosen
        return cast(Tensor, run(queries, documents, winners, limit))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.limit = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        queries, documents, winners = ctx.saved_tensors
        return (
            apply(_QueryGradient, cotangent, queries, documents, winners, ctx.limit),
            apply(_DocumentGradient, cotangent, queries, documents, winners, ctx.limit),
            None,
            None,
        )


class _QueryGradient(RowFunction):
    """sum_j G_ij D_j,w(j,i,q), (*batch, I, Lq, d); the queries lend only their shape and dtype."""

    @staticmethod
    def forward(cotangent: Tensor, queries: Tensor, documents: Tensor, winners: Tensor, limit: int) -> Tensor:
        run = _query_gradient_op if torch.compiler.is_compiling() else _query_gradient
        return cast(Tensor, run(cotangent, queries, documents, winners, limit))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        cotangent, _, documents, winners, ctx.limit = inputs
        ctx.save_for_backward(cotangent, documents, winners)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        outer, documents, winners = ctx.saved_tensors
        return (
            apply(_Chosen, cotangent, documents, winners, ctx.limit),
            None,
            apply(_DocumentGradient, outer, cotangent, documents, winners, ctx.limit),
            None,
            None,
        )


class _DocumentGradient(RowFunction):
    """sum of G_ij Q_iq over the (i, q) that l won, (*batch, J, Ld, d); the documents lend only shape and dtype."""

    @staticmethod
    def forward(cotangent: Tensor, queries: Tensor, documents: Tensor, winners: Tensor, limit: int) -> Tensor:
        run = _document_gradient_op if torch.compiler.is_compiling() else _document_gradient
        return cast(Tensor, run(cotangent, queries, documents, winners, limit))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        cotangent, queries, _, winners, ctx.limit = inputs
        ctx.save_for_backward(cotangent, queries, winners)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        outer, queries, winners = ctx.saved_tensors
        return (
            apply(_Chosen, queries, cotangent, winners, ctx.limit),
            apply(_QueryGradient, outer, queries, cotangent, winners, ctx.limit),
            None,
            None,
            None,
        )


def _score(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    topk: int,
    keep: bool,
    limit: int,
) -> tuple[Tensor, Tensor]:
    batch, (count, length, dim) = queries.shape[:-3], queries.shape[-3:]
    total, tokens = documents.shape[-3:-1]
    items, rows = batch.numel(), count * length
    product = Products(grid_dtype(queries, documents), queries.device)
    if topk and product.rounds:
        product = Products(torch.float32, queries.device)  # exact similarities decide what is retrieved
    dtype = working(product.dtype)
    scores = torch.zeros(items, count, total, dtype=dtype, device=queries.device)
    winners = torch.full((items, total, rows if keep else 0), -1, dtype=torch.int32, device=queries.device)
    if scores.numel() and length and tokens:
        q, d = queries.reshape(items, rows, dim), documents.reshape(items, total, tokens, dim)
        seen = None if query_mask is None else query_mask.reshape(items, 1, rows)
        live = None if document_mask is None else document_mask.reshape(items, total, tokens)
        largest = Largest(topk, items, total, rows, dtype, queries.device) if topk else None
        footprint = max(tokens * product.dtype.itemsize, dim * dtype.itemsize if product.rounds else 0)
        with full_precision(queries):
            for items_at, documents_at, height in tiles(
                items, total, footprint, rows, budget(limit, q.device)
            ):
                at = items_at, documents_at
                alive = None if live is None else live[at]
                watch = None if largest is None else partial(largest.watch, items_at)
                values, index = _maxima(product, q[items_at], d[at], alive, height, keep, watch)
                if alive is not None:
                    idle = ~alive.any(-1, keepdim=True)
                    values.masked_fill_(idle, 0)
                    index = None if index is None else index.masked_fill_(idle, -1)
                if seen is not None:
                    values.masked_fill_(~seen[items_at], 0)
                    index = None if index is None else index.masked_fill_(~seen[items_at], -1)
                if index is not None and keep:
                    winners[at] = index.to(torch.int32)
                if largest is None:
                    scores[items_at, :, documents_at] = values.unflatten(-1, (count, length)).sum(-1).mT
                else:
                    largest.values[at] = values
        if largest is not None:
            scores = largest.drop_(winners).unflatten(-1, (count, length)).sum(-1).mT.contiguous()
    shape = (total, count, length) if keep else (0,)
    return scores.view(*batch, count, total), winners.view(*batch, *shape)


def _maxima(
    product: Products,
    queries: Tensor,
    documents: Tensor,
    live: Tensor | None,
    height: int,
    where: bool,
    watch: Callable[[slice, Tensor], None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Largest similarity of each of (items, R, d) query tokens in each of (items, n, Ld, d) documents, and its place.

    Both (items, n, R). Of a document without tokens they mean nothing.
    """
    items, total, tokens, dim = documents.shape
    rows = queries.shape[1]
    dtype = working(product.dtype)
    values = torch.empty(items, total, rows, dtype=dtype, device=queries.device)
    index = torch.empty(items, total, rows, dtype=torch.int64, device=queries.device) if where else None
    right = product.operand(documents, product.documents)
    for start in range(0, rows, height):
        at = slice(start, min(rows, start + height))
        left = queries[:, at]
        grid = product(right, product.operand(left, product.queries))
        if live is not None:
            hide(grid, live.reshape(-1, tokens))
        value, place = best(grid, where or product.rounds)
        if watch is not None:
            watch(at, grid.view(items, total * tokens, -1))
        if product.rounds and place is not None:
            # rounding keeps the order, so the winner is a largest one up to rounding; its similarity is made again
            row = place + tokens * torch.arange(len(place), device=place.device).unsqueeze(-1)
            chosen = documents.reshape(-1, dim).index_select(0, row.view(-1)).to(dtype)
            chosen = chosen.view(items, total, -1, dim).mul_(left.to(dtype).unsqueeze(1))
            value = chosen.sum(-1)
        values[:, :, at] = value.view(items, total, -1)
        if index is not None and place is not None:
            index[:, :, at] = place.view(items, total, -1)
    return values, index


def _chosen(queries: Tensor, documents: Tensor, winners: Tensor, limit: int) -> Tensor:
    batch, (count, length, dim) = queries.shape[:-3], queries.shape[-3:]
    total, tokens = documents.shape[-3:-1]
    items, rows = batch.numel(), count * length
    dtype = torch.promote_types(working(queries.dtype), working(documents.dtype))
    scores = torch.zeros(items, count, total, dtype=dtype, device=queries.device)
    if scores.numel() and length and tokens:
        q, d = queries.reshape(items, rows, dim), documents.reshape(items, total, tokens, dim)
        w = winners.reshape(items, total, rows)
        for items_at, documents_at, height in tiles(
            items, total, dim * dtype.itemsize, rows, budget(limit, q.device)
        ):
            table, won = d[items_at, documents_at].reshape(-1, dim), w[items_at, documents_at]
            parts = []
            for start in range(0, rows, height):
                part = won[..., start : start + height]
                place = _places(part, tokens)
                found = table.index_select(0, place.clamp(min=0).view(-1)).to(dtype).view(*part.shape, dim)
                found = found * q[items_at, None, start : start + height].to(dtype)
                parts.append(found.sum(-1).masked_fill_(part < 0, 0))
            values = torch.cat(parts, -1).unflatten(-1, (count, length))
            scores[items_at, :, documents_at] = values.sum(-1).mT
    return scores.view(*batch, count, total)


def _query_gradient(
    cotangent: Tensor, queries: Tensor, documents: Tensor, winners: Tensor, limit: int
) -> Tensor:
    batch, (count, length, dim) = queries.shape[:-3], queries.shape[-3:]
    total, tokens = documents.shape[-3:-1]
    items, rows = batch.numel(), count * length
    dtype = cotangent.dtype
    out = torch.zeros(items, rows, dim, dtype=dtype, device=queries.device)
    if total and out.numel() and tokens:
        d, w = documents.reshape(items, total, tokens, dim), winners.reshape(items, total, rows)
        g = cotangent.reshape(items, count, total)
        for items_at, documents_at, _ in _blocks(items, total, tokens * dim, rows, budget(limit, w.device)):
            table = d[items_at, documents_at].reshape(-1, dim).to(dtype)
            place = _places(w[items_at, documents_at], tokens)
            idle = place < 0
            if any_true(idle):  # they find the row after the last, which is zero
                place = torch.where(idle, len(table), place)
                table = torch.cat([table, table.new_zeros(1, dim)])
            place = place.mT.reshape(-1, place.shape[1])
            weight = g[items_at, :, documents_at].unsqueeze(2).expand(-1, -1, length, -1).reshape(place.shape)
            found = torch.nn.functional.embedding_bag(place, table, mode="sum", per_sample_weights=weight)
            out[items_at] += found.view(-1, rows, dim)
    return out.view(queries.shape).to(queries.dtype)


def _document_gradient(
    cotangent: Tensor, queries: Tensor, documents: Tensor, winners: Tensor, limit: int
) -> Tensor:
    batch, (count, length, dim) = queries.shape[:-3], queries.shape[-3:]
    total, tokens = documents.shape[-3:-1]
    items, rows = batch.numel(), count * length
    if not (total and tokens and dim and items and rows):
        return torch.zeros_like(documents, memory_format=torch.contiguous_format)
    out = torch.empty(items, total, tokens, dim, dtype=documents.dtype, device=documents.device)
    q, w = queries.reshape(items, rows, dim), winners.reshape(items, total, rows)
    g = cotangent.reshape(items, count, total)
    for items_at, documents_at, _ in _blocks(items, total, tokens * dim, rows, budget(limit, w.device)):
        won = w[items_at, documents_at]
        pairs = won.shape[0] * won.shape[1]
        table = q[items_at].reshape(-1, dim).to(cotangent.dtype)
        # Query tokens sorted by the document token they picked; within one, in their own order, so that every sum
        # has one order. Those that picked none go last, into a bag that is thrown away.
        place = _places(won, tokens).view(-1)
        place = torch.where(place < 0, pairs * tokens, place)
        place, order = place.sort(stable=True)
        row = torch.arange(len(table), device=place.device, dtype=place.dtype).view(-1, 1, rows)
        row = row.expand(won.shape).reshape(-1).index_select(0, order)
        weight = g[items_at, :, documents_at].mT.unsqueeze(-1).expand(-1, -1, -1, length)
        weight = weight.reshape(-1).index_select(0, order)
        first = torch.searchsorted(
            place,
            torch.arange(pairs * tokens + 1, device=place.device, dtype=place.dtype),
            out_int32=place.dtype == torch.int32,
        )
        found = torch.nn.functional.embedding_bag(row, table, first, mode="sum", per_sample_weights=weight)
        out[items_at, documents_at] = found[:-1].view(*won.shape[:2], tokens, dim)
    return out.view(documents.shape)


def _blocks(items: int, documents: int, entries: int, rows: int, limit: int) -> Iterator[Tile]:
    """Tiles of documents with all query tokens: integers and weights for each pair, and the documents' entries."""
    return tiles(items, documents, 8 * entries + PAIR * rows, 1, limit)


def _places(winners: Tensor, tokens: int) -> Tensor:
    """(items, n, R) winners as rows of the (items n tokens, d) documents; -1 stays negative."""
    pairs = winners.shape[0] * winners.shape[1]
    wide = torch.int32 if (pairs + 1) * tokens + winners.numel() < 2**31 else torch.int64
    begin = torch.arange(0, pairs * tokens, tokens, device=winners.device, dtype=wide)
    return torch.where(winners < 0, -1, winners.to(wide) + begin.view(*winners.shape[:2], 1))


_score_op = torch.library.custom_op("couplings::maxsim", _score, mutates_args=())
_chosen_op = torch.library.custom_op("couplings::maxsim_chosen", _chosen, mutates_args=())
_query_gradient_op = torch.library.custom_op(
    "couplings::maxsim_query_gradient", _query_gradient, mutates_args=()
)
_document_gradient_op = torch.library.custom_op(
    "couplings::maxsim_document_gradient", _document_gradient, mutates_args=()
)


@_score_op.register_fake
def _(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    topk: int,
    keep: bool,
    limit: int,
) -> tuple[Tensor, Tensor]:
    *batch, count, length, _ = queries.shape
    dtype = torch.promote_types(working(queries.dtype), working(documents.dtype))
    shape = (documents.shape[-3], count, length) if keep else (0,)
    return (
        queries.new_empty((*batch, count, documents.shape[-3]), dtype=dtype),
        queries.new_empty((*batch, *shape), dtype=torch.int32),
    )


@_chosen_op.register_fake
def _(queries: Tensor, documents: Tensor, winners: Tensor, limit: int) -> Tensor:
    dtype = torch.promote_types(working(queries.dtype), working(documents.dtype))
    return queries.new_empty((*queries.shape[:-2], documents.shape[-3]), dtype=dtype)


@_query_gradient_op.register_fake
def _(cotangent: Tensor, queries: Tensor, documents: Tensor, winners: Tensor, limit: int) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


@_document_gradient_op.register_fake
def _(cotangent: Tensor, queries: Tensor, documents: Tensor, winners: Tensor, limit: int) -> Tensor:
    return torch.empty_like(documents, memory_format=torch.contiguous_format)
