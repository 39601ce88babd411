"""
Soft sorts, ranks and quantiles
===============================

Sorting couples scores with places. An entropic transport plan softens that coupling: a score has a part in
several places, and epsilon says in how many. The operators are :func:`couplings.soft_sort`,
:func:`couplings.soft_rank`, :func:`couplings.soft_quantile` and :func:`couplings.soft_permutation`; these are the
pictures of Cuturi, Teboul and Vert, `Differentiable Ranks and Sorting using Optimal Transport
<https://arxiv.org/abs/1905.11885>`_, 2019.
"""

import matplotlib.pyplot as plt
import torch

import couplings as cp

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00"]  # told apart with any colour vision
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)

# %%
# Ranks and sorted values against epsilon
# ---------------------------------------
# Five scores. The operators take one epsilon per row, so that all curves are one call. At small epsilon the ranks
# are 1 to 5 and the sorted values are the scores (dashed); at large epsilon all ranks meet at 3 and all values at
# the mean. On the way a rank may first move away from the mean, but ranks never change their order.

scores = torch.tensor([-1.6, -0.7, -0.4, 0.5, 1.9], dtype=torch.float64)
epsilons = torch.logspace(-4, 1.5, 67, dtype=torch.float64)
rows = scores.expand(len(epsilons), -1)
ranks = cp.soft_rank(rows, epsilon=epsilons).numpy()
values = cp.soft_sort(rows, epsilon=epsilons).numpy()
grid = epsilons.numpy()

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharex=True)
for i, score in enumerate(scores.tolist()):
    left.plot(grid, ranks[:, i], linewidth=2)
    left.text(1.3e-4, i + 1.08, f"score {score:g}", color=COLOURS[i])
    right.axhline(score, color="0.7", linestyle="--", linewidth=1, zorder=0)
    right.plot(grid, values[:, i], linewidth=2)
left.set(title="soft ranks", ylabel="rank", yticks=range(1, 6), ylim=(0.8, 5.5))
right.set(title="soft sorted values", ylabel="value")
for axes in (left, right):
    axes.set(xscale="log", xlabel="epsilon", xlim=(1e-4, grid[-1]))

# %%
# Sixty scores, sorted softly
# ---------------------------
# The dots are the exact sort. A soft sort follows them at small epsilon and flattens as epsilon grows, at the two
# ends first: the largest score has neighbours on one side only.

many = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
places = range(1, 61)
shades = plt.get_cmap("viridis")([0.0, 0.35, 0.6, 0.85])  # dark: small epsilon

figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.scatter(places, many.sort().values.numpy(), s=18, color="0.2", label="exact", zorder=3)
for epsilon, shade in zip([1e-4, 1e-2, 1e-1, 1.0], shades):
    soft = cp.soft_sort(many, epsilon=epsilon).numpy()
    axes.plot(places, soft, color=shade, linewidth=2, label=f"epsilon {epsilon:g}")
axes.set(title="sorted values of 60 normal scores", xlabel="place", ylabel="value")
axes.legend(frameon=False)

# %%
# Quantiles
# ---------
# A soft quantile is a transport problem with three targets: what lies below, the quantile, and what lies above.
# At epsilon 1e-3 the curve lies on that of ``torch.quantile``; at 1 every quantile has moved towards the mean.

levels = torch.linspace(0, 1, 61, dtype=torch.float64)

figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.plot(
    levels.numpy(), torch.quantile(many, levels).numpy(), color="0.75", linewidth=7, label="torch.quantile"
)
for epsilon, shade in zip([1e-3, 1e-1, 1.0], shades[[0, 2, 3]]):
    soft = cp.soft_quantile(many, levels, epsilon=epsilon)
    axes.plot(levels.numpy(), soft.numpy(), color=shade, linewidth=2, label=f"epsilon {epsilon:g}")
axes.set(title="quantiles of the same scores", xlabel="level", ylabel="quantile", xlim=(0, 1))
axes.legend(frameon=False)

# %%
# Milestones: fewer targets than scores
# -------------------------------------
# The plan between 24 scores, rising from left to right, and a few targets. Above, five targets of equal mass:
# soft fifths. Below, three targets of masses 0.4, 0.2 and 0.4: the middle row gathers the middle fifth. A score
# on a boundary is shared even at the smallest epsilon, since 24 scores do not divide into five equal parts.

some = many[:24].sort().values
masses = torch.tensor([0.4, 0.2, 0.4], dtype=torch.float64)

figure, grid = plt.subplots(2, 3, figsize=(8, 4.2), layout="constrained", height_ratios=[5, 3], sharex=True)
for column, epsilon in enumerate([1e-4, 1e-2, 1e-1]):
    even = cp.soft_permutation(some, epsilon=epsilon, num_targets=5) * len(some) / 5
    weighted = cp.soft_permutation(some, epsilon=epsilon, target_weights=masses)
    weighted = weighted * len(some) * masses[:, None]
    for axes, shares in zip(grid[:, column], (even, weighted)):
        image = axes.imshow(shares.numpy(), aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
    grid[0, column].set_title(f"epsilon {epsilon:g}")
    grid[1, column].set_xlabel("scores, rising")
grid[0, 0].set(yticks=range(5), yticklabels=[f"{i + 1}. fifth" for i in range(5)])
grid[1, 0].set(yticks=range(3), yticklabels=["40 %", "20 %", "40 %"])
figure.colorbar(image, ax=grid, label="share of the score")

# %%
# Gradient fields
# ---------------
# Three scores x, y and 0. Above, the soft rank of x: colour is its value and arrows are its gradient with respect
# to x and y. At small epsilon the rank changes where x passes one of the other scores, and nowhere else; at large
# epsilon it has a gradient everywhere. Below, the largest sorted value: its arrows point along whichever score is
# the largest. The longest arrow of every picture has the same length, and lengths are square roots of the
# gradient's.


def field(function, epsilon, cells, side=2.0):
    """Values on a grid of x and y, and the gradient with respect to both."""
    line = torch.linspace(-side, side, cells, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], -1).requires_grad_()
    three = torch.cat([points, torch.zeros_like(points[:, :1])], -1)
    value = function(three, epsilon=epsilon, standardize=False)  # raw scores: their spread pulls at nothing
    (gradient,) = torch.autograd.grad(value.sum(), points)
    return points.detach(), value.detach().view(cells, cells), gradient


def rank_of_x(three, **options):
    return cp.soft_rank(three, **options)[:, 0]


def largest(three, **options):
    return cp.soft_sort(three, **options)[:, -1]


figure, grid = plt.subplots(2, 3, figsize=(8, 5.2), layout="compressed", sharex=True, sharey=True)
panels = [(rank_of_x, "rank of x", (1, 3)), (largest, "largest value", (0, 2))]
for row, (function, name, (low, high)) in enumerate(panels):
    for axes, epsilon in zip(grid[row], [0.01, 0.05, 0.25]):
        _, value, _ = field(function, epsilon, 61)
        points, _, gradient = field(function, epsilon, 9, side=1.75)
        image = axes.imshow(
            value.numpy(), extent=(-2, 2, -2, 2), origin="lower", cmap="viridis", vmin=low, vmax=high
        )
        length = gradient.norm(dim=-1, keepdim=True)
        arrows = gradient / (length * length.max()).sqrt().clamp_min(1e-12)
        seen = (length > 0.02 * length.max()).flatten()
        shape = {"pivot": "mid", "scale": 8, "width": 0.015, "linewidth": 0.5}
        axes.quiver(
            *points[seen].T.numpy(), *arrows[seen].T.numpy(), color="white", edgecolor="black", **shape
        )
        axes.set_title(f"epsilon {epsilon:g}" if row == 0 else None)
        axes.set_xlabel("score x" if row == 1 else None)
    grid[row, 0].set_ylabel("score y")
    figure.colorbar(image, ax=grid[row], label=name)

plt.show()
