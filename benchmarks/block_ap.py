"""A step of Block-AP over one Llama block of 4096-wide layers, against the matrix products of that step alone.

The products are those of each layer's output, of the gradient of its inputs and of that of its weight, with operands in
the dtype of the hidden states. What a step does besides: it quantizes (once in forward, once in backward), masks
gradients, computes attention and norms, and AdamW moves weights, scales and offsets. The more tokens a step has, the
less these weigh: here it has 1024, the paper's has 4096. A run of four rounds takes about two minutes and 7 GB.

    python -m benchmarks block_ap
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.measure import THREADS, in_turn, ratio, store, table
from quadapt.nn.block_ap import BlockAP, BlockAPLinear, Example, step
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

HIDDEN, INTERMEDIATE, HEAD = 4096, 11008, 128
SEQUENCES, LENGTH = 2, 512
FORMAT = Format(bits=2, group_size=64)


def llama_block(dtype: torch.dtype) -> tuple[nn.Module, Example]:
    """A random block of Llama-2-7B's shape, and sequences that are to come out of it as they did from another one."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0)
    block = block.to_empty(device="cpu").to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim == 2 else nn.init.ones_(parameter)
    hidden, target = torch.randn(2, SEQUENCES, LENGTH, HIDDEN).to(dtype)
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(LENGTH)[None])
    return block, Example((hidden,), {"position_embeddings": positions, "attention_mask": None}, target)


def fitted(block: nn.Module) -> list[BlockAPLinear]:
    """Put layers that Block-AP trains into the places of the block's own."""
    found = []
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear):
            layout = Layout(format=FORMAT, storage=Storage(), out=layer.out_features, columns=layer.in_features)
            found.append(BlockAP().layer(layer, layout))
            block.set_submodule(name, found[-1])
    return found


def products(shapes: list[tuple[int, int]], dtype: torch.dtype) -> Callable[[], None]:
    """The products of a step for layers of some shapes, `(out, in)`; layers of one shape share their operands."""
    tokens = SEQUENCES * LENGTH

    def operands(out: int, columns: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape).to(dtype) for shape in ((tokens, columns), (out, columns), (tokens, out)))

    held = {shape: operands(*shape) for shape in set(shapes)}

    def run() -> None:
        for shape in shapes:
            x, weight, dy = held[shape]
            linear(x, weight), dy @ weight, dy.T @ x

    return run


def measured(dtype: torch.dtype, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a step and of its products, medians, and the ratio of the two."""
    block, example = llama_block(dtype)
    layers = fitted(block)
    optimizer = BlockAP().optimizer(layers)
    shapes = [(len(layer.source), layer.source.shape[1]) for layer in layers]
    times = in_turn(
        {"step": lambda: step(block, example, optimizer), "products": products(shapes, dtype)}, rounds=rounds, warmup=1
    )
    milliseconds = (1000 * statistics.median(times[name]) for name in ("step", "products"))
    return next(milliseconds), next(milliseconds), ratio(times, "step", "products")


def main(rounds: int = 3) -> dict[str, Any]:
    """Measure, print and store."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rows = [(str(dtype).removeprefix("torch."), *measured(dtype, rounds)) for dtype in (torch.bfloat16, torch.float32)]
    columns = ("hidden_states", "step_ms", "products_ms", "of_products")
    table(
        f"a step of Block-AP, hidden size {HIDDEN}, intermediate size {INTERMEDIATE}, {SEQUENCES} x {LENGTH} tokens",
        columns,
        rows,
    )
    figures = {
        "limit": "2.0 times the products in bfloat16, 1.5 times in float32",
        "block": {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "tokens": SEQUENCES * LENGTH, "format": FORMAT.name},
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    store("block_ap", figures)
    return figures
