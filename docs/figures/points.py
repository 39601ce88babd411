"""A function interpolated from the nodes of two boxes, and its error."""

import matplotlib.pyplot as plt
import torch

from couplings.transport import ChebyshevBoxes, interpolate

x = torch.linspace(0, 1, 400, dtype=torch.float64)


def f(x):
    return torch.sin(9 * x) / (0.2 + x)


figure, (left, right) = plt.subplots(1, 2)
for degree in (4, 8, 16):
    boxes = ChebyshevBoxes(0.0, 1.0, count=2, degree=degree)
    nodes = boxes.nodes()
    found = interpolate(x, f(nodes)[:, None], boxes)[:, 0]
    right.semilogy(x, (found - f(x)).abs() + 1e-17, label=f"degree {degree}")
    if degree == 8:
        left.plot(x, f(x))
        left.plot(nodes, f(nodes), "o", label="nodes of two boxes, degree 8")
left.set(title="f")
left.legend(fontsize="small")
right.set(title="error of interpolate")
right.legend(fontsize="small")
