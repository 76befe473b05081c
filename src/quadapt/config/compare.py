"""Settings of the commands that compare runs and show them: `compare` and `report`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from quadapt.config.fields import Machine, RowsOfData, Settings
from quadapt.config.values import Location, Sources
from quadapt.setting import Count, Flag, Inner, NotNegative, Positive, Whole

MOST_RATES = 20
"""No search of learning rates needs more; each costs a quarter of a run."""


def _names(value: Any) -> tuple[str, ...]:
    """`4,3`, `[4, 3]` and repeated flags are the same."""
    parts = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
        raise ValueError("must be a list, such as 4,3,2")
    return tuple(name.strip() for part in parts for name in str(part).split(",") if name.strip())


class CompareConfig(RowsOfData, Machine):
    """Tune a model by several methods at several widths, and show what each keeps, on a page for a browser."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder or hub name of the dense model."""

    data: Annotated[Sources, Field(min_length=1), Flag((), "Data", reads=True)]
    """Data to tune on, of the kinds that tune takes for text. Parts of it are set aside to choose learning rates by and
    to report on, unless other data are named for that."""

    choose_data: Annotated[Sources, Flag((), "Data", reads=True)] = ()
    """Data by whose loss learning rates are chosen. Default: a twentieth of --data."""

    test_data: Annotated[Sources, Flag((), "Data", reads=True)] = ()
    """Data that figures are reported on. Default: a tenth of --data."""

    choose_split: Annotated[Inner, Flag((), "Data")] = 0.05
    """Share of --data by whose loss learning rates are chosen; it is not trained on."""

    test_split: Annotated[Inner, Flag((), "Data")] = 0.1
    """Share of --data that figures are reported on; nothing is trained on it or chosen by it."""

    measure_rows: Annotated[Count, Flag((), "Data")] = 200
    """The most rows to choose by, and as many to report on; of texts, so many times 200 characters."""

    seq_len: Annotated[Count | None, Flag(("--max-length", "--max-seq-length"), "Data")] = None
    """Tokens in a sequence. Default: the model's context, at most 1024."""

    methods: Annotated[tuple[str, ...], Field(min_length=1), Flag((), "What is compared")] = (
        "qa-lora",
        "l4q",
        "qlora",
        "recover",
    )
    """Methods to compare (comma-separated), of those that tune takes."""

    bits: Annotated[
        tuple[Literal["2", "3", "4", "5", "6", "8"], ...], Field(min_length=1), Flag((), "What is compared")
    ] = ("4", "3", "2")
    """Widths of codes to compare (comma-separated)."""

    seeds: Annotated[Count, Flag((), "What is compared")] = 3
    """Runs of each method at each width with the rate that was chosen; each has another seed. Their spread says which
    differences mean something."""

    rates: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_RATES), Flag((), "What is compared")] = (
        "1e-4",
        "3e-4",
        "1e-3",
        "3e-3",
        "1e-2",
    )
    """Learning rates to choose from (comma-separated). All are tried on a quarter of the steps or less, the better half
    on twice as many, and so on; if the best one is the largest or the smallest, further ones are tried."""

    usual: Annotated[bool, Flag((), "What is compared")] = True
    """Compare with the usual route as well: LoRA in 16 bits, merged, then llama.cpp's quantizer; left out, with a word,
    where that is not installed."""

    budget_minutes: Annotated[Positive | None, Flag((), "Training")] = None
    """Take as many steps as let the whole comparison fit into so many minutes on this machine, by short trial runs.
    Further seeds are left out if it takes longer after all."""

    max_steps: Annotated[Whole, Flag((), "Training")] = 0
    """Optimizer steps of each run; 0: by --budget-minutes, else one pass over the data."""

    batch_size: Annotated[Count, Flag((), "Training")] = 8
    """How many sequences go through the model at once."""

    gradient_accumulation: Annotated[Count, Flag((), "Training")] = 2
    """Forward passes for each optimizer step."""

    rank: Annotated[Count, Flag((), "Training")] = 16
    """Rank of every adapter; alpha is the same number."""

    settings: Annotated[tuple[str, ...], Flag(("--set",), "Training")] = ()
    """A further setting of tune, for every method (dropout=0.05) or for one (recover.calibration_epochs=2). May be
    given several times."""

    tolerance: Annotated[NotNegative, Flag((), "Output", idle=True)] = 0.05
    """Nats per token that a recommended model may lose against LoRA in full precision; 0.05 is 5 percent of
    perplexity."""

    samples: Annotated[Whole, Flag((), "Output")] = 3
    """How many prompts of the test data every model goes on with, on the page."""

    page: Annotated[bool, Flag((), "Output", idle=True)] = True
    """Write the page, index.html, beside the figures, compare.json. It needs the extra report."""

    output: Annotated[Location, Flag(("-o",), "Output", idle=True)] = "comparison"
    """Folder of the comparison. Runs that lie in it are not done again: given again, or with more methods, widths or
    seeds, the command does what is missing."""

    @field_validator("methods", "bits", "rates", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> tuple[str, ...]:
        parts = value if isinstance(value, list | tuple) else (value,)
        if info.field_name == "methods" and not all(isinstance(part, str) for part in parts):
            raise ValueError("must be names of methods, such as qa-lora,l4q")
        return tuple(dict.fromkeys(_names(value)))

    @field_validator("rates")
    @classmethod
    def _numbers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                right = 0 < float(text) < 10
            except ValueError:
                right = False
            if not right:
                raise ValueError(f"{text!r} is no learning rate. Use numbers such as 3e-4, parted by commas")
        return value

    @field_validator("settings", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> tuple[str, ...]:
        parts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (value,)
        for part in parts:
            if not isinstance(part, str) or "=" not in part or not part.partition("=")[0].strip():
                raise ValueError("must be a setting and its value, such as dropout=0.05 or recover.dropout=0.05")
        return parts

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths as numbers, in the order in which they were given."""
        return tuple(int(each) for each in self.bits)


class ReportConfig(Settings):
    """Show what became of a run, or of a comparison, on a page for a browser."""

    run: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder that tune, merge or compare has written."""

    data: Annotated[Sources, Flag((), "Data", reads=True)] = ()
    """Held-out data to measure on as well, and to take prompts for samples from."""

    limit: Annotated[Count, Flag((), "Data")] = 200
    """Use only the first so many rows of the data."""

    samples: Annotated[Whole, Flag((), "Output")] = 3
    """How many prompts of the data the model goes on with, on the page."""

    output: Annotated[Location | None, Flag(("-o",), "Output", idle=True)] = None
    """The HTML file to write. Default: named after the folder, beside it; of a comparison, index.html in it."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the page if it exists."""
