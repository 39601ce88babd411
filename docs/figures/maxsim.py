"""Token similarities of a query with two documents; the best token of each row is marked."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
query = torch.nn.functional.normalize(torch.randn(1, 6, 16, generator=draw), dim=-1)
noise = torch.randn(2, 10, 16, generator=draw)
noise[0, [7, 2, 5]] += 12 * query[0, [0, 2, 4]]  # the first document says something about the query
documents = torch.nn.functional.normalize(noise, dim=-1)
scores = cp.maxsim(query, documents)[0]
figure, panels = plt.subplots(1, 2, figsize=(5.8, 2.2), sharey=True)
for axes, document, score in zip(panels, documents, scores):
    grid = query[0] @ document.T
    picture = axes.imshow(grid.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    axes.plot(grid.argmax(-1), range(6), "o", markerfacecolor="none", color="black")
    axes.set(title=f"score {score:.2f}", xlabel="document token")
    axes.grid(visible=False)
panels[0].set(ylabel="query token")
figure.colorbar(picture, ax=panels, label="similarity", shrink=0.8)
