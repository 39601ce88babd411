"""spread and interpolate: adjoint, against Lagrange's formula, to any order, under every transform."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from couplings.transport import ChebyshevBoxes, interpolate, nodes, spread

BOXES = ChebyshevBoxes(-1.0, 2.0, count=3, degree=5)
FUNCTIONS = {"spread": spread, "interpolate": interpolate}
each = pytest.mark.parametrize("name", FUNCTIONS)


def cardinals(points, boxes):
    """l_q(points_i), (*batch, n, count * degree), by Lagrange's products; differentiable."""
    width = (boxes.high - boxes.low) / boxes.count
    box = ((points.detach() - boxes.low) / width).floor().clamp(0, boxes.count - 1)
    place = boxes.nodes().reshape(boxes.count, boxes.degree)
    parts = []
    for number, here in enumerate(place):
        inside = (box == number).to(points.dtype)
        for q in range(boxes.degree):
            others = torch.cat((here[:q], here[q + 1 :]))
            part = ((points.unsqueeze(-1) - others) / (here[q] - others)).prod(-1)
            parts.append(part * inside)
    return torch.stack(parts, -1)


def dense(name, points, values, boxes=BOXES):
    matrix = cardinals(points, boxes)
    return matrix.mT @ values if name == "spread" else matrix @ values


def draw(name, *batch, n=9, d=2, boxes=BOXES):
    points = boxes.low + (boxes.high - boxes.low) * torch.rand(*batch, n, dtype=torch.float64)
    rows = n if name == "spread" else boxes.count * boxes.degree
    return points.requires_grad_(), torch.randn(*batch, rows, d, dtype=torch.float64).requires_grad_()


@each
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
@pytest.mark.parametrize("d", [1, 2, 6])
@pytest.mark.parametrize("degree", [2, 3, 8])
def test_like_lagrange(name, batch, d, degree):
    boxes = ChebyshevBoxes(-3.0, -1.0, 4, degree)
    points, values = draw(name, *batch, d=d, boxes=boxes)
    expected = dense(name, points, values, boxes)
    torch.testing.assert_close(FUNCTIONS[name](points, values, boxes), expected, atol=1e-13, rtol=1e-13)


def test_adjoint():
    points, weights = draw("spread", 4, n=50)
    values = torch.randn(4, 15, 2, dtype=torch.float64)
    left = (spread(points, weights, BOXES) * values).sum()
    right = (weights * interpolate(points, values, BOXES)).sum()
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)


@each
@pytest.mark.parametrize("d", [1, 3])
def test_first_and_second_derivative(name, d):
    inputs = draw(name, 2, d=d)
    assert gradcheck(lambda x, v: FUNCTIONS[name](x, v, BOXES), inputs)
    assert gradgradcheck(lambda x, v: FUNCTIONS[name](x, v, BOXES), inputs)


def derivatives(function, points, values, orders):
    """Of a scalar, nested: each order differentiates a weighted sum of the last gradients."""
    found, total = [], function(points, values).sin().sum()
    for _ in range(orders):
        grads = torch.autograd.grad(total, (points, values), create_graph=True)
        found += grads
        total = sum((grad * torch.arange(grad.numel()).reshape(grad.shape)).sum() for grad in grads)
    return found


@each
def test_to_the_fourth_order(name):
    points, values = draw(name, 2)
    found = derivatives(lambda x, v: FUNCTIONS[name](x, v, BOXES), points, values, 4)
    expected = derivatives(lambda x, v: dense(name, x, v), points, values, 4)
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-9 * float(wanted.detach().abs().max()))


@each
def test_derivatives_beyond_the_degree_vanish(name):
    boxes = ChebyshevBoxes(0.0, 1.0, 2, 3)
    points, values = draw(name, boxes=boxes)
    total = FUNCTIONS[name](points, values, boxes).sum()
    if name == "spread":  # the cardinals sum to 1 wherever the points are
        (first,) = torch.autograd.grad(total, points)
        torch.testing.assert_close(first, torch.zeros_like(first), atol=1e-12, rtol=0)
        return
    for _ in range(3):
        (grad,) = torch.autograd.grad(total, points, create_graph=True)
        total = grad.sum()
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-9, rtol=0)


@each
def test_transforms(name):
    points, values = (t.detach() for t in draw(name, 3))

    def loss(x, v):
        return FUNCTIONS[name](x, v, BOXES).square().sum()

    plain = torch.func.grad(loss, (0, 1))(points, values)
    mapped = torch.vmap(torch.func.grad(loss, (0, 1)))(points, values)
    expected = torch.func.grad(lambda x, v: dense(name, x, v).square().sum(), (0, 1))(points, values)
    for found in (plain, mapped):
        for grad, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, wanted, atol=1e-10, rtol=1e-10)
    shared = torch.vmap(loss, in_dims=(None, 0))(points[0], values)
    alone = torch.stack([loss(points[0], v) for v in values])
    torch.testing.assert_close(shared, alone, atol=1e-12, rtol=1e-12)
    second = torch.func.jacrev(torch.func.jacrev(lambda x: loss(x, values[0])))(points[0])
    wanted = torch.autograd.functional.hessian(lambda x: dense(name, x, values[0]).square().sum(), points[0])
    torch.testing.assert_close(second, wanted, atol=1e-9, rtol=1e-9)


@each
def test_compile_fullgraph(name):
    points, values = draw(name, 2)

    def loss(x, v):
        return FUNCTIONS[name](x, v, BOXES).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(points, values), (points, values))
    found = torch.autograd.grad(compiled(points, values), (points, values))
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@each
def test_points_outside_are_nan_where_nobody_may_look(name):
    points, values = (t.detach() for t in draw(name, 2))
    points[0, 0] = 7.0
    found = torch.vmap(lambda x, v: FUNCTIONS[name](x, v, BOXES))(points, values)
    assert found[0].isnan().any()
    assert found[1].isfinite().all()


@each
@pytest.mark.parametrize("n", [1, 40, nodes.CHUNK + 7])
def test_long_rows_and_single_precision(name, n):
    points, values = draw(name, 2, n=n)
    found = FUNCTIONS[name](points.float(), values.float(), BOXES)
    assert found.dtype == torch.float32
    wanted = FUNCTIONS[name](points.detach().float().double(), values.detach().float().double(), BOXES)
    torch.testing.assert_close(found.double(), wanted, atol=0, rtol=1e-6)
    grads = torch.autograd.grad(FUNCTIONS[name](points, values, BOXES).sin().sum(), (points, values))
    if n < 100:
        expected = torch.autograd.grad(dense(name, points, values).sin().sum(), (points, values))
        for grad, one in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, one, atol=1e-11, rtol=1e-11)


@each
def test_nothing_in_nothing_out(name):
    for batch, n, d in (((0,), 4, 1), ((2,), 0, 1), ((2,), 4, 0)):
        points, values = draw(name, *batch, n=n, d=d)
        found = FUNCTIONS[name](points, values, BOXES)
        assert found.shape == dense(name, points, values).shape
        assert (found == 0).all()
        torch.autograd.grad(found.sum(), (points, values))


POINTS, VALUES = torch.rand(3), torch.rand(3, 1)


@pytest.mark.parametrize(
    ("points", "values", "boxes", "error", "word"),
    [
        (POINTS.long(), VALUES, BOXES, TypeError, "points"),
        (POINTS, VALUES.double(), BOXES, TypeError, "values"),
        (POINTS, VALUES[:2], BOXES, ValueError, "values"),
        (POINTS, VALUES[:, 0], BOXES, ValueError, "values"),
        (POINTS[0], VALUES[0], BOXES, ValueError, "points"),
        (POINTS + 9, VALUES, BOXES, ValueError, "points"),
        (POINTS * torch.nan, VALUES, BOXES, ValueError, "points"),
        (POINTS, VALUES, 3, TypeError, "boxes"),
    ],
)
def test_bad_input(points, values, boxes, error, word):
    with pytest.raises(error, match=rf"^{word}: expected .*, got "):
        spread(points, values, boxes)


@pytest.mark.parametrize(
    ("low", "high", "count", "degree", "error", "word"),
    [
        (0, 1, 2.0, 4, TypeError, "count"),
        (0, 1, 0, 4, ValueError, "count"),
        (0, 1, 2, 1, ValueError, "degree"),
        ("0", 1, 2, 4, TypeError, "low"),
        (1, 1, 2, 4, ValueError, "high"),
        (0, float("nan"), 2, 4, ValueError, "high"),
    ],
)
def test_bad_boxes(low, high, count, degree, error, word):
    with pytest.raises(error, match=rf"^{word}: expected .*, got "):
        ChebyshevBoxes(low, high, count, degree)
