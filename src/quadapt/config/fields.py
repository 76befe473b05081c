"""What settings are made of: fields with their words, groups that several commands share, and how they are checked."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_serializer,
    field_validator,
    model_validator,
)

from quadapt.config.values import GroupSize, Location, Sources, check_plain
from quadapt.errors import ConfigError, locate
from quadapt.setting import Count, Flag, Whole
from quadapt.widths import Width

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from quadapt.budget import BudgetPlan
    from quadapt.config.spec import Spec
    from quadapt.methods import Method

MethodName = Literal[
    "qa-lora",
    "qlora",
    "loftq",
    "quailora",
    "cloq",
    "gptq-lora",
    "lq-lora",
    "qa-lora-scales",
    "ir-qlora",
    "ir-qa-lora",
    "peqa",
    "e2e-qp",
    "efficientqat",
    "l4q",
    "qat-lora",
    "lr-qat",
]
"""The keys of `methods.METHODS` (a test compares them)."""
StartName = Literal["zero", "loftq", "lq", "quailora", "cloq", "qera"]
"""The keys of `nn.starts.STARTS` (likewise)."""
DType = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Base of all settings: unknown names are errors, values do not change."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def flags(cls) -> dict[str, Flag]:
        """What is declared of each field beside its type."""
        return {
            name: next((item for item in field.metadata if isinstance(item, Flag)), Flag())
            for name, field in cls.model_fields.items()
        }

    def idle(self) -> set[str]:
        """Names of the settings that do not change the result, see :class:`Flag`."""
        return {name for name, flag in self.flags().items() if flag.idle}

    def effective(self) -> dict[str, Any]:
        """The settings as JSON, each as it acts: where a default depends on others, the value that it comes to."""
        return self.model_dump(mode="json")

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Files, folders and names of the hub that are read, by the setting that names them."""
        found = {name: getattr(self, name) for name, flag in self.flags().items() if flag.reads}
        return {
            name: (value,) if isinstance(value, str) else tuple(map(str, value))
            for name, value in found.items()
            if value
        }

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without what was made of the old settings."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("spec", None)
        return copy

    @field_validator("target_modules", "skip", mode="before", check_fields=False)
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        """`a,b` and repeated flags are the same."""
        parts = [value] if isinstance(value, str) else () if value is None else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("must be a name, or a list of names. Put numbers in quotes")
        return tuple(name for part in parts for name in part.split(",") if name)

    @field_validator("*", mode="before")
    @classmethod
    def _as_given(cls, value: Any, info: ValidationInfo) -> Any:
        return check_plain(value, cls.model_fields[str(info.field_name)])


class Machine(Settings):
    """Where and how to compute."""

    dtype: Annotated[DType, Flag(("--torch-dtype",), "Machine")] = "auto"
    """Of the computation and of what is not quantized; auto: as the model is stored."""

    device: Annotated[str, Flag((), "Machine")] = "auto"
    """cpu, cuda, cuda:1, ..; auto: a GPU if there is one."""

    trust_remote_code: Annotated[bool, Flag((), "Machine", idle=True)] = False
    """Run code that comes with a model. Off: such models are refused."""


class Walk(Machine):
    """Where and how to work through a dense model."""

    offload: Annotated[Literal["auto", "none", "cpu"], Flag((), "Machine", idle=True)] = "auto"
    """Where the dense model is while a GPU quantizes it. none: on the GPU. cpu: mapped from its files (what memory does
    not hold is read again), one block at a time on the GPU. auto: on the GPU if it fits. Results are the same."""


class RowsOfData(Settings):
    """What becomes of rows of data that cannot be used."""

    max_bad_rows: Annotated[Whole | None, Flag((), "Data", idle=True)] = None
    """Skip and count rows that cannot be used, up to so many. Default: a thousandth of the rows, at least 10, and no
    more than there are good ones."""

    strict: Annotated[bool, Flag((), "Data", idle=True)] = False
    """Skip no row: the first one that cannot be used is an error."""

    @field_validator("strict")
    @classmethod
    def _one_limit(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("max_bad_rows"):
            raise ValueError(f"no bad row is allowed, and max_bad_rows={info.data['max_bad_rows']}. Leave one out")
        return value

    @property
    def most_bad_rows(self) -> int | None:
        """The limit that holds; None for the default."""
        return 0 if self.strict else self.max_bad_rows


class Target(Settings):
    """Where results go."""

    output: Annotated[Location, Flag(("-o", "--output-dir"), "Output", idle=True)]
    """Folder to write. It appears when the work is complete; an interrupted command, given again, goes on."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the output if it exists."""


def _method_or_name(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """From Python a method may be given itself."""
    if value is None or isinstance(value, str | bool | int | float | list | dict | tuple):
        return check(value)
    from quadapt.methods import Method

    if not isinstance(value, Method):
        raise ValueError("must be the name of a method, or a quadapt.methods.Method")
    return value


MethodOrName = Annotated[MethodName, WrapValidator(_method_or_name)]


def with_planned_method(values: Any) -> Any:
    """Settings with the method of their plan, if none is given. What is wrong with the file is said when it is read."""
    if isinstance(values, dict) and isinstance(values.get("plan"), str) and not values.get("method"):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            found = json.loads(Path(os.path.expanduser(values["plan"])).read_text(encoding="utf-8")).get("method")
            return {**values, "method": found} if found in get_args(MethodName) else values
    return values


class Grid(Settings):
    """How weights are quantized. What is not given is the method's own choice."""

    method: Annotated[MethodOrName, Flag((), "Quantization")] = "qa-lora"
    """Preset of all that follows. Merge exactly: qa-lora, ir-qa-lora, qa-lora-scales, peqa, e2e-qp, efficientqat, l4q,
    lr-qat. Do not: qlora, loftq, quailora, cloq, lq-lora, ir-qlora, gptq-lora, qat-lora."""

    plan: Annotated[Location | None, Flag((), "Quantization", reads=True)] = None
    """Plan of the bits of every layer: a file that quadapt plan has written. It decides the grid, and the method if
    none is given."""

    bits: Annotated[Width | None, Flag((), "Quantization")] = None
    """Width of a code: 2, 3, 4 or 8, and 5 or 6 for integers. Default: the method's, 4."""

    group_size: Annotated[GroupSize | None, Flag((), "Quantization")] = None
    """Inputs that share a scale: 16 to 256 in steps of 16, or -1 for whole rows. Default: the method's."""

    levels: Annotated[Literal["int", "nf", "nf-sym"] | None, Flag(("--quant-type",), "Quantization")] = None
    """int: evenly spaced. nf: NormalFloat. nf-sym: symmetric nf2. Default: the method's."""

    zero: Annotated[Literal["none", "integer", "float"] | None, Flag((), "Quantization")] = None
    """none: symmetric. integer: whole zero-points. float: free offsets. Default: the method's."""

    scales: Annotated[Literal["fp16", "fp32", "double", "linear"] | None, Flag((), "Quantization")] = None
    """How scales are stored; as 8-bit codes: double, QLoRA's double quantization; linear, LQ-LoRA's. Default: the
    method's."""

    rounding: Annotated[Literal["nearest", "gptq", "block-ap"] | None, Flag((), "Quantization")] = None
    """nearest needs no data; gptq is calibrated; block-ap trains block by block on the calibration text. Default: the
    method's."""

    range: Annotated[Literal["minmax", "mse", "icq", "icq-scale"] | None, Flag((), "Quantization")] = None
    """Span of a group's levels. minmax: all of it. mse: the part of least squared error. For the highest entropy of
    codes: icq, shifted (needs zero float); icq-scale, scaled (integers). Default: the method's."""

    skip: Annotated[tuple[str, ...], Flag((), "Quantization")] = ()
    """Layers to leave unquantized, by name or a part of it: down_proj, layers.0, .. (comma separated, or repeated)."""

    calibration_data: Annotated[Sources, Flag((), "Quantization", reads=True)] = ()
    """Text to calibrate gptq and block-ap on: files, folders or hub names, read as --data is. Default for tune: the
    training data."""

    calibration_sequences: Annotated[Count, Flag((), "Quantization")] = 128
    """Sequences to calibrate on, at most."""

    calibration_length: Annotated[Count | None, Flag((), "Quantization")] = None
    """Their length in tokens. Default: the model's context, at most 2048."""

    calibration_epochs: Annotated[Count | None, Flag((), "Quantization")] = None
    """block-ap: passes over them. Default: 2."""

    @cached_property
    def spec(self) -> Spec:
        """What is made, resolved from all settings: the method, and how each layer is quantized.

        Raises:
            ConfigError: The choices contradict each other, or the plan.
            CheckpointError: The plan is damaged, or something else.
        """
        from quadapt.config.spec import Spec

        chosen = self._method()
        return Spec.of(chosen, planned=self.budget_plan(chosen), skip=self.skip).without_adapter()

    def _method(self, **more: Any) -> Method:
        """The method, with what was chosen otherwise."""
        from quadapt.methods import method_named

        names = ("levels", "bits", "group_size", "zero", "scales", "rounding", "range", "calibration_epochs")
        given: Any = self.method
        chosen = method_named(given) if isinstance(given, str) else given
        return chosen.having(**{name: getattr(self, name) for name in names}, **more)

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
        from quadapt.budget import BudgetPlan
        from quadapt.budget.candidates import check_plannable
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
