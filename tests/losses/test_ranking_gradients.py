"""float32 gradients of ranking losses against float64's at the same scores."""

import pytest
import torch

from couplings.losses import kendall_loss, trimmed_loss


def gradients(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    return tuple(torch.autograd.grad(function(leaf).sum(), leaf)[0].double() for leaf in leaves)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-6])
def test_trimmed_losses_far_from_zero(epsilon):
    """Weights add up to a constant: how far the losses lie from 0 must not come back in their gradient."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(3, 20, generator=generator)
    tied = (5 * torch.rand(3, 20, generator=generator)).floor()
    x = torch.cat((1e4 + noise, 1e8 + 100 * tied, 1e20 * tied, torch.full((1, 20), 3.7e30)))
    got, exact = gradients(lambda t: trimmed_loss(t, 0.7, epsilon=epsilon, reduction="none"), x)
    torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


def test_trimmed_second_derivative():
    x = 50 + torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: trimmed_loss(t, 4, epsilon=0.5), x)


@pytest.mark.parametrize("masked", [False, True])
def test_kendall_of_far_and_of_close_pairs(masked):
    """Signs that are almost hard still have a slope, and close scores a difference."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 15, generator=generator)
    place = torch.rand(4, 15, generator=generator).mul(3).floor()
    x = torch.cat((place + 1e-4 * noise, torch.arange(15.0).expand(2, 15) + 0.1 * noise[:2], 1000 + noise))
    y = torch.randint(0, 4, x.shape, generator=generator)
    mask = torch.arange(15).expand(x.shape) % 4 != 1 if masked else None
    for epsilon in (1e-2, 1e-3, 1e-5):
        got, exact = gradients(
            lambda t, e=epsilon: kendall_loss(t, y, epsilon=e, mask=mask, reduction="none"), x
        )
        size = exact.abs().amax(-1, keepdim=True)
        there = size > 1e-30  # below, no float32 slope of a pair is left
        assert (((got - exact).abs() / size)[there.expand(x.shape)] < 1e-4).all(), epsilon
