"""The settings of `quadapt tune`. The words under a field are what `--help` prints."""

from __future__ import annotations

import contextlib
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, PrivateAttr, model_validator

from quadapt.config.check import checked
from quadapt.config.derive import adding, choice, fields_of, of_pieces
from quadapt.config.fields import Columns, Target, Walk
from quadapt.config.grid import METHOD_WORDS, Grid, MethodName, with_planned_method
from quadapt.config.spec import Shape, Spec, by_layer
from quadapt.config.values import Location, Sources
from quadapt.errors import ConfigError
from quadapt.hf.head import PROBLEMS, Head
from quadapt.methods import METHODS, Method, Recipe, Run, method_named
from quadapt.methods.first import FIRSTS
from quadapt.nn.adapters import ADAPTERS
from quadapt.nn.objective import OBJECTIVES
from quadapt.nn.starts import STARTS
from quadapt.setting import Count, Flag, Share, settings_of
from quadapt.tasks import TASKS

_PANEL = Flag(panel="Adapter")

OVER_CODES = "qa-lora"
"""The method that is taken over a model that is quantized already, if none is given."""

OTHER_TASKS = "qa-lora"
"""The method that is taken for tasks other than to go on with text, if none is given: it needs no teacher."""

OVER_WHOLE = "code-lora"
"""The method that is taken over one whose zero-points are whole, or that has none: they stay whole."""

EIGHT_BITS = "l4q"
"""The method that is taken at eight bits, if none is given."""


def _methods_of(adapter: str) -> list[str]:
    """The methods that train an adapter."""
    return [name for name in METHODS if method_named(name).adapter.kind == adapter]


@adding(
    {
        **fields_of(Recipe),
        **choice("start", STARTS, "Where the adapter starts; pooled ones fold it into the offsets.", _PANEL),
        **choice("objective", OBJECTIVES, "What training lowers.", Flag(panel="Training")),
        **choice("tune_first", FIRSTS, "What becomes of the dense model before that.", Flag(panel="Training")),
        **of_pieces(STARTS),
        **of_pieces(ADAPTERS, _methods_of),
        **of_pieces(OBJECTIVES),
        **of_pieces(FIRSTS),
    }
)
class Adapting(Grid):
    """What is trained over the quantized weights, and how. What is not given is the method's own choice."""

    target_modules: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Layers that get adapters: names, parts of names (q_proj), a regular expression for whole names
    ('.*layers.[0-3]\\..*'), or all-linear. Default: all quantized layers."""

    exclude_modules: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Layers that get no adapter, in the same words; they are quantized all the same."""

    rank_pattern: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Another rank for some layers, as NAME=RANK: q_proj=16,layers.0.mlp=8; the last that fits a layer holds."""

    alpha_pattern: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Another alpha for some layers, as NAME=ALPHA, likewise."""

    use_rslora: Annotated[bool, Flag((), "Adapter")] = False
    """Multiply adapters by alpha / sqrt(rank), not by alpha / rank (rsLoRA)."""

    train_tokens: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Tokens whose rows of embedding and head train too, by name or id: marks of turns that are new, or that no
    training has told apart (repeat the flag for several)."""

    train_also: Annotated[tuple[Literal["norms", "biases", "embeddings", "head"], ...], Flag((), "Adapter")] = ()
    """What trains beside the adapters, whole, and merges exactly: norms, biases, embeddings, head (comma-separated, or
    repeat the flag)."""

    @cached_property
    def spec(self) -> Spec:
        chosen = self._method()
        return Spec.of(
            chosen,
            planned=self.budget_plan(chosen),
            skip=self.skip,
            target_modules=self.target_modules,
            also=tuple(dict.fromkeys(self.train_also)),
            part=self.part,
            shape=Shape(
                excluded=self.exclude_modules,
                ranks=by_layer("rank_pattern", self.rank_pattern),
                alphas=by_layer("alpha_pattern", self.alpha_pattern),
                rslora=self.use_rslora,
            ),
        )


_RUN = fields_of(Run, own_defaults=True)


@adding({"seed": _RUN["seed"]})
class PrepareConfig(Adapting, Walk):
    """Settings of :func:`quadapt.prepare`: all that a method is made of, and the machine."""


@adding(_RUN)
class TuneConfig(Target, Adapting, Columns, Walk):
    """Fine-tune a model: quantize it if it is not yet, train an adapter over it."""

    method: Annotated[
        MethodName,
        Flag((), "Quantization"),
        Field(
            description=f"{METHOD_WORDS} Default: recover; at 8 bits {EIGHT_BITS}, over a model that is "
            f"quantized already {OVER_CODES}, or {OVER_WHOLE} if its zero-points are whole numbers; for tasks other "
            f"than causal-lm, and for pairs of answers, {OTHER_TASKS}."
        ),
    ] = "recover"

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder or hub name: a dense model (it is quantized first), one that quadapt has quantized, or an adapter that
    tune has written (it is trained on, over the same base)."""

    task: Annotated[
        Literal[tuple(TASKS)] | None,  # type: ignore[valid-type]
        Flag((), "Data"),
        Field(
            description="What the model is trained for. "
            + "; ".join(f"{name}: {cls.summary}" for name, cls in TASKS.items())
            + ". Default: what the model's config.json says that it does."
        ),
    ] = None

    labels: Annotated[tuple[str, ...], Flag((), "Data")] = ()
    """Tasks with labels: all of them, in the order that a new head has (comma-separated). Default: those of the data,
    numbers by size and names by the alphabet; or those that the model knows."""

    problem: Annotated[Literal[("auto", *PROBLEMS)], Flag((), "Data")] = "auto"  # type: ignore[valid-type]
    """What labels are: single-label (one of several), multi-label (any of several) or regression (a number). auto:
    lists are several, numbers that are not whole are values."""

    data: Annotated[Sources, Field(min_length=1), Flag((), "Data", reads=True)]
    """Training data: text, JSON lines, CSV, Parquet (also .gz), a folder, or a hub name; repeat it to mix several.
    Columns: text; prompt and completion; instruction, input and output; question and answer; messages or conversations;
    prompt, chosen and rejected; .. Tasks with labels: text and label, words and tags; a folder of pictures for each
    label."""

    output: Annotated[Location, Flag(("-o", "--output-dir"), "Output", idle=True)] = ""
    """Folder to write. It appears when the work is complete; an interrupted command, given again, goes on. Default:
    here, named after model, method and bits."""

    eval_data: Annotated[Sources, Flag((), "Data", idle=True, reads=True)] = ()
    """Held-out data, in the same forms as the training data."""

    eval_split: Annotated[Share, Flag((), "Data")] = 0.0
    """Share of the training data to hold out, if there is no --eval-data."""

    seq_len: Annotated[Count | None, Flag(("--max-length", "--max-seq-length"), "Data")] = None
    """Tokens in a sequence; longer examples are truncated, and counted. Default: the model's context, at most 1024."""

    packing: Annotated[bool, Flag((), "Data")] = False
    """Pack several examples into a sequence; attention does not cross them. (Plain text always fills its sequences.)"""

    completion_only: Annotated[bool, Flag((), "Data")] = True
    """Loss on completions (or the assistant's turns) alone."""

    teacher: Annotated[Location | None, Flag((), "Training", reads=True)] = None
    """Objectives with a teacher (rilq, kl, js): its folder or hub name, the full-precision model or one that was tuned.
    Default: the dense model, or what the base was made of."""

    dry_run: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Print what would be done, the true bits per weight and the peak memory, and stop."""

    _head = PrivateAttr(cast("Head | None", None))  # no setting: what the data ask for

    @property
    def head(self) -> Head | None:
        return self._head

    def with_head(self, head: Head | None) -> TuneConfig:
        """These settings, where the model gets a new head that the data have asked for."""
        copy = self.model_copy()
        copy._head = head
        return copy

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Name the output, if the user has not."""
        values = with_planned_method(values)
        if isinstance(values, dict) and isinstance(values.get("model"), str) and values.get("output") is None:
            bits = f"-{values['bits']}bit" if values.get("bits") else ""
            with contextlib.suppress(OSError, ValueError):  # such a path is refused by the checks of the fields
                name = Path(os.path.expanduser(values["model"])).resolve().name
                return {**values, "output": f"{name}-{values.get('method', 'tuned')}{bits}"}
        return values

    def _method(self) -> Method:
        try:
            return super()._method()
        except ConfigError as error:
            if "method" in self.model_fields_set:
                raise
            raise ConfigError(
                f"{error}. (No method is given, so it is {self.method}: --method takes another)"
            ) from None

    def usual(self, *, quantized: bool, whole: bool = False, writes: bool = True) -> TuneConfig:
        """These settings with the method that is usual for a model, if none is given.

        Args:
            quantized: Whether the model is quantized already.
            whole: Whether it is to integers, and all its zero-points are whole numbers, or implied.
            writes: Whether it goes on with a text, and learns from texts, not from pairs of them.

        Raises:
            ConfigError: A setting does not go with it.
        """
        over = OVER_WHOLE if whole else OVER_CODES
        dense = EIGHT_BITS if self.value("bits") == 8 else None if writes else OTHER_TASKS
        method = over if quantized else dense
        if "method" in self.model_fields_set or method is None:
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return checked(type(self), {**given, "method": method})

    @property
    def prefers(self) -> bool:
        """Whether the objective that is asked for is about pairs of answers."""
        wanted = self.value("objective")
        return (OBJECTIVES[wanted] if isinstance(wanted, str) else type(wanted)).pairs if wanted else False

    @cached_property
    def run(self) -> Run:
        """The training run, on a device that is not decided yet."""
        given = {name: self.value(name) for name in settings_of(Run)}
        return Run(recipe=self.spec.method.recipe, **{**given, "keep": self.keeps})

    def idle(self) -> set[str]:
        """The settings that do not change the result; held-out data does, if it decides what is kept or when to end."""
        deciding = self.keeps == "best" or self.value("early_stopping")
        return super().idle() - ({"eval_data", "eval_steps"} if deciding else set())

    def effective(self) -> dict[str, Any]:
        return {**super().effective(), "keep": self.keeps}

    @property
    def keeps(self) -> Literal["best", "last"]:
        """Which state of the run is written: the best one or the last."""
        wanted: Literal["best", "last"] | None = self.value("keep")
        return wanted or ("best" if self.eval_data or self.eval_split else "last")
