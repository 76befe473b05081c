"""`make gpu`: what it says without a card, on a bare machine, and (on a card that is only pretended) with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checking, full, sections, speed, steps
from benchmarks.gpu.cases import Case
from benchmarks.gpu.rows import ROWS, Row, shown

ROOT = Path(__file__).parents[1]
ABSENT = ("pydantic", "typer", "rich", "datasets", "gguf", "sentencepiece", "matplotlib", "trl", "bitsandbytes")
"""Packages that are not on the bare machine."""

BARE = f"""
import itertools, runpy, sys
for name in {ABSENT!r}:
    sys.modules[name] = None
from benchmarks.gpu import cases, steps  # a few that are quick: all are tests of their own
every, named = cases.cases, steps.named
cases.cases = lambda *sizes: itertools.islice(every(*sizes), 0, None, 60)
steps.named = lambda device: named(device)[:12:6]
sys.argv = ["gpu"]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_without_a_card_one_line_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert line.startswith("No GPU here: ")
    assert line.endswith("agree with the CPU; nothing was timed.")


def test_what_differs_is_named_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Case("dequantize", "int4", lambda x: x + 1, lambda x: x, (torch.ones(2),))
    monkeypatch.setattr("benchmarks.gpu.cases.cases", lambda *_: [wrong])
    monkeypatch.setattr(steps, "named", lambda _: [])
    with pytest.raises(SystemExit, match=r"No GPU here\. 1 of 1 kernel cases"):
        gpu.interpreted()
    assert "dequantize, int4: result 0 differs by 1.0e+00" in capsys.readouterr().out


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of a card, and small sizes."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {
        "CARD": torch.device("cpu"),
        "COPY": 64,
        "SIDE": 16,
        "OUT": 24,
        "IN": 256,
        "SQUARE": 64,
        "BATCH": (1, 8),
        "TABLE_RANK": 4,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "BLOCKS", {**speed.BLOCKS, **small, "num_hidden_layers": 1, "vocab_size": 64})
    monkeypatch.setattr(speed, "RANK", 4)

    def elapsed(work: Callable[[], object], times: int = 1) -> float:
        begun = time.perf_counter()
        for _ in range(min(times, 1)):
            work()
        return max(time.perf_counter() - begun, 1e-6)

    def graph(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        return work, work()

    monkeypatch.setattr(speed, "elapsed", elapsed)
    monkeypatch.setattr(speed, "graph", graph)
    monkeypatch.setattr(speed, "find_spec", lambda _: None)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a pretended card")
    monkeypatch.setattr(gpu, "card", lambda: {"name": "a pretended card", "driver": None, "cuda": None})
    monkeypatch.setattr(checking, "checks", lambda *_: (checking.Counter(kernels=1), []))


@pytest.mark.usefixtures("pretended")
def test_on_a_card_every_row_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.on_card(tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    without = {key for key in ROWS if not isinstance(found["rows"].get(key), float)}
    peers = {"bnb_qlora", "bnb_qa_lora", "memory_qlora", "memory_qa_lora", "decode_bnb", "decode_int4pack"}
    assert without == peers | {key for key in ROWS if key.startswith("full_")}
    assert found["rows"]["bnb_qlora"] == "bitsandbytes is not installed"
    assert set(found["rows"]) <= set(ROWS)
    assert found["checks"] == {"run": 1, "failed": []}
    assert "a pretended card" in capsys.readouterr().out


@pytest.mark.usefixtures("pretended")
def test_sections_of_a_full_model_are_added_to_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(full, "SHAPE", {**speed.BLOCKS, "num_hidden_layers": 2})
    monkeypatch.setattr(full, "CALIBRATION", (2, 2, 64))
    card = gpu.card()
    (tmp_path / "gpu.json").write_text(
        json.dumps({"card": card, "rows": {"copy": 4.0, "full_bnb_step": 1e9, "full_bnb_peak": 1.0}})
    )
    gpu.on_card(tmp_path / "gpu.json", ["full-qlora", "full-l4q", "full-qa-lora"])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows["copy"] == 4.0
    assert {key for key in ROWS if key.startswith("full_")} <= set(rows)
    assert 0 < rows["full_qa_lora_of_bnb"] < 1
    gpu.on_card(tmp_path / "gpu.json", ["ceilings"])
    monkeypatch.setattr(gpu, "card", lambda: {"name": "another"})
    gpu.on_card(tmp_path / "gpu.json", ["ceilings"])  # nothing of one card stands beside what another did
    assert set(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == {"copy", "matmul"}
    with pytest.raises(SystemExit, match=r"ceiling: no such section\. There are ceilings, "):
        gpu.on_card(tmp_path / "gpu.json", ["ceiling"])


@pytest.mark.deep
def test_checks_are_shared_out_over_processes() -> None:
    cpu, done = torch.device("cpu"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "_shared", lambda _, tasks, __: done.append(tasks) or [None] * len(tasks))
        counts, failed = checking.checks(cpu, processes=3)
    ((tasks),) = done
    assert (counts["kernels"], counts["steps"], failed) == (
        sum(kind == "kernels" for kind, _ in tasks),
        len(steps.named(cpu)),
        [],
    )
    some = [task for task in tasks if task[0] == "kernels"][::150]
    assert list(checking._shared(cpu, [*some, ("steps", ("step", "no method"))], 2))[:-1] == [None] * len(some)


@pytest.mark.usefixtures("pretended")
def test_a_section_that_fails_is_told_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sections, "SECTIONS", {"first": fails, "second": lambda: {"copy": 4.0}})
    with pytest.raises(SystemExit, match="1 failed"):
        gpu.on_card(tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rows"] == {"copy": 4.0}
    assert found["checks"]["failed"] == ["first: RuntimeError: out of memory"]


@pytest.mark.usefixtures("pretended")
def test_no_section_begins_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "DEADLINE", -1.0)
    gpu.on_card(tmp_path / "gpu.json")
    assert list(tmp_path.iterdir()) == []  # what an earlier run measured is kept
    said = capsys.readouterr().out
    assert all(f"{name}: not begun, out of time" in said for name in sections.by_default())


def test_rows_say_what_is_asked_and_whether_it_is_met() -> None:
    assert Row("a", "ms", 50).met(50)
    assert not Row("a", "ms", 50).met(51)
    assert Row("a", "of the copy", 0.75, at_least=True).met(0.8)
    assert Row("a", "ms").met(1) is None
    table = {what: rest for what, *rest in shown({"icq": 49.0, "gptq": 4.0, "bnb_qlora": "no peer"})}
    assert table[ROWS["icq"].what] == ["49 ms", "at most 50", "met"]
    assert table[ROWS["gptq"].what] == ["4 s", "at most 3", "missed"]
    assert table[ROWS["table"].what] == ["not measured", "at most 5 s", ""]
