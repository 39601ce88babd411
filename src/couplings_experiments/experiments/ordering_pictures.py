"""The pictures of Cuturi, Teboul and Vert: ranks, sorts and quantiles as epsilon falls, milestones, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import couplings as cp
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph
from couplings_experiments.report.figures import COLOURS, FAINT, INK, MAP, drawing

SCORES = [-1.6, -0.7, -0.4, 0.5, 1.9]
MANY = 60  # scores of the sorts and the quantiles
SORT_EPSILONS = [1e-4, 1e-2, 1e-1, 1.0]
QUANTILE_EPSILONS = [1e-3, 1e-1, 1.0]
LEVELS = 61
MILESTONE_SCORES = 24
MILESTONE_EPSILONS = [1e-4, 1e-2, 1e-1]
WEIGHTED = [0.4, 0.2, 0.4]  # the middle fifth, and what lies below and above
FIELD_EPSILONS = [0.01, 0.05, 0.25]
REACH, CELLS, ARROWS = 2.0, 61, 11  # the plane of the gradient fields: half its side, its grids


def run(context: Context) -> dict[str, Any]:
    """Evaluate the operators at the points that are drawn. Takes no training and little time."""
    context.progress.expect(1)
    epsilons = torch.logspace(-4, 1.5, 67, dtype=torch.float64)
    few = torch.tensor(SCORES, dtype=torch.float64)
    rows = few.expand(len(epsilons), -1)
    generator = torch.Generator().manual_seed(1)
    many = torch.randn(MANY, dtype=torch.float64, generator=generator)
    some = many[:MILESTONE_SCORES].sort().values
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    result = {
        "epsilons": epsilons.tolist(),
        "ranks": cp.soft_rank(rows, epsilon=epsilons).T.tolist(),
        "sorts": cp.soft_sort(rows, epsilon=epsilons).T.tolist(),
        "many": {
            "exact": many.sort().values.tolist(),
            "soft": [cp.soft_sort(many, epsilon=e).tolist() for e in SORT_EPSILONS],
        },
        "quantiles": {
            "levels": levels.tolist(),
            "exact": torch.quantile(many, levels).tolist(),
            "soft": [cp.soft_quantile(many, levels, epsilon=e).tolist() for e in QUANTILE_EPSILONS],
        },
        "milestones": {
            "scores": some.tolist(),
            "even": [_masses(some, e, None).tolist() for e in MILESTONE_EPSILONS],
            "weighted": [_masses(some, e, WEIGHTED).tolist() for e in MILESTONE_EPSILONS],
        },
        "fields": {
            "rank": [_field("rank", e) for e in FIELD_EPSILONS],
            "sort": [_field("sort", e) for e in FIELD_EPSILONS],
        },
    }
    context.progress.advance(1, "pictures")
    return result


def _masses(scores: Tensor, epsilon: float, weights: list[float] | None) -> Tensor:
    """Where each score's mass goes (m, n): columns sum to 1, rows to n times the target's weight."""
    if weights is None:
        matrix = cp.soft_permutation(scores, epsilon=epsilon, num_targets=5)
        return matrix * (len(scores) / 5)
    b = torch.tensor(weights, dtype=scores.dtype)
    matrix = cp.soft_permutation(scores, epsilon=epsilon, target_weights=b)
    return matrix * (len(scores) * b / b.sum()).unsqueeze(-1)


def _field(what: str, epsilon: float) -> dict[str, Any]:
    """A function of (x, y, 0) on a grid of x and y, and its gradient on a coarser one.

    ``what``: the soft "rank" of x, or the largest soft value of the "sort". Scores are not standardised: that would
    add the pull of their spread to every arrow.
    """

    def values(points: Tensor) -> Tensor:
        three = torch.cat([points, torch.zeros_like(points[:, :1])], -1)
        if what == "rank":
            return cp.soft_rank(three, epsilon=epsilon, standardize=False)[:, 0]
        return cp.soft_sort(three, epsilon=epsilon, standardize=False)[:, -1]

    fine = values(_grid(CELLS))
    coarse = _grid(ARROWS).requires_grad_()
    (gradient,) = torch.autograd.grad(values(coarse).sum(), coarse)
    return {"values": fine.reshape(CELLS, CELLS).tolist(), "gradient": gradient.tolist()}


def _grid(count: int) -> Tensor:
    """Points (count^2, 2) of the square, y rising by row and x within."""
    edge = REACH * (1 - 1 / count)  # centres of equal cells
    line = torch.linspace(-edge, edge, count, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.reshape(-1), y.reshape(-1)], -1)


# --------------------------------------------------------------------------------------------------- the report


def blocks(result: dict[str, Any]) -> list[Block]:
    """Five pictures."""
    return [
        Paragraph(_meaning(result), lead=True),
        Heading("Ranks and sorted values against epsilon"),
        _against_epsilon(result),
        Heading("Sixty Gaussian scores, sorted softly"),
        _many(result["many"]),
        Heading("Quantiles"),
        _quantiles(result["quantiles"]),
        Heading("Milestones: fewer targets than scores"),
        _milestones(result["milestones"]),
        Heading("What the gradient asks for"),
        _fields(result["fields"]),
    ]


def _meaning(result: dict[str, Any]) -> str:
    """What the curves reach at both ends, computed from what is drawn."""
    ranks, exact = np.asarray(result["ranks"]), np.argsort(np.argsort(SCORES)) + 1
    low = np.abs(ranks[:, 0] - exact).max()
    high = np.abs(ranks[:, -1] - (len(SCORES) + 1) / 2).max()
    quantiles = result["quantiles"]
    away = np.abs(np.asarray(quantiles["soft"][0]) - quantiles["exact"]).max()
    return (
        "Scores are coupled with rising targets; the plan says which ranks a score has a part in, and which scores "
        f"make up a sorted value. At the smallest epsilon drawn ({result['epsilons'][0]:g}) soft ranks differ from the "
        f"exact ones by at most {low:.1e}, at the largest ({result['epsilons'][-1]:.0f}) from their common mean by at "
        f"most {high:.1e}. Soft quantiles at epsilon {QUANTILE_EPSILONS[0]:g} are within {away:.1e} of torch.quantile."
    )


def _against_epsilon(result: dict[str, Any]) -> Figure:
    epsilons = result["epsilons"]
    order = np.argsort(SCORES)
    with drawing("ordering-epsilon", 7.8, 3.3) as (canvas, out):
        left, right = canvas.subplots(1, 2)
        for i, (score, curve) in enumerate(zip(SCORES, result["ranks"], strict=True)):
            left.plot(epsilons, curve, color=COLOURS[i], linewidth=1.8, label=f"score {score:g}")
        for i, curve in enumerate(result["sorts"]):
            right.hlines(
                SCORES[order[i]],
                epsilons[0],
                0.4,
                color=FAINT,
                linewidth=0.8,
                linestyle=(0, (3, 3)),
                zorder=0,
            )
            right.plot(epsilons, curve, color=COLOURS[order[i]], linewidth=1.8, label=_place(i))
        left.set_yticks(range(1, len(SCORES) + 1))
        left.set_title("soft ranks")
        right.set_title("soft sorted values (dashed: exact)")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("epsilon")
            axes.set_xlim(epsilons[0], epsilons[-1])
            axes.legend(loc="upper right", fontsize=8)
    return Figure(
        out[-1],
        "Five scores. From left to right epsilon grows: ranks leave 1 to 5 for their mean, sorted values leave the "
        "scores for theirs. On the way a rank may first move away from the mean, but no two ranks change their order.",
        "Two line charts over epsilon on a logarithmic axis. At the smallest epsilon the ranks are "
        + ", ".join(f"{curve[0]:.2f}" for curve in result["ranks"])
        + " and the sorted values "
        + ", ".join(f"{curve[0]:.2f}" for curve in result["sorts"])
        + "; at the largest all ranks are near "
        + f"{np.mean([curve[-1] for curve in result['ranks']]):.2f}.",
    )


def _place(index: int) -> str:
    return ("smallest", "2nd", "3rd", "4th", "largest")[index]


def _many(data: dict[str, Any]) -> Figure:
    places = range(1, len(data["exact"]) + 1)
    with drawing("ordering-sorts", 7.8, 3.0) as (canvas, out):
        axes = canvas.subplots()
        axes.scatter(places, data["exact"], s=16, color=INK, linewidths=0, label="exact", zorder=3)
        for soft, epsilon, colour in zip(data["soft"], SORT_EPSILONS, COLOURS, strict=False):
            axes.plot(places, soft, color=colour, linewidth=1.8, label=f"soft, epsilon {epsilon:g}")
        axes.set_xlabel("place")
        axes.set_ylabel("value")
        axes.legend(loc="upper left", fontsize=9)
    worst = [np.abs(np.asarray(soft) - data["exact"]).max() for soft in data["soft"]]
    return Figure(
        out[-1],
        "Sorted values of 60 scores, exact and soft. The largest distances from the exact ones are "
        + ", ".join(f"{w:.2g} (epsilon {e:g})" for w, e in zip(worst, SORT_EPSILONS, strict=True))
        + ".",
        "Rising points and soft curves that flatten towards the mean as epsilon grows.",
    )


def _quantiles(data: dict[str, Any]) -> Figure:
    with drawing("ordering-quantiles", 7.8, 3.0) as (canvas, out):
        axes = canvas.subplots()
        axes.plot(data["levels"], data["exact"], color=INK, linewidth=6, alpha=0.3, label="torch.quantile")
        for soft, epsilon, colour in zip(data["soft"], QUANTILE_EPSILONS, COLOURS, strict=False):
            axes.plot(data["levels"], soft, color=colour, linewidth=1.6, label=f"soft, epsilon {epsilon:g}")
        axes.set_xlabel("level q")
        axes.set_ylabel("quantile")
        axes.set_xlim(0, 1)
        axes.legend(loc="upper left", fontsize=9)
    return Figure(
        out[-1],
        "Quantiles of the same 60 scores. Each level is a transport problem with three targets: what lies below, the "
        "quantile, what lies above.",
        "Rising curves of quantile against level; at "
        + ", ".join(
            f"epsilon {e:g} the median is {soft[LEVELS // 2]:.2f}"
            for e, soft in zip(QUANTILE_EPSILONS, data["soft"], strict=True)
        )
        + f"; torch.quantile gives {data['exact'][LEVELS // 2]:.2f}.",
    )


def _milestones(data: dict[str, Any]) -> Figure:
    scores = data["scores"]
    names = [f"target {i + 1}" for i in range(len(data["even"][0]))], [f"{100 * w:.0f} %" for w in WEIGHTED]
    with drawing("ordering-milestones", 7.8, 3.5) as (canvas, out):
        axes = canvas.subplots(2, 3, height_ratios=[5, 3])
        for row, (kind, labels) in enumerate(zip(("even", "weighted"), names, strict=True)):
            for column, (plan, epsilon) in enumerate(zip(data[kind], MILESTONE_EPSILONS, strict=True)):
                place = axes[row, column]
                picture = place.imshow(
                    np.asarray(plan), aspect="auto", cmap=MAP, vmin=0, vmax=1, origin="lower"
                )
                place.set_yticks(range(len(labels)), labels if column == 0 else [])
                place.set_xticks([])
                place.tick_params(length=0)
                place.spines[:].set_visible(False)
                if row == 0:
                    place.set_title(f"epsilon {epsilon:g}")
                else:
                    place.set_xlabel("scores, rising")
        canvas.colorbar(picture, ax=axes, label="share of the score", shrink=0.9, pad=0.015)
    return Figure(
        out[-1],
        f"Transport plans of {len(scores)} sorted scores. Top: five even targets of equal mass, the soft version of "
        "fifths. Bottom: three targets of weights 0.4, 0.2 and 0.4: the middle row gathers the middle fifth of the "
        "scores. A score may be shared between two targets even at the smallest epsilon.",
        "Six heat maps: bands along the diagonal, sharp at small epsilon and blurred at large. "
        + " ".join(
            f"At epsilon {e:g} the largest share is {max(max(line) for line in plan):.2f} with five targets."
            for plan, e in zip(data["even"], MILESTONE_EPSILONS, strict=True)
        ),
    )


def _fields(data: dict[str, Any]) -> Figure:
    points = _grid(ARROWS).numpy()
    longest = {}
    with drawing("ordering-fields", 7.8, 5.3) as (canvas, out):
        axes = canvas.subplots(2, 3, sharex=True, sharey=True)
        for row, (kind, label) in enumerate((("rank", "rank of x"), ("sort", "largest value"))):
            for column, (field, epsilon) in enumerate(zip(data[kind], FIELD_EPSILONS, strict=True)):
                place = axes[row, column]
                gradient = np.asarray(field["gradient"])
                longest[kind, epsilon] = float(np.hypot(*gradient.T).max())
                picture = place.imshow(
                    np.asarray(field["values"]),
                    extent=(-REACH, REACH, -REACH, REACH),
                    origin="lower",
                    cmap=MAP,
                    vmin=1 if kind == "rank" else 0,
                    vmax=3 if kind == "rank" else REACH,
                    interpolation="bilinear",
                )
                place.quiver(
                    *points.T,
                    *_shortened(gradient / longest[kind, epsilon]).T,
                    color="#ffffff",
                    edgecolor="#000000",
                    linewidth=0.4,
                    angles="xy",
                    pivot="mid",
                    scale=3.2,
                    scale_units="inches",
                    units="inches",
                    width=0.026,
                    minlength=0,
                )
                place.set_title(f"{label}, epsilon {epsilon:g}")
                place.set_xticks([-2, 0, 2])
                place.set_yticks([-2, 0, 2])
                place.set_xlim(-REACH, REACH)
                place.set_ylim(-REACH, REACH)
                if column == 0:
                    place.set_ylabel("y")
                if row == 1:
                    place.set_xlabel("x")
            canvas.colorbar(picture, ax=axes[row], pad=0.015, shrink=0.9)
    return Figure(
        out[-1],
        "Three scores x, y and 0. Colour: the soft rank of x (top) and the largest soft sorted value (bottom); arrows: "
        "their gradients in x and y, in each picture relative to its longest (drawn length: the root of it; below a "
        "hundredth: none). Exact ranks are flat between the lines "
        "x = 0, y = 0 and x = y; the soft gradient is strongest at the lines where x changes its rank, and reaches "
        "the further from them the larger epsilon is.",
        "Six colour maps with arrows. The longest gradients: "
        + ", ".join(f"{value:.2f} ({kind}, epsilon {e:g})" for (kind, e), value in longest.items())
        + ".",
    )


def _shortened(arrows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Arrows with the root of their lengths, so that short ones show; NaN, which is not drawn, below 1 / 100."""
    length = np.hypot(*arrows.T)[:, None]
    kept: np.ndarray[Any, Any] = np.where(length > 0.01, arrows / np.sqrt(np.maximum(length, 1e-12)), np.nan)
    return kept


def headline(result: dict[str, Any]) -> Headline:
    """How exact soft ranks are where they ought to be."""
    ranks, exact = np.asarray(result["ranks"]), np.argsort(np.argsort(SCORES)) + 1
    return Headline(
        f"Largest error of a soft rank at epsilon {result['epsilons'][0]:g}",
        f"{np.abs(ranks[:, 0] - exact).max():.1e}",
        "",
        f"At the largest epsilon, {result['epsilons'][-1]:.0f}, all ranks are within "
        f"{np.abs(ranks[:, -1] - (len(SCORES) + 1) / 2).max():.1e} of their mean.",
    )


EXPERIMENT = Experiment(
    name="ordering-pictures",
    title="Soft sorts, ranks and quantiles in pictures",
    source="Cuturi, Teboul and Vert, Differentiable Ranks and Sorting using Optimal Transport, NeurIPS 2019: figures",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.02, "quick": 0.05, "full": 0.05},
)
