"""
Six relaxations of a sort beside each other
===========================================

``method=`` of :func:`couplings.soft_rank` and its kin selects how a sort is relaxed. All methods see the same row
of scores, standardised; epsilon has another unit in each, so that every method has a default of its own.
"""

from functools import partial

import matplotlib.pyplot as plt
import torch

import couplings as cp

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00"]  # told apart with any colour vision
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)
DEFAULTS = {
    "transport": 0.01,
    "projection": 0.1,
    "neuralsort": 1.0,
    "softsort": 0.1,
    "sigmoid": 0.1,
    "network": 0.1,
}
row = torch.tensor([-1.6, -0.7, -0.4, 0.5, 1.9], dtype=torch.float64)

# %%
# Ranks against epsilon
# ---------------------
# Five scores, one curve each; the dashed line is the method's default. All methods are exact at small epsilon and
# tend to the mean rank, 3, at large epsilon, each in its way. Projection is exact until epsilon reaches the gaps
# between scores and has corners; neuralsort and transport begin to mix early and last for two decades; sigmoid
# and softsort are quicker. The network's epsilon is that of one swap, and a rank passes through several of them.

factors = torch.logspace(-2, 2, 81, dtype=torch.float64)
rows = row.expand(len(factors), -1)

figure, grid = plt.subplots(2, 3, figsize=(8, 5.0), layout="constrained", sharey=True)
for axes, (method, default) in zip(grid.flat, DEFAULTS.items()):
    ranks = cp.soft_rank(rows, method=method, epsilon=default * factors)
    axes.plot((default * factors).numpy(), ranks.numpy(), linewidth=2)
    axes.axvline(default, color="0.6", linestyle="--", linewidth=1)
    axes.set(title=method, xscale="log", yticks=range(1, 6), ylim=(0.8, 5.6))
for axes in grid[1]:
    axes.set_xlabel("epsilon")
for axes in grid[:, 0]:
    axes.set_ylabel("rank")
for y, score in enumerate(row.tolist(), start=1):
    grid[0, 0].text(1.2e-4, y + 0.1, f"{score:g}", color=COLOURS[y - 1])

# %%
# The matrices
# ------------
# The relaxed permutation matrix of the methods that have one, at the default: row j is the soft indicator of the
# j-th smallest score. Rows sum to 1 in all of them. Columns do in a transport plan and in a network, which is a
# product of swaps; the number below each name is the largest error of a column's sum.

figure, grid = plt.subplots(1, 4, figsize=(8, 2.6), layout="compressed", sharey=True)
for axes, method in zip(grid, ("transport", "neuralsort", "softsort", "network")):
    matrix = cp.soft_permutation(row, method=method)
    image = axes.imshow(matrix.numpy(), cmap="viridis", vmin=0, vmax=1)
    error = (matrix.sum(0) - 1).abs().max().item()
    axes.set(title=f"{method}\n{error:.0e}", xticks=range(5), yticks=range(5), yticklabels=range(1, 6))
    axes.set_xticklabels([f"{score:g}" for score in row.tolist()], rotation=90)
grid[0].set_ylabel("place")
figure.colorbar(image, ax=grid, label="share")

# %%
# What a gradient reaches
# -----------------------
# The derivative of every rank with respect to every score at the default, on a row of 12 normal scores in rising
# order; each picture has its own scale. Projection passes nothing on where scores are farther apart than epsilon.
# With the other methods a rank feels all its neighbours; how far, depends on the method.

longer = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).sort().values

figure, grid = plt.subplots(2, 3, figsize=(8, 5.2), layout="compressed", sharex=True, sharey=True)
for axes, method in zip(grid.flat, DEFAULTS):
    jacobian = torch.func.jacrev(partial(cp.soft_rank, method=method))(longer)
    limit = jacobian.abs().max()
    image = axes.imshow((jacobian / limit).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(title=f"{method}, at most {limit:.1f}", xticks=[], yticks=[])
for axes in grid[1]:
    axes.set_xlabel("score")
for axes in grid[:, 0]:
    axes.set_ylabel("rank")
figure.colorbar(image, ax=grid, label="derivative / largest")

plt.show()
