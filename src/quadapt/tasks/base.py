"""What every task answers, and the registry in which each is known by its name.

A task stands between data and models: it reads rows, says which head they ask for, makes inputs of them, batches of
inputs, the loss of each example, and figures that tell how good a model is at it. How a model is quantized, trained and
merged is none of its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from quadapt.data import Calibration, Encoded, Rows
from quadapt.data.tables import Table
from quadapt.errors import ConfigError
from quadapt.hf.head import Head
from quadapt.hf.kinds import KINDS, Kind
from quadapt.registry import Registry

TASKS: Registry[type[Task]] = Registry("task", "quadapt.tasks")
"""The class of every task, by its name; entry points of the group `quadapt.tasks` add theirs."""

Data = Rows | Table
"""Rows of data as a task reads them: text that is gone on with, or cells that have a meaning."""

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
"""Makes a batch of some examples: a model's inputs by name, and `labels`."""

Losses = Callable[[Tensor, Tensor], Tensor]
"""Logits and labels of a batch to the summed loss of each example and how much it counts, float64 `[batch, 2]`."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps the list of batches to work on, like `tqdm`."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read and made into inputs."""

    max_bad_rows: int | None = None
    """Rows that cannot be used are skipped, up to so many; None for the default."""

    text_columns: tuple[str, ...] = ()
    """Columns of the text, two for pairs of texts; empty for the usual names."""

    label_column: str | None = None
    """Column of the label; None for the usual names."""

    labels: tuple[str, ...] = ()
    """Labels in the order in which a new head has them; empty for those of the data."""

    problem: str = "auto"
    """What labels are (:data:`quadapt.hf.head.Problem`); auto: as the data have them."""

    packing: bool = False
    """Whether a sequence may hold several examples."""

    completion_only: bool = True
    """Whether completions alone bear loss."""

    seed: int = 0
    """The seed of what is drawn while rows become inputs, and of a new head."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is measured."""

    batch_size: int = 8
    """How many sequences go through the model at once."""

    length: int = 2048
    """The most tokens that the model sees at once."""

    stride: int | None = None
    """Tokens from one window of a text to the next; None for no overlap."""

    protocol: str = "documents"
    """How perplexity is measured: of each document by itself, or as in GPTQ, of all of them joined."""

    max_new_tokens: int = 32
    """The most tokens that an answer may have."""

    samples: int = 3
    """How many answers to show."""

    prompt_form: str = "auto"
    """The form in which prompts are put; auto for that of training, or of the data."""

    system: str | None = None
    """A system message, for a chat template."""

    note: Mapping[str, Any] = field(default_factory=dict)
    """What `quadapt.json` says about the model: how it was trained."""

    progress: Callable[[str], Progress] = lambda _: iter
    """Gives a function that wraps the batches of what it is given the name of."""

    show: Callable[[str], None] = lambda _: None
    """Shows a figure, or a word about the data."""


Measured = dict[str, Any]
"""Figures by name, as they are written to JSON."""


class Task(ABC):
    """A task. Those of other packages derive from it, and register by an entry point of the group `quadapt.tasks`."""

    name: ClassVar[str]
    """The name of the task, as `--task` takes it; registering sets it."""

    summary: ClassVar[str]
    """What the task is, in a few words."""

    kinds: ClassVar[tuple[str, ...]]
    """The kinds of models that do it (:data:`quadapt.hf.kinds.KINDS`)."""

    @abstractmethod
    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Data:
        """Read rows of data, each of them checked; `held_out` means the split `test` of what has splits.

        Raises:
            DataError: There are none, or they are not such rows.
        """

    @abstractmethod
    def split(self, data: Any, share: float, seed: int) -> tuple[Data, Data]:
        """Rows to train on, and a share of them that is held out."""

    def head(self, config: Any, kind: Kind, data: Any, reading: Reading) -> Head | None:
        """The new head that a model is to get for its data; None if it has what it needs.

        Args:
            config: Of the dense model, as transformers reads it.
            kind: The kind of the model.
            data: The rows to train on.
            reading: How they are read.

        Raises:
            ConfigError: The model is of another kind, and a head does not make it one of this task.
            DataError: The labels of the data cannot be learnt.
        """
        if kind.name not in self.kinds:
            raise ConfigError(
                f"task={self.name!r} takes models for {' or '.join(self.kinds)}, and this one is for {kind.name}. "
                "Use another model, or another task"
            )
        return None

    def length(self, positions: int, most: int) -> int:
        """The length of sequences where none is given: the model's positions, up to the most that is usual."""
        return min(positions, most)

    @abstractmethod
    def encode(self, data: Any, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        """Make examples of rows.

        Args:
            data: Rows that the task has read.
            prepare: The model's tokenizer, or its processor.
            config: The model's config, which names its labels.
            length: The most tokens of an example.
            reading: How it is done.

        Raises:
            DataError: A row has a label that the model does not know, or too few can be used.
        """

    @abstractmethod
    def collator(self, prepare: Any, model: Any) -> Collate:
        """What makes batches of examples, for a model and its tokenizer or processor."""

    def losses(self, config: Any) -> Losses | None:
        """The loss of each example; None where it is that of a language model."""
        return None

    @abstractmethod
    def calibration(
        self,
        data: Any,
        prepare: Any,
        model: Any,
        *,
        length: int,
        sequences: int,
        at_least: int | None,
        reading: Reading,
    ) -> Calibration:
        """Batches to calibrate a quantization on.

        Args:
            data: Rows that the task has read.
            prepare: The model's tokenizer, or its processor.
            model: The dense model.
            length: The most tokens of a sequence.
            sequences: The most sequences.
            at_least: The fewest sequences that are wanted, where text is cut into them; None: `length` holds.
            reading: How rows become inputs; its seed chooses among them.
        """

    @abstractmethod
    def measure(self, model: Any, prepare: Any, data: Any, asking: Asking) -> Measured:
        """Measure a model on held-out rows: its loss, and the usual figures of the task.

        Raises:
            DataError: There is nothing to measure on, or a label that the model does not know.
        """


def task_of(name: str | None, kind: Kind) -> Task:
    """The task that was asked for, or the one that models of a kind do.

    Raises:
        ConfigError: There is none by itself; the message has those that can be asked for.
    """
    if name:
        return TASKS[name]()
    found = next((each for each in TASKS.values() if kind.name in each.kinds), None)
    if found is None:
        labelled = [each for each, cls in TASKS.items() if any(KINDS[of].labels for of in cls.kinds)]
        raise ConfigError(
            f"what the model is to be trained for is not clear: it is of the kind {kind.name}. Say it with --task "
            f"({', '.join(labelled)}). Other tasks are trained from Python: quadapt.prepare, and any trainer"
        )
    return found()
