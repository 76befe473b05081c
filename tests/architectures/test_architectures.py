"""Every architecture of transformers: quantized or listed, walked right, saved and merged bit for bit; or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tests.architectures.__main__ import RESULTS
from tests.architectures.checks import Row, examined
from tests.architectures.tiny import all_types

_NAMES = """albert bart bert bloom clip deberta-v2 detr distilbert falcon gemma3 gpt2 gpt_neox grounding-dino llava
mamba mixtral opt owlvit qwen2_vl qwen3_next roberta swin t5 vit whisper"""
SAMPLE = frozenset(_NAMES.split())
"""Those that every run of the tests examines: the most common families, and one of each way to be built."""

STORED = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"versions": {}, "rows": {}}


def _sampled(model_type: str) -> object:
    return model_type if model_type in SAMPLE else pytest.param(model_type, marks=pytest.mark.deep)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [_sampled(model_type) for model_type in all_types()])
def test_an_architecture_is_what_the_table_says(model_type: str, tmp_path: Path) -> None:
    """With the versions of the table: with others, nothing may be wrong."""
    row = examined(model_type, tmp_path)
    assert "fault" not in row, row["fault"]
    if STORED["versions"].get("transformers") == transformers.__version__:
        assert _outcome(row) == _outcome(STORED["rows"][model_type])


def _outcome(row: Row) -> Row:
    """What of a row does not hang on wording."""
    words = ("walk", "saved", "merge", "refused", "not_built")
    return {key: str(value).partition(":")[0] if key in words else value for key, value in row.items()}


def test_the_sample_has_models_of_all_kinds() -> None:
    assert set(all_types()) >= SAMPLE
    rows = {name: row for name, row in STORED["rows"].items() if name in SAMPLE}
    assert {"equal", "refused"} <= {str(row.get("walk", "")).partition(":")[0] for row in rows.values()}
    assert sum(row.get("merge") == "exact" for row in rows.values()) > 15
