"""
Matching with dustbins
======================

Points of one picture are matched with points of another; some have no partner. SuperGlue's layer (Sarlin et al.,
CVPR 2020) gives both sides a dustbin and solves a transport problem: :func:`couplings.match_with_dustbin`.
"""

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import ConnectionPatch

import couplings as cp

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart with any colour vision

# %%
# Points with and without a partner
# ---------------------------------
# Ten points; the second picture shows seven of them, turned and moved a little, and two new ones, *h* and *i*.
# The score of a pair is high where the two lie close after the turn. The first side is padded to 12 rows, the
# second to 11 columns: masks say which entries are points. Lines are the mutual matches, as thick as their
# confidence; points 2, 5 and 7 have no partner and get none.

draw = torch.Generator().manual_seed(11)
cells = torch.cartesian_prod(torch.arange(4), torch.arange(3)) / torch.tensor([4.0, 3.0]) + 0.1
first = cells + 0.12 * torch.rand(12, 2, generator=draw)
angle = math.radians(20)
turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
second = torch.cat([first[[6, 1, 9, 3, 0, 8, 4, 10, 11]], torch.rand(2, 2, generator=draw)])
second = (second - 0.5) @ turn.T + 0.5 + 0.02 * torch.randn(11, 2, generator=draw)
scores = 8 - torch.cdist(first, (second - 0.5) @ turn + 0.5).square() / 0.004
row_mask, column_mask = torch.arange(12) < 10, torch.arange(11) < 9

coupling = cp.match_with_dustbin(scores, 1.0, row_mask=row_mask, column_mask=column_mask)
indices, confidence = cp.mutual_matches(coupling.log_plan(), threshold=0.2)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.9), layout="constrained")
sides = (left, first, "0123456789", "first picture"), (right, second, "abcdefghi", "second picture")
for axes, points, names, title in sides:
    for name, (x, y) in zip(names, points.tolist()):
        axes.scatter(x, y, s=170, color=BLUE, zorder=3)
        axes.text(x, y, name, ha="center", va="center", color="white", zorder=4)
    axes.set(title=title, xticks=[], yticks=[], xlim=(-0.1, 1.1), ylim=(-0.1, 1.1), aspect="equal")
    axes.patch.set_visible(False)  # lines between the pictures run behind their points
for row, (column, sure) in enumerate(zip(indices.tolist(), confidence.tolist())):
    if column >= 0:
        ends = first[row].tolist(), second[column].tolist()
        line = ConnectionPatch(*ends, "data", axesA=left, axesB=right)
        line.set(color=ORANGE, linewidth=3 * sure, zorder=-1)
        figure.add_artist(line)

# %%
# The plan and its blocks
# -----------------------
# Every point has mass 1, a dustbin as much as there are points on the other side. If the matched mass is p, of N
# = 10 and M = 9 points N - p and M - p go to the dustbins, and the corner holds p. Masked rows and columns (grey)
# are exactly zero.

plan = coupling.plan()
blocks = plan[:-1, :-1].sum(), plan[:-1, -1].sum(), plan[-1, :-1].sum(), plan[-1, -1]
here = torch.tensor([True])
valid = torch.cat([row_mask, here])[:, None] & torch.cat([column_mask, here])

figure, axes = plt.subplots(figsize=(8, 6.0), layout="constrained")
cmap = plt.get_cmap("viridis").with_extremes(bad="0.85")
image = axes.imshow(plan.where(valid, torch.nan).numpy(), cmap=cmap, vmin=0, vmax=1, aspect="auto")
for (i, j), share in zip(valid.nonzero().tolist(), plan[valid].tolist()):
    if share >= 0.01:
        colour = "white" if share < 0.6 else "black"
        axes.text(j, i, f"{share:.2f}", ha="center", va="center", fontsize=9, color=colour)
axes.axhline(11.5, color="white", linewidth=2)
axes.axvline(10.5, color="white", linewidth=2)
axes.set_xticks(range(12), [*"abcdefghi--", "dustbin"])
axes.set_yticks(range(13), [*"0123456789--", "dustbin"])
axes.set(xlabel="second picture", ylabel="first picture")
axes.set_title("p = {:.3f}, N - p = {:.3f}, M - p = {:.3f}, corner = {:.3f}".format(*blocks))
figure.colorbar(image, ax=axes, label="mass", extend="max")

# %%
# Certified against twenty sweeps
# -------------------------------
# 128 points on either side and sharper scores: 20 and 100 Sinkhorn sweeps, as the published layer makes them, and
# the certified solver. Drawn is by how much each point of the first picture misses its mass of 1, worst first.
# Sweeps end with the columns, so that rows are what they leave wrong.

sharp = 10 * torch.randn(128, 128, generator=draw)
couplings = {
    "20 sweeps": (cp.match_with_dustbin(sharp, 1.0, iterations=20), ORANGE),
    "100 sweeps": (cp.match_with_dustbin(sharp, 1.0, iterations=100), GREEN),
    "certified": (cp.match_with_dustbin(sharp, 1.0), BLUE),
}

figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, (coupling, colour) in couplings.items():
    missing = (coupling.plan().double().sum(-1)[:-1] - 1).abs().sort(descending=True).values
    axes.plot(range(1, 129), missing.numpy(), color=colour, linewidth=2, label=name)
    print(f"{name:10} residual {coupling.residual:.0e} of a total mass of 256")
axes.set(yscale="log", ylim=(1e-10, 1), xlabel="points, worst first", ylabel="error of the mass")
axes.set_title("how far the mass of a point is from 1")
axes.legend(frameon=False)

plt.show()
