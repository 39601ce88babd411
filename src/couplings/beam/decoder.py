"""The protocol of a decoder, its checks, and its state as beams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from couplings import _checks
from couplings._rowwise import seen

_ROUNDING = 1e-3  # of the logarithm of a probability near 1

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""``step(embedding (rows, d), state) -> (log_probs (rows, V), state)``, any pytree of tensors (rows, ..) as state.

The beams of a sentence are adjacent rows: row = sentence * beam + index of the beam. What does not change between
steps, such as encoder outputs, need not be in the state: a closure may hold it, repeated ``beam`` times.
"""


class Decoder:
    """A step function with its checks, over ``batch`` sentences of ``beam`` beams each."""

    def __init__(self, step: Step, embeddings: Tensor, state: Any, start: int | Tensor, beam: int) -> None:
        if not callable(step):
            _checks.reject(
                "step",
                "a function (embedding, state) -> (log_probs, state)",
                _checks.describe(step),
                "Pass the decoder's step.",
                TypeError,
            )
        _checks.real_tensor("embeddings", embeddings)
        if embeddings.dim() != 2 or embeddings.shape[0] == 0:
            _checks.reject(
                "embeddings",
                "shape (V, d), one row per token",
                _checks.describe(embeddings),
                "Pass the weight.",
            )
        whole_number("beam", beam, 1)
        leaves = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        if isinstance(start, Tensor) and start.dim() == 1:
            batch = start.shape[0]
        elif leaves:
            batch = leaves[0].shape[0] if leaves[0].dim() else 1
        else:
            batch = 1
        for leaf in leaves:
            if leaf.dim() == 0 or leaf.shape[0] != batch:
                _checks.reject(
                    "state",
                    f"tensors whose first dimension is the batch, {batch}",
                    _checks.describe(leaf),
                    "Put what has no batch dimension into the step function.",
                )
        self.step, self.embeddings, self.beam, self.batch = step, embeddings, beam, batch
        self.vocabulary = embeddings.shape[0]
        self.first = token_ids("start", start, (batch,), self.vocabulary, embeddings.device)
        self.state = tree_map(self._repeat, state)

    def __call__(self, embedding: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step: embedding ``(batch, beam, d)`` -> log probabilities ``(batch, beam, V)``, state."""
        out: object = self.step(embedding.reshape(self.batch * self.beam, -1), state)
        if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[0], Tensor):
            _checks.reject(
                "step", "it to return (log_probs, state)", _checks.describe(out), "Return a pair.", TypeError
            )
        log_probs, state = out
        if log_probs.shape != (self.batch * self.beam, self.vocabulary):
            _checks.reject(
                "step",
                f"log probabilities of shape {(self.batch * self.beam, self.vocabulary)}",
                _checks.describe(log_probs),
                "One row per row of the embedding, one column per row of embeddings.",
            )
        if seen(log_probs > _ROUNDING):
            _checks.reject(
                "step",
                "log probabilities, which are at most 0",
                f"{float(log_probs.detach().amax()):.3g} among them",
                "Return scores.log_softmax(-1).",
            )
        return log_probs.view(self.batch, self.beam, self.vocabulary), state

    def first_embedding(self) -> Tensor:
        """The start token's, for all beams, ``(batch, beam, d)``."""
        return self.embeddings[self.first].unsqueeze(1).expand(-1, self.beam, -1)

    def first_scores(self) -> Tensor:
        """Log-likelihoods of the beams before the first step: one counts, since all are equal."""
        scores = self.embeddings.new_full((self.batch, self.beam), -torch.inf)
        scores[:, 0] = 0
        return scores

    def mix(self, state: Any, mixing: Tensor, source: Tensor) -> Any:
        """The new beams' state: averages of the old by ``mixing`` (batch, new, old); integers follow ``source``."""

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            old = value.view(self.batch, self.beam, -1) if value.dim() > 1 else value.view(self.batch, -1, 1)
            if value.is_floating_point() or value.is_complex():
                new = mixing.to(value.dtype) @ old
            else:
                new = old.gather(1, source.unsqueeze(-1).expand(-1, -1, old.shape[-1]))
            return new.reshape(value.shape)

        return tree_map(leaf, state)

    def follow(self, state: Any, source: Tensor) -> Any:
        """The state of the new beams, each a copy of its source ``(batch, beam)``."""
        rows = (source + self.beam * torch.arange(self.batch, device=source.device).unsqueeze(-1)).flatten()
        return tree_map(lambda v: v.index_select(0, rows) if isinstance(v, Tensor) else v, state)

    def _repeat(self, leaf: Any) -> Any:
        return leaf.repeat_interleave(self.beam, 0) if isinstance(leaf, Tensor) else leaf


def whole_number(name: str, value: object, least: int) -> None:
    """An int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        _checks.reject(name, "an int", _checks.describe(value), f"Pass {name} >= {least}.", TypeError)
    if value < least:
        _checks.reject(name, f"at least {least}", value, "Raise it.")


def token_ids(name: str, value: object, shape: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Token numbers as an int64 tensor of ``shape``; those out of range are torch.embedding's to refuse."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < size:
            _checks.reject(name, f"a token in [0, {size - 1}]", value, "Check the vocabulary.")
        return torch.full(shape, value, dtype=torch.int64, device=device)
    if (
        not isinstance(value, Tensor)
        or value.is_floating_point()
        or value.is_complex()
        or value.dtype == torch.bool
    ):
        _checks.reject(
            name, "an int or an integer tensor", _checks.describe(value), "Pass token ids.", TypeError
        )
    _checks.broadcastable(name, value, shape, "one token per sentence")
    return value.to(device=device, dtype=torch.int64).expand(shape)


def proposals(log_probs: Tensor, scores: Tensor, finished: Tensor | None, end: int | None) -> Tensor:
    """Log-likelihood of every continuation ``(batch, beam * V)``; a finished beam only repeats its end token."""
    total = scores.unsqueeze(-1) + log_probs
    if finished is not None and end is not None:
        stay = torch.full_like(total, -torch.inf)
        stay[..., end] = scores
        total = torch.where(finished.unsqueeze(-1), stay, total)
    # a beam that does not exist yet proposes nothing, whatever its step made of it
    total = torch.where(scores.unsqueeze(-1) == -torch.inf, -torch.inf, total)
    return total.flatten(1)
