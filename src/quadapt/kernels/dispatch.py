"""Which set of kernels serves a device.

`*reference.py` (plain torch) serves every device and is what the others are tested against; `*cpu.py` (numba) serves
the CPU, `*cuda.py` (Triton) CUDA devices. All have the same signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

MOST_TOKENS = {"cpu": 16, "cuda": 1}
"""Most tokens of the fused product on each device: measured with `python -m benchmarks decode`, and with `make gpu`.

One multiply-add for each weight and token goes, beyond these, over the time in which a dense matrix is made and
multiplied. An H200 took 0.7 of that time for one token, and 1.2 of it for two."""

_HAS_TRITON = find_spec("triton") is not None


def set_for(device: torch.device) -> str:
    """`cpu`, `cuda` or `reference`: the fastest set for tensors on `device`. Without Triton, CUDA has the last."""
    if device.type == "cpu" or (device.type == "cuda" and _HAS_TRITON):
        return device.type
    return "reference"


def kernels_for(device: torch.device, family: str = "") -> ModuleType:
    """The kernels of a family ("", "fake", "entropy") for `device`: numba and Triton are imported at the first call."""
    return _module(family, set_for(device))


@cache
def _module(family: str, chosen: str) -> ModuleType:
    return import_module(f"quadapt.kernels.{family}_{chosen}" if family else f"quadapt.kernels.{chosen}")


def codes_of_lane(bits: int) -> int:
    """How many codes stand in one lane of the CPU's fused product: what fits 32 bits and is whole bytes, or half."""
    return 8 if bits <= 4 else 4


def few(x: Tensor, group_size: int, columns: int) -> bool:
    """Whether the fused product serves inputs `[.., columns]`: few enough that it is faster than the dense one.

    A rule, not a timing: the same model must take the same path, and give the same bits, each time.
    """
    return (
        1 <= x.numel() // columns <= MOST_TOKENS.get(set_for(x.device), 0)
        and x.dtype != torch.float64
        and (group_size % 8 == 0 or group_size >= columns)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def at_once(tensor: Tensor) -> bool:
    """Whether a kernel on such a tensor may be called past torch's dispatcher, which costs as much as a small product.

    Nothing may be recorded meanwhile, neither a graph of gradients nor a program; and there must be numbers, which fake
    tensors lack.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in _PLAIN
        and tensor.device.type in ("cpu", "cuda")
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


R = TypeVar("R", covariant=True)


class Operator(Protocol[R]):
    """A function that is an operator in traced programs."""

    def __call__(self, *arguments: Any, **named: Any) -> R: ...

    def register_fake(self, fake: Callable[..., Any]) -> Any:
        """Say what the result looks like, for programs that are traced without numbers."""


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., R]], Operator[R]]:
    """Make a function an opaque operator of torch's, which is called as it is where nothing is traced (`at_once`).

    Args:
        name: Of the operator in `torch.ops`, with its namespace.
        mutates: Names of the tensors that it changes in place.
    """

    def make(function: Callable[..., R]) -> Operator[R]:
        traced: Any = torch.library.custom_op(name, function, mutates_args=tuple(mutates))

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> R:
            first = arguments[0] if arguments else next(iter(named.values()))
            found: R = (function if at_once(first) else traced)(*arguments, **named)
            return found

        call.register_fake = traced.register_fake  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return make
