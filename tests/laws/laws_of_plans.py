"""Transport and matching: operators on matrices and point sets."""

from __future__ import annotations

import torch
from law_entry import Operator, Outputs, Settings, Source, Tensors, shifted, turned
from torch import Tensor

import couplings as cp
from couplings.testing.dense import linear_program

ONE_PLAN = "a plan has no order to keep"
HARD = "of a general cost a linear program: its value is compared instead (sums of 'solve[small epsilon]')"


def _cost(source: Source) -> tuple[Tensors, Settings]:
    rows, columns = source.mask(source.ROWS, source.n), source.mask(source.ROWS, source.m)
    return {
        "x": source.scores(source.ROWS, source.n, source.m),
        "a": source.masses(rows),
        "b": source.masses(columns),
        "rows": rows,
        "columns": columns,
    }, {}


COST_AXES = {"x": "bnm", "a": "bn", "b": "bm", "rows": "bn", "columns": "bm"}


def _solve(t: Tensors, epsilon: float, s: Settings, **options: object) -> Outputs:
    coupling = cp.solve(
        t["x"],
        t["a"],
        t["b"],
        epsilon=epsilon,
        row_mask=t["rows"],
        column_mask=t["columns"],
        **{"on_fail": "ignore", **options},
    )
    return coupling.plan(), coupling.value


def _marginals(t: Tensors, s: Settings, out: Outputs):
    yield out[0].sum(-1), t["a"]
    yield out[0].sum(-2), t["b"]


def _cost_moves(t: Tensors, source: Source):
    """A constant for each row and each column leaves the plan."""
    moves = source.randn(*t["x"].shape[:2], 1), source.randn(t["x"].shape[0], 1, t["x"].shape[2])
    change = (moves[0][..., 0] * t["a"]).sum(-1) + (moves[1][:, 0] * t["b"]).sum(-1)
    return t, {**t, "x": t["x"] + moves[0] + moves[1]}, lambda out: (out[0], out[1] + change)


def _rows_moved(t: Tensors, source: Source):
    """Sweeps begin with the rows: their constants are gone after the first."""
    move = source.randn(*t["x"].shape[:2], 1)

    def like(out: Outputs) -> Outputs:
        return out[0], *(value + (move[..., 0] * out[0].sum(-1)).sum(-1) for value in out[1:])

    return t, {**t, "x": t["x"] + move}, like


def _ends(t: Tensors) -> Tensor:
    parts = zip(t["x"], t["a"], t["b"], strict=True)
    return torch.tensor([linear_program(x, a, b)[1] for x, a, b in parts], dtype=torch.float64)


def _independent(t: Tensors, s: Settings) -> Outputs:
    return (t["a"][:, :, None] * t["b"][:, None],)


SOLVED = {"order": ONE_PLAN, "hard limit": HARD}


def _solver(name: str, **options: object) -> Operator:
    return Operator(
        "solve",
        _cost,
        lambda t, e, s: _solve(t, e, s, **options),
        COST_AXES,
        ("bnm", "b"),
        name,
        free="nm",
        masks={"n": "rows", "m": "columns"},
        learned=("x", "a", "b"),
        invariances=(_rows_moved if "iterations" in options else _cost_moves,),
        sums=None if "iterations" in options else _marginals,
        flat=None if "iterations" in options else (_independent, 1e9),
        without=SOLVED
        | (
            dict.fromkeys(("sums", "flat limit"), "as many sweeps as were asked for")
            if "iterations" in options
            else {}
        ),
    )


def _unbalanced(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    return _solve(t, epsilon, s, tau_a=0.7, tau_b=1.5)


def _value_only(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    plan = _solve(t, epsilon, s)[0]
    return ((plan * torch.where(plan > 0, t["x"], 0)).sum((-1, -2)),)


PLANS = [
    _solver("newton", solver="newton"),
    _solver("newton_cg", solver="newton_cg"),
    _solver("sinkhorn, 7 sweeps", solver="sinkhorn", iterations=7),
    Operator(
        "solve",
        _cost,
        _unbalanced,
        COST_AXES,
        ("bnm", "b"),
        "unbalanced",
        free="nm",
        masks={"n": "rows", "m": "columns"},
        learned=("x", "a", "b"),
        sums=lambda t, s, out: [(out[0], out[0].clamp_min(0))],
        without=SOLVED
        | {
            "invariance": "a dearer cost leaves mass out",
            "flat limit": "the marginals are priced: tests/transport/test_unbalanced.py",
        },
    ),
    Operator(
        "solve",
        _cost,
        _value_only,
        COST_AXES,
        ("b",),
        "cost of the plan",
        free="nm",
        masks={"n": "rows", "m": "columns"},
        hard=(lambda t, s: (_ends(t),), 1e-4),
        flat=(lambda t, s: ((_independent(t, s)[0] * t["x"]).sum((-1, -2)),), 1e9),
        without={
            "order": ONE_PLAN,
            "sums": "see the other entries of solve",
            "invariance": "see the other entries of solve",
            "gradients": "see the other entries of solve",
        },
    ),
]


def _line(source: Source) -> tuple[Tensors, Settings]:
    mask = source.mask(source.ROWS, source.n)
    y = source.randn(source.ROWS, source.m).sort(-1).values
    return {
        "x": source.scores(*mask.shape),
        "y": y,
        "a": source.masses(mask),
        "b": source.masses(torch.ones(y.shape, dtype=torch.bool)),
        "mask": mask,
    }, {}


def _points(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    plan = cp.transport.solve_points(
        t["x"], t["y"], t["a"], t["b"], epsilon=epsilon, mask=t["mask"], on_fail="ignore"
    ).plan()
    mean = (plan * t["y"].unsqueeze(-2)).sum(-1) / torch.where(t["mask"], t["a"], 1)
    return plan, mean


def _both_moved(t: Tensors, source: Source):
    move = source.randn(t["x"].shape[0], 1)
    return t, {**t, "x": t["x"] + move}, lambda out: out


POINTS = Operator(
    "transport.solve_points",
    _line,
    _points,
    {"x": "bn", "y": "bm", "a": "bn", "b": "bm", "mask": "bn"},
    ("bnm", "bn"),
    free="n",
    masks={"n": "mask"},
    learned=("x", "y", "a", "b"),
    invariances=(_both_moved,),  # x alone: a constant of each target
    ordered=("x", 1),
    sums=_marginals,
    flat=(lambda t, s: (_independent(t, s)[0],), 1e9),
    without={
        "hard limit": "tests/transport/test_points.py, against the sorted plan",
        "half": "the table divides the rounded plan by rounded masses",
    },
)


def _clouds(source: Source) -> tuple[Tensors, Settings]:
    x_mask, y_mask = source.mask(source.ROWS, source.n), source.mask(source.ROWS, source.m)
    return {
        "x": source.scores(*x_mask.shape, 3),
        "y": source.scores(*y_mask.shape, 3),
        "a": source.masses(x_mask),
        "b": source.masses(y_mask),
        "x_mask": x_mask,
        "y_mask": y_mask,
    }, {}


def _moved_clouds(t: Tensors, source: Source):
    move = source.randn(t["x"].shape[0], 1, 3)
    return t, {**t, "x": t["x"] + move, "y": t["y"] + move}, lambda out: out


DIVERGENCE = Operator(
    "sinkhorn_divergence",
    _clouds,
    lambda t, e, s: (
        cp.sinkhorn_divergence(
            t["x"], t["y"], t["a"], t["b"], epsilon=e, x_mask=t["x_mask"], y_mask=t["y_mask"]
        ),
    ),
    {"x": "bnd", "y": "bmd", "a": "bn", "b": "bm", "x_mask": "bn", "y_mask": "bm"},
    ("b",),
    free="nmd",
    masks={"n": "x_mask", "m": "y_mask"},
    learned=("x", "y", "a", "b"),
    invariances=(turned("x", "y"), _moved_clouds),
    sums=lambda t, s, out: [(out[0], out[0].clamp_min(0))],
    without={
        "order": "one number",
        "hard limit": "tests/transport/test_divergence.py",
        "flat limit": "tests/transport/test_divergence.py",
    },
)


# ---------------------------------------------------------------------------------- spread and interpolate

BOXES = cp.transport.ChebyshevBoxes(-1.0, 1.0, 3, 5)


def _in_boxes(source: Source) -> tuple[Tensors, Settings]:
    points = 2 * source.positive(source.ROWS, source.n).clamp_max(0.99) - 1
    return {"points": points, "x": source.randn(source.ROWS, source.n, 2)}, {}


def _at_nodes(source: Source) -> tuple[Tensors, Settings]:
    tensors, settings = _in_boxes(source)
    return {
        "points": tensors["points"],
        "x": source.randn(source.ROWS, BOXES.count * BOXES.degree, 2),
    }, settings


NO_EPSILON = dict.fromkeys(("hard limit", "flat limit"), "no epsilon")
LINEAR = NO_EPSILON | {
    "order": "a linear operator",
    "padding": "no mask: a zero value adds nothing",
    "invariance": "a linear operator, exact for polynomials: tests/transport/test_operators.py",
    "nan": "a NaN stays in its box and its payload",
}
BOXED = [
    Operator(
        "transport.spread",
        _in_boxes,
        lambda t, e, s: (cp.transport.spread(t["points"], t["x"], BOXES),),
        {"points": "bn", "x": "bnd"},
        ("bqd",),
        free="nd",
        learned=("x", "points"),
        sums=lambda t, s, out: [(out[0].sum(1), t["x"].sum(1))],
        without=LINEAR,
    ),
    Operator(
        "transport.interpolate",
        _at_nodes,
        lambda t, e, s: (cp.transport.interpolate(t["points"], t["x"], BOXES),),
        {"points": "bn", "x": "bqd"},
        ("bnd",),
        free="nd",
        learned=("x", "points"),
        without=LINEAR | {"sums": "of a constant it is the constant: tests/transport/test_operators.py"},
    ),
]


# -------------------------------------------------------------------------------------------------- dustbins


def _scores(source: Source) -> tuple[Tensors, Settings]:
    return {
        "x": 3 * source.scores(source.ROWS, source.n, source.m),
        "dustbin": source.randn(source.ROWS),
        "rows": source.mask(source.ROWS, source.n),
        "columns": source.mask(source.ROWS, source.m),
    }, {}


def _pairs(source: Source) -> tuple[Tensors, Settings]:
    tensors, settings = _scores(source)
    tensors["bin_rows"] = source.randn(source.ROWS, source.n)
    tensors["bin_columns"] = source.randn(source.ROWS, source.m)
    del tensors["dustbin"]
    return tensors, settings


BLOCKS = ("bnm", "bn", "bm", "b")
SCORE_AXES = {"x": "bnm", "dustbin": "b", "rows": "bn", "columns": "bm"}
PAIR_AXES = {"x": "bnm", "rows": "bn", "columns": "bm", "bin_rows": "bn", "bin_columns": "bm"}


def blocks(plan: Tensor) -> Outputs:
    """The true part, the rows' and the columns' dustbins, the corner."""
    return plan[..., :-1, :-1], plan[..., :-1, -1], plan[..., -1, :-1], plan[..., -1, -1]


def _match(t: Tensors, epsilon: float, s: Settings, **options: object) -> Outputs:
    dustbin = t["dustbin"] if "dustbin" in t else (t["bin_rows"], t["bin_columns"])
    coupling = cp.match_with_dustbin(
        t["x"],
        dustbin,
        row_mask=t["rows"],
        column_mask=t["columns"],
        epsilon=epsilon,
        on_fail="ignore",
        **options,
    )
    return blocks(coupling.plan())


def _dustbin_sums(t: Tensors, s: Settings, out: Outputs):
    core, rows, columns, corner = out
    n, m = t["rows"].double(), t["columns"].double()
    yield core.sum(-1) + rows, n
    yield core.sum(-2) + columns, m
    yield rows.sum(-1) + corner, n.sum(-1)
    yield columns.sum(-1) + corner, m.sum(-1)
    yield core.sum((-1, -2)), corner  # the corner balances


def _all_moved(t: Tensors, source: Source):
    """One constant for scores and dustbins alike."""
    move = source.randn(t["x"].shape[0])
    return t, {**t, "x": t["x"] + move[:, None, None], "dustbin": t["dustbin"] + move}, lambda out: out


def _pair_moved(t: Tensors, source: Source):
    """A constant of a row in its scores and its dustbin."""
    move = source.randn(*t["rows"].shape)
    return t, {**t, "x": t["x"] + move[..., None], "bin_rows": t["bin_rows"] + move}, lambda out: out


MATCHED = {"order": ONE_PLAN, "hard limit": "tests/matching: an assignment with dustbins"}
FLAT = {"flat limit": "tests/transport: that of solve"}


def _matching(name: str, draw, axes, move, **options: object) -> Operator:
    exact = "iterations" not in options and "method" not in options
    free = {} if exact else {"sums": "as far as asked for: the residual is to be read"}
    return Operator(
        "match_with_dustbin",
        draw,
        lambda t, e, s: _match(t, e, s, **options),
        axes,
        BLOCKS,
        name,
        free="nm",
        masks={"n": "rows", "m": "columns"},
        learned=tuple(k for k in axes if k not in ("rows", "columns")),
        invariances=(move,) if move else (),
        sums=_dustbin_sums if exact else None,
        without=MATCHED | FLAT | free | ({} if move else {"invariance": "matchability is absolute"}),
    )


def _log_ot(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    return blocks(cp.log_optimal_transport(t["x"], t["dustbin"], s["iters"]).exp())


def _unmasked(iters: int | None):
    def draw(source: Source) -> tuple[Tensors, Settings]:
        tensors, _ = _scores(source)
        return {k: tensors[k] for k in ("x", "dustbin")}, {"iters": iters}

    return draw


def _log_sums(t: Tensors, s: Settings, out: Outputs):
    ones = {
        "rows": torch.ones_like(out[1], dtype=torch.bool),
        "columns": torch.ones_like(out[2], dtype=torch.bool),
    }
    return _dustbin_sums({**t, **ones}, s, out)


def _published(name: str, iters: int | None) -> Operator:
    return Operator(
        "log_optimal_transport",
        _unmasked(iters),
        _log_ot,
        {"x": "bnm", "dustbin": "b"},
        BLOCKS,
        name,
        free="nm",
        learned=("x", "dustbin"),
        invariances=(_all_moved,),
        sums=_log_sums if iters is None else None,
        without=MATCHED
        | dict.fromkeys(("hard limit", "flat limit"), "epsilon is 1")
        | {
            "padding": "no masks: match_with_dustbin has them",
            "half": "of the logarithm, which the table exponentiates",
        }
        | ({} if iters is None else {"sums": "as far as the sweeps went"}),
    )


DUSTBINS = [
    _matching("one score", _scores, SCORE_AXES, _all_moved),
    _matching("a pair", _pairs, PAIR_AXES, _pair_moved),
    _matching("5 sweeps", _scores, SCORE_AXES, _all_moved, iterations=5),
    _matching("dual softmax", _scores, SCORE_AXES, None, method="dual_softmax"),
    _published("certified", None),
    _published("5 sweeps", 5),
]


# ------------------------------------------------------------------------------------- readings, normalisation


def _plan_blocks(source: Source) -> tuple[Tensors, Settings]:
    shape = source.ROWS, source.n, source.m
    return (
        {
            "x": -source.randn(*shape).abs(),  # logarithms of a plan
            "row_bin": source.randn(*shape[:2]),
            "column_bin": source.randn(source.ROWS, source.m),
        },
        {},
    )


def _joined(t: Tensors) -> Tensor:
    side = torch.cat((t["x"], t["row_bin"].unsqueeze(-1)), -1)
    last = torch.nn.functional.pad(t["column_bin"], (0, 1))
    return torch.cat((side, last.unsqueeze(-2)), -2)


def _one_hot(columns: Tensor, m: int) -> Tensor:
    """(b, n, m) of column numbers, zero for -1."""
    return torch.nn.functional.one_hot(columns + 1, m + 1)[..., 1:]


def _mutual(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    found = cp.mutual_matches(_joined(t), 0.2)
    return found.confidence, _one_hot(found.indices, t["x"].shape[-1]).to(found.confidence.dtype)


DISCRETE = NO_EPSILON | {"order": "a reading of a plan"}
READINGS = [
    Operator(
        "mutual_matches",
        _plan_blocks,
        _mutual,
        {"x": "bnm", "row_bin": "bn", "column_bin": "bm"},
        ("bn", "bnm"),
        free="nm",
        learned=("x",),
        sums=lambda t, s, out: [
            (out[1].sum(-1), out[1].sum(-1).clamp_max(1)),
            (out[1].sum(-2), out[1].sum(-2).clamp_max(1)),
            (out[0], (out[1] * t["x"].exp()).sum(-1)),
        ],
        without=DISCRETE
        | {
            "padding": "masked entries are -inf in the plan it reads: tests/matching/test_assignment.py",
            "invariance": "the threshold is absolute",
            "nan": "documented: NaN matches nothing",
        },
    ),
    Operator(
        "hard_assignment",
        lambda source: (
            {
                "x": source.randn(source.ROWS, source.n, source.m),
                "rows": source.mask(source.ROWS, source.n),
                "columns": source.mask(source.ROWS, source.m),
            },
            {},
        ),
        lambda t, e, s: (
            _one_hot(
                cp.hard_assignment(t["x"], row_mask=t["rows"], column_mask=t["columns"]), t["x"].shape[-1]
            ).to(t["x"].dtype),
        ),
        {"x": "bnm", "rows": "bn", "columns": "bm"},
        ("bnm",),
        free="nm",
        masks={"n": "rows", "m": "columns"},
        invariances=(shifted("x"),),
        sums=lambda t, s, out: [
            (out[0].sum((-1, -2)), torch.minimum(t["rows"].sum(-1), t["columns"].sum(-1)).double())
        ],
        without=DISCRETE | {"gradients": "discrete", "nan": "documented: NaN raises"},
    ),
]


def _logits(source: Source) -> tuple[Tensors, Settings]:
    m = source.n if source.m % 2 else source.m  # square, small ones have a path of their own
    return {"x": 2 * source.scores(source.ROWS, source.n, m)}, {"seed": source.drawn.seed}


def _stochastic_sums(t: Tensors, s: Settings, out: Outputs):
    n, m = t["x"].shape[-2:]
    yield out[0].sum(-1), torch.ones_like(out[0][..., 0])
    yield out[0].sum(-2), torch.full_like(out[0][..., 0, :], n / m)


def _lines_moved(t: Tensors, source: Source):
    x = t["x"]
    return (
        t,
        {"x": x + source.randn(*x.shape[:2], 1) + source.randn(x.shape[0], 1, x.shape[2])},
        lambda out: out,
    )


BISTOCHASTIC = {
    "order": ONE_PLAN,
    "padding": "no mask: -inf forbids a pair, and no row may be without one",
    "hard limit": "the logits carry it: tests/matching",
    "flat limit": "the logits carry it: tests/matching",
}


def _normalized(name: str, call, *, sums=True, free="nm", move=_lines_moved, without=None) -> Operator:
    function, _, variant = name.partition(" ")
    return Operator(
        function,
        _logits,
        call,
        {"x": "bnm"},
        ("bnm",),
        variant,
        free=free,
        learned=("x",),
        invariances=(move,),
        sums=_stochastic_sums if sums else None,
        without=BISTOCHASTIC | (without or {}),
    )


SWEPT = {"sums": "as far as the sweeps went"}
NORMALIZED = [
    _normalized(
        "sinkhorn_normalize certified", lambda t, e, s: (cp.sinkhorn_normalize(t["x"], on_fail="ignore"),)
    ),
    _normalized(
        "sinkhorn_normalize sweeps",
        lambda t, e, s: (cp.sinkhorn_normalize(t["x"], iterations=4),),
        sums=False,
        move=_rows_moved,
        without=SWEPT,
    ),
    _normalized(
        "gumbel_sinkhorn quiet",
        lambda t, e, s: (cp.gumbel_sinkhorn(t["x"], epsilon=10 * e, noise=0.0, on_fail="ignore"),),
    ),
    _normalized(
        "gumbel_sinkhorn noisy",
        lambda t, e, s: (
            cp.gumbel_sinkhorn(
                t["x"],
                epsilon=10 * e,
                generator=torch.Generator().manual_seed(s["seed"]),
                on_fail="ignore",
            ),
        ),
        free="",
        without=dict.fromkeys(
            ("permutation", "alone"), "noise is drawn by place: another place, another draw"
        ),
    ),
]

OPERATORS = [*PLANS, POINTS, DIVERGENCE, *BOXED, *DUSTBINS, *READINGS, *NORMALIZED]
