"""Beam search: brute force, soft at epsilon 0 against the ordinary one, gradients, the short list, messages."""

from __future__ import annotations

import itertools

import pytest
import torch

import couplings as cp
from couplings.beam import beam_search, sequence_loss, soft_beam_loss, soft_beam_search, teacher_forcing_loss
from couplings.beam.candidates import FIRST, LOST, choose_softly

INF = float("inf")


class Recurrent(torch.nn.Module):
    """A small decoder whose state is a nested structure with an integer step counter."""

    def __init__(self, vocabulary=5, width=4, dtype=torch.float64):
        super().__init__()
        self.embeddings = torch.nn.Parameter(torch.randn(vocabulary, width, dtype=dtype))
        self.cell = torch.nn.GRUCell(width, width, dtype=dtype)
        self.out = torch.nn.Linear(width, vocabulary, dtype=dtype)

    def initial(self, batch):
        hidden = torch.randn(batch, self.cell.hidden_size, dtype=self.embeddings.dtype)
        return {"hidden": (hidden,), "count": torch.zeros(batch, dtype=torch.int64), "name": "gru"}

    def forward(self, embedding, state):
        hidden = self.cell(embedding, state["hidden"][0])
        scores = 2 * self.out(hidden) + 0.1 * state["count"][:, None]
        return scores.log_softmax(-1), {"hidden": (hidden,), "count": state["count"] + 1, "name": "gru"}


@torch.no_grad()
def likelihood(model, state, tokens, start, end=None):
    """log p of a token sequence, up to its first end token, by running the decoder on it alone."""
    total, previous = 0.0, start
    for token in tokens:
        log_probs, state = model(model.embeddings[previous][None], state)
        total += float(log_probs[0, token])
        previous = token
        if token == end:
            break
    return total


def row(state, b):
    return {"hidden": (state["hidden"][0][b : b + 1],), "count": state["count"][b : b + 1], "name": "gru"}


@torch.no_grad()
def by_hand(model, state, beam, steps, start, end=None):
    """Beam search over Python tuples, one sentence."""
    beams = [((), 0.0)]
    for _ in range(steps):
        grown = []
        for tokens, score in beams:
            if end in tokens:
                grown.append(((*tokens, end), score))
                continue
            for token in range(model.out.out_features):
                path = (*tokens, token)
                grown.append((path, likelihood(model, state, path, start, end)))
        beams = sorted(grown, key=lambda item: -item[1])[:beam]
    return beams


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("beam", [1, 2, 4, 7])
def test_beam_search_is_the_definition(beam, end):
    model = Recurrent()
    state = model.initial(3)
    found = beam_search(model, model.embeddings, state, start=1, beam=beam, max_length=4, end=end)
    for b in range(3):
        expected = by_hand(model, row(state, b), beam, found.tokens.shape[-1], 1, end)
        assert [tuple(t) for t in found.tokens[b].tolist()] == [tokens for tokens, _ in expected]
        scores = torch.tensor([score for _, score in expected], dtype=torch.float64)
        torch.testing.assert_close(found.log_likelihoods[b], scores)
        ends = [tokens.index(end) + 1 if end in tokens else len(tokens) for tokens, _ in expected]
        assert found.lengths[b].tolist() == ends


def test_a_wide_beam_finds_the_best_of_all():
    model = Recurrent(vocabulary=3)
    state = model.initial(1)
    found = beam_search(model, model.embeddings, state, start=0, beam=27, max_length=3)
    every = {path: likelihood(model, state, path, 0) for path in itertools.product(range(3), repeat=3)}
    best = max(every, key=every.get)
    assert tuple(found.tokens[0, 0].tolist()) == best
    torch.testing.assert_close(found.log_likelihoods[0].exp().sum(), torch.ones((), dtype=torch.float64))


@torch.no_grad()
def test_one_beam_is_greedy():
    model = Recurrent()
    state = model.initial(2)
    found = beam_search(model, model.embeddings, state, start=0, beam=1, max_length=5)
    for b in range(2):
        token, now = 0, row(state, b)
        for t in range(5):
            log_probs, now = model(model.embeddings[token][None], now)
            token = int(log_probs.argmax())
            assert found.tokens[b, 0, t] == token


def test_it_stops_when_all_beams_have_ended():
    def step(embedding, state):
        return torch.tensor([0.1, 0.9]).log().expand(len(embedding), 2), state

    found = beam_search(step, torch.eye(2), None, start=0, beam=1, max_length=100, end=1)
    assert found.tokens.tolist() == [[[1]]]


@pytest.mark.parametrize("beam", [1, 3, 7])
@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("options", [{"epsilon": 0}, {"hard": True}])
def test_discrete_soft_search_is_beam_search(options, end, beam):
    model = Recurrent()
    state = model.initial(4)
    expected = beam_search(model, model.embeddings, state, start=1, beam=beam, max_length=4, end=end)
    steps = expected.tokens.shape[-1]
    found = soft_beam_search(
        model, model.embeddings, state, start=1, beam=beam, steps=steps, end=end, **options
    )
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.log_likelihoods, expected.log_likelihoods, rtol=1e-12, atol=1e-12)


def test_small_epsilon_approaches_beam_search():
    model = Recurrent()
    state = model.initial(2)
    expected = beam_search(model, model.embeddings, state, start=1, beam=3, max_length=3)
    found = soft_beam_search(model, model.embeddings, state, start=1, beam=3, steps=3, epsilon=1e-6)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.log_likelihoods, expected.log_likelihoods, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_gold_along_the_path():
    model = Recurrent()
    state, gold = model.initial(3), torch.randint(5, (3, 4))
    found = soft_beam_search(model, model.embeddings, state, start=1, beam=3, gold=gold, epsilon=0)
    for b in range(3):
        for tokens, score in zip(found.tokens[b].tolist(), found.gold_log_likelihoods[b], strict=True):
            now, previous, total = row(state, b), 1, 0.0
            for t, token in enumerate(tokens):
                log_probs, now = model(model.embeddings[previous][None], now)
                total += float(log_probs[0, gold[b, t]])
                previous = token
            assert abs(total - float(score)) < 1e-10


@pytest.mark.parametrize("epsilon", [0.3, None, 0])
def test_lengths_are_shorter_sentences(epsilon):
    model = Recurrent()
    state, gold = model.initial(3), torch.randint(5, (3, 4))
    lengths = torch.tensor([4, 2, 1])
    losses = [
        soft_beam_loss(
            model, model.embeddings, row(state, b), gold[b : b + 1, :n], start=1, beam=3, epsilon=epsilon
        )
        for b, n in enumerate(lengths.tolist())
    ]
    together = soft_beam_loss(
        model, model.embeddings, state, gold, start=1, lengths=lengths, beam=3, epsilon=epsilon
    )
    torch.testing.assert_close(together, torch.stack(losses).mean())
    forced = [
        teacher_forcing_loss(model, model.embeddings, row(state, b), gold[b : b + 1, :n], start=1)
        for b, n in enumerate(lengths.tolist())
    ]
    teacher = teacher_forcing_loss(model, model.embeddings, state, gold, start=1, lengths=lengths)
    torch.testing.assert_close(teacher, torch.stack(forced).mean())
    mixed = sequence_loss(
        model, model.embeddings, state, gold, start=1, lengths=lengths, beam=3, epsilon=epsilon, rho=0.8
    )
    torch.testing.assert_close(mixed, 0.8 * teacher + 0.2 * together)


@pytest.mark.parametrize("epsilon", [0.5, 0.1])
def test_gradient_through_four_steps(epsilon):
    torch.manual_seed(3)
    model = Recurrent(vocabulary=4, width=3)
    hidden, gold = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randint(4, (2, 4))

    def loss(hidden, embeddings, weight):
        def step(embedding, state):
            hidden = torch.tanh(state + embedding)
            return (2 * hidden @ weight).log_softmax(-1), hidden

        found = soft_beam_search(step, embeddings, hidden, start=0, beam=3, gold=gold, epsilon=epsilon)
        return found.gold_log_likelihoods.sum() + found.log_likelihoods.sum()

    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (hidden, model.embeddings.detach().requires_grad_(), weight)
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3, 1e-4])
def test_gradient_is_finite(epsilon, dtype):
    model = Recurrent(dtype=dtype)
    loss = soft_beam_loss(
        model, model.embeddings, model.initial(3), torch.randint(5, (3, 6)), start=1, beam=4, epsilon=epsilon
    )
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("epsilon", [1.0, 0.3, 0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_short_list_loses_nothing(spread, epsilon):
    k, n = 5, 5000
    total = (spread * torch.randn(3, n, dtype=torch.float64)).log_softmax(-1)
    total[0, 100:] = -INF
    total[1, 3:] = -INF
    chosen = choose_softly(total, k, epsilon, hard=False)
    _, full = cp.soft_topk(total, k, epsilon=epsilon)
    ours = torch.zeros_like(full).scatter(-1, chosen.listed[:, None].expand(-1, k, -1), chosen.weights)
    assert (ours - full).abs().sum((-1, -2)).max() <= 4 * LOST
    if epsilon <= 0.1 and spread == 3.0:
        assert chosen.listed.shape[-1] < n
    assert chosen.listed.shape[-1] >= FIRST * k


def test_fewer_tokens_than_beams():
    def step(embedding, state):
        return (embedding @ torch.randn(2, 2, generator=torch.Generator().manual_seed(0))).log_softmax(
            -1
        ), state

    weight = torch.eye(2, requires_grad=True)
    found = soft_beam_search(step, weight, None, start=0, beam=4, gold=torch.tensor([[1, 0, 1]]))
    found.gold_log_likelihoods.sum().backward()
    assert weight.grad.isfinite().all()
    assert found.log_likelihoods.isfinite().all()


def test_two_steps_learn_what_teacher_forcing_cannot_see():
    """A decoder trained through its own beam: the loss falls."""
    torch.manual_seed(0)
    model = Recurrent(vocabulary=6, width=8, dtype=torch.float32)
    state, gold = model.initial(4), torch.randint(6, (4, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    values = []
    for _ in range(60):
        loss = sequence_loss(model, model.embeddings, state, gold, start=0, beam=3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.1 * values[0]
    found = beam_search(model, model.embeddings, state, start=0, beam=3, max_length=3)
    assert torch.equal(found.tokens[:, 0], gold)


def uniform(embedding, state):
    return torch.zeros(len(embedding), 3).log_softmax(-1), state


EYE, GOLD = torch.eye(3), torch.zeros(2, 4, dtype=torch.int64)
BAD = {
    "step": (lambda: beam_search(3, EYE, None, start=0, beam=2, max_length=2), TypeError, "step"),
    "embeddings": (
        lambda: beam_search(uniform, [1], None, start=0, beam=2, max_length=2),
        TypeError,
        "embeddings",
    ),
    "embeddings shape": (
        lambda: beam_search(uniform, torch.zeros(3), None, start=0, beam=2, max_length=2),
        ValueError,
        r"\(V, d\)",
    ),
    "start range": (
        lambda: beam_search(uniform, EYE, None, start=3, beam=2, max_length=2),
        ValueError,
        "start",
    ),
    "start type": (
        lambda: beam_search(uniform, EYE, None, start=0.5, beam=2, max_length=2),
        TypeError,
        "start",
    ),
    "beam": (lambda: beam_search(uniform, EYE, None, start=0, beam=0, max_length=2), ValueError, "beam"),
    "beam type": (
        lambda: beam_search(uniform, EYE, None, start=0, beam=2.0, max_length=2),
        TypeError,
        "beam",
    ),
    "max_length": (
        lambda: beam_search(uniform, EYE, None, start=0, beam=1, max_length=0),
        ValueError,
        "max_length",
    ),
    "end": (lambda: beam_search(uniform, EYE, None, start=0, beam=1, max_length=2, end=7), ValueError, "end"),
    "state": (
        lambda: beam_search(
            uniform, EYE, (torch.zeros(2, 1), torch.zeros(3, 1)), start=0, beam=1, max_length=2
        ),
        ValueError,
        "state",
    ),
    "returned": (
        lambda: beam_search(lambda e, s: e, EYE, None, start=0, beam=1, max_length=2),
        TypeError,
        "return",
    ),
    "returned shape": (
        lambda: beam_search(lambda e, s: (e[:, :2], s), EYE, None, start=0, beam=1, max_length=2),
        ValueError,
        "log probabilities of shape",
    ),
    "probabilities": (
        lambda: beam_search(lambda e, s: (e.softmax(-1), s), EYE, None, start=0, beam=1, max_length=2),
        ValueError,
        "log_softmax",
    ),
    "no steps": (lambda: soft_beam_search(uniform, EYE, None, start=0, beam=1), ValueError, "steps"),
    "steps beyond gold": (
        lambda: soft_beam_search(uniform, EYE, None, start=0, beam=1, gold=GOLD[:1], steps=9),
        ValueError,
        "steps",
    ),
    "gold": (
        lambda: soft_beam_search(uniform, EYE, None, start=0, beam=1, gold=GOLD[:1].double()),
        TypeError,
        "gold",
    ),
    "gold shape": (
        lambda: soft_beam_search(uniform, EYE, None, start=0, beam=1, gold=GOLD[0]),
        ValueError,
        "gold",
    ),
    "rho": (
        lambda: sequence_loss(uniform, EYE, torch.zeros(2, 1), GOLD, start=0, rho=2.0),
        ValueError,
        "rho",
    ),
    "epsilon": (
        lambda: soft_beam_loss(uniform, EYE, torch.zeros(2, 1), GOLD, start=0, epsilon=-1.0),
        ValueError,
        "epsilon",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
