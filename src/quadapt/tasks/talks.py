"""Talking about pictures: chats, or prompts and completions, with pictures between the words of those who ask.

What a row says is read as for language models, by the same forms; its pictures are taken out first, and put back where
they stood. The model's processor makes inputs of a whole batch at once: how many tokens a picture takes, and how
pictures of several examples lie in one tensor, differs from model to model, and the processor alone knows it. It says
which characters it has put in the place of a picture, so that the answers are found in the tokens.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from quadapt.data import Encoded, PromptForm
from quadapt.data.collate import NO_LOSS
from quadapt.data.forms import layout_of
from quadapt.data.messages import Row, from_json
from quadapt.data.prompt import template_digest
from quadapt.data.tables import Cells, Table
from quadapt.data.turns import Template
from quadapt.errors import DataError
from quadapt.tasks.base import TASKS, Asking, Collate, Measured, Reading
from quadapt.tasks.examples import ByExamples, answered, encoded, taken
from quadapt.tasks.labels import cross_entropy
from quadapt.tasks.pictures import joined, opened, picture_of, read_beside
from quadapt.tasks.written import exact_match, perplexity

COLUMNS = ("images", "image", "pictures", "picture", "img")
"""The names under which the pictures of a row are looked for."""

MARK = "<image>"
"""Stands in a text where a picture is, as in the data of LLaVA."""


@TASKS.register("image-text-to-text")
class ImageTextToText(ByExamples):
    """A model is shown pictures, and says something about them."""

    summary: ClassVar[str] = "to talk about pictures"
    kinds: ClassVar[tuple[str, ...]] = ("image-text-to-text",)

    def read(self, sources: Sequence[str], reading: Reading, *, held_out: bool = False) -> Table:
        most = reading.max_bad_rows
        return joined([read_beside(source, _itself, _talk, held_out=held_out, max_bad_rows=most) for source in sources])

    def encode(self, data: Table, prepare: Any, config: Any, *, length: int, reading: Reading) -> Encoded:
        processor = Processor(prepare)
        talks, tally, kept = Talks(data.rows, data.where), Counter[str](), list[int]()
        for at, talk in enumerate(talks):
            spans = processor.spans(talk, completion_only=reading.completion_only)
            batch = processor.batch([talk], [spans])
            tokens, loss = batch["input_ids"].shape[1], int((batch["labels"][:, 1:] != NO_LOSS).sum())
            if tokens > length or not loss:
                tally.update(dropped=1, long=int(tokens > length))
                continue
            kept.append(at)
            tally.update(tokens=tokens, loss=loss)
        notes = list(data.notes)
        if tally["long"]:
            notes.append(f"{tally['long']:,} examples are longer than {length:,} tokens; a picture cannot be cut")
        data = Table(data.rows, data.where, data.source, data.columns, tuple(notes), data.bad)
        first = processor.text(talks[kept[0]]) if kept else ""
        form = PromptForm("chat", template_digest(processor.tokenizer))
        examples = talks.select(kept)
        return encoded(
            self.name, data, examples, length=length, tally=tally, unit="tokens to say", example=first, form=form
        )

    def collator(self, prepare: Any, model: Any) -> Collate:
        processor = Processor(prepare)

        def collate(examples: Sequence[Any]) -> Mapping[str, Any]:
            return processor.batch(examples, [processor.spans(each) for each in examples])

        return taken(model, collate)

    def measure(self, model: Any, prepare: Any, data: Table, asking: Asking) -> Measured:
        """Perplexity of what is to be said, how many last answers are exactly right, and some of them."""
        found = self.encode(data, prepare, model.config, length=asking.length, reading=Reading())
        batches = answered(
            model, found, self.collator(prepare, model), asking.batch_size, asking.progress("perplexity")
        )
        losses = [cross_entropy(logits[:, :-1], labels[:, 1:]) for logits, labels in batches]
        counted = perplexity(losses, len(found.data), data.source, asking)
        answers = _answers(model, Processor(prepare), found.data, asking)
        return {"perplexity": counted, "exact_match": exact_match(answers, asking)}


@dataclass(frozen=True)
class Talks:
    """Chats with pictures; these are opened when they are asked for, and none is kept."""

    rows: Sequence[Cells]
    """`messages` in the form that chat templates take, and `pictures` as paths or bytes in the order of their marks."""

    where: Sequence[str]
    """Where each row stands, for errors."""

    column_names: ClassVar[list[str]] = ["messages", "images"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        """`messages`, and `images` as pictures in three colours.

        Raises:
            DataError: One of them cannot be opened.
        """
        row = self.rows[at]
        images = [opened(picture, self.where[at]) for picture in row["pictures"]]
        return {"messages": row["messages"], "images": images, "where": self.where[at]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[at] for at in range(len(self)))

    def select(self, indices: Sequence[int]) -> Talks:
        """Some of the chats, in the order of `indices`."""
        some = [int(at) for at in indices]
        return Talks([self.rows[at] for at in some], [self.where[at] for at in some])


class Processor:
    """What makes inputs of chats with pictures: the model's processor, and its chat template.

    Args:
        prepare: The processor, or the tokenizer that lies beside it.

    Raises:
        DataError: There is no processor, or none that says where pictures stand in a text.
    """

    def __init__(self, prepare: Any) -> None:
        self._processor = _beside(prepare)
        self.tokenizer = copy.copy(self._processor.tokenizer)
        template = getattr(self._processor, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        self.tokenizer.chat_template = template or self.tokenizer.chat_template
        self._template = Template(self.tokenizer)

    def text(self, talk: Row) -> str:
        """A chat as its template renders it, with one mark for each picture."""
        return self._template.chat(talk["messages"], find=False).text

    def spans(self, talk: Row, *, completion_only: bool = True) -> list[tuple[int, int]]:
        """The first character of each answer that bears loss in that text, and the one after its end.

        Raises:
            DataError: The template cannot render the chat.
        """
        try:
            found = self._template.chat(talk["messages"], find=completion_only)
        except DataError as error:
            raise DataError(f"{talk['where']}: {error}") from error
        return found.spans if completion_only else [(0, len(found.text))]

    def batch(self, talks: Sequence[Row], spans: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
        """Inputs of some chats, padded on the right, with `labels` `[batch, tokens]` for the characters in spans.

        Raises:
            DataError: The processor cannot take them, or does not say what it has put in the place of pictures.
        """
        texts = [self.text(talk) for talk in talks]
        found = self._inputs(talks, texts, "right", return_offsets_mapping=True, return_text_replacement_offsets=True)
        offsets, ids = found.pop("offset_mapping"), found["input_ids"]
        replaced = found.pop("text_replacement_offsets", None) or [[]] * len(talks)
        labels = torch.full_like(ids, NO_LOSS)
        for row, talk in enumerate(talks):
            if len(replaced[row]) < len(talk["images"]):
                raise DataError(
                    f"{type(self._processor).__name__} does not say where pictures stand in a text, so answers cannot "
                    "be told from questions. Use a newer transformers, or train from Python with labels of your own"
                )
            heard = torch.zeros_like(ids[row], dtype=torch.bool)
            for start, end in _moved(spans[row], replaced[row]):
                heard |= (offsets[row][:, 0] < end) & (offsets[row][:, 1] > start)
            heard &= found["attention_mask"][row].bool()
            labels[row][heard] = ids[row][heard]
        return {**found, "labels": labels}

    def asked(self, talks: Sequence[Row]) -> dict[str, Any]:
        """Inputs of some chats up to where the last answer begins, padded on the left."""
        before = [{**talk, "messages": talk["messages"][:-1]} for talk in talks]
        return self._inputs(before, [self._template.render(talk["messages"], prompt=True) for talk in before], "left")

    def _inputs(self, talks: Sequence[Row], texts: list[str], side: str, **more: Any) -> dict[str, Any]:
        images = [talk["images"] for talk in talks] if any(talk["images"] for talk in talks) else None
        opening = self.tokenizer.bos_token
        begun = opening is not None and texts[0].startswith(opening)
        try:
            found = self._processor(
                images=images,
                text=texts,
                padding=True,
                padding_side=side,
                add_special_tokens=not begun,
                return_tensors="pt",
                **more,
            )
        except (TypeError, ValueError, IndexError) as error:
            words = " ".join(str(error).split())
            raise DataError(f"{talks[0]['where']}: {type(self._processor).__name__} cannot take it: {words}") from error
        return dict(found)


def _beside(prepare: Any) -> Any:
    """The processor that a tokenizer lies beside, which is to take this tokenizer; or the processor itself."""
    from transformers import AutoProcessor, PreTrainedTokenizerBase

    if not isinstance(prepare, PreTrainedTokenizerBase):
        return prepare
    try:
        found = AutoProcessor.from_pretrained(prepare.name_or_path)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{prepare.name_or_path}: has no processor that could be loaded ({error})") from error
    if not hasattr(found, "image_processor"):
        raise DataError(
            f"{prepare.name_or_path}: has no processor for pictures. Copy preprocessor_config.json and "
            "processor_config.json from the model's source"
        )
    found.tokenizer = prepare
    return found


def _moved(spans: Sequence[tuple[int, int]], replaced: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Where spans of a text lie after something longer has been put in the place of the marks."""
    ends = [each["span"][1] for each in replaced]
    gained = [0, *(each["new_span"][1] - each["span"][1] for each in replaced)]
    return [(start + gained[bisect_right(ends, start)], end + gained[bisect_right(ends, end)]) for start, end in spans]


@torch.no_grad()
def _answers(model: Any, processor: Processor, talks: Talks, asking: Asking) -> list[tuple[str, str, str]]:
    """Of each chat that ends with an answer: what is said last before it, what the model says, and what is right."""
    from quadapt.evaluate import evaluating
    from quadapt.hf.reading import generating

    device = next(model.parameters()).device
    some = [at for at, row in enumerate(talks.rows) if row["messages"][-1]["role"] == "assistant"]
    found, size = list[tuple[str, str, str]](), asking.batch_size
    with evaluating(model):
        for start in asking.progress("answers")(list(range(0, len(some), size))):
            batch = [talks[at] for at in some[start : start + size]]
            given = {name: each.to(device) for name, each in processor.asked(batch).items()}
            output = generating(model, **given, max_new_tokens=asking.max_new_tokens, do_sample=False)
            said = processor.tokenizer.batch_decode(output[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
            for talk, answer in zip(batch, said, strict=True):
                asked, right = talk["messages"][-2:] if len(talk["messages"]) > 1 else ({}, talk["messages"][-1])
                found.append((_words(asked), answer, _words(right)))
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def _itself(cells: Cells) -> dict[str, str]:
    """Every column means what it is called."""
    return {name: name for name in cells}


def _talk(cells: Cells, folder: Path) -> Cells:
    """A row as `messages` whose pictures are parts of their content, and the pictures in their order."""
    given = next((cells[name] for name in COLUMNS if cells.get(name) is not None), None)
    given = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    pictures = list(given)
    rest = {name: _marked(cell, pictures) for name, cell in cells.items() if name not in COLUMNS}
    layout = layout_of(rest)
    if layout.form.kind == "text":
        raise DataError("has a text alone. Give messages, or a prompt and a completion")
    said = layout.row(layout.cells(rest), "messages")
    return {"messages": _in_parts(json.loads(said["messages"]), len(pictures)), "pictures": _kept(pictures, folder)}


def _kept(pictures: Sequence[Any], folder: Path) -> list[Any]:
    return [picture_of(picture, folder) for picture in pictures]


def _marked(cell: Any, pictures: list[Any]) -> Any:
    """A cell with marks in place of the pictures that are parts of its messages; these are put into the list.

    A part `{"type": "image"}` without a picture stands for one of the column of pictures.
    """
    cell = from_json(cell)
    if not isinstance(cell, list):
        return cell
    messages = []
    for message in cell:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message = {**message, "content": [_as_mark(part, pictures) for part in content]}
        messages.append(message)
    return messages


def _as_mark(part: Any, pictures: list[Any]) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image", "image_url"):
        return part
    picture = next((part[name] for name in ("image", "image_url", "path", "url", "bytes") if part.get(name)), None)
    if picture is not None:
        pictures.append(picture)
    return {"type": "text", "text": MARK}


def _in_parts(messages: list[Row], count: int) -> list[Row]:
    """Messages in which each mark is a picture; if there is none, the pictures stand before the first question."""
    marks = sum(str(message.get("content") or "").count(MARK) for message in messages)
    if count and not marks:
        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise DataError("has pictures, and no message of the user that they could belong to")
        messages[first]["content"], marks = MARK * count + str(messages[first]["content"]), count
    if marks != count:
        raise DataError(f"has {count} pictures, and {marks} places for them ({MARK}, or parts of the type image)")
    return [_parted(message) for message in messages]


def _parted(message: Row) -> Row:
    text = message.get("content")
    if not isinstance(text, str) or MARK not in text:
        return message
    if message["role"] == "assistant":
        raise DataError("has a picture in an answer, and models of this kind answer in words. Delete the row")
    parts: list[Row] = []
    pieces = text.split(MARK)
    for at, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (at > 0)
        own = piece.removeprefix("\n") if at else piece  # LLaVA's data have a line for the mark, templates need none
        own = own.removesuffix("\n") if at < len(pieces) - 1 else own
        parts += [{"type": "text", "text": own}] * bool(own)
    return {**message, "content": parts}


def _words(message: Row) -> str:
    """What a message says in words."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
