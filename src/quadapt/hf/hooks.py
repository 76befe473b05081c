"""Run code when a module gets imported, so that `import quadapt` need not import transformers and PEFT (five to ten seconds)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_waiting: dict[str, Callable[[], None]] = {}


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once the module `name` has been imported: now, if it has been already."""
    if name in sys.modules and not getattr(sys.modules[name].__spec__, "_initializing", False):
        action()
        return
    _waiting[name] = action
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for as the others would, and calls their action after they have run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = _waiting.pop(fullname, None)  # popped first: the search below comes through here again
        if action is None:
            return None
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _ThenCall(spec.loader, action)
        return spec


class _ThenCall(Loader):
    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action()

    def __getattr__(self, name: str) -> object:  # resource readers and the like
        return getattr(self._loader, name)
