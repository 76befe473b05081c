"""What settings are made of: fields with their words, groups that several commands share, and how they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from quadapt.config.values import Location, check_plain
from quadapt.setting import Flag, Whole

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
        """Copy the settings as pydantic does, but without what was derived from the old ones."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("spec", "run"):
            copy.__dict__.pop(name, None)
        return copy

    def value(self, name: str) -> Any:
        """A setting by its name: those that come from the pieces of a method are not known to type checkers."""
        return getattr(self, name)

    @field_validator(
        "target_modules",
        "skip",
        "exclude_modules",
        "train_also",
        "text_column",
        "labels",
        "tasks",
        mode="before",
        check_fields=False,
    )
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        """`a,b` and repeated flags are the same."""
        parts = [value] if isinstance(value, str) else () if value is None else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("must be a name, or a list of names. Put numbers in quotes")
        return tuple(name for part in parts for name in part.split(",") if name)

    @field_validator("rank_pattern", "alpha_pattern", mode="before", check_fields=False)
    @classmethod
    def _split_patterns(cls, value: Any) -> Any:
        """Likewise, and from Python and YAML also `{"q_proj": 16}`."""
        if isinstance(value, dict):
            value = [f"{name}={each}" for name, each in value.items()]
        return cls._split_commas(value)

    @field_validator("*", mode="before")
    @classmethod
    def _as_given(cls, value: Any, info: ValidationInfo) -> Any:
        return check_plain(value, cls.model_fields[str(info.field_name)])


class Machine(Settings):
    """Settings that say where and how a command computes."""

    dtype: Annotated[DType, Flag(("--torch-dtype",), "Machine")] = "auto"
    """The dtype of the computation and of what is not quantized; auto: as the model is stored."""

    device: Annotated[str, Flag((), "Machine")] = "auto"
    """The device that computes, cpu, cuda, cuda:1, ..; auto: a GPU if there is one."""

    trust_remote_code: Annotated[bool, Flag((), "Machine", idle=True)] = False
    """Run code that comes with a model. Off: such models are refused."""


class Walk(Machine):
    """Settings that say where and how a command works through a dense model."""

    offload: Annotated[Literal["auto", "none", "cpu"], Flag((), "Machine", idle=True)] = "auto"
    """Keep the dense model here while a GPU quantizes it. none: on the GPU. cpu: mapped from its files (what memory
    does not hold is read again), one block at a time on the GPU. auto: on the GPU if it fits. Results are the same."""


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


class Columns(RowsOfData):
    """Where in rows of data a task with labels finds what it needs."""

    text_column: Annotated[tuple[str, ...], Flag((), "Data")] = ()
    """Tasks with labels: column of the text (or of the words, or the picture); two columns for pairs of texts
    (comma-separated). Default: the usual names (text, sentence, ..)."""

    label_column: Annotated[str | None, Flag((), "Data")] = None
    """Tasks with labels: column of the label. Default: label, labels, class or category; for words tags."""


class Published(Settings):
    """Settings that say whether what a command writes goes to the hub as well."""

    push_to_hub: Annotated[str | None, Field(min_length=1), Flag((), "Output", idle=True)] = None
    """Upload what is written to this repository of the hub, OWNER/NAME, once it is whole; the repository is made if
    there is none. It needs a token (hf auth login)."""

    private: Annotated[bool, Flag((), "Output", idle=True)] = False
    """The repository that push_to_hub makes can be seen by its owner alone."""

    @field_validator("private")
    @classmethod
    def _of_a_repository(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("push_to_hub") is None:
            raise ValueError("says how the repository is made that push_to_hub names. Give --push-to-hub OWNER/NAME")
        return value

    def written(self) -> list[Path]:
        """The folder that the command has written, or files of it that lie beside each other."""
        return [Path(self.value("output"))]


class Target(Published):
    """Settings that say where a command writes its result."""

    output: Annotated[Location, Flag(("-o", "--output-dir"), "Output", idle=True)]
    """Folder to write. It appears when the work is complete; an interrupted command, given again, goes on."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the output if it exists."""
