"""Laws of every ordering operator with ``method="transport"``, mostly as property tests."""

import functools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import couplings as cp
from couplings.testing import SCORE_KINDS, score_rows


def _payload(x):
    """Columns that follow the entries wherever they go."""
    known = x.nan_to_num(0, 0, 0)
    return torch.stack((known, known * known / (1 + known.abs()), torch.sin(known)), -1)


def sort_by(x, **options):
    return cp.soft_sort_by(x, _payload(x), **options)


def quantiles(x, **options):
    return cp.soft_quantile(x, [0.1, 0.5, 0.95], **options).movedim(0, -1)


def normalized(x, **options):
    return cp.quantile_normalize(x, torch.tensor([3.0, -1.0, 0.5, 7.0, 2.0], dtype=x.dtype), **options)


def quantized(x, **options):
    return cp.soft_quantize(x, 4, **options)


# what the last dimension of the result runs over; sort_by has the payload behind it
PER_ENTRY = {"soft_rank": cp.soft_rank, "quantile_normalize": normalized, "soft_quantize": quantized}
PER_TARGET = {"soft_sort": cp.soft_sort, "soft_quantile": quantiles, "soft_sort_by": sort_by}
MATRIX = {"soft_permutation": cp.soft_permutation}
OPERATORS = {**PER_ENTRY, **PER_TARGET, **MATRIX}
SCALING = ("soft_sort", "soft_quantile", "soft_quantize")  # in units of the scores

each = pytest.mark.parametrize("name", OPERATORS)
seeds = st.integers(0, 2**31 - 1)
epsilons = st.sampled_from([None, 1.0, 1e-1, 1e-2, 1e-3, 1e-5])
quick = settings(max_examples=8)


def draw(seed, rows=3, n=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = n or int(torch.randint(1, 40, (), generator=generator))
    x = torch.randn(rows, n, generator=generator, dtype=dtype)
    if seed % 3 == 0:
        x = x.round()  # ties
    return x, generator


def close(actual, expected, atol=1e-8):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@each
@quick
@given(seed=seeds, epsilon=epsilons)
def test_permutation_equivariance(name, seed, epsilon):
    x, generator = draw(seed)
    order = torch.randperm(x.shape[-1], generator=generator)
    function = functools.partial(OPERATORS[name], epsilon=epsilon)
    moved, plain = function(x[..., order]), function(x)
    if name not in PER_TARGET:
        plain = plain[..., order]
    close(moved, plain)


@each
@quick
@given(
    seed=seeds,
    epsilon=epsilons,
    scale=st.sampled_from([1e-3, 0.5, 7.0, 1e4]),
    shift=st.sampled_from([-100.0, 0.0, 3.0]),
)
def test_shift_and_scale(name, seed, epsilon, scale, shift):
    x, _ = draw(seed)
    if name == "soft_sort_by":
        function = functools.partial(cp.soft_sort_by, values=_payload(x), epsilon=epsilon)
    else:
        function = functools.partial(OPERATORS[name], epsilon=epsilon)
    out = function(scale * x + shift)
    if name in SCALING:
        out = (out - shift) / scale
    close(out, function(x), 1e-5 if epsilon == 1e-5 else 1e-7)


def disturb(x, seed, generator):
    """Rows 0 and 2 replaced by something else."""
    other = x.clone()
    other[0] = 1e3 * torch.randn(x.shape[-1], generator=generator, dtype=x.dtype)
    other[2] = [math.nan, 0.0, math.inf, 1e30][seed % 4]
    if seed % 5 == 0:
        other[0, 0] = 1e25
    return other


@each
@quick
@given(
    seed=seeds,
    n=st.sampled_from([1, 5, 33, 70]),
    epsilon=epsilons,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    squash=st.sampled_from(["logistic", "arctan", None]),
)
def test_rows_are_independent_bitwise(name, seed, n, epsilon, dtype, squash):
    x, generator = draw(seed, n=n, dtype=dtype)
    function = functools.partial(OPERATORS[name], epsilon=epsilon, squash=squash)
    out = function(x)
    assert torch.equal(out[1], function(disturb(x, seed, generator))[1])
    close(function(x[1:2])[0], out[1], 1e-9 * n if dtype == torch.float64 else 2e-5 * n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-2])
@pytest.mark.parametrize("squash", ["logistic", None])
@pytest.mark.parametrize("function", [cp.soft_rank, cp.soft_sort])
def test_long_rows_and_their_gradients_are_independent_bitwise(function, squash, epsilon, dtype):
    """Long enough for boxes; other rows may need other layouts."""
    x, generator = draw(4, n=250, dtype=dtype)
    x.requires_grad_()
    out = function(x, epsilon=epsilon, squash=squash)
    (grad,) = torch.autograd.grad(out[1].square().sum(), x)
    for seed in (2, 4, 5, 11):
        other = disturb(x.detach(), seed, generator).requires_grad_()
        again = function(other, epsilon=epsilon, squash=squash)
        assert torch.equal(out[1], again[1])
        (grad_again,) = torch.autograd.grad(again[1].square().sum(), other)
        assert torch.equal(grad[1], grad_again[1])


@each
@quick
@given(seed=seeds, epsilon=epsilons)
def test_padding_and_its_gradient(name, seed, epsilon):
    x, generator = draw(seed)
    n, wide = x.shape[-1], x.shape[-1] + 7
    places = torch.randperm(wide, generator=generator)[:n].sort().values
    mask = torch.zeros(3, wide, dtype=torch.bool)
    mask[:, places] = True
    padded = torch.full((3, wide), [math.nan, math.inf, 1e20][seed % 3], dtype=x.dtype)
    padded[:, places] = x
    x.requires_grad_()
    padded.requires_grad_()
    function = functools.partial(OPERATORS[name], epsilon=epsilon)
    plain, masked = function(x), function(padded, mask=mask)
    cotangent = torch.randn(plain.shape, generator=generator, dtype=x.dtype)
    spread = torch.zeros_like(masked)
    if name in PER_ENTRY:
        assert (masked[~mask] == 0).all()
        kept = masked[:, places]
        spread[:, places] = cotangent
    elif name == "soft_permutation":
        assert (masked[:, n:] == 0).all()
        assert (masked[..., ~mask[0]] == 0).all()
        kept = masked[:, :n, places]
        spread[:, :n, places] = cotangent
    elif name == "soft_quantile":
        kept, spread = masked, cotangent
    else:
        assert (masked[:, n:] == 0).all()
        kept = masked[:, :n]
        spread[:, :n] = cotangent
    close(kept, plain)
    plain.backward(cotangent)
    masked.backward(spread)
    size = float(x.grad.abs().max()) + 1
    close(padded.grad[:, places], x.grad, 1e-7 * size)
    assert (padded.grad[~mask] == 0).all()


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4])
def test_padding_of_long_rows(epsilon):
    x = score_rows("normal", 2, 300)
    padded = torch.full((2, 420), math.nan, dtype=x.dtype)
    mask = torch.zeros(2, 420, dtype=torch.bool)
    for row in range(2):
        places = torch.randperm(420)[:300].sort().values
        padded[row, places], mask[row, places] = x[row], True
    close(
        cp.soft_rank(padded, epsilon=epsilon, mask=mask)[mask].reshape(2, 300),
        cp.soft_rank(x, epsilon=epsilon),
        1e-6,
    )
    close(cp.soft_sort(padded, epsilon=epsilon, mask=mask)[:, :300], cp.soft_sort(x, epsilon=epsilon), 1e-6)


@each
@pytest.mark.parametrize("epsilon", [0, None, 1e-5])
def test_masks_that_leave_none_one_or_two(name, epsilon):
    x = torch.randn(3, 6, dtype=torch.float64)
    x[0] = math.nan
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 4] = mask[2, 1] = mask[2, 5] = True
    x.requires_grad_()
    out = OPERATORS[name](x, mask=mask, epsilon=epsilon)
    assert (out[0] == 0).all()
    assert out.isfinite().all()
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~mask] == 0).all()
    alone = OPERATORS[name](x.detach()[1:2, 4:5], epsilon=epsilon)[0]
    if name == "soft_permutation":
        close(out[1, :1, 4:5], alone)
    elif name in PER_ENTRY:
        close(out[1, 4:5], alone)
    elif name == "soft_quantile":
        close(out[1], alone)
    else:
        close(out[1, :1], alone)


@quick
@given(seed=seeds, epsilon=epsilons, kind=st.sampled_from(SCORE_KINDS), weighted=st.booleans())
def test_ranks_keep_order_range_and_mass(seed, epsilon, kind, weighted):
    x = score_rows(kind, 3, 2 + seed % 90, seed=seed)
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) + 1e-3
    weights = weights if weighted else None
    n = x.shape[-1]
    ranks = cp.soft_rank(x, epsilon=epsilon, weights=weights)
    ordered = ranks.gather(-1, x.argsort(dim=-1, stable=True))
    assert (ordered.diff(dim=-1) >= -1e-9 * n).all()
    assert (ranks >= 1 - 1e-8).all()
    assert (ranks <= n + 1e-8).all()
    a = torch.full_like(x, 1 / n) if weights is None else weights / weights.sum(-1, keepdim=True)
    close((a * ranks).sum(-1), torch.full((3,), (n + 1) / 2, dtype=x.dtype), 1e-8 * n)
    same = x.unsqueeze(-1) == x.unsqueeze(-2)
    apart = (ranks.unsqueeze(-1) - ranks.unsqueeze(-2)).abs()
    assert (apart[same] <= 1e-9 * n).all()


@quick
@given(seed=seeds, epsilon=epsilons)
def test_mass_with_weights_and_milestones(seed, epsilon):
    x, generator = draw(seed, n=30)
    a = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    a[:, ::4] = 0
    b = torch.rand(7, generator=generator, dtype=x.dtype) + 0.1
    y = torch.rand(7, generator=generator, dtype=x.dtype).sort().values
    options = {"epsilon": epsilon, "weights": a, "targets": y, "target_weights": b}
    ranks, values = cp.soft_rank(x, **options), cp.soft_sort(x, **options)
    matrix = cp.soft_permutation(x, **options)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum()
    close((a * ranks).sum(-1), (30 * (b * b.cumsum(0)).sum()).expand(3), 1e-7)
    close((values * b).sum(-1), (a * x).sum(-1))
    close(matrix.sum(-1), torch.ones(3, 7, dtype=x.dtype))
    close((b.unsqueeze(-1) * matrix).sum(-2), a)
    assert (values.diff(dim=-1) >= -1e-8).all()


@quick
@given(seed=seeds, epsilon=epsilons)
def test_forms_agree(seed, epsilon):
    """One plan behind all operators."""
    x, _ = draw(seed)
    n = x.shape[-1]
    matrix = cp.soft_permutation(x, epsilon=epsilon)
    close(matrix.sum(-1), torch.ones(3, n, dtype=x.dtype))
    close(matrix.sum(-2), torch.ones(3, n, dtype=x.dtype))
    close((matrix @ x.unsqueeze(-1)).squeeze(-1), cp.soft_sort(x, epsilon=epsilon))
    places = torch.arange(1, n + 1, dtype=x.dtype)
    close((matrix.mT @ places), cp.soft_rank(x, epsilon=epsilon), 1e-7)
    close(matrix @ _payload(x), sort_by(x, epsilon=epsilon))
    close(cp.quantile_normalize(x, places.flip(0), epsilon=epsilon), cp.soft_rank(x, epsilon=epsilon), 1e-7)
    close(cp.soft_sort(x, epsilon=epsilon).mean(-1), x.mean(-1))


@quick
@given(seed=seeds)
def test_epsilon_zero_is_torch_bitwise(seed):
    x, generator = draw(seed)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        z = x.to(dtype)
        for descending in (False, True):
            expected = torch.sort(z, dim=-1, descending=descending, stable=True)
            assert torch.equal(cp.soft_sort(z, epsilon=0, descending=descending), expected.values)
            place = torch.argsort(expected.indices, dim=-1)
            assert torch.equal(cp.soft_rank(z, epsilon=0, descending=descending), (place + 1).to(dtype))
            matrix = torch.nn.functional.one_hot(expected.indices, z.shape[-1])
            assert torch.equal(cp.soft_permutation(z, epsilon=0, descending=descending), matrix.to(dtype))
    mask = torch.rand(x.shape, generator=generator) < 0.6
    values, ranks = cp.soft_sort(x, epsilon=0, mask=mask), cp.soft_rank(x, epsilon=0, mask=mask)
    for row in range(3):
        kept = x[row, mask[row]]
        count = len(kept)
        expected = kept.sort(stable=True)
        assert torch.equal(values[row, :count], expected.values)
        assert (values[row, count:] == 0).all()
        assert torch.equal(ranks[row, mask[row]], expected.indices.argsort().to(x.dtype) + 1)
        assert (ranks[row, ~mask[row]] == 0).all()


@each
def test_infinite_and_nan_rows_are_nan_and_alone(name):
    x = torch.randn(4, 9, dtype=torch.float64)
    x[1, 4], x[2, 0] = math.nan, math.inf
    for options in ({}, {"epsilon": 0}, {"hard": True}, {"standardize": False, "squash": None}):
        leaf = x.clone().requires_grad_()
        out = OPERATORS[name](leaf, **options)
        assert out[1].isnan().all()
        assert out[2].isnan().all()
        assert out[[0, 3]].isfinite().all()
        (grad,) = torch.autograd.grad(out[[0, 3]].square().sum(), leaf)
        assert grad[[0, 3]].isfinite().all()


@quick
@given(seed=seeds)
def test_limits(seed):
    x, _ = draw(seed, n=12)
    x = x.sort(-1).values + 3 * torch.arange(12, dtype=x.dtype)
    x = x[:, torch.randperm(12)]
    for name, function in OPERATORS.items():
        if name == "soft_quantile":
            continue  # its middle target shares entries at any epsilon > 0
        close(function(x, epsilon=1e-7), function(x, epsilon=0), 1e-8)
    close(cp.soft_sort(x, epsilon=1e6), x.mean(-1, keepdim=True).expand(3, 12), 1e-3)
    close(cp.soft_rank(x, epsilon=1e6), torch.full_like(x, 6.5), 1e-3)
    close(cp.soft_permutation(x, epsilon=1e6), torch.full((3, 12, 12), 1 / 12, dtype=x.dtype), 1e-4)
    close(quantiles(x, epsilon=1e6), x.mean(-1, keepdim=True).expand(3, 3), 1e-3)
    for level in (0.0, 0.25, 0.4, 1.0):
        close(cp.soft_quantile(x, level, epsilon=1e-7), cp.soft_quantile(x, level, epsilon=0), 1e-7)


@quick
@given(seed=seeds)
def test_weighted_limit_is_the_staircase(seed):
    x, generator = draw(seed, n=8)
    x = x.sort(-1).values + 3 * torch.arange(8, dtype=x.dtype)
    a = torch.randint(0, 4, x.shape, generator=generator).to(x.dtype)
    a[:, 2] = 1.5
    y, b = torch.tensor([0.1, 0.3, 0.9]).double(), torch.tensor([2.0, 1.0, 3.0]).double()
    options = {"weights": a, "targets": y, "target_weights": b}
    share, mass = a / a.sum(-1, keepdim=True), b / b.sum()
    low = share.cumsum(-1) - share
    left = mass.cumsum(0) - mass
    overlap = torch.minimum((low + share).unsqueeze(-1), left + mass) - torch.maximum(low.unsqueeze(-1), left)
    plan = overlap.clamp_min(0)
    close(cp.soft_sort(x, epsilon=0, **options), (plan.mT @ x.unsqueeze(-1)).squeeze(-1) / mass, 1e-12)
    close(cp.soft_permutation(x, epsilon=0, **options), plan.mT / mass.unsqueeze(-1), 1e-12)
    heavy = share > 0
    ranks = (plan @ (8 * mass.cumsum(0))) / share
    close(cp.soft_rank(x, epsilon=0, **options)[heavy], ranks[heavy], 1e-11)
    close(cp.soft_sort(x, epsilon=1e-7, **options), cp.soft_sort(x, epsilon=0, **options), 1e-5)


@each
def test_constant_rows(name):
    for value in (0.0, 3.7, -1e30, 1e-40):
        x = torch.full((2, 7), value, dtype=torch.float64, requires_grad=True)
        for epsilon in (1.0, 1e-2, 1e-6):
            out = OPERATORS[name](x, epsilon=epsilon)
            if name == "soft_rank":
                close(out, torch.full_like(out, 4.0))
            elif name == "soft_permutation":
                close(out, torch.full_like(out, 1 / 7))
            elif name in SCALING:
                torch.testing.assert_close(out, torch.full_like(out, value), rtol=1e-9, atol=0)
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert grad.isfinite().all()


@each
@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite(name, kind, dtype):
    for epsilon in (None, 1e-4, 1e-8):
        for n in (17, 60):
            x = score_rows(kind, 2, n, dtype=dtype).requires_grad_()
            out = OPERATORS[name](x, epsilon=epsilon)
            assert out.isfinite().all()
            out.backward(torch.randn(out.shape, dtype=out.dtype))
            assert x.grad.isfinite().all()


@each
@quick
@given(seed=seeds)
def test_hard_is_the_exact_answer_with_the_soft_gradient(name, seed):
    x, generator = draw(seed, n=11)
    x.requires_grad_()
    function = OPERATORS[name]
    hard = function(x, hard=True, epsilon=0.05)
    assert torch.equal(hard, function(x, epsilon=0))
    cotangent = torch.randn(hard.shape, generator=generator, dtype=x.dtype)
    (actual,) = torch.autograd.grad(hard, x, cotangent)
    (expected,) = torch.autograd.grad(function(x, epsilon=0.05), x, cotangent)
    close(actual, expected, 1e-12)


def test_gradient_at_epsilon_zero():
    x = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((cp.soft_sort(x, epsilon=0) * torch.tensor([1.0, 10.0, 100.0])).sum(), x)
    assert grad.tolist() == [100.0, 1.0, 10.0]
    for out in (cp.soft_rank(x, epsilon=0), cp.soft_permutation(x, epsilon=0)):
        assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], torch.zeros_like(x))


@each
def test_inputs_are_not_modified_and_results_repeat(name):
    x, mask, weights = torch.randn(3, 11), torch.rand(3, 11) > 0.2, torch.rand(3, 11)
    kept = x.clone(), mask.clone(), weights.clone()
    for options in ({"mask": mask}, {"weights": weights}, {"epsilon": 0, "mask": mask}, {"hard": True}):
        first = OPERATORS[name](x, **options)
        assert torch.equal(first, OPERATORS[name](x, **options))
    assert torch.equal(x, kept[0])
    assert torch.equal(mask, kept[1])
    assert torch.equal(weights, kept[2])


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(name, dtype):
    x = torch.randn(3, 40).to(dtype)
    out = OPERATORS[name](x)
    assert out.dtype == dtype
    exact = OPERATORS[name](x.double())
    info = torch.finfo(dtype)
    bar = {torch.float64: 0.0, torch.float32: 1e-4}.get(dtype, 0.5 * info.eps)
    torch.testing.assert_close(out.double(), exact, atol=bar + 1e-6, rtol=info.eps)
    leaf = x.clone().requires_grad_()
    OPERATORS[name](leaf).float().square().sum().backward()
    assert leaf.grad.dtype == dtype
    assert leaf.grad.isfinite().all()


@each
def test_autocast_changes_nothing(name):
    x = torch.randn(3, 50)
    plain = OPERATORS[name](x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = x.clone().requires_grad_()
        cast = OPERATORS[name](leaf)
        cast.square().sum().backward()
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    other = x.clone().requires_grad_()
    OPERATORS[name](other).square().sum().backward()
    assert torch.equal(leaf.grad, other.grad)


@each
def test_any_dimension_layout_and_batch(name):
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = OPERATORS[name](x.movedim(1, -1).contiguous())
    if name == "soft_permutation":
        close(cp.soft_permutation(x, dim=1), expected, 1e-11)
        close(cp.soft_permutation(x, dim=-2), expected, 1e-11)
    elif name == "soft_sort_by":
        close(sort_by(x, dim=1).movedim(1, 2), expected, 1e-11)
    elif name == "soft_quantile":
        close(quantiles(x, dim=1), expected, 1e-11)
        assert cp.soft_quantile(x, [0.1, 0.2], dim=1).shape == (2, 2, 3)
        assert cp.soft_quantile(x, 0.1, dim=0).shape == (7, 3)
    else:
        close(OPERATORS[name](x, dim=1).movedim(1, -1), expected, 1e-11)
    for shape in ((7,), (0, 7), (2, 0, 7), (2, 3, 4, 7), (1,), (3, 1)):
        z = torch.randn(shape)
        for options in ({}, {"epsilon": 0}, {"hard": True}):
            out = OPERATORS[name](z, **options)
            assert out.shape[: z.dim() - 1] == z.shape[:-1]
            assert out.isfinite().all()
    leaf = torch.randn(0, 7, requires_grad=True)
    OPERATORS[name](leaf).sum().backward()
    assert leaf.grad.shape == (0, 7)
    strided = torch.randn(6, 4, dtype=torch.float64).mT
    close(OPERATORS[name](strided), OPERATORS[name](strided.contiguous()), 1e-12)


def test_one_entry():
    x = torch.tensor([2.5], dtype=torch.float64)
    for epsilon in (0, 1e-6, 1e-2, 10.0):
        assert cp.soft_sort(x, epsilon=epsilon).tolist() == pytest.approx([2.5])
        assert cp.soft_rank(x, epsilon=epsilon).tolist() == pytest.approx([1.0])
        assert cp.soft_median(x, epsilon=epsilon).item() == pytest.approx(2.5)
        assert cp.soft_permutation(x, epsilon=epsilon).tolist() == [[pytest.approx(1.0)]]
        assert cp.soft_sort(x, epsilon=epsilon, num_targets=3).tolist() == pytest.approx([2.5] * 3)


@each
def test_epsilon_per_row(name):
    x = torch.randn(4, 20, dtype=torch.float64)
    epsilon = torch.tensor([1.0, 1e-1, 1e-3, 1e-5], dtype=torch.float64)
    out = OPERATORS[name](x, epsilon=epsilon)
    for row in range(4):
        close(out[row], OPERATORS[name](x[row], epsilon=float(epsilon[row])), 1e-9)
    close(OPERATORS[name](x, epsilon=torch.tensor(0.1)), OPERATORS[name](x, epsilon=0.1), 1e-6)


@each
def test_descending_is_ascending_of_the_negated(name):
    if name in ("soft_quantile", "quantile_normalize", "soft_quantize"):
        return
    x = torch.randn(3, 12, dtype=torch.float64)
    if name == "soft_sort_by":
        close(sort_by(x, descending=True), sort_by(x).flip(-2))
    elif name == "soft_sort":
        close(cp.soft_sort(x, descending=True), cp.soft_sort(x).flip(-1))
    elif name == "soft_rank":
        close(cp.soft_rank(x, descending=True), 13 - cp.soft_rank(x))
    else:
        close(cp.soft_permutation(x, descending=True), cp.soft_permutation(x).flip(-2))


@quick
@given(seed=seeds)
def test_quantile_at_zero_is_torchs(seed):
    x, generator = draw(seed)
    q = torch.cat((torch.rand(5, generator=generator, dtype=x.dtype), torch.tensor([0.0, 0.5, 1.0]).double()))
    close(cp.soft_quantile(x, q, epsilon=0), torch.quantile(x, q, dim=-1), 1e-12)
    close(cp.soft_quantile(x, q, epsilon=0, dim=0), torch.quantile(x, q, dim=0), 1e-12)
    close(cp.soft_quantile(x.float(), 0.3, epsilon=0), torch.quantile(x.float(), 0.3, dim=-1), 1e-6)
    close(cp.soft_median(x, epsilon=0), torch.quantile(x, 0.5, dim=-1), 1e-12)
    mask = torch.rand(x.shape, generator=generator) < 0.7
    mask[:, 0] = True
    got = cp.soft_quantile(x, q, epsilon=0, mask=mask)
    for row in range(3):
        close(got[:, row], torch.quantile(x[row, mask[row]], q), 1e-12)


def test_quantiles_rise_and_stay_inside():
    for kind in SCORE_KINDS:
        x = score_rows(kind, 2, 60)
        for epsilon in (1.0, 1e-2, 1e-4):
            out = cp.soft_quantile(x, [0.0, 0.2, 0.5, 0.8, 1.0], epsilon=epsilon)
            size = float(x.abs().max())
            assert (out >= x.amin(-1) - 1e-9 * size).all()
            assert (out <= x.amax(-1) + 1e-9 * size).all()


def test_worked_example():
    """Sorting permutation (3, 6, 4, 2, 1, 5): the third entry is the least."""
    x = torch.empty(6, dtype=torch.float64)
    x[torch.tensor([3, 6, 4, 2, 1, 5]) - 1] = torch.tensor(
        [-2.0, -1.0, 0.3, 0.9, 1.5, 4.0], dtype=torch.float64
    )
    assert cp.soft_rank(x, epsilon=0).tolist() == [5, 4, 1, 3, 6, 2]
    close(cp.soft_rank(x, epsilon=1e-5), torch.tensor([5.0, 4, 1, 3, 6, 2], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["normal", "heavy", "clustered", "outlier"])
def test_quantile_normalize_keeps_order_and_takes_the_targets(kind):
    x = score_rows(kind, 2, 80)
    targets = score_rows("normal", 2, 80, seed=9) * 5 + 3
    for epsilon in (1e-1, 1e-3, 1e-6):
        out = cp.quantile_normalize(x, targets, epsilon=epsilon)
        ordered = out.gather(-1, x.argsort(-1))
        assert (ordered.diff(dim=-1) >= -1e-8).all()
        close(out.mean(-1), targets.mean(-1))
    ranks = [t.argsort(-1).argsort(-1).double() for t in (out, x)]
    spearman = torch.corrcoef(torch.stack((ranks[0][0], ranks[1][0])))[0, 1]
    assert spearman > 0.99
    exact = cp.quantile_normalize(x, targets, epsilon=0)
    close(exact.sort(-1).values, targets.sort(-1).values, 1e-11)
    assert torch.equal(exact.argsort(-1), x.argsort(-1))
    few = cp.quantile_normalize(x, torch.tensor([1.0, 0.0]).double(), epsilon=0)
    close(few.sort(-1).values, torch.tensor([[0.0] * 40 + [1.0] * 40] * 2, dtype=x.dtype), 1e-12)


def test_soft_quantize_levels():
    x = torch.randn(2, 12, dtype=torch.float64)
    for levels in (1, 3, 4, 12):
        exact = cp.soft_quantize(x, levels, epsilon=0)
        means = x.sort(-1).values.reshape(2, levels, -1).mean(-1)
        close(exact.sort(-1).values, means.repeat_interleave(12 // levels, -1), 1e-12)
        soft = cp.soft_quantize(x, levels, epsilon=1e-2)
        close(soft.mean(-1), x.mean(-1))
        assert (soft.gather(-1, x.argsort(-1)).diff(dim=-1) >= -1e-9).all()
    close(cp.soft_quantize(x, 1), x.mean(-1, keepdim=True).expand(2, 12))


def test_payloads_of_any_shape():
    keys = torch.randn(2, 9, 4, dtype=torch.float64)
    values = torch.randn(2, 9, 4, 2, 3, dtype=torch.float64)
    out = cp.soft_sort_by(keys, values, dim=1, num_targets=5)
    assert out.shape == (2, 5, 4, 2, 3)
    matrix = cp.soft_permutation(keys, dim=1, num_targets=5)
    close(out, torch.einsum("bkmn,bnkpq->bmkpq", matrix, values))
    close(cp.soft_sort_by(keys, keys, dim=1), cp.soft_sort(keys, dim=1))
    mask = torch.rand(2, 9, 4) < 0.6
    spoiled = values.masked_fill(~mask[..., None, None], math.nan)
    close(
        cp.soft_sort_by(keys, spoiled, dim=1, mask=mask),
        cp.soft_sort_by(keys, values.masked_fill(~mask[..., None, None], 0), dim=1, mask=mask),
        0,
    )
    assert cp.soft_sort_by(keys, torch.zeros(2, 9, 4, 0, dtype=torch.float64), dim=1).shape == (2, 9, 4, 0)


@pytest.mark.parametrize("m", [1, 2, 5, 40])
def test_num_targets_like_even_targets(m):
    x = torch.randn(2, 20, dtype=torch.float64)
    y = torch.linspace(0, 1, m, dtype=torch.float64)
    for function in (cp.soft_sort, cp.soft_rank, cp.soft_permutation):
        close(function(x, num_targets=m), function(x, targets=y, target_weights=torch.ones_like(y)), 1e-9)


def test_weights_like_repeated_entries():
    x = torch.randn(6, dtype=torch.float64)
    times = torch.tensor([1, 3, 2, 1, 4, 1])
    repeated = x.repeat_interleave(times)
    for epsilon in (0, 1e-2, 1e-4):
        out = cp.soft_sort(x, weights=times.double(), num_targets=5, epsilon=epsilon)
        close(out, cp.soft_sort(repeated, num_targets=5, epsilon=epsilon))
    share = cp.soft_rank(x, weights=times.double(), num_targets=12, epsilon=1e-2) / 6
    close(share.repeat_interleave(times), cp.soft_rank(repeated, num_targets=12, epsilon=1e-2) / 12)


def test_memory_is_linear():
    """200,000 entries: the whole plan would take 320 GB."""
    x = torch.randn(200_000, requires_grad=True)
    ranks = cp.soft_rank(x, epsilon=1e-2)
    ranks.square().mean().backward()
    assert x.grad.isfinite().all()
    assert abs(ranks.double().mean().item() - 100_000.5) < 0.1


def test_a_call_in_inference_mode_leaves_nothing_behind():
    x = torch.randn(2, 77, dtype=torch.float64)
    with torch.inference_mode():
        cp.soft_rank(x), cp.soft_sort(x)
    x.requires_grad_()
    (cp.soft_rank(x) + cp.soft_sort(x)).square().sum().backward()
    assert x.grad.isfinite().all()


def test_scores_far_wider_than_the_targets():
    """Raw scores in the hundreds against targets on [0, 1]: the squares, which the plan ignores, must not cancel it."""
    x = 300 * score_rows("normal", 2, 40)
    ranks = cp.soft_rank(x, epsilon=0.1, standardize=False, squash=None)
    close(ranks.mean(-1), torch.full((2,), 20.5, dtype=x.dtype), 1e-6)
    # the plan depends on x y / epsilon alone
    y = torch.linspace(0, 1, 40, dtype=x.dtype)
    close(ranks, cp.soft_rank(x / 300, targets=y, epsilon=0.1 / 300, standardize=False, squash=None), 1e-4)
    far = cp.soft_rank(1e8 + x / 300, epsilon=0.1, standardize=False, squash=None)
    close(far, cp.soft_rank(x / 300, epsilon=0.1, standardize=False, squash=None), 1e-5)


def test_kinds_of_rows_side_by_side_in_float32():
    """Rows that need finer boxes beside rows that do not."""
    x = torch.cat([score_rows(kind, 1, 300, dtype=torch.float32) for kind in SCORE_KINDS])
    for function in (cp.soft_rank, cp.soft_sort):
        out = function(x, epsilon=1e-3)
        assert out.dtype == torch.float32
        assert out.isfinite().all()
