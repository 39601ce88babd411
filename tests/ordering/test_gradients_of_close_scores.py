"""float32 gradients where only differences of close scores count: against float64's at the same scores."""

import pytest
import torch

import couplings as cp

LEVELS = [0.0, 0.25, 0.5, 0.9, 1.0]


def scores(kind: str) -> torch.Tensor:
    """float32 rows of three clusters far narrower than their distance, of all magnitudes, or far from 0."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    place = torch.rand(6, 24, generator=generator, dtype=torch.float64)
    width = 10.0 ** -torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    rows = {
        "clustered": (3 * place).floor() + width * noise,
        "geometric": 10 ** (-12 * place) * noise.sign(),
        "far": 1000 + noise,
        "constant": torch.full_like(noise, 3.7e30),
        "tiny": 1e-20 * ((3 * place).floor() + width * noise),
    }
    return rows[kind].float()


def off(operator, x: torch.Tensor) -> float:
    """The largest error of a row's gradient over its largest slope, or over range of results / std if that is more."""
    assert x.dtype == torch.float32
    grads = []
    for t in (x, x.double()):
        leaf = t.clone().requires_grad_()
        out = operator(leaf)
        # float32 numbers for both: only the operator differs
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad(out, leaf, noise.to(out.dtype))[0].double())
    whole = out.detach().flatten(1)
    size = (whole.amax(-1) - whole.amin(-1)) / x.double().std(-1, correction=0)
    size = torch.maximum(grads[1].abs().amax(-1), size.nan_to_num(0, 0))
    return ((grads[0] - grads[1]).abs().amax(-1) / torch.where(size > 0, size, 1)).max().item()


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("kind", ["clustered", "geometric", "far", "tiny"])
def test_sorted_values(kind, epsilon):
    x = scores(kind)
    assert off(lambda x: cp.soft_sort(x, epsilon=epsilon), x) < 1e-6
    assert off(lambda x: cp.soft_quantile(x, LEVELS, epsilon=epsilon).movedim(0, -1), x) < 1e-6
    payload = 1e4 + torch.arange(24.0).expand(6, 24)
    assert off(lambda x: cp.soft_sort_by(x, payload.to(x.dtype), epsilon=epsilon), x) < 1e-6


@pytest.mark.parametrize("method", ["sigmoid", "gaussian", "softsort", "neuralsort"])
@pytest.mark.parametrize("kind", ["clustered", "geometric", "far", "tiny", "constant"])
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_by_other_methods(method, kind, masked):
    x = scores(kind)
    mask = torch.arange(24).expand(6, 24) % 5 != 2 if masked else None
    for epsilon in (1e-1, 1e-3, 1e-5):
        error = off(lambda x, e=epsilon: cp.soft_rank(x, epsilon=e, method=method, mask=mask), x)
        assert error < 1e-4, epsilon


def test_weights_and_a_tensor_epsilon():
    x = scores("clustered")
    weights = torch.linspace(0.0, 2.0, 24)
    epsilon = torch.tensor([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    for method in ("sigmoid", "gaussian"):
        error = off(
            lambda x, m=method: cp.soft_rank(
                x, epsilon=epsilon.to(x.dtype), method=m, weights=weights.to(x.dtype)
            ),
            x,
        )
        assert error < 1e-4, method


def test_slope_in_epsilon():
    """The pair sums know their slope in epsilon from that in the scores."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 9, generator=generator, dtype=torch.float64) + 50
    away = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    for method in ("sigmoid", "gaussian"):
        epsilon = torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64, requires_grad=True)

        def total(e, method=method):
            return (cp.soft_rank(x, epsilon=e, method=method) * away).sum()

        (slope,) = torch.autograd.grad(total(epsilon), epsilon)
        step = 1e-6 * torch.eye(3, dtype=torch.float64)
        finite = torch.stack([(total(epsilon + s) - total(epsilon - s)) / 2e-6 for s in step])
        torch.testing.assert_close(slope, finite.detach(), rtol=1e-6, atol=1e-8)
