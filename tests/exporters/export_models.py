"""Models and tokenizers to export: tiny random ones of each family, and the two trained ones beside the repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from quadapt.hf.peft_layer import adapted_layers, lora_config
from quadapt.hf.quantizer import adopt
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.nn.adapters import Adapter
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import QuantWeight

SHARED = Path(__file__).parents[2].parent / "shared"
"""Real models and texts, in a folder beside the repository; tests that need them skip where it is absent."""

TEXT = """Once upon a time, in 1823, there lived a fox who'd never seen the sea. "Isn't it far?" she asked the owl.
It's 47 miles, said the owl; you'll walk for two days, and then -- naturally -- swim.\n\n\tThe fox laughed: HA! HA!
Das Meer ist groß, là-bas; 海は広い… and don't they say it's “blue”? They've told me so. 🦊
"""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def byte_level(pre: Any = None, *, ignore_merges: bool = False, **settings: Any) -> Any:
    """A trained byte-level BPE tokenizer; GPT-2's way to cut a text unless another is given."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|begin|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[1])


def tiny(kind: str = "Llama", **changes: Any) -> nn.Module:
    """A random model of a family, with biases (where it has any) and norms that are not trivial."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM", None) or getattr(transformers, f"{kind}LMHeadModel")
    model = made(made.config_class(**(SIZES | changes))).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def quantized(
    model: nn.Module, format: Format | None = None, storage: Storage | None = None, *, skip: tuple[str, ...] = ()
) -> nn.Module:
    """The model with its linear layers quantized to nearest."""
    format = format or Format(bits=4, group_size=32)
    selection = select(model, skip=skip)
    plan = Quantization(format=format, storage=storage or Storage.default(format), rounding=Nearest())
    quantize_model(model, selection.chosen, plan)
    return adopt(model, left=selection.left, made={})


def with_adapter(model: nn.Module, adapter: Adapter, *, alpha: float = 4.0, start: str = "zero", **changes: Any) -> Any:
    """The model with an adapter that changes its answers, and with first factors if it has a start."""
    from peft import get_peft_model

    torch.manual_seed(1)
    config = lora_config(adapter, rank=4, alpha=alpha, start=start)
    for name, value in changes.items():
        setattr(config, name, value)
    peft_model = get_peft_model(model, config)
    for layer in adapted_layers(peft_model).values():
        if start != "zero":
            layer.begin("default", 0.2 * torch.randn(layer.out_features, 4), 0.2 * torch.randn(4, layer.in_features))
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        if "beta" in layer.params("default"):
            nn.init.normal_(layer.params("default")["beta"], std=0.3)
    return peft_model.eval()


def trained(name: str) -> tuple[nn.Module, Any]:
    """A real small model and its tokenizer."""
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"needs the folder shared/models/{name} beside the repository")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def story(tokenizer: Any, length: int) -> list[int]:
    """Ids of a text that the trained models know how to go on with."""
    path = SHARED / "data" / "tinystories_train_0.txt"
    if not path.is_file():
        pytest.skip("needs the folder shared/data beside the repository")
    return list(tokenizer(path.read_text()[:4000]).input_ids[:length])


@torch.no_grad()
def logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits after each token, float32 `[length, vocabulary]`."""
    return model(torch.tensor([ids])).logits[0].float()


def steps(found: Tensor, weight: QuantWeight) -> float:
    """How far a matrix is from a weight, in steps of its grid."""
    width = weight.format.width(weight.layout.columns)
    scales = weight.scales.repeat_interleave(width, 1)[:, : weight.layout.columns]
    return float(((found.double() - weight.dequantize()) / scales).abs().max())


def check_in_steps(found: Mapping[str, Tensor], again: Any, model: Any) -> None:
    """Assert that a format with zero-points holds a model: as its own reader has it, and as ours does.

    Args:
        found: What the reader of the format makes of each quantized matrix.
        again: The model that quadapt loads from the folder.
        model: The model that was written.
    """
    layers = quantized_layers(model)
    assert set(found) == set(layers)
    for name, layer in layers.items():
        weight, second = layer.quant_weight, again.get_submodule(name).quant_weight
        if weight.format.zero == "float":
            assert steps(found[name], weight) < 2.0 ** (weight.format.bits - 22), name
        else:
            assert torch.equal(found[name], weight.dequantize()), name
        assert torch.equal(second.codes(), weight.codes())
        assert torch.equal(second.scales, weight.scales)
        assert torch.equal(second.offsets, weight.offsets)
