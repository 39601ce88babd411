"""Soft beam search and top-k attention against what they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import couplings as cp
from benchmarks.registry import Contender, Figure, Measured, Setting, case, quotient
from couplings.beam.candidates import choose_softly

SELECTION, TOPK = "soft selection of 5 beams", "torch.topk of the same scores"


class Recurrent(nn.Module):
    """A GRU decoder."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(vocabulary, width))
        self.cell = nn.GRUCell(width, width)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, embedding: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.cell(embedding, hidden)
        return self.out(hidden).log_softmax(-1), hidden


def selection_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{where}: ours / {TOPK}", 1 / quotient(rows, where, TOPK, SELECTION), 40, at_most=True)
        for where in dict.fromkeys(row.setting for row in rows)
    ]


@case(
    "beam_selection",
    "One step of soft beam selection: 8 sentences, 5 beams, 32,000 tokens",
    selection_figures,
)
def beam_selection(quick: bool) -> Iterator[Setting]:
    """Forward, float32, log-likelihoods of normal logits of standard deviation 3. Error: L1 distance of the indicators
    from the sorted soft top-k of the whole row in float64.
    """
    vocabulary = 2000 if quick else 32_000
    total = (3 * torch.randn(8, 5, vocabulary)).log_softmax(-1).flatten(1)
    for epsilon in (0.1, 0.01):
        _, truth = cp.soft_topk(total.double(), 5, epsilon=epsilon)

        def error(chosen: tuple[Tensor, Tensor], truth: Tensor = truth) -> float:
            weights, listed = chosen
            whole = torch.zeros_like(truth).scatter(-1, listed[:, None].expand_as(weights), weights.double())
            return float((whole - truth).abs().sum((-1, -2)).max())

        def ours(epsilon: float = epsilon) -> tuple[Tensor, Tensor]:
            chosen = choose_softly(total, 5, epsilon)
            return chosen.weights, chosen.listed

        yield Setting(
            f"epsilon {epsilon:g}",
            [
                Contender(SELECTION, ours, "ours", error, bar=1e-4),
                Contender(TOPK, lambda: total.topk(5), "floor"),
            ],
        )


SOFT, FORCED = "soft beam loss, forward and backward", "teacher forcing, forward and backward"


def training_figures(rows: list[Measured]) -> list[Figure]:
    where = rows[0].setting if rows else ""
    return [
        Figure(
            f"{where}: ours / ({FORCED} x beam)", 1 / quotient(rows, where, FORCED, SOFT) / 5, 6, at_most=True
        )
    ]


@case("beam_training", "A training step through the soft beam", training_figures)
def beam_training(quick: bool) -> Iterator[Setting]:
    """64 sentences of 20 tokens, 200 words, beam 5, a GRU decoder of width 64. Error: distance of the loss at epsilon 0
    from the gold tokens' log-likelihood along ordinary beam search's best hypothesis.
    """
    batch, steps = (8, 5) if quick else (64, 20)
    model = Recurrent(200, 64)
    hidden, gold = torch.randn(batch, 64), torch.randint(200, (batch, steps))

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.zero_grad()
            value = loss()
            value.backward()
            return value.detach()

        return run

    with torch.no_grad():
        found = cp.beam.beam_search(model, model.embeddings, hidden, start=0, beam=5, max_length=steps)
        best = torch.cat([torch.zeros_like(found.tokens[:, 0, :1]), found.tokens[:, 0, :-1]], 1)
        state, total = hidden, torch.zeros(())
        for t in range(steps):
            log_probs, state = model(model.embeddings[best[:, t]], state)
            total = total - log_probs.gather(-1, gold[:, t : t + 1]).mean()
        exact = cp.beam.soft_beam_loss(model, model.embeddings, hidden, gold, start=0, beam=5, epsilon=0)
    gap = float((exact - total).abs() / total)

    def soft() -> Tensor:
        return cp.beam.soft_beam_loss(model, model.embeddings, hidden, gold, start=0, beam=5)

    def forced() -> Tensor:
        return cp.beam.teacher_forcing_loss(model, model.embeddings, hidden, gold, start=0)

    yield Setting(
        f"{batch} sentences of {steps} tokens",
        [
            Contender(SOFT, step(soft), "ours", lambda _: gap, bar=1e-5, memory=True),
            Contender(FORCED, step(forced), "floor", memory=True),
        ],
    )


OURS, PLAIN = "topk_attention", "softmax attention, unfused"


def attention_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{where}: ours / {PLAIN}", 1 / quotient(rows, where, PLAIN, OURS), 10, at_most=True)
        for where in dict.fromkeys(row.setting for row in rows)
    ]


@case("topk_attention", "Top-k attention: 8 x 8 heads, 512 x 512, d = 64", attention_figures)
def topk_attention(quick: bool) -> Iterator[Setting]:
    """float32, forward and backward, k = 32. Error: distance of the output from softmax(scores + log A) in float64, for
    some queries.
    """
    size = 64 if quick else 512
    q, k, v = (torch.randn(8, 8, size, 64, requires_grad=True) for _ in range(3))
    for epsilon in (0.1, 0.01):
        with torch.no_grad():
            some = q[:, :, :4].double()
            scores = some @ k.double().mT / 8
            selected = cp.soft_topk_mask(scores, 32, epsilon=epsilon)
            truth = (scores + selected.log()).softmax(-1) @ v.double()

        def error(out: Tensor, truth: Tensor = truth) -> float:
            return float((out.detach()[:, :, :4].double() - truth).abs().max())

        def ours(epsilon: float = epsilon) -> Tensor:
            out = cp.topk_attention(q, k, v, 32, epsilon=epsilon)
            assert isinstance(out, Tensor)  # noqa: S101 - one result without return_weights
            out.sum().backward()
            return out

        def plain() -> Tensor:
            out = ((q / 8) @ k.mT).softmax(-1) @ v
            out.sum().backward()
            return out

        yield Setting(
            f"epsilon {epsilon:g}",
            [
                Contender(OURS, ours, "ours", error, bar=1e-4, memory=True),
                Contender(PLAIN, plain, "floor", memory=True),
            ],
        )
