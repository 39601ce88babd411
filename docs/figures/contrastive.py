"""Losses of 16 pairs that turn away from one another: from all equal (0) to orthogonal (1)."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

steps = torch.linspace(0, 1, 40).tolist()
common = torch.full((16, 16), 0.25)
losses = {
    "clip_loss, T = 1": lambda x: cp.losses.clip_loss(x, x, temperature=1.0),
    "clip_loss, T = 0.07": lambda x: cp.losses.clip_loss(x, x, temperature=0.07),
    "nt_xent_loss": lambda x: cp.losses.nt_xent_loss(x, x),
    "triplet_loss": lambda x: cp.losses.triplet_loss(x, x),
    "cosine_target_loss": lambda x: cp.losses.cosine_target_loss(x, x),
}
figure, axes = plt.subplots()
for name, loss in losses.items():
    axes.plot(steps, [loss((1 - t) * common + t * torch.eye(16)).item() for t in steps], label=name)
axes.set(xlabel="from all rows equal to orthogonal rows", ylabel="loss")
axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
