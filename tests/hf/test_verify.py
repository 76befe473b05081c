"""A flipped bit anywhere in a written model is found, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from quadapt.errors import CheckpointError
from quadapt.hf.config import QuadaptConfig
from quadapt.hf.peft_layer import lora_config
from quadapt.hf.quantizer import base_config
from quadapt.hf.saving import save_quantized, write_note
from quadapt.hf.verify import unverified, verify
from quadapt.nn.adapters import Pooled
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage

LAYER = "model.layers.1.mlp.up_proj"
Written = tuple[Path, dict[str, Any], QuadaptConfig]


@pytest.fixture
def written(quantized_llama: Callable[..., Any], tmp_path: Path) -> Written:
    """A model as the command line writes it, its `quadapt.json`, and its config."""
    model = quantized_llama(
        Format(levels="nf", bits=4, group_size=32, zero="float"), storage=Storage(scales="double", offsets="fp16")
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    note = {"made": {}, "bits_per_weight": 4.6, "certificate": {"verdict": "lossy", "kl": 0.01, "layers": [(1, 2.0)]}}
    save_quantized(model, tokenizer, tmp_path, note)
    return tmp_path, read(tmp_path), base_config(model)


def read(folder: Path, name: str = "quadapt.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def flip(tensor: Tensor, at: int = 3, bit: int = 1) -> None:
    tensor.view(torch.uint8).flatten()[at] ^= bit


def test_a_folder_as_it_was_written_passes(written: Written) -> None:
    assert verify(*written) == []


def test_every_tensor_has_a_digest(written: Written) -> None:
    folder, note, config = written
    digests = note["digests"]
    names = set(load_file(folder / "model.safetensors"))
    inside = {f"{name}.{part}" for name in digests["layers"] for part in config.layouts[name].shapes}
    assert set(digests["layers"]) == set(config.layouts)
    assert set(digests["tensors"]) == names - inside
    assert "model.norm.weight" in digests["tensors"]


@pytest.mark.parametrize("part", ["weight", "scales", "scales_absmax", "scales_mean", "offsets"])
def test_one_bit_of_a_layer_names_that_layer(part: str, written: Written) -> None:
    edit(written[0], lambda tensors: flip(tensors[f"{LAYER}.{part}"]))
    assert verify(*written) == [LAYER]


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"],
)
def test_one_bit_of_another_tensor_names_that_tensor(name: str, written: Written) -> None:
    edit(written[0], lambda tensors: flip(tensors[name], at=-1, bit=128))
    assert verify(*written) == [name]


def test_all_that_differs_is_named(written: Written) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        flip(tensors[f"{LAYER}.weight"])
        flip(tensors["model.norm.weight"])
        flip(tensors["model.layers.0.self_attn.q_proj.offsets"])

    edit(written[0], change)
    assert set(verify(*written)) == {LAYER, "model.norm.weight", "model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize(("gone", "named"), [(f"{LAYER}.offsets", LAYER), ("model.norm.weight", "model.norm.weight")])
def test_a_tensor_that_is_missing_is_named(gone: str, named: str, written: Written) -> None:
    edit(written[0], lambda tensors: tensors.pop(gone))
    assert verify(*written) == [named]


def test_a_layer_that_is_missing_is_named(written: Written) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(LAYER)]:
            del tensors[name]

    edit(written[0], drop)
    assert verify(*written) == [LAYER]


def test_a_tensor_that_was_added_is_named(written: Written) -> None:
    edit(written[0], lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    assert verify(*written) == ["model.extra"]


def test_a_tensor_of_another_shape_is_named(written: Written) -> None:
    edit(written[0], lambda tensors: tensors.update({f"{LAYER}.scales": tensors[f"{LAYER}.scales"][:-1]}))
    assert verify(*written) == [LAYER]


def test_the_same_bytes_as_another_shape_or_dtype_are_named(written: Written) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].view(64, 96)

    edit(written[0], change)
    assert set(verify(*written)) == {"model.norm.weight", "lm_head.weight"}


def test_two_layers_whose_weights_were_swapped_are_named(written: Written) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        for part in written[2].layouts[LAYER].shapes:
            one, other = f"model.layers.0.mlp.up_proj.{part}", f"{LAYER}.{part}"
            tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    edit(written[0], swap)
    assert set(verify(*written)) == {LAYER, "model.layers.0.mlp.up_proj"}


def test_another_format_in_the_config_is_noticed(written: Written) -> None:
    folder, note, config = written
    config.schemes[0]["format"]["zero"] = "float"
    config.schemes[0]["format"]["bits"] = 4
    config.schemes[0]["format"]["levels"] = "int"  # the same bytes, another meaning
    assert set(verify(folder, note, config)) == set(config.layouts)


def test_without_digests_nothing_is_claimed(written: Written) -> None:
    folder, _, config = written
    for note in ({}, {"digests": {}}):
        with pytest.raises(CheckpointError, match="no digests, so nothing can be verified"):
            verify(folder, note, config)


def test_shards_are_verified_together(quantized_llama: Callable[..., Any], tmp_path: Path, written: Written) -> None:
    folder, note, config = written
    model = quantized_llama(
        Format(levels="nf", bits=4, group_size=32, zero="float"), storage=Storage(scales="double", offsets="fp16")
    )
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="10KB")
    (shards / "model.safetensors.index.json").unlink()
    for name in note["digests"]["files"]:
        (shards / name).write_bytes((folder / name).read_bytes())
    assert verify(shards, note, config) == []
    sorted(shards.glob("*.safetensors"))[0].unlink()
    assert verify(shards, note, config) != []


# --- what is said of the tensors --------------------------------------------------------------------------------------


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = read(folder, name)
    change(value)
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda config: config.update(rope_theta=1e6)),
        ("config.json", lambda config: config["quantization_config"]["made"].update(merge="exact")),
        ("generation_config.json", lambda config: config.update(eos_token_id=7)),
        ("tokenizer.json", lambda config: config["model"]["vocab"].update({"new": 1})),
        ("tokenizer_config.json", lambda config: config.update(chat_template="{{ messages }}")),
    ],
)
def test_a_changed_field_of_a_config_or_the_tokenizer_names_the_file(
    name: str, change: Callable[..., Any], written: Written
) -> None:
    rewrite(written[0], name, dict)  # laid out otherwise, the same content
    assert verify(*written) == []
    rewrite(written[0], name, change)
    assert verify(*written) == [name]


def test_a_file_that_transformers_would_read_besides_is_named_and_others_are_not(written: Written) -> None:
    folder = written[0]
    (folder / "eval.json").write_text("{}")
    (folder / "README.md").write_text("Mine.")
    assert verify(*written) == []
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").unlink()
    assert set(verify(*written)) == {"chat_template.jinja", "generation_config.json"}


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note["certificate"].update(verdict="exact"),
        lambda note: note["certificate"].update(kl=0.0),
        lambda note: note["certificate"]["layers"][0].reverse(),
        lambda note: note.pop("certificate"),
    ],
)
def test_a_certificate_holds_for_what_it_certified_with_its_own_figures(
    change: Callable[..., Any], written: Written
) -> None:
    folder, _, config = written
    rewrite(folder, "quadapt.json", change)
    assert verify(folder, read(folder), config) == ["certificate (in quadapt.json)"]


def test_digests_that_were_made_to_fit_are_noticed_too(written: Written) -> None:
    folder, note, config = written
    note["certificate"]["verdict"] = "exact"
    note["digests"]["note"] = {}
    assert "digests (in quadapt.json)" in verify(folder, note, config)


def test_the_config_of_another_model_of_the_same_layout_is_noticed(written: Written) -> None:
    folder, note, config = written
    config.fingerprint = "0" * 64
    assert verify(folder, note, config) == ["fingerprint"]


def test_what_an_earlier_version_wrote_is_verified_as_far_as_it_goes(written: Written) -> None:
    folder, note, config = written
    assert unverified(note) == []
    note["digests"] = {name: note["digests"][name] for name in ("layers", "tensors")}
    assert verify(folder, note, config) == []
    assert len(unverified(note)) == 2
    edit(folder, lambda tensors: flip(tensors[f"{LAYER}.weight"]))
    assert verify(folder, note, config) == [LAYER]


def test_an_adapter_is_verified_as_a_model_is(quantized_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = get_peft_model(quantized_llama(), lora_config(Pooled(), rank=2, alpha=2, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    write_note(tmp_path, {"kind": "adapter", "final_loss": 1.5})
    assert verify(tmp_path, read(tmp_path)) == []
    rewrite(tmp_path, "adapter_config.json", lambda config: config["auto_mapping"]["quadapt"].update(pooling="mean"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name, value = next(iter(tensors.items()))
    (tmp_path / "adapter_model.safetensors").unlink()
    save_file({**tensors, name: value + 1e-6}, tmp_path / "adapter_model.safetensors")
    assert set(verify(tmp_path, read(tmp_path))) == {"adapter_config.json", name}
