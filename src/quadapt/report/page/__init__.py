"""One page for a browser about a run or a comparison: a single file that asks nothing of the network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from quadapt.errors import require
from quadapt.report.choice import Point, front
from quadapt.report.page import charts, tables

__all__ = ["page"]


def page(result: Mapping[str, Any]) -> str:
    """The page about a comparison, or about a single run, as HTML.

    It has no date and no chance in it: the same figures give the same page.

    Args:
        result: What `quadapt compare` writes into `compare.json`: `points` (its models), `search`, `recommendation`,
            `left_out` and facts about the run. Of a single run, `points` has one or a few, and the rest may be missing.

    Raises:
        MissingDependency: Plotly is not installed.
    """
    here, offline = files(__name__), require("plotly.offline", "report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["chart"] = _chart
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    points: Sequence[Point] = result["points"]
    sections = [section for section in _sections(result, points) if section is not None]
    return template.render(
        title=_title(result),
        facts=tables.facts(result),
        recommendation=result.get("recommendation"),
        sections=sections,
        samples=tables.samples(points),
        left_out=result.get("left_out", []),
        comparison=result["kind"] == "quadapt comparison",
        versions=result.get("versions", {}),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(offline.get_plotlyjs()),
    )


def _title(result: Mapping[str, Any]) -> str:
    if result["kind"] == "quadapt comparison":
        return f"{result['model']}: methods and widths compared"
    return f"{result['model']}: what became of it"


def _chart(figure: Mapping[str, Any]) -> Markup:
    """A figure as JSON within a script element, where `</` would end it."""
    return Markup(json.dumps(figure, sort_keys=True, ensure_ascii=True).replace("<", "\\u003c"))


def _sections(result: Mapping[str, Any], points: Sequence[Point]) -> list[dict[str, Any] | None]:
    """The sections with charts, in order; None in the place of those that there is nothing to say in."""
    trained = [point for point in points if point.get("curve")]
    served = [point for point in points if point.get("losses") and point["route"] not in ("untuned", "dense")]
    best = {point["key"] for point in front(served)}
    return [
        _section(
            "size",
            "Loss against size",
            "Lower and further left is better. Bars show the spread of the seeds. Bits are true ones: all that is "
            "stored for a weight of the linear layers, scales, offsets and unmerged adapters included.",
            tables.models(points, best),
            [("", charts.loss_by_bits(points), "Loss on the test data against true bits per weight.", None)]
            if len(served) > 1
            else [],
        )
        if any(point.get("losses") for point in points)
        else None,
        _section(
            "cost",
            "Time and memory",
            "Training alone, on the machine that ran it; mean time of the seeds, largest peak of memory.",
            tables.cost(trained),
            [("", charts.time_and_memory(points), "Seconds of training and peak of memory of each run.", None)],
        )
        if trained
        else None,
        _section(
            "curves",
            "Learning curves",
            "Loss on the training data as lines, and on data that is not trained on as marks; of the first seed.",
            None,
            [("", charts.curves(points), "Loss by optimizer step for each run.", tables.curves(trained))],
        )
        if trained
        else None,
        _section(
            "rates",
            "Learning rates that were tried",
            "Every rate had a share of the steps, the better half twice as many, and so on. The loss is that on text "
            "which is neither trained on nor reported on. Larger marks had more steps.",
            None,
            [
                (
                    "",
                    charts.search(result["search"]),
                    "Loss by learning rate for each method and width.",
                    tables.search(result["search"]),
                )
            ],
        )
        if result.get("search")
        else None,
        _choices(
            "errors",
            "Errors by layer",
            "How far the weights of each layer are from those of the model that was given: the norm of the difference "
            "over the norm of the matrix. What training has changed counts too.",
            [point for point in points if point.get("layers")],
            lambda point: [
                ("", charts.errors(point), "Relative error by block and kind of layer.", tables.errors(point))
            ],
        ),
        _choices(
            "codes",
            "Codes before and after",
            "How often each code is used, in all quantized layers together.",
            [point for point in points if point.get("codes")],
            lambda point: [
                (
                    tables.codes_words(width, counts),
                    charts.codes(width, counts),
                    "Use of each code.",
                    tables.codes(counts),
                )
                for width, counts in point["codes"].items()
            ],
        ),
        _section(
            "certificates",
            "Certificates",
            "What each merge kept of the model that was trained. Exact: the merged model gives the same logits, bit "
            "for bit.",
            tables.certificates(points),
            [],
        )
        if any(point.get("certificate") for point in points)
        else None,
    ]


Part = tuple[str, Mapping[str, Any], str, Any]
"""Words before a chart, the chart, what it shows in a sentence, and its table (None if the section has one)."""


def _section(name: str, title: str, words: str, table: Any, parts: Sequence[Part]) -> dict[str, Any]:
    return {"name": name, "title": title, "words": words, "table": table, "choices": [("", _parts(parts))]}


def _choices(
    name: str, title: str, words: str, points: Sequence[Point], parts: Callable[[Point], Sequence[Part]]
) -> dict[str, Any] | None:
    """A section in which one chooses a model; without JavaScript all are shown."""
    if not points:
        return None
    choices = [(str(point["label"]), _parts(parts(point))) for point in points]
    return {"name": name, "title": title, "words": words, "table": None, "choices": choices}


def _parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [{"words": words, "figure": figure, "label": label, "table": table} for words, figure, label, table in parts]
