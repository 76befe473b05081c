"""How the tests give commands, and the tiny model and data that they give them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from quadapt.cli import app

STORY = "The fox saw the sea. The owl said: swim, fox, swim! And she swam for 47 days, and came home.\n"
SUMS = [{"prompt": f"{left} + {left} =", "completion": f" {left + left}"} for left in range(24)]
SHORT = ("--seq-len", "32", "--batch-size", "2", "--gradient-accumulation", "1", "--rank", "2", "--lr", "0.02")
"""Settings of a training run that takes no time and changes the answers."""


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """All of stdout, as one JSON document without any word that is not JSON's."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def error(self) -> str:
        """The last line of stderr; there must be no traceback above it."""
        assert "Traceback" not in self.err, self.err
        return self.err.rstrip("\n").rpartition("\n")[2]


def give(*arguments: object, code: int | None = None) -> Said:
    """Give a command; `code` is the exit code that it should have."""
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    said = Said(found.exit_code, found.stdout, found.stderr)
    assert code in (None, said.code), f"exit code {said.code}, not {code}\n{said.out}\n{said.err}"
    return said


def quadapt(*arguments: object) -> dict[str, Any]:
    """Give a command that should succeed; its result."""
    return give(*arguments, "--json", code=0).json


def byte_tokenizer() -> Any:
    """A token for each byte, one for `he`, and one for the end, which also pads."""
    from transformers import PreTrainedTokenizerFast

    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def write_data(folder: Path) -> None:
    """`story.txt`, one document, and `sums.jsonl`, prompts and completions."""
    (folder / "story.txt").write_text(STORY * 12)
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a folder, by its path in it."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change."""
    found = [(item, item.stat()) for item in sorted(folder.rglob("*"))]
    return {str(item): (stat.st_size if item.is_file() else 0, stat.st_mtime_ns) for item, stat in found}


@torch.no_grad()
def logits(model: Any, ids: Sequence[int] = tuple(range(40, 72))) -> torch.Tensor:
    """Of a short sequence."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0].float()
