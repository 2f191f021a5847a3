"""Every recipe: its settings are accepted, it runs end to end on the tiny base, and its page holds paper and ours side by side."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from credence.training.data import DataFormat
from credence.training.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingError
from credence.training.generation import measure_generation
from credence.training.methods import method_class, method_settings
from credence.training.recipes import (
    Outcome,
    Recipe,
    Reproduction,
    document,
    load_recipe,
    page,
    recipe_names,
    recipe_text,
    reproduce,
)
from credence.training.recipes.page import cells, mean_and_error
from credence.training.recipes.recipe import AVERAGE, METRIC, ROBUSTNESS, Generate, Grid, parse_recipe
from credence.training.recipes.run import over_cells
from credence.training.tasks import TASKS
from tests.training.conftest import make_base
from tests.training.encoders import make_encoder

Table = Callable[..., Reproduction]


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with room for a multiple-choice prompt in bytes."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny", context=256)


@pytest.fixture(scope="module")
def encoder_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa."""
    return make_encoder(tmp_path_factory.mktemp("base") / "encoder")


def task_rows(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Short rows in a task's format."""
    if TASKS[name].format is DataFormat.LABEL:
        return [{"text": f"x{seed}{i}", "text_b": f"y{i}", "label": "AB"[i % 2]} for i in range(count)]
    if TASKS[name].format is DataFormat.COMPLETION:
        tested = {"test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"} if name == "humaneval" else {}
        return [
            {"prompt": f"{seed}+{i}=", "completion": f"{i % 3}", "answer": f"{i % 3}", **tested} for i in range(count)
        ]
    return [{"prompt": f"{seed} {i}?", "choices": ["a", "b", "c"][: 2 + i % 2], "answer": i % 2} for i in range(count)]


@pytest.fixture
def table(tmp_path: Path, wide_base: Path, encoder_base: Path) -> Table:
    """Writes data of the tasks named and makes a reduced reproduction of one seed."""

    def build(name: str, prepared: tuple[str, ...], **options: Any) -> Reproduction:
        for task in prepared:
            folder = tmp_path / "data" / task
            if folder.exists():
                continue
            folder.mkdir(parents=True)
            for seed, split in enumerate(TASKS[task].files):
                lines = (json.dumps(row) + "\n" for row in task_rows(task, 9, seed))
                (folder / f"{split}.jsonl").write_text("".join(lines))
        recipe = load_recipe(name)
        # Few points of tau: the fit itself is tested elsewhere.
        common = {**recipe.common, "release": {"ks": [10], "taus": [1.0], "max_rows": 8, "map_rows": 0}}
        reduced: dict[str, Any] = {"common": common}
        if recipe.grid:
            reduced["grid"] = Grid(learning_rates=(1e-3, 1e-1), batch_sizes=(2, 8))
        if recipe.generate:
            reduced["generate"] = Generate(max_new_tokens=4)
        chosen: dict[str, Any] = {"rows": 8, "steps": 4, "seeds": 1, **options}
        return Reproduction(
            name=name,
            recipe=recipe.model_copy(update=reduced),
            text=recipe_text(name),
            base=str(encoder_base if recipe.encoder else wide_base),
            data=tmp_path / "data",
            output=tmp_path / "out",
            **chosen,
        )

    return build


SMALL: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "ivon-table-1": (("arc_easy",), None),
    "ivon-table-2": (("boolq",), None),
    "melora-in-distribution": (("openbookqa",), ("ensemble", "blob")),
    "melora-out-of-distribution": (("openbookqa", "mmlu_physics"), ("melora",)),
    "monteclora-robustness": (("rte",), None),
    "monteclora-generation": (("gsm8k",), None),
}
"""Tasks and adapters of the end-to-end run: all adapters of some recipe, few of each."""


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_its_settings_are_the_methods_own(name: str) -> None:
    recipe = load_recipe(name)
    for key, adapter in recipe.adapters.items():
        for task in recipe.trained:
            settings = method_settings(adapter.method, recipe.config(key, task).method)
            assert isinstance(settings, method_class(adapter.method).settings_class)
    assert {line.adapter for line in recipe.lines} == set(recipe.adapters)
    assert any(line.published for line in recipe.lines) == (name != "monteclora-generation")


def test_settings_of_single_tasks_reach_the_training() -> None:
    # Seed facts of the IVON paper, written down a second time.
    published = {
        "winogrande_s": (1e7, 3e-4),
        "arc_challenge": (1e6, 1e-3),
        "arc_easy": (1e6, 1e-3),
        "winogrande_m": (1e8, 3e-4),
        "openbookqa": (1e6, 1e-3),
        "boolq": (1e7, 3e-4),
    }
    for name in ("ivon-table-1", "ivon-table-2"):
        recipe = load_recipe(name)
        for task, expected in published.items():
            config = recipe.config("ivon", task)
            assert (config.method["ess"], config.method["hess_init"]) == expected
            assert (config.train.learning_rate, config.train.max_steps, config.train.batch_size) == (0.03, 10_000, 4)
            assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16, 0.1)
    assert load_recipe("ivon-table-1").config("adamw", "boolq").train.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown configuration key ivon-table-1.colour"),
        ({"tasks": ["arc"]}, "'arc' is not one of winogrande_s"),
        ({"metrics": ["f1"]}, "'f1' is not one of accuracy"),
        ({"train_on": "mmlu_physics"}, "mmlu_physics has no training rows"),
        ({"lines": [{"label": "x", "adapter": "none"}]}, "asks for 'none'"),
        ({"lines": [{"label": "x", "adapter": "ivon", "published": {"rte": {"nll": 1}}}]}, "published numbers for rte"),
        ({"adapters": {"ivon": {"method": "sgd"}}}, "unknown method 'sgd'"),
        ({"adapters": {"ivon": {"method": "ivon", "around": "map"}}}, "is around 'map'"),
        ({"adapters": {"ivon": {"method": "ivon", "settings": {"method": {"lam": 1}}}}}, "unknown configuration key method.lam"),
        ({"common": {"train": {"step": 1}}}, "unknown configuration key train.step"),
        ({"metrics": ["extrinsic"]}, "extrinsic and intrinsic need a grid"),
        ({"grid": {"learning_rates": [1e-3], "batch_sizes": [4]}}, "and these only, need over"),
        ({"lines": [{"label": "x", "adapter": "ivon", "over": "best"}]}, "and these only, need over"),
        ({"tasks": ["gsm8k"]}, "gsm8k: tasks of free text (gsm8k, humaneval), and these only, need generate"),
        ({"generate": {"max_new_tokens": 4}}, "and these only, need generate"),
        ({"tasks": ["gsm8k"], "generate": {"max_new_tokens": 4}, "lines": [{"label": "x", "adapter": "ivon", "tempered": True}],
          "adapters": {"ivon": {"method": "ivon"}}}, "line x is tempered; free text has no such temperature"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused(change: Mapping[str, Any], message: str) -> None:
    recipe = yaml.safe_load(recipe_text("ivon-table-1"))
    recipe["lines"] = [line for line in recipe["lines"] if line["adapter"] == "ivon"]
    recipe["adapters"] = {"ivon": recipe["adapters"]["ivon"]}
    parse_recipe(yaml.safe_dump(recipe), "ivon-table-1")
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_recipe(yaml.safe_dump({**recipe, **change}), "ivon-table-1")


def test_unknown_names_are_refused(table: Table) -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'table-1'; allowed: ivon-table-1"):
        load_recipe("table-1")
    with pytest.raises(ConfigError, match="--methods names 'sgd'; the recipe has adamw"):
        reproduce(table("ivon-table-1", (), adapters=("sgd",)))
    with pytest.raises(ConfigError, match="--tasks names 'rte'; the recipe has winogrande_s"):
        reproduce(table("ivon-table-1", (), tasks=("rte",)))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_end_to_end(name: str, table: Table) -> None:
    tasks, adapters = SMALL[name]
    asked = table(name, tasks, adapters=adapters)
    outcome = reproduce(asked)
    assert outcome.tasks == tasks and set(outcome.missing) == set(asked.recipe.tasks) - set(tasks)
    found = cells(asked, outcome)
    for cell in found:
        assert (cell.ours is None) == (cell.task == AVERAGE), cell
        assert cell.difference is None or cell.difference == pytest.approx(cell.ours - cell.paper)  # type: ignore[operator]
    text = page(asked, outcome)
    assert text.startswith("**A reduced run and no reproduction: at most 8 rows a file, 4 steps a training.**\n")
    published = {number for line in asked.recipe.lines for by in line.published.values() for number in by.values()}
    printed = {cell.paper for cell in found} - {None}
    assert printed <= published and (printed == published or adapters or set(tasks) != set(asked.recipe.tasks))
    for line in asked.recipe.lines:
        assert (f"| {line.label} | " in text) == (line.adapter in outcome.adapters)
    json.dumps(document(asked, outcome), allow_nan=False)


def test_best_and_median_of_a_grid_are_those_of_its_run_files(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = table("monteclora-robustness", ("rte",))
    outcome = reproduce(asked)
    runs = asked.output / "runs"
    names = [f"rte-monteclora-0-{rate}-{size}" for rate in ("0.001", "0.1") for size in (2, 8)]
    assert {path.stem for path in runs.iterdir() if "monteclora" in path.stem} == set(names)
    documents = [json.loads((runs / f"{name}.json").read_text()) for name in names]
    assert [
        (
            run["config"]["train"]["learning_rate"],
            run["config"]["train"]["batch_size"],
            run["config"]["train"]["max_steps"],
        )
        for run in documents
    ] == [(1e-3, 2, 4), (1e-3, 8, 4), (0.1, 2, 4), (0.1, 8, 4)]
    lines = [run["results"]["rte"]["lines"]["MonteCLoRA, median"] for run in documents]
    accuracy, nll = sorted(line["accuracy"] for line in lines), sorted(line["nll"] for line in lines)
    assert len(set(nll)) == 4
    printed = {(cell.line, cell.metric): cell for cell in cells(asked, outcome) if cell.task == "rte"}
    assert printed["MonteCLoRA, best", "accuracy"].ours == pytest.approx(100 * accuracy[3])
    assert printed["MonteCLoRA, best", "nll"].ours == pytest.approx(nll[0])
    assert printed["MonteCLoRA, median", "accuracy"].ours == pytest.approx(100 * (accuracy[1] + accuracy[2]) / 2)
    assert printed["MonteCLoRA, median", "nll"].ours == pytest.approx((nll[1] + nll[2]) / 2)
    assert printed["MonteCLoRA, median", "extrinsic"].ours == printed["MonteCLoRA, median", "accuracy"].ours
    assert printed["MonteCLoRA, median", "intrinsic"].ours == pytest.approx(2 / (nll[1] + nll[2]))
    assert ("MonteCLoRA, best", "extrinsic") not in printed
    assert f"| MonteCLoRA, median | ours | {2 / (nll[1] + nll[2]):.2f} | - |\n" in page(asked, outcome)

    # Goes on with the one cell that is missing, whose training now fails: that is the worst of the four.
    import credence.training.recipes.run as module

    trained: list[str] = []

    def fails(*arguments: Any, **_: Any) -> None:
        trained.append(Path(arguments[4]).name)
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(module, "train", fails)
    assert reproduce(asked).results == outcome.results and not trained
    best = [line["nll"] for line in lines].index(nll[0])
    lost = names[best]
    (runs / f"{lost}.json").unlink()
    shutil.rmtree(asked.output / "adapters" / lost)
    again = reproduce(asked)
    assert trained == [lost] and again.failed == {lost: "the loss is not finite"}
    left = sorted(line["accuracy"] for index, line in enumerate(lines) if index != best)
    found = again.results["MonteCLoRA, median", "rte", 0]
    assert found["nll"] == pytest.approx((nll[2] + nll[3]) / 2)
    assert found["accuracy"] == found["extrinsic"] == pytest.approx((left[0] + left[1]) / 2)
    assert again.results["MonteCLoRA, best", "rte", 0]["nll"] == nll[1]
    assert f"worse than every other cell: {lost} (the loss is not finite)." in page(asked, again)
    assert reproduce(asked).results == again.results and len(trained) == 1  # a failure is a result and kept


def test_one_value_of_a_grid() -> None:
    cells = [{"accuracy": 0.5, "nll": 4.0}, {"accuracy": 0.9, "nll": 1.0}, {"accuracy": 0.7, "nll": 2.0}]
    for over, expected in (("median", (0.7, 2.0)), ("best", (0.9, 1.0)), ("worst", (0.5, 4.0))):
        found = over_cells(over, cells)  # type: ignore[arg-type]
        assert (found["accuracy"], found["nll"]) == expected
        assert (set(ROBUSTNESS) <= set(found)) == (over == "median")
    assert over_cells("median", cells)["extrinsic"] == 0.7 and over_cells("median", cells)["intrinsic"] == 0.5
    lost = over_cells("median", [*cells[:1], {}, {}])
    assert lost["accuracy"] is lost["nll"] is lost["extrinsic"] is lost["intrinsic"] is None


def test_texts_are_generated_and_verified(table: Table) -> None:
    asked = table("monteclora-generation", ("gsm8k", "humaneval"), adapters=("monteclora",), steps=1)
    asked = replace(
        asked, recipe=asked.recipe.model_copy(update={"tasks": ("gsm8k", "humaneval"), "train_on": "gsm8k"})
    )
    outcome = reproduce(asked)
    assert outcome.missing == {
        "humaneval": "humaneval runs generated programs on this machine: allow it with --allow-code-execution"
    }
    artifact, data = asked.output / "adapters" / "gsm8k-monteclora-0", asked.output / "data" / "gsm8k" / "test.jsonl"
    expected = measure_generation(artifact, asked.base, data, "number", [0, 10], 1.0, max_new_tokens=4).document()
    for label, entry in zip(("MonteCLoRA", "MonteCLoRA, K = 10"), expected["results"], strict=True):
        assert outcome.results[label, "gsm8k", 0] == entry
    allowed = replace(asked, allow_code_execution=True)
    both = reproduce(allowed)
    assert both.tasks == ("gsm8k", "humaneval") and both.results.items() >= outcome.results.items()
    assert both.results["MonteCLoRA", "humaneval", 0]["accuracy"] == 0  # four bytes are no program


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "monteclora-robustness",
            "needs an encoder such as FacebookAI/roberta-base, and .* is none; give another --base",
        ),
        (
            "ivon-table-2",
            "needs a causal language model such as meta-llama/.*, and .* is an encoder; give another --base",
        ),
    ],
)
def test_the_other_kind_of_base_is_refused(
    name: str, message: str, table: Table, wide_base: Path, encoder_base: Path
) -> None:
    asked = table(name, SMALL[name][0])
    other = wide_base if asked.recipe.encoder else encoder_base
    with pytest.raises(ModelError, match=message):
        reproduce(replace(asked, base=str(other)))
    assert not asked.output.exists()


def test_lines_of_one_adapter_are_what_evaluate_says_of_it(table: Table) -> None:
    from credence.training.evaluate import evaluate

    asked = table("ivon-table-2", ("arc_easy",))
    outcome = reproduce(asked)
    artifact, test = asked.output / "adapters" / "arc_easy-ivon-0", asked.output / "data" / "arc_easy" / "test.jsonl"
    for label, k, tau in (("tau = 0 (mean)", 0, 1.0), ("tau = 1.5", 10, 1.5), ("fitted tau", 10, "fitted")):
        expected = evaluate(artifact, asked.base, test, ks=[k], tau=tau)["results"][0]  # type: ignore[arg-type]
        assert outcome.results[label, "arc_easy", 0] == expected
    assert outcome.results["tau = 1.5", "arc_easy", 0]["nll"] != outcome.results["tau = 0.25", "arc_easy", 0]["nll"]


def test_a_finished_run_is_kept_and_an_interrupted_one_goes_on(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    import credence.training.recipes.run as module

    trained: list[str] = []
    train = module.train

    def counted(*arguments: Any, **options: Any) -> Any:
        trained.append(Path(arguments[4]).name)
        return train(*arguments, **options)

    monkeypatch.setattr(module, "train", counted)
    asked = table("ivon-table-1", ("arc_easy",), adapters=("laplace",))
    first = reproduce(asked)
    assert trained == ["arc_easy-adamw-0", "arc_easy-laplace-0"]  # what the posterior is put around is trained too
    assert reproduce(asked).results == first.results and len(trained) == 2
    (
        asked.output / "runs" / "arc_easy-laplace-0.json"
    ).unlink()  # stopped between training and the end of the evaluation
    assert reproduce(asked).results == first.results and len(trained) == 2
    more = reproduce(replace(asked, seeds=2))
    assert trained[2:] == ["arc_easy-adamw-1", "arc_easy-laplace-1"] and more.results.items() >= first.results.items()


def test_runs_with_other_settings_are_not_mixed(table: Table) -> None:
    asked = table("ivon-table-1", ("arc_easy",), adapters=("adamw",), steps=1)
    reproduce(asked)
    for change, message in (
        ({"rows": None}, r"rows 8 there and None now"),
        ({"steps": 2}, r"steps 1 there and 2 now"),
        ({"drop_long": True}, r"drop_long False there and True now"),
        ({"text": asked.text + "\n"}, "recipe_sha256"),
    ):
        with pytest.raises(CheckpointError, match=f"holds runs with other settings .*{message}"):
            reproduce(replace(asked, **change))
    other = asked.data / "arc_easy" / "train.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in task_rows("arc_easy", 9, seed=7)))
    with pytest.raises(CheckpointError, match=r"arc_easy-adamw-0.json holds runs with other settings \(train "):
        reproduce(asked)
    (asked.data.parent / "mine").mkdir()
    (asked.data.parent / "mine" / "thesis").touch()
    with pytest.raises(CheckpointError, match="holds no reproduction"):
        reproduce(replace(asked, output=asked.data.parent / "mine"))


def test_rows_that_are_too_long_are_an_error_or_counted(table: Table) -> None:
    asked = table("ivon-table-1", ("arc_easy",), adapters=("adamw",), rows=None, steps=1)
    path = asked.data / "arc_easy" / "train.jsonl"
    long = {"prompt": "why " * 70, "choices": ["a", "b"], "answer": 0}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    with pytest.raises(
        DataError,
        match=r"train.jsonl:10: has \d+ tokens, 256 are allowed \(1 of 10 rows are too long\); give --drop-long",
    ):
        reproduce(asked)
    dropping = replace(asked, drop_long=True, output=asked.output / "dropping")
    outcome = reproduce(dropping)
    assert outcome.left_out == {"arc_easy/train": (1, 10)}
    text = page(dropping, outcome)
    assert "longer than 256 tokens (--drop-long): 1 of 10 of arc_easy/train." in text
    kept = (dropping.output / "data" / "arc_easy" / "train.jsonl").read_text().splitlines()
    assert kept == path.read_text().splitlines()[:9]
    assert not (
        dropping.output / "data" / "arc_easy" / "test.jsonl"
    ).exists()  # files without long rows are used in place


def test_what_is_missing_is_said(table: Table) -> None:
    with pytest.raises(DataError, match="has none of the tasks of ivon-table-1: winogrande_s lacks train.jsonl"):
        reproduce(table("ivon-table-1", ()))
    with pytest.raises(DataError, match="openbookqa lacks train.jsonl, validation.jsonl, test.jsonl"):
        reproduce(table("melora-out-of-distribution", ("mmlu_physics",)))


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx((7 / 3) ** 0.5))  # variance (4 + 1 + 9) / 2 = 7, of three
    assert mean_and_error([4.0]) == (4.0, None)


def synthetic(recipe: Recipe, seeds: int) -> Outcome:
    """Results that are known: accuracy 0.7 + 0.1 seed of every task but the first, whose is 0.1 less."""
    results = {
        (line.label, task, seed): {name: 0.7 + 0.1 * seed - 0.1 * (index == 0) for name in METRIC}
        for line in recipe.lines
        for index, task in enumerate(recipe.tasks)
        for seed in range(seeds)
    }
    return Outcome(
        tasks=recipe.tasks,
        adapters=tuple(recipe.adapters),
        seeds=seeds,
        results=results,
        missing={},
        failed={},
        left_out={},
        max_length=512,
    )


def test_the_page_of_known_results(table: Table) -> None:
    asked = table("ivon-table-1", (), rows=None, steps=None, seeds=2)
    outcome = synthetic(asked.recipe, seeds=2)
    found = {(cell.line, cell.task, cell.metric): cell for cell in cells(asked, outcome)}
    cell = found["IVON@mean", AVERAGE, "accuracy"]
    # Averages over six tasks 68.333 and 78.333 %: mean 73.333, standard error 10 / sqrt(2) / sqrt(2) = 5.
    assert cell.paper == 78.9 and cell.ours == pytest.approx(73.3333, abs=1e-4)
    assert cell.standard_error == pytest.approx(5.0) and cell.difference == pytest.approx(-5.5667, abs=1e-4)
    text = page(asked, outcome)
    assert text.startswith("# ivon-table-1: ")  # a full run says nothing of a reduced one
    assert "| IVON@mean | paper | - | - | - | - | - | - | 78.90 |\n" in text
    ours = "| 65.00 +- 5.00 |" + " 75.00 +- 5.00 |" * 5 + " 73.33 +- 5.00 |\n"
    assert f"|  | ours {ours}|  | ours - paper | - | - | - | - | - | - | -5.57 |\n" in text
    assert f"| AdamW, fitted T | ours {ours}" in text
    partial = replace(outcome, results={key: value for key, value in outcome.results.items() if key[1] != "boolq"})
    found = {(cell.line, cell.task, cell.metric): cell for cell in cells(asked, partial)}
    assert found["IVON@mean", AVERAGE, "accuracy"].ours is None
    assert found["IVON@mean", "arc_easy", "accuracy"].ours == pytest.approx(75)


def test_published_numbers_are_those_of_our_sources() -> None:
    def published(name: str, task: str) -> dict[str, list[float]]:
        return {
            line.label: list(line.published[task].values())
            for line in load_recipe(name).lines
            if task in line.published
        }

    assert published("ivon-table-1", AVERAGE) == {
        "AdamW": [76.1, 21.8, 2.24],
        "+ MC-dropout": [76.3, 20.2, 2.01],
        "+ Laplace (KFAC)": [75.7, 7.3, 0.65],
        "+ SWAG": [77.2, 8.1, 0.60],
        "IVON@mean": [78.9, 17.2, 1.60],
        "IVON, K = 10": [77.8, 10.6, 1.11],
    }
    melora = {
        task: published("melora-in-distribution", task)["Me-LoRA, K = 10"] for task in load_recipe("ivon-table-1").tasks
    }
    assert [accuracy for accuracy, _ in melora.values()] == [66.15, 65.62, 84.93, 72.10, 81.78, 81.61]
    assert [error for _, error in melora.values()] == [9.13, 8.69, 7.08, 6.45, 4.87, 5.05]
    glue = [published("monteclora-robustness", task) for task in ("mrpc", "cola", "rte", "wic", "boolq_pairs")]
    assert [task["MonteCLoRA, best"] for task in glue] == [[91.2], [84.9], [81.2], [71.3], [79.9]]
    assert [task["MonteCLoRA, median"] for task in glue] == [[89.3], [84.3], [81.2], [69.2], [79.9]]
