"""The integer program: as good as trying everything, never over the budget, and proven by its bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import lq_numpy

from quadapt.budget import Candidate, Option, candidates, effective_bits, pareto, solve
from quadapt.budget.candidates import NF_GROUPS, SCALES, adapter_bits
from quadapt.budget.program import _Dual, _integer_program
from quadapt.errors import ConfigError
from quadapt.methods import method_named
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

ANY = Candidate(Format(), Storage())

SMALL = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 100, width=32)), min_size=1, max_size=5), min_size=1, max_size=6
)
"""Up to six matrices with up to five options: bits and error."""


def options(rows: list[list[tuple[int, float]]]) -> dict[str, list[Option]]:
    return {str(i): [Option(ANY, bits, error) for bits, error in row] for i, row in enumerate(rows)}


def brute(rows: list[list[tuple[int, float]]], budget: int) -> float | None:
    found = lq_numpy.best_plan([[e for _, e in row] for row in rows], [[b for b, _ in row] for row in rows], budget)
    return None if found is None else found[0]


@given(rows=SMALL, share=st.floats(0, 1))
def test_it_is_as_good_as_trying_everything(rows: list[list[tuple[int, float]]], share: float) -> None:
    least, most = (sum(choose(bits for bits, _ in row) for row in rows) for choose in (min, max))
    budget = least + int(share * (most - least))
    found, want = solve(options(rows), budget), brute(rows, budget)
    assert want is not None
    assert found.objective == pytest.approx(want, rel=1e-5, abs=1e-9)
    assert found.bound <= found.objective
    assert found.bound <= want * (1 + 1e-9) + 1e-9
    assert found.bits == sum(option.bits for option in found.chosen.values()) <= budget
    assert list(found.chosen) == [str(i) for i in range(len(rows))]


@given(rows=SMALL, share=st.floats(0, 1))
def test_the_front_has_every_optimum(rows: list[list[tuple[int, float]]], share: float) -> None:
    fronts = [[(option.bits, option.error) for option in pareto(each)] for each in options(rows).values()]
    least, most = (sum(choose(bits for bits, _ in row) for row in rows) for choose in (min, max))
    budget = least + int(share * (most - least))
    assert brute(fronts, budget) == brute(rows, budget)
    for front in fronts:
        assert front == sorted(front)
        assert all(one[1] > other[1] for one, other in itertools.pairwise(front))


def large(seed: int, matrices: int = 60) -> dict[str, list[Option]]:
    """As from a model of billions of weights: bits of odd sizes, errors that fall fourfold with every bit."""
    drawn, found = np.random.default_rng(seed), {}
    for i in range(matrices):
        weights, error = int(drawn.integers(1 << 22, 1 << 26)), float(drawn.lognormal(0, 2))
        found[f"layers.{i}"] = [
            Option(ANY, int(weights * bits) + 32, error * 4.0**-bits * float(drawn.uniform(0.9, 1.1)))
            for bits in np.linspace(2.03, 8.6, 24)
        ]
    return found


@pytest.mark.parametrize("seed", range(3))
def test_billions_of_bits_stay_within_the_budget_to_the_bit(seed: int) -> None:
    table = large(seed)
    least = sum(row[0].bits for row in table.values())
    before = float("inf")
    for share in (1.0, 1.001, 1.2, 1.5, 2.0):
        found = solve(table, int(least * share))
        assert sum(option.bits for option in found.chosen.values()) <= int(least * share)
        assert found.bound <= found.objective <= before * (1 + 1e-6)
        assert found.objective / found.bound - 1 < 0.05
        before = found.objective


def test_what_the_solver_leaves_out_the_dual_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    table = large(0)
    budget = int(1.3 * sum(row[0].bits for row in table.values()))
    best = solve(table, budget)
    assert _integer_program(table, budget) is not None
    monkeypatch.setattr("quadapt.budget.program._integer_program", lambda *_: None)
    found = solve(table, budget)
    assert found.bits <= budget
    assert best.objective <= found.objective < 1.05 * best.objective
    assert found.bound == best.bound


@pytest.mark.parametrize(
    ("budget", "want"),
    [
        (20, [0, 0]),  # nothing is left
        (21, [0, 0]),  # nothing fits
        (23, [1, 0]),  # the better step does not
        (24, [0, 1]),  # what fits exactly: the second matrix gains 2 a bit, the first 1.5
        (26, [1, 1]),
        (27, [1, 1]),
        (28, [1, 2]),
        (40, [2, 2]),  # to the end, though the last steps gain little
        (60, [2, 2]),
    ],
)
def test_what_is_left_goes_to_the_largest_gain_a_bit(budget: int, want: list[int]) -> None:
    front = [Option(ANY, 10, 20.0), Option(ANY, 12, 17.0), Option(ANY, 20, 16.0)]
    other = [Option(ANY, 10, 20.0), Option(ANY, 14, 12.0), Option(ANY, 16, 11.0)]
    assert _Dual({"a": front, "b": other}, budget)._filled([0, 0]) == want


@pytest.mark.parametrize("seed", range(5))
def test_without_the_solver_nothing_that_still_fits_is_left_out(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quadapt.budget.program._integer_program", lambda *_: None)
    table = large(seed, 12)
    budget = int(1.37 * sum(row[0].bits for row in table.values()))
    found = solve(table, budget)
    for name, option in found.chosen.items():
        better = [each for each in table[name] if each.error < option.error]
        assert all(found.bits - option.bits + each.bits > budget for each in better), name


def test_more_than_is_needed_takes_the_best_of_each() -> None:
    table = large(0, 5)
    found = solve(table, 10**12)
    assert found.objective == sum(min(option.error for option in row) for row in table.values())


def test_a_budget_that_nothing_fits_is_refused_with_the_least() -> None:
    with pytest.raises(ConfigError, match=r"the budget of 11 bits is below 12"):
        solve(options([[(7, 1.0), (9, 0.5)], [(5, 1.0)]]), 11)


# --- what there is to choose from, and what it costs ------------------------------------------------------------------


def test_the_grid_is_the_papers_but_for_bfloat16() -> None:
    ways = candidates(method_named("lq-lora"))
    assert len(set(ways)) == len(ways) == 432 * 2 // 3
    assert 3 * len(ways) // 2 == 4 * len(NF_GROUPS) * len(SCALES) * 3 // 2 == 432
    bits = [way.layout(4096, 4096).bits_per_weight for way in ways]
    assert min(bits) == pytest.approx(2.032, abs=1e-3)
    assert max(bits) == pytest.approx(8.625, abs=1e-3)


def test_integers_have_widths_and_groups_and_the_methods_storage() -> None:
    ways = candidates(method_named("qa-lora"))
    assert {(way.format.bits, way.format.group_size) for way in ways} == set(
        itertools.product((2, 3, 4, 5, 6, 8), (16, 32, 64, 128))
    )
    assert {way.storage for way in ways if way.format.bits < 8} == {method_named("qa-lora").storage}
    assert all(way.format.zero == "integer" for way in candidates(method_named("e2e-qp")))


@pytest.mark.parametrize("name", ["l4q", "qat-lora", "lr-qat"])
def test_adapters_with_a_grid_of_their_own_take_no_plan(name: str) -> None:
    with pytest.raises(ConfigError, match="quantizes by its own grid"):
        candidates(method_named(name))


def llama(hidden: int, inner: int, keys: int, layers: int) -> list[tuple[int, int]]:
    """Shapes of the matrices of a Llama 2."""
    block = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    return layers * [*block, (inner, hidden), (inner, hidden), (hidden, inner)]


def test_effective_bits_are_the_papers() -> None:
    small, large_ = llama(4096, 11008, 4096, 32), llama(8192, 28672, 1024, 80)
    assert effective_bits(small, 2.75, 64) == pytest.approx(2.951, abs=5e-4)
    assert effective_bits(large_, 2.75, 64) == pytest.approx(2.848, abs=5e-4)
    assert effective_bits(small, 2.75, 64, "fp16") == pytest.approx(3.145, abs=5e-4)


def test_adapters_are_counted_in_whole_bits() -> None:
    layout = Layout(format=Format(bits=4, group_size=32), storage=Storage(), out=64, columns=96)
    assert adapter_bits(method_named("lq-lora"), layout, 4, "fp16") == 16 * 4 * (64 + 96)
    assert adapter_bits(method_named("qa-lora"), layout, 4, "fp16") == 16 * 4 * (64 + 3)
    assert adapter_bits(method_named("peqa"), layout, 4, "fp16") == 0
    nf8 = adapter_bits(method_named("lq-lora"), layout, 4, "nf8")
    assert nf8 == int(8.126953125 * 4 * (64 + 96)) + 1
    assert torch.tensor(nf8).dtype == torch.int64
