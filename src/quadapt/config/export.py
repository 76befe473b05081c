"""The settings of `quadapt export`: its formats, and the options of each, come from the registry of formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from quadapt.config.fields import DType, Machine, Published
from quadapt.config.values import Location
from quadapt.exporters.formats import EXPORTERS, Exporter
from quadapt.setting import Flag

LIST = "?"
"""In the place of a format: list what each of them makes of the model."""

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[(*EXPORTERS, LIST)]

_WORDS = (
    " ".join(f"{name}: {exporter.summary}." for name, exporter in EXPORTERS.items())
    + f" {LIST}: say which of these hold the model exactly, and why the others do not; nothing is written."
)

_DTYPES = ", ".join(
    f"{vars(exporter())['dtype']} for {name}" for name, exporter in EXPORTERS.items() if "dtype" in exporter.options()
)


_FILES = ", ".join(name for name, exporter in EXPORTERS.items() if exporter.suffix)


class _Format(Published, Machine):
    """What is exported, and to which format."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder of a quantized model or of an adapter (it is merged first, if it merges exactly)."""

    format: Annotated[FormatName, Flag((), "Output"), Field(description=_WORDS)] = "gguf"

    dtype: Annotated[
        DType,
        Flag(("--torch-dtype",), "Machine"),
        Field(
            description="Of the computation, and of the floats that a format writes if it leaves that open. auto: as "
            f"the model is stored, and {_DTYPES}."
        ),
    ] = "auto"


def _options() -> dict[str, Any]:
    """A field for each option that some format has: its choices, or None for the format's own default."""
    fields: dict[str, Any] = {}
    for name, exporter in EXPORTERS.items():
        words = exporter.words()
        for option, choices in exporter.options().items():
            if option not in _Format.model_fields:
                about = Field(
                    default=None, description=f"{name}: {words[option]} (default: {getattr(exporter, option)})"
                )
                fields[option] = (Annotated[Literal[choices] | None, Flag((), "Output")], about)
    return fields


_OPTIONS = _options()

if TYPE_CHECKING:
    _Options = _Format
else:
    _Options = create_model("_Options", __base__=_Format, **_OPTIONS)


class ExportConfig(_Options):
    """Write a model in a format that others serve."""

    base: Annotated[Location | None, Flag(reads=True)] = None
    """The folder of an adapter's base, if it has moved since the adapter was made."""

    any_base: Annotated[bool, Flag()] = False
    """Take an adapter though its base is another one than it was trained over. What comes of it is another model."""

    ollama: Annotated[bool, Flag((), "Output")] = False
    """gguf: also write a Modelfile beside the file (model.Modelfile beside model.gguf), for `ollama create`."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the output if it exists."""

    output: Annotated[
        Location | None,
        Flag(("-o",), "Output", idle=True),
        Field(validate_default=True, description=f"File ({_FILES}) or folder (all others) to write."),
    ] = None

    @field_validator("output")
    @classmethod
    def _written(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("format", LIST) != LIST:
            raise PydanticCustomError("missing", "Field required")
        if value is not None and info.data.get("format") == LIST:
            raise ValueError(f"format={LIST!r} writes nothing. Leave output out, or choose a format")
        if value is None and info.data.get("push_to_hub") is not None:
            raise ValueError(f"format={LIST!r} writes nothing that could be uploaded. Leave push_to_hub out")
        return value

    @field_validator("ollama")
    @classmethod
    def _of_gguf(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("format") != "gguf":
            raise ValueError("a Modelfile is for a program that reads GGUF files. Use format gguf, or leave it out")
        return value

    @field_validator(*_OPTIONS)
    @classmethod
    def _of_the_format(cls, value: str | None, info: ValidationInfo) -> str | None:
        """An option is set for a format that has it; the format says so itself."""
        chosen = info.data.get("format", LIST)
        why = "" if value is None or chosen == LIST else EXPORTERS[chosen].objection(str(info.field_name), value)
        if why:
            raise ValueError(why)
        return value

    def written(self) -> list[Path]:
        """The folder that was written, or the file and what lies beside it: an adapter, a Modelfile."""
        found = super().written()
        if self.exporter().suffix:
            found += [*self.exporter().besides(found[0]), *([self.modelfile] if self.ollama else [])]
        return found

    @property
    def modelfile(self) -> Path:
        """The path of Ollama's Modelfile, beside the GGUF file."""
        return Path(self.value("output")).with_suffix(".Modelfile")

    def exporter(self, name: str | None = None) -> Exporter:
        """The format, or another one of that name, with those of the options that it has."""
        cls = EXPORTERS[name or self.format]
        given = {option: getattr(self, option) for option in cls.options()}
        return cls.made(**{option: value for option, value in given.items() if value not in (None, "auto")})

    def effective(self) -> dict[str, Any]:
        """The settings as JSON, with the options that the format has, each with the value that it comes to."""
        given = {name: value for name, value in super().effective().items() if name not in _OPTIONS}
        return given if self.format == LIST else {**given, **vars(self.exporter())}
