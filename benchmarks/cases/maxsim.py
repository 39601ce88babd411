"""maxsim against the bare product, autograd through einsum, and maxsim-cpu."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.peers import libraries
from benchmarks.registry import Contender, Figure, Measured, Setting, case, quotient
from couplings.similarity import maxsim

OURS, SMOOTH = "couplings.maxsim", "couplings.maxsim, temperature=0.1"
PRODUCT, EINSUM = "torch.matmul, all token pairs", "torch.einsum, max, sum"
PEER = "maxsim-cpu"
BAR = 1e-6
Sizes = tuple[int, int, int, int, int]
SEARCH: Sizes = (1, 1000, 32, 300, 128)
SQUARE: Sizes = (64, 64, 32, 300, 128)
TRAINING: dict[Sizes, float] = {SQUARE: 3, (32, 32, 32, 180, 128): 2.3, (16, 16, 128, 512, 128): 2.3}


def label(sizes: Sizes, dtype: torch.dtype = torch.float32) -> str:
    """How the tables name a problem."""
    many, documents, length, tokens, _ = sizes
    return f"{many} x {documents}, {length} and {tokens} tokens, {str(dtype).removeprefix('torch.')}"


def draw(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Unit vectors, as late-interaction encoders give them."""
    many, documents, length, tokens, dim = sizes
    queries, found = torch.randn(many, length, dim), torch.randn(documents, tokens, dim)
    unit = torch.nn.functional.normalize
    return unit(queries, dim=-1).to(dtype), unit(found, dim=-1).to(dtype)


def truth(queries: Tensor, documents: Tensor, temperature: float = 0.0) -> Tensor:
    """The definition in float64, document by document."""
    columns = []
    for document in documents.double():
        grid = queries.double() @ document.T
        best = temperature * (grid / temperature).logsumexp(-1) if temperature else grid.amax(-1)
        columns.append(best.sum(-1))
    return torch.stack(columns, -1)


def relative_error(expected: Tensor) -> Callable[[Tensor], float]:
    """Largest difference over the largest score."""
    scale = expected.abs().max()
    return lambda found: float((found.detach().double() - expected).abs().max() / scale)


def by_einsum(queries: Tensor, documents: Tensor) -> Tensor:
    """The textbook: the whole grid."""
    return torch.einsum("iqd,jld->ijql", queries, documents).amax(-1).sum(-1)


def by_einsum_argmax(queries: Tensor, documents: Tensor) -> Tensor:
    """The textbook to be differentiated: ``amax`` would share the gradient between equals."""
    return torch.einsum("iqd,jld->ijql", queries, documents).max(-1).values.sum(-1)


def forward_figures(rows: list[Measured]) -> list[Figure]:
    found = []
    for sizes, dtype, bound in (
        (SQUARE, torch.float32, 1.0),
        (SEARCH, torch.float32, 1.0),
        (SQUARE, torch.bfloat16, 2.0),
    ):
        where = label(sizes, dtype)
        found.append(
            Figure(f"{where}: ours / {PRODUCT}", quotient(rows, where, OURS, PRODUCT), bound, at_most=True)
        )
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in (SQUARE, SEARCH):
            where = label(sizes, dtype)
            ratio = quotient(rows, where, SMOOTH, OURS)
            found.append(Figure(f"{where}: smooth / hard", ratio, 2, at_most=True))
    where = label(SEARCH)
    return [*found, Figure(f"{where}: {PEER} / ours", quotient(rows, where, PEER, OURS), 1.5, at_most=False)]


@case("maxsim", "MaxSim scores: forward only", forward_figures)
def scores(quick: bool) -> Iterator[Setting]:
    """Unit vectors of 128 numbers. Error: largest difference from the definition in float64 over the largest score;
    bfloat16 is scored with dtype=torch.float32 and compared with float64 on the same bfloat16 numbers. The floor is the
    one matrix product that fills the token grid, which maxsim never stores.
    """
    for sizes, dtype in (
        (SQUARE, torch.float32),
        (SEARCH, torch.float32),
        (SQUARE, torch.bfloat16),
        (SEARCH, torch.bfloat16),
    ):
        queries, documents = draw(sizes, dtype)
        exact = truth(queries, documents)

        def ours(queries: Tensor = queries, documents: Tensor = documents) -> Tensor:
            return maxsim(queries, documents, dtype=torch.float32)

        def smooth(queries: Tensor = queries, documents: Tensor = documents) -> Tensor:
            return maxsim(queries, documents, temperature=0.1, dtype=torch.float32)

        def product(queries: Tensor = queries, documents: Tensor = documents) -> Tensor:
            return documents.flatten(0, 1) @ queries.flatten(0, 1).T

        def textbook(queries: Tensor = queries, documents: Tensor = documents) -> Tensor:
            return by_einsum(queries, documents)

        error = relative_error(exact)
        setting = Setting(
            label(sizes, dtype),
            [
                Contender(
                    OURS, ours, "ours", error, bar=BAR if dtype == torch.float32 else 1e-3, memory=True
                ),
                Contender(
                    SMOOTH,
                    smooth,
                    "ours",
                    relative_error(truth(queries, documents, 0.1)),
                    bar=BAR,
                    memory=True,
                ),
                Contender(PRODUCT, product, "floor", memory=True),
                Contender(EINSUM, textbook, "peer", error, memory=True),
            ],
        )

        def compiled_peer(
            queries: Tensor = queries,
            documents: Tensor = documents,
            error: Callable[[Tensor], float] = error,
        ) -> Contender:
            peer = libraries.library("maxsim_cpu", "maxsim-cpu")
            query, found = queries[0].numpy(), documents.numpy()
            return Contender(
                PEER,
                lambda: torch.from_numpy(peer.maxsim_scores(query, found)).unsqueeze(0),
                "peer",
                error,
                note="its own threads",
            )

        if sizes == SEARCH and dtype == torch.float32:
            setting.add(compiled_peer, PEER)
        yield setting


def training_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{label(sizes)}: {EINSUM} / ours", quotient(rows, label(sizes), EINSUM, OURS), bound, False)
        for sizes, bound in TRAINING.items()
    ]


@case("maxsim_training", "MaxSim: forward and backward, both arguments, float32", training_figures)
def training(quick: bool) -> Iterator[Setting]:
    """Error: of the scores and of both gradients against autograd through einsum in float64, relative to the largest
    entry; of the smooth maximum, scores only. einsum holds the grid.
    """
    sizes: Sizes
    for sizes in [(32, 32, 32, 180, 128)] if quick else TRAINING:
        queries, documents = draw(sizes)
        cotangent = torch.randn(sizes[:2])

        def both(
            forward: Callable[[Tensor, Tensor], Tensor],
            queries: Tensor = queries,
            documents: Tensor = documents,
            cotangent: Tensor = cotangent,
        ) -> tuple[Tensor, ...]:
            left, right = queries.detach().requires_grad_(), documents.detach().requires_grad_()
            result = forward(left, right)
            return result.detach(), *torch.autograd.grad(result, (left, right), cotangent.to(result.dtype))

        exact = both(by_einsum_argmax, queries.double(), documents.double())

        def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...] = exact) -> float:
            return max(relative_error(right)(one) for one, right in zip(found, exact, strict=True))

        smooth_error = relative_error(truth(queries, documents, 0.1))
        yield Setting(
            label(sizes),
            [
                Contender(OURS, lambda both=both: both(maxsim), "ours", error, bar=1e-5, memory=True),  # type: ignore[misc]
                Contender(
                    SMOOTH,
                    lambda both=both: both(lambda q, d: maxsim(q, d, temperature=0.1)),  # type: ignore[misc]
                    "ours",
                    lambda found, judge=smooth_error: judge(found[0]),  # type: ignore[misc]
                    bar=1e-5,
                    memory=True,
                ),
                Contender(
                    EINSUM,
                    lambda both=both: both(by_einsum_argmax),  # type: ignore[misc]
                    "peer",
                    error,
                    memory=True,
                ),
            ],
        )
