"""Little stories whose state is known, in the manner of the bAbI tasks, and exact questions about them.

Characters walk between places, and take, carry, hand over and put down objects. The generator keeps the state of that
world, so that every question that it asks has one exact answer. A story comes in two tellings:

* `stories` gives the bare events with questions about them: the task of the demonstration.
* `narratives` mixes the same kind of events with remarks that reveal the state ("Somebody asked where the ball was. It
  was in the garden."): what the embedded model is trained to read. They use the words of the questions, but a question
  in them is never followed by its bare answer, so the trained model has to be tuned before it answers.

Everything follows from a seed. Whether a story belongs to the held-out part is decided by a digest of its events alone,
so that the two parts share no story whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
PLACES = ("kitchen", "garden", "cellar", "attic", "library", "barn", "office", "tower")
OBJECTS = ("ball", "key", "lamp", "book", "apple", "coin", "hat", "map")

OPENINGS = ("One day", "This morning", "Last night")
WALK = ("{x} went to the {p}.", "{x} walked to the {p}.", "{x} ran to the {p}.")
WALK_FROM = ("{x} went from the[ {q}] to the {p}.", "{x} left the[ {q}] and went to the {p}.")
WALK_BACK = ("{x} went back to the[ {p}].",)
CARRY = ("{x} carried the[ {o}] to the {p}.", "{x} took the[ {o}] to the {p}.", "{x} brought the[ {o}] to the {p}.")
TAKE = ("{x} picked up the {o}.", "{x} grabbed the {o}.", "{x} found the {o} in the[ {p}].")
DROP = ("{x} put down the[ {o}].", "{x} dropped the[ {o}].", "{x} left the[ {o}] in the[ {p}].")
GIVE = ("{x} gave the[ {o}] to {y}.", "{x} handed the[ {o}] to {y}.", "{y} got the {o} from[ {x}].")

HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True)
class Question:
    """One question about a story.

    Attributes:
        kind: What is asked: `person`, `object`, `holder` or `before`.
        prompt: The story, then the question.
        answer: The only right answer, without surrounding space.
    """

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Story:
    """The events of a story and the questions about its last state."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Narrative:
    """A story told with remarks.

    Attributes:
        text: The text.
        known: Where the words stand that follow from the state, as (start, end) with the space before them.
    """

    text: str
    known: tuple[tuple[int, int], ...]


def _unmark(marked: str) -> Narrative:
    """Take out the brackets around the words that follow from the state."""
    text, known = "", []
    for i, part in enumerate(re.split(r"[\[\]]", marked)):
        if i % 2:
            known.append((len(text), len(text) + len(part)))
        text += part
    return Narrative(text, tuple(known))


@dataclass
class _World:
    """Who is where, who was where before, and who holds what."""

    cast: list[str]
    things: list[str]
    places: list[str]
    at: dict[str, str] = field(default_factory=dict)  # persons and objects
    before: dict[str, str] = field(default_factory=dict)  # persons: the place that they came from
    holder: dict[str, str] = field(default_factory=dict)  # objects in someone's hands

    def held_by(self, person: str) -> list[str]:
        return [thing for thing in self.things if self.holder.get(thing) == person]

    def walk(self, person: str, place: str) -> None:
        if person in self.at:
            self.before[person] = self.at[person]
        self.at[person] = place
        for thing in self.held_by(person):
            self.at[thing] = place

    def take(self, person: str, thing: str) -> None:
        self.holder[thing] = person
        self.at[thing] = self.at[person]


def _step(rng: random.Random, world: _World) -> str:
    """Let one event happen; returns the sentence that tells it."""
    x = rng.choice(world.cast)
    if x not in world.at:
        return _walk(rng, world, x)
    here = world.at[x]
    held = world.held_by(x)
    near = [y for y in world.cast if y != x and world.at.get(y) == here]
    loose = [o for o in world.things if o not in world.holder and world.at.get(o, here) == here]
    actions: list[Callable[[random.Random, _World, str], str]] = [_walk, _walk]
    if loose and not held:
        actions += [_take] * 3
    if held:
        actions += [_drop] + [_give] * (4 * bool(near))
    return rng.choice(actions)(rng, world, x)


def _walk(rng: random.Random, world: _World, x: str) -> str:
    target = rng.choice([p for p in world.places if p != world.at.get(x)])
    others = [world.at[y] for y in world.cast if y != x and y in world.at and world.at[y] != world.at.get(x)]
    if others and rng.random() < 0.4:  # people meet, so that objects can change hands
        target = rng.choice(others)
    held = world.held_by(x)
    back = world.before.get(x) == target
    world.walk(x, target)
    if held and rng.random() < 0.6:
        return rng.choice(CARRY).format(x=x, p=target, o=held[0])
    ways = WALK_BACK if back else WALK + WALK_FROM * (x in world.before)
    return rng.choice(ways).format(x=x, p=target, q=world.before.get(x))


def _take(rng: random.Random, world: _World, x: str) -> str:
    here = world.at[x]
    thing = rng.choice([o for o in world.things if o not in world.holder and world.at.get(o, here) == here])
    world.take(x, thing)
    return rng.choice(TAKE).format(x=x, o=thing, p=here)


def _drop(rng: random.Random, world: _World, x: str) -> str:
    thing = rng.choice(world.held_by(x))
    del world.holder[thing]
    return rng.choice(DROP).format(x=x, o=thing, p=world.at[x])


def _give(rng: random.Random, world: _World, x: str) -> str:
    thing = rng.choice(world.held_by(x))
    y = rng.choice([y for y in world.cast if y != x and world.at.get(y) == world.at[x]])
    world.take(y, thing)
    return rng.choice(GIVE).format(x=x, y=y, o=thing)


def _facts(world: _World) -> list[tuple[str, str, str, str]]:
    """All that can be asked now, as (kind, subject, where the subject is now, answer)."""
    facts = [("person", x, world.at[x], world.at[x]) for x in world.cast if x in world.at]
    facts += [("origin", x, world.at[x], p) for x, p in world.before.items()]
    facts += [("object", o, world.at[o], world.at[o]) for o in world.things if o in world.at]
    facts += [("holder", o, world.at[o], x) for o, x in world.holder.items()]
    return facts


QUESTIONS = {
    "person": ("Where is {s}?", "Where is {s} now?"),
    "object": ("Where is the {s}?", "Where is the {s} now?"),
    "holder": ("Who has the {s}?", "Who has the {s} now?"),
    "origin": ("Where did {s} come from?",),
}
ANSWERS = {"person": "in the {a}", "object": "in the {a}", "holder": "{a}", "origin": "from the {a}"}
REMARKS = {
    "person": (
        "{s} was in the[ {a}].",
        "{z} asked where {s} was. {s} was in the[ {a}].",
        "Where is {s} now? asked {z}. {s} was in the[ {a}].",
    ),
    "object": (
        "The {s} was in the[ {a}].",
        "{z} asked where the {s} was. It was in the[ {a}].",
        "Where is the {s} now? asked {z}. It was in the[ {a}].",
    ),
    "holder": (
        "It was[ {a}] who had the {s}.",
        "{z} asked who had the {s}. It was[ {a}].",
        "Who has the {s} now? asked {z}. It was[ {a}].",
    ),
    "origin": (
        "{s} had come from the[ {a}].",
        "{z} asked where {s} had come from. {s} had come from the[ {a}].",
        "Where did {s} come from? asked {z}. {s} had come from the[ {a}].",
    ),
}


def _remark(rng: random.Random, world: _World) -> str:
    """A sentence that reveals a part of the state."""
    facts = _facts(world)
    kind = rng.choice(sorted({fact[0] for fact in facts}))
    return _reveal(rng, rng.choice([fact for fact in facts if fact[0] == kind]))


def _reveal(rng: random.Random, fact: tuple[str, str, str, str]) -> str:
    kind, subject, now, answer = fact
    z = rng.choice(["Somebody", "Nobody"])
    telling = REMARKS[kind][rng.choice([0, 0, 1, 2])]
    return telling.format(s=subject, now=now, a=answer, z=z)


def _ask(rng: random.Random, world: _World, text: str) -> tuple[Question, ...]:
    questions = []
    facts = _facts(world)
    for kind, template in QUESTIONS.items():
        known = [fact for fact in facts if fact[0] == kind]
        if known:
            _, subject, now, answer = rng.choice(known)
            asked = rng.choice(template).format(s=subject, now=now)
            questions.append(Question(kind, f"{text} {asked}", ANSWERS[kind].format(a=answer)))
    rng.shuffle(questions)
    return tuple(questions)


def _world(rng: random.Random) -> _World:
    return _World(
        rng.sample(NAMES, rng.choice([2, 3])),
        rng.sample(OBJECTS, rng.choice([1, 2])),
        rng.sample(PLACES, rng.choice([3, 4])),
    )


def in_split(events: str, split: Split) -> bool:
    """Whether a story with these events belongs to the split: a matter of the text alone, not of any seed."""
    digest = hashlib.sha256(events.encode()).digest()
    return (digest[0] < 256 * HELD_OUT_SHARE) == (split == "held_out")


def _tell(rng: random.Random, remarks: float, longest: int = 8) -> tuple[_World, str, str]:
    world = _world(rng)
    events, told = [], []
    for _ in range(rng.randint(2, longest)):
        events.append(_step(rng, world))
        told.append(events[-1])
        if rng.random() < remarks:
            told.append(_remark(rng, world))
    if remarks:
        facts = _facts(world)
        rng.shuffle(facts)
        told += [_reveal(rng, fact) for fact in facts]
    opening = rng.choice(OPENINGS)
    return world, " ".join([opening, *events]), " ".join([opening, *told])


def stories(seed: int, n: int, split: Split = "train") -> Iterator[Story]:
    """Yield `n` stories with their questions."""
    rng = random.Random(f"stories {split} {seed}")
    while n:
        world, events, _ = _tell(rng, 0.0)
        if in_split(events, split):
            n -= 1
            text = _unmark(events).text
            yield Story(text, _ask(rng, world, text))


def narratives(seed: int, n: int, split: Split = "train", longest: int = 8) -> Iterator[Narrative]:
    """Yield `n` stories told with remarks that reveal the state, as plain text."""
    rng = random.Random(f"narratives {split} {seed}")
    while n:
        _, events, told = _tell(rng, 0.3, longest)
        if in_split(events, split):
            n -= 1
            yield _unmark(told)


def rows(told: Iterable[Story]) -> Iterator[dict[str, str]]:
    """One row per question: the prompt, and the completion with the space that parts the two."""
    for story in told:
        for question in story.questions:
            yield {"prompt": question.prompt, "completion": f" {question.answer}"}


def write_jsonl(path: Path, lines: Iterable[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
