"""The specification of a run: settings are resolved into it once, and it is handed down from there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from quadapt.budget import BudgetPlan
from quadapt.config.values import allowed, shown
from quadapt.errors import ConfigError, locate
from quadapt.methods import Method
from quadapt.model.layer import Quantization
from quadapt.model.select import Part, matching
from quadapt.nn.starts import Zero
from quadapt.setting import MOST


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Where adapters differ from layer to layer, and how they are scaled."""

    excluded: tuple[str, ...] = ()
    """Layers that get no adapter, by name."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of layers by name, where they are not the recipe's."""

    alphas: Mapping[str, float] = field(default_factory=dict)
    """Alphas of layers by name, where they are not the recipe's."""

    rslora: bool = False
    """Whether adapters are multiplied by alpha / sqrt(rank)."""

    def check(self, method: Method) -> None:
        """Raise ConfigError if the method cannot have adapters of this shape."""
        if method.start.name != Zero.name and (self.excluded or self.ranks or self.alphas or self.rslora):
            raise ConfigError(
                f"start={method.start.name!r} is fitted with one rank and scaling for all layers. Leave "
                "exclude_modules, rank_pattern, alpha_pattern and use_rslora out, or use --start zero"
            )

    def layers(self, names: Sequence[str]) -> dict[str, Any]:
        """What PEFT's config says about these layers, each by its full name.

        Raises:
            ConfigError: A name matches none of them.
        """
        found: dict[str, dict[str, Any]] = {}
        for option, patterns in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas)):
            found[option] = {
                f"^{re.escape(name)}": value
                for pattern, value in patterns.items()
                for name in matching(names, [pattern])
            }
        return {**found, "use_rslora": self.rslora}


def by_layer(setting: str, given: Sequence[str]) -> dict[str, Any]:
    """Numbers by the names of layers, from `NAME=NUMBER`.

    Raises:
        ConfigError: One is not of this form.
    """
    kind = int if setting == "rank_pattern" else float
    found: dict[str, Any] = {}
    for each in given:
        name, _, number = each.rpartition("=")
        try:
            found[name] = kind(number)
        except ValueError:
            found[name] = 0
        if not name or not 0 < found[name] < MOST:
            wanted = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{setting}={each!r}: must be NAME={wanted} above 0, such as q_proj=16")
    return found


@dataclass(frozen=True)
class Spec:
    """What is made: by which method, with which grid for each layer. Made by :meth:`of` from flags, YAML or Python."""

    method: Method
    """The method with all its pieces; whatever was chosen otherwise is in it."""

    quantization: Quantization
    """How each layer is quantized, and where its adapter starts."""

    skip: tuple[str, ...] = ()
    """Layers that stay unquantized, by name or a part of it."""

    target_modules: tuple[str, ...] = ()
    """Layers that get adapters, by name or a part of it; empty for all."""

    also: tuple[str, ...] = ()
    """What trains beside adapters: norms, biases, embeddings, head."""

    part: Part = "auto"
    """The part of a model with several towers that is quantized, and adapted."""

    shape: Shape = Shape()
    """Where adapters differ from layer to layer, and how they are scaled."""

    alone: bool = False
    """Whether a base is made for itself, and no adapter is trained over it at once."""

    @property
    def dense_base(self) -> bool:
        """Whether what is quantized becomes dense again, for an adapter over dense matrices that begins with it."""
        return self.method.begins_rounded and not self.alone

    @classmethod
    def of(
        cls,
        method: Method,
        *,
        planned: BudgetPlan | None = None,
        skip: Sequence[str] = (),
        target_modules: Sequence[str] = (),
        also: Sequence[str] = (),
        part: Part = "auto",
        shape: Shape | None = None,
    ) -> Spec:
        """Resolve a method into what each layer of a model gets.

        Args:
            method: With everything that was chosen otherwise.
            planned: Grids of single layers by an integer program, if there is such a plan.
            skip: Layers to leave unquantized.
            target_modules: Layers that get adapters; empty for all.
            also: What trains beside adapters.
            part: The part of a model with several towers.
            shape: Where adapters differ from layer to layer; by default nowhere.

        Raises:
            ConfigError: Two of the choices contradict each other, or the plan.
        """
        pieces = (method.rounding, method.start, method.adapter, method.objective, method.tune_first)
        for piece in (method.recipe, *pieces):
            check_values(piece)
        method.check()
        shape = shape or Shape()
        shape.check(method)
        if method.recipe.also_learning_rate is not None and not also:
            raise ConfigError("also_learning_rate is for what train_also names, which is nothing. Leave it out")
        format, storage, rounding = method.base()
        quantization = Quantization(
            format=format,
            storage=storage,
            rounding=rounding,
            start=method.start,
            rank=method.recipe.rank,
            pooled=method.adapter.begins == "offsets",
            adapted=tuple(target_modules),
        )
        if planned is not None:
            layouts = {name: layer.layout for name, layer in planned.layers.items()}
            for name, layout in layouts.items():
                with locate(name):
                    rounding.check(layout)
            quantization = replace(
                quantization,
                layers={name: (layout.format, layout.storage) for name, layout in layouts.items()},
                shapes={name: (layout.out, layout.columns) for name, layout in layouts.items()},
            )
        return cls(method, quantization, tuple(skip), tuple(target_modules), tuple(also), part, shape)

    def without_adapter(self) -> Spec:
        """The spec of a base alone: training does not go on from it at once, so no start is fitted."""
        bare = replace(self.quantization, start=Zero(), rank=0, pooled=False, adapted=())
        if self.method.begins_rounded:
            bare = replace(bare, rounding=self.method.rounding)
        return replace(self, quantization=bare, also=(), alone=True)


def check_values(piece: Any) -> None:
    """Check the values of a piece's fields against their types and ranges, as those of flags are.

    Raises:
        ConfigError: One is not what its field takes.
    """
    for each in fields(piece):
        value = getattr(piece, each.name)
        cls: Any = type(piece)
        adapter, hint = _adapter(cls, each.name)
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            words = allowed(FieldInfo(annotation=hint)) or error.errors()[0]["msg"].lower()
            words = words.removeprefix("input should be ")
            raise ConfigError(f"{each.name}={shown(value)} of {type(piece).__name__}: must be {words}") from None


@cache
def _adapter(piece: type, name: str) -> tuple[TypeAdapter[Any], Any]:
    hint = get_type_hints(piece, include_extras=True)[name]
    return TypeAdapter(hint, config=None), hint
