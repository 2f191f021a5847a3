"""Encoders with a classification head: every method trains them, and what is stored predicts what transformers and PEFT compute alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    TrainerCallback,
)
from transformers.utils import logging as hf_logging

from credence.adapters.artifact import Artifact, load_artifact, write_sample
from credence.adapters.errors import ArtifactError
from credence.adapters.merged import merge
from credence.serve.errors import ConfigurationError
from credence.serve.launcher import verify
from credence.training.classifier import load_classifier, load_model
from credence.training.config import LoraSettings, TrainConfig
from credence.training.data import DataFormat, read_data
from credence.training.errors import ConfigError, DataError, MetricError, ModelError
from credence.training.evaluate import evaluate
from credence.training.importers import ImportRequest, import_adapter
from credence.training.loop import train
from credence.training.methods import METHODS
from credence.training.methods.base import TrainingRows
from credence.training.methods.laplace import Laplace, LaplaceSettings
from credence.training.modeling import add_lora, context_length, is_encoder, load_tokenizer
from credence.training.predict import Prediction, Predictor
from credence.training.prompts import Encoder, class_space, collate, label_space
from credence.training.release import release
from credence.training.served import Server
from credence.training.session import open_session
from credence.training.trainer import target_nll
from tests.training.conftest import label_rows, quick_config
from tests.training.encoders import class_rows, make_encoder, pair_rows
from tests.training.test_loop import StopAfter

Write = Callable[..., Path]
Rows = Callable[..., list[dict[str, str]]]
PAD = 1
ABLE = [name for name in METHODS if name != "ensemble"]
HEADS = {
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "bert": {f"{part}.{kind}" for part in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")},
}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "roberta")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def config_of(method: str, *overrides: str) -> TrainConfig:
    return quick_config(method, "lora.target_modules=[query, value]", *overrides)


def files(write: Write, rows: Rows, count: int = 24) -> tuple[Path, Path]:
    """Training rows, and others to hold out."""
    return write("train.jsonl", rows(count)), write("validation.jsonl", rows(12, start=count))


def alone(base: Path, factors: dict[str, Any], artifact: Artifact, text: str, text_b: str | None) -> Tensor:
    """Log-probabilities of the classes for one row, [C] float64, with nothing of ours but the stored tensors: W + alpha / r B A."""
    hf_logging.set_verbosity_error()
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(artifact.config.training["labels"]))
    model.eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in artifact.head.items():
            weights[name].copy_(tensor)
        for module, pair in factors.items():
            weights[f"{module}.weight"] += artifact.config.lora_alpha / artifact.config.rank * pair.B @ pair.A
        types = model.config.type_vocab_size > 1
        row = PreTrainedTokenizerFast.from_pretrained(base)(
            text, text_b, return_tensors="pt", return_token_type_ids=types
        )
        logits: Tensor = model(**row).logits
    return torch.log_softmax(logits[0].double(), dim=-1)


def in_order(predictions: list[Prediction]) -> Tensor:
    """The averaged log-probabilities in the order of the rows, [rows, C]."""
    rows = torch.cat([prediction.row for prediction in predictions])
    return torch.cat([prediction.log_mean_PC for prediction in predictions])[rows.argsort()]


@pytest.mark.parametrize("rows", [class_rows, pair_rows])
@pytest.mark.parametrize("method", ABLE)
def test_every_method_trains_an_encoder(
    method: str, rows: Rows, roberta: Path, bert: Path, write: Write, tmp_path: Path
) -> None:
    family = "roberta" if rows is class_rows else "bert"
    base, (data, validation) = {"roberta": roberta, "bert": bert}[family], files(write, rows)
    result = train(base, data, validation, method, tmp_path / "out", config_of(method), 1)
    artifact = load_artifact(result.path)
    assert sorted(artifact.mean) == [
        f"{family}.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")
    ]
    assert all(bool(factors.B.any()) for factors in artifact.mean.values())
    assert set(artifact.head) == HEADS[family] and all(bool(tensor.any()) for tensor in artifact.head.values())
    record = artifact.config.training
    assert record["labels"] == record["label_texts"] == sorted({row["label"] for row in rows(24)})
    assert record["label_tokens"] == list(range(len(record["labels"]))) and record["by_head"] is True
    assert artifact.adapter_config["task_type"] == "SEQ_CLS"
    assert set(artifact.calibration.temperature) == {0, 2, 4}
    if artifact.has_posterior:
        sample = artifact.draw(seed=0, index=0, tau=1.0)
        assert any(not torch.equal(sample[name].A, pair.A) for name, pair in artifact.mean.items())
    card = (result.path / "README.md").read_text()
    assert "credence eval ." in card and "credence serve" not in card and record["labels"][0] in card
    report = evaluate(result.path, base, validation, ks=[0, 2])
    released = artifact.metrics["release"]["nll"]
    for entry in report["results"]:
        if entry["temperature"] == artifact.calibration.fitted_temperature(entry["k"]):
            assert entry["nll"] == pytest.approx(released[str(entry["k"])], abs=1e-6)  # the head was stored and loaded
    assert train(base, data, validation, method, tmp_path / "again", config_of(method), 1).digest == result.digest


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_predictions_are_those_of_transformers_alone(
    family: str, roberta: Path, bert: Path, write: Write, tmp_path: Path
) -> None:
    base, rows = {"roberta": roberta, "bert": bert}[family], pair_rows(24)
    data, validation = files(write, pair_rows)
    config = config_of("blob", "train.max_steps=12", "method.initial_sd=0.3")
    artifact = load_artifact(train(base, data, validation, "blob", tmp_path / "out", config, 2).path)
    draws = [artifact.draw(seed=0, index=index, tau=1.0) for index in range(3)]
    with open_session(artifact, base) as session:
        examples = session.encoder.encode(read_data(data))
        mean = in_order(list(session.predictor.predict(examples, [artifact.mean], [1])))
        average = in_order(list(session.predictor.predict(examples, draws, [3])))
    texts = [(row["text"], row["text_b"]) for row in rows]
    expected = torch.stack([alone(base, artifact.mean, artifact, *pair) for pair in texts])
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
    members = torch.stack([torch.stack([alone(base, draw, artifact, *pair) for pair in texts]) for draw in draws])
    torch.testing.assert_close(average, members.exp().mean(0).log(), rtol=0, atol=1e-6)
    assert (
        float((average - mean).abs().max()) > 1e-3 and float(mean.std(0).min()) > 1e-3
    )  # there is something to compare


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_peft_loads_a_drawn_sample_with_its_head(
    family: str, roberta: Path, bert: Path, write: Write, tmp_path: Path
) -> None:
    base = {"roberta": roberta, "bert": bert}[family]
    data, _ = files(write, class_rows)
    artifact = load_artifact(train(base, data, None, "ivon", tmp_path / "out", config_of("ivon"), 2).path)
    for tau in (0.0, 1.0):
        folder = tmp_path / f"sample-{tau}"
        write_sample(folder, artifact, seed=0, index=1, tau=tau)
        model = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), folder
        ).eval()
        with open_session(artifact, base) as session, torch.no_grad():
            examples = session.encoder.encode(read_data(data))[:5]
            found = in_order(list(session.predictor.predict(examples, [artifact.draw(seed=0, index=1, tau=tau)], [1])))
            for example, row in zip(examples, found, strict=True):
                expected = torch.log_softmax(model(torch.tensor([example.prompt])).logits[0].double(), dim=-1)
                torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("rows", [class_rows, pair_rows])
def test_padding_changes_nothing(family: str, rows: Rows, roberta: Path, bert: Path, write: Write) -> None:
    base, data = {"roberta": roberta, "bert": bert}[family], read_data(write("data.jsonl", rows(12)))
    model, head = load_classifier(base, "float32", len(data.labels))
    head.start(0)
    space = class_space(data.labels, has_pairs=data.has_pairs)
    examples = Encoder(load_tokenizer(base), DataFormat.LABEL, space=space, max_length=64).encode(data)
    model, sites = add_lora(model, LoraSettings(target_modules=("query",)), head.modules)
    draw = {site.name: site.mean for site in sites}
    assert len({len(example.prompt) for example in examples}) > 3
    together, singly = (
        in_order(list(Predictor(model, sites, PAD, size).predict(examples, [draw], [1]))) for size in (64, 1)
    )
    torch.testing.assert_close(together, singly, rtol=0, atol=1e-6)
    nll, count = target_nll(model, collate(examples, PAD))
    answers = torch.tensor([[example.answer] for example in examples])
    assert int(count) == 12
    torch.testing.assert_close(nll[0].double(), -singly.gather(1, answers).sum(), rtol=0, atol=1e-5)
    # The class is no part of what is read.
    relabelled = Encoder(load_tokenizer(base), DataFormat.LABEL, space=space, max_length=64).encode(data, answers=False)
    unlabelled = in_order(list(Predictor(model, sites, PAD).predict(relabelled, [draw], [1])))
    assert torch.equal(unlabelled, together)


def test_bert_reads_which_text_a_token_belongs_to(bert: Path, write: Write) -> None:
    data = read_data(write("data.jsonl", pair_rows(3)))
    space = class_space(data.labels, has_pairs=True)
    examples = Encoder(load_tokenizer(bert), DataFormat.LABEL, space=space, max_length=64).encode(data)
    batch = collate(examples, PAD)
    first = len(pair_rows(1)[0]["text"]) + 2
    length = len(examples[0].prompt)
    assert batch["token_type_ids"][0, :length].tolist() == [0] * first + [1] * (length - first)
    model, _ = load_classifier(bert, "float32", 2)
    model.eval()
    with torch.no_grad():
        told, _ = target_nll(model, batch)
        untold, _ = target_nll(model, {key: value for key, value in batch.items() if key != "token_type_ids"})
    assert abs(float(told - untold)) > 1e-4


@pytest.mark.parametrize(("rows", "chance"), [(class_rows, 1 / 3), (pair_rows, 1 / 2)])
def test_a_rule_is_learned(rows: Rows, chance: float, bert: Path, write: Write, tmp_path: Path) -> None:
    data, validation = files(write, rows, 48)
    test = write("test.jsonl", rows(48, start=60))
    config = config_of("map", "train.max_steps=60", "train.batch_size=8")
    result = train(bert, data, validation, "map", tmp_path / "out", config)
    best = evaluate(result.path, bert, test, ks=[0])["results"][0]
    assert best["accuracy"] > chance + 0.25


@pytest.mark.parametrize("method", ["ivon", "swag", "blob"])
def test_a_resumed_run_is_bit_equal(method: str, write: Write, tmp_path: Path) -> None:
    base = make_encoder(tmp_path / "roberta", dropout=0.1)
    data, validation = files(write, class_rows)
    settings = ["train.max_steps=7", "train.save_steps=3", "train.gradient_accumulation=2", "train.eval_steps=3"]
    if method == "swag":
        settings.append("method.start=0.2")  # iterates lie before the checkpoint
    config = config_of(method, *settings)
    whole = train(base, data, validation, method, tmp_path / "whole", config, 5)
    with pytest.raises(KeyboardInterrupt):
        train(base, data, validation, method, tmp_path / "cut", config, 5, callbacks=[StopAfter(5)])
    torch.manual_seed(99)
    assert train(base, data, validation, method, tmp_path / "cut", config, 5, True).digest == whole.digest


@pytest.mark.parametrize("method", ["map", "ivon", "monteclora"])
def test_accumulated_batches_train_as_one(method: str, roberta: Path, write: Write, tmp_path: Path) -> None:
    data, _ = files(write, class_rows)
    one, parts = (
        load_artifact(train(roberta, data, None, method, tmp_path / name, config_of(method, *sizes), 3).path)
        for name, sizes in (
            ("one", ["train.batch_size=8"]),
            ("parts", ["train.batch_size=2", "train.gradient_accumulation=4"]),
        )
    )
    for name, pair in one.mean.items():
        torch.testing.assert_close(parts.mean[name].A, pair.A, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(parts.mean[name].B, pair.B, rtol=1e-3, atol=1e-5)
    for name, tensor in one.head.items():
        torch.testing.assert_close(parts.head[name], tensor, rtol=1e-3, atol=1e-5)


class Heads(TrainerCallback):  # type: ignore[misc]
    """Keeps the head after every step, and the learning rates of the first."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = dict(kwargs["model"].get_base_model().named_parameters())
        self.after.append({name: parameters[name].detach().double().clone() for name in HEADS["roberta"]})
        if len(self.after) == 1:
            self.rates = [group["initial_lr"] for group in kwargs["optimizer"].param_groups]


def test_swag_averages_the_head_with_the_adapter(roberta: Path, write: Write, tmp_path: Path) -> None:
    data, validation = files(write, class_rows)
    heads = Heads()
    config = config_of("swag", "train.eval_steps=4")
    result = train(roberta, data, validation, "swag", tmp_path / "out", config, callbacks=[heads])
    artifact = load_artifact(result.path)
    for name, tensor in artifact.head.items():
        average = (heads.after[2][name] + heads.after[3][name]) / 2  # of 4 steps, those of the second half
        torch.testing.assert_close(tensor, average.float(), rtol=0, atol=0)
        assert not torch.equal(tensor, heads.after[3][name].float())
    # The evaluation of the last step was made with that average, and left the head as it was.
    (entry,) = result.metrics["train"]["evaluations"]
    at_one = next(point for point in artifact.calibration.temperature[0].curve if point.value == 1)
    assert entry["nll"] == pytest.approx(at_one.nll, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "settings", "rates"),
    [
        ("map", [], [0.01, 0.01]),
        ("map", ["train.head_learning_rate=0.002"], [0.01, 0.002]),
        ("ivon", [], [1, 2e-4]),
        ("ivon", ["train.head_learning_rate=0.002"], [1, 0.002]),
    ],
)
def test_the_head_has_a_rate_of_its_own(
    method: str, settings: list[str], rates: list[float], roberta: Path, write: Write, tmp_path: Path
) -> None:
    data, _ = files(write, class_rows)
    heads, config = Heads(), config_of(method, *settings)
    result = train(roberta, data, None, method, tmp_path / "out", config, callbacks=[heads])
    assert heads.rates == rates
    written = yaml.safe_load((result.path / "config.yaml").read_text())
    assert written["train"]["head_learning_rate"] == rates[1]
    again = TrainConfig.model_validate(written)
    assert (
        load_artifact(result.path).mean.keys()
        == load_artifact(train(roberta, data, None, method, tmp_path / "again", again).path).mean.keys()
    )
    # Weights move by about the rate a step, of ivon's clipped update by lr * clip_radius.
    moved = (heads.after[1]["classifier.out_proj.weight"] - heads.after[0]["classifier.out_proj.weight"]).abs().max()
    assert 0.1 * rates[1] < float(moved) < 2 * rates[1]


def test_a_head_of_the_base_folder_is_the_start(roberta: Path, write: Write, tmp_path: Path) -> None:
    """One with as many classes is taken over, of another the layer that depends on them is new."""
    model, head = load_classifier(roberta, "float32", 3)
    head.start(7)
    stored = head.tensors()
    model.save_pretrained(tmp_path / "classifier")
    load_tokenizer(roberta).save_pretrained(tmp_path / "classifier")
    assert is_encoder(tmp_path / "classifier")
    _, same = load_classifier(tmp_path / "classifier", "float32", 3)
    same.start(0)
    _, other = load_classifier(tmp_path / "classifier", "float32", 2)
    other.start(0)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in same.tensors().items()) and not same.fresh
    assert other.fresh == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    assert torch.equal(other.tensors()["classifier.dense.weight"], stored["classifier.dense.weight"])
    assert other.tensors()["classifier.out_proj.weight"].std() == pytest.approx(0.2, rel=0.3)


def test_an_encoder_without_its_own_weights_is_refused(roberta: Path, tmp_path: Path) -> None:
    model, _ = load_classifier(roberta, "float32", 2)
    lost = "roberta.encoder.layer.1.output.dense.weight"
    state = {name: tensor for name, tensor in model.state_dict().items() if name != lost}
    model.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(ModelError, match=f"lacks 1 weights of the encoder, e.g. {lost}"):
        load_classifier(tmp_path / "half", "float32", 2)


def test_bfloat16_keeps_the_head_in_float32(bert: Path, write: Write, tmp_path: Path) -> None:
    data, validation = files(write, class_rows)
    config = config_of("monteclora", "train.dtype=bfloat16")
    result = train(bert, data, validation, "monteclora", tmp_path / "out", config)
    artifact = load_artifact(result.path)
    tensor = artifact.head["classifier.weight"]
    assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())
    assert evaluate(result.path, bert, validation, ks=[2])["results"][0]["nll"] < 3


def laplace_rows(base: Path, write: Write) -> TrainingRows:
    """Five rows of different lengths on a model whose B is not zero."""
    data = read_data(write("data.jsonl", class_rows(5)))
    model, head = load_classifier(base, "float32", 3)
    head.start(0)
    examples = Encoder(
        load_tokenizer(base), DataFormat.LABEL, space=class_space(data.labels, has_pairs=False), max_length=64
    ).encode(data)
    model, sites = add_lora(model, LoraSettings(r=3, alpha=6, target_modules=("query", "value")), head.modules)
    torch.manual_seed(1)
    for site in sites:
        torch.nn.init.normal_(site.mean.B, std=0.2)
    return TrainingRows(model=model, sites=sites, examples=examples, pad_token=PAD, batch_size=3, seed=4)


def test_the_diagonal_laplace_is_the_sum_of_squared_row_gradients(roberta: Path, write: Write) -> None:
    rows = laplace_rows(roberta, write)
    method = Laplace(LaplaceSettings(structure="diag", fisher="empirical", prior_precision=0.5), rows.sites)
    method.fit_posterior(rows)
    rows.model.eval()
    for site in rows.sites:
        total = torch.zeros_like(site.mean.A, dtype=torch.float64)
        for example in rows.examples:
            logits = rows.model(input_ids=torch.tensor([example.prompt])).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([example.answer]))
            total += torch.autograd.grad(loss, site.mean.A)[0].double().square()
        expected = -0.5 * (total + 0.5).log()
        torch.testing.assert_close(
            method.posteriors()[site.name].tensors()["log_sd_A"], expected.float(), rtol=1e-4, atol=1e-5
        )
        assert float((total / 0.5).max()) > 1e-3


def test_the_kronecker_laplace_counts_every_token_and_no_padding(roberta: Path, write: Write) -> None:
    rows = laplace_rows(roberta, write)
    method = Laplace(LaplaceSettings(structure="kron", kronecker_rank=64, prior_precision=0.5), rows.sites)
    method.fit_posterior(rows)
    name = rows.sites[0].name
    posterior: Any = method.posteriors()[name]
    layer = dict(rows.model.named_modules())[f"base_model.model.{name}"]
    seen: list[Tensor] = []
    handle = layer.lora_A["default"].register_forward_hook(lambda _, given, __: seen.append(given[0][0].detach()))
    with torch.no_grad():
        for example in rows.examples:
            rows.model(input_ids=torch.tensor([example.prompt]))
    handle.remove()
    inputs = torch.cat(seen).double()
    expected = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs)).flip(0).clamp_min(0)
    torch.testing.assert_close(posterior.A.in_values.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["tfb", "laplace"])
def test_a_posterior_around_a_given_classifier_keeps_its_head(
    method: str, roberta: Path, write: Write, tmp_path: Path
) -> None:
    data, validation = files(write, class_rows)
    start = load_artifact(train(roberta, data, None, "map", tmp_path / "map", config_of("map")).path)
    own = ["method.samples=3"] if method == "tfb" else []
    config = quick_config(method, "train.max_steps=0", f"lora.init={tmp_path / 'map'}", *own)
    config = config.model_copy(update={"lora": LoraSettings(init=str(tmp_path / "map"))})
    artifact = load_artifact(train(roberta, data, validation, method, tmp_path / "out", config).path)
    assert all(torch.equal(tensor, start.head[name]) for name, tensor in artifact.head.items())
    others = write("others.jsonl", [{**row, "label": row["label"].upper()} for row in class_rows(24)])
    with pytest.raises(ModelError, match="classifies bird, cat, dog, the data have BIRD, CAT, DOG"):
        train(roberta, others, None, method, tmp_path / "others", config)


def test_posthoc_monteclora_leaves_the_head_alone(roberta: Path, write: Write, tmp_path: Path) -> None:
    data, _ = files(write, class_rows)
    start = load_artifact(train(roberta, data, None, "map", tmp_path / "map", config_of("map")).path)
    config = quick_config("monteclora", "method.posthoc=true")
    config = config.model_copy(update={"lora": LoraSettings(init=str(tmp_path / "map"))})
    artifact = load_artifact(train(roberta, data, None, "monteclora", tmp_path / "out", config).path)
    assert all(torch.equal(tensor, start.head[name]) for name, tensor in artifact.head.items())
    assert all(torch.equal(pair.A, start.mean[name].A) for name, pair in artifact.mean.items())


def test_release_keeps_the_head(roberta: Path, write: Write, tmp_path: Path) -> None:
    data, validation = files(write, class_rows)
    path = train(roberta, data, None, "blob", tmp_path / "out", config_of("blob")).path
    before = load_artifact(path)
    release(path, roberta, validation, config_of("blob").release)
    after = load_artifact(path)
    assert after.calibration.temperature and all(torch.equal(after.head[n], t) for n, t in before.head.items())


@pytest.fixture
def classifier(roberta: Path, write: Write, tmp_path: Path) -> Path:
    """An artifact on an encoder."""
    data, _ = files(write, class_rows)
    return train(roberta, data, None, "map", tmp_path / "classifier", config_of("map")).path


def test_a_classifier_is_not_served_merged_or_put_into_an_ensemble(
    classifier: Path, roberta: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigurationError, match="vLLM serves causal language models: evaluate it with `credence eval`"
    ):
        verify({"triage": str(classifier)}, tmp_path / "store")
    with pytest.raises(ArtifactError, match="causal language models are merged: evaluate it"):
        merge(
            classifier,
            roberta,
            tmp_path / "m",
            linear_modules={},
            base_model=load_artifact(classifier).config.base_model,
            name="m",
        )
    server = Server(connect=pytest.fail, model="triage")
    with pytest.raises(MetricError, match="which no server serves; evaluate it with --engine hf"):
        server.open(load_artifact(classifier), roberta, 1).__enter__()
    request = ImportRequest(source=classifier, others=(classifier,), output=tmp_path / "e")
    with pytest.raises(ArtifactError, match="has a classification head of its own"):
        import_adapter(request, "ensemble")
    assert not (tmp_path / "m").exists() and not (tmp_path / "e").exists()


def test_an_artifact_belongs_to_its_kind_of_base(
    classifier: Path, base: Path, bert: Path, roberta: Path, write: Write, tmp_path: Path
) -> None:
    rows = write("rows.jsonl", label_rows(12))
    with pytest.raises(ModelError, match="was trained on an encoder, .* is a causal language model"):
        evaluate(classifier, base, rows)
    with pytest.raises(ModelError, match=r"differ in bert\.pooler\.dense\.bias.* not the adapter's base model"):
        evaluate(classifier, bert, rows)
    causal = train(base, rows, None, "map", tmp_path / "causal", quick_config("map")).path
    with pytest.raises(ModelError, match="was trained on a causal language model, .* is an encoder"):
        evaluate(causal, roberta, rows)


def test_evaluation_takes_rows_of_the_trained_shape(classifier: Path, roberta: Path, write: Write) -> None:
    pairs = write("pairs.jsonl", [{**row, "label": "dog"} for row in pair_rows(12)])
    with pytest.raises(DataError, match=r'pairs\.jsonl:1: has a "text_b"; the adapter classifies single texts'):
        evaluate(classifier, roberta, pairs)


@pytest.mark.parametrize(
    ("method", "settings", "rows", "error", "message"),
    [
        ("ensemble", [], class_rows, ConfigError, "every member would need a classification head of its own"),
        ("map", ["data.template='{text} is'"], class_rows, ConfigError, "reads text and text_b as they are"),
        (
            "map",
            ["train.quantization=8bit"],
            class_rows,
            ConfigError,
            "is an encoder; causal language models are quant",
        ),
        ("map", ["lora.target_modules=[dense]"], class_rows, ModelError, r"classifier\.dense, a part of the classif"),
        ("map", [], "completion", ModelError, "is an encoder, which classifies rows of the form"),
        ("map", [], "long", DataError, r"has 65 tokens, 64 are allowed"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(
    method: str,
    settings: list[str],
    rows: Any,
    error: type[Exception],
    message: str,
    roberta: Path,
    write: Write,
    tmp_path: Path,
) -> None:
    documents = {
        "completion": [{"prompt": "a", "completion": "b"}] * 8,
        "long": [*class_rows(8), {"text": "x" * 63, "label": "dog"}],
    }
    data = write("train.jsonl", documents[rows] if isinstance(rows, str) else rows(24))
    with pytest.raises(error, match=message):
        train(roberta, data, None, method, tmp_path / "out", config_of(method, *settings))
    assert not (tmp_path / "out").exists()


def test_roberta_reads_as_many_tokens_as_it_has_positions_for(roberta: Path, bert: Path, write: Write) -> None:
    """Positions begin behind the padding token's, so that 66 of them are 64 tokens; of BERT all 64 count."""
    for base in (roberta, bert):
        model, _ = load_classifier(base, "float32", 2)
        assert context_length(model) == 64
        ids = torch.full((1, 64), 5)
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


def test_all_linear_leaves_the_head_out(roberta: Path, write: Write, tmp_path: Path) -> None:
    data, validation = files(write, class_rows)
    config = quick_config("map", "lora.target_modules=all-linear")
    result = train(roberta, data, validation, "map", tmp_path / "out", config)
    artifact = load_artifact(result.path)
    assert len(artifact.mean) == 12 and not any("classifier" in name for name in artifact.mean)
    assert evaluate(result.path, roberta, validation, ks=[0])["results"]


def test_a_tokenizer_with_another_padding_token_is_refused(roberta: Path, write: Write, tmp_path: Path) -> None:
    data, _ = files(write, class_rows)
    config = json.loads((roberta / "config.json").read_text())
    for path in roberta.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    with pytest.raises(ModelError, match="the tokenizer pads with token 1, the encoder's padding token is 3"):
        train(tmp_path, data, None, "map", tmp_path / "out", config_of("map"))


def test_a_head_rate_needs_a_head(base: Path, train_file: Path, tmp_path: Path) -> None:
    config = quick_config("map", "train.head_learning_rate=0.1")
    with pytest.raises(ConfigError, match="is a causal language model, which has no classification head"):
        train(base, train_file, None, "map", tmp_path / "out", config)


def test_what_counts_as_an_encoder(base: Path, roberta: Path, bert: Path, tmp_path: Path) -> None:
    assert is_encoder(roberta) and is_encoder(bert)
    assert not is_encoder(base) and not is_encoder(tmp_path / "nothing")
    causal = RobertaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, is_decoder=True)
    RobertaForCausalLM(causal).save_pretrained(tmp_path / "causal")
    assert not is_encoder(tmp_path / "causal")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored/config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(ModelError, match="has a classification head instead of next-token logits"):
        load_model(tmp_path / "scored", "float32", num_classes=2)


def test_pairs_on_a_causal_model_need_a_place_in_the_template(base: Path, write: Write, tmp_path: Path) -> None:
    rows = [{"text": "a {text_b}", "text_b": "b", "label": label} for label in ("no", "yes")] * 6
    data = write("pairs.jsonl", rows)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .* has no place for it; put \{text_b\} beside"):
        train(base, data, None, "map", tmp_path / "out", quick_config("map"))
    tokenizer = load_tokenizer(base)
    space = label_space(tokenizer, ["no", "yes"], "{text} / {text_b}:")
    example = Encoder(tokenizer, DataFormat.LABEL, space=space, max_length=64).encode(read_data(data))[0]
    assert tokenizer.decode(example.prompt) == "a {text_b} / b:" and not example.by_head
    result = train(base, data, None, "map", tmp_path / "out", quick_config("map", "data.template='{text} / {text_b}:'"))
    single = write("single.jsonl", label_rows(12))
    with pytest.raises(DataError, match=r'single\.jsonl:1: .*(has no "text_b"|has the label)'):
        evaluate(result.path, base, single)


def test_pairs_and_single_texts_are_not_mixed(write: Write) -> None:
    data = write("mixed.jsonl", [*label_rows(2), *pair_rows(1)])
    with pytest.raises(DataError, match=r'mixed\.jsonl:3: line 3 has a "text_b" and line 1 has none'):
        read_data(data)
    with pytest.raises(DataError, match='"text_b" is a JSON int'):
        read_data(write("bad.jsonl", [{"text": "a", "text_b": 3, "label": "x"}]))
