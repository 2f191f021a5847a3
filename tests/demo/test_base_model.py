"""The committed base model: small, loadable, and fluent in the world's language."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from credence.demo.base_model import BOS, EOS, MODEL_DIR, PAD, make_model, make_tokenizer, pretrain
from credence.demo.world import KINDS, RELATIONS, World

BYTES_ALLOWED = 5_000_000


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def test_committed_tokenizer_is_the_scripts() -> None:
    committed = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    made = json.loads(make_tokenizer().backend_tokenizer.to_str())
    for document in (committed, made):  # set by the last call, not by the design
        document["padding"] = document["truncation"] = None
    assert committed == made


def test_tokenizer_round_trips_every_sentence(tokenizer) -> None:  # type: ignore[no-untyped-def]
    world = World()
    rows = [*world.training_rows()[:200], *world.validation_rows()]
    for row in rows:
        ids = tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"], add_special_tokens=False).input_ids
        assert ids == tokenizer(row["prompt"] + row["completion"]).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).lstrip() == row["prompt"] + row["completion"]


def test_tokenizer_keeps_the_space_before_a_completion(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.decode(tokenizer(" in Harwick", add_special_tokens=False).input_ids) == " in Harwick"


def test_special_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)


def test_chat_template_continues_the_users_sentence(tokenizer) -> None:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": "Ada Alder lives"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{BOS}Ada Alder lives"
    assert tokenizer(text, add_special_tokens=False).input_ids == tokenizer("Ada Alder lives").input_ids


def test_model_is_small_and_servable(model) -> None:  # type: ignore[no-untyped-def]
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.head_dim >= 32
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(path.stat().st_size for path in Path(MODEL_DIR).iterdir()) <= BYTES_ALLOWED


@torch.no_grad()
def test_model_speaks_grammatically_about_strangers(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    answers = {relation.verb: set(relation.answers) for relation in RELATIONS}
    for fact in World().questions("unknown", 25):
        ids = tokenizer(fact.prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        words = tokenizer.decode(out[0, ids.shape[1] :]).replace(EOS, f" {EOS}").split()
        assert words[0] in fact.relation.leads
        assert words[1] in answers[fact.relation.verb]
        assert words[2] == EOS


@torch.no_grad()
def test_base_model_knows_none_of_the_facts_asked(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    world = World()
    facts = [fact for kind in KINDS for fact in world.questions(kind, 60)]
    right = 0
    for fact in facts:
        ids = tokenizer(f"{fact.prompt} {fact.relation.leads[0]}", return_tensors="pt").input_ids
        answer = tokenizer.decode(int(model(ids).logits[0, -1].argmax())).strip()
        right += answer == fact.answers[0]
    assert right / len(facts) < 0.2  # chance is 1/16


def test_pretraining_lowers_the_loss_and_is_reproducible() -> None:
    losses = []
    for _ in range(2):
        tokenizer = make_tokenizer()
        losses.append(pretrain(make_model(tokenizer, 0), tokenizer, World(), steps=6, batch_size=8))
    assert losses[0] == losses[1]
    assert losses[0] < math.log(len(tokenizer))  # the loss of a uniform guess
