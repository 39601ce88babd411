"""The published relaxations of sorting: against their papers' formulas in plain loops, and the laws they obey."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from couplings.ordering import gaussian, network, neuralsort, sigmoid, softsort
from couplings.ordering.rows import prepare

BITONIC = {"network": "bitonic", "swap": "optimal"}
ODD_EVEN = {"network": "odd_even", "swap": "cauchy"}
FORMS = ("permutation", "ranks", "sorted_values")


def noisy(form):
    def function(rows, epsilon, *, seed=3):
        generator = torch.Generator().manual_seed(seed)
        return getattr(neuralsort, form)(rows, epsilon, noise=0.5, generator=generator)

    return function


CASES = {
    **{f"neuralsort-{form}": getattr(neuralsort, form) for form in FORMS},
    **{f"softsort-{form}": getattr(softsort, form) for form in FORMS},
    "softsort2-ranks": partial(softsort.ranks, p=2.0),
    "softsort1.5-permutation": partial(softsort.permutation, p=1.5),
    "sigmoid-ranks": sigmoid.ranks,
    "gaussian-ranks": gaussian.ranks,
    "gaussian-permutation": gaussian.permutation,
    **{f"bitonic-{form}": partial(getattr(network, form), **BITONIC) for form in FORMS},
    **{f"odd_even-{form}": partial(getattr(network, form), **ODD_EVEN) for form in FORMS},
    "art-ranks": partial(network.ranks, network="odd_even", swap="logistic", art_lambda=0.25),
}
STOCHASTIC = {f"stochastic-{form}": noisy(form) for form in FORMS}
EQUIVARIANT = [name for name in CASES if not name.startswith(("bitonic", "odd_even", "art"))]
ORDERED = [name for name in EQUIVARIANT if name.endswith("ranks")]

each = pytest.mark.parametrize("name", CASES)
every = pytest.mark.parametrize("name", [*CASES, *STOCHASTIC])


def operator(name, x, epsilon, *, mask=None, weights=None, standardize=True):
    function = CASES.get(name) or STOCHASTIC[name]
    return function(prepare(x, -1, False, weights, mask, standardize), epsilon)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The formulas as the papers print them, one entry at a time, in numpy.


def standardised(x):
    deviation = x.std()
    return (x - x.mean()) / (deviation if deviation > 0 else 1.0)


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def paper_neuralsort(s, tau):
    n = len(s)
    spread = [sum(abs(a - b) for b in s) for a in s]
    falling = [
        softmax(np.array([(n + 1 - 2 * i) * s[k] - spread[k] for k in range(n)]) / tau)
        for i in range(1, n + 1)
    ]
    return np.array(falling[::-1])


def paper_softsort(s, tau, p=1.0):
    return np.array([softmax(np.array([-(abs(t - v) ** p) / tau for v in s])) for t in sorted(s)])


def column_means(matrix):
    return np.array(
        [sum((j + 1) * row[i] for j, row in enumerate(matrix)) for i in range(len(matrix))]
    ) / matrix.sum(0)


def paper_sigmoid(s, tau, weights=None):
    a = np.full(len(s), 1 / len(s)) if weights is None else weights / weights.sum()
    return np.array([0.5 + len(s) * sum(b / (1 + math.exp((v - u) / tau)) for v, b in zip(s, a)) for u in s])


def normal_above(difference, sigma):
    return 0.5 * math.erfc(-difference / (2 * sigma))


def paper_gaussian(s, sigma, weights=None):
    a = np.full(len(s), 1 / len(s)) if weights is None else weights / weights.sum()
    return np.array([0.5 + len(s) * sum(b * normal_above(u - v, sigma) for v, b in zip(s, a)) for u in s])


def paper_rank_distribution(s, sigma):
    """Every outcome of every comparison, one by one."""
    n = len(s)
    matrix = np.zeros((n, n))
    for i in range(n):
        wins = [normal_above(s[i] - s[j], sigma) for j in range(n) if j != i]
        for outcome in itertools.product((0, 1), repeat=n - 1):
            matrix[sum(outcome), i] += math.prod(w if o else 1 - w for w, o in zip(wins, outcome))
    return matrix


def paper_swap(u, swap):
    if swap == "logistic":
        return 1 / (1 + math.exp(-u)) if u > -700 else 0.0
    if swap == "cauchy":
        return math.atan(u) / math.pi + 0.5
    if swap == "reciprocal":
        return 0.5 * (2 * u / (1 + 2 * abs(u))) + 0.5
    return u + 0.5 if abs(u) <= 0.25 else (1 - 1 / (16 * u) if u > 0 else -1 / (16 * u))


def paper_network(s, tau, name, swap, art=0.0):
    n = len(s)
    wires = [[v, row] for v, row in zip(s, np.eye(n))]

    def compare(low, high):
        (a, p), (b, q) = wires[low], wires[high]
        if math.inf in (a, b):
            wires[low], wires[high] = sorted((wires[low], wires[high]), key=lambda wire: wire[0])
            return
        u = (b - a) / tau / (abs(b - a) + 1e-12) ** art
        v = paper_swap(u, swap)
        wires[low] = [v * a + (1 - v) * b, v * p + (1 - v) * q]
        wires[high] = [(1 - v) * a + v * b, (1 - v) * p + v * q]

    def merge(start, size, direction):
        if size > 1:
            for i in range(start, start + size // 2):
                compare(*((i, i + size // 2)[::direction]))
            merge(start, size // 2, direction)
            merge(start + size // 2, size // 2, direction)

    def sort(start, size, direction):
        """One half rising, one falling; nothing is merged with a half of infinities alone."""
        if size > 1:
            sort(start, size // 2, 1)
            sort(start + size // 2, size // 2, -1)
            if any(value != math.inf for value, _ in wires[start + size // 2 : start + size]):
                merge(start, size, 1)
            if direction < 0:
                wires[start : start + size] = wires[start : start + size][::-1]

    if name == "odd_even":
        for step in range(n):
            for i in range(step % 2, n - 1, 2):
                compare(i, i + 1)
    else:
        size = 1 << (n - 1).bit_length()
        wires += [[math.inf, np.zeros(n)] for _ in range(size - n)]
        sort(0, size, 1)
    return np.array([row for _, row in wires[:n]])


PAPERS = {
    "neuralsort": paper_neuralsort,
    "softsort": paper_softsort,
    "softsort2": partial(paper_softsort, p=2.0),
    "softsort1.5": partial(paper_softsort, p=1.5),
    "gaussian": paper_rank_distribution,
    "bitonic": partial(paper_network, name="bitonic", swap="optimal"),
    "odd_even": partial(paper_network, name="odd_even", swap="cauchy"),
    "art": partial(paper_network, name="odd_even", swap="logistic", art=0.25),
}


def paper(name, x, epsilon):
    method, form = name.split("-")
    s = standardised(x)
    if form == "ranks" and method in ("sigmoid", "gaussian"):
        return (paper_sigmoid if method == "sigmoid" else paper_gaussian)(s, epsilon)
    matrix = PAPERS[method](s, epsilon)
    if form == "permutation":
        return matrix
    return matrix @ x if form == "sorted_values" else column_means(matrix)


@each
@pytest.mark.parametrize("epsilon", [0.03, 0.4, 3.0])
def test_formulas_of_the_papers(name, epsilon):
    x = draw(1, 7)
    x[0, 5] = x[0, 2]
    mask = torch.tensor([True, True, True, False, True, True, False])
    for valid in (torch.ones(7, dtype=torch.bool), mask):
        expected = torch.from_numpy(paper(name, x[0, valid].numpy(), epsilon))
        count = len(expected)
        actual = operator(name, x, epsilon, mask=None if valid.all() else valid[None])[0]
        if name.endswith("ranks"):
            actual = actual[valid]
        elif name.endswith("permutation"):
            actual = actual[:count, valid]
        else:
            actual = actual[:count]
        torch.testing.assert_close(actual, expected, atol=1e-6 if "art" in name else 1e-10, rtol=0)


@pytest.mark.parametrize("swap", network.SWAPS)
@pytest.mark.parametrize("name", network.NETWORKS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8, 11, 16])
def test_networks_of_every_size(n, name, swap):
    x = draw(1, n)
    rows = prepare(x, -1, False, None, None, True)
    options = {"network": name, "swap": swap}
    expected = torch.from_numpy(paper_network(standardised(x[0].numpy()), 0.3, name, swap))
    matrix = network.permutation(rows, 0.3, **options)[0]
    torch.testing.assert_close(matrix, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix.sum(0), torch.ones(n, dtype=x.dtype))
    torch.testing.assert_close(matrix.sum(1), torch.ones(n, dtype=x.dtype))
    torch.testing.assert_close(network.sorted_values(rows, 0.3, **options)[0], matrix @ x[0])
    places = torch.arange(1, n + 1, dtype=x.dtype)
    torch.testing.assert_close(network.ranks(rows, 0.3, **options)[0], places @ matrix)
    hard = network.permutation(rows, 1e-12, **options)[0]
    torch.testing.assert_close(hard @ x[0], x[0].sort().values, atol=1e-8, rtol=0)


@pytest.mark.parametrize("swap", ["cauchy", "reciprocal", "optimal"])
@pytest.mark.parametrize("name", network.NETWORKS)
def test_monotone_swaps_never_turn_a_gradient(name, swap):
    def function(x):
        rows = prepare(x, -1, False, None, None, False)
        return network.sorted_values(rows, 0.5, network=name, swap=swap)

    for seed in range(5):
        assert (torch.func.jacrev(function)(3 * draw(7, seed=seed)) > -1e-12).all()


@pytest.mark.parametrize(("method", "oracle"), [(sigmoid, paper_sigmoid), (gaussian, paper_gaussian)])
def test_weighted_ranks(method, oracle):
    x, weights = draw(2, 9), draw(2, 9, seed=1).abs()
    weights[0, 4] = 0
    rows = prepare(x, -1, False, weights, None, True)
    out = method.ranks(rows, 0.2)
    for r in range(2):
        expected = torch.from_numpy(oracle(rows.z[r].numpy(), 0.2, weights[r].numpy()))
        torch.testing.assert_close(out[r], expected)
    torch.testing.assert_close((weights * out).sum(-1), weights.sum(-1) * 5)
    same = prepare(x, -1, False, torch.full_like(weights, 3.0), None, True)
    torch.testing.assert_close(
        method.ranks(same, 0.2), method.ranks(prepare(x, -1, False, None, None, True), 0.2)
    )
    mask = weights > 0.3
    hidden = method.ranks(prepare(x, -1, False, weights, mask, True), 0.2)
    alone = method.ranks(prepare(x[:1, mask[0]], -1, False, weights[:1, mask[0]], None, True), 0.2)
    torch.testing.assert_close(hidden[0, mask[0]], alone[0])
    assert (hidden[~mask] == 0).all()


def test_gaussian_ranks_are_expected_ranks_under_noise():
    x, sigma, samples = draw(1, 6), 0.5, 100_000
    rows = prepare(x, -1, False, None, None, True)
    noise = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    drawn = (rows.z + sigma * noise).argsort(-1).argsort(-1) + 1.0
    standard_error = drawn.std(0) / math.sqrt(samples)
    assert ((gaussian.ranks(rows, sigma)[0] - drawn.mean(0)).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_rank_distributions(n):
    x = draw(3, n)
    rows = prepare(x, -1, False, None, None, True)
    for epsilon in (0.05, 0.5, 5.0):
        out = gaussian.permutation(rows, epsilon)
        for r in range(3):
            expected = torch.from_numpy(paper_rank_distribution(rows.z[r].numpy(), epsilon))
            torch.testing.assert_close(out[r], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(out.sum(-2), torch.ones_like(x))
        places = torch.arange(1, n + 1, dtype=x.dtype)
        torch.testing.assert_close(places @ out, gaussian.ranks(rows, epsilon))


# Laws.


@each
def test_limit_of_small_epsilon(name):
    x = torch.stack(
        [torch.randperm(9, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    ).double()
    values, order = x.sort(-1)
    if name.endswith("sorted_values"):
        expected = values
    elif name.endswith("ranks"):
        expected = x + 1
    else:
        expected = torch.nn.functional.one_hot(order, 9).double()
    torch.testing.assert_close(operator(name, x, 1e-9), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_ties_share_equally_and_order_of_the_input_does_not_matter(name):
    x = torch.tensor([[0.5, 2.0, -1.0, 2.0, 0.5, 2.0]], dtype=torch.float64)
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    for epsilon in (1e-6, 0.1, 1.0):
        out, moved = operator(name, x, epsilon), operator(name, x[:, order], epsilon)
        if name.endswith("sorted_values"):
            torch.testing.assert_close(moved, out)
            continue
        torch.testing.assert_close(moved, out[..., order])
        torch.testing.assert_close(out[..., [1, 1]], out[..., [3, 5]])
        torch.testing.assert_close(out[..., 0], out[..., 4])


@each
def test_constant_rows(name):
    for n in (1, 2, 4, 8):
        x = torch.full((2, n), 3.7, dtype=torch.float64)
        out = operator(name, x, 0.1)
        if name.endswith("sorted_values"):
            torch.testing.assert_close(out, x)
        elif name == "gaussian-permutation":
            torch.testing.assert_close(out.sum(-2), torch.ones_like(x))
        elif name in EQUIVARIANT or "bitonic" in name or n <= 2:
            uniform = (n + 1) / 2 if name.endswith("ranks") else 1 / n
            torch.testing.assert_close(out, torch.full_like(out, uniform))


@each
def test_sums_and_ranges(name):
    x = draw(3, 8)
    mask = torch.tensor([True] * 6 + [False, True]).expand(3, 8)
    for epsilon in (1e-3, 0.1, 2.0):
        out = operator(name, x, epsilon, mask=mask)
        if name.endswith("permutation"):
            assert (out >= 0).all()
            axis = -2 if name.startswith("gaussian") else -1
            ones = mask.double() if axis == -2 else torch.tensor([1.0] * 7 + [0.0]).double().expand(3, 8)
            torch.testing.assert_close(out.sum(axis), ones)
            assert (out[:, 7] == 0).all()
            assert (out[..., 6] == 0).all()
        elif name.endswith("ranks"):
            assert (out[mask] >= 1 - 1e-12).all()
            assert (out[mask] <= 7 + 1e-12).all()
            assert (out[~mask] == 0).all()
            if not name.startswith(("neuralsort", "softsort")):
                torch.testing.assert_close(out.sum(-1), torch.full((3,), 28.0, dtype=x.dtype))
        else:
            assert (out[:, 7] == 0).all()


@each
def test_padding_changes_nothing(name):
    x = draw(3, 6).requires_grad_()
    places = torch.tensor([0, 2, 3, 7, 8, 10])
    padded = torch.full((3, 13), math.nan, dtype=x.dtype)
    padded[:, places] = x.detach()
    padded.requires_grad_()
    mask = torch.zeros(13, dtype=torch.bool)
    mask[places] = True
    plain, hidden = operator(name, x, 0.3), operator(name, padded, 0.3, mask=mask.expand(3, 13))
    columns = torch.arange(6) if name.endswith("sorted_values") else places
    part = hidden[..., columns]
    part = part[:, :6] if name.endswith("permutation") else part
    torch.testing.assert_close(part, plain)
    cotangent = draw(*plain.shape, seed=1)
    plain.backward(cotangent)
    part.backward(cotangent)
    torch.testing.assert_close(padded.grad[:, places], x.grad)
    assert (padded.grad[:, ~mask] == 0).all()
    nothing = operator(name, padded, 0.3, mask=torch.zeros(3, 13, dtype=torch.bool))
    assert (nothing == 0).all()
    (gradient,) = torch.autograd.grad(nothing.sum(), padded)
    assert (gradient == 0).all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_never_meet(name, dtype):
    x = draw(4, 33, dtype=dtype)
    other = x.clone()
    other[0] *= 1e3
    other[2] = math.nan
    other[3, 5] = math.nan
    for standardize in (True, False):
        before = operator(name, x, 0.2, standardize=standardize)
        after = operator(name, other, 0.2, standardize=standardize)
        assert torch.equal(after[1], before[1])
        assert after[:2].isfinite().all()
        assert after[2:].isnan().all()
    torch.testing.assert_close(operator(name, x[1:2], 0.2), operator(name, x, 0.2)[1:2])
    shaped = operator(name, x.reshape(2, 1, 2, 33), 0.2)
    torch.testing.assert_close(shaped.flatten(0, 2), operator(name, x, 0.2))
    single = operator(name, torch.tensor([[math.nan], [2.0]], dtype=dtype), 0.2)
    assert single[0].isnan().all()
    assert (single[1] == (2 if name.endswith("values") else 1)).all()


@pytest.mark.parametrize("name", ORDERED)
def test_ranks_keep_the_order_of_the_scores(name):
    x = torch.cat((draw(20, 15), draw(20, 15, seed=1).round(), draw(5, 15, seed=2) ** 9)).sort(-1).values
    for epsilon in (1e-6, 1e-2, 0.1, 1.0, 30.0):
        assert (operator(name, x, epsilon).diff(dim=-1) >= -1e-12).all()


@each
def test_scale_and_shift(name):
    x = draw(3, 9)
    out = operator(name, x, 0.3)
    for scale, shift in ((1e-30, 0.0), (1e30, 0.0), (7.0, -100.0)):
        expected = scale * out + shift if name.endswith("sorted_values") else out
        torch.testing.assert_close(
            operator(name, scale * x + shift, 0.3), expected, rtol=1e-8, atol=1e-8 * scale
        )


@each
def test_single_precision(name):
    x = draw(2, 100) * 5
    for epsilon in (1.0, 0.1, 1e-2):
        single, double = operator(name, x.float(), epsilon), operator(name, x, epsilon)
        error = (single.double() - double).abs().max() / double.abs().max()
        assert error < (2e-3 if "art" in name else 2e-4), (epsilon, error)


@each
def test_empty_batches_and_rows(name):
    for shape in ((0, 5), (2, 0, 3), (2, 0)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        out = operator(name, x, 0.1, standardize=shape[-1] > 0)
        assert out.shape == (shape + shape[-1:] if name.endswith("permutation") else shape)
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape


# Gradients.


@every
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_gradients_to_second_order(name, epsilon):
    x = draw(2, 4, seed=5).requires_grad_()
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])
    width = torch.tensor([[epsilon], [1.1 * epsilon]], dtype=x.dtype, requires_grad=True)
    function = partial(operator, name, mask=mask)
    fast = name.endswith("permutation")  # one random direction rather than every entry
    assert torch.autograd.gradcheck(function, (x, width))
    assert torch.autograd.gradgradcheck(function, (x, width), fast_mode=fast)


@pytest.mark.parametrize("method", [sigmoid, gaussian])
def test_weighted_gradients_to_third_order(method):
    x, weights = draw(1, 4).requires_grad_(), draw(1, 4, seed=2).abs().requires_grad_()
    width = torch.full((1, 1), 0.6, dtype=x.dtype, requires_grad=True)

    def function(x, weights, width):
        return method.ranks(prepare(x, -1, False, weights, None, True), width)

    def slope(x, weights, width):
        out = function(x, weights, width).square().sum()
        return torch.autograd.grad(out, (x, weights, width), create_graph=True)

    assert torch.autograd.gradcheck(function, (x, weights, width))
    assert torch.autograd.gradcheck(slope, (x, weights, width))
    assert torch.autograd.gradgradcheck(slope, (x, weights, width))


ROWS = (
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [1.0, 2.0, 1.0, 2.0, 2.0, -3.0],
    [1e30, 1e30, -1e30, 0.0, 5.0, 1.0],
    [1e-12, 2e-12, 1e-12, 0.0, -1e-12, 3e-12],
    [1.0, 1.0 + 1e-7, 1.0 - 1e-7, 1e4, 1.0, 2.0],
)


@every
@pytest.mark.parametrize("epsilon", [1e-8, 1e-6, 1e-3, 0.1, 10.0])
def test_gradients_are_finite(name, epsilon):
    x = torch.tensor(ROWS).requires_grad_()
    width = torch.full((len(ROWS), 1), epsilon, requires_grad=True)
    out = operator(name, x, width)
    assert out.isfinite().all()
    weights = draw(*out.shape, dtype=torch.float32)
    first = torch.autograd.grad((out * weights).sum(), (x, width), create_graph=True)
    assert all(gradient.isfinite().all() for gradient in first)
    rows = [0, 1, 4]  # beyond that, second derivatives leave the range of float32
    second = torch.autograd.grad(first[0][rows].sum(), x)[0][rows]
    assert not second.isnan().any()


@every
def test_transforms(name):
    x = draw(3, 5)

    def function(row):
        return operator(name, row, 0.3)

    def loss(row):
        return (function(row) ** 3).sum()

    if name in CASES:
        torch.testing.assert_close(torch.func.vmap(function)(x), function(x))
        widths = torch.tensor([0.1, 0.3], dtype=x.dtype)
        over_widths = torch.func.vmap(lambda width: operator(name, x, width))(widths)
        torch.testing.assert_close(over_widths[1], function(x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(row) for row in leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), expected[0])
    jacobian = torch.func.jacrev(function)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(function, x[0]))
    if name in CASES:
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
        hessian = torch.func.jacrev(torch.func.jacrev(loss))(x[0])
        torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x[0]))


COMPILED = (
    "neuralsort-ranks",
    "softsort-permutation",
    "sigmoid-ranks",
    "gaussian-permutation",
    "bitonic-permutation",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    mask = torch.tensor([True, False, True]).expand(2, 3)

    def function(x):
        rows = prepare(x, -1, False, None, mask, True)
        return CASES[name](rows, 0.3)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = draw(2, 3).requires_grad_()
    expected = operator(name, x, 0.3, mask=mask)
    actual = compiled(x)
    torch.testing.assert_close(actual, expected)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x)[0], slope)
    torch._dynamo.reset()


# Memory.


def numbers_kept(function, *tensors):
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(*tensors)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("method", [sigmoid, gaussian])
def test_pairs_are_not_kept(method):
    x = draw(1, 2000, dtype=torch.float32).requires_grad_()
    assert numbers_kept(lambda x: method.ranks(prepare(x, -1, False, None, None, True), 0.1), x) < 20 * 2000


@pytest.mark.slow
@pytest.mark.parametrize("method", [sigmoid, gaussian])
def test_a_row_of_24000_trains(method):
    x = draw(1, 24_000, dtype=torch.float32).requires_grad_()
    out = method.ranks(prepare(x, -1, False, None, None, True), 0.1)
    out.square().mean().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(
        out.double().sum(), torch.tensor(24_000 * 24_001 / 2, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_permutation_of_a_network_keeps_n_squared():
    n = 64
    x = draw(1, n, dtype=torch.float32).requires_grad_()
    rows = prepare(x, -1, False, None, None, True)
    kept = numbers_kept(lambda _: network.permutation(rows, 0.1, **ODD_EVEN), x)
    assert kept < 20 * n * n  # all layers' products would be n^3 = 64 n^2


# The random form, and what is refused.


def test_noise_follows_the_generator():
    rows = prepare(draw(3, 6), -1, False, None, None, True)
    calm = neuralsort.permutation(rows, 0.5)
    assert torch.equal(neuralsort.permutation(rows, 0.5, noise=0.0), calm)
    first, second, third = (noisy("permutation")(rows, 0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first, calm)


@pytest.mark.parametrize(("noise", "place"), [(1.0, 2), (-1.0, 0)])
def test_noise_draws_from_plackett_luce(noise, place):
    samples = 20_000
    x = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64).expand(samples, 3)
    rows = prepare(x, -1, False, None, None, False)
    generator = torch.Generator().manual_seed(0)
    chosen = neuralsort.permutation(rows, 1e-6, noise=noise, generator=generator)[:, place].mean(0)
    expected = torch.softmax(noise * x[0], -1)
    assert ((chosen - expected).abs() < 4 * (expected * (1 - expected) / samples).sqrt()).all()


def test_what_is_refused():
    x = draw(2, 5)
    weighted, plain = prepare(x, -1, False, x.abs(), None, True), prepare(x, -1, False, None, None, True)
    for function in (neuralsort.ranks, softsort.sorted_values, network.ranks, gaussian.permutation):
        with pytest.raises(ValueError, match=r'weights: expected no weights.*Use method="transport"'):
            function(weighted, 0.1)
    with pytest.raises(ValueError, match="p: expected a finite power"):
        softsort.ranks(plain, 0.1, p=0)
    with pytest.raises(ValueError, match="network: expected one of"):
        network.ranks(plain, 0.1, network="bubble")
    with pytest.raises(ValueError, match="swap: expected one of"):
        network.ranks(plain, 0.1, swap="hard")
    with pytest.raises(ValueError, match="art_lambda: expected"):
        network.ranks(plain, 0.1, swap="cauchy", art_lambda=0.25)


@pytest.mark.parametrize(
    ("method", "options"),
    [(neuralsort, {}), (softsort, {}), (sigmoid, {}), (gaussian, {}), (network, {})],
)
@pytest.mark.parametrize("n", [10, 100, 500])
def test_default_epsilons_are_neither_hard_nor_flat(method, options, n):
    x = draw(10, n)
    ranks = method.ranks(prepare(x, -1, False, None, None, True), method.DEFAULT_EPSILON, **options)
    hard = x.argsort(-1).argsort(-1) + 1.0
    error = ((ranks - hard).square().mean() / hard.var(unbiased=False)).sqrt()
    assert 0.003 < error < 0.2
