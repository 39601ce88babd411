"""
Beam search that a gradient passes through
==========================================

A beam search keeps the k likeliest continuations at every step, by a top-k that has no gradient. With the sorted
soft top-k in its place (Xie et al. 2020, section 5) each beam is a mixture of continuations, and a loss at its
end reaches everything that competed: :func:`couplings.beam.soft_beam_search`.
"""

import matplotlib.pyplot as plt
import torch

import couplings as cp

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "0.8"  # told apart with any colour vision
TOKENS = "ABCDE"
STEPS, BEAM = 3, 2

# %%
# A toy decoder
# -------------
# Five tokens; the next token depends on the present one by a table. Embeddings are the identity, so that a soft
# beam shows its mixture of tokens to the decoder's step, where we can look at it.

logits = torch.tensor(
    [
        [-9.0, 1.0, 0.9, -1.0, -9.0],  # from A: B a little better than C
        [-9.0, 0.0, 0.0, 0.1, 0.2],  # from B: nothing stands out
        [-9.0, -1.0, -1.0, 3.0, 0.0],  # from C: D for certain
        [-9.0, 0.0, -1.0, 0.0, 2.5],  # from D: E
        [-9.0, 0.5, 0.2, 0.0, 0.0],
    ],
    dtype=torch.float64,
)
EMBEDDINGS = torch.eye(5, dtype=torch.float64)


def decoder(table, watch=None):
    def step(embedding, state):
        if watch is not None:
            watch.append(embedding.detach())
        return (embedding @ table).log_softmax(-1), state

    return step


# %%
# Path probabilities
# ------------------
# All paths of three tokens from A, likeliest first. Greedy search (a beam of 1) takes B first, the better
# beginning, and ends at a poor path. A beam of 2 keeps C as well and finds the best one.

step_probabilities = logits.softmax(-1)
paths = torch.cartesian_prod(*[torch.arange(5)] * STEPS)
froms = torch.cat([torch.zeros(len(paths), 1, dtype=torch.int64), paths[:, :-1]], -1)
probabilities = step_probabilities[froms, paths].prod(-1)
order = probabilities.argsort(descending=True)[:16]
names = ["".join(TOKENS[token] for token in path) for path in paths[order].tolist()]

found = {}
for beam in (1, BEAM):
    beams = cp.beam.beam_search(decoder(logits), EMBEDDINGS, None, start=0, beam=beam, max_length=STEPS)
    found[beam] = "".join(TOKENS[token] for token in beams.tokens[0, 0].tolist())

figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
bars = axes.bar(names, probabilities[order].numpy(), color=GREY)
for beam, colour, name in ((1, ORANGE, "greedy"), (BEAM, BLUE, "beam of 2")):
    bars[names.index(found[beam])].set(color=colour, label=f"{name}: {found[beam]}")
axes.set(title="the 16 likeliest of 125 paths", ylabel="probability", xlabel="path from A")
axes.legend(frameon=False)

# %%
# Soft beams
# ----------
# What the two beams consist of, at each step, for three epsilons: a share of every token, light is 1. At the
# smallest epsilon they are the tokens of the ordinary search. As epsilon grows the two beams share tokens.

figure, grid = plt.subplots(3, 1, figsize=(8, 4.6), layout="constrained", sharex=True)
for axes, epsilon in zip(grid, [0.001, 0.3, 3.0]):
    watch = []
    cp.beam.soft_beam_search(
        decoder(logits, watch), EMBEDDINGS, None, start=0, beam=BEAM, steps=STEPS + 1, epsilon=epsilon
    )
    mixture = torch.cat(watch[1:]).T  # tokens x (step, beam); the first is the start token
    image = axes.imshow(mixture.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(5), list(TOKENS))
    axes.set_title(f"epsilon {epsilon:g}", loc="left")
    for border in (1.5, 3.5):
        axes.axvline(border, color="white", linewidth=3)
grid[-1].set_xticks(range(6), [f"step {i // 2 + 1}\nbeam {i % 2 + 1}" for i in range(6)])
figure.colorbar(image, ax=grid, label="share of the token")

# %%
# Gradients
# ---------
# The gold path is A, C, D, E. On the left the gradient of teacher forcing with respect to the table: every step
# is fed the gold token, so that only the rows A, C and D are trained. On the right the gradient of the soft beam
# loss: rows that the beams visit beside the gold path, here B, are trained, too.

gold = torch.tensor([[2, 3, 4]])
figure, grid = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
losses = {
    "teacher forcing": lambda step: cp.beam.teacher_forcing_loss(step, EMBEDDINGS, None, gold, start=0),
    "soft beam, epsilon 0.3": lambda step: cp.beam.soft_beam_loss(
        step, EMBEDDINGS, None, gold, start=0, beam=BEAM, epsilon=0.3
    ),
}
for axes, (name, loss) in zip(grid, losses.items()):
    table = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(decoder(table)), table)
    limit = gradient.abs().max()
    image = axes.imshow((-gradient / limit).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(title=name, xlabel="next token")
    axes.set_xticks(range(5), list(TOKENS))
    axes.set_yticks(range(5), list(TOKENS))
grid[0].set_ylabel("present token")
figure.colorbar(image, ax=grid, label="step downhill, largest = 1")

plt.show()
