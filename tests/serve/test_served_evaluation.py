"""`credence eval --engine URL` measures what the offline evaluation measures, on label and on choice rows."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from credence.adapters import load_artifact
from credence.cli.main import run as credence
from credence.clients import Client
from credence.training.config import load_config
from credence.training.errors import MetricError
from credence.training.evaluate import evaluate
from credence.training.loop import train
from credence.training.served import Server as Served
from tests.servers import Server, credence_command, start
from tests.training.conftest import make_base

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SETTINGS = [
    "train.max_steps=20",
    "train.batch_size=4",
    "method.initial_sd=0.3",
    "release.ks=[4]",
    "release.taus=[1, 10]",
    "release.map_rows=0",
]
KS = [0, 1, 4]
TOLERANCE = 1e-3


def rows(data_format: str, count: int, seed: int) -> list[dict[str, object]]:
    """Texts of six to nine words whose first word says the answer; choice rows have two to four choices.

    No text occurs twice in a file or beside another seed's: of equal rows rounding would decide which is the less familiar.
    """
    draw = random.Random(seed)
    words = ["red", "green", "blue", "cat", "dog"]
    result: list[dict[str, object]] = []
    for _ in range(count):
        text = " ".join(draw.choices(words, k=6 + seed % 4))
        if data_format == "label":
            result.append({"text": text, "label": "animal" if text.startswith(("cat", "dog")) else "colour"})
        else:
            choices = draw.sample(words, draw.randint(2, 4))
            result.append({"prompt": text, "choices": choices, "answer": draw.randrange(len(choices))})
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and, for each format, a released artifact, test rows and rows from elsewhere."""
    folder = tmp_path_factory.mktemp("served-evaluation")
    base = make_base(folder / "base", hidden_size=64, context=256)
    for name in ("label", "choices"):
        for seed, (part, count) in enumerate({"train": 24, "validation": 24, "test": 30, "ood": 10}.items()):
            lines = [json.dumps(row) for row in rows(name, count, seed)]
            (folder / f"{name}-{part}.jsonl").write_text("\n".join(lines) + "\n")
        files = (folder / f"{name}-{part}.jsonl" for part in ("train", "validation"))
        train(base, *files, "melora", folder / name, load_config(None, SETTINGS), 0)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Serves both artifacts."""
    adapters = {name: folder / name for name in ("label", "choices")}
    running = start(credence_command(folder / "base", adapters), folder / "server.log")
    yield running
    running.stop()


@pytest.mark.parametrize("name", ["label", "choices"])
def test_the_numbers_are_the_offline_ones(folder: Path, server: Server, name: str) -> None:
    arguments = (folder / name, folder / "base", folder / f"{name}-test.jsonl", folder / f"{name}-ood.jsonl", KS)
    offline = evaluate(*arguments)
    output = folder / f"{name}.json"
    command = ["eval", str(arguments[0]), "--base", str(arguments[1]), "--data", str(arguments[2])]
    options = [
        "--ood",
        str(arguments[3]),
        "--k",
        "0,1,4",
        "--engine",
        server.url,
        "--model",
        name,
        "--concurrency",
        "4",
        "--json",
        str(output),
    ]
    assert credence([*command, *options]) == 0
    served = json.loads(output.read_text())
    assert [served["adapter"], served["data"]] == [offline["adapter"], offline["data"]]
    assert len(served["results"]) == len(offline["results"]) == 2 * len(KS)
    for found, expected in zip(served["results"], offline["results"], strict=True):
        assert found["accuracy"] == expected["accuracy"]
        assert found == pytest.approx(expected, abs=TOLERANCE)
    by_k = {entry["k"]: entry for entry in offline["results"]}
    # The samples differ from the mean and from one another by more than the tolerance: the comparison can fail.
    assert abs(by_k[0]["nll"] - by_k[4]["nll"]) > 3 * TOLERANCE < abs(by_k[1]["nll"] - by_k[4]["nll"])
    assert by_k[4]["ood_auroc_epistemic"] is not None


def test_another_artifact_is_refused(folder: Path, server: Server) -> None:
    digests = {name: load_artifact(folder / name).digest for name in ("label", "choices")}
    ask = Served(connect=lambda: Client(server.url), model="choices")
    with pytest.raises(MetricError, match=f"{digests['choices']}, .* is {digests['label']}: serve the artifact"):
        evaluate(folder / "label", folder / "base", folder / "label-test.jsonl", server=ask)
    unknown = Served(connect=lambda: Client(server.url), model="lable")
    with pytest.raises(MetricError, match="no model 'lable'; it serves .*label"):
        evaluate(folder / "label", folder / "base", folder / "label-test.jsonl", server=unknown)


def test_more_samples_than_the_server_takes_are_refused_before_any_row(folder: Path, server: Server) -> None:
    ask = Served(connect=lambda: Client(server.url), model="label")
    with pytest.raises(MetricError, match="K is 9; the server takes at most 8 samples"):
        evaluate(folder / "label", folder / "base", folder / "label-test.jsonl", ks=[9], server=ask)
