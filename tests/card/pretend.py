"""A pretended accelerator, `card`: its tensors lie on the CPU and behave as if they did not.

An operator that is given tensors of the card beside others raises, as on a GPU. Bytes on the card are counted while
they live, and so are the moments at which the host would wait for the card. Results are those of the same operators on
the CPU, so that what is computed on the card may be compared bit for bit with what is computed without it.

torch takes a new kind of device only before its first backward: import this before anything runs. These tests have a
process of their own (`test_card.py`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    """What `torch.card` says of itself."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("card", backend_module=_Module())
CARD = torch.device("card:0")
_ATEN = torch.ops.aten
_CROSSING = {_ATEN._to_copy.default, _ATEN.copy_.default}
"""Operators that may see tensors of two devices."""


class Ledger:
    """What the card holds, and how often it was waited for."""

    def __init__(self) -> None:
        self.now = self.peak = self.waits = self.operators = 0
        """Bytes held, and most of them at once; times waited for the card; operators on it. All since `reset`."""
        self._known: dict[int, int] = {}

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's memory once, until it is let go."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def reset(self) -> None:
        """Begin to count anew. What is held now (tables that are made once for a device, say) counts for nothing."""
        gc.collect()
        self._known = dict.fromkeys(self._known, 0)
        self.now = self.peak = self.waits = self.operators = 0


ledger = Ledger()


class OnCard(Tensor):
    """A tensor on the card."""

    inner: Tensor
    """Its values, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        size, strides, start = inner.shape, inner.stride(), inner.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, size, dtype=inner.dtype, strides=strides, storage_offset=start, device=CARD
        )
        made.inner = inner
        ledger.count(inner)
        return made

    def tolist(self) -> Any:
        """As of any tensor; torch refuses it to subclasses."""
        ledger.waits += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        if function not in _CROSSING and any(not isinstance(each, OnCard) and each.ndim for each in tensors):
            raise RuntimeError(f"{function}: expected all tensors to be on the card")
        stays = isinstance(tensors[0], OnCard)
        if kwargs.get("device") is not None:
            stays, kwargs = kwargs["device"].type == "card", {**kwargs, "device": "cpu"}
        ledger.operators += 1
        ledger.waits += not stays or function is _ATEN._local_scalar_dense.default
        plain_args = _each(_inner, args)
        result = function(*plain_args, **{name: _each(_inner, each) for name, each in kwargs.items()})
        if not stays:
            return result.clone() if any(result is each for each in plain_args) else result
        return _each(_outer, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnCard) else value


def _outer(value: Any) -> Any:
    return OnCard(value) if isinstance(value, Tensor) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from _tensors(each)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """Change every tensor that an operator takes or gives: lists are all it knows, and torch's own walk is slow."""
    return type(value)([_each(change, each) for each in value]) if isinstance(value, (list, tuple)) else change(value)


def _made(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Operators that are given no tensor: `torch.empty` and its like."""
    assert not any(True for _ in _tensors((*args, *kwargs.values()))), function
    return _each(_outer, function(*args, **{**kwargs, "device": "cpu"}))


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    """What `torch.tensor(.., device="card")` fills its result with."""
    assert isinstance(target, OnCard)
    target.inner.copy_(source)
    return target


_libraries = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_libraries[0].fallback(_made, "PrivateUse1")
_libraries[1].impl("copy_", _copied, "PrivateUse1")
