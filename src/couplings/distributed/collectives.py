"""What moves between ranks: an agreement on shapes, a differentiable gather, and a ring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from couplings._checks import HALF, describe, reject
from couplings._rowwise import apply

Group = Any
"""A ``torch.distributed.ProcessGroup``; None is the default group."""

# torch 2.13 renames both, older ones know only the old names, and a torch without torch.distributed neither
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)


def position(group: Group = None) -> tuple[int, int]:
    """This process's rank in the group, and the group's size; (0, 1) where nothing is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        reject("group", "a group that this process belongs to", "another", "Call on its members only.")
    return rank, dist.get_world_size(group)


def agree(
    tensors: Mapping[str, Tensor | None], group: Group, error: Exception | None = None
) -> dict[str, list[int]]:
    """How many rows each rank has of each tensor, after every rank has seen that all else is alike.

    Raises on every rank where one has an error of its own or where they do not fit together: a rank that raised alone
    would leave the others waiting.

    Args:
        tensors: name and local tensor, or None.
        group: the group.
        error: what is wrong on this rank already.
    """
    mine: dict[str, Any] | str
    if error is not None:
        mine = f"{type(error).__name__}: {error}"
    else:
        recorded = torch.is_grad_enabled()
        mine = {
            name: None if x is None else (tuple(x.shape), str(x.dtype), recorded and x.requires_grad)
            for name, x in tensors.items()
        }
    every: list[Any] = [None] * position(group)[1]
    dist.all_gather_object(every, mine, group=group)
    if error is not None:
        raise error
    for rank, other in enumerate(every):
        if isinstance(other, str):
            raise ValueError(f"rank {rank} of the group could not take part: {other}")
    rows = {}
    for name in tensors:
        forms = [other.get(name) for other in every]
        apart = [form and (form[0][1:], *form[1:]) for form in forms]
        if any(form != apart[0] for form in apart):
            found = [form and f"{form[1]} {form[0]}{', with gradient' * form[2]}" for form in forms]
            reject(
                name,
                "on every rank the same dtype, dimensions after the first, and requires_grad",
                ", ".join(f"{text or 'nothing'} on rank {rank}" for rank, text in enumerate(found)),
                "Only the number of rows may differ.",
            )
        rows[name] = [form[0][0] if form and form[0] else 0 for form in forms]
    return rows


def gather(x: Tensor, group: Group = None) -> Tensor:
    """The rows of all ranks, in the order of the ranks; differentiable to any order.

    The gradient of a rank's rows is the sum of what all ranks have asked of them (reduce-scatter; half precision is
    summed in float32), so that ``backward`` must be called on every rank. Without an initialised process group, and in
    a group of one, it is the identity. Each call also exchanges the shapes, which waits for all ranks.

    Args:
        x: (n, ...) of any dtype; ranks may differ in n, and in nothing else.
        group: a process group, gloo or nccl; None is the default one.

    Returns:
        (sum of n, ...).

    Raises:
        TypeError: x is no tensor.
        ValueError: x has no dimension, or ranks differ in more than n. Every rank raises.

    Example:
        >>> import torch
        >>> gather(torch.ones(2, 3)).shape  # one process: what went in
        torch.Size([2, 3])
    """
    size = position(group)[1]
    error: Exception | None = None
    if not isinstance(x, Tensor):
        error = TypeError(f"x: expected a tensor, got {describe(x)}. Pass torch.as_tensor(x).")
    elif x.ndim == 0:
        error = ValueError(f"x: expected at least one dimension, got {describe(x)}. Call x.reshape(1).")
    if size == 1:
        if error is not None:
            raise error
        return x
    return gathered(x, agree({"x": x}, group, error)["x"], group)


def gathered(x: Tensor, rows: list[int], group: Group) -> Tensor:
    """``gather`` where the rows of each rank are known."""
    found: Tensor = apply(_Gather, x, rows, group)
    return found


class _Gather(torch.autograd.Function):
    """All rows from each rank's; its transpose is ``_SumHome``, and the other way round."""

    @staticmethod
    def forward(x: Tensor, rows: list[int], group: Group) -> Tensor:
        most = max(rows)
        if most == 0:
            return x.clone()
        sent = _padded(x, most)
        out = sent.new_empty((len(rows) * most, *x.shape[1:]))
        # as bytes: nothing is computed here, and not every backend knows every dtype
        _all_gather(out.view(torch.uint8), sent.view(torch.uint8), group=group)
        if min(rows) == most:
            return out
        return torch.cat([part[:count] for part, count in zip(out.split(most), rows, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.rows, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return apply(_SumHome, slope, ctx.rows, ctx.group), None, None


class _SumHome(torch.autograd.Function):
    """Each rank's rows of the sum of all ranks' tensors."""

    @staticmethod
    def forward(slope: Tensor, rows: list[int], group: Group) -> Tensor:
        most, mine = max(rows), rows[position(group)[0]]
        if most == 0:
            return slope.clone()
        wide = slope.float() if slope.dtype in HALF else slope
        if min(rows) < most:
            wide = torch.cat([_padded(part, most) for part in wide.split(rows)])
        out = wide.new_empty((most, *wide.shape[1:]))
        _reduce_scatter(out, wide.contiguous(), group=group)
        return out[:mine].to(slope.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.rows, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return apply(_Gather, slope, ctx.rows, ctx.group), None, None


def _padded(x: Tensor, rows: int) -> Tensor:
    """``x`` with zeros below, up to ``rows`` rows."""
    if x.shape[0] == rows:
        return x.contiguous()
    out = x.new_zeros((rows, *x.shape[1:]))
    out[: x.shape[0]] = x
    return out


@dataclass(frozen=True)
class Ring:
    """The ranks in a circle: at step s, rank r holds the block of rank r - s.

    Attributes:
        rows: of each rank's block.
        group: the group.
    """

    rows: list[int]
    group: Group

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.rows)

    @property
    def rank(self) -> int:
        """This process's."""
        return position(self.group)[0]

    def owner(self, step: int) -> int:
        """Whose block is here at a step."""
        return (self.rank - step) % self.size

    def span(self, rank: int) -> slice:
        """Where a rank's rows are among all."""
        ends = [0, *accumulate(self.rows)]
        return slice(ends[rank], ends[rank + 1])

    def load(self, block: Tensor) -> Tensor:
        """This rank's block, as it travels: as long as the longest."""
        return _padded(block, max(self.rows))

    def start(self, block: Tensor) -> tuple[Tensor, list[Any]]:
        """Begin to send a block on and to receive the next; ``finish`` waits for it."""
        ahead, behind = ((self.rank + step) % self.size for step in (1, -1))
        found = torch.empty_like(block)
        moves = [
            dist.P2POp(dist.isend, block, group=self.group, group_peer=ahead),
            dist.P2POp(dist.irecv, found, group=self.group, group_peer=behind),
        ]
        return found, dist.batch_isend_irecv(moves)

    @staticmethod
    def finish(moving: tuple[Tensor, list[Any]]) -> Tensor:
        """The block received."""
        found, works = moving
        for work in works:
            work.wait()
        return found
