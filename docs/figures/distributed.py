"""What rank 1 of four computes: its rows against everybody's columns, at once or block by block."""

import matplotlib.pyplot as plt
import numpy as np

figure, (left, right) = plt.subplots(1, 2, figsize=(5.8, 2.8))
gather, ring = np.full((4, 4), np.nan), np.full((4, 4), np.nan)
gather[1] = 0
for step in range(4):
    ring[1, (1 - step) % 4] = step
left.imshow(gather, cmap="Blues_r", vmin=-1, vmax=4)
right.imshow(ring, cmap="Blues_r", vmin=-1, vmax=4)
for column in range(4):
    left.text(column, 1, "all", ha="center", va="center", fontsize=8, color="white")
    step = int(ring[1, column])
    right.text(
        column,
        1,
        f"step {step}",
        ha="center",
        va="center",
        fontsize=8,
        color="black" if step > 2 else "white",
    )
for axes, title in ((left, 'mode="gather"'), (right, 'mode="ring"')):
    ranks = [f"rank {i}" for i in range(4)]
    axes.set(title=title, xlabel="columns of", xticks=range(4), yticks=range(4), xticklabels=ranks)
    axes.set_yticklabels(ranks)
    axes.grid(visible=False)
left.set(ylabel="rows of")
