"""Models whose code cannot do with codes for weights, and models that something else has quantized, are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quadapt
from quadapt.errors import ConfigError, ShapeError
from quadapt.hf.quantizer import adopt
from quadapt.model.inputs import text_ids
from quadapt.model.quantize import quantized_layers
from quadapt.model.select import select
from quadapt.model.trial import check_reads, check_runs, logits_of
from quadapt.nn.quant_linear import QuantLinear

Make = Callable[..., Any]


def _t5(kind: str, gated: bool) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96,
        d_model=64,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        d_kv=16,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


def _mamba(kind: str) -> Any:
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 16, "pad_token_id": 0}
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()


@pytest.mark.parametrize(("kind", "gated"), [("T5", False), ("MT5", True), ("UMT5", True), ("LongT5", False)])
def test_encoder_decoders_that_cast_to_a_weights_dtype_compute_or_are_refused(kind: str, gated: bool) -> None:
    """Where transformers keeps the layer in float32 it is left; where not, the layer is named."""
    model, ids = _t5(kind, gated), torch.randint(1, 96, (2, 12))
    dense = logits_of(model, ids)
    settings = {"bits": 8, "rounding": "nearest", "method": "qlora"}
    if not getattr(model, "_keep_in_fp32_modules", None):
        with pytest.raises(ConfigError, match=rf"\.wo: {kind}ForConditionalGeneration reads .*--skip wo\)"):
            quadapt.prepare(model, **settings)
        settings["skip"] = ["wo"]
    prepared = quadapt.prepare(model, **settings)
    assert not any(name.endswith("wo") for name in quantized_layers(prepared))
    after = logits_of(prepared, ids)
    assert 0 < (after - dense).norm() / dense.norm() < 0.05


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_layers_whose_weight_is_multiplied_outside_are_named(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"mixer\.dt_proj: .* reads the weight of this layer.*--skip dt_proj"):
        quadapt.prepare(_mamba(kind), rounding="nearest", skip=["A_log"])
    model = _mamba(kind)
    ids = text_ids(model.config, 2, 12)
    dense = logits_of(model, ids)
    skip, where = ["A_log", "dt_proj"], ["in_proj", "x_proj"]
    with pytest.raises(ConfigError, match=r"PEFT refuses .*out_proj.*--target-modules"):
        quadapt.prepare(_mamba(kind), rounding="nearest", skip=skip, method="qlora")
    prepared = quadapt.prepare(model, rounding="nearest", bits=8, skip=skip, method="qlora", target_modules=where)
    assert 0 < (logits_of(prepared, ids) - dense).norm() / dense.norm() < 0.05


class _Reader(nn.Module):
    """Stands for an MLP, and reads a weight: to no end, or as a number."""

    def __init__(self, mlp: Any, how: str) -> None:
        super().__init__()
        self.mlp, self.how = mlp, how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mlp.up_proj.weight
        return self.mlp(x.to(weight.device) if self.how == "device" else x + weight.float().mean())


def test_reading_without_consequence_passes(tiny_llama: Make) -> None:
    for how in ("device", "mean"):
        model = tiny_llama()
        model.model.layers[0].mlp = _Reader(model.model.layers[0].mlp, how)
        model.model.layers[0].mlp.mlp.up_proj.weight.data += 1
        chosen = select(model).chosen
        if how == "device":
            check_reads(model, chosen)
        else:
            with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.mlp\.up_proj: .*--skip up_proj"):
                check_reads(model, chosen)
        assert {type(layer) for layer in chosen.values()} == {nn.Linear}  # as they were
        assert not any("on_read" in vars(layer) for layer in chosen.values())


def test_a_model_that_gives_no_numbers_or_does_not_run_is_refused(tiny_llama: Make) -> None:
    model = tiny_llama()
    assert check_runs(model).shape == (1, 8, 96)
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ConfigError, match="gives logits that are NaN or infinite"):
        check_runs(model)
    model.model.norm = nn.LayerNorm(63)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be run on tokens \(RuntimeError"):
        check_runs(model)


def test_a_quantized_layer_refuses_what_is_no_float(quantized_llama: Make) -> None:
    layer = next(iter(quantized_layers(quantized_llama()).values()))
    with pytest.raises(ShapeError, match=r"input of a quantized layer is torch\.uint8"):
        layer(torch.zeros(1, layer.in_features, dtype=torch.uint8))


# --- subclasses of nn.Linear ------------------------------------------------------------------------------------------


def test_linear_layers_with_a_forward_of_their_own_are_left_with_the_reason(tiny_llama: Make) -> None:
    from transformers import Llama4TextConfig, PhimoeConfig
    from transformers.models.llama4.modeling_llama4 import Llama4Router
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    model = tiny_llama()
    model.model.layers[0].mlp.router = Llama4Router(Llama4TextConfig(hidden_size=64, num_local_experts=4))
    model.model.layers[1].mlp.router = PhimoeTopKRouter(PhimoeConfig(hidden_size=64, num_local_experts=4))
    left = select(model).left
    assert left["model.layers.0.mlp.router"] == "Llama4Router, a linear layer with a forward of its own"
    assert left["model.layers.1.mlp.router"] == "PhimoeTopKRouter, a linear layer with a forward of its own"


# --- quantized by something else --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("known", [True, False], ids=["by config", "by its layers"])
@pytest.mark.parametrize("method", ["qa-lora", "l4q"])
def test_a_bitsandbytes_model_is_refused(kind: str, known: bool, method: str, tiny_llama: Make, tmp_path: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if known:
        tiny_llama().save_pretrained(tmp_path)
        how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**how))
    else:
        model = tiny_llama()
        linear = model.model.layers[1].mlp.up_proj
        other = (
            bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
            if kind == "int8"
            else bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4")
        )
        other.load_state_dict({"weight": linear.weight})
        model.model.layers[1].mlp.up_proj = other.to("cpu")
    words = r"is quantized already, by bitsandbytes" if known else r"up_proj\.weight: is u?int8 in a Linear.bit"
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=rf"{words}.*Load the dense model"):
        quadapt.prepare(model, method=method, rounding="nearest") if method == "qa-lora" else quadapt.prepare(
            model, method=method
        )
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_models_quantized_by_others_are_told_by_their_tensors(quantized_llama: Make, tiny_llama: Make) -> None:
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="LlamaForCausalLM is quantized already, by gptq"):
        select(model)
    model = tiny_llama()
    codes = nn.Module()
    codes.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))
    model.model.layers[0].mlp.up_proj = codes
    with pytest.raises(ConfigError, match=r"mlp\.up_proj\.qweight: is int32 in a Module, so something else"):
        select(model)
    model = quantized_llama()
    model.model.layers[0].mlp.gate = nn.Linear(4, 4, dtype=torch.float32)
    model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"mlp\.gate\.weight: is int8 in a Linear"):
        adopt(model, left={}, made={})
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    select(quantized_llama(skip=("mlp",)))  # our own codes are no offence


def test_torchao_is_told_by_its_tensors(tiny_llama: Make) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_llama(dtype=torch.bfloat16)
    torchao.quantize_(model.model.layers[0].mlp.up_proj, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ConfigError, match=r"so something else has quantized this model"):
        select(model)


def test_an_adapter_that_trains_the_grid_is_not_put_over_codes_of_others(tiny_llama: Make) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from peft import get_peft_model

    trained = quadapt.prepare(tiny_llama(), method="l4q", target_modules=["up_proj"])
    model = tiny_llama()
    for block in model.model.layers:
        other = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4")
        other.load_state_dict({"weight": block.mlp.up_proj.weight})
        block.mlp.up_proj = other.to("cpu")
    with quadapt.any_base(), pytest.raises(ConfigError, match="so something else has quantized this model"):
        get_peft_model(model, trained.peft_config["default"])
