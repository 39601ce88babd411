"""Scores of questions against texts, where the right text stands in them, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from couplings.similarity import maxsim
from couplings_experiments.data.docstrings import Entry, words
from couplings_experiments.retrieval_model import Encoder, Lexicon, Texts, pooled

Array = NDArray[np.float64]
RECALLS = (1, 10, 100)
CUT = 10  # of the reciprocal rank
_BATCH = 64  # texts encoded at a time
_RESAMPLES = 1000


@dataclass(frozen=True)
class Variant:
    """One way from words' vectors to a score.

    Attributes:
        label: what the report calls it.
        kind: ``"max"``, ``"smooth"``, ``"retrieved"`` (XTR) or ``"single"``.
        rate: of learning.
        temperature: that scores are divided by in the loss.
        setting: temperature of the smooth maximum; or how many words of the batch, and of all texts, each word of a
            question retrieves.
        weight: how long an epoch takes compared with the cheapest (for the time left).
    """

    label: str
    kind: str
    rate: float
    temperature: float
    setting: tuple[float, ...]
    weight: float


def training_scores(variant: Variant, questions: Encoded, texts: Encoded) -> Tensor:
    """Scores of all questions against all texts of a batch, (n, m)."""
    if variant.kind == "single":
        return pooled(questions.vectors) @ pooled(texts.vectors).mT
    return maxsim(
        questions.vectors,
        texts.vectors,
        query_mask=questions.mask,
        document_mask=texts.mask,
        reduction="mean",
        temperature=variant.setting[0] if variant.kind == "smooth" else None,
        topk=int(variant.setting[0]) if variant.kind == "retrieved" else None,
    )


@dataclass(frozen=True)
class Encoded:
    """Words' vectors (n, L, width) and where there are words (n, L)."""

    vectors: Tensor
    mask: Tensor


def encode(model: Encoder, lexicon: Lexicon, texts: Texts) -> list[Encoded]:
    """The vectors of ``texts``, some at a time, without gradients."""
    model.eval()
    out = []
    with torch.no_grad():
        for rows in torch.arange(len(texts)).split(_BATCH):
            some = texts.at(rows)
            out.append(Encoded(model(some, lexicon), some.mask.to(model.table.device)))
    return out


def all_scores(variant: Variant, model: Encoder, lexicon: Lexicon, questions: Texts, texts: Texts) -> Tensor:
    """Scores of all questions against all texts, (n, m), as the variant gives them when it is used."""
    asked, told = encode(model, lexicon, questions), encode(model, lexicon, texts)
    with torch.no_grad():
        if variant.kind == "retrieved":
            return torch.cat([_retrieved(part, told, int(variant.setting[1])) for part in asked])
        if variant.kind == "single":
            answers = torch.cat([pooled(part.vectors) for part in told])
            return torch.cat([pooled(part.vectors) for part in asked]) @ answers.mT
        return torch.cat(
            [torch.cat([training_scores(variant, one, other) for other in told], 1) for one in asked]
        )


def _retrieved(asked: Encoded, told: Sequence[Encoded], count: int) -> Tensor:
    """XTR's scores from the words that are retrieved, and the last of these in place of those that are not.

    A word of the question retrieves its ``count`` nearest words of all texts. A text's share in the score is its
    nearest word among these; a text without any gets the similarity of the last one retrieved, which is the least
    upper bound of what is not known. That is the larger one of both, whether anything was retrieved or not.
    """
    single = asked.vectors[asked.mask].unsqueeze(1)  # each word a question of its own
    nearest = torch.cat(
        [maxsim(single, part.vectors, document_mask=part.mask, empty=float("-inf")) for part in told], 1
    )
    candidates = []
    for part in told:
        grid = single.squeeze(1) @ part.vectors[part.mask].mT
        candidates.append(grid.topk(min(count, grid.shape[1]), dim=1, sorted=False).values)
    best = torch.cat(candidates, 1)
    last = best.topk(min(count, best.shape[1]), dim=1).values[:, -1:]
    shares = nearest.maximum(last)
    owner = asked.mask.nonzero()[:, 0]
    sums = shares.new_zeros(len(asked.mask), shares.shape[1]).index_add_(0, owner, shares)
    return sums / asked.mask.sum(1, keepdim=True)


def bm25(found: Sequence[Entry], limit: int | None, k1: float, b: float) -> Tensor:
    """BM25 of all queries against all bodies (their first ``limit`` words), by the library bm25s; the same words."""
    import bm25s

    index = bm25s.BM25(k1=k1, b=b, backend="numpy")
    index.index([words(entry.body)[:limit] for entry in found], show_progress=False)
    return torch.from_numpy(np.stack([index.get_scores(words(entry.query)) for entry in found]))


def ranks(scores: Tensor) -> Array:
    """Where the i-th text stands for the i-th question, from 1; among equal scores in the middle."""
    own = scores.diagonal().unsqueeze(1)
    above, level = (scores > own).sum(1), (scores == own).sum(1)
    found: Array = (above + (level + 1) / 2).cpu().double().numpy()
    return found


def reciprocal(rank: Array) -> Array:
    """1 / rank down to rank 10, then 0."""
    return np.where(rank <= CUT, 1 / rank, 0.0)


MEASURES: dict[str, Callable[[Array], Array]] = {
    f"MRR@{CUT}": reciprocal,
    **{f"Recall@{k}": lambda rank, k=k: (rank <= k).astype(float) for k in RECALLS},  # type: ignore[misc]
}


def interval(values: Array) -> tuple[float, float]:
    """The middle 95 % of the mean of ``values`` (questions,) when questions are drawn anew with replacement."""
    draw = np.random.default_rng(0)
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def measure(rank: Array) -> dict[str, Any]:
    """Every measure of one ranking of the right texts."""
    return {name: float(per_question(rank).mean()) for name, per_question in MEASURES.items()}
