"""An adapter goes over its own base alone, whole, with the settings it was trained with: at every door."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quadapt
from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.peft_layer import adapted_layers, lora_config
from quadapt.hf.quantizer import base_config, content_of, fingerprint_of
from quadapt.methods import method_named
from quadapt.nn.adapters import Adapter, Elastic, LoRA, Pooled, Scales
from quadapt.quant.format import Format

FORMAT = Format(bits=3, group_size=16)
TARGETS = ["q_proj", "down_proj"]
OVER_CODES: dict[str, Adapter] = {"lora": LoRA(), "pooled": Pooled(), "elastic": Elastic(), "scales": Scales()}
OVER_DENSE = ("l4q", "qat-lora")
IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def base(quantized_llama: Callable[..., Any]) -> Any:
    return quantized_llama(FORMAT)


@pytest.fixture(scope="module")
def other(quantized_llama: Callable[..., Any]) -> Any:
    return quantized_llama(FORMAT, seed=5)


def put(base: nn.Module, adapter: Adapter) -> PeftModel:
    """A copy of a base with an adapter, as if trained."""
    config = lora_config(adapter, rank=2, alpha=4, target_modules=TARGETS)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(scope="module")
def saved(base: Any, tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each kind, in a folder named by it."""
    root = tmp_path_factory.mktemp("adapters")
    for kind, adapter in OVER_CODES.items():
        put(base, adapter).save_pretrained(root / kind)
    for kind in OVER_DENSE:
        put(tiny_llama(), method_named(kind).adapter).save_pretrained(root / kind)
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the pooled adapter, to be damaged."""
    for file in (saved / "pooled").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def through_peft(model: nn.Module, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, folder)


def through_a_second_name(model: nn.Module, folder: Path) -> Any:
    adapted = get_peft_model(model, lora_config(LoRA(), rank=2, alpha=2, target_modules=TARGETS))
    adapted.load_adapter(folder, "second")
    return adapted


def through_transformers(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder))
    return model


doors = pytest.mark.parametrize("door", [through_peft, through_a_second_name, through_transformers])
kinds = pytest.mark.parametrize("kind", OVER_CODES)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # it may be mapped
    save_file(tensors, path, metadata={"format": "pt"})


# --- the base ---------------------------------------------------------------------------------------------------------


@doors
def test_another_base_of_the_same_shape_is_refused_and_left_as_it_was(
    door: Callable[..., Any], saved: Path, other: Any
) -> None:
    model = copy.deepcopy(other)
    with pytest.raises(CheckpointError, match=r"another base \(fingerprint .*--base.*any_base"):
        door(model, saved / "pooled")
    if door is not through_a_second_name:
        assert not adapted_layers(model)
        door(model, _of(other, saved / "own"))  # and can still be used


def _of(base: Any, folder: Path) -> Path:
    if not folder.exists():
        put(base, Pooled()).save_pretrained(folder)
    return folder


@doors
def test_another_base_is_taken_when_asked_for_by_name(
    door: Callable[..., Any], saved: Path, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with quadapt.any_base(), caplog.at_level(logging.WARNING, "quadapt"):
        door(copy.deepcopy(other), saved / "pooled")
    assert "goes over another one" in caplog.text
    with pytest.raises(CheckpointError):  # not longer than asked for
        door(copy.deepcopy(other), saved / "pooled")


@kinds
def test_an_adapter_over_codes_does_not_load_over_the_dense_model(
    kind: str, saved: Path, tiny_llama: Callable[..., Any]
) -> None:
    with pytest.raises(CheckpointError, match="dense model"):
        PeftModel.from_pretrained(tiny_llama(), saved / kind)


@pytest.mark.parametrize("kind", OVER_DENSE)
def test_an_adapter_over_a_dense_model_loads_over_that_one_alone(
    kind: str, saved: Path, tiny_llama: Callable[..., Any]
) -> None:
    PeftModel.from_pretrained(tiny_llama(), saved / kind)
    with pytest.raises(CheckpointError, match="another base"):
        PeftModel.from_pretrained(tiny_llama(seed=1), saved / kind)
    with pytest.raises(CheckpointError, match="another dtype"):
        PeftModel.from_pretrained(tiny_llama(dtype=torch.bfloat16), saved / kind)


def test_the_fingerprint_does_not_see_the_adapters(base: Any, tiny_llama: Callable[..., Any]) -> None:
    assert content_of(put(base, LoRA())) == content_of(base) == fingerprint_of(base) == base_config(base).fingerprint
    dense, config = tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert fingerprint_of(get_peft_model(copy.deepcopy(dense), config)) == fingerprint_of(dense)
    assert fingerprint_of(dense.to("meta")) == ""


def test_a_merge_reads_the_base_itself_not_what_its_config_says(base: Any, other: Any) -> None:
    """As if another file had been put under the base's config.json."""
    swapped = copy.deepcopy(other)
    swapped.config.quantization_config = copy.deepcopy(base.config.quantization_config)
    model = put(swapped, Pooled())
    with pytest.raises(CheckpointError, match="another base"):
        quadapt.merge(model)
    with quadapt.any_base():
        merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert "another" in base_config(merged).made["base"]


@pytest.mark.parametrize("value", ["", None, ...])
@pytest.mark.parametrize("version", ["today's", "earlier"])
@doors
def test_a_fingerprint_that_is_missing_or_empty_is_no_pass(
    value: Any, version: str, door: Callable[..., Any], folder: Path, base: Any
) -> None:
    def empty(config: dict[str, Any]) -> None:
        entry = config["auto_mapping"]["quadapt"]
        entry["base_fingerprint"] = value
        if value is ...:
            del entry["base_fingerprint"]
        if version == "earlier":
            config["peft_type"] = "LORA"
            del entry["digest"]

    edit_config(folder, empty)
    with pytest.raises(CheckpointError, match="base_fingerprint is missing or empty"):
        door(copy.deepcopy(base), folder)


def test_an_entry_that_was_taken_out_is_no_pass(folder: Path, base: Any) -> None:
    edit_config(folder, lambda config: config.update(auto_mapping=None))
    with pytest.raises(CheckpointError, match="base_fingerprint is missing"):
        PeftModel.from_pretrained(copy.deepcopy(base), folder)
    edit_config(folder, lambda config: config.update(peft_type="LORA"))
    with pytest.raises(CheckpointError, match=r"has the shape \(2, 6\)"):
        PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("entry", [1.5, [{}], {"quadapt": "l4q"}, {"quadapt": ["kind"]}])
def test_an_entry_that_is_no_object_is_refused(entry: Any, folder: Path) -> None:
    edit_config(folder, lambda config: config.update(auto_mapping=entry))
    with pytest.raises(CheckpointError, match="where the adapter's settings belong"):
        PeftConfig.from_pretrained(folder)


# --- the settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["auto_mapping"]["quadapt"].update(pooling="mean"),
        lambda config: config["auto_mapping"]["quadapt"].update(form="side"),
        lambda config: config["auto_mapping"]["quadapt"].update(start="cloq"),
        lambda config: config["auto_mapping"]["quadapt"].pop("digest"),
        lambda config: config.update(lora_alpha=8),
        lambda config: config.update(use_rslora=True),
        lambda config: config.update(alpha_pattern={"q_proj": 64}),
    ],
)
def test_a_setting_that_was_changed_on_disk_is_noticed(change: Callable[..., Any], folder: Path) -> None:
    edit_config(folder, lambda config: config.update(inference_mode=False))  # no part of the product
    PeftConfig.from_pretrained(folder)
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match="their digest differs"):
        PeftConfig.from_pretrained(folder)


def test_what_an_earlier_version_wrote_still_loads(folder: Path, base: Any) -> None:
    want = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(input_ids=IDS).logits

    def earlier(config: dict[str, Any]) -> None:
        config["peft_type"] = "LORA"
        del config["auto_mapping"]["quadapt"]["digest"]

    edit_config(folder, earlier)
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert torch.equal(model(input_ids=IDS).logits, want)
    model.save_pretrained(folder / "again")
    assert json.loads((folder / "again/adapter_config.json").read_text())["peft_type"] == "QUADAPT"


def test_tensors_do_not_go_into_an_adapter_of_another_kind(saved: Path, base: Any) -> None:
    model = PeftModel.from_pretrained(copy.deepcopy(base), saved / "pooled", is_trainable=True)
    model.load_adapter(saved / "pooled", "default", is_trainable=True)  # as Trainer resumes
    with pytest.raises(ConfigError, match=r"holds another adapter, .*kind=scales"):
        model.load_adapter(saved / "scales", "default")


def test_hot_swapping_stays_within_a_kind(saved: Path, base: Any, other: Any, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model = PeftModel.from_pretrained(copy.deepcopy(base), saved / "pooled").eval()
    second = put(base, Pooled())
    second.save_pretrained(tmp_path / "second")
    hotswap_adapter(model, str(tmp_path / "second"), "default")
    assert torch.equal(model(input_ids=IDS).logits, second(input_ids=IDS).logits)
    put(other, Pooled()).save_pretrained(tmp_path / "other")
    for wrong, told in ((saved / "lora", "another adapter"), (tmp_path / "other", "another base")):
        with pytest.raises((ConfigError, CheckpointError), match=told):
            hotswap_adapter(model, str(wrong), "default")
    plain = copy.deepcopy(base)
    plain.load_adapter(str(saved / "elastic"))
    with pytest.raises(ConfigError, match="lora_A and lora_B alone"):
        plain.load_adapter(str(saved / "elastic"), hotswap=True)


# --- the tensors ------------------------------------------------------------------------------------------------------


def _twice(tensors: dict[str, Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "empty": (lambda tensors: tensors.clear(), r"lacks .* and 5 more \(0 tensors, 8 are needed\)"),
    "a layer less": (lambda tensors: [tensors.pop(name) for name in [*tensors] if "layers.1.mlp" in name], "lacks"),
    "a layer more": (_twice, "do not ask for them|does not ask for them"),
    "a shape": (
        lambda tensors: tensors.update({name: t[:, :1].clone() for name, t in tensors.items()}),
        "has the shape",
    ),
    "a dtype": (
        lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()}),
        "held as int8",
    ),
    "a number": (lambda tensors: next(iter(tensors.values())).view(-1)[0].fill_(float("inf")), "NaN or infinite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@doors
def test_an_adapter_that_is_not_whole_is_refused(
    damage: str, door: Callable[..., Any], folder: Path, base: Any
) -> None:
    change, told = DAMAGES[damage]
    edit_tensors(folder, change)
    with pytest.raises((CheckpointError, RuntimeError), match=f"{told}|mismatch"):
        door(copy.deepcopy(base), folder)


def test_the_tensors_of_another_adapter_are_refused(folder: Path, saved: Path, base: Any) -> None:
    for kind, told in (("elastic", "has, though"), ("scales", "lacks")):
        (folder / "adapter_model.safetensors").write_bytes((saved / kind / "adapter_model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=told):
            PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("door", [through_peft, through_transformers])
def test_ours_without_its_entry_is_not_taken_for_plain_lora(
    door: Callable[..., Any], saved: Path, tmp_path: Path, tiny_llama: Callable[..., Any]
) -> None:
    for file in (saved / "l4q").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, lambda config: config.update(peft_type="LORA", auto_mapping=None))
    with pytest.raises(CheckpointError, match=r"has, though its adapter_config\.json does not ask for them"):
        door(tiny_llama(), tmp_path)


def test_peft_may_still_set_a_part_by_hand(base: Any) -> None:
    """As FSDP does on all ranks but one."""
    model = put(base, Pooled())
    state = get_peft_model_state_dict(model)
    name = next(iter(state))
    set_peft_model_state_dict(model, {name: torch.ones_like(state[name])})
    set_peft_model_state_dict(model, {})
    assert bool((get_peft_model_state_dict(model)[name] == 1).all())
