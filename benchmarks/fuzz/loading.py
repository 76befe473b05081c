"""Damaged models, adapters, tokenizers and GGUF files: each loads whole, or is refused."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.cases import FaultError, command, guard, linked
from benchmarks.fuzz.damage import damaged_bytes, damaged_header, damaged_json


def load_damaged(shelf: Path, scratch: Path, example: tuple[str, str, Any]) -> bool:
    """A model with damaged files: whole, or refused. Of a quantized one that verifies, all numbers are the old ones."""
    from quadapt.hf.loading import load

    name, file, changes = example
    data = (shelf / name / file).read_bytes()
    data = damaged_header(data, changes) if file.endswith(".safetensors") else damaged_json(data, changes)
    folder = linked(shelf / name, scratch / name, {file: data})
    found: list[Any] = []
    code, _ = guard(lambda _: found.append(load(str(folder), base=_base(shelf, name))) or {})
    if code:
        return False
    model, tokenizer = found[0]
    sure = file.endswith(".safetensors") and name != "dense"
    if sure and name == "q4":
        sure = not command("inspect", {"model": str(folder), "verify": True})[0]
    if sure and _digest(model) != _whole(shelf, name):
        raise FaultError(f"{name}: other numbers than before, accepted")
    code, _ = guard(lambda _: _answer(model, tokenizer))
    return not code


def _base(shelf: Path, name: str) -> str | None:
    return str(shelf / "adapter" / "base") if name == "adapter" else None


def _answer(model: Any, tokenizer: Any) -> dict[str, Any]:
    from quadapt.evaluate import generate_samples

    return {"samples": generate_samples(model, tokenizer, ["The fox"], max_new_tokens=2)}


def _digest(model: Any) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@cache
def _whole(shelf: Path, name: str) -> str:
    from quadapt.hf.loading import load

    return _digest(load(str(shelf / name), base=_base(shelf, name))[0])


def tokenize_damaged(shelf: Path, scratch: Path, example: tuple[str, Any]) -> bool:
    """Files of a tokenizer, its template among them: it encodes, or is refused."""
    from quadapt.data import encode, read
    from quadapt.hf.loading import load_tokenizer

    file, changes = example
    data = (shelf / "dense" / file).read_bytes()
    data = damaged_bytes(data, changes) if file.endswith(".jinja") else damaged_json(data, changes)
    folder = linked(shelf / "dense", scratch / "dense", {file: data})

    def work() -> None:
        tokenizer = load_tokenizer(str(folder))
        encode(read(str(shelf / "turns.jsonl")), tokenizer, seq_len=32, packing=False)

    code, _ = guard(lambda _: work() or {})
    return not code


def load_gguf(shelf: Path, scratch: Path, changes: Any) -> bool:
    """A GGUF file with a damaged head."""
    from quadapt.hf.loading import load

    data = (shelf / "m.gguf").read_bytes()
    (scratch / "m.gguf").write_bytes(damaged_bytes(data[:HEAD], changes) + data[HEAD:])
    code, _ = guard(lambda _: load(str(scratch / "m.gguf")) and {})
    return not code


HEAD = 12_000
"""Bytes of a GGUF file that are damaged: metadata, the vocabulary, and where the tensors are."""
