"""Losses of one list while one score rises past the others; steps: the metric itself."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

place = torch.linspace(-2.5, 2.5, 201)
others = torch.tensor([-1.5, -0.6, 0.1, 0.9, 1.6]).expand(201, -1)
scores = torch.cat([place[:, None], others], -1)
relevance = torch.tensor([1, 0, 0, 1, 0, 0]).expand(201, -1)
losses = {
    "ndcg_loss": lambda e: cp.losses.ndcg_loss(scores, relevance, epsilon=e, reduction="none"),
    "average_precision_loss": lambda e: cp.losses.average_precision_loss(
        scores, relevance.bool(), epsilon=e, reduction="none"
    ),
    "recall_at_k_loss, k = 2": lambda e: cp.losses.recall_at_k_loss(
        scores, relevance.bool(), 2, epsilon=e, reduction="none"
    ),
    "spearman_loss": lambda e: cp.losses.spearman_loss(scores, relevance, epsilon=e, reduction="none"),
    "kendall_loss": lambda e: cp.losses.kendall_loss(scores, relevance, epsilon=e, reduction="none"),
}
figure, axes = plt.subplots(figsize=(6, 3))
for (name, loss), colour in zip(losses.items(), plt.rcParams["axes.prop_cycle"].by_key()["color"]):
    axes.plot(place, loss(None), color=colour, label=name)
    axes.plot(place, loss(0), color=colour, linestyle=":", linewidth=1)
axes.set(
    xlabel="score of a relevant entry", ylabel="loss", title="solid: default epsilon; dotted: the metric"
)
axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
