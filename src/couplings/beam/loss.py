"""Losses of a decoder: teacher forcing, the soft beam, and their mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from couplings import _checks
from couplings.beam.decoder import Decoder, Step
from couplings.beam.soft import _check_gold, soft_beam_search


def teacher_forcing_loss(
    step: Step,
    embeddings: Tensor,
    state: Any,
    gold: Tensor,
    *,
    start: int | Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Negative log-likelihood of the gold tokens, every step fed the gold token before it.

    Args:
        step, embeddings, state, start: as in ``couplings.beam.beam_search``.
        gold: (batch, T) the true tokens, with the end token if there is one.
        lengths: (batch,) true lengths; None: all T.

    Returns:
        A scalar, summed over a sentence, averaged over sentences.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or range.

    Example:
        >>> import torch, couplings as cp
        >>> step = lambda embedding, state: (torch.zeros(len(embedding), 4).log_softmax(-1), state)
        >>> cp.beam.teacher_forcing_loss(step, torch.eye(4), None, torch.tensor([[1, 2]]), start=0)
        tensor(2.7726)
    """
    decoder = Decoder(step, embeddings, state, start, 1)
    steps, checked, lengths = _check_gold(decoder, None, gold, lengths)
    state, embedding, total = decoder.state, decoder.first_embedding(), None
    for t in range(steps):
        log_probs, state = decoder(embedding, state)
        token = gold[:, t] if checked is None else checked[:, t]
        term = log_probs[:, 0].gather(-1, token.unsqueeze(-1))[:, 0]
        if lengths is not None:
            term = torch.where(t < lengths, term, 0)
        total = term if total is None else total + term
        embedding = embeddings[token].unsqueeze(1)
    return -total.mean() if total is not None else embeddings.new_zeros(())


def soft_beam_loss(
    step: Step,
    embeddings: Tensor,
    state: Any,
    gold: Tensor,
    *,
    start: int | Tensor,
    lengths: Tensor | None = None,
    beam: int = 5,
    epsilon: float | None = None,
    hard: bool = False,
) -> Tensor:
    r"""Negative log-likelihood of the gold tokens along the most likely path of the soft beam search.

    Args:
        step, embeddings, state, start: as in ``couplings.beam.beam_search``.
        gold: (batch, T) the true tokens, with the end token if there is one.
        lengths: (batch,) true lengths; None: all T.
        beam, epsilon, hard: as in ``couplings.beam.soft_beam_search``.

    Returns:
        A scalar, summed over a sentence, averaged over sentences.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or range.

    Reference:
        Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 5.

    Example:
        >>> import torch, couplings as cp
        >>> step = lambda embedding, state: (torch.zeros(len(embedding), 4).log_softmax(-1), state)
        >>> cp.beam.soft_beam_loss(step, torch.eye(4), None, torch.tensor([[1, 2]]), start=0, beam=2)
        tensor(2.7726)
    """
    found = soft_beam_search(
        step,
        embeddings,
        state,
        start=start,
        beam=beam,
        gold=gold,
        lengths=lengths,
        epsilon=epsilon,
        hard=hard,
    )
    best = found.log_likelihoods.detach().argmax(-1, keepdim=True)
    if found.gold_log_likelihoods is None:
        _checks.reject("gold", "the true tokens", "None", "Pass them.")
    return -found.gold_log_likelihoods.gather(-1, best).mean()


def sequence_loss(
    step: Step,
    embeddings: Tensor,
    state: Any,
    gold: Tensor,
    *,
    start: int | Tensor,
    lengths: Tensor | None = None,
    beam: int = 5,
    epsilon: float | None = None,
    rho: float = 0.8,
) -> Tensor:
    r"""The training loss of Xie et al. 2020: ``rho * teacher forcing + (1 - rho) * soft beam``.

    Args:
        step, embeddings, state, gold, start, lengths, beam, epsilon: as in ``couplings.beam.soft_beam_loss``.
        rho: weight of teacher forcing, in [0, 1].

    Returns:
        A scalar.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or range.

    Example:
        >>> import torch, couplings as cp
        >>> step = lambda embedding, state: (torch.zeros(len(embedding), 4).log_softmax(-1), state)
        >>> cp.beam.sequence_loss(step, torch.eye(4), None, torch.tensor([[1, 2]]), start=0, beam=2)
        tensor(2.7726)
    """
    if isinstance(rho, bool) or not isinstance(rho, (int, float)):
        _checks.reject("rho", "a number in [0, 1]", _checks.describe(rho), "Pass a float.", TypeError)
    if not 0 <= rho <= 1:
        _checks.reject("rho", "a number in [0, 1]", rho, "1 is teacher forcing alone.")
    forced = teacher_forcing_loss(step, embeddings, state, gold, start=start, lengths=lengths)
    if rho == 1:
        return forced
    soft = soft_beam_loss(
        step, embeddings, state, gold, start=start, lengths=lengths, beam=beam, epsilon=epsilon
    )
    return rho * forced + (1 - rho) * soft
