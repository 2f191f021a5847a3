"""lm-evaluation-harness against a real server: its own `local-completions`, and our model `credence`, beside transformers + PEFT."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from credence.adapters import Artifact
from credence.cli.main import run as credence
from credence.clients import CredenceError
from tests.serve.reference import Reference
from tests.servers import Server

pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements/dev.txt)")
pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity (requirements/dev.txt)")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402

from credence.cli.lm_eval import CredenceLM  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow]

K, TOLERANCE = 4, 1e-4
MEMBERS = [f"s{index}" for index in range(K)]
CONTEXT = "w2 w6 w14 w30"
CONTINUATIONS = [" w57 w58", " w57 w91 w3", " w60", " w61"]
QUESTIONS = [(CONTEXT, CONTINUATIONS[:2], 0), ("w5 w9 w11", CONTINUATIONS[2:], 1), ("w7", CONTINUATIONS[1:3], 0)]


def ids(text: str) -> list[int]:
    return [int(word[1:]) + 3 for word in text.split()]


def instance(kind: str, *arguments: Any, doc_id: int = 0) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("words", doc_id, 1))


def loglikelihoods(context: str = CONTEXT, texts: list[str] = CONTINUATIONS) -> list[Instance]:
    return [instance("loglikelihood", context, text) for text in texts]


@pytest.fixture(scope="module")
def reference(model_path: Path, artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("lm-eval-reference")
    path = str(artifacts["diag"].path)
    assert credence(["draw", path, "--k", str(K), "--output", str(folder / "samples")]) == 0
    assert credence(["draw", path, "--k", "1", "--tau", "0", "--output", str(folder / "mean")]) == 0
    samples = {f"s{index}": folder / "samples" / f"sample-{index:02d}" for index in range(K)}
    return Reference(model_path, {**samples, "mean": folder / "mean" / "sample-00"})


@pytest.fixture
def ask(server: Server, model_path: Path) -> Iterator[Any]:
    opened: list[CredenceLM] = []

    def model(**arguments: Any) -> CredenceLM:
        options = {"base_url": server.url, "model": "diag", "tokenizer": str(model_path), "num_concurrent": 2}
        opened.append(CredenceLM(**{**options, **arguments}))
        return opened[-1]

    yield model
    for one in opened:
        one.close()


@pytest.mark.parametrize("k", [0, K])
def test_loglikelihood_is_the_posterior_predictive(ask: Any, reference: Reference, tmp_path: Path, k: int) -> None:
    names = MEMBERS[:k] or ["mean"]
    [greedy] = [" " + " ".join(f"w{step.token - 3}" for step in reference.greedy(ids(CONTEXT), 3, list(names)))]
    file = tmp_path / "new" / "uncertainty.jsonl"
    model = ask(n_samples=k, uncertainty_file=str(file))
    texts = [*CONTINUATIONS, greedy]
    answers = model.loglikelihood(loglikelihoods(texts=texts), disable_tqdm=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for text, (value, is_greedy), row in zip(texts, answers, rows, strict=True):
        steps = reference.read(ids(CONTEXT), ids(text), names)
        assert value == pytest.approx(sum(step.log_prob for step in steps), abs=TOLERANCE)
        assert is_greedy == all(step.log_prob == step.top for step in steps)
        assert (row["task"], row["doc_id"], row["request"]) == ("words", 0, "loglikelihood")
        assert (row["prompt"], row["answer"]) == (CONTEXT, text)
        for score in ("total", "aleatoric", "epistemic"):
            mean = sum(getattr(step, score) for step in steps) / len(steps)
            assert row["uncertainty"][score] == pytest.approx(mean, abs=TOLERANCE)
    assert answers[-1][1] and not all(is_greedy for _, is_greedy in answers)
    with pytest.raises(ValueError, match="uncertainty.jsonl is there already"):
        ask(n_samples=k, uncertainty_file=str(file))


def test_average_of_whole_texts(ask: Any, reference: Reference) -> None:
    answers = ask(n_samples=K, average="sequence").loglikelihood(loglikelihoods(), disable_tqdm=True)
    by_token = ask(n_samples=K).loglikelihood(loglikelihoods(), disable_tqdm=True)
    for text, (value, _), (other, _) in zip(CONTINUATIONS, answers, by_token, strict=True):
        tokens = ids(text)
        members = reference.log_probs(ids(CONTEXT) + tokens[:-1], MEMBERS)[:, -len(tokens) :]
        sums = [sum(float(member[step, token]) for step, token in enumerate(tokens)) for member in members]
        assert value == pytest.approx(math.log(sum(map(math.exp, sums)) / K), abs=TOLERANCE)
        assert (abs(value - other) < TOLERANCE) == (len(tokens) == 1)


def test_choices_are_read_together(ask: Any, reference: Reference, tmp_path: Path) -> None:
    file = tmp_path / "choices.jsonl"
    repeated = [*CONTINUATIONS, CONTINUATIONS[0]]
    requests = [*loglikelihoods(texts=repeated), instance("loglikelihood", "w9", " w60", doc_id=1)]
    answers = ask(n_samples=K, mode="choices", uncertainty_file=str(file)).loglikelihood(requests, disable_tqdm=True)
    probs = []
    for member in MEMBERS:
        sums = [sum(s.log_prob for s in reference.read(ids(CONTEXT), ids(text), [member])) for text in CONTINUATIONS]
        weights = [math.exp(value) for value in sums]
        probs.append([weight / sum(weights) for weight in weights])
    expected = [math.log(sum(column) / K) for column in zip(*probs, strict=True)]
    assert [value for value, _ in answers[:5]] == pytest.approx([*expected, expected[0]], abs=TOLERANCE)
    alone = sum(step.log_prob for step in reference.read(ids("w9"), ids(" w60"), MEMBERS))
    assert answers[5][0] == pytest.approx(alone, abs=TOLERANCE)
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert first["answer"] == CONTINUATIONS[expected.index(max(expected))]
    assert (first["uncertainty"]["mode"], second["uncertainty"]["mode"]) == ("choices", "score")


@pytest.mark.parametrize("k", [0, K])
def test_generation_is_the_average(ask: Any, reference: Reference, k: int) -> None:
    steps = reference.greedy(ids(CONTEXT), 4, [*(MEMBERS[:k] or ["mean"])])
    words = [f" w{step.token - 3}" for step in steps]
    arguments = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False, "temperature": 0}
    [text] = ask(n_samples=k).generate_until([instance("generate_until", CONTEXT, arguments)], disable_tqdm=True)
    assert text.split() == "".join(words).split()
    arguments["until"] = [words[1].strip()]
    [text] = ask(n_samples=k).generate_until([instance("generate_until", CONTEXT, arguments)], disable_tqdm=True)
    assert text.split() == [words[0].strip()]
    with pytest.raises(ValueError, match="max_gen_toks is 500, the model reads 191"):
        ask().generate_until([instance("generate_until", CONTEXT, {"max_gen_toks": 500})], disable_tqdm=True)


def test_rolling_loglikelihood(ask: Any, reference: Reference) -> None:
    text = "w5 w9 w11 w20"
    [value] = ask(n_samples=K).loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    steps = reference.read([0], ids(text), MEMBERS)  # the harness begins with the tokenizer's bos
    assert value == pytest.approx(sum(step.log_prob for step in steps), abs=TOLERANCE)


def test_local_completions_asks_the_mean_adapter(ask: Any, server: Server, model_path: Path) -> None:
    plain = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="diag",
        tokenizer=str(model_path),
        tokenizer_backend="huggingface",
    )
    mean = ask(n_samples=0).loglikelihood(loglikelihoods(), disable_tqdm=True)
    found = plain.loglikelihood(loglikelihoods(), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in mean], abs=TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in mean]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "nobody"}, "'nobody' is not on the server; adapters with uncertainty: diag, row, point"),
        ({"model": "base"}, "'base' has no posterior; the harness's local-completions asks it"),
        ({"model": None}, "no model given"),
        ({"n_samples": 9}, r"n_samples is 9; it may be 0 \(the mean adapter\) to 8"),
        ({"mode": "generate"}, "mode is 'generate'; it may be score or choices"),
        ({"average": "logits"}, "average is 'logits'; it may be token or sequence"),
    ],
)
def test_wrong_arguments(ask: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(**arguments)


def test_a_failed_request_fails_the_evaluation(ask: Any) -> None:
    with pytest.raises(CredenceError, match="the model reads 192|maximum context length"):
        ask(max_length=4000).loglikelihood(loglikelihoods("w1 " * 300), disable_tqdm=True)


def write_task(folder: Path) -> None:
    rows = [{"question": q, "choices": [c.strip() for c in choices], "answer": a} for q, choices, a in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "words.yaml").write_text(json.dumps(task))


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("datasets", "sacrebleu", "pytablewriter"))),
    reason="tasks of lm-eval need what requirements/harnesses.txt pins",
)
@pytest.mark.parametrize("mode", ["score", "choices"])
def test_a_task_on_the_command_line(
    server: Server, model_path: Path, reference: Reference, tmp_path: Path, mode: str
) -> None:
    write_task(tmp_path)
    arguments = f"model=diag,base_url={server.url},n_samples={K},tokenizer={model_path},mode={mode}"
    command = ["run", "--model", "credence", "--tasks", "words", "--include_path", str(tmp_path), "--log_samples"]
    result = subprocess.run(
        [
            str(Path(sys.executable).parent / "credence"),
            "lm-eval",
            *command,
            "--output_path",
            str(tmp_path / "out"),
            "--model_args",
            f"{arguments},uncertainty_file={tmp_path / 'out' / 'uncertainty.jsonl'}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    [found] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json")]
    right = 0
    for question, choices, answer in QUESTIONS:
        sums = [sum(s.log_prob for s in reference.read(ids(question), ids(text), MEMBERS)) for text in choices]
        right += sums.index(max(sums)) == answer
    assert 0 < right < len(QUESTIONS)
    assert found["results"]["words"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    rows = [json.loads(line) for line in (tmp_path / "out" / "uncertainty.jsonl").read_text().splitlines()]
    assert len(rows) == (6 if mode == "score" else 3)
    assert [row["task"] for row in rows] == ["words"] * len(rows)
