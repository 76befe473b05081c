"""`quantization_config` of a checkpoint: what each quantized layer is, and why the others are not quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import NoneType
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from quadapt.errors import CheckpointError, ConfigError
from quadapt.model.layer import Quantization
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage, scales_meant
from quadapt.quant.weight import Layout, from_fields

VERSION = 1
"""The version of the stored form that this code writes; a checkpoint of a later version is refused."""


class QuadaptConfig(QuantizationConfigMixin):
    """Either a wish (quantize on loading, to nearest), or the content of a checkpoint.

    Args:
        bits: Wish: the width of a code in bits.
        group_size: Wish: how many inputs share a scale; -1 for whole rows.
        levels: Wish: the kind of levels, int, nf, nf-sym, nf-qlora, fp4 or iq4-nl.
        zero: Wish: what the offset may be: none, integer or float. By default it is float for int, and none for nf.
        scales: Wish: how scales are stored: fp16, fp32, double, linear8-256-fp32 and its like, or k-quant, which
            chooses the group size and the zero as well.
        range: Wish: what the levels of a group span: minmax, mse, icq or icq-scale.
        skip: Wish: the layers to leave as they are.
        schemes: Content: formats and storages, each with the layers (and their shapes) that have it.
        left: Content: why each other matrix is not quantized.
        made: Content: how it was made (method, rounding, calibration), for people to read.
        fingerprint: Content: SHA-256 of the quantized layers, and of `besides`; adapters name their base by it.
        besides: Content: SHA-256 of what merges have changed outside of the quantized layers; empty if nothing.
        version: The version of the stored form.
        quant_method: The name by which transformers knows this quantization: always "quadapt".
    """

    def __init__(  # noqa: PLR0913 - the fields of config.json
        self,
        *,
        bits: int = 4,
        group_size: int = 32,
        levels: str = "int",
        zero: str = "default",
        scales: str = "",
        range: str = "minmax",
        skip: Sequence[str] = (),
        schemes: Sequence[Mapping[str, Any]] = (),
        left: Mapping[str, str] | None = None,
        made: Mapping[str, Any] | None = None,
        fingerprint: str = "",
        besides: str = "",
        version: int = VERSION,
        quant_method: str = "quadapt",
    ) -> None:
        _check_fields(version, schemes, left, made, fingerprint, besides)
        if version > VERSION:
            raise CheckpointError(
                f"the checkpoint has version {version} of the stored form, this quadapt reads up to {VERSION}. "
                "Upgrade quadapt"
            )
        self.quant_method, self.version = "quadapt", version  # type: ignore[assignment]  # an enum of transformers' own
        if schemes:
            self.schemes, self.left, self.made = list(schemes), dict(left or {}), dict(made or {})
            self.fingerprint, self.besides = fingerprint, besides
        else:
            self.bits, self.group_size, self.levels, self.zero = bits, group_size, levels, zero
            self.scales, self.range, self.skip = scales, range, list(skip)
            self.quantization()  # a wrong wish fails here, not layer by layer

    def quantization(self) -> Quantization:
        """What the wish's fields describe: every layer has one grid, one storage and rounding to nearest."""
        format = Format(levels=self.levels, bits=self.bits, group_size=self.group_size, zero=self.zero)  # type: ignore[arg-type]
        storage = Storage.default(format)
        if self.scales:
            meant = scales_meant(self.scales, self.bits)
            format = replace(format, **meant.demands)
            storage = Storage.default(format).with_scales(meant.name)
        rounding = Nearest(range=self.range)
        return Quantization(format=format, storage=storage, rounding=rounding)

    @staticmethod
    def of(
        layouts: Mapping[str, Layout],
        *,
        left: Mapping[str, str],
        made: Mapping[str, Any],
        fingerprint: str,
        besides: str = "",
    ) -> QuadaptConfig:
        """The config of a checkpoint that holds these layers."""
        schemes: dict[tuple[Format, Storage, bool], dict[str, list[int]]] = {}
        for name, layout in layouts.items():
            scheme = (layout.format, layout.storage, layout.permuted)
            schemes.setdefault(scheme, {})[name] = [layout.out, layout.columns]
        if not schemes:
            raise ConfigError("the model has no quantized layer")
        return QuadaptConfig(
            schemes=[
                {"format": asdict(format), "storage": asdict(storage), "permuted": permuted, "layers": layers}
                for (format, storage, permuted), layers in schemes.items()
            ],
            left=left,
            made=made,
            fingerprint=fingerprint,
            besides=besides,
        )

    @property
    def layouts(self) -> dict[str, Layout]:
        """Layout of every quantized layer, by name.

        Raises:
            CheckpointError: An entry is damaged.
        """
        try:
            return {
                name: Layout(
                    format=from_fields(Format, scheme["format"]),
                    storage=from_fields(Storage, scheme["storage"]),
                    out=out,
                    columns=columns,
                    permuted=scheme["permuted"],
                )
                for scheme in self.schemes
                for name, (out, columns) in scheme["layers"].items()
            }
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"quantization_config is damaged ({error}). Restore config.json") from error


def _check_fields(*values: Any) -> None:
    """Raise CheckpointError if a field has not the type that was written."""
    wanted: dict[str, tuple[type, ...]] = {
        "version": (int,),
        "schemes": (list, tuple),
        "left": (Mapping, NoneType),
        "made": (Mapping, NoneType),
        "fingerprint": (str,),
        "besides": (str,),
    }
    for (name, types), value in zip(wanted.items(), values, strict=True):
        if not isinstance(value, types) or isinstance(value, bool):
            raise CheckpointError(f"quantization_config is damaged ({name} is {value!r:.80}). Restore config.json")
