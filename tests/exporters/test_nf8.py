"""Adapters held as nf8: what they take, what they compute, and that every command takes the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import quadapt
from quadapt.errors import ConfigError, ExportError
from quadapt.exporters.nf8 import export_nf8
from quadapt.hf.compressed import NF8_FILE, attach, read_nf8, write_nf8
from quadapt.hf.peft_layer import adapted_layers, lora_config
from quadapt.hf.quantizer import fingerprint_of
from quadapt.nn.adapters import Elastic, LoRA, Pooled
from quadapt.quant.format import Format


@pytest.mark.parametrize(("rank", "out", "columns"), [(64, 4096, 4096), (4, 128, 352), (3, 5, 7)])
def test_factors_come_back_nearly_and_take_8_bits(rank: int, out: int, columns: int, tmp_path: Path) -> None:
    A, B = torch.randn(rank, columns), torch.randn(out, rank)
    sizes = write_nf8(tmp_path / NF8_FILE, {"a.b": (A, B)})
    found = read_nf8(tmp_path / NF8_FILE)
    for part, factor in (("A", A), ("B", B)):
        again = found[f"base_model.model.a.b.lora_{part}.weight"]
        assert again.shape == factor.shape
        assert again.is_contiguous()
        assert float((again - factor).norm() / factor.norm()) < 0.01
    if rank == 64:
        assert 8 * sizes["a.b"] / (A.numel() + B.numel()) == pytest.approx(8.127, abs=2e-3)


@pytest.mark.parametrize(
    ("adapter", "start"),
    [(LoRA(), "zero"), (Elastic(), "zero"), (LoRA(), "lq"), (LoRA(train_start=False), "lq")],
    ids=["lora", "elastic", "started", "frozen"],
)
def test_the_adapter_computes_nearly_the_same(
    adapter: Any, start: str, quantized_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = quantized_llama(Format(bits=4, group_size=32))
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
    model = get_peft_model(base, lora_config(adapter, rank=8, alpha=8, start=start)).eval()
    for layer in adapted_layers(model).values():
        if start != "zero":
            layer.begin("default", 0.05 * torch.randn(layer.out_features, 8), 0.2 * torch.randn(8, layer.in_features))
        layer.lora_B["default"].weight.data.normal_(std=0.05)
        if "beta" in layer.params("default"):
            layer.params("default")["beta"].data.fill_(0.3)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    report = export_nf8(model, tmp_path / "nf8")
    assert "effective bits per weight: 5.000 for the base" in report.notes[0]
    again = attach(quantized_llama(Format(bits=4, group_size=32)), tmp_path / "nf8").eval()
    with torch.no_grad():
        found = again(input_ids=ids).logits
    assert float((found - trained).norm()) < 0.02 * float((trained - plain).norm())


def test_from_python_the_folder_loads_over_its_base(
    quantized_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    base = quantized_llama(vocab_size=320)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora_config(LoRA(), rank=8, alpha=8, base_fingerprint=fingerprint_of(base))).eval()
    for layer in adapted_layers(model).values():
        layer.lora_B["default"].weight.data.normal_(std=0.05)
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        report = quadapt.export(model, tokenizer, tmp_path / "nf8", format="nf8")
        again, kept = quadapt.load(tmp_path / "nf8", base=str(tmp_path / "base"))
        found = again(input_ids=ids).logits
    assert report.format == "nf8"
    assert len(kept) == len(tokenizer)
    assert float((found - trained).norm() / trained.norm()) < 0.01
    with pytest.raises(ConfigError, match=r"format='nf9' is unknown\. Did you mean nf8"):
        quadapt.export(model, tokenizer, tmp_path / "no", format="nf9")


def test_what_merges_is_refused(quantized_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = get_peft_model(quantized_llama(), lora_config(Pooled(), rank=2, alpha=2))
    with pytest.raises(ExportError, match="the adapter merges into the codes"):
        export_nf8(model, tmp_path / "nf8")
    assert not (tmp_path / "nf8").exists()
