"""The page about runs: it has all that its charts show, asks nothing of the network, and follows from its figures."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadapt.errors import MissingDependency
from quadapt.report.choice import front, recommended
from quadapt.report.page import page
from quadapt.report.page.charts import COLOURS, SYMBOLS
from quadapt.report.weights import Place

VOID = {"meta", "link", "br", "option"}


def point(label: str, route: str, bits: float, losses: list[float], **more: Any) -> dict[str, Any]:
    loss = sum(losses) / len(losses)
    about = {"key": label, "label": label, "route": route, "bits": bits, "bytes": 10**6 * bits, "losses": losses}
    return {
        **about,
        "loss": loss,
        "exact": 0.25,
        "tokens": 99,
        "samples": [],
        "method": label.partition(",")[0],
        **more,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """A comparison of two methods at two widths, with anchors."""
    run: dict[str, Any] = {
        "rate": 1e-3,
        "choose": [1.0],
        "seconds": 12.5,
        "peak_memory": 1.5e9,
        "curve": [[step, 3.0 / step] for step in range(1, 31)],
        "held_out": [[15, 1.25], [30, 1.125]],
    }
    names = [(0, "mlp.up_proj"), (1, "mlp.up_proj"), (0, "self_attn.q_proj"), (1, "self_attn.q_proj"), (-1, "extra")]
    layers = [
        {
            "name": f"{block}.{kind}",
            "block": block,
            "kind": kind,
            "bits": 2.5,
            "error": 0.125 + at,
            "base_error": 0.0625,
        }
        for at, (block, kind) in enumerate(names)
    ]
    counts = {"before": [7, 13, 11, 5], "after": [6, 14, 10, 6], "before_is": "base", "changed": 3, "weights": 36}
    certificate = {"verdict": "exact", "logits_equal": True, "effect_lost": 0.0, "kl": 0.0, "argmax_changed": 0.0}
    merged = {**run, "layers": layers, "codes": {"2": counts}, "certificate": {**certificate, "codes_changed": 0}}
    samples = [{"prompt": "Where is </script><script>alert(1)</script>?", "answer": " <b>here</b>", "expected": "here"}]
    points = [
        point("the model as it was given", "untuned", 16.0, [4.0], samples=samples),
        point("LoRA in full precision", "dense", 16.0, [1.0, 1.01], **run, samples=samples),
        point("qa-lora, 4 bits", "merged", 4.5, [1.02, 1.03], **merged, samples=samples),
        point("qa-lora, 2 bits", "merged", 2.5, [1.5, 1.6], **merged, samples=samples),
        point("qlora, 4 bits, as trained", "as trained", 7.5, [1.04, 1.05], **run),
        point("qlora, 4 bits, requantized", "requantized", 4.2, [1.2, 1.3], **run),
        point("LoRA, then llama.cpp's Q2_K", "usual", 3.0, [1.8, 1.9]),
    ]
    tried = [{"rate": 1e-3, "steps": 8, "choose": 1.5}, {"rate": 1e-2, "steps": 8, "choose": None}]
    return {
        "kind": "quadapt comparison",
        "model": "tiny & small",
        "data": ["a.jsonl"],
        "steps": 30,
        "seeds": 2,
        "points": points,
        "search": [{"label": "qa-lora, 4 bits", "rate": 1e-3, "tried": tried}],
        "left_out": ["qlora at 5 bits: nf has none"],
        "recommendation": recommended(points, 0.05),
        "versions": {"quadapt": "0.1", "torch": "2.13"},
    }


class _Seen(HTMLParser):
    """What stands in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.words: list[str] = []
        self._json = False
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._json = tag == "script" and ("type", "application/json") in attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside in ("td", "th"):
            self.cells.append(data)
        if inside == "script" and self._json:
            self.charts.append(json.loads(data))
        elif inside not in ("script", "style"):
            self.words.append(data)


def test_the_page_is_one_file_that_asks_nothing_of_the_network(result: dict[str, Any]) -> None:
    seen = _Seen(page(result))
    for tag, name, value in seen.attributes:
        assert name not in ("src", "srcset", "action", "poster"), (tag, name)
        if name == "href":
            assert value.startswith("#") or value == "data:,"


def test_headings_go_down_by_one_level_at_a_time(result: dict[str, Any]) -> None:
    levels = _Seen(page(result)).headings
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_tables_hold_what_charts_show(result: dict[str, Any]) -> None:
    """Each loss, time, error, count and rate that is drawn stands in a cell as well, rounded as tables are."""
    seen = _Seen(page(result))
    assert len(seen.charts) == 4 + 2 + 2  # of the whole, and of each merged model: errors and codes
    cells = set(seen.cells)
    for each in result["points"]:
        assert {f"{each['loss']:.4f}", f"{each['bits']:.2f}", each["label"]} <= cells
    for layer in result["points"][2]["layers"]:
        assert f"{layer['error']:.4f}" in cells
    assert {"7", "13", "11", "5", "6", "14", "10", "12.5", "1.500", "1.2500", "1.1250", "diverged"} <= cells
    drawn = [trace for chart in seen.charts for trace in chart["data"] if trace["type"] == "scatter"]
    shown = {f"{y:.4f}" for trace in drawn for y in trace["y"] if trace["mode"] != "lines"}
    assert shown <= cells


def test_text_of_models_and_data_cannot_leave_its_place(result: dict[str, Any]) -> None:
    text = page(result)
    assert "<script>alert(1)" not in text
    assert "<b>here" not in text
    assert "<b>here</b>" in " ".join(_Seen(text).words)
    result["points"][2]["label"] = "</script><script>alert(2)</script>"
    text = page(result)
    assert "<script>alert(2)" not in text
    assert any("alert(2)" in json.dumps(chart) for chart in _Seen(text).charts)


def test_the_same_figures_give_the_same_page(result: dict[str, Any]) -> None:
    first = page(result)
    assert page(json.loads(json.dumps(result))) == first
    other = copy.deepcopy(result)
    other["points"][2]["losses"][0] += 0.25
    assert page(other) != first


def test_every_colour_has_a_lighter_one_for_dark_pages() -> None:
    script = (files("quadapt.report.page") / "page.js").read_text()
    assert all(f'"{colour}": "#' in script for colour in COLOURS)
    assert len(COLOURS) == len(set(COLOURS)) == len(SYMBOLS)


def test_a_run_without_data_shows_what_there_is(result: dict[str, Any]) -> None:
    run = result["points"][2]
    for name in ("losses", "loss", "exact", "tokens", "samples"):
        del run[name]
    seen = _Seen(page({"kind": "quadapt run", "model": "adapter", "points": [run], "left_out": ["loss"]}))
    words = " ".join(seen.words)
    assert "Learning curves" in words
    assert "Errors by layer" in words
    assert "Recommendation" not in words
    assert "Loss against size" not in words


def test_the_page_says_what_to_install(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingDependency, match=r"pip install 'quadapt\[report\]'"):
        page(result)


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(pairs: list[tuple[int, int]]) -> None:
    points = [{"key": at, "bits": bits, "loss": loss} for at, (bits, loss) in enumerate(pairs)]
    slow = {
        (one["bits"], one["loss"])
        for one in points
        if not any(
            other["bits"] <= one["bits"] and other["loss"] <= one["loss"] and other != {**one, "key": other["key"]}
            for other in points
        )
    }
    found = front(points)
    assert {(each["bits"], each["loss"]) for each in found} == slow
    assert len(found) == len(slow)


def test_the_smallest_that_is_good_enough_is_recommended(result: dict[str, Any]) -> None:
    points = result["points"]
    chosen = recommended(points, 0.05)
    assert chosen["key"] == "qa-lora, 4 bits"
    assert chosen["within"]
    assert "loses 0.0200 nats per token (perplexity 2.0% more)" in chosen["words"]
    assert "qa-lora, 2 bits would save 2.00 bits and cost 0.5250" not in chosen["words"]  # the next smaller is another
    assert "qlora, 4 bits, requantized would save 0.30 bits and cost 0.2250" in chosen["words"]
    assert recommended(points, 0.6)["key"] == "qa-lora, 2 bits"
    none = recommended(points, 0.001)
    assert (none["key"], none["within"]) == ("qa-lora, 4 bits", False)
    assert "Nothing with fewer bits comes within 0.001" in none["words"]
    assert recommended(points[:2], 0.05)["key"] is None


def test_what_the_seeds_cannot_tell_apart_is_said(result: dict[str, Any]) -> None:
    points = result["points"]
    points[5] |= {"losses": [1.0, 1.07], "loss": 1.035, "bits": 4.6}
    assert "qlora, 4 bits, requantized cannot be told from it" in recommended(points, 0.05)["words"]
    for each in points:
        each["losses"] = each["losses"][:1]
    assert "It was run with one seed" in recommended(points, 0.05)["words"]


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.up_proj", 3, "mlp.up_proj"),
        ("transformer.h.11.mlp.experts.2.gate_proj", 11, "mlp.experts.2.gate_proj"),
        ("lm_head", -1, "lm_head"),
    ],
)
def test_layers_have_their_place(name: str, block: int, kind: str) -> None:
    assert Place.of(name) == Place(block, kind)
