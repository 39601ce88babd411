"""What a collapsed and a healthy batch look like, and the guard against the distance from the mean."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
direction, noise = torch.ones(8, 32), torch.randn(8, 32, generator=draw)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(6.8, 2.3))
cp.similarity_heatmap(direction + 0.05 * noise, annotate=False, title="nearly collapsed", axes=left)
cp.similarity_heatmap(noise, annotate=False, title="healthy", axes=middle)
for axes in (left, middle):
    axes.grid(visible=False)
batches = [direction + t * noise for t in torch.linspace(0, 1, 40).tolist()]
spreads = [cp.diagnostics(x, x).spread1 ** 0.5 for x in batches]
right.plot(spreads, [cp.losses.collapse_guard(x).item() for x in batches])
right.set(title="collapse_guard", xlabel="distance from mean")
