"""`credence reproduce`: a published table beside ours."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from credence.cli.output import JsonOption, needs_extra, print_table, say, warn, write_json


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe.", show_default=False)] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the recipes and exit.")] = False,
    base: Annotated[str | None, typer.Option("--base", metavar="DIR_OR_HUB_ID", help="The base model.")] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Folder of the tasks' folders.")] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Keeps runs and adapters.")] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=8, help="Most rows of a file; makes it a reduced run.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps a training; makes it a reduced run.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Number of seeds.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", metavar="A,B,...", help="Some of its adapters.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="A,B,...", help="Some of its tasks.")] = None,
    drop_long: Annotated[
        bool, typer.Option("--drop-long", help="Leave out rows longer than the base takes; the page counts them.")
    ] = False,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Evaluate tasks that run generated programs; they are left out otherwise."
        ),
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Train, release and evaluate the adapters of a published table, and print it beside ours.

    DIR of --data holds TASK/train.jsonl and so on, as `credence data` writes them; a task that is missing is left out and
    said. A finished run is kept in --output and not repeated; runs with other settings are refused.

    \b
    Example:
      credence reproduce ivon-table-1 --base meta-llama/Llama-2-7b-hf --data data --output out/ivon-table-1
      credence reproduce ivon-table-1 --base models/small --data data --output out/quick --rows 64 --steps 20 --seeds 1
      credence reproduce --list
    """
    with needs_extra("train"):
        from credence.training import recipes
        from credence.training.verifiers import VERIFIERS, warning
    if show_list:
        found = {recipe: recipes.load_recipe(recipe) for recipe in recipes.recipe_names()}
        write_json(json_file, {"recipes": {recipe: loaded.title for recipe, loaded in found.items()}})
        if json_file != "-":
            print_table(
                ["recipe", "table", "base", "tasks"],
                [[key, value.title, value.base, ", ".join(value.tasks)] for key, value in found.items()],
            )
        return
    if name is None or base is None or data is None or output is None:
        raise typer.BadParameter("NAME, --base, --data and --output are needed; --list shows the recipes")
    asked = recipes.Reproduction(
        name=name,
        recipe=recipes.load_recipe(name),
        text=recipes.recipe_text(name),
        base=base,
        data=data,
        output=output,
        rows=rows,
        steps=steps,
        seeds=seeds,
        adapters=_names(methods),
        tasks=_names(tasks),
        drop_long=drop_long,
        allow_code_execution=allow_code_execution,
    )
    caution = warning(VERIFIERS["python"]) if allow_code_execution else None
    if caution is not None:
        warn(caution)
    outcome = recipes.reproduce(asked, say=_progress)
    write_json(json_file, recipes.document(asked, outcome))
    say(json_file, recipes.page(asked, outcome))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
