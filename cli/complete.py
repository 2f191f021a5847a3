"""`credence complete`: one prompt to a running server, and its answer with the scores."""

from typing import TYPE_CHECKING, Annotated, Any

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
    read_text,
    uncertainty_options,
    usage_errors,
)
from credence.cli.output import JsonOption, write_json
from credence.cli.scores import for_screen, print_token_table, show_scores, show_text

if TYPE_CHECKING:
    from credence.clients import Client


def complete(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The prompt; @FILE reads it from a file, - from standard input.")
    ],
    model: ModelOption,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Ask for the uncertainty of the answer.")] = False,
    n_samples: NumSamplesOption = None,
    mode: Annotated[str | None, typer.Option("--mode", help="ensemble, score, choices or generate.")] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", metavar="LABEL", help="With mode choices: a label, once for each of them."),
    ] = None,
    length_normalized: Annotated[
        bool, typer.Option("--length-normalized", help="With mode choices: divide log-probabilities by lengths.")
    ] = False,
    tau: TauOption = None,
    seed: SeedOption = None,
    granularity: GranularityOption = None,
    return_samples: ReturnSamplesOption = False,
    min_samples: MinSamplesOption = None,
    threshold: ThresholdOption = None,
    uncalibrated: UncalibratedOption = False,
    stop_confidence: StopConfidenceOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated.")] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Sampling temperature, 0 is greedy.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    json_file: JsonOption = None,
) -> None:
    """Ask a running server, and show how sure it is.

    \b
    Example:
      credence complete $'Text: hello\\nLabel:' --model triage --uncertainty --max-tokens 1
      credence complete @question.txt --model triage --uncertainty --mode choices --choice yes --choice no
    """
    if stream and json_file is not None:
        raise typer.BadParameter("--stream prints the answer while it comes, --json needs all of it; leave one out")
    # The client checks the values and names the allowed ones.
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
    options |= {
        "model": model,
        "uncertainty": uncertainty,
        "mode": mode,
        "choices": choice,
        "length_normalized": length_normalized or None,
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    text = read_text(prompt)
    with connection(url, api_key_file, timeout_s) as client:
        if stream:
            _stream(client, text, options, chat=chat)
            return
        with usage_errors():
            answer = client.chat(_message(text), **options) if chat else client.complete(text, **options)
    write_json(json_file, answer.model_dump(mode="json", exclude_none=True))
    if json_file == "-":
        return
    show_text(answer.text, answer.uncertainty)
    if answer.uncertainty is not None:
        print()
        show_scores(answer.uncertainty)


def _stream(client: "Client", text: str, options: dict[str, Any], *, chat: bool) -> None:
    """Print the text as it arrives, and what is known about it at the end."""
    with usage_errors():
        stream = client.stream_chat(_message(text), **options) if chat else client.stream_complete(text, **options)
    with stream:
        try:
            for chunk in stream:
                print(for_screen(chunk.text), end="", flush=True)
        finally:
            print()
    scores = stream.uncertainty
    if scores is None:
        return
    if scores.tokens:
        print_token_table(scores.tokens)
    print()
    show_scores(scores)


def _message(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]
