"""What a checkpoint lacks, or has too many of, or of the wrong kind, is an error wherever a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quadapt
from quadapt.errors import CheckpointError
from quadapt.hf.folder import open_folder
from quadapt.hf.loading import load_model

Make = Callable[..., Any]
Change = Callable[[dict[str, Tensor]], Any]

LAYER = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """`written(model, change)`: its folder, with the tensors of the file changed."""

    def write(model: nn.Module, change: Change = len) -> Path:
        model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
        file = tmp_path / "m" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return tmp_path / "m"

    return write


def _rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def _cast(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.__setitem__(name, tensors[name].view(torch.uint8).view(dtype))


DAMAGE: dict[str, tuple[Change, str]] = {
    "a matrix is missing": (lambda tensors: tensors.pop(f"{LAYER}.weight"), rf"{LAYER}\.weight: is not in the files"),
    "a norm is missing": (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight: is not in"),
    "the embedding is missing": (
        lambda tensors: tensors.pop("model.embed_tokens.weight"),
        r"model\.embed_tokens\.weight: is not in",
    ),
    "the head is missing": (lambda tensors: tensors.pop("lm_head.weight"), r"lm_head\.weight: is not in"),
    "a bias is missing": (lambda tensors: tensors.pop(f"{LAYER}.bias"), rf"{LAYER}\.bias: is not in"),
    "a whole block is missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name],
        r"and \d+ more: are not in the files, and random numbers would stand there",
    ),
    "a norm is renamed": (
        _rename("model.layers.0.input_layernorm.weight", "model.layers.0.first_norm.weight"),
        r"input_layernorm\.weight: is not in the files",
    ),
    "a tensor is too many": (
        lambda tensors: tensors.__setitem__("model.layers.0.mlp.up_proj.bias", torch.ones(96)),
        r"up_proj\.bias: is in the files, but LlamaForCausalLM has nothing of that name",
    ),
    "a shape differs": (
        lambda tensors: tensors.__setitem__(f"{LAYER}.weight", torch.ones(16, 64)),
        rf"{LAYER}\.weight: is 16 x 64 in the files, and 32 x 64 by config\.json",
    ),
    "integers for floats": (
        _cast("model.norm.weight", torch.int32),
        r"model\.norm\.weight: is int32 in the files, where float32, bfloat16 or float16 belongs",
    ),
    "eight-bit floats": (
        lambda tensors: tensors.__setitem__(f"{LAYER}.weight", tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)),
        rf"{LAYER}\.weight: is float8_e4m3fn in the files",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dense_model_that_is_not_whole_is_refused_by_name(
    damage: str, device: str, tiny_llama: Make, written: Make
) -> None:
    change, words = DAMAGE[damage]
    folder = written(tiny_llama(attention_bias=True), change)
    with pytest.raises(CheckpointError, match=words):
        load_model(str(folder), device=device)


QUANTIZED: dict[str, tuple[Change, str]] = {
    "a norm is renamed": (_rename("model.norm.weight", "model.final.weight"), r"model\.norm\.weight: is not in"),
    "scales are missing": (lambda tensors: tensors.pop(f"{LAYER}.scales"), rf"{LAYER}\.scales: is not in the"),
    "codes called signed": (
        _cast(f"{LAYER}.weight", torch.int8),
        rf"{LAYER}\.weight: is int8 in the files, where uint8 belongs",
    ),
    "codes called floats": (
        _cast(f"{LAYER}.weight", torch.float8_e5m2),
        rf"{LAYER}\.weight: is float8_e5m2 in the files, where uint8 belongs",
    ),
    "offsets called floats": (
        _cast(f"{LAYER}.offsets", torch.float8_e4m3fn),
        rf"{LAYER}\.offsets: is float8_e4m3fn in the files",
    ),
    "scales of other groups": (
        lambda tensors: tensors.__setitem__(f"{LAYER}.scales", tensors[f"{LAYER}.scales"][:, :2].clone()),
        rf"{LAYER}\.scales: is not in the checkpoint, or has another shape there than 32 x 4",
    ),
    "a layer of another model": (
        lambda tensors: tensors.__setitem__("model.layers.9.mlp.up_proj.weight", torch.ones(2, 2)),
        r"model\.layers\.9\.mlp\.up_proj\.weight: is in the files, but",
    ),
}


@pytest.mark.parametrize("damage", QUANTIZED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantized_model_that_is_not_whole_is_refused_by_name(
    damage: str, device: str, quantized_llama: Make, written: Make
) -> None:
    change, words = QUANTIZED[damage]
    folder = written(quantized_llama(), change)
    with pytest.raises(CheckpointError, match=words):
        load_model(str(folder), device=device)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_whole_models_load(tied: bool, dtype: torch.dtype, tiny_llama: Make, written: Make) -> None:
    model = tiny_llama(tie_word_embeddings=tied, dtype=dtype)
    folder = written(model)
    assert torch.equal(load_model(str(folder)).lm_head.weight, model.lm_head.weight)  # type: ignore[operator,union-attr]
    assert {parameter.device.type for parameter in load_model(str(folder), device="meta").parameters()} == {"meta"}


def test_what_older_versions_wrote_beside_the_weights_passes(tiny_llama: Make, written: Make) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    model = tiny_llama()
    found = load_model(str(written(model, change)))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_causal_masks_of_older_versions_pass_and_a_real_bias_does_not(tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    model = GPTJForCausalLM(GPTJConfig(vocab_size=96, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=32))
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "transformer.h.0.attn"
    tensors = load_file(file)
    tensors |= {f"{name}.bias": torch.ones(1, 1, 32, 32).bool(), f"{name}.masked_bias": torch.tensor(-1e9)}
    save_file(tensors, file, metadata={"format": "pt"})
    load_model(str(tmp_path))
    save_file({**tensors, f"{name}.bias": torch.ones(64)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.bias: is in the files, but GPTJForCausalLM has nothing"):
        load_model(str(tmp_path))


# --- doors ------------------------------------------------------------------------------------------------------------


def test_python_refuses_too(quantized_llama: Make, tiny_llama: Make, written: Make) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: is not in the files"):
        quadapt.prepare(
            str(written(tiny_llama(), lambda tensors: tensors.pop("model.norm.weight"))), rounding="nearest"
        )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: is not in the files"):
        quadapt.load(written(quantized_llama(), lambda tensors: tensors.pop("model.norm.weight")))


# --- pickles ----------------------------------------------------------------------------------------------------------


def _as_pickles(folder: Path, *, shards: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{at + 1:05}-of-{shards:05}.bin" for at in range(shards)]
    where = {name: files[at % shards] for at, name in enumerate(tensors)}
    for file in files:
        torch.save({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_load_like_safetensors(shards: int, tiny_llama: Make, written: Make) -> None:
    model = tiny_llama(attention_bias=True)
    folder = written(model)
    _as_pickles(folder, shards=shards)
    assert open_folder(str(folder)).kind == "model"
    again = load_model(str(folder)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_pickle_that_lacks_a_tensor_or_a_shard_is_refused(tiny_llama: Make, written: Make) -> None:
    folder = written(tiny_llama(), lambda tensors: tensors.pop("model.norm.weight"))
    _as_pickles(folder, shards=2)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: is not in the files"):
        load_model(str(folder))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing, though the index"):
        open_folder(str(folder))


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_code_in_a_pickle_does_not_run(tiny_llama: Make, written: Make, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(tiny_llama())
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors, such as code, which is not run"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_is_refused(tiny_llama: Make, written: Make) -> None:
    folder = written(tiny_llama())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights \(model\.safetensors or pytorch_model\.bin\)"):
        open_folder(str(folder))


def test_of_the_hub_pickles_are_fetched_only_where_there_is_no_safetensors(tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub

    asked: list[list[str]] = []
    for safe in (True, False):
        folder = tmp_path / str(safe)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / ("model.safetensors" if safe else "pytorch_model.bin")).write_bytes(b"")
        if safe:
            from safetensors.torch import save_file as save

            save({"a": torch.ones(1)}, folder / "model.safetensors")

        def fetch(_: str, allow_patterns: list[str], at: Path = folder) -> str:
            asked.append(allow_patterns)
            return str(at)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        open_folder("someone/something")
    assert [any(pattern.endswith(".bin") for pattern in patterns) for patterns in asked] == [False, False, True]
    assert not any(pattern == "*.bin" for patterns in asked for pattern in patterns)  # no optimizer's state


# --- kinds ------------------------------------------------------------------------------------------------------------


def _others() -> dict[str, Any]:
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
        LlamaModel,
        RobertaConfig,
        RobertaForMaskedLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    gated = {**sizes, "intermediate_size": 64, "pad_token_id": 0}
    return {
        "bert": lambda: BertForSequenceClassification(BertConfig(**gated)),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**gated)),
        "llama-tokens": lambda: LlamaForTokenClassification(LlamaConfig(**gated)),
        "llama-body": lambda: LlamaModel(LlamaConfig(**gated)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**gated)),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64
            )
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=64, d_ff=64, num_layers=1, num_heads=4, d_kv=16)
        ),
    }


@pytest.mark.parametrize("kind", ["bert", "llama", "llama-tokens", "llama-body", "roberta", "bart", "t5"])
def test_a_model_of_any_kind_is_loaded_as_the_class_that_it_is(kind: str, tmp_path: Path) -> None:
    model = _others()[kind]().eval()
    model.save_pretrained(tmp_path)
    found = load_model(str(tmp_path))
    assert type(found) is type(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_a_class_that_transformers_does_not_have_is_refused_before_anything_is_loaded(
    tiny_llama: Make, written: Make, monkeypatch: Any
) -> None:
    from transformers import PreTrainedModel

    folder = written(tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForTelepathy"]}))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(CheckpointError, match="LlamaForTelepathy is no class of transformers"):
        load_model(str(folder))


@pytest.mark.parametrize("named", [None, [], ["LLaMAForCausalLM"], ["LlamaForCausalLM"], ["OwnForCausalLM"]], ids=str)
def test_causal_language_models_load_however_they_are_written(
    named: list[str] | None, tiny_llama: Make, written: Make
) -> None:
    model = tiny_llama()
    folder = written(model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": named}))
    assert type(load_model(str(folder))) is type(model)
