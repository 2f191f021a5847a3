"""A small run on a really pretrained model and real data (needs CREDENCE_TEST_MODELS and CREDENCE_TEST_DATA)."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from credence.training.config import load_config
from credence.training.evaluate import evaluate
from credence.training.loop import train


def private(variable: str, name: str) -> Path:
    """A folder of the private test data."""
    root = os.environ.get(variable)
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"{variable} is not set to a folder holding {name}/")
    return Path(root) / name


@pytest.mark.slow
def test_clinc_domains_is_learned(write: Callable[..., Path], tmp_path: Path) -> None:
    base, data = private("CREDENCE_TEST_MODELS", "stories260K"), private("CREDENCE_TEST_DATA", "clinc_domains")
    files = {}
    for name, count in (("train", 200), ("validation", 40), ("test", 120), ("ood", 40)):
        rows = (data / f"{name}.jsonl").read_text().splitlines()
        random.Random(0).shuffle(rows)
        files[name] = write(f"{name}.jsonl", rows[:count])
    config = load_config(
        None,
        [
            "train.max_steps=80",
            "train.batch_size=16",
            "train.learning_rate=0.01",
            "release.ks=[4]",
            "release.taus=[10]",
        ],
    )
    result = train(base, files["train"], files["validation"], "monteclora", tmp_path / "adapter", config)
    report = evaluate(result.path, base, files["test"], files["ood"], ks=[0, 4])
    for entry in report["results"]:
        assert entry["accuracy"] > 0.25  # ten classes: chance is 0.1
        assert entry["nll"] < 2.25  # ln 10 = 2.30
        assert entry["ood_auroc_total"] > 0.5
