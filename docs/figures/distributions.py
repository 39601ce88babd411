"""A bimodal row mapped onto normal quantiles, and rounded to four levels of its own."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
x = torch.cat([torch.randn(200, generator=draw) * 0.4 - 2, torch.randn(200, generator=draw) + 2])
normal = torch.special.ndtri((torch.arange(400) + 0.5) / 400)
figure, (left, right) = plt.subplots(1, 2)
left.hist(x, 30, alpha=0.6, label="scores")
left.hist(cp.quantile_normalize(x, normal, epsilon=1e-3), 30, alpha=0.6, label="onto a normal")
left.set(title="quantile_normalize", xlabel="value", ylabel="count")
left.legend()
order = x.argsort()
for epsilon in (0.03, 0.003):
    right.plot(x[order], cp.soft_quantize(x, 4, epsilon=epsilon)[order], label=f"epsilon {epsilon:g}")
right.set(title="soft_quantize(x, 4)", xlabel="score", ylabel="level")
right.legend()
