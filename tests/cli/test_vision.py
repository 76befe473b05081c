"""Models with a vision tower: their text part is quantized, tuned and merged; the rest stays, and works, as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, byte_tokenizer, give, logits, quadapt, write_data

from quadapt.hf.loading import load, load_model
from quadapt.model.quantize import quantized_layers

TEXT = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
SIGHT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
PICTURE = {"image_size": 28, "patch_size": 14}
REASON = "outside the language model (vision tower, projector)"


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**SIGHT, **PICTURE, projection_dim=32),
        image_token_index=263,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config)


def _gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=16, pad_token_id=0),
        vision_config=SiglipVisionConfig(**SIGHT, **PICTURE, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=263,
        boi_token_index=262,
        eoi_token_index=261,
    )
    return Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 0},
        vision_config={"depth": 4, "embed_dim": 96, "num_heads": 4, "hidden_size": 64, "patch_size": 14},
        image_token_id=263,
        video_token_id=262,
        vision_start_token_id=261,
        vision_end_token_id=260,
    )
    return Qwen2VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {"llava": _llava, "gemma3": _gemma3, "qwen2-vl": _qwen2_vl}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(name)`: a folder with the dense model in `dense`, data, and what the commands make of it."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folder = folders[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            MODELS[name]().eval().save_pretrained(folder / "dense")
            byte_tokenizer().save_pretrained(folder / "dense")
            (folder / "dense" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
            write_data(folder)
            text = ("--data", folder / "story.txt", "--max-steps", "4")
            quadapt("tune", folder / "dense", *text, *SHORT, "--output", folder / "adapter")
            quadapt("merge", folder / "adapter", "--output", folder / "merged")
        return folders[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_text_part_alone_is_quantized_and_the_rest_is_as_it_was(name: str, made: Callable[[str], Path]) -> None:
    folder = made(name)
    dense, merged = load_model(str(folder / "dense")), load_model(str(folder / "merged"))
    layers = quantized_layers(merged)
    assert len(layers) == 14
    assert all(layer.startswith("model.language_model.layers.") for layer in layers)
    left = json.loads((folder / "merged" / "config.json").read_text())["quantization_config"]["left"]
    sight = [each for each in left if ".vision" in each or ".visual" in each or "projector" in each]
    assert len(sight) > 10
    assert {left[each] for each in sight} <= {REASON, "embedding"}
    state = merged.state_dict()
    kept = {key: tensor for key, tensor in dense.state_dict().items() if key.rpartition(".")[0] not in layers}
    assert all(torch.equal(state[key], tensor) for key, tensor in kept.items())
    assert type(merged) is type(dense)
    assert (folder / "merged" / "preprocessor_config.json").read_bytes() == (
        folder / "dense" / "preprocessor_config.json"
    ).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_what_was_trained_is_what_is_merged(name: str, made: Callable[[str], Path]) -> None:
    folder = made(name)
    note = json.loads((folder / "merged" / "quadapt.json").read_text())
    assert note["certificate"]["verdict"] == "exact"
    dense, adapted, merged = (load(str(folder / each))[0] for each in ("dense", "adapter", "merged"))
    assert torch.equal(logits(adapted), logits(merged))
    assert not torch.equal(logits(merged), logits(dense))
    found = quadapt("eval", folder / "merged", "--data", folder / "story.txt", "--limit", "1", "--context", "32")
    assert found["perplexity"]["loss"] > 0


def test_random_tokens_to_compare_on_stand_for_no_picture() -> None:
    import quadapt as library

    torch.manual_seed(0)
    model = library.prepare(_llava().eval(), rounding="nearest", rank=2)
    merged, certificate = library.merge(model)
    assert certificate.probe == "256 random tokens"
    assert type(merged).__name__ == "LlavaForConditionalGeneration"


def test_pictures_are_still_seen(made: Callable[[str], Path]) -> None:
    merged: Any = load_model(str(made("llava") / "merged"))
    ids = torch.tensor([[5, 6, *[263] * 4, 7, 8]])
    with torch.no_grad():
        first, second = (
            merged(input_ids=ids, pixel_values=picture).logits for picture in torch.randn(2, 1, 3, 28, 28).unbind()
        )
    assert bool(torch.isfinite(first).all())
    assert (first - second)[0, -1].abs().max() > 1e-3


def test_dense_weights_go_out_under_the_names_of_the_files(made: Callable[[str], Path]) -> None:
    folder = made("gemma3")
    quadapt("export", folder / "merged", "--format", "hf", "--dtype", "float32", "--output", folder / "hf")
    assert (logits(load_model(str(folder / "hf"))) - logits(load_model(str(folder / "merged")))).abs().max() < 1e-3
    assert (folder / "hf" / "preprocessor_config.json").exists()
    said = give("export", folder / "merged", "--output", folder / "m.gguf", code=2)
    assert "Gemma3ForConditionalGeneration" in said.error or "gemma3" in said.error


@pytest.mark.parametrize(("part", "text", "sight"), [("vision", 0, 24), ("all", 14, 24)])
def test_another_part_is_quantized_if_it_is_asked_for(
    part: str, text: int, sight: int, made: Callable[[str], Path], tmp_path: Path
) -> None:
    given = ("--part", part, "--rounding", "nearest", "--group-size", "16", "--output", tmp_path / "q")
    quadapt("quantize", made("llava") / "dense", *given)
    model: Any = load_model(str(tmp_path / "q"))
    layers = quantized_layers(model)
    assert sum(".language_model." in name for name in layers) == text
    assert sum(".vision_tower." in name for name in layers) == sight
    ids = torch.tensor([[5, 6, *[263] * 4, 7, 8]])
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits).all())


def test_all_of_a_model_is_tuned_on_text_and_the_vision_tower_alone_is_not(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = made("llava")
    given = ("--data", folder / "story.txt", "--max-steps", "2", "--rounding", "nearest", "--method", "qa-lora", *SHORT)
    said = give("tune", folder / "dense", "--part", "vision", *given, "--output", tmp_path / "none", code=2).error
    assert "part='vision': the data are text, of which nothing reaches that part" in said
    quadapt("tune", folder / "dense", "--part", "all", *given, "--output", tmp_path / "adapter")
    merged = quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert merged["certificate"]["verdict"] == "exact"
    assert len(quantized_layers(load_model(str(tmp_path / "merged")))) > 14 + 16


def test_parts_of_a_model_that_compares_pictures_with_text() -> None:
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

    from quadapt.errors import ConfigError
    from quadapt.model.select import select

    text = {**TEXT, "projection_dim": 32}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIGHT, **PICTURE, "projection_dim": 32}))
    of_text, of_vision, of_all = (set(select(model, part=part).chosen) for part in ("text", "vision", "all"))  # type: ignore[arg-type]
    assert all(name.startswith("text_model.") for name in of_text)
    assert all(not name.startswith("text_model.") for name in of_vision)
    assert of_text | of_vision == of_all
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no towers that could be told apart"):
        select(LlamaForCausalLM(LlamaConfig(**TEXT)), part="vision")
