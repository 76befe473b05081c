"""Run code when a module gets imported, and around functions of others: importing quadapt imports none of them."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

_waiting: dict[str, list[Callable[[], None]]] = {}


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once the module `name` has been imported: now, if it has been already."""
    if name in sys.modules and not getattr(sys.modules[name].__spec__, "_initializing", False):
        action()
        return
    _waiting.setdefault(name, []).append(action)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for as the others would, and has their action called after they have run."""

    _searching: ClassVar[set[str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting or fullname in self._searching:  # the search below comes through here again
            return None
        self._searching.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenCall(spec.loader, fullname)
        return spec


class _ThenCall(Loader):
    """A loader that calls the action once the module has run; a spec may also be looked up and never loaded."""

    def __init__(self, loader: Loader, name: str) -> None:
        self._loader, self._name = loader, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for action in _waiting.pop(self._name, []):
            action()

    def __getattr__(self, name: str) -> object:  # resource readers and the like
        return getattr(self._loader, name)


def wrap(owner: Any, name: str, around: str) -> None:
    """Replace a function or method by one that calls `around(function, ...)` instead, unless that has been done.

    Args:
        owner: The class or module that has it.
        name: The name of the function in its owner.
        around: Module and name, "quadapt.hf.doors:load": imported when it is first called, so that modules of ours may
            import PEFT, whose import gets here, in any order.
    """
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    stock = getattr(owner, name)
    if getattr(stock, "_quadapt", False):
        return
    module, _, function = around.partition(":")

    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(stock, *args, **kwargs)

    wrapped._quadapt = True  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)
