"""Registries: every piece of the library is known by its name, and says that name itself, where it is defined.

A registry belongs to an axis ("start", "adapter", "exporter", ..). It finds its pieces in two places: the modules of
its own packages, all of which are imported when a name is first looked up, so that a new piece is one new file; and the
entry points of other installed packages, whose group is `quadapt.` and the plural of the axis::

    [project.entry-points."quadapt.adapters"]
    my-adapter = "my_package.adapter:MyAdapter"

Choices of settings, tables of the documentation and lists of benchmarks are made from what a registry holds.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from quadapt.errors import ConfigError

T = TypeVar("T")
D = TypeVar("D")


class Registry(Mapping[str, T], Generic[T]):
    """Pieces of one axis, by name; a read-only mapping in the order of the names.

    Args:
        axis: What the pieces are, in the singular, as error messages say it: `start`.
        packages: The packages whose modules define them: `quadapt.nn.starts`.
        group: Group of entry points through which other packages add theirs. Default: `quadapt.` and the plural of
            the axis.
    """

    def __init__(self, axis: str, *packages: str, group: str | None = None) -> None:
        self.axis, self.packages, self.group = axis, packages, group or f"quadapt.{axis}s"
        self._pieces: dict[str, T] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[D], D]:
        """A decorator that makes a class, or a function, known by a name; a class has it as its `name` from then on.

        Raises:
            ConfigError: The name is taken by another piece.
        """

        def add(piece: D) -> D:
            self._add(name, piece)
            return piece

        return add

    def _add(self, name: str, piece: object) -> None:
        taken = self._pieces.get(name)
        if taken is not None and _where(taken) != _where(piece):  # a module that is loaded again is none other
            raise ConfigError(f"{self.axis} {name!r} is {_where(taken)} already, and cannot be {_where(piece)} too")
        self._pieces[name] = piece  # type: ignore[assignment] # what a decorator is put on is of the axis
        if isinstance(piece, type):
            piece.name = name  # type: ignore[attr-defined]

    def own(self) -> dict[str, T]:
        """The pieces that are known without a look at other packages: all of the own ones are."""
        for package in self.packages:
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
        return dict(self._pieces)

    def _load(self) -> dict[str, T]:
        if not self._complete:
            self._complete = True  # first: what is imported below may look up names
            self.own()
            for entry in entry_points(group=self.group):
                piece = entry.load()
                if entry.name not in self._pieces:
                    self._add(entry.name, piece)
        return self._pieces

    def __getitem__(self, name: str) -> T:
        """Look up the piece that is registered under a name.

        Raises:
            ConfigError: There is none; the message has what may have been meant.
        """
        known = self._load()
        if name not in self:
            near = difflib.get_close_matches(str(name), known)
            hint = f"Did you mean {near[0]}?" if near else f"Use {', '.join(self)}"
            raise ConfigError(f"{self.axis}={name!r} is unknown. {hint}")
        return known[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._load()  # what stands in files may be anything

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())


def _where(piece: object) -> str:
    """Module and name of a class or function."""
    return f"{getattr(piece, '__module__', '?')}.{getattr(piece, '__qualname__', piece)}"
