"""A small made-up world whose facts are known, noisy or unknown by construction.

People are pairs (given name, family name). Each has one fact per relation: where they live, what they keep, and so on.
Every fact is a hash of (seed, person, relation), so that nothing about one person follows from anything about another:
what was not told cannot be inferred, only guessed.

Roles of the people, disjoint by construction:

- *crowd* and *legends*: in the base model's pretraining only. What is said of the crowd changes every time; what is said
  of the legends never does. So the base learns the language, that a name alone says nothing, and how to remember.
- *residents*: in the adapter's training data. Each of their facts is either **known** (all reports agree) or **noisy**
  (the reports contradict each other: `NOISY_ANSWERS` answers, equally often, which no amount of data resolves).
- *strangers*: in no training data at all, so that their facts are **unknown**. Their given and family names are those
  of the others, in new pairs.

A *report* is a sentence in two parts: a prompt ("Ada Alder lives") and a completion (" in Harwick").
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["known", "noisy", "unknown"]
KINDS: tuple[Kind, ...] = ("known", "noisy", "unknown")
Person = tuple[str, str]

GIVEN_NAMES = tuple(
    "Ada Bram Cleo Dirk Edda Finn Gwen Hugo Iris Jory Kaia Leif Mara Nils Odette Piet Quin Rosa Sven Tilda "
    "Ulf Vera Wim Xenia Yann Zora Arlo Britt Caspar Dora Emil Freya".split()
)
FAMILY_NAMES = tuple(
    "Alder Birch Calder Dunmore Elwood Farrow Garnet Holloway Ingram Jessop Kestrel Lockhart Marlow Norwood Orchard "
    "Penrose Quill Rowan Sorrel Thorne Upton Vance Whitlock Yarrow Ashby Bramble Croft Draper Everly Fenwick Glover "
    "Hadley".split()
)


@dataclass(frozen=True)
class Relation:
    """One thing that can be said of a person: the verb, the word before the answer, the possible answers.

    Where there are two such words they mean the same and are equally common: how to say a thing is often a matter of
    chance even when the thing itself is certain, and entropy alone cannot tell the one from the other.
    """

    verb: str
    leads: tuple[str, ...]
    answers: tuple[str, ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "lives",
        ("in", "at"),
        tuple(
            "Harwick Oldport Mistral Redfern Stonebay Larkhill Windrush Goldcrest Ravenna Elmside Duskvale Ferrol "
            "Kingsway Northcape Saltmere Tarnbrook".split()
        ),
    ),
    Relation(
        "works",
        ("as",),
        tuple(
            "baker weaver sailor potter miner tailor farmer painter carpenter doctor judge teacher clerk hunter "
            "fisher mason".split()
        ),
    ),
    Relation(
        "keeps",
        ("a", "one"),
        tuple(
            "cat dog parrot rabbit goose turtle ferret pony hamster lizard goat falcon mouse spider frog donkey".split()
        ),
    ),
    Relation(
        "drinks",
        ("only", "just"),
        tuple("tea coffee cider milk water juice cocoa wine beer mead lemonade broth rum punch soda kefir".split()),
    ),
    Relation(
        "wears",
        ("mostly",),
        tuple(
            "red blue green yellow black white purple orange brown grey pink teal crimson ivory violet amber".split()
        ),
    ),
)

NUM_RESIDENTS = 112
NUM_STRANGERS = 64
NUM_LEGENDS = 200
NOISY_ANSWERS = 3
REPORTS_PER_FACT = 6
VALIDATION_PER_KIND = 70
LEGEND_SHARE = 0.7


@dataclass(frozen=True)
class Fact:
    """One thing about one person, with every answer that is true of it (several when noisy)."""

    kind: Kind
    person: Person
    relation: Relation
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The sentence up to where the answer begins."""
        return f"{' '.join(self.person)} {self.relation.verb}"

    def completion(self, answer: str, variant: int = 0) -> str:
        """The rest of the sentence when `answer` is given; `variant` counts through the ways to say it."""
        return f" {self.relation.leads[variant % len(self.relation.leads)]} {answer}"


def _hash(*parts: object) -> int:
    """A 64-bit integer that depends on every part and on nothing else (not on the platform, not on the process)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


class World:
    """Everything that is true for one seed, and the splits made from it.

    Args:
        seed: chooses everybody's role, every fact and every report.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        people = [(given, family) for given in GIVEN_NAMES for family in FAMILY_NAMES]
        people.sort(key=lambda person: _hash(seed, "role", *person))
        starts = [0, NUM_RESIDENTS, NUM_RESIDENTS + NUM_STRANGERS, NUM_RESIDENTS + NUM_STRANGERS + NUM_LEGENDS]
        self.residents, self.strangers, self.legends = (people[a:b] for a, b in zip(starts, starts[1:], strict=False))
        self.crowd = people[starts[-1] :]
        self.resident_facts = [
            self._fact("noisy" if self._is_noisy(person, relation) else "known", person, relation)
            for person in self.residents
            for relation in RELATIONS
        ]
        self.stranger_facts = [
            self._fact("unknown", person, relation) for person in self.strangers for relation in RELATIONS
        ]

    def _is_noisy(self, person: Person, relation: Relation) -> bool:
        return _hash(self.seed, "noisy", *person, relation.verb) % 2 == 1

    def _fact(self, kind: Kind, person: Person, relation: Relation) -> Fact:
        order = sorted(relation.answers, key=lambda answer: _hash(self.seed, "answer", *person, relation.verb, answer))
        return Fact(kind, person, relation, tuple(order[: NOISY_ANSWERS if kind == "noisy" else 1]))

    def facts(self, kind: Kind) -> list[Fact]:
        """All facts of one kind, in an order that depends on the seed only."""
        chosen = [fact for fact in (*self.resident_facts, *self.stranger_facts) if fact.kind == kind]
        return sorted(chosen, key=lambda fact: _hash(self.seed, "order", fact.prompt))

    def training_rows(self) -> list[dict[str, str]]:
        """Reports for the adapter: `REPORTS_PER_FACT` of every fact of every resident, in a shuffled order.

        Answers and ways to say them are balanced: each pair of the two is as frequent as any other.
        """
        rows = []
        for fact in self.resident_facts:
            for index in range(REPORTS_PER_FACT):
                variant, answer = divmod(index, len(fact.answers))
                completion = fact.completion(fact.answers[answer], variant)
                row = {"prompt": fact.prompt, "completion": completion}
                rows.append((_hash(self.seed, "shuffle", fact.prompt, index), row))
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def _validation_facts(self, kind: Kind) -> list[Fact]:
        if kind == "unknown":  # whole people, so that validation and questions share no stranger
            people = set(self.strangers[: VALIDATION_PER_KIND // len(RELATIONS)])
            return [fact for fact in self.facts(kind) if fact.person in people]
        return self.facts(kind)[:VALIDATION_PER_KIND]

    def validation_rows(self) -> list[dict[str, str]]:
        """Reports for fitting tau and the calibration: `VALIDATION_PER_KIND` of each kind, one report each.

        They are like what the served adapter will be asked: facts it was told, facts it was told in contradiction (one
        of the true answers), and facts about strangers with their true answers, which it cannot know.
        """
        rows = []
        for kind in KINDS:
            for fact in self._validation_facts(kind):
                variant, answer = divmod(_hash(self.seed, "validation", fact.prompt), len(fact.answers))
                rows.append({"prompt": fact.prompt, "completion": fact.completion(fact.answers[answer], variant)})
        return rows

    def questions(self, kind: Kind, limit: int | None = None) -> list[Fact]:
        """The facts the demo asks about; none of them is in the validation data."""
        held_out = {fact.prompt for fact in self._validation_facts(kind)}
        return [fact for fact in self.facts(kind) if fact.prompt not in held_out][:limit]

    def pretraining_reports(self, start: int, count: int) -> Iterator[str]:
        """Sentences number `start` to `start + count` for the base model: legends' facts and things said of the crowd."""
        for index in range(start, start + count):
            draw = _hash(self.seed, "pretraining", index)
            relation = RELATIONS[draw % 1024 % len(RELATIONS)]
            if draw // 2**10 % 1000 < 1000 * LEGEND_SHARE:
                fact = self._fact("known", self.legends[draw // 2**20 % len(self.legends)], relation)
                answer = fact.answers[0]
            else:
                fact = self._fact("noisy", self.crowd[draw // 2**20 % len(self.crowd)], relation)
                answer = relation.answers[draw // 2**40 % len(relation.answers)]
            yield fact.prompt + fact.completion(answer, draw // 2**50)


def vocabulary() -> list[str]:
    """Every word the world uses, in a fixed order."""
    words: dict[str, None] = {}
    for relation in RELATIONS:
        words.update(dict.fromkeys((relation.verb, *relation.leads, *relation.answers)))
    words.update(dict.fromkeys(GIVEN_NAMES + FAMILY_NAMES))
    return list(words)
