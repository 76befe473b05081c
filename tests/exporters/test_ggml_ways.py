"""The ways to hold a matrix in GGML's blocks: which are exact, which is taken, and what the others cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_models import logits, quantized, tiny
from gguf.quants import dequantize
from gguf_models import MODELS

from quadapt import load, merge, prepare
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.ggml import ASIDE, Held, bytes_of, ways, why_not, why_not_layout
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.llama_cpp import LlamaCpp, differences
from quadapt.exporters.survey import Subject, survey
from quadapt.kernels import expand
from quadapt.methods import peqa
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format, Zero
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight


def weight(bits: int, zero: Zero, group_size: int = 32, floats: str = "fp16", columns: int = 512) -> QuantWeight:
    torch.manual_seed(0)
    format = Format(bits=bits, zero=zero, group_size=group_size)
    layout = Layout(format=format, storage=Storage.floating(floats, zero), out=48, columns=columns)
    return Nearest()(torch.randn(48, columns) * 0.02, layout)


def read(held: Held) -> np.ndarray:
    """The weights that llama.cpp computes with: blocks as the `gguf` package reads them, and offsets from beside."""
    found = dequantize(bytes_of(held.weight), gguf.GGMLQuantizationType[held.block.name])
    if held.aside is None:
        return found
    columns = held.weight.layout.columns
    return found + expand(held.aside, held.weight.format.width(columns), columns).numpy()


EXACT: list[tuple[int, Zero, str, str]] = [
    (2, "none", "fp16", "Q4_0"),
    (2, "integer", "fp16", "Q4_0"),
    (3, "integer", "fp16", "Q4_0"),
    (4, "integer", "fp16", "Q5_0"),
    (5, "integer", "fp16", "Q8_0"),
    (6, "integer", "fp16", "Q8_0"),
    (4, "float", "fp16", "Q4_1"),
    (8, "none", "fp16", "Q8_0"),
]


@pytest.mark.parametrize("group_size", [32, 96, -1])
@pytest.mark.parametrize(("bits", "zero", "floats", "block"), EXACT)
def test_the_smallest_exact_type_is_taken(bits: int, zero: Zero, floats: str, block: str, group_size: int) -> None:
    stored = weight(bits, zero, group_size, floats)
    found = ways(stored)
    assert found[0].block.name == block
    sizes = [held.block.bits_per_weight for held in found]
    assert sizes == sorted(sizes)
    for held in found:
        assert held.change is None or held.change.words == ASIDE
        if held.change is None:
            np.testing.assert_array_equal(read(held), stored.dequantize().numpy(), strict=True)
    assert why_not(stored) == why_not_layout(stored.layout) == ""


def test_zero_points_whose_products_float16_holds_need_no_fifth_bit() -> None:
    layout = Layout(
        format=Format(bits=4, zero="integer"), storage=Storage.floating("fp16", "integer"), out=4, columns=32
    )
    stored = QuantWeight.build(
        layout, torch.full((4, 16), 0xF0, dtype=torch.uint8), torch.full((4, 1), 0.5), torch.full((4, 1), 7)
    )
    assert [held.block.name for held in ways(stored)] == ["Q4_1", "Q5_0", "Q8_0"]
    np.testing.assert_array_equal(read(ways(stored)[0]), stored.dequantize().numpy())


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("bits", [6, 8])
def test_wide_codes_leave_their_offsets_beside(bits: int, zero: Zero) -> None:
    """Added in float32, they make the weights but for that addition's own rounding."""
    stored = weight(bits, zero, 64)
    held = ways(stored)[-1]
    assert held.block.name == "Q8_0"
    assert held.change is not None
    assert held.change.words == ASIDE
    assert held.change.moved.most < 1e-3
    np.testing.assert_allclose(read(held), stored.dequantize().numpy(), rtol=0, atol=1e-6)


def apart(held: Held, stored: QuantWeight) -> np.ndarray:
    """How far each weight is from its own, in steps; by hand."""
    columns = stored.layout.columns
    steps = expand(stored.scales, stored.format.width(columns), columns).double().numpy()
    return np.abs(read(held).astype(np.float64) - stored.dequantize().double().numpy()) / steps


FAST: list[tuple[int, Zero, str, int, str]] = [
    (2, "float", "fp16", 512, "Q2_K"),
    (3, "float", "fp16", 512, "Q4_K"),
    (4, "float", "fp16", 512, "Q4_K"),
    (4, "integer", "fp16", 512, "Q4_K"),
    (5, "float", "fp16", 512, "Q5_K"),
    (4, "integer", "fp16", 96, "Q4_1"),
    (4, "none", "fp32", 512, "Q4_0"),
    (8, "none", "fp32", 512, "Q8_0"),
    (8, "float", "fp32", 512, "Q8_0"),
]


@pytest.mark.parametrize(("bits", "zero", "floats", "columns", "block"), FAST)
def test_fast_types_say_how_far_weights_move(bits: int, zero: Zero, floats: str, columns: int, block: str) -> None:
    stored = weight(bits, zero, 32, floats, columns)
    held = ways(stored, "fast")[0]
    assert held.block.name == block
    assert held.change is not None
    by_hand = apart(held, stored)
    assert held.change.moved.mean == pytest.approx(float(np.sqrt((by_hand**2).mean())), rel=1e-3)
    assert held.change.moved.most == pytest.approx(float(by_hand.max()), rel=1e-3)
    assert 0 < held.change.moved.mean < 0.15
    assert "codes as they are" in held.change.words
    if held.aside is None and held.weight.format.bits == bits:
        assert torch.equal(held.weight.codes(), stored.codes())


def test_fast_leaves_fast_types_alone() -> None:
    assert [held.block.name for held in ways(weight(4, "none"), "fast")] == ["Q4_0"]
    assert ways(weight(4, "none"), "fast")[0].change is None


def test_super_blocks_have_no_positive_offsets_so_that_those_are_quantized_anew() -> None:
    stored = weight(4, "float", 64)
    assert stored.offsets is not None
    lifted = stored.with_offsets(stored.offsets.abs(), "fp16")
    held = ways(lifted, "fast")[0]
    assert held.block.name == "Q4_K"
    assert held.change is not None
    assert held.change.words == "quantized anew, which moves less than keeping codes"
    kept = ways(stored, "fast")[0]
    assert kept.change is not None
    assert kept.change.words.startswith("codes as they are")


IDS = torch.randint(2, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("zero", ["integer", "float"])
def test_llama_cpp_adds_the_offsets_from_beside(zero: Zero, tokenizer: Any, tmp_path: Path) -> None:
    """What differs is its rounding of activations to 8 bits; without the second file it is another model."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")
    model = tiny(hidden_size=256, intermediate_size=512, num_hidden_layers=1, initializer_range=0.05)
    model = quantized(model, Format(bits=8, zero=zero, group_size=64), Storage.floating("fp16", zero))
    path, lora = tmp_path / "model.gguf", tmp_path / "model-offsets.gguf"
    report = export_gguf(model, tokenizer, path)
    assert {row.type for row in report.tensors if row.linear} == {"Q8_0"}
    assert report.bytes == path.stat().st_size + lora.stat().st_size
    assert 8.5 < report.bits_per_weight < 10
    assert any("--lora model-offsets.gguf" in note for note in report.notes)
    with_it, without = differences(path, model, IDS, lora=lora), differences(path, model, IDS)
    print(f"{zero}: with the offsets {with_it.max():.3f} at most, without them {without.max():.1f}")
    assert with_it.max() < 0.1
    assert without.max() > 1


def test_experts_have_one_type_that_all_of_them_fit(tokenizer: Any, tmp_path: Path) -> None:
    """The zero-points of one expert are such that four bits would do for it alone."""
    kind, changes = MODELS["mixtral"]
    model = quantized(tiny(kind, **changes), Format(bits=4, zero="integer", group_size=32))
    layer = quantized_layers(model)["model.layers.0.mlp.experts.1.up_proj"]
    old = layer.quant_weight
    layer.quant_weight = QuantWeight.build(
        old.layout, old.packed, old.scales.sign() * 0.25, torch.full((old.layout.out, old.layout.groups), 8)
    )
    assert ways(layer.quant_weight)[0].block.name == "Q4_0"
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert next(row.type for row in report.tensors if row.name == "blk.0.ffn_up_exps.weight") == "Q5_0"
    assert not any("several types" in note for note in report.notes)


def test_fast_files_answer_nearly_alike(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")
    model = tiny(hidden_size=256, intermediate_size=512, num_hidden_layers=1, initializer_range=0.05)
    model = quantized(model, Format(bits=4, zero="integer", group_size=64))
    report = export_gguf(model, tokenizer, tmp_path / "fast.gguf", gguf_type="fast")
    assert {row.type for row in report.tensors if row.linear} == {"Q4_K"}
    assert sum("in Q4_K: codes as they are" in note for note in report.notes) == 1
    ours = logits(model, IDS).log_softmax(-1)
    with LlamaCpp(tmp_path / "fast.gguf") as llama:
        theirs = llama.token_logprobs(IDS)
    assert sum(max(row, key=row.__getitem__) == int(ours[at].argmax()) for at, row in enumerate(theirs)) > 50


def test_the_survey_says_what_fast_changes() -> None:
    stored = weight(4, "float")
    (answer,) = survey(Subject(matrices={"layer": lambda: stored}), [EXPORTERS["gguf"](gguf_type="fast")])
    assert answer.holds == "changed"
    assert "Q4_K, codes as they are" in answer.words
    (answer,) = survey(Subject(matrices={"layer": lambda: stored}), [EXPORTERS["gguf"]()])
    assert answer.holds == "exactly"


def test_scales_over_the_levels_of_iq4_nl_train_merge_and_go_out_exactly(tokenizer: Any, tmp_path: Path) -> None:
    method = peqa(group_size=32).having(levels="iq4-nl")
    assert (method.format.name, method.format.zero) == ("iq4-nl-g32", "none")
    adapted = prepare(tiny(), method=method)
    ids = torch.randint(2, 300, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    optimizer = torch.optim.Adam([each for each in adapted.parameters() if each.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        loss = adapted.train()(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    tuned = logits(adapted.eval(), ids)
    merged, certificate = merge(adapted)
    assert certificate.verdict == "exact"
    report = export_gguf(merged, tokenizer, tmp_path / "model.gguf")
    assert {row.type for row in report.tensors if row.linear} == {"IQ4_NL"}
    assert report.bits_per_weight == 4.5
    again, _ = load(tmp_path / "model.gguf", dtype="float32")
    assert {layer.layout.format.name for layer in quantized_layers(again).values()} == {"iq4-nl-g32"}
    assert torch.equal(logits(again, ids), tuned)
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")
    assert differences(tmp_path / "model.gguf", merged, ids).mean() < 0.1  # it rounds activations to 8 bits


def test_fast_rounds_scales_of_iq4_nl_and_keeps_codes() -> None:
    torch.manual_seed(0)
    layout = Layout(
        format=Format(levels="iq4-nl", bits=4), storage=Storage(scales="fp32", offsets="absent"), out=8, columns=64
    )
    stored = Nearest()(torch.randn(8, 64) * 0.02, layout)
    assert ways(stored) == []
    (held,) = ways(stored, "fast")
    assert (held.block.name, torch.equal(held.weight.codes(), stored.codes())) == ("IQ4_NL", True)
    assert held.change is not None
    assert held.change.moved.mean < 0.05
