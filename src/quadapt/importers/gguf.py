"""GGUF files, those of llama.cpp: layers in the blocks of GGML as they are, the rest as dense numbers.

A file has all that is known of its model; transformers makes a configuration and a tokenizer of it. Matrices of linear
layers keep their blocks (`ggml.py`), or are floats. The embedding and the output head, of whatever type, become the
numbers that llama.cpp dequantizes them to, in float32: computation has that dtype if no other is asked for.

Where rows lie in another order in a file, as those of q_proj and k_proj of the llama family do, that is undone: groups
run along a row. Stacks of experts are taken apart into the matrices of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quadapt.errors import CheckpointError
from quadapt.importers.base import IMPORTERS, FileImporter, Importer, Parts, expect
from quadapt.importers.ggml import BLOCKS, Blocks
from quadapt.importers.gguf_config import FACTORS, FREQUENCIES, completed, llama3_scaling
from quadapt.importers.gguf_families import FAMILIES, family_names
from quadapt.importers.gguf_family import names_of, one_of_several
from quadapt.quant.weight import Layout, QuantWeight

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_ADVICE = "quadapt.load gives it as dense numbers; to tune over codes, take a file of Q4_K, Q6_K, Q8_0 and the like"

_READ = {name: family for name, family in FAMILIES.items() if family.read}
"""The families whose files are read as codes, by the model's class."""


@IMPORTERS.register("gguf")
class GGUF(FileImporter):
    """GGUF files of the families that `gguf_families.py` says are read, in any mixture of the types that are held."""

    summary: ClassVar[str] = f"{', '.join(BLOCKS)}; of llama.cpp, for {family_names(read=True)}"
    parts: ClassVar[tuple[str, ...]] = ("blocks", "type")
    suffix: ClassVar[str] = ".gguf"
    dtype: ClassVar[str] = "float32"

    @classmethod
    def of_file(cls, path: Path) -> Importer:
        reader = _open(path)
        name = _name_of_model(reader)
        if name is None:
            arch = reader.fields["general.architecture"].contents()
            raise CheckpointError(f"is of {arch}, and GGUF files of {family_names(read=True)} are read. {_ADVICE}")
        matrices = [each for each in reader.tensors if each.name.startswith("blk.") and len(each.shape) > 1]
        for each in matrices:
            if len(each.shape) > 2 and not _READ[name].experts:
                raise CheckpointError(f"{each.name}: is a stack of matrices (experts), which {name} does not have")
            if each.tensor_type.name not in BLOCKS.keys() | _FLOATS.keys():
                raise CheckpointError(
                    f"{each.name}: is {each.tensor_type.name}, and {', '.join(BLOCKS)} can be held. {_ADVICE}"
                )
        if not any(each.tensor_type.name in BLOCKS for each in matrices):
            raise CheckpointError("is not quantized. quadapt.load gives it as a dense model")
        llama3_scaling(reader)
        return cls()

    def completed(self, path: Path, config: Any) -> Any:
        return configured(path, config)

    def tensors(self, path: Path, model: Any) -> Mapping[str, Tensor]:
        return _Tensors(_open(path), model)

    def layout(self, parts: Parts, out: int, columns: int) -> Layout:
        ggml = self._type(parts)
        expect(parts, "blocks", (torch.uint8,), (out, None))
        size = columns // ggml.weights * ggml.size
        if columns % ggml.weights or parts["blocks"].shape[1] != size:
            raise CheckpointError(
                f"has rows of {parts['blocks'].shape[1]} bytes, which are not {columns} inputs. The file is damaged, "
                "or belongs to another model"
            )
        return ggml.layout(out, columns)

    def weight(self, parts: Parts, layout: Layout) -> QuantWeight:
        return self._type(parts).weight(parts["blocks"], layout)

    @staticmethod
    def _type(parts: Parts) -> Blocks:
        import gguf

        return BLOCKS[gguf.GGMLQuantizationType(int(parts["type"])).name]


def configured(path: Path, config: Any) -> Any:
    """Transformers' configuration of a file, completed by all that the file says, if it is of a family that is read."""
    reader = _open(path)
    name = _name_of_model(reader)
    return config if name is None else completed(reader, name, config)


def _name_of_model(reader: GGUFReader) -> str | None:
    """The class of a file's model; None if it is not one of those that are read."""
    arch = reader.fields["general.architecture"].contents()
    count = reader.fields.get(f"{arch}.expert_count")
    experts = count is not None and count.contents() > 0
    found = (name for name, family in _READ.items() if family.arch == arch and family.experts == experts)
    return next(found, None)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file by the names that they have in a model, each made when it is asked for.

    A layer in blocks has `NAME.blocks`, uint8 `[out, bytes of a row]`, and `NAME.type`, the number of GGML's type.

    Raises:
        CheckpointError: The file has a tensor that the model does not have.
    """

    def __init__(self, reader: GGUFReader, model: Any) -> None:
        self.family, self.config = FAMILIES[type(model).__name__], model.config
        name_of = names_of(self.family, model.config.num_hidden_layers)
        known: dict[str | None, list[str]] = {}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in self._shapes:
            known.setdefault(name_of(name), []).append(name)
        head = model.get_output_embeddings()
        layers = {name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}
        self._found: dict[str, tuple[str, _Piece]] = {}
        for tensor in reader.tensors:
            if tensor.name in (FREQUENCIES, *FACTORS.values()):  # part of the configuration, see `completed`
                continue
            if tensor.name not in known:
                raise CheckpointError(
                    f"{tensor.name}: {type(model).__name__} has no such tensor. The file is damaged, or of a later "
                    "sort of model"
                )
            for name, piece in _pieces(tensor, known[tensor.name]):
                layer, _, leaf = name.rpartition(".")
                blocks = layer in layers and leaf == "weight" and tensor.tensor_type.name in BLOCKS
                for part in (f"{layer}.blocks", f"{layer}.type") if blocks else (name,):
                    self._found[part] = name, piece

    def __getitem__(self, part: str) -> Tensor:
        name, piece = self._found[part]
        if part.endswith(".type"):
            return torch.tensor(int(piece.type))
        rows = torch.from_numpy(piece.data) if part.endswith(".blocks") else piece.numbers()
        if self.family.shifts(name):
            rows = rows.float() - 1
        if rows.ndim == 1 and self._shapes[name] == (1, len(rows)):
            return rows[None]  # the gate of a shared expert, a matrix of one row
        order = self.family.order(name, self.config, len(rows))
        return rows if order is None else rows[torch.from_numpy(order).argsort()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@dataclass(frozen=True)
class _Piece:
    """A tensor of a file, or one of those that it stacks."""

    type: GGMLQuantizationType
    """GGML's type of the numbers."""

    data: np.ndarray
    """The rows, of numbers or of bytes of blocks; mapped from the file."""

    def numbers(self) -> Tensor:
        """Floats as they are, blocks as the gguf package dequantizes them, in float32."""
        from gguf.quants import dequantize

        dtype = _FLOATS.get(self.type.name)
        if dtype is None:
            return torch.from_numpy(dequantize(self.data, self.type))
        return torch.from_numpy(self.data).view(dtype)


def _pieces(tensor: ReaderTensor, names: Sequence[str]) -> Iterator[tuple[str, _Piece]]:
    """A tensor of a file under its name in the model; under several if the file holds these in one.

    Raises:
        CheckpointError: It does not hold as many.
    """
    if not one_of_several(names[0]):
        yield names[-1], _Piece(tensor.tensor_type, tensor.data)
        return
    if len(tensor.data) != len(names):
        raise CheckpointError(
            f"{tensor.name}: holds {len(tensor.data)} tensors in one, and the model has {len(names)}. The file is "
            "damaged, or of a later sort of model"
        )
    for name, data in zip(names, tensor.data, strict=True):
        yield name, _Piece(tensor.tensor_type, data)


def _open(path: Path) -> GGUFReader:
    """What a file holds; its tensors are mapped, and each is read when it is used."""
    about = path.stat()
    return _opened(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: Path, _size: int, _changed: int) -> GGUFReader:
    import gguf

    return gguf.GGUFReader(path, "c")  # a mapping of its own, which torch may take for one that can be written
