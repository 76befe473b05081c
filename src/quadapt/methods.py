"""The published methods, each a choice along the library's axes. A new paper is often one new piece and one line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from quadapt.errors import ConfigError
from quadapt.nn.adapters import L4Q, LRQAT, Adapter, Elastic, ElasticPooled, LoRA, Pooled, QATLoRA, Scales
from quadapt.nn.block_ap import BlockAP
from quadapt.nn.starts import LQ, CLoQ, LoftQ, QuAILoRA, Start, Zero
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import FixedPoint, Nearest, Rounding
from quadapt.quant.storage import LINEAR, Storage


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

    grid_learning_rate: float | None = None
    """Peak learning rate of scales and offsets, where these train; relative to the scale, without weight decay."""

    dense_steps: int = 0
    """First steps that train a low-rank change of the dense matrix, before anything is quantized (L4Q's first version).
    """

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

    def base(self) -> tuple[Format, Storage, Rounding]:
        """Grid, storage and rounding of the quantized base that the adapter trains over."""
        if self.adapter.base != "fixed-point":
            return self.format, self.storage, self.rounding
        fine = replace(self.format, bits=8)
        span = self.rounding.range if isinstance(self.rounding, (Nearest, GPTQ, BlockAP)) else "mse"
        return fine, Storage.default(fine), FixedPoint(bits=self.format.bits, range=span)

    def with_format(self, format: Format) -> Method:
        """The same method over another grid, with storage to match: kept where it fits, else the new grid's default."""
        try:
            self.storage.check(format)
            storage = self.storage if format.bits != 8 or self.format.bits == 8 else Storage.default(format)
        except ConfigError:
            storage = Storage.default(format)
        return replace(self, format=format).with_storage(storage)

    def with_storage(self, storage: Storage) -> Method:
        """The same method with scales and offsets held otherwise."""
        return replace(self, storage=storage, adapter=self.adapter.with_grid(self.format, storage))


L4Q_RECIPE = Recipe(
    learning_rate=2e-4,
    grid_learning_rate=1e-3,
    rank=4,
    alpha=4,
    schedule="cosine",
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    source="L4Q, Llama-2 7B (appendix D); for scales ours, relative to them",
)

E2E_QP_RECIPE = Recipe(
    learning_rate=1e-3,
    rank=1,
    alpha=1,
    schedule="cosine",
    warmup_ratio=0.03,
    source="EfficientQAT; its 1e-5 on steps of about 0.01 is 1e-3 relative to them",
)

QUAILORA_RECIPE = Recipe(learning_rate=2e-4, warmup_ratio=0.03, source="QuAILoRA §4")

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
    "loftq": Method(
        summary="QLoRA that starts from a low-rank fit to the quantization error. Cannot merge exactly.",
        paper="2310.08659",
        format=Format(levels="nf", bits=4, group_size=64),
        storage=Storage(scales="double", offsets="absent"),
        rounding=Nearest(code_against="exact"),
        adapter=LoRA(),
        start=LoftQ(),
        recipe=Recipe(
            learning_rate=3e-4,
            schedule="cosine",
            warmup_ratio=0.03,
            weight_decay=0.1,
            source="LoftQ's code (GSM8K), without its dropout, which would drop part of the fit",
        ),
    ),
    "quailora": Method(
        summary="QLoRA that starts from a fit to what quantization did to outputs. Cannot merge exactly.",
        paper="2410.14713",
        format=Format(levels="nf", bits=4, group_size=64),
        storage=Storage(scales="double", offsets="absent"),
        rounding=Nearest(code_against="exact"),
        adapter=LoRA(),
        start=QuAILoRA(),
        recipe=QUAILORA_RECIPE,
    ),
    "cloq": Method(
        summary="Integers rounded by GPTQ, LoRA from the best fit to outputs. Cannot merge exactly.",
        paper="2501.18475",
        format=Format(bits=4, group_size=64),
        storage=Storage(),
        rounding=GPTQ(),
        adapter=LoRA(),
        start=CLoQ(),
        recipe=replace(QUAILORA_RECIPE, source="QuAILoRA's: CLoQ's own rates are per task"),
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
    "lq-lora": Method(
        summary="NormalFloat and LoRA that begin as one decomposition; bits by budget (--plan). Cannot merge exactly.",
        paper="2311.12023",
        format=Format(levels="nf", bits=4, group_size=64),
        storage=Storage(scales=LINEAR, offsets="absent"),
        rounding=Nearest(),
        adapter=LoRA(),
        start=LQ(),
        recipe=Recipe(
            learning_rate=2e-5,
            schedule="cosine",
            warmup_ratio=0.03,
            source="LQ-LoRA, on C4 (its code)",
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
    "qa-lora-scales": Method(
        summary="QA-LoRA, and the scales train with it. Merges exactly; no paper has it.",
        paper="2309.14717",
        format=Format(bits=4, group_size=32),
        storage=Storage(),
        rounding=GPTQ(),
        adapter=Scales(pooled=True),
        recipe=Recipe(learning_rate=2e-5, grid_learning_rate=1e-3, source="QA-LoRA; for scales as e2e-qp"),
    ),
    "ir-qlora": Method(
        summary="NF4 shifted for entropy, doubly quantized, and LoRA with elastic connections. Cannot merge exactly.",
        paper="2402.05445",
        format=Format(levels="nf", bits=4, group_size=64, zero="float"),
        storage=Storage(scales="double", offsets="double"),
        rounding=Nearest(range="icq"),
        adapter=Elastic(),
        recipe=Recipe(learning_rate=2e-4, dropout=0.1, source="IR-QLoRA, up to 13B (1e-4 and dropout 0.05 above)"),
    ),
    "ir-qa-lora": Method(
        summary="QA-LoRA with IR-QLoRA's ranges and connections, pooled. Merges exactly into the offsets.",
        paper="2402.05445",
        format=Format(bits=4, group_size=32),
        storage=Storage(),
        rounding=GPTQ(range="icq-scale"),
        adapter=ElasticPooled(),
        recipe=Recipe(learning_rate=2e-5, source="QA-LoRA, 7B and 13B (1e-5 above)"),
    ),
    "peqa": Method(
        summary="Integers, of which the scales train, one a row. Merges exactly.",
        paper="2305.14152",
        format=Format(bits=4, group_size=-1),
        storage=Storage(),
        rounding=Nearest(range="mse"),
        adapter=Scales(),
        recipe=Recipe(learning_rate=1e-3, rank=1, alpha=1, source="ours: the paper's rates are per model and absolute"),
    ),
    "e2e-qp": Method(
        summary="Integers in groups, of which the scales train (EfficientQAT's second stage). Merges exactly.",
        paper="2407.11062",
        format=Format(bits=4, group_size=64, zero="integer"),
        storage=Storage(offsets="integer"),
        rounding=Nearest(),
        adapter=Scales(),
        recipe=E2E_QP_RECIPE,
    ),
    "efficientqat": Method(
        summary="e2e-qp over a base of Block-AP: weights, scales and offsets of each block are trained first.",
        paper="2407.11062",
        format=Format(bits=4, group_size=64, zero="integer"),
        storage=Storage(offsets="integer"),
        rounding=BlockAP(),
        adapter=Scales(),
        recipe=E2E_QP_RECIPE,
    ),
    "l4q": Method(
        summary="Quantizes W + B A inside the forward; A, B, scales and offsets train. Merges exactly.",
        paper="2402.04902",
        format=Format(bits=4, group_size=128),
        storage=Storage(),
        rounding=Nearest(),
        adapter=L4Q(),
        recipe=L4Q_RECIPE,
    ),
    "qat-lora": Method(
        summary="L4Q's baseline: a trained quantizer, and LoRA beside it. Cannot merge exactly.",
        paper="2402.04902",
        format=Format(bits=4, group_size=128),
        storage=Storage(),
        rounding=Nearest(),
        adapter=QATLoRA(),
        recipe=L4Q_RECIPE,
    ),
    "lr-qat": Method(
        summary="A low-rank term among the codes of a frozen fixed-point base, and scales. Merges exactly.",
        paper="2406.06385",
        format=Format(bits=4, group_size=128, zero="none"),
        storage=Storage(offsets="absent"),
        rounding=Nearest(range="mse"),
        adapter=LRQAT(),
        recipe=Recipe(
            learning_rate=1e-3,
            grid_learning_rate=1e-3,
            rank=32,
            alpha=32,
            schedule="linear",
            warmup_ratio=0.1,
            max_grad_norm=1.0,
            adam_beta2=0.95,
            source="LR-QAT's README; its 1e-5 for scales is 1e-3 relative to them",
        ),
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
