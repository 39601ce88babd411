"""The transport core: entropic couplings, solved to a certificate and differentiated implicitly."""

from couplings.transport.api import solve
from couplings.transport.coupling import Coupling, Potentials, Status, act_on_failure
from couplings.transport.points import solve_points

__all__ = ["Coupling", "Potentials", "Status", "act_on_failure", "solve", "solve_points"]
