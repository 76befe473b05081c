"""Experts are calibrated on the tokens that are sent to them, and on no others; what is known of none is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FAMILIES, logits_of, tiny_of
from torch import Tensor, nn

from quadapt.calibrate import LEAST_TOKENS, BlockWalk, walk
from quadapt.model.layer import Quantization
from quadapt.model.quantize import Done, quantize_model, quantized_layers
from quadapt.model.select import find_blocks, select
from quadapt.nn.block_ap import BlockAP
from quadapt.nn.starts import Start, Zero
from quadapt.nn.starts.calibrated import CLoQ
from quadapt.nn.starts.lq import LQ
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, Rounding
from quadapt.quant.storage import Storage
from quadapt.statistics import FISHER, MOMENT, StatisticsFiles, gather_fisher, gather_second_moments

FORMAT = Format(bits=3, group_size=32)
EXPERTS = "model.layers.0.mlp.experts"


def _batches(sequences: int = 8, length: int = 32) -> list[Tensor]:
    return list(torch.randint(3, 96, (2, sequences // 2, length), generator=torch.Generator().manual_seed(2)))


def _quantize(model: Any, rounding: Rounding, batches: list[Tensor], start: Start | None = None, **more: Any) -> Done:
    plan = Quantization(
        format=FORMAT, storage=Storage.default(FORMAT), rounding=rounding, start=start or Zero(), rank=4
    )
    return quantize_model(model, select(model).chosen, plan, batches=batches, **more)


def _sent(model: Any, batches: list[Tensor], expert: int) -> Tensor:
    """What transformers' own model sends to an expert of its first layer, `[tokens, in]`."""
    taken: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, _weights = args
        taken.append(hidden[(chosen == expert).any(-1)])

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(note)
    for batch in batches:
        logits_of(model, batch)
    handle.remove()
    return torch.cat(taken)


@pytest.mark.parametrize("chunk", [1 << 30, 50_000], ids=["in one pass", "in several"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_each_expert_is_quantized_as_if_alone(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "MOMENTS_AT_ONCE", chunk)
    dense, batches = tiny_of(name), _batches()
    model = copy.deepcopy(dense)
    chosen = {each: layer for each, layer in select(model).chosen.items() if each.startswith(EXPERTS)}
    rounding = GPTQ()
    plan = Quantization(format=FORMAT, storage=Storage.default(FORMAT), rounding=rounding)
    done = quantize_model(model, chosen, plan, batches=batches)
    experts: Any = model.get_submodule(EXPERTS)
    for at in range(4):
        x = _sent(dense, batches, at)
        assert len(x) >= LEAST_TOKENS
        gate, up = experts[at].gate_proj, experts[at].up_proj
        with torch.no_grad():
            inner = experts.gated(gate(x), up(x))
        for part, inputs in (("gate_proj", x), ("up_proj", x), ("down_proj", inner)):
            path = f"{EXPERTS}.{at}.{part}"
            moment = (inputs.double().T @ inputs.double()) / len(inputs)
            alone = rounding(chosen[path].weight.detach(), done.weights[path].layout, {"second_moment": moment})
            assert torch.equal(done.weights[path].codes(), alone.codes()), path
    assert not any(row.note for row in done.rows)


def _starved() -> Any:
    """A model whose first layer sends nothing to expert 3."""
    model = tiny_of("GptOss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -100.0
    return model


@pytest.mark.parametrize("rounding", [GPTQ(), GPTQ(true_sequential=False)], ids=["in order", "all at first"])
def test_an_expert_that_sees_no_text_is_rounded_to_nearest_and_named(rounding: GPTQ) -> None:
    model, nearest = _starved(), _starved()
    rows = {row.name: row for row in _quantize(model, rounding, _batches()).rows}
    _quantize(nearest, Nearest(), [])
    starved = {f"{EXPERTS}.3.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    assert {name for name, row in rows.items() if row.note} == starved
    for name in starved:
        assert rows[name].note == "rounded to nearest: an expert to which fewer than 32 tokens were sent"
        found, wanted = (quantized_layers(each)[name].quant_weight for each in (model, nearest))
        assert found.digest() == wanted.digest()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_walked_through(name: str) -> None:
    model = tiny_of(name)
    done = _quantize(model, GPTQ(), _batches(16))
    assert done.weights.keys() == quantized_layers(model).keys()
    assert bool(torch.isfinite(logits_of(model)).all())


def test_a_block_is_trained_with_its_experts() -> None:
    model = _starved()
    rounding = BlockAP(epochs=1, learning_rate=1e-3)
    done = _quantize(model, rounding, _batches())
    assert done.weights.keys() == quantized_layers(model).keys()
    assert bool(torch.isfinite(logits_of(model)).all())


def test_stages_of_experts_stand_together() -> None:
    model = tiny_of("Qwen2Moe")
    chosen = select(model).chosen
    with BlockWalk(model, find_blocks(model), _batches()) as going:
        name = going.order[0]
        found = going.stages(name, {each: layer for each, layer in chosen.items() if each.startswith(f"{name}.")})
    routed = [stage for stage in found if any(".experts." in each for each in stage)]
    both = [[f"{name}.mlp.experts.{at}.gate_proj", f"{name}.mlp.experts.{at}.up_proj"] for at in range(4)]
    assert routed == both + [[f"{name}.mlp.experts.{at}.down_proj"] for at in range(4)]


def test_experts_that_are_modules_in_the_models_own_code_may_rest(tiny_llama: Any) -> None:
    class Routed(nn.Module):
        """Sends all tokens to the first of two experts."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)  # type: ignore[no-any-return]

    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp)
    rows = _quantize(model, GPTQ(), _batches()).rows
    assert {row.name for row in rows if row.note} == {row.name for row in rows if ".experts.1." in row.name}


# --- statistics of the dense model ------------------------------------------------------------------------------------


def test_second_moments_are_those_of_the_tokens_sent(tmp_path: Path) -> None:
    dense, model, batches = _starved(), _starved(), _batches()
    chosen = select(model).chosen
    files = StatisticsFiles(tmp_path)
    gather_second_moments(model, chosen, batches, files)
    x = _sent(dense, batches, 1).double()
    for part in ("gate_proj", "up_proj"):
        torch.testing.assert_close(
            files[f"{EXPERTS}.1.{part}"][MOMENT], (x.T @ x / len(x)).float(), rtol=1e-4, atol=1e-5
        )
    assert files[f"{EXPERTS}.3.gate_proj"] == {}
    assert not files.missing(MOMENT, chosen)  # it is known that there is none


def test_fisher_information_of_an_expert_that_is_not_used_is_zero(tmp_path: Path) -> None:
    """Nothing is lost where it loses: a plan gives it the fewest bits, and a start by Fisher weighs all alike."""
    model = _starved()
    chosen, files = select(model).chosen, StatisticsFiles(tmp_path)
    gather_fisher(model, chosen, _batches(2), files)
    assert not files[f"{EXPERTS}.3.up_proj"][FISHER].any()
    assert files[f"{EXPERTS}.0.up_proj"][FISHER].sum() > 0
    assert not files.missing(FISHER, chosen)
    done = _quantize(model, Nearest(), [], LQ(fisher=True), statistics=files)
    assert not any(row.note for row in done.rows)
    assert all(bool(torch.isfinite(each).all()) for pair in done.factors.values() for each in pair)


def test_a_start_without_statistics_is_said(tmp_path: Path) -> None:
    model = _starved()
    files = StatisticsFiles(tmp_path)
    gather_second_moments(model, select(model).chosen, _batches(), files)
    done = _quantize(model, Nearest(), [], CLoQ(), statistics=files)
    notes = {row.name: row.note for row in done.rows if row.note}
    assert set(notes.values()) == {"no cloq start: an expert to which fewer than 32 tokens were sent"}
    assert set(notes) == {f"{EXPERTS}.3.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
