"""The pictures of the SOFT paper: what the operator does to scores, and what its gradient says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import couplings as cp
from couplings_experiments.experiment import Context, Experiment
from couplings_experiments.report.blocks import Block, Figure, Heading, Headline, Paragraph
from couplings_experiments.report.figures import COLOURS, FAINT, INK, MAP, drawing

EXAMPLE = [0.4, 0.7, 2.3, 1.9, -0.2, 1.4, 0.1]
STEP_EPSILONS = [0.1, 0.5, 2.0]
PLAN_EPSILONS = [0.05, 0.5, 2.0]
GAUSSIAN_EPSILONS = [0.1, 0.3, 1.0, 3.0]
ARROW_EPSILON = 3.0  # of raw scores: standardising them would add the pull of their spread to every arrow


def run(context: Context) -> dict[str, Any]:
    """Evaluate the operators at the points that are drawn. Takes no training and no time."""
    context.progress.expect(1)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    example = torch.tensor(EXAMPLE, dtype=torch.float64)
    gaussian = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = {
        "steps": {
            "scores": grid.tolist(),
            "hard": cp.soft_topk_mask(grid, 50, largest=False, epsilon=0).tolist(),
            "soft": [cp.soft_topk_mask(grid, 50, largest=False, epsilon=e).tolist() for e in STEP_EPSILONS],
        },
        "mask_plans": [_mask_plan(example, 5, epsilon).tolist() for epsilon in PLAN_EPSILONS],
        "sorted_plans": [_sorted_plan(example, 2, epsilon).tolist() for epsilon in PLAN_EPSILONS],
        "gaussian": {
            "scores": gaussian.tolist(),
            "soft": [
                cp.soft_topk_mask(gaussian, 5, largest=False, epsilon=e).tolist() for e in GAUSSIAN_EPSILONS
            ],
        },
        "arrows": [_arrows(chosen) for chosen in ([0, 1, 2], [2, 3, 4])],
    }
    context.progress.advance(1, "pictures")
    return result


def _mask_plan(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """The plan (n, 2) that selects the k smallest, times n: to the selected target, and to the other."""
    inside = cp.soft_topk_mask(scores, k, largest=False, epsilon=epsilon)
    return torch.stack([inside, 1 - inside], -1)


def _sorted_plan(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """The plan (n, k+1) that selects and sorts the k smallest, times n; the last target takes the rest."""
    _, weights = cp.soft_topk(scores, k, largest=False, epsilon=epsilon)
    return torch.cat([weights, 1 - weights.sum(-2, keepdim=True)], -2).T


def _arrows(chosen: list[int]) -> dict[str, Any]:
    """Gradient of the soft weight of ``chosen`` among the 3 smallest of 0..9, with respect to the scores."""
    scores = torch.arange(10.0, dtype=torch.float64, requires_grad=True)
    weights = cp.soft_topk_mask(scores, 3, largest=False, epsilon=ARROW_EPSILON, standardize=False)
    (gradient,) = torch.autograd.grad(weights[chosen].sum(), scores)
    return {"chosen": chosen, "weights": weights.tolist(), "gradient": gradient.tolist()}


def blocks(result: dict[str, Any]) -> list[Block]:
    """Five pictures."""
    arrows = result["arrows"]
    last = [max(range(10), key=lambda i: abs(arrow["gradient"][i])) for arrow in arrows]
    return [
        Paragraph(
            "The hard indicator of the k smallest scores is a step: its slope is zero wherever it exists. The soft one "
            "is the plan of an entropic transport problem between the scores and the two targets 'in' and 'out'; "
            f"{_sums(result)}",
            lead=True,
        ),
        Heading("Indicator against score"),
        _steps(result["steps"]),
        Heading("Transport plans of the two worked examples"),
        _plans(result),
        Heading("Fifty Gaussian scores, the five smallest"),
        _gaussian(result["gaussian"]),
        Heading("What the gradient asks for"),
        _draw_arrows(arrows, last),
    ]


def _sums(result: dict[str, Any]) -> str:
    """How well the weights add up to k, computed from what is drawn."""
    return (
        f"over all curves and scatter plots below, its weights miss the sum k by at most {_worst(result):.1e}. "
        "Epsilon is in standard deviations of the scores, but for the arrows."
    )


def _worst(result: dict[str, Any]) -> float:
    misses = [abs(sum(weights) - 50) for weights in result["steps"]["soft"]]
    misses += [abs(sum(weights) - 5) for weights in result["gaussian"]["soft"]]
    return float(max(misses))


def _steps(data: dict[str, Any]) -> Figure:
    with drawing("indicator", 7.6, 2.9) as (canvas, out):
        axes = canvas.subplots()
        axes.step(data["scores"], data["hard"], where="mid", color=INK, linewidth=1.6, label="hard")
        for soft, epsilon, colour in zip(data["soft"], STEP_EPSILONS, COLOURS, strict=False):
            axes.plot(data["scores"], soft, color=colour, linewidth=1.8, label=f"soft, epsilon {epsilon:g}")
        axes.set_xlabel("score")
        axes.set_ylabel("weight among the 50 smallest")
        axes.legend(loc="upper right")
    return Figure(
        out[-1],
        "Weight of each of 101 evenly spaced scores among the 50 smallest, exact and soft. Small epsilon hugs the "
        "step, large epsilon spreads the decision over all scores.",
        "Line chart: a step from 1 to 0 in the middle, and three smooth curves that flatten as epsilon grows.",
    )


def _plans(result: dict[str, Any]) -> Figure:
    with drawing("plans", 7.6, 5.6) as (canvas, out):
        axes = canvas.subplots(2, 3)
        targets = (["in", "out"], ["1st", "2nd", "rest"])
        for row, (name, labels) in enumerate(zip(("mask_plans", "sorted_plans"), targets, strict=True)):
            for column, (plan, epsilon) in enumerate(zip(result[name], PLAN_EPSILONS, strict=True)):
                place = axes[row, column]
                shown = np.asarray(plan)
                place.imshow(shown, aspect="auto", cmap=MAP, vmin=0, vmax=1)
                for (i, j), value in np.ndenumerate(shown):
                    place.text(
                        j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=_on_map(value)
                    )
                place.set_xticks(range(len(labels)), labels)
                place.set_yticks(
                    range(len(EXAMPLE)), [f"{score:g}" for score in EXAMPLE] if column == 0 else []
                )
                place.tick_params(length=0)
                place.spines[:].set_visible(False)
                what = "5 smallest" if row == 0 else "2 smallest, sorted"
                place.set_title(f"{what}, epsilon {epsilon:g}")
    return Figure(
        out[-1],
        "Where each of the seven scores sends its mass (plan times n; a row sums to 1). Top: the 5 smallest, targets "
        "in and out. Bottom: the 2 smallest in order, targets first, second and the rest. As epsilon falls, the plans "
        "become the exact indicators: {0.4, 0.7, -0.2, 1.4, 0.1}, and -0.2 then 0.1.",
        "Six heat maps of transport plans. "
        + " ".join(
            f"At epsilon {epsilon:g} the weights among the 5 smallest are "
            + ", ".join(f"{score:g}: {row[0]:.2f}" for score, row in zip(EXAMPLE, plan, strict=True))
            + "."
            for plan, epsilon in zip(result["mask_plans"], PLAN_EPSILONS, strict=True)
        ),
    )


def _on_map(value: float) -> str:
    """Text colour that is readable on the colour map at ``value``."""
    return "#ffffff" if value < 0.6 else "#000000"


def _gaussian(data: dict[str, Any]) -> Figure:
    scores = np.asarray(data["scores"])
    order = np.argsort(scores)
    with drawing("gaussian", 7.6, 3.6) as (canvas, out):
        axes = canvas.subplots(2, 4, height_ratios=[1, 3], sharex=False)
        for column, (soft, epsilon) in enumerate(zip(data["soft"], GAUSSIAN_EPSILONS, strict=True)):
            weights = np.asarray(soft)
            upper, lower = axes[:, column]
            upper.imshow(
                np.stack([weights[order], 1 - weights[order]]), aspect="auto", cmap=MAP, vmin=0, vmax=1
            )
            upper.set_title(f"epsilon {epsilon:g}")
            upper.set_yticks([0, 1], ["in", "out"] if column == 0 else [])
            upper.set_xticks([])
            upper.tick_params(length=0)
            upper.spines[:].set_visible(False)
            hard = np.zeros_like(weights)
            hard[order[:5]] = 1
            lower.scatter(scores, hard, s=9, color=FAINT, linewidths=0, label="hard")
            lower.scatter(scores, weights, s=14, color=COLOURS[0], linewidths=0, label="soft")
            lower.set_ylim(-0.06, 1.06)
            lower.set_xlabel("score")
            if column == 0:
                lower.set_ylabel("weight")
                lower.legend(loc="upper right", handletextpad=0, borderpad=0)
            else:
                lower.set_yticklabels([])
    most = [max(soft) for soft in data["soft"]]
    return Figure(
        out[-1],
        "Top: the plan, scores in ascending order from left to right, light = 1. Bottom: weight against score, soft in "
        "blue and exact in grey.",
        "Four colour maps and four scatter plots. The largest weight is "
        + ", ".join(f"{value:.2f} at epsilon {e:g}" for value, e in zip(most, GAUSSIAN_EPSILONS, strict=True))
        + ".",
    )


def _draw_arrows(arrows: list[dict[str, Any]], last: list[int]) -> Figure:
    with drawing("arrows", 7.6, 3.4) as (canvas, out):
        axes = canvas.subplots(2, 1, sharex=True)
        largest = max(abs(value) for arrow in arrows for value in arrow["gradient"])
        for place, arrow in zip(axes, arrows, strict=True):
            _arrow_row(place, arrow, 0.92 / largest)
        axes[-1].set_xlabel("score")
    return Figure(
        out[-1],
        "Arrows show where each score moves if the soft weight of the filled points among the 3 smallest is to grow "
        "(gradient on raw scores, one common scale; dashed: the boundary between "
        "third and fourth). The score that moves most is "
        f"{last[0]} in the upper picture, {last[1]} in the lower.",
        "Two rows of the scores 0 to 9 with arrows. "
        + " ".join(
            f"For the objective {arrow['chosen']}: gradients "
            + ", ".join(f"{value:+.2f}" for value in arrow["gradient"])
            + "."
            for arrow in arrows
        ),
    )


def _arrow_row(place: Any, arrow: dict[str, Any], scale: float) -> None:
    place.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    place.axvline(2.5, color=FAINT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    for score, value in enumerate(arrow["gradient"]):
        chosen = score in arrow["chosen"]
        place.scatter(
            [score],
            [0],
            s=60,
            zorder=3,
            linewidths=1.4,
            edgecolors=COLOURS[0],
            color=COLOURS[0] if chosen else "#ffffff",
        )
        height = 0.4 + 0.3 * (score % 2)  # neighbours' arrows may cross
        if abs(value * scale) > 0.03:
            place.annotate(
                "",
                (score + value * scale, height),
                (score, height),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": COLOURS[1],
                    "linewidth": 1.8,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
    place.set_ylim(-0.5, 1)
    place.set_xlim(-0.9, 9.9)
    place.set_xticks(range(10))
    place.set_yticks([])
    place.spines["left"].set_visible(False)
    names = ", ".join(str(score) for score in arrow["chosen"])
    place.set_title(f"objective: weight of {names}", loc="left")


def headline(result: dict[str, Any]) -> Headline:
    """How well the weights add up."""
    worst = _worst(result)
    held = "Every soft indicator drawn adds up to k, to rounding."
    return Headline(
        "Largest distance of a soft indicator's sum from k",
        f"{worst:.1e}",
        "",
        held if worst < 1e-10 else "A soft indicator drawn misses the k that it was asked for.",
    )


EXPERIMENT = Experiment(
    name="topk-pictures",
    title="Soft top-k in pictures",
    source="Xie et al., Differentiable Top-k with Optimal Transport, NeurIPS 2020: figures 1, 2, 3, 4 and 8",
    run=run,
    blocks=blocks,
    headline=headline,
    minutes={"smoke": 0.01, "quick": 0.01, "full": 0.01},
)
