"""The CPU's product of few tokens: near the product with the dense matrix, and the same bits however it is run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quadapt import kernels
from quadapt.kernels import few, product_cpu
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

CPU = torch.device("cpu")
STORAGES = {
    "float": (Format(bits=4), Storage()),
    "wide": (Format(bits=4), Storage(scales="fp32")),
    "zero-points": (Format(bits=4, zero="integer"), Storage(offsets="integer")),
    "implied": (Format(bits=4, zero="none"), Storage(offsets="absent")),
    "double": (Format(bits=4, levels="nf"), Storage(scales="double", offsets="absent")),
    "k-quant": (Format(bits=4), Storage(scales="q4_k", offsets="q4_k-min")),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """With gradients on, every product is the dense one."""
    with torch.no_grad():
        yield


def quantized(format: Format, rows: int, columns: int, storage: Storage | None = None, seed: int = 0) -> QuantWeight:
    """A random matrix, rounded to nearest."""
    storage = storage or Storage(offsets="fp16" if format.levels == "int" else "absent")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Nearest()(weight, layout=Layout.fitting(format, storage, rows, columns), statistics={})


def error(x: torch.Tensor, weight: QuantWeight) -> float:
    """Largest difference from the exact product, relative to the largest number of that."""
    exact = x.double() @ weight.dequantize().double().T
    return float((quant_matmul(x, weight).double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_integers(bits: int, group_size: int) -> None:
    for columns in (48, 352, 1008):
        weight = quantized(Format(bits=bits, group_size=group_size), 5, columns)
        assert few(torch.zeros(1, columns), weight.format.width(columns), columns)
        for tokens in (1, 7):
            assert error(torch.randn(tokens, columns), weight) < 2e-6


@pytest.mark.parametrize(
    ("bits", "group_size", "columns"), [(4, 64, 1000), (8, 64, 200), (3, 256, 1000), (4, 48, 1008)]
)
def test_other_lengths(bits: int, group_size: int, columns: int) -> None:
    weight = quantized(Format(bits=bits, group_size=group_size), 5, columns)
    for tokens in (1, 2, 16):
        assert error(torch.randn(tokens, columns), weight) < 2e-6


@pytest.mark.parametrize(
    ("levels", "bits"),
    [("nf", 2), ("nf", 3), ("nf", 4), ("nf", 8), ("nf-sym", 2), ("fp4", 4), ("nf-qlora", 4), ("iq4-nl", 4)],
)
def test_tables(levels: str, bits: int) -> None:
    weight = quantized(Format(bits=bits, levels=levels, group_size=64), 5, 352)
    assert error(torch.randn(3, 352), weight) < 2e-6


@pytest.mark.parametrize("name", STORAGES)
def test_storages(name: str) -> None:
    format, storage = STORAGES[name]
    assert error(torch.randn(3, 768), quantized(format, 7, 768, storage)) < 2e-6


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
def test_dtypes_are_rounded_once(dtype: torch.dtype, close: float) -> None:
    assert error(torch.randn(3, 320).to(dtype), quantized(Format(bits=4), 5, 320)) < close


def test_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantized(Format(bits=3), 600, 512), torch.randn(4, 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = quant_matmul(x, weight)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(alone, quant_matmul(x, weight))


def test_nothing_past_the_last_row_is_read_or_written() -> None:
    weight, x = quantized(Format(bits=3, group_size=16), 3, 112), torch.randn(2, 112)
    groups, expected = 7, quant_matmul(x, weight)
    packed, scales, offsets = weight.packed, weight.scales.half(), weight.offsets
    assert offsets is not None
    room = [torch.full((each.numel() + 64,), float("nan"), dtype=each.dtype) for each in (scales, offsets.half())]
    codes = torch.full((packed.numel() + 64,), 255, dtype=torch.uint8)
    for place, each in zip((codes, *room), (packed, scales, offsets.half()), strict=True):
        place[: each.numel()] = each.flatten()
    inside = [place[: 3 * groups].view(3, groups) for place in room]
    found = product_cpu.product(x, codes[: packed.numel()].view(packed.shape), inside[:1], inside[1:], None, 3, 16, 112)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("tokens", "dtype", "group", "taken"),
    [
        (1, torch.bfloat16, 16, True),
        (16, torch.float16, 64, True),
        (17, torch.float16, 64, False),
        (0, torch.float32, 16, False),
        (1, torch.float64, 16, False),
    ],
)
def test_rule(tokens: int, dtype: torch.dtype, group: int, taken: bool) -> None:
    assert few(torch.zeros(tokens, 768, dtype=dtype), group, 768) == taken


def test_offsets_wider_than_scales_leave_nothing_behind() -> None:
    """Past the groups of the last row there are zeros, whatever was read there before."""
    weight, x = quantized(Format(bits=4, group_size=16), 5, 48), torch.ones(1, 48)
    offsets = torch.full((5, 3), -0.50387573)  # half of its bytes, taken for float16, are NaN
    assert offsets.view(torch.float16).isnan().any()
    found = kernels.product(x, weight.packed, weight.held("scales"), [offsets], None, 4, 16, 48)
    assert bool(found.isfinite().all())


def test_with_gradients_on_the_product_is_the_dense_one() -> None:
    weight, x = quantized(Format(bits=4), 5, 64), torch.randn(2, 64, requires_grad=True)
    with torch.enable_grad():
        assert torch.equal(quant_matmul(x.detach(), weight), x @ weight.dequantize().T)
        quant_matmul(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(2, -1), atol=1e-5)


def test_a_traced_program_calls_the_operator() -> None:
    weight, x = quantized(Format(bits=4), 8, 64), torch.randn(1, 64)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        compiled = torch.compile(lambda x: quant_matmul(x, weight), backend=keep, fullgraph=True)
        assert torch.equal(compiled(x), quant_matmul(x, weight))
    assert "quadapt.product" in graphs[0].code


def test_the_operator_knows_its_shape_beforehand() -> None:
    weight, x = quantized(Format(bits=4), 8, 64), torch.randn(3, 64)
    held = (weight.packed, weight.held("scales"), weight.held("offsets"), None, 4, 32, 64)
    torch.library.opcheck(torch.ops.quadapt.product.default, (x, *held), test_utils=("test_schema", "test_faketensor"))
