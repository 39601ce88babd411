"""The picture at the top of README.md: `python docs/overview.py` writes docs/overview.svg."""

from pathlib import Path

import matplotlib
import torch

import couplings as cp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"


def ranks(axes: plt.Axes) -> None:
    """Every rank from its own place to the middle as epsilon grows."""
    scores = torch.tensor([0.3, 1.9, -0.8, 1.1, -1.4, 0.6, 2.4])
    epsilons = torch.logspace(-3, 2, 60)
    found = torch.stack([cp.soft_rank(scores, epsilon=float(e)) for e in epsilons])
    for i, row in enumerate(found.T):
        axes.semilogx(epsilons, row, color=plt.cm.viridis(i / 6), linewidth=1.8)
    axes.set(title="soft_rank", xlabel="epsilon", ylabel="rank", yticks=range(1, 8))


def selection(axes: plt.Axes) -> None:
    """The indicator of the ten largest of forty scores."""
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0)).sort().values
    for epsilon, colour in ((1.0, GREY), (0.3, BLUE), (0.0, ORANGE)):
        weights = cp.soft_topk_mask(scores, 10, epsilon=epsilon)
        axes.plot(
            scores, weights, "o-", markersize=3, linewidth=1, color=colour, label=f"epsilon {epsilon:g}"
        )
    axes.legend(frameon=False, fontsize=8)
    axes.set(title="soft_topk_mask, k = 10", xlabel="score", ylabel="weight")


def matching(axes: plt.Axes) -> None:
    """A plan with dustbins."""
    generator = torch.Generator().manual_seed(3)
    places = torch.randn(10, 2, generator=generator)
    others = torch.cat(
        [places[torch.randperm(10, generator=generator)[:7]], 3 + torch.randn(5, 2, generator=generator)]
    )
    plan = cp.match_with_dustbin(3 - 12 * torch.cdist(places, others), dustbin=1.0).plan()
    shown = plan.clone()
    shown[-1, -1] = float("nan")
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    axes.axhline(9.5, color=ORANGE)
    axes.axvline(11.5, color=ORANGE)
    axes.set(title="match_with_dustbin", xlabel="columns, then the dustbin", ylabel="rows, then the dustbin")
    axes.set(xticks=[], yticks=[])


def certificate(axes: plt.Axes) -> None:
    """What fixed sweeps leave wrong, and what the solver does."""
    cost = torch.rand(100, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    epsilons = torch.logspace(-4, 0, 13).tolist()
    for sweeps, colour in ((20, GREY), (200, BLUE)):
        left = [
            float(cp.solve(cost, epsilon=e, solver="sinkhorn", iterations=sweeps, on_fail="ignore").residual)
            for e in epsilons
        ]
        axes.loglog(epsilons, left, color=colour, label=f"{sweeps} Sinkhorn sweeps")
    ours = [float(cp.solve(cost, epsilon=e).residual) for e in epsilons]
    axes.loglog(epsilons, ours, color=GREEN, linewidth=2, label="solve")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set(title="how far the marginals are off", xlabel="epsilon", ylabel="residual")


plt.rcParams.update(
    {
        "svg.hashsalt": "couplings",
        "svg.fonttype": "path",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
figure, places = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
for draw, axes in zip((ranks, selection, matching, certificate), places):
    draw(axes)
figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
