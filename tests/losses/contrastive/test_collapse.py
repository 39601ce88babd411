"""The collapse question: what the losses see, what the diagnostics see, and the way out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from couplings.losses.contrastive import (
    EmbeddingDiagnostics,
    clip_loss,
    collapse_guard,
    cosine_target_loss,
    diagnostics,
    info_nce_loss,
    n_pairs_loss,
    nt_xent_loss,
    sigmoid_loss,
    triplet_loss,
)

N, D = 7, 768
# each loss on raw cosines: all rows equal; all equal and x2 = -x1; x2 = x1 random, mean over 100 draws
LOG = math.log
SCENARIOS = {
    "n_pairs": (lambda a, b: n_pairs_loss(a, b, temperature=1.0), LOG(7), LOG(7), 1.736),
    "info_nce": (lambda a, b: info_nce_loss(a, b, temperature=1.0), LOG(7), LOG(7), 1.736),
    "clip": (lambda a, b: clip_loss(a, b, temperature=1.0), LOG(7), LOG(7), 1.736),
    "nt_xent": (lambda a, b: nt_xent_loss(a, b, temperature=1.0), LOG(13), LOG(7 + 6 * math.e**2), 2.337),
    "sigmoid": (
        lambda a, b: sigmoid_loss(a, b, temperature=1.0, bias=0.0),
        7 * LOG(1 + math.e) - 1,
        7 * LOG(1 + math.e) - 6,
        7.135,
    ),
    "triplet": (triplet_loss, 0.2, 0.2, 0.0),
    "triplet, hard": (lambda a, b: triplet_loss(a, b, mining="hard"), 0.2, 0.2, 0.0),
    "cosine_target": (cosine_target_loss, 49 / 72, 2 + 25 / 72, 0.420),
    "cosine_target, -1": (
        lambda a, b: cosine_target_loss(a, b, target=-1.0),
        2 - 50 / 169,
        2 - 50 / 169,
        1.235,
    ),
}


def equal_rows(dtype=torch.float64):
    return torch.rand(D, dtype=dtype).expand(N, D).contiguous()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_three_scenarios(name):
    """SPEC's table: the collapsed states cost little more than random vectors, and nothing pulls out of them."""
    loss, same, opposite, random = SCENARIOS[name]
    x = equal_rows()
    for x2, expected in ((x, same), (-x, opposite)):
        leaves = x.clone().requires_grad_(), x2.clone().requires_grad_()
        found = loss(*leaves)
        assert abs(found.item() - expected) < 1e-9
        for grad in torch.autograd.grad(found, leaves):
            assert grad.abs().max() < 1e-16
    draws = [torch.rand(N, D, dtype=torch.float64) for _ in range(100)]
    assert abs(sum(loss(y, y).item() for y in draws) / 100 - random) < 3e-3
    assert diagnostics(x, x).collapsed
    assert diagnostics(x, -x).collapsed
    assert not any(diagnostics(y, y).collapsed for y in draws[:10])


def test_figures_of_the_question():
    """1.9459, 1.9459 and 1.736 as printed."""
    x = equal_rows(torch.float32)
    values = [n_pairs_loss(x, y, temperature=1.0).item() for y in (x, -x)]
    assert [round(v, 4) for v in values] == [1.9459, 1.9459]
    draws = [torch.rand(N, D) for _ in range(100)]
    assert abs(sum(n_pairs_loss(y, y, temperature=1.0).item() for y in draws) / 100 - 1.736) < 2e-3


# -------------------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_reasons(dtype):
    x = equal_rows(dtype)
    healthy = torch.randn(N, D).to(dtype)
    for pair, words in (
        ((x, x), "x1: all rows point the same way (spread 0); x2: all"),
        ((x, -x), "x1: all rows point the same way (spread 0); x2: all"),
        ((healthy, x), "x2: all rows point the same way"),
        ((x * torch.rand(N, 1).add(0.5).to(dtype), healthy), "x1: all rows point the same way"),
        ((torch.zeros_like(x), healthy), "x1: all rows point the same way"),
        (
            (x * torch.tensor([[1], [-1], [1], [-1], [1], [1], [-1]]).to(dtype), healthy),
            "x1: all rows lie on",
        ),
    ):
        found = diagnostics(*pair)
        assert found.collapsed
        assert found.reason.startswith(words)
        assert all(math.isfinite(v) for v in found[2:])
    assert not diagnostics(healthy, healthy).collapsed
    assert diagnostics(healthy, healthy).reason == ""


def test_not_finite():
    x = torch.randn(4, 3)
    broken = x.clone()
    broken[1, 2] = torch.nan
    found = diagnostics(x, broken)
    assert not found.collapsed
    assert found.reason == "not finite"
    assert math.isnan(found.alignment)


def test_figures_by_definition():
    """Against pair-by-pair definitions in float64."""
    x1 = torch.randn(40, 9, dtype=torch.float64)
    x2 = x1 + torch.randn(40, 9, dtype=torch.float64)
    found = diagnostics(x1.float(), x2.float(), rows=40)
    u1, u2 = (x / x.norm(dim=1, keepdim=True) for x in (x1, x2))
    cosine = u1 @ u2.T
    off = ~torch.eye(40, dtype=torch.bool)
    near = torch.zeros(40, dtype=torch.float64)
    for row in cosine:
        near[row.argsort(descending=True)[:10]] += 1
    hardest = cosine.masked_fill(~off, -2).amax(1)
    singular = torch.linalg.svdvals(u1)
    share = singular / singular.sum()
    expected = EmbeddingDiagnostics(
        collapsed=False,
        reason="",
        rows=40,
        alignment=(u1 - u2).square().sum(1).mean(),
        uniformity1=(-2 * torch.pdist(u1).square()).exp().mean().log(),
        uniformity2=(-2 * torch.pdist(u2).square()).exp().mean().log(),
        effective_rank1=(-share * share.log()).sum().exp(),
        effective_rank2=found.effective_rank2,
        spread1=u1.var(0, correction=0).sum(),
        spread2=u2.var(0, correction=0).sum(),
        diagonal=cosine.diagonal().mean(),
        off_diagonal=cosine[off].mean(),
        margin=(cosine.diagonal() - hardest).mean(),
        accuracy=(cosine.diagonal() > hardest).double().mean(),
        hubness=((near - near.mean()) ** 3).mean() / near.var(correction=0) ** 1.5,
    )
    for name, got, want in zip(found._fields, found, expected, strict=True):
        assert got == want if isinstance(want, (bool, str)) else abs(got - float(want)) < 1e-5, name


def test_two_rows_are_enough():
    found = diagnostics(torch.eye(2), torch.eye(2))
    assert not found.collapsed
    assert abs(found.uniformity1 + 4) < 1e-6  # squared distance 2
    assert abs(found.effective_rank1 - 2) < 1e-6


def test_a_sample_stands_for_the_batch():
    x1 = torch.randn(3000, 16)
    x2 = x1 + torch.randn(3000, 16)
    whole, sample = (diagnostics(x1, x2, rows=rows) for rows in (3000, 256))
    assert (whole.rows, sample.rows) == (3000, 256)
    assert [diagnostics(x1[:n], x2[:n]).rows for n in (2, 64, 100, 2048, 3000)] == [2, 64, 64, 128, 187]
    assert diagnostics(torch.randn(8192, 2), torch.randn(8192, 2)).rows == 256
    assert abs(whole.effective_rank1 - sample.effective_rank1) < 0.5
    assert abs(whole.uniformity1 - sample.uniformity1) < 0.1
    assert abs(whole.alignment - sample.alignment) < 0.1
    assert abs(whole.spread1 - sample.spread1) < 0.01


def healthy_batch(generator):
    """Random rows, of random size, width, mean and relation."""
    n = int(2 ** (3 + 6 * torch.rand((), generator=generator)))
    d = int(2 ** (1 + 8.6 * torch.rand((), generator=generator)))
    kind = int(torch.randint(3, (), generator=generator))
    x1 = torch.rand(n, d, generator=generator) if kind == 0 else torch.randn(n, d, generator=generator)
    x2 = x1 if kind < 2 else torch.randn(n, d, generator=generator)
    return x1, x2


@pytest.mark.parametrize("batches", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_false_alarm(batches):
    generator = torch.Generator().manual_seed(0)
    alarms = [
        d.reason for d in (diagnostics(*healthy_batch(generator)) for _ in range(batches)) if d.collapsed
    ]
    assert not alarms


# -------------------------------------------------------------------------------------------------------------- guard


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("fill", [0.3, -2.0, 0.0, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_exact_collapse(normalize, fill, dtype):
    x1 = torch.full((16, 5), fill, dtype=dtype, requires_grad=True)
    x2 = torch.full((16, 5), fill, dtype=dtype, requires_grad=True)
    loss = collapse_guard(x1, x2, normalize=normalize)
    assert loss == 1
    grad, other = torch.autograd.grad(loss, (x1, x2))
    assert torch.isfinite(grad).all()
    grad, other = grad.double(), other.double()  # at length 1e-20 their squares leave float32
    size = grad.norm(dim=1)
    assert (size > 0).all()
    directions = grad / size[:, None]
    apart = 1 - directions @ directions.T + torch.eye(16)
    assert apart.min() > 1e-3  # no two rows are sent the same way
    torch.testing.assert_close(grad, other)  # a pair parts together
    again = torch.autograd.grad(collapse_guard(x1, normalize=normalize), x1)[0].double()
    torch.testing.assert_close(again, 2 * grad)  # the same seed, the same direction
    another = torch.autograd.grad(collapse_guard(x1, normalize=normalize, seed=1), x1)[0]
    assert (another - again).norm() > 0.1 * again.norm()


def test_a_step_along_the_guard_lowers_it():
    """A subgradient of the hinge that also descends, to first order with the slope it claims."""
    x = torch.full((8, 4), 0.7, dtype=torch.float64, requires_grad=True)
    for normalize in (True, False):
        (grad,) = torch.autograd.grad(collapse_guard(x, normalize=normalize), x)
        step = 1e-5 * x.detach().norm(dim=1).mean()
        moved = collapse_guard(x.detach() - step * grad / grad.norm(), normalize=normalize)
        assert moved < 1 - 0.5 * step * grad.norm()


def test_rounding_is_no_spread():
    """Equal rows that came out of a matrix product with another last bit."""
    x = torch.full((64, 8), 0.3)
    x[::3] = torch.nextafter(x[::3], torch.tensor(1.0))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(collapse_guard(x), x)
    assert torch.linalg.matrix_rank(grad) > 2


def test_healthy_batches_are_left_alone():
    for scale in (1e-3, 1.0, 1e3):
        x = (scale * torch.randn(32, 16)).requires_grad_()
        loss = collapse_guard(x, x)
        assert loss == 0
        loss.backward()
        assert (x.grad == 0).all()
    x = torch.randn(32, 16, dtype=torch.float64)
    assert collapse_guard(x + 30) > 0  # mean cosine 0.999
    u = torch.nn.functional.normalize(x + 30, dim=1)
    singular = torch.linalg.svdvals(u - u.mean(0))
    torch.testing.assert_close(collapse_guard(x + 30), 1 - singular.sum() / (32 * 16) ** 0.5 / 0.25)
    # which is the root mean square distance from the mean, times the root of the share of the directions in use
    used = singular.sum().square() / singular.square().sum()
    spread = u.var(0, correction=0).sum().sqrt()
    torch.testing.assert_close(collapse_guard(x + 30), 1 - spread * (used / 16).sqrt() / 0.25)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (5, 5), (6, 5), (2, 3), (40, 64), (64, 30), (20, 300)])
def test_every_direction_is_pushed_alike(shape):
    """The gradient in the rows has equal singular values: U V' of the centred rows, by another algorithm."""
    n, d = shape
    scale = torch.logspace(0, -3, d, dtype=torch.float64)  # one direction dominates
    x = (torch.randn(n, d, dtype=torch.float64) * scale).requires_grad_()
    (grad,) = torch.autograd.grad(collapse_guard(x, threshold=1e3, normalize=False), x)
    u, _, v = torch.linalg.svd(x.detach() - x.detach().mean(0), full_matrices=False)
    rank = min(n - 1, d)
    expected = -(u[:, :rank] @ v[:rank]) / (n * rank) ** 0.5 / 1e3
    torch.testing.assert_close(grad, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (50, 768)])
@pytest.mark.parametrize("rank", [1, 2])
def test_directions_that_are_missing_are_opened(shape, rank):
    """Rows on a line or in a plane, exactly: the gradient has all other directions, and a step along it uses them."""
    n, d = shape
    x = torch.randn(n, rank, dtype=torch.float64) @ torch.randn(rank, d, dtype=torch.float64)
    x.requires_grad_()
    loss = collapse_guard(x, threshold=1e3, normalize=False)
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.linalg.matrix_rank(grad) == min(n - 1, d, 64)
    step = 1e-3 / grad.norm()
    found = collapse_guard(x.detach() - step * grad, threshold=1e3, normalize=False)
    assert found < loss - 0.9 * step * grad.square().sum()


def test_a_line_is_left():
    """Where all cosines are +-1, the losses' gradients vanish as at a point, and the old spread is 1."""
    x = torch.rand(16, dtype=torch.float64) * torch.tensor([1.0, -1.0]).double().repeat(8)[:, None]
    x.requires_grad_()
    assert diagnostics(x, x).collapsed
    loss = collapse_guard(x, threshold=0.5)
    assert loss > 0
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.linalg.matrix_rank(grad) > 10


def test_many_dimensions_are_sketched():
    """64 random directions stand for 768: about the same value, in both precisions, the same for the same seed."""
    x = torch.randn(300, 768, dtype=torch.float64) + 5
    u = torch.nn.functional.normalize(x, dim=1)
    singular = torch.linalg.svdvals(u - u.mean(0))
    whole = 1 - singular.sum() / (300 * 299) ** 0.5 / 0.5
    found = collapse_guard(x, threshold=0.5)
    assert abs(found - whole) < 0.1
    torch.testing.assert_close(collapse_guard(x.float(), threshold=0.5).double(), found, atol=1e-5, rtol=0)
    assert collapse_guard(x, threshold=0.5, seed=1) != found


def test_few_rows_in_many_dimensions_are_not_sketched():
    x = torch.randn(1, 768, dtype=torch.float64)
    assert collapse_guard(torch.cat([x, -x]), threshold=0.99) == 0  # spread 1
    torch.testing.assert_close(
        collapse_guard(torch.cat([x, -x]), threshold=4.0 * 768, normalize=False),
        (1 - torch.linalg.vector_norm(x) / (4 * 768)),
    )


@pytest.mark.parametrize("size", [1e-200, 1e160])
def test_squares_neither_overflow_nor_vanish(size):
    x = torch.randn(8, 4, dtype=torch.float64)
    found, expected = (
        torch.autograd.functional.jacobian(
            lambda x, s=s: collapse_guard(x, threshold=3 * s, normalize=False), x * s
        )
        for s in (size, 1.0)
    )
    torch.testing.assert_close(found * size, expected)


def test_the_seed_may_be_any_int_under_compile():
    compiled = torch.compile(lambda x, seed: collapse_guard(x, seed=seed), fullgraph=True, backend="eager")
    x = torch.ones(80, 100, dtype=torch.float64)
    for seed in (0, 1, -7, 2**33 + 1):
        assert compiled(x, seed) == collapse_guard(x, seed=seed) == 1
    assert collapse_guard(torch.ones(4, 3), seed=2**33 + 1) == 1


def test_no_dimension_is_an_error():
    for normalize in (True, False):
        with pytest.raises(ValueError, match="d >= 1"):
            collapse_guard(torch.ones(4, 0), normalize=normalize)


def test_what_is_not_finite_stays_so():
    x = torch.randn(6, 4)
    x[2, 1] = torch.nan
    assert collapse_guard(x).isnan()
    assert collapse_guard(torch.randn(6, 4), x).isnan()


def test_other_guards_do_not_part_equal_rows():
    """Why a new term: the smoothed variance hinge has the same gradient for all rows there (zero but for rounding)."""
    x = torch.full((8, 4), 0.3, requires_grad=True)
    hinge = (1 - (x.var(0) + 1e-4).sqrt()).clamp(min=0).mean()
    hinge.backward()
    assert (x.grad == x.grad[0]).all()


def data(n, seed):
    """Two noisy views of the same hidden causes."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(1000)
    mixing = torch.randn(2, 6, 16, generator=fixed)
    causes = torch.randn(n, 6, generator=generator)
    return [(causes @ m).tanh() + 0.05 * torch.randn(n, 16, generator=generator) for m in mixing]


def encoder(seed, collapsed, bias):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    if collapsed:
        nn.init.zeros_(network[2].weight)
        nn.init.constant_(network[2].bias, bias)
    return network


def train(loss, collapsed, guard, bias=0.3, steps=150):
    encoders = [encoder(seed, collapsed, bias) for seed in (0, 1)]
    parameters = [p for e in encoders for p in e.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    for step in range(steps):
        x1, x2 = (e(x) for e, x in zip(encoders, data(128, 10 + step), strict=True))
        total = loss(x1, x2) + (collapse_guard(x1, x2) if guard else 0)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    with torch.no_grad():
        return diagnostics(*(e(x) for e, x in zip(encoders, data(256, 1), strict=True)), rows=256)


def test_training_out_of_exact_collapse():
    """Last layers with weight zero and a constant bias: the loss alone stays, with the guard it catches up."""

    def loss(x1, x2):
        return clip_loss(x1, x2, temperature=0.1)

    stuck = train(loss, collapsed=True, guard=False, steps=20)
    assert stuck.collapsed
    assert stuck.accuracy <= 1 / 256
    healthy = train(loss, collapsed=False, guard=True)
    freed = train(loss, collapsed=True, guard=True)
    assert not freed.collapsed
    assert healthy.accuracy > 0.8
    assert freed.accuracy > healthy.accuracy - 0.02
    from_zeros = train(
        loss, collapsed=True, guard=True, bias=0.0, steps=40
    )  # not even a direction to start from
    assert not from_zeros.collapsed
    assert from_zeros.accuracy > 0.2
