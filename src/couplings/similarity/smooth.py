"""The smooth maximum: base-2 log-sum-exp over a document's tokens, never the grid (README.md, "Smooth maximum").

Base 2, since exp2 stays fast on a CPU where it underflows to 0, which exp does not. Nothing is kept for the backward
pass: a tile holds whole documents, so its weights are made again from its products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._rowwise import RowFunction, apply
from couplings.similarity.tiles import ROWS, Products, Scratch, budget, hide, tiles, working
from couplings.transport._progress import any_true

LN2 = math.log(2)

NEAR = 32
"""The largest logit is brought into [-32, 32]: 2^32 does not overflow, and beside 2^-32 what underflows is nothing."""

FLOOR = -96
"""Below it a shifted logit counts for nothing, as 2^-96 does: denormal numbers take ten times as long."""


class SmoothMaxSim(RowFunction):
    """sum_q log2 sum_l 2^<Q_iq, D_jl>, (*batch, I, J); 0 for a document without tokens."""

    @staticmethod
    def forward(
        queries: Tensor,
        documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        limit: int,
    ) -> Tensor:
        """(*batch, I, Lq, d), (*batch, J, Ld, d), (*batch, I, Lq) or None, (*batch, J, Ld) or None."""
        run = _score_op if torch.compiler.is_compiling() else _score
        return cast(Tensor, run(queries, documents, query_mask, document_mask, limit))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs."""
        *tensors, ctx.limit = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        grads = apply(_Gradient, cotangent, *ctx.saved_tensors, wanted[0], wanted[1], ctx.limit)
        return *(grad if want else None for grad, want in zip(grads, wanted)), None, None, None


class _Gradient(RowFunction):
    """Both gradients, each (*batch, 0) if it is not wanted."""

    @staticmethod
    def forward(
        cotangent: Tensor,
        queries: Tensor,
        documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        for_queries: bool,
        for_documents: bool,
        limit: int,
    ) -> tuple[Tensor, Tensor]:
        run = _gradient_op if torch.compiler.is_compiling() else _gradient
        return cast(
            tuple[Tensor, Tensor],
            run(cotangent, queries, documents, query_mask, document_mask, for_queries, for_documents, limit),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.for_queries, ctx.for_documents, ctx.limit = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, along_queries: Tensor, along_documents: Tensor) -> tuple[Tensor | None, ...]:
        cotangent, queries, documents, query_mask, document_mask = ctx.saved_tensors
        # a gradient that was not wanted leads nowhere: no direction
        if not ctx.for_queries:
            along_queries = torch.zeros_like(queries)
        if not ctx.for_documents:
            along_documents = torch.zeros_like(documents)
        grads = apply(
            _Second,
            cotangent,
            queries,
            documents,
            along_queries,
            along_documents,
            query_mask,
            document_mask,
            ctx.limit,
        )
        return *grads, None, None, None, None, None


class _Second(RowFunction):
    """Gradient of the scores' derivative along a direction, in cotangent, queries and documents."""

    @staticmethod
    def forward(
        cotangent: Tensor,
        queries: Tensor,
        documents: Tensor,
        along_queries: Tensor,
        along_documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        limit: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = _second_op if torch.compiler.is_compiling() else _second
        return cast(
            tuple[Tensor, Tensor, Tensor],
            run(
                cotangent,
                queries,
                documents,
                along_queries,
                along_documents,
                query_mask,
                document_mask,
                limit,
            ),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """From the third order on by plain torch code, which does hold the grid."""
        *tensors, query_mask, document_mask = ctx.saved_tensors
        plain = partial(_dense_second, query_mask=query_mask, document_mask=document_mask)
        pull: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = torch.func.vjp(plain, *tensors)[1]
        return *pull(cotangents), None, None, None


class _Work:
    """What the three passes share: inputs as (items, ..), tile after tile."""

    def __init__(
        self,
        queries: Tensor,
        documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        limit: int,
    ) -> None:
        self.batch, (self.count, self.length, self.dim) = queries.shape[:-3], queries.shape[-3:]
        self.total, self.tokens = documents.shape[-3:-1]
        self.items, self.rows = self.batch.numel(), self.count * self.length
        self.dtype = torch.promote_types(working(queries.dtype), working(documents.dtype))
        self.device = queries.device
        self.seen = None if query_mask is None else query_mask.reshape(self.items, self.rows)
        self.live = (
            None if document_mask is None else document_mask.reshape(self.items, self.total, self.tokens)
        )
        self.queries, self.documents = self.of_queries(queries), self.of_documents(documents)
        self.longest = torch.linalg.vector_norm(self.queries, dim=-1).amax() if self.queries.numel() else 0.0
        self.product = Products(self.dtype, self.device)
        self.loaded = self.scratch()
        size = self.items * self.total * self.tokens * self.rows
        width, limit = self.tokens * self.dtype.itemsize, budget(limit, queries.device)
        if documents.dtype != self.dtype and size:  # the documents' copy wants its place in the cache, too
            width += width * self.dim // min(self.rows, ROWS)
        self.tiles = list(tiles(self.items, self.total, width, self.rows, limit) if size else ())

    def scratch(self) -> Scratch:
        """Room for tiles of documents."""
        return Scratch(self.dtype, self.device)

    def zeros(self, *shape: int) -> Tensor:
        """An output that tiles are added to."""
        return torch.zeros(self.items, *shape, dtype=self.dtype, device=self.device)

    def of_queries(self, x: Tensor) -> Tensor:
        """(*batch, I, Lq, d) as (items, rows, d), 0 where masked."""
        x = x.reshape(self.items, self.rows, self.dim).to(self.dtype)
        return x if self.seen is None else x.masked_fill(~self.seen.unsqueeze(-1), 0)

    def of_documents(self, x: Tensor) -> Tensor:
        """(*batch, J, Ld, d) as (items, total, tokens, d); tiles of it go through ``tile`` or ``clean``."""
        return x.reshape(self.items, self.total, self.tokens, self.dim)

    def tile(self, x: Tensor, at: tuple[slice, slice]) -> Tensor:
        """A tile of documents with whatever stands where they are masked, valid until the next one."""
        x = x[at]
        return x if x.dtype == self.dtype else self.loaded.copy(x)

    def clean(self, x: Tensor, at: tuple[slice, slice], scratch: Scratch) -> Tensor:
        """A tile of documents, 0 where masked, valid until the next one in this scratch."""
        x = x[at]
        if self.live is None and x.dtype == self.dtype:
            return x
        x = scratch.copy(x)
        if self.live is not None:
            hide(x.flatten(0, 1), self.live[at].reshape(-1, self.tokens), 0)
        return x

    def logits(self, documents: Tensor, queries: Tensor, at: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        """Products, (pairs, Ld, r), -inf where masked, and their maximum over tokens (pairs, 1, r), 0 if all are."""
        grid = self.product(documents, queries)
        if self.live is not None:
            hide(grid, self.live[at].reshape(-1, self.tokens))
        top = grid.amax(1, keepdim=True)
        if self.live is not None:
            top.masked_fill_(top == -torch.inf, 0)  # a document without tokens
        return grid, top

    def calm(self, documents: Tensor) -> bool:
        """Whether no product with a tile of documents leaves [-NEAR, NEAR] (Cauchy, Schwarz), if looking is cheap."""
        if self.device.type != "cpu" or self.rows < self.dim:
            return False
        longest = torch.linalg.vector_norm(documents, dim=-1).amax() * self.longest
        return bool(longest <= 0.99 * NEAR)  # NaN is not; the rest is for rounding

    def log_sums(self, documents: Tensor, queries: Tensor, at: tuple[slice, slice], calm: bool) -> Tensor:
        """log2 sum_l 2^z_l of the products z, (pairs, r); where all is ``calm`` the same bits in fewer passes."""
        if calm:
            grid = self.product(documents, queries)
            if self.live is not None:
                hide(grid, self.live[at].reshape(-1, self.tokens))
            return grid.exp2_().sum(1).log2_()
        grid, top = self.logits(documents, queries, at)
        shift = torch.nn.functional.softshrink(top, NEAR)
        # taking 0 away changes no bit: whether it is done may depend on the others in a tile
        if any_true(shift):
            grid.sub_(shift)
        return self.powers(grid).sum(1).log2_() + shift.squeeze(1)

    @staticmethod
    def powers(logits: Tensor) -> Tensor:
        """2^z in place, 0 below the floor."""
        return torch.nn.functional.threshold(logits, FLOOR, -torch.inf, inplace=True).exp2_()

    def shares(self, documents: Tensor, queries: Tensor, at: tuple[slice, slice], total: Tensor) -> Tensor:
        """Weights 2^z scaled to sum to ``total`` (items, n, r) over each document; 0 in one without tokens."""
        grid, top = self.logits(documents, queries, at)
        weights = self.powers(grid.sub_(top))
        mass = weights.sum(1, keepdim=True)
        if self.live is not None:
            mass.masked_fill_(mass == 0, 1)
        return weights.mul_(total.reshape(mass.shape) / mass)

    @staticmethod
    def hidden(grad: Tensor, mask: Tensor | None, at: Any = slice(None)) -> Tensor:
        """A gradient, 0 where masked whatever it met there."""
        return grad if mask is None else grad.masked_fill_(~mask[at].unsqueeze(-1), 0)

    def spread(self, cotangent: Tensor) -> Tensor:
        """(*batch, I, J) as (items, J, rows), 0 where a query token is masked."""
        g = cotangent.reshape(self.items, self.count, self.total).to(self.dtype)
        g = g.mT.unsqueeze(-1).expand(-1, -1, -1, self.length).reshape(self.items, self.total, self.rows)
        return g if self.seen is None else g.masked_fill(~self.seen.unsqueeze(1), 0)

    def gather(self, values: Tensor) -> Tensor:
        """(items, J, rows) summed over each query's tokens, (*batch, I, J)."""
        if self.seen is not None:
            values = values.masked_fill(~self.seen.unsqueeze(1), 0)
        sums: Tensor = values.unflatten(-1, (self.count, self.length)).sum(-1)
        return sums.mT.reshape(*self.batch, self.count, self.total)


def _score(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None, document_mask: Tensor | None, limit: int
) -> Tensor:
    with full_precision(queries):
        work = _Work(queries, documents, query_mask, document_mask, limit)
        values = work.zeros(work.total, work.rows)
        for items, some, height in work.tiles:
            at = items, some
            right = work.tile(work.documents, at)
            calm = work.calm(right)
            for start in range(0, work.rows, height):
                rows = slice(start, start + height)
                value = work.log_sums(right, work.queries[items, rows], at, calm).view(*right.shape[:2], -1)
                if work.live is not None:
                    value.masked_fill_(~work.live[at].any(-1, keepdim=True), 0)
                values[items, some, rows] = value
        return work.gather(values).contiguous()


def _gradient(
    cotangent: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    for_queries: bool,
    for_documents: bool,
    limit: int,
) -> tuple[Tensor, Tensor]:
    with full_precision(queries):
        work = _Work(queries, documents, query_mask, document_mask, limit)
        grad_q = work.zeros(work.rows, work.dim) if for_queries else work.zeros(0)
        grad_d = torch.zeros(
            (work.items, work.total, work.tokens, work.dim) if for_documents else (work.items, 0),
            dtype=documents.dtype,
            device=work.device,
        )
        g = work.spread(cotangent)
        for items, some, height in work.tiles:
            at = items, some
            right = work.clean(work.documents, at, work.loaded)
            flat = right.flatten(1, 2)
            part = torch.zeros_like(flat) if for_documents else None
            for start in range(0, work.rows, height):
                rows = slice(start, start + height)
                left = work.queries[items, rows]
                shares = work.shares(right, left, at, g[items, some, rows]).view(*flat.shape[:2], -1)
                if for_queries:
                    grad_q[items, rows].baddbmm_(shares.mT, flat)
                if part is not None:
                    part.baddbmm_(shares, left)
            if part is not None:
                grad_d[at] = work.hidden(part.view(right.shape), work.live, at).to(grad_d.dtype)
        if for_queries:
            grad_q = work.hidden(grad_q, work.seen)
        return (
            grad_q.view(queries.shape if for_queries else (*work.batch, 0)).to(queries.dtype),
            grad_d.view(documents.shape if for_documents else (*work.batch, 0)),
        )


def _second(
    cotangent: Tensor,
    queries: Tensor,
    documents: Tensor,
    along_queries: Tensor,
    along_documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with full_precision(queries):
        work = _Work(queries, documents, query_mask, document_mask, limit)
        aside, turned = work.of_queries(along_queries), work.of_documents(along_documents)
        moved, turned_scratch = Products(work.dtype, work.device), work.scratch()
        values = work.zeros(work.total, work.rows)
        grad_q = work.zeros(work.rows, work.dim)
        grad_d = work.zeros(work.total, work.tokens, work.dim)
        g = work.spread(cotangent)
        for items, some, height in work.tiles:
            at = items, some
            right = work.clean(work.documents, at, work.loaded)
            along_right = work.clean(turned, at, turned_scratch)
            flat = right.flatten(1, 2)
            along_flat = along_right.reshape(flat.shape)
            part = torch.zeros_like(flat)
            for start in range(0, work.rows, height):
                rows = slice(start, start + height)
                left, along_left = work.queries[items, rows], aside[items, rows]
                shares = work.shares(right, left, at, torch.ones_like(g[items, some, rows]))
                speed = moved(right, along_left)  # of the products along the direction
                speed.view(*flat.shape[:2], -1).baddbmm_(along_flat, left.mT)
                mean = (shares * speed).sum(1, keepdim=True)
                values[items, some, rows] = mean.view(*right.shape[:2], -1)
                shares *= g[items, some, rows].reshape(mean.shape)
                bent = speed.sub_(mean).mul_(shares).mul_(LN2).view(*flat.shape[:2], -1)
                shares = shares.view(bent.shape)
                grad_q[items, rows].baddbmm_(bent.mT, flat).baddbmm_(shares.mT, along_flat)
                part.baddbmm_(bent, left).baddbmm_(shares, along_left)
            grad_d[at] = work.hidden(part.view(right.shape), work.live, at)
        return (
            work.gather(values).to(cotangent.dtype, copy=True),
            work.hidden(grad_q, work.seen).view(queries.shape).to(queries.dtype),
            grad_d.view(documents.shape).to(documents.dtype),
        )


def _dense_second(
    cotangent: Tensor,
    queries: Tensor,
    documents: Tensor,
    along_queries: Tensor,
    along_documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``_second`` at once, in differentiable torch code."""
    dtype = torch.promote_types(working(queries.dtype), working(documents.dtype))

    def tokens(x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.to(dtype)
        return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)

    def grid(q: Tensor, d: Tensor) -> Tensor:
        """(*batch, I, 1, Lq, d) against (*batch, 1, J, Ld, d)."""
        return q.unsqueeze(-3) @ d.unsqueeze(-4).mT

    q, along_q = tokens(queries, query_mask), tokens(along_queries, query_mask)
    d, along_d = tokens(documents, document_mask), tokens(along_documents, document_mask)
    logits = grid(q, d) * LN2
    idle = None
    if document_mask is not None:
        hidden = ~document_mask[..., None, :, None, :]
        idle = hidden.all(-1, keepdim=True)
        logits = logits.masked_fill(hidden & ~idle, -torch.inf)
    shares = logits.softmax(-1)
    weight = cotangent.to(dtype)[..., None, None]
    if idle is not None:
        shares = shares.masked_fill(idle, 0)
    if query_mask is not None:
        shares = shares * query_mask[..., :, None, :, None]
    speed = grid(along_q, d) + grid(q, along_d)
    mean = (shares * speed).sum(-1, keepdim=True)
    bent = LN2 * weight * shares * (speed - mean)
    shares = weight * shares
    grad_q = torch.einsum("...ijql,...jld->...iqd", bent, d) + torch.einsum(
        "...ijql,...jld->...iqd", shares, along_d
    )
    grad_d = torch.einsum("...ijql,...iqd->...jld", bent, q) + torch.einsum(
        "...ijql,...iqd->...jld", shares, along_q
    )
    return (
        mean.sum((-1, -2)).to(cotangent.dtype),
        grad_q.to(queries.dtype),
        grad_d.to(documents.dtype),
    )


_score_op = torch.library.custom_op("couplings::smooth_maxsim", _score, mutates_args=())
_gradient_op = torch.library.custom_op("couplings::smooth_maxsim_gradient", _gradient, mutates_args=())
_second_op = torch.library.custom_op("couplings::smooth_maxsim_second", _second, mutates_args=())


@_score_op.register_fake
def _(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None, document_mask: Tensor | None, limit: int
) -> Tensor:
    dtype = torch.promote_types(working(queries.dtype), working(documents.dtype))
    return queries.new_empty((*queries.shape[:-2], documents.shape[-3]), dtype=dtype)


@_gradient_op.register_fake
def _(
    cotangent: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    for_queries: bool,
    for_documents: bool,
    limit: int,
) -> tuple[Tensor, Tensor]:
    none = (*queries.shape[:-3], 0)
    return (
        queries.new_empty(queries.shape if for_queries else none),
        documents.new_empty(documents.shape if for_documents else none),
    )


@_second_op.register_fake
def _(
    cotangent: Tensor,
    queries: Tensor,
    documents: Tensor,
    along_queries: Tensor,
    along_documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        cotangent.new_empty(cotangent.shape),
        queries.new_empty(queries.shape),
        documents.new_empty(documents.shape),
    )
