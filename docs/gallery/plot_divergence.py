"""
Clouds of points: divergence and unbalanced transport
=====================================================

The divergence :func:`couplings.sinkhorn_divergence` is zero for equal clouds only, and its gradient says where
every point should go. Unbalanced transport, :func:`couplings.solve` with ``tau_a`` and ``tau_b``, puts a price on
mass that stays where it is, so that outliers need not be carried anywhere.
"""

import math

import matplotlib.pyplot as plt
import torch

import couplings as cp

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart with any colour vision
draw = torch.Generator().manual_seed(0)

# %%
# From one shape to another
# -------------------------
# A disc of 150 points (blue) follows the gradient of its divergence from a spiral (orange). Each step moves every
# point by half the gradient's full step, which for this cost is the mean of its partners less the mean of its
# neighbours. After six steps the divergence, above each picture, has fallen by three orders of magnitude.

count = 150
radius, angle = torch.rand(count, generator=draw).sqrt(), 2 * math.pi * torch.rand(count, generator=draw)
disc = 0.5 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
turn = 3.2 * math.pi * torch.linspace(0.08, 1, count).sqrt()
spiral = 0.1 * turn[:, None] * torch.stack([turn.cos(), turn.sin()], -1)

points = disc.double().requires_grad_()
spiral = spiral.double()
shown, values, snapshots = (0, 1, 3, 20), [], []
for step in range(21):
    divergence = cp.sinkhorn_divergence(points, spiral, epsilon=0.01)
    (gradient,) = torch.autograd.grad(divergence, points)
    if step in shown:
        snapshots.append((step, points.detach().clone(), divergence.item()))
    values.append(divergence.item())
    points = (points - 0.25 * count * gradient).detach().requires_grad_()

figure, grid = plt.subplots(1, 4, figsize=(8, 2.5), layout="compressed", sharex=True, sharey=True)
for axes, (step, moved, value) in zip(grid, snapshots):
    axes.scatter(*spiral.T.numpy(), s=6, color=ORANGE)
    axes.scatter(*moved.T.numpy(), s=6, color=BLUE)
    axes.set(title=f"step {step}\n{value:.1e}", aspect="equal", xticks=[], yticks=[])

# %%
# The divergence, step by step, on a logarithmic axis.

figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
axes.plot(values, color=BLUE, linewidth=2, marker="o", markersize=4)
axes.set(yscale="log", xlabel="step", ylabel="divergence", xticks=range(0, 21, 4))
axes.set_title("divergence along the gradient flow")

# %%
# Outliers, and a price for them
# ------------------------------
# The same 20 points on both sides, a step upwards, and 4 outliers on each side that have nothing to do with the
# other. Lines show the plan, as thick as the mass; the size of a dot is the mass that takes part. Exact marginals
# (above) carry the outliers across the picture, and other points make room for them. With a price of 0.3 on mass
# that is missing or too much on either side (below) the outliers stay.


def blob(x, y, size, spread):
    return torch.tensor([x, y]) + spread * torch.randn(size, 2, generator=draw)


middle = torch.tensor([0.8, 0.15]) * blob(0.0, 0.0, 20, 1.0)
x = torch.cat([middle, blob(-4.5, 0.0, 4, 0.1)])
y = torch.cat([middle + torch.tensor([0.0, 0.7]), blob(4.5, 0.7, 4, 0.1)])
cost = torch.cdist(x, y).square()
problems = {
    "exact marginals": cp.solve(cost, epsilon=0.05),
    "a price of 0.3": cp.solve(cost, epsilon=0.05, tau_a=0.3, tau_b=0.3),
}

figure, grid = plt.subplots(2, 1, figsize=(8, 4.6), layout="constrained", sharex=True, sharey=True)
for axes, (name, coupling) in zip(grid, problems.items()):
    plan = 24 * coupling.check().plan()
    for i, j in (plan > 0.02).nonzero().tolist():
        share = plan[i, j].item()
        axes.plot(*torch.stack([x[i], y[j]]).T.numpy(), color="0.5", linewidth=2 * share, alpha=0.7, zorder=0)
    axes.scatter(*x.T.numpy(), s=3 + 40 * plan.sum(-1).numpy(), color=BLUE, label="from")
    axes.scatter(*y.T.numpy(), s=3 + 40 * plan.sum(-2).numpy(), color=ORANGE, label="to")
    axes.set(
        title=f"{name}: {plan.sum() / 24:.0%} of the mass is carried", xticks=[], yticks=[], ylim=(-0.7, 1.4)
    )
grid[0].legend(frameon=False, loc="upper left")

plt.show()
