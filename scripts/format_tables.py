"""Tables of what export formats hold of each method, and how fast their engines are, from `benchmarks/formats.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.engines import ENGINES
from compared import table

_LAYERS = re.compile(r"^(every layer|model\.\S+( and \d+ more of \d+ layers)?): ")
_ADAPTER = re.compile(r"\ban? [\w-]+ adapter\b")
_GRID = re.compile(r"\b(int|nf|fp|iq)\d\S*?-(g\d+|row)\b")
_OURS = {"bf16": "transformers, bfloat16", "quadapt": "quadapt"}
"""What runs without being exported."""


def formats_table(found: dict[str, Any]) -> str:
    """A row for each method, a column for each format: how it is held, and how far logits are apart."""
    cells = [run for name, run in found["runs"].items() if name.startswith("cell ")]
    rows, columns = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("row", "format"))
    columns.sort(key=lambda name: list(ENGINES).index(name) if name in ENGINES else len(ENGINES))
    notes: dict[str, str] = {}
    by_key = {(cell["row"], cell["format"]): cell for cell in cells}
    lines = [
        (f"`{row}`", *(_cell(by_key[row, name], notes) if (row, name) in by_key else "" for name in columns))
        for row in rows
    ]
    listed = "\n".join(f"* ({letter}) {words}." for words, letter in notes.items())
    sizes = [cell["size"] for cell in cells if cell["format"] == "hf" and "size" in cell]
    about = (
        f"A Llama of {found['about']['sizes']['hidden_size']} and {found['about']['sizes']['intermediate_size']} "
        f"features, tuned for {found['about']['steps']} steps; largest difference of logits over "
        f"{found['about']['tokens']} tokens, where logits have a standard deviation of about "
        f"{sum(sizes) / len(sizes):.1f}.\n\n"
    )
    return f"{about}{table(('method', *columns), lines)}\n{listed}\n\n{_commits(cells)}\n"


def _cell(cell: Mapping[str, Any], notes: dict[str, str]) -> str:
    """A cell in a few words, with the letter of a note where there is more to say."""
    words, held = _short(cell), cell["holds"]
    letter = notes.setdefault(words, _letter(len(notes))) if words else ""
    said = {"exactly": "exact", "changed": "changed", "no": "no"}[held] + (f" ({letter})" if letter else "")
    if cell.get("failed"):
        return f"{said}, not loaded"
    return f"{said}, {_number(cell['largest'])}" if "largest" in cell else said


def _letter(count: int) -> str:
    return chr(ord("a") + count) if count < 26 else _letter(count // 26 - 1) + chr(ord("a") + count % 26)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") if value < 1e-2 else f"{value:.2f}"


def _short(cell: Mapping[str, Any]) -> str:
    """Why a format does not hold a model as it is, or how it holds it otherwise: its own words without their advice."""
    words = _LAYERS.sub("", cell["words"].partition(". ")[0])
    words = _ADAPTER.sub("the adapter", _GRID.sub("the grid", words)).replace(f" {cell['format']} ", " the format ")
    if cell["holds"] == "no":
        return words
    plain = words in ("codes as they are", "dense weights", "LoRA factors in float32")
    return "" if plain else words


def engines_table(found: dict[str, Any]) -> str:
    """Which engine ran each format, in which version and precision, and tokens per second."""
    runs = {name.removeprefix("speed "): run for name, run in found["runs"].items() if name.startswith("speed ")}
    rows = []
    for name, run in runs.items():
        engine = ENGINES.get(name)
        size = f"{run['bytes'] / 1e6:.0f}" if "bytes" in run else ""
        speeds = (f"{run[f'{what} per second']:.0f}" for what in ("written", "read"))
        about = (f"`{name}`", run["versions"] or engine.name, engine.computes) if engine else ("", _OURS[name], "")
        rows.append((*about, size, *speeds))
    columns = ("format", "engine", "computes in", "MB", "tokens written a second", "read a second")
    where = f"{found['environment']['processor']}, one thread, by time on the CPU."
    return f"{table(columns, rows)}\n{where} {_commits(list(runs.values()))}\n"


def _commits(runs: list[dict[str, Any]]) -> str:
    """The commits that runs were made on, in words."""
    found = list(dict.fromkeys(run["commit"][:10] for run in runs))
    return f"Commit{'s' if len(found) > 1 else ''} {', '.join(found)}."


FILES = {
    "int4-sym": "Q4_0",
    "iq4-nl": "IQ4_NL",
    "nf4": "F32",
    "int8-sym,fp16": "Q8_0",
    "int8-sym,fp32": "F32",
    "int8,fp16": "Q8_0, offsets beside it",
    "int8,fp32": "F32",
}
"""What a GGUF file holds the grids of `benchmarks/levels.py` in, bit for bit."""


def levels_table(found: dict[str, Any]) -> str:
    """A row for each grid: loss when rounded to it, and after tuning, at the rate that is best on the first seed."""
    grids: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, run in found["runs"].items():
        grid, rate, _ = name.split()
        grids.setdefault(grid, {}).setdefault(rate, []).append(run)
    rows = []
    for grid, rates in grids.items():
        ((untuned,), tuned) = rates.pop("0"), rates
        rate, runs = min(tuned.items(), key=lambda item: (-len(item[1]), item[1][0]["choose"]))
        losses = [run["loss"] for run in runs]
        bits, name = f"{untuned['bits']:.2f}", grid.replace(",", ", scales in ")
        rows.append((name, bits, FILES[grid], f"{untuned['loss']:.4f}", rate, len(runs), _spread(losses)))
    columns = ("grid, groups of 32", "true bits", "in GGUF", "loss, rounded", "rate", "seeds", "loss, tuned and merged")
    return f"{found['about']['steps']} steps.\n\n{table(columns, rows)}"


def _spread(losses: list[float]) -> str:
    """Mean and half the range, with the digits in which grids of eight bits differ."""
    mean = f"{sum(losses) / len(losses):.4f}"
    return mean if len(losses) == 1 else f"{mean}\u00a0±\u00a0{(max(losses) - min(losses)) / 2:.4f}"
