"""A small made-up world whose facts are known, noisy or unknown by construction.

People are pairs (given name, family name). Each has one fact per relation: where they live, what they keep, and so on.
Every fact is a hash of (seed, person, relation), so that nothing about one person follows from anything about another:
what was not told cannot be inferred, only guessed.

Roles of the people, disjoint by construction:

- *crowd*: only in the base model's pretraining, every time with freshly drawn answers. From them the base learns the
  language and that a name alone says nothing about the answer.
- *residents*: in the adapter's training data. Each of their facts is either **known** (all reports agree) or **noisy**
  (the reports contradict each other: `NOISY_ANSWERS` answers, equally likely, which no amount of data resolves).
- *strangers*: in no training data at all; their facts are **unknown**. Their given and family names are common ones.

A *report* is one prompt with one completion. Training data, validation data and the demo's questions are reports.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["known", "noisy", "unknown"]
KINDS: tuple[Kind, ...] = ("known", "noisy", "unknown")

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
    """One thing that can be asked about a person: the question, the word before the answer, the possible answers."""

    name: str
    question: str
    lead: str
    answers: tuple[str, ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "home",
        "Where does {person} live?",
        "in",
        tuple("Harwick Oldport Mistral Redfern Stonebay Larkhill Windrush Goldcrest Ravenna Elmside Duskvale Ferrol "
              "Kingsway Northcape Saltmere Tarnbrook".split()),
    ),
    Relation(
        "work",
        "What is {person} by trade?",
        "a",
        tuple("baker weaver sailor potter miner tailor farmer painter carpenter doctor judge teacher clerk hunter "
              "fisher mason".split()),
    ),
    Relation(
        "pet",
        "Which pet does {person} keep?",
        "one",
        tuple("cat dog parrot rabbit goose turtle ferret pony hamster lizard goat falcon mouse spider frog "
              "donkey".split()),
    ),
    Relation(
        "drink",
        "What does {person} drink?",
        "some",
        tuple("tea coffee cider milk water juice cocoa wine beer mead lemonade broth rum punch soda kefir".split()),
    ),
    Relation(
        "colour",
        "Which colour does {person} wear?",
        "mostly",
        tuple("red blue green yellow black white purple orange brown grey pink teal crimson ivory violet "
              "amber".split()),
    ),
)

NUM_RESIDENTS = 112
NUM_STRANGERS = 96
NOISY_ANSWERS = 3
REPORTS_PER_FACT = 6
VALIDATION_PER_KIND = 80

Person = tuple[str, str]


@dataclass(frozen=True)
class Fact:
    """One question about one person, with every answer that is true of it (one, or several when noisy)."""

    kind: Kind
    person: Person
    relation: Relation
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The question, as asked."""
        return self.relation.question.format(person=" ".join(self.person))

    def completion(self, answer: str) -> str:
        """The text that follows the question when `answer` is given."""
        return f" {self.relation.lead} {answer}"


def _hash(*parts: object) -> int:
    """A 64-bit integer that depends on every part and on nothing else (not on the platform, not on the process)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


class World:
    """Everything that is true for one seed, and the three splits made from it.

    Args:
        seed: chooses who is a resident and who a stranger, every fact, and every report.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        people = [(given, family) for given in GIVEN_NAMES for family in FAMILY_NAMES]
        people.sort(key=lambda person: _hash(seed, "role", *person))
        self.residents = people[:NUM_RESIDENTS]
        self.strangers = people[NUM_RESIDENTS : NUM_RESIDENTS + NUM_STRANGERS]
        self.crowd = people[NUM_RESIDENTS + NUM_STRANGERS :]
        self.resident_facts = [self._fact(person, relation) for person in self.residents for relation in RELATIONS]
        self.stranger_facts = [
            self._fact(person, relation, unknown=True) for person in self.strangers for relation in RELATIONS
        ]

    def _fact(self, person: Person, relation: Relation, unknown: bool = False) -> Fact:
        order = sorted(relation.answers, key=lambda answer: _hash(self.seed, "answer", *person, relation.name, answer))
        if unknown:
            return Fact("unknown", person, relation, tuple(order[:1]))
        noisy = _hash(self.seed, "noisy", *person, relation.name) % 2 == 1
        kind: Kind = "noisy" if noisy else "known"
        return Fact(kind, person, relation, tuple(order[: NOISY_ANSWERS if noisy else 1]))

    def facts(self, kind: Kind) -> list[Fact]:
        """All facts of one kind, in an order that depends on the seed only."""
        pool = self.stranger_facts if kind == "unknown" else self.resident_facts
        chosen = [fact for fact in pool if fact.kind == kind]
        return sorted(chosen, key=lambda fact: _hash(self.seed, "order", *fact.person, fact.relation.name))

    def training_rows(self) -> list[dict[str, str]]:
        """Reports for the adapter: `REPORTS_PER_FACT` of every fact of every resident, in a shuffled order.

        The contradicting answers of a noisy fact appear equally often.
        """
        rows = []
        for fact in self.resident_facts:
            for index in range(REPORTS_PER_FACT):
                answer = fact.answers[index % len(fact.answers)]
                rows.append((_hash(self.seed, "shuffle", fact.prompt, index), fact, answer))
        rows.sort(key=lambda row: row[0])
        return [{"prompt": fact.prompt, "completion": fact.completion(answer)} for _, fact, answer in rows]

    def _validation_facts(self, kind: Kind) -> list[Fact]:
        if kind == "unknown":  # whole people, so that validation and questions share no stranger
            people = set(self.strangers[: VALIDATION_PER_KIND // len(RELATIONS)])
            return [fact for fact in self.facts(kind) if fact.person in people]
        return self.facts(kind)[:VALIDATION_PER_KIND]

    def validation_rows(self) -> list[dict[str, str]]:
        """Reports for fitting tau and the calibration: `VALIDATION_PER_KIND` of each kind, one report each.

        They are what the served adapter will be asked: facts it was told, facts it was told in contradiction (one of
        the true answers, drawn by hash), and facts about strangers with their true answer, which it cannot know.
        """
        rows = []
        for kind in KINDS:
            for fact in self._validation_facts(kind):
                answer = fact.answers[_hash(self.seed, "validation", fact.prompt) % len(fact.answers)]
                rows.append({"prompt": fact.prompt, "completion": fact.completion(answer)})
        return rows

    def questions(self, kind: Kind, limit: int | None = None) -> list[Fact]:
        """The facts the demo asks about: none of them is in the validation data."""
        held_out = {fact.prompt for fact in self._validation_facts(kind)}
        chosen = [fact for fact in self.facts(kind) if fact.prompt not in held_out]
        return chosen if limit is None else chosen[:limit]

    def pretraining_rows(self, start: int, count: int) -> Iterator[tuple[str, str]]:
        """Pairs (prompt, completion) about the crowd, numbers `start` to `start + count`; answers are pure chance."""
        for index in range(start, start + count):
            draw = _hash(self.seed, "pretraining", index)
            person = self.crowd[draw % len(self.crowd)]
            relation = RELATIONS[draw // 4096 % len(RELATIONS)]
            answer = relation.answers[draw // 2**32 % len(relation.answers)]
            fact = Fact("unknown", person, relation, (answer,))
            yield fact.prompt, fact.completion(answer)


def vocabulary() -> list[str]:
    """Every word and sign the world uses, in a fixed order."""
    words: dict[str, None] = {}
    for relation in RELATIONS:
        for word in (*relation.question.replace("{person}", "").replace("?", "").split(), relation.lead):
            words.setdefault(word)
    for relation in RELATIONS:
        words.update(dict.fromkeys(relation.answers))
    words.update(dict.fromkeys(GIVEN_NAMES + FAMILY_NAMES))
    return list(words)
