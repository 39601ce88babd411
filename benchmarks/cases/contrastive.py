"""Cross-similarity losses against the textbook forms with whole matrices of scores, and the bare matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from benchmarks.registry import Contender, Figure, Measured, Setting, case, pick, quotient
from couplings.losses.contrastive import clip_loss, diagnostics, info_nce_loss, nt_xent_loss, sigmoid_loss

CLIP, NCE, SIGMOID, NT_XENT = "clip_loss", "info_nce_loss", "sigmoid_loss", "nt_xent_loss"
DENSE = "two matrices of logits, two cross entropies (as open_clip)"
ONE = "one matrix of logits, two cross entropies"
CHUNKED, WHOLE = "logsigmoid, 512 rows at a time", "logsigmoid of the whole matrix"
PUBLISHED_PAIRS = 17.4 * 2**30
"""Bytes that pytorch-metric-learning's NTXentLoss takes at 512 pairs: every pair has its own copy of the negatives."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def views(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit vectors with a noisy counterpart each."""
    x2 = normalize(torch.randn(n, d), dim=1)
    return normalize(x2 + 2.4 * torch.randn(n, d) / d**0.5, dim=1), x2


def differentiated(loss: Loss, x1: Tensor, x2: Tensor, scale: float) -> Callable[[], list[Tensor]]:
    """Forward and backward from fresh leaves; the three gradients."""

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (x1, x2, x1.new_tensor(scale))]
        loss(*leaves).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    return run


def gradient_error(truth: list[Tensor]) -> Callable[[list[Tensor]], float]:
    """The largest relative distance of a gradient from float64's."""

    def error(found: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth))

    return error


def products(n: int, d: int, count: int) -> Callable[[], Tensor]:
    """As many bare matrix products as the loss cannot do without, block by block."""
    x, y, block = torch.randn(n, d), torch.randn(d, n), torch.empty(512, n)

    def run() -> Tensor:
        for _ in range(count):
            for start in range(0, n, 512):
                torch.mm(x[start : start + 512], y, out=block[: min(512, n - start)])
        return block

    return run


def two_matrices(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(a.shape[0])
    return (cross_entropy(scale * a @ b.T, own) + cross_entropy(scale * b @ a.T, own)) / 2


def one_matrix(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    own, logits = torch.arange(a.shape[0]), scale * a @ b.T
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def one_way(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return cross_entropy(scale * a @ b.T, torch.arange(a.shape[0]))


def whole(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    sign = 2 * torch.eye(a.shape[0], dtype=a.dtype) - 1
    return -logsigmoid(sign * (scale * a @ b.T - 10)).sum() / a.shape[0]


def chunked(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    total = a.new_zeros(())
    for start in range(0, a.shape[0], 512):
        logits = scale * a[start : start + 512] @ b.T - 10
        sign = -torch.ones_like(logits)
        sign.diagonal(start).fill_(1.0)
        total = total - logsigmoid(sign * logits).sum()
    return total / a.shape[0]


def ours(loss: Callable[..., Tensor], **options: float) -> Loss:
    return lambda a, b, scale: loss(a, b, temperature=1 / scale, normalize=False, **options)


def memory_ratio(rows: list[Measured], setting: str, above: str, below: str) -> float:
    first, second = pick(rows, setting, above), pick(rows, setting, below)
    if first is None or second is None or not first.memory or not second.memory:
        return float("nan")
    return first.memory / second.memory


def softmax_figures(rows: list[Measured]) -> list[Figure]:
    found = []
    for where in dict.fromkeys(row.setting for row in rows):
        if pick(rows, where, CLIP) is not None:
            found.append(Figure(f"{where}: time / {DENSE}", quotient(rows, where, CLIP, DENSE), 0.6, True))
            found.append(
                Figure(f"{where}: memory / {DENSE}", memory_ratio(rows, where, CLIP, DENSE), 0.15, True)
            )
    return found


@case(
    "contrastive_softmax",
    "CLIP's loss and InfoNCE: 4096 x 512, float32, forward and backward",
    softmax_figures,
)
def softmax(quick: bool) -> Iterator[Setting]:
    """Error: largest relative distance of a gradient (both sides, scale) from float64's. Scale 20 is a young model,
    100 CLIP's limit. The floor is what a loss that stores no matrix cannot do without: four products of this size
    (two directions), three (one direction).
    """
    n, d = (1024, 128) if quick else (4096, 512)
    x1, x2 = views(n, d)
    for scale in (20.0, 100.0):
        truth = differentiated(one_matrix, x1.double(), x2.double(), scale)()
        error = gradient_error(truth)
        yield Setting(
            f"two directions, scale {scale:g}",
            [
                Contender(
                    CLIP, differentiated(ours(clip_loss), x1, x2, scale), "ours", error, 1e-3, memory=True
                ),
                Contender(DENSE, differentiated(two_matrices, x1, x2, scale), "peer", error, memory=True),
                Contender(ONE, differentiated(one_matrix, x1, x2, scale), "peer", error, memory=True),
                Contender("four matrix products", products(n, d, 4), "floor"),
            ],
        )
    error = gradient_error(differentiated(one_way, x1.double(), x2.double(), 20.0)())
    yield Setting(
        "one direction, scale 20",
        [
            Contender(
                NCE, differentiated(ours(info_nce_loss), x1, x2, 20.0), "ours", error, 1e-4, memory=True
            ),
            Contender(
                "matrix of logits, cross entropy",
                differentiated(one_way, x1, x2, 20.0),
                "peer",
                error,
                memory=True,
            ),
            Contender("three matrix products", products(n, d, 3), "floor"),
        ],
    )


def sigmoid_figures(rows: list[Measured]) -> list[Figure]:
    where = "scale 20, bias -10"
    return [Figure(f"time / {CHUNKED}", quotient(rows, where, SIGMOID, CHUNKED), 0.7, True)]


@case("contrastive_sigmoid", "SigLIP's loss: 4096 x 512, float32, forward and backward", sigmoid_figures)
def sigmoid(quick: bool) -> Iterator[Setting]:
    """Error: largest relative distance of a gradient (both sides, scale) from float64's. All do three products; what
    can be saved is the rest.
    """
    n, d = (1024, 128) if quick else (4096, 512)
    x1, x2 = views(n, d)
    error = gradient_error(differentiated(whole, x1.double(), x2.double(), 20.0)())
    loss = ours(sigmoid_loss, bias=-10.0)
    yield Setting(
        "scale 20, bias -10",
        [
            Contender(SIGMOID, differentiated(loss, x1, x2, 20.0), "ours", error, 1e-4, memory=True),
            Contender(CHUNKED, differentiated(chunked, x1, x2, 20.0), "peer", error, memory=True),
            Contender(WHOLE, differentiated(whole, x1, x2, 20.0), "peer", error, memory=True),
            Contender("three matrix products", products(n, d, 3), "floor"),
        ],
    )


def nt_xent_figures(rows: list[Measured]) -> list[Figure]:
    row = pick(rows, "512 pairs", NT_XENT)
    ratio = PUBLISHED_PAIRS / row.memory if row and row.memory else float("nan")
    return [Figure("512 pairs: memory of pytorch-metric-learning (published) / ours", ratio, 100, False)]


@case("contrastive_nt_xent", "NT-Xent: pairs of views of 128 features, float32", nt_xent_figures)
def nt_xent(quick: bool) -> Iterator[Setting]:
    """Error: relative distance of the gradients from float64's. The peer is the textbook form, one matrix of 2n x 2n
    scores.
    """
    for n in (512,) if quick else (512, 4096):
        x1, x2 = views(n, 128)

        def textbook(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
            z = torch.cat((a, b))
            count = a.shape[0]
            logits = scale * z @ z.T
            logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool), -torch.inf)
            return cross_entropy(logits, torch.arange(2 * count).roll(count))

        error = gradient_error(differentiated(textbook, x1.double(), x2.double(), 10.0)())
        yield Setting(
            f"{n} pairs",
            [
                Contender(
                    NT_XENT,
                    differentiated(ours(nt_xent_loss), x1, x2, 10.0),
                    "ours",
                    error,
                    1e-4,
                    memory=True,
                ),
                Contender(
                    "2n x 2n logits", differentiated(textbook, x1, x2, 10.0), "peer", error, memory=True
                ),
            ],
        )


def watching_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{where}: diagnostics / {CLIP}", quotient(rows, where, "diagnostics", CLIP), 0.1, True)
        for where in dict.fromkeys(row.setting for row in rows)
    ]


@case(
    "contrastive_diagnostics",
    "Diagnostics beside the loss they watch, float32, 512 features",
    watching_figures,
)
def watching(quick: bool) -> Iterator[Setting]:
    """The loss forward and backward; the diagnostics with their default sample of the rows."""
    for n in (2048,) if quick else (1024, 4096):
        x1, x2 = views(n, 512)
        yield Setting(
            f"n = {n}",
            [
                Contender(CLIP, differentiated(ours(clip_loss), x1, x2, 20.0), "ours"),
                Contender("diagnostics", lambda x1=x1, x2=x2: diagnostics(x1, x2), "floor"),  # type: ignore[misc]
            ],
        )


def large_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{row.setting}: memory in GiB", (row.memory or float("nan")) / 2**30, 8, True) for row in rows
    ]


@case("contrastive_large", "CLIP's loss where the matrix of scores would be 16 GiB, float32", large_figures)
def large(quick: bool) -> Iterator[Setting]:
    """65,536 x 256 forward and backward. Error: the gradients of 64 rows of x1, relative, against float64 with the
    columns' sums taken from all rows.
    """
    n, d, scale = (8192, 64, 20.0) if quick else (65536, 256, 20.0)
    x1, x2 = views(n, d)
    sums = torch.zeros(n, dtype=torch.float64)
    for part in x1.split(512):
        sums += (scale * (part @ x2.T)).exp().sum(0, dtype=torch.float64)
    rows = torch.arange(0, n, n // 64)
    logits = scale * (x1[rows].double() @ x2.double().T)
    slope = logits.softmax(1) + logits.exp() / sums
    slope[torch.arange(64), rows] -= 2
    truth = slope @ x2.double() * scale / (2 * n)

    def error(found: list[Tensor]) -> float:
        return float((found[0][rows] - truth).norm() / truth.norm())

    run = differentiated(ours(clip_loss), x1, x2, scale)
    yield Setting(f"n = {n}", [Contender(CLIP, run, "ours", error, 1e-4, memory=True)])
