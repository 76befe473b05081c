"""A dense model that begins with what a rounding gave: for adapters that quantize dense matrices in their forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError, locate
from quadapt.model.layer import Quantization
from quadapt.quant.weight import QuantWeight


def dense_again(
    model: nn.Module, weights: Mapping[str, QuantWeight], quantization: Quantization, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Put dense matrices in the place of fixed-point ones (`quant/fixed_point.py`), in place.

    Each holds the numbers that were rounded, so that under the grid that is given back they round to the codes which
    the rounding chose.

    Args:
        model: The model whose layers have been quantized.
        weights: The fixed-point base of each layer, by name.
        quantization: How they were quantized.
        dtypes: The dtype of each dense matrix, by name.

    Returns:
        The first grid of each layer, float32 `[2, out, groups]`: its scales, and the middle of its levels.

    Raises:
        ConfigError: The rounding has ordered the inputs anew, which a dense matrix under a grid by groups cannot be.
    """
    grids = {}
    for name, weight in weights.items():
        if weight.layout.permuted:
            with locate(name):
                raise ConfigError(
                    "act_order puts inputs into groups in another order, which an adapter over the dense matrix has no "
                    "place for. Leave it out, or use a method over codes (lr-qat, code-lora)"
                )
        layout = quantization.layout(name, weight.layout.out, weight.layout.columns)
        product = quantization.rounding.product(weight, layout)
        scales, offsets = product.scales, product.offsets
        assert offsets is not None  # integers have offsets, if only implied ones
        grids[name] = torch.stack([scales, offsets + 2 ** (layout.format.bits - 1) * scales])
        bias = model.get_submodule(name).bias
        linear = nn.Linear(layout.columns, layout.out, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.dequantize().to(dtypes[name]), requires_grad=False)
        linear.bias = bias  # type: ignore[assignment]  # which is one, or None
        model.set_submodule(name, linear)
    return grids
