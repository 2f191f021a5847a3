"""`credence data`: a published data set as training, validation and test files."""

from pathlib import Path
from typing import Annotated

import typer

from credence.cli.output import JsonOption, needs_extra, say, write_json


def data(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="Such as arc_easy; --help lists them.", show_default=False)
    ],
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder with the data set's splits.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="New folder.", show_default=False)],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the rows that are cut off training.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Write a task's train.jsonl, validation.jsonl and test.jsonl.

    SRC holds train.jsonl and so on, as `datasets.load_dataset(...)[split].to_json(...)` writes them. Rows that already
    have our format pass through. provenance.json says what became of what.

    Tasks: winogrande_s, winogrande_m, arc_challenge, arc_easy, openbookqa, boolq, mmlu_chemistry, mmlu_physics, mrpc,
    cola, rte, wic, boolq_pairs, gsm8k and humaneval.

    \b
    Example:
      credence data arc_easy exports/arc_easy --output data/arc_easy
    """
    with needs_extra("train"):
        from credence.training.tasks import prepare
        from credence.training.tasks import task as find
    prepared = prepare(find(task), source, output, seed)
    write_json(json_file, {"path": str(output), "rows": dict(prepared.rows), "provenance": dict(prepared.provenance)})
    counts = ", ".join(f"{count} {split}" for split, count in prepared.rows.items())
    say(json_file, f"wrote {output}: {counts} rows; {prepared.provenance['split_rule']}")
    for name, read in prepared.provenance["read"].items():
        if read["left_out"]:
            say(json_file, f"{name}: {read['left_out']} records of other subjects were left out")
    say(json_file, f"license: {prepared.provenance['license']}")
