"""Points of two sets, some without a partner: the plan with dustbins, and the pairs read from it."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(3)
first = torch.rand(8, 2, generator=draw)
second = torch.cat([first[[4, 0, 6, 2, 7]] + 0.03, torch.rand(4, 2, generator=draw)])
scores = 4 - torch.cdist(first, second).square() / 0.01
coupling = cp.match_with_dustbin(scores, 0.0)
pairs, _ = cp.mutual_matches(coupling.log_plan(), threshold=0.2)

figure, (left, right) = plt.subplots(1, 2, width_ratios=(1.2, 1))
left.imshow(
    coupling.plan().clamp(max=1).numpy(), cmap="Blues"
)  # the corner holds more than one: cut for the picture
left.axhline(7.5, color="black", linewidth=0.8)
left.axvline(8.5, color="black", linewidth=0.8)
left.set(title="plan; dustbins last", xlabel="column", ylabel="row")
left.grid(visible=False)
right.scatter(*first.T, label="rows")
right.scatter(*second.T, marker="s", facecolors="none", edgecolors="tab:red", label="columns")
for i, j in enumerate(pairs.tolist()):
    if j >= 0:
        right.plot(*zip(first[i].tolist(), second[j].tolist()), color="black", linewidth=1)
right.set(title="mutual_matches", aspect="equal")
right.legend(fontsize="small")
