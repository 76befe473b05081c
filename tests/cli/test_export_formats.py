"""`quadapt export MODEL --format ?`: what each format makes of a model, as the export of it then does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, give, quadapt

from quadapt.exporters.formats import EXPORTERS

pytestmark = pytest.mark.usefixtures("shelf", "here")

GRAPHS = tuple(
    name
    for name, needed in {"onnx": ("onnxscript",), "openvino": ("onnxscript", "openvino")}.items()
    if all(map(find_spec, needed))
)
"""Formats that are refused where a library is not installed."""

WHOLE = ("awq", "compressed-tensors", "gptq", "hqq", "torchao", *GRAPHS)
"""Formats of integers with whole zero-points; those of 4 bits fit into all of them."""

ALL = {"gguf", "hf", "mlx"}
"""Formats that hold integers with any offsets, in float32."""

NO = dict.fromkeys(("bitsandbytes", *WHOLE, "lora", "mlx", "nf8", "onnx", "openvino"), "no")
ROUNDED = dict.fromkeys(("hf", "hqq", "torchao", *GRAPHS), "changed")

HOLDS = {
    "merged": NO | ROUNDED | {"gguf": "exactly", "mlx": "exactly"},
    "adapter": NO | ROUNDED | {"gguf": "exactly", "lora": "changed", "mlx": "exactly"},
    "qlora": NO | {"gguf": "exactly", "hf": "changed", "lora": "exactly", "nf8": "changed"},
}


@pytest.mark.parametrize("model", HOLDS)
def test_each_format_does_as_the_table_says(model: str, tmp_path: Path) -> None:
    rows = {row["format"]: row for row in quadapt("export", model, "--format", "?")["formats"]}
    assert set(rows) == set(EXPORTERS)
    assert {name: row["holds"] for name, row in rows.items()} == HOLDS[model]
    for name, row in rows.items():
        said = give(
            "export", model, "--format", name, "--output", tmp_path / name, code=2 if row["holds"] == "no" else 0
        )
        if row["holds"] != "no":
            continue
        assert not (tmp_path / name).exists()
        reason = next(iter(row["layers"].values()), row["words"])
        assert reason in said.error or "is no adapter" in said.error


def test_people_get_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = give("export", "merged", "--format", "?", code=0).out
    for name, kind in EXPORTERS.items():
        assert name in said
        assert kind.served_by.split()[0] in said
    assert "offsets that compressed-tensors cannot hold" in " ".join(said.split())


def test_a_dtype_that_holds_it_is_asked_for_its_sake() -> None:
    rows = quadapt("export", "merged", "--format", "?", "--dtype", "float32")["formats"]
    assert {row["format"]: row["holds"] for row in rows}["hf"] == "exactly"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("--format", "ggfu", "-o", "x"),
            "format='ggfu': input should be 'awq', 'bitsandbytes', 'compressed-tensors'",
        ),
        (("--format", "?", "-o", "x"), "output='x': format='?' writes nothing. Leave output out"),
        (("--format", "hf"), "output is missing. File (gguf) or folder (all others) to write"),
        (("--format", "hf", "--dense", "f16", "-o", "x"), "dense='f16': is no option of format='hf', which has dtype"),
        (("--format", "gguf", "--dense", "q8", "-o", "x"), "dense='q8': input should be 'f32' or 'f16'"),
    ],
    ids=["a format that is none", "output", "no output", "another's option", "no choice"],
)
def test_what_cannot_be_meant_is_said_at_once(arguments: tuple[Any, ...], told: str) -> None:
    assert told in give("export", "merged", *arguments, code=2).error


def test_a_layout_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("quadapt.jobs.export.load", None)
    said = give("export", "merged", "--format", "compressed-tensors", "--output", tmp_path / "ct", code=2)
    assert "down_proj: int3-g32 has offsets that compressed-tensors cannot hold" in said.error


def test_an_adapter_is_refused_for_what_it_would_merge_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Again before anything is loaded: the layout of the merge is known from that of the base."""
    monkeypatch.setattr("quadapt.jobs.export.load_adapted", None)
    said = give("export", "adapter", "--format", "compressed-tensors", "--output", tmp_path / "ct", code=2)
    assert "down_proj: int3-g32 has offsets that compressed-tensors cannot hold" in said.error
    assert not (tmp_path / "ct").exists()


@pytest.mark.parametrize(
    ("method", "settings", "exactly"),
    [
        ("l4q", ("--zero", "integer"), {*WHOLE, *ALL}),
        ("lr-qat", (), {*WHOLE, *ALL}),
        ("peqa", (), ALL),
        ("qa-lora-scales", (), ALL),
        ("lota-qaf", ("--rounding", "nearest"), ALL),
        ("lota-qaf", ("--rounding", "nearest", "--no-shift-offsets"), {*WHOLE, *ALL}),
        ("code-lora", ("--rounding", "nearest", "--train-offsets"), {*WHOLE, *ALL}),
        ("qat-lora", (), {"gguf"}),
    ],
)
def test_adapters_of_every_kind_are_asked_about_what_they_merge_to(
    method: str, settings: tuple[str, ...], exactly: set[str], place: Path, tmp_path: Path
) -> None:
    adapter, options = tmp_path / method, ("--dtype", "float32")
    quadapt(
        *("tune", place / "dense", "--data", place / "story.txt", "--method", method, "--group-size", "32"),
        *("--max-steps", "2", *settings, *SHORT, "--output", adapter),
    )
    answers = quadapt("export", adapter, "--format", "?", *options)["formats"]
    rows = {row["format"]: row for row in answers}
    assert {name for name, row in rows.items() if row["holds"] == "exactly"} == exactly, rows
    for name, row in rows.items():
        said = give("export", adapter, "--format", name, *options, "--output", tmp_path / f"{name}-out")
        assert (said.code == 0) == (row["holds"] != "no"), (row, said.err)
        assert said.code == 0 or not (tmp_path / f"{name}-out").exists()
