"""In which form a prompt reaches the model in training, so that it can be asked in the same form afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from quadapt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
"""Stanford Alpaca's template for an instruction alone, with Alpaca-LoRA's line end after it, at which a token ends."""

ALPACA_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
"""The same for an instruction with an input."""

FormKind = Literal["text", "prompt", "alpaca", "chat"]


def alpaca(instruction: str, context: str = "") -> str:
    """An instruction, and its input if it has one, in Stanford Alpaca's template."""
    return (ALPACA_INPUT if context else ALPACA).format_map({"instruction": instruction, "input": context})


@dataclass(frozen=True)
class PromptForm:
    """The form of the prompts that a model was trained on; JSON by `as_dict`, and back by `from_dict`."""

    kind: FormKind
    """text: no prompts at all. prompt: as they are in the data. alpaca: put into Stanford Alpaca's template. chat:
    rendered by the tokenizer's chat template."""

    template: str = ""
    """chat: SHA-256 of the chat template's text, in hexadecimal."""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PromptForm:
        """What `as_dict` gave; a kind that is not known counts as text."""
        kinds: dict[str, FormKind] = {"text": "text", "prompt": "prompt", "alpaca": "alpaca", "chat": "chat"}
        return cls(kinds.get(str(value.get("kind")), "text"), str(value.get("template") or ""))

    def ask(self, prompt: str, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None) -> str:
        """A prompt as it stands before the model's answer, to be tokenized without special tokens if `kind` is chat.

        Args:
            prompt: What the user says.
            tokenizer: Its chat template is used if `kind` is chat.
            system: A system message; it needs a chat template.

        Raises:
            DataError: There is no place for a system message, or the tokenizer has no chat template or another one.
        """
        if self.kind != "chat":
            if system:
                raise DataError(f"prompts of the form {self.kind!r} have no place for a system message. Leave it out")
            return alpaca(prompt) if self.kind == "alpaca" else prompt
        if self.template and template_digest(tokenizer) != self.template:
            raise DataError("the tokenizer's chat template is not the one that was trained with. Give the trained one")
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's chat template; empty if it has none."""
    return hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest() if tokenizer.chat_template else ""
