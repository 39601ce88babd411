"""Differentiable beam search (Xie et al., NeurIPS 2020, section 5): the sorted soft top-k in place of the top-k."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings import _checks
from couplings.beam.candidates import choose_softly
from couplings.beam.decoder import Decoder, Step, proposals, token_ids, whole_number


class SoftBeams(NamedTuple):
    """The beams of every sentence; which is the best follows from ``log_likelihoods``."""

    tokens: Tensor  #: ``(batch, beam, steps)`` int64, the leading token at every step
    log_likelihoods: Tensor  #: ``(batch, beam)``, of those tokens along their path, differentiable
    gold_log_likelihoods: Tensor | None  #: ``(batch, beam)``, of the gold tokens along each beam's path


def soft_beam_search(
    step: Step,
    embeddings: Tensor,
    state: Any,
    *,
    start: int | Tensor,
    beam: int,
    steps: int | None = None,
    gold: Tensor | None = None,
    lengths: Tensor | None = None,
    end: int | None = None,
    epsilon: float | None = None,
    hard: bool = False,
) -> SoftBeams:
    r"""Beam search that a gradient passes through, for training.

    At every step the sorted soft top-k over beam x V continuations gives each new beam l a weight A_l over
    continuations (source beam i, token j). Its embedding is ``sum A_l,ij embeddings_j`` and its state ``sum A_l,ij
    state_i``; its source and token are those of the largest weight, and its log-likelihood is that of its source plus
    log p(token | source).

    Args:
        step, embeddings, state, start, beam: as in ``couplings.beam.beam_search``.
        steps: number of steps; None is the length of gold.
        gold: (batch, T) the true tokens; their log-likelihood along each beam's path is returned.
        lengths: (batch,) true lengths, at most T: a sentence stops changing after that many steps. None: all T.
        end: a beam whose leading token was this proposes only it again, with no further cost. None: no such token.
        epsilon: of ``soft_topk``, on log-likelihoods standardised over the continuations of a sentence. None is its
            default, .1; 0 is ordinary beam search, with the gradient of a gather; the paper's 1e-1, relative to its
            largest cost, is about 30 here.
        hard: ordinary beam search forward, with the soft gradient.

    Returns:
        ``SoftBeams(tokens, log_likelihoods, gold_log_likelihoods)``. Beams are ordered by their soft top-k place, which
        at epsilon 0 is best first.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or range, or a step that returns the wrong shape.

    Reference:
        Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 5, Algorithm 2.

    Example:
        >>> import torch, couplings as cp
        >>> logits = torch.zeros(3, 3, requires_grad=True)  # token -> next
        >>> step = lambda embedding, state: ((embedding @ logits).log_softmax(-1), state)
        >>> gold = torch.tensor([[1, 2]])
        >>> found = cp.beam.soft_beam_search(step, torch.eye(3), None, start=0, beam=2, gold=gold)
        >>> found.gold_log_likelihoods.sum().backward()
        >>> logits.grad[0].argmax()  # a step from token 0 towards token 1
        tensor(1)
    """
    decoder = Decoder(step, embeddings, state, start, beam)
    steps, gold, lengths = _check_gold(decoder, steps, gold, lengths)
    if end is not None:
        token_ids("end", end, (1,), decoder.vocabulary, embeddings.device)
    state, embedding, scores = decoder.state, decoder.first_embedding(), decoder.first_scores()
    tokens = decoder.first.new_zeros(decoder.batch, beam, 0)
    gold_scores = None if gold is None else torch.zeros_like(scores)
    finished = torch.zeros_like(scores, dtype=torch.bool)
    identity = torch.arange(beam, device=scores.device).expand(decoder.batch, -1)
    for t in range(steps):
        log_probs, state = decoder(embedding, state)
        total = proposals(log_probs, scores, finished, end)
        chosen = choose_softly(total, beam, epsilon, hard)
        running = None if lengths is None else (t < lengths).unsqueeze(-1)
        source, token = chosen.best // decoder.vocabulary, chosen.best % decoder.vocabulary
        new_scores = total.gather(-1, chosen.best)
        # what the soft top-k could not fill, as in the first step with fewer tokens than beams
        new_scores = torch.where(chosen.weights.detach().sum(-1) > 0, new_scores, -torch.inf)
        if running is not None:
            source = torch.where(running, source, identity)
            new_scores = torch.where(running, new_scores, scores)
        if gold is not None and gold_scores is not None:
            true = log_probs.gather(-1, gold[:, t, None, None].expand(-1, beam, 1))[..., 0]
            true = torch.where(scores == -torch.inf, 0, true)
            if running is not None:
                true = torch.where(running, true, 0)
            gold_scores = (gold_scores + true).gather(-1, source)
        scores = new_scores
        tokens = tokens.gather(1, source.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens, token.unsqueeze(-1)], -1)
        if end is not None:
            finished = finished.gather(1, source) | (token == end)
        if t + 1 < steps:
            weights = chosen.weights
            embedding = weights.to(embeddings.dtype) @ embeddings[chosen.listed % decoder.vocabulary]
            old = chosen.listed // decoder.vocabulary
            mixing = weights.new_zeros(decoder.batch, beam, beam)
            mixing = mixing.scatter_add(-1, old.unsqueeze(1).expand_as(weights), weights)
            state = decoder.mix(state, mixing, source)
    return SoftBeams(tokens, scores, gold_scores)


def _check_gold(
    decoder: Decoder, steps: int | None, gold: object, lengths: Tensor | None
) -> tuple[int, Tensor | None, Tensor | None]:
    if gold is not None:
        if not isinstance(gold, Tensor) or gold.dim() != 2 or gold.shape[1] == 0:
            _checks.reject(
                "gold", "integers of shape (batch, T)", _checks.describe(gold), "Pad the sentences."
            )
        gold = token_ids(
            "gold", gold, (decoder.batch, gold.shape[1]), decoder.vocabulary, decoder.first.device
        )
        if steps is None:
            steps = gold.shape[1]
    if steps is None:
        _checks.reject("steps", "an int, or gold", "neither", "Pass one of them.")
    whole_number("steps", steps, 1)
    if gold is not None and steps > gold.shape[1]:
        _checks.reject(
            "steps", f"at most the length of gold, {gold.shape[1]}", steps, "Lower it, or pad gold."
        )
    if lengths is not None:
        lengths = token_ids("lengths", lengths, (decoder.batch,), steps + 1, decoder.first.device)
    return steps, gold, lengths
