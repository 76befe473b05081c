"""The published methods, each a choice along the library's axes. A new paper is often one new piece and one line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from quadapt.errors import ConfigError
from quadapt.nn.adapters import Adapter, LoRA, Pooled
from quadapt.nn.starts import Start, Zero
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, Rounding
from quadapt.quant.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper trains. Every field can be overridden; what is used is printed before training starts."""

    learning_rate: float
    """Peak learning rate of AdamW."""

    rank: int = 64
    """Rank of the adapters."""

    alpha: float = 16
    """LoRA's alpha: the adapter is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Dropout on the adapter's input."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up."""

    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    max_grad_norm: float = 0.3
    """Gradients are scaled down to this norm."""

    adam_beta2: float = 0.999
    """AdamW's second decay rate."""

    source: str = ""
    """Where these numbers come from."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A choice of grid, storage, rounding, start, adapter and recipe."""

    summary: str
    """One line for `--help`."""

    paper: str
    """arXiv number."""

    format: Format
    """Grid of the quantized weights."""

    storage: Storage
    """How scales and offsets are held."""

    rounding: Rounding
    """From weights to codes."""

    adapter: Adapter
    """What trains."""

    start: Start = field(default_factory=Zero)
    """Where training starts."""

    recipe: Recipe
    """How the paper trains."""

    def with_format(self, format: Format) -> Method:
        """The same method over another grid, with storage to match: kept where it fits, else the new grid's default."""
        try:
            self.storage.check(format)
            storage = self.storage if format.bits != 8 or self.format.bits == 8 else Storage.default(format)
        except ConfigError:
            storage = Storage.default(format)
        return replace(self, format=format, storage=storage)


METHODS: dict[str, Method] = {
    "qlora": Method(
        summary="NF4 with double-quantized scales, LoRA beside it. Cannot merge exactly.",
        paper="2305.14314",
        format=Format(levels="nf", bits=4, group_size=64),
        storage=Storage(scales="double", offsets="absent"),
        rounding=Nearest(code_against="exact"),
        adapter=LoRA(),
        recipe=Recipe(learning_rate=2e-4, dropout=0.1, source="QLoRA, up to 13B (1e-4 and dropout 0.05 above)"),
    ),
    "gptq-lora": Method(
        summary="Integers rounded by GPTQ, LoRA beside them. Cannot merge exactly.",
        paper="2210.17323",
        format=Format(bits=4, group_size=128),
        storage=Storage(),
        rounding=GPTQ(),
        adapter=LoRA(),
        recipe=Recipe(
            learning_rate=2e-5,
            schedule="cosine",
            warmup_ratio=0.03,
            max_grad_norm=1.0,
            source="the GPTQ-LoRA baseline of LQ-LoRA (arXiv 2311.12023)",
        ),
    ),
    "qa-lora": Method(
        summary="Integers rounded by GPTQ, adapter over pooled inputs. Merges exactly into the offsets.",
        paper="2309.14717",
        format=Format(bits=4, group_size=32),
        storage=Storage(),
        rounding=GPTQ(),
        adapter=Pooled(),
        recipe=Recipe(learning_rate=2e-5, source="QA-LoRA, 7B and 13B (1e-5 above)"),
    ),
}
"""Every method by the name that the command line takes."""


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ConfigError: There is none.
    """
    if name not in METHODS:
        raise ConfigError(f"method={name!r} is unknown. Use {', '.join(METHODS)}")
    return METHODS[name]
