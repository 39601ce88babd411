"""How much of each source is moved, for three values of tau; the last source is an outlier."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

x = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 3.0], dtype=torch.float64)
y = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
cost = (x[:, None] - y).square()
figure, axes = plt.subplots()
for offset, tau in zip((-0.25, 0.0, 0.25), (0.1, 1.0, 10.0)):
    coupling = cp.solve(cost, torch.ones_like(x), torch.ones_like(y), epsilon=0.02, tau_a=tau, tau_b=tau)
    axes.bar((torch.arange(6) + offset).numpy(), coupling.plan().sum(-1).numpy(), 0.25, label=f"tau {tau:g}")
axes.axhline(1, color="0.5", linestyle=":")
axes.set(ylabel="mass moved", xticks=range(6), xticklabels=[f"x = {v:g}" for v in x.tolist()])
axes.legend(loc="lower left")
