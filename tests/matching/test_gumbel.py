"""gumbel_sinkhorn: the noise, its limits, gradients with the noise fixed, randomness under vmap, messages."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from couplings.matching import gumbel
from couplings.matching.gumbel import gumbel_sinkhorn
from couplings.matching.normalize import sinkhorn_normalize

EULER = 0.5772156649


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def test_noise_is_gumbel_and_finite():
    noise = gumbel._gumbel(torch.empty(10**6), seeded())
    assert abs(float(noise.mean()) - EULER) < 4e-3
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 1e-2
    for level in (-1.0, 0.0, 1.0, 3.0):
        expected = torch.exp(-torch.exp(torch.tensor(-level)))
        assert abs(float((noise <= level).double().mean()) - float(expected)) < 2e-3


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_noise_is_finite_at_the_ends_of_the_generator(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([uniform], dtype=torch.float64))
    assert gumbel._gumbel(torch.empty(1), None).abs() < 37


def test_formula():
    scores, epsilon, noise = draw(3, 4, 4), 0.7, 0.4
    plan = gumbel_sinkhorn(scores, epsilon=epsilon, noise=noise, generator=seeded(5))
    perturbed = scores + noise * gumbel._gumbel(scores, seeded(5))
    torch.testing.assert_close(plan, sinkhorn_normalize(perturbed / epsilon), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_seeded_generator_reproduces(dtype):
    scores = draw(5, 4, 4, dtype=dtype)
    first, again, other = (gumbel_sinkhorn(scores, epsilon=0.5, generator=seeded(s)) for s in (1, 1, 2))
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    double = gumbel_sinkhorn(scores.double(), epsilon=0.5, generator=seeded(1))
    budget = {torch.float64: 0, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(first.double(), double, rtol=0, atol=budget)


def test_default_generator_is_torchs_and_no_noise_draws_nothing():
    scores = draw(3, 3)
    torch.manual_seed(3)
    first = gumbel_sinkhorn(scores, epsilon=1.0)
    torch.manual_seed(3)
    assert torch.equal(first, gumbel_sinkhorn(scores, epsilon=1.0))
    state = torch.get_rng_state()
    quiet = gumbel_sinkhorn(scores, epsilon=0.3, noise=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(quiet, sinkhorn_normalize(scores / 0.3))


def test_cold_samples_are_permutations_with_the_gumbel_max_frequencies():
    """Of two permutations the first wins if the sum of two score differences beats logistic-like noise."""
    scores = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double().expand(20000, 2, 2)
    plan = gumbel_sinkhorn(scores, epsilon=1e-3, generator=seeded())
    assert ((plan > 0.999) | (plan < 1e-3)).double().mean() > 0.99
    noise = gumbel._gumbel(scores, seeded(11)) + scores
    wins = noise[:, 0, 0] + noise[:, 1, 1] > noise[:, 0, 1] + noise[:, 1, 0]
    assert abs(float((plan[:, 0, 0] > 0.5).double().mean()) - float(wins.double().mean())) < 0.015


@pytest.mark.parametrize("iterations", [None, 5])
def test_gradient_with_the_noise_fixed(iterations):
    scores = draw(2, 3, 3).requires_grad_()
    epsilon = torch.tensor([0.8, 1.3], dtype=torch.float64, requires_grad=True)

    def plan(scores, epsilon):
        return gumbel_sinkhorn(scores, epsilon=epsilon, generator=seeded(4), iterations=iterations)

    assert gradcheck(plan, (scores, epsilon))
    assert gradgradcheck(plan, (scores, epsilon))


def test_torch_func_and_randomness():
    scores = draw(3, 3)
    many = scores.expand(4, 3, 3)

    def sample(x):
        return gumbel_sinkhorn(x, epsilon=0.5)

    different = torch.func.vmap(sample, randomness="different")(many)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(sample, randomness="same")(many)
    assert all(torch.equal(same[0], one) for one in same)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(sample)(many)
    gradient = torch.func.vmap(torch.func.grad(lambda x: sample(x).square().sum()), randomness="different")(
        many
    )
    assert gradient.isfinite().all()
    quiet = torch.func.vmap(lambda x: gumbel_sinkhorn(x, epsilon=0.5, noise=0.0))(many)
    torch.testing.assert_close(quiet[0], sinkhorn_normalize(scores / 0.5))


def test_compile_fullgraph():
    def loss(x):
        return gumbel_sinkhorn(x, epsilon=0.5).square().sum()

    scores = draw(2, 3, 3).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    out = compiled(scores)
    torch.manual_seed(0)
    expected = loss(scores)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(value, scores)[0] for value in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_forbidden_pairs_rectangles_and_empty_batches():
    scores = draw(4, 3, 3)
    scores[:, 0, 1] = -torch.inf
    plan = gumbel_sinkhorn(scores, epsilon=0.5, generator=seeded())
    assert (plan[:, 0, 1] == 0).all()
    wide = gumbel_sinkhorn(draw(2, 5), epsilon=0.5, generator=seeded())
    torch.testing.assert_close(wide.sum(-1), torch.ones(2, dtype=torch.float64))
    assert gumbel_sinkhorn(torch.zeros(0, 3, 3), epsilon=0.5).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("scores", {"scores": [[1.0]]}, TypeError),
        ("scores", {"scores": torch.ones(3, 3, dtype=torch.int64)}, TypeError),
        ("scores", {"scores": torch.ones(3)}, ValueError),
        ("scores", {"scores": torch.ones(0, 3)}, ValueError),
        ("epsilon", {"epsilon": 0}, ValueError),
        ("epsilon", {"epsilon": -1.0}, ValueError),
        ("epsilon", {"epsilon": float("nan")}, ValueError),
        ("epsilon", {"epsilon": float("inf")}, ValueError),
        ("epsilon", {"epsilon": "cold"}, TypeError),
        ("epsilon", {"epsilon": None}, TypeError),
        ("epsilon", {"epsilon": torch.ones(5)}, ValueError),
        ("epsilon", {"epsilon": torch.tensor(1)}, TypeError),
        ("epsilon", {"epsilon": torch.tensor([1.0, -1.0])}, ValueError),
        ("epsilon", {"epsilon": torch.tensor([1.0, float("nan")])}, ValueError),
        ("noise", {"noise": -0.1}, ValueError),
        ("noise", {"noise": float("inf")}, ValueError),
        ("noise", {"noise": True}, TypeError),
        ("noise", {"noise": torch.ones(3, 3)}, TypeError),
        ("generator", {"generator": 3}, TypeError),
        ("iterations", {"iterations": 0}, ValueError),
        ("iterations", {"iterations": 1.5}, TypeError),
        ("on_fail", {"on_fail": "quiet"}, ValueError),
    ],
)
def test_bad_arguments(argument, options, error):
    arguments = {"scores": torch.ones(2, 3, 3), "epsilon": 1.0, **options}
    with pytest.raises(error, match=f"^{argument}: expected .+, got ") as caught:
        gumbel_sinkhorn(arguments.pop("scores"), **arguments)
    assert type(caught.value) is error


def test_generator_of_another_device():
    with pytest.raises(ValueError, match=r"^generator: expected .+, got "):
        gumbel_sinkhorn(torch.ones(3, 3, device="meta"), epsilon=1.0, generator=torch.Generator())


@pytest.mark.parametrize("n", [4, 10])
@pytest.mark.parametrize("iterations", [None, 5])
def test_epsilon_has_a_gradient_where_pairs_are_forbidden(iterations, n):
    scores = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scores[0, 1] = -float("inf")
    epsilon = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def plan(epsilon):
        return gumbel_sinkhorn(scores, epsilon=epsilon, noise=0.0, iterations=iterations, on_fail="ignore")

    assert torch.autograd.gradcheck(plan, epsilon, atol=1e-6)
