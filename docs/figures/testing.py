"""Sorted scores of the kinds that score_rows draws."""

import matplotlib.pyplot as plt

from couplings.testing import SCORE_KINDS, score_rows

figure, panels = plt.subplots(2, 6, figsize=(6.4, 2.8))
for axes, kind in zip(panels.flat, SCORE_KINDS):
    axes.plot(score_rows(kind, 1, 100)[0].sort().values, ".", markersize=2)
    axes.set_title(kind, fontsize=9)
    axes.set(xticks=[], yticks=[])
