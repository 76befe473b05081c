"""Which formats hold a model, and why the others do not: for one model, or for named layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from quadapt.errors import QuadaptError
from quadapt.exporters.formats import EXPORTERS, Answer, Exporter
from quadapt.nn.adapters import Adapter
from quadapt.quant.rounding import Nearest
from quadapt.quant.weight import Layout, QuantWeight


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that may be exported."""

    matrices: Mapping[str, Layout | Callable[[], QuantWeight]]
    """The model's quantized matrices by the names of their layers, merged ones if its adapter merges: a layout, which
    decides by itself, or a function that gives the matrix, whose numbers then decide."""

    model: Any = None
    """The model, or the PEFT model that holds it and an adapter; None to leave architecture and tokenizer aside."""

    tokenizer: Any = None
    """The tokenizer of the model, if there is one."""

    adapter: Adapter | None = None
    """The adapter over the model, if it has one that is not merged yet."""


@dataclass(frozen=True, kw_only=True)
class _Objection:
    """What a format has against a matrix."""

    why: str
    """The reason why the format cannot hold the matrix."""

    instead: tuple[str, bool] | None
    """What to use instead, as :meth:`Exporter.instead` gives it."""


def merged_layout(adapter: Adapter, base: Layout) -> Layout:
    """The layout of what merging an adapter makes of a matrix: found by merging an untrained one into a single row.

    Args:
        adapter: One that merges.
        base: Layout of the quantized matrix that it trains over. If it trains over dense ones, only the shape counts.
    """
    dense = torch.linspace(-1, 1, base.columns)[None]
    source = dense if adapter.base == "float" else Nearest()(dense, replace(base, out=1, permuted=False))
    params = {}
    for name, param in adapter.params(adapter.layout_of(source), 1).items():
        params[name] = torch.zeros(param.shape)
        param.init(params[name], source)
    return replace(adapter.merge(source, params, 1.0).layout, out=base.out, permuted=base.permuted)


def survey(subject: Subject, exporters: Sequence[Exporter]) -> list[Answer]:
    """What each of the formats makes of a model, in their order. Each matrix is made once and asked about by all."""
    refused = [_refused(exporter, subject) for exporter in exporters]
    found: list[dict[str, _Objection]] = [{} for _ in exporters]
    asked = [(exporter, into) for exporter, into, why in zip(exporters, found, refused, strict=True) if not why]
    for name, matrix in subject.matrices.items() if asked else ():
        weight = None if isinstance(matrix, Layout) else matrix()
        layout = matrix if isinstance(matrix, Layout) else weight.layout  # type: ignore[union-attr]
        for exporter, objections in asked:
            why = exporter.accepts(layout) if weight is None else exporter.holds(weight)
            if why:
                instead = exporter.instead(layout) if weight is None else exporter.replaced(weight)
                objections[name] = _Objection(why=why, instead=instead)
    return [
        _answer(exporter, subject, why, objections)
        for exporter, why, objections in zip(exporters, refused, found, strict=True)
    ]


def _refused(exporter: Exporter, subject: Subject) -> str:
    """Why the model as a whole cannot be written; an empty string if it can."""
    if exporter.takes == "adapter" and subject.adapter is None:
        return "it holds an adapter alone, and this is a whole model"
    try:
        if subject.adapter is not None:
            exporter.check_adapter(subject.adapter)
        if subject.model is not None:
            exporter.check_model(subject.model, subject.tokenizer)
    except QuadaptError as error:
        return str(error)
    return ""


def _answer(exporter: Exporter, subject: Subject, refused: str, objections: Mapping[str, _Objection]) -> Answer:
    def answer(holds: Literal["exactly", "changed", "no"], words: str) -> Answer:
        return Answer(
            format=exporter.name,
            holds=holds,
            words=words,
            layers={name: each.why for name, each in objections.items()},
            suffix=exporter.suffix,
            served_by=exporter.served_by,
        )

    if refused:
        return answer("no", refused)
    total = len(subject.matrices)
    lost = [name for name, each in objections.items() if each.instead is None]
    if lost:
        return answer("no", f"{_some(lost, total)}: {objections[lost[0]].why}")
    fates = list(dict.fromkeys(each.instead for each in objections.values() if each.instead is not None))
    alike = len(fates) == 1 and len(objections) == total
    words = _whole(exporter, subject.adapter, fates[0][0] if alike else exporter.form)
    changes = "" if subject.adapter is None else exporter.changes(subject.adapter)
    for fate in fates:
        names = [name for name, each in objections.items() if each.instead == fate]
        some = "" if alike else f" {_some(names, total)}: {fate[0]},"
        words += f"{',' if alike else ';'}{some} since {objections[names[0]].why}"
    words += f"; {changes}" if changes else ""
    exact = not changes and all(same for _, same in fates)
    return answer("exactly" if exact else "changed", words)


def _whole(exporter: Exporter, adapter: Adapter | None, form: str) -> str:
    """How a model is held, before what is said of single layers."""
    if adapter is None or exporter.takes == "adapter":
        return form
    if adapter.exactness != "none":
        return f"{form}, the adapter merged first"
    return f"{form}, the adapter {'added up in them' if exporter.unmerged == 'added' else 'in a file beside it'}"


def _some(names: Sequence[str], of: int) -> str:
    """Layers in words: all, or the first and how many more."""
    if len(names) == of:
        return "every layer" if of > 1 else names[0]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more of {of} layers"


COLUMNS = ("format", "holds it", "how, or why not", "written as", "served by")
"""Headings of the table of answers."""


def rows(answers: Iterable[Answer]) -> list[tuple[str, str, str, str, str]]:
    """The answers as rows below :data:`COLUMNS`."""
    return [
        (each.format, each.holds, each.words, f"file ({each.suffix})" if each.suffix else "folder", each.served_by)
        for each in answers
    ]


def formats_page(layouts: Mapping[str, Layout]) -> str:
    """Which formats hold which layouts exactly, as Markdown: a table of all, and the reasons below it.

    Args:
        layouts: Layouts by the words that name them in the table: "QA-LoRA, merged", "symmetric int8", ..
    """
    exporters = [cls() for cls in EXPORTERS.values() if cls.takes == "model"]
    asked = {name: survey(Subject(matrices={_LAYERS: layout}), exporters) for name, layout in layouts.items()}
    head = ["layout", *(exporter.name for exporter in exporters)]
    lines = [_row(head), _row(["---"] * len(head))]
    lines += [_row([name, *map(_cell, answers)]) for name, answers in asked.items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, answers in asked.items():
        for each in answers:
            if each.layers:
                reasons.setdefault((each.format, each.words.removeprefix(f"{_LAYERS}: ")), []).append(name)
    lines += [
        "",
        *(f"* `{format}`, {', '.join(names)}: {words}." for (format, words), names in sorted(reasons.items())),
    ]
    return "\n".join(lines) + "\n"


_LAYERS = "its layers"
"""The name of all layers, where a layout stands for them."""


def _cell(answer: Answer) -> str:
    """An answer in a few words."""
    return answer.holds if answer.holds == "no" else f"{answer.holds}: {answer.words.partition(', since ')[0]}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
