"""The charts of the page, as Plotly's figures: colours of text and grid are the page's own, and set in the browser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quadapt.errors import require
from quadapt.report.choice import Point, front, spread

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#3a9ad0", "#7a5195", "#8c8c8c")
"""Colours that people who do not see all colours can tell apart (Okabe and Ito's, darkened where text needs it)."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
"""Marks that tell series apart without colour."""

Figure = dict[str, Any]
"""A chart as JSON: `data` and `layout`."""


def series_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Models that belong together: a method with one route at several widths, or the usual route."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point["route"] in ("untuned", "dense"):
            continue
        name = "LoRA, then llama.cpp" if point["route"] == "usual" else str(point["method"])
        if point["route"] in ("as trained", "requantized"):
            name += f", {point['route']}"
        found.setdefault(name, []).append(point)
    return found


def loss_by_bits(points: Sequence[Point]) -> Figure:
    """Loss on the test data against true bits per weight, with the front and the anchor."""
    go = _go()
    figure = go.Figure()
    served = [point for group in series_of(points).values() for point in group]
    best = front(served)
    if len(best) > 1:
        figure.add_scatter(
            x=[point["bits"] for point in best],
            y=[point["loss"] for point in best],
            mode="lines",
            line={"color": "#8c8c8c", "width": 7, "shape": "hv"},
            opacity=0.35,
            name="front: no other is as small and as good",
            hoverinfo="skip",
        )
    for at, (name, group) in enumerate(series_of(points).items()):
        ordered = sorted(group, key=lambda point: point["bits"])
        figure.add_scatter(
            x=[point["bits"] for point in ordered],
            y=[point["loss"] for point in ordered],
            error_y={"type": "data", "array": [spread(point) for point in ordered], "thickness": 1.2},
            mode="lines+markers",
            line={"dash": "dot", "width": 1},
            marker={"size": 11, "color": _colour(at), "symbol": SYMBOLS[at % len(SYMBOLS)]},
            name=name,
            text=[point["label"] for point in ordered],
            hovertemplate="%{text}<br>%{x:.2f} bits, %{y:.4f} nats per token<extra></extra>",
        )
    anchor = next((point for point in points if point["route"] == "dense"), None)
    if anchor is not None:
        ends = [
            min((point["bits"] for point in served), default=2),
            max((point["bits"] for point in served), default=16),
        ]
        figure.add_scatter(
            x=ends,
            y=[anchor["loss"]] * 2,
            mode="lines",
            line={"dash": "dash", "color": "#8c8c8c", "width": 2},
            name=str(anchor["label"]),
            hovertemplate="%{y:.4f} nats per token<extra></extra>",
        )
    bits = {
        "title": {"text": "true bits per weight"},
        "type": "log",
        "tickvals": [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24],
    }
    losses = [loss for point in served for loss in point["losses"]]
    wide = {"type": "log", "dtick": "D1"} if max(losses) > 3 * min(losses) > 0 else {}
    figure.update_layout(xaxis=bits, yaxis={"title": {"text": "loss, nats per token"}, **wide}, height=460)
    return _done(figure)


def time_and_memory(points: Sequence[Point]) -> Figure:
    """Seconds of training, and the peak of memory, as bars for each run."""
    subplots = require("plotly.subplots", "report")
    runs = [point for point in points if point.get("seconds") is not None and point["route"] != "requantized"]
    figure = subplots.make_subplots(rows=2, cols=1, vertical_spacing=min(0.35, 90 / (180 + 50 * len(runs))))
    names = [_run_name(point) for point in runs]
    figure.add_bar(
        x=[point["seconds"] for point in runs], y=names, orientation="h", row=1, col=1, marker_color=COLOURS[0]
    )
    memory = [(point["peak_memory"] or 0) / 1e9 for point in runs]
    figure.add_bar(x=memory, y=names, orientation="h", row=2, col=1, marker_color=COLOURS[2])
    figure.update_layout(
        showlegend=False,
        height=180 + 50 * len(runs),
        xaxis={"title": {"text": "seconds of training"}, "rangemode": "tozero"},
        xaxis2={"title": {"text": "peak memory, GB"}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed"},
        yaxis2={"autorange": "reversed"},
    )
    return _done(figure)


def curves(points: Sequence[Point]) -> Figure:
    """Training loss by step, and the loss on held-out data as marks."""
    figure = _go().Figure()
    runs = [point for point in points if point.get("curve") and point["route"] != "requantized"]
    for at, point in enumerate(runs):
        colour, name = _colour(at), _run_name(point)
        dash = ("solid", "dash", "dot", "dashdot")[at // len(COLOURS) % 4]
        steps, losses = zip(*point["curve"], strict=True)
        figure.add_scatter(
            x=steps,
            y=losses,
            mode="lines",
            name=name,
            legendgroup=name,
            line={"color": colour, "width": 1.6, "dash": dash},
        )
        if point.get("held_out"):
            steps, losses = zip(*point["held_out"], strict=True)
            mark = {"color": colour, "size": 9, "symbol": SYMBOLS[at % len(SYMBOLS)]}
            figure.add_scatter(
                x=steps,
                y=losses,
                mode="markers",
                name=f"{name}, held out",
                legendgroup=name,
                showlegend=False,
                marker=mark,
            )
    figure.update_layout(
        xaxis={"title": {"text": "optimizer step"}},
        yaxis={"title": {"text": "loss, nats per token"}, "type": "log", "dtick": "D2"},
        height=460,
    )
    return _done(figure)


def search(trails: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss where rates are chosen against the rate; larger marks had more steps."""
    figure = _go().Figure()
    for at, trail in enumerate(trails):
        tried = sorted((each for each in trail["tried"] if each["choose"] is not None), key=lambda each: each["rate"])
        most = max((each["steps"] for each in tried), default=1)
        figure.add_scatter(
            x=[each["rate"] for each in tried],
            y=[each["choose"] for each in tried],
            mode="markers",
            name=trail["label"],
            text=[f"{each['steps']} steps" for each in tried],
            marker={
                "color": _colour(at),
                "symbol": SYMBOLS[at % len(SYMBOLS)],
                "size": [6 + 8 * each["steps"] / most for each in tried],
            },
            hovertemplate="rate %{x:g}, %{text}: %{y:.4f}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": "learning rate"}, "type": "log", "dtick": "D2"},
        yaxis={"title": {"text": "loss where rates are chosen"}, "type": "log", "dtick": "D2"},
        height=420,
    )
    return _done(figure)


def errors(point: Point) -> Figure:
    """A heat map of relative errors of weights: blocks across, kinds of layers down."""
    kinds = list(dict.fromkeys(layer["kind"] for layer in point["layers"]))
    blocks = sorted({layer["block"] for layer in point["layers"]})
    found = {(layer["kind"], layer["block"]): layer["error"] for layer in point["layers"]}
    figure = _go().Figure()
    figure.add_heatmap(
        x=[str(block) if block >= 0 else "none" for block in blocks],
        y=kinds,
        z=[[found.get((kind, block)) for block in blocks] for kind in kinds],
        colorscale="Viridis",
        colorbar={"thickness": 12, "tickformat": ".2f"},
        hovertemplate="block %{x}, %{y}: %{z:.4f}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": {"text": "block"}, "type": "category"},
        yaxis={"autorange": "reversed"},
        height=150 + 34 * len(kinds),
    )
    return _done(figure)


def codes(width: str, counts: Mapping[str, Any]) -> Figure:
    """How often each code is used, before training and after it."""
    figure = _go().Figure()
    for at, (name, words) in enumerate((("before", "before"), ("after", "after"))):
        if counts[name] is not None:
            total = max(1, sum(counts[name]))
            figure.add_bar(
                x=list(range(len(counts[name]))),
                y=[each / total for each in counts[name]],
                name=words,
                marker_color=_colour(at),
            )
    figure.update_layout(
        xaxis={"title": {"text": f"code of {width} bits"}, "dtick": max(1, 2 ** int(width) // 16)},
        yaxis={"title": {"text": "share of weights"}, "tickformat": ".0%", "rangemode": "tozero"},
        barmode="group",
        height=340,
    )
    return _done(figure)


def _run_name(point: Point) -> str:
    return str(point["label"]).removesuffix(", as trained")


def _colour(at: int) -> str:
    return COLOURS[at % len(COLOURS)]


def _go() -> Any:
    return require("plotly.graph_objects", "report")


def _done(figure: Any) -> Figure:
    """A figure with what all have in common, as JSON without numbers that JSON has no word for."""
    figure.update_layout(
        template=_go().layout.Template(),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 8, "t": 12, "b": 8},
        legend={"orientation": "h", "yanchor": "top", "y": -0.22, "x": 0, "xanchor": "left"},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    found: Figure = figure.to_plotly_json()
    return {"data": _plain(found["data"]), "layout": _plain(found["layout"])}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "to_plotly_json"):
        return _plain(value.to_plotly_json())
    return None if isinstance(value, float) and not math.isfinite(value) else value
