"""The settings of each command. The words under a field are what `--help` prints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from quadapt.config.fields import Columns, Machine, Settings, Target
from quadapt.config.values import Location, Sources
from quadapt.setting import Count, Flag, NotNegative, Port, Seed, Whole
from quadapt.widths import NormalFloatWidth


class MergeConfig(Target, Machine):
    """Merge an adapter into its quantized base."""

    adapter: Annotated[Location, Flag(positional=True, reads=True)]
    """The folder of the adapter, which `quadapt tune` wrote."""

    base: Annotated[Location | None, Flag(reads=True)] = None
    """The folder of the adapter's base, if it has moved since the adapter was made."""

    any_base: Annotated[bool, Flag()] = False
    """Take the adapter though its base is another one than it was trained over. What comes of it is another model."""

    data: Annotated[Sources, Flag(reads=True)] = ()
    """Text to compare the merged with the adapted model on. Default: the training data if it is still there, else
    random tokens."""

    requantize: Annotated[bool, Flag((), "Requantization (lossy)")] = False
    """Quantize the adapted weights anew, where the adapter cannot merge. Loses some of what was trained, and says how
    much."""

    rounding: Annotated[Literal["nearest", "gptq"], Flag((), "Requantization (lossy)")] = "nearest"
    """How to requantize; gptq is calibrated on --data."""

    range: Annotated[Literal["minmax", "mse", "icq", "icq-scale"], Flag((), "Requantization (lossy)")] = "minmax"
    """Span of a group's levels when requantizing, as for quantize."""


class ConvertConfig(Target, Machine):
    """Write a model that others have quantized in quadapt's own form, with the same numbers."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder, hub name or file of the model. tune, eval, chat and export take it as it is; converting it saves the time
    to read it anew, and gives it a fingerprint and digests."""


class EvalConfig(Columns, Machine):
    """Measure a model on held-out data."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder, hub name or GGUF file: anything that quadapt has written, or a dense model."""

    tasks: Annotated[tuple[str, ...], Flag((), "Tasks of the harness (lm_eval)")] = ()
    """Measure by these tasks of EleutherAI's harness instead of --data: mmlu, arc_challenge, piqa, winogrande,
    hellaswag, boolq, openbookqa, social_iqa, gsm8k, and all others that it has; comma-separated. Needs the
    extra eval."""

    task_files: Annotated[Location | None, Flag((), "Tasks of the harness (lm_eval)", reads=True)] = None
    """Folder with the files of the tasks, where there is no network: MMLU's CSV files, the JSON of LLM-Adapters,
    GSM8K's JSONL. Default: data of the hub."""

    few_shot: Annotated[Whole | None, Flag(("--num-fewshot",), "Tasks of the harness (lm_eval)")] = None
    """Examples that stand before each question. Default: what the task says (none for most)."""

    data: Annotated[Sources, Field(validate_default=True), Flag((), "Data", reads=True)] = ()
    """Data to measure on, of the kinds that tune takes; or give --tasks."""

    protocol: Annotated[Literal["documents", "gptq"], Flag((), "Data")] = "documents"
    """How perplexity is measured. documents: each text by itself. gptq: as in GPTQ and the papers after it, all texts
    joined by two newlines, in windows of 2048 tokens (--context) that know nothing of each other."""

    base: Annotated[Location | None, Flag(reads=True)] = None
    """The folder of an adapter's base, if it has moved since the adapter was made."""

    any_base: Annotated[bool, Flag()] = False
    """Take an adapter though its base is another one than it was trained over. What comes of it is another model."""

    context: Annotated[Count | None, Flag(("--seq-len", "--max-length"), "Data")] = None
    """Tokens that the model sees at once. Default: its context, at most 2048."""

    stride: Annotated[Count | None, Flag((), "Data")] = None
    """Tokens from one window to the next. Default: the context (windows do not overlap)."""

    limit: Annotated[Count | None, Flag((), "Data")] = None
    """Use only the first so many rows, or questions of each task."""

    max_new_tokens: Annotated[Count, Flag((), "Data")] = 32
    """The most tokens that an answer may have, on prompt/completion data; in tasks, the default is the task's."""

    prompt_form: Annotated[Literal["auto", "prompt", "alpaca", "chat"], Flag((), "Data")] = "auto"
    """How prompts are put. prompt: as they are. alpaca: in Stanford Alpaca's template. chat: through the tokenizer's
    chat template. auto: as in training, which is recorded beside an adapter; else as the data stand."""

    system: Annotated[str | None, Flag((), "Data")] = None
    """A system message; only a chat template has a place for it."""

    samples: Annotated[Whole, Flag((), "Output")] = 3
    """How many continuations or answers to print."""

    batch_size: Annotated[Count, Flag((), "Machine", idle=True)] = 8
    """How many sequences go through the model at once."""

    output: Annotated[Location | None, Flag(("-o",), "Output", idle=True)] = None
    """Also write the figures to this JSON file."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the output if it exists."""

    @field_validator("data")
    @classmethod
    def _something_to_do(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if "tasks" not in info.data:  # said already
            return value
        tasks = info.data["tasks"]
        if not value and not tasks:
            raise PydanticCustomError("missing", "neither data nor tasks")
        if value and tasks:
            raise ValueError("tasks are given too, which bring their own data. Measure the two one after the other")
        for name in ("task_files", "few_shot"):
            if value and info.data.get(name) is not None:
                raise ValueError(f"{name}={info.data[name]!r} belongs to tasks, which are not given. Leave it out")
        return value


class InspectConfig(Settings):
    """Say what a folder holds."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """Folder of a quantized model or an adapter."""

    verify: Annotated[bool, Flag()] = False
    """Check that tensors, configs, tokenizer and figures are still what was written; fail and name what is not."""

    layers: Annotated[bool, Flag()] = False
    """List every quantized layer as well."""


class DoctorConfig(Settings):
    """Say what is installed, what this machine has, and whether the kernels are right on it."""

    kernels: Annotated[bool, Flag()] = True
    """Run a kernel of each kind and compare it with plain torch; without, only versions and devices are listed."""


class ChatConfig(Machine):
    """Talk to a model in the terminal."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """The model to talk to: anything that `quadapt eval` takes."""

    base: Annotated[Location | None, Flag(reads=True)] = None
    """The folder of an adapter's base, if it has moved since the adapter was made."""

    any_base: Annotated[bool, Flag()] = False
    """Take an adapter though its base is another one than it was trained over. What comes of it is another model."""

    prompt: Annotated[str | None, Flag(("-p",))] = None
    """Answer this and stop, instead of asking for input."""

    max_new_tokens: Annotated[Count, Flag()] = 128
    """The most tokens that an answer may have."""

    prompt_form: Annotated[Literal["auto", "prompt", "alpaca", "chat"], Flag()] = "auto"
    """How prompts are put. prompt: as they are. alpaca: in Stanford Alpaca's template. chat: through the tokenizer's
    chat template. auto: as in training, which is recorded beside an adapter; else chat, if there is a template."""

    system: Annotated[str | None, Flag()] = None
    """A system message; only a chat template has a place for it."""

    temperature: Annotated[NotNegative, Flag()] = 0.0
    """The temperature of sampling; at 0 the likeliest token is always taken."""

    seed: Annotated[Seed, Flag()] = 0
    """The seed of the random numbers that sampling draws."""


class ServeConfig(Machine):
    """Answer programs and browsers: an HTTP server with OpenAI's interface."""

    model: Annotated[Location, Flag(positional=True, reads=True)]
    """The model to serve: anything that `quadapt chat` takes."""

    engine: Annotated[Literal["auto", "llama-cpp", "transformers"], Flag()] = "auto"
    """The program that serves. llama-cpp: llama.cpp's own server, from a GGUF file (a folder is exported to one first).
    transformers: that of transformers, from the folder as it is. auto: llama.cpp, if GGUF holds the codes as they are;
    else transformers."""

    host: Annotated[str, Field(min_length=1), Flag()] = "127.0.0.1"
    """The address to listen on. The default is reached from this machine alone; 0.0.0.0 from all that reach it, and
    neither server asks who they are."""

    port: Annotated[Port, Flag()] = 8080
    """The port to listen on; 0 takes a free one."""

    name: Annotated[str | None, Field(min_length=1), Flag(("--served-model-name",))] = None
    """The name that requests call the model by. Default: that of its folder or file."""

    base: Annotated[Location | None, Flag(reads=True)] = None
    """The folder of an adapter's base, if it has moved since the adapter was made."""

    any_base: Annotated[bool, Flag()] = False
    """Take an adapter though its base is another one than it was trained over. What comes of it is another model."""

    prompt_form: Annotated[Literal["auto", "prompt", "alpaca", "chat"], Flag()] = "auto"
    """How messages are put. prompt: the last one as it is. alpaca: the last one in Stanford Alpaca's template. chat:
    all of them through the model's chat template. auto: as in training, which is recorded beside an adapter; else
    chat, if there is a template."""

    context: Annotated[Count | None, Flag(("--ctx-size", "--max-model-len"))] = None
    """llama.cpp: tokens that prompt and answer may have together. Default: the model's context, or less if the memory
    for it is lacking."""

    temperature: Annotated[NotNegative | None, Flag()] = None
    """The temperature of sampling for requests that name none; at 0 the likeliest token is always taken. Default: the
    server's own, which is 0.8 for llama.cpp, and for transformers what the model's generation_config says, or 1."""


class DemoConfig(Settings):
    """Tune the embedded model by every method at 4, 3 and 2 bits, and compare."""

    output: Annotated[Location, Flag(("-o",), "Output", idle=True)] = "report"
    """Folder for the report, the merged model and the GGUF file."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the report of an earlier run."""

    bits: Annotated[tuple[NormalFloatWidth, ...], Field(min_length=1), Flag()] = (4, 3, 2)
    """Bit widths to compare, of 2, 3, 4 and 8."""

    seed: Annotated[Seed, Flag()] = 0
    """The seed of stories, initialization and data order."""


class InitConfig(Settings):
    """Write a commented job file for `quadapt run`, by four questions; options answer them without a terminal."""

    model: Annotated[Location | None, Flag()] = None
    """Folder or hub name of the dense model."""

    data: Annotated[Sources, Flag()] = ()
    """Data to tune on, of the kinds that tune takes."""

    target: Annotated[
        Literal["llama-cpp", "vllm", "mlx", "onnx", "openvino", "transformers", "dense"] | None, Flag()
    ] = None
    """Where it will run. llama-cpp: llama.cpp, Ollama, LM Studio. vllm: also SGLang. mlx: Macs. onnx: ONNX Runtime.
    openvino: OpenVINO. transformers: with quadapt installed. dense: whatever loads dense weights."""

    size: Annotated[str | None, Flag()] = None
    """How large it may be: bits of a weight (2, 3, 4, 5 or 6), or of the whole (3GB, 700MB), for which the largest
    width that fits is taken."""

    output: Annotated[Location, Flag(("-o",), "Output", idle=True)] = "job.yaml"
    """The job file to write."""

    overwrite: Annotated[bool, Flag((), "Output", idle=True)] = False
    """Replace the file if it exists."""

    @field_validator("size", mode="before")
    @classmethod
    def _a_size(cls, value: Any) -> Any:
        text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if value is not None and not re.fullmatch(r"[2-6]|\d+(\.\d+)? ?(GB|MB)", text, re.IGNORECASE):
            raise ValueError("must be bits of a weight (2, 3, 4, 5 or 6), or a size such as 3GB or 700MB")
        return None if value is None else text.upper().replace(" ", "")


class RunConfig(Settings):
    """A whole job: tune, then merge, eval and export as far as they are listed."""

    output: Location
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
