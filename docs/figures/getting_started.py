"""The mask of ten features in the course of training; three of them matter."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

torch.manual_seed(1)
x = torch.randn(200, 10)
y = x[:, 1] - 2 * x[:, 4] + x[:, 7]
scores = torch.randn(10, requires_grad=True)
weights = torch.zeros(10, requires_grad=True)
optimiser = torch.optim.Adam([scores, weights], lr=0.1)
history = []
for step in range(100):
    mask = cp.soft_topk_mask(scores, 3, epsilon=0.1 ** (step / 100))
    loss = (x @ (mask * weights) - y).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    history.append(mask.detach())
figure, axes = plt.subplots()
for feature, curve in enumerate(torch.stack(history).T):
    told = feature in (1, 4, 7)
    axes.plot(curve, color=None if told else "0.7", label=f"feature {feature}" if told else None)
axes.set(xlabel="step", ylabel="soft indicator")
axes.legend()
