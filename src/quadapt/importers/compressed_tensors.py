"""compressed-tensors' folders of whole numbers, as llm-compressor writes them and vLLM serves them.

    W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]),    g = weight_g_idx[i]

`pack-quantized`: codes and zero-points are signed, stored as themselves plus 2**(bits - 1), dense streams of bits in
int32 words, the least significant first: codes along the inputs of one output, zero-points down the outputs of one
group (earlier writers left them plain int8). `naive-quantized` and `int-quantized`: signed bytes as they are.

Scales of bfloat16 are held as float32, which is the same number in more bits.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from quadapt import kernels
from quadapt.errors import CheckpointError
from quadapt.importers.base import (
    FLOATS,
    IMPORTERS,
    Importer,
    Parts,
    by_group,
    expect,
    grid,
    packed_rows,
    permutation,
    width_of,
)
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.quant.words import of_stream
from quadapt.widths import INTEGER_WIDTHS

_Form = Literal["pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense"]
"""mixed-precision: each group of layers names its own."""


class Weights(BaseModel):
    """What a group of layers says about its weights."""

    model_config = ConfigDict(extra="ignore")

    num_bits: Literal[2, 3, 4, 5, 6, 8]
    """Width of a code; the shape of the codes decides."""

    type: Literal["int"] = "int"
    """Whole numbers; float8, float4 and the like have another form."""

    strategy: Literal["group", "channel"]
    """What shares a scale: a group of inputs of a row, or the whole row."""

    group_size: int | None = None
    """How many inputs share a scale, where the strategy is by groups."""

    symmetric: bool = True
    """Whether there are no zero-points."""


class Group(BaseModel):
    """The settings of a group of layers; which ones they are follows from the tensors that each layer has."""

    model_config = ConfigDict(extra="ignore")

    format: _Form | None = None
    """The form of these layers, if it is not that of the folder."""

    weights: Weights
    """The settings of the weights of these layers."""

    input_activations: None = None
    """Activations that are rounded as well, which is not done here."""

    output_activations: None = None
    """How outputs of a layer are quantized; only None, not at all, is read."""


@IMPORTERS.register("compressed-tensors")
class CompressedTensors(Importer):
    """compressed-tensors of 2 to 8 bits, groups or whole rows, with and without zero-points and act-order."""

    summary: ClassVar[str] = "2 to 8 bits, pack-quantized or int8, weights alone; of llm-compressor, for vLLM"
    parts: ClassVar[tuple[str, ...]] = ("weight_scale",)
    optional: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    format: _Form
    """The form of the tensors."""

    config_groups: dict[str, Group]
    """The settings of the groups of layers."""

    sparsity_config: dict[str, Any] | None = None
    """How zeros are left out of the files; nothing but `dense` can be read."""

    transform_config: dict[str, Any] | None = None
    """Rotations that the model applies to activations as it runs; none can be read."""

    @field_validator("sparsity_config")
    @classmethod
    def _dense(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("format", "dense") != "dense":
            raise ValueError("sparse files cannot be read")
        return value

    @field_validator("transform_config")
    @classmethod
    def _plain(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("config_groups"):
            raise ValueError("rotations of activations cannot be read")
        return value

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        bits = self._bits(parts, out, columns)
        scales = expect(parts, "weight_scale", FLOATS, (out, None))
        width = width_of(columns, scales.shape[1], self._said("group_size", bits))
        zeros = self._zeros(parts, bits, out)
        return grid(
            out=out,
            columns=columns,
            bits=bits,
            width=width,
            zero="none" if zeros is None or bool((zeros == 2 ** (bits - 1)).all()) else "integer",
            scales=scales.dtype,
            permuted=self._positions(parts, columns, width) is not None,
        )

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        bits, columns, scales = layout.format.bits, layout.columns, parts["weight_scale"]
        width = width_of(columns, scales.shape[1], self._said("group_size", bits))
        position = self._positions(parts, columns, width) if layout.permuted else None
        if "weight_packed" in parts:
            packed = parts["weight_packed"].contiguous().view(torch.uint8)[:, : layout.format.row_bytes(columns)]
        else:
            packed = _unsigned(parts["weight"], 8)
        if position is not None:
            packed = packed_rows(kernels.unpack(packed.contiguous(), bits, columns), bits, position)
        zeros = self._zeros(parts, bits, layout.out) if layout.format.zero == "integer" else None
        zeros = None if zeros is None else by_group(zeros, layout, width)
        return QuantWeight.build(layout, packed.contiguous(), by_group(scales, layout, width), zeros, position)

    def _bits(self, parts: Parts, out: int, columns: int) -> int:
        """The width of a layer's codes, by the shape of their tensor.

        Raises:
            CheckpointError: There are no codes, or their shape fits no width that the folder names.
        """
        if "weight_packed" not in parts:
            expect(parts, "weight", (torch.int8,), (out, columns))
            return 8
        if "weight_shape" in parts and parts["weight_shape"].tolist() != [out, columns]:
            raise CheckpointError(
                f"weight_shape: is {parts['weight_shape'].tolist()}, and the layer has {out} rows of {columns} "
                "inputs. The file belongs to another model"
            )
        words = expect(parts, "weight_packed", (torch.int32,), (out, None)).shape[1]
        fitting = [bits for bits in INTEGER_WIDTHS if -(-columns * bits // 32) == words]
        named = sorted({group.weights.num_bits for group in self.config_groups.values()})
        both = [bits for bits in fitting if bits in named]
        if len(both) != 1:
            raise CheckpointError(
                f"weight_packed: has {words} words for {columns} inputs, which are codes of "
                f"{' or '.join(map(str, fitting)) or 'no whole number of'} bits, and quantization_config says "
                f"num_bits={' and '.join(map(str, named))}. Correct it in config.json; a file of 3 bits from before "
                "the dense packing has to be written anew by compressed-tensors"
            )
        return both[0]

    def _said(self, field: str, bits: int) -> Any:
        """What the folder says about all layers of a width, if it says one thing; else None."""
        weights = [group.weights for group in self.config_groups.values() if group.weights.num_bits == bits]
        values = {getattr(each, field) for each in weights}
        return values.pop() if len(values) == 1 else None

    def _zeros(self, parts: Parts, bits: int, out: int) -> Tensor | None:
        """Zero-points, uint8 `[out, groups]`; None if there are none.

        Raises:
            CheckpointError: They are missing.
        """
        if "weight_zero_point" not in parts:
            if self._said("symmetric", bits) is False:
                raise CheckpointError(
                    "weight_zero_point: is not in the files, and quantization_config says symmetric=false. The copy is "
                    "incomplete"
                )
            return None
        groups = parts["weight_scale"].shape[1]
        if parts["weight_zero_point"].dtype == torch.int8:
            return _unsigned(expect(parts, "weight_zero_point", (torch.int8,), (out, groups)), bits)
        words = expect(parts, "weight_zero_point", (torch.int32, torch.int8), (-(-out * bits // 32), groups))
        return of_stream(words.T, bits, out).T.contiguous()

    @staticmethod
    def _positions(parts: Parts, columns: int, width: int) -> Tensor | None:
        if "weight_g_idx" not in parts:
            return None
        group_of = expect(parts, "weight_g_idx", (torch.int32, torch.int64), (columns,))
        unused = bool((group_of == -1).all())  # as the library makes it before anything is ordered
        return None if unused else permutation(group_of, width)


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """Signed numbers, int8, as codes from zero, uint8.

    Raises:
        CheckpointError: One of them is no number of so many bits.
    """
    codes = values.to(torch.int16) + 2 ** (bits - 1)
    if int(codes.min()) < 0 or int(codes.max()) >= 2**bits:
        raise CheckpointError(
            f"weight_zero_point: has numbers from {int(values.min())} to {int(values.max())}, which are not of {bits} "
            "bits. The file is damaged"
        )
    return codes.to(torch.uint8)
