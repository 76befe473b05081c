"""The table of errors: the shortcut is as good as decomposing for every way, and weighs as it is told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from quadapt.budget import Solution, candidates, measure, pareto, solve, table
from quadapt.budget.table import _Table, table_start
from quadapt.errors import ShapeError
from quadapt.methods import method_named
from quadapt.nn.starts import LQ
from quadapt.nn.starts.lq import squared_error
from quadapt.quant.rounding import Nearest

LQ_LORA = method_named("lq-lora")


def decaying(out: int, columns: int) -> Tensor:
    least = min(out, columns)
    U, V = (torch.linalg.qr(torch.randn(size, least)).Q for size in (out, columns))
    return (U * torch.arange(1, least + 1) ** -0.6) @ V.T


@pytest.mark.parametrize("weighted", [False, True])
def test_without_a_low_rank_part_errors_are_those_of_rounding(weighted: bool) -> None:
    weight = torch.randn(96, 128)
    fisher = torch.rand(96, 128)
    found = measure(weight, candidates(LQ_LORA), LQ_LORA, rank=0, statistics={"fisher": fisher} if weighted else {})
    assert 10 < len(found) < 150
    for option in found[::5]:
        way = option.candidate
        layout = way.layout(96, 128)
        missed = (Nearest()(weight, layout).dequantize() - weight).square()
        assert option.error == pytest.approx(float((missed * fisher if weighted else missed).sum()), rel=1e-4)
        assert option.bits == layout.bits


def test_codes_may_be_chosen_by_the_exact_scales() -> None:
    qlora, weight = method_named("qlora"), torch.randn(96, 128)
    for option in measure(weight, candidates(qlora), qlora, rank=0)[::9]:
        quantized = qlora.rounding(weight, option.candidate.layout(96, 128), {})
        assert option.error == pytest.approx(float((quantized.dequantize() - weight).square().sum()), rel=1e-4)


@pytest.mark.parametrize("method", ["qa-lora", "e2e-qp", "peqa", "gptq-lora"])
def test_other_methods_are_measured_by_their_own_rounding(method: str) -> None:
    chosen, weight = method_named(method), torch.randn(48, 128)
    found = measure(weight, candidates(chosen), chosen, rank=0)
    assert len(found) == 28  # the widest codes with fp32 scales, too
    for option in found[::5]:
        layout = option.candidate.layout(48, 128)
        want = chosen.rounding.without_data()(weight, layout).dequantize()
        assert option.error == pytest.approx(float((want - weight).square().sum()), rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_plans_by_the_shortcut_are_as_good_as_by_the_whole_table(weighted: bool) -> None:
    """Judged by what the method's own start, run to its end, makes of either plan."""
    weights = {f"w{i}": decaying(64, 160) * 1.6**i for i in range(4)}
    fisher = {name: {"fisher": torch.rand(64, 160) ** 2} if weighted else {} for name in weights}
    ways = [way for way in candidates(LQ_LORA) if way.format.bits < 8][::4]
    start, whole = table_start(LQ_LORA, weighted), LQ(fisher=weighted)
    full = {name: _Table(weight, start, Nearest(), 8, fisher[name]).each(ways) for name, weight in weights.items()}
    quick = {name: measure(weight, ways, LQ_LORA, rank=8, statistics=fisher[name]) for name, weight in weights.items()}

    def outcome(solution: Solution) -> float:
        total = 0.0
        for name, option in solution.chosen.items():
            layout = option.candidate.layout(64, 160)
            begun = whole(weights[name], partial(Nearest(), layout=layout), 8, fisher[name])
            assert begun.factors is not None
            rest = weights[name] - begun.weight.dequantize()
            total += squared_error(rest, *begun.factors, fisher[name].get("fisher"))
        return total

    ratios = []
    for bits in (2.4, 2.75, 3.25):
        budget = int(bits * 4 * 64 * 160)
        ratios.append(outcome(solve(quick, budget)) / outcome(solve(full, budget)))
    assert max(ratios) < 1.12  # four small matrices: one step more or less of one of them shows
    assert sum(ratios) / 3 < 1.04


def test_nothing_that_matters_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = decaying(192, 256)
    short = pareto(measure(weight, candidates(LQ_LORA), LQ_LORA, rank=8))
    monkeypatch.setattr(table, "GAIN", -1e9)
    whole = pareto(measure(weight, candidates(LQ_LORA), LQ_LORA, rank=8))
    assert len(short) < len(whole)
    for option in whole:  # some option that was kept takes no more bits and errs hardly more
        assert min(each.error for each in short if each.bits <= option.bits) <= 1.01 * option.error


def test_constants_that_fp16_cannot_hold_are_no_option() -> None:
    for scale in (1e-7, 1e6):
        found = measure(scale * torch.randn(64, 64), candidates(LQ_LORA), LQ_LORA, rank=0)
        kinds = [option.candidate.storage.of_scales for option in found]
        assert all(kind and kind.constant == "fp32" for kind in kinds)
    found = measure(1e-7 * torch.randn(64, 64), candidates(method_named("qa-lora")), method_named("qa-lora"), rank=0)
    kept = {(option.candidate.format.bits, option.candidate.storage.scales) for option in found}
    assert kept == {(8, "fp32")}


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    weight = torch.randn(64, 64)
    weight[3, 4] = torch.nan
    for method in ("lq-lora", "qa-lora"):
        with pytest.raises(ShapeError, match="1 of 4096 weights are NaN or infinite"):
            measure(weight, candidates(method_named(method)), method_named(method), rank=0)


def test_zeros_cost_nothing() -> None:
    found = measure(torch.zeros(64, 64), candidates(LQ_LORA), LQ_LORA, rank=4)
    assert min(option.error for option in found) == 0.0


def test_the_table_runs_fewer_turns_than_the_start() -> None:
    start = table_start(replace(LQ_LORA), False)
    assert getattr(start, "iterations", None) == table.TURNS < LQ_LORA.start.iterations  # type: ignore[attr-defined]
    assert table_start(LQ_LORA, True).needs == {"fisher"}
