"""What trains over scales in super-blocks: each adapter that can, and Block-AP; a merge stores what was trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quadapt.nn.adapters import Adapter, Pooled
from quadapt.nn.adapters.l4q import L4Q
from quadapt.nn.adapters.lr_qat import LRQAT
from quadapt.nn.adapters.scales import Scales
from quadapt.nn.block_ap import BlockAP, BlockAPLinear
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.fixed_point import FixedPoint
from quadapt.quant.format import Format, Zero
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

KINDS: dict[str, tuple[str, int, int, Zero, float]] = {
    "Q4_K": ("q4_k", 4, 32, "float", 4.5),
    "Q5_K": ("q4_k", 5, 32, "float", 5.5),
    "Q2_K": ("q2_k", 2, 16, "float", 2.625),
    "Q3_K": ("q3_k", 3, 16, "none", 3.4375),
    "Q6_K": ("q6_k", 6, 16, "none", 6.5625),
}
"""GGML's types: the storage of scales, the width of codes, the size of groups, the zero, and the true bits a weight."""


def layout_of(kind: str, out: int = 12, columns: int = 512) -> Layout:
    scales, bits, group_size, zero, _ = KINDS[kind]
    format = Format(bits=bits, group_size=group_size, zero=zero)
    return Layout(format=format, storage=Storage.floating(scales, zero), out=out, columns=columns)


ADAPTERS = {
    "l4q": (L4Q(), KINDS),
    "asymmetric": (L4Q(init="asymmetric"), ["Q4_K", "Q5_K", "Q2_K"]),
    "lr-qat": (LRQAT(), KINDS),
    "scales": (Scales(), KINDS),
    "scales-pooled": (Scales(pooled=True), ["Q4_K", "Q5_K", "Q2_K"]),
    "pooled": (Pooled(), ["Q4_K", "Q5_K", "Q2_K"]),
}
CASES = [(name, kind) for name, (_, kinds) in ADAPTERS.items() for kind in kinds]


def source_of(adapter: Adapter, layout: Layout, weight: Tensor) -> Tensor | QuantWeight:
    if adapter.base == "float":
        return weight
    if adapter.base == "codes":
        return Nearest()(weight, layout)
    return FixedPoint(rounding=Nearest())(weight, layout)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("columns", [512, 400])
def test_a_merge_stores_what_was_trained(name: str, kind: str, columns: int) -> None:
    """Forward and merged matrix are one, after steps that move scales, offsets and codes; all gradients are whole."""
    layout, weight = layout_of(kind, columns=columns), torch.randn(12, columns)
    adapter = ADAPTERS[name][0].with_grid(layout.format, layout.storage)
    source = source_of(adapter, layout, weight)
    params = {}
    for each, param in adapter.params(layout, 4).items():
        params[each] = torch.zeros(param.shape)
        param.init(params[each], source)
        if param.trains:
            params[each] = (params[each] + 0.1 * torch.randn(param.shape)).requires_grad_()
    x = torch.randn(70, columns)
    y = adapter.forward(x, source, params, 0.5)
    merged = adapter.merge(source, params, 0.5)
    assert (merged.layout.storage, merged.layout.format) == (layout.storage, layout.format)
    assert torch.equal(y, torch.nn.functional.linear(x, merged.dequantize()))
    with torch.no_grad():  # one token is multiplied with the codes
        assert torch.equal(adapter.forward(x[:1], source, params, 0.5), quant_matmul(x[:1], merged))
    again = QuantWeight.build(merged.layout, merged.tensors["weight"], merged.scales, merged.offsets)
    assert again.digest() == merged.digest()
    y.square().sum().backward()
    for each, value in params.items():
        if value.requires_grad:
            assert bool(torch.isfinite(value.grad).all()), each
            assert bool(value.grad.any()), each


@pytest.mark.parametrize("kind", KINDS)
def test_l4q_begins_near_the_weight(kind: str) -> None:
    """Neither a group of zeros nor a negative scale spoils its super-block."""
    layout, weight = layout_of(kind), torch.randn(12, 512) * 0.02
    weight[2, 32:64] = 0
    adapter = L4Q().with_grid(layout.format, layout.storage)
    params = {"rho": torch.zeros(12, layout.groups), "start": adapter.start(weight), "A": torch.zeros(1, 512)}
    params |= {"shift": torch.zeros(12, layout.groups), "B": torch.zeros(12, 1)}
    begun, nearest = adapter.merge(weight, params, 1.0), Nearest()(weight, layout)
    assert not bool(begun.dequantize()[2, 32:64].any())
    errors = [float((each.dequantize() - weight).norm() / weight.norm()) for each in (begun, nearest)]
    assert errors[0] < 1.8 * errors[1]  # its first levels are symmetric about zero


@pytest.mark.parametrize("kind", KINDS)
def test_block_ap_trains_in_it(kind: str) -> None:
    torch.manual_seed(3)
    linear, layout = torch.nn.Linear(512, 12), layout_of(kind)
    BlockAP().check(layout)
    layer = BlockAPLinear(linear, layout)
    x = torch.randn(200, 512)
    begun = float((layer(x) - linear(x)).detach().norm())
    optimizer = torch.optim.Adam(layer.trained.values(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (layer(x) - linear(x)).square().sum().backward()
        optimizer.step()
    stored = layer.quantized()
    assert stored.layout == layout
    assert torch.equal(torch.nn.functional.linear(x, stored.dequantize()) + linear.bias, layer(x))
    assert float((layer(x) - linear(x)).detach().norm()) < begun
