"""The stories' answers against a reader that knows only their text, and the embedded model against held-out ones."""

import json
import math
import re
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quadapt.demo.stories import (
    NAMES,
    OBJECTS,
    PLACES,
    narratives,
    rows,
    split_of,
    stories,
    write_jsonl,
    write_text,
)

MODEL = Path(str(files("quadapt.demo"))) / "model"

X, T, P = (f"({'|'.join(words)})" for words in (NAMES, OBJECTS, PLACES))
EVENTS = {  # what a sentence says, written apart from the generator's templates
    "walk": rf"{X} (?:went|walked|ran)(?: back)? to the {P}",
    "walk_from": rf"{X} (?:went from|left) the {P} (?:and went )?to the {P}",
    "carry": rf"{X} (?:carried|took|brought) the {T} to the {P}",
    "take": rf"{X} (?:picked up|grabbed|found) the {T}(?: in the {P})?",
    "drop": rf"{X} (?:put down|dropped|left) the {T}(?: in the {P})?",
    "give": rf"{X} (?:gave|handed) the {T} to {X}",
    "get": rf"{X} got the {T} from {X}",
}
FIRST_STORY = (  # of seed 0: guards against a change of Python's random numbers as much as of the generator
    "One day David went to the office. David picked up the ball. David carried the ball to the library. "
    "David went from the library to the barn. Emma ran to the library."
)


class Reader:
    """Follows a story by its text alone, and objects to what cannot be."""

    def __init__(self):
        self.path = {}  # person -> places, oldest first
        self.hands = {}  # object -> person
        self.lying = {}  # object -> place

    def place_of_object(self, o):
        return self.path[self.hands[o]][-1] if o in self.hands else self.lying[o]

    def read(self, sentence):
        for name, pattern in EVENTS.items():
            if match := re.fullmatch(pattern, sentence):
                return getattr(self, name)(*match.groups())
        raise AssertionError(f"cannot read {sentence!r}")

    def walk(self, x, p):
        assert self.path.get(x, [None])[-1] != p, "walked to where they were"
        self.path.setdefault(x, []).append(p)

    def walk_from(self, x, q, p):
        assert self.path[x][-1] == q
        self.walk(x, p)

    def carry(self, x, o, p):
        assert self.hands[o] == x
        self.walk(x, p)

    def take(self, x, o, p):
        assert o not in self.hands
        assert p in (None, self.path[x][-1])
        assert self.lying.get(o, self.path[x][-1]) == self.path[x][-1]
        self.hands[o] = x

    def drop(self, x, o, p):
        assert self.hands.pop(o) == x
        assert p in (None, self.path[x][-1])
        self.lying[o] = self.path[x][-1]

    def give(self, x, o, y):
        assert self.hands[o] == x
        assert x != y
        assert self.path[x][-1] == self.path[y][-1], "gave to someone elsewhere"
        self.hands[o] = y

    def get(self, y, o, x):
        self.give(x, o, y)

    def answer(self, question):
        *_, subject = re.findall(f"{X}|{T}", question)
        subject = next(filter(None, subject))
        if question.startswith("Who has"):
            return self.hands[subject]
        if question.startswith("Where did"):
            return f"from the {self.path[subject][-2]}"
        return f"in the {self.path[subject][-1] if subject in self.path else self.place_of_object(subject)}"


def sentences(text):
    text = re.sub(r"^(One day|This morning|Last night) ", "", text)
    return [sentence for sentence in re.split(r"[.] ?", text) if sentence]


def test_answers_follow_from_the_text():
    kinds = set()
    for split in ("train", "held_out"):
        for story in stories(7, 600, split):
            reader = Reader()
            for sentence in sentences(story.text):
                reader.read(sentence)
            for question in story.questions:
                assert question.prompt.startswith(f"{story.text} ")
                assert reader.answer(question.prompt[len(story.text) + 1 :]) == question.answer, question
                kinds.add(question.kind)
    assert kinds == {"person", "object", "holder", "origin"}


def check_remark(reader, sentence, subject):
    """Whether the sentence is a remark; objects to a false one. "It" is the last object named."""
    if match := re.fullmatch(rf"{X} was in the {P}", sentence):
        assert reader.path[match[1]][-1] == match[2]
    elif match := re.fullmatch(rf"(?:The {T}|It) was in the {P}", sentence):
        assert reader.place_of_object(subject) == match[2]
    elif match := re.fullmatch(rf"It was {X}(?: who had the {T})?", sentence):
        assert reader.hands[subject] == match[1]
    elif match := re.fullmatch(rf"{X} had come from the {P}", sentence):
        assert reader.path[match[1]][-2] == match[2]
    else:
        return bool(re.fullmatch(r"(Somebody|Nobody|A child) asked wh.*|Wh.*[?] asked a child", sentence))
    return True


def test_remarks_are_true():
    for narrative in narratives(3, 500):
        reader, subject = Reader(), None
        for sentence in sentences(narrative.text):
            if named := re.search(rf"\b{T}\b", sentence):
                subject = named[1]
            if not check_remark(reader, sentence, subject):
                reader.read(sentence)


def test_known_words_are_words_of_the_world():
    for narrative in narratives(0, 100):
        words = [narrative.text[begin:end] for begin, end in narrative.known]
        assert words
        assert {word[1:] for word in words} <= {*NAMES, *PLACES, *OBJECTS}
        assert all(word.startswith(" ") for word in words)


def test_the_seed_decides_everything():
    assert list(stories(1, 50)) == list(stories(1, 50))
    assert list(narratives(1, 50)) == list(narratives(1, 50))
    assert list(stories(1, 50)) == list(stories(1, 80))[:50]
    assert not {s.text for s in stories(1, 50)} & {s.text for s in stories(2, 50)}
    assert next(stories(0, 1)).text == FIRST_STORY


def test_the_parts_share_no_story():
    parts = {
        (split, seed): {story.text for story in stories(seed, 400, split)}
        for split in ("train", "held_out")
        for seed in (0, 1)
    }
    for (split, _), texts in parts.items():
        assert {split_of(text) for text in texts} == {split}
    for (one, first), (other, second) in combinations(parts.items(), 2):
        assert one[0] == other[0] or not first & second


@pytest.mark.parametrize("tell", [stories, narratives])
def test_a_part_that_there_is_not_is_refused_rather_than_searched(tell):
    with pytest.raises(ValueError, match="train or held_out"):
        next(tell(1, 1, "test"))


def test_rows_and_files(tmp_path):
    told = list(stories(5, 20))
    assert len(list(rows(told))) == 20
    every = list(rows(told, each=9))
    assert len(every) == sum(len(story.questions) for story in told)
    assert all(row["completion"].startswith(" ") and not row["prompt"].endswith(" ") for row in every)
    write_jsonl(tmp_path / "rows.jsonl", every)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == every
    write_text(tmp_path / "text.txt", narratives(5, 20))
    assert (tmp_path / "text.txt").read_text().splitlines() == [n.text for n in narratives(5, 20)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_model_folder_is_small():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(sizes.values()) <= 6_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= sizes.keys()


def test_the_model_has_widths_that_groups_of_32_divide(model):
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    weights = [w for name, w in model.named_parameters() if w.ndim == 2]
    assert all(side % 32 == 0 for w in weights for side in w.shape)


def test_the_tokenizer_gives_texts_back(tokenizer):
    texts = [row["prompt"] + row["completion"] for row in rows(stories(9, 100, "held_out"))]
    for text in [*texts, "Bytes: Zürich, 東京 🙂\n\ttoo"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    for word in (*NAMES, *PLACES, *OBJECTS):
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1


def test_prompt_and_completion_can_be_encoded_apart(tokenizer):
    for row in rows(stories(10, 100), each=4):
        apart = tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"], add_special_tokens=False).input_ids
        assert apart == tokenizer(row["prompt"] + row["completion"]).input_ids


@torch.no_grad()
def test_the_model_reads_held_out_stories(model, tokenizer):
    told = list(narratives(11, 100, "held_out"))
    loss = tokens = right = known = 0
    for narrative in told:
        encoded = tokenizer(narrative.text, return_offsets_mapping=True)
        ids = torch.tensor([encoded.input_ids])
        logits = model(ids).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.numel() - 1
        begins = {begin for begin, _ in narrative.known}
        marked = [i for i, (begin, end) in enumerate(encoded.offset_mapping) if begin in begins and end > begin]
        known += len(marked)
        right += sum(logits[i - 1].argmax() == ids[0, i] for i in marked)
    assert math.exp(loss / tokens) < 1.8
    assert right / known > 0.95


@torch.no_grad()
def test_the_untuned_model_does_not_answer(model, tokenizer):
    asked = list(rows(stories(12, 40, "held_out")))
    batch = tokenizer([row["prompt"] for row in asked], return_tensors="pt", padding=True, padding_side="left")
    written = model.generate(**batch, max_new_tokens=5)[:, batch.input_ids.shape[1] :]
    answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert sum(answer == row["completion"] for answer, row in zip(answers, asked, strict=True)) <= 0.2 * len(asked)
