"""One option for each matrix, least error in all, within the budget: an integer program, and a bound that proves it.

    minimize sum_i error[i, c_i]   such that   sum_i bits[i, c_i] <= budget

Source: LQ-LoRA (arXiv 2311.12023) section 3.2, equation 9 (there by Gurobi).
Differs: solved by HiGHS; bits are whole numbers and summed as such, so that the budget holds to the bit; and the result
comes with a lower bound on any plan's error, from the Lagrangian dual, which needs no trust in the solver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from quadapt.budget.candidates import Candidate
from quadapt.errors import ConfigError

TIME_LIMIT = 60.0
"""Seconds that the solver may take; what it has by then is used, and the bound says how good it is."""

ATTEMPTS = 5
"""How often the budget is tightened where the solver's own tolerance let it be exceeded."""


@dataclass(frozen=True)
class Option:
    """A way to hold one matrix, with its price."""

    candidate: Candidate
    """The grid and the storage with which the matrix would be held."""

    bits: int
    """What it takes out of the budget: all stored bytes, and those of an adapter if that counts."""

    error: float
    """The squared error (weighted by Fisher information, if there is some) of the matrix when it is held so."""


@dataclass(frozen=True)
class Solution:
    """A choice of one option for every matrix, within the budget."""

    chosen: dict[str, Option]
    """The chosen option for each matrix, by the name of the matrix."""

    bits: int
    """The bits that the chosen options take out of the budget, summed over all matrices."""

    objective: float
    """The squared errors of the chosen options, summed over all matrices."""

    bound: float
    """A bound that the solver has proved: no choice within the budget has a smaller sum of errors."""


def pareto(options: Sequence[Option]) -> list[Option]:
    """Options to which no other is equal or better in both bits and error, by rising bits. Never loses an optimum."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (each.bits, each.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def solve(options: Mapping[str, Sequence[Option]], budget: int) -> Solution:
    """Choose an option for every matrix.

    Args:
        options: The options for each matrix, by the name of the matrix.
        budget: How many bits all matrices may take together.

    Raises:
        ConfigError: Even the smallest options exceed the budget.
    """
    fronts = {name: pareto(each) for name, each in options.items()}
    least = sum(front[0].bits for front in fronts.values())
    if least > budget:
        raise ConfigError(
            f"the budget of {budget:,} bits is below {least:,}, the least that these layers take. Raise it"
        )
    dual = _Dual(fronts, budget)
    picks, bound = dual.solve()
    exact = _integer_program(fronts, budget)
    if exact is not None and dual.error(exact) <= dual.error(picks):
        picks = exact
    chosen = {name: front[pick] for (name, front), pick in zip(fronts.items(), picks, strict=True)}
    total = sum(option.bits for option in chosen.values())
    assert total <= budget, (total, budget)
    objective = sum(option.error for option in chosen.values())
    return Solution(chosen, total, objective, min(bound, objective))


def _integer_program(fronts: Mapping[str, Sequence[Option]], budget: int) -> list[int] | None:
    """An optimum by HiGHS, as positions in the fronts; None if it found nothing within the budget.

    Its tolerance is relative to the numbers it is given. These are bits beyond each matrix's smallest option, in units
    of a thousandth of what can be spent; where rounded choices still exceed the budget, it is tightened.
    """
    sizes = [np.array([option.bits - front[0].bits for option in front]) for front in fronts.values()]
    errors = np.concatenate([[option.error for option in front] for front in fronts.values()])
    room = budget - sum(front[0].bits for front in fronts.values())
    unit = max(1.0, room / 1000)
    worst = sum(front[0].error for front in fronts.values()) or 1.0
    counts = [len(front) for front in fronts.values()]
    ends = np.cumsum(counts)
    one_each = csr_array((np.ones(ends[-1]), np.arange(ends[-1]), np.concatenate([[0], ends])))
    tight = room
    for _ in range(ATTEMPTS):
        found = milp(
            errors * (1e6 / worst),
            integrality=np.ones(ends[-1]),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(np.concatenate(sizes)[None] / unit, -np.inf, tight / unit),
            ],
            options={"time_limit": TIME_LIMIT, "mip_rel_gap": 1e-6},
        )
        if found.x is None:
            return None
        # A variable may come out as 1e-9 or 1 - 1e-9: the largest of a matrix is the choice.
        picks = [int(part.argmax()) for part in np.split(found.x, ends[:-1])]
        spent = sum(int(size[pick]) for size, pick in zip(sizes, picks, strict=True))
        if spent <= room:
            return picks
        tight -= spent - room
    return None


class _Dual:
    """The Lagrangian dual: for any price of a bit, the cheapest choices bound the error of every plan from below."""

    def __init__(self, fronts: Mapping[str, Sequence[Option]], budget: int) -> None:
        self.budget = budget
        self.bits = [np.array([option.bits for option in front], dtype=np.int64) for front in fronts.values()]
        self.errors = [np.array([option.error for option in front]) for front in fronts.values()]

    def error(self, picks: Sequence[int]) -> float:
        """Sum of the errors of a choice."""
        return float(sum(errors[pick] for errors, pick in zip(self.errors, picks, strict=True)))

    def solve(self) -> tuple[list[int], float]:
        """A choice within the budget, and the highest lower bound found: by halving the interval of prices."""
        low, high = 0.0, 1.0
        picks, spent, best = self._at(low)
        if spent <= self.budget:
            return picks, best
        while (tried := self._at(high))[1] > self.budget:
            low, high = high, 4 * high
        within, best = tried[0], max(best, tried[2])
        for _ in range(200):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            picks, spent, bound = self._at(middle)
            best = max(best, bound)
            if spent <= self.budget:
                within, high = picks, middle
            else:
                low = middle
        return self._filled(within), best

    def _at(self, price: float) -> tuple[list[int], int, float]:
        """Cheapest choices at a price: picks (the smaller where two cost the same), their bits, and the bound."""
        picks = [int((errors + price * bits).argmin()) for errors, bits in zip(self.errors, self.bits, strict=True)]
        spent = sum(int(bits[pick]) for bits, pick in zip(self.bits, picks, strict=True))
        return picks, spent, self.error(picks) + price * (spent - self.budget)

    def _filled(self, picks: list[int]) -> list[int]:
        """Spend what is left, on whatever lowers the error most per bit."""
        picks = list(picks)
        left = self.budget - sum(int(bits[pick]) for bits, pick in zip(self.bits, picks, strict=True))
        while True:
            steps = [
                ((self.errors[i][pick] - self.errors[i][to]) / (self.bits[i][to] - self.bits[i][pick]), i, to)
                for i, pick in enumerate(picks)
                for to in range(pick + 1, len(self.bits[i]))
                if self.bits[i][to] - self.bits[i][pick] <= left
            ]
            if not steps:
                return picks
            _, i, to = max(steps)
            left -= int(self.bits[i][to] - self.bits[i][picks[i]])
            picks[i] = to
