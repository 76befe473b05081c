"""A transformers folder whose quantized layers are the tensors of other software, and all else is as in a dense one."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.exporters.files import new_folder, write_index
from quadapt.exporters.report import ExportReport, TensorRow, size_of
from quadapt.exporters.tensors import (
    TYPES,
    Source,
    Stored,
    as_stored,
    dense_of,
    refuse_adapters,
    rounded_besides,
    tensors_of,
)
from quadapt.hf.ending import set_ends
from quadapt.hf.saving import copy_processor
from quadapt.model.quantize import Progress
from quadapt.quant.weight import Layout, QuantWeight

DType = Literal["float16", "bfloat16", "float32"]

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""The dtypes that scales and unquantized tensors may have."""


SHARD = 4 << 30
"""Largest file of tensors, in bytes."""


class Writer(ABC):
    """What a format makes of quantized layers.

    Args:
        dtype: Of scales and of all that is not quantized: what servers compute in.
    """

    name: ClassVar[str]
    """The name of the format, as reports have it."""

    def __init__(self, dtype: DType = "float16") -> None:
        if dtype not in DTYPES:
            raise ExportError(f"dtype={dtype!r} is unknown. Use {', '.join(DTYPES)}")
        self.dtype: DType = dtype

    @property
    def floats(self) -> torch.dtype:
        """The dtype of scales and of all that is not quantized."""
        return DTYPES[self.dtype]

    @abstractmethod
    def why_not(self, weight: QuantWeight) -> str:
        """Why the format cannot hold a weight with all its numbers; an empty string if it can."""

    def why_not_together(self, layouts: Mapping[str, Layout]) -> str:
        """Why the format cannot hold layers, by name, each of which it holds, in one folder; empty if it can."""
        return ""

    @abstractmethod
    def parts(self, weight: QuantWeight) -> dict[str, Tensor]:
        """The tensors of a layer, by what follows the name of the layer and a dot."""

    @abstractmethod
    def about(self, layers: Mapping[str, QuantWeight], plain: Sequence[str]) -> dict[str, Any]:
        """What the folder says of itself (`quantization_config`).

        Args:
            layers: The quantized layers, by name.
            plain: Names of the linear layers that are not quantized.
        """

    def fields(self, config: Any, said: Mapping[str, Any]) -> dict[str, Any]:
        """Further fields of `config.json` that readers of the format need.

        Args:
            config: The model's configuration.
            said: What the file says already.
        """
        return {}

    def header(self, sources: Mapping[str, Stored]) -> dict[str, str]:
        """What each file of tensors says in its header.

        Args:
            sources: All tensors of the model by their names in the files, quantized matrices as such.
        """
        return {"format": "pt"}

    def notes(self, model: nn.Module) -> list[str]:
        """What one should know before serving the folder, for the report."""
        return []

    def check_model(self, model: nn.Module) -> None:  # noqa: B027 - many formats take any model
        """Raise ExportError if readers of the format could not load such a model, whatever its weights."""

    def export(self, model: nn.Module, tokenizer: Any, folder: str | Path, progress: Progress = iter) -> ExportReport:
        """Write a quantized model.

        Args:
            model: Quantized layers as codes, without adapters.
            tokenizer: Saved beside it.
            folder: Must not exist, or be empty.
            progress: Wraps the names of the tensors, to show how far the work is.

        Raises:
            ExportError: The folder is taken, the model carries adapters, or the format cannot hold a layer; it is
                named.
        """
        refuse_adapters(model)
        self.check_model(model)
        found = dict(tensors_of(model))
        sources = as_stored(model, found, dense=False)
        layers = {name.removesuffix(".weight"): each for name, each in found.items() if isinstance(each, QuantWeight)}
        self._check(layers)
        coded, plain = self._tensors(sources, progress)
        path = Path(folder)
        with new_folder(path) as partial:
            self._save(model, coded | plain, self.header(sources), partial)
            set_ends(model, tokenizer)
            self._save_config(model, layers, partial)
            tokenizer.save_pretrained(partial)
            copy_processor(model, partial)
        weights = sum(weight.layout.out * weight.layout.columns for weight in layers.values())
        return ExportReport(
            format=self.name,
            path=str(path),
            bytes=size_of(path),
            tensors=tuple(_row(name, each, linear=name in coded) for name, each in sorted((coded | plain).items())),
            bits_per_weight=8 * sum(each.nbytes for each in coded.values()) / max(weights, 1),
            notes=(*rounded_besides(sources, self.floats), *self.notes(model)),
        )

    def _check(self, layers: Mapping[str, QuantWeight]) -> None:
        """Raise ExportError if the format cannot hold these layers; one is named."""
        for name, weight in layers.items():
            why = self.why_not(weight)
            if why:
                raise ExportError(f"{name}: {why}")
        why = self.why_not_together({name: weight.layout for name, weight in layers.items()})
        if why:
            raise ExportError(why)

    def _tensors(
        self, sources: Mapping[str, Stored], progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All tensors of the file by name, on the CPU: those of quantized layers, and the others."""
        coded: dict[str, Tensor] = {}
        plain: dict[str, Tensor] = {}
        for name in progress(sorted(sources)):
            source = sources[name]
            if isinstance(source, QuantWeight):
                parts = self.parts(source)
                coded |= {f"{name.removesuffix('.weight')}.{part}": each.cpu() for part, each in parts.items()}
            else:
                plain[name] = dense_of(source, self._plain)
        return coded, plain

    def _save(self, model: nn.Module, tensors: Mapping[str, Tensor], header: dict[str, str], folder: Path) -> None:
        """Write the tensors into one file, or several and an index of them."""
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file

        shards = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD)
        for file, names in shards.filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, folder / file, metadata=header)
        write_index(shards, folder)

    def _plain(self, source: Source) -> Tensor:
        """A tensor that is not quantized, as the file has it."""
        assert isinstance(source, Tensor)
        return source.detach().to("cpu", self.floats if source.is_floating_point() else source.dtype).contiguous()

    def _save_config(self, model: Any, layers: Mapping[str, QuantWeight], folder: Path) -> None:
        config = copy.deepcopy(model.config)
        plain = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name not in layers]
        config.quantization_config = self.about(layers, plain)
        config.dtype, config.architectures = self.dtype, [type(model).__name__]
        config.save_pretrained(folder)
        file = folder / "config.json"
        said = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**said, **self.fields(config, said)}, indent=2) + "\n", encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)


def _row(name: str, tensor: Tensor, *, linear: bool) -> TensorRow:
    return TensorRow(
        name=name,
        type=TYPES.get(tensor.dtype, str(tensor.dtype)),
        shape=tuple(tensor.shape),
        nbytes=tensor.nbytes,
        linear=linear,
    )
