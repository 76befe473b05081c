"""What does not go into GGUF files: llama.cpp would compute something else, or would not read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import quantized, tiny, with_adapter
from gguf_models import LLAMA3

from quadapt.errors import ExportError
from quadapt.exporters.gguf import export_gguf
from quadapt.nn.adapters import Pooled

REFUSED = [
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        "rope_type default or linear or",
    ),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_refuses_what_llama_cpp_would_compute_otherwise(
    changes: dict[str, Any], why: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=why):
        export_gguf(quantized(tiny(**changes)), tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_refuses_other_families(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("OPT", ffn_dim=96, word_embed_proj_dim=64, pad_token_id=0)
    with pytest.raises(ExportError, match=r"OPTForCausalLM.*LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM"):
        export_gguf(quantized(model), tokenizer, tmp_path / "model.gguf")


def test_refuses_llama3_frequencies_where_llama_cpp_reads_none(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Qwen2ForCausalLM rope_type default or linear"):
        export_gguf(quantized(tiny("Qwen2", rope_parameters=LLAMA3)), tokenizer, tmp_path / "model.gguf")


def test_refuses_adapters(tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny()), Pooled())
    with pytest.raises(ExportError, match=r"q_proj: carries an adapter.*merge_and_unload"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")


def test_refuses_unknown_tensors(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    model.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ExportError, match=r"extra: llama.cpp's llama has no such tensor"):
        export_gguf(quantized(model), tokenizer, tmp_path / "model.gguf")


def test_refuses_a_folder_and_an_unknown_type(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny())
    with pytest.raises(ExportError, match="is a folder"):
        export_gguf(model, tokenizer, tmp_path)
    with pytest.raises(ExportError, match="Use f32 or f16"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf", dense="q8_0")  # type: ignore[arg-type]
