"""The range of least squares: against the solution of NumPy, and against the other ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quadapt.quant.format import Format, Levels, Zero
from quadapt.quant.gptq import GPTQ
from quadapt.quant.least_squares import fitted
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

GRIDS: list[tuple[Levels, int, Zero]] = [
    ("int", 4, "float"),
    ("int", 3, "none"),
    ("int", 2, "integer"),
    ("nf", 4, "none"),
    ("nf", 3, "float"),
]


def layout_of(levels: Levels, bits: int, zero: Zero, columns: int = 80, group_size: int = 32) -> Layout:
    format = Format(levels=levels, bits=bits, group_size=group_size, zero=zero)
    return Layout(format=format, storage=Storage.floating("fp32", zero), out=12, columns=columns)


@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
def test_the_fit_is_numpys(levels: Levels, bits: int, zero: Zero) -> None:
    """Group by group, a short last one included: `lstsq` over the levels of the codes."""
    torch.manual_seed(0)
    layout, weight = layout_of(levels, bits, zero), torch.randn(12, 80) + 0.1
    begun = Nearest()(weight, layout)
    held = None if zero == "none" else begun.offsets if zero == "float" else begun.tensors["offsets"].float()
    scales, offsets = fitted(weight, layout, begun.scales, held)
    table = layout.format.table(weight)
    codes = begun.codes()
    points = (codes.float() if table is None else table[codes.int()]).double().numpy()
    for row in range(12):
        for group, start in enumerate(range(0, 80, 32)):
            t, w = points[row, start : start + 32], weight[row, start : start + 32].double().numpy()
            if zero == "float":
                want, shift = np.linalg.lstsq(np.stack([t, np.ones_like(t)], 1), w, rcond=None)[0]
                np.testing.assert_allclose(offsets[row, group], shift, rtol=1e-4, atol=1e-5)
            else:
                middle = 0 if levels == "nf" else 2 ** (bits - 1) if zero == "none" else float(held[row, group])
                want = np.linalg.lstsq((t - middle)[:, None], w, rcond=None)[0][0]
            np.testing.assert_allclose(scales[row, group], want, rtol=1e-5)


@pytest.mark.parametrize(("levels", "bits", "zero"), GRIDS)
@pytest.mark.parametrize("columns", [256, 80])
def test_it_errs_less_than_the_other_ranges(levels: Levels, bits: int, zero: Zero, columns: int) -> None:
    torch.manual_seed(1)
    layout, weight = layout_of(levels, bits, zero, columns), torch.randn(12, columns)
    weight[3], weight[4, :32] = 0, 0.5
    errors = {}
    for range_ in ("minmax", "mse", "least-squares"):
        stored = Nearest(range=range_)(weight, layout)
        errors[range_] = float((stored.dequantize() - weight).norm())
        assert not bool(stored.dequantize()[3].any())
    assert errors["least-squares"] < errors["mse"] < errors["minmax"]


@pytest.mark.parametrize("kind", ["q4_k", "q2_k", "q3_k", "q6_k"])
def test_it_serves_super_blocks_and_gptq(kind: str) -> None:
    bits, group_size, zero = {"q4_k": (4, 32, "float"), "q2_k": (2, 16, "float"), "q3_k": (3, 16, "none")}.get(
        kind, (6, 16, "none")
    )
    torch.manual_seed(2)
    format = Format(bits=bits, group_size=group_size, zero=zero)
    layout = Layout(format=format, storage=Storage.floating(kind, zero), out=12, columns=512)
    weight = torch.randn(12, 512)
    weight[5, 64:96] = 0
    found: list[QuantWeight] = [Nearest(range=each)(weight, layout) for each in ("mse", "least-squares")]
    worse, better = (float((each.dequantize() - weight).norm()) for each in found)
    assert better < worse
    assert not bool(found[1].dequantize()[5, 64:96].any())
    x = torch.randn(1000, 512)
    moment = x.T @ x / 1000
    gptq = [GPTQ(range=each)(weight, layout, {"second_moment": moment}) for each in ("minmax", "least-squares")]
    seen = [float(((each.dequantize() - weight) @ x.T).norm()) for each in gptq]
    assert seen[1] < seen[0]
