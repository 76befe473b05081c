"""What every export format answers, and the registry in which each is known by its name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_type_hints

from quadapt.errors import ConfigError, ExportError
from quadapt.registry import Registry
from quadapt.setting import words_of

if TYPE_CHECKING:  # torch takes seconds to import, and the names and options of formats need none of it
    from quadapt.exporters.report import ExportReport
    from quadapt.nn.adapters import Adapter
    from quadapt.quant.weight import Layout, QuantWeight

Progress = Callable[[Sequence[str]], Iterator[str]]
"""Wraps the names of what is written, one by one, to show how far the work is."""


EXPORTERS: Registry[type[Exporter]] = Registry("format", "quadapt.exporters.formats", group="quadapt.exporters")
"""The class of every export format, by its name; entry points of the group `quadapt.exporters` add theirs."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from, for formats that record it."""

    note: Mapping[str, Any]
    """Content of `quadapt.json` in the folder that is exported."""

    base: str
    """Folder of the quantized weights: the folder itself, or the base of an adapter."""

    output: Path
    """The path where the export will be in the end; it may be written elsewhere first."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a format makes of one model."""

    format: str
    """The name of the format."""

    holds: Literal["exactly", "changed", "no"]
    """exactly: what is written computes with the same numbers. changed: with rounded ones. no: it is refused."""

    words: str
    """How it is held, what changes, or why it is refused."""

    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Layers that the format cannot hold as they are, each with the reason."""

    suffix: str = ""
    """Suffix of the file; empty for a folder."""

    served_by: str = ""
    """The programs that read the format, in words."""


@dataclass(frozen=True, kw_only=True)
class Exporter(ABC):
    """A format, with its options: each field of the class is one, a text with a fixed set of choices.

    A new format is a class in a file of its own in this package, or in another package that names it under the entry
    points `quadapt.exporters`::

        @EXPORTERS.register("my-format")
        @dataclass(frozen=True, kw_only=True)
        class MyFormat(Exporter):
            summary: ClassVar[str] = "for my server, codes as they are"
            ...
    """

    name: ClassVar[str]
    """Name of the format; registering the class sets it."""

    summary: ClassVar[str]
    """One sentence about it for `--help`, without its name."""

    form: ClassVar[str]
    """How it holds what it accepts: "codes as they are", "dense weights", .."""

    served_by: ClassVar[str]
    """The programs that read the format, in words."""

    suffix: ClassVar[str] = ""
    """Suffix of the file that it is; empty if it is a folder."""

    place: ClassVar[str] = "export"
    """Name of the output within the folder of a job (`quadapt run`)."""

    takes: ClassVar[Literal["model", "adapter"]] = "model"
    """Whether it holds a whole model, or an adapter without its base."""

    unmerged: ClassVar[Literal["refused", "added", "beside"]] = "refused"
    """What becomes of an adapter that cannot merge into codes, where the format holds a whole model. refused: it is an
    error. added: base and adapter are added up in dense weights. beside: a second file (:meth:`write_beside`)."""

    paired: ClassVar[bool] = False
    """Whether there are matrices for which a second file is written (:meth:`pairs`, :meth:`second`)."""

    def instead(self, layout: Layout) -> tuple[str, bool] | None:
        """What becomes of a matrix that is not accepted: in words, and whether it still has the same numbers.

        None: the model is refused.
        """
        return None

    def replaced(self, weight: QuantWeight) -> tuple[str, bool] | None:
        """What becomes of a matrix that is not held, as :meth:`instead` says it, if its numbers are known."""
        return self.instead(weight.layout)

    @abstractmethod
    def accepts(self, layout: Layout) -> str | None:
        """None if the format holds matrices of this layout bit for bit in its own form; else the reason, for people.

        The layout alone is asked: a reason may say that something "may not" be held, which the numbers then decide.
        """

    def holds(self, weight: QuantWeight) -> str | None:
        """Why the format cannot hold a matrix whose numbers are known; None if it can. By default its layout says."""
        return self.accepts(weight.layout)

    def never(self, layout: Layout) -> str | None:
        """Why the model is refused for a matrix of this layout, whatever its numbers; None if it is not."""
        return self.accepts(layout) if self.instead(layout) is None else None

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise ConfigError if models with such an adapter cannot be written; nothing has been loaded yet."""
        if self.takes == "model" and self.unmerged == "refused" and adapter.exactness == "none":
            raise ConfigError(
                "the adapter cannot merge into codes. Requantize it first (quadapt merge --requantize), or use "
                "--format gguf or lora"
            )

    def check_model(self, model: Any, tokenizer: Any) -> None:  # noqa: B027 - many formats take any model
        """Raise ExportError if the model cannot be written, whatever its weights: its architecture, its tokenizer.

        Args:
            model: Loaded, or a PEFT model with an adapter in it.
            tokenizer: Its tokenizer.
        """

    def check(self, model: Any, tokenizer: Any) -> None:
        """Raise ExportError, before anything is written, if the model or one of its matrices cannot be written."""
        from quadapt.model.quantize import quantized_layers

        self.check_model(model, tokenizer)
        for name, layer in quantized_layers(model).items() if self.takes == "model" else ():
            why = self.holds(layer.quant_weight)
            if why and self.replaced(layer.quant_weight) is None:
                raise ExportError(f"{name}: {why}")

    def changes(self, adapter: Adapter) -> str:
        """What exporting a model changes about its adapter, in words; empty if it computes the same numbers."""
        if adapter.exactness == "equivalent":
            return "merging the adapter rounds its offsets to their stored dtype"
        if adapter.exactness == "none" and self.unmerged == "added":
            return "base and adapter are added up, which rounds"
        return ""

    @abstractmethod
    def write(
        self, model: Any, tokenizer: Any, path: Path, *, origin: Origin | None = None, progress: Progress = iter
    ) -> ExportReport:
        """Write the model. The output appears when it is whole; an export that fails leaves nothing behind.

        Args:
            model: Quantized, without adapters; or for formats of adapters, a PEFT model.
            tokenizer: Its tokenizer.
            path: The file or folder to write.
            origin: Where the model comes from, if that is known.
            progress: Shows how far the work is.

        Raises:
            ExportError: The format cannot hold the model; the message names the layer and the reason.
        """

    def beside(self, path: Path) -> Path:
        """The second file of `unmerged = "beside"`, given the first."""
        raise NotImplementedError(f"{self.name}: a format with unmerged='beside' says here where its second file is")

    def write_beside(self, model: Any, path: Path) -> ExportReport:
        """Write the adapter of a PEFT model as that second file."""
        raise NotImplementedError(f"{self.name}: a format with unmerged='beside' writes its second file here")

    def pairs(self, layout: Layout) -> bool:
        """Whether a matrix of this layout may need a second file (:meth:`second`), beside that of an adapter."""
        return False

    def second(self, path: Path) -> Path:
        """The file that :meth:`write` may make beside the first, where a matrix needs one."""
        raise NotImplementedError(f"{self.name}: a format that pairs files says here where the second one is")

    def besides(self, path: Path) -> list[Path]:
        """The files that lie beside a written one and belong to it."""
        return [file for file in [self.beside(path)] if file.exists()] if self.unmerged == "beside" else []

    # --- options ---

    @classmethod
    def options(cls) -> dict[str, tuple[str, ...]]:
        """The choices of each option, by its name."""
        hints = get_type_hints(cls)
        return {each.name: get_args(hints[each.name]) for each in dataclasses.fields(cls)}

    @classmethod
    def words(cls) -> dict[str, str]:
        """What the string below each option says, on one line, by its name."""
        words = words_of(cls)
        return {option: words[option] for option in cls.options()}

    @classmethod
    def objection(cls, option: str, value: object) -> str:
        """What is wrong with an option of that name and value, in words; an empty string if nothing is."""
        known = cls.options()
        if option not in known:
            has = f"which has {', '.join(known)}" if known else "which has none"
            others = [name for name, each in EXPORTERS.items() if option in each.options()]
            hint = f"It is one of {', '.join(others)}" if others else "No format has it"
            return f"is no option of format={cls.name!r}, {has}. {hint}"
        return "" if value in known[option] else f"is unknown. Use {', '.join(known[option])}"

    @classmethod
    def made(cls, **given: Any) -> Exporter:
        """Make an exporter of this format with some options.

        Raises:
            ConfigError: It has no such option, or not this choice.
        """
        for option, value in given.items():
            why = cls.objection(option, value)
            if why:
                raise ConfigError(f"{option}={value!r} {why}")
        return cls(**given)
