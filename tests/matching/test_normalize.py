"""sinkhorn_normalize: the certificate, a long float64 loop, brute force, laws, gradients, messages."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from couplings.matching import small
from couplings.matching.normalize import sinkhorn_normalize

INF, NAN = float("inf"), float("nan")
BAR = {torch.float64: 1e-9, torch.float32: 2e-6}


def draw(*shape, std=1.0, seed=0, dtype=torch.float64):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


def residual(plan):
    """L1 error of both marginals in float64, and what it must not exceed is BAR times the mass."""
    plan = plan.double()
    n, m = plan.shape[-2:]
    return (plan.sum(-1) - 1).abs().sum(-1) + (plan.sum(-2) - n / m).abs().sum(-1)


def textbook(logits, sweeps):
    """Row and column normalisation in the log domain, rows first."""
    n, m = logits.shape[-2:]
    for _ in range(sweeps):
        logits = logits - torch.logsumexp(logits, -1, keepdim=True)
        logits = (
            logits - torch.logsumexp(logits, -2, keepdim=True) + torch.tensor(n / m, dtype=logits.dtype).log()
        )
    return logits.exp()


def in_an_assignment(allowed):
    """The pairs that some assignment without a forbidden pair makes, by brute force."""
    n = len(allowed)
    used = torch.zeros_like(allowed)
    for permutation in itertools.permutations(range(n)):
        if all(allowed[i, j] for i, j in enumerate(permutation)):
            used[range(n), list(permutation)] = True
    return used


# ---- the certificate and the oracles


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [0.0, 1.0, 3.0, 6.0, 10.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 12])
def test_every_matrix_is_certified(n, std, dtype):
    count = {8: 512, 12: 32}.get(n, 4096)
    logits = draw(count, n, n, std=std, seed=n, dtype=dtype)
    plan = sinkhorn_normalize(logits, on_fail="raise")
    assert plan.dtype == dtype
    assert (plan >= 0).all()
    assert (residual(plan) <= BAR[dtype] * n).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [1.0, 3.0, 6.0, 10.0, 20.0, 50.0, 100.0])
@pytest.mark.parametrize("n", [3, 4])
def test_every_one_of_very_many_is_certified(n, std, dtype):
    logits = draw(2**18, n, n, std=std, seed=7, dtype=dtype)
    assert (residual(sinkhorn_normalize(logits, on_fail="raise")) <= BAR[dtype] * n).all()


@pytest.mark.parametrize(
    "shape", [(3, 3), (40, 4, 4), (5, 8, 8), (2, 3, 9, 9), (4, 3, 5), (4, 6, 2), (2, 1, 4), (2, 4, 1)]
)
def test_agrees_with_a_long_loop(shape):
    logits = draw(*shape, std=2.0, seed=3)
    expected = textbook(logits, 4000)
    torch.testing.assert_close(sinkhorn_normalize(logits), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(sinkhorn_normalize(logits.float()).double(), expected, rtol=0, atol=2e-6)


def test_two_by_two_is_a_sigmoid():
    logits = draw(1000, 2, 2, std=20.0)
    (a, b), (c, d) = logits.unbind(-2)[0].unbind(-1), logits.unbind(-2)[1].unbind(-1)
    expected = torch.sigmoid((a + d - b - c) / 2)
    plan = sinkhorn_normalize(logits)
    torch.testing.assert_close(plan[:, 0, 0], expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(plan[:, 0, 1], 1 - expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("std", [3.0, 10.0, 40.0])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_has_the_form_of_a_scaling(n, std):
    """A cycle of the plan has the logits of the cycle, whatever the potentials; that and the marginals say it all."""
    logits = draw(500, n, n, std=std, seed=5)
    log_plan = sinkhorn_normalize(logits).log()

    def cycles(x):
        return x[:, :-1, :-1] + x[:, 1:, 1:] - x[:, :-1, 1:] - x[:, 1:, :-1]

    inside = cycles(log_plan).isfinite()
    torch.testing.assert_close(cycles(log_plan)[inside], cycles(logits)[inside], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_cold_limit_is_the_best_assignment(n):
    logits = draw(300, n, n)
    plan = sinkhorn_normalize(logits / 1e-4)
    for matrix, hard in zip(logits, plan, strict=True):
        totals = {p: float(matrix[range(n), p].sum()) for p in itertools.permutations(range(n))}
        best, *others = sorted(totals.values(), reverse=True)
        if best - others[0] > 1e-2:
            assert tuple(hard.argmax(-1).tolist()) == max(totals, key=totals.__getitem__)
            torch.testing.assert_close(hard.amax(-1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-9)


# Matrices whose potentials must travel far, or between groups that hardly touch.
CHAIN = [[0, -8, -40, -40], [-40, 0, -8, -40], [-40, -40, 0, -8], [-8, -40, -40, 0]]
HARD = {
    "all equal": torch.zeros(4, 4),
    "two blocks": torch.tensor([[0.0, 0, -60, -60], [0, 0, -60, -60], [-60, -60, 0, 0], [-60, -60, 0, 0]]),
    "two blocks, one way": torch.tensor(
        [[0.0, 0, -3, -2], [0, 0, -1, 0], [-90, -80, 0, 0], [-85, -99, 0, 0]]
    ),
    "one way, at the edge of rounding": torch.tensor(
        [[0.0, 0, 9, 9], [0, 0, 9, 9], [-25, -24, 0, 0], [-26, -23, 0, 0]]
    ),
    "a cycle": torch.tensor(CHAIN).float(),
    "a tie of assignments": torch.tensor([[50.0, 50, 0, 0], [50, 50, 0, 0], [0, 0, 50, 50], [0, 0, 50, 50]]),
    "triangular": torch.full((4, 4), 30.0).triu(),
    "huge": torch.tensor([[1e30, -1e30, 3.0], [5.0, 1e30, 2.0], [-1e30, 0.0, 1e29]]),
    "finfo.min as a mask": torch.tensor([[0.0, -3.4e38, 1.0], [2.0, 0.5, -3.4e38], [1.0, 1.0, 1.0]]),
    "powers": -torch.tensor([[float(2 ** (i * j)) for j in range(6)] for i in range(6)]),
    "one hot row": torch.tensor([[1e4, 0, 0, 0], [1e4, 0, 0, 0], [1e4, 1, 0, 0], [1e4, 0, 2, 0]]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_difficult_matrices(name, turned, dtype):
    logits = HARD[name].to(dtype)
    logits = (logits.mT if turned else logits).clone().requires_grad_()
    plan = sinkhorn_normalize(logits, on_fail="raise")
    assert residual(plan.detach()) <= BAR[dtype] * len(logits)
    plan.square().sum().backward()
    assert logits.grad.isfinite().all()


def test_the_careful_steps_alone_solve_it(monkeypatch):
    monkeypatch.setattr(small, "QUICK_PASSES", 0)
    logits = draw(500, 4, 4, std=20.0)
    careful = sinkhorn_normalize(logits, on_fail="raise")
    monkeypatch.undo()
    torch.testing.assert_close(careful, sinkhorn_normalize(logits), rtol=0, atol=1e-9)


def test_on_the_device(device):
    for n in (4, 12):
        logits = draw(200, n, n, std=8.0, dtype=torch.float32)
        logits[3, 0] = -INF
        leaf = logits.to(device).requires_grad_()
        plan = sinkhorn_normalize(leaf, on_fail="ignore")
        assert plan.device == leaf.device
        torch.testing.assert_close(
            plan.detach().cpu(),
            sinkhorn_normalize(logits, on_fail="ignore"),
            rtol=0,
            atol=1e-5,
            equal_nan=True,
        )
        plan[4:].square().sum().backward()
        assert leaf.grad[4:].isfinite().all()


@pytest.mark.parametrize("std", [1.0, 20.0])
def test_where_values_cannot_be_looked_at(monkeypatch, std):
    """The same where no branch depends on values, as on an accelerator: all pass through every step, frozen."""
    logits = draw(300, 4, 4, std=std)
    logits[::7, 1, 2] = -INF
    expected = sinkhorn_normalize(logits)
    monkeypatch.setattr(small, "any_true", lambda _: True)
    monkeypatch.setattr(small, "all_true", lambda: lambda _: False)
    torch.testing.assert_close(sinkhorn_normalize(logits), expected, rtol=0, atol=1e-9)


# ---- rectangular, and a fixed number of sweeps


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (2, 5, 4)])
def test_rectangular_rows_sum_to_one(shape):
    plan = sinkhorn_normalize(draw(*shape, std=3.0))
    n, m = shape[-2:]
    torch.testing.assert_close(plan.sum(-1), torch.ones_like(plan[..., 0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(plan.sum(-2), torch.full_like(plan[..., 0, :], n / m), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sweeps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 5), (12, 9)])
def test_fixed_sweeps_are_the_textbook_loop(shape, sweeps):
    logits = draw(*shape, std=3.0).requires_grad_()
    plan, expected = sinkhorn_normalize(logits, iterations=sweeps), textbook(logits, sweeps)
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-10)
    weights = draw(*shape, seed=1)
    ours, theirs = (torch.autograd.grad((weights * p).sum(), logits)[0] for p in (plan, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    columns = plan.detach().sum(-2)
    torch.testing.assert_close(columns, torch.full_like(columns, shape[-2] / shape[-1]), rtol=0, atol=1e-12)


def test_twenty_sweeps_are_not_the_answer():
    logits = draw(2000, 4, 4, std=6.0)
    wrong = (sinkhorn_normalize(logits, iterations=20).sum(-1) - 1).abs().amax(-1) > 1e-2
    assert 0.3 < wrong.double().mean() < 0.8


# ---- forbidden pairs, bad matrices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_forbidden_pairs_against_brute_force(n, dtype):
    logits = draw(400, n, n, std=1.5, seed=n)
    allowed = torch.rand(400, n, n, generator=torch.Generator().manual_seed(n)) < 0.6
    used = torch.stack([in_an_assignment(one) for one in allowed])
    feasible = used.any(-1).all(-1)
    assert 20 < feasible.sum() < 380
    given = logits.masked_fill(~allowed, -INF).to(dtype).requires_grad_()
    plan = sinkhorn_normalize(given, on_fail="ignore")
    assert plan[~feasible].isnan().all()
    # what is in no assignment is 0 in the limit of the sweeps; without it the loop converges fast
    expected = textbook(logits.masked_fill(~used, -INF)[feasible], 3000)
    ours = plan.detach()[feasible].double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-6)
    assert (ours[~used[feasible]] == 0).all()
    (gradient,) = torch.autograd.grad(plan[feasible].square().sum(), given)
    assert gradient[feasible].isfinite().all()
    assert (gradient[feasible][~used[feasible]] == 0).all()


@pytest.mark.parametrize("n", [9, 12])
def test_forbidden_pairs_of_a_larger_matrix(n):
    logits = draw(n, n, std=2.0)
    logits[draw(n, n, seed=1) > 0.8] = -INF
    logits.diagonal().zero_()
    plan = sinkhorn_normalize(logits)
    torch.testing.assert_close(plan, textbook(logits, 3000), rtol=0, atol=1e-8)
    assert (plan[logits == -INF] == 0).all()


BROKEN = {
    "NaN": lambda x: x.index_put_((torch.tensor(1), torch.tensor(0)), torch.tensor(NAN).to(x)),
    "+inf": lambda x: x.index_put_((torch.tensor(1), torch.tensor(0)), torch.tensor(INF).to(x)),
    "a row of -inf": lambda x: x[1].fill_(-INF),
    "a column of -inf": lambda x: x[:, 0].fill_(-INF),
    "all -inf": lambda x: x.fill_(-INF),
}


# what only the small certified solver knows
SMALL_ONLY = {"two rows for one column": lambda x: x[:2, 1:].fill_(-INF)}


@pytest.mark.parametrize(
    ("n", "iterations", "name"),
    [(n, k, name) for n, k in ((2, None), (4, None), (9, None), (4, 5)) for name in BROKEN]
    + [(n, None, name) for n in (2, 4) for name in SMALL_ONLY],
)
def test_a_bad_matrix_is_nan_and_only_that_one(name, n, iterations):
    spoil = (BROKEN | SMALL_ONLY)[name]
    logits = draw(6, n, n, std=2.0, dtype=torch.float32)
    clean = sinkhorn_normalize(logits, iterations=iterations)
    spoil(logits[2])
    spoil(logits[5])
    plan = sinkhorn_normalize(logits, iterations=iterations, on_fail="ignore")
    assert plan[[2, 5]].isnan().all()
    assert torch.equal(plan[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_larger_matrix_without_an_assignment_is_reported():
    logits = torch.zeros(2, 10, 10)
    logits[1, :2, 1:] = -INF
    with pytest.warns(
        RuntimeWarning, match=r"^sinkhorn_normalize: 1 of 2 .* matrix \(1,\) has a marginal error"
    ):
        sinkhorn_normalize(logits)


def test_what_on_fail_does():
    logits = torch.zeros(2, 3, 3)
    logits[1, 0, 0] = NAN
    with pytest.warns(
        RuntimeWarning, match=r"1 of 2 matrices are not solved; matrix \(1,\) is NaN"
    ) as caught:
        sinkhorn_normalize(logits)
    assert caught[0].filename == __file__
    with pytest.raises(RuntimeError, match=r"1 of 2 matrices"):
        sinkhorn_normalize(logits, on_fail="raise")
    with pytest.warns(RuntimeWarning, match="the matrix is NaN"):
        sinkhorn_normalize(logits[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn_normalize(logits, on_fail="ignore")
        sinkhorn_normalize(logits, iterations=3)


# ---- laws


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [3, 4, 7, 10])
def test_offsets_of_rows_and_columns_change_nothing(n, dtype):
    logits = (draw(50, n, n, std=3.0) * 8).round() / 8  # so that the offsets add without rounding
    offset = (draw(50, n, 1, seed=1) * 4000).round() + (draw(50, 1, n, seed=2) * 4000).round()
    plan, moved = sinkhorn_normalize(logits.to(dtype)), sinkhorn_normalize((logits + offset).to(dtype))
    torch.testing.assert_close(moved, plan, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("std", [1.0, 20.0])
@pytest.mark.parametrize("n", [2, 4, 6])
def test_matrices_are_bitwise_independent(n, std):
    logits = draw(3000, n, n, std=std, dtype=torch.float32)
    other = draw(3000, n, n, std=60.0, seed=9, dtype=torch.float32)
    keep = torch.arange(3000) % 7 == 3
    mixed = torch.where(keep[:, None, None], logits, other)
    mixed[~keep & (torch.arange(3000) % 5 == 0)] = -INF
    assert torch.equal(sinkhorn_normalize(logits)[keep], sinkhorn_normalize(mixed, on_fail="ignore")[keep])
    weights = draw(3000, n, n, seed=4, dtype=torch.float32)
    gradients = []
    for x in (logits, mixed):
        leaf = x.clone().requires_grad_()
        loss = (weights * sinkhorn_normalize(leaf, on_fail="ignore"))[keep].sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0][keep])
    assert torch.equal(*gradients)


@given(st.integers(1, 6), st.floats(0, 60), st.integers(0, 2**31 - 1), st.sampled_from(list(BAR)))
def test_laws(n, std, seed, dtype):
    logits = draw(3, n, n, std=std, seed=seed, dtype=dtype)
    before = logits.clone()
    plan = sinkhorn_normalize(logits, on_fail="raise")
    assert torch.equal(logits, before)
    near = {"rtol": 0, "atol": 10 * n * BAR[dtype]}
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=generator) for _ in range(2))
    torch.testing.assert_close(
        sinkhorn_normalize(logits[:, rows][:, :, columns]), plan[:, rows][:, :, columns], **near
    )
    torch.testing.assert_close(sinkhorn_normalize(logits.mT), plan.mT, **near)
    torch.testing.assert_close(sinkhorn_normalize(logits[1]), plan[1], **near)
    torch.testing.assert_close(sinkhorn_normalize(plan.log()), plan, **near)
    assert torch.equal(sinkhorn_normalize(logits), plan)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (2, 3, 4, 4), (1, 1, 1), (5, 1, 1)])
def test_shapes_layouts_and_an_input_left_alone(shape):
    logits = draw(*shape, std=3.0, dtype=torch.float32)
    before = logits.clone()
    plan = sinkhorn_normalize(logits)
    assert plan.shape == logits.shape
    assert torch.equal(logits, before)
    turned = logits.mT.contiguous().mT
    assert torch.equal(sinkhorn_normalize(turned), plan)
    batch = draw(4, *shape, dtype=torch.float32).transpose(0, -1)[..., 0:1]
    assert sinkhorn_normalize(batch).shape == batch.shape


@pytest.mark.parametrize("iterations", [None, 3])
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3, 3), (0, 9, 9), (0, 3, 5)])
def test_empty_batch(shape, iterations):
    logits = torch.zeros(shape, requires_grad=True)
    plan = sinkhorn_normalize(logits, iterations=iterations)
    assert plan.shape == shape
    plan.sum().backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [4, 10])
def test_half_precision_is_solved_in_float32(n, dtype):
    logits = draw(6, n, n, std=3.0).to(dtype).requires_grad_()
    plan = sinkhorn_normalize(logits)
    assert plan.dtype == dtype
    assert torch.equal(plan, sinkhorn_normalize(logits.float()).to(dtype))
    plan.sum().backward()
    assert logits.grad.dtype == dtype


def test_autocast_changes_nothing():
    for n in (4, 12):
        logits = draw(5, n, n, std=3.0, dtype=torch.float32)
        expected = sinkhorn_normalize(logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sinkhorn_normalize(logits), expected)


# ---- gradients


@pytest.mark.parametrize("std", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2, 2), (3, 3), (4, 4), (9, 9), (2, 3)])
def test_gradcheck_and_gradgradcheck(shape, std):
    logits = draw(*shape, std=std).requires_grad_()
    assert gradcheck(sinkhorn_normalize, (logits,))
    if shape[-1] < 9:
        assert gradgradcheck(sinkhorn_normalize, (logits,))


def test_gradcheck_of_fixed_sweeps():
    logits = draw(2, 3, 3, std=2.0).requires_grad_()
    assert gradcheck(lambda x: sinkhorn_normalize(x, iterations=4), (logits,))
    assert gradgradcheck(lambda x: sinkhorn_normalize(x, iterations=4), (logits,))


@pytest.mark.parametrize("n", [3, 4, 8])
def test_gradient_is_that_of_a_converged_loop(n):
    logits, weights = draw(10, n, n, std=2.0).requires_grad_(), draw(10, n, n, seed=1)
    ours, theirs = (
        torch.autograd.grad((weights * f(logits)).sum(), logits)[0]
        for f in (sinkhorn_normalize, lambda x: textbook(x, 1500))
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("std", [1.0, 3.0, 6.0, 10.0, 20.0, 40.0, 100.0])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_float32_gradient_is_that_of_float64(n, std):
    """Matrix by matrix, also where the plan is so hard that the gradient is 1e-9."""
    logits, weights = (
        draw(2000, n, n, std=std, dtype=torch.float32),
        draw(2000, n, n, seed=1, dtype=torch.float32),
    )
    gradients = []
    for dtype in BAR:
        leaf = logits.to(dtype).requires_grad_()
        loss = (weights.to(dtype) * sinkhorn_normalize(leaf)).sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0].double().flatten(1))
    double, single = gradients
    size = double.norm(dim=1)
    assert ((single - double).norm(dim=1) <= 1e-4 * size + 1e-13).all()


@pytest.mark.parametrize("n", [3, 9])
def test_torch_func(n):
    logits = draw(3, n, n, std=2.0)

    def loss(x):
        return sinkhorn_normalize(x).square().sum()

    expected = torch.stack([torch.autograd.functional.jacobian(loss, one) for one in logits])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(logits), expected, rtol=0, atol=1e-9)
    nested = torch.func.vmap(torch.func.vmap(sinkhorn_normalize))(logits.expand(2, 3, n, n))
    torch.testing.assert_close(nested[1], sinkhorn_normalize(logits), rtol=0, atol=1e-10)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(logits[0]).reshape(n * n, n * n)
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-8)
    with pytest.raises(RuntimeError):
        torch.func.jvp(loss, (logits[0],), (logits[0],))


@pytest.mark.parametrize(("n", "iterations"), [(3, None), (3, 4)])
def test_compile_fullgraph(n, iterations):
    def function(x):
        return sinkhorn_normalize(x, iterations=iterations).square().sum()

    leaf = draw(2, n, n, std=2.0).requires_grad_()
    loss = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(loss, function(leaf), rtol=0, atol=1e-10)
    ours, expected = (torch.autograd.grad(out, leaf)[0] for out in (loss, function(leaf)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def test_blocks_of_a_batch_change_nothing(monkeypatch):
    logits = draw(100, 4, 4, std=5.0).requires_grad_()
    outcomes = []
    for size in (2**16, 16 * 7):
        monkeypatch.setattr(small, "BLOCK", size)
        monkeypatch.setattr(small, "BACK", size)
        plan = sinkhorn_normalize(logits)
        outcomes.append((plan, torch.autograd.grad(plan.square().sum(), logits)[0]))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


# ---- messages


@pytest.mark.parametrize(
    ("argument", "logits", "options", "error"),
    [
        ("logits", [[1.0]], {}, TypeError),
        ("logits", torch.ones(3, 3, dtype=torch.int64), {}, TypeError),
        ("logits", torch.ones(3, 3, dtype=torch.complex64), {}, TypeError),
        ("logits", torch.ones(3), {}, ValueError),
        ("logits", torch.tensor(1.0), {}, ValueError),
        ("logits", torch.ones(2, 0, 0), {}, ValueError),
        ("logits", torch.ones(0, 3), {}, ValueError),
        ("iterations", torch.ones(3, 3), {"iterations": 0}, ValueError),
        ("iterations", torch.ones(3, 3), {"iterations": -2}, ValueError),
        ("iterations", torch.ones(3, 3), {"iterations": 2.0}, TypeError),
        ("iterations", torch.ones(3, 3), {"iterations": True}, TypeError),
        ("on_fail", torch.ones(3, 3), {"on_fail": "quiet"}, ValueError),
        ("on_fail", torch.ones(3, 3), {"on_fail": None}, ValueError),
    ],
)
def test_bad_arguments(argument, logits, options, error):
    with pytest.raises(error, match=f"^{argument}: expected .+, got ") as caught:
        sinkhorn_normalize(logits, **options)
    assert type(caught.value) is error
