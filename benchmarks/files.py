"""Files of one model by every route, of what `benchmarks/served.py` has stored: which is best, and beside which."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Key = tuple[str, ...]
"""What is alike in runs that differ in their rate and seed alone: `("ours", "recover", "3", "4")`."""


@dataclass(frozen=True)
class Files:
    """Files of one kind at their best rate, one for each seed."""

    key: Key
    """What they are."""

    rate: str
    """The learning rate that is best on the first seed, on the part of the text that is for choosing."""

    losses: tuple[float, ...]
    """The loss of each in llama.cpp, in nats per token."""

    size: int
    """How many bytes the first has."""

    @property
    def route(self) -> str:
        """lora: dense, in 16 bits. usual: that, quantized by llama.cpp. Else the method of ours."""
        return self.key[1] if self.key[0] == "ours" else self.key[0]

    @property
    def ours(self) -> bool:
        """Whether a method of ours made them."""
        return self.key[0] == "ours"

    @property
    def loss(self) -> float:
        """Mean loss over the seeds, in nats per token."""
        return statistics.mean(self.losses)

    @property
    def megabytes(self) -> float:
        """The size of a file."""
        return self.size / 1e6

    @property
    def label(self) -> str:
        """What a reader calls them."""
        if self.route == "lora":
            return "LoRA, F16"
        if self.route == "usual":
            return self.key[1] + ", importance" * int(self.key[2])
        return f"{self.key[1]}, {self.key[2]} bits"


def files_of(runs: Mapping[str, Any]) -> list[Files]:
    """All kinds of files that have as many seeds as LoRA; mixtures that llama.cpp refuses are left out.

    Raises:
        AssertionError: The merge of one of ours was not exact.
    """
    found: dict[Key, dict[str, dict[int, dict[str, Any]]]] = {}
    for name, run in runs.items():
        *key, rate, seed = name.split()
        found.setdefault(tuple(key), {}).setdefault(rate, {})[int(seed)] = run
    made, seeds = [], 0
    for key, rates in sorted(found.items(), key=lambda item: item[0][0] != "lora"):
        rate = min(rates, key=lambda each, rates=rates: rates[each][0].get("choose", 0.0))
        some = [rates[rate][seed] for seed in sorted(rates[rate])]
        seeds = seeds or len(some)
        if len(some) == seeds and not any("refused" in run for run in some):
            assert all(run.get("verdict", "exact") == "exact" for run in some), key
            made.append(Files(key, rate, tuple(run["loss"] for run in some), some[0]["bytes"]))
    return made


def against(found: Sequence[Files]) -> Iterator[tuple[Files, Files | None]]:
    """Each of ours, the largest first, and the best of the usual route that is no larger; None if there is none."""
    for ours in sorted((each for each in found if each.ours), key=lambda each: -each.size):
        rivals = [each for each in found if each.route == "usual" and each.size <= ours.size]
        yield ours, min(rivals, key=lambda each: each.loss, default=None)


def dense(found: Sequence[Files]) -> Files:
    """LoRA in 16 bits."""
    (only,) = (each for each in found if each.route == "lora")
    return only
