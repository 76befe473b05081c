"""Which models of a comparison none other beats in loss and size at once, and which one to serve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Point = Mapping[str, Any]
"""What a comparison says of one model: its `label`, `route`, true `bits`, mean `loss` and the `losses` of its seeds."""


def front(points: Sequence[Point]) -> list[Point]:
    """The models that no other beats: of those with as few bits or fewer, none has as little loss.

    Returns:
        By their true bits, fewest first.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each["bits"], each["loss"])):
        if not found or point["loss"] < found[-1]["loss"]:
            found.append(point)
    return found


def spread(point: Point) -> float:
    """Half the distance of a model's best seed from its worst, in nats per token."""
    losses = point["losses"]
    return (max(losses) - min(losses)) / 2


def recommended(points: Sequence[Point], tolerance: float) -> dict[str, Any]:
    """Choose the model with the fewest true bits that loses no more than allowed, and say why in words.

    Args:
        points: All models of a comparison, anchors too.
        tolerance: Nats per token that it may lose against LoRA in full precision.

    Returns:
        `key` of the model (None if there is none), `words`, and `within`: whether it is within what is allowed.
    """
    served = [point for point in points if point["route"] not in ("untuned", "dense")]
    anchor = next((point for point in points if point["route"] == "dense"), None)
    if not served:
        return {
            "key": None,
            "within": False,
            "words": "Nothing was measured that has fewer bits than the model itself.",
        }
    best = min(served, key=lambda point: point["loss"])
    limit = (best if anchor is None else anchor)["loss"] + tolerance
    within = [point for point in front(served) if point["loss"] <= limit]
    chosen = within[0] if within else best
    words = [_first(chosen, anchor, tolerance, bool(within)), *_beside(chosen, served), *_larger(chosen, front(served))]
    return {"key": chosen["key"], "within": bool(within), "words": " ".join(words)}


def _first(chosen: Point, anchor: Point | None, tolerance: float, within: bool) -> str:
    what = f"{chosen['label']} ({chosen['bits']:.2f} true bits per weight, {_size(chosen)})"
    if anchor is None:
        return f"Serve {what}: its loss is {chosen['loss']:.4f} nats per token."
    lost = chosen["loss"] - anchor["loss"]
    how = _against(lost)
    if within:
        return (
            f"Serve {what}: it has the fewest bits of all that lose at most {tolerance:g} nats per token against LoRA "
            f"in full precision; it {how}."
        )
    return (
        f"Nothing with fewer bits comes within {tolerance:g} nats per token of LoRA in full precision. The best is "
        f"{what}: it {how}. Raise the widths, the steps or the tolerance."
    )


def _against(lost: float) -> str:
    share = math.expm1(abs(lost)) if lost >= 0 else -math.expm1(lost)
    verb, word = ("loses", "more") if lost >= 0 else ("gains", "less")
    return f"{verb} {abs(lost):.4f} nats per token (perplexity {share:.1%} {word})"


def _beside(chosen: Point, served: Sequence[Point]) -> list[str]:
    """Which others of about that size cannot be told from it, by the spread of the seeds."""
    alike = []
    for point in served:
        near = abs(point["bits"] - chosen["bits"]) <= 0.1 * chosen["bits"] and point["key"] != chosen["key"]
        if near and abs(point["loss"] - chosen["loss"]) <= spread(point) + spread(chosen):
            alike.append(point["label"])
    if len(chosen["losses"]) < 2:
        return ["It was run with one seed, so that small differences mean nothing: give --seeds 3."]
    return [f"Within the spread of the seeds, {' and '.join(alike)} cannot be told from it."] if alike else []


def _larger(chosen: Point, best: Sequence[Point]) -> list[str]:
    """What the next larger and the next smaller model on the front would change."""
    more = [point for point in best if point["bits"] > chosen["bits"]]
    less = [point for point in best if point["bits"] < chosen["bits"]]
    said = []
    if more:
        gain = chosen["loss"] - more[0]["loss"]
        said.append(f"{more[0]['label']} would gain {gain:.4f} for {more[0]['bits'] - chosen['bits']:.2f} bits more.")
    if less:
        cost = less[-1]["loss"] - chosen["loss"]
        said.append(f"{less[-1]['label']} would save {chosen['bits'] - less[-1]['bits']:.2f} bits and cost {cost:.4f}.")
    return said


def _size(point: Point) -> str:
    return f"{point['bytes'] / 1e6:.1f} MB"
