"""solve_points against the dense solver, its certificate and its gradients."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import couplings as cp
from couplings.testing import SCORE_KINDS, score_rows
from couplings.transport import solve_points

Y = torch.tensor([-1.0, 0.0, 0.2, 1.3], dtype=torch.float64)


def masses(*shape):
    raw = torch.rand(*shape, dtype=torch.float64) + 0.1
    return raw / raw.sum(-1, keepdim=True)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02])
def test_equals_dense_solver(epsilon):
    x, a, b = torch.randn(2, 9, dtype=torch.float64), masses(2, 9), masses(2, 4)
    points = solve_points(x, Y, a, b, epsilon=epsilon)
    dense = cp.solve((x.unsqueeze(-1) - Y) ** 2, a, b, epsilon=epsilon)
    torch.testing.assert_close(points.plan(), dense.plan(), atol=1e-10, rtol=0)
    torch.testing.assert_close(points.log_plan(), dense.log_plan(), atol=1e-7, rtol=0)
    torch.testing.assert_close(points.value, dense.value, atol=1e-10, rtol=0)
    for mine, theirs in zip(points.potentials, dense.potentials, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_certificate_is_truthful_at_every_epsilon(kind, dtype, bar):
    x = score_rows(kind, 2, 200, dtype=dtype)
    x = x / x.std(-1, keepdim=True, correction=0).clamp_min(1e-3)
    for exponent in range(7):
        coupling = solve_points(x, Y.to(dtype), epsilon=10.0**-exponent, on_fail="raise")
        plan = coupling.plan().double()
        residual = (plan.sum(-1) - 1 / 200).abs().sum(-1) + (plan.sum(-2) - 1 / 4).abs().sum(-1)
        torch.testing.assert_close(coupling.residual, residual, atol=1e-12, rtol=1e-6)
        assert residual.amax() <= bar
        assert (coupling.status == cp.Status.CONVERGED).all()


def test_gradients():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    a, b = masses(2, 6).requires_grad_(), masses(2, 4).requires_grad_()
    y = Y.clone().requires_grad_()
    epsilon = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def function(x, y, a, b, epsilon):
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        coupling = solve_points(x, y, a, b, epsilon=epsilon)
        return coupling.plan(), coupling.value, *coupling.potentials

    inputs = (x, y, a, b, epsilon)
    assert gradcheck(function, inputs)
    assert gradgradcheck(lambda *args: function(*args)[:2], inputs)


def test_mask_nan_and_padding():
    x = torch.randn(3, 8, dtype=torch.float64)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 3:5] = False
    x[2, 0] = torch.nan
    coupling = solve_points(x, Y, epsilon=0.1, mask=mask, on_fail="ignore")
    plan = coupling.plan()
    assert (plan[1, 3:5] == 0).all()
    assert plan[2].isnan().all()
    assert coupling.status.tolist() == [cp.Status.CONVERGED, cp.Status.CONVERGED, cp.Status.NONFINITE]
    alone = solve_points(x[1, mask[1]], Y, epsilon=0.1)
    torch.testing.assert_close(plan[1, mask[1]], alone.plan(), atol=1e-12, rtol=0)
    with pytest.warns(RuntimeWarning, match="NONFINITE"):
        solve_points(x, Y, epsilon=0.1)


def test_tied_points_and_one_target():
    x = torch.tensor([1.0, 1.0, 1.0, 2.0])
    plan = solve_points(x, torch.tensor([0.0, 1.0]), epsilon=0.01).plan()
    torch.testing.assert_close(plan[0], plan[1])
    one = solve_points(x, torch.tensor([3.0]), epsilon=0.1)
    torch.testing.assert_close(one.plan(), torch.full((4, 1), 0.25))
