"""Selection and ordering: operators on rows of scores."""

from __future__ import annotations

import torch
from law_entry import Operator, Outputs, Settings, Source, Tensors, affine, as_values
from torch import Tensor

import couplings as cp
from couplings.ordering.methods import METHODS
from couplings.selection.api import MASK_METHODS, SORTED_METHODS

NOISE = "noise is drawn by place: another place, another draw"
KINKED = "its limits are tested against its own definition beside the operator"


def generator(settings: Settings) -> torch.Generator:
    return torch.Generator().manual_seed(settings["seed"])


# ------------------------------------------------------------------------------------------------ selection


def _rows(source: Source) -> tuple[Tensors, Settings]:
    x = source.scores(source.ROWS, source.n)
    k = int(source.integers(1, source.n))
    return {"x": x, "mask": source.mask(*x.shape)}, {"k": k, "seed": source.drawn.seed}


def _no_ties(source: Source) -> tuple[Tensors, Settings]:
    """For k successive softmaxes: where scores tie, each multiplies rounding by 1 / epsilon (selection/README.md)."""
    tensors, settings = _rows(source)
    return {**tensors, "x": source.randn(*tensors["x"].shape)}, settings


def _draw(method: str):
    return _no_ties if method in ("softmax", "gumbel") else _rows


def _k_and_weights(source: Source) -> tuple[Tensors, Settings]:
    tensors, settings = _rows(source)
    k = source.n * torch.rand(source.ROWS, generator=source.generator, dtype=torch.float64)
    return {**tensors, "k": k, "weights": source.positive(*tensors["x"].shape)}, settings


def _chosen(x: Tensor, mask: Tensor, k: int) -> Tensor:
    """(b, k, n): the i-th largest valid entry, none where there are fewer."""
    order = x.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :k]
    plan = torch.nn.functional.one_hot(order, x.shape[-1]).to(x.dtype)
    return plan * (torch.arange(k) < mask.sum(-1, keepdim=True)).unsqueeze(-1)


def _mask_sums(t: Tensors, s: Settings, out: Outputs):
    valid = t["mask"].sum(-1).to(out[0].dtype)
    if "weights" not in t:
        yield out[0].sum(-1), valid.clamp_max(s["k"])
        return
    weights = t["weights"] * t["mask"]
    yield (weights * out[0]).sum(-1), torch.minimum(t["k"] / valid, torch.ones(())) * weights.sum(-1)


def _mask_flat(t: Tensors, s: Settings) -> Outputs:
    valid = t["mask"].sum(-1, keepdim=True)
    return (((s["k"] / valid).clamp_max(1) * t["mask"]).double(),)


SMOOTH = ("transport", "laplace", "gaussian")


def _mask(method: str) -> Operator:
    noisy = method == "gumbel"

    def call(t: Tensors, epsilon: float, s: Settings) -> Outputs:
        options = {"generator": generator(s)} if noisy else {}
        return (cp.soft_topk_mask(t["x"], s["k"], mask=t["mask"], method=method, epsilon=epsilon, **options),)

    without = {}
    if noisy:
        without = dict.fromkeys(
            ("permutation", "alone", "padding", "order", "hard limit", "flat limit"), NOISE
        )
    elif method not in (*SMOOTH, "sparse"):
        without = dict.fromkeys(
            ("order", "flat limit"), "a baseline: a sum of k softmaxes, without such a law"
        )
    elif method == "sparse":
        without = {"flat limit": "its limit is the same, but reached with p-norms: tests/selection"}
    return Operator(
        "soft_topk_mask",
        _draw(method),
        call,
        {"x": "bn", "mask": "bn"},
        ("bn",),
        method,
        free="" if noisy else "n",
        masks={} if noisy else {"n": "mask"},
        learned=("x",),
        scaled=("x",),
        invariances=(affine("x"),),
        ordered=("x", 0) if method in (*SMOOTH, "sparse") else None,
        sums=_mask_sums,
        hard=None if noisy else (lambda t, s: (_chosen(t["x"], t["mask"], s["k"]).sum(-2),), 1e-7),
        flat=(_mask_flat, 1e7) if method in SMOOTH else None,
        without=without,
    )


def _weighted_mask(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    return (cp.soft_topk_mask(t["x"], t["k"], weights=t["weights"], mask=t["mask"], epsilon=epsilon),)


WEIGHTED = Operator(
    "soft_topk_mask",
    _k_and_weights,
    _weighted_mask,
    {"x": "bn", "mask": "bn", "weights": "bn", "k": "b"},
    ("bn",),
    "weights, k per row",
    free="n",
    masks={"n": "mask"},
    learned=("x", "weights", "k"),
    scaled=("x",),
    invariances=(affine("x"),),
    ordered=("x", 0),
    sums=_mask_sums,
    flat=(lambda t, s: ((t["k"][:, None] / t["mask"].sum(-1, keepdim=True)).clamp_max(1) * t["mask"],), 1e7),
    without={"hard limit": "a fractional k splits an entry: tests/selection/test_mask.py"},
)


def _sorted(method: str) -> Operator:
    noisy = method == "gumbel"

    def call(t: Tensors, epsilon: float, s: Settings) -> Outputs:
        options = {"generator": generator(s)} if noisy else {}
        values, weights = cp.soft_topk(
            t["x"], s["k"], mask=t["mask"], method=method, epsilon=epsilon, **options
        )
        return weights, values

    def sums(t: Tensors, s: Settings, out: Outputs):
        live = torch.arange(s["k"]) < t["mask"].sum(-1, keepdim=True)
        yield out[0].sum(-1), live.to(out[0].dtype)
        x = t["x"].masked_fill(~t["mask"], 0)
        yield out[1], (out[0] @ x.unsqueeze(-1)).squeeze(-1)

    def hard(t: Tensors, s: Settings) -> Outputs:
        chosen = _chosen(t["x"], t["mask"], s["k"])
        return chosen, (chosen @ t["x"].unsqueeze(-1)).squeeze(-1)

    without = {"flat limit": "every place shares what is left by those before it: tests/selection"}
    without["order"] = "the middle places' indicators rise and fall"
    if noisy:
        without |= dict.fromkeys(("permutation", "alone", "padding", "hard limit"), NOISE)
    return Operator(
        "soft_topk",
        _draw(method),
        call,
        {"x": "bn", "mask": "bn"},
        ("bsn", "bs"),
        method,
        free="" if noisy else "n",
        masks={} if noisy else {"n": "mask"},
        learned=("x",),
        scaled=("x",),
        invariances=(affine("x", like=_sorted_like),),
        sums=sums,
        hard=None if noisy else (hard, 1e-7),
        without=without,
    )


def _sorted_like(out: Outputs, scale: Tensor, move: Tensor) -> Outputs:
    return out[0], scale * out[1] + move


# ------------------------------------------------------------------------------------------------- ordering


def _exact_order(t: Tensors, s: Settings) -> tuple[Tensor, Tensor]:
    """Ranks (b, n) and the sorting matrix (b, s, n) by a stable sort of the valid entries."""
    x, mask = t["x"], t["mask"]
    matrix = x.new_zeros(*x.shape, x.shape[-1])
    ranks = torch.zeros_like(x)
    for row in range(len(x)):
        order = x[row].masked_fill(~mask[row], torch.inf).argsort(stable=True)[: int(mask[row].sum())]
        matrix[row, torch.arange(len(order)), order] = 1
        ranks[row, order] = 1 + torch.arange(len(order), dtype=x.dtype)
    return ranks, matrix


def _flat_matrix(t: Tensors) -> Tensor:
    count = t["mask"].sum(-1)[:, None, None]
    live = torch.arange(t["x"].shape[-1])[:, None] < count
    return live * t["mask"][:, None] / count.double()


def _values(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


ORDER_KEPT = ("transport", "projection", "neuralsort", "softsort", "sigmoid", "gaussian")
SHAPES = {"ranks": "bn", "sorted_values": "bs", "permutation": "bsn"}
FUNCTIONS = {"ranks": cp.soft_rank, "sorted_values": cp.soft_sort, "permutation": cp.soft_permutation}
EXACT = {
    "ranks": lambda t, s: (_exact_order(t, s)[0],),
    "sorted_values": lambda t, s: (_values(_exact_order(t, s)[1], t["x"]),),
    "permutation": lambda t, s: (_exact_order(t, s)[1],),
}
FLAT = {
    "ranks": lambda t, s: ((t["mask"].sum(-1, keepdim=True).double() + 1) / 2 * t["mask"],),
    "sorted_values": lambda t, s: (_values(_flat_matrix(t), t["x"]),),
    "permutation": lambda t, s: (_flat_matrix(t),),
}


def _order_sums(kind: str, method: str):
    def sums(t: Tensors, s: Settings, out: Outputs):
        valid = t["mask"].sum(-1).double()
        if kind == "ranks":
            yield out[0].sum(-1), valid * (valid + 1) / 2
        elif kind == "sorted_values":
            yield out[0].sum(-1), (t["x"] * t["mask"]).sum(-1)
        elif method == "gaussian":  # distributions of each entry's rank
            yield out[0].sum(-2), t["mask"].double()
        else:
            yield out[0].sum(-1), (torch.arange(t["x"].shape[-1]) < valid[:, None]).double()
            if method in ("transport", "network"):
                yield out[0].sum(-2), t["mask"].double()

    return sums


UNEVEN = "no marginal on that side: its columns do not sum to 1"


def _ordering(kind: str, method: str, variant: str | None) -> Operator:
    name = {"ranks": "soft_rank", "sorted_values": "soft_sort", "permutation": "soft_permutation"}[kind]
    noisy = variant == "stochastic"
    sequence = method == "network"
    # sums of projected ranks and values are those of the corners of the permutahedron
    balanced = (
        method in ("transport", "projection", "network", "sigmoid", "gaussian") or kind == "permutation"
    )
    if method == "projection" and variant == "kl":
        balanced = False  # the sum of exponentials is
    without: dict[str, str] = {}

    def call(t: Tensors, epsilon: float, s: Settings) -> Outputs:
        options = {"generator": generator(s)} if noisy else {}
        return (
            FUNCTIONS[kind](
                t["x"], mask=t["mask"], method=method, variant=variant, epsilon=epsilon, **options
            ),
        )

    if noisy:
        without |= dict.fromkeys(("permutation", "alone", "padding", "hard limit"), NOISE)
    if sequence:
        without["permutation"] = "a network compares places: soft swaps depend on who meets whom"
    if kind != "ranks":
        without["order"] = "no result per entry that could keep their order"
    elif method not in ORDER_KEPT or noisy:
        without["order"] = "not kept: ordering/README.md, 'Which method'"
    if not balanced:
        without["sums"] = UNEVEN
    if method != "transport":
        without["flat limit"] = "of its own: tests/ordering/test_relaxations.py"
    if method == "network" and variant != "bitonic_optimal":
        raise ValueError(variant)
    return Operator(
        name,
        _rows,
        call,
        {"x": "bn", "mask": "bn"},
        (SHAPES[kind],),
        " ".join(filter(None, (method, variant))),
        free="" if noisy or sequence else "n",
        masks={} if noisy else {"n": "mask"},
        learned=("x",),
        scaled=("x",),
        invariances=(affine("x", like=as_values if kind == "sorted_values" else None),),
        ordered=("x", 0) if "order" not in without else None,
        sums=_order_sums(kind, method) if balanced else None,
        hard=None if noisy else (EXACT[kind], 1e-7),
        flat=(FLAT[kind], 1e7) if method == "transport" else None,
        without=without,
    )


def _relaxations() -> list[Operator]:
    out = []
    for kind in SHAPES:
        out.append(_ordering(kind, "transport", None))
        for method, entry in METHODS.items():
            if getattr(entry, kind) is None:
                continue
            variants = ["bitonic_optimal"] if method == "network" else [v or None for v in entry.variants]
            out.extend(_ordering(kind, method, variant) for variant in variants)
    return out


def _keyed(source: Source) -> tuple[Tensors, Settings]:
    tensors, settings = _rows(source)
    return {**tensors, "values": source.randn(*tensors["x"].shape, 2)}, settings


def _exact_keyed(t: Tensors, s: Settings) -> Outputs:
    return (_exact_order(t, s)[1] @ t["values"],)


SORT_BY = Operator(
    "soft_sort_by",
    _keyed,
    lambda t, e, s: (cp.soft_sort_by(t["x"], t["values"], mask=t["mask"], epsilon=e),),
    {"x": "bn", "mask": "bn", "values": "bnd"},
    ("bsd",),
    free="nd",
    masks={"n": "mask"},
    learned=("x", "values"),
    scaled=("x",),
    invariances=(affine("x"),),
    sums=lambda t, s, out: [(out[0].sum(1), (t["values"] * t["mask"].unsqueeze(-1)).sum(1))],
    hard=(_exact_keyed, 1e-7),
    flat=(lambda t, s: (_flat_matrix(t) @ t["values"],), 1e7),
    without={"order": "no result per entry that could keep their order"},
)

LEVELS = [0.0, 0.3, 0.5, 1.0]


def _quantiles_exact(t: Tensors, levels: list[float]) -> Tensor:
    q = torch.tensor(levels, dtype=torch.float64)
    return torch.stack([torch.quantile(x[m], q) for x, m in zip(t["x"], t["mask"], strict=True)])


def _flat_quantile(t: Tensors, levels: list[float]) -> Tensor:
    mean = (t["x"] * t["mask"]).sum(-1, keepdim=True) / t["mask"].sum(-1, keepdim=True)
    return mean.expand(-1, len(levels))


def _within(t: Tensors, out: Tensor) -> tuple[Tensor, Tensor]:
    low = t["x"].masked_fill(~t["mask"], torch.inf).amin(-1, keepdim=True)
    high = t["x"].masked_fill(~t["mask"], -torch.inf).amax(-1, keepdim=True)
    return out, torch.minimum(torch.maximum(out, low), high)


QUANTILES = [
    Operator(
        "soft_quantile",
        _rows,
        lambda t, e, s: (cp.soft_quantile(t["x"], LEVELS, mask=t["mask"], epsilon=e).movedim(0, -1),),
        {"x": "bn", "mask": "bn"},
        ("bq",),
        free="n",
        masks={"n": "mask"},
        learned=("x",),
        scaled=("x",),
        invariances=(affine("x", like=as_values),),
        sums=lambda t, s, out: [_within(t, out[0])],
        hard=(lambda t, s: (_quantiles_exact(t, LEVELS),), 1e-7),
        flat=(lambda t, s: (_flat_quantile(t, LEVELS),), 1e7),
        without={"order": "no result per entry"},
    ),
    Operator(
        "soft_median",
        _rows,
        lambda t, e, s: (cp.soft_median(t["x"], mask=t["mask"], epsilon=e).unsqueeze(-1),),
        {"x": "bn", "mask": "bn"},
        ("bq",),
        free="n",
        masks={"n": "mask"},
        learned=("x",),
        scaled=("x",),
        invariances=(affine("x", like=as_values),),
        sums=lambda t, s, out: [_within(t, out[0])],
        hard=(lambda t, s: (_quantiles_exact(t, [0.5]),), 1e-7),
        flat=(lambda t, s: (_flat_quantile(t, [0.5]),), 1e7),
        without={"order": "no result per entry"},
    ),
]


def _targeted(source: Source) -> tuple[Tensors, Settings]:
    tensors, settings = _rows(source)
    return {**tensors, "targets": source.randn(source.ROWS, source.m)}, settings


def _staircase(t: Tensors, levels: Tensor) -> Tensor:
    """Each entry's mean of rising levels (b, m) under the unregularised plan."""
    out = torch.zeros_like(t["x"])
    for row in range(len(out)):
        order = _exact_order({k: v[row : row + 1] for k, v in t.items() if k in ("x", "mask")}, {})[0][0]
        c, m = int(t["mask"][row].sum()), levels.shape[-1]
        left = torch.arange(c)[:, None] / c
        overlap = torch.minimum(left + 1 / c, (torch.arange(m) + 1) / m) - torch.maximum(
            left, torch.arange(m) / m
        )
        mean = c * overlap.clamp_min(0).double() @ levels[row]
        valid = t["mask"][row]
        out[row, valid] = mean[order[valid].long() - 1]
    return out


def _level_values(t: Tensors, count: int) -> Tensor:
    """Means of the count equal parts of each sorted row."""
    out = []
    for x, mask in zip(t["x"], t["mask"], strict=True):
        fine = x[mask].sort().values.repeat_interleave(count)
        out.append(fine.reshape(count, -1).mean(-1))
    return torch.stack(out)


MAPS = [
    Operator(
        "quantile_normalize",
        _targeted,
        lambda t, e, s: (cp.quantile_normalize(t["x"], t["targets"], mask=t["mask"], epsilon=e),),
        {"x": "bn", "mask": "bn", "targets": "bt"},
        ("bn",),
        free="nt",
        masks={"n": "mask"},
        learned=("x", "targets"),
        scaled=("x",),
        invariances=(affine("x"),),
        ordered=("x", 0),
        sums=lambda t, s, out: [(out[0].sum(-1) / t["mask"].sum(-1), t["targets"].mean(-1))],
        hard=(lambda t, s: (_staircase(t, t["targets"].sort().values),), 1e-8),
        flat=(lambda t, s: (t["targets"].mean(-1, keepdim=True) * t["mask"],), 1e7),
    ),
    Operator(
        "soft_quantize",
        _rows,
        lambda t, e, s: (cp.soft_quantize(t["x"], s["k"], mask=t["mask"], epsilon=e),),
        {"x": "bn", "mask": "bn"},
        ("bn",),
        free="n",
        masks={"n": "mask"},
        learned=("x",),
        scaled=("x",),
        invariances=(affine("x", like=as_values),),
        ordered=("x", 0),
        sums=lambda t, s, out: [(out[0].sum(-1), (t["x"] * t["mask"]).sum(-1))],
        hard=(lambda t, s: (_staircase(t, _level_values(t, s["k"])),), 1e-8),
        flat=(lambda t, s: (_flat_quantile(t, [0.5]) * t["mask"],), 1e7),
    ),
]


def _certificate(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    found = cp.order_certificate(t["x"], mask=t["mask"], epsilon=epsilon)
    return (found.residual.to(t["x"].dtype),)


CERTIFICATE = Operator(
    "order_certificate",
    _rows,
    _certificate,
    {"x": "bn", "mask": "bn"},
    ("b",),
    free="n",
    masks={"n": "mask"},
    invariances=(affine("x"),),
    sums=lambda t, s, out: [(out[0], torch.zeros_like(out[0]))],
    without={
        "order": "one number a row",
        "hard limit": "epsilon = 0 is exact by sorting and refused",
        "flat limit": "it is an error, 0 at every epsilon",
        "gradients": "a measurement, detached",
    },
)


def _two_samples(source: Source) -> tuple[Tensors, Settings]:
    x, y = source.scores(source.ROWS, source.n), source.scores(source.ROWS, source.m)
    a, b = (source.masses(torch.ones(t.shape, dtype=torch.bool)) for t in (x, y))
    return {"x": x, "y": y, "a": a, "b": b}, {}


WASSERSTEIN = Operator(
    "wasserstein_1d",
    _two_samples,
    lambda t, e, s: (cp.wasserstein_1d(t["x"], t["y"], t["a"], t["b"]),),
    {"x": "bn", "y": "bm", "a": "bn", "b": "bm"},
    ("b",),
    free="nm",
    learned=("x", "y", "a", "b"),
    invariances=(affine("x", "y", like=lambda out, c, d: (out[0] * c[:, 0] ** 2,)),),
    sums=lambda t, s, out: [(out[0], out[0].clamp_min(0)), (out[0], _linear_program(t))],
    without={
        "padding": "no mask; a point without mass changes nothing: tests/ordering",
        "order": "one number a row",
        "hard limit": "no epsilon: exact",
        "flat limit": "no epsilon: exact",
    },
)


def _linear_program(t: Tensors) -> Tensor:
    from couplings.testing.dense import linear_program

    cost = (t["x"][:, :, None] - t["y"][:, None]) ** 2
    plans = zip(cost.detach(), t["a"].detach(), t["b"].detach(), strict=True)
    return torch.stack([torch.as_tensor(linear_program(*one)[1], dtype=cost.dtype) for one in plans])


OPERATORS = [
    *map(_mask, MASK_METHODS),
    WEIGHTED,
    *map(_sorted, SORTED_METHODS),
    *_relaxations(),
    SORT_BY,
    *QUANTILES,
    *MAPS,
    CERTIFICATE,
    WASSERSTEIN,
]
