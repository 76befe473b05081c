"""Each family that GGUF is written for: llama.cpp computes what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import SIZES, quantized, tiny, with_adapter
from gguf_models import EXPERTS, HALF, LONG, MODELS, WINDOWS, YARN, with_their_gelu
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from quadapt.errors import ExportError
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.gguf_lora import export_gguf_lora
from quadapt.exporters.llama_cpp import differences
from quadapt.importers.gguf_families import FAMILIES, family_names
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import LoRA
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")

NF4 = Format(levels="nf", bits=4)
"""Leaves as F32, and so is not subject to llama.cpp's rounding of activations: shows that all else is equal."""

GRIDS = {
    "Q4_1": (Format(bits=4, group_size=32), Storage.floating("fp16", "float")),
    "Q4_K": (Format(bits=4, group_size=32), Storage.floating("q4_k", "float")),
}
ONE_OF_EACH = list({kind: name for name, (kind, _) in reversed(MODELS.items())}.values())


def tokens(count: int) -> list[int]:
    """Ids drawn at random, the same each time."""
    return torch.randint(2, 300, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def test_every_family_is_tried_and_named_on_the_first_page() -> None:
    tried = {type(tiny(*MODELS[name][:1], **MODELS[name][1])).__name__ for name in ONE_OF_EACH}
    assert tried | {"Gemma3ForConditionalGeneration"} == set(FAMILIES)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"GGUF: {family_names()}." in " ".join(readme.split())


@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same_where_nothing_is_rounded(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Nothing but GELU, which llama.cpp looks up in a table over float16; with that table torch gives its answer."""
    kind, changes = MODELS[name]
    model, ids = quantized(tiny(kind, **changes), NF4), tokens(100)
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    apart = differences(tmp_path / "model.gguf", model, ids)
    if "rope_parameters" in changes:  # and they matter
        plain = quantized(tiny(kind, **changes | {"rope_parameters": None}), NF4)
        assert differences(tmp_path / "model.gguf", plain, ids).max() > 0.1
    if not with_their_gelu(model):
        assert apart.max() < 1e-3
        return
    alike = differences(tmp_path / "model.gguf", model, ids)
    print(
        f"{name}: {apart.max():.4f}, {apart.mean():.1e} on average; with its GELU {alike.max():.4f}, {alike.mean():.1e}"
    )
    assert apart.max() < 0.01
    assert alike.max() < 2e-3
    assert alike.mean() < 1e-4


@pytest.mark.parametrize(("kind", "layers"), [("Gemma2", 46), ("Gemma3", 62)])
def test_the_largest_gemmas_divide_queries_otherwise(kind: str, layers: int, tokenizer: Any, tmp_path: Path) -> None:
    """llama.cpp tells them by their layers. So many of them make more of the rounding of GELU, but not as much."""
    largest = {**WINDOWS, "num_hidden_layers": layers}
    model = quantized(tiny(kind, **(largest | {"query_pre_attn_scalar": 16})), NF4)  # 64 inputs for each of 4 heads
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    with_their_gelu(model)
    apart = differences(tmp_path / "model.gguf", model, tokens(30))
    for layer in model.model.layers:
        layer.self_attn.scaling = WINDOWS["head_dim"] ** -0.5  # that of all others
    assert apart.max() < 0.05
    assert differences(tmp_path / "model.gguf", model, tokens(30)).max() > 1


def test_the_language_model_of_one_that_sees(tokenizer: Any, tmp_path: Path) -> None:
    sees = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"text_config": SIZES | WINDOWS, "vision_config": {**sees, "image_size": 28, "patch_size": 14}}
    torch.manual_seed(0)
    model: Any = Gemma3ForConditionalGeneration(Gemma3Config(**parts)).eval()
    ids, path = tokens(60), tmp_path / "model.gguf"
    report = export_gguf(quantized(model, NF4), tokenizer, path)
    assert any(note.startswith("model.vision_tower and model.multi_modal_projector stay out") for note in report.notes)
    assert differences(path, model, ids).max() < 0.01
    adapted = with_adapter(model, LoRA(), alpha=6.0, target_modules=list(quantized_layers(model)))
    export_gguf_lora(adapted, tmp_path / "lora.gguf")
    assert differences(path, adapted, ids, lora=tmp_path / "lora.gguf").max() < 0.01


@pytest.mark.parametrize("block", GRIDS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_quantized_model_answers_alike(name: str, block: str, tokenizer: Any, tmp_path: Path) -> None:
    """What differs is llama.cpp's rounding of activations to 8 bits, and it is small."""
    kind, changes = MODELS[name]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    if (
        "num_experts_per_tok" in changes or kind == "Mixtral"
    ):  # all experts take part: rounding may change which are chosen
        sizes |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts_per_tok": 4}
    sizes["num_attention_heads"] = 256 // changes.get("head_dim", 64)  # so that all widths are whole super-blocks
    model = quantized(tiny(kind, **(changes | sizes)), *GRIDS[block])
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert {row.type for row in report.tensors if row.linear} == {block}
    apart = differences(tmp_path / "model.gguf", model, tokens(60))
    print(f"{name}, {block}: log-probabilities differ by at most {apart.max():.3f}, {apart.mean():.4f} on average")
    assert apart.max() < 0.3
    assert apart.mean() < 0.04


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_serves_base_and_adapter(name: str, tokenizer: Any, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    model = quantized(tiny(kind, **changes), NF4)
    targets = list(quantized_layers(model))  # and not the routers of experts, which are dense
    model, ids = with_adapter(model, LoRA(), alpha=6.0, target_modules=targets), tokens(40)
    base, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    export_gguf_lora(model, lora)
    export_gguf(quantized(tiny(kind, **changes), NF4), tokenizer, base)
    assert differences(base, model, ids, lora=lora).max() < 0.01
    assert differences(base, model, ids).max() > 0.1


NOT_ALIKE: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("GPTNeoX", {"hidden_act": "relu"}, "hidden_act='relu'.*GPTNeoXForCausalLM with 'gelu_pytorch_tanh'"),
    "windows": (
        "Gemma2",
        {**WINDOWS, "layer_types": ["full_attention"] * 2},
        "layer_types=.*with .'sliding_attention'",
    ),
    "scale of queries": ("Gemma2", {**WINDOWS, "query_pre_attn_scalar": 64}, "query_pre_attn_scalar=64.* with 32"),
    "no cap": ("Gemma2", {**WINDOWS, "attn_logit_softcapping": None}, "attn_logit_softcapping=None.* with 50.0"),
    "a cap": ("Gemma3", {**WINDOWS, "final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0.* with None"),
    "an own head": ("Gemma", {"head_dim": 32, "tie_word_embeddings": False, "pad_token_id": 0}, "no such tensor"),
    "norms of queries": ("Phi", {"qk_layernorm": True}, "qk_layernorm=True.* with False"),
    "weights of experts": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}, "norm_topk_prob=False.* with True"),
    "layers without experts": ("Qwen2Moe", {**EXPERTS, "mlp_only_layers": [1]}, "mlp_only_layers=.* with \\[\\]"),
    "alibi": ("Falcon", {"alibi": True}, "alibi=True.* with False"),
    "biases": ("Falcon", {"bias": True}, "bias=True.* with False"),
    "parts of heads": ("Llama", {"rope_parameters": HALF}, "rope_type default .*over whole heads"),
    "other scaling": (
        "GPTNeoX",
        {"rope_parameters": {**HALF, "rope_type": "dynamic", "factor": 2.0}},
        "rope_type default",
    ),
    "another ramp": ("Qwen2", {"rope_parameters": {**YARN, "beta_fast": 16}}, "rope_type default or linear or yarn"),
    "residual": ("Bloom", {"apply_residual_connection_post_layernorm": True}, "with False"),
}


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_refuses_what_llama_cpp_would_compute_otherwise(name: str, tokenizer: Any, tmp_path: Path) -> None:
    kind, changes, why = NOT_ALIKE[name]
    with pytest.raises(ExportError, match=why):
        export_gguf(quantized(tiny(kind, **changes)), tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_notes_what_differs(tokenizer: Any, tmp_path: Path) -> None:
    for (kind, changes), words in [
        (("Falcon", {}), "gelu by its approximation with tanh"),
        (("Phi3", {"pad_token_id": 0, **LONG}), "more than 256 tokens"),
        (("Phi3", {"pad_token_id": 0, "sliding_window": 64}), "last 64 tokens, llama.cpp to all"),
    ]:
        report = export_gguf(quantized(tiny(kind, **changes)), tokenizer, tmp_path / "model.gguf")
        assert words in report.notes[-1]


def test_experts_of_which_one_is_not_held_leave_as_f32(tokenizer: Any, tmp_path: Path) -> None:
    kind, changes = MODELS["mixtral"]
    model = quantized(tiny(kind, **changes), skip=("0.mlp.experts.1.up_proj",))
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    types = {row.name: row.type for row in report.tensors if "exps" in row.name}
    assert types.pop("blk.0.ffn_up_exps.weight") == "F32"
    assert set(types.values()) == {"Q4_1"}
    assert any(note.startswith("its matrices are of several types: left as F32") for note in report.notes)
    assert differences(tmp_path / "model.gguf", model, tokens(5)).mean() < 0.5


def test_refuses_an_adapter_over_some_of_the_experts(tmp_path: Path) -> None:
    kind, changes = MODELS["mixtral"]
    model = quantized(tiny(kind, **changes))
    targets = [name for name in quantized_layers(model) if "experts.3" not in name]
    adapted = with_adapter(model, LoRA(), target_modules=targets)
    with pytest.raises(
        ExportError, match=r"ffn_gate_exps.weight: 3 of its 4 matrices have an adapter, .*--format lora"
    ):
        export_gguf_lora(adapted, tmp_path / "lora.gguf")
