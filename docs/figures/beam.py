"""The weights of the first beam over ten continuations, and training a table of transitions through the soft beam."""

import matplotlib.pyplot as plt
import torch

import couplings as cp

draw = torch.Generator().manual_seed(0)
scores = torch.randn(10, generator=draw).log_softmax(-1)
figure, (left, right) = plt.subplots(1, 2)
for epsilon in (0.01, 0.1, 0.5):
    _, weights = cp.soft_topk(scores, 3, epsilon=epsilon)
    left.plot(weights[0], marker="o", label=f"epsilon {epsilon:g}")
left.set(title="weights of the first of 3 beams", xlabel="continuation")
left.legend(fontsize="small")

gold = torch.tensor([[1, 2, 3, 4, 0]])
for name, rho in (("sequence_loss, rho = 0.8", 0.8), ("teacher forcing", 1.0)):
    logits = torch.zeros(5, 5, requires_grad=True)
    history = []
    for _ in range(30):
        loss = cp.beam.sequence_loss(
            lambda embedding, state, logits=logits: ((embedding @ logits).log_softmax(-1), state),
            torch.eye(5), None, gold, start=0, beam=3, rho=rho,
        )  # fmt: skip
        (slope,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.5 * slope).detach().requires_grad_()
        history.append(loss.item())
    right.plot(history, label=name)
right.set(title="a table learns one sentence", xlabel="step", ylabel="loss")
right.legend(fontsize="small")
