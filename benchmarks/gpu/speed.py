"""Times and memory on a card. Each section fills some rows of `rows.py`; candidates of one ratio are timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.gpu.models import adapted, llama, stock
from benchmarks.gpu.steps import graph
from benchmarks.peers import Int4Pack, bitsandbytes
from quadapt.budget import candidates, measure
from quadapt.kernels import product
from quadapt.methods import method_named
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.icq import shifted_range
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

CARD = torch.device("cuda")
COPY, SIDE = 1 << 29, 8192
"""Floats that are copied, and the side of the matrices that are multiplied, for the card's own limits."""

OUT, IN, SQUARE = 4096, 11008, 4096
"""Llama-2-7B's matrices."""

BATCH = (4, 1024)
"""Sequences and tokens of a training step."""

BLOCKS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
}
RANK, TABLE_RANK = 16, 64
INT4, NF4 = Format(bits=4, group_size=64, zero="float"), Format(levels="nf", bits=4, group_size=64)

Measured = dict[str, Any]


def seconds(works: dict[str, Callable[[], object]], rounds: int = 7, least: float = 0.02) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round: A B C, A B C; calls are repeated until a round takes `least`."""
    repeats = {}
    for name, work in works.items():
        for _ in range(3):
            work()
        took = elapsed(work, 1)
        repeats[name] = max(1, round(least / took))
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(elapsed(work, repeats[name]) / repeats[name])
    return found


def elapsed(work: Callable[[], object], times: int = 1) -> float:
    """Seconds that the card takes for so many calls, launches included."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()  # type: ignore[no-untyped-call]
    for _ in range(times):
        work()
    stop.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000  # type: ignore[no-untyped-call]


def of(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(mine / theirs for mine, theirs in zip(times[name], times[base], strict=True))


def ceilings() -> Measured:
    """What the card can do."""
    source = torch.randn(COPY, device=CARD)
    target = torch.empty_like(source)
    left, right = (torch.randn(SIDE, SIDE, device=CARD, dtype=torch.bfloat16) for _ in range(2))
    times = seconds({"copy": lambda: target.copy_(source), "matmul": lambda: left @ right})
    best = {name: statistics.median(took) for name, took in times.items()}
    return {"copy": 2 * source.nbytes / best["copy"] / 1e12, "matmul": 2 * SIDE**3 / best["matmul"] / 1e12}


def quantized(format: Format, out: int | None = None, columns: int | None = None) -> QuantWeight:
    """A random matrix, rounded to nearest on the card."""
    layout = Layout(format=format, storage=Storage.default(format), out=out or OUT, columns=columns or IN)
    return Nearest()(torch.randn(layout.out, layout.columns, device=CARD), layout)


def decoding_weights() -> Measured:
    """Dequantize, recorded as a graph so that the kernel is timed and not its launch; sets in turn, none in cache."""
    found: Measured = {}
    bandwidth = ceilings()["copy"]
    for name, format in (("int4", INT4), ("nf4", NF4)):
        sets = [quantized(format) for _ in range(4)]
        replay, _ = graph(lambda sets=sets: [each.dequantize(torch.bfloat16) for each in sets][-1])
        took = statistics.median(seconds({name: replay})[name]) / len(sets)
        moved = sets[0].nbytes + OUT * IN * 2
        found[f"dequantize_{name}"] = moved / took / 1e12 / bandwidth
    return found


def dense(**changes: int) -> nn.Module:
    """Eight blocks of Llama-2-7B's shape in bfloat16."""
    return llama(CARD, torch.bfloat16, **(BLOCKS | changes))


def steps() -> Measured:
    """Training steps in turn, and the peak memory of each alone."""
    builds: dict[str, Callable[[], nn.Module]] = {
        "bf16": lambda: get_peft_model(dense(), stock(RANK)),
        "qlora": lambda: adapted(dense(), "qlora", rank=RANK),
        "gptq_lora": lambda: adapted(dense(), "gptq-lora", rank=RANK),
        "qa_lora": lambda: adapted(dense(), "qa-lora", rank=RANK),
        "l4q": lambda: adapted(dense(), "l4q", rank=RANK),
        "lr_qat": lambda: adapted(dense(), "lr-qat", rank=RANK),
        "e2e_qp": lambda: adapted(dense(), "e2e-qp", rank=RANK),
    }
    if find_spec("bitsandbytes"):
        builds["bnb"] = lambda: bitsandbytes(dense(), stock(RANK), "cuda")
    ids = torch.randint(0, BLOCKS["vocab_size"], BATCH, device=CARD)
    works, peaks = {}, {}
    for name, build in builds.items():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        work = _step(build().train(), ids)
        work()
        torch.cuda.reset_peak_memory_stats()
        work()
        peaks[name], works[name] = torch.cuda.max_memory_allocated() - before, work
    times = seconds(works, rounds=9, least=0.1)
    found: Measured = {f"step_{name}": of(times, name, "bf16") for name in builds if name not in ("bf16", "bnb")}
    found["step_bf16"] = 1000 * statistics.median(times["bf16"])
    found |= {f"peak_{name}": peaks[name] / 1e9 for name in ("bf16", "qlora", "qa_lora")}
    for name in ("qlora", "qa_lora"):
        missing = "bitsandbytes is not installed"
        found[f"bnb_{name}"] = of(times, name, "bnb") if "bnb" in builds else missing
        found[f"memory_{name}"] = peaks[name] / peaks["bnb"] if "bnb" in builds else missing
    return found


def _step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.autocast(CARD.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return work


def quantizing() -> Measured:
    """ICQ, GPTQ and the table of errors."""
    weight = torch.randn(OUT, IN, device=CARD)
    inputs = torch.randn(2 * IN, IN, device=CARD)
    moment = (inputs.T @ inputs / len(inputs)).double()
    layout = Layout(format=Format(bits=4, group_size=128, zero="float"), storage=Storage(), out=OUT, columns=IN)
    method = method_named("lq-lora")
    ways = candidates(method)
    ways = ways[:: len(ways) // 24][:24]
    searched = Format(levels="nf", bits=4, group_size=64, zero="float")
    works: dict[str, tuple[Callable[[], object], float]] = {
        "icq": (lambda: shifted_range(weight, searched), 1000),
        "gptq": (lambda: GPTQ()(weight, layout, {"second_moment": moment}), 1),
        "table": (lambda: measure(weight, ways, method, rank=TABLE_RANK), 1),
    }
    found: Measured = {}
    for name, (work, unit) in works.items():
        work()
        found[name] = unit * statistics.median(elapsed(work, 1) for _ in range(3))
    return found


def tokens() -> Measured:
    """One token through the blocks, recorded as a graph."""
    builds: dict[str, Callable[[], Any]] = {
        "bf16": dense,
        "int4": lambda: adapted(dense(), "gptq-lora", rank=RANK).unload(),  # type: ignore[operator]
        "nf4": lambda: adapted(dense(), "qlora", rank=RANK).unload(),  # type: ignore[operator]
    }
    if CARD.type == "cuda":
        builds["int4pack"] = int4pack
    if find_spec("bitsandbytes"):
        builds["bnb"] = lambda: bitsandbytes(dense(), stock(RANK), "cuda").unload()  # type: ignore[operator]
    replays: dict[str, Callable[[], object]] = {}
    kept = []  # a graph holds addresses, not tensors
    for name, build in builds.items():
        model = build()
        kept.append(model)
        with torch.no_grad():
            replays[name], _ = graph(_token(model.model))
    times = seconds(replays)
    found: Measured = {f"decode_{name}": of(times, "bf16", name) for name in builds if name != "bf16"}
    return {**found, "decode_bf16": 1 / statistics.median(times["bf16"])}


def int4pack() -> nn.Module:
    """The blocks with torch's own int4 product in all layers, of random codes."""
    model = dense()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            codes = torch.randint(0, 16, (layer.out_features, layer.in_features), device=CARD, dtype=torch.uint8)
            scales = 0.01 * torch.rand(layer.out_features, layer.in_features // INT4.group_size, device=CARD)
            model.set_submodule(name, Int4Pack(codes, scales, torch.randn_like(scales), INT4.group_size))
    return model


def _token(model: Any) -> Callable[[], Tensor]:
    hidden = torch.randn(1, 1, BLOCKS["hidden_size"], device=CARD, dtype=torch.bfloat16)
    place = model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.long, device=CARD))

    def work() -> Tensor:
        state = hidden
        for block in model.layers:
            state = block(state, position_embeddings=place)
        return state

    return work


def multiplied(x: Tensor, weight: QuantWeight) -> Tensor:
    """The fused product, for more tokens than the rule allows too."""
    format, columns = weight.format, weight.layout.columns
    held = weight.held("scales"), weight.held("offsets")
    return product(x, weight.packed, *held, format.table(x), format.bits, format.width(columns), columns)


def products() -> Measured:
    """The fused product beside dequantize and a dense product: where the rule for few tokens should end."""
    found: Measured = {}
    sets = [quantized(INT4, out=SQUARE, columns=SQUARE) for _ in range(8)]  # 67 MB: more than the cache
    for count in (1, 2, 4, 8, 16):
        x = torch.randn(count, SQUARE, device=CARD, dtype=torch.bfloat16)
        with torch.no_grad():
            fused, _ = graph(lambda x=x: [multiplied(x, each) for each in sets][-1])
            plain, _ = graph(
                lambda x=x: [nn.functional.linear(x, each.dequantize(torch.bfloat16)) for each in sets][-1]
            )
        times = seconds({"fused": fused, "plain": plain})
        found[f"product_{count}"] = of(times, "fused", "plain")
    return found
