"""Statistics of the full-precision model: against loops, kept on disk, gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quadapt.errors import CalibrationError
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model
from quadapt.model.select import select
from quadapt.nn.starts import CLoQ, QuAILoRA
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.statistics import FISHER, MOMENT, StatisticsFiles, gather_fisher, gather_second_moments

Make = Callable[..., Any]


def batches(*sizes: int, length: int = 24) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    return list(torch.randint(3, 96, (sum(sizes), length), generator=random).split(list(sizes)))


def moments_by_loop(model: nn.Module, layers: dict[str, nn.Linear], data: Sequence[Tensor]) -> dict[str, Tensor]:
    """Token by token, of the model run as a whole."""
    found = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64) for name, layer in layers.items()
    }
    handles = []
    for name, layer in layers.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            for x in args[0].flatten(0, -2).double():
                found[name] += torch.outer(x, x)

        handles.append(layer.register_forward_pre_hook(hook))
    tokens = 0
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch)
            tokens += batch.numel()
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in found.items()}


def test_second_moments_are_those_of_the_dense_model(tiny_llama: Make, tmp_path: Path) -> None:
    model, files = tiny_llama(), StatisticsFiles(tmp_path / "s")
    layers = select(model).chosen
    gather_second_moments(model, layers, batches(2, 1), files)
    want = moments_by_loop(model, layers, batches(3))
    assert set(files) == set(layers)
    for name in layers:
        torch.testing.assert_close(files[name][MOMENT].double(), want[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(files[name][MOMENT], files[name][MOMENT].T)


def test_the_split_into_batches_and_the_order_of_sequences_do_not_matter(tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    layers = select(model).chosen
    whole = torch.cat(batches(4))
    found = []
    for at, data in enumerate(([whole], list(whole.flip(0).split(3)))):
        files = StatisticsFiles(tmp_path / str(at))
        gather_second_moments(model, layers, data, files)
        found.append(files)
    for name in layers:
        torch.testing.assert_close(found[0][name][MOMENT], found[1][name][MOMENT], rtol=1e-5, atol=1e-6)


def test_layers_that_share_an_input_share_a_file_entry(tiny_llama: Make, tmp_path: Path) -> None:
    model, files = tiny_llama(), StatisticsFiles(tmp_path / "s")
    gather_second_moments(model, select(model).chosen, batches(2), files)
    from safetensors import safe_open

    path = tmp_path / "s" / f"{MOMENT}@model.layers.0.safetensors"
    with safe_open(path, framework="pt") as file:
        sizes = sorted(len(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    triangle = [size * (size + 1) // 2 for size in (64, 64, 64, 96)]  # q/k/v, o, gate/up, down
    assert sizes == triangle


class Passes:
    """Progress that counts, and is interrupted after some units."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.units = until, list[str]()

    def __call__(self, units: Sequence[str]) -> Iterator[str]:
        for done, unit in enumerate(units):
            if done == self.until:
                raise KeyboardInterrupt
            self.units.append(unit)
            yield unit


def test_what_is_there_is_not_gathered_again(tiny_llama: Make, tmp_path: Path) -> None:
    model, folder = tiny_llama(), tmp_path / "s"
    layers = select(model).chosen
    with pytest.raises(KeyboardInterrupt):
        gather_second_moments(model, layers, batches(3), StatisticsFiles(folder), Passes(1))
    assert len(StatisticsFiles(folder)) == 7
    gather_second_moments(model, layers, batches(3), StatisticsFiles(folder))
    resumed, whole = StatisticsFiles(folder), StatisticsFiles(tmp_path / "whole")
    gather_second_moments(model, layers, batches(3), whole)
    assert all(torch.equal(resumed[name][MOMENT], whole[name][MOMENT]) for name in layers)
    idle = Passes()
    gather_second_moments(model, layers, [], resumed, idle)  # no data is needed where nothing is missing
    assert idle.units == []
    (folder / f"{MOMENT}@model.layers.1.safetensors").write_bytes(b"damaged")
    assert len(StatisticsFiles(folder).missing(MOMENT, layers)) == 7


# --- Fisher -----------------------------------------------------------------------------------------------------------


def fisher_by_loop(model: nn.Module, layers: dict[str, nn.Linear], data: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    found = {name: torch.zeros(layer.weight.shape) for name, layer in layers.items()}
    for sequence in data:
        model.zero_grad()
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sequence[1:]).backward()
        for name in layers:
            found[name] += model.get_submodule(name).weight.grad.square()
    return found


def test_fisher_is_the_sum_of_squared_gradients_of_single_sequences(tiny_llama: Make, tmp_path: Path) -> None:
    model, files = tiny_llama(), StatisticsFiles(tmp_path / "s")
    layers = select(model).chosen
    data = batches(3, 2)
    gather_fisher(model, layers, data, files)
    want = fisher_by_loop(model, layers, torch.cat(data))
    for name in layers:
        torch.testing.assert_close(files[name][FISHER], want[name], rtol=1e-4, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not list((tmp_path / "s").glob("partial*"))


def test_the_square_of_a_batchs_gradient_is_something_else(tiny_llama: Make) -> None:
    model, data = tiny_llama(), torch.cat(batches(4))
    layers = select(model).chosen
    single = fisher_by_loop(model, layers, data)
    model.zero_grad()
    model(input_ids=data, labels=data).loss.backward()
    name = next(iter(layers))
    batched = len(data) * model.get_submodule(name).weight.grad.square()
    assert float((batched - single[name]).norm()) > 0.3 * float(single[name].norm())


def test_an_interrupted_fisher_run_goes_on(tiny_llama: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("quadapt.statistics._SECONDS_AT_RISK", 0.0)
    model = tiny_llama()
    layers, folder = select(model).chosen, tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        gather_fisher(model, layers, batches(5), StatisticsFiles(folder), Passes(3))
    assert len(StatisticsFiles(folder)) == 0  # partial sums are none to be read
    rest = Passes()
    gather_fisher(model, layers, batches(5), StatisticsFiles(folder), rest)
    assert rest.units == ["3", "4"]
    want = fisher_by_loop(model, layers, torch.cat(batches(5)))
    for name in layers:
        torch.testing.assert_close(StatisticsFiles(folder)[name][FISHER], want[name], rtol=1e-4, atol=1e-9)


def test_gradients_that_are_not_finite_are_named(tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="gradients are not finite"):
        gather_fisher(model, select(model).chosen, batches(1), StatisticsFiles(tmp_path / "s"))
    with pytest.raises(CalibrationError, match="there is no calibration data"):
        gather_fisher(model, select(model).chosen, [], StatisticsFiles(tmp_path / "s"))


# --- in a whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ()], ids=["nearest", "gptq"])
def test_starts_bring_a_models_layers_nearer_to_the_dense_ones(rounding: Any, tiny_llama: Make, tmp_path: Path) -> None:
    """Output error of each layer on text that was not calibrated on, below that of a start at zero."""
    model, files = tiny_llama(), StatisticsFiles(tmp_path / "s")
    dense = copy.deepcopy(model)
    layers = select(model).chosen
    gather_second_moments(model, layers, batches(8, 8), files)
    plan = Quantization(
        format=Format(bits=3, group_size=32), storage=Storage(), rounding=rounding, start=QuAILoRA(), rank=8
    )
    done = quantize_model(model, layers, plan, batches=batches(8, 8), statistics=files)
    assert set(done.factors) == set(layers)
    fresh = moments_by_loop(dense, select(dense).chosen, [torch.randint(3, 96, (6, 24))])
    better = 0
    for name, weight in done.weights.items():
        up, down = (factor.double() for factor in done.factors[name])
        E = dense.get_submodule(name).weight.detach().double() - weight.dequantize().double()
        with_, without = (float(((e @ fresh[name]) * e).sum()) for e in (E - up @ down, E))
        better += with_ < without
        row = next(row for row in done.rows if row.name == name)
        assert row.start_error is not None
        assert row.start_error[1] < row.start_error[0]
    assert better == len(done.weights)


def test_layers_without_an_adapter_or_statistics_start_at_zero_and_say_so(tiny_llama: Make, tmp_path: Path) -> None:
    model, files = tiny_llama(), StatisticsFiles(tmp_path / "s")
    layers = {**select(model).chosen, "lm_head": model.lm_head}
    gather_second_moments(model, layers, batches(4), files)
    format = Format(bits=4, group_size=32)
    plan = Quantization(
        format=format, storage=Storage(), rounding=Nearest(), start=CLoQ(), rank=4, adapted=["q_proj", "lm_head"]
    )
    done = quantize_model(model, layers, plan, statistics=files)
    assert sorted(done.factors) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert done.rows[-1].note == "no cloq start: lies outside the blocks"
