"""Spread and interpolate: adjoint, exact on polynomials, mass kept, rows alone, pieces like the whole."""

import pytest
import torch

from couplings.testing import score_rows
from couplings.transport import nodes
from couplings.transport.nodes import Boxes as AnyBoxes
from couplings.transport.nodes import Cells, Chained, Exact, Grid, Shared

DEGREE = 7
KINDS = ("normal", "uniform", "heavy", "clustered", "tied", "outlier", "geometric", "constant")


def Boxes(points, count, degree, present=None, ends=None, **options):
    """Boxes from the least to the largest point."""
    return AnyBoxes(points, ends_of(points) if ends is None else ends, count, degree, present, **options)


def ends_of(points):
    return points.amin(-1, keepdim=True), points.amax(-1, keepdim=True)


def exact(points):
    return Exact(points)


def boxes(points):
    return Boxes(points, 5, DEGREE)


def cells(points):
    low, high = points.aminmax()
    return Cells(points, low + (high - low) * torch.tensor([0.3, 0.35, 0.7], dtype=torch.float64), DEGREE)


def bisected(points):
    side = cells(points)
    return side.bisected(torch.ones(len(side.low), dtype=torch.bool))


def chained(points):
    fine = Boxes(points, 64, DEGREE)
    return Chained(fine, Boxes(fine.nodes, 5, DEGREE, fine.live, ends_of(points)))


def chained_cells(points):
    fine = Boxes(points, 64, DEGREE)
    kept = fine.live[0].nonzero()[:, 0]
    inner = fine.nodes[:, kept]
    low, high = inner.aminmax()
    return Chained(fine, Cells(inner, ((low + high) / 2)[None], DEGREE), kept)


LAYOUTS = {f.__name__: f for f in (exact, boxes, cells, bisected, chained, chained_cells)}
ONE_ROW = ("cells", "bisected", "chained_cells")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
kinds = pytest.mark.parametrize("kind", KINDS)


def points_for(layout, kind, n=150, rows=3):
    return score_rows(kind, 1 if layout in ONE_ROW else rows, n, seed=3)


def scale(side):
    """Positions in [-1, 1] over the range of each row."""
    low, high = side.points.amin(-1, keepdim=True), side.points.amax(-1, keepdim=True)
    return lambda t: torch.where(high > low, 2 * (t - low) / (high - low) - 1, 0.0)


@layouts
@kinds
@pytest.mark.parametrize("d", [1, 6])
def test_adjoint(layout, kind, d):
    points = points_for(layout, kind)
    side = LAYOUTS[layout](points)
    weight = torch.randn(*points.shape, d, dtype=torch.float64)
    value = torch.randn(*side.nodes.shape, d, dtype=torch.float64)
    spread, between = side.spread(weight), side.interpolate(value)
    assert spread.shape == value.shape
    assert between.shape == weight.shape
    left, right = (spread * value).sum((1, 2)), (weight * between).sum((1, 2))
    size = spread.abs().sum((1, 2)) + weight.abs().sum((1, 2))
    assert ((left - right).abs() <= 1e-13 * size).all()


@layouts
@kinds
def test_polynomials_below_the_degree(layout, kind):
    side = LAYOUTS[layout](points_for(layout, kind))
    powers = torch.arange(DEGREE)
    value, expected = (scale(side)(t).unsqueeze(-1) ** powers for t in (side.nodes, side.points))
    torch.testing.assert_close(side.interpolate(value), expected, atol=1e-12, rtol=0)


@layouts
@kinds
def test_mass_and_first_moments(layout, kind):
    points = points_for(layout, kind)
    side = LAYOUTS[layout](points)
    weight = torch.rand(*points.shape, 1, dtype=torch.float64)
    held = side.spread(weight)
    torch.testing.assert_close(held.sum(1), weight.sum(1), atol=0, rtol=1e-12)
    unit = scale(side)
    for order in range(DEGREE):
        there = (held.squeeze(-1) * unit(side.nodes) ** order).sum(-1)
        here = (weight.squeeze(-1) * unit(points) ** order).sum(-1)
        assert ((there - here).abs() <= 1e-11 * weight.sum((1, 2))).all()


@layouts
@kinds
def test_no_mass_where_nobody_lives(layout, kind):
    points = points_for(layout, kind)
    side = LAYOUTS[layout](points)
    weight = torch.rand(*points.shape, 2, dtype=torch.float64)
    assert (side.spread(weight)[~side.live] == 0).all()
    value = torch.rand(*side.nodes.shape, 2, dtype=torch.float64)
    kept = side.interpolate(value)
    value[~side.live] = 1e300
    if layout != "chained":  # its fine nodes are asked everywhere, and weigh nothing where nobody lives
        assert torch.equal(side.interpolate(value), kept)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ONE_ROW])
@kinds
def test_rows_are_independent(layout, kind):
    points = points_for(layout, kind)
    other = points.clone()
    other[0], other[2] = 1e6 * torch.randn(points.shape[1], dtype=torch.float64), 0.0
    a, b = LAYOUTS[layout](points), LAYOUTS[layout](other)
    weight = torch.randn(*points.shape, 2, dtype=torch.float64)
    changed = weight.clone()
    changed[0], changed[2] = torch.nan, 1e200
    assert torch.equal(a.spread(weight)[1], b.spread(changed)[1])
    value = torch.randn(*a.nodes.shape, 2, dtype=torch.float64)
    changed = value.clone()
    changed[0] = torch.inf
    assert torch.equal(a.interpolate(value)[1], b.interpolate(changed)[1])
    alone = LAYOUTS[layout](points[1:2])
    torch.testing.assert_close(alone.spread(weight[1:2]), a.spread(weight)[1:2], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(alone.interpolate(value[1:2]), a.interpolate(value)[1:2], atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("layout", ["boxes", "chained"])
@pytest.mark.parametrize("even", [False, True])
def test_pieces_like_the_whole(layout, rows, even, monkeypatch):
    points = score_rows("normal", rows, 150, seed=3)
    weight = torch.randn(*points.shape, 2, dtype=torch.float64)
    if even:  # one number for all entries of a row, in no memory
        weight = torch.rand(rows, 1, 1, dtype=torch.float64).expand(rows, 150, 1)
    whole = LAYOUTS[layout](points)
    value = torch.randn(*whole.nodes.shape, 2, dtype=torch.float64)
    for chunk in (37, 150, 151, 400):
        monkeypatch.setattr(nodes, "CHUNK", chunk)
        pieces = LAYOUTS[layout](points)
        assert torch.equal(pieces.nodes, whole.nodes)
        assert torch.equal(pieces.live, whole.live)
        torch.testing.assert_close(pieces.spread(weight), whole.spread(weight), atol=1e-12, rtol=0)
        torch.testing.assert_close(pieces.interpolate(value), whole.interpolate(value), atol=1e-12, rtol=0)


@pytest.mark.parametrize("degree", [2, 3, 4, 5])
@pytest.mark.parametrize("d", [1, 3, 6])
@kinds
def test_powers_like_chebyshev(degree, d, kind, monkeypatch):
    """The few first degrees have a basis of their own."""
    points = score_rows(kind, 3, 150, seed=3)
    found = []
    for powers in (0, 99):
        monkeypatch.setattr(nodes, "POWERS", powers)
        side = Boxes(points, 5, degree)
        weight = torch.rand(3, 150, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        value = torch.randn(3, 5 * degree, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        even = weight[:, :1, :1].expand(3, 150, 1)
        found.append((side.spread(weight), side.interpolate(value), side.spread(even)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("degree", [4, DEGREE])
@pytest.mark.parametrize("single", [False, True])
def test_contract_like_interpolate(degree, single):
    points = score_rows("normal", 3, 150, seed=3)
    side = Boxes(points, 5, degree, single=single)
    value = torch.randn(3, 5 * degree, 4, dtype=torch.float64)
    weights = [torch.randn(3, 150, dtype=torch.float64) for _ in range(4)]
    weights[1], weights[3] = (torch.rand(3, 1, dtype=torch.float64).expand(3, 150) for _ in range(2))
    expected = (side.interpolate(value, double=True) * torch.stack(weights, -1)).sum(-1)
    found = side.contract(value, weights)
    assert found.dtype == (torch.float32 if single else torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=2e-5 if single else 1e-12, rtol=0)


@pytest.mark.parametrize("degree", [4, DEGREE])
@pytest.mark.parametrize("d", [1, 6])
@pytest.mark.parametrize("places", [1, 2, 5, 64, 65, 150, 1000])
def test_grid_like_boxes(places, degree, d):
    """Even places, a box's worth of them at a time: the operators of boxes over the same places."""
    grid = Grid(places, 16, degree, torch.device("cpu"))
    points = torch.arange(places, dtype=torch.float64)[None] / max(1, places - 1)
    assert torch.equal(grid.points, points)
    assert grid.count <= 16
    assert grid.live.all()
    assert float(grid.high) >= 1
    weight = torch.randn(1, places, d, dtype=torch.float64)
    value = torch.randn(1, grid.count * degree, d, dtype=torch.float64)
    spread, between = grid.spread(weight), grid.interpolate(value)
    left, right = (spread * value).sum(), (weight * between).sum()
    torch.testing.assert_close(left, right, atol=1e-11, rtol=1e-12)
    if places > 1:
        # half a step to the left, so that rounding puts no place into another box; the polynomials are the same
        step = 0.5 / (places - 1)
        boxes = Boxes(points, grid.count, degree, ends=(grid.low - step, grid.high - step))
        power = torch.arange(degree)
        there, here = (nodes_.unsqueeze(-1) ** power for nodes_ in (boxes.nodes, grid.nodes))
        torch.testing.assert_close(boxes.interpolate(there), grid.interpolate(here), atol=1e-11, rtol=0)
    torch.testing.assert_close(spread.sum(1), weight.sum(1), atol=1e-11, rtol=0)
    single = Grid(places, 16, degree, torch.device("cpu"), single=True).interpolate(value)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), between, atol=2e-5, rtol=0)


def test_more_points_than_a_piece():
    n = nodes.CHUNK + 1000
    points = torch.rand(2, n, dtype=torch.float64)
    side = Boxes(points, 3, 8)
    weight = torch.rand(2, n, 1, dtype=torch.float64)
    torch.testing.assert_close(side.spread(weight).sum(1), weight.sum(1), atol=0, rtol=1e-12)
    torch.testing.assert_close(
        side.interpolate((3 * side.nodes**2 - 1).unsqueeze(-1)).squeeze(-1),
        3 * points**2 - 1,
        atol=1e-12,
        rtol=0,
    )


def test_single_precision_is_only_that_of_the_values():
    points = score_rows("normal", 3, 200, seed=1)
    side, single = Boxes(points, 4, 9), Boxes(points, 4, 9, single=True)
    weight = torch.rand(3, 200, 2, dtype=torch.float64)
    assert torch.equal(side.spread(weight), single.spread(weight))
    value = torch.sin(side.nodes).unsqueeze(-1)
    assert single.interpolate(value).dtype == torch.float32
    torch.testing.assert_close(single.interpolate(value).double(), side.interpolate(value), atol=1e-6, rtol=0)


def test_shared_like_one_by_one():
    points = score_rows("uniform", 1, 60, seed=2)
    one = Boxes(points, 3, 8)
    shared = Shared(one)
    weight = torch.randn(4, 60, 2, dtype=torch.float64)
    value = torch.randn(4, one.nodes.shape[1], 2, dtype=torch.float64)
    for row in range(4):
        pick = slice(row, row + 1)
        torch.testing.assert_close(shared.spread(weight)[pick], one.spread(weight[pick]), atol=1e-13, rtol=0)
        torch.testing.assert_close(
            shared.interpolate(value)[pick], one.interpolate(value[pick]), atol=1e-13, rtol=0
        )
    same = torch.rand(1, 60, 1, dtype=torch.float64).expand(4, 60, 1)
    torch.testing.assert_close(shared.spread(same).expand(4, -1, 1)[2:3], one.spread(same[:1]))


@pytest.mark.parametrize("kind", KINDS)
def test_tails_are_zero_of_what_is_resolved_and_large_of_what_is_not(kind):
    side = Boxes(score_rows(kind, 2, 100, seed=1), 2, DEGREE)
    middle = side.nodes.mean(-1, keepdim=True)
    width = (side.nodes.amax(-1, keepdim=True) - side.nodes.amin(-1, keepdim=True)).clamp_min(1e-300)
    t = (side.nodes - middle) / width
    smooth = torch.stack((t**2, t**4), 1)
    assert side.tails(smooth).max() < 1e-12
    assert side.tails(torch.cos(40 * t).unsqueeze(1)).max() > 1e-2
