"""The benchmark of formats: every format has an engine, and what engines compute becomes a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.engines import ENGINES, of_graph, of_torch
from benchmarks.formats import ADAPTERS, ROWS
from export_models import logits, tiny

from quadapt.exporters.formats import EXPORTERS
from quadapt.methods import METHODS

IDS = torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_format_has_an_engine_and_every_method_a_row() -> None:
    assert {*ENGINES, *ADAPTERS} == set(EXPORTERS)
    assert set(METHODS) <= set(ROWS)
    assert {row["method"] for row in ROWS.values()} == set(METHODS)


def test_a_model_of_transformers_is_read_and_written_token_by_token() -> None:
    model, seen = tiny(), list[int]()
    running = of_torch(model)
    assert torch.equal(running.read(IDS), logits(model, IDS))
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    running.write(IDS, 3)
    assert seen == [12, 1, 1, 1]


def test_a_graph_is_given_its_own_keys_and_values_again() -> None:
    lengths = []

    def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A graph whose token after each is the next number; what it remembers is how many there were."""
        past, ids = given["past_key_values.0.key"], given["input_ids"]
        assert "position_ids" not in given  # which this graph does not name
        assert given["attention_mask"].shape[1] == past.shape[2] + ids.shape[1]
        lengths.append((past.shape[2], ids.tolist()[0]))
        rows = np.eye(50, dtype=np.float32)[ids + 1]
        return {"logits": rows, "present.0.key": np.concatenate([past, np.zeros((1, 2, ids.shape[1], 4))], 2)}

    inputs: dict[str, Any] = {"input_ids": None, "attention_mask": None, "past_key_values.0.key": (2, 4)}
    running = of_graph(inputs, run)
    assert running.read([4, 9]).argmax(-1).tolist() == [5, 10]
    lengths.clear()
    running.write([4, 9], 2)
    assert lengths == [(0, [4, 9]), (2, [10]), (3, [11])]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "scripts"), *sys.path])
    import format_tables

    return format_tables


def test_the_table_has_the_exporters_own_words_once(tables: Any) -> None:
    why = "every layer: int4-g32 has offsets that {} cannot hold, which knows whole zero-points. Use something"
    held = {"merge": "exact", "size": 0.8, "holds": "exactly", "words": "codes as they are"}
    cells = [
        {**held, "row": "qa-lora", "format": "hf", "largest": 0.0},
        *({"row": row, "format": "gptq", "holds": "no", "words": why.format("gptq")} for row in ("qa-lora", "peqa")),
        {"row": "peqa", "format": "awq", "holds": "no", "words": why.format("awq")},
        {**held, "row": "peqa", "format": "hf", "largest": 3.4e-6},
    ]
    about = {"sizes": {"hidden_size": 256, "intermediate_size": 512}, "steps": 6, "tokens": 48}
    runs = {f"cell {each['row']} {each['format']}": {**each, "commit": "0123456789abcdef"} for each in cells}
    found = {"about": about, "runs": runs}
    text = tables.formats_table(found)
    assert "| `qa-lora` | exact, 0 | no (a) |  |" in text
    assert "| `peqa` | exact, 3e-6 | no (a) | no (a) |" in text
    assert text.count("* (") == 1
    assert "* (a) the grid has offsets that the format cannot hold, which knows whole zero-points.\n" in text
    assert text.endswith("Commit 0123456789.\n")


def test_more_than_26_reasons_have_letters_of_their_own(tables: Any) -> None:
    assert [tables._letter(count) for count in (0, 25, 26, 27, 51, 52)] == ["a", "z", "aa", "ab", "az", "ba"]
