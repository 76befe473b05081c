"""The form of prompts is recorded, survives JSON, and asks again as in training."""

import json

import pytest

from quadapt.data import PromptForm, encode, read
from quadapt.errors import DataError

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a cat"}, "text"),
        ({"prompt": "a", "completion": " cat"}, "prompt"),
        ({"instruction": "name a pet", "output": "cat"}, "alpaca"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}, "chat"),
    ],
)
def test_what_is_asked_is_what_was_trained(row, kind, chars, tmp_path):
    chars.chat_template = CHAT
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    encoded = encode(read(str(tmp_path / "a.jsonl")), chars, seq_len=400, packing=False)
    form = PromptForm.from_dict(json.loads(json.dumps(encoded.form.as_dict())))
    assert (form, form.kind) == (encoded.form, kind)
    asked = form.ask({"prompt": "a", "alpaca": "name a pet"}.get(kind, "hi"), chars)
    ids = chars(asked, add_special_tokens=kind != "chat")["input_ids"]
    sequence = encoded.data[0]
    assert sequence["input_ids"][: len(ids)] == ids or kind == "text"
    assert all(label == -100 for label in sequence["labels"][: len(ids)]) or kind == "text"


def test_a_system_message_needs_a_place(chars):
    chars.chat_template = CHAT
    assert PromptForm("chat").ask("hi", chars, system="be") == "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    with pytest.raises(DataError, match="no place for a system message"):
        PromptForm("alpaca").ask("hi", chars, system="be")
    with pytest.raises(DataError, match="not the one"):
        PromptForm("chat", "0" * 64).ask("hi", chars)
