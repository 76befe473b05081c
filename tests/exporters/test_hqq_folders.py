"""HQQ's folders: read in NumPy, by our own importer, and run by hqq where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_models import tiny_of
from export_models import check_in_steps, logits, quantized, tiny, with_adapter
from reference.hqq_pack_numpy import read

import quadapt
from quadapt.errors import ExportError
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.hqq import FILE, HQQWriter
from quadapt.hf.merge import merge
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight as a reader in NumPy has it, that follows the description of the format alone."""
    found = {}
    for name, held in torch.load(folder / FILE, weights_only=True).items():
        if "W_q" in held:
            parts = {part: held[part].float().numpy() for part in ("scale", "zero")}
            parts |= {"W_q": held["W_q"].numpy(), "nbits": np.array(held["nbits"]), "shape": np.array(held["shape"])}
            found[name] = torch.from_numpy(read(parts)).float()
    return found


def run(folder: Path, ids: list[int]) -> torch.Tensor:
    """The logits of the model as hqq loads it, in float32 `[length, vocabulary]`."""
    base = pytest.importorskip("hqq.models.hf.base", reason="needs hqq (pip install hqq)")
    return logits(base.AutoHQQHFModel.from_quantized(str(folder), compute_dtype=torch.float32, device="cpu"), ids)


@pytest.mark.parametrize("zero", ["float", "none", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_read_as_they_are(bits: int, zero: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), Format(bits=bits, group_size=32, zero=zero), Storage.floating("fp16", zero))
    HQQWriter().export(model, tokenizer, tmp_path / "hqq")
    HQQWriter("float32", "safetensors").export(model, tokenizer, tmp_path / "safe")
    again, _ = quadapt.load(tmp_path / "safe", dtype="float32")
    check_in_steps(read_back(tmp_path / "hqq"), again, model)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_was_tuned_and_merged_is_what_hqq_runs(bits: int, tokenizer: Any, tmp_path: Path) -> None:
    """Also where head and embedding are one."""
    model = quantized(tiny("Qwen2", tie_word_embeddings=bits == 4), Format(bits=bits, group_size=32))
    model = with_adapter(model, Pooled())
    tuned = logits(model, IDS)
    merged, _ = merge(model)
    report = EXPORTERS["hqq"].made(dtype="float32").write(merged, tokenizer, tmp_path / "out")
    assert "compute_dtype=torch.float32" in report.notes[0]
    assert (run(tmp_path / "out", IDS) - tuned).norm() < 1e-5 * tuned.norm()


def test_whole_zero_points_give_the_very_same_logits(tokenizer: Any, tmp_path: Path) -> None:
    """Also where groups have an odd size, and a layer has stayed dense."""
    model = quantized(tiny(), Format(bits=4, group_size=48, zero="integer"), skip=("layers.1.mlp.up_proj",))
    EXPORTERS["hqq"].made(dtype="float32").write(model, tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["quant_config"]["weight_quant_params"]["nbits"] == 4
    assert (run(tmp_path / "out", IDS) - logits(model, IDS)).norm() < 1e-6 * logits(model, IDS).norm()


@pytest.mark.parametrize(
    ("format", "told"),
    [
        (Format(bits=5, group_size=32), r"int5-g32 has codes of 5 bits, and hqq knows 2, 3, 4 and 8\. Use"),
        (Format(levels="nf", bits=4, group_size=32), "nf4-g32 has levels that hqq cannot hold"),
    ],
    ids=["width", "levels"],
)
def test_what_it_cannot_hold_is_refused_by_name(format: Format, told: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"model\.layers\.\d\..*{told}"):
        HQQWriter("float32").export(quantized(tiny(), format), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_it_would_load_otherwise_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny_of("Mixtral", vocab_size=320), Format(bits=4, group_size=32))
    with pytest.raises(ExportError, match="experts: is a stack of experts in transformers, of which hqq reads no"):
        HQQWriter("float32").export(model, tokenizer, tmp_path / "out")
    model = quantized(tiny(), Format(bits=4, group_size=32))
    model.model.lonely = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ExportError, match=r"model\.lonely: belongs to no module that hqq reads"):
        HQQWriter().export(model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
