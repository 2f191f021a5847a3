"""The grid of runs (kept, resumed, in processes, refused) and its summary against numbers worked out by hand."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from credence.training import robustness
from credence.training.errors import CheckpointError, ConfigError, TrainingError
from credence.training.grid import Cell, Grid, Study, plan
from credence.training.robustness import compare, read_cell, run, spread, summarise
from tests.training.conftest import QUICK, label_rows

SETTINGS = [setting for setting in QUICK if not setting.startswith(("train.batch_size", "release.ks"))]
MAP_GRID = Grid(learning_rates={"map": (0.001, 0.01)}, batch_sizes=(2, 4))


@pytest.fixture
def study(base: Path, train_file: Path, validation_file: Path, write: Callable[..., Path]) -> Callable[..., Study]:
    test_file = write("test.jsonl", label_rows(15, start=40))

    def make(grid: Grid = MAP_GRID, *settings: str, **own: list[str]) -> Study:
        return plan(
            base,
            train_file,
            validation_file,
            test_file,
            grid,
            ks=(0, 2),
            settings=[*SETTINGS, *settings],
            own_settings=own,
        )

    return make


class Counted:
    """The real training, counted; it fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cells: list[tuple[str, float, int, int]] = []
        self.errors: dict[tuple[float, int], BaseException] = {}
        self.train = robustness.train
        monkeypatch.setattr(robustness, "train", self)

    def __call__(self, base: Any, data: Any, validation: Any, method: str, output: Any, config: Any, seed: int) -> Any:
        where = (config.train.learning_rate, config.train.batch_size)
        self.cells.append((method, *where, seed))
        if where in self.errors:
            raise self.errors[where]
        return self.train(base, data, validation, method, output, config, seed)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def results(cells: dict[Cell, dict[str, Any]]) -> dict[Cell, Any]:
    return {cell: document["results"] for cell, document in cells.items()}


def test_a_grid_is_run_once_and_what_is_missing_again(
    study: Callable[..., Study], trained: Counted, tmp_path: Path
) -> None:
    one, folder, lines = study(), tmp_path / "grid", list[str]()
    first = run(one, folder, say=lines.append)
    assert trained.cells == [("map", rate, size, 0) for size in (2, 4) for rate in (0.001, 0.01)]
    assert len(lines) == 4 and lines[0].startswith("1/4 map, learning rate 0.001, batch size 2, seed 0: accuracy ")
    for document in first.values():
        assert [(entry["k"], entry["tau"]) for entry in document["results"]] == [(0, 0), (0, 0), (2, 0), (2, 0)]
        assert document["results"][0]["temperature"] == 1 and document["failed"] is None
    assert len({json.dumps(found) for found in results(first).values()}) == 4
    (folder / "map-lr0.01-batch2-seed0.json").unlink()
    trained.cells.clear()
    again = run(one, folder, say=lines.append)
    assert trained.cells == [("map", 0.01, 2, 0)]
    assert results(again) == results(first)
    assert "3 of 4 cells are there" in lines
    assert not [path for path in folder.iterdir() if path.is_dir()], "no adapter is left behind"


def test_a_larger_grid_keeps_the_cells_of_the_smaller(
    study: Callable[..., Study], trained: Counted, tmp_path: Path
) -> None:
    run(study(), tmp_path / "grid", say=lambda _: None)
    trained.cells.clear()
    larger = dataclasses.replace(MAP_GRID, seeds=(0, 1), batch_sizes=(4,))
    run(study(larger), tmp_path / "grid", say=lambda _: None)
    assert trained.cells == [("map", 0.001, 4, 1), ("map", 0.01, 4, 1)]


def test_processes_give_the_numbers_of_one(study: Callable[..., Study], tmp_path: Path) -> None:
    grid = Grid(learning_rates={"map": (0.01,), "monteclora": (0.02,)}, batch_sizes=(4,))
    one = study(grid, monteclora=["method.epsilon=0.05"])
    alone = run(one, tmp_path / "alone", say=lambda _: None)
    together = run(one, tmp_path / "together", jobs=2, say=lambda _: None)
    assert results(alone) == results(together)
    assert list(alone) == list(together)


def test_errors_in_processes_name_their_cell(study: Callable[..., Study], tmp_path: Path) -> None:
    """ConfigError cannot be sent between processes as it is."""
    one = study(Grid(learning_rates={"ivon": (0.1,)}, batch_sizes=(4,)), "train.max_grad_norm=1")
    with pytest.raises(TrainingError, match="1 of 1 cells have no result.*ivon, learning rate 0.1.*max_grad_norm is 1"):
        run(one, tmp_path / "grid", jobs=2, say=lambda _: None)


def test_a_failed_cell_is_kept_with_its_reason(study: Callable[..., Study], trained: Counted, tmp_path: Path) -> None:
    one = study(Grid(learning_rates={"monteclora": (0.01, 1e10)}, batch_sizes=(4,)))
    lines: list[str] = []
    cells = run(one, tmp_path / "grid", say=lines.append)
    _, failed = cells.values()
    assert failed["failed"].startswith("the loss is nan at optimiser step") and failed["results"] == []
    assert "failed: the loss is nan" in lines[-1]
    (method,) = summarise(one, cells)["methods"]
    assert (method["cells"], method["failed"]) == (2, 1)
    trained.cells.clear()
    run(one, tmp_path / "grid", say=lines.append)
    assert trained.cells == [], "a failure is a result"


class Blown(TrainerCallback):  # type: ignore[misc]
    """Makes the adapter infinite after the last loss was seen."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad:
                parameter.data.fill_(float("inf"))


def test_an_adapter_that_the_last_step_blew_up_is_a_failed_cell(
    study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(robustness, "train", functools.partial(robustness.train, callbacks=[Blown()]))
    one = study(Grid(learning_rates={"map": (0.01,)}, batch_sizes=(4,)))
    (cell,) = run(one, tmp_path / "grid", say=lambda _: None).values()
    assert cell["failed"].startswith("the held-out NLL is nan at tau 0: lower train.learning_rate")


def test_an_error_that_is_no_result_is_tried_again(
    study: Callable[..., Study], trained: Counted, tmp_path: Path
) -> None:
    trained.errors[0.01, 2] = OSError("no space left")
    with pytest.raises(
        TrainingError, match="1 of 4 cells.*map, learning rate 0.01, batch size 2.*OSError: no space left"
    ):
        run(study(), tmp_path / "grid", say=lambda _: None)
    assert len(trained.cells) == 4, "the others ran"
    assert "no space left" in (tmp_path / "grid/map-lr0.01-batch2-seed0.log").read_text()
    trained.errors.clear()
    assert len(run(study(), tmp_path / "grid", say=lambda _: None)) == 4
    assert len(trained.cells) == 5


def test_an_interrupt_leaves_finished_cells(study: Callable[..., Study], trained: Counted, tmp_path: Path) -> None:
    trained.errors[0.001, 4] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(study(), tmp_path / "grid", say=lambda _: None)
    trained.cells.clear()
    trained.errors.clear()
    assert len(run(study(), tmp_path / "grid", say=lambda _: None)) == 4
    assert [cell[1:3] for cell in trained.cells] == [(0.001, 4), (0.01, 4)]


def test_cells_of_other_settings_or_data_are_refused(
    study: Callable[..., Study], trained: Counted, train_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "grid"
    run(study(), folder, say=lambda _: None)
    trained.cells.clear()
    with pytest.raises(CheckpointError, match="settings.lora.alpha was 8 and is now 4; choose another --output"):
        run(study(MAP_GRID, "lora.alpha=4"), folder, say=lambda _: None)
    with train_file.open("a") as file:
        file.write(json.dumps(label_rows(1)[0]) + "\n")
    with pytest.raises(CheckpointError, match="data.rows was 24 and is now 25"):
        run(study(), folder, say=lambda _: None)
    path = folder / "map-lr0.001-batch2-seed0.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(CheckpointError, match="cannot be read; delete it to run map, learning rate 0.001"):
        run(study(), folder, say=lambda _: None)
    assert trained.cells == []


def test_two_calls_do_not_share_a_folder(study: Callable[..., Study], tmp_path: Path) -> None:
    with robustness._locked(tmp_path), pytest.raises(CheckpointError, match="another process works in"):
        run(study(), tmp_path, say=lambda _: None)


@pytest.mark.parametrize(
    ("rates", "sizes", "settings", "message"),
    [
        ({"map": (0.1,), "ivon": (1.0, 3.0)}, (4,), (), r"numbers of learning rates differ \(map: 1, ivon: 2\)"),
        ({"map": (0.1, 0.1)}, (4,), (), r"learning rates of map are \[0.1, 0.1\]"),
        ({"map": (0.1,)}, (), (), "batch sizes are"),
        ({"map": (0.1,)}, (0,), (), "train.batch_size: .*greater than or equal to 1"),
        ({"map": (-0.1,)}, (4,), (), "train.learning_rate: .*greater than 0"),
        ({"mapp": (0.1,)}, (4,), (), "unknown method 'mapp'"),
        (
            {"map": (0.1,)},
            (4,),
            ("train.learning_rate=1",),
            "train.learning_rate is set, but it is an axis of the grid",
        ),
        ({"map": (0.1,)}, (4,), ("method.epsilon=1",), "unknown configuration key method.epsilon"),
    ],
)
def test_what_no_grid_can_be_is_refused(
    study: Callable[..., Study], rates: Any, sizes: Any, settings: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        study(Grid(learning_rates=rates, batch_sizes=sizes), *settings)


def test_settings_of_a_method_that_is_not_there_are_refused(study: Callable[..., Study]) -> None:
    with pytest.raises(ConfigError, match="settings for ivon, which is not among the methods: map"):
        study(MAP_GRID, ivon=["method.ess=1e6"])


def test_spread_by_hand() -> None:
    assert spread([0.5, 0.9, 0.6], larger_is_better=True) == pytest.approx(
        {"median": 0.6, "best": 0.9, "worst": 0.5, "spread": 0.4}
    )
    assert spread([1.0, 4.0, 2.0, 3.0], larger_is_better=False) == {
        "median": 2.5,
        "best": 1.0,
        "worst": 4.0,
        "spread": 3.0,
    }
    one = {"median": 0.5, "best": 0.5, "worst": 0.5, "spread": 0.0}
    assert spread([0.5], larger_is_better=True) == one


def test_a_failed_cell_moves_the_median_to_the_worse_side() -> None:
    assert spread([0.5, None, 0.9], larger_is_better=True) == pytest.approx(
        {"median": 0.5, "best": 0.9, "worst": 0.5, "spread": 0.4}
    )
    assert spread([1.0, None, 2.0], larger_is_better=False)["median"] == 2.0
    assert spread([1.0, None], larger_is_better=False)["median"] is None
    assert spread([None], larger_is_better=True) == dict.fromkeys(("median", "best", "worst", "spread"))


def exact_p(differences: list[float]) -> float:
    """Two-sided p of the signed-rank statistic by all 2^n signs of the non-zero differences, mid-ranks for ties."""
    sizes = [abs(d) for d in differences if d]
    ranks = [sum(other < size for other in sizes) + (sum(other == size for other in sizes) + 1) / 2 for size in sizes]
    seen = sum(rank for rank, d in zip(ranks, [d for d in differences if d], strict=True) if d > 0)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(ranks))]
    lower, upper = (sum(test) / len(sums) for test in ([s <= seen for s in sums], [s >= seen for s in sums]))
    return min(1.0, 2 * min(lower, upper))


@pytest.mark.parametrize(
    "differences",
    [[1.0, 2, 3, 4, 5, 6], [3.0, -1, 2, 4, -5], [1.0, 1, -1, 2, 2, 0, 3], [0.5, 0.5, 0.5, 0.5], [0.25], [0.25, 0]],
)
def test_the_paired_test_is_exact(differences: list[float]) -> None:
    found = compare(differences)
    assert found["p"] == pytest.approx(exact_p(differences), abs=1e-12)
    assert found["smallest_p"] == 2.0 ** (1 - sum(map(bool, differences)))


def test_paired_numbers_by_hand() -> None:
    found = compare([1.0, 2.0, 6.0])
    assert (found["pairs"], found["mean_difference"]) == (3, 3.0)
    assert found["standard_error"] == pytest.approx((14 / 2 / 3) ** 0.5)
    assert found["p"] == 0.25
    assert compare([0.25]) == {"pairs": 1, "mean_difference": 0.25, "standard_error": None, "p": 1.0, "smallest_p": 1.0}
    assert compare([0.0, 0.0]) == {"pairs": 2, "mean_difference": 0, "standard_error": 0, "p": 1.0, "smallest_p": 1.0}
    nothing = dict.fromkeys(("mean_difference", "standard_error", "p", "smallest_p"))
    assert compare([]) == {"pairs": 0, **nothing}


def test_rounding_does_not_part_equal_differences() -> None:
    assert 0.3 - 0.1 != 0.5 - 0.3
    assert compare([0.3 - 0.1, 0.3 - 0.1, 0.3 - 0.5, 0.4, 0.5])["p"] == 0.25, "0.3125 if the first two were smaller"


def test_the_summary_by_hand(study: Callable[..., Study]) -> None:
    """Two methods, two learning rates, two seeds; ivon failed once at its first rate and always at its second."""
    one = study(Grid(learning_rates={"map": (0.1, 0.2), "ivon": (1.0, 2.0)}, batch_sizes=(4,), seeds=(0, 1)))
    accuracy = {("map", 0): (0.5, 0.7), ("map", 1): (0.6, 0.9), ("ivon", 0): (0.8, None), ("ivon", 1): (None, None)}

    def document(value: float | None) -> dict[str, Any]:
        if value is None:
            return {"failed": "the loss is nan", "results": []}
        entries = [{"accuracy": value - 0.1 * index, "nll": 2 * value, "ece15": 0.1} for index in range(4)]
        return {"failed": None, "results": entries}

    cells = {cell: document(accuracy[cell.method, cell.rate_index][cell.seed]) for cell in one.grid.cells()}
    summary = summarise(one, cells)
    plain, ivon = summary["methods"]
    assert plain["failed"] == 0 and ivon["failed"] == 3
    assert [(entry["k"], entry["fitted"]) for entry in plain["predictions"]] == [
        (0, False),
        (0, True),
        (2, False),
        (2, True),
    ]
    assert plain["predictions"][0]["extrinsic"] == pytest.approx(0.65)
    assert plain["predictions"][0]["intrinsic"] == pytest.approx(1 / 1.3)
    assert plain["predictions"][3]["accuracy"] == pytest.approx(
        {"median": 0.35, "best": 0.6, "worst": 0.2, "spread": 0.4}
    )
    assert ivon["predictions"][0]["extrinsic"] is None and ivon["predictions"][0]["intrinsic"] is None
    assert ivon["predictions"][0]["accuracy"]["worst"] == 0.8
    first = summary["comparisons"][0]
    assert (first["method"], first["against"], first["metric"]) == ("ivon", "map", "accuracy")
    assert (first["pairs"], first["left_out"], first["standard_error"]) == (1, 1, None)
    assert first["mean_difference"] == pytest.approx(0.3), "seed 0 at the first rate alone"
    assert len(summary["comparisons"]) == 8
    json.dumps(summary, allow_nan=False)


def test_seeds_are_averaged_before_they_are_paired(study: Callable[..., Study]) -> None:
    one = study(Grid(learning_rates={"map": (0.1,), "ivon": (1.0,)}, batch_sizes=(2, 4), seeds=(0, 1)))
    gain = {(2, 0): 0.1, (2, 1): 0.3, (4, 0): 0.4, (4, 1): 0.6}
    cells = {}
    for cell in one.grid.cells():
        value = 0.2 + (gain[cell.batch_size, cell.seed] if cell.method == "ivon" else 0)
        cells[cell] = {"failed": None, "results": [{"accuracy": value, "nll": 1.0, "ece15": 0.1}] * 4}
    found = summarise(one, cells)["comparisons"][0]
    assert found["pairs"] == 2
    assert found["mean_difference"] == pytest.approx(0.35) and found["standard_error"] == pytest.approx(0.15)


def test_a_cell_that_is_not_there(study: Callable[..., Study], tmp_path: Path) -> None:
    one = study()
    assert read_cell(one, one.grid.cells()[0], tmp_path) is None
