"""The quantized linear layer.

`weight` holds packed codes as a frozen uint8 parameter of an `nn.Linear`, and scales and offsets are uint8 parameters
beside it. With plain parameters, stock PEFT, safetensors, `torch.compile`, DDP and FSDP2 work without code of ours:
buffers would be sent around by DDP at every step and not be sharded by FSDP2; a tensor subclass would need a dispatch
table and lose its state under FSDP2. Codes are packed along the last axis, so that a shard of axis 0 is whole rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadapt.errors import ShapeError
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.weight import Layout, QuantWeight


class QuantLinear(nn.Linear):
    """A linear layer over a :class:`QuantWeight`; a drop-in for `nn.Linear` whose weight is frozen.

    Inputs may be float16, bfloat16 or float32 `[..., in]`; the output has their dtype (autocast's, where that is on).

    Args:
        layout: The format, the storage and the shape of the weight.
        bias: Whether there is a bias.
        device: The device of the parameters; "meta" before loading.
        dtype: The dtype of the bias.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a dense weight
        self.in_features, self.out_features, self.layout = layout.columns, layout.out, layout
        for name, shape in layout.shapes.items():
            stored = torch.int32 if name == "perm" else torch.uint8
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=stored, device=device), requires_grad=False)
            )
        kept = nn.Parameter(torch.empty(layout.out, dtype=dtype, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", kept)

    @staticmethod
    def of(weight: QuantWeight, bias: Tensor | None = None) -> QuantLinear:
        """A layer that holds `weight` and, frozen, `bias`."""
        layer = QuantLinear(weight.layout, bias=bias is not None, device="meta")
        layer.quant_weight = weight
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def quant_weight(self) -> QuantWeight:
        """The weight, as its layout and tensors (shared with the parameters)."""
        return QuantWeight(self.layout, {name: self._parameters[name] for name in self.layout.shapes})  # type: ignore[misc]

    @quant_weight.setter
    def quant_weight(self, weight: QuantWeight) -> None:
        """Take over another weight, of any layout with the same shape (what a merge gives)."""
        for name in self.layout.shapes:
            delattr(self, name)
        self.layout = weight.layout
        for name, tensor in weight.tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x @ W.T + bias` from the packed codes.

        Raises:
            ShapeError: `x` is no float: the model's code has cast it to the dtype of `weight`, which holds codes.
        """
        if not x.is_floating_point():
            raise ShapeError(f"the input of a quantized layer is {x.dtype}; it must be float16, bfloat16 or float32")
        x = autocast(x)
        return self.with_bias(quant_matmul(x, self.quant_weight))

    def with_bias(self, y: Tensor) -> Tensor:
        """Add the bias, if there is one, in the dtype of `y`."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def reset_parameters(self) -> None:
        """Do nothing: a quantized weight is never initialized at random."""

    def extra_repr(self) -> str:
        """Shape, format and true bits per weight."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.layout.name}, bits_per_weight={self.layout.bits_per_weight:.3f}"
        )


def autocast(x: Tensor) -> Tensor:
    """Cast `x` as autocast would before a matrix product (a custom function's inputs are not cast by it)."""
    device_type = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))
