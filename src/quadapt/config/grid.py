"""Settings of the quantized weights: those of the method's pieces, and what is told beside them."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, field_serializer, model_validator

from quadapt.budget import BudgetPlan
from quadapt.budget.candidates import check_plannable
from quadapt.config.derive import adding, choice, fields_of, of_pieces
from quadapt.config.fields import Columns, Machine, Settings, Target, Walk
from quadapt.config.spec import Spec
from quadapt.config.values import Location, Sources
from quadapt.errors import ConfigError, locate
from quadapt.hf.head import Head
from quadapt.methods import METHODS, Method, Recipe, method_named
from quadapt.model.embeddings import TYPES
from quadapt.model.select import Part
from quadapt.quant.format import Format
from quadapt.quant.ranges import RANGES
from quadapt.quant.rounding import ROUNDINGS
from quadapt.quant.storage import STORAGES
from quadapt.setting import Count, Flag, Positive, Seed


def _method_or_name(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """From Python a method may be given itself."""
    return value if isinstance(value, Method) else check(value)


if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Annotated[Literal[tuple(METHODS)], WrapValidator(_method_or_name)]
    """One of the registered methods; from Python also a :class:`quadapt.methods.Method`."""


def with_planned_method(values: Any) -> Any:
    """Settings with the method of their plan, if none is given. What is wrong with the file is said when it is read."""
    if isinstance(values, dict) and isinstance(values.get("plan"), str) and not values.get("method"):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            found = json.loads(Path(os.path.expanduser(values["plan"])).read_text(encoding="utf-8")).get("method")
            return {**values, "method": found} if found in METHODS else values
    return values


def _merging(exactly: bool) -> str:
    """Names of the methods whose adapters merge exactly, or do not."""
    return ", ".join(name for name in METHODS if (method_named(name).adapter.exactness != "none") == exactly)


METHOD_WORDS = f"Preset of all that follows. Merge exactly: {_merging(True)}. Do not: {_merging(False)}."
"""What `--help` says about the choice of a method."""

_SCALES = [name for name, each in STORAGES.items() if each.for_scales and each.family is None]
"""Storages of scales that have no settings of their own; the others go by the names of their families."""

_FAMILIES = {each.family: each for each in STORAGES.values() if each.for_scales and each.family and each.serves(4)}
"""Of each family the one for codes of four bits, by the family's name."""


def _summaries() -> str:
    """Each of them in its own words, those of one kind together."""
    alike: dict[str, list[str]] = {}
    for name, each in [*((name, STORAGES[name]) for name in _SCALES), *_FAMILIES.items()]:
        alike.setdefault(each.summary, []).append(str(name))
    return "; ".join(f"{', '.join(names)}: {summary}" for summary, names in alike.items())


_PANEL = Flag(panel="Quantization")


@adding(
    {
        **fields_of(Format),
        **choice("rounding", ROUNDINGS, "From weights to codes.", _PANEL),
        **choice("range", RANGES, "Span of a group's levels.", _PANEL),
        **of_pieces(ROUNDINGS),
    }
)
class Grid(Settings):
    """How weights are quantized. What is not given is the method's own choice."""

    method: Annotated[
        MethodName,
        Flag((), "Quantization"),
        Field(description=METHOD_WORDS),
    ] = "qa-lora"

    plan: Annotated[Location | None, Flag((), "Quantization", reads=True)] = None
    """Plan of the bits of every layer: a file that quadapt plan has written. It decides the grid, and the method if
    none is given."""

    scales: Annotated[
        Literal[(*_SCALES, *_FAMILIES)] | None,  # type: ignore[valid-type]
        Flag((), "Quantization", of_piece=True),
        Field(
            description=f"How scales are stored. {_summaries()}. Here linear has 8 bits and 256, and k-quant chooses "
            "the type, the group size and the zero for the bits: 2 to 6. Default: the method's."
        ),
    ] = None

    skip: Annotated[tuple[str, ...], Flag((), "Quantization")] = ()
    """Layers to leave unquantized, by name or a part of it: down_proj, layers.0, .. (comma separated, or repeated)."""

    part: Annotated[Part, Flag((), "Quantization")] = "auto"
    """Which part of a model with towers for text and pictures is quantized and adapted: text, vision (all but text), or
    all. auto: the language model, where the model says which part that is; else all."""

    embeddings: Annotated[
        Literal[("float", *TYPES)],  # type: ignore[valid-type]
        Flag((), "Quantization"),
        Field(
            description="Round the input embedding, and a head that is not quantized, to the values of a type of "
            "llama.cpp's before all else. They stay floats here; a GGUF file holds them exactly, in 8.5 (q8_0) or "
            "6.5625 (q6_k) bits a weight. float: they stay as they are."
        ),
    ] = "float"

    calibration_data: Annotated[Sources, Flag((), "Quantization", reads=True)] = ()
    """Text to calibrate gptq and block-ap on: files, folders or hub names, read as --data is. Default for tune: the
    training data."""

    calibration_sequences: Annotated[Count, Flag((), "Quantization")] = 128
    """Sequences to calibrate on, at most."""

    calibration_length: Annotated[Count | None, Flag((), "Quantization")] = None
    """Their length in tokens. Default: the model's context, at most 2048."""

    @cached_property
    def spec(self) -> Spec:
        """What is made, resolved from all settings: the method, and how each layer is quantized.

        Raises:
            ConfigError: The choices contradict each other, or the plan.
            CheckpointError: The plan is damaged, or something else.
        """
        chosen = self._method()
        planned = self.budget_plan(chosen)
        return Spec.of(chosen, planned=planned, skip=self.skip, part=self.part).without_adapter()

    @property
    def head(self) -> Head | None:
        """The new head that the model gets when it is loaded; none, where nothing asks for one."""
        return None

    def _method(self) -> Method:
        """The method, with what was chosen otherwise."""
        given: Any = self.method
        chosen = method_named(given) if isinstance(given, str) else given
        return chosen.having(**{name: getattr(self, name) for name, flag in self.flags().items() if flag.of_piece})

    @field_serializer("method")
    def _named_method(self, value: Any) -> str:
        return value if isinstance(value, str) else value.name

    @model_validator(mode="before")
    @classmethod
    def _planned(cls, values: Any) -> Any:
        return with_planned_method(values)

    def budget_plan(self, chosen: Method) -> BudgetPlan | None:
        """The plan that is given, read, for a method.

        Raises:
            ConfigError: It is not there, or another setting contradicts it.
            CheckpointError: It is damaged, or something else.
        """
        from quadapt.hf.reading import read_json

        if self.plan is None:
            return None
        for name in ("bits", "group_size", "levels", "zero", "scales"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)!r} contradicts the plan {self.plan!r}. Leave one out")
        path = Path(self.plan)
        if not path.is_file():
            beside = [item.name for item in path.parent.glob("*.json")] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, beside)
            hint = f"Did you mean {str(path.parent / near[0])!r}?" if near else "Make one: quadapt plan MODEL"
            raise ConfigError(f"plan={self.plan!r} does not exist. {hint}")
        value = read_json(path)
        with locate(self.plan):
            found = BudgetPlan.from_json(value)
        check_plannable(chosen)
        levels = {layer.layout.format.levels for layer in found.layers.values()}
        if levels != {chosen.format.levels}:
            raise ConfigError(
                f"method={chosen.name!r} has levels={chosen.format.levels!r}, the plan {', '.join(sorted(levels))}. "
                f"Use --method {found.method}, or make a plan for {chosen.name}"
            )
        return found

    def given(self) -> list[str]:
        """Names of the grid settings that were set explicitly."""
        return [name for name in Grid.model_fields if name in self.model_fields_set and name not in ("method", "skip")]


class QuantizeConfig(Target, Grid, Columns, Walk):
    """Quantize a model to low bits."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """The folder or hub name of a dense model."""

    target_modules: Annotated[tuple[str, ...], Flag((), "Quantization")] = ()
    """Quantize only these layers, by name or a part of it. Default: all linear layers but the head."""

    seed: Annotated[Seed, Flag((), "Machine")] = 0
    """The seed of the choice of calibration text."""

    dry_run: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Print what would be done, the true bits per weight and the peak memory, and stop."""


@adding({"rank": fields_of(Recipe)["rank"]})
class PlanConfig(Columns, Machine):
    """Choose bits for every layer, so that a model fits a budget and errs least; quantize and tune take the plan."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """The folder or hub name of a dense causal language model."""

    budget: Annotated[Positive, Flag((), "Plan")]
    """True bits per weight that the quantized layers may take on average: 2.75, say."""

    output: Annotated[Location, Flag(("-o",), "Output", idle=True)] = "plan.json"
    """File to write; a figure goes beside it."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the output if it exists."""

    method: Annotated[MethodName, Flag((), "Plan")] = "lq-lora"
    """The method to plan for, which must train over codes; its kind of levels decides among which grids there is a
    choice."""

    count_adapters: Annotated[Literal["fp16", "nf8"] | None, Flag((), "Plan")] = None
    """Also count adapters in the budget, held as 16-bit floats or as nf8 (8.127 bits). Default: they do not count, as
    in the paper."""

    fisher: Annotated[Location | None, Flag((), "Plan", reads=True)] = None
    """Weight errors by diagonal Fisher information: text to gather it on, of the kinds that tune takes, or a
    safetensors file that holds it, a tensor of the weight's shape for each layer. Default: all weights count alike."""

    calibration_sequences: Annotated[Count, Flag((), "Plan")] = 128
    """Sequences of the text, at most."""

    calibration_length: Annotated[Count | None, Flag((), "Plan")] = None
    """Their length in tokens. Default: the model's context, at most 2048."""

    seed: Annotated[Seed, Flag((), "Machine")] = 0
    """The seed of the choice of calibration text."""

    target_modules: Annotated[tuple[str, ...], Flag((), "Plan")] = ()
    """Plan only these layers, by name or a part of it. Default: all linear layers but the head."""

    skip: Annotated[tuple[str, ...], Flag((), "Plan")] = ()
    """Layers to leave unquantized, by name or a part of it (comma separated, or repeated)."""

    cache: Annotated[Location | None, Flag((), "Output", idle=True)] = None
    """Folder that keeps the measured errors: an interrupted run goes on there, another budget takes seconds. Default:
    plan-errors beside the output."""
