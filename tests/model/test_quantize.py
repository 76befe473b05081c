"""Quantizing a model in place: the walk, its report, and going on after an interruption."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quadapt.errors import CalibrationError, ConfigError, ShapeError
from quadapt.hf.blocks import BlockFiles
from quadapt.model.layer import LayerRow, Quantization, quantize_layer, relative_error
from quadapt.model.quantize import Done, bits_of, fingerprint, quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, Rounding
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Make = Callable[..., Any]
ORDER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
FORMAT = Format(bits=3, group_size=32)


def batches(count: int = 3, length: int = 24) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (2, length), generator=random) for _ in range(count)]


def plan_of(rounding: Rounding, **settings: Any) -> Quantization:
    return Quantization(**{"format": FORMAT, "storage": Storage(), "rounding": rounding, **settings})


def digests(model: nn.Module) -> dict[str, str]:
    return {name: layer.quant_weight.digest() for name, layer in quantized_layers(model).items()}


@dataclass(frozen=True, kw_only=True)
class Spy(GPTQ):
    """GPTQ that notes, call by call, the weight and the second moment that it was given."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def __call__(self, weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]) -> QuantWeight:
        self.calls.append((weight.clone(), statistics["second_moment"].clone()))
        gptq = GPTQ(**{each.name: getattr(self, each.name) for each in fields(GPTQ)})
        return gptq(weight, layout, statistics)


# --- without data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_layer_is_rounded_as_it_would_be_alone(dtype: torch.dtype, tiny_llama: Make) -> None:
    model = tiny_llama(attention_bias=True, dtype=dtype)
    dense = copy.deepcopy(model)
    selection = select(model)
    quantize_model(model, selection.chosen, plan_of(Nearest()))
    for name in selection.chosen:
        layer, original = model.get_submodule(name), dense.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        layout = Layout(format=FORMAT, storage=Storage(), out=original.out_features, columns=original.in_features)
        assert layer.quant_weight.digest() == Nearest()(original.weight, layout).digest()
        assert (layer.bias is None) == (original.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, original.bias)
    for name, value in dense.state_dict().items():
        assert name.rpartition(".")[0] in selection.chosen or torch.equal(model.state_dict()[name], value), name
    assert not any(p.requires_grad for layer in quantized_layers(model).values() for p in layer.parameters())


def test_the_report_has_a_row_for_each_layer_in_the_order_of_the_walk(tiny_llama: Make) -> None:
    model = tiny_llama()
    dense = copy.deepcopy(model)
    rows = quantize_model(model, select(model).chosen, plan_of(Nearest())).rows
    assert [row.name for row in rows] == [f"model.layers.{block}.{name}" for block in (0, 1) for name in ORDER]
    for row in rows:
        layer, weight = model.get_submodule(row.name), dense.get_submodule(row.name).weight
        assert (row.out, row.columns) == tuple(weight.shape)
        assert row.format == "int3-g32"
        assert row.bits_per_weight == layer.layout.bits_per_weight == 4.0
        error = ((layer.quant_weight.dequantize() - weight).norm() / weight.norm()).detach()
        assert row.error == pytest.approx(float(error), rel=1e-5)
        assert row.seconds >= 0
        assert row.note == ""


def test_layers_of_the_plan_have_a_grid_of_their_own(tiny_llama: Make) -> None:
    model = tiny_llama()
    own = (Format(levels="nf", bits=4, group_size=64), Storage(scales="double", offsets="absent"))
    name = "model.layers.1.mlp.up_proj"
    rows = quantize_model(model, select(model).chosen, plan_of(Nearest(), layers={name: own})).rows
    layouts = {name: (layer.layout.format, layer.layout.storage) for name, layer in quantized_layers(model).items()}
    assert layouts.pop(name) == own
    assert set(layouts.values()) == {(FORMAT, Storage())}
    assert next(row.format for row in rows if row.name == name) == "nf4-g64"


def test_scales_that_fp16_cannot_hold_become_fp32_with_a_note(tiny_llama: Make) -> None:
    model = tiny_llama()
    name = "model.layers.0.mlp.gate_proj"
    model.get_submodule(name).weight.data *= 1e-6
    rows = {row.name: row for row in quantize_model(model, select(model).chosen, plan_of(Nearest())).rows}
    assert model.get_submodule(name).layout.storage == Storage(scales="fp32", offsets="fp32")
    assert rows[name].note.startswith("fp32 scales: ")
    assert rows[name].error < 0.3
    assert rows[name].bits_per_weight == 5.0
    assert [row.note for row in rows.values() if row.name != name] == [""] * 13


def test_a_weight_that_is_not_finite_names_its_layer(tiny_llama: Make) -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ShapeError, match=r"^model\.layers\.1\.self_attn\.v_proj: 1 of 2048 weights are NaN"):
        quantize_model(model, select(model).chosen, plan_of(Nearest()))


def test_a_layer_of_zeros_has_no_error() -> None:
    weight = torch.zeros(4, 32)
    begun, row = quantize_layer("zeros", weight, plan_of(Nearest()), {})
    assert row.error == 0.0
    assert relative_error(begun.weight, weight) == 0.0


# --- calibrated -------------------------------------------------------------------------------------------------------


def moment_of(model: nn.Module, name: str, data: Sequence[Tensor]) -> Tensor:
    """`X^T X / n` of a layer's inputs, from plain runs of the whole model."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch)
    hook.remove()
    x = torch.cat(seen).double()
    return x.T @ x / len(x)


def test_every_layer_is_calibrated_on_the_quantized_layers_before_it(tiny_llama: Make) -> None:
    """Layer by layer: a model in which just the stages before it are quantized sees the second moment that GPTQ saw."""
    model, spy = tiny_llama(), Spy()
    dense = copy.deepcopy(model)
    rows = quantize_model(model, select(model).chosen, plan_of(spy), batches=batches()).rows
    half = copy.deepcopy(dense)
    stages = [ORDER[:3], ORDER[3:4], ORDER[4:6], ORDER[6:]]
    calls = iter(zip(rows, spy.calls, strict=True))
    for block in (0, 1):
        for stage in stages:
            names = [f"model.layers.{block}.{name}" for name in stage]
            for name in names:
                row, (weight, moment) = next(calls)
                assert row.name == name
                assert torch.equal(weight, dense.get_submodule(name).weight)
                torch.testing.assert_close(moment, moment_of(half, name, batches()), rtol=1e-4, atol=1e-6)
            for name in names:
                half.set_submodule(name, QuantLinear.of(model.get_submodule(name).quant_weight))
    full = moment_of(dense, rows[-1].name, batches())
    assert float((spy.calls[-1][1] - full).norm() / full.norm()) > 0.01  # the two would be told apart


def test_layers_that_share_their_input_share_their_second_moment(tiny_llama: Make) -> None:
    model, spy = tiny_llama(), Spy()
    quantize_model(model, select(model).chosen, plan_of(spy), batches=batches())
    moments = [moment for _, moment in spy.calls]
    assert torch.equal(moments[0], moments[1])
    assert torch.equal(moments[0], moments[2])
    assert torch.equal(moments[4], moments[5])
    assert not torch.equal(moments[0], moments[3])


def test_without_true_sequential_a_block_is_calibrated_as_it_was(tiny_llama: Make) -> None:
    model, spy = tiny_llama(), Spy(true_sequential=False)
    dense = copy.deepcopy(model)
    quantize_model(model, select(model).chosen, plan_of(spy), batches=batches())
    for at, name in enumerate(ORDER):
        want = moment_of(dense, f"model.layers.0.{name}", batches())
        torch.testing.assert_close(spy.calls[at][1], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_gptq_lowers_the_error_of_the_models_output(settings: dict[str, Any], tiny_llama: Make) -> None:
    dense, data = tiny_llama(**settings), batches(8)
    lost = {}
    for name, rounding in (("gptq", GPTQ()), ("nearest", Nearest())):
        model = copy.deepcopy(dense)
        quantize_model(model, select(model).chosen, plan_of(rounding), batches=data)
        with torch.no_grad():
            changes = [model(input_ids=batch).logits - dense(input_ids=batch).logits for batch in data]
        lost[name] = float(torch.cat(changes).float().norm())
    assert lost["gptq"] < 0.9 * lost["nearest"]


def test_a_layer_outside_the_blocks_is_rounded_to_nearest_with_a_note(tiny_llama: Make) -> None:
    model = tiny_llama()
    layers = {**select(model).chosen, "lm_head": model.lm_head}
    weight = model.lm_head.weight.detach().clone()
    rows = quantize_model(model, layers, plan_of(GPTQ()), batches=batches()).rows
    assert rows[-1].name == "lm_head"
    assert rows[-1].note == "rounded to nearest: lies outside the blocks"
    layout = Layout(format=FORMAT, storage=Storage(), out=96, columns=64)
    assert model.lm_head.quant_weight.digest() == Nearest()(weight, layout).digest()
    assert all(row.note == "" for row in rows[:-1])


def test_blocks_without_layers_to_quantize_are_walked_through(tiny_llama: Make) -> None:
    model, spy = tiny_llama(), Spy()
    dense = copy.deepcopy(model)
    rows = quantize_model(
        model, select(model, target_modules=["layers.1.mlp"]).chosen, plan_of(spy), batches=batches()
    ).rows
    assert [row.name for row in rows] == [f"model.layers.1.{name}" for name in ORDER[4:]]
    torch.testing.assert_close(spy.calls[0][1], moment_of(dense, rows[0].name, batches()), rtol=1e-4, atol=1e-6)


def test_without_data_a_calibrated_rounding_is_refused(tiny_llama: Make) -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="no calibration data"):
        quantize_model(model, select(model).chosen, plan_of(GPTQ()))
    assert quantized_layers(model) == {}


def test_an_overflow_on_the_data_names_the_layer(tiny_llama: Make) -> None:
    model = tiny_llama()
    model.model.layers[0].post_attention_layernorm.weight.data[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"^model\.layers\.0\.mlp\.gate_proj: .*NaN or infinite entries"):
        quantize_model(model, select(model).chosen, plan_of(GPTQ()), batches=batches())


# --- interrupted ------------------------------------------------------------------------------------------------------


def until(count: int) -> Callable[[Sequence[str]], Iterator[str]]:
    """Progress during which somebody presses Ctrl-C after some units."""

    def progress(units: Sequence[str]) -> Iterator[str]:
        for done, unit in enumerate(units):
            if done == count:
                raise KeyboardInterrupt
            yield unit

    return progress


@pytest.mark.parametrize("rounding", [Nearest(range="mse"), GPTQ(), GPTQ(act_order=True)], ids=["mse", "gptq", "act"])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    rounding: Rounding, done: int, tiny_llama: Make, tmp_path: Path
) -> None:
    whole = tiny_llama()
    layers = {**select(whole).chosen, "lm_head": whole.lm_head}
    want = quantize_model(whole, layers, plan_of(rounding), batches=batches()).rows
    first = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            first,
            {**select(first).chosen, "lm_head": first.lm_head},
            plan_of(rounding),
            batches=batches(),
            keeper=BlockFiles(tmp_path),
            progress=until(done),
        )
    assert len(quantized_layers(first)) == 7 * done
    second = tiny_llama()
    rows = quantize_model(
        second,
        {**select(second).chosen, "lm_head": second.lm_head},
        plan_of(rounding),
        batches=batches(),
        keeper=BlockFiles(tmp_path),
    ).rows
    assert digests(second) == digests(whole)
    timeless = [[{**asdict(row), "seconds": 0} for row in each] for each in (rows, want)]
    assert timeless[0] == timeless[1]
    with torch.no_grad():
        assert torch.equal(second(input_ids=batches()[0]).logits, whole(input_ids=batches()[0]).logits)


def test_finished_blocks_are_not_quantized_again(tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            model,
            select(model).chosen,
            plan_of(Spy()),
            batches=batches(),
            keeper=BlockFiles(tmp_path),
            progress=until(1),
        )
    again, spy = tiny_llama(), Spy()
    quantize_model(again, select(again).chosen, plan_of(spy), batches=batches(), keeper=BlockFiles(tmp_path))
    assert len(spy.calls) == 7
    last, idle = tiny_llama(), Spy()
    quantize_model(last, select(last).chosen, plan_of(idle), batches=batches(), keeper=BlockFiles(tmp_path))
    assert idle.calls == []
    assert digests(last) == digests(again)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "missing"])
def test_a_damaged_block_is_quantized_again(damage: str, tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_model(model, select(model).chosen, plan_of(Nearest()), keeper=BlockFiles(tmp_path))
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.unlink()  # mapped by the model above: never write into it
    if damage == "foreign":
        save_file({"a": torch.ones(2)}, path)
    elif damage != "missing":
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    again = tiny_llama()
    rows = quantize_model(again, select(again).chosen, plan_of(Nearest()), keeper=BlockFiles(tmp_path)).rows
    assert digests(again) == digests(model)
    assert len(rows) == 14


def test_kept_blocks_come_back_as_they_were(quant_weight: Make, tmp_path: Path) -> None:
    weights = {
        "model.layers.0.a": quant_weight(Format(bits=3), permuted=True),
        "model.layers.0.b": quant_weight(Format(levels="nf", bits=8), 5, 7),
    }
    rows = [
        LayerRow(name=name, out=1, columns=2, format="x", bits_per_weight=3.5, error=0.1, seconds=0.2, note="ß")
        for name in weights
    ]
    rows[1] = replace(rows[1], block_error=(0.5, 0.25))
    factors = (torch.randn(24, 3), torch.randn(80, 3).T)
    keeper = BlockFiles(tmp_path / "blocks")
    assert keeper.find("model.layers.0") is None
    kept = keeper.keep("model.layers.0", Done(weights, rows, {"model.layers.0.a": factors}))
    found = BlockFiles(tmp_path / "blocks").find("model.layers.0")
    assert found is not None
    for each in (kept, found):
        assert {name: weight.digest() for name, weight in each.weights.items()} == {
            name: weight.digest() for name, weight in weights.items()
        }
        assert each.rows == rows
        assert list(each.factors) == ["model.layers.0.a"]
        assert all(torch.equal(*pair) for pair in zip(each.factors["model.layers.0.a"], factors, strict=True))
    assert not list((tmp_path / "blocks").glob("*.tmp"))


# --- about a model ----------------------------------------------------------------------------------------------------


def test_quantized_layers_are_found_by_name(quantized_llama: Make) -> None:
    model = quantized_llama(skip=("down_proj",))
    assert len(quantized_layers(model)) == 12
    assert set(quantized_layers(model, ["layers.1.mlp", "k_proj"])) == {
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_bits_of_a_model_are_the_mean_over_its_weights() -> None:
    four = Layout(format=Format(bits=4), storage=Storage(), out=8, columns=64)
    two = Layout(format=Format(bits=2), storage=Storage(), out=24, columns=64)
    assert bits_of([four, two]) == pytest.approx((5.0 * 8 + 3.0 * 24) / 32)
    with pytest.raises(ConfigError, match="no quantized layer"):
        bits_of([])


def test_the_fingerprint_is_of_names_and_bits(quant_weight: Make) -> None:
    one, other = quant_weight(Format(bits=4)), quant_weight(Format(bits=3))
    prints = {
        fingerprint(weights)
        for weights in (
            {"a": one, "b": other},
            {"a": other, "b": one},
            {"a": one},
            {"c": one, "b": other},
            {"a": one, "b": one},
        )
    }
    assert len(prints) == 5
    assert fingerprint({"a": one, "b": other}) == fingerprint({"b": other, "a": one})


def test_a_plan_needs_data_if_its_rounding_does() -> None:
    assert plan_of(GPTQ()).needs_data
    assert not plan_of(Nearest()).needs_data
