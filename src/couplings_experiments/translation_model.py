"""Two small translators behind one protocol: LSTM with additive attention, and a transformer.

Both have ``embeddings`` and ``begin``, which is what `couplings.beam` asks for, and both may attend softly to all
source words or, by ``topk``, to the best of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import couplings as cp
from couplings_experiments.data.numbers import PAD, START

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class Translator(nn.Module):
    """What is common: source and target words."""

    def __init__(self, sources: int, targets: int, width: int) -> None:
        super().__init__()
        self.source = nn.Embedding(sources, width)
        self.target = nn.Embedding(targets, width)

    @property
    def embeddings(self) -> Tensor:
        """(V, width), what a step is fed."""
        return self.target.weight

    def begin(self, source: Tensor, record: list[Tensor] | None = None) -> tuple[Step, Any]:
        """The decoder's step and its first state, for sentences (batch, S) padded with `PAD`.

        ``record`` takes every step's attention, (rows, S).
        """
        raise NotImplementedError

    def forced_loss(self, source: Tensor, gold: Tensor, lengths: Tensor) -> Tensor:
        """Teacher forcing: (batch, S), (batch, T), (batch,) -> a scalar."""
        step, state = self.begin(source)
        return cp.beam.teacher_forcing_loss(step, self.embeddings, state, gold, start=START, lengths=lengths)


class Repeated:
    """What does not change between steps, for as many beams as a step has."""

    def __init__(self, *tensors: Tensor) -> None:
        self._of = {1: tensors}
        self._batch = len(tensors[0])

    def __call__(self, rows: int) -> tuple[Tensor, ...]:
        beams = rows // self._batch
        if beams not in self._of:
            self._of[beams] = tuple(tensor.repeat_interleave(beams, 0) for tensor in self._of[1])
        return self._of[beams]


class AdditiveAttention(nn.Module):
    """Bahdanau, Cho and Bengio 2015: score v' tanh(W h + U s) of every source; ``topk`` as in `cp.topk_attention`."""

    def __init__(self, query: int, sources: int, width: int, topk: int | None, epsilon: float | None) -> None:
        super().__init__()
        self.query = nn.Linear(query, width)
        self.key = nn.Linear(sources, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.topk = topk
        self.epsilon = epsilon

    def forward(self, query: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """(rows, query), (rows, S, width) by ``key``, (rows, S) bool -> weights (rows, S)."""
        scores = self.score(torch.tanh(self.query(query).unsqueeze(1) + keys)).squeeze(-1)
        weights: Tensor = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        if self.topk is None:
            return weights
        # softmax(scores + log A) without the logarithm
        kept = weights * cp.soft_topk_mask(
            scores, min(self.topk, scores.shape[-1]), epsilon=self.epsilon, mask=visible
        )
        return kept / kept.sum(-1, keepdim=True)


class LstmTranslator(Translator):
    """Bidirectional LSTM, additive attention, LSTM."""

    def __init__(
        self, sources: int, targets: int, width: int, topk: int | None, epsilon: float | None
    ) -> None:
        super().__init__(sources, targets, width)
        self.encoder = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.first = nn.Linear(width, width)
        self.attention = AdditiveAttention(width, width, width, topk, epsilon)
        self.cell = nn.LSTMCell(2 * width, width)
        self.out = nn.Linear(2 * width, targets)

    def begin(self, source: Tensor, record: list[Tensor] | None = None) -> tuple[Step, Any]:
        visible = source != PAD
        packed = pack_padded_sequence(
            self.source(source), visible.sum(-1).cpu(), batch_first=True, enforce_sorted=False
        )
        memory, (last, _) = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, batch_first=True, total_length=source.shape[1])
        hidden = torch.tanh(self.first(torch.cat([last[0], last[1]], -1)))
        repeated = Repeated(memory, self.attention.key(memory), visible)

        def step(embedding: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            values, keys, seen = repeated(len(embedding))
            weights = self.attention(state[0], keys, seen)
            if record is not None:
                record.append(weights.detach())
            context = (weights.unsqueeze(1) @ values).squeeze(1)
            hidden, carry = self.cell(torch.cat([embedding, context], -1), state)
            return self.out(torch.cat([hidden, context], -1)).log_softmax(-1), (hidden, carry)

        return step, (hidden, torch.zeros_like(hidden))


class TransformerTranslator(Translator):
    """Encoder and decoder with pre-normalised layers and fixed positions."""

    HEADS, LAYERS = 4, 2

    def __init__(
        self, sources: int, targets: int, width: int, topk: int | None, epsilon: float | None
    ) -> None:
        super().__init__(sources, targets, width)
        self.encoder = nn.ModuleList(_Layer(width, self.HEADS, topk, epsilon) for _ in range(self.LAYERS))
        self.decoder = nn.ModuleList(
            _Layer(width, self.HEADS, topk, epsilon, cross=True) for _ in range(self.LAYERS)
        )
        self.encoded = nn.LayerNorm(width)
        self.decoded = nn.LayerNorm(width)
        self.out = nn.Linear(width, targets)

    def begin(self, source: Tensor, record: list[Tensor] | None = None) -> tuple[Step, Any]:
        repeated = Repeated(*self._encode(source))

        def step(embedding: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            memory, hidden = repeated(len(embedding))
            x = (embedding + _positions(state[0].shape[1], 1, embedding)).unsqueeze(1)
            grown = []
            for layer, past in zip(self.decoder, state, strict=True):
                x, past, weights = layer(x, past=past, memory=memory, hidden=hidden)
                grown.append(past)
            if record is not None:
                record.append(weights[:, 0].detach())
            return self.out(self.decoded(x[:, 0])).log_softmax(-1), grown

        none = self.embeddings.new_zeros(len(source), 0, self.embeddings.shape[1])
        return step, [none] * self.LAYERS

    def forced_loss(self, source: Tensor, gold: Tensor, lengths: Tensor) -> Tensor:
        """All steps at once: what was before is known."""
        memory, hidden = self._encode(source)
        before = torch.cat([torch.full_like(gold[:, :1], START), gold[:, :-1]], 1)
        x = self.target(before)
        x = x + _positions(0, x.shape[1], x)
        for layer in self.decoder:
            x, _, _ = layer(x, memory=memory, hidden=hidden)
        log_probs = self.out(self.decoded(x)).log_softmax(-1).gather(-1, gold.unsqueeze(-1)).squeeze(-1)
        counted = torch.arange(gold.shape[1], device=gold.device) < lengths.unsqueeze(-1)
        return -torch.where(counted, log_probs, 0).sum(-1).mean()

    def _encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        hidden = source == PAD
        x = self.source(source)
        x = x + _positions(0, x.shape[1], x)
        for layer in self.encoder:
            x, _, _ = layer(x, hidden=hidden)
        return self.encoded(x), hidden


class _Layer(nn.Module):
    """Self-attention, attention to the sources if there are any, two linear maps."""

    def __init__(
        self, width: int, heads: int, topk: int | None, epsilon: float | None, *, cross: bool = False
    ) -> None:
        super().__init__()

        def attention() -> nn.MultiheadAttention:
            if topk is None:
                return nn.MultiheadAttention(width, heads, batch_first=True)
            return cp.nn.TopKAttention(width, heads, topk, epsilon=epsilon, batch_first=True)

        self.inner = attention()
        self.before_inner = nn.LayerNorm(width)
        if cross:
            self.cross = attention()
            self.before_cross = nn.LayerNorm(width)
        self.maps = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(
        self,
        x: Tensor,
        *,
        hidden: Tensor,
        past: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``past``: inputs of former steps; without it a decoder's steps come all at once."""
        inputs = self.before_inner(x)
        if memory is None:
            x = x + self.inner(inputs, inputs, inputs, key_padding_mask=hidden, need_weights=False)[0]
            return x + self.maps(x), inputs, hidden
        later: Tensor | None = None
        known = inputs
        if past is None:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        else:
            known = torch.cat([past, inputs], 1)
        x = x + self.inner(inputs, known, known, attn_mask=later, need_weights=False)[0]
        attended, weights = self.cross(self.before_cross(x), memory, memory, key_padding_mask=hidden)
        x = x + attended
        return x + self.maps(x), known, weights


def _positions(first: int, count: int, like: Tensor) -> Tensor:
    """Sines and cosines, (count, width)."""
    width = like.shape[-1]
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(1e4) / width))
    angles = torch.arange(first, first + count, device=like.device).unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)
