"""`quadapt export --gguf-type`: what it says and writes, also where a model takes two files."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from commands import SHORT, give, quadapt

pytestmark = pytest.mark.usefixtures("shelf", "here")


def types(path: Path) -> set[str]:
    return {each.tensor_type.name for each in gguf.GGUFReader(path).tensors if each.name.startswith("blk.0.ffn_up")}


def test_eight_bits_with_offsets_take_two_files(tmp_path: Path) -> None:
    model, path, beside = tmp_path / "eight", tmp_path / "eight.gguf", tmp_path / "eight-offsets.gguf"
    quadapt("quantize", "dense", "--rounding", "nearest", "--bits", "8", "--output", model)
    (answer,) = [row for row in quadapt("export", model, "--format", "?")["formats"] if row["format"] == "gguf"]
    assert answer["words"].startswith("Q8_0, codes as they are, offsets in a file beside it")
    said = quadapt("export", model, "--output", path)
    (report,) = said["reports"]
    assert types(path) == {"Q8_0"}
    assert 8.5 < report["bits_per_weight"] < 16
    assert any("eight-offsets.gguf has the offsets" in note for note in report["notes"])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["eight", "eight-offsets.gguf", "eight.gguf"]
    assert "exists" in give("export", model, "--output", path, code=2).error
    before = beside.read_bytes()
    quadapt("export", model, "--output", path, "--overwrite")
    assert beside.read_bytes() == before


def test_eight_bits_with_scales_in_float32_are_dense_unless_rounded(tmp_path: Path) -> None:
    model, path, beside = tmp_path / "wide", tmp_path / "wide.gguf", tmp_path / "wide-offsets.gguf"
    quadapt("quantize", "dense", "--rounding", "nearest", "--bits", "8", "--scales", "fp32", "--output", model)
    quadapt("export", model, "--output", path)
    assert types(path) == {"F32"}
    assert not beside.exists()
    quadapt("export", model, "--gguf-type", "fast", "--output", path, "--overwrite")
    assert types(path) == {"Q8_0"}
    assert beside.exists()


def test_symmetric_eight_bits_take_one_file(tmp_path: Path) -> None:
    model, path = tmp_path / "eight", tmp_path / "eight.gguf"
    quadapt("quantize", "dense", "--rounding", "nearest", "--bits", "8", "--zero", "none", "--output", model)
    (answer,) = [row for row in quadapt("export", model, "--format", "?")["formats"] if row["format"] == "gguf"]
    assert (answer["holds"], answer["words"]) == ("exactly", "codes as they are")
    (report,) = quadapt("export", model, "--output", path)["reports"]
    assert types(path) == {"Q8_0"}
    assert report["bits_per_weight"] == 8.5
    assert sorted(each.name for each in tmp_path.iterdir()) == ["eight", "eight.gguf"]


def test_eight_bits_that_were_trained_over_a_dense_base(place: Path, tmp_path: Path) -> None:
    """What the merge will be is not known before it is loaded; the second file is there all the same."""
    quadapt(
        *("tune", place / "dense", "--data", place / "story.txt", "--method", "l4q", "--bits", "8"),
        *("--max-steps", "1", "--group-size", "32", *SHORT, "--output", tmp_path / "adapter"),
    )
    quadapt("export", tmp_path / "adapter", "--gguf-type", "fast", "--output", tmp_path / "model.gguf")
    assert types(tmp_path / "model.gguf") == {"Q8_0"}
    assert (tmp_path / "model-offsets.gguf").exists()


def test_whole_zero_points_need_no_second_file(tmp_path: Path) -> None:
    quadapt("quantize", "dense", "--rounding", "nearest", "--zero", "integer", "--output", tmp_path / "model")
    said = quadapt("export", tmp_path / "model", "--output", tmp_path / "model.gguf")
    (report,) = said["reports"]
    assert types(tmp_path / "model.gguf") == {"Q5_0"}
    assert any("less their whole zero-points" in note for note in report["notes"])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "model.gguf"]
