"""`credence bench`: what samples cost, and what our server costs when nobody asks for uncertainty."""

import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from credence.cli.output import CommandError, JsonOption, needs_extra, say, write_json

if TYPE_CHECKING:
    from credence.benchmarks.workload import Workload

DTYPES = ("bfloat16", "float32")

app = typer.Typer(rich_markup_mode=None, help="Measure what posterior samples cost on this machine.")

BaseOption = Annotated[
    Path | None, typer.Option("--base", help="Folder of a base model.", show_default="a random Llama")
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", help="Artifact that fits --base.", show_default="random")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")]
PromptOption = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of every prompt.")]
NewOption = Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of every answer.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Compute threads of each competitor.", show_default="all cores but one"),
]
HiddenOption = Annotated[int, typer.Option("--hidden-size", help="Random model: width, a multiple of 128.")]
LayersOption = Annotated[int, typer.Option("--num-layers", min=1, help="Random model: layers.")]
IntermediateOption = Annotated[
    int | None,
    typer.Option(
        "--intermediate-size", min=1, help="Random model: width of the MLP.", show_default="10/3 of the width"
    ),
]
VocabularyOption = Annotated[int, typer.Option("--vocab-size", min=8, help="Random model: vocabulary.")]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables, with this command, to FILE.")
]


@app.command("k-curve")
def k_curve(
    k: Annotated[str, typer.Option("--k", help="Numbers of samples; 0 is the mean adapter.")] = "0,1,2,4,8,16,32",
    peft_k: Annotated[
        str, typer.Option("--peft-k", help="Numbers of samples of the transformers + PEFT loops; empty for none.")
    ] = "1,8",
    at_once_k: Annotated[
        str | None,
        typer.Option("--at-once-k", help="Numbers of samples of the rows with 8 requests at once.", show_default="--k"),
    ] = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "bfloat16",
    prompt_tokens: PromptOption = 32,
    new_tokens: NewOption = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 7,
    threads: ThreadsOption = None,
    hidden_size: HiddenOption = 768,
    intermediate_size: IntermediateOption = None,
    num_layers: LayersOption = 12,
    vocab_size: VocabularyOption = 4096,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curve as PNG.")] = None,
    markdown_file: MarkdownOption = None,
    json_file: JsonOption = None,
) -> None:
    """Latency, CPU time and throughput against the number of samples.

    One interleaved run of our server for every K, stock vLLM with the mean adapter, n = K answers of the mean, and
    loops over K samples in transformers + PEFT.

    \b
    Example:
      credence bench k-curve --plot k_curve.png --json k_curve.json
      credence bench k-curve --base models/llama --adapter out/triage --k 0,8
    """
    counts, peft_counts = _counts("--k", k), _counts("--peft-k", peft_k)
    _check_dtype(dtype)
    with needs_extra("bench"):
        import matplotlib  # noqa: F401  # now, not after the measurement

        from credence.benchmarks.k_curve import KCurveSettings, markdown, run_k_curve
        from credence.benchmarks.measure import default_threads
        from credence.benchmarks.plot import plot_k_curve
    try:
        settings = KCurveSettings(
            sample_counts=counts,
            peft_counts=peft_counts,
            at_once_counts=counts if at_once_k is None else _counts("--at-once-k", at_once_k),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            dtype=dtype,
            threads=threads or default_threads(),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with _ending_orderly(), tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch:
        workload = _workload(
            base,
            adapter,
            Path(scratch),
            prompt_tokens + new_tokens,
            hidden_size,
            intermediate_size,
            num_layers,
            vocab_size,
        )
        result = run_k_curve(workload, settings, _progress)
    if plot is not None:
        plot_k_curve(result, plot)
    _report(result, markdown, markdown_file, json_file)


@app.command("overhead")
def overhead(
    pairs: Annotated[int, typer.Option("--pairs", min=2, help="Pairs of identical requests, per model.")] = 60,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "bfloat16",
    prompt_tokens: PromptOption = 32,
    new_tokens: NewOption = 32,
    threads: ThreadsOption = None,
    hidden_size: HiddenOption = 768,
    intermediate_size: IntermediateOption = None,
    num_layers: LayersOption = 12,
    vocab_size: VocabularyOption = 4096,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the mean into the base, and measure that on both servers.")
    ] = False,
    markdown_file: MarkdownOption = None,
    json_file: JsonOption = None,
) -> None:
    """Cost of our server for requests without uncertainty, against stock vLLM.

    Pairs of identical requests, one to each server, in alternating order: for the mean adapter and for the base model, or
    with --merged for the model that holds the mean in its weights.

    \b
    Example:
      credence bench overhead --pairs 100 --json overhead.json
    """
    _check_dtype(dtype)
    with needs_extra("bench"):
        from credence.benchmarks.measure import default_threads
        from credence.benchmarks.overhead import OverheadSettings, markdown, run_overhead
        from credence.benchmarks.workload import merged_workload
    settings = OverheadSettings(
        pairs=pairs,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        dtype=dtype,
        threads=threads or default_threads(),
    )
    with _ending_orderly(), tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch:
        workload = _workload(
            base,
            adapter,
            Path(scratch),
            prompt_tokens + new_tokens,
            hidden_size,
            intermediate_size,
            num_layers,
            vocab_size,
        )
        if merged:
            workload = merged_workload(workload, Path(scratch) / "merged", dtype)
        result = run_overhead(workload, settings, _progress)
    _report(result, markdown, markdown_file, json_file)


@app.command("prompts")
def prompts(
    k: Annotated[str, typer.Option("--k", help="Numbers of samples; 0 is the mean adapter.")] = "0,1,8",
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the prompts.")] = "32,128,512",
    shared: Annotated[
        int, typer.Option("--shared", min=0, help="Tokens that prompts of the longest length share; 0 skips it.")
    ] = 480,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "bfloat16",
    new_tokens: NewOption = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 5,
    threads: ThreadsOption = None,
    hidden_size: HiddenOption = 768,
    intermediate_size: IntermediateOption = None,
    num_layers: LayersOption = 12,
    vocab_size: VocabularyOption = 4096,
    markdown_file: MarkdownOption = None,
    json_file: JsonOption = None,
) -> None:
    """Cost of K against the length of the prompt, and what a shared beginning saves.

    Every sample has its own keys and values, so a new prompt is computed K times; what prompts share is computed once
    for each sample and then read from vLLM's prefix cache.

    \b
    Example:
      credence bench prompts --k 0,8 --lengths 32,512 --shared 480
    """
    counts, tokens = _counts("--k", k), _counts("--lengths", lengths)
    _check_dtype(dtype)
    with needs_extra("bench"):
        from credence.benchmarks.measure import default_threads
        from credence.benchmarks.prompts import PromptSettings, markdown, run_prompts
    try:
        settings = PromptSettings(
            sample_counts=counts,
            lengths=tokens,
            shared=shared,
            new_tokens=new_tokens,
            rounds=rounds,
            dtype=dtype,
            threads=threads or default_threads(),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with _ending_orderly(), tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch:
        workload = _workload(
            base,
            adapter,
            Path(scratch),
            max(tokens) + new_tokens,
            hidden_size,
            intermediate_size,
            num_layers,
            vocab_size,
        )
        result = run_prompts(workload, settings, _progress)
    _report(result, markdown, markdown_file, json_file)


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise typer.BadParameter(f"{option} is {text!r}; give whole numbers, separated by commas") from None


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is {dtype!r}; choose from {', '.join(DTYPES)}")


def _workload(
    base: Path | None,
    adapter: Path | None,
    folder: Path,
    max_length: int,
    hidden_size: int,
    intermediate_size: int | None,
    num_layers: int,
    vocab_size: int,
) -> "Workload":
    from credence.benchmarks.workload import ModelShape, given_workload, random_workload

    if (base is None) != (adapter is None):
        raise typer.BadParameter("give --base and --adapter together, or neither for a random model")
    if base is not None and adapter is not None:
        return given_workload(base, adapter)
    try:
        shape = ModelShape(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size or 10 * hidden_size // 3,
            num_layers=num_layers,
            vocab_size=vocab_size,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return random_workload(folder, shape, max_length=max_length)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _ending_orderly() -> Iterator[None]:
    """Inside, SIGTERM ends the command like an interrupt does, so that the servers it has started are stopped."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(
    result: dict[str, Any],
    markdown: Callable[[Mapping[str, Any], str], str],
    markdown_file: Path | None,
    json_file: str | None,
) -> None:
    command = shlex.join(["credence", *sys.argv[1:]])
    result["command"] = command
    page = markdown(result, command)
    say(json_file, page)
    if markdown_file is not None:
        try:
            markdown_file.write_text(page)
        except OSError as error:
            raise CommandError(f"--markdown {markdown_file} cannot be written: {error.strerror}") from error
    write_json(json_file, result)
