"""Ollama's Modelfile beside a GGUF file: what Ollama does not read from the file itself.

Ollama runs llama.cpp. It takes the chat template from the GGUF file where the Modelfile has no TEMPLATE (its sources,
llm/llama_server.go); a TEMPLATE is written in Go's language, and so stands here only for forms of prompts that are no
chat template. Values run to the end of the line or, in three quotes, over lines; nothing is escaped (parser/parser.go).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from quadapt.data import PromptForm
from quadapt.errors import ExportError

MOST_CONTEXT = 8192
"""The longest context that is asked for: Ollama takes the memory for all of it when it loads a model."""


def modelfile(path: Path, *, form: PromptForm, ends: Iterable[str], context: int, adapters: Sequence[Path] = ()) -> str:
    """The text of a Modelfile.

    Args:
        path: The GGUF file, which lies beside it.
        form: The form in which the model is asked.
        ends: The tokens that end an answer, as text.
        context: How many tokens the model was made for.
        adapters: GGUF files beside it that llama.cpp applies as adapters; Ollama takes one.

    Raises:
        ExportError: There are two adapters, or a token cannot be written in such a file.
    """
    if len(adapters) > 1:
        names = " and ".join(file.name for file in adapters)
        raise ExportError(f"Ollama takes one adapter, and {path.name} needs {names}. Leave --ollama out")
    lines = [f"FROM ./{path.name}", *(f"ADAPTER ./{file.name}" for file in adapters)]
    parts = form.parts()
    if parts is None:
        lines.append("# TEMPLATE: the chat template of the GGUF file")
    else:
        before, after = parts
        lines.append(f'TEMPLATE """{before}{{{{ .Prompt }}}}{after}"""')
    lines += [f"PARAMETER stop {_quoted(end)}" for end in dict.fromkeys(ends)]
    if context > MOST_CONTEXT:
        lines.append(f"# the model takes up to {context} tokens; a longer context takes more memory")
    lines.append(f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A value in quotes, as Ollama's parser takes them off."""
    if '"""' in text or text.endswith('"') or "\n" in text:
        raise ExportError(f"the token {text!r} ends an answer, and a Modelfile cannot say so. Leave --ollama out")
    return f'"""{text}"""'
