"""The soft permutation matrix of eight scores."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

scores = torch.randn(8, generator=torch.Generator().manual_seed(4))
figure, panels = plt.subplots(1, 3, figsize=(5.8, 2.2), sharey=True)
for axes, epsilon in zip(panels, (0.0001, 0.01, 0.1)):
    picture = axes.imshow(cp.soft_permutation(scores, epsilon=epsilon).numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set(title=f"epsilon {epsilon:g}", xlabel="entry")
    axes.grid(visible=False)
panels[0].set(ylabel="place")
figure.colorbar(picture, ax=panels, shrink=0.7)
