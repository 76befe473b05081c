"""Little stories whose state is known, in the manner of the bAbI tasks, and exact questions about them.

Characters walk between places, and take, carry, hand over and put down objects. The generator keeps the state of that
world, so that every question it asks has one exact answer. A story comes in two tellings:

* `stories` gives the bare events with questions about their outcome: the task of the demonstration.
* `narratives` mixes such events with remarks that reveal the state ("Somebody asked where the ball was. It was in the
  garden."): what the embedded model was trained to read. They use the words of the questions, but no question in them
  is followed by its bare answer, so the model has to be tuned before it answers.

Everything follows from a seed. Which part a story belongs to, training or held out, is decided by a digest of its
events alone: the two parts share no story, whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Split = Literal["train", "held_out"]
FactKind = Literal["person", "object", "holder", "origin"]

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
PLACES = ("kitchen", "garden", "cellar", "attic", "library", "barn", "office", "tower")
OBJECTS = ("ball", "key", "lamp", "book", "apple", "coin", "hat", "map")

# Square brackets stand around the words that follow from the state; see `Narrative.known`.
OPENINGS = ("One day", "This morning", "Last night")
WALK = ("{x} went to the {p}.", "{x} walked to the {p}.", "{x} ran to the {p}.")
WALK_FROM = ("{x} went from the[ {q}] to the {p}.", "{x} left the[ {q}] and went to the {p}.")
WALK_BACK = ("{x} went back to the[ {p}].",)
CARRY = ("{x} carried the[ {o}] to the {p}.", "{x} took the[ {o}] to the {p}.", "{x} brought the[ {o}] to the {p}.")
TAKE = ("{x} picked up the {o}.", "{x} grabbed the {o}.", "{x} found the {o} in the[ {p}].")
DROP = ("{x} put down the[ {o}].", "{x} dropped the[ {o}].", "{x} left the[ {o}] in the[ {p}].")
GIVE = ("{x} gave the[ {o}] to {y}.", "{x} handed the[ {o}] to {y}.", "{y} got the {o} from[ {x}].")

ASKERS = ("Somebody", "Nobody", "A child")
REMARKS: dict[FactKind, tuple[str, str, str]] = {
    "person": (
        "{s} was in the[ {a}].",
        "{z} asked where {s} was. {s} was in the[ {a}].",
        "Where is {s} now? asked a child. {s} was in the[ {a}].",
    ),
    "object": (
        "The {s} was in the[ {a}].",
        "{z} asked where the {s} was. It was in the[ {a}].",
        "Where is the {s} now? asked a child. It was in the[ {a}].",
    ),
    "holder": (
        "It was[ {a}] who had the {s}.",
        "{z} asked who had the {s}. It was[ {a}].",
        "Who has the {s} now? asked a child. It was[ {a}].",
    ),
    "origin": (
        "{s} had come from the[ {a}].",
        "{z} asked where {s} had come from. {s} had come from the[ {a}].",
        "Where did {s} come from? asked a child. {s} had come from the[ {a}].",
    ),
}
QUESTIONS: dict[FactKind, tuple[tuple[str, ...], str]] = {
    "person": (("Where is {s}?", "Where is {s} now?"), "in the {a}"),
    "object": (("Where is the {s}?", "Where is the {s} now?"), "in the {a}"),
    "holder": (("Who has the {s}?", "Who has the {s} now?"), "{a}"),
    "origin": (("Where did {s} come from?",), "from the {a}"),
}

HELD_OUT_SHARE = 1 / 8
REMARK_RATE = 0.3


@dataclass(frozen=True)
class Question:
    """One question about a story.

    Attributes:
        kind: What is asked: where a person is, where an object is, who holds an object, or where a person came from.
        prompt: The story, then the question.
        answer: The only right answer, without surrounding space.
    """

    kind: FactKind
    prompt: str
    answer: str


@dataclass(frozen=True)
class Story:
    """The events of a story, and questions about how it ends, in random order."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Narrative:
    """A story told with remarks.

    Attributes:
        text: The text.
        known: Where the words stand that follow from the state, as (start, end), each with the space before it. All
            other words are chance, so that a trainer may give these more weight.
    """

    text: str
    known: tuple[tuple[int, int], ...]


class _Fact(NamedTuple):
    kind: FactKind
    subject: str
    answer: str


@dataclass
class _World:
    """Who is where, who came from where, and who holds what."""

    cast: list[str]
    things: list[str]
    places: list[str]
    at: dict[str, str] = field(default_factory=dict)  # persons and objects that the story has mentioned
    origin: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)

    def carried(self, person: str) -> list[str]:
        return [thing for thing in self.things if self.holder.get(thing) == person]

    def loose(self, place: str) -> list[str]:
        # An object that the story has not mentioned yet may turn up anywhere.
        return [o for o in self.things if o not in self.holder and self.at.get(o, place) == place]

    def others(self, person: str) -> list[str]:
        return [y for y in self.cast if y != person and y in self.at]

    def near(self, person: str) -> list[str]:
        return [y for y in self.others(person) if self.at[y] == self.at[person]]

    def move(self, person: str, place: str) -> None:
        if person in self.at:
            self.origin[person] = self.at[person]
        self.at.update(dict.fromkeys([person, *self.carried(person)], place))

    def receive(self, person: str, thing: str) -> None:
        self.holder[thing] = person
        self.at[thing] = self.at[person]

    def facts(self) -> list[_Fact]:
        facts = [_Fact("person", x, self.at[x]) for x in self.cast if x in self.at]
        facts += [_Fact("object", o, self.at[o]) for o in self.things if o in self.at]
        facts += [_Fact("holder", o, x) for o, x in self.holder.items()]
        return facts + [_Fact("origin", x, p) for x, p in self.origin.items()]


def _event(rng: random.Random, world: _World) -> str:
    """Let one thing happen; returns the sentence that tells it."""
    x = rng.choice(world.cast)
    actions: list[Callable[[random.Random, _World, str], str]] = [_walk, _walk]
    if x in world.at:
        carried = world.carried(x)
        actions += [_take] * (3 * (not carried and bool(world.loose(world.at[x]))))
        actions += [_drop] * bool(carried) + [_give] * (4 * bool(carried and world.near(x)))
    return rng.choice(actions)(rng, world, x)


def _walk(rng: random.Random, world: _World, x: str) -> str:
    here = world.at.get(x)
    target = rng.choice([p for p in world.places if p != here])
    company = [world.at[y] for y in world.others(x) if world.at[y] != here]
    if company and rng.random() < 0.4:  # characters have to meet for objects to change hands
        target = rng.choice(company)
    carried = world.carried(x)
    if carried and rng.random() < 0.6:
        ways: tuple[str, ...] = CARRY
    elif world.origin.get(x) == target:
        ways = WALK_BACK
    else:
        ways = WALK + WALK_FROM * (here is not None)
    world.move(x, target)
    return rng.choice(ways).format(x=x, p=target, q=here, o=carried[0] if carried else None)


def _take(rng: random.Random, world: _World, x: str) -> str:
    thing = rng.choice(world.loose(world.at[x]))
    world.receive(x, thing)
    return rng.choice(TAKE).format(x=x, o=thing, p=world.at[x])


def _drop(rng: random.Random, world: _World, x: str) -> str:
    thing = rng.choice(world.carried(x))
    del world.holder[thing]
    return rng.choice(DROP).format(x=x, o=thing, p=world.at[x])


def _give(rng: random.Random, world: _World, x: str) -> str:
    thing = rng.choice(world.carried(x))
    y = rng.choice(world.near(x))
    world.receive(y, thing)
    return rng.choice(GIVE).format(x=x, y=y, o=thing)


def _remark(rng: random.Random, fact: _Fact) -> str:
    statement, indirect, direct = REMARKS[fact.kind]
    telling = rng.choice((statement, statement, indirect, direct))
    return telling.format(s=fact.subject, a=fact.answer, z=rng.choice(ASKERS))


def _any_fact(rng: random.Random, facts: list[_Fact]) -> _Fact:
    kind = rng.choice(sorted({fact.kind for fact in facts}))  # the kind first, so that no kind is rare
    return rng.choice([fact for fact in facts if fact.kind == kind])


def _question(rng: random.Random, story: str, fact: _Fact) -> Question:
    asked, answer = QUESTIONS[fact.kind]
    prompt = f"{story} {rng.choice(asked).format(s=fact.subject)}"
    return Question(fact.kind, prompt, answer.format(a=fact.answer))


def _unmark(marked: str) -> Narrative:
    """Take the brackets out of a text, and note what they held."""
    text, known = "", []
    for i, part in enumerate(re.split(r"[\[\]]", marked)):
        if i % 2:
            known.append((len(text), len(text) + len(part)))
        text += part
    return Narrative(text, tuple(known))


def split_of(events: str) -> Split:
    """The part that a story with these events belongs to: a matter of the text alone, not of any seed."""
    digest = hashlib.sha256(events.encode()).digest()
    return "held_out" if digest[0] < 256 * HELD_OUT_SHARE else "train"


def _tell(rng: random.Random, events: int) -> tuple[str, str, list[_Fact]]:
    """Run a world; returns the bare story, the marked story with remarks, and what is true at the end."""
    cast, things, places = rng.choice((2, 3)), rng.choice((1, 2)), rng.choice((3, 4))
    world = _World(rng.sample(NAMES, cast), rng.sample(OBJECTS, things), rng.sample(PLACES, places))
    bare = [rng.choice(OPENINGS)]
    told = bare.copy()
    for _ in range(events):
        bare.append(_event(rng, world))
        told.append(bare[-1])
        if rng.random() < REMARK_RATE:
            told.append(_remark(rng, _any_fact(rng, world.facts())))
    facts = world.facts()
    rng.shuffle(facts)
    told += [_remark(rng, fact) for fact in facts]
    return _unmark(" ".join(bare)).text, " ".join(told), facts


def stories(seed: int, n: int, split: Split = "train") -> Iterator[Story]:
    """Yield stories of four to eight events, with one question of each kind that has an answer.

    Args:
        seed: Where the stories start from; the two parts never share one, not even for equal seeds.
        n: How many.
        split: Which part they come from.

    Yields:
        The stories, always the same for the same arguments.

    Raises:
        ValueError: There is no such part.
    """
    _check_split(split)
    rng = random.Random(f"stories {split} {seed}")
    while n > 0:
        text, _, facts = _tell(rng, rng.randint(4, 8))
        if split_of(text) == split:
            n -= 1
            by_kind = {fact.kind: fact for fact in facts}  # a random one of each kind: the facts come shuffled
            asked = rng.sample(list(by_kind.values()), len(by_kind))
            yield Story(text, tuple(_question(rng, text, fact) for fact in asked))


def narratives(seed: int, n: int, split: Split = "train", longest: int = 8) -> Iterator[Narrative]:
    """Yield stories of two to `longest` events, told with remarks that reveal the state.

    Args:
        seed: Where the stories start from.
        n: How many.
        split: Which part the events come from.
        longest: The largest number of events; a small one makes easy reading for a model that starts to learn.

    Yields:
        The narratives, always the same for the same arguments.

    Raises:
        ValueError: There is no such part.
    """
    _check_split(split)
    rng = random.Random(f"narratives {split} {seed}")
    while n > 0:
        text, marked, _ = _tell(rng, rng.randint(2, longest))
        if split_of(text) == split:
            n -= 1
            yield _unmark(marked)


def _check_split(split: str) -> None:
    """No story belongs to a part that there is not, and the search for one would not end."""
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is no part of the stories. Use {' or '.join(get_args(Split))}")


def rows(told: Iterable[Story], each: int = 1) -> Iterator[dict[str, str]]:
    """Yield prompt and completion rows, `each` questions a story at most.

    The completion begins with the space that parts it from the prompt: the tokenizer keeps a space with the word after
    it, so the two can be encoded apart. The end token is the trainer's to add.
    """
    for story in told:
        for question in islice(story.questions, each):
            yield {"prompt": question.prompt, "completion": f" {question.answer}"}


def write_jsonl(path: Path, lines: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_text(path: Path, told: Iterable[Narrative]) -> None:
    """Write narratives to a text file, one a line."""
    path.write_text("".join(narrative.text + "\n" for narrative in told), encoding="utf-8")
