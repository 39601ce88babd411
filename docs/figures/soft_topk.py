"""Indicators of the first four places over ten scores."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

scores = torch.randn(10, generator=torch.Generator().manual_seed(2))
figure, panels = plt.subplots(1, 2, figsize=(5.8, 1.9), sharey=True)
for axes, epsilon in zip(panels, (0.01, 0.3)):
    values, weights = cp.soft_topk(scores, 4, epsilon=epsilon)
    picture = axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set(title=f"epsilon {epsilon:g}", xlabel="entry", xticks=range(0, 10, 2))
    axes.grid(visible=False)
panels[0].set(ylabel="place", yticks=range(4), yticklabels=range(1, 5))
figure.colorbar(picture, ax=panels, label="weight", shrink=0.8)
