"""Soft ranks and soft sorted values of five scores against epsilon."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

scores = torch.tensor([-1.6, -0.7, -0.4, 0.5, 1.9], dtype=torch.float64)
epsilons = torch.logspace(-4, 1.5, 60, dtype=torch.float64)
rows = scores.expand(len(epsilons), -1)
figure, (left, right) = plt.subplots(1, 2, sharex=True)
left.plot(epsilons, cp.soft_rank(rows, epsilon=epsilons))
right.plot(epsilons, cp.soft_sort(rows, epsilon=epsilons))
left.set(xscale="log", xlabel="epsilon", title="soft_rank", yticks=range(1, 6))
right.set(xlabel="epsilon", title="soft_sort")
for axes in (left, right):
    axes.axvline(0.01, color="0.5", linestyle=":", label="default")
left.legend()
