"""match_with_dustbin and log_optimal_transport: the textbook loop, the blocks, masks, gradients, messages."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import couplings as cp
from couplings import Status, log_optimal_transport, match_with_dustbin
from couplings.transport import newton_low, sinkhorn_large

INF, NAN = float("inf"), float("nan")
BAR = {torch.float64: 1e-9, torch.float32: 2e-6}


def textbook(scores, dustbin, sweeps):
    """The appendix's loop in log space: border, log marginals, so many sweeps, the normalisation undone."""
    batch, n, m = scores.shape
    border = torch.zeros(batch, n + 1, m + 1, dtype=scores.dtype) + dustbin
    border[:, :n, :m] = scores
    log_mu = torch.tensor([1.0] * n + [float(m)], dtype=scores.dtype).log() - torch.tensor(float(n + m)).log()
    log_nu = torch.tensor([1.0] * m + [float(n)], dtype=scores.dtype).log() - torch.tensor(float(n + m)).log()
    u, v = torch.zeros(batch, n + 1, dtype=scores.dtype), torch.zeros(batch, m + 1, dtype=scores.dtype)
    for _ in range(sweeps):
        u = log_mu - torch.logsumexp(border + v[:, None, :], 2)
        v = log_nu - torch.logsumexp(border + u[:, :, None], 1)
    return border + u[:, :, None] + v[:, None, :] + torch.tensor(float(n + m)).log()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def flags(*shape, seed=0, part=0.7):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < part


def marginal_error(plan, rows, columns):
    """L1 error of both marginals from the masks alone, in float64."""
    plan, rows, columns = plan.double(), rows.double(), columns.double()
    a = torch.cat([rows, columns.sum(-1, keepdim=True)], -1)
    b = torch.cat([columns, rows.sum(-1, keepdim=True)], -1)
    return (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)


# ---- the published layer


@pytest.mark.parametrize("sweeps", [1, 2, 3, 10, 37, 100])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 7, 5), (1, 1, 9), (4, 40, 31), (1, 120, 128)])
def test_fixed_sweeps_are_the_published_loop(shape, sweeps):
    scores, alpha = 5 * draw(*shape), torch.tensor(1.3, dtype=torch.float64)
    expected = textbook(scores, alpha, sweeps)
    torch.testing.assert_close(log_optimal_transport(scores, alpha, sweeps), expected, rtol=0, atol=1e-6)
    single = log_optimal_transport(scores.float(), alpha.float(), sweeps)
    torch.testing.assert_close(
        single.double(), textbook(scores.float().double(), 1.3, sweeps), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("std", [1.0, 5.0, 20.0, 60.0, 300.0])
def test_fixed_sweeps_of_large_problems(std):
    scores = torch.stack([std * draw(200, 190, seed=seed) for seed in range(2)]).float()
    expected = textbook(scores.double(), std, 100)
    out = log_optimal_transport(scores, std, 100)
    rounding = (expected.float().double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= max(1e-5, 1.5 * float(rounding))
    double = log_optimal_transport(scores.double(), std, 100)
    torch.testing.assert_close(double, expected, rtol=1e-11, atol=1e-9)
    # an item's bits do not depend on its neighbours, whatever precision and kernels those need
    other = torch.stack([scores[0], 100 * scores[1]])
    assert torch.equal(log_optimal_transport(other, std, 100)[0], out[0])


@pytest.mark.parametrize("shape", [(700, 190), (330, 660)])
def test_fixed_sweeps_in_several_blocks_of_rows(shape):
    scores = 5 * draw(1, *shape).float()
    expected = textbook(scores.double(), 5.0, 30)
    assert (log_optimal_transport(scores, 5.0, 30).double() - expected).abs().max() <= 1e-5
    double = log_optimal_transport(scores.double(), 5.0, 30)
    torch.testing.assert_close(double, expected, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("floors", [(-40.0, -60.0), (-30.0, -42.0)], ids=["some", "every sweep"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_fixed_sweeps_leave_their_kernel(dtype, floors, monkeypatch):
    # the true range takes score deviations in the thousands, where a plan's logarithm says little
    monkeypatch.setattr(
        sinkhorn_large, "FLOOR", dict(zip((torch.float32, torch.float64), floors, strict=True))
    )
    for std in (5.0, 20.0):
        scores = (std * draw(1, 200, 190)).to(dtype)
        expected = textbook(scores.double(), std, 60)
        out = log_optimal_transport(scores, std, 60)
        atol = 1e-5 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)


def test_sweeps_count_up_to_the_first_that_a_cut_off_kernel_may_have_changed():
    solver = sinkhorn_large.Large(140, 130, torch.float64)
    q, p = torch.rand(140, dtype=torch.float64) + 0.1, torch.rand(130, dtype=torch.float64) + 0.1
    solver.load(torch.zeros(140, 130, dtype=torch.float64), q, p, torch.ones((), dtype=torch.float64))
    long, short = solver.us.shape[-1], solver.vs.shape[-1]
    for seed in range(20):
        us, vs = (10 ** (2 * draw(32, size, seed=seed + size)) for size in (long, short))
        us[:, 140:], vs[:, 130:] = 0, 0
        solver.v = 1 / vs[0].clamp_min(1e-3)
        before = torch.cat([solver.v[None], vs[:-1]])
        alters = torch.maximum(
            us.amax(-1).clamp_min(1) * (vs[:, :130] / p).amax(-1).clamp_min(1),
            before.amax(-1).clamp_min(1) * (us[:, :140] / q).amax(-1).clamp_min(1),
        )
        for room in (0.5 * alters.min(), 1.01 * alters.median(), 2 * alters.max()):
            solver.room = float(room)
            assert solver.exact(vs, us) == int((alters <= solver.room).long().cumprod(0).sum())
        vs[seed, 3] = torch.nan
        assert solver.exact(vs, us) == seed


def test_fixed_sweeps_of_large_masked_problems():
    scores = (5 * draw(2, 150, 160)).float()
    scores[:, 3, 5:9] = -INF
    rows, columns = flags(2, 150), flags(2, 160, seed=1)
    columns[1] = False
    out = match_with_dustbin(scores, 1.0, row_mask=rows, column_mask=columns, iterations=30).log_plan()
    for i in range(2):
        chosen = scores[i][rows[i]][:, columns[i]].double()
        kept = torch.cat([rows[i], torch.ones(1).bool()]), torch.cat([columns[i], torch.ones(1).bool()])
        got = out[i][kept[0]][:, kept[1]].double()
        if columns[i].any():
            torch.testing.assert_close(got, textbook(chosen[None], 1.0, 30)[0], rtol=0, atol=1e-5)
        else:  # nobody to match with: every row goes to its dustbin, and the corner is empty
            alone = torch.ones_like(got)
            alone[-1] = 0
            torch.testing.assert_close(got.exp(), alone, rtol=0, atol=1e-6)
        assert (out[i][~kept[0]] == -INF).all()
        assert (out[i][:, ~kept[1]] == -INF).all()


@pytest.mark.parametrize("std", [5.0, 60.0])
def test_unrolled_gradient_of_large_fixed_sweeps(std):
    scores = (std * draw(1, 130, 128)).requires_grad_()
    weight = draw(1, 131, 129, seed=1)
    ours = torch.autograd.grad((log_optimal_transport(scores, std, 40).exp() * weight).sum(), scores)
    theirs = torch.autograd.grad((textbook(scores, std, 40).exp() * weight).sum(), scores)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_half_precision_is_solved_in_float32():
    scores = (5 * draw(2, 6, 9)).bfloat16()
    out = log_optimal_transport(scores, torch.tensor(1.0), 20)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, textbook(scores.double(), 1.0, 20).bfloat16(), rtol=0, atol=0.0)


def test_unrolled_gradient_of_the_fixed_sweeps():
    scores = draw(2, 4, 6).requires_grad_()
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weight = draw(2, 5, 7, seed=1)
    ours = torch.autograd.grad((log_optimal_transport(scores, alpha, 3) * weight).sum(), (scores, alpha))
    theirs = torch.autograd.grad((textbook(scores, alpha, 3) * weight).sum(), (scores, alpha))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_no_denormal_slows_a_nearly_hard_problem(monkeypatch):
    smallest = []
    measure = newton_low._Low.measure

    def looked_at(self):
        measure(self)
        smallest.append(float(self.pi.amin()))

    monkeypatch.setattr(newton_low._Low, "measure", looked_at)
    scores = draw(150, 8, seed=3) @ draw(8, 150, seed=4)
    coupling = match_with_dustbin((scores * (40 / scores.std())).float(), 40.0, tolerance=2e-6)
    assert coupling.status == Status.CONVERGED
    assert len(smallest) > 3
    assert min(smallest) >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_certified_is_where_the_loop_goes(dtype):
    scores = (2 * draw(3, 12, 9)).to(dtype)
    expected = textbook(scores.double(), 1.0, 3000)
    out = log_optimal_transport(scores, torch.tensor(1.0, dtype=dtype), None)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-8 if dtype == torch.float64 else 1e-5)


# ---- the certificate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [1.0, 5.0, 20.0, 40.0])
@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("shape", [(8, 8), (9, 30), (128, 100)])
def test_certified_at_every_scale(shape, offset, std, dtype):
    n, m = shape
    scores = (std * draw(n, m) + offset).to(dtype)
    coupling = match_with_dustbin(scores, 1.0, on_fail="raise")
    bar = BAR[dtype] * (n + m)
    plan = coupling.plan().double()
    measured = marginal_error(plan, torch.ones(n), torch.ones(m))
    assert coupling.residual <= bar
    assert measured <= bar
    torch.testing.assert_close(coupling.residual, measured, rtol=0, atol=3e-7 * (n + m))
    matched = plan[:-1, :-1].sum()
    blocks = torch.stack([matched, plan[:-1, -1].sum(), plan[-1, :-1].sum(), plan[-1, -1]])
    expected = torch.stack([matched, n - matched, m - matched, matched])
    torch.testing.assert_close(blocks, expected, rtol=0, atol=1e-6 * (n + m))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("shape", [(512, 500), (2048, 1700)])
def test_certified_at_the_sizes_of_images(shape, std, dtype):
    for offset in (-100.0, 0.0, 100.0):
        coupling = match_with_dustbin((std * draw(*shape) + offset).to(dtype), 1.0, on_fail="raise")
        assert marginal_error(coupling.plan(), *map(torch.ones, shape)) <= BAR[dtype] * sum(shape)


# ---- masks


@pytest.mark.parametrize("method", ["transport", "dual_softmax"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("pair", [False, True])
def test_masked_is_unpadded(pair, dtype, atol, method):
    scores = (5 * draw(3, 12, 17)).to(dtype)
    rows, columns = flags(3, 12), flags(3, 17, seed=1)
    bins = (
        (draw(3, 12, seed=2).to(dtype), draw(3, 17, seed=3).to(dtype))
        if pair
        else torch.tensor(1.0, dtype=dtype)
    )
    scores = scores.masked_fill(~rows[..., None], NAN).masked_fill(~columns[..., None, :], INF)
    coupling = match_with_dustbin(scores, bins, row_mask=rows, column_mask=columns, method=method)
    assert (coupling.status == Status.CONVERGED).all()
    for i in range(3):
        row, column = rows[i], columns[i]
        dustbin = (bins[0][i][row], bins[1][i][column]) if pair else bins
        alone = match_with_dustbin(scores[i][row][:, column], dustbin, method=method).plan()
        row, column = torch.cat([row, torch.ones(1) > 0]), torch.cat([column, torch.ones(1) > 0])
        plan = coupling.plan()[i]
        torch.testing.assert_close(plan[row][:, column], alone, rtol=0, atol=atol)
        assert (plan[~row] == 0).all()
        assert (plan[:, ~column] == 0).all()
        assert (coupling.log_plan()[i][~row] == -INF).all()


@pytest.mark.parametrize("method", ["transport", "dual_softmax"])
def test_no_valid_row_and_nothing_valid(method):
    scores = draw(3, 4, 5).requires_grad_()
    bin_score = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[False] * 4, [False] * 4, [True] * 4])
    columns = torch.tensor([[True] * 5, [False] * 5, [False] * 5])
    coupling = match_with_dustbin(scores, bin_score, row_mask=rows, column_mask=columns, method=method)
    plan = coupling.plan()
    torch.testing.assert_close(plan[0, -1, :-1], torch.ones(5, dtype=torch.float64))
    assert plan[0, -1, -1] == 0
    assert (plan[1] == 0).all()
    torch.testing.assert_close(plan[2, :-1, -1], torch.ones(4, dtype=torch.float64))
    log_plan = coupling.log_plan()
    assert (cp.mutual_matches(log_plan, 0.0).indices == -1).all()
    loss = cp.losses.matching_loss(log_plan, torch.full((3, 4), -1), row_mask=rows, column_mask=columns)
    gradients = torch.autograd.grad(loss, (scores, bin_score))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 3, 4)])
@pytest.mark.parametrize("method", ["transport", "dual_softmax"])
def test_empty_sides(shape, method):
    scores = torch.zeros(shape)
    coupling = match_with_dustbin(scores, 1.0, method=method)
    plan = coupling.plan()
    batch, n, m = shape
    assert plan.shape == (batch, n + 1, m + 1)
    total = torch.full((batch,), float(n + m))
    torch.testing.assert_close(plan.sum((-1, -2)), total)
    assert cp.mutual_matches(coupling.log_plan()).indices.shape == (batch, n)


def test_nan_stays_in_its_problem():
    scores = draw(3, 6, 5)
    clean = match_with_dustbin(scores, 1.0).plan()
    scores[1, 2, 2] = NAN
    for method in ("transport", "dual_softmax"):
        coupling = match_with_dustbin(scores, 1.0, on_fail="ignore", method=method)
        assert coupling.plan()[1].isnan().any()
        assert coupling.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
        assert not coupling.plan()[[0, 2]].isnan().any()
    torch.testing.assert_close(
        match_with_dustbin(scores, 1.0, on_fail="ignore").plan()[[0, 2]], clean[[0, 2]], rtol=0, atol=0
    )


def test_forbidden_pairs():
    scores = draw(4, 4)
    scores[0, 1] = -INF
    plan = match_with_dustbin(scores, 0.0, on_fail="raise").plan()
    assert plan[0, 1] == 0
    assert marginal_error(plan, torch.ones(4), torch.ones(4)) <= 1e-9


# ---- dustbins


def test_one_score_is_a_pair_of_halves():
    scores = draw(2, 6, 9)
    pair = (torch.full((6,), 0.15, dtype=torch.float64), 0.15)
    one = match_with_dustbin(scores, 0.3).plan()
    torch.testing.assert_close(match_with_dustbin(scores, pair).plan(), one, rtol=0, atol=1e-10)
    per_item = torch.full((2,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(match_with_dustbin(scores, per_item).plan(), one, rtol=0, atol=1e-12)


def test_a_pair_is_the_sum_of_what_stays_unmatched():
    """At a small epsilon the plan is the best of all partial matchings, by brute force."""
    scores, rows, columns = draw(3, 3), draw(3, seed=1), draw(3, seed=2)
    plan = match_with_dustbin(scores, (rows, columns), epsilon=0.01).plan()
    best, value = None, -INF
    for choice in itertools.product(range(4), repeat=3):  # the column of each row, 3 = none
        taken = [j for j in choice if j < 3]
        if len(set(taken)) < len(taken):
            continue
        total = sum(scores[i, j] if j < 3 else rows[i] for i, j in enumerate(choice))
        total = total + sum(columns[j] for j in range(3) if j not in taken)
        if total > value:
            best, value = choice, total
    assert plan[:-1].argmax(-1).tolist() == list(best)


def test_one_rows_dustbin_says_nothing_about_the_others():
    scores = draw(6, 6) - 4
    matched = []
    for high in (20.0, 100.0, 1e4):
        rows = torch.tensor([high, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        matched.append(match_with_dustbin(scores, (rows, 0.0)).plan()[1:-1, :-1].sum())
    torch.testing.assert_close(matched[0], matched[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(matched[1], matched[2], rtol=1e-6, atol=0)
    masked = torch.tensor([False] + [True] * 5)
    alone = match_with_dustbin(scores, (0.0, 0.0), row_mask=masked).plan()[1:-1, :-1].sum()
    torch.testing.assert_close(matched[2], alone, rtol=1e-6, atol=0)


def test_a_row_that_must_be_matched():
    rows = torch.tensor([-INF, 0.0, 0.0], dtype=torch.float64)
    plan = match_with_dustbin(torch.zeros(3, 3, dtype=torch.float64), (rows, 0.0), on_fail="raise").plan()
    assert plan[0, -1] == 0
    assert marginal_error(plan, torch.ones(3), torch.ones(3)) <= 1e-9


@given(n=st.integers(1, 6), m=st.integers(1, 6), shift=st.floats(-50, 50))
def test_shift_and_permutation(n, m, shift):
    scores = 3 * torch.randn(n, m, dtype=torch.float64)
    before = match_with_dustbin(scores, 0.5).plan()
    moved = match_with_dustbin(scores + shift, 0.5 + shift).plan()
    torch.testing.assert_close(moved, before, rtol=0, atol=1e-9)
    order, turn = torch.randperm(n), torch.randperm(m)
    out = match_with_dustbin(scores[order][:, turn], 0.5).plan()
    expected = before[torch.cat([order, torch.tensor([n])])][:, torch.cat([turn, torch.tensor([m])])]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


def test_other_problems_do_not_change_a_bit():
    scores = 5 * draw(4, 20, 30)
    one = match_with_dustbin(scores, 1.0).plan()
    scores[1:] = 30 * draw(3, 20, 30, seed=5)
    torch.testing.assert_close(match_with_dustbin(scores, 1.0).plan()[0], one[0], rtol=0, atol=0)


def test_dual_softmax_is_lightglue_and_loftr():
    scores, rows, columns = draw(2, 5, 7), draw(2, 5, seed=1), draw(2, 7, seed=2)
    plan = match_with_dustbin(scores, (rows, columns), method="dual_softmax").plan()
    both = scores.softmax(-1) * scores.softmax(-2)
    matchable = (-rows).sigmoid()[..., None] * (-columns).sigmoid()[..., None, :]
    torch.testing.assert_close(plan[:, :-1, :-1], both * matchable)
    torch.testing.assert_close(plan[:, :-1, -1], rows.sigmoid())
    torch.testing.assert_close(plan[:, -1, :-1], columns.sigmoid())
    bare = match_with_dustbin(scores, -INF, method="dual_softmax", epsilon=0.1).plan()
    torch.testing.assert_close(bare[:, :-1, :-1], (scores / 0.1).softmax(-1) * (scores / 0.1).softmax(-2))
    assert (bare[:, -1] == 0).all()


def test_dual_softmax_solves_no_dual():
    coupling = match_with_dustbin(draw(3, 3), 0.0, method="dual_softmax")
    assert coupling.check() is coupling
    again = pickle.loads(pickle.dumps(coupling))
    torch.testing.assert_close(again.plan(), coupling.plan(), rtol=0, atol=0)
    bad = draw(2, 3, 3)
    bad[0, 0, 0] = NAN
    with pytest.raises(RuntimeError, match="NONFINITE"):
        match_with_dustbin(bad, 0.0, method="dual_softmax", on_fail="raise")
    plan = match_with_dustbin(bad, 0.0, method="dual_softmax", on_fail="ignore").plan()
    assert plan[0].isnan().all()
    assert plan[1].isfinite().all()
    with pytest.raises(AttributeError, match="dual softmax"):
        _ = coupling.potentials


# ---- gradients


@pytest.mark.parametrize("method", ["transport", "dual_softmax"])
@pytest.mark.parametrize("epsilon", [1.0, 0.1])
def test_gradients_of_scores_dustbins_and_epsilon(epsilon, method):
    scores = (0.3 * draw(2, 3, 4)).requires_grad_()
    bins = (
        (0.3 * draw(2, 3, seed=1)).requires_grad_(),
        (0.3 * draw(4, seed=2)).requires_grad_(),
    )
    eps = torch.tensor(epsilon, dtype=torch.float64, requires_grad=True)

    def plan(scores, rows, columns, eps):
        return match_with_dustbin(scores, (rows, columns), epsilon=eps, method=method).plan()

    assert torch.autograd.gradcheck(plan, (scores, *bins, eps), atol=1e-6)
    assert torch.autograd.gradgradcheck(plan, (scores, *bins, eps), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"iterations": 4}, {"method": "dual_softmax"}], ids=str)
def test_epsilon_has_a_gradient_where_pairs_are_forbidden(options):
    scores = draw(3, 4)
    scores[0, 1] = scores[2, 3] = -INF
    epsilon = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def plan(epsilon):
        return match_with_dustbin(scores, 0.3, epsilon=epsilon, on_fail="ignore", **options).plan()

    assert torch.autograd.gradcheck(plan, epsilon, atol=1e-6)
    assert torch.autograd.gradgradcheck(plan, epsilon, atol=1e-5)


def test_loftr_learns_its_temperature():
    scores = draw(3, 4)
    epsilon = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    plan = match_with_dustbin(scores, -INF, epsilon=epsilon, method="dual_softmax").plan()[:-1, :-1]
    expected = (scores / epsilon).softmax(-1) * (scores / epsilon).softmax(-2)
    (ours,) = torch.autograd.grad(plan.square().sum(), epsilon)
    (theirs,) = torch.autograd.grad(expected.square().sum(), epsilon)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["transport", "dual_softmax"])
def test_gradients_under_masks(method):
    scores, rows, columns = draw(2, 4, 5).requires_grad_(), flags(2, 4), flags(2, 5, seed=3)

    def loss(scores, bins):
        plan = match_with_dustbin(scores, bins, row_mask=rows, column_mask=columns, method=method).log_plan()
        return cp.losses.matching_loss(plan, torch.full((2, 4), -1), row_mask=rows, column_mask=columns)

    bins = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (scores, bins), atol=1e-6)
    (gradient,) = torch.autograd.grad(loss(scores, bins), scores)
    assert (gradient[~rows] == 0).all()
    assert (gradient.mT[~columns] == 0).all()


def test_certified_gradient_is_the_long_loops():
    scores = (2 * draw(1, 6, 5)).requires_grad_()
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weight = draw(1, 7, 6, seed=1)
    ours = torch.autograd.grad(
        (log_optimal_transport(scores, alpha, None).exp() * weight).sum(), (scores, alpha)
    )
    theirs = torch.autograd.grad((textbook(scores, alpha, 1500).exp() * weight).sum(), (scores, alpha))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_vmap_grad_and_compile():
    scores = draw(3, 4, 5)

    def loss(scores):
        return match_with_dustbin(scores, 0.5, on_fail="ignore").plan().square().sum()

    expected = torch.stack([torch.func.grad(loss)(s) for s in scores])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(scores), expected)
    torch.testing.assert_close(torch.func.jacrev(loss)(scores[0]), expected[0])

    def layer(scores):
        return log_optimal_transport(scores, 0.5, None)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores), layer(scores))


def test_autocast_does_not_lower_the_precision():
    scores = draw(2, 20, 30, dtype=torch.float32)
    expected = match_with_dustbin(scores, 1.0).plan()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(match_with_dustbin(scores, 1.0).plan(), expected, rtol=0, atol=0)


# ---- modules


def test_modules_learn_their_dustbin_and_survive_pickling():
    layer, loss = cp.nn.DustbinMatching(2.0), cp.nn.MatchingLoss()
    scores = draw(2, 4, 5, dtype=torch.float32)
    rows = flags(2, 4)
    out = loss(layer(scores, row_mask=rows), torch.full((2, 4), -1), row_mask=rows)
    out.backward()
    assert layer.dustbin.grad < 0  # nothing matches: a higher bin lowers the loss
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    torch.testing.assert_close(again(scores), layer(scores), rtol=0, atol=0)
    again.load_state_dict(layer.state_dict())
    assert "method='transport'" in repr(layer)


# ---- reading a plan


def test_mutual_matches_by_brute_force():
    log_plan = draw(4, 7, 9)
    log_plan -= log_plan.amax((-2, -1), keepdim=True)
    indices, confidence = cp.mutual_matches(log_plan, 0.3)
    for b in range(4):
        inner = log_plan[b, :-1, :-1]
        for i in range(6):
            j = int(inner[i].argmax())
            good = int(inner[:, j].argmax()) == i and inner[i, j].exp() > 0.3
            assert indices[b, i] == (j if good else -1)
            assert confidence[b, i] == (inner[i, j].exp() if good else 0)


def test_mutual_matches_of_nan_ties_and_masks():
    plan = torch.tensor([[[-0.5, -0.5, -3.0], [-0.5, -0.5, -3.0], [-3.0, -3.0, -3.0]]])
    assert cp.mutual_matches(plan).indices.tolist() == [[0, -1]]  # first of equals
    assert cp.mutual_matches(plan * NAN).indices.tolist() == [[-1, -1]]
    assert cp.mutual_matches(torch.full((1, 3, 3), -INF), 0.0).indices.tolist() == [[-1, -1]]


# ---- bad input

SCORES = torch.zeros(2, 3, 4)
BAD = {
    "a plan": (
        lambda: cp.mutual_matches(match_with_dustbin(SCORES, -9.0).plan() + 1),
        ValueError,
        r"log_plan\(\)",
    ),
    "a coupling": (lambda: cp.mutual_matches(match_with_dustbin(SCORES, 1.0)), TypeError, r"log_plan\(\)"),
    "a list": (lambda: match_with_dustbin([[1.0]], 1.0), TypeError, "scores: expected a floating-point"),
    "integers": (lambda: match_with_dustbin(torch.ones(2, 2, dtype=torch.int64), 1.0), TypeError, "scores"),
    "complex": (lambda: match_with_dustbin(SCORES + 1j, 1.0), TypeError, "scores"),
    "one dimension": (lambda: match_with_dustbin(torch.ones(3), 1.0), ValueError, "N, M"),
    "dustbin type": (lambda: match_with_dustbin(SCORES, "1"), TypeError, "dustbin"),
    "dustbin bool": (lambda: match_with_dustbin(SCORES, True), TypeError, "dustbin"),
    "dustbin shape": (lambda: match_with_dustbin(SCORES, torch.zeros(3)), ValueError, "dustbin"),
    "dustbin triple": (lambda: match_with_dustbin(SCORES, (torch.zeros(3),) * 3), ValueError, "a pair"),
    "dustbin rows": (
        lambda: match_with_dustbin(SCORES, (torch.zeros(4), torch.zeros(4))),
        ValueError,
        r"dustbin\[0\]",
    ),
    "mask dtype": (
        lambda: match_with_dustbin(SCORES, 1.0, row_mask=torch.ones(2, 3)),
        TypeError,
        "row_mask: expected a bool",
    ),
    "mask shape": (
        lambda: match_with_dustbin(SCORES, 1.0, column_mask=torch.ones(2, 3) > 0),
        ValueError,
        "column_mask",
    ),
    "mask device": (
        lambda: match_with_dustbin(SCORES, 1.0, row_mask=torch.ones(2, 3, device="meta") > 0),
        ValueError,
        "row_mask",
    ),
    "method": (lambda: match_with_dustbin(SCORES, 1.0, method="sinkhorn"), ValueError, "dual_softmax"),
    "epsilon": (lambda: match_with_dustbin(SCORES, 1.0, epsilon=0.0), ValueError, "epsilon"),
    "epsilon dual": (
        lambda: match_with_dustbin(SCORES, 1.0, epsilon=-1.0, method="dual_softmax"),
        ValueError,
        "epsilon",
    ),
    "iterations": (lambda: match_with_dustbin(SCORES, 1.0, iterations=0), ValueError, "iterations"),
    "iterations dual": (
        lambda: match_with_dustbin(SCORES, 1.0, iterations=3, method="dual_softmax"),
        ValueError,
        "closed form",
    ),
    "on_fail": (lambda: match_with_dustbin(SCORES, 1.0, on_fail="ignored"), ValueError, "on_fail"),
    "alpha pair": (lambda: log_optimal_transport(SCORES, [1.0], 3), TypeError, "alpha"),
    "iters": (lambda: log_optimal_transport(SCORES, 1.0, 0), ValueError, "iters"),
    "epsilon tensor dual": (
        lambda: match_with_dustbin(SCORES, 1.0, epsilon=torch.tensor(-1.0), method="dual_softmax"),
        ValueError,
        "epsilon",
    ),
    "threshold": (lambda: cp.mutual_matches(SCORES, -1.0), ValueError, "threshold"),
    "threshold type": (lambda: cp.mutual_matches(SCORES, "a"), TypeError, "threshold"),
    "log plan": (lambda: cp.mutual_matches(torch.zeros(0, 3)), ValueError, "log_plan"),
    "log plan type": (lambda: cp.mutual_matches(3.0), TypeError, "log_plan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
