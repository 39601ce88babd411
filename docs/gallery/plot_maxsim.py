"""
MaxSim, token by token
======================

Late interaction (Khattab and Zaharia, ColBERT, 2020) compares a query with a document token by token: each query
token takes the document token that is most similar to it, and :func:`couplings.maxsim` adds these maxima.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize

import couplings as cp

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart with any colour vision

# %%
# Words
# -----
# A made-up space. Every word has a direction of its own, words of one meaning share a part of it, and every
# occurrence differs a little. All vectors have length 1.

SIZE = 64
MEANINGS = [["who", "rembrandt"], ["painted", "finished"], ["night", "evening"], ["watch", "clock"]]
draw = torch.Generator().manual_seed(4)
directions = {}
for group in MEANINGS:
    shared = torch.randn(SIZE, generator=draw)
    directions |= {word: shared + torch.randn(SIZE, generator=draw) for word in group}


def embed(text):
    """Vectors (words, SIZE) of length 1."""
    rows = []
    for word in text.split():
        if word not in directions:
            directions[word] = 1.4 * torch.randn(SIZE, generator=draw)
        rows.append(directions[word] + 0.7 * torch.randn(SIZE, generator=draw))
    return normalize(torch.stack(rows), dim=-1)


query = "who painted the night watch"
documents = [
    "rembrandt finished the night watch in the evening",
    "the clock shop is closed at night",
]
q, (d, other) = embed(query), [embed(text) for text in documents]

# %%
# What the maximum sees, and what the smooth maximum sees
# -------------------------------------------------------
# Above, the cosines of all pairs, with a frame around each query word's maximum: the frames are the alignment,
# and the gradient of the maximum reaches these words only. Below, the weights with which the smooth maximum at
# temperature 0.1 passes the gradient on: words that come close to the maximum have a part in it. (A grid of
# similarities is itself a query, whose document is the identity: so the derivative of the score shows what it
# looks at.)

grid = (q @ d.T).requires_grad_()
smooth = cp.maxsim(grid, torch.eye(len(d)), layout="pairwise", temperature=0.1)
(weights,) = torch.autograd.grad(smooth, grid)
grid = grid.detach()

figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.4), layout="constrained", sharex=True)
pictures = (above, grid, "RdBu_r", -1, "cosine"), (below, weights, "viridis", 0, "weight")
for axes, values, cmap, low, name in pictures:
    image = axes.imshow(values.numpy(), cmap=cmap, vmin=low, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, label=name)
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            light = value < 0.6 if low == 0 else abs(value) > 0.6
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if light else "black")
    axes.set_yticks(range(len(q)), query.split())
for i, j in enumerate(grid.argmax(-1).tolist()):
    above.add_patch(plt.Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, linewidth=2.5))
above.set_title("similarities, and the alignment that MaxSim takes")
below.set_title("what the smooth maximum looks at")
below.set_xticks(range(len(d)), documents[0].split())

# %%
# What each query word adds
# -------------------------
# The same query against a second document, *the clock shop is closed at night*: it has two of the words and one
# of like meaning. Documents of different lengths go in as a list; a query word alone is a query, too.

scores = cp.maxsim(q[None], [d, other])[0].tolist()
parts = cp.maxsim(q[:, None], [d, other])

figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
places = torch.arange(len(q))
for shift, name, colour, part, score in zip(
    (-0.2, 0.2), ("first", "second"), (BLUE, ORANGE), parts.T, scores
):
    axes.bar(
        (places + shift).numpy(), part.numpy(), 0.36, color=colour, label=f"{name} document, sum {score:.2f}"
    )
axes.set_xticks(places.numpy(), query.split())
axes.set(ylabel="largest cosine", ylim=(0, 1.25))
axes.legend(frameon=False, ncols=2, loc="upper center")
axes.set_title("two documents, query word by query word")

# %%
# Padding does not matter
# -----------------------
# Documents of a batch are padded to one length. With ``document_mask`` the score is that of the unpadded document
# (lines). Without it (dots) zeros take part: for a query word whose similarities are all negative a zero is the
# best partner, and the smooth maximum grows with every zero. The query has one more word here, unlike all of the
# document.

against = torch.cat([q, -normalize(d.mean(0, keepdim=True))])
lengths = range(0, 61, 5)
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for temperature, colour, name in ((0.1, BLUE, "smooth maximum"), (None, ORANGE, "maximum")):
    masked, bare = [], []
    for length in lengths:
        padded = torch.cat([d, torch.zeros(length, SIZE)])
        mask = torch.arange(len(padded)) < len(d)
        masked.append(
            cp.maxsim(against, padded, document_mask=mask, layout="pairwise", temperature=temperature).item()
        )
        bare.append(cp.maxsim(against, padded, layout="pairwise", temperature=temperature).item())
    axes.plot(lengths, masked, color=colour, linewidth=2)
    axes.plot(lengths, bare, color=colour, linestyle="", marker="o", markersize=5)
    axes.text(62, masked[-1], f"{name}, masked", color=colour, va="center")
    axes.text(62, bare[-1], f"{name}, bare zeros", color=colour, va="center")
    print(f"{name}: with a mask the scores of all lengths differ by at most {max(masked) - min(masked):.0e}")
axes.set(
    xlabel="zeros appended to a document of 8 tokens", ylabel="score", xlim=(-2, 96), xticks=range(0, 61, 10)
)
axes.set_title("score of one document, padded further and further")

plt.show()
