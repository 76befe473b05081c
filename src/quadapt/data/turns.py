"""Chats as text, and where in it the assistant speaks.

Templates do not render a message the same way wherever it stands: thoughts of earlier answers are left out, text is
trimmed, the last answer ends otherwise than those before it. So what the assistant says is looked for in the rendering
of the whole chat:

* It begins where generation would begin: after the rendering of all messages before it with the generation prompt, if
  the whole begins so. Else (in an earlier answer, say, from which the thoughts were left out) where the text of this
  message begins, which another text in its place shows.
* It ends where the next message begins. What the template puts after an answer is known from the rendering that ends
  with it; if the end of a chat is written otherwise than the end of an answer within it, the next message begins where
  the mark stands with which the generation prompt begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from quadapt.data.messages import Row
from quadapt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says."""

_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What templates raise on purpose and by mistake: `raise_exception`, None plus text, and the like."""

_MARK = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,40}\]")
"""A mark of a template that is no token of its own in the tokenizer: `<|end|>`, `[/INST]`."""

_STANDINS = ("\ue0f1\ue0f2\ue0f1", "\ue0f3\ue0f4\ue0f3", "\u2042\u2042\u2042")


@dataclass(frozen=True)
class Chat:
    """A chat as a template renders it."""

    text: str
    """The whole chat as a template renders it."""

    spans: list[tuple[int, int]]
    """For each answer of the assistant that bears loss, the index in `text` of its first character and of the one
    after its end."""

    lost: list[str] = field(default_factory=list)
    """What is in the messages and not in the text: `thoughts`, `tool calls`, `tools`, .."""


class Template:
    """A tokenizer's chat template, which renders chats and finds the answers in them.

    Args:
        tokenizer: It has one.

    Raises:
        DataError: It has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be rendered. Set tokenizer.chat_template, take "
                "the chat variant of the model, or give prompts and completions"
            )
        self._tokenizer = tokenizer
        tokens = [re.escape(token) for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if token]
        self._marks = re.compile("|".join([*sorted(tokens, key=len, reverse=True), _MARK.pattern]))
        self._in_parts = self._wants_parts()

    def render(self, messages: Sequence[Row], tools: Sequence[Row] = (), *, prompt: bool = False) -> str:
        """The text of some messages, and the generation prompt after them if it is asked for.

        Raises:
            DataError: The template cannot; the message has its words.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [self._form(message) for message in messages],
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except _FAILURES as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the chat template cannot render the messages: {words}") from error

    def chat(self, messages: Sequence[Row], tools: Sequence[Row] = (), *, find: bool = True) -> Chat:
        """Render a chat as text, and find the answers of the assistant in it.

        Args:
            messages: What `quadapt.data.messages.chat` gives; answers with a `weight` of 0 bear no loss.
            tools: The schemas of the functions that the model may call.
            find: Whether to look for what the assistant says.

        Raises:
            DataError: The template cannot render it; the message has its words.
        """
        heard = [message.get("weight") != 0 for message in messages]
        bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        bare, text = self._rendered(bare, tools)
        lost = self._lost(bare, tools, text)
        if not find:
            return Chat(text, [], lost)
        spans = []
        for turn, message in enumerate(bare):
            if message["role"] != "assistant":
                continue
            if not _said(message, text):
                raise _unfound(turn)
            span = self._span(bare, tools, turn, text)
            if heard[turn] and not (lost and _is_empty(message, text[slice(*span)])):
                spans.append(span)
        return Chat(text, spans, lost)

    def marked(self, messages: Sequence[Row], tools: Sequence[Row] = ()) -> tuple[list[int], list[bool], list[str]]:
        """Tokens, which of them bear loss by the marks in the template (`{% generation %}`), and what is lost."""
        bare, text = self._rendered(messages, tools)
        found: Any = self._tokenizer.apply_chat_template(
            [self._form(message) for message in bare],
            tools=list(tools) or None,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        lost = self._lost(bare, tools, text)
        return list(found["input_ids"]), [bool(bit) for bit in found["assistant_masks"]], lost

    # --- forms of messages --------------------------------------------------------------------------------------------

    def _form(self, message: Row) -> Row:
        """A message with its text as a list of parts, if the template reads no other."""
        if not self._in_parts or not isinstance(message.get("content"), str):
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _wants_parts(self) -> bool:
        """Whether the template shows text only where it is a part in a list, as those of vision models do."""
        asked, said = _STANDINS[:2]
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for self._in_parts in (False, True):
            try:
                text = self.render(talk)
            except DataError:
                continue
            if asked in text and said in text:
                return self._in_parts
        return False

    def _rendered(self, messages: Sequence[Row], tools: Sequence[Row]) -> tuple[list[Row], str]:
        """Messages in the form that the template renders whole, and their text.

        Templates differ in whether arguments of calls are objects or JSON, and whether the missing content beside a
        call is null or empty: the first form is taken in which all calls are shown and no `None` is.
        """
        calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        if not calls:
            return list(messages), self.render(messages, tools)
        failure, found = None, []
        nones = []
        for arguments, content in product((_same, json.dumps), (None, "")):
            form = [_with_calls(message, arguments, content) for message in messages]
            try:
                text = self.render(form, tools)
            except DataError as error:
                failure = error if arguments is _same else failure  # with empty content: null has reasons of its own
                continue
            found.append((form, text))
            nones.append(text.count("None"))
        if not found:
            assert failure is not None
            raise failure
        named = [sum(text.count(call["name"]) for call in calls) for _, text in found]
        shown = [sum(_shows(call, text) for call in calls) for _, text in found]
        best = min(range(len(found)), key=lambda at: (nones[at] - min(nones), -shown[at], -named[at], at))
        return found[best]

    def _lost(self, messages: Sequence[Row], tools: Sequence[Row], text: str) -> list[str]:
        """What is not in the rendering of messages."""
        found = ["tools"] if any(tool["function"]["name"] not in text for tool in tools) else []
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if without != list(messages) and self._try(without, tools) == text:
            found.append("tool calls")
        for message in messages:
            content = str(message.get("content") or "").strip()
            if message["role"] not in ("user", "assistant", "tool") and content not in text:
                found.append(f"messages of the role {message['role']}")
        last = messages[-1]
        if last["role"] == "assistant":
            said = _answer(last)
            found += [] if _thinks(last, text) else ["thoughts before the last answer"]
            found += ["end of the last answer"] if said and text.rstrip().endswith(said) else []
        return list(dict.fromkeys(found))

    # --- the search ---------------------------------------------------------------------------------------------------

    def _span(self, messages: list[Row], tools: Sequence[Row], turn: int, text: str) -> tuple[int, int]:
        """The indices in the whole text at which one answer begins and ends."""
        prompt = self._try(messages[:turn], tools, prompt=True)
        start = len(prompt) if prompt and text.startswith(prompt) else None
        if turn == len(messages) - 1:
            end = len(text)
        else:
            ended = self._try(messages[: turn + 1], tools)
            end = len(ended) if ended and text.startswith(ended) else -1
        if start is None or end < 0:
            begins, ends = self._content(messages, tools, turn, text)
            start = begins if start is None else start
            end = self._end(messages, tools, turn, text, max(ends, start)) if end < 0 else end
        return start, max(start, end)

    def _content(self, messages: list[Row], tools: Sequence[Row], turn: int, text: str) -> tuple[int, int]:
        """The indices at which a message's own text begins and ends, found by rendering other text in its place."""
        other = next(each for each in _STANDINS if each[0] not in text)
        message = {key: value for key, value in messages[turn].items() if key not in _THOUGHTS}
        changed = [*messages[:turn], {**message, "content": other}, *messages[turn + 1 :]]
        with_other = self._try(changed, tools)
        if not with_other or other not in with_other:
            raise _unfound(turn)
        begins = with_other.index(other)
        before, after = with_other[:begins], with_other[begins + len(other) :]
        shared = _common(before, text)
        begins = shared if shared == len(before) else self._cut(text, shared)
        after_shared = _common(after[::-1], text[begins:][::-1])
        return begins, len(text) - after_shared

    def _end(self, messages: list[Row], tools: Sequence[Row], turn: int, text: str, at: int) -> int:
        """The index at which an answer ends that others follow, and whose own text ends at `at`."""
        ended = self._try(messages[: turn + 1], tools)
        if ended:
            tail = ended[self._content(messages[: turn + 1], tools, turn, ended)[1] :]
            shared = _common(tail, text[at:])
            shared = shared if shared == len(tail) else self._cut(text, at + shared) - at
            if shared > 0 and text[at : at + shared].strip():
                return at + shared
        following = self._next(messages, tools, turn, text, at)
        opening = self._opening(messages, tools, turn)
        found = text.find(opening, at, following) if opening else -1
        return found if found >= 0 else at

    def _next(self, messages: list[Row], tools: Sequence[Row], turn: int, text: str, at: int) -> int:
        """The index at which the text of the next message begins."""
        try:
            return max(at, self._content(messages, tools, turn + 1, text)[0])
        except DataError:
            return len(text)

    def _opening(self, messages: list[Row], tools: Sequence[Row], turn: int) -> str:
        """The mark with which the generation prompt begins; empty if there is none."""
        prompt, without = (self._try(messages[:turn], tools, prompt=prompt) for prompt in (True, False))
        if not prompt or without is None:
            return ""
        found = self._marks.search(prompt, self._cut(prompt, _common(prompt, without)))
        return found[0] if found else ""

    def _try(self, messages: Sequence[Row], tools: Sequence[Row], *, prompt: bool = False) -> str | None:
        try:
            return self.render(messages, tools, prompt=prompt)
        except DataError:
            return None

    def _cut(self, text: str, at: int) -> int:
        """The place itself, or the beginning of the mark in which it lies."""
        for found in self._marks.finditer(text, max(0, at - 80)):
            if found.start() < at < found.end():
                return found.start()
        return at


_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def _unfound(turn: int) -> DataError:
    return DataError(
        f"what the assistant says in message {turn + 1} cannot be found in the rendering of the chat template. Put "
        "{% generation %} and {% endgeneration %} around it in the template"
    )


def _answer(message: Row) -> str:
    """What a message says, without thoughts before it."""
    return str(message.get("content") or "").rpartition("</think>")[2].strip()


def _said(message: Row, text: str) -> bool:
    """Whether a line of an answer at least is in the rendering, or there is none."""
    lines = [line.strip() for line in _answer(message).splitlines() if line.strip()]
    return not lines or any(line in text for line in lines)


def _thinks(message: Row, text: str) -> bool:
    thoughts = next((str(message[name]) for name in _THOUGHTS if message.get(name)), "")
    if not thoughts and "</think>" in str(message.get("content")):
        thoughts = str(message["content"]).split("</think>")[0].rpartition("<think>")[2]
    return thoughts.strip() in text


def _shows(call: Row, text: str) -> bool:
    return call["name"] in text and all(str(name) in text for name in _names(call.get("arguments")))


def _names(arguments: Any) -> list[str]:
    return list(arguments) if isinstance(arguments, dict) else []


def _is_empty(message: Row, said: str) -> bool:
    """Whether a message is all calls, and none of them was written: it would train to answer nothing."""
    return not message.get("content") and not any(
        call["function"]["name"] in said for call in message.get("tool_calls", ())
    )


def _same(arguments: Any) -> Any:
    return arguments


def _with_calls(message: Row, arguments: Any, content: str | None) -> Row:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        given = call["function"].get("arguments")
        calls.append(
            {
                **call,
                "function": {**call["function"], "arguments": arguments(given) if isinstance(given, dict) else given},
            }
        )
    return {
        **message,
        "tool_calls": calls,
        "content": content if message.get("content") is None else message["content"],
    }


def _common(one: str, other: str) -> int:
    """Characters that two texts have in common at their beginnings."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
