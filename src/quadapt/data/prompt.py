"""In which form a prompt reaches the model in training, so that it can be asked in the same form afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

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
"""Stanford Alpaca's template for an instruction that comes with an input."""

_MARK = "{prompt}"
"""Where a prompt goes, while a template is made of a form."""

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
        """The fields by name, as they are written to JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PromptForm:
        """What `as_dict` gave; a kind that is not known counts as text."""
        kinds: dict[str, FormKind] = {"text": "text", "prompt": "prompt", "alpaca": "alpaca", "chat": "chat"}
        return cls(kinds.get(str(value.get("kind")), "text"), str(value.get("template") or ""))

    def ask(
        self,
        prompt: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """A prompt as it stands before the model's answer, to be tokenized without special tokens if `kind` is chat.

        Args:
            prompt: What the user says.
            tokenizer: The tokenizer, whose chat template is used if `kind` is chat.
            system: A system message; it needs a chat template.
            history: Messages before the prompt, if `kind` is chat; otherwise each prompt stands alone.

        Raises:
            DataError: There is no place for a system message, or the tokenizer has no chat template or another one.
        """
        if self.kind != "chat":
            if system:
                raise DataError(f"prompts of the form {self.kind!r} have no place for a system message. Leave it out")
            return alpaca(prompt) if self.kind == "alpaca" else prompt
        self.check(tokenizer)
        first = [{"role": "system", "content": system}] if system else []
        messages: Any = [*first, *history, {"role": "user", "content": prompt}]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError, KeyError) as error:  # on purpose or not
            raise DataError(f"the chat template cannot render the prompt: {error}") from error

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a tokenizer can put prompts into this form.

        Raises:
            DataError: It has no chat template, or another one than was trained with, and `kind` is chat.
        """
        if self.kind == "chat" and self.template and template_digest(tokenizer) != self.template:
            raise DataError("the tokenizer's chat template is not the one that was trained with. Give the trained one")
        if self.kind == "chat" and not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template to ask through. Ask with --prompt-form prompt")

    def ids(self, asked: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens of what `ask` gave, as training has them: a chat template writes its own opening tokens."""
        from quadapt.data.examples import opening, tokenize  # which needs what stands above

        return [*([] if self.kind == "chat" else opening(tokenizer)), *tokenize(tokenizer, [asked])[0]]

    def parts(self) -> tuple[str, str] | None:
        """What stands before a prompt and after it; None if a chat template says so."""
        if self.kind == "chat":
            return None
        before, _, after = (alpaca(_MARK) if self.kind == "alpaca" else _MARK).partition(_MARK)
        return before, after

    def jinja(self, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
        """This form as a chat template, for a server that is given messages; None if it is the tokenizer's own.

        As with `ask`, each prompt stands alone: what was said before it is left out.

        Args:
            tokenizer: The tokenizer, for a server that leaves it to the template what begins a text; None for one that
                puts it there by itself.
        """
        from quadapt.data.examples import opening

        parts = self.parts()
        if parts is None:
            return None
        first = "" if tokenizer is None else str(tokenizer.decode(opening(tokenizer)))
        refused = f"prompts of the form {self.kind!r} have no place for a system message"
        return (
            f"{{% if messages[0]['role'] == 'system' %}}{{{{ raise_exception({json.dumps(refused)}) }}}}{{% endif %}}"
            f"{{{{ {json.dumps(first + parts[0])} + messages[-1]['content'] + {json.dumps(parts[1])} }}}}"
        )

    @classmethod
    def recorded(cls, note: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PromptForm:
        """The form that a folder's note records; where there is none, what the tokenizer suggests."""
        form = cls.from_dict(note.get("prompt") or {})
        if form.kind != "text":
            return form
        return cls("chat" if tokenizer.chat_template else "prompt")


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's chat template; empty if it has none."""
    return hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest() if tokenizer.chat_template else ""
