"""Where the assistant speaks, in every chat template of the installed trl, against independent oracles.

* What generation after the rendered prompt would have to say: of the last answer, the rest of the rendering.
* What trl's own training version of a template marks, where it renders the same text.
* Of earlier answers: the words of their message and the end of turn, and nothing of another message.
"""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quadapt.data.examples import examples
from quadapt.data.messages import chat, tools
from quadapt.data.turns import Template
from quadapt.errors import DataError

FOLDER = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
PATCHED = [name for name in NAMES if name.endswith("_training")]

TOOL = {
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "its name"}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bergen"}'}}


def turns(count, think=None):
    """As many questions and answers; answers with thoughts in their text, or beside it."""
    talk = []
    for number in range(1, count + 1):
        said = {"role": "assistant", "content": f"Answer {number} of it."}
        if think == "inside":
            said["content"] = f"<think>\nThought {number}.\n</think>\n\n{said['content']}"
        if think == "beside":
            said["reasoning_content"] = f"Thought {number}."
        talk += [{"role": "user", "content": f"Question {number}?"}, said]
    return talk


SYSTEM = [{"role": "system", "content": "Be brief."}]
CALLED = [
    {"role": "user", "content": "Question 0?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "Rain again."},
    {"role": "assistant", "content": "Answer 0 of it."},
]
CASES = {
    "one turn": turns(1),
    "two turns": turns(2),
    "three turns": turns(3),
    "system": [*SYSTEM, *turns(2)],
    "thoughts": turns(3, "inside"),
    "thoughts beside": [*SYSTEM, *turns(2, "beside")],
    "tools": [*CALLED, *turns(1)],
    "tools at last": CALLED,
}


REFUSALS = ("roles must alternate", "System role not supported", "Only user and assistant roles are supported")
"""What templates say that know no system role, or no tools."""


@pytest.fixture(scope="module")
def letters():
    """A token for each character, whatever it is, so that tokens are as fine as can be."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def said_in(tokenizer, text, bearing):
    """The stretches of a text that bear loss, by what each of its tokens does."""
    spans = []
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (start, end), bears in zip(offsets, bearing, strict=True):
        if bears and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif bears:
            spans.append((start, end))
    return [text[start:end] for start, end in spans]


def rendered(tokenizer, name, case):
    """The chat of a case by a template; None if the template refuses it, in its own words."""
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    schemas = tools([TOOL]) if "tools" in case else []
    try:
        return Template(tokenizer).chat(chat(CASES[case]), schemas), schemas
    except DataError as error:
        if not any(words in str(error) and words in tokenizer.chat_template for words in REFUSALS):
            raise
        return None


@pytest.mark.parametrize("name", NAMES)
def test_the_assistant_is_found_in_every_template(name, letters):
    refused = set()
    for case, messages in CASES.items():
        found = rendered(letters, name, case)
        if found is None:
            refused.add(case)
            continue
        whole, _ = found
        answers = [message for message in messages if message["role"] == "assistant"]
        said = [whole.text[start:end] for start, end in whole.spans]
        if "tool calls" in whole.lost:  # an answer that is all calls, and shows none, trains nothing
            answers = [message for message in answers if message["content"]]
        assert len(said) == len(answers), case
        for words, message in zip(said, answers, strict=True):
            content = (message["content"] or "weather").rpartition("</think>")[2].strip()
            assert content in words, case
            assert not any(other in words for other in ("Question", "Be brief", "Rain again")), case
            head, _, tail = words.partition(content)
            assert "Answer" not in head + tail, case
            if message["content"] and "end of the last answer" not in whole.lost:
                assert tail.strip(), f"{case}: the end of turn bears no loss"
    assert refused <= {"system", "thoughts beside", "tools", "tools at last"}


@pytest.mark.parametrize("name", NAMES)
def test_the_last_answer_is_what_generation_would_have_to_say(name, letters):
    agreed = 0
    for case, messages in CASES.items():
        found = rendered(letters, name, case)
        if found is None:
            continue
        whole, schemas = found
        template = Template(letters)
        forms, text = template._rendered(chat(messages), schemas)
        assert text == whole.text
        prompt = template.render(forms[:-1], schemas, prompt=True)
        if text.startswith(prompt):
            assert whole.spans[-1] == (len(prompt), len(text)), case
            agreed += 1
    assert agreed or "deepseek" in name  # whose prompt begins a thought that its renderings of answers do not have


@pytest.mark.parametrize("name", PATCHED)
def test_marks_of_training_templates_agree(name, letters):
    """Where the training version of a template renders the same, it marks the same, but for the header."""
    for case, messages in CASES.items():
        found = rendered(letters, name.removesuffix("_training"), case)
        if found is None or "tool calls" in found[0].lost:
            continue
        whole, schemas = found
        template = Template(letters)
        forms, _ = template._rendered(chat(messages), schemas)
        letters.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        if Template(letters).render(forms, schemas) != whole.text:
            continue
        bearing = Template(letters).marked(forms, schemas)[1]
        theirs = said_in(letters, whole.text, bearing)
        ours = [whole.text[start:end] for start, end in whole.spans]
        assert len(theirs) == len(ours)
        for marked, searched in zip(theirs, ours, strict=True):
            longer, shorter = sorted((marked.strip(), searched.strip()), key=len, reverse=True)
            assert shorter in longer, case
            more = longer.replace(shorter, "", 1)  # of the header, of thoughts that were not there, of the end
            assert not any(words in more for words in ("Answer", "Thought", "Question", "weather")), case


def test_answers_of_weight_zero_bear_no_loss(letters):
    letters.chat_template = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
    talk = turns(3)
    talk[3]["weight"] = 0
    whole = Template(letters).chat(chat(talk))
    assert ["1" in whole.text[start:end] or "3" in whole.text[start:end] for start, end in whole.spans] == [True] * 2
    assert "Answer 2" in whole.text


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "llama3"])
def test_a_chat_may_begin_with_the_assistant(name, letters):
    letters.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    whole = Template(letters).chat(chat(turns(2)[1:]))
    said = [whole.text[start:end].strip() for start, end in whole.spans]
    assert [words.split("<")[0] for words in said] == ["Answer 1 of it.", "Answer 2 of it."]


def test_a_null_beside_a_call_is_not_trained_as_the_word_none(chars):
    chars.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    whole = Template(chars).chat(chat(CALLED), tools([TOOL]))
    assert "None" not in whole.text
    assert whole.lost == ["tools", "tool calls"]
    assert [whole.text[start:end] for start, end in whole.spans] == ["Answer 0 of it.<|end|>"]


def test_a_token_across_the_end_of_an_answer_is_the_templates(pieces, make_rows):
    """Here a line end merges with the one after it: the token belongs to what follows as much as to the answer."""
    pieces.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{{ '\n' if m.role == 'assistant' }}{% endfor %}"
    )
    rows = make_rows("messages", [[("user", "yes"), ("assistant", "no"), ("user", "and"), ("assistant", "yes")]])
    (example,) = examples(rows, pieces)
    text = pieces.decode(example.ids[example.loss])
    assert "and" not in text
    assert "no" in text
