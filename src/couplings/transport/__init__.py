"""The transport core: entropic couplings, solved to a certificate and differentiated implicitly."""

from couplings.transport.api import solve
from couplings.transport.coupling import Coupling, Potentials, Status, act_on_failure
from couplings.transport.divergence import sinkhorn_divergence
from couplings.transport.operators import ChebyshevBoxes, interpolate, spread
from couplings.transport.points import solve_points

__all__ = [
    "ChebyshevBoxes",
    "Coupling",
    "Potentials",
    "Status",
    "act_on_failure",
    "interpolate",
    "sinkhorn_divergence",
    "solve",
    "solve_points",
    "spread",
]
