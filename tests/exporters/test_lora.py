"""Adapters as stock LoRA: PEFT alone, over the dequantized base, gives what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import logits, quantized, tiny, with_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quadapt.errors import ExportError
from quadapt.exporters.dense import export_hf
from quadapt.exporters.gguf_lora import export_gguf_lora
from quadapt.exporters.lora import export_lora
from quadapt.hf.peft_layer import adapted_layers
from quadapt.nn.adapters import Adapter, Elastic, LoRA, Pooled
from quadapt.quant.format import Format

FORMATS = [Format(bits=4, group_size=32), Format(bits=2, group_size=64), Format(levels="nf", bits=3)]
IDS = torch.randint(2, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def over_the_dense_base(model: Any, tokenizer: Any, tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base and of base + adapter, by transformers and PEFT from the two exported folders."""
    export_lora(model, tmp_path / "adapter", base=str(tmp_path / "dense"))
    export_hf(model.unload(), tokenizer, tmp_path / "dense", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    alone = logits(base, IDS)
    return alone, logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), IDS)


@pytest.mark.parametrize("format", FORMATS, ids=[format.name for format in FORMATS])
@pytest.mark.parametrize(
    ("adapter", "alpha"),
    [(LoRA(), 6.0), (Elastic(), 6.0), (Pooled(form="side"), 6.0), (Pooled(form="side", pooling="mean"), 90.0)],
    ids=["lora", "elastic", "pooled", "mean"],
)
def test_peft_gives_what_was_trained(
    adapter: Adapter, alpha: float, format: Format, tokenizer: Any, tmp_path: Path
) -> None:
    model = with_adapter(quantized(tiny(), format), adapter, alpha=alpha)
    ours = logits(model, IDS)
    alone, theirs = over_the_dense_base(model, tokenizer, tmp_path)
    assert (theirs - ours).abs().max() < 1e-3
    assert (alone - ours).abs().max() > 0.1


def test_the_merged_form_is_equivalent_up_to_the_rounding_of_offsets(tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny()), Pooled())
    ours = logits(model, IDS)
    report = export_lora(model, tmp_path / "again")
    alone, theirs = over_the_dense_base(model, tokenizer, tmp_path)
    assert 1e-4 < (theirs - ours).abs().max() < 0.1 * (alone - ours).abs().max()
    assert any("merged form" in note and "export it merged" in note for note in report.notes)
    assert (theirs - ours).norm() < 0.01 * (alone - ours).norm()


WITHOUT = """
import sys
sys.modules["quadapt"] = None  # not to be had
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.tensor([eval(sys.argv[3])])
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    alone = base(ids).logits[0].float()
    adapted = PeftModel.from_pretrained(base, sys.argv[2]).eval()(ids).logits[0].float()
torch.save([alone, adapted], sys.argv[4])
"""


def test_base_and_adapter_load_where_there_is_no_quadapt(tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny()), Pooled(form="side"))
    ours = logits(model, IDS)
    over_the_dense_base(model, tokenizer, tmp_path)
    arguments = [tmp_path / "dense", tmp_path / "adapter", IDS, tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", WITHOUT, *map(str, arguments)], check=True)
    alone, adapted = torch.load(tmp_path / "out.pt")
    assert (alone - logits(quantized(tiny()), IDS)).abs().max() < 1e-3
    assert (adapted - ours).abs().max() < 1e-3
    assert (alone - ours).abs().max() > 0.1


def test_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny(), Format(bits=4, group_size=64)), Pooled(), alpha=8.0)
    before = json.dumps(model.peft_config["default"].to_dict(), default=str)
    report = export_lora(model, tmp_path / "adapter", base="some/base")
    assert json.dumps(model.peft_config["default"].to_dict(), default=str) == before
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "quadapt" not in json.dumps(config)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == len(report.tensors) == 2 * 14
    for name, layer in adapted_layers(model).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        pooled = layer.lora_A["default"].weight
        assert A.shape == (4, layer.in_features)
        for column in range(layer.in_features):  # the last group of 96 inputs is a short one
            assert torch.equal(A[:, column], pooled[:, column // 64])
        assert torch.equal(B, layer.lora_B["default"].weight)
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    bits = 32 * sum(tensor.numel() for tensor in tensors.values())
    assert report.bits_per_weight == pytest.approx(bits / (2 * 30720))
    assert "not the model before quantization" in report.notes[0]


def test_another_adapter_of_the_same_model(tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny()), LoRA())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    report = export_lora(model, tmp_path / "second", adapter_name="second")
    assert {row.shape for row in report.tensors} == {(2, 64), (64, 2)}
    assert len(report.tensors) == 2 * 2
    with pytest.raises(ExportError, match=r"adapter 'third'.*default, second"):
        export_lora(model, tmp_path / "third", adapter_name="third")
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


def test_trained_modules_go_along(tokenizer: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = get_peft_model(quantized(tiny()), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    ours = logits(model, IDS)
    _, theirs = over_the_dense_base(model, tokenizer, tmp_path)
    assert (theirs - ours).abs().max() < 1e-3
    assert {"base_model.model.model.norm.weight", "base_model.model.lm_head.lora_A.weight"} <= set(
        load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    )


KEPT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks of layers": {"rank_pattern": {"q_proj": 4, "mlp.up_proj": 4}, "alpha_pattern": {"v_proj": 12.0}},
    "beside a dense layer": {"target_modules": ["q_proj", "up_proj", "lm_head"]},
}


@pytest.mark.parametrize(("kind", "case"), [*((LoRA, case) for case in KEPT), (Elastic, "plain")])
def test_a_frozen_start_goes_out_with_what_trained_beside_it(
    kind: type[Any], case: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = with_adapter(quantized(tiny()), kind(train_start=False), alpha=6.0, start="lq", **KEPT[case])
    if case == "beside a dense layer":
        model.base_model.model.lm_head.lora_B["default"].weight.data.normal_(std=0.05)
    ours = logits(model, IDS)
    with model.disable_adapter():
        off = logits(model, IDS)
    report = export_lora(model, tmp_path / "again")
    alone, theirs = over_the_dense_base(model, tokenizer, tmp_path)
    assert (theirs - ours).abs().max() < 1e-3
    assert (off - ours).abs().max() > 0.1
    assert (off - alone).abs().max() > 0.1
    assert any("twice the adapter's" in note for note in report.notes)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    uniform = case in ("plain", "rslora")  # what servers understand that know one rank
    assert (config["r"], bool(config["rank_pattern"])) == ((8, False) if uniform else (4, True))
    if case == "plain":
        assert (config["lora_alpha"], type(config["lora_alpha"])) == (12, int)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it has adapters none"):
        export_lora(quantized(tiny()), tmp_path / "adapter")
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(ExportError, match="exists already"):
        export_lora(with_adapter(quantized(tiny()), LoRA()), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


GGUF_REFUSED = {
    "norm: has a whole module trained": {"modules_to_save": ["norm"]},
    "lm_head: has LoRA over a dense weight trained": {"target_modules": ["q_proj", "lm_head"]},
    "q_proj: its lora_B has a bias": {"lora_bias": True},
    r"more than one alpha \(\[8.0, 16.0\]\)": {"alpha_pattern": {"layers.0.self_attn.q_proj": 16}},
}


@pytest.mark.parametrize("why", GGUF_REFUSED)
def test_gguf_refuses_what_it_cannot_hold(why: str, tmp_path: Path) -> None:
    config = LoraConfig(**({"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | GGUF_REFUSED[why]))
    with pytest.raises(ExportError, match=f"{why}.*Use --format lora"):
        export_gguf_lora(get_peft_model(quantized(tiny()), config), tmp_path / "lora.gguf")
    assert list(tmp_path.iterdir()) == []
