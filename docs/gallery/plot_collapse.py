"""
Has the embedding collapsed?
============================

A cross-similarity loss sees only differences of similarities. If a network maps everything onto one vector there
are none: the loss is log n, its gradient is exactly zero, and training stands still without a word.
:func:`couplings.diagnostics` tells, and :func:`couplings.losses.collapse_guard` gives a gradient out of it.
"""

import matplotlib.pyplot as plt
import torch

import couplings as cp

COLOURS = {"with guard": "#0072b2", "without": "#d55e00"}  # told apart with any colour vision

# %%
# Three scenarios
# ---------------
# Seven pairs of vectors of 768 dimensions: all equal; all equal, and the second side opposite; random, with equal
# sides. As similarity matrices they could not be more different. Cross-entropy over raw cosines cannot tell the
# first two apart and hardly sees the third: the diagnostics do.

draw = torch.Generator().manual_seed(0)
one = torch.rand(1, 768, generator=draw).expand(7, -1)
random = torch.rand(7, 768, generator=draw)
scenarios = {"all equal": (one, one), "all equal, opposite": (one, -one), "random": (random, random)}

figure, grid = plt.subplots(1, 3, figsize=(8, 2.6), layout="constrained")
for axes, (name, (x1, x2)) in zip(grid, scenarios.items()):
    cp.similarity_heatmap(x1, x2, annotate=False, title=name, axes=axes)
    axes.set(aspect="auto", xticks=range(7), yticks=range(7))
    loss = cp.losses.clip_loss(x1, x2, temperature=1.0)
    seen = cp.diagnostics(x1, x2)
    rank = seen.effective_rank1
    print(f"{name}: loss {loss:.4f}, collapsed {seen.collapsed}, effective rank {rank:.2f}; {seen.reason}")

# %%
# Training from exact collapse
# ----------------------------
# Two views of 64 objects, an encoder whose last layer has zero weight and a constant bias: every output is the
# same vector, bit for bit. The CLIP loss alone never moves. With the guard the rows part in all
# directions, its share of the loss is soon zero, and the CLIP loss does the rest.

objects = torch.randn(64, 16, generator=draw)
views = [objects + 0.3 * torch.randn(64, 16, generator=draw) for _ in range(2)]


def train(guarded, steps=120):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    with torch.no_grad():
        encoder[-1].weight.zero_()
        encoder[-1].bias.fill_(1.0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    history = []
    for _ in range(steps):
        x1, x2 = (encoder(view) for view in views)
        loss = cp.losses.clip_loss(x1, x2, temperature=0.1)
        seen = cp.diagnostics(x1, x2)
        history.append((loss.item(), seen.spread1, seen.effective_rank1, 100 * seen.accuracy))
        if guarded:
            loss = loss + cp.losses.collapse_guard(x1, x2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(history).numpy()


names = ["CLIP loss", "spread", "effective rank", "pairs found, %"]
figure, grid = plt.subplots(2, 2, figsize=(8, 4.8), layout="constrained", sharex=True)
for label, colour in COLOURS.items():
    history = train(label == "with guard")
    for axes, name, curve in zip(grid.flat, names, history.T):
        axes.plot(curve, color=colour, linewidth=2, label=label)
        axes.set(title=name)
        axes.set_ylim(bottom=-0.05 * axes.get_ylim()[1])
for axes in grid[1]:
    axes.set_xlabel("step")
grid[0, 0].legend(frameon=False, loc="center right")

plt.show()
