"""The settings of each command. The words under a field are what `--help` prints."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import model_validator

from quadapt.config.fields import Flag, Grid, Machine, MethodName, Settings, Target, checked, with_planned_method
from quadapt.errors import ConfigError

if TYPE_CHECKING:
    from quadapt.methods import Method


class QuantizeConfig(Target, Grid, Machine):
    """Quantize a model."""

    model: Annotated[str, Flag(positional=True)]
    """Folder or hub name of a causal language model."""

    target_modules: Annotated[tuple[str, ...], Flag((), "Quantization")] = ()
    """Quantize only these layers, by name or a part of it. Default: all linear layers but the head."""

    seed: Annotated[int, Flag((), "Machine")] = 0
    """Of the choice of calibration text."""

    dry_run: Annotated[bool, Flag((), "Output")] = False
    """Print what would be done, the true bits per weight and the peak memory, and stop."""


class PlanConfig(Machine):
    """Choose bits for every layer, so that a model fits a budget and errs least; quantize and tune take the plan."""

    model: Annotated[str, Flag(positional=True)]
    """Folder or hub name of a dense causal language model."""

    budget: Annotated[float, Flag((), "Plan")]
    """True bits per weight that the quantized layers may take on average: 2.75, say."""

    output: Annotated[str, Flag(("-o",), "Output")] = "plan.json"
    """File to write; a figure goes beside it."""

    overwrite: Annotated[bool, Flag((), "Output")] = False
    """Replace the output if it exists."""

    method: Annotated[MethodName, Flag((), "Plan")] = "lq-lora"
    """For which method: its kind of levels decides among which grids there is a choice. Must train over codes."""

    rank: Annotated[int | None, Flag(("--r", "--lora-r"), "Plan")] = None
    """Of the adapters; lq-lora's errors depend on it. Default: the paper's, 64."""

    count_adapters: Annotated[Literal["fp16", "nf8"] | None, Flag((), "Plan")] = None
    """Also count adapters in the budget, held as 16-bit floats or as nf8 (8.127 bits). Default: they do not count, as
    in the paper."""

    fisher: Annotated[str | None, Flag((), "Plan")] = None
    """Fisher information to weight errors with: a safetensors file with a tensor of the weight's shape for each layer,
    by the layer's name. Default: all weights count alike."""

    target_modules: Annotated[tuple[str, ...], Flag((), "Plan")] = ()
    """Plan only these layers, by name or a part of it. Default: all linear layers but the head."""

    skip: Annotated[tuple[str, ...], Flag((), "Plan")] = ()
    """Layers to leave unquantized, by name or a part of it (comma separated, or repeated)."""

    cache: Annotated[str | None, Flag((), "Output")] = None
    """Folder that keeps the measured errors: an interrupted run goes on there, another budget takes seconds. Default:
    plan-errors beside the output."""


class TuneConfig(Target, Grid, Machine):
    """Fine-tune a model: quantize it if it is not yet, train an adapter over it."""

    model: Annotated[str, Flag(positional=True)]
    """Folder or hub name: a dense model (it is quantized first), or one that quadapt has quantized."""

    data: Annotated[str, Flag((), "Data")]
    """Training data: text, JSON lines, CSV, Parquet, or a hub name. Columns: text; prompt and completion; instruction,
    input and output; or messages."""

    output: Annotated[str, Flag(("-o", "--output-dir"), "Output")] = ""
    """Folder to write. It appears when the work is complete; an interrupted command, given again, goes on. Default:
    here, named after model, method and bits."""

    eval_data: Annotated[str | None, Flag((), "Data")] = None
    """Held-out data, of the same kinds."""

    eval_split: Annotated[float, Flag((), "Data")] = 0.0
    """Share of the training data to hold out, if there is no --eval-data."""

    seq_len: Annotated[int | None, Flag(("--max-length", "--max-seq-length"), "Data")] = None
    """Tokens in a sequence; longer examples are truncated, and counted. Default: the model's context, at most 1024."""

    packing: Annotated[bool, Flag((), "Data")] = False
    """Pack several examples into a sequence; attention does not cross them. (Plain text always fills its sequences.)"""

    completion_only: Annotated[bool, Flag((), "Data")] = True
    """Loss on completions (or the assistant's turns) alone."""

    target_modules: Annotated[tuple[str, ...], Flag((), "Adapter")] = ()
    """Layers that get adapters, by name or a part of it. Default: all quantized layers."""

    rank: Annotated[int | None, Flag(("--r", "--lora-r"), "Adapter")] = None
    """Rank of the adapters. Default: the paper's, 64."""

    alpha: Annotated[float | None, Flag(("--lora-alpha",), "Adapter")] = None
    """The adapter is multiplied by alpha / rank. Default: the paper's, 16."""

    dropout: Annotated[float | None, Flag(("--lora-dropout",), "Adapter")] = None
    """Dropout on the adapter's input. Default: the paper's."""

    pooling: Annotated[Literal["sum", "mean"] | None, Flag((), "Adapter")] = None
    """qa-lora: sum inputs over a group, as in the paper, or average them, as in its authors' code. Default: sum."""

    init: Annotated[Literal["l4q", "lsq+", "symmetric", "asymmetric"] | None, Flag((), "Adapter")] = None
    """l4q, qat-lora: first scales. l4q clips nothing, the others are its paper's ablation. Default: l4q."""

    dense_steps: Annotated[int | None, Flag((), "Adapter")] = None
    """l4q: first steps that train A and B without quantization (the paper's first version). Default: 0."""

    form: Annotated[Literal["merged", "side"] | None, Flag((), "Adapter")] = None
    """qa-lora: train what the merge will give (exact), or a side branch as published (equivalent). Default: merged."""

    objective: Annotated[Literal["cross-entropy", "rilq"], Flag((), "Training")] = "cross-entropy"
    """rilq: half of the objective is the distance of the last hidden state to the full-precision model's."""

    teacher: Annotated[str | None, Flag((), "Training")] = None
    """rilq: folder or hub name of the full-precision model. Default: the dense model, or what the base was made of."""

    keep_targets: Annotated[bool, Flag((), "Training")] = True
    """rilq: compute the teacher's targets once and keep them on disk, rather than the teacher in memory."""

    learning_rate: Annotated[float | None, Flag(("--lr",), "Training")] = None
    """Peak learning rate of AdamW. Default: the paper's."""

    grid_learning_rate: Annotated[float | None, Flag(("--scale-lr",), "Training")] = None
    """Peak learning rate of scales and offsets, relative to the scale, where these train. Default: the method's."""

    schedule: Annotated[Literal["constant", "cosine", "linear"] | None, Flag(("--lr-scheduler-type",), "Training")] = (
        None
    )
    """Learning rate after the warm-up. Default: the paper's."""

    warmup_ratio: Annotated[float | None, Flag((), "Training")] = None
    """Share of the steps over which the learning rate rises. Default: the paper's."""

    weight_decay: Annotated[float | None, Flag((), "Training")] = None
    """AdamW's weight decay. Default: the paper's."""

    max_grad_norm: Annotated[float | None, Flag((), "Training")] = None
    """Gradients are scaled down to this norm. Default: the paper's."""

    max_steps: Annotated[int, Flag((), "Training")] = 0
    """Optimizer steps; 0 to go by --epochs."""

    epochs: Annotated[float, Flag(("--num-train-epochs",), "Training")] = 1.0
    """Passes over the data."""

    batch_size: Annotated[int, Flag(("--per-device-train-batch-size",), "Training")] = 8
    """Sequences in one forward pass."""

    gradient_accumulation: Annotated[int, Flag(("--gradient-accumulation-steps",), "Training")] = 2
    """Forward passes per optimizer step. The default makes the papers' batch of 16."""

    gradient_checkpointing: Annotated[bool, Flag((), "Training")] = False
    """Recompute activations in backward: less memory, about a third more time."""

    seed: Annotated[int, Flag((), "Training")] = 0
    """Of initialization, data order, dropout and calibration."""

    save_steps: Annotated[int, Flag((), "Training")] = 0
    """Steps between checkpoints to resume from. Default: a tenth of the run, at most 500."""

    eval_steps: Annotated[int, Flag((), "Training")] = 0
    """Steps between evaluations. Default: only at the end."""

    report_to: Annotated[str, Flag((), "Training")] = "none"
    """Where Trainer also reports: none, tensorboard, wandb, .."""

    dry_run: Annotated[bool, Flag((), "Output")] = False
    """Print what would be done, the true bits per weight and the peak memory, and stop."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Name the output, if the user has not."""
        values = with_planned_method(values)
        if isinstance(values, dict) and values.get("model") and not values.get("output"):
            bits = f"-{values['bits']}bit" if values.get("bits") else ""
            name = Path(str(values["model"])).expanduser().resolve().name
            return {**values, "output": f"{name}-{values.get('method', 'qa-lora')}{bits}"}
        return values

    def chosen_method(self) -> Method:
        """The method with the choices made about its adapter and recipe too."""
        from quadapt.methods import Recipe
        from quadapt.nn.adapters import L4Q, Pooled

        chosen = super().chosen_method()
        about: dict[str, Any] = {}
        for kind, names, owner in ((Pooled, ("pooling", "form"), "qa-lora"), (L4Q, ("init",), "l4q")):
            given = {name: value for name in names if (value := getattr(self, name)) is not None}
            if given and not isinstance(chosen.adapter, kind):
                raise ConfigError(
                    f"{next(iter(given))} is a setting of {owner}'s adapter; method={self.method!r} has none. Leave it "
                    "out"
                )
            about |= given
        if self.dense_steps and not isinstance(chosen.adapter, L4Q):
            raise ConfigError(
                f"dense_steps needs the dense matrix; method={self.method!r} trains over codes. Leave it out"
            )
        own = {
            name: getattr(self, name) for name in Recipe.__dataclass_fields__ if getattr(self, name, None) is not None
        }
        return replace(chosen, adapter=replace(chosen.adapter, **about), recipe=replace(chosen.recipe, **own))


class MergeConfig(Target, Machine):
    """Merge an adapter into its quantized base."""

    adapter: Annotated[str, Flag(positional=True)]
    """Folder of the adapter (what tune wrote)."""

    base: Annotated[str | None, Flag()] = None
    """Where its base is, if it is not where it was."""

    data: Annotated[str | None, Flag()] = None
    """Text to compare the merged with the adapted model on. Default: the training data if it is still there, else
    random tokens."""

    requantize: Annotated[bool, Flag((), "Requantization (lossy)")] = False
    """Quantize the adapted weights anew, where the adapter cannot merge. Loses some of what was trained, and says how
    much."""

    rounding: Annotated[Literal["nearest", "gptq"], Flag((), "Requantization (lossy)")] = "nearest"
    """How to requantize; gptq is calibrated on --data."""

    range: Annotated[Literal["minmax", "mse"], Flag((), "Requantization (lossy)")] = "minmax"
    """Span of a group's levels when requantizing."""


class EvalConfig(Machine):
    """Measure a model on held-out data."""

    model: Annotated[str, Flag(positional=True)]
    """Folder, hub name or GGUF file: anything that quadapt has written, or a dense model."""

    data: Annotated[str, Flag((), "Data")]
    """Data to measure on, of the kinds that tune takes."""

    base: Annotated[str | None, Flag()] = None
    """Where an adapter's base is, if it is not where it was."""

    context: Annotated[int | None, Flag(("--seq-len", "--max-length"), "Data")] = None
    """Tokens that the model sees at once. Default: its context, at most 2048."""

    stride: Annotated[int | None, Flag((), "Data")] = None
    """Tokens from one window to the next. Default: the context (windows do not overlap)."""

    limit: Annotated[int | None, Flag((), "Data")] = None
    """Use only the first so many rows."""

    max_new_tokens: Annotated[int, Flag((), "Data")] = 32
    """Longest answer, on prompt/completion data."""

    samples: Annotated[int, Flag((), "Output")] = 3
    """Continuations or answers to print."""

    batch_size: Annotated[int, Flag((), "Machine")] = 8
    """Sequences in one forward pass."""

    output: Annotated[str | None, Flag(("-o",), "Output")] = None
    """Also write the figures to this JSON file."""


class ExportConfig(Machine):
    """Write a model in a format that others serve."""

    model: Annotated[str, Flag(positional=True)]
    """Folder of a quantized model or of an adapter (it is merged first, if it merges exactly)."""

    output: Annotated[str, Flag(("-o",), "Output")]
    """File (gguf) or folder (hf, lora) to write."""

    format: Annotated[Literal["gguf", "hf", "lora", "compressed-tensors"], Flag((), "Output")] = "gguf"
    """gguf: for llama.cpp, codes as they are (an adapter that cannot merge becomes a LoRA file beside it). hf: dense
    weights, for any server. lora: a standard PEFT adapter. compressed-tensors: for vLLM, codes as they are, of integers
    with whole zero-points or none."""

    base: Annotated[str | None, Flag()] = None
    """Where an adapter's base is, if it is not where it was."""

    dense: Annotated[Literal["f32", "f16"], Flag((), "Output")] = "f32"
    """gguf: type of the layers that a block format cannot hold; f16 rounds them."""

    overwrite: Annotated[bool, Flag((), "Output")] = False
    """Replace the output if it exists."""


class InspectConfig(Settings):
    """Say what a folder holds."""

    model: Annotated[str, Flag(positional=True)]
    """Folder of a quantized model or an adapter."""

    verify: Annotated[bool, Flag()] = False
    """Check that every tensor is still what was written; fail and name those that are not."""

    layers: Annotated[bool, Flag()] = False
    """List every layer."""


class ChatConfig(Machine):
    """Talk to a model."""

    model: Annotated[str, Flag(positional=True)]
    """Anything that eval takes."""

    base: Annotated[str | None, Flag()] = None
    """Where an adapter's base is, if it is not where it was."""

    prompt: Annotated[str | None, Flag(("-p",))] = None
    """Answer this and stop, instead of asking for input."""

    max_new_tokens: Annotated[int, Flag()] = 128
    """Longest answer."""

    temperature: Annotated[float, Flag()] = 0.0
    """0: always the likeliest token."""

    seed: Annotated[int, Flag()] = 0
    """Of sampling."""


class DemoConfig(Settings):
    """Tune the embedded model by every method at 4, 3 and 2 bits, and compare."""

    output: Annotated[str, Flag(("-o",), "Output")] = "report"
    """Folder for the report, the merged model and the GGUF file."""

    overwrite: Annotated[bool, Flag((), "Output")] = True
    """Replace the report if it exists."""

    bits: Annotated[tuple[int, ...], Flag()] = (4, 3, 2)
    """Bit widths to compare."""

    seed: Annotated[int, Flag()] = 0
    """Of stories, initialization and data order."""


class RunConfig(Settings):
    """A whole job: tune, then merge, eval and export as far as they are listed."""

    output: str
    """Folder of the job; each stage writes into it."""

    tune: dict[str, Any]
    """Settings of `quadapt tune` but output."""

    merge: dict[str, Any] | None = None
    """Settings of `quadapt merge` but adapter and output. Omit to leave the adapter unmerged."""

    eval: dict[str, Any] | None = None
    """Settings of `quadapt eval` but model and output."""

    export: dict[str, Any] | None = None
    """Settings of `quadapt export` but model and output."""

    overwrite: bool = False
    """Start over if the job has been done."""


def read_job(path: str) -> RunConfig:
    """Read a job file.

    Raises:
        ConfigError: It is missing, not YAML, or has a wrong setting (named with its section).
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(
            file.name, [item.name for item in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        )
        raise ConfigError(f"{path!r} does not exist." + (f" Did you mean {near[0]!r}?" if near else ""))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings. It needs at least output and tune")
    stages: dict[str, Any] = {name: {} for name in ("merge", "eval", "export") if values.get(name, ...) is None}
    return checked(RunConfig, {**values, **stages}, f"{path}: ")
