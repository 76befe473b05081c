"""What a method is: a choice along the library's axes, and the recipe of its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, TypeVar

from quadapt.errors import ConfigError
from quadapt.methods.first import FIRSTS, First, Untuned
from quadapt.methods.recipe import Recipe
from quadapt.nn.adapters import ADAPTERS, Adapter
from quadapt.nn.objective import OBJECTIVES, CrossEntropy, Objective
from quadapt.nn.starts import STARTS, Start, Zero
from quadapt.quant.fixed_point import fixed_point
from quadapt.quant.format import Format
from quadapt.quant.rounding import ROUNDINGS, Nearest, Rounding
from quadapt.quant.storage import Storage, scales_meant
from quadapt.quant.weight import Layout
from quadapt.registry import Registry
from quadapt.setting import settings_of

D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A choice of grid, storage, rounding, start, adapter, objective and recipe.

    ::

        method = qa_lora(bits=3).having(act_order=True, rank=16)
        method = replace(method, start=LQ(fisher=True))

    An adapter that has a grid of its own (L4Q, LR-QAT) is given the method's.

    Raises:
        ConfigError: The adapter cannot train the grid.
    """

    name: str = "custom"
    """The name that is noted in what is written; for a registered method the name under which it is registered."""

    paper: str = ""
    """The number of the paper on arXiv; empty if there is none."""

    format: Format
    """The grid that quantized weights lie on."""

    storage: Storage
    """How scales and offsets are held."""

    rounding: Rounding
    """The rounding, which turns weights into codes."""

    adapter: Adapter
    """The adapter, which says what trains."""

    start: Start = field(default_factory=Zero)
    """What the adapter and its base start from."""

    objective: Objective = field(default_factory=CrossEntropy)
    """The objective, which says what training lowers."""

    recipe: Recipe
    """The learning rate, the rank and the schedule with which the paper trains."""

    tune_first: First = field(default_factory=Untuned)
    """What becomes of the dense model before it is quantized."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter", self.adapter.with_grid(self.format, self.storage))

    @property
    def begins_rounded(self) -> bool:
        """Whether an adapter over dense matrices begins with the codes and the grid that the rounding chooses.

        By itself (rounding to nearest over the whole range) it begins with the matrix and a first grid of its own.
        """
        return self.adapter.base == "float" and self.rounding != Nearest()

    def base(self) -> tuple[Format, Storage, Rounding]:
        """Grid and storage of the product, and the rounding that makes what the adapter trains over."""
        fine = self.adapter.base == "fixed-point" or self.begins_rounded
        return self.format, self.storage, fixed_point(self.rounding) if fine else self.rounding

    def with_format(self, format: Format) -> Method:
        """Take another grid, with storage to match: the method's own where it fits, else the new grid's default."""
        try:
            self.storage.check(format)
            storage = self.storage if format.bits != 8 or self.format.bits == 8 else Storage.default(format)
        except ConfigError:
            storage = Storage.default(format)
        return replace(self, format=format, storage=storage)

    def having(self, **settings: Any) -> Method:
        """Take other settings, each put into the piece where it belongs.

        Args:
            settings: By name: fields of the grid (`levels`, `bits`, `group_size`, `zero`); `scales`, how scales are
                stored (fp16, fp32, double, linear, k-quant); a piece (`rounding`, `start`, `objective`, `tune_first`),
                by its name or itself; fields of the pieces (`range`, `damping`, `pooling`, ..) and of the recipe
                (`rank`, `learning_rate`, ..). None leaves the method's own.

        Raises:
            ConfigError: None of the method's pieces has such a setting; the message says which pieces do.
        """
        left = {name: value for name, value in settings.items() if value is not None}
        grid: dict[str, Any] = {
            name: left.pop(name) for name in ("levels", "bits", "group_size", "zero") if name in left
        }
        found = self._with_scales(left.pop("scales", None), grid)
        for axis, registry in PIECES.items():
            if axis in left:
                found = replace(found, **{axis: found._piece(axis, registry, left.pop(axis))})
        recipe = {name: left.pop(name) for name in Recipe.__dataclass_fields__ if name in left}
        found = replace(found, recipe=replace(found.recipe, **recipe))
        for name, value in left.items():
            axis, own = found._owner(name)
            found = replace(found, **{axis: replace(getattr(found, axis), **{own: value})})
        return found

    def _format(self, **grid: Any) -> Format:
        same = grid.get("levels", self.format.levels) == self.format.levels
        own = {"levels": self.format.levels, "bits": self.format.bits, "group_size": self.format.group_size}
        return Format(**{**own, "zero": self.format.zero if same else "default", **grid})

    def _with_scales(self, scales: str | None, grid: dict[str, Any]) -> Method:
        """With another grid, and scales stored otherwise, or in the super-blocks for another width.

        Raises:
            ConfigError: Such scales determine a field of the grid, and another value is asked for.
        """
        own = self.storage.of_scales
        if scales is None and own.demands and "bits" in grid:
            scales = own.family
        if scales is None:
            return self.with_format(self._format(**grid)) if grid else self
        meant = scales_meant(scales, grid.get("bits", self.format.bits))
        for name, value in meant.demands.items():
            if grid.get(name, value) != value:
                raise ConfigError(
                    f"scales={scales!r} have {name}={value!r} at {self._format(**grid).bits} bits, not "
                    f"{grid[name]!r}. Leave {name} out, or use fp16 scales"
                )
        found = self.with_format(self._format(**{**grid, **meant.demands}))
        return replace(found, storage=found.storage.with_scales(meant.name))

    def _piece(self, axis: str, registry: Registry[type[Any]], given: Any) -> Any:
        """A piece by its name, with the settings of the method's own that it has too; or the piece that is given."""
        own = getattr(self, axis)
        if not isinstance(given, str):
            return given
        cls = registry[given]
        if type(own) is cls:
            return own
        kept = {each.name: getattr(own, each.name) for each in fields(own) if each.name == "range"}
        return cls(**{name: value for name, value in kept.items() if name in cls.__dataclass_fields__})

    def _owner(self, name: str) -> tuple[str, str]:
        """The axis, and the field of its piece, that are set by a name."""
        for axis in ("rounding", "start", "adapter", "objective", "tune_first"):
            own = names_of(type(getattr(self, axis)))
            if name in own:
                return axis, own[name]
        raise ConfigError(self._homeless(name))

    def _homeless(self, name: str) -> str:
        """What to say of a setting that none of the pieces has."""
        for axis, registry in PIECES.items():
            owners = [each for each, cls in registry.items() if name in names_of(cls)]
            if owners:
                return (
                    f"{name} is a setting of the {axis} {' or '.join(owners)}, and here it is "
                    f"{getattr(self, axis).name}. Use {axis}={owners[0]!r} (--{axis} {owners[0]}), or leave it out"
                )
        adapters = {each for each, adapter in ADAPTERS.items() if name in names_of(adapter)}
        users = [each for each in METHODS if adapters and method_named(each).adapter.kind in adapters]
        if users:
            return (
                f"{name} is a setting of the adapter of {', '.join(users)}; method={self.name!r} has another "
                f"({self.adapter.kind}). Leave it out, or use one of these methods"
            )
        return f"{name} is no setting of a method, nor of any of its pieces. See Method.having"

    def check(self) -> None:
        """Raise ConfigError if two of the choices contradict each other."""
        if self.recipe.dense_steps and self.adapter.base != "float":
            raise ConfigError(
                f"dense_steps needs the dense matrix; method={self.name!r} trains over codes. Leave it out"
            )
        if self.begins_rounded and not self.adapter.takes_grid:
            raise ConfigError(
                f"rounding={self.rounding.name!r}: the {self.adapter.kind} adapter of method={self.name!r} chooses its "
                "first grid itself. Leave rounding and range out"
            )
        if self.recipe.dense_steps and self.begins_rounded:
            raise ConfigError(
                f"dense_steps end in a first grid of their own, and rounding={self.rounding.name!r} chooses one before "
                "them. Leave one out"
            )
        begun = self.start.fits
        if begun and self.adapter.begins == "zero":
            raise ConfigError(
                f"start={self.start.name!r}: the {self.adapter.kind} adapter of method={self.name!r} has nothing "
                "to start from but zero. Leave it out"
            )
        offsets = self.storage.of_offsets
        if begun and self.adapter.begins == "offsets" and not (offsets.free and offsets.together):
            raise ConfigError(
                f"start={self.start.name!r} is folded into float offsets, and these are {self.storage.offsets}. "
                "Use zero='float', and fp16 or fp32 scales"
            )
        layout = Layout(format=self.format, storage=self.storage, out=1, columns=1)
        self.rounding.check(layout)
        self.adapter.check(layout, self.recipe.rank, self.recipe.dropout)

    @property
    def summary(self) -> str:
        """One line for lists: the first of the registered function's docstring."""
        words = (METHODS[self.name].__doc__ or "") if self.name in METHODS else ""
        return words.strip().partition("\n")[0]


PIECES: Mapping[str, Registry[type[Any]]] = {
    "rounding": ROUNDINGS,
    "start": STARTS,
    "objective": OBJECTIVES,
    "tune_first": FIRSTS,
}
"""The axes whose pieces are chosen by name beside the method's."""


class _Methods(Registry[Callable[..., Method]]):
    """Methods by name; what a function gives is called by the name under which it is registered."""

    def register(self, name: str) -> Callable[[D], D]:
        def add(function: Any) -> Any:
            @wraps(function)
            def named(*args: Any, **settings: Any) -> Method:
                return replace(function(*args, **settings), name=name)

            self._add(name, named)
            return named

        return add


METHODS = _Methods("method", "quadapt.methods")
"""Every method by the name that the command line takes: a function of its settings."""


def names_of(piece: type) -> dict[str, str]:
    """The fields of a piece by the names under which they are set."""
    declared = {each.name: name for name, each in settings_of(piece).items()}
    return {declared.get(each.name, each.name): each.name for each in fields(piece)}


def method_named(name: str, **settings: Any) -> Method:
    """The method called `name`, with settings as :meth:`Method.having` takes them.

    Raises:
        ConfigError: There is none, or a setting does not fit.
    """
    return METHODS[name]().having(**settings)
