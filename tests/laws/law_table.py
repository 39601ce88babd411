"""The table of laws: every public operator, in every method and form."""

from law_entry import Operator
from laws_of_losses import OPERATORS as LOSSES
from laws_of_plans import OPERATORS as PLANS
from laws_of_rows import OPERATORS as ROWS
from laws_of_sequences import OPERATORS as SEQUENCES

OPERATORS: list[Operator] = [*ROWS, *PLANS, *SEQUENCES, *LOSSES]
BY_NAME: dict[str, Operator] = {str(operator): operator for operator in OPERATORS}
