"""solve: gradients to any order, against finite differences, unrolled sweeps and float64; torch.func and compile."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from couplings.testing.dense import (
    dustbin_problem,
    gaussian_problem,
    plane_problem,
    sinkhorn_oracle,
    uneven_masses,
)
from couplings.transport import implicit, solve

OUTPUTS = {
    "plan": lambda coupling: coupling.plan(),
    "log_plan": lambda coupling: coupling.log_plan(),
    "value": lambda coupling: coupling.value,
    "potentials": lambda coupling: tuple(coupling.potentials),
    "apply": lambda coupling: coupling.apply(torch.arange(3.0, dtype=torch.float64)),
    "transpose_apply": lambda coupling: coupling.transpose_apply(torch.arange(2.0, dtype=torch.float64)),
}
METHODS = {
    "newton": {"solver": "newton"},
    "newton_cg": {"solver": "newton_cg"},
    "sinkhorn": {"solver": "sinkhorn"},
    "fixed sweeps": {"solver": "sinkhorn", "iterations": 11},
}


def problem(epsilon: float) -> list[torch.Tensor]:
    cost, a, b = plane_problem(2, 3, seed=5)
    return [t.requires_grad_() for t in (cost, a, b, torch.tensor(epsilon, dtype=torch.float64))]


def outcome(name: str, method: str):
    def function(cost, a, b, epsilon):
        return OUTPUTS[name](solve(cost, a, b, epsilon=epsilon, on_fail="ignore", **METHODS[method]))

    return function


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_gradcheck_and_gradgradcheck(name, method, epsilon):
    assert gradcheck(outcome(name, method), problem(epsilon))
    assert gradgradcheck(outcome(name, method), problem(epsilon))


def test_gradcheck_with_the_longer_side_in_rows_and_the_iterative_adjoint(monkeypatch):
    monkeypatch.setattr(implicit, "ADJOINT_DENSE_LIMIT", 0)
    cost, a, b = (t.requires_grad_() for t in plane_problem(4, 3, seed=2))
    epsilon = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def plan(cost, a, b, epsilon):
        return solve(cost, a, b, epsilon=epsilon).plan()

    assert gradcheck(plan, (cost, a, b, epsilon))
    assert gradgradcheck(plan, (cost, a, b, epsilon))


@pytest.mark.parametrize("epsilon", [0.3, 0.05, 0.01])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_agrees_with_a_converged_unrolled_loop(shape, epsilon):
    weights = torch.randn(shape, dtype=torch.float64)
    inputs = [
        t.requires_grad_() for t in (*plane_problem(*shape), torch.tensor(epsilon, dtype=torch.float64))
    ]
    coupling = solve(*inputs[:3], epsilon=inputs[3])
    ours = torch.autograd.grad((weights * coupling.plan()).sum() + coupling.value, inputs)
    cost, a, b, eps = inputs
    plan, *_ = sinkhorn_oracle(cost, a, b * a.sum() / b.sum(), eps, 3000)
    value = (plan * (cost + eps * (plan.log() - 1))).sum()
    expected = torch.autograd.grad((weights * plan).sum() + value, inputs)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def test_value_is_the_envelope():
    cost, a, b, epsilon = problem(0.1)
    coupling = solve(cost, a, b, epsilon=epsilon)
    by_cost, by_a, by_b = torch.autograd.grad(coupling.value, (cost, a, b))
    torch.testing.assert_close(by_cost, coupling.plan())
    torch.testing.assert_close(by_a, coupling.potentials.f)
    torch.testing.assert_close(by_b, coupling.potentials.g)


def test_one_sided_derivative_where_a_mass_is_zero():
    cost = torch.rand(4, 3, dtype=torch.float64)
    weights = torch.randn(4, 3, dtype=torch.float64)
    a = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64, requires_grad=True)

    def loss(a, b):
        return (weights * solve(cost, a, b, epsilon=0.1).plan()).sum()

    by_a, by_b = torch.autograd.grad(loss(a, b), (a, b))
    for gradient, along, move in (
        (
            by_a,
            torch.tensor([-1.0, 1.0, 0.0, 0.0]).double(),
            lambda h, d: loss(a.detach() + h * d, b.detach()),
        ),
        (by_b, torch.tensor([1.0, -1.0, 0.0]).double(), lambda h, d: loss(a.detach(), b.detach() + h * d)),
    ):
        h = 1e-5
        forward = (-3 * move(0, along) + 4 * move(h, along) - move(2 * h, along)) / (2 * h)
        torch.testing.assert_close((gradient * along).sum(), forward, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("epsilon", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("make", ["plane", "gaussian", "dustbin"])
def test_float32_gradient_is_that_of_float64(make, epsilon):
    if make == "plane":
        cost, a, b = plane_problem(60, 50)
    else:
        cost, a, b = {"gaussian": gaussian_problem, "dustbin": dustbin_problem}[make](60, 50, 0.1)
    cost, a, b = cost.float(), a.float(), b.float()  # the same numbers in both precisions
    weights = torch.randn(cost.shape)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (cost, a, b)]
        coupling = solve(*inputs, epsilon=epsilon)
        gradients.append(torch.autograd.grad((weights.to(dtype) * coupling.plan()).sum(), inputs))
    for single, double in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(single - double) <= 1e-4 * torch.linalg.vector_norm(double)


@pytest.mark.parametrize("size", [24, 140, 300])
@pytest.mark.parametrize("make", [gaussian_problem, dustbin_problem])
def test_gradient_at_large_scores(make, size):
    # Rows of such a plan are hard to 1e-16: their adjoint equations are 0 = 0 up to rounding.
    cost, a, b = (t.float() for t in make(size, size, 100.0, seed=3))
    weights, along = torch.randn(2, *cost.shape, dtype=torch.float64)
    weights = weights.float().double()

    def loss(cost, dtype):
        return (weights.to(dtype) * solve(cost, a.to(dtype), b.to(dtype), epsilon=1.0).plan()).sum()

    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = cost.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaf, dtype), leaf)[0].double())
    single, double = gradients
    assert torch.linalg.vector_norm(single - double) <= 1e-4 * torch.linalg.vector_norm(double)
    h = 1e-4
    near, far = (
        loss(cost + step * along, torch.float64) - loss(cost - step * along, torch.float64)
        for step in (h, 2 * h)
    )
    expected = (8 * near - far) / (12 * h)
    torch.testing.assert_close((double * along).sum(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_torch_func(method):
    cost, a = torch.randn(3, 4, 5, dtype=torch.float64), uneven_masses(4)

    def loss(cost, a):
        coupling = solve(cost, a, epsilon=0.2, on_fail="ignore", **METHODS[method])
        return coupling.plan().square().sum() + coupling.value

    expected = torch.stack([torch.autograd.functional.jacobian(lambda c: loss(c, a), c) for c in cost])
    per_item = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(cost, a)
    torch.testing.assert_close(per_item, expected, rtol=1e-6, atol=1e-9)
    nested = torch.func.vmap(torch.func.vmap(loss, in_dims=(0, None)), in_dims=(None, 0))(
        cost, a.expand(2, 4)
    )
    torch.testing.assert_close(nested[1], torch.stack([loss(c, a) for c in cost]), rtol=1e-6, atol=1e-9)
    jacobian = torch.func.jacrev(
        lambda c: solve(c, a, epsilon=0.2, on_fail="ignore", **METHODS[method]).plan()
    )
    assert jacobian(cost[0]).shape == (4, 5, 4, 5)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(cost[0], a).reshape(20, 20)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_compile_fullgraph(method):
    def function(cost, a, epsilon):
        coupling = solve(cost, a, epsilon=epsilon, on_fail="ignore", **METHODS[method])
        return coupling.plan().square().sum() + coupling.value.sum(), coupling.status, coupling.residual

    inputs = [
        torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True),
        uneven_masses(4).requires_grad_(),
        torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
    ]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    loss, status, residual = compiled(*inputs)
    expected, expected_status, expected_residual = function(*inputs)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(status, expected_status)
    torch.testing.assert_close(residual, expected_residual, rtol=0, atol=1e-9)
    ours, eager = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    for mine, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def test_autocast_changes_nothing():
    cost = torch.randn(20, 30)
    expected = solve(cost, epsilon=0.1).plan()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(solve(cost, epsilon=0.1).plan(), expected)
        sweeps = solve(cost, epsilon=0.1, solver="sinkhorn", iterations=40, on_fail="ignore").plan()
    torch.testing.assert_close(
        sweeps, solve(cost, epsilon=0.1, solver="sinkhorn", iterations=40, on_fail="ignore").plan()
    )
