"""The tables of all architectures of transformers, from what `make architectures` has stored."""

from __future__ import annotations

from typing import Any

from compared import table

STEPS = ("walk", "saved", "merge")


def architectures(found: dict[str, Any]) -> str:
    """What came of every architecture: a row for each that was built, the refusals, and those that were not built."""
    rows: dict[str, dict[str, Any]] = found["rows"]
    built = {name: row for name, row in rows.items() if "not_built" not in row}
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        f"With {versions}: {len(rows)} model types, of which {len(built)} can be built tiny here.\n",
        _summary(built),
        "### Examined\n",
        _examined(built),
        "### Refused\n",
        _refused(built),
        "### Not built\n",
        table(
            ("model type", "why"), [(name, _short(row["not_built"])) for name, row in rows.items() if name not in built]
        ),
    ]
    return "\n".join(parts)


def _summary(built: dict[str, dict[str, Any]]) -> str:
    counts = [
        ("quantized, or every matrix listed", sum("quantized" in row and "fault" not in row for row in built.values())),
        ("GPTQ's walk equal to the model's own forward", sum(row.get("walk") == "equal" for row in built.values())),
        ("saved and reloaded, bit for bit", sum(row.get("saved") == "equal" for row in built.values())),
        ("QA-LoRA merged exactly", sum(row.get("merge") == "exact" for row in built.values())),
        ("refused at some step, with the reason", sum(bool(_refusals(row)) for row in built.values())),
        ("wrong at some step", sum("fault" in row for row in built.values())),
    ]
    return table(("", "model types"), counts)


def _examined(built: dict[str, dict[str, Any]]) -> str:
    columns = ("model type", "task", "class", "lists of blocks", "quantized", "left", "walk", "saved", "QA-LoRA")
    lines = [
        (
            name,
            row["task"],
            row["class"],
            ", ".join(row.get("stacks", [])),
            row.get("quantized", ""),
            row.get("left", ""),
            *(_outcome(row, step) for step in STEPS),
        )
        for name, row in built.items()
    ]
    return table(columns, lines)


def _outcome(row: dict[str, Any], step: str) -> str:
    return "refused" if "refused" in row else str(row.get(step, "")).partition(":")[0]


def _refusals(row: dict[str, Any]) -> list[tuple[str, str]]:
    """At which step something was refused or wrong, and the words."""
    found = [("quantizing", row["refused"])] if "refused" in row else []
    found += [(step, str(row[step])[9:]) for step in STEPS if str(row.get(step, "")).startswith("refused: ")]
    found += [("skipped, as asked for", ", ".join(row["skipped"]))] if row.get("skipped") else []
    return found + ([("wrong", row["fault"])] if "fault" in row else [])


def _refused(built: dict[str, dict[str, Any]]) -> str:
    lines = [(name, step, _short(words)) for name, row in built.items() for step, words in _refusals(row)]
    return table(("model type", "at", "words"), lines)


def _short(words: str) -> str:
    """The beginning of some words, without what Markdown would take for its own."""
    words = words.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("[", "\\[")
    return words if len(words) < 300 else f"{words[:300]} .."
