"""Folders as other libraries write them, of a tiny model with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0}


@pytest.fixture(scope="session")
def foreign(tiny_llama: Callable[..., Any]) -> Callable[..., nn.Module]:
    """`foreign(folder, pack, about)`: write a tiny Llama as another library would, and give the dense model it means.

    `pack(name, W)` turns a matrix, float64 `[out, in]`, into the tensors of the layer (by what follows its name) and
    the matrix that they mean; None leaves the layer dense. `about` becomes `quantization_config` (or another `field`).
    With `embeddings`, they are packed too. Further settings are the model's. All that is not quantized is float16.
    """

    def make(
        folder: Path,
        pack: Callable[[str, np.ndarray], tuple[Mapping[str, Any], np.ndarray] | None],
        about: Mapping[str, Any] | None,
        *,
        field: str = "quantization_config",
        embeddings: bool = False,
        **changes: Any,
    ) -> nn.Module:
        from tests.cli.commands import byte_tokenizer

        model = tiny_llama(**(SIZES | {"dtype": torch.float16} | changes))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        state: dict[str, Tensor] = {
            name: tensor.clone() for name, tensor in model.state_dict().items() if not _tied(model, name)
        }
        dense = type(model).from_pretrained(folder, dtype=torch.float32)
        for name, layer in dense.named_modules():
            if not isinstance(layer, nn.Linear | nn.Embedding if embeddings else nn.Linear):
                continue
            packed = pack(name, layer.weight.detach().double().numpy())
            if packed is None:
                continue
            del state[f"{name}.weight"]
            state |= {f"{name}.{part}": torch.as_tensor(each).contiguous() for part, each in packed[0].items()}
            layer.weight.data = torch.from_numpy(packed[1]).float()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if about is not None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, field: dict(about)}))
        return dense

    return make


def _tied(model: Any, name: str) -> bool:
    return bool(model.config.tie_word_embeddings) and name == "lm_head.weight"
