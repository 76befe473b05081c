"""Dense folders: an ordinary model, the quantized one up to a cast that is accounted for.

That they load where there is no quadapt, is shown in test_lora.py, together with adapters.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FAMILIES, logits_of, tensors_in, tiny_of
from export_models import logits, quantized, tiny, trained, with_adapter
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from quadapt.errors import ExportError
from quadapt.exporters import dense
from quadapt.exporters.dense import export_hf
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format

IDS = torch.randint(2, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
FORMATS = [
    Format(bits=2, group_size=32),
    Format(bits=4, group_size=64, zero="none"),
    Format(levels="nf", bits=4),
    Format(bits=8, group_size=-1),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("format", FORMATS, ids=[format.name for format in FORMATS])
def test_weights_are_the_stored_ones_rounded_once(format: Format, dtype: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(), format)
    report = export_hf(model, tokenizer, tmp_path / "dense", dtype=dtype)
    kind = getattr(torch, dtype)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    layers, rows = quantized_layers(model), {row.name: row for row in report.tensors}
    worst = 0.0
    for name, layer in layers.items():
        weight = layer.quant_weight
        exact = weight.dequantize()
        assert torch.equal(other[f"{name}.weight"], exact.to(kind))
        table = weight.format.table(exact)
        gap = 1.0 if table is None else float((table[1:] - table[:-1]).min())
        width = weight.format.width(weight.layout.columns)
        steps = gap * weight.scales.repeat_interleave(width, 1)[:, : exact.shape[1]]
        move = float(((exact.to(kind).float() - exact).abs() / steps).max())
        worst = max(worst, move)
        said = f"the cast moved a weight by up to {move:.4f} of a quantization step" if move else ""
        assert rows[f"{name}.weight"].note == said
        assert rows[f"{name}.weight"].linear
    assert bool(worst) == (dtype != "float32")
    assert report.bits_per_weight == 8 * kind.itemsize
    if worst:
        assert f"{dtype} does not hold the quantized weights exactly" in report.notes[0]
        assert f"by up to {worst:.4f} of a quantization step" in report.notes[0]
        assert "model.embed_tokens.weight" in report.notes[1]  # float32 before
    else:
        assert report.notes == ()


def test_the_folder_is_an_ordinary_one(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny(tie_word_embeddings=True).to(torch.bfloat16))
    model.generation_config.max_new_tokens = 7
    report = export_hf(model, tokenizer, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert hasattr(model.config, "quantization_config")
    assert json.loads((tmp_path / "dense" / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("The fox").input_ids == tokenizer("The fox").input_ids
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())
    assert "lm_head.weight" not in {row.name for row in report.tensors}
    assert len(report.notes) == 1  # the rest was bfloat16 before
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_shards(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny())
    seen: list[str] = []

    def progress(files: Any) -> Any:
        for file in files:
            yield file
            seen.append(file)

    export_hf(model, tokenizer, tmp_path / "dense", dtype="float32", shard_bytes=100_000, progress=progress)
    files = sorted(path.name for path in (tmp_path / "dense").glob("*.safetensors"))
    assert files == seen == [f"model-{at:05}-of-{len(files):05}.safetensors" for at in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(tmp_path / "dense" / file, framework="pt") as shard:
            assert sorted(shard.keys()) == sorted(name for name, where in index.items() if where == file)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert (logits(other, IDS) - logits(model, IDS)).abs().max() < 1e-4


def test_holds_one_shard_at_a_time(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    held = []
    densify = dense._densify

    def watched(*arguments: Any) -> tuple[torch.Tensor, float]:
        tensor, move = densify(*arguments)
        made.append(weakref.ref(tensor))
        held.append(sum(other.nbytes for ref in made if (other := ref()) is not None))
        return tensor, move

    monkeypatch.setattr(dense, "_densify", watched)
    report = export_hf(quantized(tiny()), tokenizer, tmp_path / "dense", shard_bytes=50_000)
    assert len(held) == len(report.tensors)
    assert max(held) <= 50_000 < sum(row.nbytes for row in report.tensors)


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama105-hf"])
def test_real_models(name: str, tmp_path: Path) -> None:
    model, tokenizer = trained(name)
    model = quantized(model, Format(bits=3, group_size=32))
    export_hf(model, tokenizer, tmp_path / "dense", dtype="float32")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    ids = tokenizer("Once upon a time, there was a fox.").input_ids
    assert (logits(other, ids) - logits(model, ids)).abs().max() < 1e-4
    assert other.generation_config.eos_token_id == [1, 2]


def test_other_families_and_biases(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny("Gemma", head_dim=16, pad_token_id=0, attention_bias=True))
    export_hf(model, tokenizer, tmp_path / "dense", dtype="float32")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0.1
    assert (logits(other, IDS) - logits(model, IDS)).abs().max() < 1e-4


def test_names_are_those_of_files_where_these_differ(tokenizer: Any, tmp_path: Path) -> None:
    """GPT-NeoX computes with `lm_head` and stores `embed_out`, as its published checkpoints do."""
    model = quantized(tiny("GPTNeoX"))
    report = export_hf(model, tokenizer, tmp_path / "dense", dtype="float32")
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "embed_out.weight" in names
    assert names == {row.name for row in report.tensors}
    assert "lm_head.weight" not in names
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert (logits(other, IDS) - logits(model, IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_transposed_layers_are_as_transformers_stores_them(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_of(name)
    model.save_pretrained(tmp_path / "wanted")
    model = quantized(model)
    export_hf(model, tokenizer, tmp_path / "dense", dtype="float32")
    wanted, found = (tensors_in(tmp_path / folder) for folder in ("wanted", "dense"))
    assert {key: each.shape for key, each in found.items()} == {key: each.shape for key, each in wanted.items()}
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not hasattr(other.config, "quantization_config")
    torch.testing.assert_close(logits_of(other), logits_of(model), rtol=1e-4, atol=1e-5)


def test_refuses_adapters_and_taken_folders(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export_hf(model, tokenizer, tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    with pytest.raises(ExportError, match="bfloat16, float16, float32"):
        export_hf(model, tokenizer, tmp_path / "dense", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="carries an adapter"):
        export_hf(with_adapter(model, Pooled()), tokenizer, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_failure_midway_leaves_no_folder(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(tiny())
    model.lm_head.weight.data[0, 0] = 1e6
    (tmp_path / "dense").mkdir()  # empty: may be used
    with pytest.raises(ExportError, match=r"lm_head.weight: has values that are infinite or NaN in torch.float16"):
        export_hf(model, tokenizer, tmp_path / "dense", dtype="float16", shard_bytes=100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert list((tmp_path / "dense").iterdir()) == []
    (tmp_path / "dense.partial").mkdir()  # somebody's own
    (tmp_path / "dense.partial" / "model-00001-of-00009.safetensors").write_bytes(b"old")
    export_hf(model, tokenizer, tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "dense.partial"]
    assert (tmp_path / "dense.partial" / "model-00001-of-00009.safetensors").read_bytes() == b"old"
    assert [path.name for path in (tmp_path / "dense").glob("*.safetensors")] == ["model.safetensors"]
