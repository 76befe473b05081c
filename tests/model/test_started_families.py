"""Starts that read statistics, on families whose blocks are called in their own ways: nearer to the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig, LlamaConfig, OPTConfig

import quadapt
from quadapt import statistics
from quadapt.model.select import select
from quadapt.statistics import FISHER, StatisticsFiles, gather

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, intermediate_size=96),  # for comparison
    "bloom": BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    "opt": OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, pad_token_id=0),
    "pythia": GPTNeoXConfig(**SIZES, intermediate_size=96, max_position_embeddings=64),
}


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()


def text(seed: int) -> Tensor:
    return torch.randint(4, 96, (16, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def error(family: str, method: str) -> float:
    """How far the outputs of the last block are from the dense model's, before anything trains: relative."""
    calibration = [] if method == "qlora" else list(text(1).split(4))
    model = random_model(family)
    dense = model(text(2), output_hidden_states=True).hidden_states[-1]
    settings = {"bits": 3, "levels": "nf", "group_size": 32, "rounding": "nearest", "rank": 8}
    begun = quadapt.prepare(model, method=method, calibration=calibration, **settings).eval()
    given = begun(text(2), output_hidden_states=True).hidden_states[-1]
    return float((given - dense).norm() / dense.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_start_is_nearer_to_the_dense_model_than_none(family: str) -> None:
    """QuAILoRA by second moments, LQ-LoRA by Fisher information: on text that neither has seen."""
    none = error(family, "qlora")
    for method in ("quailora", "lq-lora"):
        assert error(family, method) < 0.85 * none, method


def _encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 96, "d_model": 64, "d_ff": 96, "num_heads": 4, "d_kv": 16, "num_layers": 2}
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def _classifier() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()


def _pictures() -> list[Any]:
    return [{"pixel_values": torch.randn(6, 3, 32, 32), "labels": torch.tensor([0, 1, 0, 1, 1, 0])}]


OTHERS = {"t5": (_encoder_decoder, lambda: [text(3)[:6]]), "vit": (_classifier, _pictures)}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_block_by_block_fisher_information_is_that_of_the_whole_model(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gradients that go back from block to block, as they do on a GPU, are those of the model's own backward."""
    make, batches = OTHERS.get(family, (lambda: random_model(family), lambda: [text(3)[:6]]))
    model, data = make(), batches()
    chosen, found = select(model, skip=["cls_token", "position_embeddings"] if family == "vit" else []).chosen, []
    for name, way in (("whole", statistics._whole), ("blocks", statistics._by_blocks)):
        monkeypatch.setattr(statistics, "_whole", way)
        files = StatisticsFiles(tmp_path / name, {FISHER})
        gather({FISHER}, model, chosen, data, files, device="cpu")
        found.append({layer: files[layer][FISHER] for layer in chosen})
    for layer, whole in found[0].items():
        assert float(whole.sum()) > 0, layer
        torch.testing.assert_close(found[1][layer], whole, rtol=1e-3, atol=1e-4 * float(whole.max()))
