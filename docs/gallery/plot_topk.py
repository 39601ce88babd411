"""
Soft top-k
==========

Which entries are among the k smallest? The exact answer is a step, and its slope is zero wherever it exists. The
soft one, :func:`couplings.soft_topk_mask`, is the entropic transport plan between the scores and two targets,
*in* and *out*; :func:`couplings.soft_topk` has one target for every place. These are the pictures of Xie et al.,
`Differentiable Top-k with Optimal Transport <https://arxiv.org/abs/2002.06504>`_, 2020. Epsilon counts in
standard deviations of the row; the paper's is relative to the largest cost and some hundred times smaller.
"""

import matplotlib.pyplot as plt
import torch

import couplings as cp

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart with any colour vision
shades = plt.get_cmap("viridis")([0.0, 0.45, 0.8])  # dark: small epsilon

# %%
# The indicator against the score
# -------------------------------
# 101 evenly spaced scores, the 50 smallest are wanted. The grey step is exact, the curves are soft. The weights
# add up to 50 at every epsilon.

scores = torch.linspace(0, 1, 101, dtype=torch.float64)

figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
exact = cp.soft_topk_mask(scores, 50, largest=False, epsilon=0)
axes.step(scores.numpy(), exact.numpy(), where="mid", color="0.75", linewidth=5, label="exact")
for epsilon, shade in zip([0.1, 0.5, 2.0], shades):
    soft = cp.soft_topk_mask(scores, 50, largest=False, epsilon=epsilon)
    axes.plot(
        scores.numpy(),
        soft.numpy(),
        color=shade,
        linewidth=2,
        label=f"epsilon {epsilon:g}, sum {soft.sum():.6f}",
    )
axes.set(title="weight among the 50 smallest of 101", xlabel="score", ylabel="weight")
axes.legend(frameon=False)

# %%
# The plans of two worked examples
# --------------------------------
# Seven scores. Above, the five smallest: each score divides its mass between *in* and *out*. Below, the two
# smallest in order: the targets are first, second and the rest. At the smallest epsilon nearly all shares are 0
# or 1: the five are 0.4, 0.7, -0.2, 1.4 and 0.1, the two are -0.2 and then 0.1.

x = torch.tensor([0.4, 0.7, 2.3, 1.9, -0.2, 1.4, 0.1], dtype=torch.float64)


def draw_plan(axes, plan, targets):
    axes.imshow(plan.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for i, row in enumerate(plan.tolist()):
        for j, share in enumerate(row):
            colour = "white" if share < 0.6 else "black"
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set(xticks=range(len(targets)), xticklabels=targets, yticks=[])


figure, grid = plt.subplots(2, 3, figsize=(8, 6.4), layout="constrained")
for (above, below), epsilon in zip(grid.T, [0.05, 0.5, 2.0]):
    inside = cp.soft_topk_mask(x, 5, largest=False, epsilon=epsilon)
    draw_plan(above, torch.stack([inside, 1 - inside], -1), ["in", "out"])
    _, weights = cp.soft_topk(x, 2, largest=False, epsilon=epsilon)
    draw_plan(below, torch.cat([weights.T, 1 - weights.sum(0)[:, None]], -1), ["1st", "2nd", "rest"])
    above.set_title(f"5 smallest\nepsilon {epsilon:g}")
    below.set_title(f"2 smallest, in order\nepsilon {epsilon:g}")
for axes in grid[:, 0]:
    axes.set(yticks=range(7), yticklabels=[f"{score:g}" for score in x.tolist()], ylabel="score")

# %%
# Fifty normal scores, the five smallest
# --------------------------------------
# Above, the plan: scores in rising order from left to right, light is 1. Below, weight against score; grey is
# exact. The decision spreads from the boundary as epsilon grows. At epsilon 10 all weights are near their mean,
# 0.1.

normal = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values
exact = cp.soft_topk_mask(normal, 5, largest=False, epsilon=0)

figure, grid = plt.subplots(2, 4, figsize=(8, 4.2), layout="constrained", height_ratios=[1, 3])
for (above, below), epsilon in zip(grid.T, [0.1, 0.5, 2.0, 10.0]):
    inside = cp.soft_topk_mask(normal, 5, largest=False, epsilon=epsilon)
    above.imshow(torch.stack([inside, 1 - inside]).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    above.set(title=f"epsilon {epsilon:g}", xticks=[], yticks=[])
    below.scatter(normal.numpy(), exact.numpy(), s=12, color="0.75")
    below.scatter(normal.numpy(), inside.numpy(), s=14, color=BLUE)
    below.set(xlabel="score", ylim=(-0.05, 1.05), yticks=[0, 0.5, 1], yticklabels=[])
grid[0, 0].set(yticks=[0, 1], yticklabels=["in", "out"])
grid[1, 0].set(yticklabels=["0", "0.5", "1"], ylabel="weight")

# %%
# What the gradient asks for
# --------------------------
# Scores 0 to 9, and the weights of the filled points among the 3 smallest. The arrows say where each score moves
# if those weights are to grow. Above, the filled points are the three that are selected: they move down, away
# from the boundary (dashed), and their competitors up. Below, 3 and 4 are to be let in: they move down, and 0 and
# 1, which are in their place, up. The scores nearest to the boundary move most.


def draw_gradient(axes, wanted):
    scores = torch.arange(10.0, dtype=torch.float64, requires_grad=True)
    weights = cp.soft_topk_mask(scores, 3, largest=False, epsilon=3.0, standardize=False)
    (gradient,) = torch.autograd.grad(weights[wanted].sum(), scores)
    axes.axvline(2.5, color="0.6", linestyle="--", linewidth=1)
    axes.axhline(0, color="0.8", linewidth=1, zorder=0)
    axes.scatter(range(10), [0] * 10, s=70, facecolor="white", edgecolor=BLUE, zorder=2)
    axes.scatter(wanted, [0] * len(wanted), s=70, color=BLUE, zorder=2)
    for score, slope in enumerate(gradient.tolist()):
        height = 0.4 + 0.3 * (score % 2)  # neighbours' arrows may cross
        arrow = {"arrowstyle": "-|>", "color": ORANGE, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
        if abs(slope) > 0.005:
            axes.annotate("", (score + 8 * slope, height), (score, height), arrowprops=arrow)
    names = ", ".join(str(score) for score in wanted)
    axes.set_title(f"raise the weight of {names}", loc="left")
    axes.set(xlim=(-1, 10), ylim=(-0.4, 1), xticks=range(10), yticks=[])
    axes.spines[["left", "right", "top"]].set_visible(False)


figure, (above, below) = plt.subplots(2, 1, figsize=(8, 3.6), layout="constrained", sharex=True)
draw_gradient(above, [0, 1, 2])
draw_gradient(below, [2, 3, 4])
below.set_xlabel("score")

plt.show()
