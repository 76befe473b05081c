"""Ollama's Modelfile, read as Ollama's own parser reads it (parser/parser.go in its sources)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quadapt.data import PromptForm
from quadapt.data.prompt import alpaca
from quadapt.errors import ExportError
from quadapt.exporters.ollama import modelfile

COMMANDS = {"from", "license", "template", "system", "adapter", "parameter", "message", "requires"}
"""What a line may begin with."""


def parsed(text: str) -> Iterator[tuple[str, str]]:
    """Commands and values: to the end of the line or, in one or three quotes, to the quotes; comments are left out."""
    at = 0
    while at < len(text):
        line = text[at:].partition("\n")[0]
        if not line.strip() or line.startswith("#"):
            at += len(line) + 1
            continue
        name, _, rest = text[at:].partition(" ")
        assert name.lower() in COMMANDS, name
        if name.lower() == "parameter":
            name, _, rest = rest.partition(" ")
            assert re.fullmatch("[a-zA-Z0-9_]+", name)
        if rest.startswith('"""'):
            value, found, after = rest[3:].partition('"""')
            assert found
            assert after.startswith("\n")
        else:
            value, _, after = rest.partition("\n")
            after = f"\n{after}"
            assert value == value.strip(' "')
        yield name, value
        at = len(text) - len(after) + 1


def rendered(template: str, prompt: str) -> str:
    """What Go makes of a template that has nothing but the prompt in it."""
    assert re.findall(r"\{\{.*?\}\}", template) == ["{{ .Prompt }}"]
    return template.replace("{{ .Prompt }}", prompt)


@pytest.mark.parametrize("kind", ["prompt", "alpaca"])
def test_a_form_becomes_a_template(kind: str) -> None:
    form = PromptForm.from_dict({"kind": kind})
    said = dict(parsed(modelfile(Path("a/m.gguf"), form=form, ends=["</s>"], context=512)))
    assert said["FROM"] == "./m.gguf"
    assert rendered(said["TEMPLATE"], "Who?") == (alpaca("Who?") if kind == "alpaca" else "Who?")
    assert (said["stop"], said["num_ctx"]) == ("</s>", "512")


def test_a_chat_template_is_that_of_the_file() -> None:
    text = modelfile(
        Path("m.gguf"),
        form=PromptForm("chat"),
        ends=["<|im_end|>", "</s>", "</s>"],
        context=1 << 17,
        adapters=[Path("l.gguf")],
    )
    said = list(parsed(text))
    assert [name for name, _ in said] == ["FROM", "ADAPTER", "stop", "stop", "num_ctx"]
    assert [value for _, value in said] == ["./m.gguf", "./l.gguf", "<|im_end|>", "</s>", "8192"]
    assert "takes up to 131072 tokens" in text


@pytest.mark.parametrize("token", ['a"""b', 'a"', "a\nb"])
def test_a_token_that_cannot_be_said_is_refused(token: str) -> None:
    with pytest.raises(ExportError, match="Leave --ollama out"):
        modelfile(Path("m.gguf"), form=PromptForm("chat"), ends=[token], context=8)


def test_two_adapters_are_refused() -> None:
    two = [Path("a.gguf"), Path("b.gguf")]
    with pytest.raises(ExportError, match=r"Ollama takes one adapter, and m\.gguf needs a\.gguf and b\.gguf"):
        modelfile(Path("m.gguf"), form=PromptForm("chat"), ends=[], context=8, adapters=two)
