"""A linear map learned through the loss: one feature tells the classes, the other is large and useless."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
labels = torch.arange(120) % 2
points = torch.stack(
    [(labels * 2.0 - 1) + 0.5 * torch.randn(120, generator=draw), 8 * torch.randn(120, generator=draw)], -1
)
matrix = torch.eye(2, requires_grad=True)
optimiser = torch.optim.Adam([matrix], lr=0.1)
figure, panels = plt.subplots(1, 2)
for step in range(101):
    mapped = points @ matrix
    loss = cp.losses.knn_loss(mapped, mapped, labels, labels, k=5, exclude_self=True)
    if step in (0, 100):
        axes = panels[step // 100]
        axes.scatter(*mapped.detach().T, c=labels, cmap="coolwarm", s=12)
        axes.set(
            title=f"step {step}: {-loss.item() / 5:.0%} agree",
            aspect="equal",
            adjustable="datalim",
        )
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
