"""`credence import`: adapters from elsewhere become artifacts."""

from pathlib import Path
from typing import Annotated

import typer

from credence.cli.output import JsonOption, needs_extra, say, write_json
from credence.cli.training import SetOption


def import_(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SRC...", help="Folder of the adapter; of an ensemble all members.", show_default=False),
    ],
    format: Annotated[
        str, typer.Option("--format", help="peft, peft-monteclora, ivon-checkpoint or ensemble.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where the artifact goes.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option("--base", metavar="DIR_OR_HUB_ID", help="The base model, for methods that run it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Rows of the adapter's task (JSON Lines): anchors of the posterior.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option("--validation", help="Held-out rows: release the artifact at the end.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="Of format peft: tfb, another method without steps, or map.", show_default="tfb"),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file.")] = None,
    settings: SetOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Make an artifact of an adapter you have.

    peft: any plain PEFT LoRA; tfb puts a posterior around it with its base model and some rows, map stores it without one.
    peft-monteclora: PEFT's MonteCLoRA, with the posterior it learned. ivon-checkpoint: an unfinished IVON run's
    checkpoint-N. ensemble: several artifacts or PEFT LoRAs of one base model. What is not understood is refused.

    \b
    Example:
      credence import my-lora --format peft --base models/base --data anchors.jsonl --validation held_out.jsonl \\
        --output out/triage
    """
    with needs_extra("train"):
        from credence.training.config import load_config
        from credence.training.importers import ImportRequest, import_adapter
    request = ImportRequest(
        source=sources[0],
        others=tuple(sources[1:]),
        output=output,
        base=base,
        data=data,
        validation=validation,
        method=method,
        config=load_config(config, settings or ()),
        seed=seed,
    )
    digest = import_adapter(request, format)
    write_json(json_file, {"path": str(output), "digest": digest})
    say(json_file, f"wrote {output}, {digest}")
    if validation is None:
        say(json_file, "not released: tau and the calibration are not fitted; run `credence release`")
