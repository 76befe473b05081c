"""Whole models for OpenVINO, run by it token by token beside transformers."""

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
from quadapt.exporters.openvino import FILE
from quadapt.hf.merge import merge
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format

IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
NEEDED = "needs onnxscript and openvino (pip install 'quadapt[openvino]')"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def compiled(folder: Path) -> Any:
    """The model as OpenVINO runs it on a CPU, in float32."""
    openvino = pytest.importorskip("openvino", reason=NEEDED)
    return openvino.Core().compile_model(folder / FILE, "CPU", EXACT)


def run(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits after each token: of ten at once, then of one more, then of the rest, over the keys and values before."""
    shapes = {each.get_any_name(): each.partial_shape for each in model.inputs}
    past = {
        name: np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
        for name, shape in shapes.items()
        if "past" in name
    }
    found, before = [], 0
    for some in (ids[:10], ids[10:11], ids[11:]):
        mask, places = np.ones((1, before + len(some)), np.int64), before + np.arange(len(some))[None]
        held = model({"input_ids": np.array([some]), "attention_mask": mask, "position_ids": places, **past})
        said = {each.get_any_name(): np.array(value) for each, value in held.items()}
        past = {name: said[name.replace("past_key_values", "present")] for name in past}
        found.append(torch.from_numpy(said["logits"][0]))
        before += len(some)
    return torch.cat(found)


def types(model: Any) -> list[str]:
    """How OpenVINO holds the weights of each layer that it runs."""
    known = [each.get_rt_info() for each in model.get_runtime_model().get_ordered_ops()]
    return [each["runtimePrecision"].astype(str) for each in known if each["layerType"].astype(str) == "FullyConnected"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_was_tuned_and_merged_is_what_openvino_runs(bits: int, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason=NEEDED)
    pytest.importorskip("openvino", reason=NEEDED)
    model = with_adapter(quantized(tiny(num_hidden_layers=1), Format(bits=bits, group_size=32)), Pooled())
    tuned = logits(model, IDS)
    merged, _ = merge(model)
    report = EXPORTERS["openvino"].made().write(merged, tokenizer, tmp_path / "out")
    assert report.format == "openvino"
    assert {each.suffix for each in (tmp_path / "out").iterdir()} == {".xml", ".bin", ".json"}
    theirs = compiled(tmp_path / "out")
    assert (run(theirs, IDS) - tuned).norm() < 1e-5 * tuned.norm()
    assert types(theirs).count("u2" if bits == 2 else "u4") == len(quantized_layers(merged))


@pytest.mark.slow
def test_whole_zero_points_and_dense_layers(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason=NEEDED)
    pytest.importorskip("openvino", reason=NEEDED)
    format = Format(bits=8, group_size=48, zero="integer")
    model = quantized(tiny("Qwen2", tie_word_embeddings=True), format, skip=("layers.1.mlp.up_proj",))
    EXPORTERS["openvino"].made().write(model, tokenizer, tmp_path / "out")
    theirs = compiled(tmp_path / "out")
    assert (run(theirs, IDS) - logits(model, IDS)).norm() < 1e-5 * logits(model, IDS).norm()
    assert types(theirs).count("u8") == len(quantized_layers(model))


@pytest.mark.skipif(find_spec("openvino") is not None, reason="openvino is installed")
def test_without_the_library_it_says_what_to_install(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"by its own reader\. pip install 'quadapt\[openvino\]'"):
        EXPORTERS["openvino"].made().write(quantized(tiny(), Format(bits=4, group_size=32)), tokenizer, tmp_path / "x")
