"""`quadapt init`: a commented job file, by four questions that are asked in the terminal or answered by options."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadapt.config import InitConfig, TuneConfig, checked, read_job
from quadapt.errors import ConfigError
from quadapt.files import writing
from quadapt.hf.folder import open_folder
from quadapt.hf.kinds import kind_of
from quadapt.hf.loading import read_config
from quadapt.hf.outputs import check_disk, check_output
from quadapt.jobs import dry
from quadapt.jobs.run import stages_of
from quadapt.jobs.source import check_writes
from quadapt.quant.weight import Layout
from quadapt.report.ui import UI

METHOD = "recover"
"""The method of the job, which keeps most."""

WIDTHS = (6, 5, 4, 3, 2)
"""Widths that a size in gigabytes is looked for among, largest first."""

SMALL = 4 * 10**9
"""Bytes of a dense model below which rates are larger than the papers' (about two billion weights in 16 bits)."""


@dataclass(frozen=True)
class Target:
    """A program that a model will run in, and what that asks of the job."""

    words: str
    """What the program is, in a few words."""

    format: str | None
    """The export format that it reads; None if it reads the merged folder."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of tune with which that format holds the codes as they are."""

    why: str = ""
    """What these settings are for, as a comment in the job file."""

    widths: tuple[int, ...] = (2, 3, 4, 5, 6)
    """The widths of codes that the program computes with."""


_WHOLE = {"zero": "integer"}
_WHOLE_WHY = "zero-points that are whole numbers, as this format has them: codes go out as they are"

TARGETS: dict[str, Target] = {
    "llama-cpp": Target(
        "llama.cpp, Ollama, LM Studio",
        "gguf",
        {"scales": "k-quant"},
        "llama.cpp's own blocks: codes go out as they are",
    ),
    "vllm": Target("vLLM, SGLang", "compressed-tensors", _WHOLE, _WHOLE_WHY, (4,)),
    "mlx": Target("mlx-lm on Macs", "mlx"),
    "onnx": Target("ONNX Runtime", "onnx", _WHOLE, _WHOLE_WHY),
    "openvino": Target("OpenVINO", "openvino", _WHOLE, _WHOLE_WHY),
    "transformers": Target("transformers, with quadapt installed", None),
    "dense": Target("whatever loads dense weights; the file is as large as the model was", "hf"),
}
"""Where a model may run, by the name that the question takes."""


def init(config: InitConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt init`: ask what is not given, write the job file, and return the answers.

    Raises:
        ConfigError: An answer cannot be, or is missing and there is no terminal to ask in.
        CheckpointError: The model is not there.
    """
    output = Path(config.output)
    check_output(output, overwrite=config.overwrite, folder=False)
    check_disk(output.parent, 0)
    model = config.model or _ask("Which model? A folder, or a name on the hub", "--model", ui)
    folder = open_folder(model)
    if folder.kind != "model":
        raise ConfigError(f"model={model!r} is {folder.kind}, and a job begins with a dense model. Give that one")
    check_writes(kind_of(read_config(folder.name)), model, "init")
    data = list(config.data) or [_ask("Which data to tune on? A file, a folder, or a name on the hub", "--data", ui)]
    choices = "".join(f"\n  {name}: {target.words}" for name, target in TARGETS.items())
    where = config.target or _ask(f"Where will it run?{choices}\n", "--target", ui, "llama-cpp", _target)
    target = TARGETS[where]
    offered = " ".join(map(str, target.widths))
    question = f"What size? Bits of a weight ({offered}), or of the whole file (3GB)"
    size = config.size or _ask(question, "--size", ui, "4", _size)
    bits = _bits(size, target, model, data)
    text = job_text(model, data, target, bits, small=_bytes(folder.path) < SMALL)
    with writing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
        stages_of(read_job(str(temporary)), output.parent / "job", str(output))  # else it would be found out too late
    ui.show(text)
    ui.say(f"wrote {output}. Look it over, then: quadapt run {output}")
    return {"output": config.output, "model": model, "data": data, "target": where, "bits": bits}


def _ask(question: str, flag: str, ui: UI, usual: str = "", check: Callable[[str], str] = str) -> str:
    """Ask until there is an answer that can be.

    Raises:
        ConfigError: There is no terminal to ask in, or the input has ended.
    """
    if not _at_terminal():
        name = flag.removeprefix("--")
        raise ConfigError(f"{name} is missing, and there is no terminal to ask in. Give {flag}")
    while True:
        ui.say(f"{question}{f' [{usual}]' if usual else ''}")
        try:
            answer = input("> ").strip() or usual
        except EOFError:
            raise ConfigError(f"the input has ended before all questions were answered. Give {flag}") from None
        try:
            if answer:
                return check(answer)
        except ConfigError as error:
            ui.say(str(error))


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _target(text: str) -> str:
    if text not in TARGETS:
        raise ConfigError(f"{text!r} is none of {', '.join(TARGETS)}")
    return text


def _size(text: str) -> str:
    return checked(InitConfig, {"size": text}).size or ""


def _bits(size: str, target: Target, model: str, data: list[str]) -> int:
    """The width that was asked for, or the largest one with which the model is no larger than asked.

    Raises:
        ConfigError: The program does not compute with it, or no width is small enough.
    """
    if not re.search("[A-Za-z]", size):
        if int(size) not in target.widths:
            allowed = ", ".join(map(str, target.widths))
            raise ConfigError(f"size={size}: {target.words} computes with codes of {allowed} bits. Use one of these")
        return int(size)
    most = float(size[:-2]) * {"G": 1e9, "M": 1e6}[size[-2]]
    sizes = {bits: _served_bytes(model, data, target, bits) for bits in WIDTHS if bits in target.widths}
    fitting = [bits for bits, size_of in sizes.items() if size_of <= most]
    if fitting:
        return fitting[0]
    least = min(target.widths)
    raise ConfigError(
        f"size={size}: with {least} bits it is {sizes[least] / 1e9:.2f} GB, and smaller is not to be had. Use more"
    )


def _served_bytes(model: str, data: list[str], target: Target, bits: int) -> int:
    """The bytes of the model that a job merges: its layers as they are stored then, and all else as it is."""
    values = {"model": model, "data": data, "method": METHOD, "bits": bits, **target.settings}
    config = checked(TuneConfig, values)
    found, method = dry.sketch(model, config), config.spec.method
    layers = [Layout.fitting(method.format, method.storage, each.out, each.columns) for each in found.layouts.values()]
    before = sum(each.bits for each in found.layouts.values())  # what trains among codes is held in fixed point
    return found.bytes_on_disk + (sum(each.bits for each in layers) - before) // 8


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def job_text(model: str, data: list[str], target: Target, bits: int, *, small: bool) -> str:
    """The job file, with what can be changed as comments.

    Args:
        model: The dense model.
        data: What to tune it on.
        target: Where it will run.
        bits: The width of codes.
        small: Whether the model is small, and wants larger rates than those of the papers.
    """
    first, finish, grid = (2e-3, 1e-3, 5e-4) if small else (2e-4, 2e-4, 1e-4)
    lines = [
        "# A job for `quadapt run`: the stages below, one after the other. Given again, it goes on where it stopped.",
        "# All settings of a stage: quadapt tune --help, quadapt merge --help, and so on.",
        f"output: {_value(_name(model, bits))}  # the folder of the job; each stage writes into it",
        "",
        "tune:",
        f"  model: {_value(model)}",
        f"  data: {_value(data[0] if len(data) == 1 else data)}",
        "  eval_split: 0.05  # share of the data that is held out: the state with the lowest loss on it is kept",
        f"  method: {METHOD}  # tune, quantize towards what was tuned, finish. With less memory: qa-lora.",
        "                   # Which one suits your data is found out by quadapt compare",
        f"  bits: {bits}",
    ]
    for at, (name, value) in enumerate(target.settings.items()):
        lines.append(f"  {name}: {value}{f'  # {target.why}' if at == 0 else ''}")
    lines += [
        f"  first_learning_rate: {first:.1e}  # of the tuning; for a model of "
        + ("less than some two billion weights" if small else "billions of weights; smaller ones want 1e-3 and more"),
        f"  learning_rate: {finish:.1e}  # of the finish",
        f"  grid_learning_rate: {grid:.1e}  # of scales and offsets in the finish",
        "  epochs: 1  # or max_steps: 1000",
        "  batch_size: 8  # sequences at once; with less memory 1, and gradient_accumulation 16",
        "  gradient_accumulation: 2",
        "  # seq_len: 1024  # tokens in a sequence; default: the model's context, at most 1024",
        "  # gradient_checkpointing: true  # less memory, about a third more time",
        "",
        "merge: {}  # with a certificate: the merged model is the one that was trained",
        "",
        "# eval:  # measure the merged model on data that it has not seen",
        "#   data: held-out.jsonl",
        "",
    ]
    if target.format is None:
        lines.append("# export:  # transformers loads the merged folder as it is, after `import quadapt`")
    else:
        lines += ["export:", f"  format: {target.format}  # for {target.words.partition(';')[0]}"]
    return "\n".join(lines) + "\n"


def _name(model: str, bits: int) -> str:
    return f"{Path(model).resolve().name if Path(model).exists() else model.rpartition('/')[2]}-{bits}bit"


def _value(value: Any) -> str:
    """A value as YAML has it, on one line: JSON is YAML."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _WORDS
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
