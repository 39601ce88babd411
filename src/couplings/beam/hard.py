"""Ordinary batched beam search."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import seen
from couplings.beam.candidates import choose
from couplings.beam.decoder import Decoder, Step, proposals, token_ids, whole_number


class Beams(NamedTuple):
    """The hypotheses of every sentence, best first."""

    tokens: Tensor  #: ``(batch, beam, steps)`` int64; after the end token it is repeated
    log_likelihoods: Tensor  #: ``(batch, beam)``, up to the end token; -inf for a beam that does not exist
    lengths: Tensor  #: ``(batch, beam)`` int64, tokens up to and with the end token


@torch.no_grad()
def beam_search(
    step: Step,
    embeddings: Tensor,
    state: Any,
    *,
    start: int | Tensor,
    beam: int,
    max_length: int,
    end: int | None = None,
) -> Beams:
    r"""The most likely continuations found by keeping ``beam`` of them at every step.

    Args:
        step: the decoder: ``step(embedding, state) -> (log_probs, state)`` on rows, see ``couplings.beam.Step``.
        embeddings: (V, d), one row per token: what a step is fed.
        state: any pytree (tensors, lists, dicts, ..) whose tensors have the batch first, (batch, ..).
        start: the token that begins every sentence, an int or (batch,).
        beam: how many hypotheses to keep, at least 1; 1 is greedy search.
        max_length: steps at most.
        end: the token that finishes a hypothesis; it keeps its place and its likelihood. None: all run to the end. With
            every beam finished the search stops early (on the CPU).

    Returns:
        ``Beams(tokens, log_likelihoods, lengths)``, best first. Of equal likelihoods the first (by beam, then token)
        counts. No gradient: that is ``soft_beam_search``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or range, or a step that returns the wrong shape.

    Example:
        >>> import torch, couplings as cp
        >>> table = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.0, 0.0, 1.0]]).log()  # token -> next
        >>> step = lambda embedding, state: (table[embedding.argmax(-1)], state)
        >>> found = cp.beam.beam_search(step, torch.eye(3), None, start=0, beam=2, max_length=3, end=2)
        >>> found.tokens[0].tolist()
        [[2, 2, 2], [1, 0, 1]]
    """
    whole_number("max_length", max_length, 1)
    decoder = Decoder(step, embeddings, state, start, beam)
    if end is not None:
        token_ids("end", end, (1,), decoder.vocabulary, embeddings.device)
    state, embedding, scores = decoder.state, decoder.first_embedding(), decoder.first_scores()
    tokens = decoder.first.new_zeros(decoder.batch, beam, 0)
    finished = torch.zeros_like(scores, dtype=torch.bool)
    lengths = torch.zeros_like(scores, dtype=torch.int64)
    for _ in range(max_length):
        log_probs, state = decoder(embedding, state)
        total = proposals(log_probs, scores, finished, end)
        best = choose(total, beam)
        scores = total.gather(-1, best)
        source, token = best // decoder.vocabulary, best % decoder.vocabulary
        tokens = tokens.gather(1, source.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens, token.unsqueeze(-1)], -1)
        finished = finished.gather(1, source)
        lengths = lengths.gather(1, source) + ~finished
        if end is not None:
            finished = finished | (token == end)
        embedding, state = embeddings[token], decoder.follow(state, source)
        if end is not None and seen(~(finished | (scores == -torch.inf))) is False:
            break
    return Beams(tokens, scores, lengths)
