"""The kinds of input that are damaged, and what may come of each: refused in a sentence, or the same as before."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer
from hypothesis import strategies as st

from benchmarks.fuzz.cases import FaultError, command, guard, linked
from benchmarks.fuzz.damage import BYTES, TREE, damaged_bytes, damaged_header, damaged_json, edits, values
from benchmarks.fuzz.loading import load_damaged, load_gguf, tokenize_damaged
from quadapt.cli.commands import COMMANDS, app, settings_of
from quadapt.config import QuantizeConfig, checked, read_job
from quadapt.errors import QuadaptError
from quadapt.model.layer import LayerRow
from quadapt.model.quantize import Done, quantized_layers


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    share: float
    """Of all cases."""

    examples: st.SearchStrategy[Any]
    """What is tried."""

    run: Callable[[Path, Path, Any], bool]
    """`run(shelf, scratch, example)`: whether it was accepted; raises `FaultError`. `scratch` is an empty folder."""


def _refused(work: Callable[[], Any]) -> bool:
    """Whether an error of ours came of it; any other error goes through."""
    try:
        work()
    except QuadaptError:
        return True
    return False


# --- settings ---------------------------------------------------------------------------------------------------------

PAIRS = [(name, field) for name in COMMANDS for field in settings_of(name).model_fields]
NEEDED = {"model": "m", "data": "d", "output": "o", "adapter": "a", "budget": 3.0}
words = st.one_of(
    values, st.sampled_from(["qa-lora", "4", "1e-3", "nan", "inf", "-1", "~/x", "cpu", "none", "1" * 5000])
)


def _python(_shelf: Path, _scratch: Path, example: tuple[str, dict[str, Any]]) -> bool:
    """Settings from Python: what is accepted is what was given, and can be written down."""
    name, given = example
    kind = settings_of(name)
    needed = {each: value for each, value in NEEDED.items() if each in kind.model_fields}
    found: list[Any] = []
    if _refused(lambda: found.append(checked(kind, {**needed, **given}))):
        return False
    for each, value in found[0].model_dump().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FaultError(f"{each}={value} was accepted")
        if isinstance(value, str):
            value.encode("utf-8")
        wanted = given.get(each)
        if type(wanted) is type(value) and wanted != value and not str(wanted).startswith("~"):
            raise FaultError(f"{each}={wanted!r} became {value!r}")
    return True


@cache
def _parser() -> Any:
    return typer.main.get_command(app)


def _flags(_shelf: Path, _scratch: Path, example: tuple[str, list[tuple[str, Any]]]) -> bool:
    """The command line; the commands themselves do nothing here."""
    name, given = example
    kind = settings_of(name)
    arguments = [name, *(["m"] if {"model", "adapter"} & set(kind.model_fields) else [])]
    for each in NEEDED.keys() & set(kind.model_fields) - {"model", "adapter"}:
        arguments += [f"--{each}", str(NEEDED[each])]
    for flag, value in given:
        arguments += [f"--{flag.replace('_', '-')}", *([] if value is None else [str(value)])]
    code, said = 0, io.StringIO()
    with patch("quadapt.cli.commands._load", lambda _: lambda *_: {}), redirect_stderr(said), redirect_stdout(said):
        try:
            _parser().main(arguments, standalone_mode=True)
        except SystemExit as end:
            code = int(end.code or 0)
    if code not in (0, 2):
        raise FaultError(f"exit code {code}: {said.getvalue()[-800:]}")
    return code == 0


def _yaml(shelf: Path, scratch: Path, changes: Any) -> bool:
    """A job file: read, and the settings of all its stages checked."""
    from quadapt.jobs.run import stages_of

    job = scratch / "job.yaml"
    text = (shelf / "job.yaml").read_bytes()
    if isinstance(changes, dict):
        text = json.dumps(changes).encode("utf-8", "surrogatepass")  # JSON is YAML
    else:
        text = damaged_bytes(text, changes)
    job.write_bytes(text)
    return not _refused(lambda: stages_of(read_job(str(job)), scratch / "out", str(job)))


sections = st.dictionaries(
    st.sampled_from(["output", "tune", "merge", "eval", "export", "overwrite", "nope"]),
    st.one_of(
        values,
        st.dictionaries(
            st.one_of(st.sampled_from([field for _, field in PAIRS]), st.text(max_size=3)), values, max_size=4
        ),
    ),
    max_size=5,
)

# --- data -------------------------------------------------------------------------------------------------------------

DATA = ("rows.jsonl", "turns.jsonl", "list.json", "table.csv", "story.txt")


def _data(shelf: Path, scratch: Path, example: tuple[str, Any]) -> bool:
    """Training data: every row that is accepted is text."""
    from quadapt.data import encode, read

    name, changes = example
    data = (shelf / name).read_bytes()
    if name.endswith("jsonl"):
        lines = data.splitlines()
        at = changes[0].at % len(lines)
        lines[at] = damaged_json(lines[at], changes)
        data = b"\n".join(lines)
    else:
        data = damaged_json(data, changes) if name.endswith("json") else damaged_bytes(data, changes)
    (scratch / name).write_bytes(data)
    found: list[Any] = []
    if _refused(lambda: found.append(read(str(scratch / name)))):
        return False
    for row in found[0].data:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    return not _refused(lambda: encode(found[0], _tokenizer(shelf), seq_len=32, packing=False))


@cache
def _tokenizer(shelf: Path) -> Any:
    from quadapt.hf.loading import load_tokenizer

    return load_tokenizer(str(shelf / "dense"))


# --- folders ----------------------------------------------------------------------------------------------------------


def _note(shelf: Path, scratch: Path, example: tuple[str, bool, Any]) -> bool:
    """`quadapt.json`: inspected, and with `--verify` what is said of the merge is what was said before."""
    name, verify, changes = example
    before = (shelf / name / "quadapt.json").read_bytes()
    after = damaged_json(before, changes)
    folder = linked(shelf / name, scratch / name, {"quadapt.json": after})
    verify = verify and name != "adapter"
    code, _ = command("inspect", {"model": str(folder), "verify": verify})
    if not code and verify and after != before:
        old, new = (json.loads(text).get("certificate") for text in (before, after))
        if old != new:
            raise FaultError(f"verified, though the certificate is another: {new!r:.300}")
    return not code


def _plan(shelf: Path, scratch: Path, changes: Any) -> bool:
    """A plan: what is accepted is what the file says."""
    file = scratch / "plan.json"
    file.write_bytes(damaged_json((shelf / "plan.json").read_bytes(), changes))
    found: list[Any] = []

    def read() -> None:
        config = checked(QuantizeConfig, {"model": "m", "output": "o", "plan": str(file)})
        plan = config.spec.quantization
        for name, shape in plan.shapes.items():
            plan.layout(name, *shape)
        found.append(config.budget_plan(config.spec.method))

    if _refused(read):
        return False
    said, wanted = json.loads(json.dumps(found[0].as_json())), json.loads(file.read_bytes())
    for name, layer in said.pop("layers").items():
        for key in ("out", "columns", "error", "format", "storage"):
            if layer[key] != wanted["layers"][name][key]:
                raise FaultError(f"{name}: {key} is {layer[key]!r}, the file says {wanted['layers'][name][key]!r}")
    for name, value in said.items():
        if name != "version" and value != wanted[name] and value == value:
            raise FaultError(f"{name} is {value!r}, the file says {wanted[name]!r}")
    return True


def _config(shelf: Path, scratch: Path, example: tuple[str, str, Any]) -> bool:
    """`config.json` and its like: the architecture that it describes, without weights."""
    from quadapt.hf.checkpoint import skeleton
    from quadapt.hf.context import context_of
    from quadapt.hf.folder import open_folder
    from quadapt.hf.loading import read_config

    name, file, changes = example
    data = damaged_json((shelf / name / file).read_bytes(), changes)
    folder = linked(shelf / name, scratch / name, {file: data})

    def read() -> None:
        open_folder(str(folder))
        config = read_config(str(folder))
        context_of(config)
        skeleton(config)

    code, _ = guard(lambda _: read() or {})
    return not code


def _checkpoint(shelf: Path, scratch: Path, example: tuple[str, Any]) -> bool:
    """What an interrupted run left: it is gone on with, or done again."""
    from quadapt.hf.blocks import BlockFiles
    from quadapt.hf.start import read_start, write_start
    from quadapt.hf.workspace import Workspace
    from quadapt.train import last_checkpoint

    which, changes = example
    if which == "complete":
        folder = scratch / "checkpoint-2"
        folder.mkdir()
        (folder / "model.bin").write_bytes(b"12345")
        (folder / "complete.json").write_bytes(damaged_json(b'{"model.bin": 5}', changes))
        return last_checkpoint(scratch) is not None
    if which == "job":
        with Workspace(scratch / "out", {"a": {"b": [1, 2]}}) as space:
            (space.path / "work").write_text("done")
            job = (space.path / "job.json").read_bytes()
        (space.path / "job.json").write_bytes(damaged_json(job, changes))
        return not _refused(lambda: Workspace(scratch / "out", {"a": {"b": [1, 2]}}).__exit__(None, None, None))
    if which == "block":
        kept = BlockFiles(scratch / "blocks")
        kept.keep("block", _block(shelf))
        file = scratch / "blocks" / "block.safetensors"
        file.write_bytes(damaged_header(file.read_bytes(), changes))
        return kept.find("block") is not None
    write_start(scratch / "start.safetensors", {"a.b": (torch.zeros(4, 2), torch.zeros(2, 4))})
    data = (scratch / "start.safetensors").read_bytes()
    (scratch / "start.safetensors").write_bytes(damaged_header(data, changes))
    return not _refused(lambda: read_start(scratch / "start.safetensors"))


@cache
def _block(shelf: Path) -> Done:
    """What quantizing made of a block."""
    from quadapt.hf.loading import load_model

    layers = quantized_layers(load_model(str(shelf / "q4")))
    rows = [LayerRow(**row) for row in json.loads((shelf / "q4" / "quadapt.json").read_text())["rows"]]
    return Done({name: layer.quant_weight for name, layer in layers.items()}, rows)


COMMAND_CASES = ("eval", "chat", "merge", "export", "quantize", "tune", "plan")
FILES = {
    "eval": ("q4", "merged", "dense"),
    "chat": ("q4", "adapter"),
    "merge": ("adapter",),
    "export": ("merged", "adapter"),
    "quantize": ("dense",),
    "tune": ("dense", "q4"),
    "plan": ("dense",),
}


def _whole_command(shelf: Path, scratch: Path, example: tuple[str, int, int, Any]) -> bool:
    """A whole command over a folder with a damaged file: done, or refused with nothing left behind."""
    name, which, at, changes = example
    source = shelf / FILES[name][which % len(FILES[name])]
    files = sorted(item for item in source.iterdir() if item.is_file() and item.suffix != ".md")
    file = files[at % len(files)]
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        data = damaged_header(data, changes)
    else:
        data = damaged_json(data, changes) if file.suffix == ".json" else damaged_bytes(data, changes)
    folder = str(linked(source, scratch / "m", {file.name: data}))
    settings: dict[str, Any] = {
        "eval": {"model": folder, "data": str(shelf / "rows.jsonl"), "context": 16, "max_new_tokens": 2},
        "chat": {"model": folder, "prompt": "Hi", "max_new_tokens": 2},
        "merge": {"adapter": folder, "output": str(scratch / "out")},
        "export": {"model": folder, "output": str(scratch / "out.gguf")},
        "quantize": {"model": folder, "output": str(scratch / "out"), "rounding": "nearest"},
        "tune": {"model": folder, "output": str(scratch / "out"), "data": str(shelf / "rows.jsonl"), "dry_run": True},
        "plan": {"model": folder, "output": str(scratch / "plan.json"), "budget": 3.5, "rank": 2},
    }[name]
    if source.name == "adapter":
        settings["base"] = str(source / "base")
    return not command(name, settings)[0]


# --- all --------------------------------------------------------------------------------------------------------------

any_edit = edits(*TREE, *TREE, *BYTES)
LOADED = (
    *(("dense", "config.json"), ("dense", "model.safetensors"), ("dense", "generation_config.json")),
    *(("q4", "config.json"), ("q4", "model.safetensors"), ("q4", "generation_config.json"), ("q4", "quadapt.json")),
    *(("adapter", "adapter_config.json"), ("adapter", "adapter_model.safetensors"), ("adapter", "quadapt.json")),
)

KINDS: Mapping[str, Kind] = {
    "settings (Python)": Kind(
        0.34,
        st.sampled_from(sorted(COMMANDS)).flatmap(
            lambda name: st.tuples(
                st.just(name),
                st.dictionaries(st.sampled_from(sorted(settings_of(name).model_fields)), words, min_size=1, max_size=3),
            )
        ),
        _python,
    ),
    "settings (flags)": Kind(
        0.12,
        st.sampled_from(sorted(COMMANDS)).flatmap(
            lambda name: st.tuples(
                st.just(name),
                st.lists(
                    st.tuples(
                        st.one_of(st.sampled_from(sorted(settings_of(name).model_fields)), st.text("abc-", max_size=5)),
                        st.one_of(st.none(), words),
                    ),
                    min_size=1,
                    max_size=3,
                ),
            )
        ),
        _flags,
    ),
    "settings (YAML)": Kind(0.06, st.one_of(edits(*BYTES), sections), _yaml),
    "data": Kind(0.08, st.tuples(st.sampled_from(DATA), any_edit), _data),
    "notes": Kind(0.16, st.tuples(st.sampled_from(["q4", "merged", "adapter"]), st.booleans(), any_edit), _note),
    "plans": Kind(0.12, any_edit, _plan),
    "what an interrupted run left": Kind(
        0.09, st.tuples(st.sampled_from(["complete", "job", "block", "start"]), any_edit), _checkpoint
    ),
    "configs": Kind(0.014, st.tuples(st.sampled_from(["dense", "q4"]), st.just("config.json"), any_edit), _config),
    "tokenizers and templates": Kind(
        0.008,
        st.tuples(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]), any_edit),
        tokenize_damaged,
    ),
    "models and adapters": Kind(
        0.005, st.builds(lambda pair, changes: (*pair, changes), st.sampled_from(LOADED), any_edit), load_damaged
    ),
    "GGUF files": Kind(0.001, edits(*BYTES), load_gguf),
    "whole commands": Kind(
        0.002,
        st.tuples(st.sampled_from(COMMAND_CASES), st.integers(0, 5), st.integers(0, 20), any_edit),
        _whole_command,
    ),
}
