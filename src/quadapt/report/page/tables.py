"""The tables of the page: every number of a chart, for those who do not see it or want to copy it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quadapt.report.choice import Point

ROWS = 12
"""The most rows of a table of a learning curve."""


@dataclass(frozen=True)
class Table:
    """A table: its caption, heads of columns, and rows whose first cell is their head."""

    caption: str
    """What the table holds, in a sentence."""

    columns: tuple[str, ...]
    """The heads of the columns."""

    rows: Sequence[tuple[str, ...]]
    """The cells, as they are shown."""


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, as pairs of a name and a value."""
    found = [("Model", result.get("model")), ("Data", ", ".join(result.get("data") or []))]
    found += [("Steps of each run", result.get("steps")), ("Seeds", result.get("seeds"))]
    found += [("Sequences in a step", result.get("batch")), ("Rank", result.get("rank"))]
    if result.get("method"):
        found.append(("Method", result["method"]))
    if result.get("spent_seconds"):
        budget = f" of {result['budget_minutes']:g}" if result.get("budget_minutes") else ""
        found.append(("Minutes that all runs took", f"{result['spent_seconds'] / 60:.1f}{budget}"))
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def models(points: Sequence[Point], best: set[str]) -> Table:
    """Every model with its size and its loss."""
    exact = any(point.get("exact") is not None for point in points)
    columns = (
        "model",
        "true bits",
        "MB",
        "loss",
        "spread",
        *(("exact answers",) if exact else ()),
        "rate",
        "on the front",
    )
    rows = []
    for point in points:
        if not point.get("losses"):
            continue
        share = () if not exact else ("" if point["exact"] is None else f"{point['exact']:.1%}",)
        size = f"{point['bytes'] / 1e6:.2f}" if point["bytes"] else ""
        spread = f"{max(point['losses']) - min(point['losses']):.4f}" if len(point["losses"]) > 1 else ""
        rate = "" if point.get("rate") is None else f"{point['rate']:g}"
        front = "yes" if point["key"] in best else ""
        rows.append((point["label"], f"{point['bits']:.2f}", size, f"{point['loss']:.4f}", spread, *share, rate, front))
    return Table("Models, their size, and their loss on the test data in nats per token.", columns, rows)


def cost(points: Sequence[Point]) -> Table:
    """Time and memory of each run."""
    rows = [
        (
            str(point["label"]).removesuffix(", as trained"),
            f"{point['seconds']:.1f}",
            f"{(point['peak_memory'] or 0) / 1e9:.3f}",
        )
        for point in points
        if point["route"] != "requantized"
    ]
    return Table("Training of each run.", ("run", "seconds", "peak memory, GB"), rows)


def curves(points: Sequence[Point]) -> Table:
    """Losses of each run at some of its steps."""
    rows = []
    for point in points:
        if point["route"] == "requantized":
            continue
        name = str(point["label"]).removesuffix(", as trained")
        held_out = {step: loss for step, loss in point.get("held_out") or []}
        every = max(1, -(-len(point["curve"]) // ROWS))
        shown = {
            step: loss
            for at, (step, loss) in enumerate(point["curve"])
            if at % every == 0 or at + 1 == len(point["curve"])
        }
        for step in sorted({*shown, *held_out}):
            rows.append((name, str(step), _loss(shown.get(step)), _loss(held_out.get(step))))
    return Table("Losses by step, some of them.", ("run", "step", "training loss", "held-out loss"), rows)


def search(trails: Sequence[Mapping[str, Any]]) -> Table:
    """Every rate that was tried, and which was taken."""
    rows = []
    for trail in trails:
        for each in sorted(trail["tried"], key=lambda each: (each["rate"], each["steps"])):
            said = "diverged" if each["choose"] is None else f"{each['choose']:.4f}"
            taken = "yes" if each["rate"] == trail["rate"] else ""
            rows.append((trail["label"], f"{each['rate']:g}", str(each["steps"]), said, taken))
    return Table("Learning rates that were tried.", ("run", "rate", "steps", "loss", "taken"), rows)


def errors(point: Point) -> Table:
    """Relative errors of each layer, before training where that is known, and after it."""
    rows = []
    for layer in point["layers"]:
        block = str(layer["block"]) if layer["block"] >= 0 else "none"
        before = "" if layer["base_error"] is None else f"{layer['base_error']:.4f}"
        rows.append((layer["kind"], block, f"{layer['bits']:.3f}", before, f"{layer['error']:.4f}"))
    columns = ("layer", "block", "true bits", "error before training", "error after")
    return Table(f"Relative errors of the layers: {point['label']}.", columns, rows)


def codes_words(width: str, counts: Mapping[str, Any]) -> str:
    """What the two counts are of, in words."""
    if counts["before"] is None:
        return f"{counts['weights']:,} weights of {width} bits. Which codes there were before is not known."
    what = {
        "base": "Before: the quantized model that training began with.",
        "nearest": "Before: the model that was given, rounded to the nearest codes of the same grid.",
    }[counts["before_is"]]
    share = counts["changed"] / max(1, counts["weights"])
    return f"{what} {share:.1%} of {counts['weights']:,} codes of {width} bits are others after training."


def codes(counts: Mapping[str, Any]) -> Table:
    """How often each code is used."""
    before = counts["before"] or [None] * len(counts["after"])
    rows = [
        (str(code), "" if one is None else f"{one:,}", f"{other:,}")
        for code, (one, other) in enumerate(zip(before, counts["after"], strict=True))
    ]
    return Table("Weights with each code.", ("code", "before", "after"), rows)


def certificates(points: Sequence[Point]) -> Table:
    """What each merge kept of the model that was trained."""
    rows = []
    for point in points:
        found = point.get("certificate")
        if found:
            equal = "bit for bit" if found["logits_equal"] else "no"
            rows.append(
                (
                    str(point["label"]),
                    found["verdict"],
                    equal,
                    f"{found['effect_lost']:.2%}",
                    f"{found['kl']:.1e}",
                    f"{found['argmax_changed']:.2%}",
                    f"{found['codes_changed']:,}",
                )
            )
    columns = ("model", "verdict", "logits equal", "effect lost", "KL", "likeliest token changed", "codes changed")
    return Table("Certificates of the merges.", columns, rows)


def samples(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Prompts of the test data, each with the right answer if there is one, and what every model makes of it."""
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        for sample in point.get("samples") or []:
            own = found.setdefault(sample["prompt"], {"expected": sample.get("expected"), "answers": []})
            own["answers"].append((point["label"], sample["answer"].strip() or "(nothing)"))
    return [{"prompt": prompt, **rest} for prompt, rest in found.items()]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
