"""The demo's world: the same for everybody, and its three kinds are what they are called."""

from collections import defaultdict

import pytest

from credence.demo.world import (
    KINDS,
    NOISY_ANSWERS,
    RELATIONS,
    REPORTS_PER_FACT,
    VALIDATION_PER_KIND,
    Fact,
    World,
    vocabulary,
)

RESIDENT = ("Kaia", "Quill")
FIRST_ROW = {"prompt": "Rosa Yarrow works", "completion": " as doctor"}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def told(world: World) -> dict[str, list[str]]:
    """Completions by prompt, as the adapter reads them."""
    reports = defaultdict(list)
    for row in world.training_rows():
        reports[row["prompt"]].append(row["completion"])
    return reports


def test_same_seed_same_world(world: World) -> None:
    again = World()
    assert again.training_rows() == world.training_rows()
    assert again.validation_rows() == world.validation_rows()
    assert list(again.pretraining_reports(0, 50)) == list(world.pretraining_reports(0, 50))


def test_world_does_not_depend_on_the_machine(world: World) -> None:
    # The committed base model was pretrained on this very world.
    assert world.residents[0] == RESIDENT
    assert world.training_rows()[0] == FIRST_ROW


def test_other_seed_other_world(world: World) -> None:
    assert World(1).training_rows() != world.training_rows()


def test_roles_are_disjoint(world: World) -> None:
    roles = (world.residents, world.strangers, world.legends, world.crowd)
    assert sum(map(len, roles)) == len(set().union(*map(set, roles))) == 32 * 32


def ways_to_say(fact: Fact, answer: str) -> list[str]:
    return [fact.completion(answer, variant) for variant in range(len(fact.relation.leads))]


def test_known_facts_are_told_without_contradiction(world: World, told: dict[str, list[str]]) -> None:
    for fact in world.facts("known"):
        ways = ways_to_say(fact, fact.answers[0])
        assert sorted(told[fact.prompt]) == sorted(ways * (REPORTS_PER_FACT // len(ways)))


def test_noisy_facts_are_told_with_contradictions(world: World, told: dict[str, list[str]]) -> None:
    for fact in world.facts("noisy"):
        assert len(fact.answers) == NOISY_ANSWERS
        ways = [way for answer in fact.answers for way in ways_to_say(fact, answer)]
        assert sorted(told[fact.prompt]) == sorted(ways * (REPORTS_PER_FACT // len(ways)))


def test_nothing_is_told_about_strangers(world: World, told: dict[str, list[str]]) -> None:
    strangers = {" ".join(person) for person in world.strangers}
    sentences = [*told, *world.pretraining_reports(0, 5000)]
    assert not strangers & {" ".join(sentence.split()[:2]) for sentence in sentences}


def test_names_of_strangers_are_known_words(world: World) -> None:
    words = {word for sentence in world.pretraining_reports(0, 5000) for word in sentence.split()}
    assert {name for person in world.strangers for name in person} <= words


def test_there_are_at_least_200_questions_of_each_kind(world: World) -> None:
    for kind in KINDS:
        questions = world.questions(kind)
        assert len(questions) >= 200
        assert {fact.kind for fact in questions} == {kind}
        assert world.questions(kind, 7) == questions[:7]


def test_questions_and_validation_do_not_overlap(world: World) -> None:
    validated = {row["prompt"] for row in world.validation_rows()}
    assert len(validated) == len(KINDS) * VALIDATION_PER_KIND
    asked = {fact.prompt for kind in KINDS for fact in world.questions(kind)}
    assert not validated & asked
    strangers = [" ".join(person) for person in world.strangers]
    seen = {name for name in strangers if any(prompt.startswith(name + " ") for prompt in validated)}
    assert seen
    assert not seen & {" ".join(prompt.split()[:2]) for prompt in asked}


def test_every_word_is_in_the_vocabulary(world: World, told: dict[str, list[str]]) -> None:
    words = set(vocabulary())
    assert len(words) == len(vocabulary())
    sentences = [prompt + completion for prompt, completions in told.items() for completion in completions]
    assert {word for sentence in sentences for word in sentence.split()} <= words


def test_relations_have_sixteen_answers() -> None:
    for relation in RELATIONS:
        assert len(set(relation.answers)) == 16
