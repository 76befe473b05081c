"""The README.md of every folder that a command writes: what it says, and metadata that the hub takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import give, quadapt
from huggingface_hub import ModelCard, constants

from quadapt.hf import card as cards
from quadapt.hf.card import adapter_card, hub_name, noted, quantized_card
from quadapt.hf.loading import read_quantization

Shelf = dict[str, dict[str, Any]]

WRITTEN = {
    "adapter": ("peft", ["lora", "quadapt"], "text-generation"),
    "over-q4": ("peft", ["lora", "quadapt"], "text-generation"),
    "q4": ("quadapt", ["quantized", "quadapt"], "text-generation"),
    "merged": ("quadapt", ["quantized", "quadapt"], "text-generation"),
    "adapter/base": ("quadapt", ["quantized", "quadapt"], "text-generation"),
    "hf": ("transformers", ["hf", "quadapt"], "text-generation"),
    "lora": ("peft", ["lora", "quadapt"], "text-generation"),
}
"""Folders on the shelf, with the library, the tags and the pipeline that their cards name."""


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_has_a_card_with_valid_metadata(name: str, shelf: Shelf) -> None:
    """What comes of a folder of this machine names no base on the hub, which would refuse it."""
    assert shelf
    card = ModelCard.load(Path(name) / "README.md")
    library, tags, pipeline = WRITTEN[name]
    assert card.data.to_dict() == {"library_name": library, "tags": tags, "pipeline_tag": pipeline}
    assert "Base model: dense." in card.text
    assert str(Path.cwd()) not in card.text.replace(str(Path("dense").resolve()), "")


@pytest.mark.usefixtures("here")
def test_a_card_says_method_bits_data_certificate_and_how_to_load(shelf: Shelf) -> None:
    adapter, merged = (Path(name, "README.md").read_text() for name in ("adapter", "merged"))
    bits = shelf["adapter"]["bits"]
    assert f"{bits['base']:.3f} for the base, {bits['with_adapter']:.3f} with the adapter" in adapter
    for words in ("# An adapter (qa-lora)", "Trained for 8 steps", "Trained on story.txt.", "`quadapt.load(folder)`"):
        assert words in adapter
    for words in ("An adapter (qa-lora), trained for 8 steps, is merged into it", "Trained on story.txt."):
        assert words in merged
    assert "Certificate of the merge: exact; all logits are bit-equal in float32" in merged
    assert f"{shelf['merged']['bits_per_weight']:.3f} true bits per quantized weight" in merged
    exported = Path("hf", "README.md").read_text()
    for words in ("in the format hf", "vLLM", "method qa-lora, for 8 steps", "Certificate of the merge: exact"):
        assert words in exported
    lossy = Path("lossy", "README.md").read_text()
    assert "Certificate of the merge: lossy" in lossy
    assert "% of what was trained is lost in float32" in lossy


def _cached(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the hub with a license, as it lies in the cache, and a set of data."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    folder = place / "models--maker--small" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: of-maker\nlicense_link: L\n---\nSmall.\n")
    (place / "datasets--maker--texts").mkdir()
    return folder


@pytest.mark.usefixtures("here")
def test_a_base_of_the_hub_and_its_license_are_named(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shelf
    source = str(_cached(tmp_path, monkeypatch))
    note = noted("merged")
    note = {**note, "made": {**note["made"], "source": source}, "trained": {**note["trained"], "data": ["maker/texts"]}}
    config = read_quantization("merged")
    assert config is not None
    for made, relation in ((note, "finetune"), ({**note, "trained": {}}, "quantized")):
        about = ModelCard(quantized_card(config, made, "causal-lm")).data
        assert (about.base_model, about.base_model_relation) == ("maker/small", relation)
        assert (about.license, about.license_name, about.license_link) == ("other", "of-maker", "L")
    assert ModelCard(quantized_card(config, note, None)).data.datasets == ["maker/texts"]
    about = ModelCard(adapter_card(noted("adapter"), Path(source))).data
    assert (about.base_model, about.base_model_relation) == ("maker/small", "adapter")
    assert about.license == "other"


def test_what_lies_here_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cached(tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert hub_name("maker/texts", "dataset") == "maker/texts"
    assert hub_name("maker/small") == "maker/small"
    assert hub_name("maker/texts") is None  # a set of data, no model
    (tmp_path / "maker" / "small").mkdir(parents=True)
    others = ("maker/small", "other/small", "", None, "./x", "the embedded model", "gone/with a space")
    assert [hub_name(name) for name in others] == [None] * len(others)


def test_a_damaged_card_of_the_base_costs_its_license_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n{[\n---\n")
    assert cards._license(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    assert cards._license(str(tmp_path)) == {}


@pytest.mark.usefixtures("here")
def test_a_conversion_has_a_card_too(shelf: Shelf, tmp_path: Path) -> None:
    assert shelf
    quadapt("export", "q4", "--format", "gguf", "-o", tmp_path / "q4.gguf")
    quadapt("convert", tmp_path / "q4.gguf", "-o", tmp_path / "own")
    card = ModelCard.load(tmp_path / "own" / "README.md")
    assert card.data.library_name == "quadapt"
    assert "Base model: q4.gguf." in card.text


@pytest.mark.usefixtures("here")
def test_a_modelfile_lies_beside_a_gguf_file(shelf: Shelf, tmp_path: Path) -> None:
    """It names the files that lie beside it; an adapter that cannot merge is one of them."""
    assert shelf
    said = quadapt("export", "merged", "--ollama", "-o", tmp_path / "m.gguf")
    assert said["modelfile"] == str(tmp_path / "m.Modelfile")
    text = (tmp_path / "m.Modelfile").read_text()
    assert text.splitlines() == [
        "FROM ./m.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop """<end>"""',
        "PARAMETER num_ctx 128",
    ]
    quadapt("export", "qlora", "--ollama", "-o", tmp_path / "q.gguf")
    assert (tmp_path / "q.Modelfile").read_text().splitlines()[:2] == ["FROM ./q.gguf", "ADAPTER ./q-lora.gguf"]
    assert {each.name for each in tmp_path.iterdir()} == {
        *("m.gguf", "m.Modelfile"),
        *("q.gguf", "q-lora.gguf", "q.Modelfile"),
    }
    said = give("export", "merged", "--ollama", "--format", "hf", "-o", tmp_path / "hf", code=2)
    assert "reads GGUF files. Use format gguf, or leave it out" in said.error
    assert "exists. Use --overwrite" in give("export", "q4", "--ollama", "-o", tmp_path / "m.gguf", code=2).error
