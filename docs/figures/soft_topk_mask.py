"""Soft indicators of the three largest of twelve scores."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

scores = torch.randn(12, generator=torch.Generator().manual_seed(1)).sort().values
figure, axes = plt.subplots()
for epsilon in (0.01, 0.1, 0.5, 2.0):
    mask = cp.soft_topk_mask(scores, 3, epsilon=epsilon)
    axes.plot(scores, mask, marker="o", label=f"epsilon {epsilon:g}")
axes.set(xlabel="score", ylabel="soft indicator", title="soft_topk_mask(scores, 3)")
axes.legend()
