"""solve with tau: the certificate, oracles, limits, gradients, masks, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from couplings.testing.dense import (
    dustbin_problem,
    gaussian_problem,
    linear_program,
    plane_problem,
    uneven_masses,
)
from couplings.transport import Status, solve, unbalanced_implicit

INF, NAN = float("inf"), float("nan")
BAR = {torch.float64: 1e-9, torch.float32: 2e-6}
SOLVERS = ["auto", "newton", "newton_cg"]
TAUS = [(1e-3, 1e-3), (0.3, 2.0), (10.0, 0.1), (1e6, 1e6), (None, 0.5), (3.0, None), (None, 1e6)]


def oracle(cost, a, b, epsilon, tau_a, tau_b, sweeps=20_000):
    """The textbook log-domain sweeps (Chizat et al. 2018), which contract by the product of the two factors."""
    x, y = (1.0 if tau is None else tau / (tau + epsilon) for tau in (tau_a, tau_b))
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(sweeps):
        f = x * epsilon * (a.log() - torch.logsumexp((g - cost) / epsilon, -1))
        before, g = g, y * epsilon * (b.log() - torch.logsumexp((f[:, None] - cost) / epsilon, -2))
        if (g - before).abs().max() <= 1e-15 * g.abs().max():
            break
    return ((f[:, None] + g - cost) / epsilon).exp()


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def divergence(x, y):
    return (torch.special.xlogy(x, x / y) - x + y).sum()


def objective(plan, cost, a, b, epsilon, tau_a, tau_b):
    """The documented objective of any plan."""
    out = (plan * cost).sum() + epsilon * (torch.special.xlogy(plan, plan) - plan).sum()
    out = out + (0 if tau_a is None else tau_a * divergence(plan.sum(-1), a))
    return out + (0 if tau_b is None else tau_b * divergence(plan.sum(-2), b))


def violation(coupling, a, b, tau_a, tau_b):
    """The L1 error of both optimality conditions, from the returned plan and potentials."""
    plan, (f, g) = coupling.plan().double(), coupling.potentials
    rows = a if tau_a is None else a * (-f / tau_a).exp()
    columns = b if tau_b is None else b * (-g / tau_b).exp()
    return (plan.sum(-1) - rows).abs().sum(-1) + (plan.sum(-2) - columns).abs().sum(-1)


# ---- the certificate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("std", [1.0, 20.0, 300.0])
@pytest.mark.parametrize("make", [gaussian_problem, dustbin_problem])
def test_residual_at_every_scale(make, std, tau, dtype):
    cost, a, b = make(40, 30, std)
    cost, a, b = (cost - cost.min()).to(dtype), a.to(dtype), (1.3 * b).to(dtype)
    coupling = solve(cost, a, b, epsilon=1.0, tau_a=tau[0], tau_b=tau[1])
    mass = coupling.plan().double().sum()
    assert coupling.status == Status.CONVERGED
    assert coupling.residual <= BAR[dtype] * mass
    assert coupling.iterations <= 60
    assert violation(coupling, a.double(), b.double(), *tau) <= 3 * BAR[dtype] * mass
    assert abs(coupling.gap) <= 1e-9 * max(1.0, float(coupling.value.abs()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 9), (1, 4)])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-1, 1.0])
@pytest.mark.parametrize(
    "tau", [(1e-3, 1e-3), (1.0, 0.1), (10.0, 10.0), (None, 0.5), (3.0, None), (1.0, 1e6)]
)
def test_plan_and_value_against_long_sweeps(tau, epsilon, shape, solver):
    cost, a, b = plane_problem(*shape)
    b = 1.7 * b
    tau = [None if t is None else t * epsilon for t in tau]
    expected = oracle(cost, a, b, epsilon, *tau)
    coupling = solve(cost, a, b, epsilon=epsilon, tau_a=tau[0], tau_b=tau[1], solver=solver)
    torch.testing.assert_close(coupling.plan(), expected, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(coupling.log_plan().exp(), expected, rtol=1e-8, atol=1e-14)
    value = objective(expected, cost, a, b, epsilon, *tau)
    torch.testing.assert_close(coupling.value, value, rtol=1e-9, atol=1e-12)
    f, g = coupling.potentials
    torch.testing.assert_close(
        ((f[:, None] + g - cost) / epsilon).exp(), coupling.plan(), rtol=1e-8, atol=1e-14
    )


def test_value_is_the_minimum_found_by_another_optimiser():
    from scipy.optimize import minimize

    cost, a, b = plane_problem(3, 4, seed=3)
    b, tau = 2 * b, (0.3, 0.2)

    def f(logs):
        leaf = torch.from_numpy(logs).reshape(3, 4).requires_grad_()
        out = objective(leaf.exp(), cost, a, b, 0.05, *tau)
        (gradient,) = torch.autograd.grad(out, leaf)
        return float(out.detach()), gradient.reshape(-1).numpy()

    found = minimize(
        f,
        torch.full((12,), -3.0).double().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 0.0, "gtol": 1e-11, "maxiter": 10_000},
    )
    coupling = solve(cost, a, b, epsilon=0.05, tau_a=tau[0], tau_b=tau[1])
    torch.testing.assert_close(coupling.value, double(found.fun), rtol=1e-8, atol=0)
    torch.testing.assert_close(
        coupling.plan().reshape(-1), torch.from_numpy(found.x).exp(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("cost", [0.0, 0.3, 40.0])
@pytest.mark.parametrize("tau", [(0.5, 2.0), (None, 0.2), (1e5, 1e5)])
def test_one_by_one_in_closed_form(tau, cost):
    a, b, epsilon = 0.7, 1.9, 0.1
    if tau[0] is None:
        log_mass = math.log(a)
    else:
        log_mass = (tau[0] * math.log(a) + tau[1] * math.log(b) - cost) / (epsilon + tau[0] + tau[1])
    coupling = solve(
        double([[cost]]),
        double([a]),
        double([b]),
        epsilon=epsilon,
        tau_a=tau[0],
        tau_b=tau[1],
    )
    torch.testing.assert_close(coupling.log_plan(), double([[log_mass]]), rtol=1e-9, atol=1e-9)


def test_gap_and_status_of_an_unfinished_solve():
    cost, a, b = gaussian_problem(20, 30, 10.0)
    options = {"epsilon": 1.0, "tau_a": 1e4, "tau_b": 1e4, "on_fail": "ignore"}
    rough = solve(cost, a, b, tolerance=1e-3, **options)
    exact = solve(cost, a, b, **options)
    assert rough.gap >= (rough.value - exact.value).abs() - 1e-9
    assert rough.gap >= -1e-12
    assert exact.residual <= 1e-10
    never = solve(cost, a, b, tolerance=1e-18, **options)
    assert never.status in (Status.STALLED, Status.CONVERGED)
    assert never.residual <= 1e-12


def test_sweeps_reach_the_same_plan():
    cost, a, b = plane_problem(8, 6)
    options = {"epsilon": 0.05, "tau_a": 0.2, "tau_b": 0.3}
    swept = solve(cost, a, b, solver="sinkhorn", **options)
    torch.testing.assert_close(swept.plan(), solve(cost, a, b, **options).plan(), rtol=1e-8, atol=1e-12)
    assert swept.iterations > 5


# ---- limits


@pytest.mark.parametrize("relaxed", [("tau_a", "tau_b"), ("tau_b",)])
def test_infinite_tau_is_the_balanced_problem(relaxed):
    cost, a, b = plane_problem(9, 7)
    balanced = solve(cost, a, b, epsilon=0.02)
    errors = []
    for tau in (1e2, 1e4, 1e8):
        coupling = solve(cost, a, b, epsilon=0.02, **dict.fromkeys(relaxed, tau))
        errors.append(float((coupling.plan() - balanced.plan()).abs().sum()))
        assert coupling.status == Status.CONVERGED
    assert errors[1] <= 2e-2 * errors[0]
    assert errors[2] <= 1e-7
    torch.testing.assert_close(coupling.value, balanced.value, rtol=1e-6, atol=1e-6)


def test_zero_tau_is_every_pair_by_itself():
    cost, a, b = plane_problem(6, 8)
    coupling = solve(cost, a, b, epsilon=0.3, tau_a=1e-9, tau_b=1e-9)
    torch.testing.assert_close(coupling.plan(), (-cost / 0.3).exp(), rtol=1e-7, atol=0)


def test_semi_relaxed_keeps_one_side():
    cost, a, b = plane_problem(6, 8)
    coupling = solve(cost, a, 5 * b, epsilon=0.05, tau_b=0.1)
    torch.testing.assert_close(coupling.plan().sum(-1), a, rtol=1e-10, atol=0)
    free = solve(cost, a, 5 * b, epsilon=0.05, tau_b=1e-12)  # rows choose by themselves
    torch.testing.assert_close(
        free.plan(), a[:, None] * torch.softmax(-cost / 0.05, -1), rtol=1e-7, atol=1e-12
    )


def test_partial_matching_at_small_epsilon():
    # three close pairs, a row and a column that are far from everything
    x = double([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    y = double([[0.0, 1.1], [0.1, 0.0], [1.0, 0.1], [-9.0, 0.0]])
    cost = (x[:, None] - y).square().sum(-1)
    coupling = solve(
        cost,
        torch.ones(4).double(),
        torch.ones(4).double(),
        epsilon=1e-3,
        tau_a=0.5,
        tau_b=0.5,
        on_fail="raise",
    )
    expected = torch.zeros(4, 4).double()
    for i, j in ((0, 1), (1, 2), (2, 0)):
        expected[i, j] = math.exp(-float(cost[i, j]) / (1 + 1e-3))  # the 1 x 1 problem's closed form
    torch.testing.assert_close(coupling.plan(), expected, rtol=1e-6, atol=1e-20)
    # as tau grows, the far ones are matched, too, and the plan is the assignment
    full = solve(
        cost, torch.ones(4).double(), torch.ones(4).double(), epsilon=1e-3, tau_a=1e6, tau_b=1e6
    ).plan()
    assignment, _ = linear_program(cost, torch.ones(4).double(), torch.ones(4).double())
    torch.testing.assert_close(full, assignment, rtol=2e-3, atol=1e-3)


# ---- gradients

OUTPUTS = {
    "plan": lambda coupling: coupling.plan(),
    "log_plan": lambda coupling: coupling.log_plan(),
    "value": lambda coupling: coupling.value,
    "potentials": lambda coupling: tuple(coupling.potentials),
}


def inputs(epsilon=0.1, n=2, m=3):
    cost, a, b = plane_problem(n, m, seed=5)
    numbers = [double(t) for t in (epsilon, 0.3, 0.7)]
    return [t.requires_grad_() for t in (cost, a, 1.4 * b, *numbers)]


@pytest.mark.parametrize("relaxed", ["ab", "a", "b"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_gradcheck_and_gradgradcheck(name, relaxed):
    def function(cost, a, b, epsilon, tau_a, tau_b):
        return OUTPUTS[name](
            solve(
                cost,
                a,
                b,
                epsilon=epsilon,
                tau_a=tau_a if "a" in relaxed else None,
                tau_b=tau_b if "b" in relaxed else None,
            )
        )

    given = inputs()
    for position, side in ((4, "a"), (5, "b")):
        if side not in relaxed:
            given[position].requires_grad_(False)
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


def test_gradcheck_with_rows_the_longer_side_and_the_iterative_adjoint(monkeypatch):
    monkeypatch.setattr(unbalanced_implicit, "ADJOINT_DENSE_LIMIT", 0)

    def plan(cost, a, b, epsilon, tau_a, tau_b):
        return solve(cost, a, b, epsilon=epsilon, tau_a=tau_a, tau_b=tau_b).plan()

    given = inputs(0.05, 4, 3)
    assert gradcheck(plan, given)
    assert gradgradcheck(plan, given)


@pytest.mark.parametrize("tau", [(1e4, 1e4), (None, 1e4), (1e-3, 1e-3), (0.1, 1e3)])
def test_gradient_at_extreme_tau(tau):
    cost, a, b = plane_problem(6, 5)
    weights, along = torch.randn(2, 6, 5, dtype=torch.float64)

    def loss(cost):
        coupling = solve(cost, a, 1.5 * b, epsilon=0.05, tau_a=tau[0], tau_b=tau[1])
        return (weights * coupling.plan()).sum()

    leaf = cost.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    near, far = (loss(cost + h * along) - loss(cost - h * along) for h in (1e-4, 2e-4))
    torch.testing.assert_close((gradient * along).sum(), (8 * near - far) / 12e-4, rtol=1e-6, atol=1e-9)


def test_value_is_the_envelope():
    cost, a, b, *_ = inputs(n=4, m=6)
    coupling = solve(cost, a, b, epsilon=0.1, tau_a=0.3)
    by_cost, by_a, by_b = torch.autograd.grad(coupling.value, (cost, a, b))
    torch.testing.assert_close(by_cost, coupling.plan())
    torch.testing.assert_close(by_a, 0.3 * (1 - coupling.plan().sum(-1) / a))
    torch.testing.assert_close(by_b, coupling.potentials.g)


@pytest.mark.parametrize("tau", [(0.3, 1.0), (None, 0.5)])
def test_float32_gradient_is_that_of_float64(tau):
    cost, a, b = (t.float() for t in gaussian_problem(50, 40, 20.0))
    weights = torch.randn(cost.shape)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (cost, a, b)]
        coupling = solve(*leaves, epsilon=1.0, tau_a=tau[0], tau_b=tau[1])
        log_mass = coupling.plan().sum(-1).log()  # masses themselves reach e^20 here
        gradients.append(
            torch.autograd.grad((weights.to(dtype).sum(-1) * log_mass).sum() + coupling.value, leaves)
        )
    for single, double in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(single - double) <= 1e-4 * torch.linalg.vector_norm(double)


def test_torch_func():
    cost, a = torch.rand(3, 4, 5, dtype=torch.float64), uneven_masses(4)

    def loss(cost, a, tau=0.4):
        coupling = solve(cost, a, epsilon=0.2, tau_a=tau, tau_b=0.6)
        return coupling.plan().square().sum() + coupling.value

    expected = torch.stack([torch.autograd.functional.jacobian(lambda c: loss(c, a), c) for c in cost])
    per_item = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(cost, a)
    torch.testing.assert_close(per_item, expected, rtol=1e-6, atol=1e-9)
    taus = torch.tensor([0.4, 2.0], dtype=torch.float64)
    over = torch.func.vmap(loss, in_dims=(None, None, 0))(cost[0], a, taus)
    torch.testing.assert_close(over[1], loss(cost[0], a, 2.0), rtol=1e-8, atol=1e-10)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(cost[0], a).reshape(20, 20)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-6, atol=1e-6)


def test_compile_fullgraph():
    def function(cost, a, epsilon, tau):
        coupling = solve(cost, a, epsilon=epsilon, tau_a=tau)
        return coupling.plan().square().sum() + coupling.value.sum(), coupling.status, coupling.residual

    given = [
        torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True),
        uneven_masses(4).requires_grad_(),
        torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.4, dtype=torch.float64, requires_grad=True),
    ]
    loss, status, residual = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    expected, expected_status, _ = function(*given)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(status, expected_status)
    assert (residual <= 1e-9).all()
    ours, eager = torch.autograd.grad(loss, given), torch.autograd.grad(expected, given)
    for mine, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


# ---- zeros, infinities, masks, items


@pytest.mark.parametrize("tau", [(0.3, 0.5), (None, 0.5), (2.0, None)])
def test_masked_and_massless_are_absent(tau):
    options = {"epsilon": 0.3, "tau_a": tau[0], "tau_b": tau[1]}
    rows, columns = torch.tensor([1, 1, 0, 1, 1, 0]).bool(), torch.tensor([1, 0, 1, 1]).bool()
    valid = rows[:, None] & columns
    cost = torch.where(valid, torch.randn(6, 4, dtype=torch.float64), NAN).requires_grad_()
    a = double([0.4, 0.0, 0.1, 0.2, 0.4, 0.3]).requires_grad_()
    coupling = solve(cost, a, row_mask=rows, column_mask=columns, **options)
    plan = coupling.plan()
    kept = rows & (a.detach() > 0)
    alone = solve(cost[kept][:, columns], a[kept], **options)
    assert (plan[~kept] == 0).all()
    assert (plan[:, ~columns] == 0).all()
    assert (coupling.potentials.f[~kept] == -INF).all()
    torch.testing.assert_close(plan[kept][:, columns], alone.plan(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(coupling.value, alone.value, rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(plan.square().sum() + coupling.value, (cost, a)):
        assert gradient.isfinite().all()
    assert (
        (torch.autograd.grad(solve(cost, a, row_mask=rows, column_mask=columns, **options).value, cost)[0])[
            ~valid
        ]
        .eq(0)
        .all()
    )


def test_infinite_cost_forbids_and_a_lonely_row_pays_its_mass():
    cost = torch.rand(3, 4, dtype=torch.float64)
    cost[1] = INF
    a = double([0.5, 0.2, 0.3])
    coupling = solve(cost, a, epsilon=0.1, tau_a=0.4, tau_b=0.3, on_fail="raise")
    kept = solve(cost[[0, 2]], a[[0, 2]], epsilon=0.1, tau_a=0.4, tau_b=0.3)
    torch.testing.assert_close(coupling.plan()[[0, 2]], kept.plan(), rtol=1e-12, atol=0)
    assert (coupling.plan()[1] == 0).all()
    torch.testing.assert_close(coupling.value, kept.value + 0.4 * 0.2, rtol=1e-12, atol=0)
    assert coupling.gap.abs() <= 1e-10
    exact = solve(cost, a, epsilon=0.1, tau_b=0.3, on_fail="ignore")
    assert exact.status == Status.INFEASIBLE
    assert exact.plan().isnan().all()


def test_nothing_to_match():
    cost = torch.rand(2, 3, 4, dtype=torch.float64)
    a = torch.zeros(2, 3).double()
    a[0] = 0.5
    coupling = solve(cost, a, epsilon=0.1, tau_a=1.0, tau_b=2.0, on_fail="raise")
    assert (coupling.plan()[1] == 0).all()
    assert coupling.value[1] == 2.0  # tau_b times the mass of b


@pytest.mark.parametrize("options", [{}, {"solver": "newton_cg"}])
@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 290, 270)])
def test_items_do_not_see_each_other(shape, options):
    cost = torch.randn(shape)
    other = cost.clone()
    other[1] *= 30
    other[2, 0, 0] = NAN
    options = {"epsilon": 0.3, "tau_a": 1.0, "tau_b": 2.0, "on_fail": "ignore"} | options
    first, second = solve(cost, **options), solve(other, **options)
    assert torch.equal(first.plan()[0], second.plan()[0])
    assert torch.equal(first.value[0], second.value[0])
    assert torch.equal(first.potentials.f[0], second.potentials.f[0])
    assert second.status[2] == Status.NONFINITE
    assert second.plan()[2].isnan().all()
    assert second.value[2].isnan()
    assert not second.plan()[:2].isnan().any()
    alone = solve(cost[0], **options)
    torch.testing.assert_close(alone.plan(), first.plan()[0], rtol=1e-5, atol=1e-9)


@given(
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    log_epsilon=st.floats(-3, 1),
    log_tau=st.tuples(st.floats(-3, 4), st.floats(-3, 4)),
)
def test_laws(n, m, log_epsilon, log_tau):
    torch.manual_seed(n + 10 * m)
    cost = torch.rand(n, m, dtype=torch.float64)
    a, b, epsilon = uneven_masses(n, seed=n), 3 * uneven_masses(m, seed=m), 10.0**log_epsilon
    tau_a, tau_b = (10.0**t for t in log_tau)
    options = {"epsilon": epsilon, "tau_a": tau_a, "tau_b": tau_b}
    coupling = solve(cost, a, b, **options)
    plan = coupling.plan()
    assert violation(coupling, a, b, tau_a, tau_b) <= 1e-9 * plan.sum()
    # the minimum in closed form from the masses
    total = tau_a * a.sum() + tau_b * b.sum()
    expected = total - (epsilon + tau_a + tau_b) * plan.sum()
    torch.testing.assert_close(
        coupling.value, expected, rtol=1e-7, atol=1e-9 * float(total + abs(expected) + tau_a + tau_b)
    )
    close = {"rtol": 1e-6, "atol": 1e-9 * float(plan.sum())}
    rows, columns = torch.randperm(n), torch.randperm(m)
    permuted = solve(cost[rows][:, columns], a[rows], b[columns], **options).plan()
    torch.testing.assert_close(permuted, plan[rows][:, columns], **close)
    turned = solve(cost.mT, b, a, epsilon=epsilon, tau_a=tau_b, tau_b=tau_a).plan()
    torch.testing.assert_close(turned, plan.mT, **close)
    scaled = solve(3 * cost, a, b, epsilon=3 * epsilon, tau_a=3 * tau_a, tau_b=3 * tau_b).plan()
    torch.testing.assert_close(scaled, plan, **close)
    # a common offset of the costs changes the mass by a factor only where tau allows it: monotone
    assert solve(cost + 0.1, a, b, **options).plan().sum() <= plan.sum() * (1 + 1e-9)


def test_half_and_per_item_tau():
    cost = torch.rand(2, 5, 6).half()
    tau = torch.tensor([0.1, 2.0])
    coupling = solve(cost, epsilon=0.1, tau_a=tau, tau_b=0.5)
    assert coupling.plan().dtype == coupling.value.dtype == torch.float16
    for i in range(2):
        alone = solve(cost[i].float(), epsilon=0.1, tau_a=float(tau[i]), tau_b=0.5)
        torch.testing.assert_close(coupling.plan()[i], alone.plan().half(), rtol=1e-2, atol=1e-4)


# ---- bad input

COST = torch.rand(2, 3, 4)
BAD = {
    "tau_a is zero": (ValueError, "tau_a: expected a finite number > 0.*or None", {"tau_a": 0}),
    "tau_b is negative": (ValueError, "tau_b: expected a finite number > 0", {"tau_b": -1.0}),
    "tau_a is infinite": (ValueError, "tau_a: expected a finite number", {"tau_a": INF}),
    "tau_a is text": (TypeError, "tau_a: expected a positive number", {"tau_a": "1"}),
    "tau_a is bool": (TypeError, "tau_a: expected a positive number", {"tau_a": True}),
    "tau_a is an integer tensor": (
        TypeError,
        "tau_a: expected dtype",
        {"tau_a": torch.ones(2, dtype=torch.int64)},
    ),
    "tau_b has a wrong shape": (ValueError, "tau_b: expected a shape", {"tau_b": torch.ones(3)}),
    "tau_b tensor is zero": (ValueError, "tau_b: expected positive values", {"tau_b": torch.zeros(2)}),
    "epsilon tensor is zero": (
        ValueError,
        "epsilon: expected positive",
        {"tau_a": 1.0, "epsilon": torch.zeros(2)},
    ),
    "a is negative": (
        ValueError,
        "a: expected non-negative",
        {"tau_a": 1.0, "a": torch.tensor([1.0, -1.0, 1.0])},
    ),
    "fixed sweeps": (
        ValueError,
        "iterations: expected None where tau_a or tau_b",
        {"tau_a": 1.0, "solver": "sinkhorn", "iterations": 5},
    ),
    "masses differ without tau": (ValueError, "b: expected the total mass of a", {"b": torch.ones(4)}),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input(case):
    error, message, change = case
    with pytest.raises(error, match=message):
        solve(COST, **({"epsilon": 0.1} | change))


def test_bad_values_where_they_cannot_be_read():
    def outcome(cost, tau):
        coupling = solve(cost, epsilon=0.1, tau_a=tau)
        return coupling.plan(), coupling.status

    plan, status = torch.func.vmap(outcome)(torch.rand(2, 3, 3).double(), double([0.5, -1.0]))
    assert status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert plan[1].isnan().all()
    assert plan[0].isfinite().all()


@pytest.mark.parametrize("taus", [(1.0, 1.0), (1.0, None)])
def test_epsilon_has_a_gradient_where_pairs_are_forbidden(taus):
    cost = torch.tensor([[0.0, float("inf")], [1.0, 0.3]], dtype=torch.float64)
    epsilon = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def plan(epsilon):
        coupling = solve(cost, epsilon=epsilon, tau_a=taus[0], tau_b=taus[1])
        return coupling.plan(), coupling.value

    assert torch.autograd.gradcheck(plan, epsilon, atol=1e-6)
