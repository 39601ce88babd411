"""The plan between two distributions on a line at three values of epsilon."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

place = torch.linspace(0, 1, 60, dtype=torch.float64)
a = torch.exp(-((place - 0.25) ** 2) / 0.02) + 0.02
b = torch.exp(-((place - 0.55) ** 2) / 0.005) + 0.6 * torch.exp(-((place - 0.85) ** 2) / 0.005) + 0.02
cost = (place[:, None] - place).square()
figure, panels = plt.subplots(1, 3, figsize=(5.8, 2.2), sharey=True)
for axes, epsilon in zip(panels, (0.1, 0.01, 0.0001)):
    plan = cp.solve(cost, a / a.sum(), b / b.sum(), epsilon=epsilon).plan()
    axes.imshow(plan.sqrt().numpy(), cmap="Blues", origin="lower", extent=(0, 1, 0, 1))
    axes.set(title=f"epsilon {epsilon:g}", xlabel="target")
    axes.grid(visible=False)
panels[0].set(ylabel="source")
