"""What is timed on a card, in sections: each fills some rows of `rows.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu import full, speed

SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "ceilings": speed.ceilings,
    "dequantize": speed.decoding_weights,
    "products": speed.products,
    "quantizing": speed.quantizing,
    "decoding": speed.tokens,
    "steps": speed.steps,
    "full-qlora": full.qlora,
    "full-bitsandbytes": full.peer,
    "full-l4q": full.l4q,
    "full-qa-lora": full.qa_lora,
}


def by_default() -> list[str]:
    """Sections that `make gpu` runs: all but those of a model of full size."""
    return [name for name in SECTIONS if not name.startswith("full-")]


def sections(wanted: Sequence[str]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Sections in turn, the card's memory given back between them."""
    for name in wanted:
        torch.cuda.empty_cache()
        yield name, SECTIONS[name]
