"""Laws that every selection operator and method obeys, as property tests."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import couplings as cp
from couplings.selection.api import MASK_METHODS, SORTED_METHODS

CASES = [("mask", method) for method in MASK_METHODS] + [("sorted", method) for method in SORTED_METHODS]
EXACT = ("transport", "laplace", "gaussian", "sparse")


def operator(form, method):
    """x, k, options -> one tensor whose last dimension runs over the entries."""

    def function(x, k, **options):
        if method == "gumbel":
            options["generator"] = torch.Generator().manual_seed(5)
        if form == "mask":
            return cp.soft_topk_mask(x, k, method=method, **options)
        return cp.soft_topk(x, k, method=method, **options)[1]

    return function


cases = pytest.mark.parametrize(("form", "method"), CASES)
quiet = pytest.mark.parametrize(("form", "method"), [case for case in CASES if case[1] != "gumbel"])
seeds = st.integers(0, 2**31 - 1)
exponents = st.sampled_from([0, 1, 2, 4, 6])


def draw(seed, rows=3, n=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = n or int(torch.randint(2, 40, (), generator=generator))
    k = int(torch.randint(1, n, (), generator=generator))
    x = torch.randn(rows, n, generator=generator, dtype=dtype)
    if seed % 3 == 0:
        x = x.round()  # ties
    return x, k, generator


@cases
@given(seed=seeds, exponent=exponents)
def test_sums(form, method, seed, exponent):
    x, k, _ = draw(seed)
    out = operator(form, method)(x, k, epsilon=10.0**-exponent)
    expected = torch.full_like(out.sum(-1), k if form == "mask" else 1)
    torch.testing.assert_close(out.sum(-1), expected, atol=1e-8, rtol=0)


@quiet
@given(seed=seeds)
def test_permutation_equivariance(form, method, seed):
    x, k, generator = draw(seed)
    if method == "softmax":
        x = x + 1e-3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    order = torch.randperm(x.shape[-1], generator=generator)
    function = operator(form, method)
    torch.testing.assert_close(function(x[..., order], k), function(x, k)[..., order], atol=1e-8, rtol=0)


@cases
@given(seed=seeds, scale=st.sampled_from([1e-3, 0.5, 7.0, 1e4]), shift=st.sampled_from([-100.0, 0.0, 3.0]))
def test_shift_and_scale_invariance(form, method, seed, scale, shift):
    x, k, _ = draw(seed)
    function = operator(form, method)
    torch.testing.assert_close(function(scale * x + shift, k), function(x, k), atol=1e-7, rtol=0)


@quiet
@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rows_are_independent_bitwise(form, method, seed, dtype):
    x, k, generator = draw(seed, dtype=dtype)
    other = x.clone()
    other[0] = 1e3 * torch.randn(x.shape[-1], generator=generator, dtype=dtype)
    other[2] = [float("nan"), 0.0, float("-inf")][seed % 3]
    function = operator(form, method)
    assert torch.equal(function(x, k)[1], function(other, k)[1])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(function(x[1:2], k)[0], function(x, k)[1], atol=tolerance, rtol=0)


@quiet
@given(seed=seeds)
def test_padding_invariance_and_masked_zeros(form, method, seed):
    x, k, generator = draw(seed)
    x.requires_grad_()
    padded = torch.full((3, x.shape[-1] + 7), float("nan"), dtype=x.dtype)
    places = torch.randperm(x.shape[-1] + 7, generator=generator)[: x.shape[-1]].sort().values
    padded[:, places] = x.detach()
    mask = torch.zeros_like(padded, dtype=torch.bool)
    mask[:, places] = True
    padded.requires_grad_()
    function = operator(form, method)
    plain, masked = function(x, k), function(padded, k, mask=mask)
    torch.testing.assert_close(masked[..., places], plain, atol=1e-10, rtol=0)
    assert (masked.masked_select(~mask if form == "mask" else ~mask.unsqueeze(-2)) == 0).all()
    cotangent = torch.randn(plain.shape, generator=generator, dtype=x.dtype)
    plain.backward(cotangent)
    spread = torch.zeros_like(masked)
    spread[..., places] = cotangent
    masked.backward(spread)
    torch.testing.assert_close(padded.grad[:, places], x.grad, atol=1e-8, rtol=1e-8)
    assert (padded.grad[~mask] == 0).all()


@quiet
def test_minus_infinity_means_masked(form, method):
    x = torch.randn(2, 9)
    hidden = x.clone()
    hidden[0, 3] = hidden[1, 0] = -torch.inf
    function = operator(form, method)
    expected = function(x, 3, mask=hidden.isfinite())
    assert torch.equal(function(hidden, 3), expected)
    assert torch.equal(function(-hidden, 3, largest=False), expected)


@cases
def test_nan_row_stays_alone(form, method):
    x = torch.randn(4, 9)
    x[2, 4] = torch.nan
    for options in ({}, {"epsilon": 0}, {"hard": True}, {"standardize": False}):
        out = operator(form, method)(x, 3, **options)
        assert out[2].isnan().all()
        assert out[[0, 1, 3]].isfinite().all()


@quiet
@given(seed=seeds)
def test_order_is_preserved(form, method, seed):
    if form != "mask" or method not in EXACT:
        return
    x, k, _ = draw(seed)
    mask = operator(form, method)(x, k)
    ordered = mask.gather(-1, x.argsort(dim=-1, stable=True))
    assert (ordered.diff(dim=-1) >= -1e-12).all()


@quiet
@given(seed=seeds)
def test_limits_of_epsilon(form, method, seed):
    if method not in EXACT:
        return
    x, k, _ = draw(seed, n=12)
    x = x.sort(-1).values + torch.arange(12, dtype=x.dtype)  # no near ties
    function = operator(form, method)
    torch.testing.assert_close(function(x, k, epsilon=1e-7), function(x, k, epsilon=0), atol=1e-9, rtol=0)
    if form == "mask" and method != "sparse":
        flat = function(x, k, epsilon=1e6)
        torch.testing.assert_close(flat, torch.full_like(flat, k / 12), atol=1e-4, rtol=0)


@cases
def test_inputs_are_not_modified_and_results_repeat(form, method):
    x, mask = torch.randn(3, 11), torch.rand(3, 11) > 0.2
    kept = x.clone(), mask.clone()
    first = operator(form, method)(x, 4, mask=mask)
    assert torch.equal(first, operator(form, method)(x, 4, mask=mask))
    assert torch.equal(x, kept[0])
    assert torch.equal(mask, kept[1])


@quiet
def test_any_dimension_and_layout(form, method):
    x = torch.randn(2, 7, 3)
    function = operator(form, method)
    expected = function(x.movedim(1, -1).contiguous(), 3)
    out = function(x, 3, dim=1)
    assert torch.equal(out.movedim(1, -1) if form == "mask" else out, expected)
    assert function(torch.randn(7), 3).shape == ((7,) if form == "mask" else (3, 7))
    assert function(torch.randn(0, 7), 3).shape[0] == 0
    torch.testing.assert_close(function(x.mT, 2).contiguous(), function(x.mT.contiguous(), 2))


@quiet
@given(seed=seeds, exponent=exponents)
def test_gradients_are_finite(form, method, seed, exponent):
    x, k, generator = draw(seed, dtype=torch.float32)
    if method == "softmax":
        exponent = min(
            exponent, 2
        )  # its gradient is a product of up to k factors 1 / epsilon: selection/README.md
    x.requires_grad_()
    out = operator(form, method)(x, k, epsilon=10.0**-exponent)
    out.backward(torch.randn(out.shape, generator=generator))
    assert x.grad.isfinite().all()


@quiet
def test_func_transforms(form, method):
    x = torch.randn(4, 6, dtype=torch.float64)
    function = operator(form, method)

    def loss(row):
        return function(row, 2).square().sum()

    torch.testing.assert_close(torch.func.vmap(lambda row: function(row, 2))(x), function(x, 2))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    jacobian = torch.func.jacrev(lambda row: function(row, 2))(x[0])
    torch.testing.assert_close(
        jacobian, torch.autograd.functional.jacobian(lambda row: function(row, 2), x[0])
    )
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(x[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x[0]))


@quiet
def test_compile_fullgraph(form, method):
    function = operator(form, method)
    compiled = torch.compile(lambda x: function(x, 2), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(compiled(x), function(x, 2))
    (expected,) = torch.autograd.grad(function(x, 2).square().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("module", [cp.nn.SoftTopKMask(3, epsilon=0.2), cp.nn.SoftTopK(3, largest=False)])
def test_modules_equal_functions_and_survive_copies(module, tmp_path):
    x = torch.randn(4, 8)
    function = cp.soft_topk_mask if isinstance(module, cp.nn.SoftTopKMask) else cp.soft_topk
    expected = function(x, 3, epsilon=module.epsilon, largest=module.largest)
    path = tmp_path / "module.pt"
    torch.save(module, path)
    for form in (
        module,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(path, weights_only=False),
    ):
        actual = form(x)
        assert (
            all(map(torch.equal, actual, expected))
            if isinstance(expected, tuple)
            else torch.equal(actual, expected)
        )
    assert "k=3" in repr(module)
