"""`credence score`: how sure a running server's adapter is of a completion that exists already."""

import json
from typing import Annotated, Any

import typer

from credence.cli.ask import (
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    ApiKeyFileOption,
    GranularityOption,
    MinSamplesOption,
    ModelOption,
    NumSamplesOption,
    ReturnSamplesOption,
    SeedOption,
    StopConfidenceOption,
    TauOption,
    ThresholdOption,
    TimeoutOption,
    UncalibratedOption,
    UrlOption,
    connection,
    read_file,
    read_text,
    uncertainty_options,
    usage_errors,
)
from credence.cli.output import CommandError, JsonOption, write_json
from credence.cli.scores import show_scores, show_text


def score(
    model: ModelOption,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt; @FILE reads it from a file, - from standard input.")
    ] = None,
    completion: Annotated[
        str | None, typer.Option("--completion", help="What continues it, with its leading space; also @FILE or -.")
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            "--messages",
            metavar="FILE",
            help="Instead of both: a JSON list of chat messages, the last from the assistant; - is standard input.",
        ),
    ] = None,
    n_samples: NumSamplesOption = None,
    tau: TauOption = None,
    seed: SeedOption = None,
    granularity: GranularityOption = None,
    return_samples: ReturnSamplesOption = False,
    min_samples: MinSamplesOption = None,
    threshold: ThresholdOption = None,
    uncalibrated: UncalibratedOption = False,
    stop_confidence: StopConfidenceOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    json_file: JsonOption = None,
) -> None:
    """Score a completion you already have; nothing is generated.

    \b
    Example:
      credence score --prompt 'The capital of Switzerland is' --completion ' Berne' --model triage --granularity token
    """
    if [prompt, completion, messages].count("-") > 1:
        raise typer.BadParameter("standard input can be only one of --prompt, --completion and --messages")
    options = uncertainty_options(
        n_samples=n_samples,
        stop_confidence=stop_confidence,
        min_samples=min_samples,
        tau=tau,
        seed=seed,
        granularity=granularity,
        return_samples=return_samples,
        threshold=threshold,
        uncalibrated=uncalibrated,
    )
    scored: dict[str, Any] = {}
    if messages is not None:
        scored["messages"] = _messages(messages)
    if prompt is not None:
        scored["prompt"] = read_text(prompt)
    if completion is not None:
        scored["completion"] = read_text(completion)
    with connection(url, api_key_file, timeout_s) as client, usage_errors():
        answer = client.score(model=model, **scored, **options)
    write_json(json_file, answer.model_dump(mode="json", exclude_none=True))
    if json_file == "-":
        return
    if answer.uncertainty.tokens:
        show_text(_scored_text(scored), answer.uncertainty)
        print()
    show_scores(answer.uncertainty)


def _messages(source: str) -> Any:
    """Read the conversation; the client checks what is in it."""
    try:
        return json.loads(read_text("-") if source == "-" else read_file(source.removeprefix("@")))
    except json.JSONDecodeError as error:
        raise CommandError(
            f"--messages {source} is not JSON: {error.msg} in line {error.lineno}; give a list of "
            '{"role": ..., "content": ...}'
        ) from error


def _scored_text(scored: dict[str, Any]) -> str:
    text = scored["messages"][-1].get("content") if "messages" in scored else scored["completion"]
    return text if isinstance(text, str) else ""
