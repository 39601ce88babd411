"""solve: the certificate, the oracles, the laws, bad input."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from couplings.testing.dense import (
    dustbin_problem,
    gaussian_problem,
    linear_program,
    marginal_error,
    plane_problem,
    sinkhorn_oracle,
    uneven_masses,
)
from couplings.transport import Coupling, Status, solve

INF, NAN = float("inf"), float("nan")
BAR = {torch.float64: 1e-9, torch.float32: 2e-6}
SOLVERS = ["auto", "newton", "newton_cg"]


# ---- the certificate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [1.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("make", [gaussian_problem, dustbin_problem])
@pytest.mark.parametrize("size", [64, 300])
def test_residual_at_every_score_scale(size, make, std, dtype):
    cost, a, b = (t.to(dtype) for t in make(size, size - 20, std))
    coupling = solve(cost, a, b, epsilon=1.0)
    assert coupling.status == Status.CONVERGED
    assert coupling.residual <= BAR[dtype]
    assert marginal_error(coupling.plan(), a, b) <= BAR[dtype]
    torch.testing.assert_close(
        coupling.residual, marginal_error(coupling.plan(), coupling.a, coupling.b), rtol=0, atol=3e-7
    )
    assert abs(coupling.gap) <= 1e-6 * std


@pytest.mark.parametrize("make", [gaussian_problem, dustbin_problem])
def test_large_problem_where_sinkhorn_is_not_there(make):
    cost, a, b = make(1024, 1024, 100.0)
    # the absorbed sweeps are the textbook's (test_fixed_sweeps_are_the_textbook_loop) and faster
    sweeps = solve(cost, a, b, epsilon=1.0, solver="sinkhorn", iterations=300, on_fail="ignore")
    assert sweeps.residual > 1e-4
    assert sweeps.status == Status.MAX_ITERATIONS
    coupling = solve(cost, a, b, epsilon=1.0)
    assert coupling.residual <= 1e-9


@pytest.mark.parametrize("offset", [-100.0, 100.0])
@pytest.mark.parametrize("std", [1.0, 40.0])
@pytest.mark.parametrize(("n", "m"), [(8, 8), (130, 129), (60, 400), (257, 200)])
def test_offsets_and_uneven_masses(n, m, std, offset):
    # 130 x 129 and more begin in float32; logits of 100 leave 4e-6 of a float32 unless differences come first
    cost, a, b = dustbin_problem(n, m, std)
    cost = cost - offset
    cost[0] += 3 * offset
    a[1], a[2] = a[1] + 0.99 * a[2], 0.01 * a[2]
    for tolerance in (None, 2e-6):
        coupling = solve(
            cost.float(), a.float(), b.float(), epsilon=1.0, tolerance=tolerance, on_fail="raise"
        )
        assert (
            marginal_error(coupling.plan(), a.float(), b.float() * a.float().sum() / b.float().sum()) <= 2e-6
        )
    exact = solve(cost, a, b, epsilon=1.0, on_fail="raise")
    assert marginal_error(exact.plan(), a, b) <= 1e-9
    assert (coupling.plan() - exact.plan()).abs().sum() <= 1e-4


def test_the_first_plan_is_the_one_that_was_measured_and_later_ones_have_its_bits():
    for shape in ((2, 6, 5), (200, 150)):
        cost = torch.randn(shape, requires_grad=True)
        for options in ({}, {"solver": "sinkhorn", "iterations": 50}):
            coupling = solve(cost, epsilon=0.3, on_fail="ignore", **options)
            first, second = coupling.plan(), coupling.plan()
            assert first is not second
            assert torch.equal(first, second)
            with torch.no_grad():
                detached = solve(cost, epsilon=0.3, on_fail="ignore", **options)
                assert not detached.plan().requires_grad
                assert torch.equal(detached.plan(), first)
            grads = [
                torch.autograd.grad(plan.square().sum(), cost, retain_graph=True) for plan in (first, second)
            ]
            assert torch.equal(*(gradient for (gradient,) in grads))
            torch.testing.assert_close(coupling.log_plan().exp(), first, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("epsilon", [1e3, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_residual_at_every_epsilon(epsilon, dtype):
    cost, a, b = (t.to(dtype) for t in plane_problem(40, 50))
    for solver in SOLVERS:
        coupling = solve(cost, a, b, epsilon=epsilon, solver=solver, on_fail="raise")
        assert marginal_error(coupling.plan(), a, b) <= BAR[dtype]


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2), (3, 11), (11, 3)])
@pytest.mark.parametrize("solver", [*SOLVERS, "sinkhorn"])
def test_small_and_oblong(shape, solver):
    cost, a, b = plane_problem(*shape)
    coupling = solve(cost, a, b, epsilon=0.2, solver=solver)
    expected, f, g = sinkhorn_oracle(cost, a, b, 0.2, 500)
    torch.testing.assert_close(coupling.plan(), expected, rtol=1e-8, atol=1e-12)
    shift = (b * g).sum()
    torch.testing.assert_close(coupling.potentials.f, f + shift, rtol=0, atol=1e-9)
    torch.testing.assert_close(coupling.potentials.g, g - shift, rtol=0, atol=1e-9)
    value = (expected * (cost + 0.2 * (expected.log() - 1))).sum()
    torch.testing.assert_close(coupling.value, value)
    torch.testing.assert_close(coupling.log_plan(), expected.log(), rtol=1e-8, atol=1e-8)


def test_small_epsilon_is_the_linear_program():
    cost, a, b = plane_problem(25, 18)
    plan, value = linear_program(cost, a, b)
    coupling = solve(cost, a, b, epsilon=1e-5)
    torch.testing.assert_close(coupling.plan(), plan, rtol=0, atol=1e-6)
    # entropy is at most log(nm)
    assert 0 <= (coupling.plan() * cost).sum() - value + 1e-9 <= 1e-5 * 7


def test_total_mass_is_free():
    cost, a, b = plane_problem(9, 7)
    one, many = solve(cost, a, b, epsilon=0.1), solve(cost, 50 * a, 50 * b, epsilon=0.1)
    torch.testing.assert_close(many.plan(), 50 * one.plan())
    plan = many.plan()
    torch.testing.assert_close(many.value, (plan * (cost + 0.1 * (plan.log() - 1))).sum())
    torch.testing.assert_close(many.residual, marginal_error(plan, 50 * a, 50 * b))
    f, g = many.potentials
    torch.testing.assert_close(((f[:, None] + g - cost) / 0.1).exp(), plan)


def test_apply_and_transpose_apply():
    cost = torch.rand(2, 4, 3, dtype=torch.float64)
    coupling = solve(cost, epsilon=0.1)
    plan, v, u = coupling.plan(), torch.rand(2, 3), torch.rand(2, 4, 5).double()
    torch.testing.assert_close(coupling.apply(v), (plan @ v[..., None].double())[..., 0])
    torch.testing.assert_close(coupling.transpose_apply(u), plan.mT @ u)
    with pytest.raises(ValueError, match="v: expected"):
        coupling.apply(torch.rand(2, 4))


def test_gap_bounds_the_error_of_an_unfinished_solve():
    cost, a, b = plane_problem(20, 30)
    exact = solve(cost, a, b, epsilon=1e-2)
    rough = solve(cost, a, b, epsilon=1e-2, solver="sinkhorn", iterations=10, on_fail="ignore")
    assert rough.gap >= (rough.value - exact.value).abs() - 1e-3 * rough.gap
    assert rough.gap > 1e-6 > abs(exact.gap)


def test_status_is_truthful_when_the_tolerance_is_out_of_reach():
    cost, a, b = gaussian_problem(20, 20, 5.0)
    coupling = solve(cost, a, b, epsilon=1.0, tolerance=1e-18, on_fail="ignore")
    assert coupling.residual <= 1e-13
    assert coupling.status in (Status.STALLED, Status.CONVERGED)


# ---- fixed sweeps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("std", [1.0, 20.0, 300.0])
@pytest.mark.parametrize("sweeps", [1, 2, 9, 60])
def test_fixed_sweeps_are_the_textbook_loop(sweeps, std, dtype):
    cost, a, b = dustbin_problem(30, 40, std)
    expected, *_ = sinkhorn_oracle(cost, a, b, 1.0, sweeps)
    coupling = solve(
        cost.to(dtype),
        a.to(dtype),
        b.to(dtype),
        epsilon=1.0,
        solver="sinkhorn",
        iterations=sweeps,
        on_fail="ignore",
    )
    rtol = (
        1e-9 if dtype == torch.float64 else 1e-5 * max(1.0, std)
    )  # float32 costs carry 6e-8 * std themselves
    torch.testing.assert_close(coupling.plan().double(), expected, rtol=rtol, atol=1e-10)
    assert coupling.iterations == sweeps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fixed_sweeps_of_a_batch_with_offsets(dtype):
    # large items are swept one by one; row 0 of the last lies 300 below the others and underflows at first
    parts = [dustbin_problem(150, 140, std, seed=i) for i, std in enumerate((1.0, 10.0, 3.0))]
    cost, a, b = (torch.stack(t) for t in zip(*parts, strict=True))
    cost[2, 0] += 300.0
    cost, a, b = cost.float(), a.float(), b.float()  # the same numbers in both precisions
    expected, *_ = sinkhorn_oracle(cost.double(), a.double(), b.double(), 1.0, 40)
    arguments = {"epsilon": 1.0, "solver": "sinkhorn", "iterations": 40, "on_fail": "ignore"}
    plan = solve(cost.to(dtype), a.to(dtype), b.to(dtype), **arguments).plan()
    assert (plan.double() - expected).abs().sum((-1, -2)).max() <= (2e-6 if dtype == torch.float32 else 1e-6)
    for i in range(3):
        alone = solve(cost[i].to(dtype), a[i].to(dtype), b[i].to(dtype), **arguments).plan()
        torch.testing.assert_close(alone, plan[i], rtol=3e-5 if dtype == torch.float32 else 1e-11, atol=1e-30)


@pytest.mark.parametrize("least", [1e-37, 1e-42, 1e-45])
@pytest.mark.parametrize("side", [0, 1])
def test_fixed_sweeps_of_masses_at_the_end_of_float32(side, least):
    cost, *masses = dustbin_problem(150, 140, 1.0)
    masses[side][3] = least
    cost, a, b = (t.float() for t in (cost, *(mass / mass.sum() for mass in masses)))
    expected = sinkhorn_oracle(cost.double(), a.double(), b.double(), 1.0, 20)[0].log()
    cost.requires_grad_()
    options = {"epsilon": 1.0, "solver": "sinkhorn", "iterations": 20, "on_fail": "ignore"}
    found = solve(cost, a, b, **options).log_plan()
    assert (found - expected).abs().max() <= 3e-5
    assert torch.autograd.grad(found.sum(), cost)[0].isfinite().all()


@pytest.mark.parametrize("size", [20, 150, 400])
def test_fixed_sweeps_do_not_ask_for_the_defaults_of_torch(size):
    cost, a, b = (t.float() for t in dustbin_problem(size, size, 1.0))
    arguments = {"epsilon": 1.0, "solver": "sinkhorn", "iterations": 40, "on_fail": "ignore"}
    expected = solve(cost, a, b, **arguments).plan()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # any but the costs' own
            found = solve(cost, a, b, **arguments).plan()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sweeps", [1, 5, 30])
def test_fixed_sweeps_have_the_unrolled_gradient(sweeps):
    cost, a, b = plane_problem(6, 8)
    epsilon = torch.tensor(0.02, dtype=torch.float64)
    weights = torch.randn(6, 8, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (cost, a, b, epsilon)]
    coupling = solve(*inputs[:3], epsilon=inputs[3], solver="sinkhorn", iterations=sweeps, on_fail="ignore")
    ours = torch.autograd.grad((weights * coupling.plan()).sum(), inputs)
    cost, a, b, epsilon = (t.clone().requires_grad_() for t in (cost, a, b, epsilon))
    plan, *_ = sinkhorn_oracle(cost, a, b * a.sum() / b.sum(), epsilon, sweeps)
    expected = torch.autograd.grad((weights * plan).sum(), (cost, a, b, epsilon))
    # the oracle runs at the mass of a, ours at mass 1: the same plan, and along a the scale counts alike
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


# ---- zeros, infinities, masks, NaN


@pytest.mark.parametrize("options", [{}, {"solver": "newton_cg"}, {"solver": "sinkhorn", "iterations": 400}])
def test_zero_masses_drop_out(options):
    cost = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    a = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.0, 0.3, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    coupling = solve(cost, a, b, epsilon=0.1, **options)
    kept = solve(cost[a > 0][:, b > 0], a[a > 0], b[b > 0], epsilon=0.1, **options)
    plan = coupling.plan()
    assert (plan[a == 0] == 0).all()
    assert (plan[:, b == 0] == 0).all()
    torch.testing.assert_close(plan[a > 0][:, b > 0], kept.plan(), rtol=1e-9, atol=1e-14)
    assert (coupling.log_plan()[a == 0] == -INF).all()
    loss = plan.square().sum() + coupling.value + (plan @ torch.ones(4, dtype=torch.float64)).sum()
    for gradient in torch.autograd.grad(loss, (cost, a, b)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"solver": "newton_cg"}, {"solver": "sinkhorn"}])
def test_infinite_cost_forbids(options):
    torch.manual_seed(3)
    cost = torch.rand(6, 7, dtype=torch.float64)
    forbidden = torch.rand(6, 7) < 0.3
    epsilon = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    infinite = cost.masked_fill(forbidden, INF).requires_grad_()
    coupling = solve(infinite, epsilon=epsilon, **options)
    huge = solve(cost.masked_fill(forbidden, 40.0), epsilon=0.1)
    assert coupling.status == Status.CONVERGED
    assert (coupling.plan()[forbidden] == 0).all()
    torch.testing.assert_close(coupling.plan(), huge.plan(), rtol=1e-7, atol=1e-12)
    loss = coupling.plan().square().sum() + coupling.value
    for gradient in torch.autograd.grad(loss, (infinite, epsilon)):
        assert gradient.isfinite().all()
    assert coupling.gap.isfinite()


def test_infeasible_support_is_a_status():
    lonely = torch.rand(2, 3, 3)
    lonely[1, 2] = INF
    coupling = solve(lonely, epsilon=0.1, on_fail="ignore")
    assert coupling.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE]
    assert coupling.plan()[1].isnan().all()
    hall = torch.full((3, 3), INF)
    hall[:, 0] = hall[0] = 0.0  # rows 1 and 2 share one column
    coupling = solve(hall, epsilon=0.1, on_fail="ignore")
    assert coupling.status == Status.STALLED
    assert coupling.residual > 0.1
    with pytest.raises(RuntimeError, match=r"STALLED with marginal residual .* Raise epsilon"):
        coupling.check()


@pytest.mark.parametrize("options", [{}, {"solver": "newton_cg"}, {"solver": "sinkhorn", "iterations": 200}])
def test_masked_is_absent(options):
    rows = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    columns = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    valid = rows[:, :, None] & columns[:, None, :]
    cost = torch.where(valid, torch.randn(3, 6, 4, dtype=torch.float64), NAN).requires_grad_()
    coupling = solve(cost, epsilon=0.3, row_mask=rows, column_mask=columns, on_fail="raise", **options)
    plan = coupling.plan()
    assert (plan[~valid] == 0).all()
    assert coupling.value[1] == 0
    alone = solve(cost[0][rows[0]][:, columns[0]], epsilon=0.3, **options)
    torch.testing.assert_close(plan[0][rows[0]][:, columns[0]], alone.plan(), rtol=1e-13, atol=1e-15)
    (gradient,) = torch.autograd.grad(plan.square().sum() + coupling.value.sum(), cost)
    assert (gradient[~valid] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"solver": "newton_cg"}, {"solver": "sinkhorn", "iterations": 30}])
@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 300, 290)])
def test_items_do_not_see_each_other(shape, options):
    cost = torch.randn(shape)
    other = cost.clone()
    other[1] *= 30  # another number of steps, another temperature schedule
    other[2, 0, 0] = NAN
    first = solve(cost, epsilon=0.3, on_fail="ignore", **options)
    second = solve(other, epsilon=0.3, on_fail="ignore", **options)
    for name in ("plan", "log_plan"):
        assert torch.equal(getattr(first, name)()[0], getattr(second, name)()[0])
    assert torch.equal(first.potentials.f[0], second.potentials.f[0])
    assert torch.equal(first.value[0], second.value[0])
    assert second.status[2] == Status.NONFINITE
    assert second.plan()[2].isnan().all()
    assert second.potentials.g[2].isnan().all()
    assert second.value[2].isnan()
    assert not second.plan()[:2].isnan().any()
    alone = solve(cost[0], epsilon=0.3, on_fail="ignore", **options)
    torch.testing.assert_close(alone.plan(), first.plan()[0], rtol=1e-5, atol=1e-9)


def test_inputs_are_unchanged():
    tensors = [t.clone() for t in (*plane_problem(5, 6), torch.tensor(0.1))]
    copies = [t.clone() for t in tensors]
    solve(*tensors[:3], epsilon=tensors[3]).plan()
    for tensor, saved in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, saved)


@given(n=st.integers(1, 8), m=st.integers(1, 8), log_epsilon=st.floats(-3, 1), shift=st.floats(-5, 5))
def test_laws(n, m, log_epsilon, shift):
    torch.manual_seed(n + 10 * m)
    cost = torch.randn(n, m, dtype=torch.float64)
    a, b, epsilon = uneven_masses(n, seed=n), uneven_masses(m, seed=m), 10.0**log_epsilon
    plan = solve(cost, a, b, epsilon=epsilon).plan()
    assert marginal_error(plan, a, b) <= 1e-9
    tolerance = {"rtol": 1e-5, "atol": 1e-8}
    rows, columns = torch.randperm(n), torch.randperm(m)
    permuted = solve(cost[rows][:, columns], a[rows], b[columns], epsilon=epsilon).plan()
    torch.testing.assert_close(permuted, plan[rows][:, columns], **tolerance)
    torch.testing.assert_close(solve(cost.mT, b, a, epsilon=epsilon).plan(), plan.mT, **tolerance)
    offsets = shift * torch.randn(n, 1, dtype=torch.float64) + shift * torch.randn(m, dtype=torch.float64)
    torch.testing.assert_close(solve(cost + offsets, a, b, epsilon=epsilon).plan(), plan, **tolerance)
    torch.testing.assert_close(solve(3 * cost, a, b, epsilon=3 * epsilon).plan(), plan, **tolerance)


def test_large_epsilon_is_the_independent_plan():
    cost, a, b = plane_problem(7, 5)
    torch.testing.assert_close(solve(cost, a, b, epsilon=1e9).plan(), a[:, None] * b, rtol=1e-8, atol=0)


# ---- dtypes, options, plumbing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_solved_in_float32(dtype):
    cost = torch.randn(2, 8, 9).to(dtype)
    coupling = solve(cost, epsilon=0.1, on_fail="raise")
    full = solve(cost.float(), epsilon=0.1)
    assert coupling.plan().dtype == coupling.value.dtype == coupling.a.dtype == dtype
    assert torch.equal(coupling.plan(), full.plan().to(dtype))
    assert coupling.apply(torch.ones(2, 9, dtype=dtype)).dtype == dtype


def test_epsilon_per_item_and_defaults():
    cost = torch.rand(3, 4, 5, dtype=torch.float64)
    epsilon = torch.tensor([0.1, 0.5, 2.0])
    together = solve(cost, epsilon=epsilon)
    for i in range(3):
        alone = solve(cost[i], epsilon=float(epsilon[i]))
        torch.testing.assert_close(alone.plan(), together.plan()[i], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(together.plan().sum(-1), torch.full((3, 4), 0.25, dtype=torch.float64))


def test_on_fail():
    cost, a, b = gaussian_problem(20, 20, 50.0, batch=(2,))
    options = {"epsilon": 1.0, "solver": "sinkhorn", "iterations": 3}
    with pytest.warns(
        RuntimeWarning, match=r"2 of 2 problems did not converge; item \(0,\) is MAX_ITERATIONS"
    ):
        solve(cost, a, b, **options)
    with pytest.raises(RuntimeError, match="Raise epsilon"):
        solve(cost, a, b, on_fail="raise", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(cost, a, b, on_fail="ignore", **options)
        assert isinstance(solve(cost, a, b, epsilon=100.0).check(), Coupling)


def test_copies_keep_the_numbers_and_drop_the_graph():
    coupling = solve(torch.randn(2, 3, 4, requires_grad=True), epsilon=0.1)
    buffer = io.BytesIO()
    torch.save(coupling, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (loaded, copy.deepcopy(coupling), pickle.loads(pickle.dumps(coupling))):
        for name in ("residual", "status", "iterations", "gap", "value", "a", "b"):
            assert torch.equal(getattr(twin, name), getattr(coupling, name)), name
        assert torch.equal(twin.plan(), coupling.plan())
        assert torch.equal(twin.log_plan(), coupling.log_plan())
        assert torch.equal(twin.potentials.f, coupling.potentials.f)
        assert not twin.plan().requires_grad
        assert "shape=(2, 3, 4)" in repr(twin)
        assert "CONVERGED, residual=" in repr(twin)


# ---- bad input

COST = torch.rand(2, 3, 4)
A, B = torch.full((2, 3), 1 / 3), torch.full((2, 4), 1 / 4)
BAD = {
    "cost is a list": (TypeError, "cost: expected", {"cost": [[1.0]]}),
    "cost is integer": (TypeError, "cost: expected dtype", {"cost": COST.int()}),
    "cost is complex": (TypeError, "Complex numbers", {"cost": COST.cfloat()}),
    "cost is bool": (TypeError, "cost: expected dtype", {"cost": COST > 0.5}),
    "cost is a vector": (ValueError, "cost: expected shape", {"cost": COST[0, 0]}),
    "cost is empty": (ValueError, "cost: expected shape", {"cost": COST[:, :0]}),
    "a has another dtype": (TypeError, "a: expected dtype float32", {"a": A.double()}),
    "a is on another device": (ValueError, "a: expected a tensor on cpu", {"a": A.to("meta")}),
    "a has another size": (ValueError, "a: expected", {"a": torch.full((2, 4), 0.25)}),
    "a is one number": (ValueError, "a: expected 3 masses", {"a": torch.tensor(1.0)}),
    "b is integer": (TypeError, "b: expected dtype", {"b": torch.ones(2, 4, dtype=torch.int64)}),
    "a is negative": (ValueError, "a: expected non-negative", {"a": torch.tensor([1.5, -0.5, 0.0])}),
    "b is negative": (ValueError, "b: expected non-negative", {"b": torch.tensor([1.5, -0.5, 0.0, 0.0])}),
    "masses differ": (ValueError, "b: expected the total mass of a", {"a": A, "b": 2 * B}),
    "mass of the default": (ValueError, "b: expected the total mass of a", {"a": 3 * A}),
    "epsilon is zero": (ValueError, "epsilon: .* linear-programming", {"epsilon": 0}),
    "epsilon is negative": (ValueError, "epsilon: expected a finite number > 0", {"epsilon": -0.1}),
    "epsilon is NaN": (ValueError, "epsilon: expected a finite", {"epsilon": NAN}),
    "epsilon is text": (TypeError, "epsilon: expected a positive number", {"epsilon": "0.1"}),
    "epsilon is bool": (TypeError, "epsilon: expected a positive number", {"epsilon": True}),
    "epsilon tensor is zero": (ValueError, "epsilon: expected positive values", {"epsilon": torch.zeros(2)}),
    "epsilon tensor has a wrong shape": (ValueError, "epsilon: expected a shape", {"epsilon": torch.ones(3)}),
    "solver": (ValueError, "solver: expected one of", {"solver": "simplex"}),
    "iterations without sinkhorn": (ValueError, "solver='sinkhorn'", {"iterations": 5}),
    "no iterations": (ValueError, "iterations: expected at least 1", {"solver": "sinkhorn", "iterations": 0}),
    "half iterations": (TypeError, "iterations: expected an int", {"solver": "sinkhorn", "iterations": 1.5}),
    "tolerance": (ValueError, "tolerance: expected", {"tolerance": -1.0}),
    "row_mask is float": (TypeError, "row_mask: expected a bool", {"row_mask": torch.ones(2, 3)}),
    "row_mask has another size": (ValueError, "row_mask: expected", {"row_mask": torch.ones(2, 4).bool()}),
    "column_mask is a list": (TypeError, "column_mask: expected a bool", {"column_mask": [True] * 4}),
    "on_fail": (ValueError, "on_fail: expected one of", {"on_fail": "shout"}),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input(case):
    error, message, change = case
    arguments = {"cost": COST, "epsilon": 0.1} | change
    with pytest.raises(error, match=message):
        solve(arguments.pop("cost"), **arguments)


def test_bad_values_where_they_cannot_be_read():
    cost = torch.rand(3, 2, 2, dtype=torch.float64)
    a = torch.tensor([[0.5, 0.5], [1.5, -0.5], [0.7, 0.7]], dtype=torch.float64)
    epsilon = torch.tensor(0.1, dtype=torch.float64)

    def outcome(cost, a):
        coupling = solve(cost, a, epsilon=epsilon)
        return coupling.status, coupling.plan()

    status, plan = torch.func.vmap(outcome)(cost, a)
    assert status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.INFEASIBLE]
    assert plan[0].isfinite().all()
    assert plan[1:].isnan().all()
