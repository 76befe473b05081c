"""A plan by budget, as tables and as a figure."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from quadapt.budget import BudgetPlan
from quadapt.errors import MissingDependency, require
from quadapt.files import writing
from quadapt.report.ui import UI


def show_plan(plan: BudgetPlan, ui: UI) -> None:
    """Print what a plan chose, and how good it is."""
    weights = sum(layer.layout.out * layer.layout.columns for layer in plan.layers.values())
    by_name: dict[str, list[str]] = defaultdict(list)
    grids: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, layer in plan.layers.items():
        by_name[name.rpartition(".")[2]].append(name)
        grids[layer.layout.name, layer.layout.storage.scales].append(name)
    rows = []
    for part, names in by_name.items():
        layouts = [plan.layers[name].layout for name in names]
        mean = sum(each.bits for each in layouts) / sum(each.out * each.columns for each in layouts)
        least, most = (choose(each.bits_per_weight for each in layouts) for choose in (min, max))
        error = sum(plan.layers[name].error for name in names) / plan.objective if plan.objective else 0.0
        rows.append((f"{len(names)} x {part}", f"{mean:.3f}", f"{least:.3f}", f"{most:.3f}", f"{100 * error:.1f} %"))
    ui.table("by kind of layer", ("layers", "bits", "least", "most", "of the error"), rows)
    table = []
    for (format, scales), names in sorted(grids.items()):
        share = sum(plan.layers[name].layout.out * plan.layers[name].layout.columns for name in names) / weights
        table.append((format, scales, len(names), f"{100 * share:.1f} %"))
    ui.table("by grid", ("format", "scales", "layers", "of the weights"), table)
    more = "" if plan.with_adapters is None else f", {plan.with_adapters:.4f} with adapters as {plan.adapters}"
    ui.show(f"{plan.bits_per_weight:.4f} true bits per weight{more}; budget {plan.budget:g}")
    gap = plan.objective / plan.bound - 1 if plan.bound > 0 else 0.0
    ui.show(f"squared error {plan.objective:.6g}; no plan within the budget is better by over {100 * gap:.2g} %")


def draw(plan: BudgetPlan, path: Path, ui: UI) -> str | None:
    """Draw bits by layer and by kind of layer into a PNG file; says so, and returns None, where matplotlib is missing.

    Args:
        plan: What to draw.
        path: File to write.
        ui: For the message.

    Returns:
        The file's name.
    """
    try:
        figure = require("matplotlib.figure", "demo")
    except MissingDependency as error:
        ui.say(f"no figure: {error}")
        return None
    by_name: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for at, (name, layer) in enumerate(plan.layers.items()):
        number = re.search(r"\.(\d+)\.", name)
        by_name[name.rpartition(".")[2]].append((int(number[1]) if number else at, layer.layout.bits_per_weight))
    canvas = figure.Figure(figsize=(10, 4), layout="constrained")
    lines, bars = canvas.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    for part, points in by_name.items():
        lines.plot(*zip(*sorted(points), strict=True), marker=".", label=part)
    lines.set(xlabel="block", ylabel="bits per weight", title=f"{plan.method}, budget {plan.budget:g} bits")
    lines.xaxis.get_major_locator().set_params(integer=True)
    lines.legend(fontsize="small")
    bars.boxplot([[bits for _, bits in points] for points in by_name.values()], tick_labels=list(by_name))
    bars.tick_params(axis="x", rotation=60)
    bars.set(title=f"by kind; {plan.bits_per_weight:.3f} on average")
    with writing(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=120)
    return str(path)
