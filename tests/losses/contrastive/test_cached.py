"""``cached_backward`` against one backward pass through the same chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from couplings import losses
from couplings.losses.contrastive.cached import cached_backward

SHARP = torch.float64


def tower(dropout: float = 0.0) -> nn.Sequential:
    layers = (nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
    return nn.Sequential(*layers).to(SHARP)


def plain(loss: Any, encoders: Any, inputs: Any, size: int) -> Tensor:
    embedded = [torch.cat([f(part) for part in x.split(size)]) for f, x in zip(encoders, inputs, strict=True)]
    value = loss(*embedded)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("size", [3, 7, 100])
def test_equals_one_backward(shared: bool, dropout: float, size: int) -> None:
    first = tower(dropout)
    encoders = (first, first if shared else tower(dropout))
    temperature = torch.tensor(0.3, dtype=SHARP, requires_grad=True)
    inputs = torch.randn(2, 14, 5, dtype=SHARP).unbind()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return losses.clip_loss(a, b, temperature=temperature)

    leaves = [temperature, *first.parameters(), *encoders[1].parameters()]
    results = []
    for run in (plain, lambda *a: cached_backward(*a[:3], chunk_size=a[3])):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(5)
        value = run(loss, encoders, inputs, size)
        results.append(([value, *(leaf.grad for leaf in leaves)], torch.rand(3)))
    (want, stream), (got, stream_after) = results
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(stream_after, stream)  # what is drawn afterwards is what would have been


def test_gradients_add_up() -> None:
    encoder = tower()
    x = torch.randn(6, 5, dtype=SHARP)
    cached_backward(losses.clip_loss, (encoder, encoder), (x, x + 1), chunk_size=4)
    once = [p.grad.clone() for p in encoder.parameters()]
    cached_backward(losses.clip_loss, (encoder, encoder), (x, x + 1), chunk_size=4)
    for p, grad in zip(encoder.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_inputs_as_tuples_and_dicts() -> None:
    encoder = tower()
    x, y = torch.randn(2, 6, 5, dtype=SHARP).unbind()

    def pair(a: Tensor, b: Tensor) -> Tensor:
        return encoder(a * b)

    found = cached_backward(losses.clip_loss, (pair, pair), ((x, y), {"b": x, "a": x}), chunk_size=2)
    torch.testing.assert_close(found, losses.clip_loss(encoder(x * y), encoder(x * x)).detach())


def test_a_frozen_encoder_stays_frozen() -> None:
    frozen, other = tower().requires_grad_(False), tower()
    x = torch.randn(6, 5, dtype=SHARP)
    cached_backward(losses.clip_loss, (frozen, other), (x, x), chunk_size=4)
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_under_autocast() -> None:
    encoder = tower(0.3).float()
    x = torch.randn(6, 5)
    grads = []
    for run in (plain, lambda *a: cached_backward(*a[:3], chunk_size=a[3])):
        encoder.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            run(losses.clip_loss, (encoder, encoder), (x, x + 1), 4)
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.002)


def test_activations_of_one_chunk_only() -> None:
    held: list[int] = []

    def counting(x: Tensor) -> Tensor:
        return x

    encoder = tower()
    x = torch.randn(64, 5, dtype=SHARP)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, counting):
        cached_backward(losses.clip_loss, (encoder, encoder), (x, x), chunk_size=4)
    assert max(held) <= 64 * 4  # embeddings of all rows, activations (16 wide) of 4


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"loss": 3}, TypeError, "loss"),
        ({"loss": lambda a, b: a}, ValueError, "loss"),
        ({"encoders": [tower(), 1]}, TypeError, "encoders"),
        ({"inputs": [torch.ones(4, 5)]}, ValueError, "inputs"),
        ({"inputs": [torch.ones(4, 5), "text"]}, TypeError, r"inputs\[1\]"),
        ({"inputs": [(torch.ones(4, 5), torch.ones(3, 5)), torch.ones(4, 5)]}, ValueError, r"inputs\[0\]"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], name: str) -> None:
    x = torch.ones(4, 5, dtype=SHARP)
    given = {"loss": losses.clip_loss, "encoders": [tower(), tower()], "inputs": [x, x], "chunk_size": 2}
    given |= change
    with pytest.raises(error, match=f"^{name}: expected"):
        cached_backward(**given)
