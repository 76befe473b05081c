"""transformers loads and saves quantized models, bit for bit, and never silently a wrong one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quadapt import QuadaptConfig
from quadapt.errors import CheckpointError, ConfigError, ShapeError
from quadapt.hf.quantizer import adopt, base_config
from quadapt.model.layer import Quantization
from quadapt.model.quantize import fingerprint, quantize_model, quantized_layers
from quadapt.model.select import select
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage

Make = Callable[..., Any]
IDS = torch.arange(2, 42).view(2, 20)

KINDS: dict[str, tuple[Format, Storage]] = {
    "int2": (Format(bits=2), Storage()),
    "int3": (Format(bits=3, zero="integer"), Storage(offsets="integer")),
    "int4": (Format(bits=4, group_size=64), Storage()),
    "int8": (Format(bits=8, zero="none"), Storage(scales="fp32", offsets="absent")),
    "nf4": (Format(levels="nf", bits=4, group_size=64), Storage(scales="double", offsets="absent")),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings}).eval()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """The same tensors, bit for bit, under the same names."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(logits(model), logits(other))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # never write into what may be mapped
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def saved(quantized_llama: Make, tmp_path: Path) -> Path:
    """A folder with a quantized model."""
    quantized_llama(Format(bits=4)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back_bit_for_bit(kind: str, tied: bool, quantized_llama: Make, tmp_path: Path) -> None:
    format, storage = KINDS[kind]
    model = quantized_llama(format, storage=storage, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(model, again)
    assert len(quantized_layers(again)) == 14
    layers = quantized_layers(again).values()
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    again.save_pretrained(tmp_path / "twice")
    assert_same(model, load(tmp_path / "twice"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_shards_comes_back_bit_for_bit(tied: bool, quantized_llama: Make, tmp_path: Path) -> None:
    model = quantized_llama(Format(bits=4), tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(model, load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_in_another_dtype_leaves_the_quantized_weights_exact(
    dtype: torch.dtype, quantized_llama: Make, tmp_path: Path
) -> None:
    model = quantized_llama(Format(bits=4), attention_bias=True)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert logits(again).dtype == dtype
    for name, layer in quantized_layers(model).items():
        assert quantized_layers(again)[name].quant_weight.digest() == layer.quant_weight.digest()
    assert again.model.embed_tokens.weight.dtype == dtype


def test_layers_with_grids_of_their_own_come_back(tiny_llama: Make, tmp_path: Path) -> None:
    """What a budget gives: other bits, storages and permutations, layer by layer."""
    from quadapt.quant.gptq import GPTQ

    model = tiny_llama()
    selection = select(model, skip=("down_proj",))
    own = {name: KINDS[kind] for name, kind in zip(selection.chosen, ("int2", "int8", "nf4"), strict=False)}
    plan = Quantization(format=Format(bits=4), storage=Storage(), rounding=Nearest(), layers=own)
    quantize_model(model, selection.chosen, plan)
    layer = model.model.layers[1].self_attn.q_proj
    layer.quant_weight = GPTQ(act_order=True)(
        layer.quant_weight.dequantize(), layer.layout, {"second_moment": torch.rand(64).diag()}
    )
    adopt(model, left=selection.left, made={})
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(model, again)
    assert again.model.layers[1].self_attn.q_proj.layout.permuted
    assert base_config(again).left == selection.left
    assert len({layer.layout.format for layer in quantized_layers(again).values()}) == 4


def test_the_config_says_what_the_model_is(quantized_llama: Make, tmp_path: Path) -> None:
    model = quantized_llama(Format(bits=4))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quadapt"
    assert config["version"] == 1
    weights = {name: layer.quant_weight for name, layer in quantized_layers(model).items()}
    assert config["fingerprint"] == fingerprint(weights)
    assert config["left"] == {"model.embed_tokens": "embedding", "lm_head": "output head"}
    assert base_config(load(tmp_path)).layouts == {name: weight.layout for name, weight in weights.items()}
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "quadapt"


def test_adapters_may_train_over_a_loaded_model(saved: Path) -> None:
    model = load(saved)
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    assert not getattr(model, "is_loaded_in_4bit", False)


# --- quantizing on loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "format", "storage"),
    [
        ({"bits": 4}, Format(bits=4), Storage()),
        ({"bits": 2, "group_size": 16, "range": "mse"}, Format(bits=2, group_size=16), Storage()),
        ({"bits": 8, "group_size": -1}, Format(bits=8, group_size=-1), Storage()),
        ({"bits": 3, "zero": "integer"}, Format(bits=3, zero="integer"), Storage(offsets="integer")),
        (
            {"bits": 4, "levels": "nf", "group_size": 64, "scales": "double"},
            Format(levels="nf", bits=4, group_size=64),
            Storage(scales="double", offsets="absent"),
        ),
        ({"bits": 4, "scales": "k-quant"}, Format(bits=4), Storage(scales="q4_k", offsets="q4_k-min")),
    ],
    ids=str,
)
def test_a_dense_model_is_quantized_on_loading(
    wish: dict[str, Any], format: Format, storage: Storage, tiny_llama: Make, tmp_path: Path
) -> None:
    dense = tiny_llama(attention_bias=True)
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=QuadaptConfig(**wish))
    selection = select(dense)
    plan = Quantization(format=format, storage=storage, rounding=Nearest(range=wish.get("range", "minmax")))
    quantize_model(dense, selection.chosen, plan)
    assert_same(model, dense)
    model.save_pretrained(tmp_path / "quantized")
    assert_same(load(tmp_path / "quantized"), model)


def test_layers_to_skip_stay_dense(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=QuadaptConfig(bits=4, skip=["down_proj", "layers.0.self_attn"]))
    assert len(quantized_layers(model)) == 14 - 2 - 4
    assert base_config(model).left["model.layers.1.mlp.down_proj"] == "listed under skip"


def test_a_sharded_bfloat16_model_is_quantized_as_its_weights_are(tiny_llama: Make, tmp_path: Path) -> None:
    tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="20KB")
    model = load(tmp_path, dtype=torch.bfloat16, quantization_config=QuadaptConfig(bits=4))
    dense = load(tmp_path, dtype=torch.bfloat16)
    quantize_model(dense, select(dense).chosen, QuadaptConfig(bits=4).quantization())
    assert_same(model, dense)


@pytest.mark.parametrize(
    "wish",
    [
        {"bits": 7},
        {"group_size": 33},
        {"levels": "fp"},
        {"zero": "half"},
        {"scales": "bf16"},
        {"range": "percentile"},
        {"levels": "nf", "zero": "integer"},
    ],
    ids=str,
)
def test_a_wrong_wish_fails_at_once(wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QuadaptConfig(**wish)


def test_weights_that_are_not_finite_are_named(
    tiny_llama: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises((ShapeError, RuntimeError)) as error:
        load(tmp_path, quantization_config=QuadaptConfig(bits=4))
    report = str(error.value) + caplog.text  # transformers writes what went wrong into its log
    assert "layers.1.mlp.up_proj" in report
    assert "1 of 6144 weights are NaN or infinite" in report


# --- what must not load -----------------------------------------------------------------------------------------------


STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "quadapt" not in sys.modules
found = {}
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.arange(2, 42).view(2, 20)
        found[folder] = model(input_ids=ids).logits.flatten().tolist()
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
import quadapt
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found["later"] = type(model.model.layers[0].mlp.up_proj).__name__
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def strangers(quantized_llama: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers alone makes of a checkpoint of each kind: an error's text, or logits."""
    folders = {}
    for kind, (format, storage) in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        quantized_llama(format, storage=storage).save_pretrained(folders[kind])
    script = tmp_path_factory.mktemp("script") / "stranger.py"
    script.write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, folders.values())],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
        timeout=300,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {"later": found["later"], **{kind: found[str(folder)] for kind, folder in folders.items()}}


@pytest.mark.parametrize("kind", KINDS)
def test_without_quadapt_a_checkpoint_does_not_load(kind: str, strangers: dict[str, Any]) -> None:
    found = strangers[kind]
    assert isinstance(found, str), "a wrong model came up in silence"
    assert "mismatched" in found


def test_quadapt_may_be_imported_after_transformers(strangers: dict[str, Any]) -> None:
    assert strangers["later"] == "QuantLinear"


@pytest.mark.parametrize("part", ["scales", "offsets", "weight"])
def test_a_tensor_that_is_missing_is_named(part: str, saved: Path) -> None:
    name = f"model.layers.1.self_attn.v_proj.{part}"
    edit(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{name}: is not in the checkpoint"):
        load(saved)


def test_a_tensor_of_another_shape_is_refused(saved: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.scales"
    edit(saved, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises((CheckpointError, RuntimeError, ValueError)):
        load(saved)


def _other_shape(config: dict[str, Any]) -> None:
    config["quantization_config"]["schemes"][0]["layers"]["model.layers.0.self_attn.q_proj"] = [64, 128]


def _other_name(config: dict[str, Any]) -> None:
    config["quantization_config"]["schemes"][0]["layers"]["transformer.h.0.attn"] = [64, 64]


def _not_linear(config: dict[str, Any]) -> None:
    config["quantization_config"]["schemes"][0]["layers"]["model.layers.0.mlp"] = [64, 64]


def _newer(config: dict[str, Any]) -> None:
    config["quantization_config"]["version"] = 2


def _damaged(config: dict[str, Any]) -> None:
    del config["quantization_config"]["schemes"][0]["format"]


def _unknown_bits(config: dict[str, Any]) -> None:
    config["quantization_config"]["schemes"][0]["format"]["bits"] = 7


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_other_shape, r"q_proj: is 64 x 64 in the model, 64 x 128 in quantization_config"),
        (_other_name, r"transformer\.h\.0\.attn: .*config\.json belongs to another model"),
        (_not_linear, r"layers\.0\.mlp: .*no linear layer of that name"),
        (_newer, "version 2 .* Upgrade quadapt"),
        (_damaged, "quantization_config is damaged"),
        (_unknown_bits, "bits=7"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], told: str, saved: Path
) -> None:
    edit_config(saved, change)
    with pytest.raises(CheckpointError, match=told):
        load(saved)


def test_a_layer_that_the_config_forgets_is_not_made_up(saved: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["quantization_config"]["schemes"][0]["layers"]["model.layers.0.self_attn.q_proj"]

    edit_config(saved, forget)
    with pytest.raises((CheckpointError, RuntimeError, ValueError)):
        load(saved)


def test_a_model_that_is_not_quantized_has_no_such_config(tiny_llama: Make) -> None:
    with pytest.raises(ConfigError, match=r"Quantize it first \(quadapt quantize\)"):
        base_config(tiny_llama())
    with pytest.raises(ConfigError, match="no quantized layer"):
        adopt(tiny_llama(), left={}, made={})


# --- back to dense ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_dequantized_model_computes_the_same(kind: str, bias: bool, quantized_llama: Make, tmp_path: Path) -> None:
    format, storage = KINDS[kind]
    model = quantized_llama(format, storage=storage, attention_bias=bias)
    want, dense = logits(model), model.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in dense.modules())
    assert torch.equal(logits(dense), want)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), want)


def test_a_dequantized_bfloat16_model_stays_bfloat16(saved: Path) -> None:
    model = load(saved, dtype=torch.bfloat16)
    want = {name: layer.quant_weight.dequantize(torch.bfloat16) for name, layer in quantized_layers(model).items()}
    state = model.dequantize().state_dict()
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    assert all(torch.equal(state[f"{name}.weight"], weight) for name, weight in want.items())


def test_a_copied_folder_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert_same(load(saved), load(tmp_path / "copy"))
