"""What a family of models is to llama.cpp: the names of its tensors, the order of their rows, and what is computed.

Read and written files have these in common. The families themselves are declared in `gguf_families.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RowOrder = Callable[[Any, int], np.ndarray]
"""From a configuration and a number of rows, the rows of a matrix in the order in which a file holds them, int64
`[rows]`: row `order[i]` of transformers' matrix is row `i` of the file's."""

Of = str | Callable[[Any], Any]
"""Where a number of the metadata comes from: a field of the configuration, or a function of all of it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp knows the models of one class of transformers."""

    arch: str
    """The name of the architecture in GGUF files, `general.architecture`."""

    metadata: Mapping[str, Of]
    """What a file says of the model, by its keys there without the name of the architecture before them. A value of
    None is not written."""

    computes: Mapping[str, tuple[Any, ...] | Callable[[Any], Any]] = field(default_factory=dict)
    """What a file does not say, and llama.cpp takes for granted: the values that a field of the configuration may
    have, or a function of the configuration that gives the only one."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of names in transformers that the `gguf` package's table of names has otherwise."""

    shown: Mapping[str, str] = field(default_factory=dict)
    """Fields of the configuration that are true if a file has a certain tensor, and what its name is there."""

    rows: Mapping[str, RowOrder] = field(default_factory=dict)
    """Layers whose rows lie in another order in a file, by the last part of their names."""

    ropes: tuple[str, ...] = ("default", "linear")
    """The kinds of rotary embedding that a file can say; none if the family has no rotary embedding."""

    partial: bool = False
    """Whether the rotary embedding may turn a part of each head."""

    windows: bool = False
    """Whether llama.cpp lets the layers attend to the last `sliding_window` tokens alone that do so in transformers."""

    norms_from_one: bool = False
    """Whether transformers stores the scales of norms less one; in a file they are what inputs are multiplied by."""

    own_head: bool = False
    """Whether a file needs an output head of its own also where it is the embedding."""

    besides: tuple[str, ...] = ()
    """Where the names of tensors begin that a file leaves out: those for pictures, which llama.cpp has in another."""

    read: bool = True
    """Whether files are read, too: transformers makes the configuration of a file, if it knows the architecture."""

    @property
    def experts(self) -> bool:
        """Whether its layers have experts."""
        return "expert_count" in self.metadata

    def order(self, name: str, config: Any, rows: int) -> np.ndarray | None:
        """The order in which a file holds the rows of the tensor `name` of transformers; None if it is the same."""
        layer = name.split(".")[-2] if "." in name else ""
        return self.rows[layer](config, rows) if layer in self.rows else None

    def shifts(self, name: str) -> bool:
        """Whether a file holds the tensor `name` of transformers plus one."""
        return self.norms_from_one and name.endswith("norm.weight")


_ONE_OF_SEVERAL = re.compile(r"(\.experts)\.\d+|\.norms\.\d+")
"""What tells one of several tensors from the others, where a file holds them in one."""


def one_of_several(name: str) -> bool:
    """Whether a tensor of transformers is one of several that a file holds in one."""
    return _ONE_OF_SEVERAL.search(name) is not None


def names_of(family: Family, blocks: int) -> Callable[[str], str | None]:
    """A function from a tensor's name in transformers to its name in GGUF, by the `gguf` package's own table.

    The function gives None for a tensor that the family does not have. Those that a file holds in one (of all
    experts of a layer, norms of all heads) have one name.
    """
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, blocks)

    def name_of(name: str) -> str | None:
        name = _ONE_OF_SEVERAL.sub(r"\1", name)
        for own, known in family.renamed.items():
            name = name.replace(own, known)
        found: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    return name_of


def pairs(heads: str) -> RowOrder:
    """Rows of heads from transformers' order for the rotary embedding (halves) into that of the llama family (pairs).

    transformers turns row `i` of a head with row `i + half`, llama.cpp's llama neighbouring ones (0 and 1, 2 and 3).

    Args:
        heads: The field of the configuration that says how many heads there are.
    """

    def order(config: Any, rows: int) -> np.ndarray:
        return np.arange(rows).reshape(getattr(config, heads), 2, -1).swapaxes(1, 2).ravel()

    return order


def apart(groups: Callable[[Any], int]) -> RowOrder:
    """Rows of a layer for query, key and value, which transformers holds group by group, into all of each.

    A group is the queries that share a key, then this key and its value.

    Args:
        groups: From a configuration, how many keys there are.
    """

    def order(config: Any, rows: int) -> np.ndarray:
        keys = groups(config)
        each = np.arange(rows).reshape(keys, config.num_attention_heads // keys + 2, -1)
        return np.concatenate([part.ravel() for part in (each[:, :-2], each[:, -2], each[:, -1])])

    return order
