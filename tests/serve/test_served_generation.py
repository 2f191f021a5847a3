"""`credence eval --generate --engine URL`: the texts, scores and token samples of a server are those of the offline evaluation."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from credence.cli.main import run as credence
from credence.clients import Client
from credence.training.config import load_config
from credence.training.generation import TextEntry, measure_generation
from credence.training.loop import train
from credence.training.served import Server as Served
from tests.servers import Server, credence_command, start
from tests.training.conftest import make_base

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SETTINGS = [
    "train.max_steps=60",
    "train.batch_size=4",
    "train.learning_rate=0.01",
    "method.initial_sd=0.3",
    "release.ks=[4]",
    "release.taus=[1, 10]",
    "release.map_rows=0",
]
ROWS = [{"prompt": f"{i % 7}+{i % 3}" + " " * (i % 4) + "=", "completion": f"{i % 7 + i % 3}"} for i in range(12)]
TAU = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a released artifact of free text."""
    folder = tmp_path_factory.mktemp("served-generation")
    base = make_base(folder / "base", hidden_size=64, context=256)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train(base, folder / "rows.jsonl", folder / "rows.jsonl", "melora", folder / "sums", load_config(None, SETTINGS), 0)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Serves the artifact."""
    running = start(credence_command(folder / "base", {"sums": folder / "sums"}), folder / "server.log")
    yield running
    running.stop()


def check(found: TextEntry, expected: TextEntry) -> None:
    assert (found.k, found.tau, found.correct) == (expected.k, expected.tau, expected.correct)
    for texts, others in zip(found.samples, expected.samples, strict=True):
        for text, other in zip(texts, others, strict=True):
            assert (text.tokens, text.text, text.stopped) == (other.tokens, other.text, other.stopped)
            scores = [text.score, text.total, text.epistemic]
            assert scores == pytest.approx([other.score, other.total, other.epistemic], abs=1e-3)
    assert found.confidence == pytest.approx(expected.confidence, abs=1e-3)


def test_texts_and_scores_are_the_offline_ones(folder: Path, server: Server) -> None:
    arguments = (folder / "sums", folder / "base", folder / "rows.jsonl", "number", [0, 4], TAU)
    ask = Served(connect=lambda: Client(server.url), model="sums", concurrency=4)
    offline = measure_generation(*arguments, max_new_tokens=6, token_samples=True)
    served = measure_generation(*arguments, max_new_tokens=6, token_samples=True, server=ask)
    for found, expected in zip(
        (*served.entries, *served.token_samples), (*offline.entries, *offline.token_samples), strict=True
    ):
        check(found, expected)
    mean, average = offline.entries
    # The comparison can fail: the average says other things than the mean, and samples differ from one another.
    assert max(average.epistemic) > 0.01
    assert max(abs(a.score - b.score) for a, b in zip(mean.texts, average.texts, strict=True)) > 0.01
    assert any(len({text.tokens for text in texts}) > 1 for texts in offline.token_samples[0].samples)
    command = ["eval", str(arguments[0]), "--base", str(arguments[1]), "--data", str(arguments[2]), "--k", "0,4"]
    options = [
        "--tau",
        str(TAU),
        "--generate",
        "number",
        "--max-new-tokens",
        "6",
        "--engine",
        server.url,
        "--model",
        "sums",
    ]
    assert credence([*command, *options, "--json", str(folder / "served.json")]) == 0
    results = json.loads((folder / "served.json").read_text())["results"]
    for result, entry in zip(results, offline.entries, strict=True):
        expected = entry.document(0)
        assert result["accuracy"] == expected["accuracy"] and result == pytest.approx(expected, abs=1e-3)
