"""Derivatives: first and second order by finite differences, every way torch differentiates, memory, limits."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

from couplings.losses.contrastive import (
    clip_loss,
    collapse_guard,
    cosine_target_loss,
    engine,
    info_nce_loss,
    n_pairs_loss,
    nt_xent_loss,
    scores,
    sigmoid_loss,
    triplet_loss,
)

N, D = 6, 3
IDS = torch.tensor([0, 1, 1, 3, 3, 3])
MASK = torch.tensor([1, 1, 1, 0, 1, 1]).bool()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(scores, "TILE_ROWS", 3)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def guide():
    return torch.randn(N, N, generator=torch.Generator().manual_seed(3))


def late_interaction(queries, documents):
    return torch.einsum("iqd,jkd->ijqk", queries, documents).amax(-1).sum(-1)


GROUPED = [{"groups": IDS, "positives": mode} for mode in ("each", "mean", "own")]
CASES = {
    "n_pairs": (lambda a, b, t: n_pairs_loss(a, b, temperature=t), 0.4),
    "clip": (lambda a, b, t: clip_loss(a, b, temperature=t), 0.4),
    "clip, needing a reference": (lambda a, b, t: clip_loss(a, b, temperature=t), 0.003),
    "clip, each": (lambda a, b, t: clip_loss(a, b, temperature=t, reduction="none"), 0.4),
    "info_nce": (lambda a, b, t: info_nce_loss(a, b, temperature=t), 0.4),
    "info_nce, needing a reference": (lambda a, b, t: info_nce_loss(a, b, temperature=t), 0.003),
    "info_nce, each": (lambda a, b, t: info_nce_loss(a, b, temperature=t, reduction="none"), 0.4),
    "nt_xent": (lambda a, b, t: nt_xent_loss(a, b, temperature=t), 0.4),
    "clip, masked": (lambda a, b, t: clip_loss(a, b, temperature=t, mask=MASK), 0.4),
    "clip, dot products": (lambda a, b, t: clip_loss(a, b, temperature=t, normalize=False), 2.0),
    "sigmoid, each": (lambda a, b, t: sigmoid_loss(a, b, temperature=t, bias=-1.0, reduction="none"), 0.4),
    "sigmoid, guide": (lambda a, b, t: sigmoid_loss(a, b, temperature=t, bias=-1.0, guide=guide()), 0.4),
    "sigmoid, groups": (
        lambda a, b, t: sigmoid_loss(a, b, temperature=t, bias=-1.0, groups=IDS, mask=MASK),
        0.4,
    ),
    "cosine target": (lambda a, b, t: cosine_target_loss(a, b) * t, 1.0),
    "cosine target, groups": (lambda a, b, t: cosine_target_loss(a, b, groups=IDS, mask=MASK) * t, 1.0),
    "triplet": (lambda a, b, t: triplet_loss(a, b, margin=0.5) * t, 1.0),
    "triplet, soft": (lambda a, b, t: triplet_loss(a, b, margin=None, mining="hard", groups=IDS) * t, 1.0),
    "guard": (lambda a, b, t: collapse_guard(a, b, threshold=0.99) * t, 1.0),
}
for options in GROUPED:
    mode = options["positives"]
    CASES |= {
        f"clip, {mode}": (lambda a, b, t, o=options: clip_loss(a, b, temperature=t, **o), 0.4),
        f"nt_xent, {mode}": (lambda a, b, t, o=options: nt_xent_loss(a, b, temperature=t, **o), 0.4),
        f"info_nce, {mode}, masked": (
            lambda a, b, t, o=options: info_nce_loss(a, b, temperature=t, mask=MASK, **o),
            0.4,
        ),
        f"clip, {mode}, guide": (
            lambda a, b, t, o=options: clip_loss(a, b, temperature=t, guide=guide(), **o),
            0.4,
        ),
    }


# every entry of these, a random direction of the others
IN_FULL = ("clip", "clip, each", "nt_xent, each")


def check(loss, inputs, full=False):
    assert gradcheck(loss, inputs, fast_mode=not full)
    assert gradgradcheck(loss, inputs, fast_mode=not full)


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_order(name):
    loss, temperature = CASES[name]
    check(loss, (leaf(N, D), leaf(N, D), number(temperature)), full=name in IN_FULL)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("clip", "n_pairs"))])
def test_one_block_has_its_gradient_with_the_loss(name, monkeypatch):
    """Where a block holds all rows, its column sums are complete, too."""
    loss, temperature = CASES[name]
    inputs = (leaf(N, D), leaf(N, D), number(temperature))
    blocked = torch.autograd.grad(loss(*inputs).sum(), inputs)
    monkeypatch.setattr(scores, "TILE_ROWS", 256)
    for got, want in zip(torch.autograd.grad(loss(*inputs).sum(), inputs), blocked, strict=True):
        torch.testing.assert_close(got, want)
    check(loss, inputs)


def test_bias_and_further_negatives():
    inputs = (leaf(N, D), leaf(N, D), number(0.5), number(-0.7))
    check(lambda a, b, t, c: sigmoid_loss(a, b, temperature=t, bias=c), inputs)
    for shape, loss in (((3, D), clip_loss), ((N, 2, D), clip_loss), ((N, 2, D), info_nce_loss)):
        inputs = (leaf(N, D), leaf(N, D), leaf(*shape), number(0.5))

        def total(a, b, c, t, loss=loss):
            return loss(a, b, negatives=c, temperature=t)

        check(total, inputs)


def test_scores_from_elsewhere():
    inputs = (leaf(N, N), number(0.5))
    check(lambda s, t: clip_loss(s, None, temperature=t, normalize=False), inputs)
    inputs = (leaf(4, 2, D), leaf(4, 3, D), number(0.5))
    for loss in (clip_loss, info_nce_loss, sigmoid_loss):

        def total(a, b, t, loss=loss):
            return loss(a, b, temperature=t, similarity=late_interaction)

        check(total, inputs)


def test_third_order():
    x1, x2 = leaf(4, 3), leaf(4, 3)

    def curvature(a):
        (slope,) = torch.autograd.grad(clip_loss(a, x2, temperature=0.5), a, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), a, create_graph=True)[0].sum()

    assert gradcheck(curvature, (x1,))


def test_one_view_twice():
    """x1 and x2 are one tensor: both of its roles count."""
    x = leaf(N, D)
    assert gradcheck(lambda a: nt_xent_loss(a, a), (x,))
    assert gradcheck(lambda a: clip_loss(a, a.flip(0)), (x,))


PLAIN = {
    "n_pairs": lambda a, b: n_pairs_loss(a, b, temperature=0.3),
    "clip": lambda a, b: clip_loss(a, b, temperature=0.3),
    "clip, groups": lambda a, b: clip_loss(a, b, temperature=0.3, groups=IDS[: len(a)]),
    "info_nce": lambda a, b: info_nce_loss(a, b, temperature=0.3),
    "nt_xent": nt_xent_loss,
    "sigmoid": sigmoid_loss,
    "cosine target": cosine_target_loss,
    "triplet": triplet_loss,
    "guard": lambda a, b: collapse_guard(a, b, threshold=0.99),
}
plain = pytest.mark.parametrize("name", PLAIN)


@plain
def test_torch_func(name):
    loss = PLAIN[name]
    a, b = (torch.randn(3, 5, D, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(
        torch.vmap(loss)(a, b), torch.stack([loss(x, y) for x, y in zip(a, b, strict=True)])
    )
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(a, b)
    a, b = a.requires_grad_(), b.requires_grad_()
    want = torch.autograd.grad(sum(loss(x, y) for x, y in zip(a, b, strict=True)), (a, b))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    small = [x[0, :3].detach() for x in (a, b)]
    twice = torch.func.jacrev(torch.func.jacrev(loss))(*small)
    torch.testing.assert_close(
        twice, torch.autograd.functional.hessian(lambda x: loss(x, small[1]), small[0])
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("clip, groups", "sigmoid") else pytest.mark.slow)
        for name in (*PLAIN, "nt_xent, twice")
    ],
)
def test_compile(name):
    def twice(a, b):
        return nt_xent_loss(a, a, normalize=False) + nt_xent_loss(a, b)

    loss = PLAIN.get(name, twice)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = leaf(5, D), leaf(5, D)
    found, expected = compiled(a, b), loss(a, b)
    torch.testing.assert_close(found, expected)
    for x, y in zip(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(x, y)


def test_forward_mode_is_refused():
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="forward"):
        torch.func.jvp(lambda a: clip_loss(a, a), (x,), (x,))


def test_a_second_derivative_has_a_size_limit(monkeypatch):
    monkeypatch.setattr(engine, "DENSE_LIMIT", 16)
    x = leaf(5, D)
    (slope,) = torch.autograd.grad(clip_loss(x, x.detach()), x, create_graph=True)  # a gradient has none
    with pytest.raises(ValueError, match="at most 16 pairs where a second derivative is taken, got 25"):
        slope.sum().backward()


def peak(run):
    """Bytes that torch held above what it held before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    held = most = 0
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("loss", [clip_loss, info_nce_loss, nt_xent_loss, sigmoid_loss, cosine_target_loss])
def test_memory_is_a_block_not_a_matrix(loss, monkeypatch):
    monkeypatch.setattr(scores, "TILE_ROWS", 64)
    n = 2048
    x1, x2 = (torch.randn(n, 16, requires_grad=True) for _ in range(2))
    assert peak(lambda: loss(x1, x2).backward()) < 0.45 * 4 * n * n  # less than half a float32 matrix
    # without a gradient nothing is formed that only the gradient needs
    with torch.no_grad():
        assert peak(lambda: loss(x1, x2)) < 0.35 * 4 * n * n


def test_nothing_is_kept_for_a_gradient_that_nobody_asks_for(monkeypatch):
    pulled = []
    original = scores.Dot.pull
    monkeypatch.setattr(scores.Dot, "pull", lambda *args: (pulled.append(1), original(*args)))
    x1, x2 = torch.randn(6, D), torch.randn(6, D)
    for loss in (info_nce_loss, clip_loss, sigmoid_loss):
        loss(x1, x2)
        with torch.no_grad():
            loss(x1.requires_grad_(), x2)
        x1.requires_grad_(False)
    assert not pulled
    info_nce_loss(x1.requires_grad_(), x2).backward()
    assert len(pulled) == 2  # two blocks, each pulled once, together with the loss


def test_bitwise_reproducible():
    x1, x2 = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16)
    for loss in (clip_loss, info_nce_loss, sigmoid_loss):
        first = torch.autograd.grad(loss(x1, x2), x1)[0]
        assert torch.equal(first, torch.autograd.grad(loss(x1, x2), x1)[0])


def test_inputs_are_not_modified():
    x1, x2, matrix = torch.randn(6, D), torch.randn(6, D), torch.randn(6, 6)
    copies = [x.clone() for x in (x1, x2, matrix)]
    for loss in (clip_loss, info_nce_loss, nt_xent_loss, sigmoid_loss, triplet_loss):
        loss(x1, x2, normalize=False, temperature=1.0) if loss is not triplet_loss else loss(x1, x2)
    for loss in (clip_loss, sigmoid_loss, cosine_target_loss):
        loss(matrix.requires_grad_(), None, normalize=False).backward()
    for x, copy in zip((x1, x2, matrix), copies, strict=True):
        assert torch.equal(x.detach(), copy)


def test_a_view_and_a_transpose():
    """Strides are followed, not assumed."""
    base = torch.randn(D, N, dtype=torch.float64, requires_grad=True)
    other = torch.randn(N, 2 * D, dtype=torch.float64)[:, ::2]
    assert gradcheck(lambda a: clip_loss(a.T, other, temperature=0.5), (base,))
    torch.testing.assert_close(
        clip_loss(base.T, other, temperature=0.5),
        clip_loss(base.T.contiguous(), other.contiguous(), temperature=0.5),
    )


def test_cross_entropy_is_the_special_case():
    x1, x2 = leaf(N, D), leaf(N, D)
    logits = torch.nn.functional.normalize(x1, dim=1) @ torch.nn.functional.normalize(x2, dim=1).T / 0.1
    want = torch.autograd.grad(cross_entropy(logits, torch.arange(N)), (x1, x2))
    got = torch.autograd.grad(info_nce_loss(x1, x2, temperature=0.1), (x1, x2))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
