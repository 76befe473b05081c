"""Peak anonymous memory while a mixture of experts of 1 B parameters is quantized, above that after import.

Limit: packed size + 1 GB. Once with a tensor for each matrix of each expert in the files (Qwen3-MoE, as most have it),
once with stacks (GPT-OSS). transformers itself would stack the former in memory, 1.7 GB of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.measure import store, table
from benchmarks.memory import child
from quadapt.hf.loading import load_tokenizer

_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "num_experts_per_tok": 4,
}
MODELS: dict[str, Any] = {
    "a tensor for each matrix (Qwen3-MoE)": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, num_experts=32, moe_intermediate_size=544)
    ),
    "stacks (GPT-OSS)": lambda: GptOssForCausalLM(
        GptOssConfig(**_SIZES, num_local_experts=32, intermediate_size=544, initial_context_length=2048)
    ),
}


def write(made: Any, folder: Path) -> int:
    """Write a random model; how many parameters it has."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = made().to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="500MB")
    load_tokenizer(str(files("quadapt.demo") / "model")).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> dict[str, Any]:
    """Measure, print and store."""
    rows, figures = [], dict[str, Any]()
    for name, made in MODELS.items():
        with tempfile.TemporaryDirectory() as place:
            source = Path(place) / "dense"
            parameters = write(made, source)
            command = [sys.executable, "-m", "benchmarks.experts", str(source), str(Path(place) / "quantized")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        limit = found["packed"] / 1e6 + 1000
        rows.append((name, parameters / 1e6, found["packed"] / 1e6, found["above_import"] / 1e6, limit))
        figures[name] = {"parameters": parameters, **found}
    columns = ("experts in the files", "million parameters", "packed, MB", "peak, MB", "limit, MB")
    table("quantizing a mixture of experts in bf16, nearest int4", columns, rows)
    figures = {"limit": "packed size + 1 GB", **figures}
    store("experts", figures)
    return figures


if __name__ == "__main__":
    child(*sys.argv[1:])
