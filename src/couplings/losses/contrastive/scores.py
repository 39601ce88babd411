"""Where the scores of a block of rows come from, and where their gradient goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from couplings._checks import reject

Similarity = Callable[[Tensor, Tensor], Tensor]

TILE_ROWS = 512
"""Rows of a block: fewer, and a matrix product no longer runs at full speed."""

TILE = 2**23
"""Scores that a block holds at most on a CPU."""

GPU_TILE = 2**26


def blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """The rows, block by block; follows from shapes alone."""
    on_cpu = device.type == "cpu"
    height = (TILE if on_cpu else GPU_TILE) // max(1, columns)
    height = max(1, min(height, TILE_ROWS if on_cpu else rows))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


class Dot:
    """logits = scale <x1_i, x2_j>."""

    def __init__(self, x1: Tensor, x2: Tensor, scale: Tensor) -> None:
        self.x1, self.x2, self.scale = x1, x2, scale
        self.shape = (x1.shape[0], x2.shape[0])
        self._right = x2.mT
        self._buffer: Tensor | None = None

    def bound(self) -> float:
        """No logit is larger in absolute value (Cauchy and Schwarz)."""
        longest = [torch.linalg.vector_norm(x, dim=-1).max() for x in (self.x1, self.x2)]
        return float(longest[0] * longest[1] * self.scale.abs()) if min(self.shape) else 0.0

    def logits(self, rows: slice) -> Tensor:
        """(r, m), to be overwritten by whoever asked, before the next call."""
        part = self.x1[rows] * self.scale
        if torch.compiler.is_compiling():
            return part @ self._right
        if self._buffer is None:
            self._buffer = part.new_empty(part.shape[0], self.shape[1])
        return torch.mm(part, self._right, out=self._buffer[: part.shape[0]])

    def start(self) -> None:
        """Before the first ``pull``."""
        self._first, self._second = torch.empty_like(self.x1), torch.zeros_like(self.x2)

    def pull(self, rows: slice, slope: Tensor) -> None:
        """Take the derivative of the loss in the logits of a block of rows, (r, m)."""
        self._first[rows] = slope @ self.x2
        self._second.addmm_(slope.mT, self.x1[rows])

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives in x1, x2 and scale."""
        by_scale = torch.linalg.vecdot(self._first, self.x1).sum(dtype=torch.float64).to(self.x1.dtype)
        return self._first.mul_(self.scale), self._second.mul_(self.scale), by_scale


class Matrix:
    """logits = scale * x1, a matrix that somebody else has made."""

    def __init__(self, x1: Tensor, scale: Tensor) -> None:
        self.x1, self.scale, self.shape = x1, scale, (x1.shape[0], x1.shape[1])

    def bound(self) -> float:
        """No logit is larger in absolute value."""
        return float(self.x1.abs().amax() * self.scale.abs()) if min(self.shape) else 0.0

    def logits(self, rows: slice) -> Tensor:
        """(r, m), to be overwritten by whoever asked."""
        return self.x1[rows] * self.scale

    def start(self) -> None:
        """Before the first ``pull``."""
        self._first = torch.empty_like(self.x1)
        self._by_scale = self.x1.new_zeros((), dtype=torch.float64)

    def pull(self, rows: slice, slope: Tensor) -> None:
        """Take the derivative of the loss in the logits of a block of rows, (r, m)."""
        torch.mul(slope, self.scale, out=self._first[rows])
        self._by_scale += (slope * self.x1[rows]).sum(dtype=torch.float64)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives in x1, in nothing, and in scale."""
        by_scale = self._by_scale.to(self.x1.dtype)
        return self._first, torch.zeros_like(by_scale), by_scale


class Computed:
    """logits = scale * similarity(x1[rows], x2), a user's function, differentiated by autograd block by block."""

    def __init__(self, x1: Tensor, x2: Tensor, scale: Tensor, similarity: Similarity) -> None:
        self.x1, self.x2, self.scale, self.similarity = x1.detach(), x2.detach(), scale.detach(), similarity
        self.shape = (x1.shape[0], x2.shape[0])
        self._asked = False

    def bound(self) -> float:
        """Nothing is known about it."""
        return torch.inf

    def logits(self, rows: slice) -> Tensor:
        """(r, m), to be overwritten by whoever asked."""
        with torch.set_grad_enabled(not self._asked):
            found = self.similarity(self.x1[rows], self.x2)
        want = (rows.stop - rows.start, self.shape[1])
        if not self._asked:
            check_tile(found, want, self.x1.dtype)
            if found.requires_grad:
                reject(
                    "similarity",
                    "a function whose only learned inputs are its two arguments",
                    "scores that depend on another tensor that requires a gradient",
                    "Apply parameters to x1 and x2 before the loss, or pass the matrix of scores as x1 and x2=None.",
                )
            self._asked = True
        return found * self.scale

    def start(self) -> None:
        """Before the first ``pull``."""
        self._first, self._second = torch.empty_like(self.x1), torch.zeros_like(self.x2)
        self._by_scale = self.x1.new_zeros((), dtype=torch.float64)

    def pull(self, rows: slice, slope: Tensor) -> None:
        """Take the derivative of the loss in the logits of a block of rows, (r, m)."""
        with torch.enable_grad():
            x1, x2 = self.x1[rows].detach().requires_grad_(), self.x2.detach().requires_grad_()
            found = self.similarity(x1, x2)
        first, second = torch.autograd.grad(found, (x1, x2), slope * self.scale, materialize_grads=True)
        self._first[rows] = first
        self._second += second
        self._by_scale += (slope * found.detach()).sum(dtype=torch.float64)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives in x1, x2 and scale."""
        return self._first, self._second, self._by_scale.to(self.x1.dtype)


def check_tile(found: object, want: tuple[int, int], dtype: torch.dtype) -> None:
    """What a user's similarity returned."""
    if not isinstance(found, Tensor) or tuple(found.shape) != want or found.dtype != dtype:
        got = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        reject(
            "similarity",
            f"scores of shape {want} and dtype {dtype} from {want[0]} rows of x1 and all of x2",
            got,
            "Return one score for each row of its first argument (rows) and of its second (columns).",
        )


Scores = Dot | Matrix | Computed


def provider(x1: Tensor, x2: Tensor | None, scale: Tensor, similarity: Similarity | None) -> Scores:
    """The source of the scores that the arguments ask for."""
    if x2 is None:
        return Matrix(x1, scale)
    return Dot(x1, x2, scale) if similarity is None else Computed(x1, x2, scale, similarity)


def all_logits(x1: Tensor, x2: Tensor | None, scale: Tensor, similarity: Similarity | None) -> Tensor:
    """All logits at once, (n, m), in differentiable torch code."""
    if x2 is None:
        return x1 * scale
    return (x1 @ x2.mT if similarity is None else similarity(x1, x2)) * scale
