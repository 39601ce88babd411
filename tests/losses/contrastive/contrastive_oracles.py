"""The losses once more: one pair after the other in Python floats, from the matrix of cosines. Shares no code."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def cosines(x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    """All cosines in float64; a row of zeros has cosine 0 with everything."""
    x1, x2 = (np.asarray(x, dtype=np.float64) for x in (x1, x2))
    lengths = [np.sqrt((x * x).sum(-1, keepdims=True)) for x in (x1, x2)]
    x1, x2 = (x / np.where(length == 0, 1, length) for x, length in zip((x1, x2), lengths, strict=True))
    return x1 @ x2.T


def log_sum(values: list[float]) -> float:
    if not values:
        return -math.inf
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z))) if z > -math.inf else 0.0


def softmax_row(positive: list[float], negative: list[float], mode: str) -> float:
    """The loss of one row from the logits of its positives and negatives."""
    if not positive:
        return 0.0
    if mode == "mean":
        return log_sum(positive + negative) - math.fsum(positive) / len(positive)
    below = log_sum(negative)
    return math.fsum(softplus(below - p) for p in positive) / len(positive)


Relation = Callable[[int, int], str]
"""What the pair (i, j) is: "+" positive, "-" negative, " " neither."""


def softmax(logits: np.ndarray, relation: Relation, mode: str = "each", extra=None) -> list[float]:
    """Row losses; ``extra[i]`` are further negative logits of row i."""
    out = []
    for i, row in enumerate(logits.tolist()):
        signs = [relation(i, j) for j in range(len(row))]
        negative = [v for v, s in zip(row, signs, strict=True) if s == "-"] + list(extra[i] if extra else ())
        out.append(softmax_row([v for v, s in zip(row, signs, strict=True) if s == "+"], negative, mode))
    return out


def sigmoid(logits: np.ndarray, relation: Relation) -> list[float]:
    out = []
    for i, row in enumerate(logits.tolist()):
        signs = [relation(i, j) for j in range(len(row))]
        out.append(
            math.fsum(
                softplus(-v) if s == "+" else softplus(v) for v, s in zip(row, signs, strict=True) if s != " "
            )
        )
    return out


def squares(scores: np.ndarray, relation: Relation, target: float, balance: float) -> float:
    n, m = scores.shape
    pairs = [(scores[i, j], relation(i, j)) for i in range(n) for j in range(m)]
    up = [(s - 1) ** 2 for s, sign in pairs if sign == "+"]
    down = [(s - target) ** 2 for s, sign in pairs if sign == "-"]
    return balance * math.fsum(up) / len(up) + (1 - balance) * math.fsum(down) / len(down)


def triplet(scores: np.ndarray, relation: Relation, margin: float, mining: str) -> list[float]:
    out = []
    for i, row in enumerate(scores.tolist()):
        positive = [v for j, v in enumerate(row) if relation(i, j) == "+"]
        negative = [v for j, v in enumerate(row) if relation(i, j) == "-"]
        if not positive or not negative:
            out.append(0.0)
            continue
        mine = min(positive)
        below = [v for v in negative if v < mine]
        chosen = max(negative) if mining == "hard" else max(below) if below else min(negative)
        out.append(max(0.0, margin + chosen - mine))
    return out
