"""Losses: of lists, of embeddings, of matchings; diagnostics."""

from __future__ import annotations

import torch
from law_entry import Operator, Outputs, Settings, Source, Tensors, affine, shifted, stretched, turned
from laws_of_plans import NO_EPSILON
from torch import Tensor

import couplings as cp
from couplings import losses

LIST = {"order": "one number a list"}
METRIC = "at epsilon 0 it is the metric: tests/losses/test_ranking.py, against scipy and scikit-learn"
AT_ZERO = {"hard limit": METRIC, "flat limit": "of its own: tests/losses/test_ranking.py"}


def _lists(source: Source) -> tuple[Tensors, Settings]:
    x = source.scores(source.ROWS, source.n)
    tensors = {
        "x": x,
        "y": source.integers(0, 3, *x.shape).double(),
        "relevance": source.flags(*x.shape, share=0.4),
        "mask": source.mask(*x.shape),
    }
    return tensors, {"k": int(source.integers(1, source.n))}


def _bounds(low: float, high: float):
    def sums(t: Tensors, s: Settings, out: Outputs):
        yield out[0], out[0].clamp(low, high)

    return sums


def _ranking(name: str, second: str | None, *args: str, bounds, like=None, also=None, **options) -> Operator:
    axes = {"x": "bn", **({second: "bn"} if second else {}), "mask": "bn"}

    def draw(source: Source) -> tuple[Tensors, Settings]:
        tensors, settings = _lists(source)
        if name == "topk_loss":
            tensors["relevance"] &= tensors["mask"]  # the true classes must take part
        return {k: tensors[k] for k in axes}, settings

    def call(t: Tensors, epsilon: float, s: Settings) -> Outputs:
        given = [t["x"], *([t[second]] if second else []), *(s[a] for a in args)]
        function = getattr(losses, name)
        return (function(*given, mask=t["mask"], epsilon=epsilon, reduction="none", **options),)

    return Operator(
        f"losses.{name}",
        draw,
        call,
        axes,
        ("b",),
        " ".join(map(str, options.values())),
        free="n",
        masks={"n": "mask"},
        learned=("x",),
        scaled=("x",),
        invariances=(affine("x", like=like),),
        sums=bounds,
        without=LIST | AT_ZERO,
    )


def _unit(out: Outputs, scale: Tensor, move: Tensor) -> Outputs:
    return (scale[:, 0] * out[0] + move[:, 0],)


def _between(t: Tensors, s: Settings, out: Outputs):
    low = t["x"].masked_fill(~t["mask"], torch.inf).amin(-1)
    high = t["x"].masked_fill(~t["mask"], -torch.inf).amax(-1)
    yield out[0], torch.minimum(torch.maximum(out[0], low), high)


RANKING = [
    _ranking("spearman_loss", "y", bounds=_bounds(0, 2)),
    _ranking("kendall_loss", "y", bounds=_bounds(0, 2)),
    _ranking("ndcg_loss", "y", bounds=_bounds(-1, 1)),
    _ranking("average_precision_loss", "relevance", bounds=_bounds(-1, 1)),
    _ranking("average_precision_loss", "relevance", bounds=_bounds(0, 1), method="sigmoid"),
    _ranking("recall_at_k_loss", "relevance", "k", bounds=_bounds(0, 1)),
    _ranking("topk_loss", "relevance", bounds=_bounds(0, 14)),
    _ranking("least_quantile_loss", None, bounds=_between, like=_unit, q=0.4),
    _ranking("trimmed_loss", None, bounds=_between, like=_unit, keep=0.6),
]


# ----------------------------------------------------------------------------------------------- contrastive

BATCH = "every row of a batch is another's negative"
TOGETHER = {"rows": BATCH, "alone": BATCH, "nan": BATCH, "batch": "one batch: (n, d)", **NO_EPSILON}


def _embeddings(source: Source) -> tuple[Tensors, Settings]:
    # a loss needs another row: two at least are valid
    mask = source.mask(source.n) | (torch.arange(source.n) < 2)
    return {"x": source.randn(source.n, 3), "y": source.randn(source.n, 3), "mask": mask}, {}


def _views(out: Tensor, n: int) -> Outputs:
    return tuple(out.unflatten(0, (-1, n)))


def _contrastive(name: str, variant: str = "", views: int = 1, **options: object) -> Operator:
    def call(t: Tensors, epsilon: float, s: Settings) -> Outputs:
        out = getattr(losses, name)(t["x"], t["y"], mask=t["mask"], reduction="none", **options)
        return _views(out, len(t["x"]))

    return Operator(
        f"losses.{name}",
        _embeddings,
        call,
        {"x": "nd", "y": "nd", "mask": "n"},
        ("n",) * views,
        variant,
        free="nd",
        rows="",
        masks={"n": "mask"},
        learned=("x", "y"),
        scaled=("x", "y"),
        invariances=(turned("x", "y"), stretched("x", "y")),
        sums=None if name == "cosine_target_loss" else lambda t, s, out: [(out[0], out[0].clamp_min(0))],
        without=TOGETHER
        | LIST
        | ({"sums": "a row's part of the floor may exceed it"} if name == "cosine_target_loss" else {}),
    )


CONTRASTIVE = [
    _contrastive("n_pairs_loss", temperature=0.2),
    _contrastive("info_nce_loss"),
    _contrastive("clip_loss"),
    _contrastive("nt_xent_loss", views=2),
    _contrastive("sigmoid_loss"),
    _contrastive("triplet_loss"),
    _contrastive("triplet_loss", "hard, soft margin", margin=None, mining="hard"),
    _contrastive("cosine_target_loss"),
]

GUARD = Operator(
    "losses.collapse_guard",
    lambda source: ({"x": 0.1 * source.randn(source.n, 3) + 1, "y": source.randn(source.n, 3)}, {}),
    lambda t, e, s: (losses.collapse_guard(t["x"], t["y"], threshold=0.5),),
    {"x": "nd", "y": "nd"},
    ("",),
    free="nd",
    rows="",
    learned=("x", "y"),
    scaled=("x", "y"),
    invariances=(turned("x", "y"), stretched("x", "y")),
    sums=_bounds(0, 1),
    without=TOGETHER | LIST | {"padding": "no mask: leave rows out"},
)


def _figures(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    found = cp.diagnostics(t["x"], t["y"], rows=64)
    names = ("alignment", "uniformity1", "effective_rank2", "spread1", "diagonal", "off_diagonal", "margin")
    return tuple(torch.tensor(getattr(found, k), dtype=t["x"].dtype) for k in (*names, "accuracy"))


DIAGNOSTICS = Operator(
    "diagnostics",
    lambda source: ({"x": source.randn(source.n, 3), "y": source.randn(source.n, 3)}, {}),
    _figures,
    {"x": "nd", "y": "nd"},
    ("",) * 8,
    free="nd",
    rows="",
    invariances=(turned("x", "y"), stretched("x", "y")),
    sums=lambda t, s, out: [(out[0], out[0].clamp(0, 4)), (out[3], out[3].clamp(0, 1))],
    without=TOGETHER
    | LIST
    | {
        "padding": "no mask: leave rows out",
        "gradients": "figures, detached",
        "half": "Python floats",
    },
)


# ------------------------------------------------------------------------------------------------ the others


def _student(source: Source) -> tuple[Tensors, Settings]:
    x = source.scores(source.ROWS, source.n)
    return {"x": x, "teacher": source.randn(*x.shape), "mask": source.mask(*x.shape)}, {}


DISTILLATION = Operator(
    "losses.distillation_loss",
    _student,
    lambda t, e, s: (losses.distillation_loss(t["x"], t["teacher"], mask=t["mask"], reduction="none"),),
    {"x": "bn", "teacher": "bn", "mask": "bn"},
    ("b",),
    free="n",
    masks={"n": "mask"},
    learned=("x", "teacher"),
    scaled=("x",),
    invariances=(shifted("x"), shifted("teacher")),
    sums=_bounds(0, 1e9),
    without=LIST | NO_EPSILON,
)


def _neighbours(source: Source) -> tuple[Tensors, Settings]:
    # few templates tie, so that which are nearest does not depend on their order
    tensors = {
        "x": source.randn(source.ROWS, 3),
        "templates": source.randn(source.n, 3),
        "labels": source.integers(0, 2, source.ROWS),
        "template_labels": source.integers(0, 2, source.n),
        "mask": source.mask(source.ROWS, source.n),
    }
    return tensors, {"k": int(source.integers(1, source.n))}


def _moved(t: Tensors, source: Source):
    move = source.randn(3)
    return t, {**t, "x": t["x"] + move, "templates": t["templates"] + move}, lambda out: out


NEIGHBOUR_AXES = {"x": "bd", "templates": "nd", "labels": "b", "template_labels": "n"}


def _knn_hard(t: Tensors, s: Settings) -> Outputs:
    distance = torch.cdist(t["x"], t["templates"]).masked_fill(~t["mask"], torch.inf)
    near = distance.argsort(-1)[:, : s["k"]]
    same = (t["template_labels"] == t["labels"][:, None]) & t["mask"]
    return (-same.gather(-1, near).sum(-1).double(),)


KNN = [
    Operator(
        "losses.knn_loss",
        _neighbours,
        lambda t, e, s: (
            losses.knn_loss(
                t["x"],
                t["templates"],
                t["labels"],
                t["template_labels"],
                s["k"],
                mask=t["mask"],
                epsilon=e,
                reduction="none",
            ),
        ),
        {**NEIGHBOUR_AXES, "mask": "bn"},
        ("b",),
        free="nd",
        masks={"n": "mask"},
        learned=("x", "templates"),
        scaled=("x",),
        invariances=(_moved, turned("x", "templates")),
        sums=lambda t, s, out: [(out[0], out[0].clamp(-s["k"], 0))],
        hard=(_knn_hard, 1e-7),
        without=LIST | {"flat limit": "that of soft_topk_mask"},
    ),
    Operator(
        "losses.knn_predict",
        _neighbours,
        lambda t, e, s: (
            losses.knn_predict(t["templates"], t["template_labels"], t["x"], s["k"]).to(t["x"].dtype),
        ),
        {**NEIGHBOUR_AXES, "mask": "bn"},
        ("b",),
        free="nd",
        invariances=(_moved, turned("x", "templates")),
        sums=lambda t, s, out: [(out[0], out[0].clamp(0, 2))],
        without=LIST
        | NO_EPSILON
        | {
            "padding": "no mask",
            "gradients": "labels",
            "nan": "labels have no NaN",
            "batch": "one batch: (q, d)",
        },
    ),
]


def _truth(source: Source) -> tuple[Tensors, Settings]:
    """Scores of a plan and a partial one-to-one truth among what takes part."""
    shape = source.ROWS, source.n, source.m
    rows, columns = source.mask(*shape[:2]), source.mask(source.ROWS, source.m)
    size = min(source.n, source.m)
    truth = torch.zeros(shape, dtype=torch.bool)
    for row in range(source.ROWS):
        i, j = source.permutation(source.n)[:size], source.permutation(source.m)[:size]
        truth[row, i, j] = source.flags(size) & rows[row, i] & columns[row, j]
    return {"x": source.randn(*shape), "truth": truth, "rows": rows, "columns": columns}, {}


def _matching_loss(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    plan = torch.nn.functional.pad(t["x"], (0, 1, 0, 1), value=-0.5)
    matches = torch.where(t["truth"].any(-1), t["truth"].to(torch.uint8).argmax(-1), -1)
    return (
        losses.matching_loss(plan, matches, row_mask=t["rows"], column_mask=t["columns"], reduction="none"),
    )


def _terms(t: Tensors, s: Settings, out: Outputs):
    matched = (t["truth"] * t["x"]).sum((-1, -2))
    lonely = (t["rows"] & ~t["truth"].any(-1)).sum(-1) + (t["columns"] & ~t["truth"].any(-2)).sum(-1)
    yield out[0], (0.5 * lonely - matched) / (lonely + t["truth"].sum((-1, -2)))


MATCHING = Operator(
    "losses.matching_loss",
    _truth,
    _matching_loss,
    {"x": "bnm", "truth": "bnm", "rows": "bn", "columns": "bm"},
    ("b",),
    free="nm",
    masks={"n": "rows", "m": "columns"},
    learned=("x",),
    scaled=("x",),
    sums=_terms,
    without=LIST
    | NO_EPSILON
    | {
        "invariance": "log masses are absolute",
        "nan": "only the plan at true matches and dustbins is read",
    },
)

OPERATORS = [*RANKING, *CONTRASTIVE, GUARD, DIAGNOSTICS, DISTILLATION, *KNN, MATCHING]
