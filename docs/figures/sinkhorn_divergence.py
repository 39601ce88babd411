"""Points follow the divergence's gradient from a disc onto a ring."""

import math

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
angle = torch.arange(120) * (2 * math.pi / 120)
ring = torch.stack([angle.cos(), angle.sin()], -1)
x = (0.3 * torch.randn(120, 2, generator=draw)).requires_grad_()
figure, panels = plt.subplots(1, 4, figsize=(6.4, 2), sharex=True, sharey=True)
for step in range(31):
    if step in (0, 5, 10, 30):
        axes = panels[(0, 5, 10, 30).index(step)]
        axes.scatter(*ring.T, s=4, color="0.7")
        axes.scatter(*x.detach().T, s=6)
        axes.set(title=f"step {step}", aspect="equal")
    divergence = cp.sinkhorn_divergence(x, ring, epsilon=0.05)
    (slope,) = torch.autograd.grad(divergence, x)
    x = (x - 0.2 * 120 * slope).detach().requires_grad_()
