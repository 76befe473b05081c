"""Whole models for ONNX Runtime, run by it token by token beside transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import logits, quantized, tiny, with_adapter

from quadapt.errors import ExportError
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.onnx import FILE, ONNXWriter
from quadapt.exporters.survey import Subject, survey
from quadapt.hf.merge import merge
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
NEEDED = "needs onnx, onnxscript and onnxruntime (pip install 'quadapt[onnx]')"


def run(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits after each token: of ten at once, then of one more, then of the rest, over the keys and values before."""
    runtime = pytest.importorskip("onnxruntime", reason=NEEDED)
    session = runtime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    wanted = {each.name: each.shape for each in session.get_inputs()}
    past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in wanted.items() if "past" in name}
    found, before = [], 0
    for some in (ids[:10], ids[10:11], ids[11:]):
        given = {
            "input_ids": np.array([some]),
            "attention_mask": np.ones((1, before + len(some)), np.int64),
            "position_ids": before + np.arange(len(some))[None],
            **past,
        }
        rows, *held = session.run(None, {name: each for name, each in given.items() if name in wanted})
        past = dict(zip(past, held, strict=True))
        found.append(torch.from_numpy(rows[0]))
        before += len(some)
    return torch.cat(found)


def dequantized(weight: Any) -> np.ndarray:
    """The matrix that the operator's inputs mean, by its description: blocks along the inputs, low bits first."""
    parts = {name: each.numpy() for name, each in ONNXWriter("float32").parts(weight).items()}
    out, columns = weight.layout.out, weight.layout.columns
    bits = 8 * parts["codes"].shape[2] * parts["codes"].shape[1] // columns

    def spread(packed: np.ndarray) -> np.ndarray:
        flat = np.unpackbits(packed.reshape(out, -1), axis=1, bitorder="little").reshape(out, -1, bits)
        return (flat << np.arange(bits, dtype=np.uint8)).sum(-1).astype(np.float64)

    scales = parts["scales"].astype(np.float64).reshape(out, -1)
    zeros = parts["zeros"]
    zeros = zeros.reshape(out, -1) if zeros.dtype == np.float32 else spread(zeros)[:, : scales.shape[1]]
    size = columns // scales.shape[1]
    return (spread(parts["codes"]) - zeros.repeat(size, 1)) * scales.repeat(size, 1)


@pytest.mark.parametrize(
    "format",
    [
        *(Format(bits=bits, group_size=32, zero="float") for bits in (2, 3, 4)),
        *(Format(bits=bits, group_size=48, zero=zero) for bits in (2, 3, 4, 5, 6, 8) for zero in ("integer", "none")),
    ],
    ids=str,
)
def test_the_operator_is_given_the_weights(format: Format) -> None:
    model = quantized(tiny(), format, Storage.floating("fp16", format.zero))
    for name, layer in quantized_layers(model).items():
        found, weight = torch.from_numpy(dequantized(layer.quant_weight)), layer.quant_weight.dequantize()
        if format.zero == "float":
            torch.testing.assert_close(found.float(), weight, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found.float(), weight), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bits"),
    [("Llama", 4), ("Llama", 2), ("Qwen2", 3)],
    ids=["llama, 4 bits", "llama, 2 bits", "qwen2, 3 bits"],
)
def test_what_was_tuned_and_merged_is_what_onnx_runtime_runs(
    kind: str, bits: int, tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason=NEEDED)
    model = with_adapter(quantized(tiny(kind, num_hidden_layers=1), Format(bits=bits, group_size=32)), Pooled())
    tuned = logits(model, IDS)
    merged, _ = merge(model)
    report = EXPORTERS["onnx"].made().write(merged, tokenizer, tmp_path / "out")
    assert report.bits_per_weight == {2: 2, 3: 4, 4: 4}[bits] + 2
    assert (run(tmp_path / "out", IDS) - tuned).norm() < 1e-5 * tuned.norm()
    assert torch.equal(logits(merged, IDS), tuned)  # the model itself is as it was


@pytest.mark.slow
def test_whole_zero_points_and_dense_layers(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason=NEEDED)
    format = Format(bits=8, group_size=48, zero="integer")
    model = quantized(tiny("Qwen2", tie_word_embeddings=True), format, skip=("layers.1.mlp.up_proj",))
    EXPORTERS["onnx"].made().write(model, tokenizer, tmp_path / "out")
    assert (run(tmp_path / "out", IDS) - logits(model, IDS)).norm() < 1e-5 * logits(model, IDS).norm()


@pytest.mark.parametrize(
    ("format", "told"),
    [
        (Format(bits=8, group_size=32), "int8-g32 has offsets of floats, which ONNX Runtime knows for codes of 2, 3"),
        (Format(levels="nf", bits=4, group_size=32), "nf4-g32 has levels that onnx cannot hold"),
        (Format(bits=4, group_size=80), "groups of 80 in rows of 100 inputs, and onnx knows groups of 16, 32, 64, 128"),
    ],
    ids=["width", "levels", "size"],
)
def test_what_it_cannot_hold_is_refused_by_name(format: Format, told: str) -> None:
    model = quantized(tiny(intermediate_size=100 if format.group_size == 80 else 96), format)
    with pytest.raises(ExportError, match="layers"):
        ONNXWriter("float32")._check({name: each.quant_weight for name, each in quantized_layers(model).items()})
    matrices = {name: each.layout for name, each in quantized_layers(model).items()}
    (answer,) = survey(Subject(matrices=matrices), [EXPORTERS["onnx"]()])
    assert answer.holds == "no"
    assert told in answer.words


@pytest.mark.skipif(find_spec("onnxscript") is not None, reason="onnxscript is installed")
def test_without_the_libraries_it_says_what_to_install(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"with onnx and onnxscript\. pip install 'quadapt\[onnx\]'"):
        EXPORTERS["onnx"].made().write(quantized(tiny(), Format(bits=4, group_size=32)), tokenizer, tmp_path / "out")
