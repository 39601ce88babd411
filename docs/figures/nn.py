"""A linear scorer in front of SoftTopKMask learns which of 20 items to take from two of their eight features."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
items = torch.randn(256, 20, 8, generator=draw)
worth = 2 * items[..., 1] - items[..., 5]
scorer = torch.nn.Linear(8, 1, bias=False)
torch.nn.init.zeros_(scorer.weight)
take = cp.nn.SoftTopKMask(4)
optimiser = torch.optim.Adam(scorer.parameters(), lr=0.05)
history = []
for _ in range(60):
    loss = -(take(scorer(items).squeeze(-1)) * worth).sum(-1).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    history.append(scorer.weight.detach()[0].clone())
figure, axes = plt.subplots()
for feature, curve in enumerate(torch.stack(history).T):
    told = feature in (1, 5)
    axes.plot(curve, color=None if told else "0.7", label=f"feature {feature}" if told else None)
axes.set(xlabel="step", ylabel="weight in the score")
axes.legend()
