"""Tables that compare methods, starts and plans, from what benchmarks have stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quadapt.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def summaries(runs: dict[str, Any]) -> dict[tuple[int, str], tuple[float, list[dict[str, Any]]]]:
    """Runs of `benchmarks/methods.py` by width and method, at the learning rate that is best on the first seed."""
    found: dict[tuple[int, str], dict[float, list[dict[str, Any]]]] = {}
    for key, run in runs.items():
        name, bits, rate, _ = key.split()
        found.setdefault((int(bits), name), {}).setdefault(float(rate), []).append(run)
    best = {}
    for key, rates in found.items():
        rate = min(rates, key=lambda rate, rates=rates: rates[rate][0].get("merged", rates[rate][0].get("as trained")))
        best[key] = rate, rates[rate]
    return best


def spread(values: list[float]) -> str:
    """Mean, and half the range, with spaces at which no line breaks; a single value as it is."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{sum(values) / len(values):.3f}\u00a0±\u00a0{(max(values) - min(values)) / 2:.3f}"


def methods_table(found: dict[str, Any]) -> str:
    """Held-out losses of the methods on one task, and which of the exact ones are best."""
    about = found["about"]
    trained = f"{about['steps']} steps of {about['batch']} sequences of at most {about['length']} tokens."
    return f"{trained}\n\n{losses(found)}\n{verdicts(found)}"


def losses(found: dict[str, Any]) -> str:
    """A row for each width and method."""
    rows = []
    order = [*("lora", "untuned"), *(each for name in METHODS for each in (name, f"{name}-grouped"))]
    for (bits, name), (rate, runs) in sorted(
        summaries(found["runs"]).items(), key=lambda item: (-item[0][0], order.index(item[0][1]))
    ):
        exact, again = ([run[kind] for run in runs if kind in run] for kind in ("merged", "requantized"))
        trained = [run["as trained"] for run in runs if "as trained" in run]
        rows.append(
            (
                bits,
                "rounding (GPTQ), untuned" if name == "untuned" else name,
                f"{rate:g}" if rate else "",
                spread(trained) if trained else "",
                spread(exact or again) if exact or again else "",
                "" if name in ("lora", "untuned") else "exact" if exact else "requantized",
                f"{runs[0]['bits']:.2f}" if "bits" in runs[0] else "16",
                f"{sum(run['CPU seconds'] for run in runs) / len(runs):.0f}" if trained else "",
            )
        )
    columns = ("bits", "method", "rate", "as trained", "served", "merge", "true bits", "CPU s")
    return table(columns, rows)


def verdicts(found: dict[str, Any]) -> str:
    """Which exact products are below every requantized one, width by width."""
    means: dict[int, dict[str, dict[str, float]]] = {}
    for (bits, name), (_, runs) in summaries(found["runs"]).items():
        for kind in ("merged", "requantized"):
            values = [run[kind] for run in runs if kind in run]
            if values and name != "untuned":
                means.setdefault(bits, {}).setdefault(kind, {})[name] = sum(values) / len(values)
    lines = []
    for bits, kinds in sorted(means.items(), reverse=True):
        least = min(kinds["requantized"].values())
        below = [name for name, value in kinds["merged"].items() if value < least]
        above = [f"{name} (by {value - least:.3f})" for name, value in kinds["merged"].items() if value >= least]
        lines.append(
            f"- {bits} bits: exact and below every requantized one ({least:.3f} and up): {', '.join(below) or 'none'}; "
            f"not below: {', '.join(above) or 'none'}."
        )
    return "\n".join(lines) + "\n"


def plans_table(found: dict[str, Any]) -> str:
    """Held-out losses under one budget."""
    numbers = ("held-out loss", "true bits")
    rows = [(row["grid"], row["model"], *(f"{row[name]:.3f}" for name in numbers)) for row in found["rows"]]
    return f"With a budget of {found['budget']} bits:\n\n" + table(("grid", "model", *numbers), rows)


def starts_table(found: dict[str, Any]) -> str:
    """Errors and losses of the starts on one task."""
    groups: dict[tuple[int, str, str], dict[str, list[dict[str, Any]]]] = {}
    for key, run in found["runs"].items():
        name, bits, range_, rate, _ = key.split()
        groups.setdefault((int(bits), range_, name), {}).setdefault(rate, []).append(run)
    rows = []
    for (bits, range_, name), rates in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1] == "icq")):
        rate, runs = max(rates.items(), key=lambda item: len(item[1]))  # the others were tried on one seed
        zero = groups[bits, range_, "zero"][rate][0]["output errors"]
        first = runs[0]
        pairs = list(zip(first["output errors"], zero, strict=True))
        rows.append(
            (
                *(bits, range_, name, f"{sum(first['weight errors']) / len(zero):.4f}"),
                f"{sum(first['output errors']) / len(zero):.4f}",
                f"{sum(mine < theirs for mine, theirs in pairs) / len(pairs):.0%}"
                if not name.startswith("zero")
                else "",
                *(f"{first['known']:.4f}", f"{first['before']:.3f}", spread([run["after"] for run in runs])),
                *(rate, f"{first['bits']:.2f}"),
            )
        )
    columns = ("bits", "range", "start", "weight error", "output error", "layers below zero's", "loss, known text")
    trained = f"{found['about']['steps']} steps of {found['about']['batch']} sequences.\n\n"
    return trained + table((*columns, "before", "after", "rate", "true bits"), rows)


def compared(stored: str) -> str:
    """The tables of a stored comparison: `methods-embedded`, `starts-embedded`, `planned-embedded`, .."""
    makers = {"methods": methods_table, "starts": starts_table, "planned": plans_table}
    return makers[stored.partition("-")[0]](json.loads((RESULTS / f"{stored}.json").read_text()))
