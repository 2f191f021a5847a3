"""`credence train`, `credence release` and `credence eval`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from credence.cli.ask import DEFAULT_TIMEOUT_S, ApiKeyFileOption, TimeoutOption, connection
from credence.cli.output import JsonOption, make_folder, needs_extra, print_table, say, warn, write_json, write_lines

if TYPE_CHECKING:
    from credence.training.release import ReleaseResult

BaseOption = Annotated[str, typer.Option("--base", metavar="DIR_OR_HUB_ID", help="The base model.", show_default=False)]
DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The artifact.", show_default=False)]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Rows per forward pass.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as train.max_steps=400; repeatable."),
]
EVAL_COLUMNS = {
    "k": "K",
    "tau": "tau",
    "temperature": "T",
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece15": "ECE15",
    "brier": "Brier",
    "error_auroc": "error AUROC",
    "aurc": "AURC",
    "ood_auroc_total": "OOD AUROC total",
    "ood_auroc_epistemic": "OOD AUROC epistemic",
    "mean_tokens": "tokens",
    "stopped": "stopped",
}


def train(
    base: BaseOption,
    data: Annotated[Path, typer.Option("--data", help="Training rows (JSON Lines).", show_default=False)],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="map, monteclora, ivon, melora, blob, laplace, swa, swag, mcdropout, ensemble or tfb.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where the artifact goes.", show_default=False)
    ],
    validation: Annotated[
        Path | None, typer.Option("--validation", help="Held-out rows: release the artifact at the end.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file; an artifact's config.yaml repeats its run.")
    ] = None,
    settings: SetOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Train an adapter and write its artifact.

    Rows are recognised by their fields: {"text","label"}, {"prompt","choices","answer"}, {"prompt","completion"} or
    {"messages"}.

    \b
    Example:
      credence train --base models/base --data train.jsonl --validation validation.jsonl \\
        --method ivon --output out/triage --set train.max_steps=400
    """
    with needs_extra("train"):
        from credence.training.config import load_config
        from credence.training.distributed import is_first_process
        from credence.training.loop import train as fit
    result = fit(
        base,
        data,
        validation,
        method,
        output,
        load_config(config, settings or ()),
        seed,
        resume,
        progress=sys.stderr.isatty(),
    )
    if not is_first_process():
        return
    document = {"path": str(output), "digest": result.digest, "seconds": result.seconds, "metrics": result.metrics}
    write_json(json_file, document)
    say(json_file, f"wrote {output}, {result.digest}, trained in {result.seconds:.1f} s")
    if validation is None:
        say(json_file, "not released: tau and the calibration are not fitted; run `credence release`")


def release(
    directory: DirectoryArgument,
    base: BaseOption,
    validation: Annotated[Path, typer.Option("--validation", help="Held-out rows (JSON Lines).", show_default=False)],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file; its section release is used.")] = None,
    settings: SetOption = None,
    batch_size: BatchSizeOption = 64,
    json_file: JsonOption = None,
) -> None:
    """Fit tau and the calibration, and write them into DIR.

    Both are fitted on held-out rows for every K in use; the size of the noise is checked against the serving dtype.

    \b
    Example:
      credence release out/triage --base models/base --validation validation.jsonl
    """
    with needs_extra("train"):
        from credence.training.config import load_config
        from credence.training.release import release as fit
    result = fit(
        directory,
        base,
        validation,
        load_config(config, settings or ()).release,
        batch_size=batch_size,
        say=_progress,
    )
    write_json(json_file, {"path": str(directory), "digest": result.digest, **result.metrics()})
    say(json_file, f"released {directory}, {result.digest}")
    _say_fits(json_file, result)


def evaluate(
    directory: DirectoryArgument,
    base: BaseOption,
    data: Annotated[Path, typer.Option("--data", help="Test rows (JSON Lines).", show_default=False)],
    ood: Annotated[Path | None, typer.Option("--ood", help="Rows from elsewhere, of the same format.")] = None,
    k: Annotated[str, typer.Option("--k", metavar="K,K,...", help="Numbers of samples; 0 is the mean.")] = "0,10",
    tau: Annotated[
        str, typer.Option("--tau", metavar="fitted|T,T,...", help="Posterior temperatures of K > 0.")
    ] = "fitted",
    token_samples: Annotated[
        bool, typer.Option("--token-samples", help="Also answer with K tokens drawn from the mean, for comparison.")
    ] = False,
    generate: Annotated[
        str | None,
        typer.Option("--generate", metavar="VERIFIER", help="Write an answer; check it: exact, squad, number, python."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest generated answer.")] = 256,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated programs here (--generate python).")
    ] = False,
    batch_size: BatchSizeOption = 64,
    engine: Annotated[
        str,
        typer.Option("--engine", metavar="hf|URL", help="hf computes here, a URL asks the server that serves DIR."),
    ] = "hf",
    model: Annotated[str | None, typer.Option("--model", help="With a URL: name of the adapter there.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="With a URL: rows under way at once.")] = 16,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    resamples: Annotated[
        int, typer.Option("--bootstrap", min=0, help="Bootstrap samples of 95 % intervals in the JSON; 0 for none.")
    ] = 0,
    rows_file: Annotated[
        Path | None, typer.Option("--rows", metavar="FILE", help="Write every row's scores (JSON Lines).")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Write a page and a Markdown file with figures.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure accuracy, likelihood and calibration.

    Also how well the scores detect errors and, with --ood, inputs from elsewhere. Every K is reported at temperature 1
    and at its fitted temperature.

    \b
    Example:
      credence eval out/triage --base models/base --data test.jsonl --ood other.jsonl --k 0,10 --json result.json
      credence eval out/triage --base models/base --data test.jsonl --k 0,1,2,4,8,16,32 --bootstrap 1000 --report out/report
      credence eval out/triage --base models/base --data test.jsonl --engine http://localhost:8000 --model triage
      credence eval out/sums --base models/base --data gsm8k.jsonl --generate number --token-samples
    """
    ks, taus = _parse_ks(k), _parse_taus(tau)
    if (engine == "hf") != (model is None):
        raise typer.BadParameter("--engine URL and --model NAME belong together; give both, or neither")
    if generate is not None and (ood is not None or report is not None):
        raise typer.BadParameter("--generate has no --ood rows and no --report; leave one of them out")
    with needs_extra("train"):
        from credence.training.evaluate import measure
        from credence.training.generation import measure_generation
        from credence.training.rows import row_documents
        from credence.training.served import Server
        from credence.training.verifiers import verifier, warning
    if report is not None:
        # Before the work starts: neither a missing package nor a folder that cannot be written shall cost an evaluation.
        with needs_extra("report"):
            from credence.training.report.write import write_report
        make_folder(report, "--report")
    server = None
    if model is not None:
        server = Server(
            connect=lambda: connection(engine, api_key_file, timeout_s), model=model, concurrency=concurrency
        )
    evaluation = None
    if generate is not None:
        caution = warning(verifier(generate, allow_code_execution=allow_code_execution))
        if caution is not None:
            warn(caution)
        written = measure_generation(
            directory,
            base,
            data,
            generate,
            ks,
            taus,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            token_samples=token_samples,
            allow_code_execution=allow_code_execution,
            server=server,
        )
        rows, result = written.row_documents(), written.document(resamples)
    else:
        evaluation = measure(
            directory, base, data, ood, ks, taus, batch_size=batch_size, token_samples=token_samples, server=server
        )
        rows, result = row_documents(evaluation), evaluation.document(resamples)
    if rows_file is not None:
        write_lines(rows_file, "--rows", rows)
    write_json(json_file, result)
    if report is not None and evaluation is not None:
        command = shlex.join(["credence", *sys.argv[1:]])
        say(
            json_file,
            f"wrote {write_report(report, evaluation, result, name=directory.resolve().name, command=command)}",
        )
    if json_file != "-":
        entries = [*result["results"], *result.get("token_samples", [])]
        columns = [name for name in EVAL_COLUMNS if any(entry.get(name) is not None for entry in entries)]
        body = [[_number(entry[name]) for name in columns] for entry in result["results"]]
        for entry in result.get("token_samples", []):
            cells = [_number(entry[name]) for name in columns if name not in ("k", "tau", "temperature")]
            body.append(
                [f"{entry['k']} {'texts' if generate else 'tokens'}", *["-"] * (len(columns) - len(cells) - 1), *cells]
            )
        print_table([EVAL_COLUMNS[name] for name in columns], body)


def _parse_ks(text: str) -> list[int]:
    try:
        ks = [int(part) for part in text.split(",")]
    except ValueError:
        ks = [-1]
    if min(ks) < 0:
        raise typer.BadParameter(f"--k is {text!r}; give whole numbers of 0 or more, for example 0,10")
    return ks


def _parse_taus(text: str) -> "list[float | Literal['fitted']]":
    taus: list[float | Literal["fitted"]] = []
    for part in text.split(","):
        try:
            tau: float | Literal["fitted"] = "fitted" if part.strip() == "fitted" else float(part)
        except ValueError:
            tau = -1.0
        if tau != "fitted" and not 0.0 <= tau < float("inf"):
            raise typer.BadParameter(f"--tau is {text!r}; give `fitted` or numbers of 0 or more, for example 0.1,1,10")
        taus.append(tau)
    return taus


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_fits(json_file: str | None, result: "ReleaseResult") -> None:
    for k, temperature in sorted(result.calibration.temperature.items()):
        tau = f"tau {result.tau[k].value:.4g}, " if k in result.tau else ""
        name = f"K = {k}" if k else "mean"
        say(json_file, f"{name}: {tau}T {temperature.value:.3f}, held-out NLL {temperature.nll:.4f}")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
