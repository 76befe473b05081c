"""Embeddings and heads that are not quantized, on the values that a type of GGML's blocks holds.

A GGUF file holds them as that type, in half of the bytes or less, and the model still computes with floats: rounded
before anything is quantized or trained, they are part of what training, merging and certificates see. Rounding twice
changes nothing, so that an export finds scales and codes again from the values alone.

Of each group of weights the largest has the last code, by a scale that is rounded towards zero. In 16 bits a checkpoint
holds few of the products of a scale and a code: there the scales of Q8_0 are powers of two, whose products all fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.kernels import pack
from quadapt.kernels.reference import as_floats, expand
from quadapt.model.select import ends_of
from quadapt.quant.format import Format
from quadapt.quant.rounding import row_chunks
from quadapt.quant.storage import Storage
from quadapt.quant.storage.super_block import Q6_K, SUPER_BLOCK
from quadapt.quant.weight import Layout, QuantWeight

_LEAST = 2.0**-24
"""The smallest positive float16, which stands for the scale of a group that is nearly or wholly zero."""


@dataclass(frozen=True)
class EmbeddingType:
    """A type of GGML's blocks on whose values an embedding may lie."""

    columns: int
    """What the length of a row must be a multiple of."""

    wide: bool
    """Whether its values need float32; otherwise there is a form for float16 and bfloat16, too."""

    lowest: int
    """The lowest signed code that is used."""

    layout: Callable[[int, int], Layout]
    """The layout of the quantized matrix that holds the same values, given its rows and columns."""

    scales: Callable[[Tensor, bool], Tensor]
    """The scales of some rows, `[rows, groups]`, given the rows in float32 and whether they are to fit 16 bits."""


def _q8_0(out: int, columns: int) -> Layout:
    format = Format(bits=8, group_size=32, zero="none")
    return Layout(format=format, storage=Storage(scales="fp16", offsets="absent"), out=out, columns=columns)


def _q8_0_scales(rows: Tensor, narrow: bool) -> Tensor:
    """The largest weight over 127; the next power of two above for 16 bits, else rounded towards zero to float16."""
    exact = (rows.unflatten(1, (-1, 32)).abs().amax(-1) / 127).clamp_min(_LEAST)
    if narrow:
        mantissa, exponent = torch.frexp(exact)
        return torch.ldexp(torch.ones_like(exact), torch.where(mantissa > 0.5, exponent, exponent - 1))
    half = exact.half()
    return torch.where(half.float() > exact, (half.view(torch.int16) - 1).view(torch.float16), half).float()


def _q6_k(out: int, columns: int) -> Layout:
    format = Format(bits=6, group_size=16, zero="none")
    return Layout(format=format, storage=Storage(scales=Q6_K.name, offsets="absent"), out=out, columns=columns)


def _q6_k_scales(rows: Tensor, _: bool) -> Tensor:
    """The largest weight over -32, as a code of its super-block that is rounded towards zero."""
    groups = rows.unflatten(1, (-1, 16))
    high, low = groups.amax(-1), -groups.amin(-1)
    exact = torch.where(high > low, -high, low) / 32
    nearest = Q6_K.encode(exact, centre=True)
    stored = Q6_K.decode(nearest, (exact.shape[0], exact.shape[1]))
    unit = as_floats(nearest["_constant"], torch.float16).float().abs().repeat_interleave(Q6_K.together, 1)
    over = (stored.abs() > exact.abs()) & (stored.abs() > unit)
    return torch.where(over, stored - stored.sign() * unit, stored)


TYPES: Mapping[str, EmbeddingType] = {
    "q8_0": EmbeddingType(32, False, -127, _q8_0, _q8_0_scales),
    "q6_k": EmbeddingType(SUPER_BLOCK, True, -32, _q6_k, _q6_k_scales),
}
"""The types that embeddings may lie on, by the names that settings have for them; GGML writes these in capitals."""


def quantized(weight: Tensor, type_name: str, *, narrow: bool) -> QuantWeight:
    """Some rows `[rows, in]` (any float dtype) in codes and scales of a type.

    Args:
        weight: The rows, of which each is rounded by itself.
        type_name: The name of the type in `TYPES`.
        narrow: Whether the values are to fit float16 and bfloat16.
    """
    chosen, rows = TYPES[type_name], weight.float()
    layout = chosen.layout(*weight.shape)
    half, scales = 2 ** (layout.format.bits - 1), chosen.scales(rows, narrow)
    codes = rows / expand(scales, layout.format.group_size, layout.columns)
    codes = codes.round().clamp(chosen.lowest, half - 1)
    return QuantWeight.build(layout, pack((codes + half).to(torch.uint8), layout.format.bits), scales, None)


def recognized(weight: Tensor, type_name: str) -> QuantWeight | None:
    """The quantized matrix whose values are those of `weight`, bit for bit; None if they are on no such grid."""
    if weight.ndim != 2 or weight.shape[1] % TYPES[type_name].columns or not weight.is_floating_point():
        return None
    for narrow in (False,) if TYPES[type_name].wide else (False, True):
        parts = []
        for rows in row_chunks(weight):
            parts.append(quantized(weight[rows], type_name, narrow=narrow))
            if not torch.equal(parts[-1].dequantize(), weight[rows].float()):
                break
        else:
            return _joined(parts, weight, type_name)
    return None


def nearest(weight: Tensor, type_name: str) -> QuantWeight:
    """A matrix in codes and scales of a type, rounded: :func:`quantized` for all rows, some at a time."""
    parts = [quantized(weight[rows], type_name, narrow=False) for rows in row_chunks(weight)]
    return _joined(parts, weight, type_name)


def _joined(parts: Sequence[QuantWeight], weight: Tensor, type_name: str) -> QuantWeight:
    """The parts of a matrix, some rows each, as one."""
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return QuantWeight(TYPES[type_name].layout(*weight.shape), tensors)


@torch.no_grad()
def round_embeddings(
    model: nn.Module, type_name: str, left_out: Mapping[str, object], dtype: torch.dtype | None = None
) -> dict[str, Layout]:
    """Bring the input embedding, and a head that is not quantized, onto the values of a type, in place.

    Args:
        model: The dense model, of transformers.
        type_name: The name of the type in `TYPES`.
        left_out: Layers that are quantized, by name, and so stay.
        dtype: The dtype that the model is cast to later, if it is.

    Returns:
        The layout that each has in that type, by the names of the layers; of tied ones the embedding's.

    Raises:
        ConfigError: The rows do not fit the type, or the dtype of the model does not hold its values.
    """
    found = {}
    for name, module in _embeddings(model, left_out).items():
        values = _rounded(name, module.weight, type_name, dtype or module.weight.dtype)
        module.weight.data = values
        found[name] = TYPES[type_name].layout(*values.shape)
    return found


def check_embeddings(
    model: nn.Module, type_name: str, left_out: Mapping[str, object], dtype: torch.dtype | None = None
) -> None:
    """Raise ConfigError if shapes and dtype already tell that :func:`round_embeddings` will; weights are not read."""
    for name, module in _embeddings(model, left_out).items():
        _check(name, module.weight.shape[1], type_name, dtype or module.weight.dtype)


def _embeddings(model: Any, left_out: Mapping[str, object]) -> dict[str, Any]:
    """The input embedding and the head, by name, without those that are left out; of tied ones the embedding alone."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Any] = {}
    for module in ends_of(model):
        weight, name = getattr(module, "weight", None), names.get(id(module), "embedding")
        seen = any(each.weight is weight for each in found.values())
        if isinstance(weight, Tensor) and not seen and name not in left_out:
            found[name] = module
    return found


def _check(name: str, columns: int, type_name: str, final: torch.dtype) -> None:
    chosen, dtype = TYPES[type_name], str(final).removeprefix("torch.")
    if columns % chosen.columns:
        fits = [f"embeddings={each!r}" for each, other in TYPES.items() if columns % other.columns == 0]
        raise ConfigError(
            f"{name}: {columns} numbers a row are no multiple of {chosen.columns}, as {type_name} needs. "
            f"Use {' or '.join([*fits, 'embeddings=' + repr('float')])}"
        )
    if final != torch.float32 and chosen.wide:
        raise ConfigError(
            f"{name}: {dtype} does not hold the values of {type_name}, which need float32. Use embeddings='q8_0', or "
            "load the model in float32 (--dtype float32)"
        )


def _rounded(name: str, weight: Tensor, type_name: str, final: torch.dtype) -> Tensor:
    _check(name, weight.shape[1], type_name, final)
    narrow, dtype = final != torch.float32, str(final).removeprefix("torch.")
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"{name}: has NaN or infinite values. Repair the model before rounding it to {type_name}")
    kept = torch.empty_like(weight, requires_grad=False)
    for rows in row_chunks(weight):
        values = quantized(weight[rows], type_name, narrow=narrow).dequantize()
        kept[rows] = values
        if not (torch.equal(kept[rows].float(), values) and torch.equal(values.to(final).float(), values)):
            raise ConfigError(
                f"{name}: {dtype} does not hold its values rounded to {type_name}. Use embeddings='float', or load the "
                "model in float32 (--dtype float32)"
            )
    return kept
