"""Bits by budget: which matrix is held in how many bits, so that the whole fits and errs least (LQ-LoRA)."""

from quadapt.budget.candidates import Candidate, adapter_bits, candidates, effective_bits
from quadapt.budget.document import BudgetPlan, PlannedLayer
from quadapt.budget.program import Option, Solution, pareto, solve
from quadapt.budget.table import measure

__all__ = [
    "BudgetPlan",
    "Candidate",
    "Option",
    "PlannedLayer",
    "Solution",
    "adapter_bits",
    "candidates",
    "effective_bits",
    "measure",
    "pareto",
    "solve",
]
