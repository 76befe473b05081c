"""Every family of models: each matrix quantized or listed, saved and reloaded bit-equal, trained and merged exactly."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

import quadapt
from quadapt.hf.loading import load_model
from quadapt.hf.quantizer import adopt, base_config
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage

WIDTHS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {**WIDTHS, "intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0}

FAMILIES = {
    "llama": LlamaConfig(**GATED, attention_bias=True),
    "llama-tied": LlamaConfig(**GATED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GATED, sliding_window=8),
    "qwen2": Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**GATED, head_dim=16),
    "gemma": GemmaConfig(**GATED, head_dim=16),
    "gemma2": Gemma2Config(**GATED, head_dim=16, sliding_window=8),
    "gemma3": Gemma3TextConfig(**GATED, head_dim=16, sliding_window=8),
    "phi": PhiConfig(**WIDTHS, intermediate_size=96, pad_token_id=0),
    "phi3": Phi3Config(**GATED),
    "gpt-neox": GPTNeoXConfig(**WIDTHS, intermediate_size=96),
    "opt": OPTConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        pad_token_id=0,
    ),
    "opt-projected": OPTConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        pad_token_id=0,
    ),
}
LINEARS = {
    "llama": 14,
    "llama-tied": 14,
    "mistral": 14,
    "qwen2": 14,
    "qwen3": 14,
    "gemma": 14,
    "gemma2": 14,
    "gemma3": 14,
    "phi": 12,
    "phi3": 8,
    "gpt-neox": 8,
    "opt": 12,
    "opt-projected": 14,
}


def random_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens():
    return torch.randint(1, 96, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rounding", [Nearest(), GPTQ()], ids=["nearest", "gptq"])
def test_every_matrix_is_quantized_or_listed_and_survives_saving(family, rounding, tmp_path):
    model = random_model(FAMILIES[family])
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1
    }
    selection = select(model)
    assert set(selection.chosen) | set(selection.left) == matrices
    assert len(selection.chosen) == LINEARS[family]
    plan = Quantization(format=Format(bits=4), storage=Storage(), rounding=rounding)
    dense = model(tokens()).logits
    rows = quantize_model(model, selection.chosen, plan, batches=[tokens()]).rows
    assert {row.name for row in rows} == set(selection.chosen)
    adopt(model, left=selection.left, made={})
    logits = model(tokens()).logits
    assert 0 < (logits - dense).norm() / dense.norm() < 0.5  # quantized, and still the same model
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_model(str(tmp_path))
    assert torch.equal(again(tokens()).logits, logits)
    assert base_config(again).layouts == base_config(model).layouts
    for name, layer in quantized_layers(model).items():
        assert again.get_submodule(name).quant_weight.digest() == layer.quant_weight.digest()
    state, kept = model.state_dict(), again.state_dict()
    assert set(state) == set(kept)
    assert all(torch.equal(state[name], kept[name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_qa_lora_trains_and_merges_exactly(family):
    model = quadapt.prepare(random_model(FAMILIES[family]), calibration=[tokens()], bits=3, rank=2, alpha=2, seed=3)
    start = model(tokens()).logits.detach()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(3):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.eval()(tokens()).logits.detach()
    assert not torch.equal(start, trained)
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(merged(tokens()).logits, trained)
