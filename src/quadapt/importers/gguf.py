"""GGUF files, those of llama.cpp: layers in the blocks of GGML as they are, the rest as dense numbers.

A file has all that is known of its model; transformers makes a configuration and a tokenizer of it. Matrices of linear
layers keep their blocks (`ggml.py`), or are floats. The embedding and the output head, of whatever type, become the
numbers that llama.cpp dequantizes them to, in float32: computation has that dtype if no other is asked for.

Rows of q_proj and k_proj lie in another order in files of the llama family, which is undone: groups run along a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from quadapt.importers.gguf_family import names_of
from quadapt.quant.weight import Layout, QuantWeight

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_ADVICE = "quadapt.load gives it as dense numbers; to tune over codes, take a file of Q4_K, Q6_K, Q8_0 and the like"

_READ = tuple(family for family in FAMILIES.values() if family.read)
"""The families whose files are read as codes."""


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
        arch = _arch(reader)
        if arch not in {family.arch for family in _READ}:
            raise CheckpointError(f"is of {arch}, and GGUF files of {family_names(read=True)} are read. {_ADVICE}")
        matrices = [each for each in reader.tensors if each.name.startswith("blk.") and len(each.shape) > 1]
        for each in matrices:
            if len(each.shape) > 2:
                raise CheckpointError(f"{each.name}: is a stack of matrices (experts), which cannot be held. {_ADVICE}")
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
    family = next((family for family in _READ if family.arch == _arch(reader)), None)
    return config if family is None else completed(reader, family, config)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file by the names that they have in a model, each made when it is asked for.

    A layer in blocks has `NAME.blocks`, uint8 `[out, bytes of a row]`, and `NAME.type`, the number of GGML's type.

    Raises:
        CheckpointError: The file has a tensor that the model does not have.
    """

    def __init__(self, reader: GGUFReader, model: Any) -> None:
        self.family, self.config = FAMILIES[type(model).__name__], model.config
        name_of = names_of(self.family, model.config.num_hidden_layers)
        known = {name_of(name): name for name in model.state_dict()}
        head = model.get_output_embeddings()
        layers = {name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}
        self._found: dict[str, tuple[str, ReaderTensor]] = {}
        for tensor in reader.tensors:
            if tensor.name in (FREQUENCIES, *FACTORS.values()):  # part of the configuration, see `completed`
                continue
            if tensor.name not in known:
                raise CheckpointError(
                    f"{tensor.name}: {type(model).__name__} has no such tensor. The file is damaged, or of a later "
                    "sort of model"
                )
            name = known[tensor.name]
            layer, _, leaf = name.rpartition(".")
            blocks = layer in layers and leaf == "weight" and tensor.tensor_type.name in BLOCKS
            for part in (f"{layer}.blocks", f"{layer}.type") if blocks else (name,):
                self._found[part] = name, tensor

    def __getitem__(self, part: str) -> Tensor:
        name, tensor = self._found[part]
        if part.endswith(".type"):
            return torch.tensor(int(tensor.tensor_type))
        rows = torch.from_numpy(tensor.data) if part.endswith(".blocks") else _numbers(tensor)
        if self.family.shifts(name):
            rows = rows.float() - 1
        order = self.family.order(name, self.config, len(rows))
        return rows if order is None else rows[torch.from_numpy(order).argsort()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _numbers(tensor: ReaderTensor) -> Tensor:
    """The numbers of a tensor: floats as they are, blocks as the gguf package dequantizes them, in float32."""
    from gguf.quants import dequantize

    dtype = _FLOATS.get(tensor.tensor_type.name)
    if dtype is None:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    return torch.from_numpy(tensor.data).view(dtype)


def _arch(reader: GGUFReader) -> str:
    return str(reader.fields["general.architecture"].contents())


def _open(path: Path) -> GGUFReader:
    """What a file holds; its tensors are mapped, and each is read when it is used."""
    about = path.stat()
    return _opened(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: Path, _size: int, _changed: int) -> GGUFReader:
    import gguf

    return gguf.GGUFReader(path, "c")  # a mapping of its own, which torch may take for one that can be written
