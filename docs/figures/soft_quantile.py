"""The median of nine scores while one of them moves."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

fixed = torch.tensor([-1.3, -0.9, -0.5, -0.1, 0.2, 0.6, 1.0, 1.5])
place = torch.linspace(-2, 2, 200)
rows = torch.cat([fixed.expand(200, -1), place[:, None]], -1)
figure, axes = plt.subplots()
for epsilon in (0.1, 0.01, 0.001):
    axes.plot(place, cp.soft_median(rows, epsilon=epsilon), label=f"epsilon {epsilon:g}")
axes.plot(place, rows.median(-1).values, color="black", linestyle="--", label="torch.median")
axes.set(xlabel="place of the ninth score", ylabel="median of all nine")
axes.legend()
