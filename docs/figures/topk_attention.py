"""Attention weights of one query over 40 sources."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
q, k = torch.randn(1, 16, generator=draw), torch.randn(40, 16, generator=draw)
v = torch.randn(40, 1, generator=draw)
order = (q @ k.T)[0].argsort(descending=True)
figure, axes = plt.subplots()
for label, topk, options in (
    ("ordinary", 40, {}),
    ("k = 8, epsilon 1", 8, {"epsilon": 1.0}),
    ("k = 8, hard", 8, {"hard": True}),
):
    _, weights = cp.topk_attention(q, k, v, topk, return_weights=True, **options)
    axes.plot(weights[0, order], marker=".", label=label)
axes.set(xlabel="source, best first", ylabel="weight")
axes.legend()
